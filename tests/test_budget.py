"""The budget at every step, for every kind of data and way to train."""

import math
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_lesam import LESAMModel
from tests.helpers import assert_same_weights
from tests.helpers import classification_data
from tests.helpers import constant_lesam
from tests.helpers import crossentropy
from tests.helpers import dense_net
from tests.helpers import traces

ROWS, BATCH, STEPS = 60, 16, 4  # the last batch has 12 rows
SIGMA, WARMUP, ANNEAL = 0.1, 0.3, 0.4


def closed_form(step, total, warmup=WARMUP, anneal=ANNEAL):
    """The budget of step 0, 1, ... of `total`."""
    progress = step / total
    rise = min(progress / warmup, 1.0) if warmup else 1.0
    done = max(0.0, (progress - (1 - anneal)) / anneal) if anneal else 0.0
    return SIGMA * rise * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


class Steps(keras.callbacks.Callback):
    """The sigma of each step, from the running means of each epoch.

    And the iterations that the optimizer had counted before each.
    """

    def __init__(self):
        super().__init__()
        self.sigma, self.before = [], []

    def on_epoch_begin(self, epoch, logs=None):
        self._steps, self._sum = 0, 0.0

    def on_train_batch_begin(self, batch, logs=None):
        self._before = int(self.model.optimizer.iterations)

    def on_train_batch_end(self, batch, logs=None):
        self.before.append(self._before)
        self._steps += 1
        total = logs["sigma"] * self._steps
        self.sigma.append(total - self._sum)
        self._sum = total


def compiled(**kwargs):
    arguments = {"warmup": WARMUP, "anneal": ANNEAL, **kwargs}
    model = LESAMModel(dense_net(), arguments.pop("sigma", SIGMA), **arguments)
    model.compile("sgd", crossentropy())
    return model


def fit(model, *data, **kwargs):
    """The sigma of each step of a `fit`."""
    steps = Steps()
    model.fit(*data, callbacks=[steps], verbose=0, **kwargs)
    return steps.sigma


def assert_follows(sigma, total, start=0, **shares):
    expected = [
        closed_form(step, total, **shares)
        for step in range(start, start + len(sigma))
    ]
    np.testing.assert_allclose(sigma, expected, atol=1e-7)


def arrays():
    return classification_data(rows=ROWS)


def dataset():
    return tf.data.Dataset.from_tensor_slices(arrays()).batch(BATCH)


def unknown():
    found = dataset().filter(lambda x, y: True)
    assert found.cardinality() == tf.data.UNKNOWN_CARDINALITY
    return found


class Sequence(keras.utils.PyDataset):
    def __len__(self):
        return STEPS

    def __getitem__(self, index):
        x, y = arrays()
        rows = slice(index * BATCH, (index + 1) * BATCH)
        return x[rows], y[rows]


def generator():
    x, y = arrays()
    while True:
        for start in range(0, ROWS, BATCH):
            rows = slice(start, start + BATCH)
            yield x[rows], y[rows]


DATA = {
    "arrays": lambda: (arrays(), {"batch_size": BATCH}),
    "dataset": lambda: ([dataset()], {}),
    "unknown": lambda: ([unknown().repeat()], {"steps_per_epoch": STEPS}),
    "infinite": lambda: ([dataset().repeat()], {"steps_per_epoch": STEPS}),
    "sequence": lambda: ([Sequence()], {}),
    "generator": lambda: ([generator()], {"steps_per_epoch": STEPS}),
}


@pytest.mark.parametrize("kind", DATA)
def test_shares_of_what_fit_is_about_to_do(kind):
    data, arguments = DATA[kind]()
    sigma = fit(compiled(), *data, epochs=5, **arguments)
    assert len(sigma) == 5 * STEPS
    assert_follows(sigma, 5 * STEPS)


def test_steps_without_validation_rows():
    sigma = fit(
        compiled(), *arrays(), batch_size=8, epochs=4, validation_split=0.5
    )
    assert len(sigma) == 4 * 4
    assert_follows(sigma, 16)


@pytest.mark.parametrize("steps", [2, 3, 8])
def test_means_of_epochs_with_several_steps_per_execution(steps):
    """Of the 5 steps of an epoch, whether or not they divide."""
    model = compiled()
    model.compile("sgd", crossentropy(), steps_per_execution=steps)
    history = model.fit(*arrays(), batch_size=12, epochs=4, verbose=0)
    expected = [closed_form(step, 20) for step in range(20)]
    np.testing.assert_allclose(
        history.history["sigma"],
        np.reshape(expected, (4, 5)).mean(axis=1),
        atol=1e-7,
    )


def test_fewer_steps_than_the_data_has():
    sigma = fit(
        compiled(), *arrays(), batch_size=BATCH, steps_per_epoch=2, epochs=5
    )
    assert len(sigma) == 5 * 2
    assert_follows(sigma, 10)


def test_steps_run_eagerly():
    model = compiled()
    model.compile("sgd", crossentropy(), run_eagerly=True)
    assert_follows(fit(model, *arrays(), batch_size=BATCH, epochs=3), 12)


@pytest.mark.parametrize("scaled", [False, True])
def test_shares_of_accumulated_updates(scaled):
    """Of 20 batches 10 updates: both batches of one have its budget."""
    model = compiled()
    optimizer = keras.optimizers.SGD(0.1, gradient_accumulation_steps=2)
    if scaled:
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
    model.compile(optimizer, crossentropy())
    for epochs in (5, 3):
        sigma = fit(model, *arrays(), batch_size=BATCH, epochs=epochs)
        assert len(sigma) == epochs * STEPS
        assert_follows(sigma[::2], epochs * STEPS // 2)
        np.testing.assert_allclose(sigma[1::2], sigma[::2], atol=1e-7)


def test_accumulation_across_epochs():
    """5 batches an epoch, 2 an update."""
    model = compiled()
    optimizer = keras.optimizers.SGD(0.1, gradient_accumulation_steps=2)
    model.compile(optimizer, crossentropy())
    sigma = fit(model, *arrays(), batch_size=12, epochs=4)
    assert_follows(sigma[::2], 10)
    np.testing.assert_allclose(sigma[1::2], sigma[::2], atol=1e-7)


@pytest.mark.parametrize(
    ("warmup", "anneal"), [(0.0, 0.0), (0.5, 0.0), (0.0, 1.0), (0.5, 0.5)]
)
def test_other_shares(warmup, anneal):
    shares = {"warmup": warmup, "anneal": anneal}
    sigma = fit(compiled(**shares), *arrays(), batch_size=BATCH, epochs=3)
    assert_follows(sigma, 12, **shares)


def test_each_fit_is_a_training_of_its_own():
    model = compiled()
    for epochs in (2, 5):
        sigma = fit(model, *arrays(), batch_size=BATCH, epochs=epochs)
        assert_follows(sigma, epochs * STEPS)


def test_initial_epoch_goes_on_where_it_says():
    sigma = fit(
        compiled(), *arrays(), batch_size=BATCH, epochs=5, initial_epoch=3
    )
    assert len(sigma) == 2 * STEPS
    assert_follows(sigma, 5 * STEPS, start=3 * STEPS)


def test_a_training_that_stopped_early_is_over():
    model = compiled()

    class Stop(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.model.stop_training = epoch == 1

    model.fit(
        *arrays(), batch_size=BATCH, epochs=9, callbacks=[Stop()], verbose=0
    )
    assert_follows(fit(model, *arrays(), batch_size=BATCH, epochs=4), 16)


def test_a_training_that_failed_is_over():
    model = compiled()

    class Fail(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.fit(
            *arrays(), batch_size=BATCH, epochs=9, callbacks=Fail(), verbose=0
        )
    with pytest.raises(ValueError, match="Pass `total_steps`"):
        model.train_on_batch(*arrays())
    assert_follows(fit(model, *arrays(), batch_size=BATCH, epochs=4), 16)


def test_total_steps_over_several_fits():
    model = compiled(total_steps=5 * STEPS)
    sigma = [
        value
        for _ in range(6)
        for value in fit(model, *arrays(), batch_size=BATCH)
    ]
    assert_follows(sigma, 5 * STEPS)
    assert sigma[-STEPS:] == [0.0] * STEPS


def test_total_steps_of_data_of_unknown_length():
    """Keras counts the attempt that finds the end of the data, too."""
    model = compiled(total_steps=3 * STEPS)
    steps = Steps()
    for _ in range(2):
        model.fit(unknown(), epochs=2, callbacks=[steps], verbose=0)
    assert len(steps.sigma) == 4 * STEPS
    expected = [closed_form(step, 3 * STEPS) for step in steps.before]
    np.testing.assert_allclose(steps.sigma, expected, atol=1e-7)


def test_total_steps_of_fit_and_train_on_batch():
    model = compiled(total_steps=10)
    sigma = fit(model, *arrays(), batch_size=BATCH, epochs=2)
    model.reset_metrics()
    logs = model.train_on_batch(*arrays(), return_dict=True)
    assert_follows([*sigma, float(logs["sigma"])], 10)


def test_total_steps_of_train_on_batch():
    model = compiled(total_steps=6)
    x, y = arrays()
    sigma = []
    for _ in range(8):
        model.reset_metrics()
        logs = model.train_on_batch(x, y, return_dict=True)
        sigma.append(float(logs["sigma"]))
    assert_follows(sigma, 6)
    assert sigma[6:] == [0.0, 0.0]


UNKNOWN_LENGTH = {
    "dataset": unknown,
    "infinite": lambda: dataset().repeat(),
    "generator": generator,
}


@pytest.mark.parametrize("kind", UNKNOWN_LENGTH)
def test_an_unknown_length_is_refused_before_training(kind):
    model = compiled()
    with pytest.raises(ValueError, match=r"steps_per_epoch.*total_steps=None"):
        model.fit(UNKNOWN_LENGTH[kind](), epochs=2, verbose=0)
    assert_same_weights(model.model, dense_net())
    assert int(model.optimizer.iterations) == 0
    with pytest.raises(ValueError, match="Pass `total_steps`"):
        model.train_step(arrays())
    # Nothing is lost: it trains when told.
    assert_follows(fit(model, *arrays(), batch_size=BATCH, epochs=2), 8)


def test_an_unknown_length_that_does_not_matter():
    model = compiled(warmup=0.0, anneal=0.0)
    np.testing.assert_allclose(fit(model, unknown()), [SIGMA] * STEPS)
    assert fit(compiled(sigma=0.0), unknown()) == [0.0] * STEPS


def test_train_on_batch_does_not_know_the_length():
    model = compiled()
    with pytest.raises(ValueError, match="Pass `total_steps`"):
        model.train_on_batch(*arrays())
    model.fit(*arrays(), verbose=0)
    with pytest.raises(ValueError, match="Pass `total_steps`"):
        model.train_on_batch(*arrays())
    constant = compiled(warmup=0.0, anneal=0.0)
    assert np.isfinite(constant.train_on_batch(*arrays())[0])


class Step(keras.optimizers.schedules.LearningRateSchedule):
    """The budget is the number of the step, from -2 on, in hundredths."""

    def __call__(self, step):
        return 0.01 * (keras.ops.cast(step, "float32") - 2)

    def get_config(self):
        return {}


def test_a_schedule_is_given_the_iterations():
    model = LESAMModel(dense_net(), Step())
    model.compile("sgd", crossentropy())
    sigma = fit(model, *arrays(), batch_size=BATCH, epochs=2)
    # Less than nothing is nothing.
    expected = [0.0, 0.0, 0.0, 0.01, 0.02, 0.03, 0.04, 0.05]
    np.testing.assert_allclose(sigma, expected, atol=1e-6)
    sigma = fit(model, *arrays(), batch_size=BATCH)
    np.testing.assert_allclose(sigma, [0.06, 0.07, 0.08, 0.09], atol=1e-6)


def test_a_schedule_needs_no_length():
    model = LESAMModel(dense_net(), Step())
    model.compile("sgd", crossentropy())
    sigma = fit(model, unknown())
    np.testing.assert_allclose(sigma, [0.0, 0.0, 0.0, 0.01], atol=1e-6)
    before = int(model.optimizer.iterations)
    model.reset_metrics()
    logs = model.train_on_batch(*arrays(), return_dict=True)
    np.testing.assert_allclose(logs["sigma"], 0.01 * (before - 2), atol=1e-6)


def test_skipped_steps_do_not_delay_the_next_epoch():
    """In float16 a step may not count as an iteration."""
    keras.config.set_dtype_policy("mixed_float16")
    model = compiled()
    model.compile(
        keras.optimizers.LossScaleOptimizer(
            keras.optimizers.SGD(0.1), initial_scale=2.0**24
        ),
        crossentropy(),
    )
    sigma = fit(model, *arrays(), batch_size=BATCH, epochs=5)
    assert int(model.optimizer.iterations) < 5 * STEPS
    for epoch in range(1, 5):
        first = sigma[epoch * STEPS]
        expected = closed_form(epoch * STEPS, 5 * STEPS)
        np.testing.assert_allclose(first, expected, atol=1e-7)


BUILDING = 1  # a pass that is traced to create variables, and never run


class Traced(keras.layers.Layer):
    """Counts the passes that are traced."""

    passes = 0

    def call(self, x, training=False):
        Traced.passes += bool(training)
        return x


def traced_net():
    Traced.passes = 0
    return keras.Sequential(
        [keras.Input((6,)), Traced(), keras.layers.Dense(4)]
    )


def test_nothing_that_changes_retraces():
    model = LESAMModel(traced_net(), SIGMA)
    model.compile("sgd", crossentropy())
    data = {"batch_size": 30, "verbose": 0}
    model.fit(*arrays(), **data)
    first = Traced.passes
    assert first == BUILDING + 2
    for sigma, rho_max, epochs in ((0.2, 0.3, 2), (0.05, None, 3), (1, 1, 1)):
        model.sigma, model.rho_max = sigma, rho_max
        model.fit(*arrays(), epochs=epochs, **data)
    assert Traced.passes == first

    # No budget at all is Keras's own step: traced once, and kept.
    model.sigma = 0
    model.fit(*arrays(), **data)
    both = Traced.passes
    assert both == first + 1
    for sigma in (0.1, 0, 0.2, 0.0):
        model.sigma = sigma
        model.fit(*arrays(), **data)
    assert Traced.passes == both


def test_a_new_budget_counts_from_the_next_step():
    """Assigned by a callback in the middle of an epoch, to and from 0."""

    class Switch(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            self.model.sigma = [0.2, 0.0, 0.3, 0.1][batch]

    model = compiled(warmup=0.0, anneal=0.0)
    steps = Steps()
    model.fit(
        *arrays(), batch_size=BATCH, callbacks=[steps, Switch()], verbose=0
    )
    np.testing.assert_allclose(steps.sigma, [0.1, 0.2, 0.0, 0.3], atol=1e-7)


def test_a_new_budget_within_an_epoch_does_not_retrace():
    class Switch(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            self.model.sigma = [0.2, 0.0, 0.3, 0.0, 0.1, 0.2][batch]
            self.model.rho_max = [0.1, 0.2, None, 0.3, None, 1.0][batch]

    model = LESAMModel(traced_net(), SIGMA)
    model.compile("sgd", crossentropy())
    fit = {"batch_size": 10, "callbacks": [Switch()], "verbose": 0}
    model.fit(*arrays(), **fit)
    # Two passes, and one of the step without a budget.
    assert Traced.passes == BUILDING + 2 + 1
    model.fit(*arrays(), epochs=2, **fit)
    assert Traced.passes == BUILDING + 2 + 1


def test_as_few_traces_as_plain_keras():
    """With a last batch of other size; each trace has two passes."""
    passes, steps = [], []
    for wrap in (lambda net: net, constant_lesam):
        model = wrap(traced_net())
        model.compile("sgd", crossentropy())
        steps.append(traces(model))
        model.fit(*arrays(), batch_size=BATCH, epochs=3, verbose=0)
        passes.append(Traced.passes)
    assert len(steps[1]) == len(steps[0]) > 0
    assert passes[1] == BUILDING + 2 * passes[0]


def test_a_budget_that_comes_too_late_for_an_unknown_length():
    """Not 0 without a word for the rest of the training."""

    class Switch(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            self.model.sigma = 0.1 * epoch

    model = compiled(sigma=0.0)
    with pytest.raises(ValueError, match="steps in an epoch"):
        model.fit(unknown(), epochs=2, callbacks=[Switch()], verbose=0)
    assert model.sigma == 0.0
    model.sigma = 0.1
    assert_follows(fit(model, *arrays(), batch_size=BATCH, epochs=2), 8)


# Trainings of another length than `fit` was told.


def early_stopping():
    return keras.callbacks.EarlyStopping("loss", patience=1)


def test_early_stopping_is_told_what_to_pass():
    """A warm-up of a training that ends long before it is said to."""
    x, y = classification_data()
    model = LESAMModel(dense_net(), 0.1)
    model.compile("sgd", crossentropy())
    with pytest.warns(UserWarning, match=r"EarlyStopping.*`total_steps`.*0\.1"):
        model.fit(x, y, epochs=2, verbose=0, callbacks=[early_stopping()])


@pytest.mark.parametrize(
    "options",
    [
        *({"total_steps": 10, "sigma": 0.1}, {"warmup": 0, "anneal": 0}),
        *({"sigma": 0.0}, {}),
    ],
    ids=str,
)
def test_early_stopping_of_a_known_length_is_not_warned_of(options):
    x, y = classification_data()
    model = LESAMModel(dense_net(), **options)
    model.compile("sgd", crossentropy())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.fit(x, y, verbose=0, callbacks=early_stopping())


def test_without_a_budget_a_batch_can_be_trained_on():
    """And no longer once there is one whose length is not known."""
    x, y = classification_data()
    model = LESAMModel(dense_net(), sigma=0.0)
    model.compile("sgd", crossentropy())
    assert np.isfinite(model.train_on_batch(x, y)[0])
    model.sigma = 0.1
    with pytest.raises(ValueError, match="`total_steps`"):
        model.train_on_batch(x, y)
