"""The passes: loss and gradient of a model at any point of weight space.

A pass is a pure function of weights, state and batch. It runs inside a
`keras.StatelessScope`, so no variable is written: not the weights, which a
pass at `w + eps` therefore cannot spoil, and not the state (batch
normalization statistics, seeds, loss trackers), whose new values are
returned. The caller commits the state of the first pass, once a step; every
pass of a step starts from the same state and draws the same random numbers.
"""

from typing import Any
from typing import NamedTuple

import keras
import tensorflow as tf


class Batch(NamedTuple):
    """What `fit` hands to a step; each a nest of tensors, or `None`.

    Attributes:
        x: Inputs of the model.
        y: Targets, structured like the outputs.
        sample_weight: Weights of the rows.
    """

    x: Any
    y: Any
    sample_weight: Any


class Point(NamedTuple):
    """The model at one point of weight space.

    Attributes:
        loss: Scalar tensor in loss units: what `fit` minimises, neither
            multiplied by a loss scale nor divided by the replicas.
        outputs: What the model returned.
        gradients: List of tensors, `tf.IndexedSlices` or `None`, parallel to
            the weights: gradients of `gradient_scale(optimizer)` times `loss`.
        state: List of `(variable, tensor)`, what a stateful pass would have
            written.
    """

    loss: tf.Tensor
    outputs: Any
    gradients: list
    state: list


def evaluate(model, weights, batch, state=()):
    """Loss, outputs and gradients of a compiled `model` at `weights`.

    Args:
        model: A compiled Keras model.
        weights: List of tensors, parallel to `model.trainable_variables`.
        batch: A `Batch`.
        state: List of `(variable, tensor)` to see in place of the variables.

    Returns:
        A `Point`.
    """
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(weights)
        scaled_loss, loss, outputs, updates = forward(
            model, weights, batch, state
        )
    return Point(
        loss=loss,
        outputs=outputs,
        gradients=tape.gradient(scaled_loss, weights),
        state=updates,
    )


def forward(model, weights, batch, state=(), training=True):
    """The forward pass alone; arguments are those of `evaluate`.

    Returns:
        `(scaled_loss, loss, outputs, state)`: what to differentiate, a scalar
        tensor, `gradient_scale(optimizer)` times the loss; and loss, outputs
        and state as in a `Point`.
    """
    mapping = [*zip(model.trainable_variables, weights), *state]
    with _RecordingScope(mapping) as scope:
        outputs = model(batch.x, training=training)
        loss = model.compute_loss(
            x=batch.x,
            y=batch.y,
            y_pred=outputs,
            sample_weight=batch.sample_weight,
        )
    scaled_loss = loss
    if model.optimizer is not None:
        scaled_loss = model.optimizer.scale_loss(loss)
    return scaled_loss, loss * replicas(loss.dtype), outputs, scope.updates


def build(model, batch):
    """Creates the variables that wait for a first batch; changes no others.

    Those of layers, losses, metrics and the optimizer. In a graph the pass
    that does so is traced apart, and never run.
    """
    if tf.executing_eagerly():
        _touch(model, batch)
    else:
        trace = tf.function(lambda: _touch(model, batch), autograph=False)
        trace.get_concrete_function()
    if model.optimizer is not None and not model.optimizer.built:
        with tf.init_scope():
            model.optimizer.build(model.trainable_variables)


def _touch(model, batch):
    """Calls all that has variables; nothing is written."""
    x, y, sample_weight = batch
    with keras.StatelessScope():
        model(x, training=False)
    weights = read(model.trainable_variables)
    # As in a pass: in training, and with what `add_loss` is given on the way.
    # With replicas, a layer may want to synchronize, which a trace cannot.
    training = replicas() == 1
    with _RecordingScope([*zip(model.trainable_variables, weights)]):
        outputs = model(x, training=training)
        model.compute_loss(
            x=x, y=y, y_pred=outputs, sample_weight=sample_weight
        )
        model.compute_metrics(x, y, outputs, sample_weight=sample_weight)


def read(variables):
    """The values of Keras variables as tensors."""
    return [tf.convert_to_tensor(v.value) for v in variables]


def commit(state):
    """Writes the state that a pass brought about."""
    for variable, value in state:
        variable.assign(value)


def gradient_scale(optimizer):
    """What `Point.gradients` are multiplied by, compared to those of `loss`.

    The loss scale of the optimizer (a Python float or a tensor), divided by
    the number of replicas, by which Keras divides the loss.
    """
    return loss_scale(optimizer) / replicas()


def loss_scale(optimizer):
    """The loss scale alone, that of a sum of gradients over replicas."""
    return 1.0 if optimizer is None else optimizer.scale_loss(1.0)


def sum_over_replicas(tensors):
    """A nest of tensors, each replaced by its sum over all replicas.

    To be called in a replica, and outside of any `tf.cond`.
    """
    context = tf.distribute.get_replica_context()
    return context.all_reduce(tf.distribute.ReduceOp.SUM, tensors)


def is_weight(variable):
    """False for the float8 scales that Keras keeps as trainable variables.

    Their "gradient" is their next value (`overwrite_with_gradient`): there is
    nothing to climb and nothing to descend.
    """
    return not getattr(variable, "overwrite_with_gradient", False)


def count_rows(nest):
    """Rows of a batch: an int where it is static, a scalar tensor elsewhere."""
    tensor = next(t for t in keras.tree.flatten(nest) if t is not None)
    if isinstance(tensor, tf.RaggedTensor):
        return tf.cast(tensor.nrows(), tf.int32)
    if tensor.shape[0] is not None:
        return tensor.shape[0]
    return tf.shape(tensor)[0]


def take_rows(batch, start, stop):
    """Rows `start` to `stop` of every tensor of the batch."""
    return keras.tree.map_structure(
        lambda leaf: None if leaf is None else _slice_rows(leaf, start, stop),
        batch,
    )


def either(conditional, predicate, then, otherwise):
    """`tf.cond`, or both and a choice between them."""
    if conditional:
        return tf.cond(predicate, then, otherwise)
    return tf.nest.map_structure(
        lambda a, b: None if a is None else tf.where(predicate, a, b),
        then(),
        otherwise(),
        expand_composites=True,
    )


class _RecordingScope(keras.StatelessScope):
    """A `StatelessScope` that lists which variables it kept from writing.

    The scope itself knows values by the id of their variable; the list also
    names variables that no model owns, such as Keras's global seed.
    """

    def __init__(self, state_mapping):
        super().__init__(state_mapping, collect_losses=True)
        self._updated = {}

    def add_update(self, update):
        variable, _ = update
        self._updated[id(variable)] = variable
        super().add_update(update)

    @property
    def updates(self):
        return [(v, self.get_current_value(v)) for v in self._updated.values()]


def replicas(dtype=None):
    """How many replicas train in sync, as an int or a tensor of a dtype."""
    count = tf.distribute.get_strategy().num_replicas_in_sync
    return count if dtype is None else tf.cast(count, dtype)


def _slice_rows(tensor, start, stop):
    if isinstance(tensor, tf.SparseTensor):
        rest = tensor.dense_shape[1:]
        begin = tf.concat([[tf.cast(start, tf.int64)], 0 * rest], 0)
        size = tf.concat([[tf.cast(stop - start, tf.int64)], rest], 0)
        return tf.sparse.slice(tensor, begin, size)
    return tensor[start:stop]
