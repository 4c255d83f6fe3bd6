"""A real Prometheus that scrapes real services once a second and evaluates the chart's rules."""

import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import yaml

from local.processes import Process, free_port
from tools.prometheus import program

RULES = Path(__file__).resolve().parents[2] / "deploy/helm/carillon/files/alerts.yaml"
_READY_TIMEOUT_S = 30


class Refused(Exception):
    """Prometheus refused a query; the message says why."""


class Watcher:
    """Runs until the `with` block ends. All targets share one job: services are told apart by their metrics alone."""

    def __init__(self, directory: Path, targets: Sequence[str]) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._config = directory / "prometheus.yaml"
        self._config.write_text(
            yaml.safe_dump(
                {
                    "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
                    "rule_files": [str(RULES)] if RULES.exists() else [],
                    "scrape_configs": [{"job_name": "carillon", "static_configs": [{"targets": list(targets)}]}],
                }
            )
        )
        address = f"127.0.0.1:{free_port()}"
        self.url = f"http://{address}"
        self._process = Process(
            "prometheus",
            [
                str(program("prometheus")),
                f"--config.file={self._config}",
                f"--storage.tsdb.path={directory / 'data'}",
                f"--web.listen-address={address}",
                "--enable-feature=exemplar-storage",
                "--log.level=warn",
            ],
            log=directory / "prometheus.log",
        )

    def __enter__(self) -> Self:
        self._process.start()
        try:
            self._process.wait_until(self._is_ready, timeout_s=_READY_TIMEOUT_S)
        except BaseException:
            self._process.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stop()

    def now(self, expr: str, at: float | None = None) -> list[dict[str, Any]]:
        """The vector that an expression gives at an instant (Unix time); a scalar as one sample without labels."""
        answer = self._ask("query", {"query": expr, **({} if at is None else {"time": str(at)})})
        if answer["resultType"] == "scalar":
            return [{"metric": {}, "value": answer["result"]}]
        return list(answer["result"])

    def over(self, expr: str, start: float, end: float, step_s: float) -> list[dict[str, Any]]:
        """The series that an expression gives between two instants."""
        spanned = {"query": expr, "start": str(start), "end": str(end), "step": str(step_s)}
        return list(self._ask("query_range", spanned)["result"])

    def metrics(self) -> set[str]:
        """The names of all metrics there have been."""
        return set(self._ask("label/__name__/values", {}))

    def rules(self) -> list[dict[str, Any]]:
        """All rules, with how their last evaluation went."""
        return [rule for group in self._ask("rules", {})["groups"] for rule in group["rules"]]

    def _ask(self, what: str, parameters: Mapping[str, str]) -> Any:
        url = f"{self.url}/api/v1/{what}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=30) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise Refused(json.load(error)["error"]) from error

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/-/ready", timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False
