"""Ascents: which gradient finds the perturbation, on which rows, and when.

```
from keras_lesam import SharpnessAwareModel, ascents, rules

ascent = ascents.Every(4, ascents.Fraction(0.5))
model = SharpnessAwareModel(net, rules.SAM(0.05), ascent=ascent)
```

| ascent      | the perturbation comes from           | passes       |
|-------------|---------------------------------------|--------------|
| `FullBatch` | the gradient of the batch             | 2            |
| `Fraction`  | that of a fraction of its rows        | 1 + fraction |
| `Previous`  | that of the step before (AsyncSAM)    | 1            |
| `Momentum`  | the mean of those before (MSAM)       | 1            |
| `Every`     | another ascent, in one step of `n`    | 1 + less     |

An ascent of your own is a subclass of one of these, or of `Ascent`.
"""

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from keras_lesam import _checks
from keras_lesam import _results
from keras_lesam import _step
from keras_lesam._data import Batch
from keras_lesam._records import Step
from keras_lesam._records import StepContext
from keras_lesam._records import StepInputs
from keras_lesam._rule import Rule
from keras_lesam._rule import Weights
from keras_lesam._strategy import Strategy
from keras_lesam.budgets import Budget
from keras_lesam.budgets import Progress
from keras_lesam.estimators import CurvatureEstimator
from keras_lesam.estimators import FirstOrder

__all__ = [
    "Ascent",
    "Every",
    "Fraction",
    "FullBatch",
    "Momentum",
    "Previous",
    "Step",
    "StepContext",
    "StepInputs",
]

_register = keras.saving.register_keras_serializable(package="keras_lesam")

# Notes what a step has found, and returns what outlives a branch.
Report = Callable[[Step], Any]


class Ascent(Strategy):
    """How a step finds its perturbation, and in which steps it does.

    Immutable; `step` is a pure function of tensors.

    Example, an ascent in the second half of the training only:

    >>> import keras, numpy as np
    >>> from keras_lesam import SharpnessAwareModel, ascents, budgets, rules
    >>> @keras.saving.register_keras_serializable("mine")
    ... class SecondHalf(ascents.FullBatch):
    ...     def gate(self, progress):
    ...         return progress.fraction >= 0.5
    >>> net = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    >>> budget = budgets.Constant(0.1, anneal=0.1)
    >>> model = SharpnessAwareModel(
    ...     net, rules.LossEquated(), budget, SecondHalf())
    >>> model.compile("sgd", "mse")
    >>> history = model.fit(
    ...     np.ones((8, 2)), np.ones((8, 1)), batch_size=8, epochs=2, verbose=0)
    >>> [round(sigma, 3) for sigma in history.history["sigma"]]
    [0.0, 0.1]
    """

    @property
    def passes(self) -> float:
        """Passes of a step that ascends, forward and back."""
        raise NotImplementedError(f"{type(self).__name__} must say `passes`.")

    @property
    def knows_rise(self) -> bool:
        """Whether both passes see the same rows, so that sharpness is known."""
        return True

    @property
    def sees_all_rows(self) -> bool:
        """Whether each pass sees all rows of the batch."""
        return True

    @property
    def makes_plain_pass(self) -> bool:
        """Whether there is a pass at the weights, before the perturbation."""
        return True

    @property
    def period(self) -> int:
        """Steps from one ascent to the next."""
        return 1

    def init_state(self, weights: Weights) -> dict[str, Any]:
        """Return the state before the first step; see `rules.Rule`."""
        del weights
        return {}

    def gate(self, progress: Any) -> tf.Tensor | None:
        """Return whether this step ascends: a bool tensor, or `None` for yes.

        The others are steps of one pass, with no budget.

        Args:
            progress: A `budgets.Progress`.
        """
        del progress
        return None

    def step(
        self, context: StepContext, batch: Batch, inputs: StepInputs
    ) -> Step:
        """Take a step; nothing is written.

        Args:
            context: What stays the same from step to step.
            batch: The batch, or a part of it.
            inputs: State, progress and budget.
        """
        raise NotImplementedError(f"{type(self).__name__} must define `step`.")

    def run(
        self,
        context: StepContext,
        batch: Batch,
        inputs: StepInputs,
        report: Report,
    ) -> Any:
        """Take the step, in parts if the batch is split, and report it.

        Args:
            context: What stays the same from step to step.
            batch: The whole batch.
            inputs: State, progress and budget.
            report: Notes model state and metrics of a `Step`, which are
                written at its end. To be called once at run time.

        Returns:
            What `report` returns.
        """
        inputs = self._gated(inputs)
        return report(_step.in_parts(self.step, context, batch, inputs))

    def _gated(self, inputs: StepInputs) -> StepInputs:
        """Return the inputs of a step that ascends only if `gate` says so."""
        return inputs.only_if(_results.gate(self, self.gate(inputs.progress)))

    def check(
        self, rule: Rule, budget: Budget, estimator: CurvatureEstimator
    ) -> None:
        """Raise `ValueError` for what this ascent does not go with."""

    def keywords(self) -> str:
        """Return the keyword arguments of a model that stand for it."""
        return repr(self)

    def can_branch(self, is_global: bool) -> bool:
        """Whether a branch around the whole step needs no other replica."""
        del is_global
        return True


@_register
class FullBatch(Ascent):
    """The gradient of the batch itself, in a pass of its own."""

    @property
    def passes(self) -> float:
        return 2.0

    def step(
        self, context: StepContext, batch: Batch, inputs: StepInputs
    ) -> Step:
        """Take a step of two passes; of one where there is no ascent."""
        return _step.two_pass_step(context, batch, inputs)


@_register
class Fraction(Ascent):
    """The gradient of a fraction of the rows; the second pass sees all.

    The loss and metrics logged are those of these rows; sharpness is not
    known.

    Args:
        fraction: Float in (0, 1]. Of each part, where batches are split.
    """

    def __init__(self, fraction: float) -> None:
        self.fraction = _checks.number("fraction", fraction, 0, 1, above=True)

    @property
    def passes(self) -> float:
        return 1 + self.fraction

    @property
    def knows_rise(self) -> bool:
        return False

    @property
    def sees_all_rows(self) -> bool:
        return False

    def step(
        self, context: StepContext, batch: Batch, inputs: StepInputs
    ) -> Step:
        """Take a step whose first pass sees the first rows only."""
        return _step.fraction_step(context, batch, inputs, self.fraction)

    def run(
        self,
        context: StepContext,
        batch: Batch,
        inputs: StepInputs,
        report: Report,
    ) -> Any:
        """Take the step; where there is no budget, a plain one on all rows."""
        inputs = self._gated(inputs)

        def run(step: _step.StepFunction) -> Any:
            return report(_step.in_parts(step, context, batch, inputs))

        if inputs.budget is None or not context.use_cond:
            return run(self.step)
        return tf.cond(
            inputs.spendable(inputs.budget) > 0,
            lambda: run(self.step),
            lambda: run(_step.plain_step),
        )

    def check(
        self, rule: Rule, budget: Budget, estimator: CurvatureEstimator
    ) -> None:
        """Refuse estimators that learn from the rise."""
        if estimator.needs_rise:
            raise ValueError(
                "curvature='secant' learns from the rise of the loss, which is "
                "not known where the two passes see different rows. Use 'none' "
                "or 'hvp', or ascent_fraction=1. Received: curvature="
                f"{estimator!r}, {self.keywords()}"
            )

    def keywords(self) -> str:
        """Return `ascent_fraction=...`."""
        return f"ascent_fraction={self.fraction}"

    def can_branch(self, is_global: bool) -> bool:
        """Whether the first pass, which is in the branch, meets no replica."""
        return not is_global


class _Memory(Ascent):
    """Gradients of earlier steps, taken at their `w + eps`.

    The logged loss and metrics are those at `w + eps`, and batch normalization
    statistics are of there; sharpness is not known. The state is one tensor
    more for each weight that is perturbed.
    """

    _decay: float

    @property
    def passes(self) -> float:
        return 1.0

    @property
    def knows_rise(self) -> bool:
        return False

    @property
    def makes_plain_pass(self) -> bool:
        return False

    def init_state(self, weights: Weights) -> dict[str, Any]:
        """Return the mean gradient, zeros for weights that are perturbed."""
        return {
            "mean": [
                None if w is None else tf.zeros_like(w)
                for w in weights.perturbed
            ]
        }

    def step(
        self, context: StepContext, batch: Batch, inputs: StepInputs
    ) -> Step:
        """Take a step of one pass, at the perturbed weights."""
        return _step.memory_step(context, batch, inputs, self._decay)

    def check(
        self, rule: Rule, budget: Budget, estimator: CurvatureEstimator
    ) -> None:
        """Refuse what asks for a pass at the weights."""
        given = f"Received: {self.keywords()}"
        if rule.uses_plain_gradient:
            raise ValueError(
                "With `ascent_from` 'previous' or 'momentum' the gradient at "
                "the weights is not known, which this rule asks for: use "
                f"'batch'. {given}, rule {rule!r}"
            )
        if not isinstance(estimator, FirstOrder):
            raise ValueError(
                "With `ascent_from` 'previous' or 'momentum' there is no pass "
                "at the weights to take the curvature from: use "
                f"curvature='none'. {given}, "
                f"curvature={_checks.short(estimator)}"
            )
        if _goes_by_losses(budget) and not budget.takes_earlier_losses:
            raise ValueError(
                "With `ascent_from` 'previous' or 'momentum' there is no pass "
                "at the weights, and no loss for the budget to go by: use "
                f"'batch'. {given}, budget={_checks.short(budget)}"
            )


@_register
class Previous(_Memory):
    """The gradient of the step before (AsyncSAM), in a step of one pass.

    References:
        Xie et al. 2025, AsyncSAM.
    """

    _decay = 0.0

    def keywords(self) -> str:
        """Return `ascent_from='previous'`."""
        return "ascent_from='previous'"


@_register
class Momentum(_Memory):
    """The running mean of earlier gradients (MSAM), in a step of one pass.

    Args:
        decay: Float in [0, 1): what the mean keeps in each step.

    References:
        Becker, Altrock, Risse, "Momentum-SAM: Sharpness Aware Minimization
        without Computational Overhead", 2024, arXiv 2401.12033.
    """

    def __init__(self, decay: float = 0.9) -> None:
        self._decay = _checks.number("decay", decay, 0, 1, below=True)

    def keywords(self) -> str:
        """Return `ascent_from='momentum'`."""
        return "ascent_from='momentum'"


@_register
class Every(Ascent):
    """Another ascent, in the steps whose number `n` divides.

    The other steps are plain ones, of one pass. Steps are counted by
    `optimizer.iterations`.

    Args:
        n: Integer > 0.
        ascent: An `Ascent`; `None` for `FullBatch()`.
    """

    def __init__(self, n: int, ascent: Ascent | None = None) -> None:
        self.n = _checks.integer("n", n, 1)
        self.ascent = FullBatch() if ascent is None else ascent
        if not isinstance(self.ascent, Ascent):
            raise TypeError(
                "`ascent` must be one of keras_lesam.ascents, such as "
                f"ascents.FullBatch(). Received: ascent={_checks.short(ascent)}"
            )
        if self.n > 1 and not self.ascent.makes_plain_pass:
            raise ValueError(
                "With `ascent_from` 'previous' or 'momentum' a step has one "
                "pass, and nothing to save: leave `ascent_every` at 1. "
                f"Received: {self.ascent.keywords()}, ascent_every={self.n}"
            )

    @property
    def passes(self) -> float:
        return 1 + (self.ascent.passes - 1) / self.n

    @property
    def knows_rise(self) -> bool:
        return self.ascent.knows_rise

    @property
    def sees_all_rows(self) -> bool:
        return self.ascent.sees_all_rows

    @property
    def makes_plain_pass(self) -> bool:
        return self.ascent.makes_plain_pass

    @property
    def period(self) -> int:
        return self.n * self.ascent.period

    def init_state(self, weights: Weights) -> dict[str, Any]:
        """Return that of the ascent itself."""
        return self.ascent.init_state(weights)

    def gate(self, progress: Any) -> tf.Tensor | None:
        """Return whether `n` divides the number of the step."""
        if self.n == 1:
            return None
        return tf.equal(progress.iterations % self.n, 0)

    def step(
        self, context: StepContext, batch: Batch, inputs: StepInputs
    ) -> Step:
        """Take the step of the ascent itself."""
        return self.ascent.step(context, batch, inputs)

    def run(
        self,
        context: StepContext,
        batch: Batch,
        inputs: StepInputs,
        report: Report,
    ) -> Any:
        """Run the ascent itself, in one step of `n`."""
        gated = self._gated(inputs)
        return self.ascent.run(context, batch, gated, report)

    def check(
        self, rule: Rule, budget: Budget, estimator: CurvatureEstimator
    ) -> None:
        """Refuse what the ascent itself refuses."""
        self.ascent.check(rule, budget, estimator)

    def keywords(self) -> str:
        """Return `ascent_every=...`, and those of the ascent itself."""
        return f"ascent_every={self.n}, {self.ascent.keywords()}"

    def can_branch(self, is_global: bool) -> bool:
        """Whether the ascent itself can."""
        return self.ascent.can_branch(is_global)


def from_arguments(
    ascent_from: str, ascent_fraction: float, ascent_every: int
) -> Ascent:
    """Make the ascent of the keyword arguments of a model."""
    fraction = _checks.number(
        "ascent_fraction", ascent_fraction, 0, 1, above=True
    )
    every = _checks.integer("ascent_every", ascent_every, 1)
    choices = ("batch", "previous", "momentum")
    if _checks.choice("ascent_from", ascent_from, choices) != "batch":
        if fraction < 1 or every > 1:
            raise ValueError(
                "With `ascent_from` 'previous' or 'momentum' a step has one "
                "pass, and nothing to save: leave `ascent_fraction` and "
                "`ascent_every` at 1. Received: "
                f"ascent_from={_checks.short(ascent_from)}, "
                f"ascent_fraction={fraction}, ascent_every={every}"
            )
        return Previous() if ascent_from == "previous" else Momentum()
    ascent = FullBatch() if fraction == 1 else Fraction(fraction)
    return ascent if every == 1 else Every(every, ascent)


def _goes_by_losses(budget: Budget) -> bool:
    """Whether a budget has no answer before the first pass of a step."""
    start = Progress(tf.zeros((), tf.int64), tf.zeros(()))
    return budget(start, None, budget.init_state()) is None
