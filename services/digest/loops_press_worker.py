"""The process that renders: jobs in on stdin, results out on stdout, one JSON line each; ends with its input.

A process of its own, because a template is a program of somebody else's: a loop without end is ended by killing it,
and a gigabyte of output meets the limit set here before it meets the service's memory. It holds no connection and no
secret. Each request has so much processor time, after which the alarm ends the process, whatever it is doing.
"""

import json
import resource
import signal
import sys
from typing import Any

from services.digest.rendering import BadTemplate, check_template, render
from services.digest.rendering_jobs import Job, Source


def main(memory_bytes: int) -> None:
    """Answer until the input ends."""
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends us by closing our input.
    _say({"is_ready": True})
    for line in sys.stdin.buffer:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, request["limit_s"])  # SIGPROF is not handled, so it ends the process.
        _say(_answer(request))
        signal.setitimer(signal.ITIMER_PROF, 0)


def _say(answer: object) -> None:
    sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
    sys.stdout.buffer.flush()


def _answer(request: dict[str, Any]) -> object:
    if "check" not in request:
        return render(Job.from_wire(request["job"])).to_wire()
    try:
        check_template(Source(*request["check"]), is_html=request["is_html"])
    except BadTemplate as err:
        return {"error": str(err), "line": err.line, "part": err.part}
    return {"error": ""}


if __name__ == "__main__":
    main(int(sys.argv[1]))
