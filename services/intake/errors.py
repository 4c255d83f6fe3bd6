"""Why one item of a batch is not accepted, while the others are.

Errors of a whole call are those of libs.errors.
"""

from dataclasses import dataclass
from enum import IntEnum


class Code(IntEnum):
    """The numbers of google.rpc.Code that items get."""

    INVALID_ARGUMENT = 3
    NOT_FOUND = 5
    PERMISSION_DENIED = 7
    FAILED_PRECONDITION = 9


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """`field` is relative to the item (`content.type`), empty when no single field is at fault."""

    code: Code
    reason: str
    message: str
    field: str = ""
