"""Exported models serve on their own, under the input names of the inner."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.helpers import classification_data
from tests.helpers import constant_lesam
from tests.helpers import crossentropy
from tests.test_package import run_python

SERVE = """
import sys
sys.modules["keras"] = None  # importing them raises ImportError
sys.modules["keras_lesam"] = None
import numpy as np
import tensorflow as tf
inputs = dict(np.load("inputs.npz"))
loaded = tf.saved_model.load("exported")
if list(inputs) == ["only"]:
    outputs = loaded.serve(inputs["only"])
else:
    outputs = loaded.serve(inputs)
np.save("outputs.npy", outputs)
_, named = loaded.signatures["serving_default"].structured_input_signature
print(*sorted(named))
"""


def two_inputs_net():
    left = keras.Input((3,), name="left")
    right = keras.Input((2,), name="right")
    x = keras.layers.Concatenate()([left, right])
    x = keras.layers.Dense(8)(x)
    x = keras.layers.BatchNormalization()(x)
    x = keras.layers.Dropout(0.3)(x)
    outputs = keras.layers.Dense(4)(x)
    return keras.Model({"left": left, "right": right}, outputs)


def two_inputs():
    rows, labels = classification_data(rows=64, shape=(5,))
    return {"left": rows[:, :3], "right": rows[:, 3:]}, labels


def convolutional_net():
    # No augmentation: Keras's export of RandomFlip and the like flips.
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            keras.layers.GaussianNoise(0.1),
            keras.layers.Conv2D(8, 3, kernel_regularizer="l2"),
            keras.layers.BatchNormalization(),
            keras.layers.ReLU(),
            keras.layers.Dropout(0.3),
            keras.layers.Flatten(),
            keras.layers.Dense(4),
        ]
    )


def images():
    return classification_data(rows=64, shape=(8, 8, 1))


CASES = {
    "two inputs": (two_inputs_net, two_inputs, "left right"),
    "sequential": (convolutional_net, images, "keras_tensor"),
}
cases = pytest.mark.parametrize(
    ("make_net", "data", "names"), CASES.values(), ids=CASES.keys()
)


def trained(make_net, data):
    """A wrapper, inputs and the outputs it predicts for them."""
    x, y = data()
    model = constant_lesam(make_net())
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), crossentropy())
    before = model.predict(x, verbose=0)
    model.fit(x, y, epochs=3, verbose=0)
    outputs = model.predict(x, verbose=0)
    assert np.abs(outputs - before).max() > 0.1
    return model, x, outputs


@cases
def test_a_saved_model_serves_without_keras(make_net, data, names, tmp_path):
    model, x, expected = trained(make_net, data)
    model.export(tmp_path / "exported", verbose=False)
    inputs = x if isinstance(x, dict) else {"only": x}
    np.savez(tmp_path / "inputs.npz", **inputs)
    printed = run_python(SERVE, cwd=tmp_path).split()
    # Keras numbers the inputs that have no name.
    assert [name.rstrip("_0123456789") for name in printed] == names.split()
    outputs = np.load(tmp_path / "outputs.npy")
    np.testing.assert_allclose(outputs, expected, rtol=0, atol=1e-6)


@cases
def test_the_export_is_that_of_the_inner_model(make_net, data, names, tmp_path):
    model, x, _ = trained(make_net, data)
    model.export(tmp_path / "wrapper", verbose=False)
    model.model.export(tmp_path / "inner", verbose=False)
    served, signatures = [], []
    for name in ("wrapper", "inner"):
        loaded = tf.saved_model.load(str(tmp_path / name))
        served.append(loaded.serve(x).numpy())
        function = loaded.signatures["serving_default"]
        signatures.append(
            (function.structured_input_signature, function.structured_outputs)
        )
    np.testing.assert_array_equal(*served)
    assert signatures[0] == signatures[1]


@pytest.mark.filterwarnings("ignore:.*tf.lite.Interpreter is deprecated")
@cases
def test_litert(make_net, data, names, tmp_path):
    model, x, expected = trained(make_net, data)
    path = str(tmp_path / "model.tflite")
    model.export(path, format="litert", verbose=False)
    runner = tf.lite.Interpreter(path).get_signature_runner()
    found = sorted(runner.get_input_details())
    assert [name.rstrip("_0123456789") for name in found] == names.split()
    inputs = x if isinstance(x, dict) else {found[0]: x}
    (outputs,) = runner(**inputs).values()
    np.testing.assert_allclose(outputs, expected, rtol=0, atol=1e-5)
