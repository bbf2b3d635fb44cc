"""How a wrapper looks to those who look at a model.

Callbacks, tuners, exporters and users read layers, inputs and attributes off
the model they are given. Given a wrapper, they find those of the model inside.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from keras_lesam import _calls
from keras_lesam import _files
from keras_lesam import _workarounds

# Attributes that training and saving give the wrapper: never the inner
# model's, which may have been trained by itself.
_OF_THE_WRAPPER = frozenset(
    {
        *("model", "optimizer", "loss", "compiled", "history"),
        *("steps_per_execution", "unrolled_steps_per_execution"),
        *("train_function", "test_function", "predict_function"),
        *("stop_training", "stop_evaluating", "stop_predicting"),
        *("save_assets", "load_assets"),
    }
)

# What only reads off the inner model: it says why it can't be assigned to.
_DESCRIBING_THE_MODEL = frozenset({"layers", "input", "output"})
# What Keras tracks where it is an attribute of a model.
_STATE = (
    keras.layers.Layer,
    keras.metrics.Metric,
    keras.random.SeedGenerator,
    keras.Variable,
)


def signature_of(method: Callable[..., Any]) -> Callable[..., Any]:
    """Give a method that forwards all its arguments another's signature.

    So that notebooks complete the arguments of `fit`, of whichever version of
    Keras is installed.
    """

    def decorate(forwarding: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forwarding)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            return forwarding(*args, **kwargs)

        wrapped.__signature__ = inspect.signature(method)  # type: ignore[attr-defined]
        return wrapped

    return decorate


class StandIn(_workarounds.ServableModel):
    """A model that is another one to all who look at it.

    Public attributes that only the inner model has are read from it and
    written to it. Private ones are not: Keras keeps its books in them, and the
    two models are two in these.

    Args:
        model: The `keras.Model` that it stands for.
        name: Name of the wrapper, or `None`.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Let Keras find the class in a file of the legacy HDF5 format.

        Which has but its name.
        """
        super().__init_subclass__(**kwargs)
        keras.saving.get_custom_objects().setdefault(cls.__name__, cls)
        _workarounds.know_name_without_package(cls)

    def __init__(self, model: keras.Model, name: str | None) -> None:
        if type(self).call is StandIn.call:
            # Before Keras looks: it goes by the names of the arguments.
            self.__dict__["call"] = _with_signature(self.call, model.call)
        # Its policy: `compile` scales the loss by it. It casts what comes in.
        super().__init__(name=name, dtype=model.dtype_policy, autocast=False)
        self.model = model
        self._loan = OptimizerLoan(model)
        self._saved_state = _files.SavedState(self)

    # Attributes.

    def __getattr__(self, name: str) -> Any:
        """Read an attribute that only the inner model has."""
        model = vars(self).get("model")
        if hasattr(type(self), name):
            # A property that has failed: say why.
            return super().__getattribute__(name)
        if model is None or name.startswith("_") or name in _OF_THE_WRAPPER:
            raise AttributeError(
                f"{type(self).__name__!r} object has no attribute {name!r}"
            )
        return getattr(model, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute, where it is."""
        if _is_of_model(self, name, value):
            setattr(self.model, name, value)
        else:
            super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        """Delete an attribute, where it is."""
        if _is_of_model(self, name):
            delattr(self.model, name)
        else:
            super().__delattr__(name)

    def __dir__(self) -> list[str]:
        """List the attributes of both, as Keras does to name what it saves."""
        return [*super().__dir__(), *_files.names_of(self.model)]

    @property
    def layers(self) -> list[Any]:
        """Layers of the inner model."""
        return self.model.layers

    @signature_of(keras.Model.get_layer)
    def get_layer(self, *args: Any, **kwargs: Any) -> Any:
        """Return a layer of the inner model, by name or index."""
        return self.model.get_layer(*args, **kwargs)

    @property
    def input(self) -> Any:
        """Symbolic input of the inner model."""
        # Or of the wrapper, if that is what was called, as a layer.
        called: Any = self.model if hasattr(self.model, "input") else super()
        return called.input

    @property
    def output(self) -> Any:
        """Symbolic output of the inner model."""
        called: Any = self.model if hasattr(self.model, "output") else super()
        return called.output

    @property
    def trainable(self) -> bool:
        """Whether the inner model is trainable; may be assigned to."""
        model = vars(self).get("model")
        return keras.Model.trainable.fget(self if model is None else model)

    @trainable.setter
    def trainable(self, value: bool) -> None:
        keras.Model.trainable.fset(self, value)

    @property
    def supports_masking(self) -> bool:
        """Whether the inner model passes masks on."""
        return self.model.supports_masking

    @supports_masking.setter
    def supports_masking(self, value: bool) -> None:
        self.model.supports_masking = value

    def compute_mask(self, *args: Any, **kwargs: Any) -> Any:
        """Return the inner model's mask."""
        return self.model.compute_mask(*args, **kwargs)

    @signature_of(keras.Model.summary)
    def summary(self, *args: Any, **kwargs: Any) -> None:
        """Print the summary of the inner model."""
        self.model.summary(*args, **kwargs)

    @signature_of(keras.Model.quantize)
    def quantize(self, *args: Any, **kwargs: Any) -> None:
        """Quantize the inner model."""
        self.model.quantize(*args, **kwargs)
        self.train_function = None
        self.test_function = None
        self.predict_function = None

    # Calling and building.

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """Return the inner model's outputs."""
        _calls.watch(self, kwargs.get("training"))
        with self._lent_optimizer():
            return self.model(*args, **_without_empty_masks(kwargs))

    def compute_output_shape(self, *args: Any, **kwargs: Any) -> Any:
        """Return the shape of the inner model's outputs."""
        return self.model.compute_output_shape(*args, **kwargs)

    def compute_output_spec(self, *args: Any, **kwargs: Any) -> Any:
        """Return shape and dtype of the inner model's outputs."""
        return self.model.compute_output_spec(*args, **kwargs)

    def _lent_optimizer(self) -> Any:
        """Return a context in which the inner model has our optimizer."""
        return self._loan(vars(self).get("optimizer"))

    @property
    def built(self) -> bool:
        """Whether the inner model is built."""
        model = vars(self).get("model")
        return model is not None and bool(model.built)

    @built.setter
    def built(self, value: bool) -> None:
        """Leave it to the inner model: Keras says so of whoever was called."""

    def build(self, input_shape: Any = None, *args: Any, **shapes: Any) -> None:
        """Build the inner model, and what is saved of the training.

        Args:
            input_shape: Shape of the first input, or a nest of shapes.
            args: Shapes of the others.
            shapes: Shapes by name, `b_shape` for an input `b`.

        Raises:
            ValueError: if that cannot be done by shapes alone.
        """
        if input_shape is not None or not shapes:
            args = (input_shape, *args)
        if self.built:
            if _is_of_another_shape(self.model, input_shape):
                self.model.build(*args, **shapes)  # It refuses.
            return
        if type(self.model).build is keras.Model.build:
            _build_by_call(self.model, args, shapes)
        else:
            self.model.build(*args, **shapes)
        if self.built and tf.executing_eagerly():
            self._build_state()

    # As Keras's own: a call is to build by what it was called with.
    vars(build).update(vars(keras.layers.Layer.build))

    def get_build_config(self) -> Any:
        """Return how the inner model was built."""
        return self.model.get_build_config()

    def build_from_config(self, config: Any) -> None:
        """Build as `get_build_config` says, unless the inner model is built."""
        if not config or self.built:
            return
        own = type(self.model).build_from_config
        if own is not keras.Model.build_from_config:
            self.model.build_from_config(config)
            self._build_state()
        elif "shapes_dict" in config:
            self.build(**config["shapes_dict"])
        else:
            self.build(config["input_shape"])

    # Files: those of the inner model, and beside it the state of the training.

    @signature_of(keras.Model.save_weights)
    def save_weights(self, filepath: Any, *args: Any, **kwargs: Any) -> None:
        """Save weights, state and optimizer; the inner model can load it."""
        super().save_weights(filepath, *args, **kwargs)
        _files.share_with_inner_model(filepath)

    @signature_of(keras.Model.load_weights)
    def load_weights(self, filepath: Any, *args: Any, **kwargs: Any) -> None:
        """Load weights that the wrapper, or the inner model, has saved."""
        failure = None
        if _files.is_of_wrapper(filepath, self.model):
            try:
                super().load_weights(filepath, *args, **kwargs)
                return
            except ValueError as error:
                # Keras came by each layer twice, and says what was wrong the
                # second time: the inner model says what it was at first.
                failure = error
        with self._lent_optimizer():
            self.model.load_weights(filepath, *args, **kwargs)
        if failure is not None:
            raise failure

    def save_own_variables(self, store: Any) -> None:
        """Save those of the inner model itself."""
        self.model.save_own_variables(store)

    def load_own_variables(self, store: Any) -> None:
        """Load those of the inner model itself."""
        if _files.is_of_0_1(getattr(store, "h5_file", ()), self.model):
            _files.read_as_0_1(store, self.model)
            self._load_state(store)
        else:
            self.model.load_own_variables(store)

    def _build_state(self) -> None:
        """Make the variables of the training; here there are none."""

    def _save_state(self, store: Any) -> None:
        """Save the state of the training; here there is none."""

    def _load_state(self, store: Any) -> None:
        """Load the state of the training; here there is none."""

    @signature_of(keras.Model.export)
    def export(self, filepath: Any, *args: Any, **kwargs: Any) -> Any:
        """Export the inner model, as `keras.Model.export` would.

        The artifact has its input names and needs neither this package nor
        Keras to serve.
        """
        return self.model.export(filepath, *args, **kwargs)


class OptimizerLoan:
    """Lends a model the optimizer it is trained with, for as long as a pass.

    Its own, of another training, is neither lost nor saved with the wrapper's.

    Args:
        model: Whose `optimizer` it is to be.
    """

    def __init__(self, model: keras.Model) -> None:
        self._attributes = vars(model)
        self._before: dict[str, Any] = {}
        self._optimizer: Any = None
        # Replicas take turns in a pass.
        self._users = 0

    def __call__(self, optimizer: Any) -> "OptimizerLoan":
        """Return the context of one loan."""
        self._optimizer = optimizer
        return self

    def __enter__(self) -> None:
        """Lend, unless it is lent already."""
        self._users += 1
        if self._users == 1 and self._optimizer is not None:
            names = {"optimizer"} & set(self._attributes)
            self._before = {name: self._attributes[name] for name in names}
            self._attributes["optimizer"] = self._optimizer

    def __exit__(self, *exception: Any) -> None:
        """Take back, when the last has done."""
        self._users -= 1
        if self._users == 0 and self._optimizer is not None:
            self._attributes.pop("optimizer", None)
            self._attributes.update(self._before)


def _is_of_another_shape(model: keras.Model, shape: Any) -> bool:
    """Return whether a model was built for inputs that `shape` excludes."""
    is_shape = isinstance(shape, list | tuple) and all(
        size is None or isinstance(size, int) for size in shape
    )
    if not is_shape or not isinstance(model, keras.Sequential):
        return False
    # Without one where a layer could not tell the shape of its output.
    built_for = getattr(model, "input_shape", None)
    return built_for is None or not tf.TensorShape(
        built_for
    ).is_compatible_with(tf.TensorShape([*shape]))


def _is_of_model(wrapper: StandIn, name: str, value: Any = None) -> bool:
    """Return whether the inner model is to be asked for an attribute.

    It is if the wrapper does not have it; and state that is attached to a built
    model, is for that model to take or to refuse.
    """
    model = vars(wrapper).get("model")
    if model is None or name.startswith("_") or name in _OF_THE_WRAPPER:
        return False
    if name in _DESCRIBING_THE_MODEL:
        return True
    if name in vars(wrapper) or hasattr(type(wrapper), name):
        return False
    return hasattr(model, name) or (model.built and _has_state(value))


def _has_state(value: Any) -> bool:
    """Return whether Keras would track something in a nest of values."""
    return any(isinstance(leaf, _STATE) for leaf in keras.tree.flatten(value))


def _with_signature(
    method: Callable[..., Any], like: Callable[..., Any]
) -> Callable[..., Any]:
    """Return a function that calls `method`, with the arguments of `like`."""

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        return method(*args, **kwargs)

    call.__signature__ = inspect.signature(like)  # type: ignore[attr-defined]
    return call


def _without_empty_masks(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Leave out the nests of `None` that Keras reads off inputs as masks.

    The inner model reads them itself; older versions of Keras take such a nest
    for an input.
    """
    return {
        name: value
        for name, value in kwargs.items()
        if not name.endswith("mask")
        or value is None
        or any(leaf is not None for leaf in keras.tree.flatten(value))
    }


def _build_by_call(
    model: keras.Model, shapes: tuple[Any, ...], by_name: dict[str, Any]
) -> None:
    """Build a model without `build` of its own, by calling it on symbols."""

    def symbols(shape: Any) -> Any:
        return keras.tree.map_shape_structure(keras.KerasTensor, shape)

    inputs = {
        name.removesuffix("_shape"): symbols(shape)
        for name, shape in by_name.items()
    }
    try:
        with keras.name_scope(model.name, caller=model):
            model.compute_output_spec(*map(symbols, shapes), **inputs)
    except Exception as error:
        raise ValueError(
            f"The model {model.name!r} cannot be built by shapes alone; call "
            f"it on a batch. Received: {(*shapes, *by_name.items())}"
        ) from error
    model.build([*shapes, *by_name.values()][0])
