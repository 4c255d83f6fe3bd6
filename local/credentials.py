"""Makes the credentials of the compose stack, once: `python -m local.credentials DIRECTORY --owner 10001`.

| file                | what it is                                                          |
|---------------------|---------------------------------------------------------------------|
| `postgres-password` | the database's password                                             |
| `pgpass`            | the same, as libpq reads it (`passfile=` in an address)              |
| `token`             | a token for all calls, of the tenant `default`, with all rights      |
| `tokens.yaml`       | its hash, for the services (CARILLON_AUTH_TOKENS_FILE)               |

What is there already stays as it is, so that a stack that is started again keeps its database and its callers. Only the
owner can read the files.
"""

import argparse
import json
import os
import secrets
from pathlib import Path

from libs.auth import OPERATOR
from libs.auth_tokens import hash_token, new_token

_TENANT = "default"


def make_credentials(directory: Path, *, owner: int | None = None) -> None:
    """Write what is missing. `owner` is the user and group that the files are given to; only root can do that."""
    directory.mkdir(parents=True, exist_ok=True)
    password = _kept(directory / "postgres-password", secrets.token_urlsafe(32), owner)
    _kept(directory / "pgpass", f"*:*:*:*:{password}", owner)
    token = _kept(directory / "token", new_token(), owner)
    entry = {"name": "compose", "sha256": hash_token(token), "tenant": _TENANT, "roles": [OPERATOR]}
    _kept(directory / "tokens.yaml", json.dumps({"tokens": [entry]}), owner)


def _kept(path: Path, content: str, owner: int | None) -> str:
    """The file's content, which is `content` where there was no file."""
    if not path.exists():
        unfinished = path.with_suffix(".new")
        unfinished.unlink(missing_ok=True)
        unfinished.touch(mode=0o600)
        unfinished.write_text(content + "\n")
        if owner is not None:
            os.chown(unfinished, owner, owner)
        unfinished.rename(path)
    return path.read_text().strip()


def main() -> None:
    """Read the arguments and write."""
    parser = argparse.ArgumentParser(prog="python -m local.credentials")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--owner", type=int, help="user and group id that the files are given to")
    options = parser.parse_args()
    make_credentials(options.directory, owner=options.owner)


if __name__ == "__main__":
    main()
