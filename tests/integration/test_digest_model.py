"""Digest against its naive model: random histories over a real Postgres; see digest_machine and digest_model."""

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest
from hypothesis import HealthCheck, Phase
from hypothesis import settings as how
from hypothesis.stateful import run_state_machine_as_test
from pydantic import SecretStr

from libs.postgres import Database
from libs.settings import PostgresSettings
from tests.integration.digest_beside import World
from tests.integration.digest_machine import DigestMachine
from tests.integration.digest_rig import Rig, migrate, replica

HISTORIES = int(os.environ.get("CARILLON_TEST_DIGEST_HISTORIES", "0"))
"""How many random histories; 0: the same few each time."""


@pytest.fixture
def world(postgres_url: str) -> Iterator[World]:
    """A replica on a loop of its own, because Hypothesis calls the machine from outside of any."""
    migrate(postgres_url)
    with asyncio.Runner() as runner:
        opened = _replica(postgres_url)
        rig = runner.run(opened.__aenter__())
        try:
            yield World(runner, rig)
        finally:
            runner.run(opened.__aexit__(None, None, None))


@asynccontextmanager
async def _replica(url: str) -> AsyncIterator[Rig]:
    address = url

    async def open_database(schema: str, url: str | None = None, **overrides: object) -> Database:
        settings = PostgresSettings(url=SecretStr(url or address)).model_copy(update=overrides)
        return await Database.connect(settings, schema)

    async with replica(url, open_database, render_windows=3) as rig:
        try:
            yield rig
        finally:
            await rig.db.close()


@pytest.mark.timeout(3600)
def test_inv6_inv7_random_histories_go_as_the_naive_model_says(world: World) -> None:
    """Every item in its one state, every window and message as the model has them, after every step."""
    run_state_machine_as_test(
        lambda: DigestMachine(world),  # type: ignore[arg-type]  # Hypothesis calls it, whatever it is.
        settings=how(
            max_examples=HISTORIES or 6,
            stateful_step_count=50,
            derandomize=not HISTORIES,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            print_blob=bool(HISTORIES),
            phases=[Phase.generate, *([Phase.shrink] if HISTORIES else [])],  # Minutes, as every step is real.
        ),
    )
