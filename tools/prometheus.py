"""Finds Prometheus and promtool, or fetches Debian's without installing anything.

    python tools/prometheus.py            prints where both are, fetching them first if need be
    python tools/prometheus.py promtool   prints the path of one

What is on PATH wins. Otherwise Debian's package `prometheus` is downloaded by apt, which checks its signature, and
unpacked below the virtual environment: no root, no service that starts. Its binaries need nothing but libc. Where
there is no apt either, the error says what to install.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
UNPACKED = ROOT / ".venv" / "share" / "prometheus"
PROGRAMS = ("promtool", "prometheus")


class NotHere(Exception):
    """A program is not there and cannot be fetched; the message says what to do."""


def main() -> int:
    names = sys.argv[1:] or list(PROGRAMS)
    try:
        for name in names:
            print(program(name))
    except NotHere as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def program(name: str) -> Path:
    """The path of `promtool` or `prometheus`; raises NotHere. Safe to call from several processes at once."""
    if name not in PROGRAMS:
        raise NotHere(f"{name!r} is none of {', '.join(PROGRAMS)}.")
    if on_path := shutil.which(name):
        return Path(on_path)
    unpacked = UNPACKED / "usr" / "bin" / name
    if not unpacked.exists():
        _fetch()
    return unpacked


def _fetch() -> None:
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise NotHere(
                f"promtool and prometheus are not on PATH, and {tool} is not here to fetch them. Install Prometheus"
                " 2.42 or newer: with `brew install prometheus` on macOS, elsewhere as package or from its releases."
            )
    UNPACKED.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=UNPACKED.parent) as scratch:
        _run(["apt-get", "download", "--quiet=2", "prometheus"], cwd=Path(scratch))
        (package,) = Path(scratch).glob("prometheus_*.deb")
        _run(["dpkg-deb", "--extract", package.name, "unpacked"], cwd=Path(scratch))
        try:
            (Path(scratch) / "unpacked").rename(UNPACKED)
        except OSError:
            if not UNPACKED.exists():  # Else another process was faster.
                raise


def _run(command: list[str], *, cwd: Path) -> None:
    try:
        subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True, timeout=300)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        said = str(error.stderr or error.stdout or "").strip()
        raise NotHere(
            f"promtool and prometheus are not on PATH, and `{' '.join(command)}` failed: {said or error}\n"
            "Does `apt-get update` help? Otherwise install the package `prometheus`."
        ) from error


if __name__ == "__main__":
    raise SystemExit(main())
