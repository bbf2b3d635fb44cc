"""What a model has learnt: its loss beside that of ignoring the input.

The prediction that ignores the input is the mean of the outputs over the rows
of the batch, put in the place of the outputs, or a thousandth of it, if that is
better: logits whose mean is far from 0 are a bad guess, by which a model with a
bad start would seem to have learnt. It takes no pass, only the loss once more.
What a budget is told of it is `budgets.Losses`; what a step leaves
for the next is a state of its own, beside that of the budget.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_lesam import _delegation
from keras_lesam import _host_random
from keras_lesam import _passes
from keras_lesam import _vectors
from keras_lesam import _workarounds
from keras_lesam._data import Batch
from keras_lesam._data import count_rows
from keras_lesam._passes import LossAndGradients
from keras_lesam._records import StepContext
from keras_lesam._records import StepInputs
from keras_lesam._vectors import Tensors
from keras_lesam.budgets import Budget
from keras_lesam.budgets import Losses

State = dict[str, Any]

# Rows whose mean is taken as it is; that of fewer is mixed with earlier ones.
FEW = 8
# Rows that the running mean is over, as long as batches are smaller.
MEMORY = 64
# Of a mean, for the prediction that tells no output from another.
TINY = 0.001
# Steps whose mean loss is the reference of losses without another.
FIRST_STEPS = 10


def init_state(
    budget: Budget,
    is_remembered: bool,
    outputs: Sequence[Any] | None,
    dtype: Any,
) -> State:
    """Return the state before the first step.

    Args:
        budget: The budget.
        is_remembered: Whether a step is told the losses of the step before.
        outputs: A `tf.TensorSpec` of each output, `None` for what is no
            tensor; `None` as long as that is not known.
        dtype: Of all scalars.
    """
    state: State = {}
    if is_remembered:
        size = 3 if budget.needs_reference else 1
        state["losses"] = tf.zeros((size,), dtype)
    if not budget.needs_reference or outputs is None:
        return state
    # The mean loss of the first steps, and how many there were.
    state["start"] = tf.zeros((2,), dtype)
    state["rows"] = tf.zeros((), dtype)
    for i, output in enumerate(outputs):
        channels = _channels(output)
        if channels is not None:
            state[f"mean_{i}"] = tf.zeros(channels, dtype)
    return state


def measure(
    context: StepContext,
    inputs: StepInputs,
    batch: Batch,
    weights: Tensors,
    point: LossAndGradients,
) -> tuple[Losses | None, State]:
    """Return what the budget is told of a pass, and the state after it.

    `None` for a budget that goes by time alone. Replicas that take one
    perturbation meet for it: outside of any branch.

    Args:
        context: The `StepContext`.
        inputs: The `StepInputs`.
        batch: The rows of the pass.
        weights: List of tensors, where it was made.
        point: What it has found.
    """
    budget, state = context.budget, inputs.states.get("reference", {})
    asks = inputs.budget is None or budget.learns or budget.needs_reference
    if not asks:
        return None, state
    if budget.needs_reference:
        losses, state = _compare(context, inputs, batch, weights, point)
    else:
        losses = Losses(_mean_over_replicas(context, point.loss))
    if "losses" in state:
        known = tf.stack([x for x in losses if x is not None])
        state = {**state, "losses": known}
    return losses, state


def remembered(inputs: StepInputs) -> Losses | None:
    """Return the losses of the step before, for a step without a pass."""
    state = inputs.states.get("reference", {})
    return Losses(*tf.unstack(state["losses"])) if "losses" in state else None


def _compare(
    context: StepContext,
    inputs: StepInputs,
    batch: Batch,
    weights: Tensors,
    point: LossAndGradients,
) -> tuple[Losses, State]:
    """Return the losses of outputs and of what stands in for them."""
    plain = _mean_over_replicas(context, point.loss)
    state = inputs.states.get("reference", {})
    given = context.budget.reference_loss
    means, state = _means(context, batch, point.outputs, state)
    model = context.model
    with (
        context.passes.looking_again(model, weights, point),
        _host_random.replaying(_host_random.get_state()),
    ):
        found = [
            _loss_of(model, batch, _in_place(point.outputs, means), given),
            # Of logits: no class more likely than another.
            _loss_of(model, batch, _in_place(point.outputs, means, TINY), 0.0),
        ]
        added = _added(model, plain.dtype)
    if found[0] is None and given is None:
        start, state = _start(state, plain)
        return Losses(plain, plain, start), state
    total = _least(context, plain, found)
    # Rounding is no gain, nor a loss below 0.
    rounding = _rounding(point.outputs, plain.dtype) * tf.maximum(
        tf.abs(plain), tf.abs(total)
    )
    data = plain if found[0] is None else plain - added
    data = _vectors.or_zero(data, tf.abs(data) > rounding)
    reference = total - added
    if given is not None:
        reference = tf.constant(given, plain.dtype)
    is_known = tf.math.is_finite(reference) & (reference - data > rounding)
    return Losses(plain, data, tf.where(is_known, reference, data)), state


def _loss_of(
    model: keras.Model, batch: Batch, outputs: Any, instead: float | None
) -> tf.Tensor | None:
    """Return the loss of other outputs; `None` if it doesn't go by them.

    Raises:
        ValueError: if it cannot be called with them, and there is no number
            `instead`.
    """
    leaves = [
        leaf
        for leaf in tf.nest.flatten(outputs, expand_composites=True)
        if tf.is_tensor(leaf) and leaf.dtype.is_floating
    ]
    try:
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(leaves)
            loss = tf.reduce_sum(
                _passes.compute_loss(model, batch, outputs, training=True)
            )
    except Exception as error:
        if instead is not None:
            return None
        raise ValueError(
            "`compute_loss` cannot be called with the mean of the outputs in "
            "place of the outputs, which tells a budget what the model has "
            "learnt: pass budgets.Relative a `reference_loss`. Received: "
            f"{type(error).__name__}: {error}"
        ) from error
    try:
        gradients = tape.gradient(loss, leaves)
    except LookupError:
        gradients = leaves  # It goes by them, in a way without a gradient.
    if all(gradient is None for gradient in gradients):
        return None
    return loss * _passes.replicas(loss.dtype)


def _least(
    context: StepContext, plain: tf.Tensor, found: list[Any]
) -> tf.Tensor:
    """Return the least of losses that are known, or else `plain`."""
    known = [_mean_over_replicas(context, f) for f in found if f is not None]
    if not known:
        return plain
    # One that is not finite is no less than another.
    losses = tf.stack(known)
    is_finite = tf.math.is_finite(losses)
    least = tf.reduce_min(tf.where(is_finite, losses, plain.dtype.max))
    return tf.where(tf.reduce_any(is_finite), least, plain)


def _added(model: keras.Model, dtype: Any) -> tf.Tensor:
    """Return regularizers and `add_loss`, if they are part of the loss."""
    inner = getattr(model, "model", model)
    losses = []
    if not _delegation.overrides(inner, "compute_loss"):
        losses = [tf.reduce_sum(tf.cast(loss, dtype)) for loss in model.losses]
    return tf.add_n(losses) if losses else tf.zeros((), dtype)


def _start(state: State, plain: tf.Tensor) -> tuple[tf.Tensor, State]:
    """Return the mean loss of the first steps, and the state of it.

    It is the loss itself until there were enough of them.
    """
    warnings.warn(
        "The loss does not go by the outputs of a model, whose mean would "
        "tell what has been learnt: the budget goes by the mean loss of the "
        f"first {FIRST_STEPS} steps instead, which is of no use in "
        "fine-tuning. Pass budgets.Relative the loss of a model that has "
        "learnt nothing as `reference_loss`.",
        stacklevel=2,
    )
    mean, count = tf.unstack(state["start"])
    is_complete = count >= FIRST_STEPS
    is_new = ~is_complete & tf.math.is_finite(plain)
    change = _vectors.or_zero(plain - mean, is_new) / (count + 1)
    new = tf.stack([mean + change, count + tf.cast(is_new, count.dtype)])
    return tf.where(is_complete, mean, plain), {**state, "start": new}


def _means(
    context: StepContext, batch: Batch, outputs: Any, state: State
) -> tuple[list[Any], State]:
    """Return the mean of each output, and the state after it.

    Of shape `(1, ...)`; `None` for outputs that have none: of integers or
    strings, or without rows.
    """
    leaves = keras.tree.flatten(outputs)
    rows = _rows(leaves, state["rows"].dtype)
    if context.is_global:
        rows = _passes.sum_over_replicas(rows)
    seen = tf.minimum(state["rows"] + rows, tf.maximum(rows, MEMORY))
    weights = _weights(batch.sample_weight, outputs)
    new = {**state, "rows": seen}
    # Of few rows each has too much of a say in their mean.
    share = tf.clip_by_value((rows - 1) / (FEW - 1), 0.0, 1.0)
    share = tf.where(state["rows"] > 0, share, 1.0)
    found: list[Any] = [None] * len(leaves)
    for i, (output, weight) in enumerate(zip(leaves, weights, strict=True)):
        values = _values(output)
        if values is None:
            continue
        total, count = _sums(context, values, weight)
        mean = tf.math.divide_no_nan(total, count)
        name = f"mean_{i}"
        if name in state:
            old = tf.cast(state[name], mean.dtype)
            change = _over_positions(total, count) - old
            change = _vectors.or_zero(change, tf.math.is_finite(change))
            change *= tf.cast(tf.math.divide_no_nan(rows, seen), mean.dtype)
            new[name] = tf.cast(old + change, state[name].dtype)
            mean += tf.cast(1 - share, mean.dtype) * (old - mean)
        found[i] = mean
    return found, new


def _sums(
    context: StepContext, values: tf.Tensor, weight: tf.Tensor | None
) -> tuple[tf.Tensor, tf.Tensor]:
    """Return the sum over rows, of shape `(1, ...)`, and what it counts for.

    In a wide dtype.
    """
    if values.dtype.size < 4:
        values = tf.cast(values, tf.float32)
    if weight is None:
        total = tf.reduce_sum(values, 0, keepdims=True)
        count = tf.cast(tf.shape(values)[0], values.dtype)
        count = tf.reshape(count, [1] * values.shape.rank)
    else:
        weight = tf.cast(weight, values.dtype)
        total = tf.reduce_sum(weight * values, 0, keepdims=True)
        count = tf.reduce_sum(weight, 0, keepdims=True)
    # Only what has the same shape in all replicas.
    if context.is_global and values.shape[1:].is_fully_defined():
        total, count = _passes.sum_over_replicas((total, count))
    return total, count


def _over_positions(total: tf.Tensor, count: tf.Tensor) -> tf.Tensor:
    """Return the mean over rows and positions: one number a channel."""
    axes = [*range(max(total.shape.rank - 1, 1))]
    count = tf.reduce_sum(count * tf.ones_like(total), axes)
    return tf.math.divide_no_nan(tf.reduce_sum(total, axes), count)


def _in_place(outputs: Any, means: list[Any], factor: float = 1.0) -> Any:
    """Return a factor of the means in each row, else like the outputs."""
    leaves = [
        output if mean is None else _repeated(factor * mean, output)
        for mean, output in zip(means, keras.tree.flatten(outputs))
    ]
    return keras.tree.pack_sequence_as(outputs, leaves)


def _repeated(mean: tf.Tensor, output: Any) -> Any:
    mean = tf.cast(mean, output.dtype)
    if isinstance(output, tf.RaggedTensor):
        values = output.flat_values
        return output.with_flat_values(tf.broadcast_to(mean, tf.shape(values)))

    def repeated(leaf: tf.Tensor) -> tf.Tensor:
        if leaf is not output:
            return leaf  # Its mask.
        return tf.ensure_shape(
            tf.broadcast_to(mean, tf.shape(leaf)), leaf.shape
        )

    return _workarounds.map_with_masks(repeated, [output])


def _weights(sample_weight: Any, outputs: Any) -> list[Any]:
    """Return what rows and positions of each output count for, or `None`."""
    leaves = keras.tree.flatten(outputs)
    if tf.is_tensor(sample_weight):
        given = [sample_weight] * len(leaves)
    elif sample_weight is not None and _are_alike(sample_weight, outputs):
        given = keras.tree.flatten(sample_weight)
    else:
        given = [None] * len(leaves)
    found = []
    for output, weight in zip(leaves, given):
        mask = _workarounds.mask_of(output)
        factors = [
            _aligned(tf.cast(w, tf.float32), output)
            for w in (weight, mask)
            if w is not None and _values(output) is output
        ]
        factors = [f for f in factors if f is not None]
        found.append(_product(factors) if factors else None)
    return found


def _product(factors: list[Any]) -> Any:
    return factors[0] if len(factors) == 1 else factors[0] * factors[1]


def _aligned(weight: tf.Tensor, output: tf.Tensor) -> tf.Tensor | None:
    """Return weights that broadcast to an output from its first axis on."""
    rank, wanted = weight.shape.rank, output.shape.rank
    if rank is None or wanted is None:
        return None
    if rank > wanted and weight.shape[-1] == 1:
        weight, rank = tf.squeeze(weight, -1), rank - 1
    if rank > wanted or rank == 0:
        return None
    for _ in range(wanted - rank):
        weight = weight[..., None]
    try:
        tf.broadcast_static_shape(weight.shape, output.shape)
    except ValueError:
        return None
    return weight


def _rows(outputs: Sequence[Any], dtype: Any) -> tf.Tensor:
    """Return the number of rows, a scalar tensor."""
    for output in outputs:
        if _values(output) is not None:
            return tf.cast(count_rows(output), dtype)
    return tf.zeros((), dtype)


def _values(output: Any) -> Any:
    """Return the tensor of an output to take the mean of, or `None`."""
    values = getattr(output, "flat_values", output)
    is_mean = (
        (tf.is_tensor(values) or isinstance(values, tf.TensorSpec))
        and not isinstance(values, tf.SparseTensor)
        and values.dtype.is_floating
        and values.shape.rank
    )
    return values if is_mean else None


def _channels(output: Any) -> list[int] | None:
    """Return the shape of a mean over rows and positions, if it is fixed."""
    values = _values(output)
    if values is None or isinstance(output, tf.RaggedTensor):
        return None
    shape = values.shape[1:][-1:]
    return shape.as_list() if shape.is_fully_defined() else None


def _rounding(outputs: Any, dtype: Any) -> float:
    """Return a share of a loss that may be rounding alone."""
    dtypes = [
        values.dtype
        for values in map(_values, keras.tree.flatten(outputs))
        if values is not None
    ]
    eps = max(
        float(np.finfo(d.as_numpy_dtype).eps) if d != tf.bfloat16 else 2.0**-7
        for d in [*dtypes, tf.as_dtype(dtype)]
    )
    return 32 * eps if eps < 1e-4 else 4 * eps


def _mean_over_replicas(context: StepContext, loss: tf.Tensor) -> tf.Tensor:
    loss = tf.cast(loss, context.dtype)
    return _passes.mean_over_replicas(loss) if context.is_global else loss


def _are_alike(nest: Any, other: Any) -> bool:
    try:
        keras.tree.assert_same_structure(nest, other)
    except (TypeError, ValueError):
        return False
    return True
