"""How often the first step traces the model: nothing is traced in vain.

A `tf.function` that creates variables is traced a second time, and with it
both passes. What a step needs is there before it is traced.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_lesam import LESAMModel
from keras_lesam import SAMModel
from keras_lesam import budgets
from keras_lesam import rules
from tests.helpers import classification_data
from tests.helpers import constant_lesam
from tests.helpers import crossentropy


@keras.saving.register_keras_serializable("test_first_epoch")
class Counter(keras.layers.Layer):
    """Counts how often Python runs it on tensors."""

    traces = 0

    def call(self, inputs):
        if not isinstance(inputs, keras.KerasTensor):
            self.traces += 1
        return inputs


def net(counter, is_built=True):
    keras.utils.set_random_seed(0)
    layers = [
        counter,
        keras.layers.Dense(8, activation="tanh"),
        keras.layers.BatchNormalization(),
        keras.layers.Dropout(0.2),
        keras.layers.Dense(4),
    ]
    return keras.Sequential(
        [keras.Input((6,)), *layers] if is_built else layers
    )


def traces_of_first_fit(wrap, is_built=True, optimizer="adam", **compiled):
    counter = Counter()
    model = wrap(net(counter, is_built))
    model.compile(optimizer, crossentropy(), **compiled)
    x, y = classification_data()
    counter.traces = 0
    model.fit(x, y, batch_size=32, verbose=0)
    first = counter.traces
    model.fit(x, y, batch_size=32, verbose=0)
    assert counter.traces == first
    return first


# Beside one trace to see what the model is like: one of each pass.
METHODS = {
    "lesam": (constant_lesam, 2),
    "default": (lambda net: LESAMModel(net), 2),
    "relative": (lambda net: LESAMModel(net, budgets.Relative(0.3)), 2),
    "secant": (lambda net: constant_lesam(net, curvature="secant"), 2),
    "adaptive": (lambda net: constant_lesam(net, adaptive=True), 2),
    "splits": (lambda net: constant_lesam(net, num_batch_splits=2), 4),
    "sam": (lambda net: SAMModel(net, rules.SAM(0.05)), 2),
    "friendly": (lambda net: SAMModel(net, rules.FriendlySAM(0.05)), 2),
    "look": (lambda net: SAMModel(net, rules.LookSAM(0.05, every=2)), 2),
    "every": (lambda net: constant_lesam(net, ascent_every=2), 2),
    "previous": (lambda net: constant_lesam(net, ascent_from="previous"), 1),
    # In a branch, a step without a budget: one pass over all rows.
    "fraction": (lambda net: constant_lesam(net, ascent_fraction=0.5), 3),
}


@pytest.mark.parametrize("name", METHODS)
def test_each_pass_is_traced_once(name):
    wrap, passes = METHODS[name]
    assert traces_of_first_fit(wrap) == 1 + passes


@pytest.mark.parametrize(
    "compiled",
    [
        lambda: {"optimizer": "sgd"},
        lambda: {"optimizer": keras.optimizers.SGD(0.1, momentum=0.9)},
        lambda: {"metrics": ["accuracy"]},
        lambda: {"weighted_metrics": ["accuracy"], "jit_compile": True},
        lambda: {"jit_compile": True},
    ],
    ids=["name", "object", "metrics", "weighted metrics, XLA", "XLA"],
)
def test_whatever_is_compiled(compiled):
    assert traces_of_first_fit(constant_lesam, **compiled()) == 3


@pytest.mark.parametrize("metrics", [[], ["accuracy"]], ids=len)
def test_a_model_that_waits_for_its_first_batch(metrics):
    """Keras itself looks at the layers, to build them, and twice at a step."""
    plain = traces_of_first_fit(lambda net: net, is_built=False)
    found = traces_of_first_fit(constant_lesam, is_built=False, metrics=metrics)
    assert found <= plain + 2


def test_compiled_anew_it_is_traced_anew():
    counter = Counter()
    model = constant_lesam(net(counter))
    x, y = classification_data()
    for _ in range(2):
        model.compile("adam", crossentropy(), metrics=["accuracy"])
        counter.traces = 0
        model.fit(x, y, batch_size=32, verbose=0)
        assert counter.traces == 3


def test_variables_start_as_in_plain_keras():
    """Those of layers that wait for a batch, of the optimizer, of metrics."""
    weights, slots = [], []
    for wrap in (lambda net: net, lambda net: constant_lesam(net, sigma=1e-9)):
        inner = net(Counter(), is_built=False)
        model = wrap(inner)
        optimizer = keras.optimizers.Ftrl(0.0, initial_accumulator_value=0.3)
        model.compile(optimizer, crossentropy(), metrics=["accuracy"])
        x, y = classification_data()
        model.fit(x, y, batch_size=32, verbose=0)
        weights.append(inner.get_weights())
        slots.append([v.shape for v in optimizer.variables])
    for a, b in zip(*weights, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert slots[0] == slots[1]


class OfItsInput(keras.layers.Layer):
    """A variable whose first value comes from the first batch."""

    def __init__(self):
        super().__init__()
        self.scale = None

    def call(self, inputs):
        if self.scale is None:
            self.scale = tf.Variable(
                lambda: tf.ones((), inputs.dtype) * 2.0, trainable=False
            )
        return inputs * self.scale


def test_variables_that_a_model_creates_by_itself():
    keras.utils.set_random_seed(0)
    layer = OfItsInput()
    model = constant_lesam(
        keras.Sequential([keras.Input((6,)), layer, keras.layers.Dense(4)])
    )
    model.compile("adam", crossentropy())
    x, y = classification_data()
    model.fit(x, y, batch_size=32, verbose=0)
    assert float(layer.scale) == 2.0
