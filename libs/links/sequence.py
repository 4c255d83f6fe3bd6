"""Keeps a service's `command_seq` from ever giving a number again, also after Postgres has gone back in time.

Commands are put in order by their sequence. A restore from a backup, and a failover to a replica that lagged, set the
sequence back, while frames with higher numbers may still be in JetStream: commands accepted from then on would count as
older than those. So every new connection raises it to the database's time in microseconds, above all that was given
before: nobody takes a million numbers a second. After a failover all connections are new.
"""

_LOCK = "SELECT pg_advisory_xact_lock(hashtextextended('carillon command_seq ' || current_schema(), 0))"

# Read under the lock, or a slower connection would set it back. What others take meanwhile is far below the time.
_RAISE = """
    SELECT setval('command_seq', us)
    FROM (SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint AS us) AS now
    WHERE us > (SELECT last_value FROM command_seq)"""

RAISE_SEQUENCE = (_LOCK, _RAISE)
"""To be run on each new connection, in one transaction."""
