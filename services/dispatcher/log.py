"""The channel `log`: for development, a delivery is a line in the log. Pure but for the function it is given."""

from typing import Protocol

from services.dispatcher.delivery import Letter, Result, Sent

MAX_TEXT = 1_000


class Write(Protocol):
    """Writes one line: a sentence and fields."""

    def __call__(self, message: str, /, **fields: object) -> object: ...


class LogChannel:
    """Always works."""

    def __init__(self, *, write: Write) -> None:
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
