"""The README's Python runs as it stands."""

import contextlib
import io
import re

import pytest

from local.stack import PROJECT, Stack
from tests.support.servers import scratch_directory

SERVICE_AT = {"7404": "intake", "7408": "digest"}  # As `make up` gives them out.


@pytest.mark.timeout(120)
def test_the_readmes_python_notifies_somebody() -> None:
    """The snippet, pointed at the services it needs, prints an id and that the notification has been applied."""
    (snippet,) = re.findall(r"```python\n(.*?)```", (PROJECT / "README.md").read_text(), re.DOTALL)
    with scratch_directory() as scratch, Stack(scratch, services=list(SERVICE_AT.values())) as stack:
        for port, service in SERVICE_AT.items():
            assert f"127.0.0.1:{port}" in snippet
            snippet = snippet.replace(f"127.0.0.1:{port}", stack.grpc(service))
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(snippet, "README.md", "exec"), {})
    assert re.fullmatch(r"[0-9a-f-]{36} True\n", printed.getvalue())
