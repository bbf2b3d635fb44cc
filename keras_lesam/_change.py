"""Keep the gradient from changing too much in the ascent.

A budget is met to first order: as far as the gradient at the end of the ascent,
`h`, is still that at the weights, `g`. If it has changed by a share `c` of
itself, `||T (h - g)|| = c ||T g||`, the rise is off by about half of that, and
beyond some share the step no longer descends from where it started. So the
budget has a factor, 1 at most, which each ascent corrects by what it has seen:
to first order the change is proportional to the radius, and the factor at which
it is `Budget.max_change` is found on a logarithmic scale. An ascent that ends
at no loss has changed it too much.
"""

import math
from typing import Any

import tensorflow as tf

from keras_lesam import _vectors
from keras_lesam._records import FirstPass
from keras_lesam._records import States
from keras_lesam._records import StepContext
from keras_lesam._vectors import Tensors
from keras_lesam.budgets import Budget

# A bad start does not survive much, and ten times as much is soon found.
FIRST_FACTOR = 0.1
# By how much an ascent corrects the factor: a tenth of what it would take.
RATE = 0.1
# Corrections are of a factor of e at most, times the rate.
LARGEST = 1.0
# It has a way back, whatever an ascent has met.
SMALLEST_FACTOR = 1e-3


def init_state(budget: Budget, dtype: Any) -> dict[str, Any]:
    """Return the state before the first step: the logarithm of the factor."""
    if budget.max_change is None:
        return {}
    return {"log_factor": tf.constant(math.log(FIRST_FACTOR), dtype)}


def shortened(allowed: tf.Tensor, state: dict[str, Any]) -> tf.Tensor:
    """Return a budget times the factor."""
    if not state:
        return allowed
    return allowed * tf.exp(tf.cast(state["log_factor"], allowed.dtype))


def measure(
    first: FirstPass,
    norm: tf.Tensor,
    gradients: Tensors,
    in_branch: bool,
) -> tf.Tensor:
    """Return `||T (h - g)|| / ||T g||` over the weights that are perturbed.

    0 where nobody asks. Replicas that take one perturbation have to meet for
    it, outside of any branch; others have it in the branch of the ascent.

    Args:
        first: The first pass.
        norm: Scalar tensor, the ascent norm of its perturbation.
        gradients: List like the weights: those of the second pass, of its
            scale.
        in_branch: Whether this is the branch of the ascent.
    """
    context = first.context
    if not _is_asked_for(context, in_branch):
        return tf.zeros((), context.dtype)
    there = context.scales().unscale(
        _vectors.dense(
            [
                h if is_perturbed else None
                for h, is_perturbed in zip(gradients, context.perturb_mask)
            ]
        )
    )
    scaling = context.rule.scaling(first.weights)
    if not context.rule.goes_along_gradients:
        norm = _vectors.norm(first.gradients, context.dtype, scaling)
    return _vectors.relative_distance(there, first.gradients, norm, scaling)


def are_finite(
    first: FirstPass, gradients: Tensors, change: tf.Tensor
) -> tf.Tensor:
    """Return whether gradients are finite, of which the change is known.

    A change is not finite if one of them is not, so that it need not be looked
    at twice; nor if it is beyond all measure.

    Args:
        first: The first pass.
        gradients: Those of the second pass.
        change: What `measure` has returned for them, in the branch.
    """
    context = first.context
    if not _is_asked_for(context, in_branch=True):
        return _vectors.are_finite(gradients)
    others = [
        None if is_perturbed else h
        for h, is_perturbed in zip(gradients, context.perturb_mask)
    ]
    return tf.math.is_finite(change) & _vectors.are_finite(others)


def _is_asked_for(context: StepContext, in_branch: bool) -> bool:
    return (
        context.budget.max_change is not None and in_branch != context.is_global
    )


def update(
    context: StepContext,
    states: States,
    change: tf.Tensor,
    is_usable: tf.Tensor,
    radius: tf.Tensor,
) -> States:
    """Return the states with what the next step has to know.

    Args:
        context: The `StepContext`.
        states: Those of each component.
        change: Scalar tensor, what `measure` has returned.
        is_usable: Bool scalar tensor, whether the ascent ended at a loss and
            gradients; one that did not has changed them too much.
        radius: Scalar tensor, how far it went; at 0 they stay.
    """
    if not states.get("change"):
        return states
    assert context.budget.max_change is not None
    limit = context.budget.max_change
    before = states["change"]["log_factor"]
    # No logarithm of 0, nor of what is not known.
    least, most = math.exp(-LARGEST) * limit, math.exp(LARGEST) * limit
    change = tf.cast(change, before.dtype)
    is_known = is_usable & tf.math.is_finite(change)
    change = tf.where(is_known, change, tf.cast(most, before.dtype))
    excess = tf.math.log(tf.clip_by_value(change, least, most) / limit)
    after = before - RATE * excess
    after = tf.clip_by_value(after, math.log(SMALLEST_FACTOR), 0.0)
    after = tf.where(radius > 0, after, before)
    return {**states, "change": {"log_factor": after}}
