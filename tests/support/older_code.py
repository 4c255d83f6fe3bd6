"""The code of an older revision, to be run beside today's: what a rollout does."""

import io
import subprocess
import tarfile
from pathlib import Path

from local.stack import PROJECT

_FAR_ENOUGH = 300
_CODE = ("services", "libs", "gen")


class NoHistory(Exception):
    """This is not a git checkout, or one without the revision before the newest migration."""


def newest_before_a_migration() -> str:
    """The newest revision that lacks a migration of the working tree's. Raises NoHistory."""
    now = {path.relative_to(PROJECT).as_posix() for path in PROJECT.glob("services/*/migrations/[0-9]*.py")}
    for revision in _git("rev-list", f"--max-count={_FAR_ENOUGH}", "HEAD").decode().split():
        files = _git("ls-tree", "-r", "--name-only", revision, "services").decode().splitlines()
        then = {name for name in files if Path(name).match("services/*/migrations/[0-9]*.py")}
        if then and now - then:
            return revision
    raise NoHistory(f"none of the {_FAR_ENOUGH} newest revisions that are here lacks a migration")


def extract(revision: str, directory: Path) -> None:
    """Put the services' code of a revision, with its stubs, into a directory."""
    archive = _git("archive", "--format=tar", revision, *_CODE)
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(directory, filter="data")


def _git(*arguments: str) -> bytes:
    try:
        done = subprocess.run(["git", "-C", str(PROJECT), *arguments], capture_output=True, check=False)
    except FileNotFoundError as err:
        raise NoHistory("there is no git") from err
    if done.returncode:
        raise NoHistory(done.stderr.decode().strip())
    return done.stdout
