"""What a user's own rule, budget, ascent or estimator returns: checked."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_lesam import SharpnessAwareModel
from keras_lesam import ascents
from keras_lesam import budgets
from keras_lesam import estimators
from keras_lesam import rules
from tests.helpers import assert_same_weights
from tests.helpers import classification_data
from tests.helpers import crossentropy
from tests.helpers import dense_net

MODES = pytest.mark.parametrize(
    "eagerly", [False, True], ids=["graph", "eager"]
)
NOT_A_TENSOR = ["0.1", b"1", [], {}, object(), NotImplemented, len, 1j, True]
NOT_A_SCALAR = [*NOT_A_TENSOR, np.ones(3), tf.constant("x"), [1.0, 2.0]]
IDS = {"ids": lambda value: type(value).__name__}


def refused(match, eagerly=True, **parts):
    """Nothing is trained, and the error has the name of class and method."""
    x, y = classification_data(rows=8)
    net, same = dense_net(), dense_net()

    def train():
        model = SharpnessAwareModel(net, **parts)
        model.compile("sgd", crossentropy(), run_eagerly=eagerly)
        model.fit(x, y, verbose=0)

    with pytest.raises((TypeError, ValueError), match=match) as info:
        train()
    assert "Received" in str(info.value)
    assert_same_weights(net, same)


def accepted(**parts):
    x, y = classification_data(rows=8)
    model = SharpnessAwareModel(dense_net(), **parts)
    model.compile("sgd", crossentropy(), run_eagerly=True)
    history = model.fit(x, y, verbose=0).history
    assert all(np.isfinite(w).all() for w in model.get_weights())
    return history


def rule_with(**methods):
    return type("Mine", (rules.SAM,), methods)(0.05)


def eps_of(change):
    """A rule whose `eps` is changed afterwards."""

    def perturb(self, *args):
        found = rules.SAM.perturb(self, *args)
        return found._replace(eps=change(found.eps))

    return rule_with(perturb=perturb)


@pytest.mark.parametrize(
    "value",
    [*NOT_A_TENSOR, None, 0.1, np.ones(3), tf.ones(()), ([], 0, 0)],
    **IDS,
)
def test_perturb_returns_something_else(value):
    rule = rule_with(perturb=lambda self, *args: value)
    refused(r"`Mine\.perturb` must return a Perturbation", rule=rule)


EPS = {
    "a tensor": lambda eps: eps[0],
    "none": lambda eps: None,
    "a string": lambda eps: "eps",
    "shorter": lambda eps: eps[:-1],
    "longer": lambda eps: [*eps, eps[0]],
    "empty": lambda eps: [],
    "strings": lambda eps: ["1"] * len(eps),
    "other shapes": lambda eps: eps[::-1],
    "flat": lambda eps: [tf.reshape(e, [-1]) for e in eps],
    "scalars": lambda eps: [0.1] * len(eps),
    "integers": lambda eps: [tf.cast(e, tf.int32) for e in eps],
    "complex": lambda eps: [tf.cast(e, tf.complex64) for e in eps],
    "not implemented": lambda eps: [NotImplemented] * len(eps),
}


@MODES
@pytest.mark.parametrize("name", EPS)
def test_eps_is_not_like_the_weights(name, eagerly):
    refused(r"`Mine\.perturb` must.*`eps`", eagerly, rule=eps_of(EPS[name]))


@pytest.mark.parametrize("name", EPS)
def test_eps_of_a_step_of_one_pass(name):
    refused(
        r"`Mine\.perturb` must.*`eps`",
        rule=eps_of(EPS[name]),
        ascent=ascents.Previous(),
    )


def test_eps_that_is_like_the_weights():
    for change in (
        lambda eps: [None] * len(eps),
        lambda eps: [eps[0], *[None] * (len(eps) - 1)],
        lambda eps: tuple(e.numpy() if hasattr(e, "numpy") else e for e in eps),
        lambda eps: [tf.cast(e, tf.float64) for e in eps],
        lambda eps: [np.zeros(e.shape, "float32") for e in eps],
    ):
        accepted(rule=eps_of(change))


@pytest.mark.parametrize("value", [*NOT_A_SCALAR, None], **IDS)
@pytest.mark.parametrize("name", ["radius", "norm"])
def test_numbers_of_a_perturbation(name, value):
    def perturb(self, *args):
        found = rules.SAM.perturb(self, *args)
        return found._replace(**{name: value})

    rule = rule_with(perturb=perturb)
    refused(r"`Mine\.perturb` must return a scalar tensor", rule=rule)


@pytest.mark.parametrize("value", [*NOT_A_SCALAR, None], **IDS)
def test_radius(value):
    rule = rule_with(radius=lambda self, *args: value)
    refused(r"`Mine\.radius` must return a scalar tensor", rule=rule)


@pytest.mark.parametrize(
    "value", [*NOT_A_TENSOR, None, tf.ones(3), [None]], **IDS
)
def test_scaling(value):
    rule = rule_with(scaling=lambda self, weights: value)
    refused(r"`Mine\.scaling` must return `T`, a list", rule=rule)


@pytest.mark.parametrize(
    "value", [*NOT_A_TENSOR, None, 0.1, tf.ones(()), (1,), (1, 2, 3)], **IDS
)
def test_update_is_no_pair(value):
    rule = rule_with(update=lambda self, *args: value)
    refused(r"`Mine\.update` must return a pair", rule=rule)


@pytest.mark.parametrize("name", EPS)
def test_updates_are_not_like_the_weights(name):
    def update(self, plain, perturbed, state):
        return EPS[name]([*perturbed]), state

    refused(r"`Mine\.update` must.*gradients", rule=rule_with(update=update))


STATES = [
    *NOT_A_TENSOR[:3],
    3,
    {1: tf.ones(())},
    {"a": "b"},
    {"a": (1, 2)},
    None,
]


@pytest.mark.parametrize("value", STATES, **IDS)
@pytest.mark.parametrize("part", ["rule", "budget", "ascent", "curvature"])
def test_first_states(part, value):
    kind, arguments = {
        "rule": (rules.LossEquated, ()),
        "budget": (budgets.Constant, (0.1,)),
        "ascent": (ascents.FullBatch, ()),
        "curvature": (estimators.FirstOrder, ()),
    }[part]
    mine = type("Mine", (kind,), {"init_state": lambda *args: value})
    refused(
        r"`Mine\.init_state` must return a dict", **{part: mine(*arguments)}
    )


LATER_STATES = [*STATES, {}, {"other": tf.ones(())}, {"n": tf.ones(3)}]


@pytest.mark.parametrize("value", LATER_STATES, **IDS)
@pytest.mark.parametrize("part", ["rule", "budget", "curvature"])
def test_later_states(part, value):
    def state(*args):
        return {"n": tf.zeros(())}

    def update_rule(self, plain, perturbed, old):
        return perturbed, value

    kind, arguments, update = {
        "rule": (rules.LossEquated, (), update_rule),
        "budget": (budgets.Constant, (0.1,), lambda *args: value),
        "curvature": (estimators.FirstOrder, (), lambda *args: value),
    }[part]
    mine = type("Mine", (kind,), {"init_state": state, "update": update})
    refused(r"update` must return a", **{part: mine(*arguments)})


@MODES
@pytest.mark.parametrize("late", [False, True], ids=["at once", "by losses"])
@pytest.mark.parametrize("value", NOT_A_SCALAR, **IDS)
def test_budgets(value, late, eagerly):
    def call(self, progress, losses, state):
        return None if late and losses is None else value

    mine = type("Mine", (budgets.Budget,), {"__call__": call})()
    refused(
        r"`Mine\.__call__` must return a scalar tensor",
        eagerly,
        rule=rules.LossEquated(),
        budget=mine,
    )


@pytest.mark.parametrize(
    "value",
    [0.1, 1, np.float64(0.1), np.array(0.1), tf.constant(0.1, tf.float64)],
    ids=str,
)
@pytest.mark.parametrize("late", [False, True], ids=["at once", "by losses"])
def test_budgets_that_are_numbers(value, late):
    def call(self, progress, losses, state):
        return None if late and losses is None else value

    mine = type("Mine", (budgets.Budget,), {"__call__": call})()
    history = accepted(rule=rules.LossEquated(), budget=mine)
    assert history["sigma"][0] == pytest.approx(float(value))


@pytest.mark.usefixtures("float64")
def test_a_number_of_python_is_not_rounded():
    mine = type("Mine", (budgets.Budget,), {"__call__": lambda *args: 0.1})()
    assert accepted(rule=rules.LossEquated(), budget=mine)["sigma"] == [0.1]


@pytest.mark.parametrize(
    "value", [value for value in NOT_A_SCALAR if value is not len], **IDS
)
@pytest.mark.parametrize("by_direction", [False, True])
def test_estimates(value, by_direction):
    def estimate(self, first, state):
        return (lambda direction: value) if by_direction else value

    mine = type(
        "Mine", (estimators.CurvatureEstimator,), {"estimate": estimate}
    )
    refused(
        r"`Mine\.estimate` must return a scalar tensor",
        rule=rules.LossEquated(),
        curvature=mine(),
    )


@pytest.mark.parametrize(
    "value",
    [v for v in NOT_A_SCALAR if v is not True] + [0.5, tf.constant([True])],
    **IDS,
)
@pytest.mark.parametrize("kind", [ascents.FullBatch, ascents.Previous])
def test_gates(kind, value):
    mine = type("Mine", (kind,), {"gate": lambda self, progress: value})()
    refused(r"`Mine\.gate` must return a bool scalar", ascent=mine)


@pytest.mark.parametrize("value", [True, False, np.True_, tf.constant(True)])
def test_gates_that_are_bools(value):
    mine = type("Mine", (ascents.FullBatch,), {"gate": lambda *args: value})()
    accepted(ascent=mine)


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("value", [*NOT_A_TENSOR, None, tf.ones(())], **IDS)
def test_steps(value, splits):
    mine = type("Mine", (ascents.FullBatch,), {"step": lambda *args: value})()
    refused(
        r"`Mine\.step` must return a Step",
        ascent=mine,
        num_batch_splits=splits,
    )


@pytest.mark.parametrize("value", [*NOT_A_TENSOR, None, (1, 2)], **IDS)
def test_runs(value):
    mine = type("Mine", (ascents.FullBatch,), {"run": lambda *args: value})()
    refused(r"`Mine\.run` must return what `report`", ascent=mine)


def test_a_wrong_result_is_refused_with_two_replicas():
    from tests.helpers import mirrored

    with mirrored(2).scope():
        model = SharpnessAwareModel(dense_net(), eps_of(lambda eps: eps[0]))
        model.compile(keras.optimizers.SGD(0.1), crossentropy())
    x, y = classification_data(rows=8)
    with pytest.raises(TypeError, match=r"`Mine\.perturb` must return `eps`"):
        model.fit(x, y, verbose=0)
