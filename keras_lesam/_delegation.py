"""How a wrapper stands in for the model it wraps.

A subclass of `keras.Model` may override parts of training. Each is either
delegated to (it works as it would without the wrapper) or refused (it cannot
be reconciled with a wrapper that trains it in another way); none is silently
ignored.
"""

import functools
import inspect
from collections.abc import Callable
from collections.abc import Iterator
from typing import Any

import keras
import tensorflow as tf

from keras_lesam import _passes
from keras_lesam import _workarounds
from keras_lesam._data import Batch

# They decide what a step does, which is what the wrapper is there to decide.
_REFUSED = (
    "train_step",
    "test_step",
    "fit",
    "evaluate",
    "train_on_batch",
    "test_on_batch",
    "make_train_function",
    "make_test_function",
    # They would be passed by: the wrapper does these by itself.
    "compile",
    "predict",
    "predict_on_batch",
    "make_predict_function",
)
_DELEGATED = ("compute_loss", "compute_metrics")


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


class DelegatingModel(_workarounds.MultiWorkerModel):
    """A model that is another one to all who look at it.

    Trained by itself, it trains the other one as that would train itself.

    Args:
        model: The `keras.Model` that it stands for.
        name: Name of the wrapper, or `None`.

    Attributes:
        model: The inner model itself, never a copy.

    Raises:
        TypeError: if `model` is no Keras model.
        ValueError: if it has training logic that cannot be honoured, or was
            made in another `strategy.scope()`.
    """

    def __init__(self, model: keras.Model, name: str | None = None) -> None:
        _check_model(model)
        if name is not None and not isinstance(name, str):
            raise TypeError(f"`name` must be a string. Received: name={name!r}")
        # The inner model's policy: it decides whether `compile` scales the
        # loss. No autocast: what comes in is for the inner model to cast.
        super().__init__(name=name, dtype=model.dtype_policy, autocast=False)
        self.model = model
        if model.built:
            self.built = True

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """Return the inner model's outputs."""
        del training  # The inner model sees it in the call's context.
        return self.model(inputs)

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> Any:
        """Return the loss that `fit` minimises; the inner model's own."""
        if not has_own_loss_or_metrics(self.model):
            return super().compute_loss(x, y, y_pred, sample_weight, training)
        batch = Batch(x, y, sample_weight)
        return _passes.compute_loss(self.model, batch, y_pred, training)

    def compute_metrics(
        self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None
    ) -> Any:
        """Update and return the metrics; the inner model's, if it has any."""
        if not has_own_loss_or_metrics(self.model):
            return super().compute_metrics(x, y, y_pred, sample_weight)
        results = self.model.compute_metrics(x, y, y_pred, sample_weight)
        return {**results, **self.get_metrics_result()}

    def test_step(self, data: Any) -> Any:
        """Take the stock step."""
        return _workarounds.reducible(super().test_step(data))

    def predict_step(self, data: Any) -> Any:
        """Take the inner model's."""
        return self.model.predict_step(data)

    @property
    def metrics(self) -> list[Any]:
        """Metrics of both models."""
        metrics = super().metrics
        if has_own_loss_or_metrics(self.model):
            metrics = [m for m in metrics if m.name == "loss"]
        return metrics + _own_metrics(self.model)

    def reset_metrics(self) -> None:
        """Reset all metrics, the inner model's too."""
        super().reset_metrics()
        if has_own_loss_or_metrics(self.model):
            self.model.reset_metrics()

    @property
    def output_names(self) -> Any:
        """Names of the inner model's outputs, for dicts of losses."""
        return self.model.output_names

    @signature_of(keras.Model.compile)
    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile as `keras.Model.compile`, for the inner model's precision.

        An inner model with `compute_loss` or `compute_metrics` of its own is
        compiled along, without an optimizer, so that they can call `super()`.

        Raises:
            ValueError: for what Keras cannot do on several replicas: gradient
                accumulation, several steps per execution, XLA.
        """
        stock = super().compile
        given = inspect.signature(stock).bind(*args, **kwargs).arguments
        _workarounds.refuse_limits_of_keras(self.distribute_strategy, given)
        stock(*args, **kwargs)
        if has_own_loss_or_metrics(self.model):
            _compile_along(self.model, given)

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compile as the model in a saved file was compiled."""
        config = keras.saving.deserialize_keras_object(config)
        self.compile(**config)
        if self.optimizer is not None and self.built:
            self.optimizer.build(self.trainable_variables)

    @signature_of(keras.Model.export)
    def export(self, filepath: Any, *args: Any, **kwargs: Any) -> Any:
        """Export the inner model, as `keras.Model.export` would.

        The artifact has its input names and needs neither this package nor
        Keras to serve.
        """
        return self.model.export(filepath, *args, **kwargs)

    def get_config(self) -> dict[str, Any]:
        """Return the arguments of the constructor, serialized."""
        return {"model": _serialize(self.model), "name": self.name}

    @classmethod
    def from_config(
        cls,
        config: dict[str, Any],
        custom_objects: dict[str, Any] | None = None,
    ) -> "DelegatingModel":
        """Make the wrapper of a `get_config`, around a new inner model."""
        return cls(
            **{
                key: keras.saving.deserialize_keras_object(
                    value, custom_objects=custom_objects
                )
                if isinstance(value, dict)
                else value
                for key, value in config.items()
            }
        )

    def get_build_config(self) -> None:
        """Return nothing: the inner model knows how it was built."""
        return

    def build_from_config(self, config: Any) -> None:
        """Count as built when the inner model is."""
        del config
        self.built = self.model.built


def overrides(model: keras.Model, method: str) -> bool:
    """Return whether `model`, by its class or itself, replaces a method."""
    return method in vars(model) or (
        getattr(type(model), method) is not getattr(keras.Model, method)
    )


def has_own_loss_or_metrics(model: keras.Model) -> bool:
    """Return whether the model computes its loss or metrics in its own way."""
    return any(overrides(model, name) for name in _DELEGATED)


def _check_model(model: Any) -> None:
    if isinstance(model, DelegatingModel):
        raise ValueError(
            f"`model` is a {type(model).__name__} already; wrap its `.model`. "
            f"Received: model={model!r}"
        )
    if not isinstance(model, keras.Model):
        raise TypeError(
            "`model` must be a keras.Model (of Keras 3; a model of tf_keras "
            "is not one). "
            f"Received: model={model!r} of type {type(model).__module__}."
            f"{type(model).__name__}"
        )
    _refuse_custom_steps(model)
    # A model that is not built yet will be, in the scope of the wrapper.
    is_replicated = _passes.replicas() > 1
    for variable in model.variables[:1]:
        made = isinstance(variable.value, tf.distribute.DistributedValues)
        if made != is_replicated:
            raise ValueError(
                "`model` and its wrapper must be made in the same "
                "`strategy.scope()`. Received: a model made "
                f"{'in' if made else 'outside of'} the scope of one with "
                "several replicas"
            )


def _refuse_custom_steps(model: keras.Model) -> None:
    """Raise `ValueError` if the model overrides what the wrapper must do."""
    refused = [name for name in _REFUSED if overrides(model, name)]
    if refused:
        raise ValueError(
            "`model` has training logic of its own, which a step of two "
            "passes cannot call. Move what it computes into `call`, "
            "`compute_loss` or `compute_metrics`, which are honoured. "
            f"Received: model={model.name!r} of class "
            f"{type(model).__name__}, which overrides {', '.join(refused)}"
        )


def _compile_along(model: keras.Model, given: dict[str, Any]) -> None:
    """Give a model the loss and metrics its wrapper was compiled with.

    It keeps the optimizer that it may have from before.
    """
    names = ("loss", "loss_weights", "metrics", "weighted_metrics")
    model.compile(
        optimizer=getattr(model, "optimizer", None),
        **{name: given[name] for name in names if name in given},
    )
    if model.optimizer is None:
        _workarounds.forget_compile(model)


def _serialize(model: keras.Model) -> dict[str, Any]:
    """Return the model's config, without a `compile` of its wrapper's."""
    config = keras.saving.serialize_keras_object(model)
    if getattr(model, "optimizer", None) is None:
        config.pop("compile_config", None)
    return config


def _own_metrics(model: keras.Model) -> list[Any]:
    """Return metrics to log that belong to the model, not to its wrapper."""
    if has_own_loss_or_metrics(model):
        metrics = model.metrics
    else:
        metrics = [m for m in _attributes(model) if m.name != "compile_metrics"]
    # The wrapper tracks the loss itself. Keras lists a metric twice that is
    # an attribute: once under its name, once among those it tracks.
    return list({id(m): m for m in metrics if m.name != "loss"}.values())


def _attributes(model: keras.Model) -> Iterator[Any]:
    for value in vars(model).values():
        if isinstance(value, dict):
            value = list(value.values())
        elif not isinstance(value, list | tuple):
            value = [value]
        yield from (m for m in value if isinstance(m, keras.metrics.Metric))
