"""`carillon catalog sync` against a real digest server, as people and pipelines run it."""

import asyncio
import hashlib
import json
import os
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest
from google.protobuf.duration_pb2 import Duration
from prometheus_client import CollectorRegistry

from libs.rpc import build_server
from libs.settings import AuthMode, AuthSettings, GrpcSettings
from services.digest.rpc import servicer
from tests.integration.digest_rig import Rig, migrate, replica
from tests.support.fixtures import OpenDatabase

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "crl_" + "x" * 40
FILE = """
notification_types:
  - id: trial/ends
    name: Your trial ends
    retention: 30d
    payload_schema: {type: object, required: [day]}
  - id: trial/ended
    name: Your trial is over
    default_cadence: daily
"""
CODE = '''
from dataclasses import dataclass
from cli.notification_types import notification_type

@notification_type(id="orders/created", name="Order created")
@dataclass
class OrderCreated:
    """An order has come."""

    order: str
'''


@dataclass(frozen=True, kw_only=True)
class Ran:
    """What one run of the command left behind."""

    code: int
    out: str
    err: str


@dataclass(frozen=True, kw_only=True)
class World:
    """A digest server and a directory to declare types in."""

    rig: Rig
    address: str
    directory: Path

    async def sync(self, *arguments: str, answer: str = "", token: str = TOKEN, address: str = "") -> Ran:
        """Run `carillon catalog sync` on the directory."""
        environment = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": f"{ROOT}:{ROOT / 'gen'}",
            "CARILLON_DIGEST_ENDPOINT": address or self.address,
            "CARILLON_TOKEN": token,
            "COLUMNS": "160",
        }
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "cli", "catalog", "sync", str(self.directory), *arguments),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=environment,
            cwd=self.directory,
        )
        out, err = await process.communicate(answer.encode())
        assert process.returncode is not None
        return Ran(code=process.returncode, out=out.decode(), err=err.decode())

    async def types(self) -> dict[str, str]:
        """Stored types, by id their names."""
        return {one.id: one.name for one in (await self.rig.call("ListNotificationTypes")).notification_types}


@pytest.fixture
async def world(postgres_url: str, open_database: OpenDatabase, tmp_path: Path) -> AsyncIterator[World]:
    """A server that asks for a token, and two declared types."""
    migrate(postgres_url)
    tokens = tmp_path / "tokens.json"
    entry = {"name": "pipeline", "sha256": hashlib.sha256(TOKEN.encode()).hexdigest(), "tenant": "acme"}
    tokens.write_text(json.dumps({"tokens": [entry]}))
    directory = tmp_path / "deployment"
    directory.mkdir()
    (directory / "types.yaml").write_text(FILE)
    async with replica(postgres_url, open_database) as rig:
        await rig.put_daily()
        server = build_server(
            GrpcSettings(drain_timeout=timedelta(seconds=1)),
            auth=AuthSettings(mode=AuthMode.TOKENS, tokens_file=tokens),
            servicers=[servicer(rig.rpc)],
            registry=CollectorRegistry(),
        )
        async with server:
            yield World(rig=rig, address=server.address, directory=directory)


async def test_what_is_declared_is_stored_and_the_second_time_there_is_nothing_to_do(world: World) -> None:
    """Shown as new, stored with all that was declared, then the same."""
    (world.directory / "scanned_events.py").write_text(CODE)
    first = await world.sync("--yes")
    assert (first.code, first.err) == (0, "")
    assert "Stored 3 types." in first.out
    assert await world.types() == {
        "orders/created": "Order created",
        "trial/ended": "Your trial is over",
        "trial/ends": "Your trial ends",
    }
    stored = (await world.rig.call("GetNotificationType", id="trial/ends")).notification_type
    assert stored.retention == Duration(seconds=30 * 86400)
    assert json.loads(stored.payload_schema) == {"type": "object", "required": ["day"]}
    again = await world.sync()
    assert (again.code, again.out) == (0, "3 types already stored as declared.\n")


async def test_a_dry_run_shows_the_difference_and_changes_nothing(world: World) -> None:
    """Its exit code tells a pipeline that there is one."""
    await world.rig.put_type("trial/ends", retention=Duration(seconds=86400))
    ran = await world.sync("--dry-run")
    assert ran.code == 3
    shown = [[cell.strip() for cell in line.strip("│").split("│")] for line in ran.out.splitlines() if "│" in line]
    assert ["", "", "retention", "1 days", "30 days"] in shown
    assert ["trial/ended", "new", "", "–", "Your trial is over"] in shown
    assert await world.types() == {"trial/ends": "Trial/ends"}


async def test_nothing_is_stored_unless_somebody_agrees(world: World) -> None:
    """No is no, and so is no answer, with an exit code of its own; yes stores."""
    assert (await world.sync(answer="n\n")).code == 3
    assert (await world.sync()).code == 3
    assert await world.types() == {}
    assert (await world.sync(answer="y\n")).code == 0
    assert len(await world.types()) == 2


async def test_types_that_are_not_declared_here_are_left_alone(world: World) -> None:
    """They belong to other deployments."""
    await world.rig.put_type("somebody/elses")
    assert (await world.sync("--yes")).code == 0
    assert "somebody/elses" in await world.types()


async def test_json_is_for_programs(world: World) -> None:
    """The same in JSON, and nothing else on the standard output."""
    ran = await world.sync("--yes", "--json")
    answer = json.loads(ran.out)
    assert [(one["id"], one["change"]) for one in answer["types"]] == [("trial/ended", "new"), ("trial/ends", "new")]
    assert answer["stored"] == ["trial/ended", "trial/ends"]
    assert (await world.sync("--json")).code == 2


async def test_a_service_that_formats_is_declared_and_must_be_registered(world: World) -> None:
    """Digest names the field; nothing is stored of that type."""
    (world.directory / "types.yaml").write_text(FILE.replace("retention: 30d", "formatting_service: crm"))
    ran = await world.sync("--yes")
    assert ran.code == 1
    assert "notification_type.formatting_service 'crm' is not registered with digest (none is)" in ran.err
    assert list(await world.types()) == ["trial/ended"]


async def test_what_digest_refuses_is_told_and_does_not_stop_the_rest(world: World) -> None:
    """A schema that refers elsewhere: named with its field; the other type is stored."""
    broken = FILE.replace("{type: object, required: [day]}", "{$ref: 'https://example.com/a.json'}")
    (world.directory / "types.yaml").write_text(broken)
    ran = await world.sync("--yes")
    assert ran.code == 1
    assert "trial/ends was refused" in ran.err
    assert "notification_type.payload_schema must refer to itself only" in ran.err
    assert list(await world.types()) == ["trial/ended"]


async def test_declarations_that_cannot_be_read_are_a_wrong_use(world: World) -> None:
    """Nothing is asked of digest."""
    (world.directory / "types.yaml").write_text("notification_types: [{id: a}]")
    ran = await world.sync("--yes")
    assert ran.code == 2
    assert "notification_types.0.name: Field required" in ran.err


async def test_a_wrong_token_and_a_server_that_is_not_there_are_told_apart(world: World) -> None:
    """One line each, no traceback."""
    unknown = await world.sync("--yes", token="crl_unknown")
    assert unknown.code == 1
    assert "UNAUTHENTICATED" in unknown.err
    nobody = await world.sync("--yes", address="127.0.0.1:1")
    assert nobody.code == 1
    assert "UNAVAILABLE" in nobody.err
    assert len(nobody.err.splitlines()) == 1
