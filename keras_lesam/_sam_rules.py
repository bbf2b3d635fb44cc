"""SAM, which the other rules vary, and SAM with a step of the plain length."""

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_lesam import _amounts
from keras_lesam import _checks
from keras_lesam import _vectors
from keras_lesam import budgets
from keras_lesam._gradients import Gradients
from keras_lesam._rule import Rule
from keras_lesam._rule import State
from keras_lesam._rule import usable_radius

_register = keras.saving.register_keras_serializable(package="keras_lesam")


@_register
class SAM(Rule):
    """Sharpness-Aware Minimization: a perturbation of fixed length.

    `eps = rho g / ||g||`, the first-order solution of `max L(w + eps)` over
    `||eps|| <= rho` (Foret et al. 2021, equation 2).

    Example:

    >>> import keras, numpy as np
    >>> from keras_lesam import SAMModel, rules
    >>> net = keras.Sequential([keras.layers.Dense(1)])
    >>> model = SAMModel(net, rules.SAM(rho=0.05))
    >>> model.compile("sgd", "mse")
    >>> history = model.fit(np.ones((8, 2)), np.ones((8, 1)), verbose=0)
    >>> round(history.history["rho"][0], 3)
    0.05

    Args:
        rho: Float >= 0, the length (weight-space distance), or a
            `keras.optimizers.schedules.LearningRateSchedule` from
            `optimizer.iterations` to it.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if one is out of range.

    References:
        Foret, Kleiner, Mobahi, Neyshabur, "Sharpness-Aware Minimization for
        Efficiently Improving Generalization", ICLR 2021, arXiv 2010.01412.
    """

    def __init__(self, rho: Any = 0.05) -> None:
        if not _checks.is_schedule(rho):
            rho = _checks.number("rho", rho, 0)
        self.rho = rho

    def radius(
        self, norm: tf.Tensor, budget: tf.Tensor, curvature: Any = None
    ) -> tf.Tensor:
        """Return the budget, which is `rho`; 0 without a direction to go."""
        del curvature
        return usable_radius(budget, norm)

    @property
    def uses_curvature(self) -> bool:
        return False

    def default_budget(self) -> budgets.Budget:
        """Return `rho` in every step."""
        return _amounts.from_number("rho", self.rho, None, None, (0.0, 0.0))


@_register
class StableSAM(SAM):
    """StableSAM: SAM whose update is as long as the plain gradient.

    `g_hat = (||g|| / ||h||) h`, algorithm 1 of Tan et al. (2024): the gradient
    at `w + eps` is mostly longer than that at `w`, which lets SAM diverge at
    learning rates where plain training doesn't. Near a saddle or on a plateau
    the step is then as short as the plain one. The norms are over all weights.

    Args:
        rho: As in `SAM`.

    References:
        Tan, Zhang, Liu, Wang, Hao, "Stabilizing Sharpness-Aware Minimization
        Through A Simple Renormalization Strategy", 2024, arXiv 2401.07250.
    """

    def update(
        self, plain: Gradients, perturbed: Gradients, state: State
    ) -> tuple[Sequence[Any], State]:
        """Return `(||g|| / ||h||) h`; 0 where `h` is."""
        plain.reduce_with(perturbed)
        size, length = plain.norm(), perturbed.norm()
        gradients = [
            None
            if h is None
            else tf.cast(_vectors.along(h, size, length), h.dtype)
            for h in perturbed
        ]
        return gradients, state
