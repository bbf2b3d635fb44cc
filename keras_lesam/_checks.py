"""Checks of arguments: one sentence each, with what was received."""

import math
import numbers
import sys

import keras


def number(
    name,
    value,
    minimum=-math.inf,
    maximum=math.inf,
    *,
    above=False,
    below=False,
):
    """A finite real number in [minimum, maximum] as a float.

    Args:
        name: The argument's name, for the error.
        value: What was received. Booleans are not numbers here.
        minimum: Smallest value allowed; itself refused if `above`.
        maximum: Largest value allowed.
        above: Whether the interval is open at `minimum`.
        below: Whether it is open at `maximum`.

    Raises:
        TypeError: if `value` is not a real number.
        ValueError: if it is not finite or out of range.
    """
    value = _scalar(value)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
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


def integer(name, value, minimum):
    """An integer of at least `minimum`, as an int.

    Raises:
        TypeError: if `value` is not an integer.
        ValueError: if it is too small.
    """
    value = _scalar(value)
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(
            f"`{name}` must be an integer. Received: {name}={value!r} "
            f"of type {type(value).__name__}"
        )
    if value < minimum:
        raise ValueError(
            f"`{name}` must be at least {minimum}. Received: {name}={value!r}"
        )
    return int(value)


def boolean(name, value):
    """A bool, and nothing that merely counts as one.

    Raises:
        TypeError: if `value` is not a bool.
    """
    value = _scalar(value)
    if not isinstance(value, bool):
        raise TypeError(
            f"`{name}` must be True or False. Received: {name}={value!r}"
        )
    return value


def choice(name, value, allowed):
    """One of the strings in `allowed`.

    Raises:
        ValueError: if it is none of them.
    """
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(
            f"`{name}` must be one of {', '.join(map(repr, allowed))}. "
            f"Received: {name}={value!r}"
        )
    return value


def _scalar(value):
    # NumPy's scalars and the arrays without dimensions, as Python's own.
    return (
        value.item()
        if getattr(value, "shape", None) == () and hasattr(value, "item")
        else value
    )


def is_schedule(value):
    """Whether it is a schedule, from the step to a number."""
    return isinstance(value, keras.optimizers.schedules.LearningRateSchedule)


def _interval(minimum, maximum, above, below):
    low = f"{'greater than' if above else 'at least'} {minimum:g}"
    if math.isinf(maximum):
        return f"finite and {low}"
    return f"{low} and {'less than' if below else 'at most'} {maximum:g}"
