"""Which of a model's weights and state the stateless passes cannot see.

A pass inside a `keras.StatelessScope` gives the model tensors in place of its
variables. Some code goes past that: a `tf.function` that was traced before
reads the variables themselves; `tf.custom_gradient` (and `keras.remat`, which
is made of it) differentiates by its arguments and by variables, and takes a
tensor that it closes over for a constant; state that is written inside of a
branch or a loop cannot be carried out of it as a tensor.

All of that can be seen in the graph of a stock pass, which is traced and never
run: with variables, and hence as plain Keras would train.
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import keras
import tensorflow as tf

from keras_lesam import _calls
from keras_lesam._data import Batch

_CALLS = ("PartitionedCall", "StatefulPartitionedCall")
_CUSTOM_GRADIENT = b"CustomGradient"


class StockPass(NamedTuple):
    """The graph of a stock pass forward.

    Attributes:
        graph: A `tf.Graph` that was never run.
        operations: Its operations up to the loss, without the metrics'.
        outputs: What the model returned.
    """

    graph: Any
    operations: list[Any]
    outputs: Any = None


class Findings(NamedTuple):
    """What the stateless passes of a model cannot see.

    Attributes:
        hidden: Variables that are read behind a `tf.function`.
        has_nested_state: Whether state is written in a branch, a loop or a
            function.
        assigned: Trainable variables that the model itself assigns.
        closures: Trainable variables that a function with a gradient of its
            own uses: as arguments, which can be seen, or not.
        accessed: Variables of any kind that a pass uses.
    """

    hidden: list[Any]
    has_nested_state: bool
    assigned: list[Any]
    closures: list[Any]
    accessed: list[Any]


def trace_stock_pass(
    model: keras.Model,
    batch: Batch,
    compute_loss: Callable[..., Any],
    training: bool = True,
) -> StockPass:
    """Trace a pass as plain Keras would make it, metrics included.

    It creates what waits for a first batch, and changes nothing.

    Args:
        model: A compiled Keras model.
        batch: A `Batch`.
        compute_loss: Function `(model, batch, outputs, training)`.
        training: Whether it is a pass of the training; if not, it is one of
            inference, without loss and metrics, in which nothing is written.
    """
    operations: list[Any] = []
    returned: list[Any] = []

    # The batch is an argument: of constants a branch would be taken at once.
    def touch(batch: Batch) -> None:
        outputs = _calls.outputs(model, batch.x, training)
        returned.append(outputs)
        if training:
            compute_loss(model, batch, outputs, training=True)
        graph = tf.compat.v1.get_default_graph()
        # A function that makes variables is traced twice.
        operations[:] = graph.get_operations()
        if training:
            model.compute_metrics(
                batch.x, batch.y, outputs, sample_weight=batch.sample_weight
            )

    function = tf.function(touch, autograph=False)
    graph = function.get_concrete_function(batch).graph
    return StockPass(graph, operations, returned[-1])


def inspect(model: keras.Model, stock: StockPass) -> Findings:
    """Return what the stateless passes of `model` cannot see.

    Args:
        model: The model that was traced.
        stock: What `trace_stock_pass` returned.
    """
    trainable = [*model.trainable_variables]
    # A loss of several outputs writes a metric for each.
    variables = [*model.variables, *model.metrics_variables]
    by_handle = variables_by_handle(stock, variables)
    nested = [*nested_nodes(stock, stock.operations)]
    hidden = [
        variable
        for operation in stock.operations
        if operation.type in _CALLS
        for variable in variables_read(operation, by_handle)
    ]
    if any(_calls_with_variables(node, stock) for node in nested):
        hidden += [v for v in trainable if id(v) not in _ids(hidden)]
    assigned = [
        variable
        for operation in stock.operations
        if is_assignment(operation.type)
        for variable in variables_read(operation, by_handle)
    ]
    return Findings(
        hidden=_unique(hidden),
        has_nested_state=any(is_assignment(node.op) for node in nested),
        assigned=[v for v in _unique(assigned) if id(v) in _ids(trainable)],
        closures=_closures(stock, by_handle, nested, trainable),
        accessed=_unique(by_handle.values()),
    )


def has_nested_metrics(stock: StockPass) -> bool:
    """Return whether metrics go past the stateless scope.

    Those that are written in a branch or a loop, or used by a `tf.function`,
    which keeps what it was traced with.
    """
    metrics = stock.graph.get_operations()[len(stock.operations) :]
    nested = [*nested_nodes(stock, metrics)]
    nodes = [*(operation.node_def for operation in metrics), *nested]
    return any(is_assignment(node.op) for node in nested) or any(
        _calls_with_variables(node, stock) for node in nodes
    )


def variables_by_handle(
    stock: StockPass, variables: Sequence[Any]
) -> dict[str, Any]:
    """Return the variables by the names of the handles that the graph uses."""
    known = {id(h): v for v in variables for h in _handles(v.value)}
    return {
        internal.name: known[id(external)]
        for external, internal in stock.graph.captures
        if id(external) in known
    }


def _handles(value: Any) -> list[Any]:
    """Return the handles of a variable: of its copies, outside of a replica."""
    copies = [value]
    if (
        isinstance(value, tf.distribute.DistributedValues)
        and tf.distribute.in_cross_replica_context()
    ):
        strategy = tf.distribute.get_strategy()
        copies = list(strategy.experimental_local_results(value))
    return [copy.handle for copy in copies if hasattr(copy, "handle")]


def variables_read(operation: Any, by_handle: dict[str, Any]) -> list[Any]:
    """Return the variables whose handles an operation is given."""
    return [by_handle[t.name] for t in operation.inputs if t.name in by_handle]


def is_assignment(kind: str) -> bool:
    """Return whether operations of a type write a variable."""
    return kind.startswith("Assign") or kind.startswith("ResourceScatter")


def nested_nodes(stock: StockPass, operations: list[Any]) -> Iterable[Any]:
    """Yield the nodes of all functions that operations of the graph use."""
    library = _library(stock)
    names = [
        name
        for operation in operations
        for name in _functions_of(operation.node_def)
    ]
    done: set[str] = set()
    while names:
        name = names.pop()
        if name in done or name not in library:
            continue
        done.add(name)
        for node in library[name].node_def:
            names += _functions_of(node)
            yield node


def _library(stock: StockPass) -> dict[str, Any]:
    functions = stock.graph.as_graph_def().library.function
    return {function.signature.name: function for function in functions}


def _functions_of(node: Any) -> list[str]:
    """Return the names of the functions that a node calls."""
    names = []
    for attribute in node.attr.values():
        if attribute.HasField("func"):
            names.append(attribute.func.name)
        names += [function.name for function in attribute.list.func]
    return names


def _calls_with_variables(node: Any, stock: StockPass) -> bool:
    """Return whether a node is a call that is given a resource."""
    if node.op not in _CALLS:
        return False
    types = node.attr["Tin"].list.type
    return tf.resource.as_datatype_enum in types


def _closures(
    stock: StockPass,
    by_handle: dict[str, Any],
    nested: list[Any],
    trainable: list[Any],
) -> list[Any]:
    """Return trainable variables that functions with own gradients read.

    TensorFlow hands such a function's arguments, and the variables that it
    closes over, to one operation with the results.
    """
    if any(has_own_gradient(node) for node in nested):
        return trainable
    used = [
        variable
        for operation in stock.operations
        if has_own_gradient(operation.node_def)
        for tensor in operation.inputs
        for variable in variables_behind(tensor.op, by_handle)
    ]
    return [v for v in _unique(used) if id(v) in _ids(trainable)]


def variables_behind(operation: Any, by_handle: dict[str, Any]) -> list[Any]:
    """Return the variable that an operation reads, casts between left out."""
    operation = source_of(operation)
    if operation.type != "ReadVariableOp":
        return []
    return variables_read(operation, by_handle)


def source_of(operation: Any) -> Any:
    """Return the operation whose result one hands on, or casts."""
    while operation.type in ("Identity", "Cast") and operation.inputs:
        operation = operation.inputs[0].op
    return operation


def has_own_gradient(node: Any) -> bool:
    """Return whether a node is a function with a gradient of its own."""
    name = node.attr["_gradient_op_type"].s
    return bool(name.startswith(_CUSTOM_GRADIENT))


def _unique(variables: Iterable[Any]) -> list[Any]:
    return list({id(v): v for v in variables}.values())


def _ids(variables: Iterable[Any]) -> set[int]:
    return {id(v) for v in variables}
