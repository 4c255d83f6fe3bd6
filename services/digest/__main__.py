"""`python -m services.digest [serve | migrate]`."""

from pathlib import Path

from libs.service import main
from services.digest.app import build
from services.digest.settings import DigestServiceSettings

if __name__ == "__main__":
    main(
        service="digest",
        receivers=("scheduler", "dispatcher"),
        senders=("intake", "scheduler", "dispatcher"),
        settings=DigestServiceSettings,
        build=build,
        directory=Path(__file__).parent,
    )
