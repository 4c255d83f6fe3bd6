"""The compose stack's credentials: made once, only for their owner, and fit for those who read them."""

import os
import stat
from pathlib import Path

import pytest
from psycopg.conninfo import conninfo_to_dict

from libs.auth import OPERATOR
from libs.auth_tokens import TokenFile
from local.credentials import make_credentials


async def test_the_token_is_the_one_that_the_services_take(tmp_path: Path) -> None:
    """With all rights, in the tenant that a caller without credentials would have locally."""
    make_credentials(tmp_path)
    tokens = TokenFile(tmp_path / "tokens.yaml", check_every_s=1)
    whom = await tokens.verify((tmp_path / "token").read_text().strip())
    assert (whom.tenant, whom.roles) == ("default", frozenset({OPERATOR}))


def test_the_password_file_is_one_that_libpq_reads(tmp_path: Path) -> None:
    """A single line for all databases, with nothing in the password that would have to be escaped."""
    make_credentials(tmp_path)
    password = (tmp_path / "postgres-password").read_text().strip()
    assert len(password) >= 40
    assert not set(password) & {":", "\\"}
    assert (tmp_path / "pgpass").read_text() == f"*:*:*:*:{password}\n"
    url = f"postgresql://carillon@postgres/carillon?passfile={tmp_path / 'pgpass'}"
    assert conninfo_to_dict(url)["passfile"] == str(tmp_path / "pgpass")


def test_only_the_owner_can_read_them(tmp_path: Path) -> None:
    """Every file, whatever the umask is; libpq refuses others, too."""
    before = os.umask(0)
    try:
        make_credentials(tmp_path)
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {"postgres-password": 0o600, "pgpass": 0o600, "token": 0o600, "tokens.yaml": 0o600}


def test_what_is_there_stays(tmp_path: Path) -> None:
    """A database keeps the password it was made with, and callers their token."""
    make_credentials(tmp_path)
    before = {path.name: path.read_text() for path in tmp_path.iterdir()}
    make_credentials(tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == before


def test_what_a_crash_left_unfinished_is_made_again_of_the_same(tmp_path: Path) -> None:
    """The password that was written belongs to the file that was not."""
    make_credentials(tmp_path)
    before = {path.name: path.read_text() for path in tmp_path.iterdir()}
    (tmp_path / "pgpass").rename(tmp_path / "pgpass.new")
    (tmp_path / "tokens.yaml").unlink()
    make_credentials(tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == before


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_root_gives_them_to_their_owner(tmp_path: Path) -> None:
    """The user that the containers run as."""
    make_credentials(tmp_path, owner=10001)
    assert {(path.stat().st_uid, path.stat().st_gid) for path in tmp_path.iterdir()} == {(10001, 10001)}
