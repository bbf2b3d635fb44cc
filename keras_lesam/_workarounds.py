"""Shims for bugs and limits of Keras, TensorFlow and XLA.

Each with its reason and its issue upstream; a test in
tests/test_workarounds.py fails once a shim can be removed.
"""

import contextlib
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf


def has_fast_conditionals(model: keras.Model) -> bool:
    """Tell whether code in a branch runs about as fast as outside of it.

    XLA on CPU does not bring convolutions inside of conditionals and loops
    into the form that its fast kernels need; the gradient of a kernel takes
    some 50 times as long: https://github.com/jax-ml/jax/issues/12868
    """
    devices = {
        device.device_type for device in tf.config.list_logical_devices()
    }
    return not (model.jit_compile and devices == {"CPU"})


def synchronizes_replicas(model: keras.Model) -> bool:
    """Tell whether replicas communicate in a pass (`synchronized=True`).

    A replica cannot wait for the others inside of a conditional
    (`merge_call`: https://github.com/tensorflow/tensorflow/issues/27716).
    """
    return tf.distribute.get_strategy().num_replicas_in_sync > 1 and any(
        getattr(layer, "synchronized", False)
        for layer in model._flatten_layers()
    )


def is_multi_worker(strategy: tf.distribute.Strategy) -> bool:
    """Tell whether some replicas are in other processes."""
    return (
        isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy)
        and len(strategy.extended.worker_devices)
        < strategy.num_replicas_in_sync
    )


class MultiWorkerModel(keras.Model):
    """A `keras.Model` that can be trained by several workers.

    Keras 3 builds a model from the mean of a batch over replicas, taken
    eagerly, which workers cannot do together, and takes the mean of scalar
    logs along an axis that scalars do not have:
    https://github.com/keras-team/keras/issues/20585
    """

    def _maybe_symbolic_build(
        self, iterator: Any = None, data_batch: Any = None
    ) -> None:
        strategy = self.distribute_strategy
        if iterator is not None and is_multi_worker(strategy):
            _, _, batches = next(iter(iterator))
            data_batch = keras.tree.map_structure(
                lambda leaf: strategy.experimental_local_results(leaf)[0],
                next(batches),
            )
            iterator = None
        super()._maybe_symbolic_build(iterator, data_batch)


class ServableModel(MultiWorkerModel):
    """A stand-in that `tf.saved_model.save` and TFLite take for its `model`.

    They ask Keras's own classes, by private names, how they are called; of
    others, TFLite knows the shape that they were built with, and their dtype:
    https://github.com/keras-team/keras/blob/master/keras/src/backend/
    tensorflow/layer.py and tensorflow/lite/python/tflite_keras_util.py
    """

    @property
    def _default_save_signature(self) -> Any:
        return getattr(self.model, "_default_save_signature", None)

    @property
    def _build_shapes_dict(self) -> Any:
        shape = getattr(self.model, "input_shape", None)
        if shape is None:
            return self.model._build_shapes_dict
        return {"input_shape": shape}

    @_build_shapes_dict.setter
    def _build_shapes_dict(self, value: Any) -> None:
        """Leave it to the model inside."""

    @property
    def input_dtype(self) -> str:
        """Dtype of the input, where there is one."""
        dtypes = {x.dtype for x in getattr(self.model, "inputs", None) or ()}
        return dtypes.pop() if len(dtypes) == 1 else self.model.input_dtype


# What `compile` was called with. Keras has it for configs, serialized.
COMPILE_CONFIG = ("_compile_config",)


def compile_arguments(model: keras.Model) -> dict[str, Any]:
    """Return what a model was compiled with: optimizer, loss and all.

    `get_compile_config` is public and has copies of them.
    """
    return dict(vars(model)[COMPILE_CONFIG[0]].config)


def refuse_state_in_hdf5(name: str, variables: Mapping[str, Any]) -> None:
    """Refuse to save a wrapper with a state in the legacy HDF5 format.

    Keras saves none but weights there, compares them by value, and fails as
    soon as a model has two of its own:
    https://github.com/keras-team/keras/blob/master/keras/src/legacy/saving/
    legacy_h5_format.py. It is seen by the configs of layers, which have no
    module in that format.

    Args:
        name: String, the name of the wrapper.
        variables: Its state, by name.

    Raises:
        ValueError: if that is what the model is being saved for.
    """
    if not variables:
        return
    layer = keras.layers.Flatten(name="layer")
    config = keras.Sequential([layer], name="probe").get_config()
    if "module" not in config["layers"][0]:
        raise ValueError(
            f"The state that {name!r} is training with cannot be saved "
            "in the legacy HDF5 format: save it as `.keras`, or the model "
            "inside, `.model`, as HDF5."
        )


def reducible(logs: Any) -> Any:
    """Reshape logs so that Keras can take their mean over workers.

    See `MultiWorkerModel` for why it fails with scalars.
    """
    if not is_multi_worker(tf.distribute.get_strategy()):
        return logs
    return keras.tree.map_structure(lambda v: tf.reshape(v, (1,)), logs)


def refuse_limits_of_keras(
    strategy: tf.distribute.Strategy, compile_arguments: Mapping[str, Any]
) -> None:
    """Refuse what Keras 3 cannot do on several replicas.

    Otherwise it ends in obscure errors of TensorFlow: gradient accumulation
    and several steps per execution because replicas cannot synchronize in a
    branch, XLA because a step would read variables of several devices. TPUs
    compile in their own way: there, nothing is refused.

    Raises:
        ValueError: if `compile_arguments` ask for one of these.
    """
    replicas = strategy.num_replicas_in_sync
    if replicas == 1 or isinstance(strategy, tf.distribute.TPUStrategy):
        return
    optimizer = compile_arguments.get("optimizer")
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    accumulated = getattr(optimizer, "gradient_accumulation_steps", None)
    steps = compile_arguments.get("steps_per_execution", 1)
    _refuse("gradient_accumulation_steps", accumulated, None, replicas)
    _refuse("steps_per_execution", steps, 1, replicas)
    if compile_arguments.get("jit_compile") is True:
        _refuse("jit_compile", True, False, replicas)


def _refuse(name: str, value: Any, instead: Any, replicas: int) -> None:
    """Raise `ValueError` unless `value` is `instead` or `None`."""
    if value not in (instead, None):
        raise ValueError(
            f"Keras cannot do with `{name}` on {replicas} replicas; leave it "
            f"{instead}. Received: {name}={value}"
        )


def mask_of(tensor: Any) -> Any:
    """Return the mask that Keras keeps on a tensor for losses, or `None`.

    It has no public name: https://github.com/keras-team/keras/blob/master/
    keras/src/backend/common/masking.py
    """
    return getattr(tensor, "_keras_mask", None)


def map_with_masks(
    function: Callable[..., tf.Tensor], tensors: Sequence[tf.Tensor]
) -> tf.Tensor:
    """Apply a function to tensors and to the Keras masks that they carry.

    Losses and metrics read a mask off the outputs: see `mask_of`.
    """
    result = function(*tensors)
    masks = [mask_of(t) for t in tensors]
    if all(mask is not None for mask in masks):
        result._keras_mask = function(*masks)
    return result


def forget_compile(model: keras.Model) -> None:
    """Keep a `compile` without an optimizer out of the files of a model.

    Keras saves it, and fails to load it: `compile_from_config` builds the
    optimizer that is None. There is no public way to undo a `compile`.
    """
    vars(model).pop("_compile_config", None)


def refuse_rematerialized_layers(model: keras.Model) -> None:
    """Refuse layers that have weights and recompute their forward pass.

    `tf.recompute_grad`, which `keras.RematScope` and `keras.remat` use on
    TensorFlow, differentiates by arguments and by `tf.Variable`s only. To it
    the weights of a pass at `w + eps` are constants; their gradient would be
    lost silently. Keras stores the mode in a private attribute.

    Raises:
        ValueError: if the model has such layers.
    """
    names = [x.name for x in model._flatten_layers() if _recomputes_weights(x)]
    if names:
        raise ValueError(
            "Layers with weights under `keras.RematScope` cannot be perturbed "
            "with the TensorFlow backend: the gradient at the perturbed "
            "weights would be lost. Build the model outside of the scope, or "
            f"with mode='activations'. Received: layers {names}"
        )


def _recomputes_weights(layer: keras.layers.Layer) -> bool:
    """Tell whether a layer has weights and recomputes its forward pass."""
    mode = getattr(layer, "_remat_mode", None)
    if mode is None or isinstance(layer, keras.Model):
        return False
    if layer.built and not layer.weights:
        return False
    if mode.mode == "list_of_layers":
        return layer.name in (mode.layer_names or ())
    return mode.mode != "activations"


def has_max_pooling(model: keras.Model) -> bool:
    """Tell whether a model has max pooling layers; see `refuse_xla`."""
    pooling = (
        keras.layers.MaxPooling1D,
        keras.layers.MaxPooling2D,
        keras.layers.MaxPooling3D,
    )
    return any(isinstance(x, pooling) for x in model._flatten_layers())


def refuse_xla() -> tf.Tensor:
    """Create an operation that XLA cannot compile, and whose name says why.

    XLA silently rounds the second derivative of max pooling to 16 bits:
    https://github.com/openxla/xla, tf2xla's MaxPoolGradGrad. Inside a
    `tf.function` there is no public way to know that XLA will compile it.

    Returns:
        A tensor, for `tf.control_dependencies`.
    """
    return tf.strings.as_string(
        0,
        name="HVP_THROUGH_MAX_POOLING_IS_WRONG_UNDER_XLA_USE_jit_compile_False",
    )


@contextlib.contextmanager
def creating_now() -> Iterator[None]:
    """Create variables outside of the functions that are being traced.

    A `tf.function` that has created variables, in `tf.init_scope` too, is
    traced once more, and with it the model:
    https://www.tensorflow.org/guide/function#creating_tfvariables
    """

    def create(next_creator: Callable[..., Any], **kwargs: Any) -> Any:
        now = {**kwargs, "experimental_enable_variable_lifting": False}
        try:
            with tf.init_scope():
                return next_creator(**now)
        except Exception:
            # Its value may come from the function: let TensorFlow lift it.
            return next_creator(**kwargs)

    with tf.variable_creator_scope(create):
        yield


def know_name_without_package(cls: type) -> None:
    """Let files be loaded that were saved where SciKeras is imported.

    To pickle a model of any class, it registers the class once more, without
    a package (`pack_keras_model` in scikeras/_saving_utils.py), and files
    that are saved from then on name the class so.
    """
    keras.saving.get_custom_objects().setdefault(f">{cls.__name__}", cls)


@contextlib.contextmanager
def unlocked(layer: keras.layers.Layer) -> Iterator[None]:
    """Let a built layer be given new weights within the context.

    Needed for weights that depend on another model's, which was not built
    when the layer was made. Keras has no public way: `keras.Layer.build`
    locks the tracker, and Keras's own quantization and LoRA unlock it so.
    """
    layer._tracker.unlock()
    try:
        yield
    finally:
        if layer.built:
            layer._tracker.lock()
