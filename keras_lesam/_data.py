"""Batches and their rows, for the step and for the curvature tools."""

from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from typing import Any
from typing import NamedTuple

import keras
import numpy as np
import scipy.sparse
import tensorflow as tf

from keras_lesam import _checks
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
    batch of fewer rows than `parts` is taken row by row; one without rows, as
    the last of a replica may be, is one part.
    """
    if isinstance(rows, int):
        parts = max(1, min(parts, rows))
    for i in range(parts):
        start, stop = i * rows // parts, (i + 1) * rows // parts
        if isinstance(rows, int):
            yield start, stop, 1 / parts
        else:
            # An empty part borrows a row, and weighs nothing.
            counts = stop > start
            if i == 0:
                counts |= tf.equal(rows, 0)
            used = tf.maximum(tf.minimum(parts, rows), 1)
            weight = tf.cast(counts, tf.float64) / tf.cast(used, tf.float64)
            yield start, tf.maximum(stop, start + 1), weight


def if_used(weight: Any, value: Any, otherwise: Any) -> Any:
    """Return what a part has left, or what was there if it weighs nothing."""
    if isinstance(weight, float):
        return value
    return tf.where(weight > 0, value, otherwise)


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
    """Make a `Batch` of tensors, of nests of arrays or tensors.

    Raises:
        TypeError: if one is not made of arrays: a dataset, a list of rows.
        ValueError: if there are no rows, or not the same number in all.
    """
    if not _is_nest(x):
        raise TypeError(
            "`x` must be the arrays of one batch; for products over several, "
            f"see `curvature.HessianOperator`. Received: x of {_type(x)}"
        )
    batch = _arrays((x, y, sample_weight))
    _refuse_empty([batch], x)
    return _tensors(batch)


def to_batches(
    x: Any, y: Any = None, sample_weight: Any = None, batch_size: int = 256
) -> list[Batch]:
    """Make a list of `Batch`es of tensors, of arrays or a dataset.

    A dataset is a `tf.data.Dataset`, a `keras.utils.PyDataset`, or anything
    else that has a length and yields batches, such as PyTorch's `DataLoader`.

    Raises:
        TypeError: for anything else: a generator, a list of rows, a masked
            array.
        ValueError: if there are no rows, or without end, or not the same
            number in `x`, `y` and `sample_weight`.
    """
    if _is_nest(x):
        batches = _batches_of_arrays((x, y, sample_weight), batch_size)
        return _refuse_empty(batches, x)
    batches_of_x = _iterate(x)
    if y is not None or sample_weight is not None:
        raise ValueError(
            "Where `x` is a dataset, `y` and `sample_weight` come from it: "
            f"leave them None. Received: x of {_type(x)}"
        )
    return _refuse_empty(_batches_of_dataset(batches_of_x, _type(x)), x)


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


def _refuse_empty(batches: list[Batch], x: Any) -> list[Batch]:
    """Return the batches that have rows, of which there must be one."""
    batches = [batch for batch in batches if 0 not in _row_counts(batch.x)]
    if not batches:
        raise ValueError(f"`x` has no rows. Received: x of {_type(x)}")
    return batches


def _batches_of_arrays(data: Any, batch_size: int) -> list[Batch]:
    arrays = Batch(*keras.tree.map_structure(_cast, tuple(_arrays(data))))
    rows = int(count_rows(arrays.x))
    return [
        _tensors(take_rows(arrays, start, min(start + batch_size, rows)))
        for start in range(0, rows, batch_size)
    ]


def _batches_of_dataset(dataset: Iterable[Any], name: str) -> list[Batch]:
    batches = []
    for i, batch in enumerate(dataset):
        # Some datasets yield lists where `fit` takes tuples.
        data = tuple(batch) if isinstance(batch, list | tuple) else (batch,)
        if not 1 <= len(data) <= 3:
            raise ValueError(
                "The dataset `x` must yield `(x, y)` or `(x, y, "
                f"sample_weight)`. Received: batches of {len(data)} parts"
            )
        try:
            data += (None,) * (3 - len(data))
            batches.append(_tensors(_arrays(data)))
        except (TypeError, ValueError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(
                f"Batch {i} of the dataset `x` of {name}: {error}"
            ) from error
    return batches


def _iterate(dataset: Any) -> Iterable[Any]:
    """Return an iterable of the batches of a dataset that has an end."""
    if isinstance(dataset, tf.data.Dataset):
        if dataset.cardinality() == tf.data.INFINITE_CARDINALITY:
            raise ValueError(
                "The dataset `x` has no end: pass `x.take(n)`, n batches."
            )
        return dataset
    if isinstance(dataset, keras.utils.PyDataset):
        if dataset.num_batches is None:
            raise ValueError(
                "The dataset `x` has no end: `num_batches` is None."
            )
        return (dataset[i] for i in range(dataset.num_batches))
    try:
        length = len(dataset)
    except (TypeError, NotImplementedError) as error:
        raise TypeError(
            "`x` must be arrays, or a dataset whose length is known: a "
            "generator or iterator can be read only once and need not end. "
            "Pass its rows as arrays, or a `tf.data.Dataset` with `take(n)`. "
            f"Received: x of {_type(dataset)}"
        ) from error
    return (batch for _, batch in zip(range(length), dataset))


def _is_nest(x: Any) -> bool:
    """Tell whether `x` is arrays, or a container or value in their place."""
    if isinstance(x, list | tuple | Mapping | set | str | bytes):
        return True
    if isinstance(x, tf.data.Dataset | keras.utils.PyDataset):
        return False
    is_iterable = hasattr(x, "__iter__") or hasattr(x, "__getitem__")
    return _is_array(x) or isinstance(x, type) or not is_iterable


def _is_array(leaf: Any) -> bool:
    if isinstance(leaf, type | keras.KerasTensor):
        return False
    return (
        tf.is_tensor(leaf)
        or hasattr(leaf, "__array__")
        or scipy.sparse.issparse(leaf)
    )


def _arrays(data: Any) -> Batch:
    """Check `(x, y, sample_weight)`; make the leaves arrays or tensors."""
    batch = Batch(*map(_nest_of_arrays, Batch._fields, data))
    if all(leaf is None for leaf in keras.tree.flatten(batch.x)):
        raise ValueError(
            "`x` must be arrays, or a dataset of batches. Received: "
            f"x={data[0]!r}"
        )
    rows = {name: _row_counts(nest) for name, nest in batch._asdict().items()}
    counts = set().union(*rows.values())
    if len(counts) > 1:
        where = ", ".join(f"{n}: {sorted(r)}" for n, r in rows.items() if r)
        raise ValueError(
            "`x`, `y` and `sample_weight` must have the same number of rows, "
            f"in each of their arrays. Received: {sorted(counts)}, {where}"
        )
    return batch


def _row_counts(nest: Any) -> set[int]:
    """Return the numbers of rows that arrays of a nest are known to have."""
    counts = set()
    for leaf in keras.tree.flatten(nest):
        if leaf is not None and _rank(leaf) is not None:
            rows = count_rows(leaf)
            # In a graph a number may be a tensor without a value.
            rows = tf.get_static_value(rows) if tf.is_tensor(rows) else rows
            counts |= set() if rows is None else {int(rows)}
    return counts


def _rank(array: Any) -> int | None:
    return array.shape.rank if tf.is_tensor(array) else array.ndim


def _nest_of_arrays(name: str, nest: Any) -> Any:
    """Make arrays or tensors of the leaves of the argument called `name`."""

    def received(leaf: Any) -> str:
        inside = "" if leaf is nest else f" with {_type(leaf)} in it"
        return f"Received: {name} of {_type(nest)}{inside}"

    def convert(leaf: Any) -> Any:
        if leaf is None:
            return None
        if isinstance(leaf, np.ma.MaskedArray):
            raise TypeError(
                f"`{name}` must not be a masked array, whose mask would be "
                "ignored: fill it, and leave rows out by `sample_weight`. "
                f"{received(leaf)}"
            )
        if not _is_array(leaf):
            raise TypeError(
                f"`{name}` must be an array with rows, or one for each input "
                "or output of the model; `np.array` makes one of a list of "
                f"rows. {received(leaf)}"
            )
        array = _array(leaf)
        if _rank(array) == 0:
            raise ValueError(
                f"`{name}` must have rows, and a scalar has none. "
                f"{received(leaf)}"
            )
        return array

    if nest is not None and not keras.tree.flatten(nest):
        raise TypeError(
            f"`{name}` must be an array with rows, or one for each input or "
            f"output of the model. Received: {name}={_checks.short(nest)}, "
            "which is empty"
        )
    return keras.tree.map_structure(convert, nest)


def _array(leaf: Any) -> Any:
    """Make an array or tensor of what `fit` takes for one."""
    if scipy.sparse.issparse(leaf):
        table = leaf.tocoo()
        indices = np.stack([table.row, table.col], 1).astype("int64")
        tensor = tf.SparseTensor(indices, table.data, table.shape)
        return tf.sparse.reorder(tensor)
    if tf.is_tensor(leaf):
        return leaf
    # In `fit`, a column of a table is a feature of its own.
    is_column = hasattr(leaf, "iloc") and leaf.ndim == 1
    return np.asarray(leaf)[:, None] if is_column else np.asarray(leaf)


def _cast(leaf: Any) -> Any:
    """Cast floats as `fit` does, which computes with no others."""
    if leaf is None:
        return None
    floatx = keras.config.floatx()
    if not leaf.dtype.name.startswith(("float", "bfloat")):
        return leaf
    return tf.cast(leaf, floatx) if tf.is_tensor(leaf) else leaf.astype(floatx)


def _tensors(batch: Batch) -> Batch:
    return Batch(*map(_nest_of_tensors, Batch._fields, batch))


def _nest_of_tensors(name: str, nest: Any) -> Any:
    def convert(leaf: Any) -> Any:
        if leaf is None or isinstance(leaf, tf.RaggedTensor | tf.SparseTensor):
            return leaf
        try:
            return tf.convert_to_tensor(leaf)
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"`{name}` must be of numbers, strings or booleans. "
                f"Received: {name} of dtype {leaf.dtype}"
            ) from error

    return keras.tree.map_structure(convert, nest)


def _type(value: Any) -> str:
    """Describe a value in an error by its type: data would be too long."""
    return f"type {type(value).__name__}"
