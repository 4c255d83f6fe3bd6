"""The pool of connections to Postgres, and what it tells Prometheus. A process has one."""

from prometheus_client import Counter, Gauge
from sqlalchemy import exc
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import AsyncAdaptedQueuePool, PoolProxiedConnection

POOL_SIZE = Gauge("carillon_postgres_pool_size", "Connections that this process may have.")
POOL_CONNECTIONS = Gauge(
    "carillon_postgres_pool_connections",
    "Connections that this process has: in_use by a transaction or being made, or idle.",
    ["state"],
)
POOL_WAITING = Gauge("carillon_postgres_pool_waiting", "Transactions of this process that wait for a connection.")
POOL_TIMEOUTS = Counter(
    "carillon_postgres_pool_timeouts_total", "Transactions that got no connection within the pool_timeout setting."
)
CONNECTIONS_OPENED = Counter(
    "carillon_postgres_connections_opened_total", "Connections made; more than the pool's size: some were lost."
)
TRANSIENT_ERRORS = Counter(
    "carillon_postgres_transient_errors_total",
    "Transactions ended by a passing error: Postgres away or read-only, no connection free, deadlock, lock timeout.",
)

IN_USE, IDLE = "in_use", "idle"

for _state in (IN_USE, IDLE):
    POOL_CONNECTIONS.labels(_state)


class CountingPool(AsyncAdaptedQueuePool):
    """SQLAlchemy's pool, which does not say who waits."""

    def connect(self) -> PoolProxiedConnection:
        """A connection, when there is one."""
        POOL_WAITING.inc()
        try:
            return super().connect()
        except exc.TimeoutError:
            POOL_TIMEOUTS.inc()
            raise
        finally:
            POOL_WAITING.dec()


def show_pool(engine: AsyncEngine, *, size: int) -> None:
    """Have the gauges read this engine's pool whenever they are asked; `size` is what it may have."""
    POOL_SIZE.set(size)
    POOL_CONNECTIONS.labels(IN_USE).set_function(lambda: _in_use(engine))
    POOL_CONNECTIONS.labels(IDLE).set_function(lambda: _idle(engine))


def note_opened(*_: object) -> None:
    """A listener of the engine's `connect` event."""
    CONNECTIONS_OPENED.inc()


def has_room(engine: AsyncEngine) -> bool:
    """Whether a transaction would get a connection at once, or be allowed to make one."""
    pool = engine.sync_engine.pool
    return isinstance(pool, CountingPool) and pool.checkedout() < pool.size()


# SQLAlchemy makes a new pool when it disposes of one, so it is looked up each time.
def _in_use(engine: AsyncEngine) -> int:
    pool = engine.sync_engine.pool
    return max(0, pool.checkedout()) if isinstance(pool, CountingPool) else 0


def _idle(engine: AsyncEngine) -> int:
    pool = engine.sync_engine.pool
    return pool.checkedin() if isinstance(pool, CountingPool) else 0
