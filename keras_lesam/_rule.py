"""The rule: from gradient, weights and budget to the perturbation.

Pure functions of tensors; no Keras model and no strategy in sight. Lists of
tensors run parallel to the trainable variables, with `None` where a variable
takes no part: it has no gradient, or its scaling `T` is zero.

In the notation of Wang et al. (ICML 2026, arXiv 2605.10183):

    g       gradient of the loss
    h       gradient at the end of the climb, at w + eps
    T       element-wise scaling: 1, or |w| when adaptive
    d       ascent direction, T^2 g / ||T g||
    s       slope along it, g.d = ||T g||
    k       curvature along it, d.H d
    sigma   loss budget
    rho     length of the climb: the loss rises by sigma over eps = rho d

What sets one rule apart from another is the `radius`. Some change one thing
more: what they climb by (`ascent`), what the optimizer is given (`descent`),
what they keep from step to step (`remember`).
"""

import math
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


class Rule:
    """What a step asks of a rule. The defaults are those of SAM.

    The methods are pure functions of tensors: a rule keeps nothing but the
    numbers it was made with. What it wants to know in the next step it returns
    from `remember`, and is given back as `memory`: a dict from each name in
    `keeps` to a list of tensors like the weights, zeros at first.

    Attributes:
        every: Integer, the steps from one climb to the next.
        keeps: Dict from the name of what is kept for each weight to whether
            it is kept for all weights, or for those that move only.
        combines: Whether `descent` is anything else than `h`.
        needs_products: Whether `remember`, `descent` or `reuse` look at sums
            over all replicas.
    """

    every = 1
    keeps = {}
    combines = False
    needs_products = False

    def scaling(self, weights):
        """`T` for each weight, up to its sign; `None` for 1."""
        return [None] * len(weights)

    def ascent(self, gradients, scale, memory):
        """What to climb by, from `scale` times the gradients: those."""
        del scale, memory
        return gradients

    def radius(self, slope, budget, curvature=None):
        """The length `rho` of a climb with this slope: not negative, finite.

        Args:
            slope: Scalar tensor `s`, which may be 0 or not finite.
            budget: Scalar tensor.
            curvature: Scalar tensor `k`, or `None` where it is not known.
        """
        raise NotImplementedError

    def climb(self, gradients, weights, budget, scale=1.0, curvature=None):
        """`eps = rho d` with `d = T^2 g / ||T g||` and `rho` from `radius`.

        Args:
            gradients: List of dense tensors or `None`: gradients of `scale`
                times the loss.
            weights: List of tensors.
            budget: Scalar tensor, what `radius` makes the length from. Its
                dtype is the dtype of all scalars here.
            scale: What the loss was multiplied by before differentiation.
                The direction does not depend on it; the slope does.
            curvature: `k = d.(H d)` of the loss: a scalar tensor; or a
                callable that gives it for `d`, a list like `gradients`; or
                `None` for the first order.

        Returns:
            A `Climb`.
        """
        scaling = self.scaling(weights)
        norm = slope(gradients, scaling, budget.dtype)
        if not callable(curvature):
            # Without d, which need not be in memory.
            rho = self.radius(norm / scale, budget, curvature)
            perturbation = _displacements(
                gradients, scaling, rho / _or_one(norm, rho > 0)
            )
            return Climb(perturbation, rho, norm / scale)
        direction = _displacements(
            gradients, scaling, 1 / _or_one(norm, norm > 0)
        )
        rho = self.radius(norm / scale, budget, curvature(direction))
        # Where rho is 0 the direction may not be finite.
        perturbation = [
            None if d is None else or_zero(tf.cast(rho, d.dtype) * d, rho > 0)
            for d in direction
        ]
        return Climb(perturbation, rho, norm / scale)

    def descent(self, products):
        """`(a, b)` of `g_hat = a h + b g`, what the optimizer is given.

        Args:
            products: Inner products of the two gradients over all weights, as
                attributes that cost something when they are looked at:
                `inner` is `g.h`, `plain` is `g.g`, `perturbed` is `h.h`.
        """
        del products
        return 1.0, 0.0

    def remember(self, memory, plain, perturbed, products, climbed):
        """The next step's `memory`, from the two gradients of this one.

        Args:
            memory: What this step was given.
            plain: List of dense tensors or `None`, the gradients of the loss.
            perturbed: Those at the end of the climb.
            products: As in `descent`.
            climbed: Bool scalar tensor, whether there was a climb; if not,
                `perturbed` is `plain`.
        """
        del plain, perturbed, products, climbed
        return memory

    def reuse(self, gradients, memory, dtype):
        """What to add to `gradients` in the steps between two climbs.

        Args:
            gradients: List of dense tensors or `None`, of any scale.
            memory: What this step was given.
            dtype: Of scalars.

        Returns:
            A list like `gradients`, at their scale; `None` for nothing.
        """
        del memory, dtype
        return [None] * len(gradients)


class LossEquated(Rule):
    """LE-SAM: climb until the loss has risen by `sigma`.

    Args:
        rho_max: Scalar tensor or variable, the largest `rho`; infinity for
            no cap.
        adaptive: Whether `T` is `|w|` (ASAM, Kwon et al. 2021) or 1.
        alpha: Float, the share of the plain gradient that the update leaves
            out.
    """

    def __init__(self, rho_max, adaptive=False, alpha=0.0):
        self.rho_max = rho_max
        self.adaptive = adaptive
        self.alpha = alpha
        self.combines = bool(alpha)

    def scaling(self, weights):
        return weights if self.adaptive else super().scaling(weights)

    def radius(self, slope, budget, curvature=None):
        rho_max = tf.cast(self.rho_max, budget.dtype)
        return radius(slope, budget, rho_max, curvature)

    def descent(self, products):
        """`g_hat = h - alpha g`.

        `alpha` > 0 removes that share of the plain gradient and leaves the
        curvature signal (the decoupling of the paper).
        """
        return 1.0, -self.alpha


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
    s = _or_one(slope, tf.math.is_finite(slope) & (slope > 0))
    if curvature is None:
        rho = sigma / s
    else:
        k = or_zero(curvature, tf.math.is_finite(curvature))
        root = tf.sqrt(tf.maximum(s * s + 2 * k * sigma, 0))
        rho = 2 * sigma / (s + root)
    return usable_radius(tf.minimum(rho, rho_max), slope)


def usable_radius(rho, slope):
    """`rho`, or 0 where there is no direction to go: see `radius`."""
    usable = tf.math.is_finite(slope) & (slope > 0)
    usable &= tf.math.is_finite(rho / _or_one(slope, usable))
    return or_zero(rho, usable)


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


def running_mean(means, values, decay):
    """`decay m + (1 - decay) v`; the first values are the first mean.

    Args:
        means: List of tensors or `None`; zeros: no mean yet.
        values: List like `means`. If one is not finite, the means stay.
        decay: Float in [0, 1).

    Returns:
        A list like `means`.
    """
    values = [m if v is None else v for m, v in zip(means, values)]
    none = [None] * len(means)
    known = tf.math.is_finite(slope(values, none, tf.float32))
    begun = slope(means, none, tf.float32) > 0
    found = []
    for m, v in zip(means, values):
        if m is not None:
            change = or_zero(v - m, known)
            m += tf.where(begun, (1 - decay) * change, change)
        found.append(m)
    return found


def dot(vectors, others, dtype):
    """The inner product of two lists of tensors, summed in `dtype`."""
    products = [
        tf.reduce_sum(tf.cast(v, dtype) * tf.cast(o, dtype))
        for v, o in zip(vectors, others)
        if v is not None and o is not None
    ]
    return tf.add_n(products) if products else tf.zeros((), dtype)


def or_zero(value, condition):
    """`value` where the condition holds, 0 elsewhere, whatever `value` is."""
    return tf.where(condition, value, tf.zeros_like(value))


def _or_one(value, condition):
    return tf.where(condition, value, tf.ones_like(value))


def _sum_of_squares(gradient, scaling, dtype):
    # Cast first: the squares of float16 numbers overflow float16.
    scaled = tf.cast(gradient, dtype)
    if scaling is not None:
        scaled *= tf.cast(scaling, dtype)
    return 2 * tf.nn.l2_loss(scaled)
