"""Checks of arguments, whose errors end in the value received."""

import math
import numbers
import sys
from collections.abc import Collection
from typing import Any

import keras


def number(
    name: str,
    value: Any,
    minimum: float = -math.inf,
    maximum: float = math.inf,
    *,
    above: bool = False,
    below: bool = False,
) -> float:
    """Check for a finite real number in [minimum, maximum].

    Args:
        name: The argument's name, for the error.
        value: What was received. Booleans are not numbers here.
        minimum: Smallest value allowed; itself refused if `above`.
        maximum: Largest value allowed.
        above: Whether the interval is open at `minimum`.
        below: Whether it is open at `maximum`.

    Returns:
        The number as a float.

    Raises:
        TypeError: if `value` is not a real number.
        ValueError: if it is not finite or out of range.
    """
    value = _scalar(value)
    if not _is_number(value, numbers.Real):
        raise TypeError(
            f"`{name}` must be a number. Received: {name}={value!r} "
            f"of type {type(value).__name__}"
        )
    too_low = value <= minimum if above else value < minimum
    too_high = value >= maximum if below else value > maximum
    # An int may be larger than any float; nan compares false.
    finite = abs(value) <= sys.float_info.max
    if not finite or too_low or too_high:
        raise ValueError(
            f"`{name}` must be {_interval(minimum, maximum, above, below)}. "
            f"Received: {name}={value!r}"
        )
    return float(value)


def integer(name: str, value: Any, minimum: int) -> int:
    """Check for an integer of at least `minimum` and return it as an int.

    Raises:
        TypeError: if `value` is not an integer.
        ValueError: if it is too small.
    """
    value = _scalar(value)
    if not _is_number(value, numbers.Integral):
        raise TypeError(
            f"`{name}` must be an integer. Received: {name}={value!r} "
            f"of type {type(value).__name__}"
        )
    if value < minimum:
        raise ValueError(
            f"`{name}` must be at least {minimum}. Received: {name}={value!r}"
        )
    return int(value)


def boolean(name: str, value: Any) -> bool:
    """Check for a bool, not just something with a truth value.

    Raises:
        TypeError: if `value` is not a bool.
    """
    value = _scalar(value)
    if not isinstance(value, bool):
        raise TypeError(
            f"`{name}` must be True or False. Received: {name}={value!r}"
        )
    return value


def choice(name: str, value: Any, allowed: Collection[str]) -> str:
    """Check for one of the strings in `allowed`.

    Raises:
        ValueError: if it is none of them.
    """
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(
            f"`{name}` must be one of {', '.join(map(repr, allowed))}. "
            f"Received: {name}={value!r}"
        )
    return value


def _scalar(value: Any) -> Any:
    """Convert scalars and 0-d arrays of NumPy to Python's own numbers."""
    return (
        value.item()
        if getattr(value, "shape", None) == () and hasattr(value, "item")
        else value
    )


def _is_number(value: Any, kind: type) -> bool:
    """Tell whether `value` is a number of a kind; bools do not count."""
    return isinstance(value, kind) and not isinstance(value, bool)


def is_schedule(value: Any) -> bool:
    """Tell whether `value` is a schedule, a function of the step."""
    return isinstance(value, keras.optimizers.schedules.LearningRateSchedule)


def _interval(minimum: float, maximum: float, above: bool, below: bool) -> str:
    """Describe an interval for an error message."""
    low = f"{'greater than' if above else 'at least'} {minimum:g}"
    if math.isinf(maximum):
        return f"finite and {low}"
    return f"{low} and {'less than' if below else 'at most'} {maximum:g}"
