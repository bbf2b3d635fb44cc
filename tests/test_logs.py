"""What is logged, where, and that it is what happened."""

import json
import math
import re

import keras
import numpy as np
import pytest

from keras_lesam import LESAMModel
from keras_lesam._statistics import StepStatistics
from keras_lesam.callbacks import ProgressBar
from tests.helpers import classification_data
from tests.helpers import constant_lesam
from tests.helpers import crossentropy
from tests.helpers import dense_net
from tests.helpers import train

OURS = {"rho", "gradient_norm", "sharpness", "sigma"}


class Logs(keras.callbacks.Callback):
    """Keeps the logs of batches and epochs as they come."""

    def __init__(self):
        super().__init__()
        self.batches, self.epochs, self.tests = [], [], []

    def on_train_batch_end(self, batch, logs=None):
        self.batches.append(dict(logs))

    def on_epoch_end(self, epoch, logs=None):
        self.epochs.append(dict(logs))

    def on_test_end(self, logs=None):
        self.tests.append(dict(logs))


def fitted(**kwargs):
    x, y = classification_data()
    model = constant_lesam(dense_net(), 0.1, **kwargs)
    model.compile("sgd", crossentropy(), metrics=["accuracy"])
    logs = Logs()
    history = model.fit(
        *(x, y),
        batch_size=32,
        epochs=2,
        validation_data=(x, y),
        callbacks=[logs],
        verbose=0,
    )
    return model, logs, history.history


def test_logs_of_fit():
    _, logs, history = fitted()
    expected = OURS | {"loss", "accuracy", "val_loss", "val_accuracy"}
    assert set(history) == expected
    assert all(
        set(batch) == OURS | {"loss", "accuracy"} for batch in logs.batches
    )
    assert all(set(epoch) == expected for epoch in logs.epochs)
    assert all(set(test) == {"loss", "accuracy"} for test in logs.tests)
    assert len(logs.batches) == 6
    assert all(np.isfinite(values).all() for values in history.values())


def test_sharpness_is_not_known_from_a_share():
    _, _, history = fitted(ascent_fraction=0.5)
    assert set(history) & OURS == OURS - {"sharpness"}


def test_epochs_log_means_over_their_steps():
    _, logs, history = fitted()
    for name in OURS:
        running = np.reshape([batch[name] for batch in logs.batches], (2, 3))
        steps = np.diff(running * [1, 2, 3], axis=1, prepend=0)
        np.testing.assert_allclose(steps.mean(axis=1), history[name], rtol=1e-5)
        # Each epoch starts afresh: its first mean is its first step.
        np.testing.assert_allclose(running[:, 0], steps[:, 0])
    np.testing.assert_allclose(history["sigma"], [0.1, 0.1], rtol=1e-6)


def test_first_order_relation_of_the_logs():
    """At each step rho times the slope is the budget."""
    x, y = classification_data(rows=32)
    model = constant_lesam(dense_net(), 0.1)
    model.compile("sgd", crossentropy())
    for _ in range(3):
        model.reset_metrics()
        logs = model.train_on_batch(x, y, return_dict=True)
        product = logs["rho"] * logs["gradient_norm"]
        np.testing.assert_allclose(product, 0.1, rtol=1e-5)


def printed_by_fit(capsys, model, verbose, callbacks=None):
    """Return the lines that a `fit` with validation data leaves, and all."""
    x, y = classification_data()
    model.compile("sgd", crossentropy(), metrics=["accuracy"])
    capsys.readouterr()
    model.fit(
        *(x, y),
        epochs=2,
        validation_data=(x, y),
        verbose=verbose,
        callbacks=callbacks,
    )
    printed = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    return [line for line in re.split("[\n\r\b]+", printed) if line.strip()]


def shown(lines):
    """Return the names of our numbers in what was printed."""
    return {name for name in OURS for line in lines if f" {name}: " in line}


@pytest.mark.parametrize("verbose", ["auto", 1, True])
@pytest.mark.parametrize("warmup", [0, 0.5])
def test_progress_bar_is_that_of_the_plain_model(verbose, warmup, capsys):
    model = LESAMModel(dense_net(), 0.1, warmup=warmup)
    lines = printed_by_fit(capsys, model, verbose)
    plain = printed_by_fit(capsys, dense_net(), verbose)
    names = [re.findall(r" - (\w+): ", run[-1]) for run in (lines, plain)]
    assert names[0] == names[1] == ["accuracy", "loss", *names[0][2:]]
    assert not shown(lines)


def test_one_line_an_epoch_has_all_numbers(capsys):
    assert shown(printed_by_fit(capsys, constant_lesam(dense_net()), 2)) == OURS


@pytest.mark.parametrize("verbose", [1, 2])
def test_progress_bar_of_chosen_numbers(verbose, capsys):
    numbers = ["sharpness", "rho"]
    model = constant_lesam(dense_net())
    bar = ProgressBar(numbers)
    lines = printed_by_fit(capsys, model, verbose, [bar])
    assert shown(lines) == set(numbers)
    assert sum("val_loss" in line for line in lines) == 2
    # Given a list of callbacks that is set up, `fit` adds nothing to it.
    listed = keras.callbacks.CallbackList([ProgressBar(["rho"])], model=model)
    listed.set_params({"verbose": 1, "epochs": 1, "steps": 3})
    assert shown(printed_by_fit(capsys, model, verbose, listed)) == {"rho"}


def test_what_is_zero_is_not_in_the_progress_bar(capsys):
    model = LESAMModel(dense_net(), 0.1, warmup=0.5, anneal=0)
    lines = printed_by_fit(capsys, model, 1, [ProgressBar(sorted(OURS))])
    assert shown(lines) == OURS
    assert not any("0.0000e+00" in line for line in lines)
    assert not shown(lines[:2]) & {"rho", "sigma"}


def test_progress_bar_leaves_the_logs_alone():
    x, y = classification_data()
    model = constant_lesam(dense_net())
    model.compile("sgd", crossentropy())
    logs = Logs()
    model.fit(x, y, callbacks=[ProgressBar([]), logs], verbose=0)
    assert set(logs.batches[0]) > OURS
    assert set(logs.epochs[0]) > OURS


@pytest.mark.parametrize("numbers", ["rho", 1, None, ["loss"], [1], [["rho"]]])
def test_progress_bar_of_no_such_number(numbers):
    with pytest.raises((TypeError, ValueError), match=r"^`numbers` must"):
        ProgressBar(numbers)


def test_evaluate_prints_nothing_of_ours(capsys):
    x, y = classification_data()
    model, _, _ = fitted()
    for verbose in (1, 2):
        capsys.readouterr()
        model.evaluate(x, y, verbose=verbose)
        assert not shown([capsys.readouterr().out])


def test_evaluate_is_that_of_plain_keras():
    x, y = classification_data()
    model, _, _ = fitted()
    plain = model.model
    plain.compile("sgd", crossentropy(), metrics=["accuracy"])
    found = model.evaluate(x, y, verbose=0, return_dict=True)
    assert found == plain.evaluate(x, y, verbose=0, return_dict=True)
    assert set(found) == {"loss", "accuracy"}
    assert model.evaluate(x, y, verbose=0) == plain.evaluate(x, y, verbose=0)
    for return_dict in (False, True):
        assert model.test_on_batch(
            x, y, return_dict=return_dict
        ) == plain.test_on_batch(x, y, return_dict=return_dict)


def test_evaluate_between_fits_does_not_hide_the_logs():
    x, y = classification_data()
    model, _, _ = fitted()
    model.evaluate(x, y, verbose=0)
    assert set(model.fit(x, y, verbose=0).history) == OURS | {
        "loss",
        "accuracy",
    }
    names = [metric.name for metric in model.metrics]
    assert "loss" in names
    assert "step_statistics" in names


def test_train_on_batch():
    x, y = classification_data()
    model, _, _ = fitted()
    weights = model.get_weights()
    model.reset_metrics()
    values = model.train_on_batch(x, y)
    model.set_weights(weights)
    model.reset_metrics()
    logs = model.train_on_batch(x, y, return_dict=True)
    assert set(logs) == OURS | {"loss", "accuracy"}
    # Those of Keras in Keras's places, ours by name after them.
    names = ["loss", "accuracy", *sorted(OURS)]
    np.testing.assert_array_equal(values, [logs[name] for name in names])


def test_metrics_names():
    model, _, _ = fitted()
    plain = dense_net()
    train(plain, *classification_data(), metrics=["accuracy"])
    assert model.metrics_names == [*plain.metrics_names, "step_statistics"]


def test_last_batch_and_epoch_log_the_same():
    _, logs, history = fitted()
    for epoch, batch in enumerate(logs.batches[2::3]):
        for name in OURS:
            assert history[name][epoch] == batch[name]
            assert logs.epochs[epoch][name] == batch[name]


def test_a_step_that_is_no_number_is_left_out_of_the_means():
    """The last of three; what is 0 for it (no climb) does count."""
    x, y = classification_data()
    x[-1] = np.nan
    model = constant_lesam(dense_net(), 0.1)
    model.compile("sgd", crossentropy())
    logs = Logs()
    history = model.fit(
        x, y, batch_size=32, shuffle=False, callbacks=[logs], verbose=0
    ).history
    before = logs.batches[1]
    assert np.isnan(history["loss"]).all()
    assert history["gradient_norm"] == [before["gradient_norm"]]
    for name in ("rho", "sharpness"):
        expected = [before[name] * 2 / 3]
        np.testing.assert_allclose(history[name], expected, rtol=1e-6)
    np.testing.assert_allclose(history["sigma"], [0.1], rtol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_each_number_is_left_out_on_its_own(bad):
    statistics = StepStatistics(["a", "b"])
    for a, b in ((1.0, 2.0), (bad, 4.0), (3.0, bad)):
        statistics.update_state({"b": b, "a": a})
    found = {name: float(v) for name, v in statistics.result().items()}
    assert found == {"a": 2.0, "b": 3.0}
    statistics.reset_state()
    assert all(float(v) == 0 for v in statistics.result().values())


def test_no_budget_logs_no_gradient_norm():
    x, y = classification_data()
    model = constant_lesam(dense_net(), sigma=0.0)
    history = train(model, x, y)
    assert not any(np.any(history[name]) for name in OURS)
    # As JSON, which has no nan (`keras.callbacks.RemoteMonitor`).
    json.dumps(history, allow_nan=False)
    model.sigma = 0.1
    history = model.fit(x, y, verbose=0).history
    assert min(history["gradient_norm"]) > 0
