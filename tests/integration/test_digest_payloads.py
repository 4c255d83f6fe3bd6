"""Payloads that do not fit their types' schemas: refused in words, on record, in nobody's way."""

import asyncio
import json
from collections.abc import AsyncIterator

import pytest
from carillon.digest.v1 import digest_pb2 as pb
from google.rpc import code_pb2

from libs.errors import InvalidArgument
from libs.ids import new_id
from tests.integration.digest_rig import Rig, migrate, replica
from tests.support.fixtures import OpenDatabase

SCHEMA = json.dumps(
    {"type": "object", "required": ["gate"], "properties": {"gate": {"type": "string"}, "minutes": {"minimum": 0}}}
)


@pytest.fixture
async def rig(postgres_url: str, open_database: OpenDatabase) -> AsyncIterator[Rig]:
    """A replica with two subscribers, one of whom gets a digest."""
    migrate(postgres_url)
    async with replica(postgres_url, open_database) as rig:
        await rig.put_type(payload_schema=SCHEMA)
        await rig.put_subscriber("ann")
        await rig.put_subscriber("bob")
        await rig.put_daily()
        await rig.subscribe("ann", "daily")
        yield rig


async def test_a_schema_is_kept_as_it_was_put(rig: Rig) -> None:
    """Get and List answer with the schema's own text."""
    answer = await rig.call("GetNotificationType", id="flight.delayed")
    assert answer.notification_type.payload_schema == SCHEMA
    listed = await rig.call("ListNotificationTypes")
    assert [one.payload_schema for one in listed.notification_types] == [SCHEMA]


async def test_a_page_of_types_with_large_schemas_is_shorter(rig: Rig) -> None:
    """No answer is larger than clients take; following the tokens shows every type once."""
    await asyncio.gather(
        *(rig.put_type(f"large/{n:02}", payload_schema=json.dumps({"description": "x" * 65_000})) for n in range(60))
    )
    found: list[str] = []
    token = ""
    while token or not found:
        page = await rig.call("ListNotificationTypes", page_size=1000, page_token=token)
        assert page.ByteSize() < 4 << 20
        found += [one.id for one in page.notification_types]
        token = page.next_page_token
    assert found == ["flight.delayed", *(f"large/{n:02}" for n in range(60))]


async def test_a_schema_that_cannot_be_used_is_refused(rig: Rig) -> None:
    """The violation names the field and says why."""
    with pytest.raises(InvalidArgument) as refused:
        await rig.put_type("other", payload_schema='{"$ref": "https://example.com/schema.json"}')
    (violation,) = refused.value.violations
    assert violation.field == "notification_type.payload_schema"
    assert violation.description.startswith("must refer to itself only")


async def test_a_payload_that_does_not_fit_is_refused_by_item_and_on_record(rig: Rig) -> None:
    """Its neighbours in the frame go on; it is suppressed for each of its subscribers, and nothing is unaccounted."""
    bad = rig.notification("ann", "bob", payload={"gate": 7})
    applied = await rig.apply(rig.notification("ann", payload={"gate": "A1"}), bad)
    ((result,),) = applied.results.values()
    assert (result.index, result.error_code, result.error_reason) == (1, code_pb2.INVALID_ARGUMENT, "PAYLOAD_INVALID")
    assert result.error_message.startswith("payload.gate: ")
    assert await rig.ledger() == {("pending", ""): 1, ("suppressed", "payload_invalid"): 2}


async def test_what_nobody_listens_to_is_refused_all_the_same(rig: Rig) -> None:
    """A topic without subscribers has one item, which says why."""
    result = await rig.result(rig.notification(topics=["gates"], payload={}))
    assert result.error_reason == "PAYLOAD_INVALID"
    assert await rig.items() == [("", "topic:gates", 4, "payload_invalid")]


async def test_the_same_notification_again_hears_the_same(rig: Rig) -> None:
    """A repeated notification is refused again, and is not on record twice."""
    entry = rig.notification("ann", payload={}, one_id=new_id())
    assert (await rig.result(entry)).error_reason == "PAYLOAD_INVALID"
    assert (await rig.result(entry)).error_reason == "PAYLOAD_INVALID"
    assert await rig.ledger() == {("suppressed", "payload_invalid"): 1}


async def test_a_changed_schema_counts_from_the_next_notification(rig: Rig) -> None:
    """A type that is put again without a schema takes everything; with another one, what that one allows."""
    await rig.put_type()
    assert not (await rig.apply(rig.notification("bob", payload={}))).results
    await rig.put_type(payload_schema='{"required": ["when"]}')
    assert (await rig.result(rig.notification("bob", payload={"gate": "A1"}))).error_message == (
        'payload: "when" is a required property'
    )


async def test_one_tenants_schema_does_not_judge_anothers_payloads(rig: Rig) -> None:
    """The same type id of another tenant has its own schema, or none (INV-8)."""
    rig.tenant = "other"
    await rig.put_type()
    await rig.put_subscriber("ann")
    applied = await rig.apply(rig.notification("ann", payload={}))
    assert not applied.results
    assert await rig.ledger() == {("pending", ""): 1}


async def test_explain_says_that_the_payload_did_not_fit(rig: Rig) -> None:
    """Whoever asks hears it in words."""
    one_id = new_id()
    await rig.apply(rig.notification("bob", payload={}, one_id=one_id))
    answer: pb.ExplainResponse = await rig.call("Explain", id=str(one_id))
    assert any(
        "its payload is not what the type's schema asks for: payload: " in one.sentence for one in answer.entries
    )
