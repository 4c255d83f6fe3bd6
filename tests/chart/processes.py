"""What the code says about its processes: which variables each reads, what it serves, what it measures.

Taken from the code itself, so that the chart cannot name what is not there.
"""

import importlib
import os
import re
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any
from unittest import mock

import typer
from prometheus_client import CollectorRegistry

from cli.main import app
from libs.auth import refuse_open_server
from libs.service import BaseSettings
from libs.settings import HttpSettings, groups_of, load
from libs.telemetry.http import TelemetryHttp
from tests.chart.objects import Pod, environment, pods, runs_service, service_of
from tests.chart.rendering import ROOT, Rendered

SUFFIXES = ("_bucket", "_count", "_sum", "_created", "_total")
PLAUSIBLE = {"CARILLON_POSTGRES_URL": "postgresql://somebody:something@postgres/carillon"}


@cache
def variables_of(service: str) -> frozenset[str]:
    """The environment variables that a service reads."""
    return frozenset(
        group.variable_of(field) for group in groups_of(settings_class(service)) for field in group.model_fields
    )


def running(rendered: Rendered) -> Iterator[tuple[Pod, dict[str, Any], BaseSettings]]:
    """Every container that serves, with the settings that its process would read; SettingsError as on its start."""
    for pod in pods(rendered.objects):
        for container in filter(runs_service, pod.containers):
            settings = settings_from(str(service_of(container)), environment(container, rendered))
            yield pod, container, settings


def settings_from(service: str, variables: Mapping[str, str | None]) -> BaseSettings:
    """The settings as the service itself reads them; what a Secret fills gets something plausible."""
    ours = {name: value for name, value in variables.items() if name.startswith("CARILLON_")}
    filled = {name: PLAUSIBLE.get(name, "secret") if value is None else value for name, value in ours.items()}
    with mock.patch.dict(os.environ, filled, clear=True):
        settings = load(settings_class(service))
    refuse_open_server(settings.auth.mode, settings.grpc.host)
    return settings


@cache
def command_variables() -> frozenset[str]:
    """The environment variables that the command `carillon` reads."""
    return frozenset(_variables(typer.main.get_command(app)))


def parse_command(arguments: list[str]) -> dict[str, object]:
    """What `carillon` makes of a command line, without running it; raises click's UsageError."""
    context = typer.main.get_command(app).make_context("carillon", list(arguments))
    while isinstance(group := context.command, typer.core.TyperGroup):
        name, command, rest = group.resolve_command(context, [*context._protected_args, *context.args])
        assert command is not None
        context = command.make_context(name or "", rest, parent=context)
    return {"command": context.command_path, **context.params}


def http_paths() -> set[str]:
    """What a service's HTTP port answers."""

    async def readiness() -> dict[str, str | None]:
        return {}

    server = TelemetryHttp(HttpSettings(), registry=CollectorRegistry(), readiness=readiness)
    return {route.resource.canonical for route in server._app().router.routes() if route.resource is not None}


@cache
def metrics() -> frozenset[str]:
    """The names of all metrics in the code, as they are declared and as Prometheus stores them."""
    declared = set()
    for package in ("libs", "services"):
        for path in (ROOT / package).rglob("*.py"):
            declared |= set(re.findall(r'"(carillon_[a-z0-9_]+)"', path.read_text()))
    return frozenset(declared | {f"{name}{suffix}" for name in declared for suffix in SUFFIXES})


def metrics_in(expression: str) -> set[str]:
    """The names of ours in a PromQL expression."""
    return set(re.findall(r"\bcarillon_[a-z0-9_]+", expression))


@cache
def settings_class(service: str) -> type[BaseSettings]:
    """The dataclass that a service's `__main__` loads."""
    members = vars(importlib.import_module(f"services.{service}.settings")).values()
    (found,) = (
        one for one in members if isinstance(one, type) and one is not BaseSettings and issubclass(one, BaseSettings)
    )
    return found


def _variables(command: object) -> Iterator[str]:
    for parameter in getattr(command, "params", []):
        names = parameter.envvar or []
        yield from [names] if isinstance(names, str) else names
    for below in getattr(command, "commands", {}).values():
        yield from _variables(below)
