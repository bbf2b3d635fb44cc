"""The only owner of variables that a step leaves for the next.

`StepState` owns what is learnt and therefore saved: the states of rule, budget,
ascent and curvature estimator, what losses are compared with, and how much the
gradient has changed. `Numbers` owns what users assign between steps:
hyperparameters, which are saved with the model's config.
"""

from collections.abc import Callable
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_lesam._records import States
from keras_lesam._strategy import Strategy

# Components, in the order in which their states are made.
COMPONENTS = ("budget", "curvature", "ascent", "rule", "reference", "change")


class StepState:
    """The states of a model's steps, in variables with names.

    A name is `rule.mean.3`: the component, what it calls the state, and the
    position of the weight among the model's weights, whatever is frozen.

    Args:
        add_variable: Function `(value, name)` that makes a weight of the model.
    """

    def __init__(self, add_variable: Callable[[Any, str], Any]) -> None:
        self._add_variable = add_variable
        self._variables: dict[str, Any] = {}
        # Read from a file before the first batch said what there is.
        self._waiting: dict[str, Any] = {}
        # The names, in the structure of the states; `None` where there is none.
        self._names: States = {}

    @property
    def variables(self) -> dict[str, Any]:
        """All variables by name, in the order in which they were made."""
        return dict(self._variables)

    def build(self, initial: States, positions: list[int]) -> None:
        """Make the variables that are missing.

        Args:
            initial: The states before the first step.
            positions: Of the trainable variables among the model's weights,
                which lists of a state run parallel to.
        """

        def make(name: str, value: Any) -> str | None:
            if value is None:
                return None
            if name not in self._variables:
                variable = self._add_variable(value, name)
                self._variables[name] = variable
                if name in self._waiting:
                    _assign_checked(name, variable, self._waiting.pop(name))
            return name

        self._names = _map_names(make, initial, positions)

    def read(self) -> States:
        """Return the states as tensors."""
        return pack(
            self._names,
            {
                name: tf.convert_to_tensor(variable.value)
                for name, variable in self._variables.items()
            },
        )

    def assign(self, states: States, before: States) -> None:
        """Write the states of the next step; those that stay are not written.

        Args:
            states: What the step has returned.
            before: What the step was given.

        Raises:
            ValueError: if the states are not of the structure of those before.
        """
        shapes = {name: v.shape for name, v in self._variables.items()}
        found = unpack(self._names, states, shapes)
        old = unpack(self._names, before, shapes)
        for name, value in found.items():
            if value is not old[name]:
                self._variables[name].assign(value)

    def save(self, store: Any) -> None:
        """Write all values into a Keras store, by name."""
        for name, variable in self._variables.items():
            store[name] = keras.ops.convert_to_numpy(variable)
        for name, value in self._waiting.items():
            store[name] = value

    def load(self, store: Any) -> None:
        """Read what a store has of this state; the rest stays as it is.

        A file of another rule, or of none, has other names. Files of version
        0.1 number the variables in the order in which they are made here.

        Raises:
            ValueError: if a value has another shape than its variable.
        """
        names = set(store.keys())
        if names and all(name.isdecimal() for name in names):
            if len(names) != len(self._variables):
                return
            pairs = list(zip(map(str, range(len(names))), self._variables))
        else:
            pairs = [(name, name) for name in self._variables if name in names]
            self._waiting = {
                name: np.asarray(store[name])
                for name in names - set(self._variables)
                if name.startswith("reference.")
            }
        for key, name in pairs:
            _assign_checked(name, self._variables[name], store[key])


class Numbers:
    """Hyperparameters that may change between steps without a new trace.

    Args:
        strategies: Dict from names of attributes ("rule", "budget") to those
            whose `numbers` these are.
        dtype: Float dtype of all.
    """

    def __init__(self, strategies: dict[str, Strategy], dtype: Any) -> None:
        self._variables = {
            owner: {
                name: scalar_variable(value, dtype, name)
                for name, value in strategy.numbers().items()
            }
            for owner, strategy in strategies.items()
        }

    def assign(self, owner: str, strategy: Strategy) -> None:
        """Take over the numbers of a strategy that replaces another."""
        for name, value in strategy.numbers().items():
            self._variables[owner][name].assign(value)

    def bind(self, owner: str, strategy: Any) -> Any:
        """Return a strategy whose numbers are read from variables."""
        return strategy.with_numbers(
            {
                name: tf.convert_to_tensor(variable.value)
                for name, variable in self._variables[owner].items()
            }
        )


def add_variable(model: Any, value: Any, name: str) -> keras.Variable:
    """Make a weight of a model, one for all replicas: the mean of theirs.

    What a reference loss goes by is none: the weights would be more after a
    first batch than before, and those of the inner model no longer. Nor is how
    much the gradient changes, which the default goes by.
    """
    is_weight = not name.startswith(("reference.", "change."))
    make = model.add_weight if is_weight else keras.Variable
    variable = make(
        shape=tuple(value.shape),
        initializer=lambda shape, dtype: tf.cast(value, dtype),
        dtype=value.dtype.name,
        trainable=False,
        autocast=False,
        aggregation="mean",
        name=name,
    )
    if not is_weight:
        setattr(model._checkpointed, name.replace(".", "_"), variable)
    return variable


def scalar_variable(value: Any, dtype: Any, name: str) -> keras.Variable:
    """Make a number that may change between steps; it is not saved."""
    return keras.Variable(
        value,
        dtype=dtype,
        trainable=False,
        autocast=False,
        aggregation="only_first_replica",
        name=name,
    )


def scalar_dtype(*dtypes: str) -> str:
    """Return the dtype of norm, radius and budget: the weights', or float32."""
    wide = "float64" in (*dtypes, keras.config.floatx())
    return "float64" if wide else "float32"


def _assign_checked(name: str, variable: Any, value: Any) -> None:
    if tuple(value.shape) != tuple(variable.shape):
        raise ValueError(
            f"The state {name!r} in the file is that of another model. "
            f"Received: shape {tuple(value.shape)}, for a variable of "
            f"shape {tuple(variable.shape)}"
        )
    variable.assign(value)


def names_of(initial: States, positions: list[int]) -> States:
    """Return the names of states in their structure, `None` where is none.

    Args:
        initial: The states before the first step.
        positions: What lists of a state are numbered by.
    """
    return _map_names(
        lambda name, value: None if value is None else name, initial, positions
    )


def pack(names: States, values: Mapping[str, Any]) -> States:
    """Return the states that have these values by name."""
    return tf.nest.map_structure(
        lambda name: None if name is None else values[name], names
    )


def unpack(
    names: States, states: States, shapes: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the values of states by name.

    Args:
        names: What `names_of` or the like has returned.
        states: What a step has returned.
        shapes: The shape of each value, by name.

    Raises:
        ValueError: if the states are not of the structure or of the shapes of
            those before.
    """
    try:
        tf.nest.assert_same_structure(names, states)
    except (TypeError, ValueError) as error:
        raise ValueError(
            "`update` must return a state like the one it was given. "
            f"Received: {states}, where the state is {names}"
        ) from error
    pairs = zip(tf.nest.flatten(names), tf.nest.flatten(states))
    found = {name: value for name, value in pairs if name is not None}
    for name, value in found.items():
        expected = shapes[name]
        shape = getattr(value, "shape", None)
        if shape is None or not tf.TensorShape(expected).is_compatible_with(
            shape
        ):
            raise ValueError(
                "`update` must return a state like the one it was given. "
                f"Received: {name!r} of shape {shape}, where it was {expected}"
            )
    return found


def _map_names(
    function: Callable[[str, Any], Any], states: States, positions: list[int]
) -> States:
    """Return `function(name, value)` in place of each value."""

    def mapped(name: str, value: Any) -> Any:
        if not isinstance(value, list):
            return function(name, value)
        if len(value) != len(positions):
            raise ValueError(
                f"The state {name!r} must be a tensor, or a list like the "
                f"trainable variables. Received: a list of {len(value)}, for "
                f"{len(positions)} variables"
            )
        return [
            function(f"{name}.{i}", item) for i, item in zip(positions, value)
        ]

    return {
        component: {
            key: mapped(f"{component}.{key}", value)
            for key, value in states.get(component, {}).items()
        }
        for component in COMPONENTS
    }
