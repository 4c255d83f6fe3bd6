"""The front door: makes what callers say durable, passes it on, and keeps the log of requests. See README.md."""
