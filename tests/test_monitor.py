"""A training that perturbations keep from moving is told of, once."""

import warnings

import keras
import numpy as np
import pytest

from keras_lesam import LESAMModel
from keras_lesam import SAMModel
from keras_lesam._monitor import PATIENCE
from tests.helpers import constant_lesam

EPOCHS = PATIENCE + 3


def learnable(rows=64):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, 6)).astype("float32")
    return x, (x[:, 0] > 0).astype("int32")


def relu_net(bias):
    """A net whose ReLUs are off for all inputs where `bias` is very low."""
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(
                8,
                activation="relu",
                bias_initializer=keras.initializers.Constant(bias),
            ),
            keras.layers.Dense(2),
        ]
    )


def warned(model, *, fits=1, optimizer="sgd", jit_compile=False, epochs=EPOCHS):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, jit_compile=jit_compile)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(fits):
            model.fit(*learnable(), epochs=epochs, batch_size=64, verbose=0)
    messages = [str(w.message) for w in caught]
    return [m for m in messages if "no lower than in the first epoch" in m]


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize(
    "wrap", [constant_lesam, lambda net: SAMModel(net, rho=0.5)]
)
def test_a_dead_net(wrap, optimizer):
    (message,) = warned(wrap(relu_net(-1e3)), optimizer=optimizer)
    # All but its last bias, which learns how frequent the classes are.
    assert "3 of 4 trainable variables do not change" in message
    assert "sigma=0" in message


def test_once_in_each_fit():
    assert len(warned(constant_lesam(relu_net(-1e3)), fits=2, epochs=20)) == 2


def test_perturbations_that_are_too_large():
    """The net is alive, and its loss goes up and down around the start's."""
    model = SAMModel(relu_net(0.0), rho=30.0)
    (message,) = warned(model, optimizer=keras.optimizers.SGD(0.3))
    assert "do not change" not in message


@pytest.mark.parametrize(
    "model",
    [
        lambda: constant_lesam(relu_net(0.0)),
        lambda: SAMModel(relu_net(0.0)),
        # It dies without us.
        lambda: LESAMModel(relu_net(-1e3), 0.0),
    ],
)
def test_nothing_is_said(model):
    assert not warned(model(), optimizer="adam")


def test_not_before_its_time():
    assert not warned(constant_lesam(relu_net(-1e3)), epochs=PATIENCE)
    assert warned(constant_lesam(relu_net(-1e3)), epochs=PATIENCE + 1)


def test_steps_take_no_notice():
    """It has no hook that `fit` calls for each batch."""
    from keras_lesam._monitor import StuckTraining

    hooks = [h for h in vars(StuckTraining) if h.startswith("on_")]
    assert hooks == ["on_train_begin", "on_epoch_end"]
