"""`python -m services.intake [serve | migrate]`."""

from pathlib import Path

from libs.service import main
from services.intake.app import build
from services.intake.settings import ServiceSettings

if __name__ == "__main__":
    main(
        service="intake",
        receivers=("scheduler", "digest"),
        senders=("scheduler",),
        settings=ServiceSettings,
        build=build,
        directory=Path(__file__).parent,
    )
