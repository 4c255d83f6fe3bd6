"""An entity's timers that wait are found without its history; and which of them wait for no time of their own.

`is_on_hold` is what a generated column would be, but that one would write the whole table again. A trigger keeps it,
whoever writes: an older version pauses timers during a rollout.
"""

from alembic import op

revision = "0003"
down_revision = "0002"

_KEEP = """
ALTER TABLE timer ADD COLUMN IF NOT EXISTS is_on_hold boolean NOT NULL DEFAULT false;

CREATE OR REPLACE FUNCTION keep_on_hold() RETURNS trigger LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
BEGIN
    UPDATE timer SET is_on_hold = NOT is_on_hold WHERE id = NEW.id;
    RETURN NULL;
END $$;

CREATE OR REPLACE TRIGGER keep_on_hold AFTER INSERT OR UPDATE ON timer FOR EACH ROW
    WHEN (NEW.is_on_hold <> (NEW.state IN (2, 11))) EXECUTE FUNCTION keep_on_hold();
"""

_HELD = "UPDATE timer SET is_on_hold = true WHERE state IN (2, 11) AND NOT is_on_hold"

INDEXES = {
    "timer_of_entity": "timer (tenant, entity, fire_at)",
    "timer_on_hold": "timer (tenant, entity) WHERE is_on_hold",
}


def upgrade() -> None:
    """Timers go on being written meanwhile; what an attempt that was broken off left is made anew."""
    op.execute(_KEEP)
    with op.get_context().autocommit_block():
        op.execute(_HELD)  # It reads the whole table, so it must not have the lock of what comes before.
        for name, on in INDEXES.items():
            op.execute(f"DROP INDEX CONCURRENTLY IF EXISTS {name}")
            op.execute(f"CREATE INDEX CONCURRENTLY {name} ON {on}")
        op.execute("DROP INDEX CONCURRENTLY IF EXISTS timer_entity")
