"""The tables of a service in a database of a test's own, in a third of the time that migrating it takes.

The revisions are written down as one SQL script, by Alembic's own offline mode, and from then on only that is run. It
leaves what `libs.migrations.upgrade` leaves; tests/integration/test_fixtures.py compares them.
"""

import io
from functools import cache

import psycopg
from alembic.config import Config
from alembic.runtime.environment import EnvironmentContext
from alembic.script import ScriptDirectory
from psycopg import sql

from local.stack import PROJECT

_DESCRIPTION = """
    WITH relation AS (SELECT * FROM pg_class WHERE relnamespace = to_regnamespace(%(schema)s))
    SELECT concat_ws('.', relname, attname), concat_ws(
        ' ', format_type(atttypid, atttypmod), attnum, attnotnull, attidentity, attgenerated,
        pg_get_expr(adbin, adrelid))
    FROM relation JOIN pg_attribute ON attrelid = relation.oid AND attnum > 0
    LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
    UNION ALL SELECT relname, concat_ws(' ', relkind, relpersistence, reloptions::text) FROM relation
    UNION ALL SELECT relname, pg_get_indexdef(oid) FROM relation WHERE relkind = 'i'
    UNION ALL SELECT conname, concat_ws(' ', relname, pg_get_constraintdef(pg_constraint.oid))
    FROM pg_constraint JOIN relation ON conrelid = relation.oid
    UNION ALL SELECT proname, pg_get_functiondef(oid) FROM pg_proc WHERE pronamespace = to_regnamespace(%(schema)s)
    UNION ALL SELECT tgname, pg_get_triggerdef(pg_trigger.oid)
    FROM pg_trigger JOIN relation ON tgrelid = relation.oid
    UNION ALL SELECT 'revision', version_num FROM alembic_version
    ORDER BY 1, 2"""


def create_tables(url: str, service: str) -> None:
    """Create a service's schema with everything in it, in a database that has no tables of it."""
    with psycopg.connect(url, autocommit=True, options=f"-c search_path={service}") as connection:
        connection.execute(sql.SQL("CREATE SCHEMA IF NOT EXISTS {}").format(sql.Identifier(service)))
        connection.execute(_script(service).encode())


def described(url: str, service: str) -> list[tuple[str, str]]:
    """What there is in a service's schema: (name, definition) of everything, in order, to be compared."""
    with psycopg.connect(url, options=f"-c search_path={service}") as connection:
        return connection.execute(_DESCRIPTION, {"schema": service}).fetchall()


@cache
def _script(service: str) -> str:
    directory = str(PROJECT / "services" / service / "migrations")
    revisions = ScriptDirectory(directory, version_locations=[directory])
    written = io.StringIO()
    environment = EnvironmentContext(Config(), revisions)
    environment.configure(
        dialect_name="postgresql",
        as_sql=True,
        output_buffer=written,
        fn=lambda _revision, _context: revisions._upgrade_revs("head", "base"),
    )
    with environment.begin_transaction():
        environment.run_migrations()
    return written.getvalue().replace(" CONCURRENTLY", "")  # It cannot be in a script, and nobody writes meanwhile.
