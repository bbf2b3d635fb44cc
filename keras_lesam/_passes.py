"""The passes: loss and gradients of a model at any point of weight space.

A pass is a pure function of weights, state and batch. It runs inside a
`keras.StatelessScope`, so no variable is written: not the weights, which a
pass at `w + eps` therefore cannot spoil, and not the state (batch
normalization statistics, seeds, loss trackers), whose new values are
returned. The caller commits the state of the first pass, once a step; every
pass of a step starts from the same state and draws the same random numbers.
"""

import contextlib
import inspect
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import keras
import tensorflow as tf

from keras_lesam import _calls
from keras_lesam._data import Batch
from keras_lesam._inspection import StockPass
from keras_lesam._inspection import trace_stock_pass
from keras_lesam._vectors import Tensors

ModelState = Sequence[tuple[Any, Any]]


class LossAndGradients(NamedTuple):
    """The model at one point of weight space.

    Attributes:
        loss: Scalar tensor in loss units: what `fit` minimises, neither
            multiplied by a loss scale nor divided by the replicas.
        logged_loss: What Keras logs: `loss`, or the losses of the rows of
            which it is the sum.
        outputs: What the model returned.
        gradients: List of tensors, `tf.IndexedSlices` or `None`, parallel to
            the weights: gradients of `gradient_scale(optimizer)` times `loss`.
        state: List of `(variable, tensor)`, what a stateful pass would have
            written.
        added_losses: What layers gave to `add_loss` in a pass that writes
            nothing; of one in place the layers have it themselves.
    """

    loss: tf.Tensor
    logged_loss: tf.Tensor
    outputs: Any
    gradients: Tensors
    state: list[tuple[Any, Any]]
    added_losses: Sequence[Any] = ()


def compute_loss_and_gradients(
    model: keras.Model, weights: Tensors, batch: Batch, state: ModelState = ()
) -> LossAndGradients:
    """Compute loss, outputs and gradients of a compiled `model` at `weights`.

    Args:
        model: A compiled Keras model.
        weights: List of tensors, parallel to `model.trainable_variables`.
        batch: A `Batch`.
        state: List of `(variable, tensor)` to see in place of the variables.
    """
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(weights)
        scaled_loss, loss, outputs, updates, added_losses = forward(
            model, weights, batch, state
        )
    return LossAndGradients(
        loss=tf.reduce_sum(loss),
        logged_loss=loss,
        outputs=outputs,
        gradients=tape.gradient(scaled_loss, weights),
        state=updates,
        added_losses=added_losses,
    )


def forward(
    model: keras.Model,
    weights: Tensors,
    batch: Batch,
    state: ModelState = (),
    training: bool = True,
) -> tuple[tf.Tensor, tf.Tensor, Any, list[tuple[Any, Any]], list[Any]]:
    """Make the forward pass alone; see `compute_loss_and_gradients`.

    Returns:
        `(scaled_loss, loss, outputs, state, added_losses)`: what to
        differentiate, which is `gradient_scale(optimizer)` times the loss;
        the others as in `LossAndGradients`, with the logged loss. Losses
        without a reduction are tensors of one number a row, whose sum is the
        loss, as in plain Keras.
    """
    mapping = [*zip(model.trainable_variables, weights), *state]
    with RecordingScope(mapping) as scope:
        outputs = _calls.outputs(model, batch.x, training)
        loss = compute_loss(model, batch, outputs, training)
    scaled_loss = loss
    if model.optimizer is not None:
        scaled_loss = model.optimizer.scale_loss(loss)
    loss *= replicas(loss.dtype)
    return scaled_loss, loss, outputs, scope.updates, scope.losses


@contextlib.contextmanager
def looking_again(
    model: keras.Model, weights: Tensors, point: LossAndGradients
) -> Iterator[None]:
    """Let losses be computed once more after a pass, and write nothing."""
    mapping = [*zip(model.trainable_variables, weights)]
    with keras.StatelessScope(mapping, collect_losses=True) as scope:
        # What was given to `add_loss` in the pass is part of the loss.
        scope.losses.extend(point.added_losses)
        yield


def compute_loss(
    model: keras.Model, batch: Batch, outputs: Any, training: bool
) -> tf.Tensor:
    """Call the model's `compute_loss`, whether or not it takes `training`."""
    kwargs = {}
    # Keras added the argument in 3.3, and calls overrides without it.
    if "training" in inspect.signature(model.compute_loss).parameters:
        kwargs["training"] = training
    return model.compute_loss(
        x=batch.x,
        y=batch.y,
        y_pred=outputs,
        sample_weight=batch.sample_weight,
        **kwargs,
    )


def build(
    model: keras.Model, batch: Batch
) -> tuple[StockPass | None, tuple[Any, ...]]:
    """Create the variables that wait for a first batch; change no others.

    Those of layers, losses, metrics and the optimizer.

    Returns:
        The stock pass that was traced for it, and never run, `None` for a
        model that only runs eagerly; and `tf.TensorSpec` of the model's
        outputs, flattened, `None` for what is no tensor. With several replicas
        the pass is one of inference: they cannot meet in a trace, to
        synchronize a layer or to write state.
    """
    stock = outputs = None
    if replicas() > 1:
        stock = trace_stock_pass(model, batch, compute_loss, training=False)
        trace = tf.function(lambda: _touch(model, batch), autograph=False)
        trace.get_concrete_function()
    elif tf.executing_eagerly():
        try:
            stock = trace_stock_pass(model, batch, compute_loss)
        except Exception:
            # It may need values; if it is wrong, this says so.
            outputs = _touch(model, batch)
    else:
        stock = trace_stock_pass(model, batch, compute_loss)
    if model.optimizer is not None and not model.optimizer.built:
        with tf.init_scope():
            model.optimizer.build(model.trainable_variables)
    return stock, _specs(outputs if stock is None else stock.outputs)


def _specs(nest: Any) -> tuple[Any, ...]:
    """Return shapes and dtypes of the tensors of a nest, `None` for others."""
    return tuple(
        tf.TensorSpec(leaf.shape, leaf.dtype)
        if isinstance(leaf, tf.Tensor)
        else None
        for leaf in keras.tree.flatten(nest)
    )


def _touch(model: keras.Model, batch: Batch) -> Any:
    """Call all that has variables, and return outputs; nothing is written."""
    x, y, sample_weight = batch
    with keras.StatelessScope():
        model(x, training=False)
    weights = read(model.trainable_variables)
    # As in a pass: in training, and with what `add_loss` is given on the way.
    # With replicas, a layer may want to synchronize, which a trace cannot.
    training = replicas() == 1
    with RecordingScope([*zip(model.trainable_variables, weights)]):
        outputs = _calls.outputs(model, x, training)
        compute_loss(model, batch, outputs, training=True)
        model.compute_metrics(x, y, outputs, sample_weight=sample_weight)
    return outputs


def read(variables: Sequence[Any]) -> Tensors:
    """Return the values of Keras variables as tensors."""
    return [tf.convert_to_tensor(v.value) for v in variables]


def commit(state: ModelState) -> None:
    """Write the state that a pass brought about."""
    for variable, value in state:
        variable.assign(value)


def gradient_scale(optimizer: Any) -> Any:
    """Return what the gradients of a pass are multiplied by.

    The loss scale of the optimizer, divided by the number of replicas, by
    which Keras divides the loss; a Python float or a scalar tensor.
    """
    return loss_scale(optimizer) / replicas()


def loss_scale(optimizer: Any) -> Any:
    """Return the loss scale alone, that of a sum of gradients over replicas."""
    return 1.0 if optimizer is None else optimizer.scale_loss(1.0)


def sum_over_replicas(tensors: Any) -> Any:
    """Replace each tensor of a nest by its sum over all replicas.

    To be called in a replica, and outside of any `tf.cond`. `None` stays.
    """
    flat = tf.nest.flatten(tensors)
    context = tf.distribute.get_replica_context()
    sums = iter(
        context.all_reduce(
            tf.distribute.ReduceOp.SUM, [t for t in flat if t is not None]
        )
    )
    return tf.nest.pack_sequence_as(
        tensors, [None if t is None else next(sums) for t in flat]
    )


def mean_over_replicas(scalar: tf.Tensor) -> tf.Tensor:
    """Return the mean of a scalar over all replicas; see above."""
    return sum_over_replicas(scalar) / replicas(scalar.dtype)


def is_weight(variable: Any) -> bool:
    """Return False for the float8 scales that Keras keeps among the weights.

    Their "gradient" is their next value (`overwrite_with_gradient`): there is
    nothing to ascend and nothing to descend.
    """
    return not getattr(variable, "overwrite_with_gradient", False)


def either(
    use_cond: bool,
    predicate: tf.Tensor,
    then: Callable[[], Any],
    otherwise: Callable[[], Any],
) -> Any:
    """Take one of two branches: by `tf.cond`, or by computing both."""
    if use_cond:
        return tf.cond(predicate, then, otherwise)
    return tf.nest.map_structure(
        lambda a, b: None if a is None else tf.where(predicate, a, b),
        then(),
        otherwise(),
        expand_composites=True,
    )


class RecordingScope(keras.StatelessScope):
    """A `StatelessScope` that lists which variables it kept from writing.

    The scope itself knows values by the id of their variable; the list also
    names variables that no model owns, such as Keras's global seed.

    Raises:
        ValueError: at a write inside of a branch, a loop or a function. It is
            found out before, if not with several replicas.
    """

    def __init__(self, state_mapping: list[tuple[Any, Any]]) -> None:
        super().__init__(state_mapping, collect_losses=True)
        self._updated: dict[int, Any] = {}
        self._graph = tf.compat.v1.get_default_graph()
        self._asking: Any = None

    def get_current_value(self, variable: Any) -> Any:
        """Return the value in the scope, that of the variable if none is.

        Keras takes it for the weights of all regularizers, also of weights
        that are not among those in the scope.
        """
        value = super().get_current_value(variable)
        if value is None and self._asking is not variable:
            self._asking = variable
            try:
                # It asks here first.
                value = variable.value
            finally:
                self._asking = None
        return value

    def add_update(self, update: tuple[Any, Any]) -> None:
        variable, _ = update
        if tf.compat.v1.get_default_graph() is not self._graph:
            raise ValueError(
                "State is written inside of a branch, a loop or a "
                "`tf.function`, from where a pass that writes nothing cannot "
                "carry it. One replica trains such a `model` in place; several "
                "cannot, nor can a `loss_fn`. Received: the state "
                f"{variable.path!r}"
            )
        self._updated[id(variable)] = variable
        super().add_update(update)

    @property
    def updates(self) -> list[tuple[Any, Any]]:
        """What would have been written: a list of `(variable, tensor)`."""
        return [(v, self.get_current_value(v)) for v in self._updated.values()]


def replicas(dtype: Any = None) -> Any:
    """Return the number of replicas: an int, or a tensor of a dtype."""
    count = tf.distribute.get_strategy().num_replicas_in_sync
    return count if dtype is None else tf.cast(count, dtype)
