"""What the two-pass step must be equal to, bit for bit or to rounding."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_lesam import LESAMModel
from tests import reference
from tests.helpers import assert_close_weights
from tests.helpers import assert_same_weights
from tests.helpers import classification_data
from tests.helpers import constant_lesam
from tests.helpers import crossentropy
from tests.helpers import dense_net
from tests.helpers import noisy_net
from tests.helpers import train


class Zero(keras.optimizers.schedules.LearningRateSchedule):
    """No budget, but for all the wrapper knows there might be one later."""

    def __call__(self, step):
        return 0.0 * keras.ops.cast(step, "float32")

    def get_config(self):
        return {}


def sgd():
    return keras.optimizers.SGD(0.1, momentum=0.9)


def adam():
    return keras.optimizers.AdamW(1e-2, weight_decay=1e-3)


def images():
    return classification_data(rows=100, shape=(8, 8, 1))


def assert_trains_like_plain_fit(wrap, optimizer, **compile_arguments):
    """Weights, state and the history of losses, to the last bit."""
    x, y = images()
    plain, net = noisy_net(), noisy_net()
    arguments = {"metrics": ["accuracy"], **compile_arguments}
    expected = train(plain, x, y, optimizer=optimizer(), **arguments)
    found = train(wrap(net), x, y, optimizer=optimizer(), **arguments)
    assert found["loss"] == expected["loss"]
    assert found["accuracy"] == expected["accuracy"]
    assert_same_weights(net, plain)
    for a, b in zip(net.non_trainable_variables, plain.non_trainable_variables):
        np.testing.assert_array_equal(a, b, err_msg=a.path)
    return found


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (sgd, {}),
        (adam, {}),
        (sgd, {"run_eagerly": True}),
        (sgd, {"jit_compile": True}),
    ],
)
def test_no_budget_is_plain_fit(optimizer, options):
    history = assert_trains_like_plain_fit(
        lambda net: LESAMModel(net, sigma=0.0), optimizer, **options
    )
    assert history["sharpness"] == [0.0] * 3
    assert history["rho"] == [0.0] * 3
    assert history["sigma"] == [0.0] * 3


@pytest.mark.parametrize(
    ("optimizer", "share", "options"),
    [
        (adam, 1.0, {}),
        (adam, 0.5, {}),
        (sgd, 1.0, {"run_eagerly": True}),
        (sgd, 0.5, {"run_eagerly": True}),
        (sgd, 1.0, {"jit_compile": True}),
    ],
)
def test_a_schedule_of_zeros_is_plain_fit(optimizer, share, options):
    """The one-pass branch of the step that could have made two."""
    history = assert_trains_like_plain_fit(
        lambda net: LESAMModel(net, Zero(), ascent_fraction=share),
        optimizer,
        **options,
    )
    assert all(norm > 0 for norm in history["gradient_norm"])


@pytest.mark.parametrize("options", [{}, {"run_eagerly": True}], ids=str)
def test_two_passes_without_displacement_are_plain_fit(options):
    """At w + eps = w, both passes see one function, noise and all."""
    history = assert_trains_like_plain_fit(
        lambda net: constant_lesam(net, sigma=0.1, rho_max=1e-30),
        adam,
        **options,
    )
    assert history["sharpness"] == [0.0] * 3
    np.testing.assert_allclose(history["rho"], 1e-30, rtol=1e-5)


def test_the_passes_are_not_the_same_once_weights_move():
    """The test above can fail."""
    x, y = images()
    plain, net = noisy_net(), noisy_net()
    train(plain, x, y)
    history = train(constant_lesam(net), x, y)
    assert min(history["sharpness"]) > 0.05
    with pytest.raises(AssertionError):
        assert_same_weights(net, plain)


RULES = {
    "first order": {},
    "capped": {"rho_max": 0.05},
    "adaptive": {"adaptive": True},
    "alpha": {"alpha": 0.5},
    "parts": {"num_batch_splits": 4},
    "uneven parts": {"num_batch_splits": 5},
    "share": {"ascent_fraction": 0.3},
    "share of parts": {"ascent_fraction": 0.5, "num_batch_splits": 3},
    "biases only": {"perturb": lambda variable: variable.name == "bias"},
    "all at once": {
        "adaptive": True,
        "alpha": 0.3,
        "rho_max": 0.5,
        "num_batch_splits": 3,
        "ascent_fraction": 0.6,
        "perturb": lambda variable: variable.name == "kernel",
    },
}


def reference_arguments(options):
    names = {"num_batch_splits": "parts", "ascent_fraction": "share"}
    return {names.get(name, name): value for name, value in options.items()}


@pytest.mark.parametrize("options", RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize("mode", [{}, {"run_eagerly": True}], ids=str)
def test_every_option_against_the_reference(options, mode, float64):
    assert_agrees_with_the_reference(options, mode)


@pytest.mark.parametrize("name", ["first order", "parts", "all at once"])
def test_options_under_xla_against_the_reference(name, float64):
    assert_agrees_with_the_reference(RULES[name], {"jit_compile": True})


def assert_agrees_with_the_reference(options, mode):
    """80 rows in batches of 32: the last of 16."""
    x, y = classification_data(rows=80)
    weight = np.random.default_rng(3).uniform(0.2, 2.0, size=80)
    expected, net = dense_net(), dense_net()
    steps = reference.fit(
        expected,
        crossentropy(),
        x,
        y,
        sigma=0.2,
        sample_weight=weight,
        **reference_arguments(options),
    )
    model = constant_lesam(net, 0.2, **options)
    model.compile(keras.optimizers.SGD(0.1), crossentropy(), **mode)
    history = model.fit(
        x,
        y,
        sample_weight=weight,
        batch_size=32,
        epochs=2,
        shuffle=False,
        verbose=0,
    ).history

    # A float32 learning rate sets the limit of agreement.
    assert_close_weights(net, expected, rtol=1e-6, atol=1e-7)
    steps = np.reshape(steps, (2, 3, 4)).mean(axis=1)
    np.testing.assert_allclose(history["rho"], steps[:, 0], rtol=1e-6)
    np.testing.assert_allclose(history["gradient_norm"], steps[:, 1], rtol=1e-6)
    if "sharpness" in history:
        np.testing.assert_allclose(history["sharpness"], steps[:, 3], rtol=1e-5)
    assert ("sharpness" in history) == ("ascent_fraction" not in options)


class Rows(keras.metrics.Metric):
    """Counts the rows it is shown."""

    def __init__(self, name="rows"):
        super().__init__(name=name)
        self.total = self.add_variable((), "zeros", name="total")

    def update_state(self, y_true, y_pred, sample_weight=None):
        rows = keras.ops.shape(y_pred)[0]
        self.total.assign_add(keras.ops.cast(rows, "float32"))

    def result(self):
        return keras.ops.convert_to_tensor(self.total)


@pytest.mark.parametrize(
    "mode", [{}, {"run_eagerly": True}, {"jit_compile": True}], ids=str
)
def test_fewer_rows_than_parts(mode):
    """81 rows in batches of 16: a last one of 1 row, in 4 parts."""
    x, y = classification_data(rows=81)
    expected, net = dense_net(), dense_net()
    arguments = {"sigma": 0.2, "epochs": 1, "batch_size": 16}
    for _ in range(2):
        first, last = slice(0, 80), slice(80, 81)
        reference.fit(
            expected, crossentropy(), x[first], y[first], parts=4, **arguments
        )
        reference.fit(expected, crossentropy(), x[last], y[last], **arguments)
    model = constant_lesam(net, 0.2, num_batch_splits=4)
    model.compile(
        keras.optimizers.SGD(0.1), crossentropy(), metrics=[Rows()], **mode
    )
    history = model.fit(
        x, y, batch_size=16, epochs=2, shuffle=False, verbose=0
    ).history
    assert_close_weights(net, expected, rtol=1e-4, atol=1e-5)
    assert np.all(np.isfinite(history["loss"]))
    assert history["rows"] == [81.0, 81.0]


def test_an_empty_part_is_never_computed():
    """Batch norm over no rows would be 0 / 0 for good."""
    x, y = classification_data(rows=17)
    net = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.BatchNormalization(),
            keras.layers.Dense(4, activation="tanh"),
            keras.layers.Dense(4),
        ]
    )
    train(constant_lesam(net, num_batch_splits=4), x, y, batch_size=16)
    for weight in net.get_weights():
        assert np.isfinite(weight).all()


def test_parts_of_a_batch_of_static_size():
    x, y = classification_data(rows=64)
    data = tf.data.Dataset.from_tensor_slices((x, y))
    expected, net = dense_net(), dense_net()
    reference.fit(expected, crossentropy(), x, y, sigma=0.2, parts=3)
    model = constant_lesam(net, 0.2, num_batch_splits=3)
    model.compile(keras.optimizers.SGD(0.1), crossentropy())
    model.fit(data.batch(32, drop_remainder=True), epochs=2, verbose=0)
    assert_close_weights(net, expected, rtol=1e-4, atol=1e-5)


def test_momentum_and_adam_see_only_the_second_gradient():
    """Against SGD's reference through an optimizer that only records."""
    seen = []

    class Recorder(keras.optimizers.SGD):
        def apply(self, grads, trainable_variables=None):
            seen.append([g.numpy() for g in grads])
            return super().apply(grads, trainable_variables)

    x, y = classification_data(rows=32)
    net, twin = dense_net(), dense_net()
    expected, _ = reference.step(
        twin, crossentropy(), [x, y, None], 0.1, rho_max=0.5
    )
    model = constant_lesam(net, 0.1, 0.5)
    train(model, x, y, optimizer=Recorder(0.1), run_eagerly=True, epochs=1)
    for found, g in zip(seen[0], expected):
        np.testing.assert_allclose(found, g, rtol=2e-4, atol=1e-6)
