"""What a step may spend: its budget, and the limits that it sets itself."""

import tensorflow as tf

from keras_lesam import _change
from keras_lesam import _results
from keras_lesam._records import States
from keras_lesam._records import StepContext
from keras_lesam._records import StepInputs
from keras_lesam.budgets import Losses
from keras_lesam.budgets import Progress


def inputs(
    context: StepContext, progress: Progress, states: States
) -> StepInputs:
    """Return what a step is told; the budget too, if it goes by time alone."""
    budget = context.budget(progress, None, states["budget"])
    if budget is not None:
        budget = _results.scalar(
            context.budget, "__call__", budget, context.dtype
        )
    return StepInputs(progress, states, budget)


def limit(context: StepContext, losses: Losses | None) -> tf.Tensor | None:
    """Return the most that the loss may rise; `None` without a guard."""
    if losses is None or context.budget.guard is None:
        return None
    return tf.cast(context.budget.guard, context.dtype) * losses.gain


def allowed(
    context: StepContext,
    inputs: StepInputs,
    losses: Losses | None,
    most: tf.Tensor | None,
) -> tf.Tensor:
    """Return the budget; ask once more if it goes by the losses."""
    budget = inputs.budget
    if budget is None:
        budget = _by_losses(context, inputs, losses)
    budget = _change.shortened(budget, inputs.states.get("change", {}))
    if most is None or not context.rule.budget_is_rise:
        return budget
    return tf.minimum(budget, most)


def _by_losses(
    context: StepContext, inputs: StepInputs, losses: Losses | None
) -> tf.Tensor:
    budget = context.budget(inputs.progress, losses, inputs.states["budget"])
    if budget is None:
        raise ValueError(
            f"{context.budget!r} must return a scalar tensor when it is given "
            "the losses of the step. Received: None"
        )
    return _results.scalar(context.budget, "__call__", budget, context.dtype)
