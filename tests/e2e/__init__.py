"""Whole stacks, as people run them. A package, so that the stack they share ends with the last of them."""
