"""The channel `log`: for development, a delivery is a line in the log. Pure but for the function it is given."""

from collections.abc import Callable

from services.dispatcher.delivery import Letter, Reason, Result, Sent

MAX_TEXT = 1_000


class LogChannel:
    """Always works. `write` takes a sentence and fields."""

    outages: frozenset[Reason] = frozenset()

    def __init__(self, *, write: Callable[..., object]) -> None:
        self._write = write

    async def send(self, letter: Letter) -> Result:
        """See Channel."""
        delivery = letter.delivery
        self._write(
            "A delivery to the log.",
            delivery_id=str(delivery.id),
            digest_id=str(delivery.digest_id),
            tenant=delivery.tenant,
            address=delivery.address,
            subject=delivery.subject,
            text=(delivery.text or delivery.json)[:MAX_TEXT],
        )
        return Sent()

    async def close(self) -> None:
        """See Channel."""
