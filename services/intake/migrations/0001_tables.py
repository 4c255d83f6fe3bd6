"""The tables of the first release."""

from alembic import op
from sqlalchemy import MetaData

from libs.links.schema import add_link_tables

revision = "0001"
down_revision = None

TABLES = (
    "CREATE SEQUENCE command_seq AS bigint",
    """
    CREATE TABLE idempotency (
        tenant text NOT NULL,
        key text NOT NULL,
        method text NOT NULL,
        fingerprint bytea NOT NULL,
        response bytea,
        created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
        PRIMARY KEY (tenant, key)
    ) WITH (fillfactor = 60)
    """,
    "CREATE INDEX idempotency_created_at ON idempotency (created_at)",
    """
    CREATE TABLE request (
        tenant text NOT NULL,
        id uuid NOT NULL,
        batch text NOT NULL,
        customer text NOT NULL,
        item text NOT NULL,
        providers text[] NOT NULL,
        payload text NOT NULL,
        submitted_at timestamptz NOT NULL,
        answer_by timestamptz NOT NULL,
        state smallint NOT NULL,
        responses integer NOT NULL,
        closed_at timestamptz,
        PRIMARY KEY (tenant, id)
    ) WITH (fillfactor = 80)
    """,
    "CREATE INDEX request_batch ON request (tenant, batch, id)",
    "CREATE INDEX request_customer ON request (tenant, customer, id)",
    "CREATE INDEX request_item ON request (tenant, item, id)",
    """
    CREATE TABLE response (
        tenant text NOT NULL,
        id uuid NOT NULL,
        request_id uuid NOT NULL,
        provider text NOT NULL,
        payload text NOT NULL,
        received_at timestamptz NOT NULL,
        PRIMARY KEY (tenant, id)
    )
    """,
    "CREATE INDEX response_request ON response (tenant, request_id, id)",
    """
    CREATE TABLE item_providers (
        tenant text NOT NULL,
        item text NOT NULL,
        providers text[] NOT NULL,
        PRIMARY KEY (tenant, item)
    )
    """,
)


def upgrade() -> None:
    """Create everything."""
    links = MetaData()
    add_link_tables(links)
    links.create_all(op.get_bind())
    for statement in TABLES:
        op.execute(statement)
