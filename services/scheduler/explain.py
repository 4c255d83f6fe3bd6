"""What the scheduler knows of timers, told in sentences. Pure."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime

from services.scheduler.timer import State, Timer

_TOLD = {
    State.SKIPPED: "was due and did not fire, because its condition was not true",
    State.CANCELLED: "was cancelled",
    State.EXPIRED: "was not fired, because it had expired",
    State.FAILED: "could not be fired; the note says why",
    State.DONE: "is done",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One thing that happened, or will (`is_expected`)."""

    at: datetime
    kind: str
    sentence: str
    details: dict[str, str] = field(default_factory=dict)
    is_expected: bool = False


def explain_timer(timer: Timer) -> Iterator[Entry]:
    """What happened to a timer, or will when nothing changes."""
    name = f"The timer {timer.id} of {timer.entity}"
    if timer.step_of is not None:
        name = f"The step {timer.step_of.step} of the timeline {timer.step_of.timeline} for {timer.entity}"
    details = {"timer_id": str(timer.id), "entity": timer.entity, "type": timer.type, "due": timer.due_at.isoformat()}
    if timer.note:
        details["note"] = timer.note
    match timer.state:
        case State.SCHEDULED:
            unless = ", if its condition is true then" if timer.condition else ""
            yield Entry(
                at=timer.fire_at,
                kind="timer_expected",
                sentence=f"{name} will fire{unless}.",
                details=details,
                is_expected=True,
            )
        case State.PAUSED:
            yield Entry(at=timer.fire_at, kind="timer_paused", sentence=f"{name} is paused.", details=details)
        case State.FIRED:
            yield Entry(
                at=timer.decided_at or timer.fire_at, kind="timer_fired", sentence=f"{name} fired.", details=details
            )
        case state:
            yield Entry(
                at=timer.decided_at or timer.fire_at,
                kind=f"timer_{state.name.lower()}",
                sentence=f"{name} {_TOLD[state]}.",
                details=details,
            )
