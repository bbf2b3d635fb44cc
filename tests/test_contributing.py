"""What CONTRIBUTING.md says of rules, budgets and ascents runs as it stands."""

import re

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.helpers import assert_same_weights
from tests.helpers import classification_data
from tests.helpers import dense_net
from tests.helpers import train
from tests.test_package import ROOT

TEXT = (ROOT / "CONTRIBUTING.md").read_text()
NAMES = ("SignSAM", "ShareOfTheLoss", "Late")


@pytest.fixture(scope="module")
def example():
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(blocks) == 1
    namespace = {"__name__": "contributing"}
    exec(blocks[0], namespace)
    return namespace


@pytest.mark.parametrize("i", range(3), ids=NAMES)
def test_it_trains_and_is_saved(example, i, tmp_path):
    x, y = classification_data()
    model = example["make"](dense_net())[i]
    history = train(model, x, y)
    assert history["rho"][-1] > 0
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert_same_weights(loaded, model)
    for name in ("rule", "budget", "ascent"):
        assert repr(getattr(loaded, name)) == repr(getattr(model, name))


def test_each_is_one_class_of_a_few_lines():
    for name in NAMES:
        [source] = re.findall(rf"class {name}.*?(?=\n\n\n)", TEXT, re.DOTALL)
        assert len(source.splitlines()) <= 12


def test_the_rule_by_hand(example):
    gradients = [tf.constant([3.0, -4.0]), None, tf.constant([0.0])]
    found = example["SignSAM"](0.1).perturb(
        gradients, [tf.zeros(2), tf.zeros(1), tf.zeros(1)], tf.constant(0.1), {}
    )
    np.testing.assert_allclose(found.eps[0], [0.1, -0.1], rtol=1e-6)
    np.testing.assert_allclose(found.radius, 0.1 * np.sqrt(2), rtol=1e-6)


def test_every_file_that_it_names_is_there():
    for name in re.findall(r"`(_?\w+\.py)`", TEXT):
        assert (ROOT / "keras_lesam" / name).exists(), name
    for name in re.findall(r"`(tests/\w+\.py|examples/\w+\.py)`", TEXT):
        assert (ROOT / name).exists(), name
