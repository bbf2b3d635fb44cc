"""What would not be here if Keras, TensorFlow and XLA were otherwise.

Each with its reason and its issue upstream; tests/test_workarounds.py tells
when one of them can go.
"""

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
