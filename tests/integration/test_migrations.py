"""libs.migrations against a real Postgres."""

import threading
from datetime import timedelta
from pathlib import Path

import psycopg
import pytest
from pydantic import SecretStr
from sqlalchemy import Column, Index, Integer, MetaData, Table, Text

from libs import migrations
from libs.errors import Unavailable
from libs.settings import PostgresSettings

FIRST = '''"""Make bells."""
revision, down_revision = "0001", None
from alembic import op
import sqlalchemy as sa
def upgrade():
    op.create_table("bell", sa.Column("id", sa.Integer, primary_key=True), sa.Column("tone", sa.Text, nullable=False))
'''
SECOND = '''"""Find bells by tone."""
revision, down_revision = "0002", "0001"
from alembic import op
def upgrade():
    with op.get_context().autocommit_block():
        op.create_index("bell_tone", "bell", ["tone"], postgresql_concurrently=True)
'''
BROKEN = '''"""Fail half way."""
revision, down_revision = "0003", "0002"
from alembic import op
def upgrade():
    op.execute("ALTER TABLE bell ADD COLUMN half int")
    op.execute("SELECT 1 / 0")
'''


@pytest.fixture
def history(tmp_path: Path) -> Path:
    """A folder with two revisions."""
    (tmp_path / "0001_bells.py").write_text(FIRST)
    (tmp_path / "0002_tones.py").write_text(SECOND)
    return tmp_path


@pytest.fixture
def settings(postgres_url: str) -> PostgresSettings:
    """Settings of the test's own database."""
    return PostgresSettings(url=SecretStr(postgres_url))


def _tables_of(settings: PostgresSettings, schema: str) -> list[str]:
    with psycopg.connect(settings.url.get_secret_value()) as connection:
        query = "SELECT table_name FROM information_schema.tables WHERE table_schema = %s ORDER BY 1"
        return [name for (name,) in connection.execute(query, [schema])]


def test_migrating_makes_the_schema_once(settings: PostgresSettings, history: Path) -> None:
    """Everything, the version table too, is in the service's schema; a second run finds nothing to do."""
    assert migrations.upgrade(settings, "intake", history) == 2
    assert _tables_of(settings, "intake") == ["alembic_version", "bell"]
    assert _tables_of(settings, "public") == []
    assert migrations.upgrade(settings, "intake", history) == 0
    assert migrations.pending_revisions(settings, "intake", history) == ()


def test_schemas_have_histories_of_their_own(settings: PostgresSettings, history: Path) -> None:
    """Two services in one database do not see each other."""
    assert migrations.upgrade(settings, "intake", history) == 2
    assert migrations.pending_revisions(settings, "digest", history) == ("0001", "0002")
    assert migrations.upgrade(settings, "digest", history) == 2


def test_processes_that_migrate_at_once_take_turns(settings: PostgresSettings, history: Path) -> None:
    """One does the work, the others wait and find it done; an index built concurrently does not deadlock with them."""
    done: list[int] = []
    threads = [
        threading.Thread(target=lambda: done.append(migrations.upgrade(settings, "intake", history))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(done) == [0, 0, 0, 2]


def test_a_failed_revision_leaves_the_ones_before_it(settings: PostgresSettings, history: Path) -> None:
    """Each revision is a transaction; the next run starts at the failed one."""
    (history / "0003_broken.py").write_text(BROKEN)
    with pytest.raises(Exception, match="division by zero"):
        migrations.upgrade(settings, "intake", history)
    assert migrations.pending_revisions(settings, "intake", history) == ("0003",)
    with psycopg.connect(settings.url.get_secret_value()) as connection:
        query = "SELECT count(*) FROM information_schema.columns WHERE column_name = 'half'"
        assert connection.execute(query).fetchone() == (0,)


def test_a_newer_schema_is_left_alone(settings: PostgresSettings, history: Path) -> None:
    """After a rollback the older program runs on the newer schema."""
    migrations.upgrade(settings, "intake", history)
    (history / "0002_tones.py").unlink()
    assert migrations.upgrade(settings, "intake", history) == 0
    assert migrations.pending_revisions(settings, "intake", history) == ()


def test_a_busy_lock_ends_in_unavailable(settings: PostgresSettings, history: Path) -> None:
    """Nobody waits longer than migration_timeout for another process's migration."""
    impatient = settings.model_copy(update={"migration_timeout": timedelta(milliseconds=50)})
    with psycopg.connect(settings.url.get_secret_value()) as holder:
        holder.execute("SELECT pg_advisory_lock(hashtextextended('carillon migrate intake', 0))")
        with pytest.raises(Unavailable, match="still migrating"):
            migrations.upgrade(impatient, "intake", history)


def test_a_server_that_is_away_is_unavailable_to_migrations(settings: PostgresSettings, history: Path) -> None:
    """Which a process says in a line, and starts again."""
    away = settings.model_copy(update={"url": SecretStr("postgresql://postgres@127.0.0.1:1/x")})
    with pytest.raises(Unavailable, match="refused"):
        migrations.upgrade(away, "intake", history)
    with pytest.raises(Unavailable, match="refused"):
        migrations.pending_revisions(away, "intake", history)


def test_models_are_compared_with_the_migrated_schema(settings: PostgresSettings, history: Path) -> None:
    """A column, an index or a table on one side only is named."""
    migrations.upgrade(settings, "intake", history)
    metadata = MetaData()
    table = Table("bell", metadata, Column("id", Integer, primary_key=True), Column("tone", Text, nullable=False))
    with pytest.raises(AssertionError, match="bell_tone"):
        migrations.check_models_match(settings, "intake", metadata)
    Index("bell_tone", table.c.tone)
    migrations.check_models_match(settings, "intake", metadata)
