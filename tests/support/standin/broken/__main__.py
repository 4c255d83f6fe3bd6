"""A service that does not start."""

raise SystemExit("the bell has no clapper")
