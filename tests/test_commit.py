"""An exception in a step leaves all that is trained as the step before did."""

import contextlib

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from keras_lesam import SharpnessAwareModel
from keras_lesam import ascents
from keras_lesam import rules
from tests.helpers import mirrored

EVERYWHERE = (
    *("call", "python", "branch", "loss", "backwards", "second pass"),
    *("metric", "result", "perturb", "update", "optimizer"),
)
# What burns, by its number, and the kernel as it is between steps.
BURNING = tf.Variable(-1, trainable=False)
KERNEL = tf.Variable(tf.zeros((4, 8)), trainable=False)
FAILURE = "it burns"


def fuse(place):
    """An assertion that is nobody's input."""
    tf.debugging.assert_none_equal(
        BURNING, EVERYWHERE.index(place), message=FAILURE
    )


def python_fuse(place):
    """The same, in a function of Python."""

    def check(burning):
        if burning.numpy() == EVERYWHERE.index(place):
            raise ValueError(FAILURE)

    tf.py_function(check, [BURNING], [])


class Fused(layers.Layer):
    """A dense layer with a seed, which can fail in all ways."""

    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(8)
        self.dropout = layers.Dropout(0.2, seed=1)

    def build(self, shape):
        self.dense.build(shape)
        self.built = True

    def call(self, x, training=False):
        fuse("call")
        python_fuse("python")
        kernel = tf.convert_to_tensor(self.dense.kernel)
        moved = tf.reduce_any(kernel != tf.cast(KERNEL, kernel.dtype))
        second = tf.where(moved, EVERYWHERE.index("second pass"), -2)
        tf.debugging.assert_none_equal(BURNING, second, message=FAILURE)
        # In a branch, which may be over before what it asserts is.
        x = tf.cond(tf.reduce_sum(x) > -1e9, lambda: burn(x), lambda: x)
        return self.dropout(self.dense(x), training=training)


def burn(x):
    fuse("branch")
    return 2.0 * x


def fused_loss(y, outputs):
    fuse("loss")
    return tf.square(y - outputs)


@tf.custom_gradient
def fused_backwards(x):
    def gradient(dy):
        fuse("backwards")
        return dy

    return tf.identity(x), gradient


class FusedMean(keras.metrics.Mean):
    def update_state(self, values, sample_weight=None):
        fuse("metric")
        super().update_state(values, sample_weight)

    def result(self):
        fuse("result")
        return super().result()


class Metered(keras.Model):
    """Has a metric that it updates itself, after others."""

    def __init__(self):
        super().__init__()
        self.fused = Fused()
        self.rest = keras.Sequential(
            [layers.BatchNormalization(), layers.ReLU(), layers.Dense(1)]
        )
        self.mean = FusedMean(name="fused")

    def call(self, x, training=False):
        return self.rest(
            fused_backwards(self.fused(x, training=training)),
            training=training,
        )

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        super().compute_metrics(x, y, y_pred, sample_weight)
        self.mean.update_state(y_pred)
        return self.get_metrics_result()


@keras.saving.register_keras_serializable("tests_commit")
class FusedSAM(rules.SAM):
    def perturb(self, *args, **kwargs):
        fuse("perturb")
        return super().perturb(*args, **kwargs)

    def update(self, plain, perturbed, state):
        fuse("update")
        return super().update(plain, perturbed, state)


METHODS = {
    "lesam": {"budget": 0.1},
    "secant": {"budget": 0.1, "curvature": "secant"},
    "hvp": {"budget": 0.1, "curvature": "hvp"},
    "sam": {"rule": FusedSAM(0.1)},
    "looksam": {"rule": rules.LookSAM(0.1, every=2)},
    "friendly": {"rule": rules.FriendlySAM(0.1)},
    "momentum": {"rule": rules.SAM(0.1), "ascent": ascents.Momentum()},
    "parts": {"budget": 0.1, "num_batch_splits": 2},
    "fraction": {"budget": 0.1, "ascent": ascents.Fraction(0.5)},
    "every": {"rule": rules.GSAM(0.1), "ascent": ascents.Every(2)},
}
GRAPH, EAGER = {}, {"run_eagerly": True}
MODES = pytest.mark.parametrize("mode", [GRAPH, EAGER], ids=str)


def data(rows=16):
    rng = np.random.default_rng(0)
    return (
        rng.normal(size=(rows, 4)).astype("float32"),
        rng.normal(size=(rows, 1)).astype("float32"),
    )


def make(method, mode, optimizer=None, net=Metered):
    keras.utils.set_random_seed(0)
    model = SharpnessAwareModel(net(), **METHODS[method])
    optimizer = optimizer or keras.optimizers.Adam(0.01)
    model.compile(optimizer, fused_loss, metrics=["mae"], **mode)
    return model


def state_of(model):
    """All that a training has, by path."""
    variables = [*model.variables, *model.optimizer.variables]
    return {f"{v.path} {i}": v.numpy() for i, v in enumerate(variables)}


def assert_same_state(model, expected, place):
    found = state_of(model)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        message = f"{name}, {place}"
        np.testing.assert_array_equal(found[name], value, err_msg=message)


@contextlib.contextmanager
def burning(place):
    BURNING.assign(EVERYWHERE.index(place))
    try:
        yield
    finally:
        BURNING.assign(-1)


def kernel(model):
    return model.model.fused.dense.kernel


def step(model):
    if model.built:
        KERNEL.assign(kernel(model))
    model.train_on_batch(*data())


def places_of(method):
    """Where steps of a method can fail; its own code is that of one."""
    return EVERYWHERE[:10] if method == "sam" else EVERYWHERE[:8]


@pytest.mark.parametrize("method", METHODS)
@MODES
def test_an_exception_leaves_the_state_of_the_step_before(method, mode):
    """Weights, statistics, seeds, iterations, slots, metrics and memories."""
    model = make(method, mode)
    for _ in range(3):
        step(model)
    # Steps of both kinds, where they are of two.
    for place in places_of(method) * 2:
        before = state_of(model)
        with burning(place), pytest.raises(Exception, match=FAILURE):
            step(model)
        assert_same_state(model, before, place)
        step(model)
        after = state_of(model)
        assert any(np.any(after[k] != before[k]) for k in before)


def assert_survives(model, places):
    """Fails in steps as `step` makes them, and in none of their state."""
    for _ in range(2):
        step(model)
    for place in places:
        before = state_of(model)
        with burning(place), pytest.raises(Exception, match=FAILURE):
            step(model)
        assert_same_state(model, before, place)
    step(model)


@MODES
def test_mixed_precision(mode):
    keras.config.set_dtype_policy("mixed_float16")
    model = make("lesam", mode)
    assert_survives(model, ("call", "second pass", "metric"))
    assert any("dynamic_scale" in name for name in state_of(model))


class Hidden(Metered):
    """Weights that are read behind a function: they are moved in place."""

    @tf.function
    def hidden(self, x, training):
        return self.rest(self.fused(x, training=training), training=training)

    def call(self, x, training=False):
        return self.hidden(x, training)


@pytest.mark.filterwarnings("ignore:.*moves its weights in place")
@MODES
def test_passes_in_place(mode):
    net = Hidden()
    net(data()[0])
    model = make("lesam", mode, net=lambda: net)
    assert_survives(model, ("call", "branch", "second pass", "metric"))
    assert model._passes.is_in_place


class Nested(FusedMean):
    """Writes in a function, out of which nothing can be carried."""

    @tf.function
    def update_state(self, values, sample_weight=None):
        super().update_state(values, sample_weight)


class NestedResult(FusedMean):
    """Reads in a function, which would keep what it was traced with."""

    @tf.function
    def result(self):
        return super().result()


@MODES
@pytest.mark.parametrize(
    ("method", "metric"),
    [("lesam", Nested), ("fraction", Nested), ("lesam", NestedResult)],
)
def test_a_metric_that_is_used_in_a_function(method, metric, mode):
    """It counts; a pass that fails leaves even that alone."""

    class Net(Metered):
        def __init__(self):
            super().__init__()
            self.mean = metric(name="fused")

    model = make(method, mode, net=Net)
    assert_survives(model, EVERYWHERE[:6])
    logs = model.train_on_batch(*data(), return_dict=True)
    mean = model.model.mean
    assert float(logs["fused"]) == float(mean.total) / float(mean.count)
    rows = 16 if method == "lesam" else 8
    # Of the last step, or of all in versions that reset no metrics.
    assert int(mean.count) in (rows, 4 * rows)


@pytest.mark.parametrize("method", ["lesam", "fraction", "looksam"])
@pytest.mark.parametrize("executed", [1, 3])
def test_fit_ends_at_the_last_whole_step(method, executed):
    """Also where several steps are one execution."""
    x, y = data(80)
    models = [
        make(method, {"steps_per_execution": executed}, net=Picky)
        for _ in range(2)
    ]
    batches = {"batch_size": 16, "shuffle": False, "verbose": 0}
    models[0].fit(x[:64], y[:64], **batches)
    x[70] = 99.0
    with pytest.raises(tf.errors.InvalidArgumentError, match=FAILURE):
        models[1].fit(x, y, **batches)
    found, expected = (state_of(model) for model in models)
    assert len(found) == len(expected)
    for name, value, other in zip(found, found.values(), expected.values()):
        np.testing.assert_array_equal(value, other, err_msg=name)


class Picky(Metered):
    """Fails by what it is given."""

    def call(self, x, training=False):
        tf.debugging.assert_less(x, 50.0, message=FAILURE)
        return super().call(x, training=training)


@pytest.mark.parametrize("mode", [GRAPH, EAGER, {"jit_compile": True}], ids=str)
def test_a_trace_that_fails(mode):
    """Of a batch of another shape, after steps; XLA has no assertions."""
    model = make("secant", mode, net=lambda: keras.Sequential([Untraced()]))
    x, y = data()
    for _ in range(2):
        model.train_on_batch(x, y)
    before = state_of(model)
    UNTRACED.append(None)
    try:
        with pytest.raises(ValueError, match=FAILURE):
            model.train_on_batch(x[:9], y[:9])
    finally:
        UNTRACED.clear()
    assert_same_state(model, before, "trace")
    model.train_on_batch(x[:9], y[:9])


# Not empty: what is traced fails.
UNTRACED = []


class Untraced(layers.Layer):
    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(1)

    def build(self, shape):
        self.dense.build(shape)
        self.built = True

    def call(self, x):
        if UNTRACED:
            raise ValueError(FAILURE)
        return self.dense(x)


@pytest.mark.parametrize("scope", ["replica", "global"])
def test_replicas(scope):
    """One fails, and none of them writes."""
    x, y = data(32)
    with mirrored(2).scope():
        keras.utils.set_random_seed(0)
        model = SharpnessAwareModel(
            Picky(), rules.FriendlySAM(0.1), perturbation_scope=scope
        )
        model.compile(keras.optimizers.Adam(0.01), "mse")
    batches = {"batch_size": 32, "shuffle": False, "verbose": 0}
    for _ in range(2):
        model.fit(x, y, **batches)
    # Of the metrics, which `fit` resets, and of all else.
    before = {v.path: v.numpy() for v in trained(model)}
    x[-1] = 99.0
    with pytest.raises(tf.errors.OpError):
        model.fit(x, y, **batches)
    for variable in trained(model):
        np.testing.assert_array_equal(
            variable.numpy(), before[variable.path], err_msg=variable.path
        )


def trained(model):
    metrics = {id(v) for v in model.metrics_variables}
    variables = [*model.variables, *model.optimizer.variables]
    return [v for v in variables if id(v) not in metrics]


class FusedSGD(keras.optimizers.SGD):
    def update_step(self, gradient, variable, learning_rate):
        fuse("optimizer")
        super().update_step(gradient, variable, learning_rate)


@MODES
def test_an_optimizer_that_fails_leaves_only_what_is_its_own(mode):
    """In plain Keras statistics, seeds and the loss have been written."""
    model = make("secant", mode, FusedSGD(0.1, momentum=0.9))
    step(model)
    its_own = [*model.trainable_variables, *model.optimizer.variables]
    others = {id(v) for v in model.variables} - {id(v) for v in its_own}
    variables = [v for v in model.variables if id(v) in others]
    before = [v.numpy() for v in variables]
    with burning("optimizer"), pytest.raises(Exception, match=FAILURE):
        step(model)
    for variable, value in zip(variables, before):
        np.testing.assert_array_equal(variable, value, err_msg=variable.path)


@keras.saving.register_keras_serializable("tests_commit")
class Uneven(ascents.FullBatch):
    """Reports steps that write other variables."""

    def run(self, context, batch, inputs, report):
        step = self.step(context, batch, inputs)
        report(step)
        return report(step._replace(model_state=step.model_state[1:]))


def test_steps_that_write_other_variables_are_refused():
    model = SharpnessAwareModel(Metered(), ascent=Uneven(), total_steps=9)
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match="must write the same variables"):
        model.train_on_batch(*data())
