"""Curvature estimators: `k`, the curvature along the ascent direction.

With it the budget of LE-SAM is met to second order:
`s rho + k rho^2 / 2 = sigma`.

| estimator    | `curvature=` | where `k` comes from                          |
|--------------|--------------|-----------------------------------------------|
| `FirstOrder` | `"none"`     | nowhere: `k = 0`, the paper                   |
| `Exact`      | `"hvp"`      | a Hessian-vector product of each batch        |
| `Secant`     | `"secant"`   | what the second passes of earlier steps found |
"""

import contextlib
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_lesam import _checks
from keras_lesam import _hessian
from keras_lesam import _passes
from keras_lesam import _vectors
from keras_lesam import _workarounds
from keras_lesam._data import Batch
from keras_lesam._engines import Passes
from keras_lesam._records import FirstPass
from keras_lesam._rule import Perturbation
from keras_lesam._strategy import Strategy
from keras_lesam._vectors import Tensors

__all__ = ["CurvatureEstimator", "Exact", "FirstOrder", "Secant"]

_register = keras.saving.register_keras_serializable(package="keras_lesam")


class CurvatureEstimator(Strategy):
    """Where the curvature along the ascent direction comes from.

    Immutable; `estimate` and `update` are pure functions of tensors. Both are
    given an immutable record of the first pass, with (among others) `budget`,
    `gradients`, `point.loss` and `weights`.
    """

    def init_state(self, dtype: Any) -> dict[str, Any]:
        """Return the state before the first step, a dict of tensors."""
        del dtype
        return {}

    def recording(self, weights: Tensors) -> Any:
        """Return the context of the first pass: a tape, or nothing."""
        del weights
        return contextlib.nullcontext()

    def estimate(self, first: FirstPass, state: dict[str, Any]) -> Any:
        """Return `k` for `Rule.perturb`.

        Args:
            first: The first pass of the step.
            state: What `update` returned in the step before.

        Returns:
            A scalar tensor; or a callable that gives it for the ascent
            direction `d`, a list like the weights; or `None` for none.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must define `estimate`."
        )

    def update(
        self,
        first: FirstPass,
        perturbation: Perturbation,
        rise: tf.Tensor,
        state: dict[str, Any],
    ) -> dict[str, Any]:
        """Return the state of the next step.

        Called where both passes saw the same rows.

        Args:
            first: The first pass of the step.
            perturbation: Its `radius` is 0 where there was no ascent.
            rise: Scalar tensor, `L(w + eps) - L(w)` in loss units; of the whole
                batch where all replicas take one perturbation.
            state: What `update` returned in the step before.
        """
        del first, perturbation, rise
        return state

    def check(self, passes: Passes, model: keras.Model, batch: Batch) -> None:
        """Raise `ValueError` for a model that it would be wrong for.

        Called before the first step, with a compiled and built model, and the
        engine of passes that sees all of it.
        """

    def supports_jit(self, model: keras.Model) -> bool:
        """Return whether XLA would compile it rightly, as far as is known.

        What `jit_compile="auto"` goes by, before there is any data.
        """
        del model
        return True

    @property
    def needs_rise(self) -> bool:
        """Whether it learns from the rise of the loss.

        Then it is refused where both passes do not see the same rows.
        """
        return type(self).update is not CurvatureEstimator.update


@_register
class FirstOrder(CurvatureEstimator):
    """`k = 0`: the paper."""

    def estimate(self, first: FirstPass, state: dict[str, Any]) -> None:
        """Return `None`."""
        del first, state


@_register
class Exact(CurvatureEstimator):
    """`k = d.(H d)` by differentiating twice.

    Args:
        method: `"reverse_over_reverse"` differentiates the first pass of the
            step once more, and goes everywhere; `"forward_over_reverse"` makes
            a pass of its own, and has no rule for the loops of recurrent
            layers; `"auto"` is the former, which is cheaper.

    Raises:
        ValueError: if it is none of these.
    """

    def __init__(self, method: str = "auto") -> None:
        self._method = _hessian.resolve(
            _checks.choice("method", method, _hessian.CHOICES)
        )

    def recording(self, weights: Tensors) -> Any:
        """Return a tape for reverse mode, nothing for forward mode."""
        if self._method == _hessian.REVERSE_OVER_REVERSE:
            return _hessian.recording(weights)
        return super().recording(weights)

    def estimate(self, first: FirstPass, state: dict[str, Any]) -> Any:
        """Return a function of the direction."""
        del state
        context = first.context

        def curvature(direction: Tensors) -> tf.Tensor:
            # Where there is no budget there is nothing to know.
            scaled = _passes.either(
                context.use_cond,
                first.budget > 0,
                lambda: self._measure(first, direction),
                lambda: tf.zeros_like(first.budget),
            )
            return context.scales().unscale_scalar(scaled)

        return curvature

    def _measure(self, first: FirstPass, direction: Tensors) -> tf.Tensor:
        """Return `d.(H d)` of the scaled loss."""
        direction = [
            None if d is None else tf.cast(d, w.dtype)
            for d, w in zip(direction, first.weights)
        ]
        if self._method == _hessian.FORWARD_OVER_REVERSE:
            products = _hessian.product(
                first.context.passes,
                first.context.model,
                first.weights,
                first.batch,
                direction,
                self._method,
                first.inputs.model_state,
            )
        else:
            products = _hessian.differentiate(
                first.tape, first.scaled, first.sources, direction
            )
        return _vectors.dot(direction, products, first.budget.dtype)

    def supports_jit(self, model: keras.Model) -> bool:
        """Return False for max pooling."""
        return not _workarounds.has_max_pooling(model)

    def check(self, passes: Passes, model: keras.Model, batch: Batch) -> None:
        """Refuse what has no second derivative, or a wrong one under XLA."""
        _hessian.refuse_forward_mode(passes, self._method, "hvp_method")
        operations = _hessian.operations(passes, model, batch)
        _hessian.refuse_unsupported(operations, self._method, "hvp_method")
        if model.jit_compile:
            _hessian.refuse_max_pooling(operations)


@_register
class Secant(CurvatureEstimator):
    """`k` from how the ascents of the steps before have ended.

    An ascent of radius `rho` along which the loss rose by `rise` has shown
    `2 (rise - s rho) / rho^2`. What is used is a running mean, in which no
    observation counts for more than `CLIP` times the usual deviation: one
    wild batch moves it no further than an odd one. At first that deviation is
    `s / rho`, the curvature that raises the rise by half. A mean below 0 is
    taken for 0: early in a training, when the budget is small and the loss
    curves down, small nets died of the larger radius.

    The state is the running mean of the curvature and that of its absolute
    deviation (loss units per squared weight-space distance), 0 at first. Means
    that are not finite count as none.
    """

    DECAY = 0.9
    CLIP = 3.0

    def init_state(self, dtype: Any) -> dict[str, Any]:
        """Return the running means, zeros of shape (2,)."""
        return {"means": tf.zeros((2,), dtype)}

    def estimate(self, first: FirstPass, state: dict[str, Any]) -> tf.Tensor:
        """Return the running mean of the curvature, at least 0."""
        del first
        # Where the loss seems to curve down, no further than to first order:
        # what was seen over a short ascent does not bear twice as long a one.
        return tf.maximum(_known(state["means"])[0], 0)

    def update(
        self,
        first: FirstPass,
        perturbation: Perturbation,
        rise: tf.Tensor,
        state: dict[str, Any],
    ) -> dict[str, Any]:
        """Return the means with what this step has shown."""
        means = _known(state["means"])
        slope, rho = perturbation.norm, perturbation.radius
        linear = slope * rho
        # No ascent, no observation. Not by the square: it underflows.
        observed = tf.math.divide_no_nan(
            2 * tf.math.divide_no_nan(rise - linear, rho), rho
        )
        usual = tf.math.divide_no_nan(slope, rho)
        # Nor where the rise that is looked for drowns in rounding. It is that
        # of the curvature too: one that is much too large makes the ascents so
        # short that the linear part would never again be seen.
        expected = linear + tf.abs(means[0]) * rho * rho / 2
        loss = tf.cast(first.point.loss, rho.dtype)
        rounding = np.finfo(rho.dtype.as_numpy_dtype).eps * tf.abs(loss)
        is_known = (expected > 1000 * rounding) & (rho > 0)
        is_known &= tf.math.is_finite(observed) & tf.math.is_finite(usual)
        learnt = self._average(means, observed, usual)
        return {"means": tf.where(is_known, learnt, means)}

    def _average(
        self, means: tf.Tensor, observed: tf.Tensor, usual: tf.Tensor
    ) -> tf.Tensor:
        """Return the means with one observation.

        The deviation stays at least at a hundredth of the usual curvature,
        which is little, and keeps it from getting stuck at 0.
        """
        mean, deviation = means[0], means[1]
        error = observed - mean
        limit = self.CLIP * deviation
        mean += (1 - self.DECAY) * tf.clip_by_value(error, -limit, limit)
        deviation += (1 - self.DECAY) * tf.minimum(
            tf.abs(error) - deviation, limit
        )
        is_first = means[1] == 0
        limit = self.CLIP * usual
        observed = tf.clip_by_value(observed, -limit, limit)
        return tf.stack(
            [
                tf.where(is_first, observed, mean),
                tf.maximum(
                    tf.where(is_first, tf.abs(observed), deviation),
                    0.01 * usual,
                ),
            ]
        )


def _known(means: tf.Tensor) -> tf.Tensor:
    """Return the means, or zeros if they are not finite: none are known."""
    is_known = tf.reduce_all(tf.math.is_finite(means)) & (means[1] > 0)
    return _vectors.or_zero(means, is_known)


def from_argument(curvature: Any, hvp_method: str = "auto") -> Any:
    """Make the estimator of the arguments of a model."""
    if isinstance(curvature, CurvatureEstimator):
        return curvature
    _checks.choice("curvature", curvature, ("none", "hvp", "secant"))
    _checks.choice("hvp_method", hvp_method, _hessian.CHOICES)
    if hvp_method != "auto" and curvature != "hvp":
        raise ValueError(
            "`hvp_method` is for curvature='hvp'. "
            f"Received: hvp_method={hvp_method!r}, curvature={curvature!r}"
        )
    if curvature == "hvp":
        return Exact(hvp_method)
    return Secant() if curvature == "secant" else FirstOrder()
