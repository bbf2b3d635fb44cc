"""Tasks of KerasHub in a wrapper: raw data in, as with the task itself.

Real classes of small configs; their vocabularies are made here.
"""

import keras
import keras_hub
import numpy as np
import pytest
import tensorflow as tf

from keras_lesam import LESAMModel
from keras_lesam import SAMModel
from keras_lesam import rules
from tests.helpers import assert_same_weights
from tests.helpers import constant_lesam

models = keras_hub.models
WORDS = ["the", "quick", "brown", "fox", "tripped", "over", "a", "dog"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
ROWS = 12


def sentences():
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(WORDS, size=4)) for _ in range(ROWS)]


def labels():
    return np.random.default_rng(1).integers(3, size=ROWS)


def bert_backbone():
    return models.BertBackbone(
        vocabulary_size=len(SPECIAL + WORDS),
        num_layers=1,
        num_heads=2,
        hidden_dim=8,
        intermediate_dim=16,
        max_sequence_length=8,
        dropout=0.1,
    )


def bert(preprocessor=True, **kwargs):
    keras.utils.set_random_seed(0)
    tokenizer = models.BertTokenizer(vocabulary=SPECIAL + WORDS)
    given = models.BertTextClassifierPreprocessor(tokenizer, sequence_length=8)
    return models.BertTextClassifier(
        bert_backbone(),
        num_classes=3,
        preprocessor=given if preprocessor else None,
        **kwargs,
    )


def gpt2():
    keras.utils.set_random_seed(0)
    letters = sorted({letter for word in WORDS for letter in word})
    vocabulary = ["<|endoftext|>", "!", *letters, "\u0120", "th"]
    tokenizer = models.GPT2Tokenizer(
        vocabulary={token: i for i, token in enumerate(vocabulary)},
        merges=["t h"],
    )
    backbone = models.GPT2Backbone(
        vocabulary_size=len(vocabulary),
        num_layers=1,
        num_heads=2,
        hidden_dim=8,
        intermediate_dim=16,
        max_sequence_length=12,
    )
    preprocessor = models.GPT2CausalLMPreprocessor(
        tokenizer, sequence_length=12
    )
    return models.GPT2CausalLM(backbone, preprocessor=preprocessor)


def vit():
    keras.utils.set_random_seed(0)
    backbone = models.ViTBackbone(
        image_shape=(8, 8, 3),
        patch_size=4,
        num_layers=1,
        num_heads=2,
        hidden_dim=8,
        mlp_dim=16,
    )
    converter = keras_hub.layers.ViTImageConverter(
        image_size=(8, 8), scale=1 / 255
    )
    preprocessor = models.ViTImageClassifierPreprocessor(converter)
    return models.ViTImageClassifier(
        backbone, num_classes=3, preprocessor=preprocessor
    )


def images():
    rng = np.random.default_rng(2)
    return rng.integers(256, size=(ROWS, 11, 9, 3)).astype("float32")


TASKS = {
    "text classifier": (bert, lambda: (sentences(), labels())),
    "causal lm": (gpt2, lambda: (sentences(),)),
    "image classifier": (vit, lambda: (images(), labels())),
}
every_task = pytest.mark.parametrize("name", TASKS)
FIT = {"batch_size": 4, "epochs": 2, "verbose": 0}


def fit(model, data, **options):
    keras.utils.set_random_seed(1)
    return model.fit(*data, **{**FIT, **options}).history


@every_task
def test_without_budget_as_the_task_itself(name):
    """With the defaults of its `compile`."""
    make, data = TASKS[name]
    plain, net = make(), make()
    wrapper = LESAMModel(net, sigma=0.0)
    wrapper.compile()
    assert isinstance(wrapper.optimizer, keras.optimizers.Adam)
    expected = fit(plain, data())
    found = fit(wrapper, data())
    assert_same_weights(net, plain)
    assert {log: found[log] for log in expected} == expected
    options = {"batch_size": 4, "verbose": 0}
    expected = plain.evaluate(*data(), **options)
    assert wrapper.evaluate(*data(), **options) == expected
    x = data()[0]
    np.testing.assert_array_equal(
        wrapper.predict(x, verbose=0), plain.predict(x, verbose=0)
    )
    x = tf.constant(x)
    np.testing.assert_array_equal(
        wrapper.predict_on_batch(x), plain.predict_on_batch(x)
    )


@every_task
def test_with_a_budget(name):
    make, data = TASKS[name]
    net = make()
    wrapper = SAMModel(net, rules.FriendlySAM(0.05))
    wrapper.compile(keras.optimizers.Adam(1e-3))
    history = fit(wrapper, data(), validation_data=data())
    assert min(history["rho"]) > 0
    assert {"val_loss"} <= set(history)
    assert all(np.isfinite(history["loss"]))
    plain = make()
    plain.compile(keras.optimizers.Adam(1e-3))
    fit(plain, data())
    with pytest.raises(AssertionError):
        assert_same_weights(net, plain)


@pytest.mark.parametrize("preprocessor", [True, False])
def test_on_batches(preprocessor):
    x = tf.constant(sentences())
    if not preprocessor:
        x = bert().preprocessor(x)
    plain, net = bert(preprocessor), bert(preprocessor)
    wrapper = constant_lesam(net, 0.0)
    wrapper.compile()
    for method in ("train_on_batch", "test_on_batch"):
        keras.utils.set_random_seed(1)
        expected = getattr(plain, method)(x, labels(), return_dict=True)
        keras.utils.set_random_seed(1)
        found = getattr(wrapper, method)(x, labels(), return_dict=True)
        assert {log: found[log] for log in expected} == expected
    assert_same_weights(net, plain)


def test_without_a_preprocessor():
    x = bert().preprocessor(sentences())
    plain, net = bert(False), bert(False)
    wrapper = LESAMModel(net, 0.0)
    wrapper.compile("adam", keras.losses.SparseCategoricalCrossentropy(True))
    plain.compile("adam", keras.losses.SparseCategoricalCrossentropy(True))
    assert (
        fit(plain, (x, labels()))["loss"]
        == (fit(wrapper, (x, labels()))["loss"])
    )
    assert_same_weights(net, plain)


@pytest.mark.parametrize("kind", ["dataset", "split", "weights"])
def test_kinds_of_data(kind):
    plain, net = bert(), bert()
    wrapper = LESAMModel(net, 0.0)
    wrapper.compile()
    data, options = (tf.constant(sentences()), labels()), {}
    if kind == "dataset":
        rows = tf.data.Dataset.from_tensor_slices(data).batch(5)
        data, options = (rows,), {"batch_size": None, "validation_data": rows}
    elif kind == "split":
        data = (np.array(sentences()), labels())
        options = {"validation_split": 0.25}
    else:
        options = {"sample_weight": np.linspace(0, 2, ROWS)}
    expected = fit(plain, data, **options)
    found = fit(wrapper, data, **options)
    assert {log: found[log] for log in expected} == expected
    assert_same_weights(net, plain)


def test_a_dataset_has_its_own_batches():
    wrapper = LESAMModel(bert(), 0.0)
    wrapper.compile()
    rows = tf.data.Dataset.from_tensor_slices((sentences(), labels())).batch(5)
    with pytest.raises(ValueError, match="leave them None"):
        wrapper.fit(rows, batch_size=3)


def test_lora(tmp_path):
    """Of the backbone; its few weights are all that moves."""
    net, plain = bert(), bert()
    for task in (net, plain):
        task.backbone.enable_lora(2)
    frozen = {id(v) for v in net.non_trainable_variables}
    before = {id(v): v.numpy() for v in net.weights}
    wrapper = constant_lesam(net, 0.1)
    wrapper.compile(keras.optimizers.Adam(1e-2))
    history = fit(wrapper, (sentences(), labels()))
    assert min(history["rho"]) > 0
    moved = {k for v in net.weights if np.any((k := id(v)) and before[k] != v)}
    assert moved
    assert not moved & frozen
    wrapper.save_weights(tmp_path / "lora.weights.h5")
    plain.load_weights(tmp_path / "lora.weights.h5")
    # Keras saves the sum of a kernel and what has been learnt beside it.
    np.testing.assert_allclose(
        plain.predict(sentences(), verbose=0),
        wrapper.predict(sentences(), verbose=0),
        atol=1e-5,
    )


def test_a_task_is_read_and_written_through_its_wrapper():
    net = gpt2()
    wrapper = constant_lesam(net)
    wrapper.compile(sampler="greedy")
    assert wrapper.backbone is net.backbone
    assert wrapper.generate("the q", max_length=8).startswith("the q")
    assert type(net.sampler) is keras_hub.samplers.GreedySampler
    wrapper.preprocessor = None
    assert net.preprocessor is None


def test_the_optimizer_of_the_task_is_its_own(tmp_path):
    """And is saved with it, apart from the wrapper's."""
    net = bert()
    own = net.optimizer
    wrapper = constant_lesam(net)
    wrapper.compile(keras.optimizers.SGD(0.1, momentum=0.9))
    fit(wrapper, (sentences(), labels()))
    assert net.optimizer is own
    wrapper.save(tmp_path / "task.keras")
    loaded = keras.models.load_model(tmp_path / "task.keras")
    assert type(loaded.model) is models.BertTextClassifier
    assert_same_weights(loaded, wrapper)
    for a, b in zip(loaded.optimizer.variables, wrapper.optimizer.variables):
        np.testing.assert_array_equal(a, b)
    data = (sentences(), labels())
    assert loaded.evaluate(*data, verbose=0) == wrapper.evaluate(
        *data, verbose=0
    )


def test_overrides_of_users_are_refused():
    class Own(models.BertTextClassifier):
        def fit(self, *args, **kwargs):
            return super().fit(*args, **kwargs)

    class OwnStep(models.BertTextClassifier):
        def train_step(self, data):
            return {}

    for cls, name in ((Own, "fit"), (OwnStep, "train_step")):
        task = cls(bert_backbone(), num_classes=3)
        with pytest.raises(ValueError, match=f"which overrides {name}"):
            LESAMModel(task)
