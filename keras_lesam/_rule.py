"""The contract of an update rule, and what rules are made of.

Pure functions of tensors; no Keras model and no strategy in sight. Lists of
tensors run parallel to the trainable variables, with `None` where a variable
takes no part: it has no gradient, or its scaling `T` is zero.

In the notation of Wang et al. (ICML 2026, arXiv 2605.10183):

    g       gradient of the loss
    h       gradient at the perturbed weights w + eps
    T       element-wise scaling: 1, or |w| when adaptive
    d       ascent direction, T^2 g / ||T g||
    s       slope along it, g.d = ||T g||: the ascent norm
    k       curvature along it, d.H d
    sigma   loss budget
    rho     radius: the length of the perturbation eps = rho d
"""

import math
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import tensorflow as tf

from keras_lesam import _passes
from keras_lesam import _results
from keras_lesam import _vectors
from keras_lesam._gradients import Gradients
from keras_lesam._strategy import Strategy
from keras_lesam._vectors import Tensors
from keras_lesam.budgets import Budget

State = dict[str, Any]


class Perturbation(NamedTuple):
    """The perturbation of one step and the numbers it came from.

    Attributes:
        eps: List of tensors like the weights (weight-space distance), `None`
            for a weight that stays where it is.
        radius: Scalar tensor, the length `rho` along the ascent direction; 0
            where there is no perturbation.
        norm: Scalar tensor, the ascent norm `||T g||` (loss units per
            weight-space distance); 0 or not finite where there is no direction
            to go.
    """

    eps: Tensors
    radius: tf.Tensor
    norm: tf.Tensor


class Weights(list[Any]):
    """The values of the trainable variables, for `Rule.init_state`.

    A list of tensors, `None` for what is no weight (the scales of float8
    layers).

    Attributes:
        perturbed: The same list, with `None` for weights that are never
            perturbed (`perturb=` of the model).
    """

    def __init__(self, values: Sequence[Any], perturbed: Sequence[Any]) -> None:
        super().__init__(values)
        self.perturbed = [*perturbed]

    @classmethod
    def of(
        cls, variables: Sequence[Any], perturb_mask: list[bool]
    ) -> "Weights":
        """Read the trainable variables of a model."""
        values = [
            value if _passes.is_weight(variable) else None
            for variable, value in zip(variables, _passes.read(variables))
        ]
        return cls(
            values,
            [v if moves else None for v, moves in zip(values, perturb_mask)],
        )


class Rule(Strategy):
    """A rule: from gradient, weights and budget to perturbation and update.

    What sets one rule apart from another is mostly its `radius`. Some scale
    the direction (`scaling`), some give the optimizer something else than the
    gradient at the perturbed weights (`update`), some need to know what
    earlier steps found (`init_state`).

    A rule is immutable, and its methods are pure functions of tensors. State
    is passed to them and returned: a dict from names to tensors, or to lists of
    tensors parallel to the weights. The model owns it, and saves it by name.

    All gradients are those of the loss that `fit` minimises, without a loss
    scale.

    Example, a rule whose radius follows the size of the weights:

    >>> import keras, numpy as np, tensorflow as tf
    >>> from keras_lesam import SharpnessAwareModel, budgets, rules
    >>> @keras.saving.register_keras_serializable("mine")
    ... class Relative(rules.Rule):
    ...     def perturb(self, gradients, weights, budget, state, k=None):
    ...         budget *= tf.linalg.global_norm(weights)
    ...         return super().perturb(gradients, weights, budget, state, k)
    ...     def radius(self, norm, budget, curvature=None):
    ...         return rules.usable_radius(budget, norm)
    >>> net = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    >>> model = SharpnessAwareModel(net, Relative(), budgets.Constant(0.01))
    >>> model.compile("sgd", "mse")
    >>> history = model.fit(np.ones((8, 2)), np.ones((8, 1)), verbose=0)
    """

    def init_state(self, weights: Weights) -> State:
        """Return the state before the first step; `{}` for none.

        Args:
            weights: The `Weights` of the model.
        """
        del weights
        return {}

    def scaling(self, weights: Tensors) -> Tensors:
        """Return `T` for each weight, up to its sign; `None` for 1."""
        return [None] * len(weights)

    def radius(
        self, norm: tf.Tensor, budget: tf.Tensor, curvature: Any = None
    ) -> tf.Tensor:
        """Return the radius `rho`: not negative, and finite.

        Args:
            norm: Scalar tensor, the ascent norm, which may be 0 or not finite.
                There, the radius must be 0: see `usable_radius`.
            budget: Scalar tensor, what the step may spend.
            curvature: Scalar tensor `k`, or `None` where it is not known.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must define `radius` or `perturb`."
        )

    def perturb(
        self,
        gradients: Tensors,
        weights: Tensors,
        budget: tf.Tensor,
        state: State,
        curvature: Any = None,
    ) -> Perturbation:
        """Return `eps = rho d` with `d = T^2 g / ||T g||`, rho from `radius`.

        Args:
            gradients: List of dense tensors, `None` for weights that are not
                perturbed.
            weights: List of tensors.
            budget: Scalar tensor, what the step may spend: loss units for
                LE-SAM, weight-space distance for SAM. Its dtype is that of all
                scalars.
            state: What `update` returned in the step before.
            curvature: `k = d.(H d)` of the loss: a scalar tensor; or a
                callable that gives it for `d`, a list like `gradients`; or
                `None` for the first order.

        Returns:
            A `Perturbation`.
        """
        del state
        scaling = _results.parallel(
            self, "scaling", "`T`", self.scaling(weights), len(weights)
        )

        def radius(*args: Any) -> tf.Tensor:
            found = self.radius(*args)
            return _results.scalar(self, "radius", found, budget.dtype)

        return perturbation_along(
            gradients, [*scaling], budget, radius, curvature
        )

    def update(
        self, plain: Gradients, perturbed: Gradients, state: State
    ) -> tuple[Sequence[Any], State]:
        """Return what the optimizer is given, and the state of the next step.

        Called once a step, outside of any branch. Where there was no ascent,
        `perturbed.radius` is 0 and `perturbed` equals `plain`. In a step
        between two ascents (`ascents.Every`) what to do is up to the rule; in
        others (no budget, no slope, no loss at the end of the ascent) the
        optimizer is given `plain` in any case.

        Args:
            plain: `Gradients` at the weights, `g`.
            perturbed: `Gradients` at the perturbed weights, `h`.
            state: What `update` returned in the step before.

        Returns:
            `(gradients, state)`: a list of dense tensors like `plain`, or
            `perturbed` itself, whose sparse gradients then stay sparse; and a
            state like the one received.
        """
        del plain
        return perturbed, state

    def limit(
        self,
        perturbation: Perturbation,
        gradients: Tensors | None,
        limit: tf.Tensor | None,
    ) -> Perturbation:
        """Return a perturbation along which the loss rises no further.

        To first order: it is made shorter, in the same direction.

        Args:
            perturbation: What `perturb` returned.
            gradients: Those it was given; `None` where they are not those at
                the weights, and the ascent norm has to do.
            limit: Scalar tensor in loss units; `None` for no limit. A budget
                that is a rise is within it already.
        """
        if limit is None or self.budget_is_rise:
            return perturbation
        rise = perturbation.norm * perturbation.radius
        if gradients is not None and not self.goes_along_gradients:
            rise = _vectors.dot(gradients, perturbation.eps, limit.dtype)
        is_over = rise > limit
        factor = tf.where(is_over, limit / _vectors.or_one(rise, is_over), 1)
        return perturbation._replace(
            eps=[
                None if e is None else _vectors.times(factor, e)
                for e in perturbation.eps
            ],
            radius=factor * perturbation.radius,
        )

    def default_budget(self) -> Budget:
        """Return the budget of a model that was given none.

        Raises:
            ValueError: by default; what a budget means is up to the rule.
        """
        raise ValueError(
            f"{type(self).__name__} has no budget of its own: pass `budget`, "
            "such as budgets.Constant(0.05). Received: budget=None"
        )

    def default_ascent(self, ascent: Any) -> Any:
        """Return the ascent to use where the user's choice is `ascent`."""
        return ascent

    @property
    def uses_plain_gradient(self) -> bool:
        """Whether `update` looks at the gradient at the weights.

        Then the rule is refused where a step makes no pass there. True for
        every rule that defines `update`, if it doesn't say otherwise.
        """
        return type(self).update is not Rule.update

    @property
    def goes_along_gradients(self) -> bool:
        """Whether the perturbation goes along the gradients it is made of.

        Then its `norm` is theirs. False for every rule that defines `perturb`,
        if it doesn't say otherwise.
        """
        return type(self).perturb is Rule.perturb

    @property
    def budget_is_rise(self) -> bool:
        """Whether the budget is a rise of the loss; if not, it is a radius."""
        return False

    @property
    def uses_curvature(self) -> bool:
        """Whether the radius goes by `curvature`; if not, none is taken."""
        return True


def combine(
    plain: Sequence[Any], perturbed: Gradients, a: Any, b: Any
) -> list[Any]:
    """Return `a h + b g` where there was an ascent, and `h` elsewhere.

    `h` too where the sum is beyond the range of its dtype.

    Args:
        plain: `Gradients` at the weights, `g`, or a list like them.
        perturbed: `Gradients` at the perturbed weights, `h`.
        a: Float or scalar tensor.
        b: Float or scalar tensor.
    """
    # Of the sum that is left where two large ones nearly cancel, the parts may
    # overflow: they are a power of two smaller.
    numbers = [abs(c) for c in (a, b) if isinstance(c, (int, float))]
    unit = 2.0 ** math.ceil(math.log2(max(1.0, *numbers)))

    def combined(g: Any, h: Any) -> Any:
        if g is None or h is None:
            return h
        change = _vectors.times(a / unit, h) + _vectors.times(b / unit, g)
        return tf.cast(change if unit == 1 else unit * change, h.dtype)

    stay = [*perturbed]
    changed = [combined(g, h) for g, h in zip(plain, stay)]
    is_usable = (perturbed.radius > 0) & _vectors.are_finite(changed)
    return _vectors.select(is_usable, changed, stay)


def perturbation_along(
    gradients: Tensors,
    scaling: Tensors,
    budget: tf.Tensor,
    radius: Callable[..., tf.Tensor],
    curvature: Any = None,
) -> Perturbation:
    """Return `eps = rho d` with `d = T^2 g / ||T g||`.

    Args:
        gradients: List of dense tensors or `None`.
        scaling: List like it of `T` up to its sign, `None` for 1.
        budget: Scalar tensor.
        radius: Function like `Rule.radius`.
        curvature: As in `Rule.perturb`.
    """
    norm = _vectors.norm(gradients, budget.dtype, scaling)
    if not callable(curvature):
        # Without d, which need not be in memory.
        rho = radius(norm, budget, curvature)
        eps = _displacements(gradients, scaling, rho, norm)
        return Perturbation(eps, rho, norm)
    has_direction = tf.cast(_vectors.is_positive(norm), norm.dtype)
    direction = _displacements(gradients, scaling, has_direction, norm)
    rho = radius(norm, budget, curvature(direction))
    eps = [
        None if d is None else tf.math.multiply_no_nan(d, tf.cast(rho, d.dtype))
        for d in direction
    ]
    return Perturbation(eps, rho, norm)


def loss_equated_radius(
    norm: tf.Tensor, sigma: tf.Tensor, rho_max: tf.Tensor, curvature: Any = None
) -> tf.Tensor:
    """Return the stable root of `s rho + k rho^2 / 2 = sigma`, capped.

    `rho = min(2 sigma / (s + sqrt(max(s^2 + 2 k sigma, 0))), rho_max)`, which
    is the paper's `sigma / s` where `k = 0`. Where the loss curves down so
    much that it cannot rise by `sigma` (a negative root) it is `2 sigma / s`.
    It is 0 where the slope is 0 or not finite, or so small that the step
    would not be a number. A curvature that is not finite counts as 0.

    Args:
        norm: Scalar tensor, the slope `s`.
        sigma: Scalar tensor, the budget.
        rho_max: Scalar tensor, the cap.
        curvature: Scalar tensor `k`, or `None` for the first order.

    Returns:
        Scalar tensor `rho`, not negative, always finite.
    """
    slope = _vectors.or_one(norm, _vectors.is_positive(norm))
    if curvature is not None:
        # The mean of s and the root.
        slope = slope / 2 + _root(slope, sigma, curvature) / 2
    # What is longer than the longest is no number either, and not infinite.
    longest = sigma.dtype.max / 8
    rho = sigma / tf.maximum(slope, sigma / longest)
    return usable_radius(tf.minimum(rho, rho_max), norm)


def _root(slope: tf.Tensor, sigma: tf.Tensor, curvature: Any) -> tf.Tensor:
    """Return `sqrt(max(s^2 + 2 k sigma, 0))`, without its squares."""
    k = _vectors.or_zero(curvature, tf.math.is_finite(curvature))
    other = tf.sqrt(tf.abs(k)) * tf.sqrt(2 * sigma)
    largest = tf.maximum(slope, other)
    up = largest * tf.sqrt(
        tf.square(slope / largest) + tf.square(other / largest)
    )
    difference = tf.maximum(slope - other, 0)
    down = tf.sqrt(difference) * tf.sqrt(slope / 2 + other / 2) * 2**0.5
    return tf.where(k < 0, down, up)


def usable_radius(radius: tf.Tensor, norm: tf.Tensor) -> tf.Tensor:
    """Return a radius, or 0 where there is no direction to go.

    That is where the ascent norm is 0 or not finite, or so small that the
    perturbation would not be a number.

    Args:
        radius: Scalar tensor.
        norm: Scalar tensor, the ascent norm.
    """
    # Nothing is added to what is near the largest number.
    usable = _vectors.is_positive(norm) & (radius < radius.dtype.max / 16)
    return _vectors.or_zero(radius, usable)


def _displacements(
    gradients: Tensors, scaling: Tensors, radius: tf.Tensor, norm: tf.Tensor
) -> Tensors:
    """Return `rho T^2 g / ||T g||` for all weights; 0 where rho is."""
    return [
        None
        if g is None
        else tf.cast(_vectors.along(g, radius, norm, t), g.dtype)
        for g, t in zip(gradients, scaling)
    ]
