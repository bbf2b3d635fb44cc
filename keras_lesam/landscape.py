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
from keras_lesam._data import row_fractions
from keras_lesam._data import to_batches
from keras_lesam._operator import prepare

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
        seed: Integer.

    Returns:
        List of arrays like `model.trainable_variables`.

    References:
        Li, Xu, Taylor, Studer, Goldstein, "Visualizing the loss landscape of
        neural nets", NeurIPS 2018, arXiv 1712.09913, section 4.
    """
    rng = np.random.default_rng(seed)
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
            memory.
        y: Targets, if `x` is arrays.
        direction: List of arrays like `model.trainable_variables`: a
            `filter_normalized_direction`, say, or an eigenvector of
            `curvature.top_eigenvalues`.
        distances: Sequence of floats, in lengths of `direction`.
        sample_weight: Weights of the rows, if `x` is arrays.
        batch_size: Integer > 0, rows of a batch, if `x` is arrays.
        verbose: 0 or 1, whether to show the progress.

    Returns:
        Float64 array `(len(distances),)`: the mean over batches, each weighed
        by its rows (loss units).

    Raises:
        TypeError, ValueError: for a model that is not compiled, for data
            without rows or without end, and for a `direction` of other shapes.
    """
    points = [(t,) for t in distances]
    around = _Around(model, (x, y, sample_weight), batch_size, [direction])
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
    for name, pair in (("directions", directions), ("distances", distances)):
        if len(pair) != 2:
            raise ValueError(
                f"`{name}` must be two of them. Received: {len(pair)}"
            )
    rows, columns = distances
    around = _Around(model, (x, y, sample_weight), batch_size, directions)
    points = [(s, t) for s in rows for t in columns]
    return around.losses(points, verbose).reshape(len(rows), len(columns))


class _Around:
    """The loss as a function of the distances along some directions.

    Args:
        model: A compiled `keras.Model`.
        data: Tuple `(x, y, sample_weight)`, as of `loss_along`.
        batch_size: Integer > 0, rows of a batch.
        directions: Sequence of lists of arrays like the trainable variables.
    """

    def __init__(
        self,
        model: keras.Model,
        data: tuple[Any, Any, Any],
        batch_size: int,
        directions: Sequence[Sequence[Any]],
    ) -> None:
        batch_size = _checks.integer("batch_size", batch_size, 1)
        self.model = model
        self.batches = to_batches(*data, batch_size)
        prepare(model, self.batches[0])
        self.directions = [_check_direction(model, d) for d in directions]
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
        dtype = self.model.trainable_variables[0].dtype
        # A tensor, so that all points have one trace.
        distances = tf.constant(point, dtype)
        return sum(
            fraction * float(self._loss(distances, batch))
            for batch, fraction in zip(self.batches, fractions)
        )

    def _loss_of_batch(self, distances: tf.Tensor, batch: Any) -> tf.Tensor:
        """Compute the loss of one batch without writing to the model."""
        weights = [
            w + sum(t * d for t, d in zip(tf.unstack(distances), moves))
            for w, *moves in zip(
                _passes.read(self.model.trainable_variables), *self.directions
            )
        ]
        _, loss, _, _ = _passes.forward(
            self.model, weights, batch, training=False
        )
        return loss


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
    ax = _axes(ax)
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
    ax = _axes(ax)
    rows, columns = distances
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

    Most eigenvalues of a net are next to 0; a few are far out.

    Args:
        spectrum: A `curvature.SpectralDensity`.
        ax: A matplotlib `Axes` to draw into, again and again for several
            spectra; `None` makes one.
        width: Float, of the Gaussian that stands for each mass (loss units
            per squared distance); `None`: a hundredth of the range.
        **line: Options of `Axes.plot`, such as `label` and `color`.

    Returns:
        The `Axes`.

    Raises:
        ImportError: without matplotlib.
    """
    ax = _axes(ax)
    low, high = spectrum.eigenvalues[[0, -1]]
    width = width or max(high - low, 1e-12) / 100
    grid = np.linspace(low - 4 * width, high + 4 * width, 1000)
    ax.plot(grid, spectrum.density(grid, width), **line)
    ax.set_yscale("log")
    # About the density of one weight in a million: below are only tails.
    ax.set_ylim(bottom=1e-6)
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
    missing = {"rho", "sigma"} - set(history)
    if missing:
        raise ValueError(
            "`history` must be that of a LESAMModel's `fit`. "
            f"Received: one without {', '.join(sorted(missing))}"
        )
    above, below = _two_axes() if axes is None else axes
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
    filters = kernel.reshape(-1, kernel.shape[-1])
    random = rng.normal(size=filters.shape).astype(kernel.dtype)
    random *= np.linalg.norm(filters, axis=0) / np.linalg.norm(random, axis=0)
    return random.reshape(kernel.shape)


def _check_direction(
    model: keras.Model, direction: Sequence[Any]
) -> list[tf.Tensor]:
    """Check the shapes of a direction and convert it to tensors."""
    variables = model.trainable_variables
    shapes = [tuple(np.shape(d)) for d in direction]
    expected = [tuple(v.shape) for v in variables]
    if shapes != expected:
        raise ValueError(
            "A direction must be a list of arrays like "
            f"`model.trainable_variables`, of shapes {expected}. "
            f"Received: shapes {shapes}"
        )
    return [tf.cast(d, v.dtype) for d, v in zip(direction, variables)]


def _axes(ax: Any) -> Any:
    """Make an `Axes` unless there is one already."""
    if ax is not None:
        return ax
    figure, ax = _pyplot().subplots(layout="constrained")
    del figure
    return _tidy(ax)


def _two_axes() -> list[Any]:
    """Make two `Axes`, one above the other."""
    _, axes = _pyplot().subplots(2, sharex=True, layout="constrained")
    return [_tidy(ax) for ax in axes]


def _tidy(ax: Any) -> Any:
    """Give an `Axes` a light grid and no box."""
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def _pyplot() -> Any:
    """Import pyplot where it is needed: matplotlib is an optional package."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            "Pictures need matplotlib: pip install 'keras_lesam[landscape]'"
        ) from error
    return plt
