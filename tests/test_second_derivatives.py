"""Functions of TensorFlow that are replaced while gradients are differentiated.

Each test of what TensorFlow does alone fails once it is mended upstream.
"""

import gc
import threading
from unittest import mock

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers as L

from keras_lesam import LESAMModel
from keras_lesam import _ctc
from keras_lesam import _second_derivatives
from keras_lesam import _unsupported
from keras_lesam._second_derivatives import twice_differentiable
from keras_lesam.curvature import hessian_vector_product
from tests.helpers import constant_lesam
from tests.helpers import mirrored

RESIZINGS = (
    "bilinear",
    "nearest",
    "bicubic",
    "lanczos3",
    "lanczos5",
    "gaussian",
    "mitchellcubic",
)
# Those that TensorFlow has a gradient of in float64 and float16, too.
ALL_DTYPES = ("bilinear", "nearest")
FORWARD = "forward_over_reverse"


def replaced():
    return [
        getattr(module, name)
        for module, name, _ in _second_derivatives._REPLACEMENTS
    ]


def value_and_gradient(function, x):
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = function(x)
    return y, tape.gradient(y, x)


def reverse(function, x, v):
    with tf.GradientTape() as outer:
        outer.watch(x)
        _, gradient = value_and_gradient(function, x)
    return outer.gradient(gradient, x, output_gradients=v)


def forward(function, x, v):
    with tf.autodiff.ForwardAccumulator(x, v) as accumulator:
        _, gradient = value_and_gradient(function, x)
    return accumulator.jvp(gradient)


def differences(function, x, v, step):
    ahead, behind = (
        value_and_gradient(function, x + tf.cast(s, x.dtype) * v)[1]
        for s in (step, -step)
    )
    return (ahead - behind).numpy().astype("float64") / (2 * step)


def power(function):
    """A scalar whose Hessian asks for two derivatives of a function."""
    return lambda x: tf.reduce_sum(tf.cast(function(x), x.dtype) ** 3)


def resize(method, **kwargs):
    return power(lambda x: tf.image.resize(x, (6, 7), method, **kwargs))


def softsign(x):
    return tf.nn.softsign(x)


def moments(x):
    return tf.nn.moments(x, [0, 1])[1]


def logsumexp(x):
    return tf.math.reduce_logsumexp(x, axis=-1)


def logsumexp_all(x):
    return tf.math.reduce_logsumexp(x, axis=[1, 2], keepdims=True)


def circle(x):
    """Two rows have no partner: the sum of nothing, whose logarithm is -inf."""
    labels = tf.constant([0, 0, 1, 1, 2, 3])
    return keras.losses.circle(labels, tf.reshape(x, [6, -1]) / 4, gamma=2)


def ctc(x):
    logits = tf.cast(tf.reshape(x, [2, 6, -1]), tf.float32)
    return tf.nn.ctc_loss(
        tf.constant([[1, 2, 2], [3, 0, 0]]),
        logits,
        tf.constant([3, 1]),
        tf.constant([6, 5]),
        logits_time_major=False,
        blank_index=-1,
    )


def image(seed=0):
    return np.random.default_rng(seed).normal(size=(2, 4, 6, 2))


FUNCTIONS = {
    **{m: resize(m) for m in RESIZINGS},
    "antialias": resize("bilinear", antialias=True),
    "preserved": resize("bilinear", preserve_aspect_ratio=True),
    "softsign": power(softsign),
    "moments": power(moments),
    "logsumexp": power(logsumexp),
    "logsumexp_all": power(logsumexp_all),
    "circle": power(circle),
    "ctc": power(ctc),
}
# TensorFlow has a gradient of other resizing in float32 only, but for this.
OTHERS = {*RESIZINGS, "antialias"} - {*ALL_DTYPES}
IN_DTYPES = [("bicubic", "float64")] + [
    (name, dtype)
    for name in FUNCTIONS
    for dtype in ("float32", "float64", "float16")
    if dtype == "float32" or name not in OTHERS
]


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize(("name", "dtype"), IN_DTYPES)
def test_second_derivative_is_that_of_differences(name, dtype, graph):
    if name == "ctc" and dtype != "float32" and graph:
        return  # Slow to trace, and the same as in float32.
    function = FUNCTIONS[name]
    x, v = tf.constant(image(), dtype), tf.constant(image(1), dtype)
    step = {"float16": 0.03, "float32": 3e-3, "float64": 3e-3}[dtype]
    expected = differences(
        function, *(tf.cast(t, "float32") for t in (x, v)), step
    )
    atol = np.abs(expected).max() * (0.05 if dtype == "float16" else 5e-3)
    # Forward mode has no rule for the loops of CTC.
    for method in (reverse,) if name == "ctc" else (reverse, forward):

        def compute(x, v, method=method):
            with twice_differentiable():
                return method(function, x, v)

        found = (tf.function(compute) if graph else compute)(x, v)
        np.testing.assert_allclose(found, expected, atol=atol)


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize(("name", "dtype"), IN_DTYPES)
def test_values_and_gradients_are_those_of_tensorflow(name, dtype, graph):
    def compute(x):
        return value_and_gradient(FUNCTIONS[name], x)

    def inside(x):
        with twice_differentiable():
            return compute(x)

    wrap = tf.function if graph else lambda function: function
    x = tf.constant(image(), dtype)
    for found, expected in zip(wrap(inside)(x), wrap(compute)(x)):
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", ["bilinear", "softsign", "logsumexp"])
@pytest.mark.parametrize("place", ["branch", "loop", "function"])
def test_inside_of_branches_loops_and_functions(name, place):
    function = FUNCTIONS[name]

    def inside(x):
        if place == "branch":
            return tf.cond(
                tf.reduce_sum(x) < 1e3, lambda: function(x), lambda: 0.0
            )
        if place == "loop":
            return tf.reduce_sum(tf.map_fn(lambda i: function(i[None]), x))
        return tf.function(function)(x)

    x, v = tf.constant(image(), "float32"), tf.constant(image(1), "float32")
    expected = differences(function, x, v, 3e-3)

    @tf.function
    def compute(x, v):
        with twice_differentiable():
            return reverse(inside, x, v)

    np.testing.assert_allclose(
        compute(x, v), expected, atol=5e-3 * np.abs(expected).max()
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_what_has_no_gradient_gets_none(dtype):
    x = tf.constant(image(), dtype)
    assert value_and_gradient(resize("bicubic"), x)[1] is None
    with twice_differentiable():
        assert value_and_gradient(resize("bicubic"), x)[1] is None


def test_integer_images_are_resized():
    images = tf.constant(np.arange(2 * 4 * 6 * 2).reshape(2, 4, 6, 2))
    with twice_differentiable():
        found = tf.image.resize(images, (2, 3))
    np.testing.assert_array_equal(found, tf.image.resize(images, (2, 3)))


def test_ctc_is_that_of_tensorflow():
    rng = np.random.default_rng(0)
    for blank in (0, 2):
        labels = tf.constant(rng.integers(3, 6, size=(4, 3)))
        logits = tf.constant(rng.normal(size=(8, 4, 6)), tf.float32)
        lengths = tf.constant([3, 2, 1, 0]), tf.constant([8, 8, 3, 2])
        np.testing.assert_allclose(
            _ctc.ctc_loss(labels, logits, *lengths, blank),
            tf.nn.ctc_loss(labels, logits, *lengths, blank_index=blank),
            rtol=1e-5,
        )


# What TensorFlow does alone.


def test_bilinear_resizing_has_no_second_derivative():
    """Then it need not be replaced: `ResizeBilinearGrad` has a gradient."""
    x = tf.constant(image(), "float32")
    assert reverse(resize("bilinear"), x, x) is None


@pytest.mark.parametrize("method", ["nearest", "bicubic", "lanczos3"])
def test_other_resizing_has_no_second_derivative(method):
    """Then it need not be replaced."""
    x = tf.constant(image(), "float32")
    with pytest.raises(LookupError, match="Grad"):
        reverse(resize(method), x, x)


def test_softsign_has_no_second_derivative():
    """Then it need not be replaced."""
    x = tf.constant(image(), "float32")
    with pytest.raises(LookupError, match="SoftsignGrad"):
        reverse(power(softsign), x, x)


@pytest.mark.parametrize("name", ["ctc", "circle"])
def test_second_derivatives_of_log_zero_are_nan(name):
    """Then these need not be replaced."""
    x = tf.constant(image(), "float32")
    assert np.isnan(reverse(FUNCTIONS[name], x, x)).any()


def test_moments_have_no_second_derivative():
    """tensorflow#19609: then they need not be replaced."""
    x = tf.constant([[1.0], [2.0], [5.0]], tf.float64)
    unit = tf.constant([[1.0], [0.0], [0.0]], tf.float64)
    variance = lambda x: tf.nn.moments(x, [0])[1]  # noqa: E731
    # Of three numbers, by hand: 2 (I / 3 - 1 / 9).
    with twice_differentiable():
        right = reverse(variance, x, unit)
    np.testing.assert_allclose(right[:, 0], [4 / 9, -2 / 9, -2 / 9])
    wrong = reverse(variance, x, unit)
    np.testing.assert_allclose(wrong[:, 0], [2 / 3, 0, 0])


def test_forward_mode_passes_by_custom_gradients_in_graphs():
    """Then `_with_gradient` can do without a `tf.function`."""

    @tf.custom_gradient
    def function(x):
        return 3 * x, lambda dy: 5 * dy

    def slope(x):
        with tf.autodiff.ForwardAccumulator(x, tf.ones_like(x)) as accumulator:
            y = function(x)
        return accumulator.jvp(y)

    x = tf.constant(2.0)
    assert tf.function(slope, autograph=False)(x) == 3


def missing():
    """What TensorFlow's registry says of operations of gradients."""
    from tensorflow.python.framework import ops

    registry = ops.gradient_registry
    registered = {*registry.list()}
    for name in dir(tf.raw_ops):
        if not name[0].isupper() or name.endswith("GradientDescent"):
            continue
        if not any(part in name for part in ("Grad", "Backprop")):
            continue
        if name not in registered or registry.lookup(name) is None:
            yield name


# Of optimizers, parameter servers and TPU embeddings; of the third derivative;
# of loops of TensorFlow 1; or of shapes, which have no derivative.
ELSEWHERE = (
    "Accumulator",
    "Apply",
    "BroadcastGradientArgs",
    "StopGradient",
    "TPUEmbedding",
    "TensorArrayGrad",
    "XlaSparse",
)


def test_unsupported_operations_are_those_of_tensorflow():
    found = {n for n in missing() if not any(e in n for e in ELSEWHERE)}
    assert not found - _unsupported.UNSUPPORTED
    # A version may lack some operations, but gives none of them a derivative.
    known = {
        name for name in _unsupported.UNSUPPORTED if name in dir(tf.raw_ops)
    }
    assert known == found


# Whose functions are replaced, and for how long.


def test_functions_are_put_back():
    originals = replaced()
    with twice_differentiable():
        assert not any(a is b for a, b in zip(replaced(), originals))
        with pytest.raises(RuntimeError), twice_differentiable():
            raise RuntimeError
        assert not any(a is b for a, b in zip(replaced(), originals))
    assert replaced() == originals


def test_functions_are_put_back_without_an_exit():
    """An exception may come before `__exit__` can be called."""
    originals = replaced()
    scope = twice_differentiable()
    scope.__enter__()
    assert replaced() != originals
    del scope
    gc.collect()
    assert replaced() == originals
    assert not _second_derivatives._threads.active


def operations_of_moments():
    trace = tf.function(lambda x: tf.nn.moments(x, [0])[1], autograph=False)
    traced = trace.get_concrete_function(tf.TensorSpec((3, 2)))
    return [node.name for node in traced.graph.as_graph_def().node]


def in_a_thread(function):
    found = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


def test_other_threads_have_tensorflows_own():
    plain = operations_of_moments()
    with twice_differentiable():
        assert in_a_thread(operations_of_moments) == plain
        assert operations_of_moments() != plain
    assert operations_of_moments() == plain


def test_threads_may_overlap():
    plain, originals = operations_of_moments(), replaced()
    inside, leave = threading.Event(), threading.Event()

    def other():
        with twice_differentiable():
            inside.set()
            leave.wait()
            return operations_of_moments()

    found = []
    thread = threading.Thread(target=lambda: found.append(other()))
    with twice_differentiable():
        thread.start()
        inside.wait()
    assert operations_of_moments() == plain
    leave.set()
    thread.join()
    assert found[0] != plain
    assert replaced() == originals


def noisy(calls):
    original = tf.nn.moments

    def moments(*args, **kwargs):
        calls.append(args)
        return original(*args, **kwargs)

    return moments


def second_moment():
    x = tf.constant([[1.0], [2.0], [5.0]])
    unit = tf.constant([[1.0], [0.0], [0.0]])
    with twice_differentiable():
        found = reverse(lambda x: tf.nn.moments(x, [0])[1], x, unit)
    return float(found[0, 0])


def test_patches_of_others_stay():
    original = tf.nn.moments
    calls = []
    # Ahead of the context.
    with mock.patch.object(tf.nn, "moments", noisy(calls)):
        assert second_moment() == pytest.approx(4 / 9)
        assert len(calls) == 1
    assert tf.nn.moments is original
    # Within it, and longer than it.
    scope = twice_differentiable()
    with scope:
        patch = mock.patch.object(tf.nn, "moments", noisy(calls))
        patched = patch.start()
    assert tf.nn.moments is patched
    assert second_moment() == pytest.approx(4 / 9)
    assert tf.nn.moments is patched
    patch.stop()
    assert second_moment() == pytest.approx(4 / 9)
    assert tf.nn.moments is original


# Nets.


class Call(L.Layer):
    """Calls a function of tensors."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def call(self, x):
        return self.function(x)

    def compute_output_shape(self, shape):
        return shape


def crop(x):
    boxes = tf.constant([[0.1, 0.2, 0.9, 0.8]])
    return tf.image.crop_and_resize(x, boxes, [0], (4, 6))


def grey(x):
    """In float32, by a name that isn't replaced."""
    return tf.raw_ops.ResizeBilinear(images=x, size=(4, 6))


traced_before = tf.function(
    lambda x: (x - tf.nn.moments(x, [0])[0]) * tf.nn.moments(x, [0])[1],
    autograph=False,
)


def python(x):
    y = tf.py_function(lambda t: t**3, [x], x.dtype)
    return tf.ensure_shape(y, x.shape)


def cudnn(x):
    rows = tf.reshape(x, [4, -1, 12])
    n = 3
    output, *_ = tf.raw_ops.CudnnRNNV3(
        input=rows,
        input_h=tf.zeros((1, tf.shape(rows)[1], n)),
        input_c=tf.zeros((1, tf.shape(rows)[1], n)),
        params=tf.zeros((4 * n * (12 + n) + 8 * n,)),
        sequence_lengths=tf.fill([tf.shape(rows)[1]], 4),
        is_training=True,
    )
    return tf.reduce_sum(output) + x


REFUSED = {
    "CropAndResizeGradImage": crop,
    "ResizeBilinearGrad": grey,
    "LRNGrad": tf.nn.local_response_normalization,
    "MaxPoolGradWithArgmax": lambda x: tf.nn.max_pool_with_argmax(
        x, 2, 1, "SAME"
    )[0],
    "Dilation2DBackpropInput": lambda x: tf.nn.dilation2d(
        x, tf.zeros((2, 2, 2)), [1] * 4, "SAME", "NHWC", [1] * 4
    ),
    "IgammaGradA": lambda x: tf.math.igamma(tf.nn.softplus(x), 2.0),
    "FakeQuantWithMinMaxArgsGradient": (
        lambda x: tf.quantization.fake_quant_with_min_max_args(x)
    ),
    "EagerPyFunc": python,
    "moments": traced_before,
}


def image_net(function):
    net = keras.Sequential(
        [
            keras.Input((4, 6, 2)),
            L.Conv2D(2, 1, name="convolution"),
            Call(function),
        ]
    )
    net.compile("sgd", "mse")
    return net


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_second_derivative_is_refused(name):
    traced_before(tf.constant(image(), tf.float32))
    net = image_net(REFUSED[name])
    x = image().astype("float32")
    vectors = [tf.ones(v.shape) for v in net.trainable_variables]
    weights = net.get_weights()
    for call in (
        lambda: hessian_vector_product(net, x, x, vectors),
        lambda: fit(net, x),
    ):
        with pytest.raises(ValueError, match=rf"second derivative.*{name}"):
            call()
    for before, after in zip(weights, net.get_weights()):
        np.testing.assert_array_equal(before, after)


def test_cudnn_is_refused():
    """That there is no kernel without a GPU does not matter to a graph."""
    net = image_net(cudnn)
    x = image().astype("float32")
    vectors = [tf.ones(v.shape) for v in net.trainable_variables]
    product = tf.function(lambda: hessian_vector_product(net, x, x, vectors))
    with pytest.raises(ValueError, match="CudnnRNNBackpropV3"):
        product.get_concrete_function()


def fit(net, x, **kwargs):
    model = constant_lesam(net, curvature="hvp", **kwargs)
    model.compile("sgd", "mse")
    return model.fit(x, x, verbose=0)


@pytest.mark.parametrize("name", ["CropAndResizeGradImage", "moments"])
def test_what_no_weight_comes_before_is_not_refused(name):
    traced_before(tf.constant(image(), tf.float32))
    net = keras.Sequential(
        [keras.Input((4, 6, 2)), Call(REFUSED[name]), L.Conv2D(2, 1)]
    )
    net.compile("sgd", "mse")
    x = image().astype("float32")[:1]
    vectors = [tf.ones(v.shape) for v in net.trainable_variables]
    for product in hessian_vector_product(net, x, x, vectors):
        assert np.isfinite(product).all()


def test_sparse_ctc_is_refused():
    def loss(y, outputs):
        return tf.nn.ctc_loss(
            tf.sparse.from_dense(tf.cast(y, tf.int32)),
            tf.transpose(outputs, [1, 0, 2]),
            None,
            tf.fill([tf.shape(outputs)[0]], 5),
            blank_index=0,
        )

    net = keras.Sequential([keras.Input((5, 3)), L.Dense(4)])
    net.compile("sgd", loss)
    x, y = np.ones((2, 5, 3), "float32"), np.array([[1, 2], [3, 1]])
    vectors = [tf.ones(v.shape) for v in net.trainable_variables]
    with pytest.raises(ValueError, match=r"PreventGradient.*CTCLoss"):
        hessian_vector_product(net, x, y, vectors)


def test_a_recomputed_gradient_is_refused():
    """In a graph: TensorFlow raises a NotImplementedError of its own."""
    net = image_net(tf.recompute_grad(lambda x: x**3))
    x = image().astype("float32")
    vectors = [tf.ones(v.shape) for v in net.trainable_variables]
    product = tf.function(lambda: hessian_vector_product(net, x, x, vectors))
    with pytest.raises(ValueError, match=r"no second derivative.*recompute"):
        product()


class Experts(L.Layer):
    """One of two layers, by a condition or by a switch."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.one, self.other = L.Dense(3, "tanh"), L.Dense(3, "softplus")

    def build(self, shape):
        self.one.build(shape)
        self.other.build(shape)

    def call(self, x):
        is_positive = keras.ops.mean(x) > 0
        if self.kind == "cond":
            return keras.ops.cond(
                is_positive, lambda: self.one(x), lambda: self.other(x)
            )
        index = keras.ops.cast(is_positive, "int32")
        return keras.ops.switch(index, [self.other, self.one], x)

    def compute_output_shape(self, shape):
        return (*shape[:-1], 3)


@pytest.mark.parametrize("kind", ["cond", "switch"])
def test_branches_are_for_reverse_mode(kind):
    net = keras.Sequential([keras.Input((4,)), Experts(kind), L.Dense(3)])
    net.compile("sgd", "mse")
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(8, 4)), rng.normal(size=(8, 3))
    vectors = [tf.ones(v.shape) for v in net.trainable_variables]
    eager = hessian_vector_product(net, x, y, vectors)
    graph = tf.function(lambda: hessian_vector_product(net, x, y, vectors))()
    for a, b in zip(eager, graph):
        np.testing.assert_allclose(a, b, atol=1e-5)
    with pytest.raises(ValueError, match=r"branches.*method='forward_over"):
        hessian_vector_product(net, x, y, vectors, method=FORWARD)
    model = LESAMModel(
        net, 0.1, total_steps=2, curvature="hvp", hvp_method=FORWARD
    )
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match=r"branches.*hvp_method='forward_over"):
        model.fit(x, y, verbose=0)


@pytest.mark.parametrize("hvp_method", ["auto", FORWARD])
@pytest.mark.parametrize("jit_compile", [False, True])
def test_the_budget_of_a_quadratic_loss_is_reached(hvp_method, jit_compile):
    net = keras.Sequential(
        [
            keras.Input((4, 6, 2)),
            L.Conv2D(1, 1, use_bias=False),
            L.UpSampling2D(2, interpolation="bilinear"),
        ]
    )
    model = LESAMModel(
        net,
        0.1,
        curvature="hvp",
        hvp_method=hvp_method,
        rho_max=None,
        warmup=0,
        anneal=0,
    )
    model.compile(keras.optimizers.SGD(0.0), "mse", jit_compile=jit_compile)
    y = np.random.default_rng(2).normal(size=(2, 8, 12, 1))
    history = model.fit(image(), y, verbose=0).history
    np.testing.assert_allclose(history["sharpness"], 0.1, rtol=1e-4)


@pytest.mark.parametrize("hvp_method", ["auto", FORWARD])
def test_replicas_resize_too(hvp_method):
    def history(strategy):
        keras.utils.set_random_seed(0)
        with strategy.scope():
            net = keras.Sequential(
                [
                    keras.Input((4, 6, 2)),
                    L.Conv2D(2, 1, activation="softsign"),
                    L.UpSampling2D(2, interpolation="bilinear"),
                ]
            )
            model = constant_lesam(
                net,
                curvature="hvp",
                hvp_method=hvp_method,
                perturbation_scope="global",
            )
            model.compile(keras.optimizers.SGD(0.1), "mse")
        y = np.random.default_rng(2).normal(size=(2, 8, 12, 2))
        fitted = model.fit(image(), y, epochs=2, verbose=0).history
        return [*fitted["loss"], *fitted["sharpness"]]

    alone = tf.distribute.get_strategy()
    np.testing.assert_allclose(history(mirrored(2)), history(alone), rtol=1e-4)
