"""Runs the mailbox: `python -m local.mailbox --directory var/mailbox --smtp-port 2525 --http-port 8025`."""

import argparse
import asyncio
import signal
from contextlib import closing
from pathlib import Path

import uvloop
from aiohttp import web

from local.mailbox.smtp import serve_smtp
from local.mailbox.store import Store
from local.mailbox.web import Pages


async def serve(*, directory: Path, host: str, smtp_port: int, http_port: int) -> None:
    """Serve until SIGTERM or SIGINT."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    with closing(Store(directory)) as store:
        smtp = await serve_smtp(store, host, smtp_port)
        runner = web.AppRunner(Pages(store).application(), access_log=None)
        await runner.setup()
        await web.TCPSite(runner, host, http_port).start()
        print(f"Mail to {host}:{smtp_port}, page at http://{host}:{http_port}, files in {directory}.", flush=True)
        await stop.wait()
        smtp.close()
        await runner.cleanup()


def main() -> None:
    """Read the arguments and serve."""
    parser = argparse.ArgumentParser(prog="python -m local.mailbox", description=__doc__)
    parser.add_argument("--directory", type=Path, default=Path("var/mailbox"))
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--smtp-port", type=int, default=2525)
    parser.add_argument("--http-port", type=int, default=8025)
    uvloop.run(serve(**vars(parser.parse_args())))


if __name__ == "__main__":
    main()
