"""Imports point one way (DESIGN §10): `__main__ → app → {rpc, stream, store, loops} → core → libs`.

Modules are parsed, never imported. What is enforced:

- a service imports itself, libs and third parties; never another service, cli, local or tests;
- within a service a module imports only from layers below its own; the four edges do not import each other (app.py
  connects them through Protocols), core modules may;
- only the store and the migrations know SQL, only the stream NATS, only rpc and stream the stubs;
- core modules are pure: they import nothing that does I/O, waits, or reads a clock;
- libs know no service: of the contracts they may use only those that all services share;
- cli talks to the services through their APIs; nothing but the tests imports the tests.

An edge that outgrows one module is split by suffix (`store_windows.py` belongs to the store). Every module that is not
listed in LAYERS is a core module; the few that do I/O of their own stand in ADAPTERS with the reason.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


class Layer(IntEnum):
    """Higher imports lower."""

    BASE = 0
    CORE = 1
    METRICS = 2
    EDGE = 3
    APP = 4
    MAIN = 5


LAYERS = {
    "__init__": Layer.BASE,
    "errors": Layer.BASE,
    "settings": Layer.BASE,
    "metrics": Layer.METRICS,
    "rpc": Layer.EDGE,
    "stream": Layer.EDGE,
    "store": Layer.EDGE,
    "loops": Layer.EDGE,
    "app": Layer.APP,
    "__main__": Layer.MAIN,
}
SPLITTABLE = ("rpc", "stream", "store", "loops")

# Edges under a domain name: they speak a protocol of the outside world.
ADAPTERS = {
    ("dispatcher", "apprise"): "the channel through Apprise",
    ("dispatcher", "smtp"): "the SMTP channel",
    ("dispatcher", "traffic"): "rates and breakers, whose libraries keep time themselves",
    ("dispatcher", "unsubscribe_http"): "the page behind List-Unsubscribe",
    ("dispatcher", "webhook"): "the webhook channel",
}

SQL = {"sqlalchemy", "psycopg", "psycopg_pool", "alembic"}
NATS = {"nats"}
STUBS = {"carillon"}
SHARED_CONTRACTS = {"carillon.link", "carillon.explain"}
MAY_KNOW = {"store": SQL, "migrations": SQL, "stream": NATS | STUBS, "rpc": STUBS}

IMPURE = {
    *("asyncio", "http", "logging", "multiprocessing", "os", "select", "selectors", "signal", "smtplib", "socket"),
    *("ssl", "subprocess", "threading", "time", "urllib.request"),
    *("aiohttp", "aiosmtplib", "grpc", "opentelemetry", "prometheus_client", "stamina", "structlog", "uvloop"),
    *("libs.auth", "libs.clock", "libs.jetstream", "libs.lifecycle", "libs.migrations", "libs.postgres", "libs.rpc"),
    *("libs.rpc_client", "libs.telemetry"),
}
SQL_TEXT = re.compile(r"\s*(SELECT\s|INSERT\s+INTO\s|UPDATE\s+\S+\s+SET\s|DELETE\s+FROM\s|WITH\s+\w+\s+AS\b)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Module:
    """One parsed file; `name` is its dotted name, `services.intake.store` for example."""

    name: str
    tree: ast.Module
    is_package: bool

    @property
    def parts(self) -> list[str]:
        return self.name.split(".")


def test_imports_point_one_way() -> None:
    """No module of the repository imports against the arrows of DESIGN §10."""
    assert [str(violation) for violation in violations(ROOT)] == []


def violations(root: Path) -> Iterator[str]:
    """Every breach under `root`, as `module: sentence`; none for an empty tree."""
    for module in _modules(root):
        found = dict.fromkeys(_judge(module))
        yield from (f"{module.name}: {sentence}" for sentence in found)


def _modules(root: Path) -> Iterator[Module]:
    for package in ("libs", "services", "cli", "local"):
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            is_package = parts[-1] == "__init__"
            name = ".".join(parts[:-1] if is_package else parts)
            yield Module(name=name, tree=ast.parse(path.read_text()), is_package=is_package)


def _judge(module: Module) -> Iterator[str]:
    imports = list(_imports(module))
    match module.parts:
        case ["services", service, *_]:
            yield from _judge_service_module(module, service, imports)
        case [package, *_]:
            forbidden = {"libs": ("services", "cli", "local", "tests"), "cli": ("services", "tests")}
            yield from (
                f"imports {target}, and {package} knows no {target.split('.')[0]}"
                for target in imports
                if _is_in(target, forbidden.get(package, ("tests",)))
            )
            if package == "libs":
                stubs = (target for target in imports if _is_in(target, STUBS))
                yield from (
                    f"imports {target}, and libs know only shared contracts"
                    for target in stubs
                    if not _is_in(target, SHARED_CONTRACTS)
                )


def _judge_service_module(module: Module, service: str, imports: list[str]) -> Iterator[str]:
    role = _role(module.parts)
    layer = _layer(service, role)
    for target in imports:
        match target.split("."):
            case [("cli" | "local" | "tests") as package, *_]:
                yield f"imports {target}, and services know no {package}"
            case ["services", other, *_] if other != service:
                yield f"imports {target}, and services never import each other"
            case ["services", _, *below] if role != "migrations":
                yield from _judge_own_import(service, role, layer, _role(["services", service, *below]))
            case _:
                yield from _judge_knowledge(role, layer, target)
    if role not in ("store", "migrations") and any(_is_sql(text) for text in _strings(module.tree)):
        yield "holds SQL, and only the store knows SQL"


def _judge_own_import(service: str, role: str, layer: Layer, target: str) -> Iterator[str]:
    below = _layer(service, target)
    if below < layer or role == target or (layer == below == Layer.CORE):
        return
    yield f"imports {target} ({below.name}) from {layer.name}, and imports point downwards"


def _judge_knowledge(role: str, layer: Layer, target: str) -> Iterator[str]:
    if _is_in(target, (SQL | NATS | STUBS) - MAY_KNOW.get(role, set())):
        yield f"imports {target}, and only {_who_may(target)} may"
    elif layer <= Layer.CORE and role not in ("migrations", "settings", "__init__") and _is_in(target, IMPURE):
        yield f"imports {target}, and core modules are pure"


def _who_may(target: str) -> str:
    return " and ".join(sorted(role for role, known in MAY_KNOW.items() if _is_in(target, known)))


def _role(parts: list[str]) -> str:
    """`store` for services.digest.store, services.digest.store_windows and anything in services.digest.store/."""
    name = parts[2] if len(parts) > 2 else "__init__"
    return next((edge for edge in SPLITTABLE if name.startswith(f"{edge}_")), name)


def _layer(service: str, role: str) -> Layer:
    return Layer.EDGE if (service, role) in ADAPTERS else LAYERS.get(role, Layer.CORE)


def _is_in(target: str, packages: tuple[str, ...] | set[str]) -> bool:
    return any(target == package or target.startswith(f"{package}.") for package in packages)


def _imports(module: Module) -> Iterator[str]:
    """Dotted targets. `from a.b import c` gives a.b.c: c may be a module, and a longer name never hides a breach."""
    for node in ast.walk(module.tree):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=source, names=names, level=level):
                base = _absolute(module, source, level)
                yield from (f"{base}.{alias.name}" for alias in names)


def _absolute(module: Module, source: str | None, level: int) -> str:
    if level == 0:
        return source or ""
    depth = len(module.parts) - level + (1 if module.is_package else 0)
    return ".".join([*module.parts[:depth], *([source] if source else [])])


def _strings(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def _is_sql(text: str) -> bool:
    return SQL_TEXT.match(text) is not None


@pytest.mark.parametrize(
    ("path", "code", "breach"),
    [
        ("services/digest/rpc.py", "from services.intake import store", "services never import each other"),
        ("services/digest/windows.py", "import services.intake.requests", "services never import each other"),
        ("services/digest/windows.py", "from services.digest.store import Store", "imports point downwards"),
        ("services/digest/windows.py", "from . import store", "imports point downwards"),
        ("services/digest/windows.py", "from .metrics import OPEN", "imports point downwards"),
        ("services/digest/store.py", "from services.digest.rpc import Rpc", "imports point downwards"),
        ("services/digest/rpc_admin.py", "from services.digest.store_windows import S", "imports point downwards"),
        ("services/digest/rpc.py", "from services.digest.app import App", "imports point downwards"),
        ("services/digest/app.py", "from services.digest import __main__", "imports point downwards"),
        ("services/digest/rpc.py", "import sqlalchemy as sa", "only migrations and store may"),
        ("services/digest/rpc.py", "Q = 'SELECT id FROM item'", "only the store knows SQL"),
        ("services/digest/loops.py", "Q = f'INSERT INTO {x} VALUES (1)'", "only the store knows SQL"),
        ("services/digest/store.py", "from nats.aio.client import Client", "only stream may"),
        ("services/digest/store.py", "from carillon.digest.v1 import digest_pb2", "only rpc and stream may"),
        ("services/digest/app.py", "from carillon.digest.v1 import digest_pb2", "only rpc and stream may"),
        ("services/digest/windows.py", "import asyncio", "core modules are pure"),
        ("services/digest/windows.py", "from libs import clock", "core modules are pure"),
        ("services/digest/windows.py", "def f():\n    import time", "core modules are pure"),
        ("services/digest/windows.py", "from libs.telemetry.logs import log", "core modules are pure"),
        ("services/digest/errors.py", "import grpc", "core modules are pure"),
        ("services/digest/app.py", "from local.stack import Stack", "services know no local"),
        ("services/digest/app.py", "from tests.support import fakes", "services know no tests"),
        ("libs/rpc.py", "from services.digest import windows", "libs knows no services"),
        ("libs/links/frames.py", "from carillon.intake.v1 import intake_pb2", "libs know only shared contracts"),
        ("cli/main.py", "from services.digest import windows", "cli knows no services"),
        ("local/demo.py", "from tests.support import fakes", "local knows no tests"),
    ],
)
def test_a_planted_violation_is_found(tmp_path: Path, path: str, code: str, breach: str) -> None:
    """Each rule of this module bites: one planted breach gives exactly one finding that says what is wrong."""
    _plant(tmp_path, path, code)
    (found,) = violations(tmp_path)
    assert found.endswith(breach)


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("services/digest/__main__.py", "from services.digest.app import run"),
        ("services/digest/app.py", "from services.digest import loops, rpc, settings, store, stream"),
        ("services/digest/rpc.py", "import grpc\nfrom carillon.digest.v1 import digest_pb2\nfrom libs import rpc"),
        ("services/digest/rpc.py", "from services.digest import metrics, windows"),
        ("services/digest/stream.py", "import nats\nfrom carillon.link.v1 import link_pb2"),
        ("services/digest/store.py", "import psycopg\nfrom services.digest.windows import Window\nQ = 'SELECT 1'"),
        ("services/digest/store_windows.py", "from services.digest.store_tables import window"),
        ("services/digest/windows.py", "from services.digest import cadences, errors\nfrom libs import ids"),
        ("services/digest/migrations/env.py", "import alembic\nfrom services.digest.store import metadata"),
        ("services/dispatcher/smtp.py", "import aiosmtplib\nfrom services.dispatcher.delivery import Delivery"),
        ("libs/links/frames.py", "from carillon.link.v1 import link_pb2"),
        ("cli/main.py", "import grpc\nfrom carillon.intake.v1 import intake_pb2"),
    ],
)
def test_what_the_layers_allow_is_not_reported(tmp_path: Path, path: str, code: str) -> None:
    """The arrows of DESIGN §10 themselves are no findings."""
    _plant(tmp_path, path, code)
    assert list(violations(tmp_path)) == []


def test_an_empty_tree_has_no_violations(tmp_path: Path) -> None:
    """The rules hold before the first module is written."""
    assert list(violations(tmp_path)) == []


def _plant(root: Path, path: str, code: str) -> None:
    file = root / path
    file.parent.mkdir(parents=True)
    file.write_text(code)
