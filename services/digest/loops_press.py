"""The press: the parent's side of the process that renders (loops_press_worker.py).

Jobs are written ahead, results are read as they come. When one takes longer than the limit, or the process dies over it, the
process is killed and started anew; that job's templates are put in quarantine, where the built-in ones stand in for them,
and everything after it goes on. So a template that never ends costs its tenant its own looks, and everybody else one limit.
"""

import asyncio
import json
import os
import sys
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from typing import Any, Final, Self

from services.digest import metrics
from services.digest.rendering import BadTemplate
from services.digest.rendering_jobs import Job, Rendered, Source

_LINE_BYTES: Final = 256 << 20
_QUARANTINE: Final = 1_000


class PressJam(Exception):
    """The process that renders did not answer, or died."""


class Press:
    """One rendering process, started when first needed; use as `async with`. Calls wait for each other."""

    def __init__(self, *, time_limit: timedelta, memory_bytes: int) -> None:
        self._time_limit_s = time_limit.total_seconds()
        self._memory_bytes = memory_bytes
        self._process: asyncio.subprocess.Process | None = None
        self._lock = asyncio.Lock()
        self._quarantine: OrderedDict[Source, str] = OrderedDict()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._kill()

    async def render(self, jobs: Sequence[Job]) -> list[Rendered]:
        """One result per job, in order. A job that even alone and with built-in templates cannot be rendered has no parts."""
        results: list[Rendered] = []
        async with self._lock:
            while len(results) < len(jobs):
                await self._render_ahead(jobs, results)
        return results

    async def check(self, source: Source, *, is_html: bool) -> None:
        """Raise BadTemplate unless the template compiles, in bounded time and memory."""
        async with self._lock:
            try:
                (answer,) = [one async for one in self._ask([{"check": source, "is_html": is_html}])]
            except PressJam as err:
                raise BadTemplate("takes too much time or memory to compile", 1) from err
        if answer["error"]:
            raise BadTemplate(answer["error"], answer["line"])

    async def _render_ahead(self, jobs: Sequence[Job], results: list[Rendered]) -> None:
        """Add results until all are there or one job jams, which then has its result too."""
        waiting = [self._allowed(job) for job in jobs[len(results) :]]
        try:
            async for answer in self._ask([job.to_wire() for job, _ in waiting]):
                result = Rendered.from_wire(answer)
                reason = waiting[len(results) - (len(jobs) - len(waiting))][1]
                results.append(replace(result, error=reason) if reason and not result.error else result)
        except PressJam as err:
            jammed, _ = waiting[len(results) - (len(jobs) - len(waiting))]
            metrics.PRESS_JAMS.inc()
            if not jammed.templates:
                results.append(Rendered(id=jammed.id, parts=[], error=str(err)))
            for source in jammed.templates.values():
                self._quarantine[source] = f"template {source.name}: {err}"
                while len(self._quarantine) > _QUARANTINE:
                    self._quarantine.popitem(last=False)

    def _allowed(self, job: Job) -> tuple[Job, str]:
        """The job without templates where one of them is in quarantine, and why."""
        reason = next((self._quarantine[one] for one in job.templates.values() if one in self._quarantine), "")
        return (replace(job, templates={}), reason) if reason else (job, "")

    async def _ask(self, requests: Sequence[Mapping[str, Any]]) -> Any:
        """Answers to requests, in order; raises PressJam, after which the process is gone."""
        process = await self._running()
        assert process.stdin is not None and process.stdout is not None
        writing = asyncio.create_task(self._write(process.stdin, requests))
        try:
            for _ in requests:
                async with asyncio.timeout(self._time_limit_s):
                    line = await process.stdout.readline()
                if not line:
                    raise PressJam("took more memory than it may, or crashed")
                yield json.loads(line)
            await writing
        except TimeoutError as err:
            raise PressJam(f"took longer than {self._time_limit_s:g} s") from err
        except (ValueError, OSError) as err:
            raise PressJam(f"gave no usable answer: {err}") from err
        finally:
            if not writing.done() or writing.exception() is not None:
                writing.cancel()
                with suppress(asyncio.CancelledError, OSError):
                    await writing
                await self._kill()
            elif sys.exc_info()[0] is not None:
                await self._kill()

    async def _write(self, stdin: asyncio.StreamWriter, requests: Sequence[Mapping[str, Any]]) -> None:
        for request in requests:
            stdin.write(json.dumps(request).encode() + b"\n")
            await stdin.drain()

    async def _running(self) -> asyncio.subprocess.Process:
        if self._process is None or self._process.returncode is not None:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "services.digest.loops_press_worker", str(self._memory_bytes)),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                limit=_LINE_BYTES,
                env=_bare_environment(),
            )
        return self._process

    async def _kill(self) -> None:
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
