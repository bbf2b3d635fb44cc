"""Tasks of KerasHub: models that preprocess what they are given.

A task overrides `fit`, `evaluate` and `predict` to turn raw inputs (strings,
images of any size) into what its network takes, and `compile` for its
defaults. A wrapper does the same before it trains in its own way.
"""

import inspect
from typing import Any

import keras
import tensorflow as tf

from keras_lesam import _workarounds

_AUTOTUNE = tf.data.AUTOTUNE


def preprocesses(model: keras.Model) -> bool:
    """Return whether a model is a task of KerasHub."""
    return _pipeline(model) is not None


def only_preprocesses(model: keras.Model, method: str) -> bool:
    """Return whether a task's override of a method only preprocesses.

    Or, that of `compile`, has other defaults.
    """
    pipeline = _pipeline(model)
    if pipeline is None or method in vars(model):
        return False
    owner = next(cls for cls in type(model).__mro__ if method in vars(cls))
    if method == "compile":
        return owner.__module__.startswith("keras_hub.")
    return owner is pipeline


def compile_arguments(
    task: keras.Model, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Compile a task, and return what it has compiled itself with.

    It keeps the optimizer that it had.
    """
    names = ("optimizer", *_workarounds.COMPILE_CONFIG)
    before = {name: vars(task)[name] for name in names if name in vars(task)}
    task.compile(*args, **kwargs)
    arguments = _workarounds.compile_arguments(task)
    for name in names:
        vars(task).pop(name, None)
    vars(task).update(before)
    return arguments


def without_own_loss(
    task: keras.Model, config: dict[str, Any]
) -> dict[str, Any]:
    """Leave out the loss where a task's `compile` makes it itself."""
    if "loss" in inspect.signature(task.compile).parameters:
        return config
    return {name: value for name, value in config.items() if name != "loss"}


def prepared(
    model: keras.Model,
    method: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return arguments for a method of `keras.Model`, preprocessed.

    Args:
        model: The model that may be a task; arguments of others stay.
        method: Name of the method.
        args: Arguments of the method.
        kwargs: Arguments of the method.
    """
    if not preprocesses(model):
        return args, kwargs
    signature = inspect.signature(getattr(keras.Model, method))
    given = dict(signature.bind(model, *args, **kwargs).arguments)
    del given["self"]
    given.update(given.pop("kwargs", {}))
    # `fit` has preprocessed the data of its own evaluations.
    if not given.get("_use_cached_eval_dataset", False):
        is_batch = method.endswith("_on_batch")
        given.update((_batch if is_batch else _datasets)(model, given))
    # Targets that a language model has made of `x` are not for all.
    for name in {"y", "sample_weight"} - set(signature.parameters):
        given.pop(name, None)
    return (), given


def _pipeline(model: keras.Model) -> type | None:
    """Return the class of KerasHub that preprocesses, if any does."""
    for cls in type(model).__mro__:
        is_hub = cls.__module__.startswith("keras_hub.")
        if is_hub and {"preprocess_samples", "fit"} <= set(vars(cls)):
            return cls
    return None


def _datasets(task: keras.Model, given: dict[str, Any]) -> dict[str, Any]:
    """Take data out of the arguments and return them as datasets."""
    data = [given.pop(name, None) for name in ("x", "y", "sample_weight")]
    batch_size = given.pop("batch_size", None)
    split = given.pop("validation_split", None)
    validation = given.get("validation_data")
    if split and validation is None:
        data, validation = _split(data, split)
    found = {"x": _dataset(task, data, batch_size)}
    if validation is not None:
        if not isinstance(validation, tf.data.Dataset):
            validation = keras.utils.unpack_x_y_sample_weight(validation)
        else:
            validation = (validation, None, None)
        found["validation_data"] = _dataset(task, validation, batch_size)
    return found


def _dataset(task: keras.Model, data: Any, batch_size: int | None) -> Any:
    """Return a dataset of preprocessed batches."""
    x, *rest = data
    if not isinstance(x, tf.data.Dataset):
        rows = keras.utils.pack_x_y_sample_weight(x, *rest)
        x = tf.data.Dataset.from_tensor_slices(_arrays(rows))
        x = x.batch(batch_size or 32)
    elif batch_size is not None or any(part is not None for part in rest):
        raise ValueError(
            "Where `x` is a dataset, `y`, `sample_weight` and `batch_size` "
            "come from it: leave them None."
        )
    x = x.map(task.preprocess_samples, num_parallel_calls=_AUTOTUNE)
    return x.prefetch(_AUTOTUNE)


def _batch(task: keras.Model, given: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of one batch, preprocessed."""
    names = ("x", "y", "sample_weight")
    samples = task.preprocess_samples(*(given.get(name) for name in names))
    parts = keras.utils.unpack_x_y_sample_weight(samples)
    return {
        name: keras.tree.map_structure(keras.ops.convert_to_tensor, part)
        for name, part in zip(names, parts)
        if part is not None
    }


def _split(data: list[Any], fraction: float) -> tuple[list[Any], list[Any]]:
    """Split rows as Keras does: the last ones are for validation."""
    data = [_arrays(part) for part in data]
    rows = len(next(x for x in keras.tree.flatten(data) if x is not None))
    at = int(rows * (1.0 - fraction))

    def part(start: int, stop: int) -> list[Any]:
        return keras.tree.map_structure(
            lambda x: None if x is None else x[start:stop], data
        )

    return part(0, at), part(at, rows)


def _arrays(nest: Any) -> Any:
    """Convert the leaves, as `tf.data` takes them: a list is a leaf."""
    if isinstance(nest, tuple):
        return tuple(map(_arrays, nest))
    if isinstance(nest, dict):
        return {name: _arrays(value) for name, value in nest.items()}
    if nest is None or isinstance(nest, tf.RaggedTensor):
        return nest
    return tf.convert_to_tensor(nest)
