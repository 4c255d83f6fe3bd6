"""Facts: what we know of an entity, a JSON object that conditions read. Pure.

Patches count in the order in which they were accepted, whatever the order of arrival: the last few are kept, and one
that comes late is put in its place and all is merged again. What is older than those few becomes their base.
"""

from collections.abc import Mapping
from functools import reduce
from typing import Any

from msgspec import Struct

MAX_FACTS_CHARACTERS = 64 * 1024
"""All facts of one entity as JSON; conditions read them at every firing (INV-9)."""

KEPT_PATCHES = 8
"""How many newer patches one may come after and still find its place."""


class Facts(Struct, frozen=True, kw_only=True):
    """`now`: what conditions read; it is `base` with the `recent` patches (sequence, patch) merged into it, in
    order."""

    now: dict[str, Any] = {}
    base: dict[str, Any] = {}
    recent: tuple[tuple[int, dict[str, Any]], ...] = ()

    def patched(self, sequence: int, patch: Mapping[str, Any]) -> "Facts":
        """With one more patch."""
        recent = sorted([*self.recent, (sequence, dict(patch))], key=lambda one: one[0])
        is_newest = recent[-1][1] == patch and recent[-1][0] == sequence
        now = merge_patch(self.now, patch) if is_newest else _merged(self.base, recent)
        surplus = recent[: max(0, len(recent) - KEPT_PATCHES)]
        return Facts(now=now, base=_merged(self.base, surplus), recent=tuple(recent[len(surplus) :]))


NOTHING_KNOWN = Facts()


def _merged(base: dict[str, Any], patches: list[tuple[int, dict[str, Any]]]) -> dict[str, Any]:
    return reduce(lambda merged, one: merge_patch(merged, one[1]), patches, base)


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
