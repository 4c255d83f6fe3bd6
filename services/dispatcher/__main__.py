"""`python -m services.dispatcher [serve | migrate]`."""

from pathlib import Path

from libs.service import main
from services.dispatcher.app import build
from services.dispatcher.settings import DispatcherSettings

if __name__ == "__main__":
    main(
        service="dispatcher",
        receivers=("digest", "scheduler"),
        senders=("digest", "scheduler"),
        settings=DispatcherSettings,
        build=build,
        directory=Path(__file__).parent,
    )
