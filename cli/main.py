"""The `carillon` command and its sub-commands.

Exit codes, the same for all of them: 0 done, or nothing to do; 1 a service refused or could not be reached, or nobody
reads what is written (`| head -1`); 2 the command line or what it names cannot be used; 3 not all of it was done: some
was refused, it stopped on the way, somebody has not answered, or there is something to do that was left, as asked
(--dry-run) or because nobody agreed.
"""

from pathlib import Path
from typing import Annotated

import typer

from cli import audit, doctor, explain, notify, schedule, tail
from cli.batch import batch
from cli.catalog import catalog
from cli.dead_letters import dead_letters
from cli.deliveries import deliveries
from cli.digests import digests
from cli.profile import ProfileError, defaults_of, read_profile
from cli.requests import requests
from cli.session import stop
from cli.subscribers import cadences, subscribers
from cli.subscriptions import subscriptions
from cli.suppressions import suppressions
from cli.timelines import timelines
from cli.timers import timers

app = typer.Typer(
    name="carillon",
    help="Ask and tell Carillon's services.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
notify.register(app)
schedule.register(app)
app.add_typer(timers, name="timers")
app.add_typer(timelines, name="timelines")
app.add_typer(requests, name="requests")
app.add_typer(subscribers, name="subscribers")
app.add_typer(subscriptions, name="subscriptions")
app.add_typer(cadences, name="cadences")
app.add_typer(digests, name="digests")
app.add_typer(deliveries, name="deliveries")
app.add_typer(dead_letters, name="dead-letters")
app.add_typer(suppressions, name="suppressions")
app.add_typer(batch, name="batch")
audit.register(app)
explain.register(app)
tail.register(app)
app.add_typer(catalog, name="catalog")
doctor.register(app)


@app.callback()
def _root(
    context: typer.Context,
    profile: Annotated[
        str, typer.Option("--profile", envvar="CARILLON_PROFILE", help="Addresses and credentials by name.")
    ] = "",
    config: Annotated[
        Path | None,
        typer.Option("--config", envvar="CARILLON_CONFIG", help="Where the profiles are.", show_default=False),
    ] = None,
) -> None:
    """Ask and tell Carillon's services."""
    try:
        context.default_map = defaults_of(context.command, read_profile(profile, config))
    except ProfileError as error:
        stop(str(error))


def main() -> None:
    """The console script."""
    app()
