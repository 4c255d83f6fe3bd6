"""The demo deletes what an earlier demo left, and nothing else."""

import fcntl
from pathlib import Path

import pytest

from local.demo.__main__ import make_room
from local.processes import ProcessError


def test_what_a_demo_left_is_deleted(tmp_path: Path) -> None:
    """Whether it came as far as starting its stack or not."""
    directory = tmp_path / "var" / "demo"
    make_room(directory)
    (directory / "report.json").write_text("{}")
    make_room(directory)
    assert not (directory / "report.json").exists()
    (directory / "lock").touch()
    make_room(directory)
    assert not (directory / "lock").exists()


def test_the_data_of_another_stack_is_left_alone(tmp_path: Path) -> None:
    """It has a lock too. An older demo's directory looks the same, and is named as what it may be."""
    for name in ("lock", "report.json"):
        (tmp_path / name).touch()
    with pytest.raises(ProcessError, match="holds what no demo has marked as its own"):
        make_room(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lock", "report.json"]


def test_a_demo_that_is_running_is_left_alone(tmp_path: Path) -> None:
    """Its stack holds the lock."""
    make_room(tmp_path)
    with (tmp_path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ProcessError, match="Another demo is running"):
            make_room(tmp_path)
    assert (tmp_path / "lock").exists()
