"""A healthy step has no infinity and no nan anywhere in its graph.

`tf.debugging.enable_check_numerics` then finds the fault of a model, not one of
the step's own.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_lesam import LESAMModel
from keras_lesam import SAMModel
from keras_lesam import SharpnessAwareModel
from keras_lesam import ascents
from keras_lesam import rules
from tests.helpers import classification_data
from tests.helpers import crossentropy
from tests.helpers import dense_net

MODELS = {
    "zero": lambda net: LESAMModel(net, 0.0),
    "default": LESAMModel,
    "constant": lambda net: LESAMModel(net, 0.1, warmup=0, anneal=0),
    "no cap": lambda net: LESAMModel(net, 0.1, None, warmup=0, anneal=0),
    "adaptive": lambda net: LESAMModel(net, adaptive=True),
    "alpha": lambda net: LESAMModel(net, alpha=0.5),
    "secant": lambda net: LESAMModel(net, curvature="secant"),
    "hvp": lambda net: LESAMModel(net, curvature="hvp", warmup=0, anneal=0),
    "share": lambda net: LESAMModel(net, ascent_fraction=0.5),
    "every": lambda net: LESAMModel(net, ascent_every=2),
    "previous": lambda net: LESAMModel(net, ascent_from="previous"),
    "momentum": lambda net: LESAMModel(net, ascent_from="momentum"),
    "splits": lambda net: LESAMModel(net, num_batch_splits=2),
    "SAM": SAMModel,
    "ASAM": lambda net: SAMModel(net, rules.ASAM(0.5)),
    "GSAM": lambda net: SAMModel(net, rules.GSAM(0.1)),
    "WSAM": lambda net: SAMModel(net, rules.WSAM(0.1)),
    "FriendlySAM": lambda net: SAMModel(net, rules.FriendlySAM(0.1)),
    "LookSAM": lambda net: SAMModel(net, rules.LookSAM(0.1)),
    "UnnormalizedSAM": lambda net: SAMModel(net, rules.UnnormalizedSAM(0.1)),
    "parts": lambda net: SharpnessAwareModel(
        net, rules.LossEquated(1.0), 0.1, ascents.Momentum()
    ),
}


@pytest.fixture(scope="module", autouse=True)
def checked_numerics():
    tf.debugging.enable_check_numerics()
    yield
    tf.debugging.disable_check_numerics()


def fit(model, eager):
    x, y = classification_data()
    model.compile("adam", crossentropy(), run_eagerly=eager, jit_compile=False)
    return model.fit(x, y, batch_size=32, epochs=2, verbose=0).history


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_nothing_in_a_healthy_step_is_no_number(name, eager):
    history = fit(MODELS[name](dense_net()), eager)
    assert np.isfinite(list(history.values())).all()


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "float64"])
@pytest.mark.parametrize("name", ["default", "secant", "no cap", "SAM"])
def test_in_other_dtypes(name, policy):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        history = fit(MODELS[name](dense_net()), False)
    finally:
        keras.config.set_dtype_policy(before)
    assert np.isfinite(list(history.values())).all()


def test_the_fault_of_a_model_is_found():
    class Faulty(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = keras.layers.Dense(3)

        def call(self, x):
            return tf.math.log(self.dense(x) * 0.0)

    with pytest.raises(tf.errors.InvalidArgumentError, match="Log"):
        fit(LESAMModel(Faulty()), False)
