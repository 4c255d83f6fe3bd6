"""A scheduler replica as the process it is in production, to be killed and paused."""

import os
import re
import sys
from datetime import timedelta
from pathlib import Path
from urllib.request import urlopen

from local.processes import Process, free_port

ROOT = Path(__file__).parents[2]


class SchedulerProcess(Process):
    """`python -m services.scheduler` on loopback; its replica's name contains `word`."""

    def __init__(self, name: str, directory: Path, *, url: str, nats_url: str, shards: int, ttl: timedelta) -> None:
        self._http_port = free_port()
        settings = {
            "CARILLON_POSTGRES_URL": url,
            "CARILLON_NATS_URL": nats_url,
            "CARILLON_SHARDS": str(shards),
            "CARILLON_HTTP_PORT": str(self._http_port),
            "CARILLON_SCHEDULER_LEASE_TTL": f"{ttl.total_seconds()}s",
            "CARILLON_LINK_REPUBLISH_AFTER": "1s",
        }
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("CARILLON_")}
        super().__init__(
            name,
            [sys.executable, "-m", "services.scheduler"],
            log=directory / f"{name}.log",
            env=inherited | settings,
            cwd=ROOT,
        )

    @property
    def word(self) -> str:
        """What is in its replica's name and in no other's."""
        return f"-{self.pid}-"

    def is_ready(self) -> bool:
        """Whether it serves."""
        try:
            with urlopen(f"http://127.0.0.1:{self._http_port}/readyz", timeout=1) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def metric(self, name: str) -> float:
        """The value of a metric without labels."""
        with urlopen(f"http://127.0.0.1:{self._http_port}/metrics", timeout=5) as answer:
            found = re.search(rf"^{name} (\S+)$", answer.read().decode(), re.MULTILINE)
        assert found is not None, f"there is no {name}"
        return float(found[1])
