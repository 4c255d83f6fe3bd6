"""Generates the Python stubs under gen/ from the contracts under proto/, or checks that the committed ones are fresh.

    python tools/protogen.py            writes gen/carillon
    python tools/protogen.py --check    exits 1 and names the files when gen/carillon differs from a fresh generation

protoc comes from grpcio-tools and the type stubs from mypy-protobuf, both pinned in requirements/dev.txt, so two
machines with the same pins write the same bytes. gen/carillon is replaced as a whole: a removed .proto leaves no stub.
"""

import argparse
import filecmp
import os
import shutil
import sys
import tempfile
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
WELL_KNOWN = Path(protoc.__file__).parent / "_proto"


class ProtocError(Exception):
    """protoc refused the contracts; it has printed why."""


def main() -> int:
    arguments = _parse_arguments()
    committed = arguments.out / "carillon"
    with tempfile.TemporaryDirectory() as scratch:
        try:
            fresh = generate(arguments.proto, Path(scratch))
        except ProtocError as error:
            print(error, file=sys.stderr)
            return 1
        if arguments.check:
            return _report(stale_files(fresh, committed))
        shutil.rmtree(committed, ignore_errors=True)
        shutil.copytree(fresh, committed)
    return 0


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Generate Python stubs from the contracts, or check them.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when the stubs are stale")
    parser.add_argument("--proto", type=Path, default=ROOT / "proto", help="where the contracts are")
    parser.add_argument("--out", type=Path, default=ROOT / "gen", help="where the package `carillon` is written")
    return parser.parse_args()


def generate(proto: Path, out: Path) -> Path:
    """Writes the stubs of every .proto under `proto` to `out` and returns `out`/carillon; raises ProtocError."""
    sources = sorted(str(path.relative_to(proto)) for path in proto.rglob("*.proto"))
    if not sources:
        raise ProtocError(f"no .proto file under {proto}")
    _put_plugins_on_path()
    outputs = [f"--{plugin}_out={options}{out}" for plugin, options in _PLUGINS]
    status = protoc.main(["protoc", f"-I{proto}", f"-I{WELL_KNOWN}", *outputs, *sources])
    if status != 0:
        raise ProtocError(f"protoc ended with status {status}")
    return _make_package(out / "carillon")


_PLUGINS = (
    ("python", ""),
    ("grpc_python", ""),
    ("mypy", "quiet:"),
    ("mypy_grpc", "quiet:"),
)


def _put_plugins_on_path() -> None:
    """protoc finds protoc-gen-mypy through PATH, and the virtual environment need not be activated."""
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


def _make_package(package: Path) -> Path:
    """Regular packages with a type marker: namespace packages would let mypy and wheel builds miss files."""
    for directory in [package, *(path for path in package.rglob("*") if path.is_dir())]:
        (directory / "__init__.py").write_text("")
    (package / "py.typed").write_text("")
    return package


def stale_files(fresh: Path, committed: Path) -> list[str]:
    """The files, relative and sorted, that are missing, superfluous or different in `committed`."""
    names = _files(fresh) | _files(committed)
    return sorted(name for name in names if not _same(fresh / name, committed / name))


def _files(package: Path) -> set[str]:
    paths = (path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {str(path.relative_to(package)) for path in paths}


def _same(one: Path, other: Path) -> bool:
    return one.is_file() and other.is_file() and filecmp.cmp(one, other, shallow=False)


def _report(stale: list[str]) -> int:
    if not stale:
        return 0
    print("Generated code is stale; run `make proto` and commit the result:", file=sys.stderr)
    for name in stale:
        print(f"  gen/carillon/{name}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
