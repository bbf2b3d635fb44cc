"""Random numbers of Python and NumPy: the same in both passes of a step.

A model may draw them where it runs eagerly, or while it is traced. Generators
that a layer keeps to itself are not known here.
"""

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np


def get_state() -> tuple[Any, Any]:
    """Return the state of the generators of `random` and `np.random`."""
    return random.getstate(), np.random.get_state()


def set_state(state: tuple[Any, Any]) -> None:
    """Set the generators to a state of `get_state`."""
    random.setstate(state[0])
    np.random.set_state(state[1])


@contextlib.contextmanager
def replaying(state: tuple[Any, Any]) -> Iterator[None]:
    """Draw the numbers that came after `state`, and then go on as before."""
    before = get_state()
    set_state(state)
    try:
        yield
    finally:
        set_state(before)
