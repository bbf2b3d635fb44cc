"""Curvature and landscape of nets whose weights are not of one dtype."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from keras_lesam import curvature
from keras_lesam import landscape
from keras_lesam.callbacks import Curvature
from tests.helpers import classification_data
from tests.helpers import crossentropy
from tests.helpers import dense_net

QUIET = {"verbose": 0}
METHODS = ("reverse_over_reverse", "forward_over_reverse")


def lora(policy="bfloat16"):
    """Float32 adapters in a net of another dtype."""
    keras.config.set_dtype_policy(policy)
    net = dense_net()
    net.layers[0].enable_lora(2)
    for variable in net.layers[0].trainable_variables:
        value = np.random.default_rng(1).normal(size=variable.shape)
        variable.assign(0.3 * value)
    return net


def embedding_lora():
    keras.config.set_dtype_policy("bfloat16")
    keras.utils.set_random_seed(0)
    net = keras.Sequential(
        [
            keras.Input((6,)),
            layers.Rescaling(2.0),
            layers.Embedding(9, 5),
            layers.GlobalAveragePooling1D(),
            layers.Dense(4),
        ]
    )
    net.layers[1].enable_lora(2)
    return net


def by_layer(*dtypes):
    """A net with a dtype for each of its layers."""
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((6,)),
            *(layers.Dense(5, "tanh", dtype=dtype) for dtype in dtypes),
            layers.Dense(4),
        ]
    )


NETS = {
    "lora in bfloat16": lora,
    "lora in float16": lambda: lora("float16"),
    "lora in mixed_bfloat16": lambda: lora("mixed_bfloat16"),
    "lora of an embedding": embedding_lora,
    "bfloat16 first": lambda: by_layer("bfloat16", "float32"),
    "bfloat16 last": lambda: by_layer("float32", "bfloat16"),
    "float64 last": lambda: by_layer("float32", "float64"),
    "float64 first": lambda: by_layer("float64", "float32"),
    "all bfloat16": lambda: by_layer("bfloat16"),
    "three": lambda: by_layer("float16", "float64", "bfloat16"),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NETS)
def test_every_tool_takes_it(name, method):
    net = NETS[name]()
    net.compile("sgd", crossentropy())
    data = classification_data(rows=24)
    operator = curvature.HessianOperator(net, *data, method=method)
    wide = any(v.dtype == "float64" for v in net.trainable_variables)
    assert operator.dtype == ("float64" if wide else "float32")
    options = {"method": method, **QUIET}
    values, [vector] = curvature.top_eigenvalues(
        net, *data, tolerance=1e-2, return_vectors=True, **options
    )
    assert np.isfinite(values).all()
    trace = curvature.trace(net, *data, max_samples=10, **options)
    assert np.isfinite(trace.value)
    spectrum = curvature.spectral_density(
        net, *data, probes=2, steps=5, **options
    )
    assert np.isfinite(spectrum.eigenvalues).all()
    products = curvature.hessian_vector_product(
        net, *data, vector, method=method
    )
    for product, variable in zip(products, net.trainable_variables):
        assert product.dtype == variable.dtype
    drawn = landscape.filter_normalized_direction(net)
    losses = landscape.loss_on_plane(
        net,
        *data,
        directions=(drawn, vector),
        distances=([0, 0.1], [0, 0.1]),
        **QUIET,
    )
    assert np.isfinite(losses).all()
    history = net.fit(*data, verbose=0, callbacks=[Curvature(*data)]).history
    assert np.isfinite(history["top_eigenvalue"]).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "dtypes", [("float32", "float64"), ("float64", "float32")], ids=str
)
def test_products_are_those_of_one_dtype(dtypes, method):
    """Of a net in float64 throughout, to the accuracy of float32."""
    data = classification_data(rows=24)
    products = []
    for layer_dtypes in (dtypes, ("float64", "float64")):
        net = by_layer(*layer_dtypes)
        rng = np.random.default_rng(0)
        net.set_weights([rng.normal(size=v.shape) for v in net.weights])
        net.compile("sgd", crossentropy())
        operator = curvature.HessianOperator(net, *data, method=method)
        products.append(operator(rng.normal(size=operator.size)))
    np.testing.assert_allclose(*products, rtol=1e-4, atol=1e-5)


def test_a_wide_block_of_a_narrow_net():
    """The dtype is that of the variables that are meant."""
    net = by_layer("bfloat16", "float64")
    net.compile("sgd", crossentropy())
    data = classification_data(rows=24)
    for layer, dtype in zip(net.layers, ("float32", "float64", "float32")):
        operator = curvature.HessianOperator(
            net, *data, variables=layer.trainable_variables
        )
        assert operator.dtype == dtype
        assert np.isfinite(operator(np.ones(operator.size))).all()


def test_distances_keep_the_widest_dtype():
    """In float32 the loss would not see a step of 1e-9 in float64."""

    class Net(keras.Sequential):
        def compute_loss(self, x, y, y_pred, sample_weight=None, training=True):
            return tf.reduce_mean(y_pred)

    net = Net(
        [
            keras.Input((1,)),
            layers.Dense(1, use_bias=False, kernel_initializer="ones"),
            layers.Dense(1, use_bias=False, dtype="float64"),
        ]
    )
    net.layers[1].kernel.assign([[1.0]])
    net.compile("sgd")
    x = np.ones((2, 1))
    direction = [[[0.0]], [[1.0]]]
    losses = landscape.loss_along(
        net, x, x, direction=direction, distances=[0, 1e-9], **QUIET
    )
    assert losses[1] - losses[0] == pytest.approx(1e-9, rel=1e-3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_filters_of_16_bits_have_the_norms_of_the_model(dtype):
    """Large kernels: their sums of squares are beyond 16 bits."""
    keras.utils.set_random_seed(0)
    net = keras.Sequential([keras.Input((4000,)), layers.Dense(2, dtype=dtype)])
    net.layers[0].kernel.assign(np.full((4000, 2), 10.0))
    kernel, _ = landscape.filter_normalized_direction(net)
    norms = np.linalg.norm(kernel.astype("float64"), axis=0)
    np.testing.assert_allclose(norms, 10 * np.sqrt(4000), rtol=1e-2)
