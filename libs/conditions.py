"""Conditions: CEL expressions over `facts`, `timer` and `now` that say whether a timer may fire. Pure.

    compile_condition("!has(facts.paid) || !facts.paid").decide(facts, timer, now).holds
    compile_condition("payload.delay > 30", frozenset({"payload"})).evaluate({"payload": payload}).holds

Other questions are asked with other variables; all the rest, the limits above all, is the same for them.

Intake compiles what callers send, so that a bad expression is refused before anything is stored; the scheduler decides
with the same code at fire time. Evaluation is by common-expression-language, CEL in Rust (100,000 decisions/s).

What callers should know:
- A fact that is not there is an error, not false: write `has(facts.paid) && facts.paid`. `has(a.b.c)` is an error where
  `a.b` is no object. What cannot be decided does not hold, and the verdict says why.
- `timer` has `entity`, `type` and `due`; `now` and `timer.due` are UTC timestamps: `now - timer.due < duration('1h')`.
- Facts come from JSON: whole numbers are int, others double; times are strings, so `timestamp(facts.since) < now`.

CEL always ends, but need not end soon, and the library has no budget: nested comprehensions multiply, and a chain of
maps can double a list each time. So comprehensions (all, exists, exists_one, map, filter) must not be nested, at most
four may stand side by side, only one of them a map, and no regular expression may stand inside one. What is left is at
worst proportional to (size of the facts) × (length of the expression).

Easy to get wrong: the library says that an unknown variable or function is an error only when evaluation gets there
(`nope || true` is true), and has no type checker; so names are checked here, and a result that is no bool is an error
of the verdict.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import lru_cache
from typing import Any

import cel

MAX_CHARACTERS = 2_048
MAX_ERROR_CHARACTERS = 2_048
MAX_COMPREHENSIONS = 4

VARIABLES = frozenset({"facts", "timer", "now"})
FUNCTIONS = frozenset(
    {
        *("size", "contains", "startsWith", "endsWith", "matches", "has"),
        *("duration", "timestamp", "string", "int", "uint", "double", "bytes", "dyn", "type"),
        *("getFullYear", "getMonth", "getDate", "getDayOfMonth", "getDayOfWeek", "getDayOfYear"),
        *("getHours", "getMinutes", "getSeconds", "getMilliseconds"),
    }
)

_TOKEN = re.compile(
    r"""(?P<skip>\s+|//[^\n]*)
      | (?P<text>[rRbB]{0,2}(?:'''(?:\\.|[^\\])*?'''|\"\"\"(?:\\.|[^\\])*?\"\"\"|'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"))
      | (?P<name>[A-Za-z_][A-Za-z0-9_]*)
      | (?P<other>.)""",
    re.VERBOSE | re.DOTALL,
)
_COMPREHENSIONS = frozenset({"all", "exists", "exists_one", "existsOne", "map", "filter"})
_OPENING = frozenset("([{")
_CLOSING = frozenset(")]}")
_PARSE_ERROR = re.compile(r"ERROR: <input>:(\d+):(\d+): (.+)")


class BadCondition(Exception):
    """The expression cannot be a condition; the message says why, for people."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a condition came to. `error` (at most 2,048 characters): why it could not be decided; then `holds` is false.

    `facts_read` are the facts the expression names, None for one that is not there; all facts where it reads the whole
    map or computes a name.
    """

    holds: bool
    error: str | None = None
    facts_read: dict[str, Any] = field(default_factory=dict)


class Condition:
    """A compiled expression; made by `compile_condition`, immutable, safe to share between threads."""

    def __init__(self, text: str, program: cel.Program, facts_named: frozenset[str] | None) -> None:
        """`facts_named` None: it may read any."""
        self.text = text
        self._program = program
        self._facts_named = facts_named

    def decide(self, facts: Mapping[str, Any], timer: Mapping[str, Any], now: datetime) -> Verdict:
        """The verdict on `facts` (parsed JSON) and `timer` (entity, type, due) at `now`. Never raises."""
        verdict = self.evaluate({"facts": facts, "timer": timer, "now": now})
        return replace(verdict, facts_read=self._facts_read(facts))

    def evaluate(self, values: Mapping[str, Any]) -> Verdict:
        """The verdict on the values of the variables it was compiled with; names no facts. Never raises."""
        try:
            result = self._program.execute(dict(values))
        except Exception as error:  # noqa: BLE001 - six classes of exceptions are documented nowhere; all mean the same.
            return Verdict(holds=False, error=_cut(_explained(error)))
        if not isinstance(result, bool):
            return Verdict(holds=False, error=f"must give true or false, gave {_type_name(result)}")
        return Verdict(holds=result)

    def _facts_read(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        if self._facts_named is None:
            return dict(facts)
        return {name: facts.get(name) for name in sorted(self._facts_named)}


@lru_cache(maxsize=4_096)
def compile_condition(text: str, variables: frozenset[str] = VARIABLES) -> Condition:
    """The condition in `text` over `variables`; raises BadCondition when it is none. Compiled once, while cached."""
    if not 1 <= len(text) <= MAX_CHARACTERS:
        raise BadCondition(f"must be 1-{MAX_CHARACTERS:,} characters, got {len(text):,}")
    try:
        program = cel.compile(text)
    except ValueError as error:
        raise BadCondition(_syntax_error(str(error))) from error
    tokens = _tokens(text)
    bound = _check_comprehensions(tokens)
    references = program.references()
    if unknown := sorted(set(references["variables"]) - variables - bound):
        raise BadCondition(f"knows no {_cut(unknown[0], 64)!r}; it may read {_listed(variables)}")
    functions = {name for name in references["functions"] if name.isidentifier()}  # Operators look like _+_ and @in.
    if unknown := sorted(functions - FUNCTIONS):
        raise BadCondition(f"knows no function {_cut(unknown[0], 64)!r}; there are {', '.join(sorted(FUNCTIONS))}")
    condition = Condition(text, program, _facts_named(tokens))
    if not references["variables"]:
        _check_constant(condition)
    return condition


def _listed(variables: frozenset[str]) -> str:
    """In a fixed order, `now` last."""
    *most, last = sorted(variables, key=lambda name: (name == "now", name))
    return f"{', '.join(most)} and {last}" if most else last


def _check_constant(condition: Condition) -> None:
    """Without variables the answer is known already: an error, or a value that is no bool, would always be one."""
    verdict = condition.evaluate({})
    if verdict.error is not None:
        raise BadCondition(verdict.error)


def _tokens(text: str) -> list[str]:
    """Names, string literals and single characters, without space and comments."""
    return [match.group() for match in _TOKEN.finditer(text) if match.lastgroup != "skip"]


def _check_comprehensions(tokens: list[str]) -> frozenset[str]:
    """The names that comprehensions bind; raises BadCondition where they could take too long (see the module)."""
    bound: set[str] = set()
    found, maps, depth, ends_at = 0, 0, 0, -1
    for index, word in enumerate(tokens):
        is_inside = ends_at >= 0
        if word in _COMPREHENSIONS and tokens[index - 1 : index] == ["."] and tokens[index + 1 : index + 2] == ["("]:
            if is_inside:
                raise BadCondition(f"must not have .{word}() inside of another comprehension")
            found, maps, ends_at = found + 1, maps + (word == "map"), depth
            bound.update(tokens[index + 2 : index + 3])
        elif word == "matches" and is_inside:
            raise BadCondition("must not use matches() inside of a comprehension")
        depth += (word in _OPENING) - (word in _CLOSING)
        if is_inside and word == ")" and depth == ends_at:
            ends_at = -1
    if found > MAX_COMPREHENSIONS or maps > 1:
        raise BadCondition(f"must not have more than {MAX_COMPREHENSIONS} comprehensions, and one .map()")
    return frozenset(bound)


def _facts_named(tokens: list[str]) -> frozenset[str] | None:
    """The facts an expression names, as facts.x, facts["x"] or "x" in facts; None when it may read any."""
    named: set[str] = set()
    for index, word in enumerate(tokens):
        if word != "facts" or tokens[max(index - 1, 0)] == ".":
            continue
        match tokens[index + 1 : index + 4]:
            case [".", name, *rest] if rest[:1] != ["("]:
                named.add(name)
            case ["[", key, "]"] if _is_plain_text(key):
                named.add(key[1:-1])
            case _ if index >= 2 and tokens[index - 1] == "in" and _is_plain_text(tokens[index - 2]):
                named.add(tokens[index - 2][1:-1])
            case _:
                return None
    return frozenset(named)


def _is_plain_text(token: str) -> bool:
    return len(token) > 1 and token[0] in "'\"" and "\\" not in token and not token.startswith(("'''", '"""'))


def _syntax_error(message: str) -> str:
    found = _PARSE_ERROR.search(message)
    if found is None:
        return "is not a CEL expression"
    line, column, what = found.groups()
    where = f"at {column}" if line == "1" else f"at line {line}, {column}"
    return _cut(f"is not a CEL expression: {where}: {what.split(' expecting ')[0]}", 300)


def _explained(error: Exception) -> str:
    match error:
        case KeyError():
            return f"there is no {error.args[0]!r}; where it may be missing, ask has() first"
        case TypeError():
            return "an operation is not defined for these types (CEL converts nothing by itself)"
        case _:
            return str(error) or type(error).__name__


def _type_name(value: object) -> str:
    names = {
        "NoneType": "null",
        "str": "a string",
        "int": "a number",
        "float": "a number",
        "dict": "a map",
        "list": "a list",
    }
    return names.get(type(value).__name__, type(value).__name__)


def _cut(text: str, limit: int = MAX_ERROR_CHARACTERS) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
