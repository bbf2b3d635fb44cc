"""A loss function in the place of a model, for steps of a user's own loop.

A `LossFunction` has what passes and steps ask of a compiled model, so that a
step of a loop is the step of `fit`. What a pass that writes nothing cannot see
of it is looked for in its graph, traced and never run, and refused by name.
"""

import collections
import re
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple
from typing import NoReturn

import tensorflow as tf

from keras_lesam import _calls
from keras_lesam import _checks
from keras_lesam import _engines
from keras_lesam import _host_random
from keras_lesam import _inspection
from keras_lesam import _passes
from keras_lesam._data import Batch
from keras_lesam._inspection import StockPass

# What a loss function is given of a batch, which it closes over.
NO_BATCH = Batch(None, None, None)
# Operations that draw other numbers in each pass.
_RANDOM = re.compile(
    r"(Random(?!Dataset)|Rng|Multinomial|NonDeterministic|Stateful(?!Part)"
    r"|(Parameterized)?TruncatedNormal|SampleDistorted)"
)


class Returned:
    """What a loss function has returned; to all others it has no parts.

    Attributes:
        loss: Scalar tensor.
        aux: Whatever came with it, or `None`.
    """

    def __init__(self, loss: tf.Tensor, aux: Any) -> None:
        self.loss = loss
        self.aux = aux


class LossFunction:
    """A loss function as passes and steps see a compiled model.

    Args:
        function: Function without arguments that returns a scalar loss, or
            `(loss, aux)`.
        variables: List of Keras variables to differentiate by.
        optimizer: The Keras optimizer that scales the loss, or `None`.
    """

    jit_compile = False
    # What it owns beside the variables is not known, nor needed.
    losses: Sequence[Any] = ()

    def __init__(
        self,
        function: Callable[[], Any],
        variables: Sequence[Any],
        optimizer: Any = None,
    ) -> None:
        self.function = function
        self.trainable_variables = [*variables]
        self.optimizer = optimizer

    def __call__(self, x: Any, training: bool) -> Returned:
        """Call the function; it knows its batch by itself."""
        del x, training
        with _calls.own():
            value = self.function()
        loss, aux = value, None
        if isinstance(value, tuple) and len(value) == 2:
            loss, aux = value
        if (
            not tf.is_tensor(loss)
            or not loss.dtype.is_floating
            or loss.shape.rank not in (0, None)
        ):
            raise TypeError(
                "`loss_fn` must return a scalar tensor of floats, or a pair of "
                f"it and anything else. Received: {_checks.short(value)} of "
                f"type {type(value).__name__}"
            )
        if loss.shape.rank is None:
            loss = tf.reshape(loss, [])
        return Returned(loss, aux)

    def compute_loss(
        self, x: Any, y: Any, y_pred: Returned, sample_weight: Any
    ) -> tf.Tensor:
        """Return the loss that the call has found."""
        del x, y, sample_weight
        return y_pred.loss


def replicas_meet(function: LossFunction) -> bool:
    """Look for what a pass cannot see of a loss function, and refuse it.

    Returns:
        Whether the replicas of a `tf.distribute.Strategy` meet in it, as they
        do to synchronize batch normalization.

    Raises:
        ValueError: if a pass that writes nothing would get it wrong.
    """
    host_random = _host_random.get_state()
    try:
        with _host_random.replaying(host_random):
            stock, stateless = _trace(function, False), _trace(function, True)
    except Exception as error:
        if _passes.replicas() > 1 and "merge_call" in str(error):
            return True
        if not tf.executing_eagerly():
            raise
        # It may need values; if it is wrong, this says so.
        _compare(function)
        return False
    _refuse_unseen(function, stock, stateless)
    _refuse_repeated(function, stock)
    return False


class _Trace(NamedTuple):
    """The graph of a pass.

    Attributes:
        graph: A `StockPass`, without what computes gradients.
        updated: Variables that it would have written.
        gradients: Those of the loss, parallel to the variables.
        weights: Names of the tensors in the place of the variables; none where
            the variables were read.
    """

    graph: StockPass
    updated: list[Any]
    gradients: list[Any]
    weights: list[str]


def _trace(function: LossFunction, is_stateless: bool) -> _Trace:
    """Trace a pass, of variables or of tensors in their place."""
    variables = function.trainable_variables
    found: list[_Trace] = []

    def touch(weights: list[Any]) -> None:
        sources = weights if is_stateless else [v.value for v in variables]
        mapping = [*zip(variables, weights)]
        with (
            _passes.RecordingScope(mapping) as scope,
            tf.GradientTape(watch_accessed_variables=False) as tape,
        ):
            tape.watch(sources)
            loss = function(None, training=True).loss
        graph = tf.compat.v1.get_default_graph()
        stock = StockPass(graph, graph.get_operations())
        updated = [variable for variable, _ in scope.updates]
        gradients = tape.gradient(loss, sources)
        names = [weight.op.name for weight in weights]
        found.append(_Trace(stock, updated, gradients, names))

    specs = [tf.TensorSpec(v.shape, v.value.dtype) for v in variables]
    tf.function(touch, autograph=False).get_concrete_function(
        specs if is_stateless else []
    )
    return found[-1]


def _refuse_unseen(
    function: LossFunction, stock: _Trace, stateless: _Trace
) -> None:
    """Raise `ValueError` for weights that go past the tensors in their place.

    Read behind a `tf.function`, assigned, or closed over by a function with a
    gradient of its own.
    """
    variables = function.trainable_variables
    by_handle = _inspection.variables_by_handle(stateless.graph, variables)
    if by_handle:
        _refuse(
            "reads weights behind a `tf.function`, where they cannot be "
            "perturbed: call the model itself, and put the `tf.function` "
            "around the whole step",
            by_handle.values(),
        )
    _refuse_assigned(function, stock.updated)
    counts = _uses_in_own_gradients(stock, variables)
    others = _uses_in_own_gradients(stateless, variables)
    if lost := [
        v
        for v, a, b in zip(variables, stock.gradients, stateless.gradients)
        if (a is not None and b is None) or counts[id(v)] > others[id(v)]
    ]:
        _refuse(
            "has weights in a function with a gradient of its own "
            "(`keras.remat`, `keras.RematScope`, `tf.custom_gradient`) that "
            "does not take them as arguments: their gradient at other weights "
            "would be lost",
            lost,
        )


def _refuse_assigned(function: LossFunction, updated: Iterable[Any]) -> None:
    """Raise `ValueError` if one of the variables is among those written."""
    trained = {id(v) for v in function.trainable_variables}
    if assigned := [v for v in updated if id(v) in trained]:
        _refuse(
            "assigns weights that it is differentiated by, whose gradient "
            "would be another than that of the variables",
            assigned,
        )


def _uses_in_own_gradients(
    trace: _Trace, variables: Sequence[Any]
) -> dict[int, int]:
    """Count how often functions with own gradients are given each variable."""
    by_name = dict(zip(trace.weights, variables))
    by_handle = _inspection.variables_by_handle(trace.graph, variables)
    counts: dict[int, int] = collections.Counter()
    for operation in trace.graph.operations:
        if not _inspection.has_own_gradient(operation.node_def):
            continue
        for tensor in operation.inputs:
            source = _inspection.source_of(tensor.op)
            if source.name in by_name:
                counts[id(by_name[source.name])] += 1
            for variable in _inspection.variables_behind(source, by_handle):
                counts[id(variable)] += 1
    return counts


def _refuse_repeated(function: LossFunction, stock: _Trace) -> None:
    """Raise `ValueError` for what each pass would do anew."""
    nested = [*_inspection.nested_nodes(stock.graph, stock.graph.operations)]
    kinds = [operation.type for operation in stock.graph.operations]
    kinds += [node.op for node in nested]
    if any(_inspection.is_assignment(kind) for kind in kinds):
        _refuse(
            "writes a `tf.Variable`, or a state behind a `tf.function`, which "
            "would be written in each pass. Keras variables that it writes by "
            "itself are written once"
        )
    if any(_RANDOM.match(kind) for kind in kinds):
        _refuse(
            "draws random numbers of TensorFlow's own, which would be others "
            "in each pass: draw them before, or by `keras.random` with a "
            "keras.random.SeedGenerator"
        )


def _compare(function: LossFunction) -> None:
    """Raise `ValueError` if the gradients of a pass are not the stock ones."""
    variables = function.trainable_variables
    plain = LossFunction(function.function, variables)
    host_random = _host_random.get_state()
    sources = [v.value for v in variables]
    with (
        _passes.RecordingScope([]) as scope,
        _host_random.replaying(host_random),
        tf.GradientTape(watch_accessed_variables=False) as tape,
    ):
        tape.watch(sources)
        loss = plain(None, training=True).loss
    _refuse_assigned(function, [v for v, _ in scope.updates])
    stock = tape.gradient(loss, sources)
    with _host_random.replaying(host_random):
        found = _passes.compute_loss_and_gradients(
            plain, _passes.read(variables), NO_BATCH
        )
    if wrong := [
        v
        for v, a, b in zip(variables, found.gradients, stock)
        if not _engines.are_close(a, b)
    ]:
        _refuse(
            "has other gradients with tensors in the place of the variables: "
            "it reads them behind a `tf.function`, or in a function with a "
            "gradient of its own, or it draws other numbers at each call",
            wrong,
        )


def _refuse(what: str, variables: Iterable[Any] = ()) -> NoReturn:
    paths = [v.path for v in variables]
    names = ", ".join(repr(path) for path in paths[:3])
    more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    received = f" with the weights {names}{more}" if paths else ""
    raise ValueError(f"`loss_fn` {what}. Received: loss_fn{received}")
