"""The owner of what a step leaves for the next: names, files, structure."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_lesam import LESAMModel
from keras_lesam import SAMModel
from keras_lesam import SharpnessAwareModel
from keras_lesam import ascents
from keras_lesam import rules
from keras_lesam._state import Numbers
from keras_lesam._state import StepState
from tests.helpers import assert_same_weights
from tests.helpers import classification_data
from tests.helpers import crossentropy
from tests.helpers import dense_net
from tests.helpers import train

STATES = {
    "budget": {},
    "curvature": {"means": tf.constant([1.0, 2.0])},
    "ascent": {},
    "rule": {"mean": [tf.constant([3.0]), None, tf.constant([[4.0]])]},
}


def built(states=None, positions=(0, 2, 5)):
    state = StepState(lambda value, name: keras.Variable(value, name=name))
    state.build(states or STATES, [*positions])
    return state


class Store(dict):
    """What Keras hands to `save_own_variables`."""


def test_names():
    assert [*built().variables] == [
        *("curvature.means", "rule.mean.0", "rule.mean.5")
    ]


def test_reads_what_was_assigned():
    state = built()
    before = state.read()
    np.testing.assert_array_equal(before["rule"]["mean"][2], [[4.0]])
    assert before["rule"]["mean"][1] is None
    after = {
        **before,
        "rule": {"mean": [tf.constant([7.0]), None, tf.constant([[8.0]])]},
    }
    state.assign(after, before)
    np.testing.assert_array_equal(state.read()["rule"]["mean"][0], [7.0])
    np.testing.assert_array_equal(state.read()["curvature"]["means"], [1, 2])


def test_what_stays_is_not_written():
    state = built()
    before = state.read()

    def refuse(value):
        raise AssertionError

    for variable in state.variables.values():
        variable.assign = refuse
    state.assign(dict(before), before)


@pytest.mark.parametrize(
    "wrong",
    [{}, {"mean": [tf.constant([3.0])]}, {"other": tf.constant(1.0)}],
    ids=["none", "short", "other"],
)
def test_a_state_of_another_structure_is_refused(wrong):
    state = built()
    with pytest.raises(ValueError, match="`update` must return a state like"):
        state.assign({**STATES, "rule": wrong}, state.read())


def test_a_list_that_is_not_like_the_weights_is_refused():
    with pytest.raises(ValueError, match=r"'rule.mean'.*list of 3, for 2"):
        built(positions=(0, 1))


def test_building_again_keeps_what_is_there():
    state = built()
    first = dict(state.variables)
    first["rule.mean.0"].assign([9.0])
    grown = {**STATES, "rule": {"mean": [tf.zeros(1)] * 3}}
    state.build(grown, [0, 2, 5])
    assert [*state.variables] == [*first, "rule.mean.2"]
    np.testing.assert_array_equal(state.read()["rule"]["mean"][0], [9.0])


def test_files_by_name():
    store = Store()
    first = built()
    first.variables["rule.mean.5"].assign([[6.0]])
    first.save(store)
    second = built()
    second.load(store)
    np.testing.assert_array_equal(second.read()["rule"]["mean"][2], [[6.0]])


def test_files_of_another_state_leave_it_as_it_is():
    second = built()
    second.load(Store({"rule.orthogonal.0": np.array([9.0])}))
    second.load(Store())
    second.load(Store({"0": np.array([9.0])}))
    np.testing.assert_array_equal(second.read()["rule"]["mean"][0], [3.0])


def test_files_of_another_shape_are_refused_by_name():
    with pytest.raises(ValueError, match=r"'rule.mean.0'.*\(2,\).*\(1,\)"):
        built().load(Store({"rule.mean.0": np.zeros(2)}))


def test_numbers_are_read_from_variables():
    rule = rules.LossEquated(rho_max=1.0)
    numbers = Numbers({"rule": rule}, "float32")
    bound = numbers.bind("rule", rule)
    assert float(bound.rho_max) == 1.0
    assert rule.rho_max == 1.0
    numbers.assign("rule", rule.replace(rho_max=None))
    # No cap is a number too: an infinity would be a fault in a healthy graph.
    assert float(numbers.bind("rule", rule).rho_max) == np.finfo("f4").max


# In models.

RULES = {
    "friendly": lambda: SAMModel(unbuilt(), rules.FriendlySAM(0.1)),
    "looksam": lambda: SAMModel(unbuilt(), rules.LookSAM(0.1, every=2)),
    "momentum": lambda: SAMModel(
        unbuilt(), rules.SAM(0.1), ascent_from="momentum"
    ),
    "secant": lambda: LESAMModel(
        unbuilt(), 0.1, curvature="secant", warmup=0, anneal=0
    ),
}


def unbuilt():
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [keras.layers.Dense(8, activation="tanh"), keras.layers.Dense(4)]
    )


def compiled(name):
    model = RULES[name]()
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), crossentropy())
    # As BackupAndRestore asks for; the wrapper was made before.
    model(classification_data(rows=1)[0])
    return model


def fit(model, epochs, **options):
    x, y = classification_data(rows=48)
    return model.fit(
        *(x, y),
        **{"epochs": epochs, "batch_size": 8, "shuffle": False, "verbose": 0},
        **options,
    )


class Interrupt(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 2:
            raise KeyboardInterrupt


@pytest.mark.parametrize("name", RULES)
def test_a_backup_is_resumed_where_the_model_was_not_built(name, tmp_path):
    """The state too: it is there before the backup is loaded."""
    whole = compiled(name)
    fit(whole, epochs=4)
    with pytest.raises(KeyboardInterrupt):
        fit(
            *(compiled(name), 4),
            callbacks=[
                keras.callbacks.BackupAndRestore(tmp_path / "backup"),
                Interrupt(),
            ],
        )
    keras.utils.clear_session()
    resumed = compiled(name)
    fit(
        *(resumed, 4),
        callbacks=[keras.callbacks.BackupAndRestore(tmp_path / "backup")],
    )
    assert_same_weights(resumed.model, whole.model)
    assert_same_weights(resumed, whole)


def test_states_of_different_kinds_do_not_load_into_each_other(tmp_path):
    """LookSAM's and momentum's are of one shape."""
    look, momentum = compiled("looksam"), compiled("momentum")
    for model in (look, momentum):
        fit(model, epochs=1)
    look.save_weights(tmp_path / "look.weights.h5")
    before = [v.numpy() for v in momentum._state.variables.values()]
    momentum.load_weights(tmp_path / "look.weights.h5")
    assert_same_weights(momentum.model, look.model)
    for a, b in zip(before, momentum._state.variables.values()):
        np.testing.assert_array_equal(a, b.numpy())


def test_a_frozen_layer_does_not_shift_the_state(tmp_path):
    """Names go by the position among all weights."""
    x, y = classification_data()

    def model():
        net = dense_net()
        return net, SAMModel(net, rules.FriendlySAM(0.1))

    _, first = model()
    train(first, x, y)
    first.save_weights(tmp_path / "all.weights.h5")
    net, second = model()
    net.layers[0].trainable = False
    second.compile(keras.optimizers.SGD(0.1), crossentropy())
    second.load_weights(tmp_path / "all.weights.h5", skip_mismatch=True)
    for name, variable in first._state.variables.items():
        np.testing.assert_array_equal(
            variable.numpy(), second._state.variables[name].numpy()
        )


def test_layers_that_are_unfrozen_get_their_state():
    x, y = classification_data()
    net = dense_net()
    net.layers[0].trainable = False
    model = SharpnessAwareModel(net, rules.SAM(0.1), ascent=ascents.Momentum())
    train(model, x, y)
    assert [*model._state.variables] == ["ascent.mean.2", "ascent.mean.3"]
    net.layers[0].trainable = True
    train(model, x, y)
    assert len(model._state.variables) == 4
    assert all(np.any(v.numpy()) for v in model._state.variables.values())
