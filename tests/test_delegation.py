"""Models with training logic of their own: honoured or refused."""

import keras
import numpy as np
import pytest

from keras_lesam import LESAMModel
from keras_lesam._delegation import DelegatingModel
from tests import reference
from tests.helpers import assert_close_weights
from tests.helpers import assert_same_weights
from tests.helpers import classification_data
from tests.helpers import constant_lesam
from tests.helpers import crossentropy
from tests.helpers import train

OURS = {"rho", "gradient_norm", "sharpness", "sigma"}


def functional(cls):
    """A functional model of class `cls`."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6,))
    x = keras.layers.Dense(8, activation="tanh", kernel_regularizer="l2")(
        inputs
    )
    return cls(inputs, keras.layers.Dense(4)(x))


@keras.saving.register_keras_serializable("tests")
class SmoothLoss(keras.Model):
    """Adds to the loss of `compile`."""

    def compute_loss(
        self, x=None, y=None, y_pred=None, sample_weight=None, training=True
    ):
        loss = super().compute_loss(x, y, y_pred, sample_weight, training)
        return loss + 0.1 * keras.ops.mean(keras.ops.square(y_pred))


class OldSignature(keras.Model):
    """Without the argument that Keras 3.3 added."""

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None):
        loss = super().compute_loss(x, y, y_pred, sample_weight)
        return loss + 0.1 * keras.ops.mean(keras.ops.square(y_pred))


class OwnTracker(keras.Model):
    """As in Keras's documentation of `compute_loss`: all by itself."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.loss_tracker = keras.metrics.Mean(name="loss")

    def compute_loss(self, x, y, y_pred, sample_weight, training=True):
        one_hot = keras.ops.one_hot(y, 4)
        loss = keras.ops.mean(keras.ops.square(y_pred - one_hot))
        loss += keras.ops.sum(self.losses)
        self.loss_tracker.update_state(loss)
        return loss

    def reset_metrics(self):
        self.loss_tracker.reset_state()

    @property
    def metrics(self):
        return [self.loss_tracker]


@keras.saving.register_keras_serializable("tests")
class OwnMetrics(keras.Model):
    """Counts the steps it is asked for, beside the metrics of `compile`."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.calls = keras.metrics.Sum(name="calls")

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        results = super().compute_metrics(x, y, y_pred, sample_weight)
        self.calls.update_state(1.0)
        return {**results, "calls": self.calls.result()}


class MetricInCall(keras.Model):
    """A metric that is updated in `call`, in a list."""

    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(4)
        self.trackers = [keras.metrics.Sum(name="seen")]

    def call(self, x, training=False):
        if training:
            self.trackers[0].update_state(1.0)
        return self.dense(x)


@keras.saving.register_keras_serializable("tests")
class Subclassed(keras.Model):
    """A loss with a term for training only, and a metric beside it."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = keras.layers.Dense(4)
        self.penalty = keras.layers.ActivityRegularization(l2=0.01)
        self.confidence = keras.metrics.Mean(name="confidence")

    def call(self, x):
        return self.penalty(self.dense(x))

    def compute_loss(
        self, x=None, y=None, y_pred=None, sample_weight=None, training=True
    ):
        loss = super().compute_loss(x, y, y_pred, sample_weight, training)
        extra = 0.1 * keras.ops.mean(keras.ops.square(y_pred))
        return loss + extra if training else loss

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        results = super().compute_metrics(x, y, y_pred, sample_weight)
        self.confidence.update_state(keras.ops.max(y_pred, axis=-1))
        return {**results, "confidence": self.confidence.result()}


def subclassed(cls):
    keras.utils.set_random_seed(0)
    net = cls()
    net(np.zeros((1, 6)))
    return net


MODELS = {
    "own loss": (SmoothLoss, functional),
    "old signature": (OldSignature, functional),
    "own tracker": (OwnTracker, functional),
    "own metrics": (OwnMetrics, functional),
    "subclassed": (Subclassed, subclassed),
    "metric in call": (MetricInCall, subclassed),
}


@pytest.mark.parametrize("name", MODELS)
def test_without_budget_as_in_plain_fit(name):
    cls, build = MODELS[name]
    x, y = classification_data()
    plain, net = build(cls), build(cls)
    arguments = {} if cls is OwnTracker else {"metrics": ["accuracy"]}
    expected = train(plain, x, y, **arguments)
    found = train(LESAMModel(net, sigma=0.0), x, y, **arguments)
    assert_same_weights(net, plain)
    assert set(found) == set(expected) | OURS
    assert {key: found[key] for key in expected} == expected


class OwnLossOfTwo(keras.Model):
    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None):
        loss = super().compute_loss(x, y, y_pred, sample_weight)
        return loss + 0.1 * keras.ops.mean(keras.ops.square(y_pred["a"]))


def two_outputs(cls):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6,))
    outputs = {name: keras.layers.Dense(4, name=name)(inputs) for name in "ab"}
    return cls(inputs, outputs)


@pytest.mark.parametrize("cls", [OwnLossOfTwo, keras.Model])
def test_losses_of_each_output(cls):
    x, y = classification_data()
    y = {"a": y, "b": (y + 1) % 4}
    plain, net = two_outputs(cls), two_outputs(cls)
    arguments = {
        "loss": {"a": crossentropy(), "b": crossentropy()},
        "loss_weights": {"a": 1.0, "b": 0.5},
        "metrics": {"b": ["accuracy"]},
    }
    model = LESAMModel(net, sigma=0.0)
    expected = train(plain, x, y, **arguments)
    found = train(model, x, y, **arguments)
    assert set(expected) == {"loss", "a_loss", "b_loss", "b_accuracy"}
    assert {key: found[key] for key in expected} == expected
    assert_same_weights(net, plain)
    scores = [m.evaluate(x, y, verbose=0) for m in (model, plain)]
    assert scores[0] == scores[1]
    # With a budget they are still those at the weights, not at w + eps.
    plain, net = two_outputs(cls), two_outputs(cls)
    once = {"epochs": 1, "batch_size": len(x), **arguments}
    expected = train(plain, x, y, **once)
    found = train(constant_lesam(net), x, y, **once)
    for key, values in expected.items():
        np.testing.assert_allclose(found[key], values, rtol=1e-6, err_msg=key)
    with pytest.raises(AssertionError):
        assert_same_weights(net, plain)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("name", ["own metrics", "metric in call"])
def test_metrics_are_updated_once_a_step(name, parts):
    cls, build = MODELS[name]
    x, y = classification_data(rows=96)
    model = constant_lesam(build(cls), num_batch_splits=parts)
    history = train(model, x, y, metrics=["accuracy"])
    # A part is a pass of its own: `call` sees each.
    steps = 3 * (parts if name == "metric in call" else 1)
    key = "calls" if name == "own metrics" else "seen"
    assert history[key] == [steps] * 3
    assert "accuracy" in history


@pytest.mark.parametrize("options", [{}, {"ascent_fraction": 0.5}], ids=str)
def test_a_tracker_in_the_loss_is_updated_once_a_step(options):
    x, y = classification_data(rows=96)
    net = functional(OwnTracker)
    train(constant_lesam(net, **options), x, y)
    assert float(net.loss_tracker.count) == 3


def smooth(y, y_pred, sample_weight=None):
    """The reference's words for the loss of `SmoothLoss`."""
    loss = crossentropy()(y, y_pred, sample_weight)
    return loss + 0.1 * keras.ops.mean(keras.ops.square(y_pred))


def squares(y, y_pred, sample_weight=None):
    """And for the loss of `OwnTracker`."""
    one_hot = keras.ops.one_hot(y, 4)
    return keras.ops.mean(keras.ops.square(y_pred - one_hot))


@pytest.mark.parametrize(
    ("cls", "build", "loss"),
    [
        (SmoothLoss, functional, smooth),
        (OldSignature, functional, smooth),
        (OwnTracker, functional, squares),
        (Subclassed, subclassed, smooth),
    ],
)
def test_own_loss_is_the_one_that_is_climbed(cls, build, loss, float64):
    x, y = classification_data()
    net, twin = build(cls), build(cls)
    steps = reference.fit(twin, loss, x, y, sigma=0.1)
    history = train(constant_lesam(net, 0.1), x, y, epochs=2, shuffle=False)
    assert_close_weights(net, twin, rtol=1e-6, atol=1e-7)
    rho, slope, value, rise = np.reshape(steps, (2, 3, 4)).mean(axis=1).T
    np.testing.assert_allclose(history["rho"], rho, rtol=1e-6)
    np.testing.assert_allclose(history["gradient_norm"], slope, rtol=1e-6)
    np.testing.assert_allclose(history["loss"], value, rtol=1e-6)
    np.testing.assert_allclose(history["sharpness"], rise, rtol=1e-5)


def test_own_loss_of_an_instance(float64):
    """Assigned to the model and not to its class."""
    x, y = classification_data()
    net, twin = functional(keras.Model), functional(keras.Model)

    def compute_loss(x, y, y_pred, sample_weight, training=True):
        return smooth(y, y_pred) + sum(net.losses)

    net.compute_loss = compute_loss
    reference.fit(twin, smooth, x, y, sigma=0.1)
    train(constant_lesam(net, 0.1), x, y, epochs=2, shuffle=False)
    assert_close_weights(net, twin, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", MODELS)
def test_evaluate_as_plain_keras(name):
    cls, build = MODELS[name]
    x, y = classification_data()
    net = build(cls)
    model = constant_lesam(net)
    arguments = {} if cls is OwnTracker else {"metrics": ["accuracy"]}
    train(model, x, y, **arguments)
    found = model.evaluate(x, y, verbose=0, return_dict=True)
    plain = build(cls)
    plain.set_weights(net.get_weights())
    plain.compile("sgd", crossentropy(), **arguments)
    expected = plain.evaluate(x, y, verbose=0, return_dict=True)
    assert found == expected


@pytest.mark.parametrize("name", MODELS)
def test_validation_in_fit_as_plain_keras(name):
    cls, build = MODELS[name]
    x, y = classification_data()
    arguments = {} if cls is OwnTracker else {"metrics": ["accuracy"]}
    found, expected = {}, {}
    for wrap, history in (
        (lambda net: LESAMModel(net, sigma=0.0), found),
        (lambda net: net, expected),
    ):
        model = wrap(build(cls))
        model.compile("sgd", crossentropy(), **arguments)
        fit = {"validation_data": (x, y), "shuffle": False, "verbose": 0}
        history.update(model.fit(x, y, epochs=2, **fit).history)
    assert set(found) == set(expected) | OURS
    assert {key: found[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("cls", "build"),
    [
        (SmoothLoss, functional),
        (OwnMetrics, functional),
        (Subclassed, subclassed),
    ],
)
def test_saved_and_loaded(cls, build, tmp_path):
    x, y = classification_data()
    model = constant_lesam(build(cls))
    train(model, x, y, optimizer=keras.optimizers.Adam(), metrics=["accuracy"])
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert type(loaded.model) is cls
    arguments = {"epochs": 2, "shuffle": False, "verbose": 0}
    expected = model.fit(x, y, **arguments).history
    assert loaded.fit(x, y, **arguments).history == expected
    assert_same_weights(loaded.model, model.model)


def test_an_optimizer_from_before_is_kept(tmp_path):
    """Of a model with a loss of its own, which is compiled along."""
    x, y = classification_data()
    net = functional(SmoothLoss)
    own = keras.optimizers.Adam(0.003)
    train(net, x, y, optimizer=own)
    train(constant_lesam(net), x, y)
    assert net.optimizer is own
    net.save(tmp_path / "net.keras")
    loaded = keras.saving.load_model(tmp_path / "net.keras")
    assert int(loaded.optimizer.iterations) == int(own.iterations) > 0


def test_own_predict_step():
    class Labels(keras.Model):
        def predict_step(self, data):
            return keras.ops.argmax(super().predict_step(data), axis=-1)

    x, y = classification_data()
    net = functional(Labels)
    model = constant_lesam(net)
    train(model, x, y)
    np.testing.assert_array_equal(
        model.predict(x, verbose=0),
        np.argmax(net(x), axis=-1),
    )


REFUSED = (
    *("train_step", "test_step", "fit", "evaluate"),
    *("train_on_batch", "test_on_batch"),
    *("make_train_function", "make_test_function"),
    *("compile", "predict", "predict_on_batch", "make_predict_function"),
)


@pytest.mark.parametrize("name", REFUSED)
def test_own_steps_are_refused(name):
    def method(self, *args, **kwargs):
        return getattr(keras.Model, name)(self, *args, **kwargs)

    cls = type("Own", (keras.Model,), {name: method})
    with pytest.raises(ValueError, match=f"which overrides {name}"):
        LESAMModel(functional(cls))
    net = functional(keras.Model)
    setattr(net, name, lambda *args: None)
    with pytest.raises(ValueError, match=f"which overrides {name}"):
        LESAMModel(net)


def test_metrics_of_a_model_compiled_before_are_not_ours():
    x, y = classification_data()
    net = functional(keras.Model)
    net.compile("sgd", crossentropy(), metrics=["accuracy", "mse"])
    history = train(constant_lesam(net), x, y, metrics=["accuracy"])
    assert set(history) == OURS | {"loss", "accuracy"}


# The base by itself, without any SAM in it.


@keras.saving.register_keras_serializable("tests")
class Wrapped(DelegatingModel):
    """Trains the inner model as that would train itself."""


@pytest.mark.parametrize(
    "cls",
    [keras.Model, SmoothLoss, OldSignature, OwnTracker, OwnMetrics],
)
def test_a_delegating_model_trains_as_the_inner_model_does(cls):
    x, y = classification_data()
    plain, net = functional(cls), functional(cls)
    wrapper = Wrapped(net)
    histories = [
        train(model, x, y, metrics=["accuracy"]) for model in (plain, wrapper)
    ]
    assert_same_weights(net, plain)
    assert histories[0] == histories[1]
    for method in ("evaluate", "test_on_batch"):
        results = [
            getattr(model, method)(x, y, return_dict=True)
            for model in (plain, wrapper)
        ]
        assert set(results[0]) == set(results[1])
        for log, value in results[0].items():
            np.testing.assert_allclose(results[1][log], value, rtol=1e-6)
    np.testing.assert_array_equal(
        plain.predict(x, verbose=0), wrapper.predict(x, verbose=0)
    )


def test_a_delegating_model_is_saved_around_its_inner_model(tmp_path):
    x, y = classification_data()
    wrapper = Wrapped(functional(SmoothLoss), name="stands_in")
    train(wrapper, x, y, metrics=["accuracy"])
    wrapper.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert isinstance(loaded, Wrapped)
    assert isinstance(loaded.model, SmoothLoss)
    assert loaded.name == "stands_in"
    assert_same_weights(loaded, wrapper)
    assert loaded.evaluate(x, y, verbose=0) == wrapper.evaluate(x, y, verbose=0)


def test_a_delegating_model_has_the_precision_and_outputs_of_its_model():
    keras.config.set_dtype_policy("mixed_float16")
    inputs = keras.Input((6,))
    outputs = [keras.layers.Dense(2, name=name)(inputs) for name in ("a", "b")]
    net = keras.Model(inputs, outputs)
    keras.config.set_dtype_policy("float32")
    wrapper = Wrapped(net)
    wrapper.compile("sgd", {"a": "mse", "b": "mse"})
    assert wrapper.output_names == ["a", "b"]
    assert isinstance(wrapper.optimizer, keras.optimizers.LossScaleOptimizer)


def test_a_delegating_model_refuses_what_it_cannot_stand_for():
    class OwnStep(keras.Model):
        def train_step(self, data):
            return {}

    with pytest.raises(ValueError, match="overrides train_step"):
        Wrapped(OwnStep())
    with pytest.raises(TypeError, match=r"must be a keras.Model.*model=3"):
        Wrapped(3)
    with pytest.raises(ValueError, match="is a Wrapped already"):
        LESAMModel(Wrapped(functional(keras.Model)))
