"""Which of the trainable variables are perturbed."""

from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_lesam import _checks
from keras_lesam import _passes


def check(perturb: Any) -> Any:
    """Check the argument `perturb`.

    Raises:
        TypeError: if it is neither a callable nor `None`.
    """
    is_class = isinstance(perturb, type)
    if perturb is not None and (is_class or not callable(perturb)):
        raise TypeError(
            "`perturb` must be a callable from a variable to bool, or "
            f"None. Received: perturb={_checks.short(perturb)}"
        )
    return perturb


def of(
    perturb: Callable[[Any], bool] | None, variables: Sequence[Any]
) -> list[bool]:
    """Return a list like the variables: which of them are perturbed."""
    return [
        _passes.is_weight(v) and (perturb is None or _moves(perturb, v))
        for v in variables
    ]


def refuse_none(
    perturb: Callable[[Any], bool] | None, variables: Sequence[Any]
) -> None:
    """Raise `ValueError` if none of the variables is perturbed."""
    if not any(of(perturb, variables)):
        raise ValueError(
            "`perturb` selects none of the trainable variables. "
            f"Received: perturb={perturb!r}, for variables "
            f"{[v.path for v in variables]}"
        )


def _moves(perturb: Callable[[Any], Any], variable: Any) -> bool:
    """Return whether a variable is perturbed, by the truth of an answer."""
    answer = perturb(variable)
    if tf.is_tensor(answer) or isinstance(
        answer, np.ndarray | keras.Variable | type(NotImplemented)
    ):
        raise TypeError(
            "`perturb` must return True or False for a variable. Received: "
            f"{_checks.short(answer)} for {variable.path!r}"
        )
    return bool(answer)
