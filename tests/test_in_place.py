"""Models that the stateless passes cannot see through, and those that they can.

Each of the former comes with an open twin: the same net without what hides its
weights, which has to end at the same weights.
"""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from keras_lesam import LESAMModel
from keras_lesam import SAMModel
from keras_lesam import curvature
from keras_lesam import landscape
from keras_lesam import rules
from tests.helpers import assert_close_weights
from tests.helpers import assert_same_weights
from tests.helpers import constant_lesam
from tests.helpers import mirrored
from tests.helpers import train

pytestmark = pytest.mark.filterwarnings("ignore:.*moves its weights in place")
MOVES = "moves its weights in place"


class Open(layers.Layer):
    """A dense layer with noise, dropout and a statistic."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dropout = layers.Dropout(0.3, seed=3)
        self.normalization = layers.BatchNormalization()

    def build(self, shape):
        self.w = self.add_weight(shape=(shape[-1], 4), name="w")
        self.normalization.build((None, 4))
        self.built = True

    def compute(self, x, training):
        x = self.normalization(keras.ops.tanh(x @ self.w), training=training)
        return self.dropout(x, training=training)

    def call(self, x, training=False):
        return self.compute(x, training)


class Function(Open):
    @tf.function
    def helper(self, x, training):
        return self.compute(x, training)

    def call(self, x, training=False):
        return self.helper(x, training)


class FunctionCall(Open):
    @tf.function
    def call(self, x, training=False):
        return self.compute(x, training)


class InACond(Open):
    def call(self, x, training=False):
        return keras.ops.cond(
            keras.ops.sum(x**2) >= 0,
            lambda: self.compute(x, training),
            lambda: 2 * self.compute(x, training),
        )


class Closure(Open):
    """A gradient of its own, by the weight that it closes over."""

    def product(self, x):
        @tf.custom_gradient
        def product(x):
            w = tf.convert_to_tensor(self.w)

            def gradient(dy, variables=None):
                dw = tf.transpose(x) @ dy
                dx = dy @ tf.transpose(w)
                return (dx, [dw]) if variables else dx

            return x @ w, gradient

        return product(x)

    def compute(self, x, training):
        x = keras.ops.tanh(self.product(x))
        x = self.normalization(x, training=training)
        return self.dropout(x, training=training)


class Arguments(Closure):
    """The same, by an argument: nothing is hidden."""

    def product(self, x):
        @tf.custom_gradient
        def product(x, w):
            def gradient(dy):
                return dy @ tf.transpose(w), tf.transpose(x) @ dy

            return x @ w, gradient

        return product(x, tf.convert_to_tensor(self.w))


class PartlyHidden(Closure):
    """Half of the gradient is seen: it is not None, and not right."""

    def product(self, x):
        return 0.5 * super().product(x) + 0.5 * (x @ self.w)


class Remat(Open):
    def compute(self, x, training):
        x = keras.remat(lambda t: keras.ops.tanh(t @ self.w))(x)
        x = self.normalization(x, training=training)
        return self.dropout(x, training=training)


HIDDEN = (Function, FunctionCall, InACond, Closure, PartlyHidden, Remat)
EVERY = pytest.mark.parametrize("kind", HIDDEN, ids=lambda k: k.__name__)


def make(kind):
    keras.utils.set_random_seed(0)
    return keras.Sequential([keras.Input((5,)), kind(), layers.Dense(1)])


def data(rows=24):
    rng = np.random.default_rng(0)
    dtype = keras.config.floatx()
    x, y = rng.normal(size=(rows, 5)), rng.normal(size=(rows, 1))
    return x.astype(dtype), y.astype(dtype)


def fit(model, **options):
    defaults = {
        **{"loss": "mse", "batch_size": 8, "epochs": 2, "shuffle": False},
        "optimizer": keras.optimizers.SGD(0.1, momentum=0.9),
    }
    return train(model, *data(), **{**defaults, **options})


def is_in_place(model):
    return model._passes.is_in_place


@EVERY
@pytest.mark.parametrize("mode", [{}, {"run_eagerly": True}], ids=str)
def test_two_passes_of_no_distance_are_plain_fit(kind, mode):
    """State and seeds once, the same numbers in both, weights put back."""
    plain, net = make(kind), make(kind)
    fit(plain, **mode)
    model = SAMModel(net, rules.SAM(1e-30))
    history = fit(model, **mode)
    # What closes over a tensor is seen where it runs eagerly.
    seen = mode and kind in (Closure, PartlyHidden)
    assert is_in_place(model) == (not seen)
    assert_close_weights(net, plain, atol=1e-6)
    assert max(np.abs(history["sharpness"])) == 0.0


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *((kind, {}) for kind in HIDDEN),
        (Function, {"curvature": "secant"}),
        (InACond, {"num_batch_splits": 2}),
        (PartlyHidden, {"ascent_fraction": 0.5}),
        (FunctionCall, {"ascent_every": 2}),
        (Closure, {"ascent_from": "momentum"}),
        (Remat, {"adaptive": True, "alpha": 0.2}),
    ],
    ids=str,
)
def test_it_trains_as_its_open_twin(kind, options):
    hidden, twin = make(kind), make(Open)
    models = [constant_lesam(net, 0.1, **options) for net in (hidden, twin)]
    histories = [fit(model) for model in models]
    assert [is_in_place(model) for model in models] == [True, False]
    assert_close_weights(hidden, twin, rtol=1e-9, atol=1e-9)
    for log in histories[1]:
        np.testing.assert_allclose(
            histories[0][log], histories[1][log], rtol=1e-7
        )


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kind", [InACond, Closure, PartlyHidden])
def test_an_exact_curvature_is_that_of_the_open_twin(kind):
    hidden, twin = make(kind), make(Open)
    histories = [
        fit(constant_lesam(net, 0.1, curvature="hvp")) for net in (hidden, twin)
    ]
    assert_close_weights(hidden, twin, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(
        histories[0]["rho"], histories[1]["rho"], rtol=1e-7
    )


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        # Its variance was traced before, without a second derivative.
        (Function, r"variance would be wrong.*normalization"),
        (Remat, "no second derivative"),
    ],
)
def test_a_curvature_that_would_be_wrong_is_refused(kind, match):
    with pytest.raises(ValueError, match=match):
        fit(constant_lesam(make(kind), 0.1, curvature="hvp"))


class Product(Open):
    def compute(self, x, training):
        return keras.ops.tanh(x @ self.w)


class HiddenProduct(Product):
    @tf.function
    def helper(self, x):
        return self.compute(x, False)

    def call(self, x, training=False):
        return self.helper(x)


@pytest.mark.usefixtures("float64")
def test_curvature_and_landscape_of_what_is_hidden():
    """By the tools, which are given the model itself or its wrapper."""
    found = []
    for kind in (HiddenProduct, Product):
        net = make(kind)
        net.compile("sgd", "mse")
        model = SAMModel(make(kind))
        model.compile("sgd", "mse")
        direction = [np.ones(v.shape) for v in net.trainable_variables]
        found.append(
            [
                curvature.top_eigenvalues(net, *data(), k=2, verbose=0),
                curvature.top_eigenvalues(model, *data(), k=2, verbose=0),
                landscape.loss_along(
                    *(net, *data()),
                    **{"direction": direction, "distances": [0.0, 0.3]},
                    verbose=0,
                ),
            ]
        )
        before = make(kind)
        assert_same_weights(net, before)
    for hidden, seen in zip(*found):
        np.testing.assert_allclose(hidden, seen, rtol=1e-6)


def test_forward_mode_is_refused_for_what_is_hidden():
    net = make(HiddenProduct)
    net.compile("sgd", "mse")
    with pytest.raises(ValueError, match="does not go by variables"):
        curvature.top_eigenvalues(
            net, *data(), method="forward_over_reverse", verbose=0
        )


@EVERY
def test_it_is_said_once(kind):
    model = SAMModel(make(kind), rho=0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(model)
        model.fit(*data(), verbose=0)
    said = [str(w.message) for w in caught if MOVES in str(w.message)]
    assert len(said) == 1
    if kind is not InACond:
        assert f"{model.model.layers[0].name}/w" in said[0]


@pytest.mark.parametrize("kind", [Open, Arguments])
def test_what_can_be_seen_is_not_moved(kind):
    model = SAMModel(make(kind), rho=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fit(model)
    assert not is_in_place(model)


ORDINARY = {
    "swish": lambda: [keras.Input((5,)), layers.Dense(4, "silu")],
    "lstm": lambda: [
        keras.Input((5, 3)),
        layers.LSTM(4, dropout=0.2, recurrent_dropout=0.2),
    ],
    "augmented": lambda: [
        keras.Input((8, 8, 3)),
        *(layers.RandomFlip(), layers.RandomRotation(0.1)),
        *(layers.Conv2D(2, 3), layers.BatchNormalization()),
        *(layers.SpatialDropout2D(0.2), layers.GlobalMaxPooling2D()),
    ],
    "embedding": lambda: [
        keras.Input((4,)),
        *(layers.Embedding(9, 3), layers.GlobalAveragePooling1D()),
        layers.LayerNormalization(),
    ],
    "group_norm": lambda: [
        keras.Input((6, 4)),
        *(layers.GroupNormalization(2), layers.Flatten()),
    ],
}


@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_models_are_not_moved(name):
    net = keras.Sequential([*ORDINARY[name](), layers.Dense(1)])
    model = SAMModel(net, rho=0.1)
    model.compile("sgd", "mse", metrics=["mae", keras.metrics.AUC()])
    x = np.ones((8, *net.input_shape[1:]), "float32")
    model.fit(x, np.ones((8, 1)), verbose=0)
    assert not is_in_place(model)


# State in loops and branches.


class NoisyCell(layers.Layer):
    """An RNN cell that drops out within the step."""

    def __init__(self, units):
        super().__init__()
        self.state_size = self.output_size = units
        self.inner = layers.Dense(units, activation="tanh")
        self.dropout = layers.Dropout(0.3)

    def build(self, shape):
        self.inner.build((None, shape[-1] + self.state_size))
        self.built = True

    def call(self, x, states, training=False):
        joined = keras.ops.concatenate([x, states[0]], -1)
        h = self.dropout(self.inner(joined), training=training)
        return h, [h]


class NoisyMap(layers.Layer):
    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(4)
        self.dropout = layers.Dropout(0.3)

    def build(self, shape):
        self.dense.build(shape[1:])
        self.built = True

    def call(self, x, training=False):
        return keras.ops.map(
            lambda t: self.dropout(self.dense(t), training=training), x
        )


LOOPS = {
    "cell": lambda: layers.RNN(NoisyCell(4)),
    "map": lambda: keras.Sequential([NoisyMap(), layers.Flatten()]),
}


@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.parametrize("mode", [{}, {"run_eagerly": True}], ids=str)
def test_state_in_a_loop(name, mode):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(16, 3, 2)).astype("float32")
    y = rng.normal(size=(16, 1)).astype("float32")
    nets = []
    for wrap in (lambda net: net, lambda net: SAMModel(net, rules.SAM(1e-30))):
        keras.utils.set_random_seed(0)
        net = keras.Sequential(
            [keras.Input((3, 2)), LOOPS[name](), layers.Dense(1)]
        )
        train(wrap(net), x, y, loss="mse", batch_size=8, epochs=2, **mode)
        nets.append(net)
    assert_close_weights(*nets, atol=1e-6)


@pytest.mark.parametrize("name", LOOPS)
def test_state_in_a_loop_is_refused_on_several_replicas(name):
    x, y = np.ones((16, 3, 2), "float32"), np.ones((16, 1), "float32")
    with mirrored(2).scope():
        net = keras.Sequential(
            [keras.Input((3, 2)), LOOPS[name](), layers.Dense(1)]
        )
        with pytest.raises(ValueError, match=r"inside of.*seed_generator_stat"):
            train(SAMModel(net, rho=0.1), x, y, loss="mse", batch_size=8)


# Weights that the model itself assigns.


@pytest.mark.parametrize("budget", ["zero", "tiny"])
def test_spectral_normalization_is_trained_as_without_the_wrapper(budget):
    zero = keras.optimizers.schedules.PiecewiseConstantDecay([99], [0.0, 1.0])
    nets = []
    for wrap in (
        lambda net: net,
        lambda net: (
            LESAMModel(net, zero)
            if budget == "zero"
            else SAMModel(net, rules.SAM(1e-12))
        ),
    ):
        keras.utils.set_random_seed(0)
        net = keras.Sequential(
            [
                keras.Input((5,)),
                layers.SpectralNormalization(layers.Dense(4)),
                layers.Dense(1),
            ]
        )
        fit(wrap(net))
        nets.append(net)
    assert_close_weights(*nets, atol=1e-6)


# What goes wrong on the way.


class FailsLater(Open):
    """Fails in the second pass of the second step, in the graph."""

    def __init__(self, count):
        super().__init__()
        self.count = count

    @tf.function
    def helper(self, x, training):
        return self.compute(x, training)

    def call(self, x, training=False):
        x = self.helper(x, training)
        count = self.count.assign_add(1)
        with tf.control_dependencies(
            [tf.debugging.assert_less(count, 4, "too many passes")]
        ):
            return tf.identity(x)


@pytest.mark.parametrize("mode", [{}, {"run_eagerly": True}], ids=str)
def test_weights_are_put_back_after_an_exception(mode):
    x, y = data()
    count = tf.Variable(0)
    net = make(lambda: FailsLater(count))
    count.assign(0)
    model = SAMModel(net, rho=0.5)
    model.compile(keras.optimizers.SGD(0.0), "mse", **mode)
    before = [w.numpy() for w in net.trainable_variables]

    def train_on():
        for _ in range(4):
            model.train_on_batch(x, y)
            # What the passes have counted was put back with their state.
            count.assign_add(1)

    with pytest.raises(tf.errors.InvalidArgumentError, match="too many"):
        train_on()
    for variable, value in zip(net.trainable_variables, before):
        np.testing.assert_array_equal(variable.numpy(), value)


def test_several_replicas_are_refused_by_name():
    with mirrored(2).scope():
        model = SAMModel(make(Function), rho=0.1)
        with pytest.raises(ValueError, match=r"several replicas.*function/w"):
            fit(model)


def test_it_compiles_under_xla():
    nets = []
    for kind in (Function, Open):
        net = make(kind)
        fit(constant_lesam(net, 0.1), jit_compile=True)
        nets.append(net)
    assert_close_weights(*nets, atol=1e-5)


def test_mixed_precision():
    keras.config.set_dtype_policy("mixed_float16")
    plain, net = make(Function), make(Function)
    fit(plain)
    fit(SAMModel(net, rules.SAM(1e-7)))
    assert_close_weights(net, plain, atol=2e-2)


def test_a_resumed_training_ends_at_the_same_weights(tmp_path):
    keras.saving.register_keras_serializable("tests_in_place")(Function)
    whole = SAMModel(make(Function), rho=0.1)
    fit(whole, epochs=4)
    first = SAMModel(make(Function), rho=0.1)
    fit(first, epochs=2)
    first.save_weights(tmp_path / "half.weights.h5")
    assert len(first.weights) == len(first.model.weights)
    again = SAMModel(make(Function), rho=0.1)
    fit(again, epochs=2)
    assert_same_weights(first, again)
