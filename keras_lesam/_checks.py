"""Checks of arguments, whose errors end in the value received."""

import math
import numbers
import sys
from collections.abc import Collection
from typing import Any

import keras
import numpy as np
import tensorflow as tf

# What counts steps is an int64.
LARGEST_INTEGER = 2**63 - 1


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
            f"`{name}` must be a number. Received: {name}={short(value)} "
            f"of type {type(value).__name__}"
        )
    too_low = value <= minimum if above else value < minimum
    too_high = value >= maximum if below else value > maximum
    # An int may be larger than any float; nan compares false.
    finite = abs(value) <= sys.float_info.max
    if not finite or too_low or too_high:
        raise ValueError(
            f"`{name}` must be {_interval(minimum, maximum, above, below)}. "
            f"Received: {name}={short(value)}"
        )
    return float(value)


def integer(
    name: str, value: Any, minimum: int, maximum: int = LARGEST_INTEGER
) -> int:
    """Check for an integer in [minimum, maximum] and return it as an int.

    Raises:
        TypeError: if `value` is not an integer.
        ValueError: if it is too small or too large.
    """
    value = _scalar(value)
    if not _is_number(value, numbers.Integral):
        raise TypeError(
            f"`{name}` must be an integer. Received: {name}={short(value)} "
            f"of type {type(value).__name__}"
        )
    if value < minimum:
        raise ValueError(
            f"`{name}` must be at least {minimum}. "
            f"Received: {name}={short(value)}"
        )
    if value > maximum:
        raise ValueError(
            f"`{name}` must be at most {maximum}. "
            f"Received: {name}={short(value)}"
        )
    return int(value)


def representable(name: str, value: float, dtype: str, owner: str) -> None:
    """Check that a number is neither infinite nor 0 in a float dtype.

    Args:
        name: The number's name.
        value: What was received.
        dtype: Name of the dtype.
        owner: The argument that the number is part of.

    Raises:
        ValueError: if it is too large, or so small that it would count as 0.
    """
    limits = np.finfo(dtype)
    # As Python's numbers: NumPy would cast `value` to the dtype first.
    least, most = float(limits.tiny), float(limits.max)
    if value and not least <= abs(value) <= most:
        raise ValueError(
            f"`{name}` of `{owner}` must be a number that {dtype} can hold: "
            f"0, or from {least:.3g} to {most:.3g}. "
            f"Received: {name}={value!r}"
        )


def boolean(name: str, value: Any) -> bool:
    """Check for a bool, not just something with a truth value.

    Raises:
        TypeError: if `value` is not a bool.
    """
    value = _scalar(value)
    if not isinstance(value, bool):
        raise TypeError(
            f"`{name}` must be True or False. Received: {name}={short(value)}"
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
            f"Received: {name}={short(value)}"
        )
    return value


def verbosity(value: Any) -> int:
    """Check for 0 or 1; or for 2 and bools, which `fit` takes as well.

    Raises:
        ValueError: if it is none of them.
    """
    found = _scalar(value)
    if not isinstance(found, int) or not 0 <= found <= 2:
        raise ValueError(
            f"`verbose` must be 0 or 1. Received: verbose={short(value)}"
        )
    return int(found)


def model(value: Any) -> keras.Model:
    """Check for a Keras model.

    Raises:
        TypeError: if it is none.
    """
    if not isinstance(value, keras.Model):
        raise TypeError(
            "`model` must be a keras.Model. Received: "
            f"model={short(value)} of type {type(value).__name__}"
        )
    return value


def real_array(name: str, values: Any) -> np.ndarray:
    """Convert finite real numbers of the argument called `name` to an array.

    Raises:
        TypeError: if they are of another kind, or not of one shape.
        ValueError: if one is not finite.
    """
    received = f"Received: {short(values)} in {name}"
    try:
        array = np.asarray(values)
        # The kind of bfloat16 is "V".
        is_number = array.dtype.kind in "iuf" or array.dtype.name == "bfloat16"
    except Exception:
        is_number = False
    if isinstance(values, np.ma.MaskedArray) or not is_number:
        raise TypeError(f"`{name}` must be of real numbers. {received}")
    if not np.all(np.isfinite(array)):
        raise ValueError(f"`{name}` must be of finite numbers. {received}")
    return array


def short(value: Any) -> str:
    """Return the `repr` of a value on one line, cut if it is long.

    Whatever the value is: that of a very long integer is an error.
    """
    try:
        text = " ".join(repr(value).split())
    except Exception:
        return f"<{type(value).__name__}>"
    return text if len(text) <= 500 else f"{text[:400]}...{text[-20:]}"


def _scalar(value: Any) -> Any:
    """Convert scalars and 0-d arrays of NumPy to Python's own numbers."""
    if isinstance(value, np.ma.MaskedArray):
        # Masked numbers are none, and their `item` is 0.
        return value
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


def changing(name: str, value: Any) -> None:
    """Raise `ValueError` for what a graph would keep as it is now.

    Args:
        name: Of the argument.
        value: A tensor or variable that the next step has another value of.
    """
    is_variable = hasattr(value, "assign")
    if tf.executing_eagerly() or is_variable or tf.is_symbolic_tensor(value):
        return
    raise ValueError(
        f"`{name}` would be a constant of the graph that is being traced, the "
        "same in all steps: give it to the `tf.function` as an argument, or "
        "keep tf.Variables of it, and assign them what a step returns. "
        f"Received: {name}={short(value)}"
    )
