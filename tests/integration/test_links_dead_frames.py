"""libs.links: what can never be applied is put aside, and holds up nothing else."""

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from uuid import UUID

import pytest
from carillon.link.v1 import link_pb2

from libs.errors import FieldViolation, InvalidArgument, Unavailable
from libs.ids import id_floor, id_time, new_id
from libs.jetstream import Bus
from libs.links import dead
from libs.links.frames import OutgoingFrame, stream_name, subject_of
from libs.links.receiver import MAX_FAILURES, MAX_GROUP_ENTRIES, Applied, IncomingFrame, PoisonFrame
from libs.links.sender import Sender
from libs.postgres import Transaction
from libs.settings import LinkSettings
from tests.support.fixtures import OpenBus, OpenDatabase
from tests.support.link_process import RECEIVER, commit_numbers, count, link_settings, numbered, numbers_of, scalar
from tests.support.link_world import LinkWorld, make_world, running, until

LONG = timedelta(seconds=15)
RETENTION = LinkSettings().inbox_retention


@pytest.fixture
async def world(open_database: OpenDatabase, postgres_url: str, nats_url: str, tmp_path: Path) -> LinkWorld:
    """Both ends, not running."""
    return await make_world(open_database, postgres_url, nats_url, tmp_path)


class Apply:
    """Counts, except for numbers that raise; remembers what it was given."""

    def __init__(self, raises: Mapping[int, Exception] | None = None) -> None:
        self.raises = dict(raises or {})
        self.calls: list[list[int]] = []

    async def __call__(self, tx: Transaction, frames: Sequence[IncomingFrame]) -> Applied:
        """See libs.links.receiver.Apply."""
        numbers = numbers_of(frames)
        self.calls.append(numbers)
        applied = await count(tx, frames)  # First the effects: they must be undone.
        for number in numbers:
            if number in self.raises:
                raise self.raises[number]
        return applied

    def attempts(self, number: int) -> int:
        """How often it was given a number."""
        return sum(number in call for call in self.calls)


class InHand:
    """A message as a receiver gets it, without a stream; remembers how it was answered."""

    def __init__(self, frame: OutgoingFrame, *, num_delivered: int = 1) -> None:
        self.data = frame.payload
        self.headers: Mapping[str, str] = {}
        self.num_delivered = num_delivered
        self.answers: list[str] = []

    async def ack(self) -> None:
        """Done."""
        self.answers.append("ack")

    async def nak(self, delay: timedelta) -> None:
        """Not done."""
        assert timedelta(0) < delay <= timedelta(seconds=15)
        self.answers.append("nak")


async def dead_of(world: LinkWorld) -> list[dead.DeadFrame]:
    """What was put aside."""
    async with world.receiver_db.read() as tx:
        return await dead.dead_frames(tx, limit=100)


async def is_stream_empty(bus: Bus) -> bool:
    """Whether everything in the receiver's stream was acked."""
    info = await bus._jetstream().stream_info(stream_name(RECEIVER))
    return info.state.messages == 0


POISON = [PoisonFrame("a kind I do not know"), InvalidArgument([FieldViolation("x", "y")])]


@pytest.mark.parametrize("error", POISON)
async def test_a_poison_frame_is_put_aside_at_once_and_the_others_are_applied(
    world: LinkWorld, open_bus: OpenBus, error: Exception
) -> None:
    """They were in one fetch and one transaction; then each is tried alone."""
    sender, apply = world.sender(await open_bus()), Apply({13: error})
    messages = [InHand((await commit_numbers(world.sender_db, sender, [n]))[0]) for n in (12, 13, 14)]
    await world.receiver(await open_bus(), apply).handle(messages)
    assert apply.calls == [[12, 13, 14], [12], [13], [14]]
    assert [one.answers for one in messages] == [["ack"]] * 3
    assert await world.applied() == {12: 1, 14: 1}
    (buried,) = await dead_of(world)
    assert (buried.sender, buried.entries) == ("intake", 1)
    assert buried.reason.startswith(type(error).__name__)


async def test_the_sender_learns_which_of_its_frames_is_dead(world: LinkWorld, open_bus: OpenBus) -> None:
    """Its receipt says so, and why; unconfirmed goes back to 0."""
    sender, apply = world.sender(await open_bus()), Apply({13: POISON[0]})
    async with running(sender.run(), world.receiver(await open_bus(), apply).run()):
        frames = [(await commit_numbers(world.sender_db, sender, [n]))[0] for n in (12, 13)]
        receipts = await sender.wait(frames, LONG)
        await until(lambda: _none(world))
    assert receipts[frames[0].id].verdict == link_pb2.FRAME_VERDICT_APPLIED
    assert receipts[frames[1].id].verdict == link_pb2.FRAME_VERDICT_DEAD
    assert receipts[frames[1].id].reason == "PoisonFrame: a kind I do not know"


async def _none(world: LinkWorld) -> bool:
    return await world.unconfirmed() == 0


async def test_an_error_nobody_foresaw_is_tried_again_a_few_times(world: LinkWorld, open_bus: OpenBus) -> None:
    """Then the frame is put aside; the one beside it was applied at the first try."""
    sender, apply = world.sender(await open_bus()), Apply({1: RuntimeError("a bug")})
    receiver = world.receiver(await open_bus(), apply)
    (bad,) = await commit_numbers(world.sender_db, sender, [1])
    (good,) = await commit_numbers(world.sender_db, sender, [2])
    beside = InHand(good)
    await receiver.handle([InHand(bad), beside])
    assert beside.answers == ["ack"]
    answers = []
    for _ in range(MAX_FAILURES - 1):
        message = InHand(bad)
        await receiver.handle([message])
        answers += message.answers
    assert answers == ["nak"] * (MAX_FAILURES - 2) + ["ack"]
    assert await world.applied() == {2: 1}
    (buried,) = await dead_of(world)
    assert buried.reason == "RuntimeError: a bug"


async def test_a_frame_that_keeps_failing_ends_as_dead_for_its_sender_too(world: LinkWorld, open_bus: OpenBus) -> None:
    """Over JetStream, with its redeliveries and the sweeper's copies: unconfirmed goes back to 0."""
    sender, apply = world.sender(await open_bus()), Apply({1: RuntimeError("a bug")})
    async with running(sender.run(), world.receiver(await open_bus(), apply).run()):
        await world.send(sender, [1])
        await world.send(sender, [2])
        await until(lambda: _none(world))
    assert await world.applied() == {2: 1}
    assert await world.dead() == 1


async def test_passing_errors_never_count(world: LinkWorld, open_bus: OpenBus) -> None:
    """However often the broker has delivered the frame because of them, one bug does not put it aside."""
    sender, apply = world.sender(await open_bus()), Apply()
    receiver = world.receiver(await open_bus(), apply)
    (frame,) = await commit_numbers(world.sender_db, sender, [1])
    for delivered, error in enumerate([*[Unavailable("Postgres is away")] * 20, RuntimeError("a bug")], start=1):
        apply.raises = {1: error}
        message = InHand(frame, num_delivered=delivered)
        await receiver.handle([message])
        assert message.answers == ["nak"]
    assert await world.dead() == 0
    apply.raises = {}
    message = InHand(frame, num_delivered=22)
    await receiver.handle([message])
    assert message.answers == ["ack"]
    assert await world.applied() == {1: 1}


async def test_a_passing_error_hands_back_the_whole_group(world: LinkWorld, open_bus: OpenBus) -> None:
    """Trying each alone would only hammer what is away."""
    sender, apply = world.sender(await open_bus()), Apply({1: Unavailable("Postgres is away")})
    receiver = world.receiver(await open_bus(), apply)
    messages = [InHand((await commit_numbers(world.sender_db, sender, [n]))[0]) for n in range(3)]
    await receiver.handle(messages)
    assert apply.calls == [[0, 1, 2]]
    assert [one.answers for one in messages] == [["nak"]] * 3
    assert await world.applied() == {}


async def test_a_group_is_bounded(world: LinkWorld, open_bus: OpenBus) -> None:
    """Twenty frames of a thousand entries are three transactions, not one that lasts for seconds."""
    sender, apply = world.sender(await open_bus()), Apply()
    receiver = world.receiver(await open_bus(), apply)
    frames = await commit_numbers(world.sender_db, sender, range(20_000))
    messages = [InHand(one) for one in frames]
    await receiver.handle(messages)
    assert [len(call) for call in apply.calls] == [MAX_GROUP_ENTRIES, MAX_GROUP_ENTRIES, 4_000]
    assert [one.answers for one in messages] == [["ack"]] * 20
    assert Counter((await world.applied()).values()) == {1: 20_000}


async def test_the_same_frame_twice_in_one_hand_is_applied_once(world: LinkWorld, open_bus: OpenBus) -> None:
    """A copy that a sweeper sent beside the original; both are answered."""
    sender = world.sender(await open_bus())
    (frame,) = await commit_numbers(world.sender_db, sender, [1])
    messages = [InHand(frame), InHand(frame)]
    await world.receiver(await open_bus()).handle(messages)
    assert [one.answers for one in messages] == [["ack"], ["ack"]]
    assert await world.applied() == {1: 1}


async def test_garbage_on_the_subject_is_put_aside(world: LinkWorld, open_bus: OpenBus, bus: Bus) -> None:
    """Once, though it was sent twice; what comes after it is applied."""
    sender = world.sender(await open_bus())
    await sender.ensure_streams()
    for payload in (b"\xff\xffgarbage", b"\xff\xffgarbage", b""):
        await bus.publish(subject_of(RECEIVER, 0), payload)
    async with running(sender.run(), world.receiver(await open_bus()).run()):
        await world.send(sender, [0])
        await world.expect_all_once(1)
        await until(lambda: is_stream_empty(bus))
    buried = await dead_of(world)
    assert [(one.sender, one.entries) for one in buried] == [("", 0), ("", 0)]
    async with world.receiver_db.transaction() as tx:
        assert await redrive(tx, [one.frame_id for one in buried]) == 0
    assert await world.dead() == 2


def of_age(frame: OutgoingFrame, frame_id: UUID) -> OutgoingFrame:
    """The same frame under another id."""
    message = link_pb2.Frame.FromString(frame.payload)
    message.id = frame_id.bytes
    return OutgoingFrame(
        id=frame_id,
        receiver=frame.receiver,
        partition=frame.partition,
        payload=message.SerializeToString(),
        entries=frame.entries,
        headers={},
    )


async def redrive(tx: Transaction, frame_ids: Sequence[UUID]) -> int:
    """As the receiver does it."""
    sent, frames = await dead.redrive(tx, frame_ids, receiver=RECEIVER, first_sweep=timedelta(0), retention=RETENTION)
    assert len(frames) == len(sent)
    return len(sent)


async def test_a_frame_older_than_the_inbox_remembers_is_put_aside(world: LinkWorld, open_bus: OpenBus) -> None:
    """It may have been applied before, so it never is again; a younger one in the same hand is."""
    sender = world.sender(await open_bus())
    now = await scalar(world.sender_db, "SELECT clock_timestamp()")
    (frame,) = frames_of(sender, 1)
    too_old = of_age(frame, id_floor(now - RETENTION - timedelta(minutes=1)))
    young = of_age(frame, id_floor(now - RETENTION + timedelta(minutes=1)))
    messages = [InHand(too_old), InHand(young)]
    receiver = world.receiver(await open_bus())
    await receiver.handle(messages)
    assert [one.answers for one in messages] == [["ack"], ["ack"]]
    assert await world.applied() == {1: 1}
    (buried,) = await dead_of(world)
    assert buried.frame_id == too_old.id
    assert "it may have been applied before" in buried.reason
    async with world.receiver_db.transaction() as tx:
        assert await redrive(tx, [too_old.id]) == 0
    assert await world.dead() == 1


def frames_of(sender: Sender, number: int) -> list[OutgoingFrame]:
    """A frame with one number."""
    return sender.pack(numbered([number]))[0]


async def test_a_redriven_frame_is_applied_once(world: LinkWorld, open_bus: OpenBus) -> None:
    """It goes over the receiver's own outbox; copies of the original stay dead, whenever they come."""
    sender, apply = world.sender(await open_bus()), Apply({1: PoisonFrame("not yet")})
    receiver = world.receiver(await open_bus(), apply)
    own_sender = Sender(
        db=world.receiver_db,
        bus=await open_bus(),
        service=RECEIVER,
        replica="one",
        receivers=["dispatcher"],
        settings=link_settings(),
    )
    async with running(sender.run(), receiver.run(), own_sender.run()):
        (frame,) = await world.send(sender, [1])
        await until(lambda: _none(world))
        assert await world.dead() == 1
        apply.raises = {}
        async with world.receiver_db.transaction() as tx:
            assert await redrive(tx, [frame.id]) == 1
            assert await redrive(tx, [frame.id]) == 0
        copy = InHand(frame)
        await receiver.handle([copy])
        assert copy.answers == ["ack"]

        async def is_done() -> bool:
            return bool(await scalar(world.receiver_db, "SELECT count(*) = 0 FROM outbox"))

        await until(is_done)
    assert await world.applied() == {1: 1}
    assert await world.dead() == 0


async def bury(tx: Transaction, frame: OutgoingFrame) -> None:
    """Put it aside now, as the receiver does."""
    await dead.bury(
        tx, frame.id, sender="intake", partition=0, payload=frame.payload, entries=1, reason="a bug", deliveries=5
    )


async def test_inv4_what_outlived_the_memory_of_cancels_is_not_redriven(world: LinkWorld, open_bus: OpenBus) -> None:
    """However young it was when it was put aside: a cancel accepted after it may be gone by now."""
    sender = world.sender(await open_bus())
    now = await scalar(world.sender_db, "SELECT clock_timestamp()")
    frame = of_age(frames_of(sender, 1)[0], id_floor(now - RETENTION - timedelta(minutes=1)))
    async with world.receiver_db.transaction() as tx:
        await bury(tx, frame)
        await tx.raw.execute("UPDATE dead_frame SET buried_at = %s", (now - RETENTION,))
        assert await redrive(tx, [frame.id]) == 0
    assert await world.dead() == 1


async def test_inv4_redriving_makes_a_frame_no_younger(world: LinkWorld, open_bus: OpenBus) -> None:
    """It goes under a new id of the old time, is applied, and would be refused when the old one would."""
    sender = world.sender(await open_bus())
    now = await scalar(world.sender_db, "SELECT clock_timestamp()")
    frame = of_age(frames_of(sender, 1)[0], id_floor(now - RETENTION + timedelta(minutes=1)))
    async with world.receiver_db.transaction() as tx:
        await bury(tx, frame)
        assert await redrive(tx, [frame.id]) == 1
    async with world.receiver_db.read() as tx:
        ((frame_id, payload),) = await (await tx.raw.execute("SELECT frame_id, payload FROM outbox")).fetchall()
    assert frame_id != frame.id
    assert id_time(frame_id) == id_time(frame.id)
    message = InHand(frame)
    message.data = payload
    await world.receiver(await open_bus()).handle([message])
    assert await world.applied() == {1: 1}


async def test_the_inbox_forgets_what_is_past_retention(world: LinkWorld, open_bus: OpenBus) -> None:
    """All of it in one go, however much it is, and nothing younger."""
    now = await scalar(world.receiver_db, "SELECT clock_timestamp()")
    old = [UUID(int=id_floor(now - RETENTION - timedelta(hours=2)).int + n) for n in range(25_000)]
    within_slack = [id_floor(now - RETENTION - timedelta(minutes=30)), new_id()]
    async with world.receiver_db.transaction() as tx:
        await tx.raw.execute("INSERT INTO inbox SELECT unnest(%s::uuid[]), 1", ([*old, *within_slack],))
    settlement = world.receiver(await open_bus()).settlement
    assert await settlement.keep_house_once() == 25_000
    assert await settlement.keep_house_once() == 0
    assert await scalar(world.receiver_db, "SELECT count(*) FROM inbox") == 2
