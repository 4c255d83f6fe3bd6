"""Brings one service's schema to the newest revision, with Alembic, one history per schema.

A history is a folder of revision files, run in order, each in a transaction of its own; the version table is in the
schema it describes. Any number of processes may start this at once: an advisory lock lets one work while the others
wait and then find nothing to do. `lock_timeout` keeps a migration from queueing the whole service behind itself: it
gives up, nothing of that revision is done, and it is run again.

Forward only. A schema newer than this program (after a rollback of the program) is left as it is: revisions must work
with the program before them.

Everything here is blocking; it is run from `python -m services.<name> migrate`, before there is an event loop.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.environment import EnvironmentContext
from alembic.runtime.migration import MigrationContext, MigrationInfo
from alembic.script import ScriptDirectory
from alembic.script.revision import RevisionError
from alembic.util import CommandError
from sqlalchemy import Connection, Engine, MetaData, create_engine, exc, text
from sqlalchemy.pool import NullPool

from libs.errors import Unavailable
from libs.postgres import connect_args, engine_url, is_transient, unavailable
from libs.settings import PostgresSettings

_LOCK_POLL_S = 0.1

log = logging.getLogger(__name__)


@contextmanager
def _passing_errors_as_unavailable() -> Iterator[None]:
    try:
        yield
    except exc.DBAPIError as error:
        if is_transient(error):
            raise unavailable(error) from error
        raise


@_passing_errors_as_unavailable()
def upgrade(settings: PostgresSettings, schema: str, directory: Path) -> int:
    """Run the revisions in `directory` that `schema` has not had, creating the schema first; returns how many ran.

    Raises Unavailable when another process's migration is not over after `migration_timeout`, for Postgres's passing
    errors (`libs.postgres.is_transient`), and whatever else a revision raises; the revisions before that one stay.
    """
    engine = _engine(settings, schema)
    script = _script(directory)
    applied = 0

    def on_applied(*, step: MigrationInfo, **_: object) -> None:
        nonlocal applied
        applied += 1
        revision = step.up_revision_id
        log.info("Migrated.", extra={"schema": schema, "revision": revision, "about": _about(script, revision)})

    with _alone(engine, settings, schema), engine.connect() as connection:
        connection.execute(text(f'CREATE SCHEMA IF NOT EXISTS "{schema}"'))
        connection.commit()
        if not _is_known(script, connection, schema):
            return 0
        # What `alembic upgrade head` does, without an ini file and an env.py in each history.
        environment = EnvironmentContext(Config(), script)
        environment.configure(
            connection=connection,
            transaction_per_migration=True,
            on_version_apply=cast(Any, on_applied),  # It is called by keyword, and typed as if by position.
            fn=lambda heads, _: script._upgrade_revs("head", cast(str, heads)),
        )
        with environment.begin_transaction():
            environment.run_migrations()
    return applied


@_passing_errors_as_unavailable()
def pending_revisions(settings: PostgresSettings, schema: str, directory: Path) -> tuple[str, ...]:
    """The revisions that `upgrade` would run, oldest first; empty also when the schema is newer than `directory`.

    Raises Unavailable for Postgres's passing errors.
    """
    script = _script(directory)
    with _engine(settings, schema).connect() as connection:
        current = MigrationContext.configure(connection).get_current_heads()
        if not _is_known(script, connection, schema):
            return ()
        return tuple(revision.revision for revision in script.iterate_revisions("head", current))[::-1]


def check_models_match(settings: PostgresSettings, schema: str, metadata: MetaData) -> None:
    """For tests: raise AssertionError, naming each difference, unless the migrated schema is what `metadata` says.

    Compares tables, columns, types, nullability, server defaults, indexes, unique and foreign keys. Alembic does not
    see check constraints, nor the conditions of partial indexes.
    """
    with _engine(settings, schema).connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        differences = compare_metadata(context, metadata)
    if differences:
        lines = "\n".join(f"  {difference}" for difference in differences)
        raise AssertionError(f"The migrations of {schema} do not add up to its tables:\n{lines}")


def _engine(settings: PostgresSettings, schema: str) -> Engine:
    patient = settings.model_copy(update={"statement_timeout": settings.migration_timeout})
    return create_engine(engine_url(settings), connect_args=connect_args(patient, schema), poolclass=NullPool)


def _script(directory: Path) -> ScriptDirectory:
    return ScriptDirectory(str(directory), version_locations=[str(directory)])


def _about(script: ScriptDirectory, revision: str | None) -> str:
    return (revision and script.get_revision(revision).doc) or ""


def _is_known(script: ScriptDirectory, connection: Connection, schema: str) -> bool:
    heads = MigrationContext.configure(connection).get_current_heads()
    connection.rollback()  # Reading began a transaction.
    try:
        for head in heads:
            script.get_revision(head)
    except (RevisionError, CommandError):
        log.warning(
            "The schema is newer than this program and stays as it is.", extra={"schema": schema, "heads": heads}
        )
        return False
    return True


@contextmanager
def _alone(engine: Engine, settings: PostgresSettings, schema: str) -> Iterator[None]:
    """Hold the schema's advisory lock, on a session of its own.

    It is asked for again and again instead of waited for: a waiting statement holds a snapshot, which the lock's holder
    would wait for in CREATE INDEX CONCURRENTLY.
    """
    deadline = time.monotonic() + settings.migration_timeout.total_seconds()
    key = {"key": f"carillon migrate {schema}"}
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as session:
        is_waiting = False
        while not session.scalar(text("SELECT pg_try_advisory_lock(hashtextextended(:key, 0))"), key):
            if time.monotonic() > deadline:
                raise Unavailable(f"Another process is still migrating {schema} after {settings.migration_timeout}.")
            if not is_waiting:
                log.info("Waiting for another process's migration.", extra={"schema": schema})
                is_waiting = True
            time.sleep(_LOCK_POLL_S)
        yield  # Closing the session releases the lock, whatever happened.
