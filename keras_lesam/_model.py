"""`LESAMModel`: any Keras model, trained by Loss-Equated SAM."""

from collections.abc import Callable
from typing import Any

import keras

from keras_lesam import _amounts
from keras_lesam import estimators
from keras_lesam import rules
from keras_lesam._facade import AscentArguments
from keras_lesam._plan import DEFAULT_BUDGET
from keras_lesam._plan import budget_and_ascent
from keras_lesam._wrapper import SharpnessAwareModel

DEFAULT_RHO_MAX = 1.0


@keras.saving.register_keras_serializable(package="keras_lesam")
class LESAMModel(AscentArguments, SharpnessAwareModel):
    """Trains a Keras model by Loss-Equated Sharpness-Aware Minimization.

    Wrap a model, `compile` and `fit` as ever; nothing has to be set.

    Example:

    >>> import keras, numpy as np
    >>> from keras_lesam import LESAMModel
    >>> net = keras.Sequential([keras.layers.Dense(10, activation="softmax")])
    >>> model = LESAMModel(net)
    >>> model.compile("sgd", "sparse_categorical_crossentropy")
    >>> x, y = np.random.rand(64, 8), np.random.randint(10, size=64)
    >>> history = model.fit(x, y, epochs=2, verbose=0)
    >>> sorted(history.history)
    ['gradient_norm', 'loss', 'rho', 'sharpness', 'sigma']
    >>> model.model is net  # a plain Keras model, with the trained weights
    True

    By default the budget is a share of the loss, as long as the ascent changes
    the gradient by no more than a share of itself, `budgets.Relative(0.1,
    max_change=0.6)`: no unit, no schedule, no length of the training. Nets that
    learn wrong labels by heart gain by `share=0.7`. `sigma=0.1` is the paper's
    budget, in loss units. The arguments, of which few need more than four:

    ```
    the model    model, sigma (the budget, by the paper), rho_max
    budget       share, max_change; warmup, anneal, guard, total_steps: of sigma
    ascent       ascent_from, ascent_fraction, ascent_every, num_batch_splits
    scope        perturb, perturbation_scope
    curvature    curvature, hvp_method
    update       adaptive, alpha
    ```

    Each step looks at the batch twice: once at the weights `w`, to find the
    direction in which the loss rises, and once at `w + eps`, so far along it
    that the loss has risen by the budget `sigma`. The optimizer then applies
    the gradient found there to `w`. SAM (Foret et al. 2021) fixes the length of
    `eps` instead; how much the loss rises over it then depends on the gradient.

    ```
    s       = ||T g||                      ascent norm, logged as gradient_norm
    eps     = rho T^2 g / s                rho = min(sigma / s, rho_max)
    g_hat   = grad L(w + eps) - alpha g    what the optimizer applies
    ```

    `L` is the loss that `fit` minimises: data loss, `add_loss` and
    regularizers, before any loss scaling. Random layers draw the same numbers
    in both passes; batch normalization statistics, seeds and metrics advance
    once, from the first. The weights themselves are never moved to `w + eps`.
    Where the budget or `s` is 0, the step is a step of plain `fit`, at the
    cost of one.

    The logs of `fit` (never those of `evaluate`) have, as means over the
    steps of an epoch: `sigma`, the budget (loss units); `gradient_norm`, the
    norm `s` of the ascent direction, which is that of the gradient of the
    batch if it is neither adaptive nor by `ascent_from` (loss units per
    weight-space distance); `rho` (weight-space distance); and `sharpness`, the
    rise `L(w + eps) - L(w)` that was reached (loss units). With `sigma=0`
    nothing looks at the gradients, and all four are 0.

    Args:
        model: A `keras.Model`: functional, sequential or subclassed, built or
            not. Its own `compute_loss` and `compute_metrics` are honoured;
            a `train_step` of its own is refused.
        sigma: Float >= 0, the paper's loss budget, in loss units (0.1 there); a
            `keras.optimizers.schedules.LearningRateSchedule` from
            `optimizer.iterations` to it; or one of `keras_lesam.budgets`. By
            default a relative budget, with a share of 0.1. A number may be
            assigned to later, and does not retrace: `model.sigma = 0.2`.
        rho_max: Float > 0, the largest `rho` (weight-space distance), or
            `None` for no cap. May be assigned to later.
        share: Float >= 0, of `budgets.Relative(share, max_change=0.6)`; without
            the limit for `ascent_from` and `ascent_fraction`, which don't make
            two passes over the same rows. May be assigned to later.
        warmup: Float in [0, 1], the share of the training over which the
            budget rises linearly from 0. Defaults to 0.1, or to 0 if `sigma`
            is a schedule or a budget, which say it all. With `warmup`,
            `anneal`, `guard` or `max_change` alone, `sigma` is 0.1.
        anneal: Float in [0, 1], the share of the training over which the
            budget falls to 0 on a cosine, at its end. Defaults to 0.2, or to
            0 if `sigma` is a schedule or a budget. Together with `warmup` at
            most 1.
        guard: Float > 0, or `None`. The budget of a step is at most this share
            of what the model has learnt: 0.5, say, for nets that die early.
        max_change: Float > 0, or `None`: 0.6 for `share`, none for `sigma`. By
            how much the ascent may change the gradient, as a share of it.
        total_steps: Integer > 0, the steps of the training that `warmup` and
            `anneal` are shares of, counted by `optimizer.iterations`, over
            several calls of `fit` or `train_on_batch`. By default it is what
            each `fit` is about to do: steps of an epoch times `epochs`. If
            you call `fit` in a loop, pass it: each call would warm up and
            anneal anew.
        ascent_from: Which gradient finds `eps`: that of the `"batch"` itself,
            in a pass of its own; or, in steps of one pass, which cost what
            plain training does, that of the `"previous"` step (AsyncSAM, Xie
            et al. 2025) or the mean of those before, `"momentum"` (MSAM,
            Becker et al. 2024), of which each step forgets a tenth. The loss
            and metrics logged are then those at `w + eps`, and batch
            normalization statistics are of there; sharpness is not logged;
            `curvature` must be `"none"` and `alpha` 0. Its state is one weight
            more for each that is perturbed, saved with the model.
        ascent_fraction: Float in (0, 1], the fraction of the rows of a batch
            (or part of it) that finds `eps`; the step then costs 1 + fraction.
            The loss and metrics logged are those of these rows; sharpness is
            not logged.
        ascent_every: Integer > 0. Only one step in so many has an ascent,
            those where it divides `optimizer.iterations`; the others are plain
            steps of one pass. The logs are means over both.
        num_batch_splits: Integer > 0, m-sharpness (Foret et al. 2021): each
            batch in so many parts, each with its own `eps`; the update is the
            mean of their `g_hat`. State such as batch normalization
            statistics advances once a part.
        perturb: Callable from a `keras.Variable` to bool: which weights are
            perturbed (the others have `T` = 0). `None`: all. To save the
            model, register it with `keras.saving`.
        perturbation_scope: Under `tf.distribute`, `"replica"`: each replica
            takes the perturbation of its own part of the batch, as with
            `num_batch_splits`, and nothing more is communicated than in plain
            training; or `"global"`: all take that of one device on the whole
            batch, for which the gradients of the first pass are summed over
            the replicas.
        curvature: How `k`, the curvature along the ascent direction, is taken
            into account, for a budget met to second order: `"none"`, the
            paper's first order; `"hvp"`, exactly, by a Hessian-vector product
            of each batch; `"secant"`, at no extra pass, by a running mean of
            what the steps before have shown (`ascent_fraction` must be 1).
        hvp_method: How `"hvp"` differentiates twice:
            `"reverse_over_reverse"`, which `"auto"` is, goes everywhere and
            makes no forward pass of its own; or `"forward_over_reverse"`,
            which has no rule for the loops of recurrent layers.
        adaptive: Bool. `T` is `|w|` (ASAM, Kwon et al. 2021) instead of 1.
        alpha: Float in [0, 1], the share of the plain gradient left out of
            the update. 0 is the paper's default.
        name: Name of the model.

    Attributes:
        model: The wrapped model itself, never a copy: with the trained
            weights, and nothing to undo.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if one is out of range, or `model` has training logic that
            cannot be honoured.

    References:
        Wang, Liu, Xie, Gao, "Loss-Equated Sharpness-Aware Minimization", ICML
        2026, arXiv 2605.10183.
    """

    def __init__(
        self,
        model: keras.Model,
        sigma: Any = DEFAULT_BUDGET,
        rho_max: float | None = DEFAULT_RHO_MAX,
        *,
        share: float | None = None,
        warmup: float | None = None,
        anneal: float | None = None,
        guard: float | None = None,
        max_change: float | None = None,
        total_steps: int | None = None,
        curvature: str = "none",
        hvp_method: str = "auto",
        adaptive: bool = False,
        alpha: float = 0.0,
        num_batch_splits: int = 1,
        ascent_from: str = "batch",
        ascent_fraction: float = 1.0,
        ascent_every: int = 1,
        perturbation_scope: str = "replica",
        perturb: Callable[[Any], bool] | None = None,
        name: str | None = None,
    ) -> None:
        ascent = ascent_from, ascent_fraction, ascent_every
        budget = sigma, share, warmup, anneal, guard, max_change
        super().__init__(
            model,
            rules.LossEquated(rho_max, adaptive, alpha),
            *budget_and_ascent(budget, ascent),
            estimators.from_argument(curvature, hvp_method),
            total_steps=total_steps,
            num_batch_splits=num_batch_splits,
            perturbation_scope=perturbation_scope,
            perturb=perturb,
            name=name,
        )
        self._keep_ascent(*ascent)
        self._curvature, self._hvp_method = curvature, hvp_method

    def get_config(self) -> dict[str, Any]:
        """Return all arguments of the constructor, serialized."""
        return {
            **self._facade_config(),
            "sigma": keras.saving.serialize_keras_object(self.sigma),
            "share": None,  # Of a budget, which is `sigma` then.
            "rho_max": self.rho_max,
            "curvature": self.curvature,
            "hvp_method": self.hvp_method,
            "adaptive": self.adaptive,
            "alpha": self.alpha,
        }

    @property
    def sigma(self) -> Any:
        amount = _amounts.amount_of(self.budget)
        return self.budget if amount is None else amount

    @sigma.setter
    def sigma(self, value: float) -> None:
        self._set_amount("sigma", value)

    @property
    def share(self) -> float | None:
        """That of a `budgets.Relative`; `None` for another budget."""
        return getattr(self.budget, "share", None)

    @share.setter
    def share(self, value: float) -> None:
        self._set_amount("share", value, of="share")

    @property
    def rho_max(self) -> float | None:
        return self.rule.rho_max

    @rho_max.setter
    def rho_max(self, value: float | None) -> None:
        self._set(rule=self.rule.replace(rho_max=value))

    @property
    def rule(self) -> rules.LossEquated:
        rule = super().rule
        assert isinstance(rule, rules.LossEquated)
        return rule

    @property
    def curvature(self) -> str:
        return self._curvature

    @property
    def hvp_method(self) -> str:
        return self._hvp_method

    @property
    def adaptive(self) -> bool:
        return self.rule.adaptive

    @property
    def alpha(self) -> float:
        return self.rule.alpha
