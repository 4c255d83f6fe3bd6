"""Ports for local servers: nobody is given one that somebody else is about to use."""

import random
import subprocess
import sys

import pytest

from local import processes


def test_a_port_is_given_to_one_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process and in others, although nobody listens on it yet."""
    drawn = iter([20_011, 20_011, 20_012])
    monkeypatch.setattr(random, "randint", lambda _low, _high: next(drawn))
    first, second = processes.free_port(), processes.free_port()
    assert first != second
    script = f"from local.processes import _claim; print([_claim(port) for port in ({first}, {second}, 9)])"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[False, False, True]"


def test_ports_that_were_given_long_ago_may_be_given_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only so many are kept, and so many descriptors."""
    monkeypatch.setattr(processes, "_MAX_CLAIMS", 2)
    monkeypatch.setattr(processes, "_claims", type(processes._claims)())
    for port in (1, 2, 3):
        assert processes._claim(port)
    assert processes._claim(1)
    assert not processes._claim(3)
