"""Reading metrics of this process, which other tests have moved before."""

from prometheus_client import REGISTRY


def sample(name: str, **labels: str) -> float:
    """The value of one series; it must exist."""
    value = REGISTRY.get_sample_value(name, labels)
    assert value is not None, f"there is no {name}{labels}"
    return value


class Since:
    """How much series have moved since this was made; one that did not exist then began at 0."""

    def __init__(self) -> None:
        self._before = {
            (one.name, tuple(sorted(one.labels.items()))): one.value
            for metric in REGISTRY.collect()
            for one in metric.samples
        }

    def __call__(self, name: str, **labels: str) -> float:
        """By how much; rounded to nanoseconds, as sums of seconds are no whole numbers."""
        return round(sample(name, **labels) - self._before.get((name, tuple(sorted(labels.items()))), 0.0), 9)
