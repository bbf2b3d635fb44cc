"""Checks of what the methods of a user's own strategies return.

Each is an error that names the class and the method. They look at types, dtypes
and shapes only, while a step is traced: nothing is added to it.
"""

from collections.abc import Sequence
from typing import Any
from typing import NoReturn

import numpy as np
import tensorflow as tf

from keras_lesam import _checks


def state(owner: Any, method: str, value: Any) -> dict[str, Any]:
    """Check a state, and make tensors of it: a dict of them, or of lists."""
    expected = "a dict from names to tensors, or to lists like the weights"
    if not isinstance(value, dict) or not all(
        isinstance(name, str) for name in value
    ):
        _refuse(owner, method, expected, value)

    def convert(item: Any) -> Any:
        tensor = None if isinstance(item, list | tuple) else _tensor(item)
        if item is not None and (tensor is None or not _is_numeric(tensor)):
            _refuse(owner, method, expected, item)
        return tensor

    return {
        name: [convert(i) for i in item]
        if isinstance(item, list)
        else convert(item)
        for name, item in value.items()
    }


def scalar(owner: Any, method: str, value: Any, dtype: Any) -> tf.Tensor:
    """Check a number and cast it to the dtype of all scalars."""
    kinds = float | int | np.floating | np.integer
    if isinstance(value, kinds) and not isinstance(value, bool):
        # Not by way of float32, in which TensorFlow takes Python's numbers.
        value = np.asarray(value, tf.as_dtype(dtype).as_numpy_dtype)
    tensor = _tensor(value)
    if tensor is None or not _is_real(tensor) or not _is_scalar(tensor):
        _refuse(owner, method, "a scalar tensor", value)
    return tf.cast(tensor, dtype)


def gate(owner: Any, value: Any) -> tf.Tensor | None:
    """Check whether an ascent is made: a bool, or `None` for yes."""
    tensor = _tensor(value)
    if value is None:
        return None
    if tensor is None or tensor.dtype != tf.bool or not _is_scalar(tensor):
        _refuse(owner, "gate", "a bool scalar tensor, or None", value)
    return tensor


def curvature(owner: Any, value: Any, dtype: Any) -> Any:
    """Check `k`, or the function of the direction that gives it."""
    if value is None:
        return None
    if not callable(value):
        return scalar(owner, "estimate", value, dtype)
    return lambda direction: scalar(owner, "estimate", value(direction), dtype)


def update(
    owner: Any, value: Any, perturbed: Any, weights: Sequence[Any]
) -> tuple[Any, dict[str, Any]]:
    """Check what `Rule.update` has returned: gradients and a state."""
    if not isinstance(value, tuple) or len(value) != 2:
        _refuse(owner, "update", "a pair (gradients, state)", value)
    gradients, new = value
    if gradients is not perturbed:
        gradients = like_weights(
            owner, "update", "its gradients", gradients, weights
        )
    return gradients, state(owner, "update", new)


def report(owner: Any, value: Any) -> Any:
    """Check that `Ascent.run` has returned what `report` gave it."""
    if not isinstance(value, tuple | list) or len(value) != 4:
        _refuse(owner, "run", "what `report` returns", value)
    return value


def instance(owner: Any, method: str, value: Any, kind: type) -> Any:
    """Check for a record of a kind."""
    if not isinstance(value, kind):
        _refuse(owner, method, f"a {kind.__name__}", value)
    return value


def parallel(
    owner: Any, method: str, what: str, value: Any, count: int
) -> Sequence[Any]:
    """Check for a list as long as that of the weights."""
    expected = f"{what}, a list like the {count} weights"
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        _refuse(owner, method, expected, value)
    if len(value) != count:
        _refuse(owner, method, expected, value, f"{len(value)} items, ")
    return value


def like_weights(
    owner: Any, method: str, what: str, value: Any, weights: Sequence[Any]
) -> list[Any]:
    """Check for a list of tensors of the shapes of the weights, or `None`."""
    items = parallel(owner, method, what, value, len(weights))
    return [
        _like_weight(owner, method, f"item {i} of {what}", item, weight)
        for i, (item, weight) in enumerate(zip(items, weights))
    ]


def _like_weight(
    owner: Any, method: str, what: str, value: Any, weight: Any
) -> Any:
    if value is None:
        return None
    tensor = _tensor(value)
    if (
        tensor is None
        or not tensor.dtype.is_floating
        or not tensor.shape.is_compatible_with(weight.shape)
    ):
        expected = f"{what} as floats of shape {tuple(weight.shape)}, or None"
        _refuse(owner, method, expected, value)
    return tensor


def _tensor(value: Any) -> Any:
    """Return a tensor, or `None` for what is none."""
    if value is None or isinstance(value, type):
        return None
    try:
        return tf.convert_to_tensor(value)
    except Exception:
        return None


def _is_scalar(tensor: Any) -> bool:
    return tensor.shape.rank in (0, None)


def _is_real(tensor: Any) -> bool:
    return bool(tensor.dtype.is_floating or tensor.dtype.is_integer)


def _is_numeric(tensor: Any) -> bool:
    return _is_real(tensor) or tensor.dtype == tf.bool


def _refuse(
    owner: Any, method: str, expected: str, value: Any, detail: str = ""
) -> NoReturn:
    raise TypeError(
        f"`{type(owner).__name__}.{method}` must return {expected}. Received: "
        f"{detail}{_checks.short(value)} of type {type(value).__name__}"
    )
