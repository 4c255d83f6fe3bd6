"""The `carillon` command and its sub-commands.

Exit codes, the same for all of them: 0 done, or nothing to do; 1 a service refused or could not be reached; 2 the
command line or what it names cannot be used; 3 there is something to do that was not done, as asked (--dry-run) or
because nobody agreed.
"""

import typer

from cli.catalog import catalog

app = typer.Typer(
    name="carillon",
    help="Ask and tell Carillon's services.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(catalog, name="catalog")


@app.callback()
def _root() -> None:
    """Keeps sub-commands sub-commands, even while there is only one."""


def main() -> None:
    """The console script."""
    app()
