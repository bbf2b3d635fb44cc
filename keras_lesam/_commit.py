"""What a step writes: all of it together, after all else is done.

An exception anywhere in the passes, in the loss, a rule or a metric leaves
every variable as the step before has left it. In Python that is a matter of
order. In a graph, operations run as soon as their inputs are there, and an
assertion is nobody's input: what is written waits for all of them.
"""

import contextlib
from collections.abc import Callable
from collections.abc import Iterator
from typing import Any

import keras
import tensorflow as tf

from keras_lesam import _passes
from keras_lesam._passes import ModelState
from keras_lesam._vectors import Tensors

# Operations that look at state, and that are left out where nobody needs them.
_READS = ("ReadVariableOp", "ResourceGather", "VarHandleOp")


class Commit:
    """Takes note of what a step is to write, and writes it at the end.

    To be made at the start of the step, of each replica for itself.
    """

    def __init__(self) -> None:
        self._graph = _graph()
        # Replicas share a graph, and must not wait for each other in turns.
        self._start = len(self._graph.get_operations()) if self._graph else 0
        self._variables: list[Any] = []

    def note(
        self,
        state: ModelState,
        update: Callable[[], Any],
        can_wait: bool,
    ) -> tuple[list[Any], Any]:
        """Take note of a state, and of what `update` writes.

        May be called in each of several branches, of which one is run.

        Args:
            state: List of `(variable, tensor)`.
            update: Function that updates metrics, and sees the state.
            can_wait: Whether all that it writes can be carried out of it. If
                not it writes by itself, as soon as all before it is done.

        Returns:
            `(values, result)`: tensors, for `write`; what `update` returned.

        Raises:
            ValueError: if branches write other variables.
        """
        if can_wait:
            with _passes.RecordingScope([]) as scope:
                for pair in state:
                    scope.add_update(pair)
                result = update()
            state = scope.updates
        else:
            with self._after([value for _, value in state]):
                result = update()
        values = {id(v): (v, tf.convert_to_tensor(x)) for v, x in state}
        if not self._variables:
            self._variables = [v for v, _ in values.values()]
        if values.keys() != {id(v) for v in self._variables}:
            raise ValueError(
                "All steps that an ascent reports must write the same "
                f"variables. Received: {[v.path for v, _ in values.values()]} "
                f"after {[v.path for v in self._variables]}"
            )
        return [values[id(v)][1] for v in self._variables], result

    def write(
        self,
        model: keras.Model,
        gradients: Tensors,
        values: list[Any],
        assign: Callable[[], None],
    ) -> None:
        """Apply the gradients and write the rest, once all else is done.

        An optimizer that fails leaves what it leaves in plain Keras, and
        nothing else.

        Args:
            model: The model, whose optimizer is given the gradients.
            gradients: List like its trainable variables.
            values: What `note` returned.
            assign: Function that assigns the rest.
        """
        with _passes.RecordingScope([]) as scope:
            assign()
        variables = model.trainable_variables
        noted = [*zip(self._variables, values)]
        # Weights that the model itself assigns are those to be updated.
        trainable = {id(v) for v in variables}
        assigned = [(v, x) for v, x in noted if id(v) in trainable]
        others = [(v, x) for v, x in noted if id(v) not in trainable]
        with self._after([gradients, values, [x for _, x in scope.updates]]):
            _passes.commit(assigned)
            model.optimizer.apply_gradients(zip(gradients, variables))
        with self._after([]):
            _passes.commit([*others, *scope.updates])

    def write_state(self, values: list[Any], tensors: Any) -> None:
        """Write what was noted alone, once a nest of tensors is computed.

        Args:
            values: What `note` returned.
            tensors: Nest of tensors, what the step is to return.
        """
        with self._after([values, tensors]):
            _passes.commit([*zip(self._variables, values)])

    @contextlib.contextmanager
    def _after(self, values: Any) -> Iterator[None]:
        """Let what is made in the context run after all that was made before.

        After all that acts by itself in this step, and the tensors of a nest.
        """
        graph = _graph()
        if graph is None:
            yield
            return
        start = self._start if graph is self._graph else 0
        acts = [o for o in graph.get_operations()[start:] if _acts(o)]
        tensors = tf.nest.flatten(values, expand_composites=True)
        # One operation in between, not all of them before each that follows.
        with tf.control_dependencies(
            [*acts, *(t for t in tensors if t is not None)]
        ):
            done = tf.no_op()
        with tf.control_dependencies([done]):
            yield


def _acts(operation: Any) -> bool:
    """Return whether an operation runs though nobody needs its outputs."""
    return operation.op_def.is_stateful and operation.type not in _READS


def _graph() -> Any:
    """Return the graph being built, or `None` where operations run at once."""
    if tf.executing_eagerly():
        return None
    return tf.compat.v1.get_default_graph()
