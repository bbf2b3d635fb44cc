"""`max_change`: how much an ascent may change the gradient."""

import math

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_lesam import LESAMModel
from keras_lesam import SAMModel
from keras_lesam import SharpnessAwareGradients
from keras_lesam import SharpnessAwareModel
from keras_lesam import ascents
from keras_lesam import budgets
from keras_lesam import rules
from tests.helpers import assert_close_weights
from tests.helpers import assert_same_weights
from tests.helpers import classification_data
from tests.helpers import crossentropy
from tests.helpers import dense_net
from tests.helpers import traces
from tests.helpers import train
from tests.test_distribution import assert_same_training
from tests.test_distribution import regularized_net
from tests.test_distribution import train_here
from tests.test_distribution import train_replicated

LOGS = ("loss", "rho", "gradient_norm", "sharpness", "sigma")
START = np.array([3.0, -1.0, 0.5])
SCALES = np.array([1.0, 4.0, 0.25])
ROWS = np.ones((4, 1), "float32")


class Quadratic(keras.Model):
    """`0.5 sum(a w^2)`, or a linear loss, whatever the batch."""

    def __init__(self, kind="quadratic"):
        super().__init__()
        self.kind = kind

    def build(self, shape):
        self.w = self.add_weight(
            shape=(3,), initializer=lambda shape, dtype: tf.cast(START, dtype)
        )

    def call(self, x):
        return 0.0 * x

    def compute_loss(
        self, x=None, y=None, y_pred=None, sample_weight=None, training=True
    ):
        scales = tf.cast(SCALES, self.w.dtype)
        if self.kind == "linear":
            return tf.reduce_sum(scales * self.w)
        return 0.5 * tf.reduce_sum(scales * tf.square(self.w))


def by_hand(amount, max_change, steps, rate, mask=1.0, adaptive=False):
    """The radius of each step of SAM on the quadratic, in NumPy."""
    w, log_factor, radii = START.copy(), math.log(0.1), []
    for _ in range(steps):
        g = SCALES * w
        t = (np.abs(w) if adaptive else 1.0) * mask
        norm = np.linalg.norm(t * g)
        rho = amount * math.exp(log_factor)
        h = SCALES * (w + rho * t * t * g / norm)
        change = np.linalg.norm(t * (h - g)) / norm
        excess = np.clip(math.log(change / max_change), -1, 1)
        log_factor = np.clip(log_factor - 0.1 * excess, math.log(1e-3), 0)
        radii.append(rho)
        w = w - rate * h
    return radii


def is_first(variable):
    return variable.shape[0] == 3


class Radii(keras.callbacks.Callback):
    """The radius and the budget of each step."""

    def __init__(self):
        super().__init__()
        self.rho, self.sigma = [], []

    def on_train_batch_end(self, batch, logs=None):
        self.rho.append(logs["rho"])
        self.sigma.append(logs.get("sigma"))


def radii(model, steps, rate=0.0, **options):
    model.compile(keras.optimizers.SGD(rate), **options)
    seen = Radii()
    # One step an epoch: what is logged is of that step.
    model.fit(ROWS, ROWS, epochs=steps, verbose=0, callbacks=[seen])
    return seen


def factor(model):
    [value] = [
        float(keras.ops.convert_to_numpy(variable))
        for name, variable in model._state.variables.items()
        if name == "change.log_factor"
    ]
    return math.exp(value)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize(("amount", "max_change"), [(2.0, 0.2), (0.02, 0.5)])
def test_closed_form(amount, max_change, adaptive, jit_compile):
    """Step by step, where the limit binds and where the budget does."""
    rule = rules.ASAM(amount, eta=0.0) if adaptive else rules.SAM(amount)
    model = SAMModel(Quadratic(), rule, max_change=max_change)
    found = radii(model, 60, 0.05, jit_compile=jit_compile).rho
    expected = by_hand(amount, max_change, 60, 0.05, adaptive=adaptive)
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    assert (max(found) < 0.9 * amount) == (amount == 2.0)


@pytest.mark.usefixtures("float64")
class Tripled(rules.SAM):
    """Goes along something else than the gradients: its norm is not theirs."""

    def perturb(self, gradients, *args, **kwargs):
        return super().perturb([3 * g for g in gradients], *args, **kwargs)


@pytest.mark.usefixtures("float64")
def test_the_change_is_a_share_of_the_gradient_whatever_the_rule_goes_by():
    found = radii(SAMModel(Quadratic(), Tripled(2.0), max_change=0.2), 60, 0.05)
    expected = by_hand(2.0, 0.2, 60, 0.05)
    np.testing.assert_allclose(found.rho, expected, rtol=1e-9)


def test_it_settles_where_the_change_is_the_limit():
    """For equal scales the change is `rho / ||w||`."""
    found = radii(SAMModel(Quadratic(), rho=5.0, max_change=0.1), 200).rho[-1]
    gradient = SCALES * START
    step = found * gradient / np.linalg.norm(gradient)
    change = np.linalg.norm(SCALES * step) / np.linalg.norm(gradient)
    assert change == pytest.approx(0.1, rel=1e-6)


def test_the_budget_that_is_logged_is_the_one_that_is_spent():
    model = LESAMModel(
        *(Quadratic(), 8.0, None),
        **{"warmup": 0.0, "anneal": 0.0, "max_change": 0.2},
    )
    seen = radii(model, 50)
    norm = np.linalg.norm(SCALES * START)
    np.testing.assert_allclose(seen.rho, np.array(seen.sigma) / norm, 1e-5)
    assert seen.sigma[0] == pytest.approx(0.8)
    assert 1.0 < seen.sigma[-1] < 4.0


def test_only_weights_that_are_perturbed_count():
    """With the others, whose gradients change too, it would be less."""
    keras.utils.set_random_seed(0)
    net = keras.Sequential(
        [keras.Input((3,)), keras.layers.Dense(5), keras.layers.Dense(2)]
    )
    x, y = np.random.rand(16, 3), np.random.rand(16, 2)
    model = SAMModel(net, rho=3.0, max_change=0.3, perturb=is_first)
    model.compile(keras.optimizers.SGD(0.0), "mse")
    model.fit(x, y, batch_size=16, epochs=150, verbose=0)
    rho = model.fit(x, y, batch_size=16, verbose=0).history["rho"][0]

    def gradient():
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(net(x) - y))
        return tape.gradient(loss, net.layers[0].kernel.value)

    before = gradient()
    net.layers[0].kernel.assign_add(rho * before / tf.norm(before))
    change = tf.norm(gradient() - before) / tf.norm(before)
    assert float(change) == pytest.approx(0.3, rel=1e-3)


def test_a_loss_that_is_linear_has_no_limit():
    model = SAMModel(Quadratic("linear"), rho=0.3, max_change=1e-3)
    rho = radii(model, 40).rho
    np.testing.assert_allclose(rho[:3], 0.03 * np.exp([0, 0.1, 0.2]), 1e-6)
    np.testing.assert_allclose(rho[24:], 0.3, rtol=1e-6)


def test_within_the_limit_nothing_changes():
    """Once the factor has grown to 1."""
    x, y = classification_data()
    found = []
    for limit in (None, 50.0):
        model = LESAMModel(dense_net(), budgets.Relative(0.5, None, limit))
        if limit:
            model._state.variables["change.log_factor"].assign(0.0)
        train(model, x, y)
        found.append(model.model)
    assert_same_weights(*found)


def test_the_factor_has_a_way_back():
    """From its smallest, once the ascents change little."""
    model = SAMModel(Quadratic(), rho=50.0, max_change=1e-7)
    radii(model, 120)
    assert factor(model) == pytest.approx(1e-3, rel=1e-4)
    other = SAMModel(Quadratic(), rho=1e-3, max_change=10.0)
    other.compile(keras.optimizers.SGD(0.0))
    other.fit(ROWS, ROWS, verbose=0)
    other._state.variables["change.log_factor"].assign(math.log(1e-3))
    other.fit(ROWS, ROWS, epochs=80, verbose=0)
    assert factor(other) == 1.0


def test_steps_without_an_ascent_leave_it():
    """Two of three steps, and all those without a gain."""
    model = SAMModel(Quadratic(), rho=20.0, max_change=0.2, ascent_every=3)
    model.compile(keras.optimizers.SGD(0.0))
    factors = []
    for _ in range(6):
        model.fit(ROWS, ROWS, verbose=0)
        factors.append(factor(model))
    first, second = factors[0], factors[3]
    assert factors == [first, first, first, second, second, second]
    assert 0.1 > first > second
    untold = LESAMModel(
        Quadratic(), budgets.Relative(0.5, max_change=1e-6, reference_loss=0.1)
    )
    radii(untold, 5)
    assert factor(untold) == pytest.approx(0.1)


class Cliff(Quadratic):
    """A loss that is nan to the right of where the weights are."""

    def compute_loss(self, **kwargs):
        loss = super().compute_loss(**kwargs)
        edge = 1.01 * 0.5 * tf.reduce_sum(SCALES * START**2)
        return tf.where(loss > tf.cast(edge, loss.dtype), math.nan, loss)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_an_ascent_that_ends_at_no_loss_shortens_the_next(jit_compile):
    """Along the edge of where it ends at one; not plain steps from then on."""
    model = SAMModel(Cliff(), rho=2.0, max_change=0.2)
    found = np.array(radii(model, 40, jit_compile=jit_compile).rho)
    assert found[0] == 0.0
    begun = np.flatnonzero(found)[0]
    np.testing.assert_allclose(found[begun], 0.2 * np.exp(-0.1 * begun), 1e-5)
    assert np.mean(found[-10:] > 0.0) >= 0.5


# Wherever there is a model.


def test_deep_nets_without_normalization_learn():
    """A large share stops them on their plateau without the limit."""

    def accuracy(max_change):
        keras.utils.set_random_seed(3)
        relu = [keras.layers.Dense(32, "relu") for _ in range(8)]
        net = keras.Sequential(
            [keras.Input((16,)), *relu, keras.layers.Dense(4)]
        )
        rng = np.random.default_rng(0)
        y = rng.integers(4, size=512)
        x = rng.normal(size=(4, 16))[y] + 0.7 * rng.normal(size=(512, 16))
        budget = budgets.Relative(1.0, max_change=max_change)
        model = LESAMModel(net, budget)
        optimizer = keras.optimizers.SGD(0.05, momentum=0.9)
        train(model, x, y, optimizer=optimizer, epochs=15)
        return np.mean(np.argmax(net.predict(x, verbose=0), -1) == y)

    assert accuracy(0.6) > 0.9
    assert accuracy(None) < 0.7


CASES = [
    {"curvature": "secant"},
    {"curvature": "hvp", "adaptive": True},
    {"alpha": 0.2, "num_batch_splits": 2},
]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("scope", ["replica", "global"])
@pytest.mark.parametrize("options", CASES, ids=str)
def test_replicas(options, scope):
    """One device on the whole batch, or on as many parts."""
    data = (regularized_net, *classification_data(rows=64))
    limited = {"max_change": 0.02, **options}
    parts = 1 if scope == "global" else 2
    splits = limited.pop("num_batch_splits", 1)
    found = train_replicated(
        *(2, *data),
        **{"perturbation_scope": scope, "num_batch_splits": splits, **limited},
    )
    if scope == "global" and splits > 1:
        # Each replica's own parts: no part of a whole batch.
        return
    expected = train_here(*data, num_batch_splits=parts * splits, **limited)
    assert_same_training(found, expected, LOGS)
    assert factor(found[0]) == pytest.approx(factor(expected[0]), rel=1e-6)
    assert factor(found[0]) < 0.9


def embedding_net():
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((5,), dtype="int32"),
            keras.layers.Embedding(20, 4),
            keras.layers.Flatten(),
            keras.layers.Dense(4),
        ]
    )


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision(policy):
    """About what float32 does; a loss scale does not count."""
    x, y = classification_data(rows=256)
    factors = []
    for name in ("float32", policy):
        keras.config.set_dtype_policy(name)
        try:
            net = dense_net(units=32)
            model = SAMModel(net, rho=1.0, max_change=0.1)
            train(model, x, y)
        finally:
            keras.config.set_dtype_policy("float32")
        factors.append(factor(model))
    assert factors[0] < 0.5
    assert factors[1] == pytest.approx(factors[0], rel=0.15)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_rows_of_an_embedding(jit_compile):
    """Repeated rows count as one; the same as with a dense kernel."""
    rng = np.random.default_rng(0)
    x, y = rng.integers(20, size=(64, 5)), rng.integers(4, size=64)

    class OneHot(keras.layers.Layer):
        def build(self, shape):
            self.table = self.add_weight(shape=(20, 4), name="embeddings")

        def call(self, x):
            return keras.ops.matmul(keras.ops.one_hot(x, 20), self.table)

    keras.utils.set_random_seed(0)
    twin = keras.Sequential(
        [
            keras.Input((5,), dtype="int32"),
            OneHot(),
            keras.layers.Flatten(),
            keras.layers.Dense(4),
        ]
    )
    twin.set_weights(embedding_net().get_weights())
    found = []
    for net in (embedding_net(), twin):
        model = SAMModel(net, rho=1.0, max_change=0.05)
        train(model, x, y, jit_compile=jit_compile)
        found.append((net, factor(model)))
    (net, mine), (other, expected) = found
    assert mine == pytest.approx(expected, rel=1e-4)
    assert mine < 0.9
    assert_close_weights(net, other, atol=1e-5)


@pytest.mark.usefixtures("float64")
def test_in_a_loop_of_ones_own():
    x, y = classification_data(rows=64)
    model = SAMModel(dense_net(), rho=1.0, max_change=0.05)
    optimizer = keras.optimizers.SGD(0.1)
    train(model, x, y, optimizer=optimizer, shuffle=False, epochs=8)

    net, loss = dense_net(), crossentropy()
    budget = budgets.Constant(1.0, max_change=0.05)
    make = SharpnessAwareGradients(rules.SAM(1.0), budget)
    variables, optimizer = net.trainable_variables, keras.optimizers.SGD(0.1)
    state = make.init_state(variables)
    assert set(state) == {"iterations", "change.log_factor"}
    for start in [0, 32] * 8:
        rows = slice(start, start + 32)
        gradients, record = make(
            lambda: loss(y[rows], net(x[rows], training=True)),  # noqa: B023
            *(variables, state, optimizer),
        )
        optimizer.apply(gradients, variables)
        state = record.state
    assert_close_weights(net, model.model, atol=1e-12)
    found = math.exp(float(state["change.log_factor"]))
    assert found == pytest.approx(factor(model), rel=1e-9)
    assert found < 0.9


@pytest.mark.parametrize("kind", ["keras", "weights", "backup", "checkpoint"])
def test_it_is_saved_and_resumed(kind, tmp_path):
    """And it is no weight of the model."""
    x, y = classification_data()

    def begun(epochs, model=None, callbacks=()):
        model = model or SAMModel(dense_net(), rho=1.0, max_change=0.05)
        model.compile(keras.optimizers.SGD(0.1), crossentropy())
        model.fit(
            *(x, y),
            **{"epochs": epochs, "shuffle": False, "verbose": 0},
            callbacks=[*callbacks],
        )
        return model

    whole = begun(4)
    half = begun(2)
    assert len(half.weights) == len(half.model.weights)
    assert factor(half) < 0.9
    if kind == "keras":
        half.save(tmp_path / "model.keras")
        again = keras.saving.load_model(tmp_path / "model.keras")
    elif kind == "weights":
        half.save_weights(tmp_path / "model.weights.h5")
        again = SAMModel(dense_net(seed=5), rho=1.0, max_change=0.05)
        again.compile(keras.optimizers.SGD(0.1), crossentropy())
        again.load_weights(tmp_path / "model.weights.h5")
    elif kind == "checkpoint":
        path = tf.train.Checkpoint(model=half).save(tmp_path / "model")
        again = SAMModel(dense_net(seed=5), rho=1.0, max_change=0.05)
        again.compile(keras.optimizers.SGD(0.1), crossentropy())
        tf.train.Checkpoint(model=again).restore(path)
    else:
        backup = keras.callbacks.BackupAndRestore(
            tmp_path, delete_checkpoint=False
        )
        begun(2, callbacks=[backup])
        again = SAMModel(dense_net(seed=5), rho=1.0, max_change=0.05)
        begun(4, again, [backup])
    if kind != "backup":
        assert factor(again) == factor(half)
        again.fit(x, y, epochs=2, shuffle=False, verbose=0)
    assert_same_weights(again.model, whole.model)
    assert factor(again) == factor(whole)


def test_a_training_begins_anew():
    """All state is what it was, and the second training the same."""
    x, y = classification_data()
    wrap = {"limited": {"rho": 1.0, "max_change": 0.05}}
    wrap["LookSAM"] = {"rule": rules.LookSAM(0.1)}
    wrap["momentum"] = {"rho": 0.1, "ascent_from": "momentum"}
    for options in wrap.values():
        model = SAMModel(dense_net(), **options)
        start = model.model.get_weights()
        first = train(model, x, y)
        model.model.set_weights(start)
        model.reset_step_state()
        assert train(model, x, y) == first


def test_it_is_traced_once():
    x, y = classification_data()
    model = LESAMModel(dense_net())
    seen = traces(model)
    train(model, x, y)
    count = len(seen)
    model.share = 0.2
    model.fit(x, y, verbose=0)
    assert len(seen) == count
    assert model.max_change == 0.6


# What it goes with.

WITHOUT = [
    {"ascent_fraction": 0.5},
    {"ascent_from": "previous"},
    {"ascent_from": "momentum"},
    {"ascent_fraction": 0.5, "ascent_every": 2},
]


@pytest.mark.parametrize("options", WITHOUT, ids=str)
def test_where_no_two_gradients_can_be_compared(options):
    """A smaller share is the default, and a limit is refused by name."""
    x, y = classification_data()
    model = LESAMModel(dense_net(), **options)
    assert (model.share, model.max_change) == (0.1, None)
    train(model, x, y)
    assert "change.log_factor" not in model._state.variables
    with pytest.raises(ValueError, match="`max_change` compares"):
        LESAMModel(
            dense_net(), budgets.Relative(0.5, max_change=0.5), **options
        )
    with pytest.raises(ValueError, match="`max_change` compares"):
        SAMModel(dense_net(), rho=0.1, max_change=0.5, **options)


@pytest.mark.parametrize(
    "make",
    [
        lambda net: LESAMModel(net),
        lambda net: SharpnessAwareModel(net),
        lambda net: SharpnessAwareModel(net, ascent=ascents.Every(2)),
        lambda net: LESAMModel(net, ascent_every=2, curvature="secant"),
    ],
    ids=range(4),
)
def test_the_default(make):
    model = make(dense_net())
    assert model.budget.get_config() == {
        **{"share": 0.1, "max_change": 0.6},
        "reference_loss": None,
    }


@pytest.mark.parametrize(
    "rule",
    [
        rules.SAM(0.5),
        rules.ASAM(0.5),
        rules.UnnormalizedSAM(0.5),
        rules.GSAM(0.5),
        rules.FriendlySAM(0.5),
        rules.WSAM(0.5),
        rules.LookSAM(0.5),
        rules.StableSAM(0.5),
    ],
    ids=lambda rule: type(rule).__name__,
)
def test_the_family(rule, tmp_path):
    """Radii shrink, and the configuration is kept."""
    x, y = classification_data(rows=256)
    found = []
    for limit in (None, 0.01):
        model = SAMModel(dense_net(), rule, max_change=limit)
        found.append(train(model, x, y, epochs=8)["rho"][-1])
    assert found[1] < 0.8 * found[0]
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert again.max_change == 0.01
    assert again.rule.get_config() == rule.get_config()


class Own(budgets.Relative):
    max_change = 0.0

    def __init__(self):
        self.share = 0.5


REFUSED = [
    (lambda: LESAMModel(dense_net(), Own()), ValueError),
    (lambda: budgets.Relative(max_change=0.0), ValueError),
    (lambda: budgets.Constant(0.1, max_change=-1.0), ValueError),
    (lambda: budgets.Relative(max_change="0.5"), TypeError),
    (lambda: SAMModel(dense_net(), max_change=math.nan), ValueError),
    (lambda: LESAMModel(dense_net(), budgets.Relative(), max_change=0.5), None),
]


@pytest.mark.parametrize(("make", "kind"), REFUSED, ids=range(len(REFUSED)))
def test_what_is_refused(make, kind):
    with pytest.raises(kind or ValueError, match="max_change"):
        make()


def test_with_the_limit_alone_the_budget_is_the_papers():
    model = LESAMModel(dense_net(), max_change=0.5)
    assert (model.sigma, model.warmup, model.anneal) == (0.1, 0.1, 0.2)
    assert LESAMModel.from_config(model.get_config()).max_change == 0.5
