"""Axes for pictures; matplotlib is an optional package."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from keras_lesam import _checks


def limits(densities: Sequence[np.ndarray]) -> tuple[float, float]:
    """Choose limits in which every peak of some densities can be seen."""
    peaks = np.concatenate([_peaks(density) for density in densities])
    highest = peaks.max()
    # Less than that share is no eigenvalue of any net, but rounding.
    lowest = peaks[peaks > 1e-13 * highest].min()
    return lowest / 10, highest * 3


def _peaks(density: np.ndarray) -> np.ndarray:
    """Return the local maxima of a curve."""
    around = np.pad(density, 1, constant_values=-np.inf)
    is_peak = (density >= around[:-2]) & (density >= around[2:])
    return density[is_peak & (density > 0)]


def axes(ax: Any) -> Any:
    """Make an `Axes` unless there is one already."""
    if ax is not None:
        return check("ax", ax)
    figure, ax = _pyplot().subplots(layout="constrained")
    del figure
    return _tidy(ax)


def check(name: str, ax: Any) -> Any:
    """Raise `TypeError` for what is no `Axes`."""
    if isinstance(ax, type) or not hasattr(ax, "contourf"):
        raise TypeError(
            f"`{name}` must be matplotlib's Axes. "
            f"Received: {name} of type {type(ax).__name__}"
        )
    return ax


def losses_of(losses: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Check losses, of which some may not be finite."""
    try:
        array = np.asarray(losses, float)
    except Exception:
        array = np.zeros(())
    if array.shape != shape:
        raise ValueError(
            f"`losses` must be numbers of shape {shape}, one for each of "
            f"`distances`. Received: losses={_checks.short(losses)}"
        )
    return array


def two_axes() -> list[Any]:
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
