"""Lists of tensors as vectors of weight space.

A list runs parallel to the trainable variables, with `None` where a variable
takes no part.
"""

from typing import Any

import numpy as np
import tensorflow as tf

Tensors = list[Any]


def norm(
    vector: Tensors, dtype: Any, scaling: Tensors | None = None
) -> tf.Tensor:
    """Return `||T v||`, summed in `dtype`.

    Right wherever it is within the range of `dtype`: where squares are not,
    they are taken of numbers times a power of two.

    Args:
        vector: List of dense tensors or `None`.
        dtype: Of the sum.
        scaling: List like `vector` of `T` up to its sign, `None` for 1.
    """
    scaling = [None] * len(vector) if scaling is None else scaling
    pairs = [(v, t) for v, t in zip(vector, scaling) if v is not None]
    if not pairs:
        return tf.zeros((), dtype)
    squared = tf.add_n([_sum_of_squares(v, t, dtype) for v, t in pairs])

    def rescaled() -> tf.Tensor:
        root = _root_of_factor(squared)
        flat = tf.concat(
            [tf.reshape(_scaled(v, t, dtype, root), [-1]) for v, t in pairs], 0
        )
        return tf.sqrt(2 * tf.nn.l2_loss(flat)) / tf.square(root)

    # A second pass over the numbers, where the first was in vain.
    return tf.cond(_is_safe(squared), lambda: tf.sqrt(squared), rescaled)


def dot(vector: Tensors, other: Tensors, dtype: Any) -> tf.Tensor:
    """Return the inner product of two lists of tensors, summed in `dtype`."""
    products = [
        tf.reduce_sum(tf.cast(v, dtype) * tf.cast(o, dtype))
        for v, o in zip(vector, other)
        if v is not None and o is not None
    ]
    return tf.add_n(products) if products else tf.zeros((), dtype)


def component(vector: Tensors, other: Tensors, length: tf.Tensor) -> tf.Tensor:
    """Return `v.o / ||o||`, the length of `vector` along `other`.

    Right wherever both norms are within range, which `v.o` need not be.

    Args:
        vector: List of tensors or `None`.
        other: List like `vector`.
        length: Scalar tensor, the norm of `other`; sums are of its dtype.
    """
    dtype = length.dtype
    product = dot(vector, other, dtype)

    def rescaled() -> tf.Tensor:
        a = tf.square(_root_of_factor(tf.square(norm(vector, dtype))))
        b = tf.square(_root_of_factor(tf.square(length)))
        v = [v if v is None else _multiplied(v, a) for v in vector]
        o = [o if o is None else _multiplied(o, b) for o in other]
        return tf.math.divide_no_nan(dot(v, o, dtype), b * length) / a

    is_safe = _is_safe(tf.square(length)) & _is_safe(tf.abs(product))
    return tf.cond(is_safe, lambda: product / length, rescaled)


def along(
    tensor: tf.Tensor, size: Any, length: tf.Tensor, scaling: Any = None
) -> tf.Tensor:
    """Return `size T^2 v / ||T v||`; 0 where either number is, whatever `v` is.

    Neither the factor `size / ||T v||` nor 16 bits have to hold the result: it
    has 32 where the tensor has 16.

    Args:
        tensor: One of the tensors of the vector.
        size: Scalar tensor.
        length: Scalar tensor, the norm `||T v||` of the whole vector.
        scaling: Tensor `T` up to its sign, or `None` for 1.
    """
    tensor = wide(tensor)
    unit = tf.math.divide_no_nan(tensor, tf.cast(length, tensor.dtype))
    if scaling is not None:
        scaling = tf.cast(scaling, tensor.dtype)
        unit = tf.math.multiply_no_nan(unit, scaling) * scaling
    return tf.math.multiply_no_nan(unit, tf.cast(size, tensor.dtype))


def relative_distance(
    vector: Tensors,
    other: Tensors,
    length: tf.Tensor,
    scaling: Tensors | None = None,
) -> tf.Tensor:
    """Return `||T (v - o)||` over a length; not finite where a number is not.

    Each number is divided by the length first. So squares are within range
    wherever the result is, and no difference is held for a second try.

    Args:
        vector: List of dense tensors or `None`.
        other: List like `vector`; pairs with a `None` are left out.
        length: Scalar tensor; sums are of its dtype.
        scaling: List like `vector` of `T` up to its sign, `None` for 1.
    """
    scaling = [None] * len(vector) if scaling is None else scaling
    squares = []
    for v, o, t in zip(vector, other, scaling):
        if v is None or o is None:
            continue
        difference = tf.cast(wide(v) - wide(o), length.dtype)
        squares.append(_sum_of_squares(difference / length, t, length.dtype))
    return tf.sqrt(tf.add_n(squares)) if squares else tf.zeros_like(length)


def running_mean(means: Tensors, values: Tensors, decay: float) -> Tensors:
    """Return `decay m + (1 - decay) v`; the first values are the first mean.

    Means that are not finite are dropped, and the next values the first again.

    Args:
        means: List of tensors or `None`; zeros: no mean yet.
        values: List like `means`; `None` for 0. If one is not finite, the
            means stay.
        decay: Float in [0, 1).
    """
    is_known = are_finite([v for m, v in zip(means, values) if m is not None])
    has_begun = is_positive(norm(means, widest_dtype(means)))

    def renewed(m: tf.Tensor, v: tf.Tensor) -> tf.Tensor:
        v = wide(v)
        zero, one = tf.zeros((), v.dtype), tf.ones((), v.dtype)
        keep = tf.where(is_known, tf.constant(decay, v.dtype), one)
        take = tf.where(has_begun, tf.constant(1 - decay, v.dtype), one)
        # What has no share counts for 0, be it finite or not.
        old = tf.math.multiply_no_nan(
            tf.cast(m, v.dtype), tf.where(has_begun, keep, zero)
        )
        new = tf.math.multiply_no_nan(v, tf.where(is_known, take, zero))
        return tf.cast(old + new, m.dtype)

    return [
        None if m is None else renewed(m, tf.zeros_like(m) if v is None else v)
        for m, v in zip(means, values)
    ]


def add(vector: Tensors, other: Tensors) -> Tensors:
    """Return the sum of two lists; `None` in the second counts as 0."""
    return [v if o is None else v + o for v, o in zip(vector, other)]


def select(condition: tf.Tensor, vector: Tensors, other: Tensors) -> Tensors:
    """Return one of two lists, in the dtypes of the second."""
    return [
        None if o is None else tf.where(condition, tf.cast(v, o.dtype), o)
        for v, o in zip(vector, other)
    ]


def dense(vector: Tensors) -> Tensors:
    """Convert `tf.IndexedSlices` to tensors; rows that repeat are summed."""
    return [None if v is None else tf.convert_to_tensor(v) for v in vector]


def times(factor: Any, tensor: tf.Tensor) -> tf.Tensor:
    """Return `factor` times a tensor, in float32 where that has 16 bits."""
    tensor = wide(tensor)
    # A Python number that is cast is rounded to float32 first.
    if tf.is_tensor(factor):
        factor = tf.cast(factor, tensor.dtype)
    return factor * tensor


def wide(tensor: tf.Tensor) -> tf.Tensor:
    """Return a tensor of 16 bits in float32; others as they are."""
    return tf.cast(tensor, tf.float32) if tensor.dtype.size < 4 else tensor


def widest_dtype(vector: Tensors) -> Any:
    """Return float64 if a tensor is, float32 if not."""
    is_double = any(v is not None and v.dtype == tf.float64 for v in vector)
    return tf.float64 if is_double else tf.float32


def are_finite(vector: Tensors) -> tf.Tensor:
    """Return whether all numbers of a list are finite, in one pass over it.

    A sum is not finite if one of its terms is not. `tf.IndexedSlices` are not
    made dense for it.
    """
    values: Tensors = [getattr(v, "values", v) for v in vector if v is not None]
    if not values:
        return tf.constant(True)
    sums = [tf.math.is_finite(tf.reduce_sum(wide(v))) for v in values]

    def one_by_one() -> tf.Tensor:
        each = [tf.reduce_all(tf.math.is_finite(v)) for v in values]
        return tf.reduce_all(tf.stack(each))

    # A sum of large numbers overflows, finite as they are.
    all_finite = tf.reduce_all(tf.stack(sums))
    return tf.cond(all_finite, lambda: tf.constant(True), one_by_one)


def is_positive(scalar: tf.Tensor) -> tf.Tensor:
    """Return whether a number is above 0 and finite."""
    return tf.math.is_finite(scalar) & (scalar > 0)


def or_zero(value: tf.Tensor, condition: tf.Tensor) -> tf.Tensor:
    """Return `value` where the condition holds and 0 elsewhere.

    Whatever `value` is there: nan times 0 would be nan.
    """
    return tf.where(condition, value, tf.zeros_like(value))


def or_one(value: tf.Tensor, condition: tf.Tensor) -> tf.Tensor:
    """Return `value` where the condition holds and 1 elsewhere."""
    return tf.where(condition, value, tf.ones_like(value))


def _sum_of_squares(
    vector: tf.Tensor, scaling: Any, dtype: Any, root: Any = None
) -> tf.Tensor:
    """Return `||T v||^2` of one tensor, of numbers times `root^2`."""
    return 2 * tf.nn.l2_loss(_scaled(vector, scaling, dtype, root))


def _scaled(
    vector: tf.Tensor, scaling: Any, dtype: Any, root: Any = None
) -> tf.Tensor:
    # Cast first: the squares of float16 numbers overflow float16.
    scaled = tf.cast(vector, dtype)
    if scaling is not None:
        scaling = tf.cast(scaling, dtype)
    if root is not None:
        # Half to each: one of both may be small where the other is large.
        scaled = _multiplied(scaled, root)
        scaling = root if scaling is None else _multiplied(scaling, root)
    if scaling is not None:
        scaled *= scaling
    return scaled


def _multiplied(tensor: tf.Tensor, factor: tf.Tensor) -> tf.Tensor:
    """Return a tensor times a factor that is not 0, in the factor's dtype.

    A product that the graph optimizer leaves alone: in `(a v) (b w)` it would
    multiply `a` by `b` first, which leaves the range that they are to keep.
    """
    return tf.math.multiply_no_nan(tf.cast(tensor, factor.dtype), factor)


def _is_safe(squared: tf.Tensor) -> tf.Tensor:
    """Return whether nothing that matters has left the range of the dtype.

    So that neither terms that became 0 count beside the sum of squares or
    products, nor the product of two such norms overflows.
    """
    limits = np.finfo(squared.dtype.as_numpy_dtype)
    least, most = limits.tiny / limits.eps**3, limits.max * limits.eps
    return (squared >= least) & (squared <= most)


def _root_of_factor(squared: tf.Tensor) -> tf.Tensor:
    """Return the root of what brings numbers into a range where squares are.

    1 where they are there: see `_is_safe`. A power of two, and so is its
    square: to multiply by either rounds nothing.
    """
    root = 2.0 ** (40 if squared.dtype.size == 4 else 320)
    one = tf.ones((), squared.dtype)
    factor = tf.where(squared < 1, root * one, one / root)
    return tf.where(_is_safe(squared), one, factor)
