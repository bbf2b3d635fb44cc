"""Trainings that do not begin at a good start: no budget may spoil them."""

import keras
import numpy as np
from keras import layers

from keras_lesam import LESAMModel
from keras_lesam import SAMModel
from keras_lesam import budgets
from tests.helpers import assert_close_weights

CLASSES, INPUTS, ROWS = 10, 32, 600


def pictures(seed=0, rows=ROWS):
    """Noisy copies of ten patterns, and their labels."""
    rng = np.random.default_rng(7)
    patterns = rng.normal(size=(CLASSES, INPUTS))
    rng = np.random.default_rng(seed)
    y = rng.integers(CLASSES, size=rows)
    x = patterns[y] + 1.5 * rng.normal(size=(rows, INPUTS))
    return x.astype("float32"), y


def relu_net(factor=1.0, seed=0, depth=2):
    keras.utils.set_random_seed(seed)
    net = keras.Sequential(
        [
            keras.Input((INPUTS,)),
            *(layers.Dense(64, "relu") for _ in range(depth)),
            layers.Dense(CLASSES),
        ]
    )
    net.layers[-1].kernel.assign(factor * net.layers[-1].kernel)
    return net


def fit(model, x, y, epochs=12, rate=0.03, loss=None):
    keras.utils.set_random_seed(1)
    model.compile(
        keras.optimizers.SGD(rate, momentum=0.9),
        loss or keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    return model.fit(x, y, epochs=epochs, batch_size=50, verbose=0).history


def accuracy(net):
    x, y = pictures(seed=1)
    return np.mean(np.argmax(net.predict(x, verbose=0), -1) == y)


def relative(net, share=0.3):
    return LESAMModel(net, budgets.Relative(share))


def steps(model, x, y, count=1):
    """The logs of single steps on the same rows."""
    logs = []
    for _ in range(count):
        model.reset_metrics()
        logs.append(model.train_on_batch(x, y, return_dict=True))
    return logs


def test_a_bad_start_costs_no_accuracy():
    """An output layer ten times too large."""
    found = []
    for wrap in (lambda net: net, relative):
        net = relu_net(10.0)
        history = fit(wrap(net), *pictures())
        assert history["loss"][0] > 3
        found.append(accuracy(net))
    plain, other = found
    assert plain > 0.8
    assert other > plain - 0.05


def test_logits_whose_mean_is_a_bad_guess_are_no_gain():
    """Better than their mean, but not than no guess at all."""
    x, y = pictures()
    net = relu_net(10.0)
    net.layers[-1].bias.assign(np.linspace(-9, 9, CLASSES))
    outputs = net(x).numpy()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    mean = np.broadcast_to(outputs.mean(0), outputs.shape)
    y = np.argmax(outputs + np.random.gumbel(size=outputs.shape) * 9, -1)
    here, there = float(loss(y, outputs)), float(loss(y, mean))
    assert np.log(CLASSES) < here < 0.95 * there
    model = relative(net)
    model.compile(keras.optimizers.SGD(0.0), loss)
    assert steps(model, x, y)[0]["sigma"] == 0


def trained_net():
    net = relu_net()
    fit(net, *pictures())
    return net


def test_a_trained_net_stays_good():
    """The gain is large at once, and the budget small, as the loss is."""
    net = trained_net()
    before = accuracy(net)
    history = fit(relative(net), *pictures(seed=2), epochs=4)
    assert 0 < history["sigma"][0] < 0.2
    assert accuracy(net) > before - 0.02


def test_a_new_head_then_all_of_it_then_once_more():
    """Frozen, unfrozen, and a second `fit`: the budget follows each."""
    backbone = keras.Sequential(trained_net().layers[:-1])
    backbone.trainable = False
    frozen = backbone.get_weights()
    head = layers.Dense(CLASSES)
    net = keras.Sequential([keras.Input((INPUTS,)), backbone, head])
    model = relative(net)
    x, y = pictures(seed=2)
    first = fit(model, x, (y + 1) % CLASSES, epochs=3)
    for a, b in zip(frozen, backbone.get_weights()):
        np.testing.assert_array_equal(a, b)
    # The new head has nothing learnt at first.
    assert first["sigma"][-1] > 0
    backbone.trainable = True
    second = fit(model, x, (y + 1) % CLASSES, epochs=3)
    assert second["rho"][0] > 0
    assert second["loss"][-1] < first["loss"][-1]
    third = model.fit(x, (y + 1) % CLASSES, epochs=1, verbose=0).history
    assert third["loss"][0] < first["loss"][0]
    assert 0 < third["sigma"][0] < 0.3


def test_regression_far_from_0():
    """Targets of 1000 and more, in which the net has to find differences."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, INPUTS)).astype("float32")
    y = 1000 + 3 * np.tanh(x[:, :1]) + x[:, 1:2]
    losses = []
    for wrap in (lambda net: net, relative):
        keras.utils.set_random_seed(0)
        net = keras.Sequential(
            [
                keras.Input((INPUTS,)),
                layers.Dense(32, "relu"),
                layers.Dense(
                    1, bias_initializer=keras.initializers.Constant(y.mean())
                ),
            ]
        )
        history = fit(wrap(net), x, y, 30, 0.003, "mse")
        losses.append(float(np.mean((net.predict(x, verbose=0) - y) ** 2)))
    assert max(history["rho"]) > 0.01
    assert losses[1] < np.var(y) / 4
    assert losses[1] < 2 * losses[0] + 0.1


def on_a_plateau():
    """A net that has died: its outputs hardly go by its inputs."""
    net = relu_net()
    for layer in net.layers[:-1]:
        layer.kernel.assign(0.03 * layer.kernel)
    return net


def test_a_net_that_has_died_recovers():
    """On the plateau it trains plainly, where the paper's budget stays."""
    found = {}
    for name, wrap in {
        "plain": lambda net: net,
        "relative": lambda net: relative(net, 1.0),
        "guard": lambda net: SAMModel(net, rho=1.0, guard=0.5),
        "radius": lambda net: SAMModel(net, rho=1.0),
    }.items():
        net = on_a_plateau()
        history = fit(wrap(net), *pictures(), epochs=10, rate=0.1)
        found[name] = history["loss"][-1], accuracy(net), history
    assert found["plain"][1] > 0.7
    assert found["radius"][1] < 0.3
    for name in ("relative", "guard"):
        assert found[name][1] > 0.6
        assert found[name][2]["rho"][0] < found[name][2]["rho"][-1]


def test_a_fit_that_learns_nothing_is_plain_training():
    """Labels without inputs: never a gain, and the same weights."""
    x, y = pictures(rows=50)
    nets = []
    for wrap in (lambda net: net, relative):
        net = relu_net()
        fit(wrap(net), np.zeros_like(x), y, epochs=3)
        nets.append(net)
    assert_close_weights(*nets, rtol=1e-5, atol=1e-7)
