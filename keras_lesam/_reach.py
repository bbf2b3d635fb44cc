"""Which operations of a traced function its arguments can have a say in."""

from collections.abc import Iterable
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

# Operations whose outputs do not change with small changes of their inputs.
_CONSTANT = {
    "ArgMax",
    "ArgMin",
    "Equal",
    "Greater",
    "GreaterEqual",
    "Less",
    "LessEqual",
    "NotEqual",
    "OnesLike",
    "Rank",
    "Shape",
    "ShapeN",
    "Size",
    "StopGradient",
    "ZerosLike",
}


class Operation(NamedTuple):
    """An operation of a graph.

    Attributes:
        type: Its type, such as `"MatMul"`.
        name: Its name, of the layers that it belongs to and what it does.
        function: The name of the function that it is in, `""` for none.
    """

    type: str
    name: str
    function: str


def reached(
    function: Any, count: int, variables: Sequence[Any] = ()
) -> list[Operation]:
    """Return the operations that depend on arguments of a function.

    Loops, branches and functions that depend on one are taken to do so in all
    that they do with their arguments.

    Args:
        function: A concrete function.
        count: How many of its arguments are meant, from the first on.
        variables: Keras variables: where the function reads them itself, it
            depends on them, too.
    """
    definition = function.graph.as_graph_def()
    bodies = {f.signature.name: f for f in definition.library.function}
    found = _dependent(
        definition.node, _sources(function, count, variables), ""
    )
    operations = [*found]
    done: set[str] = set()
    while found:
        names = {name for node, _ in found for name in _functions(node)}
        found = []
        for name in sorted(names & bodies.keys() - done):
            done.add(name)
            body = bodies[name]
            arguments = {argument.name for argument in body.signature.input_arg}
            found += _dependent(body.node_def, arguments, name)
        operations += found
    return [Operation(node.op, node.name, name) for node, name in operations]


def _sources(function: Any, count: int, variables: Sequence[Any]) -> set[str]:
    """Return the names of the arguments that stand for weights."""
    captured = function.captured_inputs
    inner = function.inputs[len(function.inputs) - len(captured) :]
    handles = {id(getattr(v.value, "handle", None)) for v in variables}
    return {tensor.op.name for tensor in function.inputs[:count]} | {
        tensor.op.name
        for tensor, outer in zip(inner, captured)
        if id(outer) in handles
    }


def _dependent(
    nodes: Iterable[Any], sources: set[str], function: str
) -> list[tuple[Any, str]]:
    """Return the nodes of a graph that depend on some of its names."""
    known = set(sources)
    found: list[tuple[Any, str]] = []
    pending = [*nodes]
    while True:
        new = [n for n in pending if known & _inputs(n)]
        if not new:
            return found
        known |= {n.name for n in new if n.op not in _CONSTANT}
        names = {n.name for n in new}
        pending = [n for n in pending if n.name not in names]
        found += [(n, function) for n in new]


def _inputs(node: Any) -> set[str]:
    """Return the names of the nodes whose outputs a node takes."""
    return {i.split(":")[0] for i in node.input if not i.startswith("^")}


def _functions(node: Any) -> set[str]:
    """Return the names of the functions that a node calls."""
    names = set()
    for value in node.attr.values():
        names.add(value.func.name)
        names |= {f.name for f in value.list.func}
    return names - {""}
