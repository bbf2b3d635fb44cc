"""The curvature of the loss that `fit` minimises, for any Keras model.

Everything here is about the Hessian `H` of that loss (data loss, `add_loss`
and regularizers, in training mode) by the trainable variables: products with
it, its largest eigenvalues, its trace, its spectrum, and `H` itself as a
linear operator. Nothing is written to
the model: batch normalization statistics and random seeds stay as they are,
so that dropout draws the mask that the next training step would.

The model must be compiled. Under `tf.distribute` the loss is the global one:
a call outside of a replica computes on one device.
"""

from typing import Any
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from keras_lesam import _checks
from keras_lesam import _hessian
from keras_lesam import _lanczos
from keras_lesam import _passes
from keras_lesam import _workarounds
from keras_lesam._data import to_batch
from keras_lesam._operator import HessianOperator
from keras_lesam._operator import choose_method
from keras_lesam._operator import prepare
from keras_lesam._vectors import Tensors

__all__ = [
    "HessianOperator",
    "SpectralDensity",
    "Trace",
    "hessian_vector_product",
    "spectral_density",
    "top_eigenvalues",
    "trace",
]


_NOT_PARALLEL = (
    "`vectors` must be a list parallel to `model.trainable_variables`. "
    "Received: "
)


def hessian_vector_product(
    model: keras.Model,
    x: Any,
    y: Any,
    vectors: list[Any],
    sample_weight: Any = None,
    method: str = "auto",
) -> Tensors:
    """Return `H v` for one batch.

    Works eagerly and in a `tf.function`. There, it is traced once: do that
    for many products of one model.

    Example:

    >>> import keras, numpy as np
    >>> from keras_lesam.curvature import hessian_vector_product
    >>> model = keras.Sequential([keras.layers.Dense(1, use_bias=False)])
    >>> model.compile(loss="mse")
    >>> x, y = np.array([[3.0, 4.0]]), np.array([[0.0]])  # H = 2 x x^T
    >>> [product] = hessian_vector_product(model, x, y, [[[1.0], [0.0]]])
    >>> product.numpy().tolist()
    [[18.0], [24.0]]

    Args:
        model: A compiled `keras.Model`, a `LESAMModel` too.
        x: Inputs of the batch, a nest of arrays or tensors.
        y: Targets.
        vectors: List parallel to `model.trainable_variables`: arrays or
            tensors of their shapes, or `None` for zeros.
        sample_weight: Weights of the rows.
        method: `"reverse_over_reverse"`: a `tf.GradientTape` around another;
            `"forward_over_reverse"`: a `tf.autodiff.ForwardAccumulator` around
            a tape, which has no rule for loops (LSTM, GRU); or `"auto"`: the
            former, as in `LESAMModel`.

    Returns:
        List of tensors, shaped like the variables and in their dtypes (loss
        units per weight-space distance, for `vectors` in distances); zeros
        where `vectors` is `None`: the product is with the block of `H` that
        belongs to the others. In a replica of a `tf.distribute.Strategy`, `x`
        is the replica's share of the batch and the result is the mean over
        replicas, the same in all.

    Raises:
        TypeError: if `model` is not a Keras model, or if `x`, `y` or
            `sample_weight` are not made of arrays or tensors.
        ValueError: if it is not compiled, for a batch without rows or
            without targets that the loss needs, if `vectors` do not fit its
            variables, or if `method` cannot differentiate it.
        tf.errors.InvalidArgumentError: if it is run under
            `jit_compile=True` for a model with max pooling, whose second
            derivative XLA gets wrong.

    References:
        Pearlmutter, "Fast exact multiplication by the Hessian", Neural
        Computation 1994.
    """
    _checks.choice("method", method, _hessian.CHOICES)
    _checks.model(model)
    batch = to_batch(x, y, sample_weight)
    if model.built and model.compiled and model.trainable_variables:
        # Else the shapes are known after the first batch only.
        _check_vectors(vectors, model.trainable_variables)
    passes = prepare(model, batch)
    weights = _passes.read(model.trainable_variables)
    vectors = _check_vectors(vectors, model.trainable_variables)
    method, xla_is_wrong = choose_method(passes, model, batch, method)
    refusals = [_workarounds.refuse_xla()] if xla_is_wrong else []
    with tf.control_dependencies(refusals):
        scaled = _hessian.product(
            passes, model, weights, batch, vectors, method
        )
    scale = _passes.gradient_scale(model.optimizer)
    products = [
        tf.zeros_like(w) if p is None else p / tf.cast(scale, p.dtype)
        for p, w in zip(scaled, weights)
    ]
    if tf.distribute.in_cross_replica_context():
        return products
    replica = tf.distribute.get_replica_context()
    return replica.all_reduce(tf.distribute.ReduceOp.MEAN, products)


def top_eigenvalues(
    model: keras.Model,
    x: Any,
    y: Any = None,
    k: int = 1,
    *,
    sample_weight: Any = None,
    batch_size: int = 256,
    variables: list[Any] | None = None,
    tolerance: float = 1e-4,
    max_products: int = 1000,
    seed: int = 0,
    method: str = "auto",
    return_vectors: bool = False,
    verbose: int = 1,
) -> Any:
    """Compute the `k` largest eigenvalues of the Hessian.

    By SciPy's Lanczos iteration with implicit restarts (ARPACK). The largest
    one is what is mostly meant by the sharpness of a minimum.

    Example:

    >>> import keras, numpy as np
    >>> from keras_lesam.curvature import top_eigenvalues
    >>> model = keras.Sequential([keras.layers.Dense(1, use_bias=False)])
    >>> model.compile(loss="mse")
    >>> x, y = np.array([[3.0, 4.0]]), np.array([[0.0]])  # H = 2 x x^T
    >>> top_eigenvalues(model, x, y, verbose=0).round(3).tolist()
    [50.0]

    Args:
        model: A compiled `keras.Model`, a `LESAMModel` too.
        x: Inputs, a nest of arrays; or a `tf.data.Dataset` or
            `keras.utils.PyDataset` of batches `(x, y)` or
            `(x, y, sample_weight)`, which must have an end and fit into
            memory; or anything else of a length that yields such batches (a
            `DataLoader`). `H` is that of the mean of the batches' losses, each
            weighed by its rows.
        y: Targets, if `x` is arrays.
        k: Integer > 0.
        sample_weight: Weights of the rows, if `x` is arrays.
        batch_size: Integer > 0, rows of a batch, if `x` is arrays. Large ones
            make faster products and take more memory. With batch
            normalization each batch is normalized by its own statistics:
            pass what `fit` was given for the Hessian of the loss that it
            minimised.
        variables: List of trainable variables, such as
            `layer.trainable_variables`: `H` is the block that belongs to
            them. `None`: all.
        tolerance: Float >= 0, the relative accuracy at which to stop; 0 for
            that of the machine.
        max_products: Integer > 0, about how many Hessian-vector products to
            make before giving up.
        seed: Integer >= 0, of the vector to start from.
        method: That of `hessian_vector_product`.
        return_vectors: Whether to return the eigenvectors too.
        verbose: 0 or 1, whether to show how many products were made.

    Returns:
        Float64 array of shape `(k,)`, from the largest (the algebraically
        largest, not in absolute value), in loss units per squared
        weight-space distance. With `return_vectors`, a pair of it and a list:
        for each eigenvalue a list of arrays shaped like the variables, of
        norm 1 together.

    Raises:
        TypeError, ValueError: as `hessian_vector_product`; and for arguments
            out of range, data that are not arrays or a dataset, without rows
            or without end.
        RuntimeError: if it has not converged after `max_products`, or if the
            Hessian is not finite.
    """
    k = _checks.integer("k", k, 1)
    tolerance = _checks.number("tolerance", tolerance, 0)
    max_products = _checks.integer("max_products", max_products, 1)
    seed = _checks.integer("seed", seed, 0)
    return_vectors = _checks.boolean("return_vectors", return_vectors)
    hessian = HessianOperator(
        model,
        x,
        y,
        sample_weight=sample_weight,
        batch_size=batch_size,
        variables=variables,
        method=method,
        verbose=verbose,
    )
    if k > hessian.size:
        raise ValueError(
            "`k` must be at most the number of weights. "
            f"Received: k={k}, for {hessian.size} weights"
        )
    values, vectors = _lanczos.largest(
        hessian, k, tolerance, max_products, np.random.default_rng(seed)
    )
    if not return_vectors:
        return values
    return values, [hessian.unflatten(v) for v in vectors.T]


class Trace(NamedTuple):
    """An estimate of a trace.

    Attributes:
        value: Float, loss units per squared weight-space distance.
        standard_error: Float, of `value`.
        samples: Integer, how many random vectors it is the mean of.
    """

    value: float
    standard_error: float
    samples: int


def trace(
    model: keras.Model,
    x: Any,
    y: Any = None,
    *,
    sample_weight: Any = None,
    batch_size: int = 256,
    variables: list[Any] | None = None,
    tolerance: float = 0.05,
    max_samples: int = 200,
    seed: int = 0,
    method: str = "auto",
    verbose: int = 1,
) -> Trace:
    """Estimate the trace of the Hessian, the sum of its eigenvalues.

    The mean of `v.(H v)` over random vectors of signs, whose expectation it
    is.

    Example:

    >>> import keras, numpy as np
    >>> from keras_lesam.curvature import trace
    >>> model = keras.Sequential([keras.layers.Dense(1, use_bias=False)])
    >>> model.compile(loss="mse")
    >>> x, y = np.array([[3.0, 0.0]]), np.array([[0.0]])  # H = 2 x x^T
    >>> trace(model, x, y, verbose=0).value
    18.0

    Args:
        model, x, y, sample_weight, batch_size, variables, seed, method,
            verbose: Those of `top_eigenvalues`.
        tolerance: Float > 0: stop when the standard error is this share of
            the estimate.
        max_samples: Integer > 1, how many random vectors to use at most.

    Returns:
        A `Trace`.

    Raises:
        TypeError, ValueError: as `top_eigenvalues`.
        RuntimeError: if the Hessian is not finite.

    References:
        Hutchinson, "A stochastic estimator of the trace of the influence
        matrix", Communications in Statistics 1989.
    """
    tolerance = _checks.number("tolerance", tolerance, 0, above=True)
    max_samples = _checks.integer("max_samples", max_samples, 2)
    seed = _checks.integer("seed", seed, 0)
    hessian = HessianOperator(
        model,
        x,
        y,
        sample_weight=sample_weight,
        batch_size=batch_size,
        variables=variables,
        method=method,
        verbose=verbose,
    )
    return Trace(
        *_lanczos.trace(
            hessian, tolerance, max_samples, np.random.default_rng(seed)
        )
    )


class SpectralDensity(NamedTuple):
    """A spectrum, as point masses.

    Attributes:
        eigenvalues: Float64 array, where the masses are, ascending (loss
            units per squared weight-space distance).
        weights: Float64 array like it, the masses; they sum to 1.
    """

    eigenvalues: np.ndarray
    weights: np.ndarray

    def moment(self, order: float) -> float:
        """Return the mean of the eigenvalues to a power: `tr(H^order) / n`."""
        order = _checks.number("order", order)
        return float(np.sum(self.weights * self.eigenvalues**order))

    def density(self, grid: Any, width: float) -> np.ndarray:
        """Return the density at the points `grid`, by Gaussians of a width."""
        width = _checks.number("width", width, 0, above=True)
        grid = _checks.real_array("grid", grid)
        distance = (grid[..., None] - self.eigenvalues) / width
        gauss = np.exp(-0.5 * distance**2) / (width * np.sqrt(2 * np.pi))
        return gauss @ self.weights


def spectral_density(
    model: keras.Model,
    x: Any,
    y: Any = None,
    *,
    sample_weight: Any = None,
    batch_size: int = 256,
    variables: list[Any] | None = None,
    probes: int = 10,
    steps: int = 50,
    seed: int = 0,
    method: str = "auto",
    verbose: int = 1,
) -> SpectralDensity:
    """Estimate the spectrum of the Hessian, by stochastic Lanczos quadrature.

    `probes` random vectors, each the start of `steps` steps of Lanczos'
    iteration. The memory needed is that of `steps` copies of the weights.

    Example:

    >>> import keras, numpy as np
    >>> from keras_lesam.curvature import spectral_density
    >>> model = keras.Sequential([keras.layers.Dense(1, use_bias=False)])
    >>> model.compile(loss="mse")
    >>> x, y = np.array([[3.0, 4.0]]), np.array([[0.0]])  # H = 2 x x^T
    >>> spectrum = spectral_density(model, x, y, verbose=0)
    >>> round(float(spectrum.eigenvalues.max()), 3)
    50.0

    Args:
        model, x, y, sample_weight, batch_size, variables, seed, method,
            verbose: Those of `top_eigenvalues`.
        probes: Integer > 0, random vectors.
        steps: Integer > 0, products for each of them.

    Returns:
        A `SpectralDensity` of at most `probes` times `steps` masses.

    Raises:
        TypeError, ValueError: as `top_eigenvalues`.
        RuntimeError: if the Hessian is not finite.

    References:
        Ubaru, Chen, Saad, "Fast estimation of tr(f(A)) via stochastic Lanczos
        quadrature", SIAM J. Matrix Analysis 2017; Ghorbani, Krishnan, Xiao,
        "An investigation into neural net optimization via Hessian eigenvalue
        density", ICML 2019.
    """
    probes = _checks.integer("probes", probes, 1)
    steps = _checks.integer("steps", steps, 1)
    seed = _checks.integer("seed", seed, 0)
    hessian = HessianOperator(
        model,
        x,
        y,
        sample_weight=sample_weight,
        batch_size=batch_size,
        variables=variables,
        method=method,
        verbose=verbose,
    )
    return SpectralDensity(
        *_lanczos.density(hessian, probes, steps, np.random.default_rng(seed))
    )


def _check_vectors(vectors: Any, variables: list[Any]) -> Tensors:
    is_list = isinstance(vectors, list | tuple)
    if not is_list or len(vectors) != len(variables):
        raise ValueError(
            f"{_NOT_PARALLEL}{_describe(vectors)}, for {len(variables)} "
            "variables"
        )
    checked: Tensors = []
    for vector, variable in zip(vectors, variables):
        if vector is None or not _passes.is_weight(variable):
            checked.append(None)
            continue
        if not tf.is_tensor(vector):
            vector = _checks.real_array("vectors", vector)
        elif not (vector.dtype.is_floating or vector.dtype.is_integer):
            raise TypeError(
                "`vectors` must be of real numbers. "
                f"Received: dtype {vector.dtype.name} in vectors"
            )
        vector = tf.cast(vector, variable.dtype)
        if not vector.shape.is_compatible_with(variable.shape):
            raise ValueError(
                "`vectors` must have the shapes of the trainable variables. "
                f"Received: {vector.shape} for {variable.path!r} of shape "
                f"{variable.shape}"
            )
        checked.append(vector)
    if all(vector is None for vector in checked):
        raise ValueError("`vectors` are all None: there is nothing to do.")
    return checked


def _describe(vectors: Any) -> str:
    if isinstance(vectors, list | tuple):
        return f"{len(vectors)} vectors"
    return f"a {type(vectors).__name__}"
