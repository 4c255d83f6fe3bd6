"""Fixtures for all tests."""

from tests.support.fixtures import *  # noqa: F403
