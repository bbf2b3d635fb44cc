"""Batches and their rows, for the step and for the curvature tools."""

from collections.abc import Iterator
from typing import Any
from typing import NamedTuple

import keras
import tensorflow as tf

from keras_lesam import _workarounds


class Batch(NamedTuple):
    """What `fit` hands to a step; each a nest of tensors, or `None`.

    Attributes:
        x: Inputs of the model.
        y: Targets, structured like the outputs.
        sample_weight: Weights of the rows.
    """

    x: Any
    y: Any
    sample_weight: Any


def count_rows(nest: Any) -> Any:
    """Return the rows of a batch: an int, or a tensor if it is dynamic."""
    tensor = next(t for t in keras.tree.flatten(nest) if t is not None)
    if isinstance(tensor, tf.RaggedTensor):
        return tf.cast(tensor.nrows(), tf.int32)
    if tensor.shape[0] is not None:
        return tensor.shape[0]
    return tf.shape(tensor)[0]


def take_rows(nest: Any, start: Any, stop: Any) -> Any:
    """Return rows `start` to `stop` of every tensor of a nest."""
    return keras.tree.map_structure(
        lambda leaf: None if leaf is None else _slice_rows(leaf, start, stop),
        nest,
    )


def fraction_of(rows: Any, fraction: float) -> Any:
    """Return a fraction of a number of rows, rounded up, at least one."""
    if isinstance(rows, int):
        return max(1, -int(-rows * fraction // 1))
    wanted = tf.math.ceil(tf.cast(rows, tf.float64) * fraction)
    return tf.maximum(1, tf.cast(wanted, tf.int32))


def split_rows(rows: Any, parts: int) -> Iterator[tuple[Any, Any, Any]]:
    """Yield `(start, stop, weight)` of each part of a batch.

    The weight is the part's in a mean over parts, whatever their sizes. A
    batch of fewer rows than `parts` is taken row by row.
    """
    if isinstance(rows, int):
        parts = min(parts, rows)
    for i in range(parts):
        start, stop = i * rows // parts, (i + 1) * rows // parts
        if isinstance(rows, int):
            yield start, stop, 1 / parts
        else:
            # An empty part borrows a row, and weighs nothing.
            weight = tf.cast(stop > start, tf.float64)
            weight /= tf.cast(tf.minimum(parts, rows), tf.float64)
            yield start, tf.maximum(stop, start + 1), weight


def join_rows(nests: list[Any], weights: list[Any]) -> Any:
    """Concatenate nests of tensors, without those of weight 0."""

    def join(*tensors: tf.Tensor) -> tf.Tensor:
        parts = [*tensors]
        if not isinstance(weights[0], float):
            parts = [
                take_rows(t, 0, tf.where(weight > 0, count_rows(t), 0))
                for t, weight in zip(parts, weights)
            ]
        if isinstance(parts[0], tf.SparseTensor):
            return tf.sparse.concat(0, parts)
        return tf.concat(parts, 0)

    return keras.tree.map_structure(
        lambda *tensors: (
            None
            if tensors[0] is None
            else _workarounds.map_with_masks(join, tensors)
        ),
        *nests,
    )


def to_batch(x: Any, y: Any, sample_weight: Any) -> Batch:
    """Make a `Batch` of tensors."""
    return _tensors((x, y, sample_weight))


def to_batches(
    x: Any, y: Any = None, sample_weight: Any = None, batch_size: int = 32
) -> list[Batch]:
    """Make a list of `Batch`es of tensors, of arrays or a dataset.

    Raises:
        ValueError: if there are none, or without end.
    """
    if isinstance(x, tf.data.Dataset | keras.utils.PyDataset):
        if y is not None or sample_weight is not None:
            raise ValueError(
                "Where `x` is a dataset, `y` and `sample_weight` come from "
                "it: leave them None."
            )
        batches = _batches_of_dataset(x)
    else:
        batches = _batches_of_arrays((x, y, sample_weight), batch_size)
    if not batches:
        raise ValueError("`x` has no rows.")
    return batches


def row_fractions(batches: list[Batch]) -> list[float]:
    """Return the rows of each batch over those of all."""
    rows = [int(count_rows(batch.x)) for batch in batches]
    return [n / sum(rows) for n in rows]


def _slice_rows(tensor: Any, start: Any, stop: Any) -> Any:
    if isinstance(tensor, tf.SparseTensor):
        rest = tensor.dense_shape[1:]
        begin = tf.concat([[tf.cast(start, tf.int64)], 0 * rest], 0)
        size = tf.concat([[tf.cast(stop - start, tf.int64)], rest], 0)
        return tf.sparse.slice(tensor, begin, size)
    return tensor[start:stop]


def _batches_of_dataset(dataset: Any) -> list[Batch]:
    if isinstance(dataset, tf.data.Dataset):
        if dataset.cardinality() == tf.data.INFINITE_CARDINALITY:
            raise ValueError(
                "The dataset `x` has no end: pass `x.take(n)`, n batches."
            )
        batches = iter(dataset)
    else:
        if dataset.num_batches is None:
            raise ValueError(
                "The dataset `x` has no end: `num_batches` is None."
            )
        batches = (dataset[i] for i in range(dataset.num_batches))
    unpack = keras.utils.unpack_x_y_sample_weight
    return [_tensors(unpack(batch)) for batch in batches]


def _batches_of_arrays(data: Any, batch_size: int) -> list[Batch]:
    rows = {len(leaf) for leaf in keras.tree.flatten(data) if leaf is not None}
    if len(rows) != 1:
        raise ValueError(
            "`x`, `y` and `sample_weight` must have the same number of rows. "
            f"Received: {sorted(rows)}"
        )
    starts = range(0, rows.pop(), batch_size)
    return [
        _tensors(take_rows(data, start, start + batch_size)) for start in starts
    ]


def _tensors(batch: Any) -> Batch:
    return Batch(*keras.tree.map_structure(_tensor, tuple(batch)))


def _tensor(leaf: Any) -> Any:
    is_composite = isinstance(leaf, tf.RaggedTensor | tf.SparseTensor)
    return leaf if leaf is None or is_composite else tf.convert_to_tensor(leaf)
