"""The process that renders: jobs in on stdin as lines of JSON, answers out on stdout; ends with its input.

A process of its own, because a template is a program of somebody else's: a loop without end is ended by killing it,
and a gigabyte of output meets the limit set here before it meets the service's memory. It holds no connection and no
secret. Each request has so much processor time, after which the alarm ends the process, whatever it is doing.
"""

import resource
import signal
import sys
import time

from services.digest.rendering import pieces
from services.digest.rendering_jobs import BATCH_BYTES, BATCH_S, Answer, Job, Part, Request, Source
from services.digest.rendering_sandbox import BadTemplate, check_template


def main(memory_bytes: int) -> None:
    """Answer until the input ends."""
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends us by closing our input.
    _say(Answer())
    until_s, room = 0.0, 0
    for line in sys.stdin.buffer:
        request = Request.from_wire(line)
        signal.setitimer(signal.ITIMER_PROF, request.limit_s)  # SIGPROF is not handled, so it ends the process.
        if request.is_first:
            until_s, room = time.monotonic() + BATCH_S, BATCH_BYTES
        if request.check is not None:
            _say(_checked(request.check, is_html=request.is_html))
        elif request.is_first or (time.monotonic() < until_s and room > 0):
            room -= _render(Job.from_wire(sys.stdin.buffer))
        else:
            Job.from_wire(sys.stdin.buffer)
            _say(Answer(is_left=True))
        signal.setitimer(signal.ITIMER_PROF, 0)


def _say(answer: Answer) -> int:
    """Returns how many bytes that were."""
    said = sys.stdout.buffer.write(answer.to_wire())
    sys.stdout.buffer.flush()
    return said


def _render(job: Job) -> int:
    """Say the job's parts as they are written; the last one waits for the end, so that most say it at once."""
    written = pieces(job)
    last: Part | None = None
    said = 0
    while True:
        try:
            part = next(written)
        except StopIteration as end:
            return said + _say(Answer(part=last, error=end.value))
        if part is None:
            said += _say(Answer(is_taken_back=True, goes_on=True))
        elif last is not None:
            said += _say(Answer(part=last, goes_on=True))
        last = part


def _checked(source: Source, *, is_html: bool) -> Answer:
    try:
        check_template(source, is_html=is_html)
    except BadTemplate as err:
        return Answer(error=str(err), line=err.line, place=err.part)
    return Answer()


if __name__ == "__main__":
    main(int(sys.argv[1]))
