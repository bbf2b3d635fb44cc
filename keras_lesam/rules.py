"""SAM and its relatives, and LE-SAM, as rules.

```
from keras_lesam import SAMModel, rules

model = SAMModel(net, rules.ASAM(rho=0.5, eta=0.01))
```

A rule says how long the perturbation is, and along what; the passes, and all
that Keras wants of a step, are the same for all. In what follows `g` is the
gradient of the loss at the weights `w`, and `h` the one at `w + eps`. The
optimizer is given `h` where nothing else is said.

| rule              | the perturbation                      | the update       |
|-------------------|---------------------------------------|------------------|
| `LossEquated`     | `eps = rho T^2 g / ||T g||`           | `h - alpha g`    |
| `SAM`             | `eps = rho g / ||g||`                 | `h`              |
| `ASAM`            | `eps = rho T^2 g / ||T g||`           | `h`              |
| `UnnormalizedSAM` | `eps = rho g`                         | `h`              |
| `GSAM`            | as SAM                                | `h - alpha g'`   |
| `FriendlySAM`     | `eps` along `g` less its running mean | `h`              |
| `WSAM`            | as SAM                                | of `g` and `h`   |
| `LookSAM`         | as SAM, in one step of several        | see there        |
| `StableSAM`       | as SAM                                | `h ||g|| / ||h||`|

A rule of your own is a subclass of `Rule`, or of one of these.

The norm is over all weights that are perturbed, as one vector, biases and the
weights of normalization layers included; several implementations of ASAM leave
those out of `T`.
"""

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_lesam import _checks
from keras_lesam import _rule
from keras_lesam import _vectors
from keras_lesam import ascents
from keras_lesam import budgets
from keras_lesam._gradients import Gradients
from keras_lesam._rule import Perturbation
from keras_lesam._rule import Rule
from keras_lesam._rule import State
from keras_lesam._rule import Weights
from keras_lesam._rule import combine
from keras_lesam._rule import usable_radius
from keras_lesam._sam_rules import SAM
from keras_lesam._sam_rules import StableSAM
from keras_lesam._vectors import Tensors

__all__ = [
    "ASAM",
    "GSAM",
    "SAM",
    "WSAM",
    "FriendlySAM",
    "Gradients",
    "LookSAM",
    "LossEquated",
    "Perturbation",
    "Rule",
    "StableSAM",
    "UnnormalizedSAM",
    "Weights",
    "combine",
    "usable_radius",
]

_register = keras.saving.register_keras_serializable(package="keras_lesam")

# A finite number of every float dtype that a radius has, so that a healthy
# step has no infinity in it.
_NO_CAP = tf.float32.max
# What examples/results/defaults.md bears out.
_DEFAULT_BUDGET = budgets.Relative(0.1, max_change=0.6)
# Those of the paper's budget, where only a part of it is given.
DEFAULT_SIGMA = 0.1
DEFAULT_WARMUP = 0.1
DEFAULT_ANNEAL = 0.2


@_register
class LossEquated(Rule):
    """LE-SAM: a perturbation along which the loss rises by the budget.

    `eps = rho T^2 g / ||T g||` with `rho = min(sigma / ||T g||, rho_max)`, or
    the root of the quadratic model where the curvature is known (Wang et al.
    2026). The budget `sigma` is in loss units.

    Example:

    >>> import keras, numpy as np
    >>> from keras_lesam import SharpnessAwareModel, budgets, rules
    >>> net = keras.Sequential([keras.layers.Dense(1)])
    >>> rule = rules.LossEquated(rho_max=1.0, adaptive=True)
    >>> model = SharpnessAwareModel(net, rule, budgets.Constant(0.1))
    >>> model.compile("sgd", "mse")
    >>> history = model.fit(np.ones((8, 2)), np.ones((8, 1)), verbose=0)

    Args:
        rho_max: Float > 0, the largest radius `rho` (weight-space distance),
            or `None` for no cap.
        adaptive: Bool. `T` is `|w|` (ASAM, Kwon et al. 2021) instead of 1.
        alpha: Float in [0, 1], the share of the plain gradient that the update
            leaves out: `g_hat = h - alpha g` (the decoupling of the paper).

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if one is out of range.

    References:
        Wang, Liu, Xie, Gao, "Loss-Equated Sharpness-Aware Minimization", ICML
        2026, arXiv 2605.10183.
    """

    def __init__(
        self,
        rho_max: float | None = None,
        adaptive: bool = False,
        alpha: float = 0.0,
    ) -> None:
        if rho_max is not None:
            rho_max = _checks.number("rho_max", rho_max, 0, above=True)
        self.rho_max = rho_max
        self.adaptive = _checks.boolean("adaptive", adaptive)
        self.alpha = _checks.number("alpha", alpha, 0, 1)

    def numbers(self) -> dict[str, float]:
        return {"rho_max": _NO_CAP if self.rho_max is None else self.rho_max}

    def scaling(self, weights: Tensors) -> Tensors:
        """Return `T`: the weights where it is adaptive."""
        return weights if self.adaptive else super().scaling(weights)

    def radius(
        self, norm: tf.Tensor, budget: tf.Tensor, curvature: Any = None
    ) -> tf.Tensor:
        """Return the radius over which the loss rises by the budget."""
        rho_max = _NO_CAP if self.rho_max is None else self.rho_max
        if tf.is_tensor(rho_max):
            rho_max = tf.cast(rho_max, budget.dtype)
        return _rule.loss_equated_radius(norm, budget, rho_max, curvature)

    def update(
        self, plain: Gradients, perturbed: Gradients, state: State
    ) -> tuple[Sequence[Any], State]:
        """Return `h - alpha g`."""
        if not self.alpha:
            return perturbed, state
        return combine(plain, perturbed, 1.0, -self.alpha), state

    @property
    def uses_plain_gradient(self) -> bool:
        return bool(self.alpha)

    @property
    def budget_is_rise(self) -> bool:
        return True

    def default_budget(self) -> budgets.Budget:
        """Return that of `LESAMModel`: a share of the loss."""
        return _DEFAULT_BUDGET


@_register
class ASAM(SAM):
    """Adaptive SAM: a perturbation of fixed length in units of the weights.

    `eps = rho T^2 g / ||T g||` with `T = |w| + eta` element by element (Kwon
    et al. 2021, equation 6): scaling the weights of a layer, and undoing it
    in the next, does not change what is minimised, if `eta` is 0.

    Args:
        rho: As in `SAM`; typically ten times as large.
        eta: Float >= 0, so that weights near 0 can move.

    References:
        Kwon, Kim, Park, Choi, "ASAM: Adaptive Sharpness-Aware Minimization
        for Scale-Invariant Learning of Deep Neural Networks", ICML 2021,
        arXiv 2102.11600.
    """

    def __init__(self, rho: Any = 0.5, eta: float = 0.01) -> None:
        super().__init__(rho)
        self.eta = _checks.number("eta", eta, 0)

    def scaling(self, weights: Tensors) -> Tensors:
        """Return `|w| + eta`."""
        return [tf.abs(_vectors.wide(w)) + self.eta for w in weights]


@_register
class UnnormalizedSAM(SAM):
    """SAM without the norm: `eps = rho g`, longer where it is steeper.

    What it minimises is `L + rho/2 ||g||^2` to first order, where SAM's is
    `L + rho ||g||` and LE-SAM's `L + sigma log ||g||`: the three differ in
    what normalization does, and in nothing else.

    Args:
        rho: As in `SAM`, but squared weight-space distance per loss unit. The
            logged `rho` is the distance, `rho ||g||`.

    References:
        Andriushchenko, Flammarion, "Towards Understanding Sharpness-Aware
        Minimization", ICML 2022, arXiv 2206.06232, section 3.
    """

    def radius(
        self, norm: tf.Tensor, budget: tf.Tensor, curvature: Any = None
    ) -> tf.Tensor:
        """Return `rho ||g||`."""
        del curvature
        return usable_radius(budget * norm, norm)


@_register
class GSAM(SAM):
    """Surrogate Gap Guided SAM: also narrows the gap `L(w + eps) - L(w)`.

    `g_hat = h - alpha g'`, where `g' = g - (g.h / ||h||^2) h` is the component
    of the plain gradient orthogonal to `h`: going up along it raises the loss
    at `w`, and leaves that at `w + eps` alone (Zhuang et al. 2022, algorithm
    1). Their `rho` follows the learning rate: give a schedule.

    Args:
        rho: As in `SAM`.
        alpha: Float >= 0, the weight of the gap. 0 is SAM.

    References:
        Zhuang, Gong, Yuan, Cui, Adam, Dvornek, Tatikonda, Duncan, Liu,
        "Surrogate Gap Minimization Improves Sharpness-Aware Training", ICLR
        2022, arXiv 2203.08065.
    """

    def __init__(self, rho: Any = 0.05, alpha: float = 0.4) -> None:
        super().__init__(rho)
        self.alpha = _checks.number("alpha", alpha, 0)

    def update(
        self, plain: Gradients, perturbed: Gradients, state: State
    ) -> tuple[Sequence[Any], State]:
        """Return `h - alpha g'`."""
        gap = plain.orthogonal_to(perturbed)
        return combine(gap, perturbed, 1.0, -self.alpha), state


@_register
class FriendlySAM(SAM):
    """Friendly SAM: ascends along what a batch's gradient has of its own.

    `eps = rho d / ||d||` with `d = g - share m`, where `m` estimates the
    gradient of the whole data: `m <- decay m + (1 - decay) g`, from the raw
    gradients, and the first of them at first. In the first step `d = g`. (Li
    et al. 2024, equation 11, in the order of their code: `d` is made before
    `m` is renewed. With share 1 the other order is the same but for a factor,
    which the norm takes away.)

    `m` is a weight of the model, saved with it, one for all replicas; to
    renew it, gradients are summed over the replicas once more. The logged
    `gradient_norm` is `||d||`.

    Args:
        rho: As in `SAM`.
        decay: Float in [0, 1), of the running mean.
        share: Float in [0, 1], how much of the mean is taken out. 0 is SAM.

    References:
        Li, Zhou, He, Cheng, Huang, "Friendly Sharpness-Aware Minimization",
        CVPR 2024, arXiv 2403.12350.
    """

    def __init__(
        self, rho: Any = 0.05, decay: float = 0.9, share: float = 1.0
    ) -> None:
        super().__init__(rho)
        self.decay = _checks.number("decay", decay, 0, 1, below=True)
        self.share = _checks.number("share", share, 0, 1)

    def init_state(self, weights: Weights) -> State:
        """Return the mean `m`, zeros for weights that are perturbed."""
        return {
            "mean": [
                None if w is None else tf.zeros_like(w)
                for w in weights.perturbed
            ]
        }

    def perturb(
        self,
        gradients: Tensors,
        weights: Tensors,
        budget: tf.Tensor,
        state: State,
        curvature: Any = None,
    ) -> Perturbation:
        """Return that of SAM along `d = g - share m`."""
        directions = [
            None
            if g is None
            else _vectors.wide(g) - _vectors.times(self.share, m)
            for g, m in zip(gradients, state["mean"])
        ]
        return super().perturb(directions, weights, budget, state, curvature)

    def update(
        self, plain: Gradients, perturbed: Gradients, state: State
    ) -> tuple[Sequence[Any], State]:
        """Return `h`, and `m <- decay m + (1 - decay) g`."""
        mean = _vectors.running_mean(state["mean"], [*plain], self.decay)
        return perturbed, {"mean": mean}


@_register
class WSAM(SAM):
    """Weighted SAM: the sharpness as a regularizer of a weight of its own.

    The loss is `L(w) + gamma / (1 - gamma) (L(w + eps) - L(w))`, so that
    `g_hat = a h + (1 - a) g` with `a = gamma / (1 - gamma)` (Yue et al. 2023,
    equation 5). This is their coupled form, in which the optimizer sees the
    sum; in the other one the sharpness's part goes past the optimizer, which
    a wrapper that writes no weights of its own does not do.

    Args:
        rho: As in `SAM`.
        gamma: Float in [0, 1). 0 is plain training, 0.5 SAM; above, sharpness
            counts for more than in SAM.

    References:
        Yue, Zhang, Wang, Ye, Xu, "Sharpness-Aware Minimization Revisited:
        Weighted Sharpness as a Regularization Term", KDD 2023, arXiv
        2305.15817.
    """

    def __init__(self, rho: Any = 0.05, gamma: float = 0.9) -> None:
        super().__init__(rho)
        self.gamma = _checks.number("gamma", gamma, 0, 1, below=True)

    def update(
        self, plain: Gradients, perturbed: Gradients, state: State
    ) -> tuple[Sequence[Any], State]:
        """Return `a h + (1 - a) g`."""
        a = self.gamma / (1 - self.gamma)
        return combine(plain, perturbed, a, 1 - a), state


@_register
class LookSAM(SAM):
    """LookSAM: an ascent in one step of `every`, reused in the others.

    A step with an ascent is a step of SAM, and its state is `v = h - (g.h /
    ||g||^2) g`, the component of `h` orthogonal to the gradient, which changes
    slowly. The steps between have one pass, and `g_hat = g + alpha ||g|| /
    ||v|| v` (Liu et al. 2022, algorithm 1).

    `v` is a weight of the model, saved with it, one for all replicas; to
    renew it, gradients are summed over the replicas once more.

    Example, what kept most for its cost in this library's benchmark:

    >>> import keras
    >>> from keras_lesam import SAMModel, rules
    >>> net = keras.Sequential([keras.layers.Dense(1)])
    >>> rule = rules.LookSAM(rho=0.2, alpha=0.5, every=4)
    >>> model = SAMModel(net, rule, warmup=0.1, anneal=0.2)

    Args:
        rho: As in `SAM`.
        alpha: Float >= 0, the share of `v` in the steps between.
        every: Integer > 0, the steps from one ascent to the next. A step costs
            `1 + 1 / every` plain ones, and passes over the weights that count
            where a step takes a few milliseconds only.

    References:
        Liu, Mai, Chen, Hsieh, You, "Towards Efficient and Scalable
        Sharpness-Aware Minimization", CVPR 2022, arXiv 2203.02714.
    """

    def __init__(
        self, rho: Any = 0.05, alpha: float = 0.7, every: int = 5
    ) -> None:
        super().__init__(rho)
        self.alpha = _checks.number("alpha", alpha, 0)
        self.every = _checks.integer("every", every, 1)

    def init_state(self, weights: Weights) -> State:
        """Return `v`, zeros for all weights."""
        return {
            "orthogonal": [
                None if w is None else tf.zeros_like(w) for w in weights
            ]
        }

    def update(
        self, plain: Gradients, perturbed: Gradients, state: State
    ) -> tuple[Sequence[Any], State]:
        """Return `h` and a new `v`; between ascents `g + c v`, and `v`."""
        v = state["orthogonal"]
        # What is summed below is summed where it is needed, in a branch.
        plain.reduce_with(perturbed)

        def ascended() -> tuple[list[Any], list[Any]]:
            return [*perturbed], _orthogonal(plain, perturbed, v)

        def between() -> tuple[list[Any], list[Any]]:
            return _reused(plain, v, self.alpha), v

        gradients, v = tf.cond(perturbed.radius > 0, ascended, between)
        return gradients, {"orthogonal": v}

    def default_ascent(self, ascent: ascents.Ascent | None) -> ascents.Ascent:
        """Return the ascent in one step of `every`."""
        if ascent is None or ascent.period == 1:
            return ascents.Every(self.every, ascent)
        if ascent.period == self.every:
            return ascent
        raise ValueError(
            "The rule has an `every` of its own: leave `ascent_every` alone. "
            f"Received: {ascent.keywords()}, {self!r}"
        )


def _orthogonal(
    plain: Gradients, perturbed: Gradients, old: Tensors
) -> Tensors:
    """Return `h - (g.h / ||g||^2) g`; what it was if `h` is not finite."""
    found = [
        None if v is None else tf.zeros_like(v) if h is None else h
        for h, v in zip(perturbed.orthogonal_to(plain), old)
    ]
    is_finite = tf.math.is_finite(perturbed.norm())
    return _vectors.select(is_finite, found, old)


def _reused(plain: Gradients, v: Tensors, alpha: float) -> list[Any]:
    """Return `g + alpha ||g|| / ||v|| v`.

    `g` where `v` is 0 (before the first ascent) or not finite, and where the
    sum is not.
    """
    size = plain.norm()
    length = _vectors.norm(v, size.dtype)
    size = alpha * _vectors.or_zero(size, _vectors.is_positive(length))
    changed = [
        g
        if g is None or v is None
        else tf.cast(
            _vectors.wide(g) + _vectors.along(v, size, length), g.dtype
        )
        for g, v in zip(plain, v)
    ]
    return _vectors.select(_vectors.are_finite(changed), changed, [*plain])
