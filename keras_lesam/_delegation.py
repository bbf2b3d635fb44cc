"""How a wrapper stands in for the model it wraps.

A subclass of `keras.Model` may override parts of training. Each is either
delegated to (it works as it would without the wrapper) or refused (it cannot
be reconciled with a wrapper that trains it in another way); none is silently
ignored.
"""

import inspect
from collections.abc import Iterator
from typing import Any

import keras
import tensorflow as tf

from keras_lesam import _checks
from keras_lesam import _passes
from keras_lesam import _tasks
from keras_lesam import _workarounds
from keras_lesam._data import Batch
from keras_lesam._standin import StandIn
from keras_lesam._standin import signature_of

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


class DelegatingModel(StandIn):
    """A model that is another one to all who look at it, and trains it.

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

    # The state of the training; here there is none.
    _state: Any = None

    def __init__(self, model: keras.Model, name: str | None = None) -> None:
        _check_model(model)
        if name is not None and not isinstance(name, str):
            raise TypeError(
                f"`name` must be a string. Received: name={_checks.short(name)}"
            )
        super().__init__(model, name)

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
        with self._lent_optimizer():
            return _passes.compute_loss(self.model, batch, y_pred, training)

    def compute_metrics(
        self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None
    ) -> Any:
        """Update and return the metrics; the inner model's, if it has any."""
        if not has_own_loss_or_metrics(self.model):
            return super().compute_metrics(x, y, y_pred, sample_weight)
        with self._lent_optimizer():
            results = self.model.compute_metrics(x, y, y_pred, sample_weight)
        return {**results, **self.get_metrics_result()}

    def test_step(self, data: Any) -> Any:
        """Take the stock step."""
        return _workarounds.reducible(super().test_step(data))

    def predict_step(self, data: Any) -> Any:
        """Take the inner model's."""
        with self._lent_optimizer():
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
        is_task = _tasks.preprocesses(self.model)
        if is_task:
            # With the defaults of the task, of which it needs some itself.
            kwargs = _tasks.compile_arguments(self.model, args, kwargs)
            args = ()
        given = inspect.signature(stock).bind(*args, **kwargs).arguments
        _workarounds.refuse_limits_of_keras(self.distribute_strategy, given)
        stock(*args, **kwargs)
        if has_own_loss_or_metrics(self.model) and not is_task:
            _compile_along(self.model, given)

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compile as the model in a saved file was compiled."""
        config = keras.saving.deserialize_keras_object(config)
        if _tasks.preprocesses(self.model):
            config = _tasks.without_own_loss(self.model, config)
        self.compile(**config)
        if self.optimizer is not None and self.built:
            self.optimizer.build(self.trainable_variables)

    @signature_of(keras.Model.fit)
    def fit(self, *args: Any, **kwargs: Any) -> Any:
        """Train as `keras.Model.fit`, on raw data for a task."""
        self._require_compile("fit")
        args, kwargs = _tasks.prepared(self.model, "fit", args, kwargs)
        return super().fit(*args, **kwargs)

    @signature_of(keras.Model.evaluate)
    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate as `keras.Model.evaluate`, on raw data for a task."""
        self._require_compile("evaluate")
        args, kwargs = _tasks.prepared(self.model, "evaluate", args, kwargs)
        return super().evaluate(*args, **kwargs)

    @signature_of(keras.Model.predict)
    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Predict as `keras.Model.predict`, on raw data for a task."""
        args, kwargs = _tasks.prepared(self.model, "predict", args, kwargs)
        return super().predict(*args, **kwargs)

    @signature_of(keras.Model.train_on_batch)
    def train_on_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Train as `keras.Model.train_on_batch`, on raw data for a task."""
        self._require_compile("train_on_batch")
        args, kwargs = _tasks.prepared(
            self.model, "train_on_batch", args, kwargs
        )
        return super().train_on_batch(*args, **kwargs)

    @signature_of(keras.Model.test_on_batch)
    def test_on_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Test as `keras.Model.test_on_batch`, on raw data for a task."""
        self._require_compile("test_on_batch")
        args, kwargs = _tasks.prepared(
            self.model, "test_on_batch", args, kwargs
        )
        return super().test_on_batch(*args, **kwargs)

    @signature_of(keras.Model.predict_on_batch)
    def predict_on_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Predict as `keras.Model.predict_on_batch`, raw data for a task."""
        args, kwargs = _tasks.prepared(
            self.model, "predict_on_batch", args, kwargs
        )
        return super().predict_on_batch(*args, **kwargs)

    def _require_compile(self, method: str) -> None:
        if not self.compiled:
            raise ValueError(
                "You must call `compile()` of the wrapper, this "
                f"{type(self).__name__}, before `{method}()`; that the model "
                "inside was compiled does not count."
            )

    def get_config(self) -> dict[str, Any]:
        """Return the arguments of the constructor, serialized."""
        if self._state is not None:
            _workarounds.refuse_state_in_hdf5(self.name, self._state.variables)
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
            f"Received: model={_checks.short(model)}"
        )
    if not isinstance(model, keras.Model):
        raise TypeError(
            "`model` must be a keras.Model (of Keras 3; a model of tf_keras "
            "is not one). "
            "Received: "
            f"model={_checks.short(model)} of type {type(model).__module__}."
            f"{type(model).__name__}"
        )
    _refuse_custom_steps(model)
    # A model that is not built yet will be, in the scope of the wrapper.
    strategy = tf.distribute.get_strategy()
    for variable in model.variables[:1]:
        made = getattr(variable.value, "distribute_strategy", None)
        if made is None and strategy.num_replicas_in_sync == 1:
            continue
        if made is not strategy:
            raise ValueError(
                "`model` and its wrapper must be made in the same "
                "`strategy.scope()`. Received: a model made "
                f"{'in' if made else 'outside of'} the scope of one with "
                "several replicas"
            )


def _refuse_custom_steps(model: keras.Model) -> None:
    """Raise `ValueError` if the model overrides what the wrapper must do."""
    refused = [
        name
        for name in _REFUSED
        if overrides(model, name) and not _tasks.only_preprocesses(model, name)
    ]
    if refused:
        raise ValueError(
            "`model` has training logic of its own, which a step of two "
            "passes cannot call. Move what it computes into `call`, "
            "`compute_loss` or `compute_metrics`, which are honoured, or use "
            "SharpnessAwareGradients in your own `train_step`. "
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
