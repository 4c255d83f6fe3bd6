"""Stand-ins for services, to test the local stack without them: a migration, a process, /readyz, and nothing else."""

import os
import signal
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import FrameType

import psycopg


def main(name: str) -> None:
    """What `python -m` runs."""
    with psycopg.connect(os.environ["CARILLON_POSTGRES_URL"]) as connection:
        connection.execute(f"SELECT * FROM {name}.{name}")
    signal.signal(signal.SIGTERM, _end)
    server = HTTPServer((os.environ["CARILLON_HTTP_HOST"], int(os.environ["CARILLON_HTTP_PORT"])), _Ready)
    print(f"{name} is up as {os.getpid()}.", flush=True)
    server.serve_forever()


class _Ready(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/readyz" else 404)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def _end(_number: int, _frame: FrameType | None) -> None:
    print("drained", flush=True)
    raise SystemExit(0)
