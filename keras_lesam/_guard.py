"""What is applied is finite, and all replicas that go together go alike."""

from typing import Any

import tensorflow as tf

from keras_lesam import _passes
from keras_lesam import _vectors
from keras_lesam._passes import LossAndGradients
from keras_lesam._records import Step
from keras_lesam._records import StepContext
from keras_lesam._vectors import Tensors


def agree(context: StepContext, condition: tf.Tensor) -> tf.Tensor:
    """Return whether a condition holds, in all replicas if they go together.

    Outside of any branch: they have to meet for it.
    """
    return agree_on_mean(context, condition, tf.zeros((), context.dtype))[0]


def agree_on_mean(
    context: StepContext, condition: tf.Tensor, value: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """Return a condition and a finite scalar as `agree`, in one collective.

    Of the scalar it is the mean; where replicas go by themselves, both are
    returned as they are.
    """
    if not context.is_global:
        return condition, value
    refusal = tf.cast(~condition, value.dtype)
    refusals, total = tf.unstack(
        _passes.sum_over_replicas(tf.stack([refusal, value]))
    )
    return tf.equal(refusals, 0), total / _passes.replicas(value.dtype)


def excuse(context: StepContext, condition: tf.Tensor) -> tf.Tensor:
    """Return a condition, or True where a loss scale may have overflowed.

    That is one above 1: its optimizer leaves the step out, and lowers it.
    """
    scale = context.scales().whole
    return condition if isinstance(scale, float) else condition | (scale > 1)


def tell_loss_scale(
    context: StepContext, step: Step, is_refused: tf.Tensor
) -> Step:
    """Let a loss scale see that gradients were refused, if it may be at fault.

    Or a net whose second pass overflows would be trained by plain steps from
    then on.

    Args:
        context: The `StepContext`.
        step: The step as it is without them.
        is_refused: Bool scalar tensor, whether any were.
    """
    if isinstance(context.scales().whole, float):
        return step
    is_excused = excuse(context, ~is_refused)
    spoiled = _spoiled(step.gradients, is_refused & is_excused)
    return step._replace(gradients=spoiled)


def without_gradients_unless(
    is_usable: tf.Tensor, point: LossAndGradients
) -> LossAndGradients:
    """Return a point with gradients of 0 and no new state, or as it is.

    Where there is no pass at the weights to fall back on.
    """
    gradients = [
        None if g is None else _or_zeros(g, is_usable) for g in point.gradients
    ]
    state = [
        (variable, tf.where(is_usable, value, variable.value))
        for variable, value in point.state
    ]
    return point._replace(gradients=gradients, state=state)


def in_unison(optimizer: Any, gradients: Tensors) -> Tensors:
    """Return gradients that a loss scale judges alike in all replicas.

    Keras asks the first replica whether its own gradients are finite, and
    applies the sum over all.
    """
    scale = _passes.loss_scale(optimizer)
    if isinstance(scale, float) or _passes.replicas() == 1:
        return gradients
    refusal = tf.cast(~_vectors.are_finite(gradients), tf.float32)
    return _spoiled(gradients, _passes.sum_over_replicas(refusal) > 0)


def _spoiled(gradients: Tensors, condition: tf.Tensor) -> Tensors:
    """Return gradients of which one is not finite where a condition holds."""
    spoiled = [*gradients]
    for i, gradient in enumerate(gradients):
        if gradient is not None:
            spoiled[i] = _divided_by_zero(gradient, condition)
            break
    return spoiled


def _divided_by_zero(gradient: Any, condition: tf.Tensor) -> Any:
    """Divide by 0, or by 1: no constant of a healthy graph is not finite."""
    divisor = tf.cast(~condition, gradient.dtype)
    if not isinstance(gradient, tf.IndexedSlices):
        return gradient / divisor
    return tf.IndexedSlices(
        gradient.values / divisor, gradient.indices, gradient.dense_shape
    )


def _or_zeros(gradient: Any, condition: tf.Tensor) -> Any:
    if not isinstance(gradient, tf.IndexedSlices):
        return _vectors.or_zero(gradient, condition)
    values = _vectors.or_zero(gradient.values, condition)
    return tf.IndexedSlices(values, gradient.indices, gradient.dense_shape)
