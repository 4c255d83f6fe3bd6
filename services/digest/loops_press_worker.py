"""The process that renders: jobs in on stdin, results out on stdout, one JSON line each; ends with its input.

A process of its own, because a template is a program of somebody else's: a loop without end is ended by killing it, and a
gigabyte of output meets the limit set here before it meets the service's memory. It holds no connection and no secret.
"""

import json
import resource
import sys

from services.digest.rendering import BadTemplate, check_template, render
from services.digest.rendering_jobs import Job, Source


def main(memory_bytes: int) -> None:
    """Answer until the input ends. A memory limit of 0 is none."""
    if memory_bytes:
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    for line in sys.stdin.buffer:
        sys.stdout.buffer.write(json.dumps(_answer(line)).encode() + b"\n")
        sys.stdout.buffer.flush()


def _answer(line: bytes) -> object:
    request = json.loads(line)
    if "check" in request:
        try:
            check_template(Source(*request["check"]), is_html=request["is_html"])
        except BadTemplate as err:
            return {"error": str(err), "line": err.line}
        return {"error": "", "line": 0}
    return render(Job.from_wire(request)).to_wire()


if __name__ == "__main__":
    main(int(sys.argv[1]))
