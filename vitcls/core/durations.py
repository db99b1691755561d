"""Every duration of a config, from one string with its unit to a number of steps."""

import math
import re
from fractions import Fraction

from vitcls.core import errors
from vitcls.core.errors import UserError

UNITS = ("steps", "epochs", "examples", "%")
_MAX_STEPS = 2**31 - 1  # the step counter is an int32
_FORM = re.compile(
    r"(?P<number>[+-]?(?:[\d_]+\.?[\d_]*|\.[\d_]+)(?:e[+-]?\d+)?|[+-]?inf(?:inity)?|nan)\s*(?P<unit>.*)",
    re.IGNORECASE,
)


def to_steps(duration: str, *, batch_size: int, num_examples: int, total_steps: int | None = None) -> int:
    """Returns `duration` in steps (updates), rounded up, so that what was asked for is always covered.

    >>> to_steps("1.5 epochs", batch_size=100, num_examples=1_010)
    16
    >>> to_steps("5%", batch_size=100, num_examples=1_010, total_steps=1_000)
    50

    Args:
      duration: a number and its unit: '400 steps', '200 epochs', '1e6 examples' or '5%'; singular units, fractions,
        exponents and underscores are fine. Zero stays zero in every unit.
      batch_size: examples in one step.
      num_examples: examples in one epoch.
      total_steps: what a percentage is a part of.

    Raises:
      UserError: for anything else, and for a percentage without `total_steps`.
    """
    number, unit = _parse(duration)
    if unit == "%" and total_steps is None:
        raise UserError(f"duration '{duration}' is a part of the total, which is not known here; use steps or epochs")
    per_unit = {
        "steps": Fraction(1),
        "epochs": Fraction(num_examples, batch_size),
        "examples": Fraction(1, batch_size),
        "%": Fraction(total_steps or 0, 100),
    }
    steps = math.ceil(number * per_unit[unit])
    if steps > _MAX_STEPS:
        raise UserError(f"duration '{duration}' is {float(steps):g} steps; make it at most {_MAX_STEPS} steps")
    return steps


def same(a: object, b: object) -> bool:
    """Whether two values of a config are equal, or are durations that say the same: '20steps' and '20 step'."""
    try:
        return a == b or _parse(a) == _parse(b)
    except UserError:
        return False


def _parse(duration: str) -> tuple[Fraction, str]:
    if not isinstance(duration, str):
        raise UserError(f"a duration is text with a unit, such as '200 steps'; {duration!r} is not")
    match = _FORM.fullmatch(duration.strip())
    if match is None:
        raise UserError(f"duration '{duration}' does not start with a number; write it like '200 epochs' or '5%'")
    number, unit = _number(match["number"], duration), match["unit"].lower()
    if not unit:
        raise UserError(f"a duration needs a unit: '{duration} steps', '{duration} epochs' or '{duration}%'")
    plural = unit if unit in UNITS else f"{unit}s"
    if plural not in UNITS:
        raise errors.unknown("duration unit", match["unit"], UNITS)
    return number, plural


def _number(text: str, duration: str) -> Fraction:
    try:
        number = float(text)
    except ValueError:
        raise UserError(f"duration '{duration}' has the malformed number '{text}'; write it like '1e6'") from None
    if not 0 <= number < math.inf:
        raise UserError(f"duration '{duration}' is impossible; its number must be finite and not negative")
    # The decimal that was written, not its binary neighbour: 10% of 30 is 3, where 0.1 * 30 would be rounded up to 4.
    return Fraction(repr(number))
