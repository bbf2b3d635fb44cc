"""Where the curvature `k = d.(H d)` along a climb comes from.

Three kinds, which a step asks in turn: `recording` is around its first pass,
`along` gives `k`, or what computes it, to the rule; `learn` is told how the
climb ended.
"""

import contextlib

import numpy as np
import tensorflow as tf

from keras_lesam import _hessian
from keras_lesam import _passes
from keras_lesam import _rule


class FirstOrder:
    """`k = 0`: the paper."""

    def recording(self, weights):
        """The context of the first pass at `weights`: a tape, or nothing."""
        del weights
        return contextlib.nullcontext()

    def along(self, first):
        """The `curvature` of a `LossEquated.climb`, from a first pass."""
        del first
        return None

    def learn(self, first, rho, rise):
        """What the next step may know of this one, a list of `Step.learnt`.

        The climb from `first` was of length `rho`; the loss rose by `rise`.
        """
        del first, rho, rise
        return []


class Exact(FirstOrder):
    """`k` by differentiating twice, in one of the ways of `_hessian`.

    Args:
        method: `REVERSE_OVER_REVERSE` differentiates the first pass of the
            step once more; the others make a pass of their own.
    """

    def __init__(self, method):
        self.method = method

    def recording(self, weights):
        if self.method == _hessian.REVERSE_OVER_REVERSE:
            return _hessian.recording(weights)
        return super().recording(weights)

    def along(self, first):
        def curvature(direction):
            # Where there is no budget there is nothing to know.
            scaled = _passes.either(
                first.problem.conditional,
                first.budget > 0,
                lambda: self._measure(first, direction),
                lambda: tf.zeros_like(first.budget),
            )
            return first.over_replicas(scaled) / first.scale

        return curvature

    def _measure(self, first, direction):
        """`d.(H d)` of the scaled loss."""
        dtype = first.budget.dtype
        here = (first.problem.model, first.weights, first.batch)
        if self.method == _hessian.FORWARD_OVER_REVERSE:
            products = _hessian.product(
                *here, direction, self.method, first.state
            )
        else:
            products = _hessian.differentiate(
                first.tape, first.gradients, first.weights, direction
            )
        return _rule.dot(direction, products, dtype)


class Secant(FirstOrder):
    """`k` from how the climbs of the steps before have ended.

    A climb of length `rho` along which the loss rose by `rise` has shown
    `2 (rise - s rho) / rho^2`. What is used is a running mean, in which no
    observation counts for more than `CLIP` times the usual deviation: one
    wild batch moves it no further than an odd one. A mean below 0 is taken
    for 0: early in a training, when the budget is small and the loss curves
    down, small nets died of the longer climbs.

    Args:
        memory: Variable of shape (2,), zeros at first: the running means of
            the curvature and of its absolute deviation (loss units per
            squared distance).
    """

    DECAY = 0.9
    CLIP = 3.0

    def __init__(self, memory):
        self._variable = memory
        self._memory = tf.convert_to_tensor(memory.value)

    def along(self, first):
        del first
        # Where the loss seems to curve down, no further than to first order:
        # what was seen over a short climb does not bear twice as long a one.
        return tf.maximum(self._memory[0], 0)

    def learn(self, first, rho, rise):
        if first.problem.shared:
            rise = first.over_replicas(rise) / _passes.replicas(rise.dtype)
        slope = first.climb.slope
        linear = slope * rho
        seen = 2 * (rise - linear) / tf.square(rho)
        # No climb, no observation; nor where the rise drowns in rounding.
        loss = tf.cast(first.point.loss, rho.dtype)
        rounding = np.finfo(rho.dtype.as_numpy_dtype).eps * tf.abs(loss)
        known = tf.math.is_finite(seen) & (linear > 1000 * rounding)
        # A curvature of s / rho raises the rise by half: a hundredth of it
        # is little, and keeps the deviation from getting stuck at 0.
        seen = self._average(seen, least=0.01 * slope / rho)
        return [(self._variable, tf.where(known, seen, self._memory))]

    def _average(self, seen, least):
        mean, deviation = self._memory[0], self._memory[1]
        error = seen - mean
        limit = self.CLIP * deviation
        mean += (1 - self.DECAY) * tf.clip_by_value(error, -limit, limit)
        deviation += (1 - self.DECAY) * tf.minimum(
            tf.abs(error) - deviation, limit
        )
        is_first = self._memory[1] == 0
        return tf.stack(
            [
                tf.where(is_first, seen, mean),
                tf.maximum(tf.where(is_first, tf.abs(seen), deviation), least),
            ]
        )
