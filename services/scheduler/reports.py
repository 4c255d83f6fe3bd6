"""What a report about an event means for its timer. Pure.

Done counts from any attempt: the work is done, whoever was late. Failed counts only from the attempt that is awaited;
an older one has been judged already.
"""

from services.scheduler.timer import State, Timer

_NOT_FOUND, _FAILED_PRECONDITION = 5, 9  # google.rpc.Code

_OVER = {
    State.CANCELLED: "TIMER_CANCELLED",
    State.FAILED: "TIMER_FAILED",
    State.SKIPPED: "TIMER_SKIPPED",
    State.EXPIRED: "TIMER_EXPIRED",
}


def refusal_of(timer: Timer | None, *, attempt: int, is_done: bool) -> tuple[int, str, str] | None:
    """Why a report cannot be taken (code, reason, message); None: it can, though it may change nothing."""
    if timer is None:
        return _NOT_FOUND, "TIMER_NOT_FOUND", "the entity has no such timer"
    if timer.report_within is None:
        return _NOT_FOUND, "NO_REPORT_EXPECTED", f"timer {timer.id} expects no report: its event has no report_within"
    if not 1 <= attempt <= timer.attempts:
        made = f"{timer.attempts} so far"
        return _FAILED_PRECONDITION, "NO_SUCH_ATTEMPT", f"timer {timer.id} has made no attempt {attempt}: {made}"
    if is_done and timer.state in _OVER:
        return _FAILED_PRECONDITION, _OVER[timer.state], f"timer {timer.id} is {timer.state.name.lower()} by now"
    return None


def is_news(timer: Timer, *, attempt: int, is_done: bool) -> bool:
    """Whether a report that can be taken changes something."""
    if is_done:
        return timer.state is not State.DONE
    return timer.state is State.AWAITING and attempt == timer.attempts
