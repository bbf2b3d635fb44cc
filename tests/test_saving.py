"""Files of wrapper and inner model: what they keep, and who can load them."""

import inspect
import json
import os
import sys
import textwrap

import keras
import numpy as np
import pytest

from keras_lesam import LESAMModel
from tests.helpers import assert_same_weights
from tests.helpers import classification_data
from tests.helpers import constant_lesam
from tests.helpers import crossentropy
from tests.helpers import dense_net
from tests.test_package import ROOT
from tests.test_package import run_python

# Not by name: a file has to restore what their arguments were, too.
OPTIMIZERS = {
    "Adam": lambda: keras.optimizers.Adam(0.02, beta_1=0.8, name="o"),
    "momentum": lambda: keras.optimizers.SGD(0.1, momentum=0.9, name="o"),
}
optimizers = pytest.mark.parametrize(
    "optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS.keys()
)


@keras.saving.register_keras_serializable("tests")
def is_kernel(variable):
    return variable.name == "kernel"


@keras.saving.register_keras_serializable("tests")
class OwnLoss(keras.Sequential):
    def compute_loss(self, x, y, y_pred, sample_weight=None, training=True):
        return 2.0 * super().compute_loss(x, y, y_pred, sample_weight)


# No dropout where files are compared: Keras does not save the state of seeds.
def functional_net():
    inputs = keras.Input((6,), name="features")
    x = keras.layers.Dense(8, activation="tanh")(inputs)
    x = keras.layers.Add()([x, keras.layers.BatchNormalization()(x)])
    return keras.Model(inputs, keras.layers.Dense(4, name="logits")(x))


def sequential_net(*first):
    return keras.Sequential(
        [
            *first,
            keras.layers.Dense(8, activation="tanh", kernel_regularizer="l2"),
            keras.layers.BatchNormalization(),
            keras.layers.Dense(4),
        ]
    )


def lesam(net, optimizer=OPTIMIZERS["Adam"]):
    """Its budget changes with each of the 12 steps of 4 epochs."""
    model = LESAMModel(net, warmup=0.5, anneal=0.5, total_steps=12)
    model.compile(optimizer(), crossentropy(), metrics=["accuracy"])
    return model


def fit(model, epochs=2):
    x, y = classification_data(rows=96)
    model.fit(x, y, epochs=epochs, shuffle=False, verbose=0)
    return model


def assert_same_optimizer(optimizer, other):
    assert optimizer.get_config() == other.get_config()
    pairs = list(zip(optimizer.variables, other.variables, strict=True))
    for a, b in pairs:
        np.testing.assert_array_equal(a, b, err_msg=a.path)
    assert len(pairs) > 2


@optimizers
@pytest.mark.parametrize("make_net", [functional_net, sequential_net])
def test_training_after_a_load_is_training_not_interrupted(
    make_net, optimizer, tmp_path
):
    model = fit(lesam(make_net(), optimizer))
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert type(loaded) is LESAMModel
    assert loaded.optimizer.iterations == 6
    assert_same_weights(loaded, model)
    assert_same_optimizer(loaded.optimizer, model.optimizer)

    before = model.get_weights()
    fit(model)
    fit(loaded)
    assert_same_weights(loaded, model)
    assert_same_optimizer(loaded.optimizer, model.optimizer)
    assert not np.array_equal(before[0], model.get_weights()[0])


def test_a_loaded_wrapper_is_compiled_as_it_was(tmp_path):
    model = fit(lesam(functional_net()))
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    x, y = classification_data(rows=96)
    expected = model.evaluate(x, y, verbose=0, return_dict=True)
    assert sorted(expected) == ["accuracy", "loss"]
    assert loaded.evaluate(x, y, verbose=0, return_dict=True) == expected


@pytest.mark.parametrize("compiled", [True, False])
def test_an_unbuilt_wrapper_is_built_by_the_first_fit_after_a_load(
    compiled, tmp_path
):
    def trained(model):
        return fit(lesam(model.model) if not compiled else model)

    path = tmp_path / "model.keras"
    model = LESAMModel(sequential_net(), 0.1, total_steps=12)
    if compiled:
        model.compile("adam", crossentropy())
    with pytest.warns(UserWarning, match="not yet been built"):
        model.save(path)
    keras.utils.set_random_seed(0)
    loaded = keras.models.load_model(path)
    assert not loaded.built
    assert (getattr(loaded, "optimizer", None) is not None) == compiled
    trained(loaded)

    keras.utils.set_random_seed(0)
    fresh = LESAMModel(sequential_net(), 0.1, total_steps=12)
    if compiled:
        fresh.compile("adam", crossentropy())
    trained(fresh)
    assert_same_weights(loaded, fresh)
    assert len(loaded.weights) == 8


@optimizers
def test_files_of_weights_hold_the_optimizer_too(optimizer, tmp_path):
    path = tmp_path / "wrapper.weights.h5"
    model = fit(lesam(functional_net(), optimizer))
    model.save_weights(path)
    other = lesam(functional_net(), optimizer)
    other.optimizer.build(other.trainable_variables)
    other.load_weights(path)
    assert_same_weights(other, model)
    assert_same_optimizer(other.optimizer, model.optimizer)
    assert_same_weights(fit(other), fit(model))


def test_the_inner_model_has_files_of_weights_of_its_own(tmp_path):
    path = tmp_path / "inner.weights.h5"
    model = fit(lesam(functional_net()))
    model.model.save_weights(path)
    plain = functional_net()
    plain.load_weights(path)
    assert_same_weights(plain, model.model)


ARGUMENTS = {
    "curvature": "hvp",
    "hvp_method": "forward_over_reverse",
    "perturbation_scope": "global",
    "sigma": 0.3,
    "rho_max": None,
    "warmup": 0.2,
    "anneal": 0.3,
    "guard": 0.5,
    "total_steps": 50,
    "adaptive": True,
    "alpha": 0.25,
    "num_batch_splits": 2,
    "ascent_fraction": 0.5,
    "ascent_every": 3,
    "perturb": is_kernel,
    "name": "climber",
}
COSINE = keras.optimizers.schedules.CosineDecay(
    0.0, 100, warmup_target=0.2, warmup_steps=10
)
# These exclude some of the others.
ONE_PASS = {"ascent_from": "momentum"}
TWO_PASSES = {"max_change": 0.5}
RELATIVE = {"share": 0.4}
WITH_SCHEDULE = {"sigma": COSINE, "rho_max": 0.07, **TWO_PASSES}


def test_the_arguments_below_are_all_and_not_the_defaults():
    parameters = inspect.signature(LESAMModel).parameters
    given = {**ARGUMENTS, **ONE_PASS, **TWO_PASSES, **RELATIVE}
    assert set(parameters) == {*given, "model"}
    assert all(parameters[n].default != given[n] for n in given)
    config = LESAMModel(dense_net()).get_config()
    assert set(config) == set(parameters)


def config_text(model):
    """Lists and tuples are one in a file."""
    return json.dumps(model.get_config())


def through_config(model, path):
    return LESAMModel.from_config(model.get_config())


def through_json_text(model, path):
    config = json.loads(json.dumps(model.get_config()))
    return LESAMModel.from_config(config)


def through_keras_json(model, path):
    return keras.models.model_from_json(model.to_json())


def through_file(model, path):
    model.save(path / "model.keras")
    return keras.models.load_model(path / "model.keras")


def through_clone(model, path):
    return keras.models.clone_model(model)


ways = pytest.mark.parametrize(
    "way",
    [
        through_config,
        through_json_text,
        through_keras_json,
        through_file,
        through_clone,
    ],
)


@ways
def test_every_argument_is_kept(way, tmp_path):
    model = LESAMModel(dense_net(), **ARGUMENTS)
    other = way(model, tmp_path)
    assert other is not model
    assert other.model is not model.model
    for name, value in ARGUMENTS.items():
        assert getattr(other, name) == value, name
    assert config_text(other) == config_text(model)


@ways
def test_a_schedule_is_kept(way, tmp_path):
    model = LESAMModel(dense_net(), **WITH_SCHEDULE)
    other = way(model, tmp_path)
    assert type(other.sigma) is keras.optimizers.schedules.CosineDecay
    assert other.sigma.get_config() == COSINE.get_config()
    assert other.rho_max == 0.07
    assert other.max_change == 0.5
    assert config_text(other) == config_text(model)


@ways
def test_arguments_assigned_later_are_kept(way, tmp_path):
    model = LESAMModel(dense_net(), 0.1)
    model.sigma, model.rho_max = 0.4, 0.9
    other = way(model, tmp_path)
    assert (other.sigma, other.rho_max) == (0.4, 0.9)
    model = LESAMModel(dense_net())
    model.share = 0.4
    assert way(model, tmp_path).share == 0.4


@pytest.mark.parametrize("way", [through_keras_json, through_clone])
def test_a_clone_trains_and_leaves_the_original_alone(way, tmp_path):
    model = lesam(functional_net())
    before = model.get_weights()
    clone = way(model, tmp_path)
    clone.set_weights(before)
    fit(clone)
    for a, b in zip(before, model.get_weights()):
        np.testing.assert_array_equal(a, b)
    fit(model)
    assert_same_weights(clone, model)


def test_the_weights_are_those_of_the_inner_model(tmp_path):
    net, plain = functional_net(), functional_net()
    model = fit(lesam(net))
    assert model.model is net
    for kind in ("weights", "trainable_weights", "non_trainable_weights"):
        pairs = zip(getattr(model, kind), getattr(net, kind), strict=True)
        assert all(a is b for a, b in pairs)
    assert model.count_params() == plain.count_params()
    plain.set_weights(model.get_weights())
    assert_same_weights(plain, net)
    other = lesam(functional_net())
    other.set_weights(plain.get_weights())
    assert_same_weights(other, net)


LOAD = """
import sys
import numpy as np
import keras
import keras_lesam
{imports}
for path in sys.argv[1:]:
    model = keras.models.load_model(path, safe_mode=True)
    assert type(model) is keras_lesam.LESAMModel
    data = np.load(path + ".npz")
    outputs = model.predict(data["x"], verbose=0)
    model.fit(data["x"], data["y"], epochs=2, shuffle=False, verbose=0)
    np.savez(path + ".npz", outputs, *model.get_weights())
"""


def assert_goes_on_in_another_process(nets, directory, imports="", **kwargs):
    """Saved by this one; the same outputs, then the same training."""
    x, y = classification_data(rows=96)
    models = [fit(lesam(net)) for net in nets]
    paths = [f"{directory}/{index}.keras" for index in range(len(nets))]
    for model, path in zip(models, paths):
        model.save(path)
        np.savez(f"{path}.npz", x=x, y=y)
    code = LOAD.format(imports=imports)
    run_python(code, *paths, cwd=directory, **kwargs)
    for model, path in zip(models, paths):
        outputs, *weights = np.load(f"{path}.npz").values()
        expected = model.predict(x, verbose=0)
        np.testing.assert_allclose(outputs, expected, atol=1e-6)
        for a, b in zip(weights, fit(model).get_weights(), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)


def test_a_fresh_process_needs_no_more_than_this_package(tmp_path):
    nets = [functional_net(), sequential_net(keras.Input((6,)))]
    assert_goes_on_in_another_process(nets, tmp_path)


# A module of a user: the only one that knows its class.
NETS = """
    import keras

    @keras.saving.register_keras_serializable("users")
    class Net(keras.Model):
        def __init__(self, units, **kwargs):
            super().__init__(**kwargs)
            self.units = units
            self.hidden = keras.layers.Dense(units, activation="tanh")
            self.norm = keras.layers.BatchNormalization()
            self.out = keras.layers.Dense(4)

        def call(self, x, training=None):
            return self.out(self.norm(self.hidden(x), training=training))

        def get_config(self):
            return {**super().get_config(), "units": self.units}
"""


def test_a_fresh_process_needs_the_module_of_a_subclass(tmp_path, monkeypatch):
    (tmp_path / "users_nets.py").write_text(textwrap.dedent(NETS))
    monkeypatch.syspath_prepend(tmp_path)
    import users_nets

    assert_goes_on_in_another_process(
        [users_nets.Net(8)],
        tmp_path,
        imports="import users_nets",
        PYTHONPATH=os.pathsep.join([str(ROOT), str(tmp_path)]),
    )
    del sys.modules["users_nets"]


PLAIN = """
import sys
sys.modules["keras_lesam"] = None  # importing it raises ImportError
import numpy as np
import keras
model = keras.models.load_model("plain.keras")
assert not any(name.startswith("keras_lesam.") for name in sys.modules)
np.save("outputs.npy", model.predict(np.load("x.npy"), verbose=0))
print(type(model).__name__)
"""


def test_the_inner_model_is_saved_as_a_plain_one(tmp_path):
    x, _ = classification_data(rows=96)
    model = fit(lesam(functional_net()))
    model.model.save(tmp_path / "plain.keras")
    np.save(tmp_path / "x.npy", x)
    assert run_python(PLAIN, cwd=tmp_path) == "Functional\n"
    outputs = np.load(tmp_path / "outputs.npy")
    np.testing.assert_allclose(outputs, model.predict(x, verbose=0), atol=1e-6)


def test_an_inner_model_with_a_loss_of_its_own_is_saved(tmp_path):
    layers = [keras.Input((6,)), keras.layers.Dense(4)]
    model = fit(lesam(OwnLoss(layers)))
    model.save(tmp_path / "model.keras")
    model.model.save(tmp_path / "plain.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    plain = keras.models.load_model(tmp_path / "plain.keras")
    assert type(loaded.model) is type(plain) is OwnLoss
    assert_same_weights(plain, model)
    assert_same_weights(fit(loaded), fit(model))


def test_the_inner_model_is_an_ordinary_model_throughout(capsys):
    x, y = classification_data(rows=96)
    net = functional_net()
    model = fit(lesam(net))
    assert model.model is net
    assert net.get_layer("logits").units == 4
    assert model.get_layer("logits") is net.get_layer("logits")
    net.summary()
    printed = capsys.readouterr().out
    model.summary()
    assert "logits (Dense)" in printed
    assert capsys.readouterr().out == printed
    outputs = net.predict(x, verbose=0)
    np.testing.assert_array_equal(outputs, model.predict(x, verbose=0))

    net.compile(loss=crossentropy(), metrics=["accuracy"])
    evaluated = net.evaluate(x, y, verbose=0, return_dict=True)
    assert evaluated == model.evaluate(x, y, verbose=0, return_dict=True)


@pytest.mark.parametrize("compiled", [True, False])
def test_an_inner_model_stays_compiled_as_it_was(compiled, tmp_path):
    net = functional_net()
    net.compile(keras.optimizers.Adam(0.03), crossentropy())
    fit(net)
    model = constant_lesam(net)
    if compiled:
        model.compile(keras.optimizers.SGD(0.2), "mse")
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert hasattr(loaded, "optimizer") == compiled
    assert_same_optimizer(loaded.model.optimizer, net.optimizer)
    assert_same_weights(fit(loaded.model), fit(net))
