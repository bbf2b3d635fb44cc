"""The Hessian of a model over a fixed sample of data, as a linear operator."""

import itertools
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import scipy.sparse.linalg
import tensorflow as tf

from keras_lesam import _checks
from keras_lesam import _engines
from keras_lesam import _hessian
from keras_lesam import _passes
from keras_lesam._data import Batch
from keras_lesam._data import row_fractions
from keras_lesam._data import to_batches
from keras_lesam._engines import Passes


class HessianOperator:
    """The Hessian of a model's loss over a sample, as a linear operator.

    `v -> H v` between NumPy vectors: `H` is the Hessian of the loss that `fit`
    minimises, the mean over batches, each weighed by its rows. The weights are
    read anew with each product: the operator can be kept while the model
    trains. Batches are kept in memory, so that all products are of the same
    ones, whatever a dataset would yield next.

    Example:

    >>> import keras, numpy as np
    >>> from keras_lesam.curvature import HessianOperator
    >>> model = keras.Sequential([keras.layers.Dense(1, use_bias=False)])
    >>> model.compile(loss="mse")
    >>> x, y = np.array([[3.0, 4.0]]), np.array([[0.0]])  # H = 2 x x^T
    >>> hessian = HessianOperator(model, x, y)
    >>> hessian([1.0, 0.0]).tolist()
    [18.0, 24.0]
    >>> hessian.to_scipy().shape
    (2, 2)

    Args:
        model: A compiled `keras.Model`, a `LESAMModel` too.
        x: Inputs, a nest of arrays; or a `tf.data.Dataset` or
            `keras.utils.PyDataset` of batches `(x, y)` or
            `(x, y, sample_weight)`, which must have an end and fit into
            memory; or anything else of a length that yields such batches
            (a `DataLoader`).
        y: Targets, if `x` is arrays.
        sample_weight: Weights of the rows, if `x` is arrays.
        batch_size: Integer > 0, rows of a batch, if `x` is arrays. Large ones
            make faster products and take more memory. With batch
            normalization each batch is normalized by its own statistics:
            pass what `fit` was given for the Hessian of the loss that it
            minimised.
        variables: List of trainable variables, such as
            `layer.trainable_variables`: `H` is the block that belongs to
            them. `None`: all.
        method: That of `hessian_vector_product`.
        verbose: 0 or 1, whether to show how many products were made while
            `progress`, a context manager, is entered.

    Attributes:
        size: Integer, the number of weights.
        shapes: List of the shapes of the variables, whose elements a vector
            holds one after the other.
        dtype: Of sums of products, the widest of the variables' and at least
            float32; vectors are float64 outside.

    Raises:
        TypeError: if `model` is not a Keras model, and for data that are not
            arrays or a dataset, such as a generator.
        ValueError: if it is not compiled or has nothing to train, for data
            without rows or without end, without targets that the loss needs,
            and for `variables` or a `method` that do not fit the model.
    """

    def __init__(
        self,
        model: keras.Model,
        x: Any,
        y: Any = None,
        *,
        sample_weight: Any = None,
        batch_size: int = 256,
        variables: list[Any] | None = None,
        method: str = "auto",
        verbose: int = 0,
    ) -> None:
        _checks.choice("method", method, _hessian.CHOICES)
        _checks.model(model)
        verbose = _checks.verbosity(verbose)
        batch_size = _checks.integer("batch_size", batch_size, 1)
        batches = to_batches(x, y, sample_weight, batch_size)
        self._set_up(model, batches, variables, method, verbose)

    @classmethod
    def of_batches(
        cls, model: keras.Model, batches: list[Batch]
    ) -> "HessianOperator":
        """Make the operator of batches that are tensors already."""
        _checks.model(model)
        if not isinstance(batches, list) or not batches:
            raise TypeError(
                "`batches` must be a list of batches, at least one. "
                f"Received: batches={_checks.short(batches)}"
            )
        operator = cls.__new__(cls)
        operator._set_up(model, batches, None, "auto", 0)
        return operator

    def _set_up(
        self,
        model: keras.Model,
        batches: list[Batch],
        variables: list[Any] | None,
        method: str,
        verbose: int,
    ) -> None:
        self.model = model
        passes = self._passes = prepare(model, batches[0])
        self._batches = batches
        self._trainable = [*model.trainable_variables]
        self._is_chosen = _choose(model, variables)
        self._method = choose_method(passes, model, batches[0], method)[0]
        chosen = [*itertools.compress(self._trainable, self._is_chosen)]
        self.shapes = [tuple(v.shape) for v in chosen]
        self.size = sum(int(np.prod(shape)) for shape in self.shapes)
        self.dtype = widest_dtype(chosen)
        self._fractions = row_fractions(batches)
        self._product = tf.function(self._product_of_batch, autograph=False)
        self.progress = _Bar(verbose)

    def __call__(self, vector: Any) -> np.ndarray:
        """Return `H v`, a float64 array of shape `(size,)`.

        Raises:
            ValueError: if `v` is not of `size` elements.
            RuntimeError: if the model has other trainable variables by now.
        """
        vector = _checks.real_array("vector", vector).ravel()
        if vector.size != self.size:
            raise ValueError(
                "`vector` must have one element for each weight. Received: "
                f"{vector.size} elements, for {self.size} weights"
            )
        if not self.is_current():
            raise RuntimeError(
                "The trainable variables of the model are not those that the "
                "HessianOperator was made for: make a new one."
            )
        vector = tf.constant(vector, self.dtype)
        total = tf.zeros((self.size,), self.dtype)
        for batch, fraction in zip(self._batches, self._fractions):
            total += fraction * self._product(vector, batch)
        self.progress.advance()
        return total.numpy().astype("float64")

    def is_current(self) -> bool:
        """Return whether the same variables are trainable as at the start."""
        now = [id(v) for v in self.model.trainable_variables]
        return now == [id(v) for v in self._trainable]

    def to_scipy(self) -> scipy.sparse.linalg.LinearOperator:
        """Return it as a `scipy.sparse.linalg.LinearOperator`, symmetric."""
        return scipy.sparse.linalg.LinearOperator(
            (self.size, self.size), matvec=self, rmatvec=self, dtype="float64"
        )

    def unflatten(self, vector: Any) -> list[np.ndarray]:
        """Return a vector as a list of arrays like the variables."""
        vector = _checks.real_array("vector", vector)
        if vector.shape != (self.size,):
            raise ValueError(
                "`vector` must have one element for each weight. Received: "
                f"shape {vector.shape}, for {self.size} weights"
            )
        ends = np.cumsum([int(np.prod(shape)) for shape in self.shapes])
        parts = np.split(vector, ends[:-1])
        return [part.reshape(shape) for part, shape in zip(parts, self.shapes)]

    def _product_of_batch(self, vector: tf.Tensor, batch: Batch) -> tf.Tensor:
        model = self.model
        weights = _passes.read(model.trainable_variables)
        sizes = [int(np.prod(shape)) for shape in self.shapes]
        parts = iter(zip(tf.split(vector, sizes), self.shapes))
        vectors = [
            tf.cast(tf.reshape(*next(parts)), w.dtype) if is_chosen else None
            for w, is_chosen in zip(weights, self._is_chosen)
        ]
        scaled = _hessian.product(
            self._passes, model, weights, batch, vectors, self._method
        )
        scale = _passes.gradient_scale(model.optimizer)
        products = [
            tf.zeros_like(v) if p is None else p
            for p, v in zip(scaled, vectors)
            if v is not None
        ]
        flat = [tf.cast(tf.reshape(p, [-1]), self.dtype) for p in products]
        return tf.concat(flat, 0) / tf.cast(scale, self.dtype)


def prepare(model: Any, batch: Batch) -> Passes:
    """Check a model and create what a first batch creates.

    Returns:
        The engine of passes that sees all of the model.

    Raises:
        TypeError: if `model` is not a Keras model.
        ValueError: if it is not compiled, or has nothing to train; or if the
            batch lacks inputs of the model, or targets that its loss needs.
    """
    _checks.model(model)
    if not model.compiled:
        raise ValueError(
            "`model` must be compiled: the curvature is that of the loss that "
            "`fit` minimises. The inner model of a LESAMModel is not; pass "
            f"the LESAMModel. Received: model={model.name!r}"
        )
    _check_inputs(model, batch.x)
    try:
        stock, _ = _passes.build(model, batch)
    except Exception as error:
        # Without targets some losses do: there is nothing to ask them.
        if batch.y is None and getattr(model, "loss", None) is not None:
            raise ValueError(
                "`y` is missing, or the dataset `x` yields no targets: the "
                f"model was compiled with a loss of them. Received: y=None, "
                f"for loss={model.loss!r}"
            ) from error
        raise
    if not model.trainable_variables:
        raise ValueError(
            "`model` has no trainable variables. "
            f"Received: model={model.name!r}"
        )
    return _engines.choose(model, stock, batch)


def widest_dtype(variables: Sequence[Any]) -> str:
    """Return the widest float type of variables, float32 at least."""
    is_double = any(v.dtype == "float64" for v in variables)
    return "float64" if is_double else "float32"


def choose_method(
    passes: Passes, model: keras.Model, batch: Batch, method: str
) -> tuple[str, bool]:
    """Return a method, and whether XLA would get it wrong for this model."""
    method = _hessian.resolve(method)
    _hessian.refuse_forward_mode(passes, method, "method")
    operations = _hessian.operations(passes, model, batch)
    _hessian.refuse_unsupported(operations, method, "method")
    return method, _hessian.has_max_pooling(operations)


def _choose(model: keras.Model, variables: list[Any] | None) -> list[bool]:
    """Return which of the trainable variables are meant."""
    trainable = model.trainable_variables
    if variables is None:
        return [_passes.is_weight(v) for v in trainable]
    if not isinstance(variables, list | tuple):
        raise TypeError(
            "`variables` must be a list of trainable variables, such as "
            "`layer.trainable_variables`. Received: variables of type "
            f"{type(variables).__name__}"
        )
    wanted = {id(v) for v in variables}
    is_chosen = [id(v) in wanted for v in trainable]
    if not wanted or sum(is_chosen) != len(wanted):
        raise ValueError(
            "`variables` must be trainable variables of the model, at least "
            "one. Received: "
            f"{[getattr(v, 'path', type(v).__name__) for v in variables]}"
        )
    return is_chosen


def _check_inputs(model: keras.Model, x: Any) -> None:
    """Raise `ValueError` for a list that is not one of the model's inputs."""
    # Only models that are built of layers know their inputs beforehand; in
    # others the name may mean anything.
    inputs = keras.tree.flatten(getattr(model, "inputs", None) or [])
    is_known = all(isinstance(tensor, keras.KerasTensor) for tensor in inputs)
    expected, received = len(inputs), len(keras.tree.flatten(x))
    is_wrong = inputs and is_known and received != expected
    if is_wrong and isinstance(x, list | tuple):
        raise ValueError(
            "`x` must have one array for each input of the model; a list of "
            "rows is one array by `np.stack`, and targets are passed as `y`. "
            f"Received: {received} arrays in x, for {expected} inputs"
        )


class _Bar:
    """Counts products on one line of the terminal, if it is wanted.

    Attributes:
        target: Integer, how many there will be at most; `None`: not known.
    """

    def __init__(self, verbose: int) -> None:
        self._verbose = verbose
        self.target: int | None = None
        self._done = 0
        self._bar: Any = None

    def __enter__(self) -> "_Bar":
        self._done = 0
        self._bar = keras.utils.Progbar(
            self.target, verbose=self._verbose, unit_name="product"
        )
        return self

    def __exit__(self, *exception: Any) -> None:
        self._bar.update(self._done, finalize=True)
        self._bar = self.target = None

    def advance(self) -> None:
        """Count one product; outside of the context nothing is shown."""
        if self._bar is not None:
            self._done += 1
            self._bar.update(self._done, finalize=False)
