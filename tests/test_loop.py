"""Sharpness-aware gradients in loops of users, against `fit`."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from keras_lesam import LESAMModel
from keras_lesam import SharpnessAwareGradients
from keras_lesam import SharpnessAwareModel
from keras_lesam import ascents
from keras_lesam import budgets
from keras_lesam import estimators
from keras_lesam import rules
from tests.helpers import assert_close_weights
from tests.helpers import assert_same_weights
from tests.helpers import classification_data
from tests.helpers import crossentropy
from tests.helpers import dense_net
from tests.helpers import mirrored
from tests.helpers import noisy_net

LESAM = rules.LossEquated()
SIGMA = budgets.Constant(0.1)
METHODS = {
    "LE-SAM": (LESAM, SIGMA),
    "schedule": (
        rules.LossEquated(rho_max=0.5, adaptive=True, alpha=0.1),
        keras.optimizers.schedules.ExponentialDecay(0.2, 2, 0.5),
    ),
    "warm-up": (LESAM, budgets.Constant(0.2, warmup=0.5)),
    "Friendly": (rules.FriendlySAM(0.05),),
    "GSAM": (rules.GSAM(0.05),),
    "LookSAM": (rules.LookSAM(0.05, every=2),),
    "momentum": (rules.SAM(0.05), None, ascents.Momentum()),
    "previous": (LESAM, SIGMA, ascents.Previous()),
    "every": (LESAM, SIGMA, ascents.Every(3)),
    "secant": (LESAM, SIGMA, None, "secant"),
    "hvp": (LESAM, SIGMA, None, "hvp"),
    "forward": (
        *(LESAM, SIGMA, None),
        estimators.Exact("forward_over_reverse"),
    ),
    "none": (LESAM, 0.0),
}
STEPS, BATCH = 8, 16
WEIGHTS = [pytest.param(None, id="all"), pytest.param("kernel", id="kernels")]


def optimizer():
    return keras.optimizers.SGD(0.1, momentum=0.9)


def by_fit(net, x, y, *method, optimizer=optimizer, **options):
    model = SharpnessAwareModel(net, *method, **options)
    model.compile(optimizer(), crossentropy())
    keras.utils.set_random_seed(1)
    epochs = STEPS * BATCH // len(x)
    return model.fit(*(x, y, BATCH, epochs), verbose=0, shuffle=False).history


def by_loop(net, x, y, *method, mode="graph", optimizer=optimizer, **options):
    """The records of all steps."""
    lesam = SharpnessAwareGradients(*method, **options)
    optimizer, loss = optimizer(), crossentropy()
    variables = net.trainable_variables
    keras.utils.set_random_seed(1)

    def step(x, y, state):
        def loss_fn():
            outputs = net(x, training=True)
            return loss(y, outputs) + sum(net.losses), outputs

        gradients, record = lesam(loss_fn, variables, state, optimizer)
        optimizer.apply(gradients, variables)
        return record

    if mode != "eager":
        step = tf.function(step, jit_compile=mode == "xla")
    state, records = lesam.init_state(variables), []
    for start in [*range(0, len(x), BATCH)] * (STEPS * BATCH // len(x)):
        rows = slice(start, start + BATCH)
        record = step(tf.constant(x[rows]), tf.constant(y[rows]), state)
        records.append(record)
        state = record.state
    return records


EAGER = ("LE-SAM", "LookSAM", "momentum", "secant")


@pytest.mark.parametrize(
    ("name", "mode"),
    [*((name, "graph") for name in METHODS), *((n, "eager") for n in EAGER)],
)
def test_as_fit(name, mode):
    """To the bit in a graph: batch norm, dropout, noise, a regularizer."""
    x, y = classification_data(64, (8, 8, 1))
    expected, found = noisy_net(), noisy_net()
    options = {"total_steps": STEPS} if name == "warm-up" else {}
    by_fit(expected, x, y, *METHODS[name], **options)
    records = by_loop(found, x, y, *METHODS[name], mode=mode, **options)
    if mode == "graph":
        assert_same_weights(found, expected)
    else:
        assert_close_weights(found, expected, rtol=1e-4, atol=1e-5)
    assert int(records[-1].state["iterations"]) == STEPS
    assert any(r.rho > 0 for r in records) == (name != "none")


@pytest.mark.parametrize("mode", ["graph", "eager"])
def test_relative_budget_as_fit(mode):
    """Of a reference that is given; the loss has one part."""
    x, y = classification_data(64)
    method = (LESAM, budgets.Relative(0.5, reference_loss=np.log(4)))
    expected, found = dense_net(), dense_net()
    by_fit(expected, x, y, *method)
    records = by_loop(found, x, y, *method, mode=mode)
    assert_close_weights(found, expected, rtol=1e-5, atol=1e-6)
    for record in records:
        gain = max(np.log(4) - float(record.loss), 0)
        wanted = 0.5 * record.loss * gain / np.log(4)
        np.testing.assert_allclose(record.sigma, wanted, rtol=1e-4)
    assert records[-1].sigma > 0


def test_relative_budget_without_a_reference():
    """It goes by the first ten steps, in which there is none."""
    w = keras.Variable([2.0, -3.0])
    lesam = SharpnessAwareGradients(LESAM, budgets.Relative(0.5))
    sgd, state = keras.optimizers.SGD(0.05), lesam.init_state([w])
    records = []
    for _ in range(14):
        with pytest.warns(UserWarning, match="`reference_loss`"):
            gradients, record = lesam(
                lambda: tf.reduce_sum(w**2), [w], state, sgd
            )
        sgd.apply(gradients, [w])
        records.append(record)
        state = record.state
    losses = np.array([float(r.loss) for r in records])
    assert [float(r.sigma) for r in records[:10]] == [0.0] * 10
    start = losses[:10].mean()
    wanted = 0.5 * losses[10:] * (start - losses[10:]) / start
    np.testing.assert_allclose([r.sigma for r in records[10:]], wanted, 1e-4)


@pytest.mark.parametrize("mode", ["graph", "eager"])
def test_closed_form_on_a_quadratic(mode):
    """To second order the rise is the budget; the gradient is that there."""
    matrix = np.diag([1.0, 3.0, 0.5]).astype("float32")
    start = np.array([1.0, -2.0, 0.3], "float32")
    w = keras.Variable(start)
    lesam = SharpnessAwareGradients(LESAM, 0.7, curvature="hvp")

    def loss_fn():
        moved = tf.convert_to_tensor(w)
        return 0.5 * tf.tensordot(moved, tf.linalg.matvec(matrix, moved), 1)

    def step(state):
        return lesam(loss_fn, [w], state, None)

    step = tf.function(step) if mode == "graph" else step
    (gradient,), record = step(lesam.init_state([w]))
    plain = matrix @ start
    np.testing.assert_allclose(record.sharpness, 0.7, rtol=1e-5)
    np.testing.assert_allclose(
        record.gradient_norm, np.linalg.norm(plain), rtol=1e-6
    )
    eps = float(record.rho) * plain / np.linalg.norm(plain)
    np.testing.assert_allclose(gradient, matrix @ (start + eps), rtol=1e-5)
    np.testing.assert_allclose(
        record.loss, 0.5 * start @ matrix @ start, rtol=1e-6
    )
    np.testing.assert_array_equal(w, start)
    assert record.aux is None


@pytest.mark.parametrize("mode", ["graph", "eager"])
def test_state_advances_once(mode):
    """Batch norm, seeds, metrics and a count of the loss function's own."""
    x, _ = classification_data(32, (8, 8, 1))
    plain, net = noisy_net(), noisy_net()
    count = keras.Variable(0, dtype="int32", trainable=False)
    mean = keras.metrics.Mean()
    lesam = SharpnessAwareGradients(rules.SAM(0.5))
    variables = net.trainable_variables

    def step(state):
        def loss_fn():
            outputs = net(x, training=True)
            count.assign_add(1)
            loss = tf.reduce_mean(outputs**2)
            mean.update_state(loss)
            return loss, {"outputs": outputs, "name": None}

        return lesam(loss_fn, variables, state, None)[1]

    step = tf.function(step) if mode == "graph" else step
    state = lesam.init_state(variables)
    for i in range(1, 4):
        before = net.get_weights()
        outputs = plain(x, training=True)
        record = step(state)
        np.testing.assert_allclose(record.aux["outputs"], outputs, 1e-4, 1e-5)
        assert record.aux["name"] is None
        assert_close_weights(net, plain, rtol=1e-5)
        assert any(np.any(a != b) for a, b in zip(before, net.get_weights()))
        assert int(count) == i
        np.testing.assert_array_equal(mean.count, i)
        assert record.sharpness != 0
    # No other draws in the second pass: over no distance there is no rise.
    still = SharpnessAwareGradients(rules.SAM(1e-20))
    _, record = still(
        lambda: tf.reduce_mean(net(x, training=True) ** 2),
        *(variables, still.init_state(variables), None),
    )
    assert float(record.sharpness) == 0


def loop_net(**options):
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(8, "tanh", **options),
            layers.BatchNormalization(),
            layers.Dropout(0.3),
            layers.Dense(4, dtype="float32"),
        ]
    )


def test_mixed_precision_as_fit():
    """The loss scale goes down where it has to, and the steps are the same."""
    x, y = classification_data(64)
    options = {"dtype": "mixed_float16"}

    def scaled():
        return keras.optimizers.LossScaleOptimizer(
            optimizer(), initial_scale=2.0**30, dynamic_growth_steps=5
        )

    for method in (METHODS["LE-SAM"], METHODS["LookSAM"]):
        nets = [loop_net(**options) for _ in range(2)]
        by_fit(nets[0], x, y, *method, optimizer=scaled)
        records = by_loop(nets[1], x, y, *method, optimizer=scaled)
        assert_same_weights(*nets)
        assert all(np.isfinite(r.loss) for r in records)
        assert float(records[-1].loss) < 10


def test_the_loss_scale_of_the_gradients():
    """That of the optimizer; none without one. All else has none."""
    w = keras.Variable([3.0, 4.0])
    lesam = SharpnessAwareGradients(LESAM, 1.0)
    scaled = keras.optimizers.LossScaleOptimizer(optimizer(), initial_scale=8.0)
    state = lesam.init_state([w])
    (plain,), record = lesam(lambda: tf.reduce_sum(w**2), [w], state, None)
    (found,), other = lesam(lambda: tf.reduce_sum(w**2), [w], state, scaled)
    assert scaled.built
    np.testing.assert_array_equal(found, 8 * plain)
    for name in ("loss", "rho", "gradient_norm", "sharpness", "sigma"):
        assert getattr(record, name) == getattr(other, name)


def test_bare_gradients_without_a_budget():
    """Those of a tape, and no second pass."""
    calls = []
    w = keras.Variable([3.0, 4.0])

    def loss_fn():
        calls.append(None)
        return tf.reduce_sum(w**3)

    lesam = SharpnessAwareGradients(LESAM, 0.0)
    state = lesam.init_state([w])
    for _ in range(2):
        calls.clear()
        (found,), record = lesam(loss_fn, [w], state, None)
        np.testing.assert_array_equal(found, 3 * np.array([9.0, 16.0]))
        assert record.rho == record.sigma == record.sharpness == 0
    # It was looked at before the first step.
    assert len(calls) == 1


@pytest.mark.parametrize("name", ["LE-SAM", "LookSAM"])
def test_a_loop_in_a_graph(name):
    """The whole epoch in one `tf.function`; the state goes round."""
    x, y = classification_data(64)
    expected, found = dense_net(), dense_net()
    by_loop(expected, x, y, *METHODS[name])
    lesam = SharpnessAwareGradients(*METHODS[name])
    sgd, loss = optimizer(), crossentropy()
    variables = found.trainable_variables
    sgd.build(variables)
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH)

    def step(x, y, state):
        def loss_fn():
            return loss(y, found(x, training=True))

        gradients, record = lesam(loss_fn, variables, state, sgd)
        sgd.apply(gradients, variables)
        return record.state

    @tf.function
    def train(data, state):
        for x, y in data:
            state = step(x, y, state)
        return state

    state = train(data.repeat(2), lesam.init_state(variables))
    assert int(state["iterations"]) == STEPS
    assert_close_weights(found, expected, rtol=1e-5, atol=1e-6)


def test_xla():
    x, y = classification_data(64)
    for name in ("Friendly", "hvp"):
        expected, found = dense_net(), dense_net()
        by_loop(expected, x, y, *METHODS[name])
        by_loop(found, x, y, *METHODS[name], mode="xla")
        assert_close_weights(found, expected, rtol=1e-4, atol=1e-5)


def test_max_pooling_twice_differentiated_under_xla_is_refused():
    x, y = classification_data(64, (8, 8, 1))
    net = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(4, 3, activation="tanh"),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(4),
        ]
    )
    by_loop(net, x, y, *METHODS["hvp"])
    with pytest.raises(tf.errors.InvalidArgumentError, match="MAX_POOLING"):
        by_loop(net, x, y, *METHODS["hvp"], mode="xla")


@pytest.mark.parametrize("as_variables", [False, True])
def test_resuming(as_variables):
    """A state that was kept goes on as if nothing had been."""
    x, y = classification_data(64)
    method = METHODS["Friendly"]
    whole, net = dense_net(), dense_net()
    by_loop(whole, x, y, *method)
    sgd, loss = optimizer(), crossentropy()
    variables = net.trainable_variables

    @tf.function
    def step(x, y, state):
        gradients, record = SharpnessAwareGradients(*method)(
            lambda: loss(y, net(x, training=True)), variables, state, sgd
        )
        sgd.apply(gradients, variables)
        return record.state

    state = SharpnessAwareGradients(*method).init_state(variables)
    if as_variables:
        kept = {
            name: keras.Variable(value, trainable=False)
            for name, value in state.items()
        }
    for start in [*range(0, 64, BATCH)] * 2:
        rows = slice(start, start + BATCH)
        if as_variables:
            state = step(tf.constant(x[rows]), tf.constant(y[rows]), kept)
            for name, value in state.items():
                kept[name].assign(value)
        else:
            state = {name: np.array(value) for name, value in state.items()}
            state = step(tf.constant(x[rows]), tf.constant(y[rows]), state)
    assert_same_weights(net, whole)


class OwnStep(keras.Model):
    """A model with a `train_step` of its own, and the state in variables."""

    def __init__(self, net, method):
        super().__init__()
        self.net, self.lesam = net, SharpnessAwareGradients(*method)
        self.step_state = {
            name: keras.Variable(value, trainable=False)
            for name, value in self.lesam.init_state(
                net.trainable_variables
            ).items()
        }

    def call(self, x, training=False):
        return self.net(x, training=training)

    def train_step(self, data):
        x, y = data

        def loss_fn():
            outputs = self(x, training=True)
            return self.compute_loss(x, y, outputs), outputs

        gradients, record = self.lesam(
            *(loss_fn, self.trainable_variables),
            *(self.step_state, self.optimizer),
        )
        self.optimizer.apply(gradients, self.trainable_variables)
        for name, value in record.state.items():
            self.step_state[name].assign(value)
        return self.compute_metrics(x, y, record.aux)


@pytest.mark.parametrize(
    ("name", "eager"),
    [("LE-SAM", False), ("LE-SAM", True), ("LookSAM", False)],
)
def test_a_train_step_of_ones_own(name, eager):
    x, y = classification_data(64, (8, 8, 1))
    expected, net = noisy_net(), noisy_net()
    by_fit(expected, x, y, *METHODS[name])
    model = OwnStep(net, METHODS[name])
    model.compile(
        optimizer(), crossentropy(), metrics=["accuracy"], run_eagerly=eager
    )
    keras.utils.set_random_seed(1)
    history = model.fit(x, y, BATCH, 2, shuffle=False, verbose=0).history
    assert_close_weights(net, expected, rtol=1e-4, atol=1e-5)
    assert len(history["accuracy"]) == 2
    assert int(model.step_state["iterations"]) == STEPS


def test_two_sets_of_variables():
    """Each with a state and an optimizer; what is not given stays."""
    x, _ = classification_data(32)
    first = dense_net(6, 4, 6)
    second = keras.Sequential(
        [keras.Input((6,)), layers.Dense(1, kernel_regularizer="l2")]
    )
    lesam = SharpnessAwareGradients(*METHODS["Friendly"])
    nets, states, optimizers = (first, second), [], []
    for net in nets:
        states.append(lesam.init_state(net.trainable_variables))
        optimizers.append(optimizer())

    def step(i, states):
        def loss_fn():
            score = second(first(x, training=True), training=True)
            # The regularizer of weights that are not trained, too.
            return (1 - 2 * i) * tf.reduce_mean(score) + sum(second.losses)

        variables = nets[i].trainable_variables
        gradients, record = lesam(loss_fn, variables, states[i], optimizers[i])
        optimizers[i].apply(gradients, variables)
        return record.state

    for run in (step, tf.function(step)):
        for i in (0, 1):
            other = nets[1 - i].get_weights()
            before = nets[i].get_weights()
            states[i] = run(i, states)
            for a, b in zip(other, nets[1 - i].get_weights()):
                np.testing.assert_array_equal(a, b)
            assert np.any(before[0] != nets[i].get_weights()[0])


def test_gradient_penalty():
    """A tape in the loss function."""
    x, _ = classification_data(32)
    net = dense_net()
    inputs = tf.constant(x)
    lesam = SharpnessAwareGradients(*METHODS["LE-SAM"])
    variables = net.trainable_variables

    def loss_fn():
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            score = tf.reduce_mean(net(inputs))
        slope = tape.gradient(score, inputs)
        return score + 10 * tf.reduce_mean(slope**2)

    with tf.GradientTape() as tape:
        loss = loss_fn()
    plain = tape.gradient(loss, [v.value for v in variables])
    _, record = lesam(loss_fn, variables, lesam.init_state(variables), None)
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in plain if g is not None))
    np.testing.assert_allclose(record.gradient_norm, norm, rtol=1e-5)
    np.testing.assert_allclose(record.loss, loss, rtol=1e-6)


def test_an_embedding_keeps_its_rows():
    keras.utils.set_random_seed(0)
    net = keras.Sequential([keras.Input((2,)), layers.Embedding(50, 3)])
    variables = net.trainable_variables
    lesam = SharpnessAwareGradients(*METHODS["LE-SAM"])
    x = tf.constant([[1, 4]])
    (gradient,), _ = tf.function(
        lambda state: lesam(
            lambda: tf.reduce_sum(net(x) ** 2), variables, state, None
        )
    )(lesam.init_state(variables))
    assert isinstance(gradient, tf.IndexedSlices)


def test_weights_that_are_not_perturbed():
    x, y = classification_data(64)
    expected, found = dense_net(), dense_net()
    choice = {"perturb": lambda v: "kernel" in v.path}
    by_fit(expected, x, y, *METHODS["Friendly"], **choice)
    records = by_loop(found, x, y, *METHODS["Friendly"], **choice)
    assert_same_weights(found, expected)
    names = {n for n in records[0].state if n.startswith("rule")}
    assert names == {"rule.mean.0", "rule.mean.2"}


@pytest.mark.usefixtures("float64")
def test_float64():
    x, y = classification_data(64)
    expected, found = dense_net(), dense_net()
    by_fit(expected, x, y, *METHODS["secant"])
    records = by_loop(found, x, y, *METHODS["secant"])
    assert_same_weights(found, expected)
    assert records[0].rho.dtype == tf.float64


def test_a_failed_step_writes_nothing():
    """In eager mode and in a graph."""
    x, _ = classification_data(32, (8, 8, 1))
    net = noisy_net()
    variables = net.trainable_variables
    lesam = SharpnessAwareGradients(*METHODS["LE-SAM"])
    limit = tf.Variable(np.inf, trainable=False)

    def step(state):
        def loss_fn():
            loss = tf.reduce_mean(net(x, training=True) ** 2)
            check = tf.debugging.assert_less(loss, limit.read_value())
            with tf.control_dependencies([check] if check is not None else []):
                return tf.identity(loss)

        return lesam(loss_fn, variables, state, None)[1].state

    state = lesam.init_state(variables)
    for run in (step, tf.function(step)):
        limit.assign(np.inf)
        run(state)
        before = net.get_weights()
        limit.assign(-1.0)
        with pytest.raises(tf.errors.InvalidArgumentError):
            run(state)
        for a, b in zip(before, net.get_weights()):
            np.testing.assert_array_equal(a, b)


# Several replicas.


def synchronized_net():
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(8, "tanh"),
            layers.BatchNormalization(synchronized=True),
            layers.Dense(4),
        ]
    )


@pytest.mark.parametrize(
    ("name", "scope", "build"),
    [
        ("LE-SAM", "replica", loop_net),
        ("Friendly", "replica", loop_net),
        ("Friendly", "global", loop_net),
        ("secant", "global", loop_net),
        ("every", "replica", loop_net),
        ("every", "replica", synchronized_net),
        ("momentum", "global", synchronized_net),
    ],
)
def test_replicas_as_fit(name, scope, build):
    x, y = classification_data(64)
    strategy = mirrored(2)
    with strategy.scope():
        expected, found = build(), build()
        by_fit(expected, x, y, *METHODS[name], perturbation_scope=scope)
        lesam = SharpnessAwareGradients(
            *METHODS[name], perturbation_scope=scope
        )
        sgd, loss = optimizer(), crossentropy()
        variables = found.trainable_variables
        sgd.build(variables)
    keras.utils.set_random_seed(1)

    def step(x, y, state):
        def loss_fn():
            return loss(y, found(x, training=True))

        gradients, record = lesam(loss_fn, variables, state, sgd)
        sgd.apply(gradients, variables)
        return record

    @tf.function
    def run(x, y, state):
        return strategy.run(step, args=(x, y, state))

    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH).repeat(2)
    state = lesam.init_state(variables)
    for rows in strategy.experimental_distribute_dataset(data):
        record = run(*rows, state)
        state = record.state
    assert_close_weights(found, expected, rtol=1e-5, atol=1e-6)
    for value in state.values():
        copies = strategy.experimental_local_results(value)
        np.testing.assert_array_equal(*copies)
        assert len(copies) == 2
    with pytest.raises(ValueError, match=r"`strategy.run`"), strategy.scope():
        step(*next(iter(data)), lesam.init_state(variables))


# `train_step` of a wrapped model in a loop.


@pytest.mark.parametrize(
    ("name", "whole"),
    [("Friendly", True), ("warm-up", False), ("none", True)],
)
def test_train_step_in_a_function(name, whole):
    """Of one step, or of an epoch; as `fit`, logs too."""
    x, y = classification_data(64, (8, 8, 1))
    expected, found = noisy_net(), noisy_net()
    options = {"total_steps": STEPS} if name == "warm-up" else {}
    history = by_fit(expected, x, y, *METHODS[name], **options)
    model = SharpnessAwareModel(found, *METHODS[name], **options)
    model.compile(optimizer(), crossentropy())
    keras.utils.set_random_seed(1)
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH)

    @tf.function
    def step(batch):
        return model.train_step(batch)

    @tf.function
    def epoch(data):
        for batch in data:
            model.train_step(batch)

    for i in range(2):
        model.reset_metrics()
        if whole:
            epoch(data)
        else:
            for batch in data:
                logs = step(batch)
        logs = model.get_metrics_result()
        for log in ("loss", "rho", "sharpness"):
            np.testing.assert_allclose(logs[log], history[log][i], rtol=1e-4)
    assert_close_weights(found, expected, rtol=1e-5, atol=1e-6)


def test_lesam_model_is_this():
    """Its defaults are those of the general form."""
    x, y = classification_data(64)
    expected, found = dense_net(), dense_net()
    model = LESAMModel(expected, 0.1, warmup=0.0, anneal=0.0)
    model.compile(optimizer(), crossentropy())
    model.fit(x, y, BATCH, 2, verbose=0, shuffle=False)
    by_loop(found, x, y, rules.LossEquated(rho_max=1.0), 0.1)
    assert_same_weights(found, expected)


def test_a_state_that_a_graph_would_keep_is_refused():
    """It would be that of the first step for ever, and the training plain."""
    net = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    variables = net.trainable_variables
    lesam = SharpnessAwareGradients(
        rules.LossEquated(), budgets.Relative(0.3, reference_loss=2.0)
    )
    x = np.ones((8, 4), "float32")
    kept = lesam.init_state(variables)

    def step(state):
        def loss_fn():
            return tf.reduce_mean((net(x) - 1.0) ** 2)

        return lesam(loss_fn, variables, state, None)[1].state

    with pytest.raises(ValueError, match=r"`state` would be a constant"):
        tf.function(lambda: step(kept))()
    assert int(step(kept)["iterations"]) == 1
    assert int(tf.function(step)(kept)["iterations"]) == 1
    in_variables = tf.nest.map_structure(tf.Variable, kept)
    assert int(tf.function(lambda: step(in_variables))()["iterations"]) == 1
