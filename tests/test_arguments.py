"""Bad arguments: refused by name, before anything happens."""

import inspect
import math

import keras
import numpy as np
import pytest
from hypothesis import example
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

from keras_lesam import LESAMModel
from keras_lesam import SAMModel
from keras_lesam import SharpnessAwareModel
from keras_lesam import budgets
from keras_lesam import rules
from tests.helpers import assert_same_weights
from tests.helpers import classification_data
from tests.helpers import constant_lesam
from tests.helpers import crossentropy
from tests.helpers import dense_net
from tests.helpers import noisy_net
from tests.helpers import train

SCHEDULE = keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.9)
NOT_NUMBERS = [
    *("0.1", b"1", "", True, False, np.True_, np.array(True)),
    *([0.1], (0.1,), {}, np.array([0.1]), 1j, np.complex64(1), object, len),
]
NOT_FINITE = [math.nan, math.inf, -math.inf, np.float32("nan")]
NUMBERS = {
    "sigma": [-0.1, -1, np.float64(-1e-9)],
    "rho_max": [-1.0, 0.0, 0],
    "warmup": [-0.1, 1.1],
    "anneal": [-0.1, 2],
    "alpha": [-0.1, 1.5],
    "ascent_fraction": [0.0, -0.5, 1.01],
}
BAD_VALUES = [
    (name, value)
    for name, values in NUMBERS.items()
    for value in [*values, *NOT_FINITE]
] + [
    ("total_steps", 0),
    ("total_steps", -5),
    ("num_batch_splits", 0),
    ("num_batch_splits", -1),
    ("curvature", "exact"),
    ("curvature", None),
    ("curvature", 1),
    ("perturbation_scope", "worker"),
    ("perturbation_scope", True),
    ("perturbation_scope", None),
    ("curvature", ["none"]),
]
BAD_TYPES = [(name, value) for name in NUMBERS for value in NOT_NUMBERS] + [
    ("sigma", None),
    ("alpha", None),
    ("ascent_fraction", None),
    ("total_steps", 1.0),
    ("total_steps", "10"),
    ("total_steps", True),
    ("total_steps", math.nan),
    ("total_steps", [5]),
    ("total_steps", SCHEDULE),
    ("num_batch_splits", 2.0),
    ("num_batch_splits", None),
    ("num_batch_splits", False),
    ("num_batch_splits", np.True_),
    ("num_batch_splits", 2j),
    ("num_batch_splits", math.inf),
    ("adaptive", 1),
    ("adaptive", None),
    ("adaptive", "yes"),
    ("adaptive", 0.0),
    ("adaptive", [True]),
    ("perturb", "kernel"),
    ("perturb", True),
    ("perturb", ["kernel"]),
    ("sigma", keras.optimizers.schedules.ExponentialDecay),
    ("name", 3),
]


@pytest.fixture(scope="module")
def net():
    return dense_net()


@pytest.mark.parametrize(("name", "value"), BAD_VALUES)
def test_bad_value(net, name, value):
    with pytest.raises(ValueError, match=f"`{name}`.*Received: {name}="):
        LESAMModel(net, **{name: value})


@pytest.mark.parametrize(("name", "value"), BAD_TYPES)
def test_bad_type(net, name, value):
    with pytest.raises(TypeError, match=f"`{name}`.*Received: {name}="):
        LESAMModel(net, **{name: value})


def test_the_message_says_what_was_received(net):
    with pytest.raises(ValueError, match=r"Received: rho_max=-1\.0$"):
        LESAMModel(net, rho_max=-1.0)


@pytest.mark.parametrize("shares", [(0.6, 0.5), (1.0, 0.001)])
def test_shares_of_more_than_the_whole(net, shares):
    message = r"at most 1\. Received: warmup={}, anneal={}$".format(*shares)
    with pytest.raises(ValueError, match=message):
        LESAMModel(net, warmup=shares[0], anneal=shares[1])


@pytest.mark.parametrize("shares", [(0.3, 0.7), (0.9, 0.1), (1, 0), (0, 1)])
def test_shares_of_just_the_whole(net, shares):
    model = LESAMModel(net, warmup=shares[0], anneal=shares[1])
    assert (model.warmup, model.anneal) == shares


@pytest.mark.parametrize("name", ["warmup", "anneal"])
@pytest.mark.parametrize("value", [0.0, 0.1, 0.2])
def test_a_schedule_leaves_no_shares(net, name, value):
    message = f"`sigma` is a schedule.*Received:.*{name}={value}"
    with pytest.raises(ValueError, match=message):
        LESAMModel(net, SCHEDULE, **{name: value})
    assert LESAMModel(net, SCHEDULE).warmup == 0.0


NOT_MODELS = [
    *(None, "model", 3.0, len, keras.Model, keras.layers.Dense(3)),
    *(keras.Input((6,)), keras.optimizers.SGD(), [keras.layers.Dense(3)]),
]


@pytest.mark.parametrize("model", NOT_MODELS, ids=lambda m: type(m).__name__)
def test_not_a_model(model):
    with pytest.raises(TypeError, match=r"must be a keras\.Model.*Received"):
        LESAMModel(model)


def test_a_wrapped_model_is_not_wrapped_again():
    class Subclass(LESAMModel):
        pass

    for cls in (LESAMModel, Subclass):
        model = cls(dense_net())
        with pytest.raises(ValueError, match=r"wrap its `\.model`.*Received"):
            LESAMModel(model)
        assert LESAMModel(model.model).model is model.model


@pytest.mark.parametrize("mode", [{}, {"run_eagerly": True}], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"num_batch_splits": 2}, {"ascent_fraction": 0.5}], ids=str
)
def test_a_choice_of_no_weights_is_refused_before_training(options, mode):
    x, y = classification_data(rows=32, shape=(8, 8, 1))
    net, same = noisy_net(), noisy_net()
    model = LESAMModel(net, perturb=lambda variable: False, **options)
    with pytest.raises(ValueError, match=r"`perturb` selects none.*kernel"):
        train(model, x, y, **mode)
    for a, b in zip(net.variables, same.variables):
        np.testing.assert_array_equal(a, b, err_msg=a.path)
    assert int(model.optimizer.iterations) == 0


READ_ONLY = (
    *("warmup", "anneal", "total_steps", "curvature", "adaptive", "alpha"),
    *("num_batch_splits", "ascent_fraction", "perturbation_scope", "perturb"),
)


@pytest.mark.parametrize("name", READ_ONLY)
def test_read_only(net, name):
    model = LESAMModel(net)
    before = getattr(model, name)
    with pytest.raises(AttributeError):
        setattr(model, name, 0.123)
    assert getattr(model, name) == before


def test_arguments_assigned_later(net):
    model = LESAMModel(net, 0.1, 0.3)
    model.sigma, model.rho_max = 0.2, None
    assert (model.sigma, model.rho_max) == (0.2, None)
    for name, value in (("sigma", -1), ("rho_max", 0), ("sigma", math.nan)):
        with pytest.raises(ValueError, match=f"Received: {name}="):
            setattr(model, name, value)
    for value in ("0.1", SCHEDULE, None, True):
        with pytest.raises(TypeError, match="Received: sigma="):
            model.sigma = value
    assert (model.sigma, model.rho_max) == (0.2, None)
    scheduled = LESAMModel(net, SCHEDULE)
    with pytest.raises(TypeError, match="schedule"):
        scheduled.sigma = 0.1
    assert scheduled.sigma is SCHEDULE


def test_without_arguments_the_budget_is_a_share_of_the_loss(net):
    model = LESAMModel(net)
    assert repr(model.budget) == "Relative(share=0.1, max_change=0.6)"
    assert (model.share, model.warmup, model.anneal) == (0.1, 0.0, 0.0)
    assert model.sigma is model.budget
    # Any number of the paper's asks for the paper's.
    for options in ({"sigma": 0.1}, {"warmup": 0.1}, {"anneal": 0.2}):
        budget = repr(LESAMModel(net, **options).budget)
        assert budget == "Constant(sigma=0.1, warmup=0.1, anneal=0.2)"
    guarded = LESAMModel(net, guard=0.5)
    assert (guarded.sigma, guarded.guard, guarded.share) == (0.1, 0.5, None)
    general = SharpnessAwareModel(net, budget=budgets.Constant(warmup=0.1))
    assert (general.budget.sigma, general.budget.anneal) == (0.1, 0.0)


def test_a_share_is_a_relative_budget_with_the_limit_of_the_default(net):
    model = LESAMModel(net, share=0.7)
    assert repr(model.budget) == "Relative(share=0.7, max_change=0.6)"
    model.share = 0.4
    copy = LESAMModel.from_config(model.get_config())
    assert repr(copy.budget) == "Relative(share=0.4, max_change=0.6)"
    tighter = LESAMModel(net, share=0.7, max_change=0.2)
    assert repr(tighter.budget) == "Relative(share=0.7, max_change=0.2)"
    assert LESAMModel(net, share=0.7, ascent_every=4).max_change == 0.6
    # Ascents that have nothing to compare have no limit.
    for options in ({"ascent_from": "momentum"}, {"ascent_fraction": 0.5}):
        unlimited = LESAMModel(net, share=0.7, **options)
        assert repr(unlimited.budget) == "Relative(share=0.7)"


@pytest.mark.parametrize(
    "option",
    [
        *({"sigma": sigma} for sigma in (0.1, SCHEDULE, budgets.Relative())),
        *({"warmup": 0.1}, {"anneal": 0.0}, {"guard": 0.5}),
    ],
    ids=range(6),
)
def test_a_share_is_the_whole_budget(net, option):
    [name] = option
    with pytest.raises(ValueError, match=f"leave `{name}` out.*share=0.5"):
        LESAMModel(net, share=0.5, **option)


@pytest.mark.parametrize("share", [-0.1, "0.7", True, float("nan"), SCHEDULE])
def test_a_share_is_a_number(net, share):
    with pytest.raises((TypeError, ValueError), match="Received: share="):
        LESAMModel(net, share=share)


def test_a_share_assigned_later(net):
    model = LESAMModel(net)
    model.share = 0.5
    assert model.share == model.budget.share == 0.5
    with pytest.raises(ValueError, match="Received: share=-1"):
        model.share = -1
    for value in ("0.1", SCHEDULE, None, True):
        with pytest.raises(TypeError, match="Received: share="):
            model.share = value
    with pytest.raises(TypeError, match=r"sigma=0\.2, budget=Relative"):
        model.sigma = 0.2
    with pytest.raises(TypeError, match=r"share=0\.2, budget=Constant"):
        LESAMModel(net, 0.1).share = 0.2
    assert model.share == 0.5


def test_a_refused_value_is_not_used():
    x, y = classification_data(rows=32)
    model = constant_lesam(dense_net(), 0.1, 0.02)
    model.compile("sgd", crossentropy())
    for name, value in (("sigma", -1.0), ("rho_max", 0.0), ("rho_max", "1")):
        with pytest.raises((ValueError, TypeError), match=f"{name}={value!r}"):
            setattr(model, name, value)
    logs = model.train_on_batch(x, y, return_dict=True)
    found = [logs["sigma"], logs["rho"]]
    np.testing.assert_allclose(found, [0.1, 0.02], rtol=1e-6)


@pytest.mark.parametrize(
    "number", [np.float32(0.25), np.float64(0.25), np.array(0.25), 0.25]
)
def test_numbers_of_numpy_are_numbers(net, number):
    model = LESAMModel(
        net, number, number, warmup=number, anneal=number, alpha=number
    )
    found = (model.sigma, model.rho_max, model.warmup, model.alpha)
    assert found == (0.25,) * 4
    assert all(type(value) is float for value in found)
    assert LESAMModel(net, num_batch_splits=np.int64(2)).num_batch_splits == 2
    assert LESAMModel(net, total_steps=np.int32(9)).total_steps == 9
    assert LESAMModel(net, adaptive=np.True_).adaptive is True


def test_a_refused_model_is_as_it_was():
    x, y = classification_data()
    net, same = dense_net(), dense_net()
    for bad in ({"sigma": -1}, {"alpha": 7}, {"curvature": "exact"}):
        with pytest.raises(ValueError):
            LESAMModel(net, **bad)
    assert not net.compiled
    assert net.trainable
    for wrap in (lambda model: model, LESAMModel):
        expected = train(wrap(same), x, y)
        assert train(wrap(net), x, y) == expected
        assert_same_weights(net, same)


NET = []
LEAST, MOST = map(float, (np.finfo("f4").tiny, np.finfo("f4").max))


def fits(*values):
    """Whether float32, in which a step counts, can hold all numbers."""
    return all(value == 0 or LEAST <= abs(value) <= MOST for value in values)


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(sorted(NUMBERS)),
    value=st.floats() | st.floats(0, 1) | st.integers(),
)
@example(name="rho_max", value=10**400)
def test_any_number_is_taken_or_refused(name, value):
    """In range: it is kept. Out of range: an error that names it."""
    NET[:] = NET or [dense_net()]
    low, high = {
        "sigma": (0, math.inf),
        "rho_max": (0, math.inf),
    }.get(name, (0, 1))
    # Rows are counted by Python, and so is what share of them there is.
    good = low <= value <= high
    good &= name == "ascent_fraction" or fits(value)
    good &= value > 0 or name not in ("rho_max", "ascent_fraction")
    arguments = {"warmup": 0.0, "anneal": 0.0, name: value}
    if good:
        kept = getattr(LESAMModel(NET[0], **arguments), name)
        assert kept == float(value)
    else:
        with pytest.raises(ValueError, match=f"Received: {name}="):
            LESAMModel(NET[0], **arguments)


@settings(max_examples=50, deadline=None)
@given(warmup=st.floats(0, 1), anneal=st.floats(0, 1))
def test_any_two_shares_are_taken_or_refused(warmup, anneal):
    NET[:] = NET or [dense_net()]
    arguments = {"warmup": warmup, "anneal": anneal}
    if not fits(warmup, anneal):
        with pytest.raises(ValueError, match=r"float32 can hold.*Received"):
            LESAMModel(NET[0], **arguments)
    elif warmup + anneal <= 1:
        model = LESAMModel(NET[0], **arguments)
        assert (model.warmup, model.anneal) == (warmup, anneal)
    elif warmup + anneal > 1 + 1e-6:
        with pytest.raises(ValueError, match=r"Received: warmup=.*, anneal="):
            LESAMModel(NET[0], **arguments)


HELD_BY_FLOAT64_ONLY = [1e308, 1e39, 1e-39, 1e-320]


@pytest.mark.parametrize("value", HELD_BY_FLOAT64_ONLY)
@pytest.mark.parametrize("name", ["sigma", "rho_max"])
def test_numbers_that_the_dtype_cannot_hold(name, value):
    match = f"`{name}`.*float32 can hold.*Received: {name}="
    with pytest.raises(ValueError, match=match):
        LESAMModel(dense_net(), **{name: value})
    model = LESAMModel(dense_net(), 0.1, 0.3)
    with pytest.raises(ValueError, match=match):
        setattr(model, name, value)
    assert (model.sigma, model.rho_max) == (0.1, 0.3)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("value", [1e300, 1e-300])
def test_numbers_that_a_wider_dtype_can_hold(value):
    model = LESAMModel(dense_net(), value, value)
    assert (model.sigma, model.rho_max) == (value, value)


@pytest.mark.parametrize("name", ["rho", "eta", "alpha", "gamma", "share"])
@pytest.mark.parametrize("value", HELD_BY_FLOAT64_ONLY)
def test_numbers_of_rules_that_the_dtype_cannot_hold(name, value):
    kinds = [getattr(rules, kind) for kind in rules.__all__]
    for kind in kinds:
        is_rule = isinstance(kind, type) and issubclass(kind, rules.SAM)
        if not is_rule or name not in inspect.signature(kind).parameters:
            continue
        if value > 1 and name in ("gamma", "share"):
            continue
        rule = kind(**{name: value})
        with pytest.raises(ValueError, match=f"`{name}`.*float32 can hold"):
            SAMModel(dense_net(), rule)


@pytest.mark.parametrize("value", [2**63, 2**64, 10**400])
@pytest.mark.parametrize(
    "name", ["total_steps", "num_batch_splits", "ascent_every"]
)
def test_integers_that_nothing_can_count_to(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be at most"):
        LESAMModel(dense_net(), **{name: value})
