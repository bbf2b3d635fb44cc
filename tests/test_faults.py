"""Numbers that are not finite, where plain Keras would have survived."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from keras_lesam import LESAMModel
from keras_lesam import SAMModel
from keras_lesam import SharpnessAwareModel
from keras_lesam import ascents
from keras_lesam import rules
from tests.helpers import assert_close_weights
from tests.helpers import constant_lesam
from tests.helpers import mirrored
from tests.helpers import train


class Root(layers.Layer):
    """The square root, whose gradient at 0 is infinite."""

    def call(self, x):
        return tf.sqrt(x)


class Length(layers.Layer):
    """The norm, whose gradient at 0 is not a number."""

    def call(self, x):
        return tf.norm(x, axis=-1, keepdims=True)


def root_net():
    """Of a unit that is on at the weights, and off at `w + eps`."""
    keras.utils.set_random_seed(0)
    unit = layers.Dense(
        1,
        "relu",
        kernel_initializer=keras.initializers.Constant(0.1),
        bias_initializer=keras.initializers.Constant(0.1),
    )
    return keras.Sequential([keras.Input((4,)), unit, Root()])


def length_net():
    keras.utils.set_random_seed(0)
    units = layers.Dense(
        8, "relu", bias_initializer=keras.initializers.Constant(0.2)
    )
    return keras.Sequential([keras.Input((4,)), units, Length()])


def data(rows=64):
    x = np.abs(np.random.default_rng(0).normal(size=(rows, 4)))
    return x.astype("float32"), np.full((rows, 1), 0.9, "float32")


KINDS = {
    "sam": {"rule": rules.SAM(2.0)},
    "asam": {"rule": rules.ASAM(20.0)},
    "gsam": {"rule": rules.GSAM(2.0)},
    "looksam": {"rule": rules.LookSAM(2.0, every=2)},
    "friendly": {"rule": rules.FriendlySAM(2.0)},
    "fraction": {"rule": rules.SAM(2.0), "ascent": ascents.Fraction(0.5)},
    "every": {"rule": rules.SAM(2.0), "ascent": ascents.Every(2)},
    "previous": {"rule": rules.SAM(2.0), "ascent": ascents.Previous()},
    "momentum": {"rule": rules.SAM(2.0), "ascent": ascents.Momentum()},
    "parts": {"rule": rules.SAM(2.0), "num_batch_splits": 2},
    "lesam": {"budget": 5.0},
    "secant": {"budget": 5.0, "curvature": "secant"},
    "hvp": {"budget": 5.0, "curvature": "hvp"},
}
MODES = [{}, {"run_eagerly": True}, {"jit_compile": True}]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_a_gradient_that_is_not_finite_is_not_applied(kind, mode):
    """The loss at `w + eps` is finite; its gradient is not."""
    for make in (root_net, length_net):
        net = make()
        model = SharpnessAwareModel(net, **KINDS[kind])
        train(
            *(model, *data()),
            **{"loss": "mse", "batch_size": 16, "epochs": 3, **mode},
            # So little that the units stay on at the weights themselves.
            optimizer=keras.optimizers.SGD(1e-4, momentum=0.9),
        )
        for weight in model.weights:
            assert np.isfinite(weight.numpy()).all(), (make, weight.path)


class HiddenUnit(layers.Layer):
    """The unit of `root_net`, whose weights are read behind a function."""

    def build(self, shape):
        constant = {"initializer": keras.initializers.Constant(0.1)}
        self.w = self.add_weight(shape=(shape[-1], 1), **constant)
        self.b = self.add_weight(shape=(1,), **constant)

    @tf.function
    def hidden(self, x):
        return tf.sqrt(tf.nn.relu(x @ self.w + self.b))

    def call(self, x):
        return self.hidden(x)


@pytest.mark.filterwarnings("ignore:.*moves its weights in place")
@pytest.mark.parametrize("mode", MODES[:2], ids=str)
def test_passes_in_place_are_looked_at_too(mode):
    plain, net = root_net(), keras.Sequential([keras.Input((4,)), HiddenUnit()])
    one = {"loss": "mse", "batch_size": 16, "epochs": 1, **mode}
    train(plain, *data(16), **one)
    model = SAMModel(net, rho=50.0)
    train(model, *data(16), **one)
    assert model._passes.is_in_place
    assert_close_weights(net, plain, atol=1e-7)


# Under XLA the gradient of a unit that is off is 0, whatever comes after it.
@pytest.mark.parametrize("mode", MODES[:2], ids=str)
def test_the_step_is_then_a_plain_one(mode):
    plain, net = root_net(), root_net()
    one = {"loss": "mse", "batch_size": 16, "epochs": 1, **mode}
    train(plain, *data(16), **one)
    history = train(SAMModel(net, rho=50.0), *data(16), **one)
    assert history["rho"] == [0.0]
    assert_close_weights(net, plain, atol=1e-7)


def test_a_loss_scale_is_lowered_by_a_bad_gradient():
    keras.config.set_dtype_policy("mixed_float16")
    net = keras.Sequential([keras.Input((4,)), layers.Dense(1)])
    for options in ({}, {"ascent_from": "momentum"}, {"ascent_fraction": 0.5}):
        model = constant_lesam(net, 0.1, **options)
        optimizer = keras.optimizers.LossScaleOptimizer(
            keras.optimizers.SGD(0.01), initial_scale=2.0**20
        )
        train(model, *data(), loss="mse", optimizer=optimizer, batch_size=8)
        assert float(optimizer.dynamic_scale) < 2.0**20
        assert np.isfinite(net.get_weights()[0]).all()


def test_sparse_gradients_that_are_not_finite():
    """Rows of an embedding, of which the passes see others."""
    keras.utils.set_random_seed(0)
    net = keras.Sequential(
        [
            keras.Input((2,)),
            layers.Embedding(9, 4, embeddings_initializer="ones"),
            layers.GlobalAveragePooling1D(),
            layers.ReLU(),
            Length(),
        ]
    )
    x = np.random.default_rng(0).integers(9, size=(32, 2))
    for options in ({}, {"ascent_fraction": 0.5}):
        model = LESAMModel(net, 50.0, None, warmup=0, anneal=0, **options)
        train(model, x, np.full((32, 1), 9.0), loss="mse", batch_size=8)
        assert np.isfinite(net.get_weights()[0]).all()


# Of replicas, of which one cannot follow what all of them share.

# With eps = -0.2 in the bias: units that stay on, and such that do not. The
# former are where they should be, and have no say in the direction.
STAYS, GOES = (2.5, np.sqrt(1.1)), (0.0, 5.0)
TOGETHER = {
    "sam": {"rule": rules.SAM(0.2)},
    "gsam": {"rule": rules.GSAM(0.2)},
    "looksam": {"rule": rules.LookSAM(0.2, every=1)},
    "friendly": {"rule": rules.FriendlySAM(0.2)},
    "wsam": {"rule": rules.WSAM(0.2)},
    "every": {"rule": rules.SAM(0.2), "ascent": ascents.Every(1)},
    "lesam": {"budget": 1.5},
    "secant": {"budget": 1.5, "curvature": "secant"},
    "hvp": {"rule": rules.LossEquated(0.2), "budget": 9, "curvature": "hvp"},
}


def halves(*kinds, rows=8):
    """One kind of rows for each replica."""
    x = np.concatenate([np.full((rows // 2, 4), x) for x, _ in kinds])
    y = np.concatenate([np.full((rows // 2, 1), y) for _, y in kinds])
    return x.astype("float32"), y.astype("float32")


def together(kind, scope="global", rows=(STAYS, GOES), steps=1, **options):
    """A step of two replicas; the model and its logs."""
    with mirrored(2).scope():
        net = root_net()
        model = net
        if kind:
            method = {**KINDS, **TOGETHER}[kind]
            model = SharpnessAwareModel(net, **method, perturbation_scope=scope)
        optimizer = options.pop("optimizer", keras.optimizers.SGD(1e-3))
        data = halves(*rows)
        one = {"loss": "mse", "batch_size": 8, "epochs": steps}
        history = train(model, *data, optimizer=optimizer, **one, **options)
    for variable in [*net.weights, *model.optimizer.variables]:
        copies = mirrored(2).experimental_local_results(variable.value)
        for copy in copies:
            np.testing.assert_array_equal(
                copy, copies[0], err_msg=variable.path
            )
            assert np.isfinite(copy).all(), variable.path
    return net, history


@pytest.fixture(scope="module")
def plain_together():
    return together(None)[0].get_weights()


@pytest.mark.parametrize("kind", TOGETHER)
def test_replicas_that_share_a_perturbation_decide_together(
    kind, plain_together
):
    """One of them has no gradient there: the step of all is a plain one."""
    net, history = together(kind)
    for found, expected in zip(net.get_weights(), plain_together):
        np.testing.assert_allclose(found, expected, atol=1e-7)
    assert history["rho"] == history["sharpness"] == [0.0]


@pytest.mark.parametrize("kind", ["sam", "secant", "hvp"])
def test_they_follow_it_where_all_can(kind):
    """Or the test above would show nothing."""
    _, history = together(kind, rows=(STAYS, (2.5, 5.0)))
    assert history["rho"][0] > 0.01
    assert history["sharpness"][0] > 0.01


ALONE = {
    "global": ("previous", "momentum", "fraction", "parts"),
    "replica": ("sam", "gsam", "looksam", "momentum", "fraction", "parts"),
}


@pytest.mark.parametrize(
    ("scope", "kind"),
    [(s, kind) for s, kinds in ALONE.items() for kind in kinds],
)
def test_what_replicas_apply_is_finite(scope, kind):
    together(kind, scope, rows=(GOES, STAYS), steps=3)


def test_without_a_pass_at_the_weights_all_leave_the_step_out():
    """The second, as the first has no perturbation; the third has none."""
    weights = [
        together("momentum", steps=steps)[0].get_weights()
        for steps in (1, 2, 3)
    ]
    np.testing.assert_array_equal(weights[0][1], weights[1][1])
    assert weights[1][1] != weights[2][1]


# And of a loss scale, which is lowered where it may be at fault.


def scaled(initial_scale):
    return keras.optimizers.LossScaleOptimizer(
        keras.optimizers.SGD(1e-3), initial_scale=initial_scale
    )


@pytest.mark.parametrize(
    "kind", ["sam", "gsam", "looksam", "fraction", "parts"]
)
@pytest.mark.parametrize("mode", MODES[:2], ids=str)
def test_a_loss_scale_is_lowered_by_the_second_pass(kind, mode):
    """Step by step, until it cannot be what overflows; then a plain step."""
    keras.config.set_dtype_policy("mixed_float16")
    net = root_net()
    options = {**KINDS[kind]}
    if kind == "looksam":
        options["rule"] = rules.LookSAM(2.0, every=1)
    model = SharpnessAwareModel(net, **options)
    optimizer = scaled(4.0)
    found = []
    for _ in range(4):
        train(
            *(model, *halves(GOES, GOES)),
            **{"loss": "mse", "batch_size": 8, "epochs": 1, **mode},
            optimizer=optimizer,
        )
        scale = float(optimizer.dynamic_scale)
        found.append((scale, int(optimizer.iterations), net.get_weights()[1]))
    assert [step[:2] for step in found] == [(2, 0), (1, 0), (1, 1), (1, 2)]
    assert found[1][2] == np.float32(0.1) != found[2][2]
    assert np.isfinite(found[-1][2]).all()


@pytest.mark.parametrize(
    ("kind", "scope"),
    [("sam", "global"), ("sam", "replica"), ("fraction", "global")],
)
def test_replicas_leave_a_step_out_together(kind, scope):
    """Whichever of them has overflowed, where Keras asks the first one."""
    keras.config.set_dtype_policy("mixed_float16")
    optimizer = scaled(4.0)
    net, _ = together(kind, scope, optimizer=optimizer)
    scale = optimizer.dynamic_scale.value
    assert mirrored(2).experimental_local_results(scale)[0] == 2.0
    np.testing.assert_array_equal(net.get_weights()[1], np.float32(0.1))


@keras.saving.register_keras_serializable("tests_faults")
class Dividing(rules.SAM):
    """Its update is not finite though both gradients are."""

    def update(self, plain, perturbed, state):
        return [None if h is None else h / 0.0 for h in perturbed], state


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_what_a_rule_makes_of_finite_gradients_is_looked_at_too(mode):
    plain, net = root_net(), root_net()
    one = {"loss": "mse", "batch_size": 16, "epochs": 1, **mode}
    train(plain, *data(16), **one)
    train(SAMModel(net, Dividing(0.01)), *data(16), **one)
    assert_close_weights(net, plain, atol=1e-7)


def test_replicas_look_at_what_their_rule_makes_together(plain_together):
    @keras.saving.register_keras_serializable("tests_faults")
    class DividingByAZero(rules.SAM):
        def update(self, plain, perturbed, state):
            zero = tf.where(tf.abs(plain[1]) > 1e-3, 0.0, 1.0)
            return [h / zero[0] for h in perturbed], state

    TOGETHER["dividing"] = {"rule": DividingByAZero(0.01)}
    try:
        found, _ = together("dividing")
    finally:
        del TOGETHER["dividing"]
    for weight, expected in zip(found.get_weights(), plain_together):
        np.testing.assert_allclose(weight, expected, atol=1e-7)
