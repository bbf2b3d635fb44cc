"""Other packages around a wrapped model: each as it is, beside plain Keras.

TensorBoard is in test_callbacks.py, LiteRT in test_export.py, KerasHub in
test_hub.py.
"""

import copy
import pickle

import keras
import keras_tuner
import numpy as np
import onnxruntime
import pytest
import tensorflow as tf
from orbax import checkpoint
from scikeras import wrappers
from sklearn import model_selection

from keras_lesam import LESAMModel
from keras_lesam import SAMModel
from keras_lesam import SharpnessAwareGradients
from keras_lesam import budgets
from keras_lesam import rules
from tests.helpers import assert_same_weights
from tests.helpers import classification_data
from tests.helpers import constant_lesam
from tests.helpers import crossentropy
from tests.helpers import dense_net
from tests.test_package import run_python

pytestmark = pytest.mark.filterwarnings("ignore")
DATA = classification_data(64)
FIT = {"epochs": 2, "verbose": 0}


def compiled(model, optimizer="adam"):
    model.compile(optimizer, crossentropy(), metrics=["accuracy"])
    return model


def unbuilt_net():
    keras.utils.set_random_seed(0)
    return keras.Sequential([keras.layers.Dense(4)])


# KerasTuner.

SEARCHES = {
    "share": lambda v: LESAMModel(dense_net(), budgets.Relative(v)),
    "rho": lambda v: SAMModel(dense_net(), rho=v),
    "state": lambda v: SAMModel(dense_net(), rules.FriendlySAM(v)),
    "unbuilt": lambda v: LESAMModel(unbuilt_net(), budgets.Relative(v)),
}


@pytest.mark.parametrize("name", SEARCHES)
def test_keras_tuner(name, tmp_path):
    """The best model is loaded as it was when it was the best."""

    def build(hp):
        amount = hp.Choice("amount", [0.05, 0.5])
        return compiled(SEARCHES[name](amount))

    tuner = keras_tuner.GridSearch(
        build, "val_loss", 2, directory=tmp_path, project_name=name
    )
    tuner.search(*DATA, validation_data=DATA, **FIT)
    trials = tuner.oracle.get_best_trials(2)
    amounts = {trial.hyperparameters.get("amount") for trial in trials}
    assert amounts == {0.05, 0.5}
    [best] = tuner.get_best_models(1)
    assert type(best) is type(SEARCHES[name](0.5))
    if name == "unbuilt":
        best.predict(DATA[0], verbose=0)
    loss = best.evaluate(*DATA, verbose=0)[0]
    np.testing.assert_allclose(loss, trials[0].score, rtol=1e-5)
    best.fit(*DATA, **FIT)


# scikit-learn.


def soft_net():
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [keras.Input((6,)), keras.layers.Dense(4, activation="softmax")]
    )


def for_classes(model, loss="categorical_crossentropy"):
    model.compile(keras.optimizers.Adam(0.01), loss, metrics=["accuracy"])
    return model


def build_for_classes(X, y, share):  # noqa: N803
    del X, y
    return for_classes(LESAMModel(soft_net(), budgets.Relative(share)))


@pytest.mark.parametrize("kind", ["function", "model"])
def test_keras_sklearn_classifier(kind):
    options = {"model": build_for_classes, "model_kwargs": {"share": 0.3}}
    if kind == "model":
        options = {"model": build_for_classes(None, None, 0.3)}
    classifier = keras.wrappers.SKLearnClassifier(**options)
    scores = model_selection.cross_val_score(
        classifier, *DATA, cv=2, params={"verbose": 0}
    )
    assert scores.shape == (2,)
    classifier.fit(*DATA, epochs=3, verbose=0)
    assert type(classifier.model_) is LESAMModel
    assert classifier.model_.share == 0.3
    assert classifier.score(*DATA) == np.mean(
        classifier.predict(DATA[0]) == DATA[1]
    )
    again = pickle.loads(pickle.dumps(classifier))
    assert again.score(*DATA) == classifier.score(*DATA)


def build_for_scikeras(share):
    model = LESAMModel(soft_net(), budgets.Relative(share))
    return for_classes(model, "sparse_categorical_crossentropy")


def test_scikeras():
    """A search over the share; copies and pickles of what was found."""
    classifier = wrappers.KerasClassifier(
        build_for_scikeras, share=0.3, epochs=2, verbose=0
    )
    search = model_selection.GridSearchCV(
        classifier, {"share": [0.1, 0.5]}, cv=2
    )
    best = search.fit(*DATA).best_estimator_
    assert type(best.model_) is LESAMModel
    assert best.model_.share == search.best_params_["share"]
    for other in (copy.deepcopy(best), pickle.loads(pickle.dumps(best))):
        np.testing.assert_array_equal(
            other.predict_proba(DATA[0]), best.predict_proba(DATA[0])
        )
        other.partial_fit(*DATA)


def test_files_saved_beside_scikeras_load_without_it(tmp_path):
    """It renames the class; once it does not, the shim can go."""
    model = compiled(LESAMModel(dense_net()))
    model.fit(*DATA, **FIT)
    pickle.dumps(model)
    assert keras.saving.get_registered_name(LESAMModel) == ">LESAMModel"
    model.save(tmp_path / "model.keras")
    np.save(tmp_path / "x.npy", DATA[0])
    code = """
import keras
import keras_lesam
import numpy as np
model = keras.saving.load_model("model.keras")
assert type(model) is keras_lesam.LESAMModel
np.save("outputs.npy", model.predict(np.load("x.npy"), verbose=0))
"""
    run_python(code, cwd=tmp_path)
    np.testing.assert_allclose(
        np.load(tmp_path / "outputs.npy"),
        model.predict(DATA[0], verbose=0),
        atol=1e-6,
    )


# ONNX.


def two_inputs_net():
    keras.utils.set_random_seed(0)
    left, right = (
        keras.Input((2,), name="left"),
        keras.Input((4,), name="right"),
    )
    x = keras.layers.Concatenate()([left, right])
    # Not "gelu": tf2onnx makes an operation of it that ONNX has not.
    x = keras.layers.Dense(8, activation="relu")(x)
    x = keras.layers.BatchNormalization()(x)
    x = keras.layers.Dropout(0.3)(x)
    return keras.Model({"left": left, "right": right}, keras.layers.Dense(4)(x))


@pytest.mark.parametrize("make", [dense_net, two_inputs_net])
def test_onnx(make, tmp_path):
    """Outputs are those of the model, under the names of its inputs."""
    x, y = DATA
    names = [tensor.name for tensor in make().inputs]
    if make is two_inputs_net:
        x = {"left": x[:, :2], "right": x[:, 2:]}
    wrapper = compiled(constant_lesam(make()))
    wrapper.fit(x, y, **FIT)
    path = str(tmp_path / "model.onnx")
    wrapper.export(path, format="onnx", verbose=False)
    session = onnxruntime.InferenceSession(path)
    found = [one.name for one in session.get_inputs()]
    feed = x if isinstance(x, dict) else {found[0]: x}
    if isinstance(x, dict):
        assert sorted(found) == sorted(names)
    [outputs] = session.run(None, feed)
    expected = wrapper.predict(x, verbose=0)
    np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-5)


# Orbax.

METHODS = {
    "plain": lambda net: net,
    "relative": lambda net: LESAMModel(net),
    "secant": lambda net: constant_lesam(net, curvature="secant"),
    "friendly": lambda net: SAMModel(net, rules.FriendlySAM(0.05)),
}


def named(make):
    """A model whose variables have the same paths each time.

    Of a Sequential, Keras's own `load_model` looks for others than its
    callback has saved, and leaves the weights as they are.
    """
    keras.backend.clear_session()
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6,), name="inputs")
    x = keras.layers.Dense(8, "tanh", name="first")(inputs)
    net = keras.Model(inputs, keras.layers.Dense(4, name="second")(x))
    return compiled(make(net), keras.optimizers.SGD(0.1, momentum=0.9))


def tree_of(model):
    """The state tree, in arrays: Orbax takes no scalars of NumPy."""
    return keras.tree.map_structure(
        np.asarray, model.get_state_tree("numpy_array")
    )


@pytest.mark.parametrize("name", METHODS)
def test_orbax_of_the_state_tree(name, tmp_path):
    """A resumed run is the uninterrupted one, bit for bit."""
    options = {**FIT, "shuffle": False}
    whole = named(METHODS[name])
    for _ in range(2):
        whole.fit(*DATA, **options)
    half = named(METHODS[name])
    half.fit(*DATA, **options)
    with checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "half", half.get_state_tree("numpy_array"))
    resumed = named(METHODS[name])
    # What waits for a first batch has to be there to be restored.
    resumed.fit(*DATA, **options)
    with checkpoint.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore(tmp_path / "half", tree_of(resumed))
    resumed.set_state_tree(tree)
    assert_same_weights(resumed, half)
    resumed.fit(*DATA, **options)
    assert_same_weights(resumed, whole)


@pytest.mark.parametrize("name", METHODS)
def test_orbax_callback(name, tmp_path):
    model = named(METHODS[name])
    callback = keras.callbacks.OrbaxCheckpoint(
        str(tmp_path), monitor="loss", save_on_background=False
    )
    model.fit(*DATA, callbacks=[callback], **FIT)
    loaded = keras.models.load_model(str(tmp_path))
    assert type(loaded) is type(model)
    assert_same_weights(loaded, model)


def test_orbax_of_a_loop(tmp_path):
    """The state of a loop is a dict of tensors, whatever keeps it."""
    net, lesam = dense_net(), SharpnessAwareGradients(rules.FriendlySAM(0.05))
    variables = net.trainable_variables
    _, record = lesam(
        lambda: tf.reduce_mean(net(DATA[0]) ** 2),
        *(variables, lesam.init_state(variables), None),
    )
    kept = {name: np.array(value) for name, value in record.state.items()}
    with checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", kept)
    with checkpoint.StandardCheckpointer() as checkpointer:
        state = checkpointer.restore(tmp_path / "state", kept)
    for name, value in record.state.items():
        np.testing.assert_array_equal(state[name], value)
