"""The books: for each job what was accepted, where every item of it is now, and what left. Unaccounted must be 0.

An item is one notification for one subscriber. How many there have to be follows from what was accepted and from what
the services decided (timers fired, requests over); where they are is what digest answers: sent alone, in a digest,
waiting in an open window, suppressed, cancelled. The difference is unaccounted for (INV-6).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from carillon.digest.v1 import digest_pb2 as digest
from carillon.intake.v1 import intake_pb2 as intake
from carillon.scheduler.v1 import timer_pb2 as timer

from local.demo import story
from local.demo.answers import Answers
from local.demo.plan import Ask, Delay, Plan

_FIRED = (timer.TIMER_STATE_FIRED, timer.TIMER_STATE_DONE)
_OVER = (intake.REQUEST_STATE_CLOSED, intake.REQUEST_STATE_EXPIRED)
_GONE = (digest.ITEM_STATE_EXPIRED, digest.ITEM_STATE_DEAD)
_JOBS = {
    "carrier-manager": "Digest",
    "airport-manager": "Digest",
    story.FEED: "Digest",
    "desk": "Batch",
    "passenger": "Batch",
    story.MAINTENANCE: "Timeline",
    story.DIRECTOR: "Schedule",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Account:
    """One job. `accepted` counts commands; the others, up to `dead`, count items; `sent` and `failed` messages."""

    job: str
    accepted: int
    due: int
    immediate: int
    digested: int
    waiting: int
    suppressed: int
    cancelled: int
    dead: int
    sent: int
    failed: int

    @property
    def unaccounted(self) -> int:
        """Items that should be somewhere and are nowhere; negative: there are more than there should be."""
        found = self.immediate + self.digested + self.waiting + self.suppressed + self.cancelled + self.dead
        return self.due - found


def accounts(plan: Plan, accepted: Mapping[str, int], answers: Answers) -> list[Account]:
    """One account per job, in the order of the jobs in the issue."""
    due = _due(plan, answers)
    commands = {
        "Digest": accepted["delays"],
        "Batch": accepted["requests"] + accepted["responses"],
        "Timeline": accepted["timelines"] + accepted["cancels"],
        "Schedule": accepted["schedules"],
    }
    # Only the deputy has turned something off, and only aircraft are cancelled, so the ledger's totals are theirs.
    states = _states(answers.ledger)
    alone = _by_job(answers.digests, is_alone=True)
    digested = _by_job(answers.digests, is_alone=False)
    waiting = Counter[str]()
    for window in answers.windows:
        waiting[job_of(window.subscriber)] += window.items
    outcomes = Counter((job_of(one.subscriber), one.outcome == "sent") for one in answers.digests)
    return [
        Account(
            job=job,
            accepted=commands[job],
            due=due[job],
            immediate=alone[job],
            digested=digested[job],
            waiting=waiting[job],
            suppressed=states[digest.ITEM_STATE_SUPPRESSED] if job == "Digest" else 0,
            cancelled=states[digest.ITEM_STATE_CANCELLED] if job == "Timeline" else 0,
            dead=sum(states[state] for state in _GONE) if job == "Digest" else 0,
            sent=outcomes[job, True],
            failed=outcomes[job, False],
        )
        for job in commands
    ]


def unaccounted(books: Sequence[Account], ledger: digest.GetLedgerResponse) -> int:
    """All that is unaccounted for: by the jobs' books, by digest's own audit, and between the two."""
    found = sum(account.due - account.unaccounted for account in books)
    stored = sum(count.items for count in ledger.items)
    return sum(abs(account.unaccounted) for account in books) + ledger.unaccounted + abs(found - stored)


def job_of(subscriber: str) -> str:
    """The job that tells a subscriber something; the kind of subscriber where there is none."""
    kind = subscriber.partition(".")[0]
    return _JOBS.get(kind, kind)


def _due(plan: Plan, answers: Answers) -> Counter[str]:
    calls = [call for shift in plan.shifts for call in shift.calls]
    delays = [call.flight for call in calls if isinstance(call, Delay)]
    asked = sum(len(call.carriers) for call in calls if isinstance(call, Ask))
    answered = sum(len(request.responses) for request in answers.requests)
    over = sum(request.state in _OVER for request in answers.requests)
    fired = [one for one in answers.timers if one.state in _FIRED]
    return Counter(
        {
            # The carrier's manager, the airport's, the feed; and the deputy of one airport.
            "Digest": 3 * len(delays) + sum(flight.origin == story.DEPUTY_AIRPORT for flight in delays),
            "Batch": asked + answered + over,
            "Timeline": sum(one.entity.startswith(story.aircraft("")) for one in fired),
            "Schedule": sum(one.type in (story.REPORT, story.REMARK) for one in fired),
        }
    )


def _by_job(digests: Sequence[digest.Digest], *, is_alone: bool) -> Counter[str]:
    found = Counter[str]()
    for one in digests:
        if (one.cadence == story.IMMEDIATE) == is_alone:
            found[job_of(one.subscriber)] += one.item_count
    return found


def _states(ledger: digest.GetLedgerResponse) -> Counter[int]:
    found = Counter[int]()
    for count in ledger.items:
        found[count.state] += count.items
    return found
