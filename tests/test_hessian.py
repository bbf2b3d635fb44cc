"""Hessian-vector products against the dense Hessian, in float64.

The dense Hessian is made of differences of gradients, not of second
derivatives: automatic differentiation would agree with its own mistakes.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from keras_lesam import LESAMModel
from keras_lesam import _hessian
from keras_lesam import _passes
from keras_lesam._data import Batch
from keras_lesam.curvature import hessian_vector_product
from tests.helpers import constant_lesam
from tests.helpers import crossentropy
from tests.helpers import dense_net
from tests.helpers import mirrored
from tests.helpers import noisy_net

FORWARD = "forward_over_reverse"
REVERSE = "reverse_over_reverse"
ROWS, CLASSES, TOKENS = 6, 3, 5

KINDS = {
    "dense": ((4,), lambda: [layers.Dense(4, "tanh")]),
    "softplus": ((4,), lambda: [layers.Dense(4, "softplus")]),
    "gelu": ((4,), lambda: [layers.Dense(4, "gelu")]),
    "silu": ((4,), lambda: [layers.Dense(4, "silu")]),
    "relu": ((4,), lambda: [layers.Dense(6, "relu"), layers.Dense(3, "tanh")]),
    "conv": ((5, 5, 1), lambda: [layers.Conv2D(2, 3, activation="tanh")]),
    "conv1d": ((6, 2), lambda: [layers.Conv1D(2, 3, activation="tanh")]),
    "strided": (
        (5, 5, 1),
        lambda: [layers.Conv2D(2, 3, 2, "same", activation="tanh")],
    ),
    "depthwise": (
        (5, 5, 2),
        lambda: [layers.DepthwiseConv2D(3, activation="tanh")],
    ),
    "separable": (
        (5, 5, 2),
        lambda: [layers.SeparableConv2D(2, 3, activation="tanh")],
    ),
    "transposed": (
        (3, 3, 2),
        lambda: [layers.Conv2DTranspose(2, 2, activation="tanh")],
    ),
    "average_pooling": (
        (6, 6, 1),
        lambda: [
            layers.Conv2D(2, 3, activation="tanh"),
            layers.AveragePooling2D(2),
        ],
    ),
    "max_pooling": (
        (6, 6, 1),
        lambda: [layers.Conv2D(2, 3, activation="tanh"), layers.MaxPooling2D()],
    ),
    "global_max_pooling": (
        (6, 6, 1),
        lambda: [
            layers.Conv2D(2, 3, activation="tanh"),
            layers.GlobalMaxPooling2D(),
        ],
    ),
    "batch_norm": (
        (4,),
        lambda: [
            layers.Dense(4),
            layers.BatchNormalization(),
            layers.Activation("tanh"),
        ],
    ),
    "conv_batch_norm": (
        (5, 5, 1),
        lambda: [
            layers.Conv2D(2, 3),
            layers.BatchNormalization(),
            layers.Activation("tanh"),
        ],
    ),
    "layer_norm": (
        (4,),
        lambda: [
            layers.Dense(6),
            layers.LayerNormalization(),
            layers.Activation("tanh"),
        ],
    ),
    "group_norm": (
        (4,),
        lambda: [
            layers.Dense(8),
            layers.GroupNormalization(2),
            layers.Activation("tanh"),
        ],
    ),
    "rms_norm": ((4,), lambda: [layers.Dense(4), layers.RMSNormalization()]),
    "embedding": ((4,), lambda: [layers.Embedding(TOKENS, 3)]),
    "masked_embedding": (
        (4,),
        lambda: [layers.Embedding(TOKENS, 2, mask_zero=True), layers.GRU(2)],
    ),
    "lstm": ((3, 2), lambda: [layers.LSTM(3)]),
    "gru": ((3, 2), lambda: [layers.GRU(3)]),
    "bidirectional": (
        (3, 2),
        lambda: [layers.Bidirectional(layers.SimpleRNN(2))],
    ),
    "dropout": ((4,), lambda: [layers.Dense(6, "tanh"), layers.Dropout(0.4)]),
    "noise": ((4,), lambda: [layers.GaussianNoise(0.3), layers.Dense(3)]),
    "l2": ((4,), lambda: [layers.Dense(4, "tanh", kernel_regularizer="l2")]),
    "attention": ((3, 4), lambda: [Attention()]),
}
LOOPS = {"masked_embedding", "lstm", "gru", "bidirectional"}


class Attention(layers.Layer):
    """Self-attention, as a layer of one input."""

    def __init__(self):
        super().__init__()
        self.attention = layers.MultiHeadAttention(2, 2)

    def build(self, input_shape):
        self.attention.build(input_shape, input_shape)

    def call(self, x):
        return self.attention(x, x)


def problem(kind):
    """A compiled net of a kind, a batch, and two random vectors."""
    shape, stack = KINDS[kind]
    rng = np.random.default_rng(0)
    has_tokens = "embedding" in kind
    x = (
        # Of so few tokens some occur more than once.
        rng.integers(TOKENS, size=(ROWS, *shape))
        if has_tokens
        else rng.normal(size=(ROWS, *shape))
    )
    net = keras.Sequential(
        [
            keras.Input(shape, dtype="int32" if has_tokens else None),
            *stack(),
            layers.Flatten(),
            layers.Dense(CLASSES),
        ]
    )
    net.compile("sgd", crossentropy())
    vectors = [
        [rng.normal(size=v.shape) for v in net.trainable_variables]
        for _ in range(2)
    ]
    return net, x, rng.integers(CLASSES, size=ROWS), vectors


def gradient_function(net, x, y):
    """The gradient in training mode, as a function of one flat vector."""
    batch = Batch(tf.constant(x), tf.constant(y), None)
    shapes = [v.shape for v in net.trainable_variables]
    sizes = [s.num_elements() for s in shapes]

    @tf.function
    def gradient(flat):
        weights = [
            tf.reshape(part, shape)
            for part, shape in zip(tf.split(flat, sizes), shapes)
        ]
        point = _passes.compute_loss_and_gradients(net, weights, batch)
        return flatten(point.gradients)

    return gradient


def flatten(tensors):
    return tf.concat(
        [tf.reshape(tf.convert_to_tensor(t), [-1]) for t in tensors], 0
    )


def dense_hessian(net, x, y, step=1e-4):
    """By differences of gradients, exact to about `step ** 4`."""
    gradient = gradient_function(net, x, y)
    w = flatten([v.value for v in net.trainable_variables])
    columns = []
    for direction in step * np.eye(len(w)):
        near = gradient(w + direction) - gradient(w - direction)
        far = gradient(w + 2 * direction) - gradient(w - 2 * direction)
        columns.append((8 * near - far) / (12 * step))
    return np.stack(columns, axis=1)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kind", KINDS)
def test_product_is_that_of_the_dense_hessian(kind):
    net, x, y, vectors = problem(kind)
    hessian = dense_hessian(net, x, y)
    np.testing.assert_allclose(hessian, hessian.T, atol=1e-7)
    methods = ["auto", REVERSE] if kind in LOOPS else [FORWARD, REVERSE]
    for method in methods:
        product = tf.function(
            lambda v, method=method: hessian_vector_product(
                net, x, y, v, method=method
            )
        )
        for vector in vectors:
            np.testing.assert_allclose(
                flatten(product(vector)),
                hessian @ flatten(vector).numpy(),
                atol=1e-6,
                err_msg=method,
            )


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kind", ["conv", "layer_norm", "embedding", "lstm"])
def test_eager_product_is_that_in_a_graph(kind):
    net, x, y, [vector, _] = problem(kind)
    eager = hessian_vector_product(net, x, y, vector)
    graph = tf.function(lambda: hessian_vector_product(net, x, y, vector))()
    np.testing.assert_allclose(flatten(eager), flatten(graph), atol=1e-12)


@pytest.mark.parametrize("kind", sorted(LOOPS))
def test_forward_mode_is_refused_for_loops(kind):
    net, x, y, [vector, _] = problem(kind)
    with pytest.raises(ValueError, match=r"loops.*method='forward_over"):
        hessian_vector_product(net, x, y, vector, method=FORWARD)


def test_auto_is_reverse_over_reverse_as_in_lesam_model(monkeypatch):
    used = []
    original = _hessian.product
    monkeypatch.setattr(
        _hessian,
        "product",
        lambda *args: used.append(args[5]) or original(*args),
    )
    for kind in ("dense", "lstm"):
        net, x, y, [vector, _] = problem(kind)
        hessian_vector_product(net, x, y, vector)
    assert used == [REVERSE, REVERSE]


@pytest.mark.parametrize("kind", ["dense", "batch_norm", "attention"])
@pytest.mark.parametrize("method", [FORWARD, REVERSE])
@pytest.mark.usefixtures("float64")
def test_product_under_xla(kind, method):
    net, x, y, [vector, _] = problem(kind)
    expected = hessian_vector_product(net, x, y, vector)
    compiled = tf.function(
        lambda: hessian_vector_product(net, x, y, vector, method=method),
        jit_compile=True,
    )
    np.testing.assert_allclose(
        flatten(compiled()), flatten(expected), atol=1e-10
    )


def test_max_pooling_is_refused_under_xla():
    net, x, y, [vector, _] = problem("max_pooling")
    for method in (FORWARD, REVERSE):
        compiled = tf.function(
            lambda method=method: hessian_vector_product(
                net, x, y, vector, method=method
            ),
            jit_compile=True,
        )
        with pytest.raises(
            tf.errors.InvalidArgumentError,
            match="HVP_THROUGH_MAX_POOLING_IS_WRONG_UNDER_XLA",
        ):
            compiled()


def test_nothing_is_written():
    """The mask of dropout is that of the next step, again and again."""
    net = noisy_net()
    net.compile("sgd", crossentropy())
    x, y = np.random.rand(8, 8, 8, 1), np.arange(8) % 4
    vectors = [np.ones(v.shape) for v in net.trainable_variables]
    before = [v.numpy() for v in net.variables]
    first, second = (
        hessian_vector_product(net, x, y, vectors) for _ in range(2)
    )
    for a, b in zip(first, second):
        np.testing.assert_array_equal(a, b)
    for variable, value in zip(net.variables, before):
        np.testing.assert_array_equal(variable, value)


@pytest.mark.usefixtures("float64")
def test_sample_weights_count():
    net, x, y, [vector, _] = problem("dense")
    weights = np.array([2.0, 2.0, 2.0, 0.0, 0.0, 0.0])
    np.testing.assert_allclose(
        flatten(hessian_vector_product(net, x, y, vector, weights)),
        flatten(hessian_vector_product(net, x[:3], y[:3], vector)),
        atol=1e-12,
    )


@pytest.mark.usefixtures("float64")
def test_blocks():
    """`None` for zeros: rows and columns of the others are left out."""
    net, x, y, [vector, _] = problem("dense")
    hessian = dense_hessian(net, x, y)
    size = vector[0].size
    product = hessian_vector_product(net, x, y, [vector[0], None, None, None])
    np.testing.assert_allclose(
        flatten(product[:1]),
        hessian[:size, :size] @ vector[0].ravel(),
        atol=1e-6,
    )
    assert not any(np.any(p) for p in product[1:])


@pytest.mark.usefixtures("float64")
def test_weights_that_the_loss_does_not_touch():
    class Idle(layers.Layer):
        def build(self, shape):
            self.idle = self.add_weight(shape=(2,), name="idle")

        def call(self, x):
            return x

    net = keras.Sequential([keras.Input((4,)), Idle(), layers.Dense(3)])
    net.compile("sgd", crossentropy())
    x, y = np.random.rand(5, 4), np.arange(5) % 3
    vectors = [np.ones(v.shape) for v in net.trainable_variables]
    for method in (FORWARD, REVERSE):
        product = hessian_vector_product(net, x, y, vectors, method=method)
        np.testing.assert_array_equal(product[0], [0, 0])
        assert np.any(product[1])


@pytest.mark.usefixtures("float64")
def test_a_wrapped_model_has_the_products_of_its_inner_model():
    net, x, y, [vector, _] = problem("dense")
    expected = hessian_vector_product(net, x, y, vector)
    model = LESAMModel(net)
    model.compile("sgd", crossentropy())
    np.testing.assert_array_equal(
        flatten(hessian_vector_product(model, x, y, vector)), flatten(expected)
    )


def test_mixed_precision_undoes_the_loss_scale():
    x, y = np.random.rand(16, 6), np.arange(16) % 4
    expected = None
    for policy in ("float32", "mixed_float16"):
        keras.config.set_dtype_policy(policy)
        net = dense_net()
        net.compile("sgd", crossentropy())
        vectors = [np.ones(v.shape) for v in net.trainable_variables]
        found = flatten(hessian_vector_product(net, x, y, vectors))
        if expected is not None:
            np.testing.assert_allclose(found, expected, rtol=0.05, atol=5e-3)
        expected = found


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("within", ["scope", "replica", "outside"])
def test_product_under_distribution_is_of_the_global_loss(within):
    """Regularizer included, which Keras divides by the replicas."""

    def build():
        keras.utils.set_random_seed(0)
        net = keras.Sequential(
            [
                keras.Input((4,)),
                layers.Dense(3, "tanh", kernel_regularizer="l2"),
                layers.Dense(3),
            ]
        )
        net.compile("sgd", crossentropy())
        return net

    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(8, 4)), rng.integers(3, size=8)
    net = build()
    vectors = [rng.normal(size=v.shape) for v in net.trainable_variables]
    expected = flatten(hessian_vector_product(net, x, y, vectors))
    strategy = mirrored(2)
    with strategy.scope():
        net = build()
        if within == "scope":
            found = hessian_vector_product(net, x, y, vectors)
    if within == "outside":
        found = hessian_vector_product(net, x, y, vectors)
    if within == "replica":
        found = in_replicas(strategy, net, x, y, vectors)
    np.testing.assert_allclose(flatten(found), expected, atol=1e-12)


def in_replicas(strategy, net, x, y, vectors):
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(len(x))
    x, y = next(iter(strategy.experimental_distribute_dataset(data)))

    @tf.function
    def run(x, y):
        return strategy.run(
            lambda x, y: hessian_vector_product(net, x, y, vectors), (x, y)
        )

    first, second = zip(
        *(strategy.experimental_local_results(p) for p in run(x, y))
    )
    for a, b in zip(first, second):
        np.testing.assert_array_equal(a, b)
    return first


BAD_VECTORS = [
    (lambda v: v[:-1], "parallel to.*Received: 3 vectors, for 4 variables"),
    (lambda v: np.ones(4), "Received: a ndarray, for 4 variables"),
    (lambda v: [v[0].T, *v[1:]], "shapes.*Received"),
    (lambda v: [v[0], np.ones(7), *v[2:]], "shapes.*Received"),
    (lambda v: [None] * 4, "all None"),
]


@pytest.mark.parametrize(("spoil", "message"), BAD_VECTORS)
def test_bad_vectors(spoil, message):
    net = keras.Sequential(
        [keras.Input((4,)), layers.Dense(5), layers.Dense(3)]
    )
    net.compile("sgd", crossentropy())
    vectors = [np.ones(v.shape) for v in net.trainable_variables]
    with pytest.raises(ValueError, match=message):
        hessian_vector_product(
            net, np.ones((2, 4)), np.zeros(2), spoil(vectors)
        )


def test_bad_models_and_methods():
    net, x, y, [vector, _] = problem("dense")
    with pytest.raises(ValueError, match="`method` must be one of"):
        hessian_vector_product(net, x, y, vector, method="backward")
    with pytest.raises(TypeError, match=r"must be a keras\.Model"):
        hessian_vector_product(len, x, y, vector)
    inner = constant_lesam(dense_net()).model
    with pytest.raises(ValueError, match=r"must be compiled.*LESAMModel"):
        hessian_vector_product(inner, x, y, vector)
    net.trainable = False
    with pytest.raises(ValueError, match="no trainable variables"):
        hessian_vector_product(net, x, y, [])
