"""Callbacks that show what a training does, and the curvature it goes by."""

import math
import re
import warnings
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from keras_lesam import _checks
from keras_lesam import _lanczos
from keras_lesam._data import to_batches
from keras_lesam._operator import HessianOperator
from keras_lesam._progress import ProgressBar

__all__ = ["Curvature", "ProgressBar"]


class Curvature(keras.callbacks.Callback):
    """Logs the largest eigenvalue and the trace of the Hessian.

    The Hessian is that of the loss that `fit` minimises, on a fixed sample,
    at the ends of epochs. The logs have `top_eigenvalue` and `hessian_trace`
    (loss units per squared weight-space distance). Put it before the
    callbacks that are to see them (`TensorBoard`, `CSVLogger`,
    `ModelCheckpoint`); `History` sees them anyway.

    It never ends a training: what cannot be measured, of a model that cannot
    be differentiated twice or a loss that has become nan, is logged as nan,
    and a warning tells the reason, once in each `fit`.

    Example:

    >>> import keras, numpy as np
    >>> from keras_lesam.callbacks import Curvature
    >>> model = keras.Sequential([keras.layers.Dense(1)])
    >>> model.compile("sgd", "mse")
    >>> x, y = np.random.rand(64, 3), np.random.rand(64, 1)
    >>> watch = Curvature(x[:32], y[:32])
    >>> history = model.fit(x, y, epochs=2, callbacks=[watch], verbose=0)
    >>> sorted(history.history)
    ['hessian_trace', 'loss', 'top_eigenvalue']

    Args:
        x: Inputs of the sample, or a dataset of batches; kept in memory. A
            few hundred rows of the training data will do.
        y: Targets, if `x` has only inputs.
        sample_weight: Weights of the rows, if `x` has only inputs.
        batch_size: Integer > 0, rows of a batch, if `x` is arrays; see
            `curvature.top_eigenvalues`.
        every: Integer > 0: measure after every so many epochs, the last of
            `fit` included; the logs of the others have nan.
        tolerance: Float > 0, the relative accuracy of the eigenvalue.
        trace_samples: Integer > 1, random vectors for the trace, or 0: no
            trace.
        seed: Integer >= 0, of the random vectors, the same at every epoch.

    Raises:
        TypeError, ValueError: for arguments out of range, and for data that
            are not arrays or a dataset, without rows or without end.
    """

    def __init__(
        self,
        x: Any,
        y: Any = None,
        sample_weight: Any = None,
        *,
        batch_size: int = 256,
        every: int = 1,
        tolerance: float = 1e-2,
        trace_samples: int = 20,
        seed: int = 0,
    ) -> None:
        super().__init__()
        batch_size = _checks.integer("batch_size", batch_size, 1)
        self._batches = to_batches(x, y, sample_weight, batch_size)
        self.every = _checks.integer("every", every, 1)
        self.tolerance = _checks.number("tolerance", tolerance, 0, above=True)
        self.trace_samples = _checks.integer("trace_samples", trace_samples, 0)
        if self.trace_samples == 1:
            # A single sample has no standard error.
            _checks.integer("trace_samples", trace_samples, 2)
        self.seed = _checks.integer("seed", seed, 0)

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        # Made when it is first asked: the training builds the model, and not
        # this sample, which may be of other shapes.
        self._hessian: HessianOperator | None = None
        self._has_warned = False

    def on_epoch_end(
        self, epoch: int, logs: dict[str, Any] | None = None
    ) -> None:
        if logs is None:
            return
        last = epoch + 1 == self.params.get("epochs")
        is_due = (epoch + 1) % self.every == 0 or last
        # Otherwise nan, so that all lists of `History` have the same length.
        logs["top_eigenvalue"] = self._try(self._top_eigenvalue, is_due)
        if self.trace_samples:
            logs["hessian_trace"] = self._try(self._trace, is_due)

    def _operator(self) -> HessianOperator:
        """Return one operator for all epochs: its first product is traced."""
        if self._hessian is None or not self._hessian.is_current():
            self._hessian = HessianOperator.of_batches(
                self.model, self._batches
            )
        return self._hessian

    def _try(
        self, measure: Callable[[HessianOperator], float], is_due: bool
    ) -> float:
        """Return a measure, or nan where there is none."""
        try:
            return measure(self._operator()) if is_due else math.nan
        except Exception as error:
            self._warn(error)
            return math.nan

    def _warn(self, error: Exception) -> None:
        """Tell the reason of the first nan of a training."""
        if self._has_warned:
            return
        self._has_warned = True
        # Errors of Keras are in bold type, and those of TensorFlow are long.
        reason = " ".join(re.sub(r"\x1b\[\d*m", "", str(error)).split())
        warnings.warn(
            "The training goes on, but `callbacks.Curvature` logs nan where "
            "it cannot measure the curvature. The reason: "
            f"{type(error).__name__}: {reason[:500]}",
            stacklevel=2,
        )

    def _top_eigenvalue(self, hessian: HessianOperator) -> float:
        values, _ = _lanczos.largest(
            hessian, 1, self.tolerance, 1000, self._rng()
        )
        return float(values[0])

    def _trace(self, hessian: HessianOperator) -> float:
        value, _, _ = _lanczos.trace(
            hessian, 0.0, self.trace_samples, self._rng()
        )
        return value

    def _rng(self) -> np.random.Generator:
        return np.random.default_rng(self.seed)
