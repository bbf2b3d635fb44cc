"""Lists of tensors as vectors of weight space.

A list runs parallel to the trainable variables, with `None` where a variable
takes no part.
"""

from typing import Any

import tensorflow as tf

Tensors = list[Any]


def norm(
    vector: Tensors, dtype: Any, scaling: Tensors | None = None
) -> tf.Tensor:
    """Return `||T v||`, summed in `dtype`.

    Args:
        vector: List of dense tensors or `None`.
        dtype: Of the sum.
        scaling: List like `vector` of `T` up to its sign, `None` for 1.
    """
    scaling = [None] * len(vector) if scaling is None else scaling
    squares = [
        _sum_of_squares(v, t, dtype)
        for v, t in zip(vector, scaling)
        if v is not None
    ]
    return tf.sqrt(tf.add_n(squares)) if squares else tf.zeros((), dtype)


def dot(vector: Tensors, other: Tensors, dtype: Any) -> tf.Tensor:
    """Return the inner product of two lists of tensors, summed in `dtype`."""
    products = [
        tf.reduce_sum(tf.cast(v, dtype) * tf.cast(o, dtype))
        for v, o in zip(vector, other)
        if v is not None and o is not None
    ]
    return tf.add_n(products) if products else tf.zeros((), dtype)


def running_mean(means: Tensors, values: Tensors, decay: float) -> Tensors:
    """Return `decay m + (1 - decay) v`; the first values are the first mean.

    Args:
        means: List of tensors or `None`; zeros: no mean yet.
        values: List like `means`. If one is not finite, the means stay.
        decay: Float in [0, 1).
    """
    values = [m if v is None else v for m, v in zip(means, values)]
    values = [None if m is None else v for m, v in zip(means, values)]
    is_known = tf.math.is_finite(norm(values, tf.float32))
    has_begun = norm(means, tf.float32) > 0

    def renewed(m: tf.Tensor, v: tf.Tensor) -> tf.Tensor:
        change = or_zero(v - m, is_known)
        return m + tf.where(has_begun, (1 - decay) * change, change)

    return [None if m is None else renewed(m, v) for m, v in zip(means, values)]


def add(vector: Tensors, other: Tensors) -> Tensors:
    """Return the sum of two lists; `None` in the second counts as 0."""
    return [v if o is None else v + o for v, o in zip(vector, other)]


def dense(vector: Tensors) -> Tensors:
    """Convert `tf.IndexedSlices` to tensors; rows that repeat are summed."""
    return [None if v is None else tf.convert_to_tensor(v) for v in vector]


def times(factor: Any, tensor: tf.Tensor) -> tf.Tensor:
    """Return `factor` times a tensor, in the dtype of the tensor."""
    # A Python number that is cast is rounded to float32 first.
    if tf.is_tensor(factor):
        factor = tf.cast(factor, tensor.dtype)
    return factor * tensor


def are_finite(vector: Tensors) -> tf.Tensor:
    """Return whether all numbers of a list are finite, in one pass over it.

    A sum is not finite if one of its terms is not. `tf.IndexedSlices` are not
    made dense for it.
    """
    values: Tensors = [getattr(v, "values", v) for v in vector if v is not None]
    wide = [tf.cast(v, tf.float32) if v.dtype.size < 4 else v for v in values]
    sums = [tf.math.is_finite(tf.reduce_sum(v)) for v in wide]
    return tf.reduce_all(tf.stack(sums)) if sums else tf.constant(True)


def or_zero(value: tf.Tensor, condition: tf.Tensor) -> tf.Tensor:
    """Return `value` where the condition holds and 0 elsewhere.

    Whatever `value` is there: nan times 0 would be nan.
    """
    return tf.where(condition, value, tf.zeros_like(value))


def or_one(value: tf.Tensor, condition: tf.Tensor) -> tf.Tensor:
    """Return `value` where the condition holds and 1 elsewhere."""
    return tf.where(condition, value, tf.ones_like(value))


def _sum_of_squares(vector: tf.Tensor, scaling: Any, dtype: Any) -> tf.Tensor:
    # Cast first: the squares of float16 numbers overflow float16.
    scaled = tf.cast(vector, dtype)
    if scaling is not None:
        scaled *= tf.cast(scaling, dtype)
    return 2 * tf.nn.l2_loss(scaled)
