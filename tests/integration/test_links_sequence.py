"""`command_seq` never gives a number again, although Postgres went back in time."""

from pydantic import SecretStr

from libs.links.sequence import RAISE_SEQUENCE
from libs.postgres import Database
from libs.settings import PostgresSettings
from tests.support.fixtures import OpenDatabase

_MICROSECONDS_A_MINUTE = 60_000_000


async def _next(db: Database) -> int:
    async with db.transaction() as tx:
        row = await (await tx.raw.execute("SELECT nextval('command_seq')")).fetchone()
    assert row is not None
    return int(row[0])


async def test_numbers_after_a_restore_are_above_all_before(postgres_url: str, open_database: OpenDatabase) -> None:
    """What was given before is forgotten; who connects then raises the sequence above it all the same."""
    plain = await open_database("intake")
    async with plain.transaction() as tx:
        await tx.raw.execute("CREATE SEQUENCE command_seq")
    settings = PostgresSettings(url=SecretStr(postgres_url))
    before = await Database.connect(settings, "intake", on_connect=RAISE_SEQUENCE)
    given = [await _next(before) for _ in range(3)]
    assert given == [given[0], given[0] + 1, given[0] + 2]
    await before.close()
    async with plain.transaction() as tx:
        await tx.raw.execute("SELECT setval('command_seq', 7)")
    assert await _next(plain) == 8
    after = await Database.connect(settings, "intake", on_connect=RAISE_SEQUENCE)
    assert given[-1] < await _next(after) < given[-1] + 10 * _MICROSECONDS_A_MINUTE
    await after.close()


async def test_a_connection_never_sets_the_sequence_back(postgres_url: str, open_database: OpenDatabase) -> None:
    """One that is ahead of the clock, on a machine whose clock was put right, stays where it is."""
    plain = await open_database("intake")
    async with plain.transaction() as tx:
        await tx.raw.execute("CREATE SEQUENCE command_seq")
        await tx.raw.execute("SELECT setval('command_seq', 9000000000000000000)")
    db = await Database.connect(PostgresSettings(url=SecretStr(postgres_url)), "intake", on_connect=RAISE_SEQUENCE)
    assert await _next(db) == 9000000000000000001
    await db.close()
