"""The budget met to second order: `curvature="hvp"` and `"secant"`."""

import math
from types import SimpleNamespace

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from keras_lesam import LESAMModel
from keras_lesam import _hessian
from keras_lesam import estimators
from keras_lesam import rules
from tests import reference
from tests.helpers import assert_close_weights
from tests.helpers import assert_same_weights
from tests.helpers import classification_data
from tests.helpers import constant_lesam
from tests.helpers import crossentropy
from tests.helpers import dense_net
from tests.helpers import kernels_only
from tests.helpers import mirrored
from tests.helpers import noisy_net
from tests.helpers import traces
from tests.helpers import train

X = np.zeros((4, 1))


@keras.saving.register_keras_serializable("tests")
class Quadratic(layers.Layer):
    """Adds the loss `b.w + w.A w / 2` of its own weights."""

    def __init__(self, hessian, linear, start, **kwargs):
        super().__init__(**kwargs)
        self.hessian, self.linear, self.start = hessian, linear, start

    def build(self, input_shape):
        self.w = self.add_weight(
            shape=(len(self.start),),
            initializer=lambda shape, dtype: tf.constant(self.start, dtype),
        )

    def call(self, x):
        w = tf.convert_to_tensor(self.w)
        curved = tf.linalg.matvec(tf.constant(self.hessian, w.dtype), w)
        linear = tf.constant(self.linear, w.dtype)
        self.add_loss(tf.reduce_sum(w * (linear + curved / 2)))
        return x

    def get_config(self):
        own = {n: getattr(self, n) for n in ("hessian", "linear", "start")}
        return {**super().get_config(), **own}


def quadratic(hessian, linear, start, learning_rate=0.01, **kwargs):
    """A LESAMModel whose loss is a quadratic of its weights, compiled."""
    net = keras.Sequential(
        [keras.Input((1,)), Quadratic(hessian, linear, start)]
    )
    model = constant_lesam(net, **kwargs)
    model.compile(keras.optimizers.SGD(learning_rate), loss=None)
    return model


class EachStep(keras.callbacks.Callback):
    """What each step logged, not the mean since the epoch began."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def on_train_batch_end(self, batch, logs=None):
        self.rows.append(dict(logs))
        self.model._statistics.reset_state()


def steps(model, count, x=X, **fit):
    watch = EachStep()
    model.fit(
        x, epochs=count, batch_size=len(x), callbacks=[watch], verbose=0, **fit
    )
    return watch.rows


def random_symmetric(size=6, seed=0):
    a = np.random.default_rng(seed).normal(size=(size, size))
    return a + a.T


POSITIVE = (np.diag([5.0, 1.0, 0.2])).tolist(), [0.0] * 3, [1.0, -2.0, 3.0]
FLAT = np.zeros((3, 3)).tolist(), [1.0, -2.0, 0.5], [1.0, 1.0, 1.0]
SADDLE = (np.diag([2.0, -1.0, 0.5])).tolist(), [0.3] * 3, [1.0, 2.0, -3.0]
INDEFINITE = random_symmetric().tolist(), [0.5] * 6, [1.0, -1.0] * 3
PROBLEMS = {
    "positive": POSITIVE,
    "flat": FLAT,
    "saddle": SADDLE,
    "indefinite": INDEFINITE,
}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("method", _hessian.METHODS)
def test_the_rise_is_the_budget(name, adaptive, method):
    """On a quadratic loss, at every step."""
    model = quadratic(
        *PROBLEMS[name],
        sigma=0.1,
        curvature="hvp",
        hvp_method=method,
        adaptive=adaptive,
    )
    rows = steps(model, 20)
    for row in rows:
        assert row["sharpness"] == pytest.approx(0.1, rel=1e-8)
    if name != "flat":  # The first order misses it.
        linear = [r["gradient_norm"] * r["rho"] for r in rows]
        assert max(np.abs(np.array(linear) - 0.1)) > 1e-5


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("distance", [1e-2, 1e-6, 1e-12])
def test_at_a_minimum_the_radius_is_finite(distance):
    """Where the first order's goes as one over the distance."""
    start = [distance, 0.0, 0.0]
    model = quadratic(
        *POSITIVE[:2], start, sigma=0.1, curvature="hvp", learning_rate=1e-300
    )
    [row] = steps(model, 1)
    # s rho + 5 rho^2 / 2 = 0.1, with s = 5 distance.
    s = 5 * distance
    expected = (-s + math.sqrt(s**2 + 2 * 5 * 0.1)) / 5
    assert row["rho"] == pytest.approx(expected, rel=1e-9)
    assert row["sharpness"] == pytest.approx(0.1, rel=1e-8)
    first_order = quadratic(
        *POSITIVE[:2], start, sigma=0.1, learning_rate=1e-300
    )
    [row] = steps(first_order, 1)
    assert row["rho"] == pytest.approx(0.1 / s, rel=1e-9)


@pytest.mark.usefixtures("float64")
def test_in_the_minimum_itself_the_step_is_plain():
    model = quadratic(*POSITIVE[:2], [0.0] * 3, sigma=0.1, curvature="hvp")
    [row] = steps(model, 1)
    assert row["rho"] == row["sharpness"] == 0
    assert np.all(model.get_weights()[0] == 0)


@pytest.mark.usefixtures("float64")
def test_a_budget_out_of_reach():
    """Downward so much that the loss never rises by sigma: 2 sigma / s."""
    hessian, start = [[-4.0]], [0.25]  # s = 1, s^2 + 2 k sigma = 1 - 8 * 0.2
    model = quadratic(hessian, [0.0], start, sigma=0.2, curvature="hvp")
    [row] = steps(model, 1)
    assert row["gradient_norm"] == pytest.approx(1.0)
    assert row["rho"] == pytest.approx(0.4)


@pytest.mark.usefixtures("float64")
def test_the_cap_holds():
    model = quadratic(*POSITIVE, sigma=0.5, rho_max=0.03, curvature="hvp")
    [row] = steps(model, 1)
    assert row["rho"] == pytest.approx(0.03, rel=1e-12)
    assert row["sharpness"] < 0.5


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"adaptive": True},
        {"rho_max": 0.05},
        {"alpha": 0.3},
        {"perturb": kernels_only},
    ],
    ids="-".join,
)
@pytest.mark.parametrize("method", ["auto", "forward_over_reverse"])
def test_training_agrees_with_the_oracle(options, method):
    """Whose curvature is a difference of gradients at moved weights."""
    x, y = classification_data()
    net, expected = dense_net(), dense_net()
    model = constant_lesam(
        net, 0.2, curvature="hvp", hvp_method=method, **options
    )
    history = train(model, x, y, shuffle=False, epochs=2)
    found = reference.fit(
        expected, crossentropy(), x, y, sigma=0.2, second_order=True, **options
    )
    assert_close_weights(net, expected, atol=1e-6)
    rho = np.mean([step[0] for step in found[3:]])
    assert history["rho"][-1] == pytest.approx(rho, rel=1e-6)


@pytest.mark.usefixtures("float64")
def test_a_share_of_the_rows_finds_the_curvature():
    x, y = classification_data()
    net, expected = dense_net(), dense_net()
    model = constant_lesam(net, 0.2, curvature="hvp", ascent_fraction=0.5)
    train(model, x, y, shuffle=False, epochs=2)
    reference.fit(
        *(expected, crossentropy(), x, y),
        **{"sigma": 0.2, "second_order": True, "share": 0.5},
    )
    assert_close_weights(net, expected, atol=1e-6)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("curvature", ["hvp", "secant"])
def test_batch_norm_and_noise_in_training(curvature, jit_compile):
    """The state advances once a step; the budget is met, if not to rounding."""
    x, y = classification_data(shape=(8, 8, 1))
    net, plain = noisy_net(), noisy_net()
    model = constant_lesam(net, 0.05, curvature=curvature)
    optimizers = [keras.optimizers.SGD(1e-9) for _ in range(2)]
    history = train(
        model, x, y, optimizer=optimizers[0], jit_compile=jit_compile
    )
    train(plain, x, y, optimizer=optimizers[1], jit_compile=jit_compile)
    assert_close_weights(net, plain, atol=1e-7)
    assert history["sharpness"][-1] == pytest.approx(0.05, rel=0.15)


LAYERS = {
    "lstm": ((5, 3), lambda: [layers.LSTM(4)]),
    "embedding": ((5,), lambda: [layers.Embedding(9, 4), layers.GRU(4)]),
    "max_pooling": (
        (8, 8, 1),
        lambda: [
            layers.Conv2D(4, 3, activation="tanh"),
            layers.MaxPooling2D(),
            layers.Flatten(),
        ],
    ),
}


def classifier(kind):
    shape, stack = LAYERS[kind]
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, *shape))
    if kind == "embedding":
        x = rng.integers(9, size=(64, *shape))
    net = keras.Sequential([keras.Input(shape), *stack(), layers.Dense(4)])
    return net, x, rng.integers(4, size=64)


@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
@pytest.mark.parametrize("kind", LAYERS)
def test_hvp_in_fit(kind, policy):
    keras.config.set_dtype_policy(policy)
    net, x, y = classifier(kind)
    model = constant_lesam(net, 0.05, curvature="hvp")
    history = train(model, x, y, optimizer=keras.optimizers.SGD(0.01))
    assert history["sharpness"][-1] == pytest.approx(0.05, rel=0.1)


def test_forward_mode_is_refused_for_loops():
    method = "forward_over_reverse"
    net, x, y = classifier("lstm")
    model = constant_lesam(net, curvature="hvp", hvp_method=method)
    before = net.get_weights()
    with pytest.raises(ValueError, match=f"loops.*hvp_method='{method}'"):
        train(model, x, y)
    np.testing.assert_array_equal(net.get_weights()[0], before[0])


def test_max_pooling_is_not_compiled_by_xla():
    """The user is told, and gets the right number."""
    rises = []
    for jit_compile in (False, True):
        keras.utils.set_random_seed(0)
        net, x, y = classifier("max_pooling")
        model = constant_lesam(net, 0.05, curvature="hvp")
        if jit_compile:
            with pytest.warns(UserWarning, match="jit_compile=False"):
                history = train(model, x, y, jit_compile=True)
        else:
            history = train(model, x, y)
        rises.append(history["sharpness"])
    assert rises[0] == rises[1]
    # Nothing is in the way of the others.
    assert constant_lesam(dense_net(), curvature="hvp").supports_jit
    assert constant_lesam(net, curvature="secant").supports_jit


class Pool(layers.Layer):
    """Max pooling that does not tell its name."""

    def call(self, x):
        return tf.nn.max_pool2d(x, 2, 2, "VALID")


def test_max_pooling_of_others_is_refused_under_xla():
    net = keras.Sequential(
        [layers.Conv2D(2, 3), Pool(), layers.Flatten(), layers.Dense(4)]
    )
    x, y = classification_data(shape=(8, 8, 1))
    model = constant_lesam(net, curvature="hvp")
    with pytest.raises(ValueError, match=r"max pooling.*jit_compile=False"):
        train(model, x, y, jit_compile=True)
    train(model, x, y, jit_compile=False)


@pytest.mark.parametrize("curvature", ["hvp", "secant"])
def test_no_budget_is_plain_training(curvature):
    x, y = classification_data()
    net, plain = dense_net(), dense_net()
    train(constant_lesam(net, 0.0, curvature=curvature), x, y)
    train(plain, x, y)
    assert_same_weights(net, plain)


@pytest.mark.parametrize("curvature", ["hvp", "secant"])
def test_traced_once(curvature):
    x, y = classification_data()
    model = constant_lesam(dense_net(), curvature=curvature)
    seen = traces(model)
    train(model, x, y)
    model.sigma = 0.3
    model.rho_max = 0.5
    model.fit(x, y, verbose=0, batch_size=32)
    assert len(seen) == 1


# The secant.


def memory(model):
    [state] = [w for w in model.weights if w.name == "curvature.means"]
    return state.numpy()


@pytest.mark.usefixtures("float64")
def test_secant_learns_the_curvature_of_a_quadratic():
    hessian = np.diag([3.0, 3.0]).tolist()
    model = quadratic(hessian, [0.0] * 2, [1.0, 2.0], curvature="secant")
    rows = steps(model, 10)
    # The first step knows nothing: it is one of the first order.
    assert rows[0]["rho"] == pytest.approx(0.1 / rows[0]["gradient_norm"])
    assert rows[0]["sharpness"] > 0.1001
    assert memory(model)[0] == pytest.approx(3.0)
    for row in rows[1:]:
        assert row["sharpness"] == pytest.approx(0.1, rel=1e-8)


@pytest.mark.usefixtures("float64")
def test_secant_never_climbs_further_than_to_first_order():
    hessian = np.diag([-1.0, -1.0]).tolist()
    model = quadratic(hessian, [1.0, 1.0], [-1.0, 2.0], curvature="secant")
    rows = steps(model, 4)
    assert memory(model)[0] == pytest.approx(-1.0)
    for row in rows:
        assert row["rho"] == pytest.approx(0.1 / row["gradient_norm"])
        assert row["sharpness"] < 0.1


def learn(state, seen, rho=0.5, slope=2.0, loss=1.0, dtype="float64"):
    """The state after one step whose ascent showed a curvature `seen`."""
    scalar = lambda value: tf.constant(value, dtype)  # noqa: E731
    first = SimpleNamespace(
        context=SimpleNamespace(is_global=False),
        point=SimpleNamespace(loss=scalar(loss)),
    )
    rise = slope * rho + seen * rho**2 / 2
    state = estimators.Secant().update(
        first,
        rules.Perturbation([], scalar(rho), scalar(slope)),
        scalar(rise),
        {"means": scalar(state)},
    )
    return state["means"].numpy()


def test_secant_is_a_running_mean():
    np.testing.assert_allclose(learn([0.0, 0.0], 4.0), [4.0, 4.0])
    np.testing.assert_allclose(learn([4.0, 4.0], 6.0), [4.2, 3.8])
    np.testing.assert_allclose(learn([4.0, 1.0], -2.0), [3.7, 1.3], rtol=1e-6)


@pytest.mark.parametrize("wild", [1e3, -1e3, 1e30])
def test_secant_is_not_moved_far_by_one_wild_batch(wild):
    mean, deviation = learn([4.0, 0.5], wild)
    assert abs(mean - 4.0) <= 0.1 * 3 * 0.5 + 1e-9
    assert deviation <= 0.5 * 1.3 + 1e-9


def test_secant_recovers_from_a_wild_first_batch():
    state = learn([0.0, 0.0], 1e6)
    for _ in range(200):
        state = learn(state, 4.0)
    assert state[0] == pytest.approx(4.0, rel=0.01)


def test_secant_takes_no_more_of_a_first_batch_than_of_a_later_one():
    """CLIP times the usual: here s / rho = 4, which raises the rise by half."""
    for wild in (1e3, 1e30):
        np.testing.assert_allclose(learn([0.0, 0.0], wild), [12.0, 12.0])
        np.testing.assert_allclose(learn([0.0, 0.0], -wild), [-12.0, 12.0])


def closed_loop(observed, start=(0.0, 0.0), loss=2.0, dtype="float32"):
    """The radii of steps that go by what those before have shown."""
    scalar = lambda value: tf.constant(value, dtype)  # noqa: E731
    secant, slope, radii = estimators.Secant(), 1.0, []
    state = np.array(start, dtype)
    for seen in observed:
        k = secant.estimate(None, {"means": scalar(state)})
        rho = rules.LossEquated(1.0).radius(scalar(slope), scalar(0.1), k)
        radii.append(float(rho))
        state = learn(state, seen, radii[-1], slope, loss, dtype)
        assert np.isfinite(state).all()
    return radii


# Where the curvature is 5 all the time.
SETTLED = closed_loop([5.0] * 30)[-1]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("loss", [0.0, 2.0, 20.0])
@pytest.mark.parametrize("wild", [1e4, 1e7, 1e12, 1e30, -1e9])
@pytest.mark.parametrize("when", [0, 1, 30])
def test_no_wild_batch_locks_the_secant(wild, when, loss, dtype):
    """A radius so short that the linear part of the rise is rounding."""
    observed = [5.0] * when + [wild] + [5.0] * 60
    radii = closed_loop(observed, loss=loss, dtype=dtype)
    assert min(radii) > 0.1 * SETTLED
    np.testing.assert_allclose(radii[-10:], SETTLED, rtol=0.05)


@pytest.mark.parametrize(
    ("start", "steps"),
    [
        ((1e7, 1e7), 200),
        ((1e7, 1.0), 250),
        ((1e7, 1e-7), 250),
        ((1e12, 1.0), 400),
        ((1e30, 1e30), 800),
        ((5.0, 1e30), 30),
        ((-1e7, 1e7), 250),
        *(((bad, 1.0), 30) for bad in (math.nan, math.inf, -math.inf)),
        *(((5.0, bad), 30) for bad in (math.nan, math.inf, -math.inf)),
        ((math.inf, math.inf), 30),
        ((5.0, -1.0), 30),
    ],
    ids=str,
)
def test_a_locked_memory_frees_itself(start, steps):
    """As one that was saved before: it takes a tenth of what is wrong."""
    radii = closed_loop([5.0] * steps, start)
    np.testing.assert_allclose(radii[-5:], SETTLED, rtol=0.05)


def test_secant_follows_a_change_from_a_steady_state():
    """The deviation never gets stuck at 0."""
    state = learn([0.0, 0.0], 4.0)
    for _ in range(300):
        state = learn(state, 4.0)
    for _ in range(100):
        state = learn(state, 40.0)
    assert state[0] == pytest.approx(40.0, rel=0.01)


@pytest.mark.parametrize(
    "step",
    [
        {"rho": 0.0},
        {"seen": math.inf},
        {"seen": math.nan},
        {"slope": 0.0, "rho": 0.0},
        {"slope": math.inf, "rho": 0.0},
        # A rise of 1e-6 of a loss of 1 in float32: mostly rounding.
        {"rho": 5e-7, "dtype": "float32"},
    ],
    ids=str,
)
def test_secant_observes_nothing(step):
    np.testing.assert_array_equal(
        learn([4.0, 0.5], **{"seen": 9.0, **step}), [4.0, 0.5]
    )


def test_secant_keeps_what_it_knows_through_steps_without_budget():
    x, y = classification_data()
    model = constant_lesam(dense_net(), curvature="secant")
    train(model, x, y)
    before = memory(model)
    assert np.all(before != 0)
    model.sigma = 1e-30  # As at the end of annealing; not plain Keras's step.
    model.fit(x, y, verbose=0)
    np.testing.assert_array_equal(memory(model), before)


def test_secant_is_saved_and_restored(tmp_path):
    x, y = classification_data()
    model = constant_lesam(dense_net(), curvature="secant")
    train(model, x, y)
    model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(memory(loaded), memory(model))
    other = constant_lesam(dense_net(seed=3), curvature="secant")
    other.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(memory(other), memory(model))
    for m in (model, loaded):
        keras.utils.set_random_seed(5)
        m.fit(x, y, verbose=0)
    assert_same_weights(model, loaded)


@pytest.mark.parametrize(
    ("saved", "loading"), [("none", "secant"), ("secant", "none")]
)
def test_weights_load_without_what_the_secant_knows(tmp_path, saved, loading):
    x, y = classification_data()
    model = constant_lesam(dense_net(), curvature=saved)
    train(model, x, y)
    model.save_weights(tmp_path / "model.weights.h5")
    other = constant_lesam(dense_net(seed=3), curvature=loading)
    other.load_weights(tmp_path / "model.weights.h5")
    assert_same_weights(other.model, model.model)


@pytest.mark.usefixtures("float64")
def test_secant_in_parts_is_that_over_replicas():
    """One memory for all: the mean of what each part, or replica, learnt."""
    x, y = classification_data(rows=64)
    options = {"curvature": "secant"}
    model = constant_lesam(dense_net(), num_batch_splits=2, **options)
    train(model, x, y, shuffle=False)
    with mirrored(2).scope():
        replicated = constant_lesam(dense_net(), **options)
        train(replicated, x, y, shuffle=False)
    np.testing.assert_allclose(memory(replicated), memory(model), rtol=1e-6)
    assert_close_weights(replicated.model, model.model, atol=1e-7)


@pytest.mark.parametrize("value", ["exact", "hvp", None])
def test_bad_method(value):
    with pytest.raises(ValueError, match="`hvp_method` must be one of"):
        LESAMModel(dense_net(), curvature="hvp", hvp_method=value)


def test_combinations_that_make_no_sense():
    with pytest.raises(ValueError, match="`hvp_method` is for curvature='hvp'"):
        LESAMModel(dense_net(), hvp_method="reverse_over_reverse")
    with pytest.raises(ValueError, match=r"secant.*Received.*=0.5"):
        LESAMModel(dense_net(), curvature="secant", ascent_fraction=0.5)


def test_config_round_trip():
    model = LESAMModel(
        dense_net(), curvature="hvp", hvp_method="forward_over_reverse"
    )
    config = model.get_config()
    again = LESAMModel.from_config(config)
    assert again.curvature == "hvp"
    assert again.hvp_method == "forward_over_reverse"
