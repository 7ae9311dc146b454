"""What a value beyond an end of a format becomes, as codes and quantisers need it: an outcome known before any value is seen.

The reference has its own words for the same, and is what these are held against.
"""

from enum import StrEnum
from typing import TYPE_CHECKING

from formats.rounding import Overflow, Rounding

if TYPE_CHECKING:
    from formats.spec import ElementFormat


class Outcome(StrEnum):
    """What is left of a value that was too large: the largest or lowest finite value, infinity of its sign, or NaN."""

    END = "end"
    INFINITY = "infinity"
    NAN = "nan"


def outcome(f: "ElementFormat", mode: Rounding, over: Overflow, *, negative: bool, infinite: bool) -> Outcome:
    """For values beyond the largest or, `negative`, the lowest; `infinite`, for infinity itself (Overflow says what and why)."""
    unsigned_side = negative and not f.signed
    reaches_infinity = f.has_inf and not unsigned_side
    inward = mode.stops_at_end(negative)
    if over is Overflow.SATURATE:
        return Outcome.END
    if over is Overflow.PROPAGATE:
        return Outcome.INFINITY if infinite and reaches_infinity else Outcome.END
    if over is Overflow.NONSATURATING:
        inward = inward or mode is Rounding.TO_ODD
        fallback = Outcome.NAN
    else:
        inward = inward or (mode is Rounding.TO_ODD and not f.signed and f.has_inf and not negative)
        fallback = Outcome.NAN if unsigned_side and f.has_nan else Outcome.END
    if inward and not infinite:
        return Outcome.END
    return Outcome.INFINITY if reaches_infinity else fallback
