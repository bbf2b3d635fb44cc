"""Tells when perturbations keep a model from learning anything."""

import warnings
from typing import Any

import keras
import numpy as np

# So many epochs, a loss that has not fallen by this share, and a rise of the
# loss in the ascent that is no less of it.
PATIENCE = 5
_SHARE = 0.01


class StuckTraining(keras.callbacks.Callback):
    """Warns, once in each `fit`, where a training does not move.

    That is one whose loss is no lower than in its first epoch, epoch after
    epoch, though its weights are perturbed: nets without normalization can die
    of a perturbation that is too large, all their ReLUs off for all inputs, and
    nothing in the logs would say so.

    It looks at the logs of epochs, and twice at the weights of a training that
    it suspects; steps take no notice.
    """

    def on_train_begin(self, logs: Any = None) -> None:
        del logs
        self._first: float | None = None
        self._stuck_epochs = 0
        self._weights: list[np.ndarray] = []
        self._has_warned = False

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        del epoch
        loss = (logs or {}).get("loss")
        if loss is None or self._has_warned:
            return
        if self._first is None:
            self._first = loss
            return
        is_stuck = loss > self._first - _SHARE * abs(self._first)
        self._stuck_epochs = self._stuck_epochs + 1 if is_stuck else 0
        if self._stuck_epochs == PATIENCE - 1:
            self._weights = self._weights_now()
        elif self._stuck_epochs == PATIENCE:
            self._look_closer(loss, logs)

    def _look_closer(self, loss: float, logs: dict[str, float]) -> None:
        """Warn if the perturbations may be the reason."""
        rho = logs.get("rho", 0.0)
        rise = logs.get("sharpness", rho * logs.get("gradient_norm", 0.0))
        still = self._weights_that_stay()
        if rho > 0 and (still or rise >= _SHARE * abs(loss)):
            self._has_warned = True
            warnings.warn(self._message(loss, rho, still), stacklevel=2)

    def _weights_now(self) -> list[np.ndarray]:
        return [
            keras.ops.convert_to_numpy(variable)
            for variable in self.model.trainable_variables
        ]

    def _weights_that_stay(self) -> list[str]:
        """Return the paths of those that are what they were an epoch ago."""
        before, self._weights = self._weights, []
        now = self._weights_now()
        variables = self.model.trainable_variables
        if len(before) != len(now):
            return []
        return [
            variable.path
            for variable, old, new in zip(variables, before, now)
            if np.array_equal(old, new)
        ]

    def _message(self, loss: float, rho: float, still: list[str]) -> str:
        count = len(self.model.trainable_variables)
        dead = (
            f" {len(still)} of {count} trainable variables do not change at "
            f"all, as behind ReLUs that are off for all inputs: {still[:5]}. "
            "Start again from fresh weights: these will not come back."
            if still
            else ""
        )
        return (
            f"The loss ({loss:.4g}) has been no lower than in the first epoch "
            f"({self._first:.4g}) for {self._stuck_epochs} epochs, while the "
            f"weights are perturbed by rho={rho:.3g}. Perturbations too large "
            "for a net can keep it there, above all without normalization: try "
            "max_change=0.6, a smaller `sigma`, `rho` or `rho_max`, or "
            f"sigma=0 to compare with.{dead}"
        )
