"""The Hessian of a model over a fixed sample of data, as a linear operator."""

import keras
import numpy as np
import tensorflow as tf

from keras_lesam import _hessian
from keras_lesam import _passes


class Hessian:
    """`v -> H v` between NumPy vectors, for the loss that `fit` minimises.

    `H` is the Hessian of the mean over batches, each weighed by its rows. The
    weights are read anew with each product: the operator can be kept while
    the model trains. Batches are kept in memory, so that all products are of
    the same ones, whatever a dataset would yield next.

    Args:
        model: A compiled Keras model.
        batches: List of `_passes.Batch`es, what `batches` makes.
        variables: Trainable variables to differentiate by; `None`: all.
        method: A method of `hessian_vector_product`.
        verbose: Whether to show how many products were made.
    """

    def __init__(
        self,
        model,
        batches,
        *,
        variables=None,
        method="auto",
        verbose=0,
    ):
        self.batches = batches
        self.model = model
        prepare(model, self.batches[0])
        self.chosen = _choose(model, variables)
        self.method = choose_method(model, self.batches[0], method)[0]
        self.shapes = [
            tuple(v.shape)
            for v, chosen in zip(model.trainable_variables, self.chosen)
            if chosen
        ]
        self.size = sum(int(np.prod(shape)) for shape in self.shapes)
        self.dtype = model.trainable_variables[0].dtype
        self.shares = shares(batches)
        self._product = tf.function(self._product_of_batch, autograph=False)
        self.progress = _Bar(verbose)

    def __call__(self, vector):
        """`H v` of an array of shape `(size,)`."""
        vector = tf.constant(np.ravel(vector), self.dtype)
        total = tf.zeros((self.size,), self.dtype)
        for batch, share in zip(self.batches, self.shares):
            total += share * self._product(vector, batch)
        self.progress.advance()
        return total.numpy().astype("float64")

    def unflatten(self, vector):
        """A vector as a list of arrays like the variables."""
        ends = np.cumsum([int(np.prod(shape)) for shape in self.shapes])
        parts = np.split(np.asarray(vector), ends[:-1])
        return [part.reshape(shape) for part, shape in zip(parts, self.shapes)]

    def _product_of_batch(self, vector, batch):
        model = self.model
        weights = _passes.read(model.trainable_variables)
        sizes = [int(np.prod(shape)) for shape in self.shapes]
        parts = iter(zip(tf.split(vector, sizes), self.shapes))
        vectors = [
            tf.reshape(*next(parts)) if chosen else None
            for chosen in self.chosen
        ]
        products = _hessian.product(model, weights, batch, vectors, self.method)
        scale = _passes.gradient_scale(model.optimizer)
        found = [
            tf.zeros_like(v) if p is None else p / tf.cast(scale, p.dtype)
            for p, v in zip(products, vectors)
            if v is not None
        ]
        return tf.concat([tf.reshape(p, [-1]) for p in found], 0)


def prepare(model, batch):
    """Checks a model and creates what a first batch creates.

    Raises:
        TypeError: if `model` is not a Keras model.
        ValueError: if it is not compiled, or has nothing to train.
    """
    if not isinstance(model, keras.Model):
        raise TypeError(
            "`model` must be a keras.Model. Received: "
            f"model={model!r} of type {type(model).__name__}"
        )
    if not model.compiled:
        raise ValueError(
            "`model` must be compiled: the curvature is that of the loss that "
            "`fit` minimises. The inner model of a LESAMModel is not; pass "
            f"the LESAMModel. Received: model={model.name!r}"
        )
    _passes.build(model, batch)
    if not model.trainable_variables:
        raise ValueError(
            "`model` has no trainable variables. "
            f"Received: model={model.name!r}"
        )


def choose_method(model, batch, method):
    """A method for what the model is made of, and whether XLA is not for it.

    Forward mode over reverse mode, but where the model has loops.
    """
    operations = _hessian.operations(model, batch)
    if method == "auto":
        method = (
            _hessian.REVERSE_OVER_REVERSE
            if _hessian.has_loops(operations)
            else _hessian.FORWARD_OVER_REVERSE
        )
    _hessian.refuse_loops(operations, method, "method")
    return method, _hessian.has_max_pooling(operations)


def batches(x, y=None, sample_weight=None, batch_size=32):
    """A list of `_passes.Batch`es of tensors.

    Raises:
        ValueError: if there are none, or without end.
    """
    if isinstance(x, tf.data.Dataset | keras.utils.PyDataset):
        if y is not None or sample_weight is not None:
            raise ValueError(
                "Where `x` is a dataset, `y` and `sample_weight` come from "
                "it: leave them None."
            )
        found = _batches_of_dataset(x)
    else:
        found = _batches_of_arrays((x, y, sample_weight), batch_size)
    if not found:
        raise ValueError("`x` has no rows.")
    return found


def shares(batches):
    """The rows of each batch over those of all, a list of floats."""
    rows = [int(_passes.count_rows(batch.x)) for batch in batches]
    return [n / sum(rows) for n in rows]


def one_batch(x, y, sample_weight):
    """A `_passes.Batch` of tensors."""
    return _tensors((x, y, sample_weight))


def _batches_of_dataset(dataset):
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


def _batches_of_arrays(data, batch_size):
    rows = {len(leaf) for leaf in keras.tree.flatten(data) if leaf is not None}
    if len(rows) != 1:
        raise ValueError(
            "`x`, `y` and `sample_weight` must have the same number of rows. "
            f"Received: {sorted(rows)}"
        )
    starts = range(0, rows.pop(), batch_size)
    return [
        _tensors(_passes.take_rows(data, start, start + batch_size))
        for start in starts
    ]


def _tensors(batch):
    return _passes.Batch(*keras.tree.map_structure(_tensor, tuple(batch)))


def _tensor(leaf):
    is_composite = isinstance(leaf, tf.RaggedTensor | tf.SparseTensor)
    return leaf if leaf is None or is_composite else tf.convert_to_tensor(leaf)


def _choose(model, variables):
    """A list of bools like the trainable variables."""
    trainable = model.trainable_variables
    if variables is None:
        return [_passes.is_weight(v) for v in trainable]
    wanted = {id(v) for v in variables}
    chosen = [id(v) in wanted for v in trainable]
    if not wanted or sum(chosen) != len(wanted):
        raise ValueError(
            "`variables` must be trainable variables of the model, at least "
            f"one. Received: {[getattr(v, 'path', v) for v in variables]}"
        )
    return chosen


class _Bar:
    """Counts products on one line of the terminal, if it is wanted."""

    def __init__(self, verbose):
        self._verbose = verbose

    def __enter__(self):
        self._done = 0
        self._bar = keras.utils.Progbar(
            None, verbose=self._verbose, unit_name="product"
        )
        return self

    def __exit__(self, *exception):
        self._bar.update(self._done, finalize=True)

    def advance(self):
        self._done += 1
        self._bar.update(self._done, finalize=False)
