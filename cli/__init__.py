"""The `carillon` command: what people and CronJobs type. It talks to the services through their gRPC APIs only."""
