"""Files written by version 0.1.0, with rules and state by position.

`tests/files_0_1/make.py` made them.
"""

import keras
import numpy as np
import pytest

from tests.files_0_1 import make

EVERY = pytest.mark.parametrize("name", make.MODELS)


def assert_goes_on_as_before(model, name):
    """One epoch more ends where the version before ended."""
    make.fit(model, epochs=1)
    expected = np.load(make.HERE / f"{name}.npz")
    for array, weights in zip(expected.values(), model.model.get_weights()):
        np.testing.assert_allclose(weights, array, rtol=1e-4, atol=1e-6)


@EVERY
def test_models_load_and_go_on(name):
    path = make.HERE / f"{name}.keras"
    model = keras.models.load_model(path, safe_mode=True)
    config = {**make.new_model(name).get_config(), "model": None, "name": None}
    assert {**model.get_config(), "model": None, "name": None} == config
    assert_goes_on_as_before(model, name)


@EVERY
def test_weights_load_and_go_on(name):
    model = make.new_model(name)
    # What a file has of a momentum is loaded where there is an optimizer.
    model.optimizer.build(model.trainable_variables)
    model.load_weights(make.HERE / f"{name}.weights.h5")
    assert_goes_on_as_before(model, name)


@pytest.mark.parametrize("name", ["secant", "friendly", "looksam"])
def test_the_state_matters(name):
    """Else the tests above would not see whether it was loaded."""
    model = keras.models.load_model(make.HERE / f"{name}.keras")
    of_net = {id(w) for w in model.model.weights}
    state = [w for w in model.weights if id(w) not in of_net]
    assert state
    for weight in state:
        weight.assign(keras.ops.zeros_like(weight))
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_goes_on_as_before(model, name)
