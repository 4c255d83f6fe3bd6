"""Facts: what we know of an entity, a JSON object that conditions read. Pure."""

from collections.abc import Mapping
from typing import Any

MAX_FACTS_CHARACTERS = 64 * 1024
"""All facts of one entity as JSON; conditions read them at every firing (INV-9)."""


def merge_patch(target: Mapping[str, Any], patch: Mapping[str, Any]) -> dict[str, Any]:
    """RFC 7396 for objects: null removes, objects merge, everything else replaces."""
    merged = dict(target)
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, dict):
            before = merged.get(key)
            merged[key] = merge_patch(before if isinstance(before, dict) else {}, value)
        else:
            merged[key] = value
    return merged
