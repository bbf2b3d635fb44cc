"""The rule: from gradient, weights and budget to the perturbation.

Pure functions of tensors; no Keras model and no strategy in sight. Lists of
tensors run parallel to the trainable variables, with `None` where a variable
takes no part: it has no gradient, or its scaling `T` is zero.

In the notation of Wang et al. (ICML 2026, arXiv 2605.10183):

    g       gradient of the loss
    T       element-wise scaling: 1, or |w| when adaptive
    d       ascent direction, T^2 g / ||T g||
    s       slope along it, g.d = ||T g||
    k       curvature along it, d.H d
    sigma   loss budget
    rho     length of the climb: the loss rises by sigma over eps = rho d
"""

import dataclasses
import math
from typing import Any
from typing import NamedTuple

import tensorflow as tf


class Climb(NamedTuple):
    """The perturbation of one step and the numbers it came from.

    Attributes:
        perturbation: List of tensors like the weights (weight-space
            distance), `None` for a weight that stays where it is.
        rho: Scalar, the length of the climb along `d`; 0 where there is
            none.
        slope: Scalar, `||T g||` (loss units per weight-space distance); 0 or
            not finite where there is nothing to climb.
    """

    perturbation: list
    rho: tf.Tensor
    slope: tf.Tensor


@dataclasses.dataclass(frozen=True)
class LossEquated:
    """LE-SAM: climb until the loss has risen by `sigma`, to first order.

    Attributes:
        rho_max: Scalar tensor or variable, the largest `rho`; infinity for
            no cap.
        adaptive: Whether `T` is `|w|` (ASAM, Kwon et al. 2021) or 1.
        alpha: Float, the share of the plain gradient that the update leaves
            out.
    """

    rho_max: Any
    adaptive: bool = False
    alpha: float = 0.0

    def climb(self, gradients, weights, sigma, scale=1.0, curvature=None):
        """`eps = rho d` with `d = T^2 g / ||T g||` and `rho` from `radius`.

        Args:
            gradients: List of dense tensors or `None`: gradients of `scale`
                times the loss.
            weights: List of tensors.
            sigma: Scalar tensor, the budget in loss units. Its dtype is the
                dtype of all scalars here.
            scale: What the loss was multiplied by before differentiation.
                The direction does not depend on it; the slope does.
            curvature: `k = d.(H d)` of the loss: a scalar tensor; or a
                callable that gives it for `d`, a list like `gradients`; or
                `None` for the first order.

        Returns:
            A `Climb`.
        """
        scaling = weights if self.adaptive else [None] * len(weights)
        norm = slope(gradients, scaling, sigma.dtype)
        rho_max = tf.cast(self.rho_max, sigma.dtype)
        if not callable(curvature):
            # Without d, which need not be in memory.
            rho = radius(norm / scale, sigma, rho_max, curvature)
            perturbation = _displacements(
                gradients, scaling, rho / _or_one(norm, rho > 0)
            )
            return Climb(perturbation, rho, norm / scale)
        direction = _displacements(
            gradients, scaling, 1 / _or_one(norm, norm > 0)
        )
        rho = radius(norm / scale, sigma, rho_max, curvature(direction))
        # Where rho is 0 the direction may not be finite.
        perturbation = [
            None if d is None else _or_zero(tf.cast(rho, d.dtype) * d, rho > 0)
            for d in direction
        ]
        return Climb(perturbation, rho, norm / scale)

    def descent(self, perturbed_gradient, gradient):
        """`g_hat = grad L(w + eps) - alpha g` for one weight.

        `alpha` > 0 removes that share of the plain gradient and leaves the
        curvature signal (the decoupling of the paper).
        """
        if not self.alpha:
            return perturbed_gradient
        alpha = tf.cast(self.alpha, gradient.dtype)
        return perturbed_gradient - alpha * gradient


def slope(gradients, scaling, dtype):
    """`s = ||T g||`, summed in `dtype` over all gradients that are there.

    `scaling` is a list like `gradients` of `T` up to its sign, `None` for 1.
    """
    squares = [
        _sum_of_squares(g, t, dtype)
        for g, t in zip(gradients, scaling)
        if g is not None
    ]
    return tf.sqrt(tf.add_n(squares)) if squares else tf.zeros((), dtype)


def radius(slope, sigma, rho_max, curvature=None):
    """The stable root of `s rho + k rho^2 / 2 = sigma`, capped at `rho_max`.

    `rho = min(2 sigma / (s + sqrt(max(s^2 + 2 k sigma, 0))), rho_max)`, which
    is the paper's `sigma / s` where `k = 0`. Where the loss curves down so
    much that it cannot rise by `sigma` (a negative root) it is `2 sigma / s`.
    It is 0 where the slope is 0 or not finite, or so small that the step
    would not be a number. A curvature that is not finite counts as 0.

    Args:
        slope: Scalar tensor `s`.
        sigma: Scalar tensor, the budget.
        rho_max: Scalar tensor, the cap.
        curvature: Scalar tensor `k`, or `None` for the first order.

    Returns:
        Scalar tensor `rho`, not negative, always finite.
    """
    usable = tf.math.is_finite(slope) & (slope > 0)
    s = tf.where(usable, slope, tf.ones_like(slope))
    if curvature is None:
        rho = sigma / s
    else:
        k = _or_zero(curvature, tf.math.is_finite(curvature))
        root = tf.sqrt(tf.maximum(s * s + 2 * k * sigma, 0))
        rho = 2 * sigma / (s + root)
    rho = tf.minimum(rho, rho_max)
    usable &= tf.math.is_finite(rho / s)
    return _or_zero(rho, usable)


def budget(sigma, progress, warmup, anneal):
    """The budget after a share `progress` of the training.

    Linear from 0 over the first `warmup`, `sigma` in between, and to 0 on a
    half cosine over the last `anneal`.

    Args:
        sigma: Scalar tensor, the full budget in loss units.
        progress: Scalar tensor of the same dtype, steps done over steps in
            all. Beyond 1 the budget stays what it is at 1.
        warmup: Float in [0, 1].
        anneal: Float in [0, 1].

    Returns:
        Scalar tensor, the budget of this step.
    """
    if warmup:
        sigma *= tf.clip_by_value(progress / warmup, 0.0, 1.0)
    if anneal:
        # sin^2 of what remains, which is 0 at the end and not nearly 0:
        # 0.5 (1 + cos(pi done)) is the same on paper.
        remains = tf.clip_by_value((1 - progress) / anneal, 0.0, 1.0)
        sigma *= tf.square(tf.sin(0.5 * math.pi * remains))
    return sigma


def _displacements(gradients, scaling, factor):
    """`factor T^2 g` for all weights."""
    return [
        None if g is None else _displacement(g, t, factor)
        for g, t in zip(gradients, scaling)
    ]


def _displacement(gradient, scaling, factor):
    """`factor T^2 g` for one weight, in the dtype of the weight."""
    factor = tf.cast(factor, gradient.dtype)
    if scaling is None:
        return factor * gradient
    return factor * tf.square(scaling) * gradient


def _or_zero(value, condition):
    return tf.where(condition, value, tf.zeros_like(value))


def _or_one(value, condition):
    return tf.where(condition, value, tf.ones_like(value))


def _sum_of_squares(gradient, scaling, dtype):
    # Cast first: the squares of float16 numbers overflow float16.
    scaled = tf.cast(gradient, dtype)
    if scaling is not None:
        scaled *= tf.cast(scaling, dtype)
    return 2 * tf.nn.l2_loss(scaled)
