"""The press: the parent's side of the process that renders (loops_press_worker.py).

Jobs are written ahead, results are read as they come. A job may use so much of the processor's time, not of the
clock's: a machine that is busy, or a process that was paused, is no template's fault. When a job uses more, its
process is ended by its own alarm and a new one is started; the job's templates are put in quarantine, where the
built-in ones stand in for them, and everything after it goes on. So a template that never ends costs its tenant its
own looks, and everybody else one limit. Which of a job's templates it was nobody knows, so they are tried again after
ten minutes; other tenants' of the same text are not theirs.

A process that dies otherwise (killed, out of memory) is replaced and the job tried again; only one that dies of the
same job every time is that job's fault. One that is silent for very long is replaced too, and the caller hears of it
as PressJam: nobody knows whose fault that is, so nobody is blamed, and the caller's transaction is repeated later.
"""

import asyncio
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Final, Self

from cachetools import TTLCache

from services.digest import metrics
from services.digest.rendering_jobs import (
    ANSWER_HEAD,
    BATCH_BYTES,
    BATCH_S,
    Answer,
    Job,
    Part,
    Rendered,
    Request,
    Source,
)
from services.digest.rendering_sandbox import BadTemplate

_READ_AHEAD_BYTES: Final = 1 << 20
_START_S: Final = 60.0
_SILENCE_S: Final = 30.0
_PER_LINE_S: Final = 0.001  # On top of the limit; the built-in templates need 0.02 ms for an item.
_TRIES: Final = 3
_QUARANTINE: Final = 1_000
_QUARANTINE_S: Final = 600.0

_Answered = tuple[Sequence[Part], Answer]


class PressJam(Exception):
    """The process that renders is silent."""


class _Died(Exception):
    """The process ended over a job; `is_time` when it had used up the job's time."""

    def __init__(self, message: str, *, is_time: bool) -> None:
        super().__init__(message)
        self.is_time = is_time


class Press:
    """One rendering process, started when first needed; use as `async with`. Calls wait for each other."""

    def __init__(self, *, time_limit: timedelta, memory_bytes: int) -> None:
        self._limit_s = time_limit.total_seconds()
        self._memory_bytes = memory_bytes
        self._process: asyncio.subprocess.Process | None = None
        self._lock = asyncio.Lock()
        self._quarantine: TTLCache[tuple[str, Source], str] = TTLCache(_QUARANTINE, ttl=_QUARANTINE_S)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._kill()

    async def render(self, jobs: Sequence[Job]) -> list[Rendered]:
        """One result per job, in order, for as many as BATCH_S and BATCH_BYTES are enough, the first in any case.

        A job that cannot be rendered even with built-in templates has no parts. Raises PressJam when nothing was heard
        of the process for half a minute.
        """
        results: list[Rendered] = []
        deaths = 0
        async with self._lock:
            until_s = time.monotonic() + BATCH_S
            while len(results) < len(jobs):
                done, died = await self._render_until_death(jobs[len(results) :])
                deaths = 0 if done else deaths
                results += done
                if died is None:
                    break
                metrics.PRESS_JAMS.inc()
                deaths += 1
                if died.is_time or deaths == _TRIES:
                    results += self._blame(jobs[len(results)], died)
                    deaths = 0
                if results and (time.monotonic() > until_s or _bytes_of(results) > BATCH_BYTES):
                    break
        return results

    async def check(self, source: Source, *, is_html: bool) -> None:
        """Raise BadTemplate unless the template compiles, in bounded time and memory."""
        async with self._lock:
            answers, _ = await self._exchange([Request(limit_s=self._limit_s, check=source, is_html=is_html)])
        if not answers:
            raise BadTemplate("takes too much time or memory to compile", 1)
        _, answer = answers[0]
        if answer.error:
            raise BadTemplate(answer.error, answer.line, answer.place)

    async def _render_until_death(self, jobs: Sequence[Job]) -> tuple[list[Rendered], _Died | None]:
        """Results of all jobs, of those that were begun, or of those before the one over which the process died."""
        allowed = [self._allowed(job) for job in jobs]
        requests = [
            Request(limit_s=self._limit_of(job), job=job, is_first=not number)
            for number, (job, _) in enumerate(allowed)
        ]
        answers, died = await self._exchange(requests)
        results = []
        for (parts, answer), (job, reason) in zip(answers, allowed, strict=False):
            if answer.is_left:
                break
            results.append(Rendered(id=job.id, parts=parts, error=answer.error or reason))
        return results, died

    def _limit_of(self, job: Job) -> float:
        return self._limit_s + len(job.lines) * _PER_LINE_S

    def _blame(self, job: Job, died: _Died) -> list[Rendered]:
        """The result of a job that cannot be rendered; none yet for one that will be tried without its templates."""
        allowed, _ = self._allowed(job)
        if not allowed.templates:
            return [Rendered(id=job.id, parts=[], error=str(died))]
        for source in allowed.templates.values():
            self._quarantine[job.tenant, source] = f"template {source.name}: {died}"
        return []

    def _allowed(self, job: Job) -> tuple[Job, str]:
        """The job without templates where one of them is in quarantine, and why."""
        reasons = (self._quarantine.get((job.tenant, source)) for source in job.templates.values())
        reason = next(filter(None, reasons), "")
        return (replace(job, templates={}), reason) if reason else (job, "")

    async def _exchange(self, requests: Sequence[Request]) -> tuple[list[_Answered], _Died | None]:
        """Answers in order: to all, or to those before the one over which the process died."""
        process = await self._running()
        writing = asyncio.create_task(_write(process, requests))
        answers: list[_Answered] = []
        is_whole = False
        try:
            while len(answers) < len(requests):
                answers.append(await _answered(process, _SILENCE_S + requests[len(answers)].limit_s))
            is_whole = True
        except EOFError:
            return answers, _died(await process.wait(), requests[len(answers)].limit_s)
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
                limit=_READ_AHEAD_BYTES,
                env={"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},  # Without our secrets.
            )
            await self._started(self._process)
        return self._process

    async def _started(self, process: asyncio.subprocess.Process) -> None:
        try:
            await _read(process, _START_S)
        except (EOFError, PressJam) as err:
            await self._kill()
            raise PressJam("The process that renders does not start.") from err

    async def _kill(self) -> None:
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            process.kill()
            await process.wait()


def _bytes_of(results: Sequence[Rendered]) -> int:
    return sum(len(text) for one in results for part in one.parts for text in part)


async def _write(process: asyncio.subprocess.Process, requests: Sequence[Request]) -> None:
    assert process.stdin is not None
    for request in requests:
        for line in request.to_wire():
            process.stdin.write(line + b"\n")
            await process.stdin.drain()


async def _answered(process: asyncio.subprocess.Process, silence_s: float) -> _Answered:
    """The next answer with the parts that stand; raises as `_read`."""
    parts: list[Part] = []
    while True:
        answer = await _read(process, silence_s)
        if answer.is_taken_back:
            parts.clear()
        if answer.part is not None:
            parts.append(answer.part)
        if not answer.goes_on:
            return parts, answer


async def _read(process: asyncio.subprocess.Process, seconds: float) -> Answer:
    """The next piece; raises EOFError when the process has ended and PressJam when it says nothing."""
    assert process.stdout is not None
    try:
        async with asyncio.timeout(seconds):
            size = int.from_bytes(await process.stdout.readexactly(ANSWER_HEAD))
            return Answer.from_wire(await process.stdout.readexactly(size))
    except TimeoutError as err:
        raise PressJam(f"The process that renders has said nothing for {seconds:g} s.") from err


def _died(status: int, limit_s: float) -> _Died:
    if status == -signal.SIGPROF:
        return _Died(f"took longer than {limit_s:g} s", is_time=True)
    return _Died(f"took more memory than it may, or crashed (status {status})", is_time=False)
