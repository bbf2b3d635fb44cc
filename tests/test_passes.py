"""The passes: what they compute at any weights, and that nothing is written."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_lesam import _passes
from keras_lesam._data import Batch
from keras_lesam._data import fraction_of
from keras_lesam._data import join_rows
from keras_lesam._data import split_rows
from keras_lesam._data import take_rows
from tests.helpers import assert_same_weights
from tests.helpers import classification_data
from tests.helpers import crossentropy
from tests.helpers import dense_net
from tests.helpers import noisy_net

pytestmark = pytest.mark.usefixtures("float64")


def problem(make_net=noisy_net, shape=(8, 8, 1)):
    x, y = classification_data(rows=16, shape=shape)
    net = make_net()
    net.compile(keras.optimizers.SGD(0.1), crossentropy())
    return net, Batch(tf.constant(x), tf.constant(y), None)


def shifted(net, shift):
    return [w + shift for w in _passes.read(net.trainable_variables)]


def test_nothing_is_written():
    net, batch = problem()
    before = [v.numpy() for v in net.variables]
    point = _passes.compute_loss_and_gradients(net, shifted(net, 0.1), batch)
    for variable, value in zip(net.variables, before):
        np.testing.assert_array_equal(variable.numpy(), value)
    # Batch norm's two statistics, and the seeds of three random layers.
    assert len(point.state) >= 4
    _passes.commit(point.state)
    assert any(
        np.any(v.numpy() != value) for v, value in zip(net.variables, before)
    )


def test_two_passes_from_one_state_draw_the_same_numbers():
    net, batch = problem()
    weights = _passes.read(net.trainable_variables)
    first, second = (
        _passes.compute_loss_and_gradients(net, weights, batch)
        for _ in range(2)
    )
    assert first.loss == second.loss
    third = _passes.compute_loss_and_gradients(net, weights, batch, first.state)
    assert first.loss != third.loss


def test_the_gradient_is_that_of_differences():
    net, batch = problem(dense_net, (6,))
    weights = _passes.read(net.trainable_variables)
    point = _passes.compute_loss_and_gradients(net, weights, batch)
    step = 1e-6
    for i, gradient in enumerate(point.gradients):
        direction = np.zeros(weights[i].shape)
        direction.flat[0] = step
        ends = []
        for sign in (1, -1):
            there = [*weights]
            there[i] = weights[i] + sign * direction
            ends.append(
                _passes.compute_loss_and_gradients(net, there, batch).loss
            )
        slope = (ends[0] - ends[1]) / (2 * step)
        np.testing.assert_allclose(
            np.ravel(gradient)[0], slope, rtol=1e-6, atol=1e-9
        )


def test_a_pass_at_other_weights_is_the_model_with_those_weights():
    net, batch = problem(dense_net, (6,))
    point = _passes.compute_loss_and_gradients(net, shifted(net, 0.1), batch)
    other, _ = problem(dense_net, (6,))
    for variable in other.trainable_variables:
        variable.assign_add(keras.ops.full(variable.shape, 0.1))
    loss = other.evaluate(batch.x, batch.y, verbose=0)
    np.testing.assert_allclose(point.loss, loss, rtol=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_compute_loss_is_called_whether_or_not_it_takes_training(training):
    calls = []

    class New(keras.Sequential):
        def compute_loss(self, x, y, y_pred, sample_weight=None, training=True):
            calls.append(training)
            return keras.ops.mean(y_pred)

    class Old(keras.Sequential):
        def compute_loss(self, x, y, y_pred, sample_weight=None):
            return keras.ops.mean(y_pred)

    batch = Batch(tf.ones((2, 3)), tf.ones((2,)), None)
    for cls in (New, Old):
        net = cls([keras.Input((3,)), keras.layers.Dense(1)])
        net.compile("sgd")
        weights = _passes.read(net.trainable_variables)
        _passes.forward(net, weights, batch, training=training)
    assert calls == [training]


def test_the_loss_scale_is_in_the_gradients_and_not_in_the_loss():
    net, batch = problem(dense_net, (6,))
    weights = _passes.read(net.trainable_variables)
    plain = _passes.compute_loss_and_gradients(net, weights, batch)
    net.compile(
        keras.optimizers.LossScaleOptimizer(
            keras.optimizers.SGD(0.1), initial_scale=64.0
        ),
        crossentropy(),
    )
    net.optimizer.build(net.trainable_variables)
    scaled = _passes.compute_loss_and_gradients(net, weights, batch)
    np.testing.assert_allclose(scaled.loss, plain.loss)
    for a, b in zip(scaled.gradients, plain.gradients):
        np.testing.assert_allclose(a, 64 * b, rtol=1e-9)
    assert float(_passes.gradient_scale(net.optimizer)) == 64.0


def test_building_makes_variables_and_changes_none():
    keras.utils.set_random_seed(0)
    net = keras.Sequential(
        [keras.layers.Dense(3), keras.layers.BatchNormalization()]
    )
    net.compile(keras.optimizers.Adam(), "mse", metrics=["mae"])
    batch = Batch(tf.ones((4, 2)), tf.ones((4, 3)), None)
    _passes.build(net, batch)
    assert net.built
    assert net.optimizer.built
    same = keras.models.clone_model(net)
    same.build((4, 2))
    same.set_weights(net.get_weights())
    _passes.build(net, batch)
    assert_same_weights(net, same)
    assert float(net.get_metrics_result()["mae"]) == 0.0


# Rows.


@pytest.mark.parametrize("rows", range(1, 8))
@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_parts_are_all_rows_and_weigh_the_same(rows, parts):
    static = [*split_rows(rows, parts)]
    dynamic = [*split_rows(tf.constant(rows), parts)]
    np.testing.assert_allclose(sum(w for *_, w in static), 1.0)
    np.testing.assert_allclose(sum(w for *_, w in dynamic), 1.0)
    x = tf.range(rows)
    for pieces in (static, dynamic):
        tensors = [take_rows(x, start, stop) for start, stop, _ in pieces]
        joined = join_rows(tensors, [weight for *_, weight in pieces])
        np.testing.assert_array_equal(joined, x)
    weighty = [(int(a), int(b)) for a, b, w in dynamic if float(w) > 0]
    assert len(weighty) == len(static)


@pytest.mark.parametrize(
    ("rows", "fraction", "expected"),
    [(8, 0.25, 2), (10, 0.25, 3), (1, 0.01, 1), (7, 1.0, 7), (3, 0.34, 2)],
)
def test_a_fraction_of_rows_is_rounded_up(rows, fraction, expected):
    assert fraction_of(rows, fraction) == expected
    assert int(fraction_of(tf.constant(rows), fraction)) == expected
