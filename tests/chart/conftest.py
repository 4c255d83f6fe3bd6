"""Fixtures for the tests of the chart: every scenario, as helm renders it for every Kubernetes version."""

import itertools

import pytest

from tests.chart.rendering import VERSIONS, Rendered, render, scenarios

# No chart, no parameters, no tests: pytest would pass in silence.
assert scenarios(), "deploy/helm/carillon/ci/*-values.yaml: there are none"


@pytest.fixture(
    params=itertools.product(scenarios(), VERSIONS),
    ids=lambda of: f"{of[0]}-{of[1].removesuffix('.0')}",
    scope="session",
)
def rendered(request: pytest.FixtureRequest) -> Rendered:
    """One scenario on one version."""
    scenario, version = request.param
    return render(scenario, version=version)
