"""Wrappers of models that are not built yet, and files that cross over."""

import json

import keras
import numpy as np
import pytest

from keras_lesam import LESAMModel
from keras_lesam import SAMModel
from keras_lesam import SharpnessAwareModel
from keras_lesam import budgets
from keras_lesam import rules
from tests.helpers import assert_same_weights
from tests.helpers import classification_data
from tests.helpers import crossentropy
from tests.helpers import train

LAYERS = keras.layers


def sequential():
    return keras.Sequential(
        [
            LAYERS.Dense(8, activation="tanh"),
            LAYERS.BatchNormalization(),
            LAYERS.Dense(4),
        ]
    )


def functional():
    inputs = keras.Input((6,))
    x = LAYERS.Dense(8, activation="tanh")(inputs)
    x = LAYERS.Add()([x, LAYERS.BatchNormalization()(x)])
    return keras.Model(inputs, LAYERS.Dense(4)(x))


def nested():
    """Of the class of its only layer."""
    return keras.Sequential([sequential()])


@keras.saving.register_keras_serializable("tests")
class WithVariables(keras.Model):
    """Layers before and after `layers`, variables and a metric of its own."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.body = LAYERS.Dense(4)
        self.model = LAYERS.Dense(4)
        self.zeta = [LAYERS.Dense(4, activation="tanh") for _ in range(2)]
        self._hidden = LAYERS.Dense(4)
        self.seen = keras.metrics.Sum(name="seen")

    def build(self, input_shape):
        self.scale = self.add_weight(
            shape=(input_shape[-1],), initializer="ones", name="scale"
        )
        x = input_shape
        for layer in (self.body, self.model, *self.zeta, self._hidden):
            layer.build(x)
            x = layer.compute_output_shape(x)
        super().build(input_shape)

    def call(self, x, training=False):
        if training:
            self.seen.update_state(1.0)
        x = self.model(self.body(x * self.scale))
        for layer in self.zeta:
            x = layer(x)
        return self._hidden(x)


@keras.saving.register_keras_serializable("tests")
class Plain(keras.Model):
    """Without `build`."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.first = LAYERS.Dense(8, activation="tanh")
        self.out = LAYERS.Dense(4)

    def call(self, x):
        return self.out(self.first(x))


NETS = {
    "sequential": sequential,
    "functional": functional,
    "nested": nested,
    "subclass": WithVariables,
    "subclass without build": Plain,
}
every_net = pytest.mark.parametrize("net", NETS.values(), ids=NETS)
WRAPS = {
    "plain rule": lambda net: SAMModel(net, rules.SAM(0.1)),
    "momentum": lambda net: LESAMModel(
        net, ascent_from="momentum", warmup=0, anneal=0
    ),
    "friendly": lambda net: SAMModel(net, rules.FriendlySAM(0.1)),
    "looksam": lambda net: SharpnessAwareModel(net, rules.LookSAM(0.1)),
}
every_wrap = pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)


def compiled(model):
    optimizer = keras.optimizers.SGD(0.05, momentum=0.9)
    model.compile(optimizer, crossentropy(), metrics=["accuracy"])
    return model


def fit(model, epochs=2):
    x, y = classification_data(rows=48)
    model.fit(*(x, y), epochs=epochs, batch_size=16, shuffle=False, verbose=0)
    return model


def outputs(model):
    return model.predict(classification_data(rows=48)[0], verbose=0)


# Building.


def by_shape(model, config):
    model.build((None, 6))


def by_config(model, config):
    """As KerasTuner's `get_best_models` does, from a file."""
    if not model.built:
        model.build_from_config(json.loads(json.dumps(config)))


def by_call(model, config):
    model(classification_data(rows=1)[0])


def by_predict(model, config):
    outputs(model)


def by_the_inner_model(model, config):
    model.model(classification_data(rows=1)[0])


WAYS = (by_shape, by_config, by_call, by_predict, by_the_inner_model)


@every_net
@pytest.mark.parametrize(
    ("wrap", "way"),
    zip(["friendly", "momentum", "looksam", "plain rule", "momentum"], WAYS),
)
def test_built_then_loaded_then_trained(way, net, wrap, tmp_path):
    """Ends where an uninterrupted training ends: the state is loaded."""
    wrap = WRAPS[wrap]
    first = fit(compiled(wrap(net())))
    path = tmp_path / "w.weights.h5"
    first.save_weights(path)
    keras.utils.set_random_seed(7)
    second = compiled(wrap(net()))
    way(second, first.get_build_config())
    assert second.built
    assert second.model.built
    second.optimizer.build(second.trainable_variables)
    second.load_weights(path)
    np.testing.assert_array_equal(outputs(second), outputs(first))
    assert_same_weights(second.model, first.model)
    fit(first)
    fit(second)
    assert_same_weights(second, first)


@every_net
def test_built_follows_the_inner_model(net, tmp_path):
    model = LESAMModel(net())
    assert model.built == model.model.built
    if not model.built:
        with pytest.raises(ValueError, match="not yet been built"):
            model.save_weights(tmp_path / "w.weights.h5")
    model.model(np.zeros((1, 6)))
    assert model.built
    model.save_weights(tmp_path / "w.weights.h5")
    model.load_weights(tmp_path / "w.weights.h5")


def test_build_makes_weights_and_state():
    model = SAMModel(sequential(), rules.FriendlySAM(0.1))
    model.build(input_shape=(None, 6))
    assert len(model.model.weights) == 8
    assert len(model.weights) == 8 + 6
    weights = model.get_weights()
    model.build((None, 6))
    # As the model itself would.
    with pytest.raises(ValueError, match="already been configured"):
        model.build((None, 3))
    for a, b in zip(weights, model.get_weights()):
        np.testing.assert_array_equal(a, b)


class Two(keras.Model):
    def __init__(self):
        super().__init__()
        self.left, self.right = LAYERS.Dense(2), LAYERS.Dense(2)

    def call(self, a, b):
        return self.left(a) + self.right(b)


class Failing(Two):
    def call(self, a):
        raise RuntimeError("only on data")


def test_build_by_several_shapes():
    for shapes in ({"a_shape": (None, 3), "b_shape": (None, 5)}, None):
        model = LESAMModel(Two())
        if shapes:
            model.build(**shapes)
        else:
            model.build((None, 3), (None, 5))
        assert [w.shape for w in model.weights] == [
            *((3, 2), (2,), (5, 2), (2,))
        ]
    again = LESAMModel(Two())
    again.build_from_config(
        {"shapes_dict": {"a_shape": (None, 3), "b_shape": (None, 5)}}
    )
    assert len(again.weights) == 4


def test_building_again_is_for_the_inner_model():
    """Which refuses another shape, if it would by itself."""
    net = keras.Sequential([keras.Input((6,)), LAYERS.Dense(4)])
    for model in (net, LESAMModel(net)):
        model.build((None, 6))
        with pytest.raises(ValueError, match="has already been configured"):
            model.build((None, 7))
    for build in (functional, Plain):
        net = build()
        net(np.zeros((1, 6)))
        before = [v.path for v in net.weights]
        LESAMModel(net).build((None, 6))
        assert [v.path for v in net.weights] == before


def test_what_cannot_be_built_by_shapes_says_so():
    with pytest.raises(ValueError, match=r"by shapes alone; call it on a b.*6"):
        LESAMModel(Failing()).build((None, 6))


def test_paths_of_variables_are_those_of_a_call():
    built = LESAMModel(Plain(name="net"), name="w")
    keras.utils.clear_session(free_memory=False)
    called = LESAMModel(Plain(name="net"), name="w")
    built.build((None, 6))
    called(np.zeros((1, 6)))
    assert [v.path for v in built.weights] == [v.path for v in called.weights]


# Files.


def into_net(tmp_path, wrapper, net):
    """A wrapper's weights file in the model without it."""
    wrapper.save_weights(tmp_path / "w.weights.h5")
    net.load_weights(tmp_path / "w.weights.h5")


def into_net_sharded(tmp_path, wrapper, net):
    wrapper.save_weights(tmp_path / "w.weights.json", max_shard_size=1)
    net.load_weights(tmp_path / "w.weights.json")


def into_net_skipping(tmp_path, wrapper, net):
    wrapper.save_weights(tmp_path / "w.weights.h5")
    net.load_weights(tmp_path / "w.weights.h5", skip_mismatch=True)


@every_net
@pytest.mark.parametrize(
    ("wrap", "way"),
    [
        (WRAPS["plain rule"], into_net),
        (WRAPS["friendly"], into_net),
        (WRAPS["momentum"], into_net_skipping),
    ],
)
def test_a_wrappers_file_in_the_net(way, net, wrap, tmp_path, recwarn):
    wrapper = fit(compiled(wrap(net())))
    keras.utils.set_random_seed(7)
    plain = compiled(net())
    plain(np.zeros((1, 6)))
    plain.optimizer.build(plain.trainable_variables)
    way(tmp_path, wrapper, plain)
    np.testing.assert_array_equal(outputs(plain), outputs(wrapper))
    assert_same_weights(plain, wrapper.model)
    # What is plain Keras's of the training, too.
    pairs = zip(
        plain.optimizer.variables, wrapper.optimizer.variables, strict=True
    )
    for a, b in pairs:
        np.testing.assert_array_equal(a, b)
    assert not [w for w in recwarn if "could not be loaded" in str(w.message)]


def weights_file(net, path):
    net.save_weights(path / "n.weights.h5")
    return path / "n.weights.h5"


def sharded_file(net, path):
    net.save_weights(path / "n.weights.json", max_shard_size=1)
    return path / "n.weights.json"


def keras_file(net, path):
    net.save(path / "n.keras")
    return path / "n.keras"


KINDS = (weights_file, sharded_file, keras_file)


@every_net
@pytest.mark.parametrize(
    ("save", "wrap"),
    zip(KINDS, [WRAPS["friendly"], WRAPS["momentum"], WRAPS["plain rule"]]),
)
def test_a_nets_file_in_the_wrapper(save, net, wrap, tmp_path):
    plain = fit(compiled(net()))
    path = save(plain, tmp_path)
    keras.utils.set_random_seed(7)
    wrapper = compiled(wrap(net()))
    wrapper.build((None, 6))
    wrapper.optimizer.build(wrapper.trainable_variables)
    wrapper.load_weights(path)
    assert_same_weights(wrapper.model, plain)
    assert int(wrapper.optimizer.iterations) == 6
    assert getattr(wrapper.model, "optimizer", None) is None
    fit(wrapper)


@every_net
@pytest.mark.parametrize(
    ("save", "wrap"),
    zip(KINDS, [WRAPS["momentum"], WRAPS["looksam"], WRAPS["friendly"]]),
)
def test_a_wrappers_file_in_the_wrapper(save, net, wrap, tmp_path):
    first = fit(compiled(wrap(net())))
    path = save(first, tmp_path)
    keras.utils.set_random_seed(7)
    second = compiled(wrap(net()))
    second.build((None, 6))
    second.optimizer.build(second.trainable_variables)
    second.load_weights(path)
    assert_same_weights(second, first)
    assert_same_weights(fit(second), fit(first))


@every_net
def test_nothing_is_saved_twice(net, tmp_path):
    """But for the few variables that a model has beside its layers."""
    wrapper = fit(compiled(WRAPS["plain rule"](net())))
    plain = fit(compiled(net()))
    wrapper.save_weights(tmp_path / "wrapper.weights.h5")
    plain.save_weights(tmp_path / "plain.weights.h5")
    sizes = [
        (tmp_path / f"{name}.weights.h5").stat().st_size
        for name in ("wrapper", "plain")
    ]
    assert sizes[0] < sizes[1] + 10_000
    saved = wrapper.model.weights
    assert len({id(v) for v in saved}) == len(saved)


def test_sharded_into_the_net(tmp_path):
    wrapper = fit(compiled(WRAPS["friendly"](functional())))
    plain = functional()
    into_net_sharded(tmp_path, wrapper, plain)
    assert_same_weights(plain, wrapper.model)


def by_method(model, path):
    model.save(path)


SAVES = (by_method, keras.models.save_model)


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("net", [functional, sequential])
def test_the_legacy_format(net, save, tmp_path):
    x, y = classification_data(rows=48)
    model = fit(compiled(LESAMModel(net(), 0.3, warmup=0, anneal=0)))
    save(model, tmp_path / "model.h5")
    loaded = keras.models.load_model(tmp_path / "model.h5")
    assert type(loaded) is LESAMModel
    assert loaded.sigma == 0.3
    np.testing.assert_array_equal(outputs(loaded), outputs(model))
    train(loaded, x, y)
    fresh = LESAMModel(net())
    fresh.build((None, 6))
    fresh.load_weights(tmp_path / "model.h5")
    assert_same_weights(fresh.model, model.model)


STATES = {
    **{name: WRAPS[name] for name in ("momentum", "friendly", "looksam")},
    # No weights: how much the gradient changes, a reference loss.
    "default": LESAMModel,
    "no limit": lambda net: LESAMModel(net, budgets.Relative(0.3)),
}


@pytest.mark.parametrize("wrap", STATES.values(), ids=STATES)
def test_a_state_is_not_lost_in_the_legacy_format(wrap, tmp_path):
    model = fit(compiled(wrap(functional())))
    for save in SAVES:
        with pytest.raises(ValueError, match="legacy HDF5 format: save it as"):
            save(model, tmp_path / "model.h5")
    model.save(tmp_path / "model.keras")
    model.model.save(tmp_path / "net.h5")
    loaded = keras.models.load_model(tmp_path / "net.h5")
    np.testing.assert_array_equal(outputs(loaded), outputs(model))


def stack(*units):
    inputs = x = keras.Input((6,))
    for index, number in enumerate(units):
        x = LAYERS.Dense(number, name=f"layer_{index}")(x)
    return keras.Model(inputs, x)


@pytest.mark.parametrize("units", [(8, 5), (7, 4), (8, 4, 4)])
@pytest.mark.parametrize("suffix", [".weights.h5", ".keras"])
@pytest.mark.filterwarnings("ignore:.*could not be loaded")
def test_a_file_that_does_not_fit(suffix, units, tmp_path):
    """The error names what the inner model's own would name."""
    errors = []
    for wrap in (lambda net: net, LESAMModel):
        path = tmp_path / f"model{suffix}"
        saved = wrap(stack(8, 4))
        if suffix == ".keras":
            saved.save(path)
        else:
            saved.save_weights(path)
        keras.utils.clear_session()
        model = wrap(stack(*units))
        with pytest.raises(ValueError, match="could not be loaded") as error:
            model.load_weights(path)
        # As far as the random numbers in it.
        errors.append(str(error.value).partition("value=[")[0])
        before = model.get_weights()
        model.load_weights(path, skip_mismatch=True)
        kept = [np.array_equal(*w) for w in zip(before, model.get_weights())]
        errors.append(kept)
    assert errors[:2] == errors[2:]


def test_files_that_are_not_there():
    model = LESAMModel(functional())
    for name in ("none.weights.h5", "none.keras"):
        with pytest.raises((OSError, ValueError)):
            model.load_weights(name)


class Dynamic(LAYERS.Layer):
    """A layer that cannot tell the shape of its output."""

    def call(self, inputs):
        return inputs + 1.0

    def compute_output_spec(self, *args, **kwargs):
        raise NotImplementedError


def test_a_model_of_no_known_shape_is_called():
    model = LESAMModel(keras.Sequential([Dynamic()]))
    x = np.ones((3, 2), "float32")
    np.testing.assert_array_equal(model(x), x + 1)
    np.testing.assert_array_equal(model(x), x + 1)
