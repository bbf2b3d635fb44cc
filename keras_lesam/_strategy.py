"""Base of rules, budgets, ascents and curvature estimators.

All four are immutable objects that keep the arguments they were made with, and
nothing else. What changes from step to step is state, which is passed to their
methods and returned.
"""

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any
from typing import NoReturn
from typing import TypeVar

import keras

S = TypeVar("S", bound="Strategy")


class Strategy:
    """An immutable object that is saved as its constructor's arguments.

    Subclass it with a constructor of your own, and nothing else has to be
    said: `get_config`, `from_config`, `repr` and `replace` go by the
    arguments. Attributes can be set in the constructor only.
    """

    _arguments: dict[str, Any]
    _is_frozen = False
    # Arguments that `repr` leaves out while they are `None`.
    _options: tuple[str, ...] = ()

    def __init__(self) -> None:
        pass

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls):
            setattr(cls, "__init__", _recorded(vars(cls)["__init__"]))  # noqa: B010

    def get_config(self) -> dict[str, Any]:
        """Return the arguments of the constructor, serialized."""
        return {
            name: keras.saving.serialize_keras_object(value)
            for name, value in self._arguments.items()
        }

    @classmethod
    def from_config(
        cls: type[S],
        config: dict[str, Any],
        custom_objects: dict[str, Any] | None = None,
    ) -> S:
        """Make the object of a `get_config`.

        Raises:
            TypeError: if it is none, or lacks an argument, or has another.
        """
        _check_config(cls, config)
        arguments = {
            name: keras.saving.deserialize_keras_object(
                value, custom_objects=custom_objects
            )
            if isinstance(value, dict)
            else value
            for name, value in config.items()
        }
        return cls(**arguments)

    def replace(self: S, **changes: Any) -> S:
        """Return the same kind of object with some arguments changed."""
        _check_changes(self, changes)
        return type(self)(**{**self._arguments, **changes})

    def numbers(self) -> dict[str, float]:
        """Return the attributes that a model may change between two steps.

        A model keeps each in a variable and hands it to the methods of the
        step as a scalar tensor, so that a new value needs no new trace.
        """
        return {}

    def with_numbers(self: S, tensors: dict[str, Any]) -> S:
        """Return a copy whose `numbers` are tensors, for use in a step."""
        bound = copy.copy(self)
        vars(bound).update(tensors)
        return bound

    def __setattr__(self, name: str, value: Any) -> None:
        if self._is_frozen:
            self._refuse_assignment(name, value)
        super().__setattr__(name, value)

    def _refuse_assignment(self, name: str, value: Any) -> NoReturn:
        raise AttributeError(
            f"{type(self).__name__} is immutable: make a new one with "
            f"`.replace({name}={value!r})`. What a model uses is changed by "
            "the model's own attributes (`model.sigma`, `model.rho`, "
            f"`model.rho_max`). Received: {name}={value!r}"
        )

    def __repr__(self) -> str:
        arguments = [
            f"{k}={v!r}"
            for k, v in self._arguments.items()
            if not (v is None and k in self._options)
        ]
        return f"{type(self).__name__}({', '.join(arguments)})"


def _check_changes(strategy: Any, changes: dict[str, Any]) -> None:
    """Raise `TypeError` for what is no argument of a strategy's."""
    known = strategy._arguments
    unknown = sorted(set(changes) - set(known))
    if unknown:
        raise TypeError(
            f"{type(strategy).__name__} has no argument `{unknown[0]}`, but "
            f"{', '.join(known) or 'none'}. Received: {unknown[0]}="
            f"{changes[unknown[0]]!r}"
        )


def _check_config(cls: type, config: Any) -> None:
    """Raise `TypeError` for what are not the arguments of a constructor."""
    if not isinstance(config, dict):
        raise TypeError(
            f"`config` must be a dict of the arguments of {cls.__name__}. "
            f"Received: config of type {type(config).__name__}"
        )
    try:
        inspect.signature(cls).bind(**config)
    except TypeError as error:
        raise TypeError(
            f"`config` must have the arguments of {cls.__name__}: {error}. "
            f"Received: config with {sorted(config, key=str)}"
        ) from None


def _recorded(init: Callable[..., None]) -> Callable[..., None]:
    """Make a constructor record its arguments, and freeze what it made.

    The outermost constructor counts: those that it calls by `super()` don't.
    """
    signature = inspect.signature(init)

    @functools.wraps(init)
    def wrapped(self: Strategy, *args: Any, **kwargs: Any) -> None:
        if "_arguments" in vars(self):
            init(self, *args, **kwargs)
            return
        vars(self)["_arguments"] = _bind(signature, self, args, kwargs)
        init(self, *args, **kwargs)
        vars(self)["_is_frozen"] = True

    return wrapped


def _bind(
    signature: inspect.Signature,
    strategy: Strategy,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> dict[str, Any]:
    """Return all arguments by name, defaults included."""
    bound = signature.bind(strategy, *args, **kwargs)
    bound.apply_defaults()
    arguments: dict[str, Any] = {}
    for parameter in list(signature.parameters.values())[1:]:
        value = bound.arguments[parameter.name]
        if parameter.kind is parameter.VAR_KEYWORD:
            arguments.update(value)
        elif parameter.kind is not parameter.VAR_POSITIONAL:
            arguments[parameter.name] = value
        elif value:
            raise TypeError(
                f"{type(strategy).__name__} cannot be saved with arguments "
                f"that have no name: give each a name. Received: *{value!r}"
            )
    return arguments


Strategy.__init__ = _recorded(Strategy.__init__)  # type: ignore[method-assign]
