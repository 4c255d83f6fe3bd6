"""Makes a failing plan short: delta debugging (Zeller & Hildebrandt, TSE 2002).

Leaving out an action changes what the others meet, so a plan may stop failing for want of luck rather than of a cause.
So each part is tried with a few different lucks. What comes out is short, not minimal.
"""

from collections.abc import Callable

from tests.simulation.checker import Violation, violations_of
from tests.simulation.plan import Plan
from tests.simulation.world import draw, simulate

MOST_RUNS = 250
_LUCKS, _FAR = 4, 1_000_003


def shortest_failing(actions: Plan, fails: Callable[[Plan], bool]) -> Plan:
    """A part of `actions` that still fails, in the same order; at most `MOST_RUNS` tries."""
    runs, parts = 0, 2
    while len(actions) > 1 and runs < MOST_RUNS:
        size = -(-len(actions) // parts)
        for start in range(0, len(actions), size):
            rest = actions[:start] + actions[start + size :]
            runs += 1
            if fails(rest):
                actions, parts = rest, max(parts - 1, 2)
                break
            if runs >= MOST_RUNS:
                break
        else:
            if parts >= len(actions):
                break
            parts = min(len(actions), parts * 2)
    return actions


def shrunk(seed: int, violation: Violation) -> tuple[Plan, Violation]:
    """The shortest plan found that breaks the same invariant in the same way, and how it does."""
    last = violation

    def fails(actions: Plan) -> bool:
        nonlocal last
        for luck in range(_LUCKS):
            found = violations_of(simulate(seed + luck * _FAR, actions))
            if same := [one for one in found if one.kind == violation.kind]:
                last = same[0]
                return True
        return False

    return shortest_failing(draw(seed), fails), last


def explained(seed: int, violations: list[Violation]) -> str:
    """For people: which seed, what is broken, the shortest history that shows it."""
    actions, violation = shrunk(seed, violations[0])
    more = f" (and {len(violations) - 1} more)" if len(violations) > 1 else ""
    return "\n".join(
        [
            f"Seed {seed} breaks an invariant.",
            f"  {violations[0]}{more}",
            f"The shortest history found that does the same has {len(actions)} actions:",
            *(f"  {action}" for action in actions),
            f"  {violation}",
            f"Again: python -m tests.simulation --first {seed} --seeds 1",
        ]
    )
