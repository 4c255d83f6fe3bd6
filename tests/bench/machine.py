"""The machine a benchmark runs on, and what processes cost on it. Reads /proc, so Linux only."""

import os
import platform
import statistics
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")


def describe(directory: Path) -> dict[str, object]:
    """Processor, memory, load and disk; `directory` is where the servers' data will be."""
    return {
        "processor": f"{len(os.sched_getaffinity(0))} cores, {_processor()}",
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "load before": f"{os.getloadavg()[0]:.1f} (1 min)",
        "disk": f"fsync of 8 KiB takes {_fsync_ms(directory):.2f} ms (median of 50)",
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
    }


def versions(*packages: str) -> dict[str, str]:
    """Versions of installed packages, `none` for those that are not."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "none"
    return found


def peak_rss_bytes(pid: int) -> int:
    """The most memory a process has had resident since it started (VmHWM)."""
    return _status_bytes(pid, "VmHWM")


def rss_bytes(pid: int) -> int:
    """What a process has resident now."""
    return _status_bytes(pid, "VmRSS")


def cpu_s(pid: int) -> float:
    """CPU seconds of a process with all threads, its living children and those that have ended, in user and kernel."""
    total = 0.0
    for one in (pid, *children(pid)):
        try:
            fields = (Path("/proc") / str(one) / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # It ended meanwhile and is in its parent's sum.
            continue
        total += sum(int(ticks) for ticks in fields[11:15]) / _TICKS
    return total


def own_cpu_s(pid: int) -> float:
    """CPU seconds of a process with all threads, without its children; 0 if it has ended."""
    try:
        fields = (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(int(ticks) for ticks in fields[11:13]) / _TICKS


def children(pid: int) -> list[int]:
    """Processes that a process's main thread has started, and that live."""
    try:
        text = (Path("/proc") / str(pid) / "task" / str(pid) / "children").read_text()
    except OSError:
        return []
    return [int(one) for one in text.split()]


def _status_bytes(pid: int, name: str) -> int:
    for line in (Path("/proc") / str(pid) / "status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(f"/proc/{pid}/status has no {name}")


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _fsync_ms(directory: Path) -> float:
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "fsync"
    took = []
    descriptor = os.open(path, os.O_CREAT | os.O_WRONLY)
    try:
        for number in range(50):
            os.pwrite(descriptor, b"\0" * 8192, number * 8192)
            began = time.perf_counter()
            os.fsync(descriptor)
            took.append(time.perf_counter() - began)
    finally:
        os.close(descriptor)
        path.unlink()
    return statistics.median(took) * 1000
