"""A service that works."""

from tests.support.standin import main

main("gong")
