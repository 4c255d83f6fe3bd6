"""Bulk calls: order, the bound on what is under way, and how they end."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from services.intake.rpc_streams import answer_in_order


async def numbers(count: int) -> AsyncIterator[int]:
    """0 to count - 1."""
    for number in range(count):
        yield number


async def test_answers_come_in_the_order_of_the_requests() -> None:
    """Also when later ones are done first."""
    gates = [asyncio.Event() for _ in range(3)]

    async def answer(number: int) -> int:
        if number == 2:
            gates[1].set()
        elif number == 1:
            await gates[1].wait()
            gates[0].set()
        else:
            await gates[0].wait()
        return number * 10

    assert [one async for one in answer_in_order(numbers(3), answer)] == [0, 10, 20]


async def test_reading_stops_at_the_bound() -> None:
    """At most so many are begun and not yet taken, however many there are to read (INV-9)."""
    begun: list[int] = []

    async def answer(number: int) -> int:
        begun.append(number)
        return number

    answers = answer_in_order(numbers(100), answer, most=4)
    assert await anext(answers) == 0
    for _ in range(20):
        await asyncio.sleep(0)
    assert begun == [0, 1, 2, 3]
    assert [one async for one in answers] == list(range(1, 100))


async def test_the_first_failure_ends_the_stream_and_what_is_under_way() -> None:
    """What came before it was answered."""
    cancelled = asyncio.Event()

    async def answer(number: int) -> int:
        if number == 1:
            raise ValueError("wrong as a whole")
        if number == 2:
            try:
                await asyncio.Event().wait()
            finally:
                cancelled.set()
        return number

    answers = answer_in_order(numbers(5), answer)
    assert await anext(answers) == 0
    with pytest.raises(ValueError, match="wrong as a whole"):
        await anext(answers)
    async with asyncio.timeout(5):
        await cancelled.wait()


async def test_an_error_of_the_reading_side_comes_after_the_answers() -> None:
    """A caller that goes away or sends nonsense ends the stream with that error."""

    async def broken() -> AsyncIterator[int]:
        yield 1
        raise ValueError("no message")

    async def answer(number: int) -> int:
        return number

    answers = answer_in_order(broken(), answer)
    assert await anext(answers) == 1
    with pytest.raises(ValueError, match="no message"):
        await anext(answers)
