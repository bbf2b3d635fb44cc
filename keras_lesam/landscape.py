"""The loss around a minimum: along lines, on planes, and in pictures.

The loss is the one that `fit` minimises (data loss, `add_loss`, regularizers),
but in inference mode: batch normalization with its moving statistics, no
dropout. The weights of the model are not written. The `plot_` functions need
matplotlib: `pip install 'keras_lesam[landscape]'`.
"""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_lesam import _checks
from keras_lesam import _passes
from keras_lesam import _pictures
from keras_lesam._data import row_fractions
from keras_lesam._data import to_batches
from keras_lesam._operator import prepare
from keras_lesam._operator import widest_dtype

__all__ = [
    "filter_normalized_direction",
    "loss_along",
    "loss_on_plane",
    "plot_budget",
    "plot_line",
    "plot_plane",
    "plot_spectrum",
]


def filter_normalized_direction(
    model: keras.Model, seed: int = 0
) -> list[np.ndarray]:
    """Draw a random direction whose distances compare between models.

    Each filter of the direction (the last axis of a kernel counts them) has
    the norm of the model's own filter: at distance 1, each filter has moved
    by its own norm. Biases and the parameters of normalization do not move.

    Example:

    >>> import keras, numpy as np
    >>> from keras_lesam.landscape import filter_normalized_direction
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    >>> kernel, bias = filter_normalized_direction(model)
    >>> np.allclose(np.linalg.norm(kernel, axis=0),
    ...             np.linalg.norm(model.get_weights()[0], axis=0))
    True

    Args:
        model: A built `keras.Model`.
        seed: Integer >= 0.

    Returns:
        List of arrays like `model.trainable_variables`.

    Raises:
        TypeError: if `model` is not a Keras model or `seed` not an integer.
        ValueError: if `model` has no trainable variables, or none yet.

    References:
        Li, Xu, Taylor, Studer, Goldstein, "Visualizing the loss landscape of
        neural nets", NeurIPS 2018, arXiv 1712.09913, section 4.
    """
    rng = np.random.default_rng(_checks.integer("seed", seed, 0))
    _checks.model(model)
    if not model.trainable_variables:
        raise ValueError(
            "`model` has no trainable variables; if it is not built yet, call "
            f"it on a batch first. Received: model={model.name!r}"
        )
    return [
        _random_filters(keras.ops.convert_to_numpy(v), rng)
        for v in model.trainable_variables
    ]


def loss_along(
    model: keras.Model,
    x: Any,
    y: Any = None,
    *,
    direction: Sequence[Any],
    distances: Sequence[float] | np.ndarray,
    sample_weight: Any = None,
    batch_size: int = 256,
    verbose: int = 1,
) -> np.ndarray:
    """Compute the loss at `w + t direction` for every `t` in `distances`.

    Example:

    >>> import keras, numpy as np
    >>> from keras_lesam.landscape import loss_along
    >>> model = keras.Sequential([keras.layers.Dense(
    ...     1, use_bias=False, kernel_initializer="zeros")])
    >>> model.compile(loss="mse")
    >>> x, y = np.ones((4, 1)), np.zeros((4, 1))
    >>> loss_along(model, x, y, direction=[[[1.0]]], distances=[-2, 0, 1],
    ...            verbose=0).tolist()
    [4.0, 0.0, 1.0]

    Args:
        model: A compiled `keras.Model`, a `LESAMModel` too.
        x: Inputs, a nest of arrays; or a `tf.data.Dataset` or
            `keras.utils.PyDataset` of batches `(x, y)` or
            `(x, y, sample_weight)`, which must have an end and fit into
            memory; or anything else of a length that yields such batches (a
            `DataLoader`).
        y: Targets, if `x` is arrays.
        direction: List of arrays like `model.trainable_variables`: a
            `filter_normalized_direction`, say, or an eigenvector of
            `curvature.top_eigenvalues`.
        distances: Sequence of finite floats, in lengths of `direction`.
        sample_weight: Weights of the rows, if `x` is arrays.
        batch_size: Integer > 0, rows of a batch, if `x` is arrays.
        verbose: 0 or 1, whether to show the progress.

    Returns:
        Float64 array `(len(distances),)`: the mean over batches, each weighed
        by its rows (loss units).

    Raises:
        TypeError, ValueError: for a model that is not compiled, for data
            that are not arrays or a dataset, without rows or without end, for
            a `direction` of other shapes, and for `distances` that are no
            sequence of finite numbers.
    """
    verbose = _checks.verbosity(verbose)
    points = [(t,) for t in _check_distances("distances", distances)]
    data = (x, y, sample_weight)
    around = _Around(model, data, batch_size, "direction", [direction])
    return around.losses(points, verbose)


def loss_on_plane(
    model: keras.Model,
    x: Any,
    y: Any = None,
    *,
    directions: Sequence[Sequence[Any]],
    distances: Sequence[Sequence[float] | np.ndarray],
    sample_weight: Any = None,
    batch_size: int = 256,
    verbose: int = 1,
) -> np.ndarray:
    """Compute the loss at `w + s a + t b` on a grid.

    Example:

    >>> import keras, numpy as np
    >>> from keras_lesam import landscape
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    >>> model.compile(loss="mse")
    >>> x, y = np.random.rand(8, 3), np.random.rand(8, 1)
    >>> plane = [landscape.filter_normalized_direction(model, i)
    ...          for i in range(2)]
    >>> landscape.loss_on_plane(model, x, y, directions=plane,
    ...                         distances=([-1, 0, 1], [0, 1]),
    ...                         verbose=0).shape
    (3, 2)

    Args:
        model, x, y, sample_weight, batch_size, verbose: Those of
            `loss_along`.
        directions: Two directions, `a` and `b`.
        distances: Two sequences of floats, for `s` and for `t`.

    Returns:
        Float64 array `(len(distances[0]), len(distances[1]))`.

    Raises:
        TypeError, ValueError: as `loss_along`.
    """
    verbose = _checks.verbosity(verbose)
    _check_pair("directions", directions)
    _check_pair("distances", distances)
    rows, columns = (_check_distances("distances", d) for d in distances)
    data = (x, y, sample_weight)
    around = _Around(model, data, batch_size, "directions", directions)
    points = [(s, t) for s in rows for t in columns]
    return around.losses(points, verbose).reshape(len(rows), len(columns))


class _Around:
    """The loss as a function of the distances along some directions.

    Args:
        model: A compiled `keras.Model`.
        data: Tuple `(x, y, sample_weight)`, as of `loss_along`.
        batch_size: Integer > 0, rows of a batch.
        name: What the user calls the directions, for errors.
        directions: Sequence of lists of arrays like the trainable variables.
    """

    def __init__(
        self,
        model: keras.Model,
        data: tuple[Any, Any, Any],
        batch_size: int,
        name: str,
        directions: Sequence[Sequence[Any]],
    ) -> None:
        batch_size = _checks.integer("batch_size", batch_size, 1)
        self.model = _checks.model(model)
        self.batches = to_batches(*data, batch_size)
        if model.built and model.compiled:  # Else that comes first.
            _check_directions(model, name, directions, "float32")
        self._passes = prepare(model, self.batches[0])
        self._dtype = widest_dtype(model.trainable_variables)
        self.directions = _check_directions(
            model, name, directions, self._dtype
        )
        self._loss = tf.function(self._loss_of_batch, autograph=False)

    def losses(
        self, points: Sequence[tuple[float, ...]], verbose: int
    ) -> np.ndarray:
        """Compute the losses at several points and show the progress."""
        bar = keras.utils.Progbar(
            len(points), verbose=verbose, unit_name="point"
        )
        losses = []
        for point in points:
            losses.append(self(point))
            bar.add(1)
        return np.array(losses)

    def __call__(self, point: tuple[float, ...]) -> float:
        """Compute the loss at a point: one distance for each direction."""
        fractions = row_fractions(self.batches)
        # A tensor, so that all points have one trace.
        distances = tf.constant(point, self._dtype)
        return sum(
            fraction * float(self._loss(distances, batch))
            for batch, fraction in zip(self.batches, fractions)
        )

    def _loss_of_batch(self, distances: tf.Tensor, batch: Any) -> tf.Tensor:
        """Compute the loss of one batch without writing to the model."""
        weights = [
            tf.cast(
                tf.cast(w, self._dtype)
                + sum(t * d for t, d in zip(tf.unstack(distances), moves)),
                w.dtype,
            )
            for w, *moves in zip(
                _passes.read(self.model.trainable_variables), *self.directions
            )
        ]
        return self._passes.loss_there(self.model, weights, batch)


def plot_line(
    distances: Sequence[float] | np.ndarray,
    losses: np.ndarray,
    ax: Any = None,
    **line: Any,
) -> Any:
    """Draw losses along a direction.

    Args:
        distances: Sequence of floats.
        losses: Array, the result of `loss_along`.
        ax: A matplotlib `Axes` to draw into, again and again for several
            lines; `None` makes one.
        **line: Options of `Axes.plot`, such as `label` and `color`.

    Returns:
        The `Axes`.

    Raises:
        ImportError: without matplotlib.
    """
    distances = _check_distances("distances", distances)
    losses = _pictures.losses_of(losses, (len(distances),))
    ax = _pictures.axes(ax)
    ax.plot(distances, losses, **line)
    ax.set(xlabel="distance along the direction", ylabel="loss")
    return ax


def plot_plane(
    distances: Sequence[Sequence[float] | np.ndarray],
    losses: np.ndarray,
    ax: Any = None,
    levels: int | Sequence[float] | np.ndarray = 20,
) -> Any:
    """Draw losses on a plane as filled contours, the model in the middle.

    Args:
        distances: The pair of sequences that `loss_on_plane` was given.
        losses: Its result.
        ax: A matplotlib `Axes` to draw into; `None` makes one.
        levels: Integer, how many contours; or a sequence of losses.

    Returns:
        The `Axes`.

    Raises:
        ImportError: without matplotlib.
    """
    _check_pair("distances", distances)
    rows, columns = (_check_distances("distances", d) for d in distances)
    losses = _pictures.losses_of(losses, (len(rows), len(columns)))
    levels = _check_levels(levels)
    ax = _pictures.axes(ax)
    filled = ax.contourf(rows, columns, np.transpose(losses), levels)
    ax.plot(0, 0, "o", color="white", markeredgecolor="black")
    ax.figure.colorbar(filled, ax=ax, label="loss")
    ax.grid(False)
    ax.set(
        xlabel="distance along the first direction",
        ylabel="distance along the second",
        aspect="equal",
    )
    return ax


def plot_spectrum(
    spectrum: Any, ax: Any = None, width: float | None = None, **line: Any
) -> Any:
    """Draw a spectrum as a density, on a logarithmic scale.

    Most eigenvalues of a net are next to 0; a few are far out. The lower limit
    is below the lowest peak of all spectra in the picture: an eigenvalue on
    its own, of a net of `n` weights, has a peak of about `0.4 / (n width)`.

    Args:
        spectrum: A `curvature.SpectralDensity`.
        ax: A matplotlib `Axes` to draw into, again and again for several
            spectra; `None` makes one.
        width: Float > 0, of the Gaussian that stands for each mass (loss units
            per squared distance); `None`: a hundredth of the range.
        **line: Options of `Axes.plot`, such as `label` and `color`.

    Returns:
        The `Axes`.

    Raises:
        ImportError: without matplotlib.
        TypeError, ValueError: if `width` is not a number greater than 0.
    """
    eigenvalues = getattr(spectrum, "eigenvalues", None)
    if not isinstance(eigenvalues, np.ndarray):
        raise TypeError(
            "`spectrum` must be a curvature.SpectralDensity. "
            f"Received: spectrum={_checks.short(spectrum)}"
        )
    low, high = eigenvalues[[0, -1]]
    if width is None:
        # Of a single eigenvalue, or of several but for rounding: its own size.
        size = max(abs(low), abs(high))
        width = (max(high - low, 1e-6 * size) or 1.0) / 100
    width = _checks.number("width", width, 1e-300, 1e300)
    ax = _pictures.axes(ax)
    span = high - low + 14 * width
    # Ten points to a width, for its peaks to be seen.
    points = int(np.clip(10 * span / width, 1000, 20_000))
    grid = np.linspace(low - 7 * width, high + 7 * width, points)
    ax.plot(grid, spectrum.density(grid, width), **line)
    ax.set_yscale("log")
    # Not those that only mark a place, such as of `axvline`.
    curves = [np.asarray(drawn.get_ydata(), float) for drawn in ax.lines]
    ax.set_ylim(*_pictures.limits([c for c in curves if len(c) > 2]))
    ax.set(
        xlabel="eigenvalue (loss per squared weight-space distance)",
        ylabel="density",
    )
    return ax


def plot_budget(history: Any, axes: Any = None) -> Any:
    """Draw the budget, the rise reached and the radius over the epochs.

    Args:
        history: What `fit` of a `LESAMModel` returned, or its `.history`.
        axes: Two matplotlib `Axes`, for losses and for distances; `None`
            makes them, one above the other.

    Returns:
        The two `Axes`.

    Raises:
        ImportError: without matplotlib.
        ValueError: if the history is not that of a `LESAMModel`.
    """
    history = getattr(history, "history", history)
    if not isinstance(history, dict):
        raise TypeError(
            "`history` must be what `fit` of a LESAMModel returned. "
            f"Received: history={_checks.short(history)}"
        )
    missing = {"rho", "sigma"} - set(history)
    if missing:
        raise ValueError(
            "`history` must be that of a LESAMModel's `fit`. "
            f"Received: one without {', '.join(sorted(missing))}"
        )
    if axes is not None:
        _check_pair("axes", axes)
        axes = [_pictures.check("axes", ax) for ax in axes]
    above, below = axes or _pictures.two_axes()
    epochs = np.arange(len(history["rho"])) + 1
    if "sharpness" in history:
        above.plot(
            *(epochs, history["sharpness"]),
            **{"color": "#D55E00", "label": "sharpness: the rise reached"},
        )
    above.plot(
        *(epochs, history["sigma"]),
        **{"color": "black", "linestyle": "--", "label": "sigma: the budget"},
    )
    below.plot(epochs, history["rho"], color="#0072B2")
    above.set(ylabel="loss", ylim=(0, None))
    above.legend(frameon=False)
    below.set(
        xlabel="epoch", ylabel="rho\n(weight-space distance)", ylim=(0, None)
    )
    return above, below


def _random_filters(kernel: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw random filters with the norms of those of a kernel."""
    if kernel.ndim < 2:
        return np.zeros_like(kernel)
    # Squares of 16 bits would overflow or lose the norm.
    wide = kernel.astype(np.promote_types(kernel.dtype, "float32"))
    filters = wide.reshape(-1, wide.shape[-1])
    random = rng.normal(size=filters.shape).astype(wide.dtype)
    random *= np.linalg.norm(filters, axis=0) / np.linalg.norm(random, axis=0)
    return random.reshape(kernel.shape).astype(kernel.dtype)


def _check_directions(
    model: keras.Model, name: str, directions: Sequence[Any], dtype: str
) -> list[list[tf.Tensor]]:
    """Check directions and convert them to tensors of a dtype."""
    return [_check_direction(model, name, d, dtype) for d in directions]


def _check_direction(
    model: keras.Model, name: str, direction: Sequence[Any], dtype: str
) -> list[tf.Tensor]:
    """Check a direction and convert it to tensors of a dtype."""
    expected = [tuple(v.shape) for v in model.trainable_variables]
    if not isinstance(direction, list | tuple | np.ndarray) or isinstance(
        direction, np.ma.MaskedArray
    ):
        raise TypeError(
            f"`{name}` must be a list of arrays like "
            "`model.trainable_variables`. Received: "
            f"{name}={_checks.short(direction)}"
        )
    arrays = [_checks.real_array(name, d) for d in direction]
    shapes = [array.shape for array in arrays]
    if shapes != expected:
        raise ValueError(
            f"`{name}` must be a list of arrays like "
            f"`model.trainable_variables`, of shapes {expected}. "
            f"Received: shapes {shapes}"
        )
    return [tf.cast(array, dtype) for array in arrays]


def _check_pair(name: str, pair: Any) -> None:
    """Raise `ValueError` for anything but two."""
    is_list = isinstance(pair, list | tuple | np.ndarray)
    if not is_list or pair is np.ma.masked or len(pair) != 2:
        raise ValueError(
            f"`{name}` must be two of them. "
            f"Received: {name}={_checks.short(pair)}"
        )


def _check_levels(levels: Any) -> Any:
    """Check for a number of contours, or a sequence of losses, at least two."""
    if isinstance(levels, list | tuple | np.ndarray):
        found = np.unique(_check_distances("levels", levels))
        if len(found) > 1:
            return found
    return _checks.integer("levels", levels, 1, 1000)


def _check_distances(name: str, distances: Any) -> np.ndarray:
    """Check a sequence of numbers and return it as an array."""
    if hasattr(distances, "__next__"):
        distances = [*distances]
    array = _checks.real_array(name, distances)
    if array.ndim != 1 or not array.size:
        raise ValueError(
            f"`{name}` must be a sequence of numbers, at least one. "
            f"Received: {name}={_checks.short(distances)}"
        )
    return array.astype("float64")
