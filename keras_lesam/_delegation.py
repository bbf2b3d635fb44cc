"""What of a wrapped model's own training logic a wrapper can honour.

A subclass of `keras.Model` may override parts of training. Each is either
delegated to (it works as it would without the wrapper) or refused (it cannot
be reconciled with a step of two passes); none is silently ignored.
"""

import inspect

import keras

from keras_lesam import _workarounds

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


def overrides(model, method):
    """Whether `model`, by its class or itself, replaces a Keras method."""
    return method in vars(model) or (
        getattr(type(model), method) is not getattr(keras.Model, method)
    )


def refuse_custom_steps(model):
    """Raises `ValueError` if the model overrides what the wrapper must do."""
    refused = [name for name in _REFUSED if overrides(model, name)]
    if refused:
        raise ValueError(
            "`model` has training logic of its own, which a step of two "
            "passes cannot call. Move what it computes into `call`, "
            "`compute_loss` or `compute_metrics`, which are honoured. "
            f"Received: model={model.name!r} of class "
            f"{type(model).__name__}, which overrides {', '.join(refused)}"
        )


def has_own_loss_or_metrics(model):
    """Whether the model computes its loss or its metrics in its own way."""
    return any(overrides(model, name) for name in _DELEGATED)


def compute_loss(model, x, y, y_pred, sample_weight, training):
    """The model's own loss, whether or not it takes `training`."""
    kwargs = {}
    # Keras added the argument in 3.3, and calls overrides without it.
    if "training" in inspect.signature(model.compute_loss).parameters:
        kwargs["training"] = training
    return model.compute_loss(
        x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, **kwargs
    )


def compile_along(model, compile_method, args, kwargs):
    """Gives a model the loss and metrics its wrapper was compiled with.

    It keeps the optimizer that it may have from before.
    """
    given = inspect.signature(compile_method).bind(*args, **kwargs).arguments
    names = ("loss", "loss_weights", "metrics", "weighted_metrics")
    model.compile(
        optimizer=getattr(model, "optimizer", None),
        **{name: given[name] for name in names if name in given},
    )
    if model.optimizer is None:
        _workarounds.forget_compile(model)


def serialize(model):
    """The model's config; without a `compile` that its wrapper did for it."""
    config = keras.saving.serialize_keras_object(model)
    if getattr(model, "optimizer", None) is None:
        config.pop("compile_config", None)
    return config


def own_metrics(model):
    """Metrics to log that belong to the model and not to its wrapper."""
    if has_own_loss_or_metrics(model):
        found = model.metrics
    else:
        found = [m for m in _attributes(model) if m.name != "compile_metrics"]
    # The wrapper tracks the loss itself. Keras lists a metric twice that is
    # an attribute: once under its name, once among those it tracks.
    return list({id(m): m for m in found if m.name != "loss"}.values())


def _attributes(model):
    for value in vars(model).values():
        if isinstance(value, dict):
            value = list(value.values())
        elif not isinstance(value, (list, tuple)):
            value = [value]
        yield from (m for m in value if isinstance(m, keras.metrics.Metric))
