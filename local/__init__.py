"""Everything on one machine: embedded Postgres and NATS, the four services as processes, a mailbox."""
