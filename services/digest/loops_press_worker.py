"""The process that renders: jobs in on stdin as lines of JSON, answers out on stdout; ends with its input.

A process of its own, because a template is a program of somebody else's: a loop without end is ended by killing it,
and a gigabyte of output meets the limit set here before it meets the service's memory. It holds no connection and no
secret. Each request has so much processor time, after which the alarm ends the process, whatever it is doing.
"""

import resource
import signal
import sys
from collections.abc import Iterator

from services.digest.rendering import pieces
from services.digest.rendering_jobs import Answer, Job, Part, Request, Source
from services.digest.rendering_sandbox import BadTemplate, check_template


def main(memory_bytes: int) -> None:
    """Answer until the input ends."""
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends us by closing our input.
    _say(Answer())
    for line in sys.stdin.buffer:
        request = Request.from_wire(line)
        signal.setitimer(signal.ITIMER_PROF, request.limit_s)  # SIGPROF is not handled, so it ends the process.
        if request.check is None:
            _render(sys.stdin.buffer)
        else:
            _say(_checked(request.check, is_html=request.is_html))
        signal.setitimer(signal.ITIMER_PROF, 0)


def _say(answer: Answer) -> None:
    sys.stdout.buffer.write(answer.to_wire())
    sys.stdout.buffer.flush()


def _render(lines: Iterator[bytes]) -> None:
    """Read the job, say its parts as they are written; the last one waits for the end, so that most say it at once."""
    written = pieces(Job.from_wire(lines))
    last: Part | None = None
    while True:
        try:
            part = next(written)
        except StopIteration as end:
            return _say(Answer(part=last, error=end.value))
        if part is None:
            _say(Answer(is_taken_back=True, goes_on=True))
        elif last is not None:
            _say(Answer(part=last, goes_on=True))
        last = part


def _checked(source: Source, *, is_html: bool) -> Answer:
    try:
        check_template(source, is_html=is_html)
    except BadTemplate as err:
        return Answer(error=str(err), line=err.line, place=err.part)
    return Answer()


if __name__ == "__main__":
    main(int(sys.argv[1]))
