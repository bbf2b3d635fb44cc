"""One battery for all rules, and for the steps of one pass."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from keras_lesam import LESAMModel
from keras_lesam import SAMModel
from keras_lesam import rules
from tests.helpers import assert_close_weights
from tests.helpers import assert_same_weights
from tests.helpers import classification_data
from tests.helpers import constant_lesam
from tests.helpers import crossentropy
from tests.helpers import dense_net
from tests.helpers import mirrored
from tests.helpers import noisy_net
from tests.helpers import train

RULES = {
    "SAM": lambda rho: rules.SAM(rho),
    "ASAM": lambda rho: rules.ASAM(rho, eta=0.1),
    "UnnormalizedSAM": lambda rho: rules.UnnormalizedSAM(rho),
    "GSAM": lambda rho: rules.GSAM(rho, alpha=0.3),
    "FriendlySAM": lambda rho: rules.FriendlySAM(rho, decay=0.7, share=0.8),
    "WSAM": lambda rho: rules.WSAM(rho, gamma=0.7),
    "LookSAM": lambda rho: rules.LookSAM(rho, alpha=0.6, every=2),
    "StableSAM": lambda rho: rules.StableSAM(rho),
}
ONE_PASS = ("SAM previous", "SAM momentum", "ASAM momentum")
FAMILY = {
    **{name: {} for name in RULES},
    **{name: {"ascent_from": name.split()[1]} for name in ONE_PASS},
    "GSAM every 3rd": {"ascent_every": 3},
    "LE-SAM": {},
    "LE-SAM every 3rd": {"ascent_every": 3},
    "LE-SAM momentum": {"ascent_from": "momentum"},
}
EVERY = pytest.mark.parametrize("name", FAMILY)
KEEPS = [
    *("FriendlySAM", "LookSAM", "SAM previous", "SAM momentum"),
    "LE-SAM momentum",
]


def wrap(name, net, rho=0.1, **options):
    """One of the family around a net; `rho` is LE-SAM's sigma."""
    options = {**FAMILY[name], **options}
    if name.startswith("LE-SAM"):
        return constant_lesam(net, rho, **options)
    return SAMModel(net, RULES[name.split()[0]](rho), **options)


def memory_of(model):
    """The weights that are the wrapper's own."""
    of_net = {id(w) for w in model.model.weights}
    return [w for w in model.weights if id(w) not in of_net]


def momentum():
    return keras.optimizers.SGD(0.1, momentum=0.9)


@EVERY
def test_without_a_radius_it_is_plain_fit_bit_for_bit(name):
    x, y = classification_data(rows=64, shape=(8, 8, 1))
    plain, net = noisy_net(), noisy_net()
    train(plain, x, y, optimizer=momentum(), metrics=["accuracy"])
    history = train(
        wrap(name, net, 0), x, y, optimizer=momentum(), metrics=["accuracy"]
    )
    assert_same_weights(net, plain)
    assert history["rho"] == [0.0] * 3


@EVERY
@pytest.mark.usefixtures("float64")
def test_a_schedule_that_is_zero_is_plain_fit(name):
    x, y = classification_data()
    zero = keras.optimizers.schedules.PiecewiseConstantDecay([1e6], [0.0, 1.0])
    plain, net = dense_net(), dense_net()
    train(plain, x, y, optimizer=momentum())
    if name.startswith("LE-SAM"):
        model = LESAMModel(net, zero, **FAMILY[name])
    else:
        model = wrap(name, net, zero)
    history = train(model, x, y, optimizer=momentum())
    assert_close_weights(net, plain, atol=1e-12)
    assert history["rho"] == [0.0] * 3


@EVERY
def test_it_trains_and_climbs(name):
    x, y = classification_data(rows=128)
    net, plain = dense_net(), dense_net()
    model = wrap(name, net, 0.05)
    history = train(model, x, y, epochs=8, optimizer=momentum())
    train(plain, x, y, epochs=8, optimizer=momentum())
    assert history["loss"][-1] < history["loss"][0]
    assert 0 < history["rho"][-1] < np.inf
    if "sharpness" in history:
        assert history["sharpness"][-1] > 0
    assert not np.allclose(net.get_weights()[0], plain.get_weights()[0])


@EVERY
def test_config_round_trip(name, tmp_path):
    model = wrap(name, dense_net(), 0.3, perturbation_scope="global")
    model.compile(momentum(), crossentropy())
    model.save(tmp_path / "model.keras")
    others = [
        type(model).from_config(model.get_config()),
        keras.models.load_model(tmp_path / "model.keras"),
        keras.models.model_from_json(model.to_json()),
    ]
    for other in others:
        assert type(other) is type(model)
        config = {**model.get_config(), "model": None}
        assert {**other.get_config(), "model": None} == config
        if hasattr(model, "rule"):
            assert repr(other.rule) == repr(model.rule)


@pytest.mark.parametrize(
    ("name", "policy"),
    [(name, "mixed_float16") for name in FAMILY]
    # Nothing but the loss scale is different.
    + [(name, "mixed_bfloat16") for name in ("SAM", "GSAM", "SAM momentum")],
)
def test_mixed_precision_takes_the_same_steps(name, policy):
    x, y = classification_data(rows=32)
    found = []
    for chosen in ("float32", policy):
        keras.config.set_dtype_policy(chosen)
        net = dense_net()
        history = train(
            *(wrap(name, net), x, y),
            **{"batch_size": 8, "epochs": 2, "optimizer": momentum()},
        )
        found.append((net.get_weights(), history["rho"]))
    (weights, rho), (others, other_rho) = found
    np.testing.assert_allclose(rho, other_rho, rtol=0.05)
    for a, b in zip(weights, others):
        np.testing.assert_allclose(a, b, atol=0.05)


@pytest.mark.parametrize("name", KEEPS)
def test_overflowing_steps_are_skipped_and_not_remembered(name):
    """A loss scale that overflows at first, and falls."""
    keras.config.set_dtype_policy("mixed_float16")
    x, y = classification_data(rows=32)
    model = wrap(name, dense_net())
    optimizer = keras.optimizers.LossScaleOptimizer(
        keras.optimizers.SGD(0.1), initial_scale=2.0**24
    )
    train(model, x, y, optimizer=optimizer, batch_size=4, epochs=4)
    assert float(optimizer.dynamic_scale) < 2.0**24
    for weight in model.weights:
        assert np.isfinite(weight.numpy()).all(), weight.path
    assert any(np.any(w.numpy()) for w in memory_of(model))


@EVERY
@pytest.mark.parametrize("scope", ["global", "replica"])
@pytest.mark.usefixtures("float64")
def test_replicas(name, scope):
    """Global: one device on the whole batch; replica: one with parts."""
    x, y = classification_data(rows=64)
    fit = {"batch_size": 16, "epochs": 3, "shuffle": False}
    strategy = mirrored(2)
    with strategy.scope():
        model = wrap(name, dense_net(), perturbation_scope=scope)
        history = train(model, x, y, optimizer=momentum(), **fit)
    parts = 1 if scope == "global" else 2
    alone = wrap(name, dense_net(), num_batch_splits=parts)
    expected = train(alone, x, y, optimizer=momentum(), **fit)
    assert_close_weights(model, alone, atol=1e-7)
    for log in expected:
        np.testing.assert_allclose(history[log], expected[log], rtol=1e-6)
    for variable in model.variables:
        copies = strategy.experimental_local_results(variable.value)
        np.testing.assert_array_equal(copies[0], copies[1])


@EVERY
@pytest.mark.usefixtures("float64")
def test_the_step_compiles_under_xla(name):
    x, y = classification_data(rows=12)
    batch = tf.constant(x), tf.constant(y)
    found = []
    for jit_compile in (True, False):
        model = wrap(name, dense_net())
        model.compile(momentum(), crossentropy())
        model.build((12, 6))
        step = tf.function(
            model.train_step, jit_compile=jit_compile, autograph=False
        )
        # The first call makes variables, and may trace twice.
        step(batch)
        traces = step.experimental_get_tracing_count()
        logs = [step(batch) for _ in range(3)]
        assert step.experimental_get_tracing_count() == traces
        found.append((model.get_weights(), logs[-1]))
    (weights, logs), (others, other_logs) = found
    for log in logs:
        np.testing.assert_allclose(logs[log], other_logs[log], rtol=1e-9)
    for a, b in zip(weights, others):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


@EVERY
def test_fit_traces_once_and_a_new_radius_does_not_retrace(name):
    x, y = classification_data()
    model = wrap(name, dense_net())
    train(model, x, y)
    function = model.train_function
    budget = "sigma" if name.startswith("LE-SAM") else "rho"
    before = getattr(model, budget)
    setattr(model, budget, 2 * before)
    history = model.fit(x, y, verbose=0).history
    assert model.train_function is function
    assert getattr(model, budget) == 2 * before
    assert history["rho"][-1] > 0


@EVERY
def test_export(name, tmp_path):
    x, y = classification_data()
    net = dense_net()
    train(wrap(name, net), x, y, epochs=1)
    wrap(name, net).export(tmp_path / "exported", verbose=False)
    served = tf.saved_model.load(str(tmp_path / "exported"))
    np.testing.assert_allclose(
        served.serve(x), net.predict(x, verbose=0), rtol=1e-6, atol=1e-6
    )


@EVERY
def test_zero_gradients_move_nothing(name):
    x = np.zeros((8, 6), "float32")
    keras.utils.set_random_seed(0)
    net = keras.Sequential([keras.Input((6,)), layers.Dense(4, use_bias=False)])
    before = net.get_weights()
    model = wrap(name, net)
    history = train(model, x, np.zeros(8, int), batch_size=4)
    assert history["rho"] == [0.0] * 3
    np.testing.assert_array_equal(net.get_weights()[0], before[0])
    for weight in model.weights:
        assert np.isfinite(weight.numpy()).all()


@EVERY
@pytest.mark.usefixtures("float64")
def test_sparse_embeddings_take_the_steps_of_dense_ones(name):
    """Words that occur several times in a batch; the same table, looked up."""
    rng = np.random.default_rng(0)
    words, y = rng.integers(5, size=(32, 3)), rng.integers(4, size=32)
    one_hot = np.eye(5)[words]
    table = rng.normal(size=(5, 4))

    def trained(first, x):
        keras.utils.set_random_seed(0)
        net = keras.Sequential(
            [
                keras.Input(x.shape[1:]),
                *(first, layers.GlobalAveragePooling1D()),
                layers.Dense(4, kernel_initializer="glorot_uniform"),
            ]
        )
        net.layers[0].set_weights([table])
        net.layers[-1].set_weights([table[:4], np.zeros(4)])
        train(wrap(name, net), x, y, batch_size=8, shuffle=False)
        return net

    sparse = trained(layers.Embedding(5, 4), words)
    dense = trained(layers.Dense(4, use_bias=False), one_hot)
    assert_close_weights(sparse, dense, atol=1e-9)
    assert not np.allclose(sparse.get_weights()[0], table, atol=1e-3)


@pytest.mark.parametrize("name", [*KEEPS, "SAM", "LE-SAM every 3rd"])
def test_a_resumed_training_ends_at_the_same_weights(name, tmp_path):
    x, y = classification_data(rows=48)
    fit = {"batch_size": 8, "shuffle": False, "verbose": 0}
    whole = wrap(name, dense_net())
    whole.compile(momentum(), crossentropy())
    whole.fit(x, y, epochs=4, **fit)
    first = wrap(name, dense_net())
    first.compile(momentum(), crossentropy())
    first.fit(x, y, epochs=2, **fit)
    first.save(tmp_path / "half.keras")
    second = keras.models.load_model(tmp_path / "half.keras")
    second.fit(x, y, epochs=2, **fit)
    assert_same_weights(second, whole)


@EVERY
def test_frozen_layers_several_inputs_weights_and_unbuilt_models(name):
    rng = np.random.default_rng(0)
    x = {"a": rng.normal(size=(32, 3)), "b": rng.normal(size=(32, 2))}

    class TwoInputs(keras.Model):
        def __init__(self):
            super().__init__()
            self.frozen = layers.Dense(5, trainable=False)
            self.normalization = layers.BatchNormalization()
            self.top = layers.Dense(1, kernel_regularizer="l2")

        def call(self, inputs):
            joined = keras.ops.concatenate([inputs["a"], inputs["b"]], -1)
            return self.top(self.normalization(self.frozen(joined)))

    net = TwoInputs()
    history = train(
        *(wrap(name, net), x, rng.normal(size=(32, 1))),
        **{"loss": "mse", "batch_size": 8, "optimizer": momentum()},
        sample_weight=rng.uniform(size=32),
    )
    assert history["loss"][-1] < history["loss"][0]
    assert history["rho"][-1] > 0


@EVERY
def test_perturb_moves_some_weights_only(name):
    """With eps on the last layer alone, the first one's `h` is not `g`."""
    x, y = classification_data()
    model = wrap(name, dense_net(), perturb=last_layer)
    history = train(model, x, y, batch_size=16)
    assert history["rho"][-1] > 0
    if name in KEEPS and name != "LookSAM":
        assert len(memory_of(model)) == 2


def last_layer(variable):
    return variable.shape[-1] == 4


@pytest.mark.parametrize("name", [n for n in FAMILY if " " not in n])
def test_a_share_of_the_rows_and_parts_of_the_batch(name):
    x, y = classification_data(rows=64)
    for options in ({"ascent_fraction": 0.5}, {"num_batch_splits": 2}):
        history = train(
            *(wrap(name, dense_net(), **options), x, y),
            **{"epochs": 8, "optimizer": momentum()},
        )
        assert np.isfinite(history["loss"]).all()
        assert history["rho"][-1] > 0
        assert ("sharpness" in history) == ("num_batch_splits" in options)
