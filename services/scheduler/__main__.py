"""`python -m services.scheduler [serve | migrate]`."""

from pathlib import Path

from libs.service import main
from services.scheduler.app import RECEIVERS, build
from services.scheduler.settings import Settings

if __name__ == "__main__":
    main(
        service="scheduler",
        receivers=RECEIVERS,
        senders=("intake", "digest", "dispatcher"),
        settings=Settings,
        build=build,
        directory=Path(__file__).parent,
    )
