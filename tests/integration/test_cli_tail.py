"""`carillon tail` on a NATS that is not as it should be."""

import pytest
from typer.testing import CliRunner

from cli.main import app
from local.servers import NatsServer


def test_where_nobody_has_made_the_stream_it_says_so(
    private_nats: NatsServer, caplog: pytest.LogCaptureFixture
) -> None:
    """One sentence, exit code 1."""
    arguments = ["tail", "--only", "events", "--nats", private_nats.url]
    ran = CliRunner().invoke(app, arguments, env={"CARILLON_CONFIG": None})
    assert (ran.exit_code, ran.stdout) == (1, "")
    assert ran.stderr == (
        f"Events cannot be followed at {private_nats.url}: there is no stream EVENTS; schedulers make it.\n"
    )
    assert caplog.records == []
