"""The rendering process: what a hostile template can do to it, and what it cannot do to others."""

import asyncio
import re
import signal
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from services.digest.loops_press import Press
from services.digest.rendering_jobs import Job, Line, Rendered, Source
from services.digest.rendering_sandbox import BadTemplate

ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
JOB = Job(
    tenant="acme",
    id="fine",
    is_alone=False,
    format="text",
    style="summary",
    subscriber="ann",
    zone="UTC",
    locale="en",
    cadence="daily",
    cadence_name="Daily",
    closed_at="2026-07-10T12:00:00+00:00",
    lines=[Line("id", "t", "T", "E", "", "2026-07-09T12:15:00+00:00", "{}")],
)


def press() -> Press:
    """With half a second per job."""
    return Press(time_limit=timedelta(seconds=0.5), memory_bytes=512 << 20)


def with_item(one_id: str, body: str) -> Job:
    """The same job with a template of the tenant's own."""
    return replace(JOB, id=one_id, templates={"item/text/t": Source(one_id, "", body)})


async def render_all(one: Press, jobs: Sequence[Job]) -> list[Rendered]:
    """In as many calls as it takes, on a busy machine more than one."""
    results: list[Rendered] = []
    while len(results) < len(jobs):
        results += await one.render(jobs[len(results) :])
    return results


async def test_an_endless_template_is_stopped_and_everybody_is_rendered() -> None:
    """The ones before and after are untouched; its own message is written by the built-in template, and says why."""
    async with press() as one:
        results = await render_all(one, [JOB, with_item("endless", ENDLESS), with_item("good", "mine"), JOB])
    assert [result.id for result in results] == ["fine", "endless", "good", "fine"]
    assert [len(result.parts) for result in results] == [1, 1, 1, 1]
    assert [bool(result.error) for result in results] == [False, True, False, False]
    assert "template endless: took longer than" in results[1].error
    assert results[1].parts == results[0].parts
    assert "mine" in results[2].parts[0].text


async def test_a_template_that_jammed_is_not_tried_again() -> None:
    """Quarantined by its text: the second time costs nothing, and a mended template is free again."""
    async with press() as one:
        await one.render([with_item("t", ENDLESS)])
        process = one._process
        (result,) = await one.render([with_item("t", ENDLESS)])
        (mended,) = await one.render([with_item("t", "mended")])
        assert process is None or one._process is process
    assert "took longer than" in result.error
    assert "mended" in mended.parts[0].text


async def test_another_tenants_template_of_the_same_text_is_not_in_quarantine() -> None:
    """And its own tenant's leaves after ten minutes: it may have been another template, or one large digest."""
    own, others = with_item("t", ENDLESS), replace(with_item("t", ENDLESS), tenant="other")
    async with press() as one:
        await one.render([own])
        assert [one._allowed(job)[1] != "" for job in (own, others)] == [True, False]
        one._quarantine.expire(time.monotonic() + 601)
        assert one._allowed(own) == (own, "")


async def test_jobs_that_take_long_are_left_for_another_time() -> None:
    """None is over its limit, but together they would keep everybody waiting: they are as if they had never come."""
    slow = "{% for a in range(9999) %}{% for b in range(999) %}{% endfor %}{% endfor %}done"
    jobs = [with_item(str(number), slow) for number in range(40)]
    async with Press(time_limit=timedelta(seconds=5), memory_bytes=512 << 20) as one:
        results = await one.render(jobs)
        (last,) = await one.render(jobs[-1:])
    assert 1 <= len(results) < 40
    assert [result.id for result in results] == [job.id for job in jobs[: len(results)]]
    assert all("done" in result.parts[0].text for result in [*results, last])


async def test_jobs_that_write_much_are_left_for_another_time() -> None:
    """So that what waits to be committed fits into memory."""
    large = replace(with_item("large", "{{ 'x' * 200000 }}"), lines=[*JOB.lines] * 20)
    async with Press(time_limit=timedelta(seconds=30), memory_bytes=512 << 20) as one:
        results = await one.render([large] * 40)
        again = await render_all(one, [large] * 2)
    assert 1 <= len(results) <= 5
    assert {len(result.parts) for result in results} == {20}
    assert [len(result.parts) for result in again] == [20] * 2


async def test_jobs_behind_one_that_uses_up_time_and_limit_are_left() -> None:
    """The process died, and time is up: those done stay done."""
    jobs = [JOB, with_item("endless", ENDLESS), JOB, JOB]
    async with Press(time_limit=timedelta(seconds=3), memory_bytes=512 << 20) as one:
        first = await one.render(jobs)
        rest = await render_all(one, jobs[1:])
    assert [result.error for result in first] == [""]
    assert [bool(result.error) for result in rest] == [True, False, False]


async def test_a_template_that_wants_gigabytes_meets_the_limit() -> None:
    """It fails, or dies with its process; the message goes out either way."""
    async with press() as one:
        results = await render_all(one, [with_item("huge", "{{ 'x' * 10 ** 11 }}"), JOB])
    assert [len(result.parts) for result in results] == [1, 1]
    assert results[0].error != ""


async def test_a_large_digest_is_rendered_part_by_part_in_little_memory() -> None:
    """20,000 items in HTML: each in exactly one part; the process holds items and one part, not all messages twice."""
    lines = [JOB.lines[0]._replace(entity=f"E{number}") for number in range(20_000)]
    async with Press(time_limit=timedelta(seconds=30), memory_bytes=512 << 20) as one:
        await one.render([JOB])
        assert one._process is not None
        before = _peak_bytes(one._process.pid)
        (result,) = await one.render([replace(JOB, format="html", lines=lines)])
        used = _peak_bytes(one._process.pid) - before
    assert result.error == ""
    shown = [row.split()[1] for part in result.parts for row in part.text.splitlines() if row.startswith("- ")]
    assert shown == [f"E{number}" for number in range(20_000)]
    assert sum(len(part.html) for part in result.parts) > 8 << 20
    assert used < 60 << 20


async def test_a_template_that_fails_in_a_late_part_leaves_nothing_behind() -> None:
    """Every part is the built-in template's then, those that had come before the failure included."""
    lines = [JOB.lines[0]._replace(entity=f"E{number}") for number in range(4_000)]
    large = replace(JOB, format="html", lines=lines)
    failing = replace(large, templates={"layout/html": Source("late", "", "{{ 1 // (digest.part - 3) }}")})
    async with Press(time_limit=timedelta(seconds=30), memory_bytes=512 << 20) as one:
        ours, fallen_back, after = await render_all(one, [large, failing, JOB])
    assert len(ours.parts) > 3
    assert "ZeroDivisionError" in fallen_back.error
    assert fallen_back.parts == ours.parts
    assert len(after.parts) == 1


def _peak_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status).group(1)) << 10  # type: ignore[union-attr]


async def test_a_process_that_was_killed_is_replaced() -> None:
    """Between two calls: the next one starts another."""
    async with press() as one:
        await one.render([JOB])
        assert one._process is not None
        one._process.kill()
        await one._process.wait()
        (result,) = await one.render([JOB])
    assert len(result.parts) == 1


async def test_a_process_killed_over_a_job_is_no_fault_of_the_job() -> None:
    """Somebody else's SIGKILL in the middle: the job is done by the next process, with its own template."""
    slow = with_item("slow", "{% for a in range(300) %}{% for b in range(9999) %}{% endfor %}{% endfor %}slow but fine")
    async with Press(time_limit=timedelta(seconds=30), memory_bytes=512 << 20) as one:
        await one.render([JOB])
        process = one._process
        assert process is not None
        rendering = asyncio.create_task(render_all(one, [JOB, slow, JOB]))
        await asyncio.sleep(0)
        process.kill()
        results = await rendering
    assert [len(result.parts) for result in results] == [1, 1, 1]
    assert [result.error for result in results] == ["", "", ""]
    assert "slow but fine" in results[1].parts[0].text


async def test_a_paused_process_is_not_blamed() -> None:
    """Longer than the limit by the clock, not by the processor: the template keeps its looks."""
    async with press() as one:
        await one.render([JOB])
        process = one._process
        assert process is not None
        process.send_signal(signal.SIGSTOP)
        rendering = asyncio.create_task(one.render([with_item("mine", "mine")]))
        done, _ = await asyncio.wait([rendering], timeout=1)
        process.send_signal(signal.SIGCONT)
        (result,) = await rendering
    assert not done
    assert result.error == ""
    assert "mine" in result.parts[0].text


async def test_templates_are_checked_in_the_process() -> None:
    """Compiling is bounded like rendering; what is wrong comes back with its line."""
    async with press() as one:
        await one.check(Source("t", "{{ item.title }}", "{{ 'x' * 10 ** 11 }}"), is_html=True)
        with pytest.raises(BadTemplate) as caught:
            await one.check(Source("t", "", "a\n{% if %}"), is_html=True)
    assert caught.value.line == 2
