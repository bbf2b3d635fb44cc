"""What would not be here if Keras, TensorFlow and XLA were otherwise.

Each with its reason and its issue upstream; tests/test_workarounds.py tells
when one of them can go.
"""

import contextlib
import threading

import keras
import tensorflow as tf


def has_fast_conditionals(model):
    """False where XLA runs a branch much slower than the same code outside.

    XLA on CPU does not bring convolutions inside of conditionals and loops
    into the form that its fast kernels need; the gradient of a kernel takes
    some 50 times as long: https://github.com/jax-ml/jax/issues/12868
    """
    devices = {
        device.device_type for device in tf.config.list_logical_devices()
    }
    return not (model.jit_compile and devices == {"CPU"})


def synchronizes_replicas(model):
    """Whether a pass of a model communicates: `synchronized=True` layers.

    A replica cannot wait for the others inside of a conditional
    (`merge_call`: https://github.com/tensorflow/tensorflow/issues/27716).
    """
    return tf.distribute.get_strategy().num_replicas_in_sync > 1 and any(
        getattr(layer, "synchronized", False)
        for layer in model._flatten_layers()
    )


def is_multi_worker(strategy):
    """Whether some replicas are in other processes."""
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

    def _maybe_symbolic_build(self, iterator=None, data_batch=None):
        strategy = self.distribute_strategy
        if iterator is not None and is_multi_worker(strategy):
            _, _, batches = next(iter(iterator))
            data_batch = keras.tree.map_structure(
                lambda leaf: strategy.experimental_local_results(leaf)[0],
                next(batches),
            )
            iterator = None
        super()._maybe_symbolic_build(iterator, data_batch)


def reducible(logs):
    """Logs of which Keras can take the mean over workers; see above."""
    if not is_multi_worker(tf.distribute.get_strategy()):
        return logs
    return keras.tree.map_structure(lambda v: tf.reshape(v, (1,)), logs)


def refuse_limits_of_keras(strategy, compile_arguments):
    """Raises `ValueError` for what Keras 3 cannot do on several replicas.

    It ends in errors of TensorFlow, deep inside: gradient accumulation and
    several steps per execution because replicas cannot meet in a branch, XLA
    because a step would read variables of several devices. TPUs compile in
    their own way: there, nothing is refused.
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


def _refuse(name, value, instead, replicas):
    if value not in (instead, None):
        raise ValueError(
            f"Keras cannot do with `{name}` on {replicas} replicas; leave it "
            f"{instead}. Received: {name}={value}"
        )


def map_with_masks(function, tensors):
    """`function(*tensors)`, and the same for the Keras masks they carry.

    Losses and metrics read a mask off the outputs. Keras has no public name
    for it: https://github.com/keras-team/keras/blob/master/keras/src/backend/
    common/masking.py
    """
    result = function(*tensors)
    masks = [getattr(t, "_keras_mask", None) for t in tensors]
    if all(mask is not None for mask in masks):
        result._keras_mask = function(*masks)
    return result


def forget_compile(model):
    """Keeps a `compile` without an optimizer out of the files of a model.

    Keras saves it, and fails to load it: `compile_from_config` builds the
    optimizer that is None. There is no public way to take a `compile` back.
    """
    vars(model).pop("_compile_config", None)


def refuse_rematerialized_layers(model):
    """Raises `ValueError` for layers that recompute a pass with weights.

    `tf.recompute_grad`, which `keras.RematScope` and `keras.remat` use on
    TensorFlow, differentiates by arguments and by `tf.Variable`s only. To it
    the weights of a pass at `w + eps` are constants; their gradient would be
    lost without a word. Keras keeps the mode in a private attribute.
    """
    names = [x.name for x in model._flatten_layers() if _recomputes_weights(x)]
    if names:
        raise ValueError(
            "Layers with weights under `keras.RematScope` cannot be perturbed "
            "with the TensorFlow backend: the gradient at the perturbed "
            "weights would be lost. Build the model outside of the scope, or "
            f"with mode='activations'. Received: layers {names}"
        )


def _recomputes_weights(layer):
    mode = getattr(layer, "_remat_mode", None)
    if mode is None or isinstance(layer, keras.Model):
        return False
    if layer.built and not layer.weights:
        return False
    if mode.mode == "list_of_layers":
        return layer.name in (mode.layer_names or ())
    return mode.mode != "activations"


class _Moments:
    """`tf.nn.moments` with the variance's second derivative."""

    def __init__(self):
        self.original = None
        self.users = 0
        self.lock = threading.Lock()

    def __call__(self, *args, **kwargs):
        mean, variance = self.original(*args, **kwargs)
        # Var x = E (x - c)^2 - (E x - c)^2 for any constant c, here the mean:
        # 0, and so is its gradient; its second derivative is what is missing.
        return mean, variance - tf.square(mean - tf.stop_gradient(mean))


_moments = _Moments()


@contextlib.contextmanager
def twice_differentiable_moments():
    """In here, normalization layers can be differentiated twice.

    `tf.nn.moments`, which Keras's normalization layers call, computes the
    variance about a mean that it takes for a constant. That is right for the
    gradient and silently wrong for every derivative of the gradient:
    https://github.com/tensorflow/tensorflow/pull/19609
    """
    with _moments.lock:
        _moments.users += 1
        if _moments.users == 1:
            _moments.original, tf.nn.moments = tf.nn.moments, _moments
    try:
        yield
    finally:
        with _moments.lock:
            _moments.users -= 1
            if _moments.users == 0:
                tf.nn.moments = _moments.original


def has_max_pooling(model):
    """Whether a model has layers that XLA gets wrong; see `refuse_xla`."""
    pooling = (
        keras.layers.MaxPooling1D,
        keras.layers.MaxPooling2D,
        keras.layers.MaxPooling3D,
    )
    return any(isinstance(x, pooling) for x in model._flatten_layers())


def refuse_xla():
    """An operation that XLA cannot compile, and whose name says why.

    XLA rounds the second derivative of max pooling to 16 bits without a word:
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
def unlocked(layer):
    """Lets a layer that is built have new weights.

    Those that depend on another model's, which was not built when the layer
    was made: Keras has no public way (keras.Layer.build locks its tracker;
    quantization and LoRA in Keras unlock it like this).
    """
    layer._tracker.unlock()
    try:
        yield
    finally:
        if layer.built:
            layer._tracker.lock()
