"""Which services may be asked, and what a shard makes of their answers."""

from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest
from msgspec.structs import replace

from libs.errors import SettingsError
from libs.ids import new_id
from libs.settings import load
from services.scheduler.conditions import MAX_ASKS, Answer, NoAnswer, Question, ServiceCondition
from services.scheduler.needs import Known
from services.scheduler.settings import SchedulerSettings
from services.scheduler.shard import Shard
from services.scheduler.timer import BEGINNING, State, TargetKind, Timer

NOON = datetime(2013, 7, 1, 12, tzinfo=UTC)
SECOND = timedelta(seconds=1)
MOMENT = timedelta(milliseconds=1)
VARIABLE = "CARILLON_SCHEDULER_CONDITION_SERVICES"


def test_services_are_a_json_object_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not set and empty: none; the token is a secret."""
    monkeypatch.setenv(VARIABLE, "")
    assert load(SchedulerSettings).condition_services == {}
    monkeypatch.setenv(VARIABLE, '{"crm": "https://crm.example/conditions?v=1", "a-b.c_1": "http://[::1]:8080"}')
    monkeypatch.setenv("CARILLON_SCHEDULER_CONDITION_TOKEN", "hunter2")
    settings = load(SchedulerSettings)
    assert settings.condition_services == {
        "crm": "https://crm.example/conditions?v=1",
        "a-b.c_1": "http://[::1]:8080",
    }
    assert "hunter2" not in repr(settings)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("crm=https://crm.example", "must be a JSON object"),
        ('["crm"]', "dictionary"),
        ('{"crm": 1}', "string"),
        ('{"CRM": "https://crm.example"}', "'CRM' is not"),
        ('{"": "https://crm.example"}', "1-64 characters"),
        (f'{{"{"x" * 65}": "https://crm.example"}}', "1-64 characters"),
        ('{"crm": "crm.example"}', "crm: must look like https://"),
        ('{"crm": "ftp://crm.example"}', "crm: must look like https://"),
        ('{"crm": "https:///conditions"}', "crm: must look like https://"),
        ('{"crm": "https://crm.example:99999"}', "crm: must look like https://"),
        ('{"crm": "https://[::1"}', "crm: must look like https://"),
        ('{"crm": "https://ann:hunter2@crm.example"}', "crm: must not hold credentials"),
    ],
)
def test_a_wrong_service_is_refused_at_the_start(monkeypatch: pytest.MonkeyPatch, value: str, words: str) -> None:
    """The message names the setting, and the service where it is known; never a password."""
    monkeypatch.setenv(VARIABLE, value)
    with pytest.raises(SettingsError) as caught:
        load(SchedulerSettings)
    assert VARIABLE in caught.value.message
    assert words in caught.value.message
    assert "hunter2" not in caught.value.message


class Scene:
    """A shard with one timer whose condition a service decides."""

    def __init__(self, **timer: object) -> None:
        self.now = NOON + MOMENT
        self.shard = Shard(
            number=0, epoch=1, watermark=BEGINNING, newest_tombstones={}, page_timers=100, now=NOON - SECOND
        )
        condition = ServiceCondition(service="crm", timeout=5 * SECOND, no_answer=NoAnswer.FAIL)
        self.timer = replace(_timer(), **({"asked": condition} | timer))
        self.fired: list[UUID] = []
        self.shard.add_page([self.timer], 100)

    def turn(self, *answers: Answer, after: timedelta = timedelta(0)) -> list[Question]:
        """One turn, some time later; what it asks."""
        self.now += after
        self.shard.answer(answers, Known(timers={self.timer.id: self.timer}), self.now)
        self.shard.fire(self.shard.take_due(self.now, 10), Known(), self.now)
        changes = self.shard.take_changes()
        self.timer = changes.updates.get(self.timer.id, self.timer)
        self.fired += [one.id for one in changes.fired]
        return changes.questions

    def answer(self, number: int, holds: bool | None, reason: str = "", *, was_asked: bool = True) -> Answer:
        """What the service says."""
        return Answer(shard=0, timer_id=self.timer.id, number=number, holds=holds, reason=reason, was_asked=was_asked)


def _timer() -> Timer:
    timer_id = new_id()
    return Timer(
        id=timer_id,
        shard=0,
        tenant="acme",
        entity="e",
        type="",
        due_at=NOON,
        fire_at=NOON,
        target_kind=TargetKind.NOTIFICATION,
        target=b"",
        sequence=1,
        schedule_id=timer_id,
    )


def test_what_has_fired_with_a_verdict_on_record_does_not_fire_again() -> None:
    """It is stored as SCHEDULED, behind the watermark: the wheel must not take it back."""
    for scene in (Scene(), Scene(asked=None, condition="true")):
        scene.turn()
        scene.turn(scene.answer(1, True))
        assert scene.fired == [scene.timer.id]
        assert scene.timer.note
        assert scene.shard.next_at() is None


def test_a_question_without_an_answer_is_asked_again_at_its_deadline() -> None:
    """Its timeout and a wait that doubles: after 6, 7 and 9 seconds; then its policy decides."""
    scene = Scene()
    numbers = [question.number for question in scene.turn()]
    for number, wait in enumerate((6, 7, 9), start=1):
        assert scene.turn(scene.answer(number, None, "silent"), after=wait * SECOND - MOMENT) == []
        numbers += [question.number for question in scene.turn(after=MOMENT)]
    assert numbers == [1, 2, 3]
    assert scene.timer.state is State.FAILED
    assert scene.timer.last_error == "crm gave no answer: silent"


def test_questions_that_never_left_are_not_the_services_silence_whoever_owns_the_shard() -> None:
    """They waited in the queues of ten owners in turn, and each was gone before it could ask."""
    scene = Scene()
    numbers = [question.number for _ in range(10) for question in scene.turn(after=6 * SECOND)]
    assert (numbers, scene.timer.state, scene.timer.asks) == ([1] * 10, State.ASKING, 0)
    scene.turn(scene.answer(1, True), after=MOMENT)
    assert scene.fired == [scene.timer.id]


def test_a_verdict_counts_from_any_question_and_an_error_only_from_the_last() -> None:
    """A slow yes is a yes."""
    scene = Scene()
    scene.turn()
    scene.turn(scene.answer(1, None, "slow"), after=6 * SECOND)
    assert scene.timer.asks == 1
    scene.turn(scene.answer(1, None, "late"), scene.answer(3, True), after=MOMENT)
    assert (scene.timer.state, scene.timer.asks, scene.timer.last_error) == (State.ASKING, 1, "slow")
    scene.turn(scene.answer(2, None, "broken"))
    assert (scene.timer.asks, scene.timer.last_error) == (2, "broken")
    scene.turn(scene.answer(1, True))
    assert scene.fired == [scene.timer.id]
    assert scene.turn(scene.answer(2, False)) == []
    assert scene.timer.state is State.SCHEDULED


def test_a_question_that_was_not_asked_does_not_count() -> None:
    """However often there was no room for it: the service has its three questions all the same."""
    scene = Scene()
    numbers = []
    for _ in range(3 * MAX_ASKS):
        numbers += [question.number for question in scene.turn(after=6 * SECOND)]
        scene.turn(scene.answer(1, None, "no room", was_asked=False))
    assert numbers == [1] * 9
    assert (scene.timer.state, scene.timer.asks, scene.timer.last_error) == (State.ASKING, 0, "no room")


def test_silence_is_not_blamed_on_the_error_of_an_earlier_attempt() -> None:
    """A timer that is tried again is asked about anew."""
    scene = Scene(state=State.RETRYING, attempts=1, last_error="no report came", report_within=SECOND)
    scene.turn()
    assert (scene.timer.state, scene.timer.last_error) == (State.ASKING, None)


def test_an_expired_timer_is_not_asked_about_again() -> None:
    """It expires at its next turn; a yes that comes after that does not fire it either."""
    scene = Scene(expires_at=NOON + 6 * SECOND)
    scene.turn()
    assert scene.turn(scene.answer(1, True), after=6 * SECOND) == []
    assert (scene.timer.state, scene.fired) == (State.EXPIRED, [])
