"""The press: the parent's side of the process that renders (loops_press_worker.py).

Jobs are written ahead, results are read as they come. When one takes longer than the limit, or the process dies over
it, the process is killed and started anew; that job's templates are put in quarantine, where the built-in ones stand
in for them, and everything after it goes on. So a template that never ends costs its tenant its own looks, and
everybody else one limit.
"""

import asyncio
import json
import os
import sys
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any, Final, Self

from services.digest import metrics
from services.digest.rendering import BadTemplate
from services.digest.rendering_jobs import Job, Rendered, Source

_ANSWER_BYTES: Final = 1 << 30
_START_S: Final = 60.0
_PER_LINE_S: Final = 0.001  # On top of the limit; the built-in templates need 0.1 ms for an item.
_QUARANTINE: Final = 1_000


class PressJam(Exception):
    """The process that renders did not answer, or died."""


class Press:
    """One rendering process, started when first needed; use as `async with`. Calls wait for each other."""

    def __init__(self, *, time_limit: timedelta, memory_bytes: int) -> None:
        self._limit_s = time_limit.total_seconds()
        self._memory_bytes = memory_bytes
        self._process: asyncio.subprocess.Process | None = None
        self._lock = asyncio.Lock()
        self._quarantine: OrderedDict[Source, str] = OrderedDict()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._kill()

    async def render(self, jobs: Sequence[Job]) -> list[Rendered]:
        """One result per job, in order. A job that cannot be rendered even with built-in templates has no parts."""
        results: list[Rendered] = []
        async with self._lock:
            while len(results) < len(jobs):
                results += await self._render_until_jam(jobs[len(results) :])
        return results

    async def check(self, source: Source, *, is_html: bool) -> None:
        """Raise BadTemplate unless the template compiles, in bounded time and memory."""
        async with self._lock:
            answers, _ = await self._exchange([{"check": source, "is_html": is_html, "limit_s": self._limit_s}])
        if not answers:
            raise BadTemplate("takes too much time or memory to compile", 1)
        if answers[0]["error"]:
            raise BadTemplate(answers[0]["error"], answers[0]["line"], answers[0]["part"])

    async def _render_until_jam(self, jobs: Sequence[Job]) -> list[Rendered]:
        """Results of the first jobs: all, or up to one that jams. That one is without its templates the next time."""
        allowed = [self._allowed(job) for job in jobs]
        requests = [
            {"job": job.to_wire(), "limit_s": self._limit_s + len(job.lines) * _PER_LINE_S} for job, _ in allowed
        ]
        answers, jam = await self._exchange(requests)
        results = []
        for answer, (_, reason) in zip(answers, allowed, strict=False):
            result = Rendered.from_wire(answer)
            results.append(replace(result, error=reason) if reason and not result.error else result)
        if jam is not None:
            metrics.PRESS_JAMS.inc()
            job, _ = allowed[len(results)]
            if not job.templates:
                results.append(Rendered(id=job.id, parts=[], error=str(jam)))
            self._put_in_quarantine(job, jam)
        return results

    def _allowed(self, job: Job) -> tuple[Job, str]:
        """The job without templates where one of them is in quarantine, and why."""
        reason = next((self._quarantine[one] for one in job.templates.values() if one in self._quarantine), "")
        return (replace(job, templates={}), reason) if reason else (job, "")

    def _put_in_quarantine(self, job: Job, jam: PressJam) -> None:
        for source in job.templates.values():
            self._quarantine[source] = f"template {source.name}: {jam}"
            while len(self._quarantine) > _QUARANTINE:
                self._quarantine.popitem(last=False)

    async def _exchange(self, requests: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], PressJam | None]:
        """Answers in order: to all, or to those before the one that jammed. After a jam the process is gone."""
        process = await self._running()
        writing = asyncio.create_task(_write(process, requests))
        answers: list[dict[str, Any]] = []
        is_whole = False
        try:
            for request in requests:
                answers.append(await _read(process, request["limit_s"]))  # noqa: PERF401 - those before a jam count.
            is_whole = True
        except PressJam as jam:
            return answers, jam
        finally:
            if not is_whole:
                await self._kill()
            await asyncio.gather(writing, return_exceptions=True)
        return answers, None

    async def _running(self) -> asyncio.subprocess.Process:
        if self._process is None or self._process.returncode is not None:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "services.digest.loops_press_worker", str(self._memory_bytes)),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                limit=_ANSWER_BYTES,
                env={"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},  # Without our secrets.
            )
            await _read(self._process, _START_S)
        return self._process

    async def _kill(self) -> None:
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            process.kill()
            await process.wait()


async def _write(process: asyncio.subprocess.Process, requests: Sequence[Mapping[str, Any]]) -> None:
    assert process.stdin is not None
    for request in requests:
        process.stdin.write(json.dumps(request).encode() + b"\n")
        await process.stdin.drain()


async def _read(process: asyncio.subprocess.Process, limit_s: float) -> dict[str, Any]:
    assert process.stdout is not None
    try:
        async with asyncio.timeout(limit_s):
            line = await process.stdout.readline()
        answer: dict[str, Any] = json.loads(line)
    except TimeoutError as err:
        raise PressJam(f"took longer than {limit_s:g} s") from err
    except ValueError as err:
        raise PressJam("took more memory than it may, or crashed") from err
    return answer
