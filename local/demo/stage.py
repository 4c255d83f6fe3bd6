"""Where the demo plays: a stack of processes, or the compose stack."""

import os
from typing import Protocol
from urllib.parse import urlsplit

from local.servers import create_database, drop_database
from local.stack import Stack


class Stage(Protocol):
    """What the demo needs of a stack. All methods block."""

    @property
    def postgres_url(self) -> str:
        """The database all services use."""
        ...

    @property
    def mailbox_url(self) -> str:
        """The mailbox's page, as seen from here."""
        ...

    @property
    def hooks_url(self) -> str:
        """Where webhooks go, as seen from the dispatcher; a name follows."""
        ...

    @property
    def token(self) -> str | None:
        """What callers show, if anything."""
        ...

    def grpc(self, service: str) -> str:
        """Where a service answers gRPC, as host:port."""
        ...

    def start(self) -> None:
        """Bring everything up. Raises ProcessError, having stopped everything."""
        ...

    def stop(self) -> None:
        """Take everything down; the mails stay, in the directory `mailbox`."""
        ...

    def kill(self, service: str) -> None:
        """SIGKILL one process of a service, and return when it is gone."""
        ...

    def restart(self, service: str) -> None:
        """Start that one again, and return when it is ready."""
        ...

    def raise_if_failed(self) -> None:
        """Raise ProcessError for a process that ended and was not meant to."""
        ...


class ProcessStage(Stack):
    """A stack that on an existing Postgres uses a database of its own, `carillon_demo`, made anew each time."""

    token = None

    @property
    def hooks_url(self) -> str:
        """See Stage."""
        return f"{self.mailbox_url}/hooks"

    def start(self) -> None:
        """See Stack."""
        if existing := os.environ.get("CARILLON_POSTGRES_URL"):
            url = urlsplit(existing)._replace(path="/carillon_demo").geturl()
            drop_database(url)
            create_database(url)
            os.environ["CARILLON_POSTGRES_URL"] = url
        super().start()
