"""What rules, budgets, ascents and estimators have in common, and exclude."""

import copy
import inspect

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_lesam import LESAMModel
from keras_lesam import SAMModel
from keras_lesam import SharpnessAwareModel
from keras_lesam import ascents
from keras_lesam import budgets
from keras_lesam import estimators
from keras_lesam import rules
from tests.helpers import assert_same_weights
from tests.helpers import classification_data
from tests.helpers import crossentropy
from tests.helpers import dense_net
from tests.helpers import train

SCHEDULE = keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.9)
register = keras.saving.register_keras_serializable("test_strategies")


@register
class Scaled(rules.SAM):
    """A rule with arguments of its own, and no `get_config`."""

    def __init__(self, factor, *, offset=0.0, **kwargs):
        super().__init__(**kwargs)
        self.factor = factor
        self.offset = offset

    def radius(self, norm, budget, curvature=None):
        scaled = self.factor * budget + self.offset
        return super().radius(norm, scaled, curvature)


@register
class HalfPlain(rules.SAM):
    """A rule with an `update` of its own: half of each gradient."""

    def update(self, plain, perturbed, state):
        return rules.combine(plain, perturbed, 0.5, 0.5), state


@register
class Counting(rules.SAM):
    """A rule with a state that is a scalar."""

    def init_state(self, weights):
        return {"steps": tf.zeros(())}

    def update(self, plain, perturbed, state):
        return perturbed, {"steps": state["steps"] + 1}


@register
class ShareOfTheLoss(budgets.Budget):
    """Goes by the loss of the step."""

    def __init__(self, share):
        self.share = share

    def __call__(self, progress, losses, state):
        return None if losses is None else self.share * losses.plain


@register
class MeanLoss(budgets.Budget):
    """Goes by the mean of the losses before."""

    def init_state(self):
        return {"mean": tf.zeros(())}

    def __call__(self, progress, losses, state):
        return 0.1 * state["mean"]

    def update(self, losses, state):
        return {"mean": 0.5 * (state["mean"] + losses.plain)}


OBJECTS = [
    rules.SAM(0.1),
    rules.SAM(SCHEDULE),
    rules.ASAM(0.3, eta=0.02),
    rules.GSAM(0.3, 0.2),
    rules.LookSAM(0.2, every=3),
    rules.LossEquated(1.0, True, 0.25),
    rules.LossEquated(),
    Scaled(2.0, rho=0.2, offset=0.1),
    budgets.Constant(0.2, warmup=0.1),
    budgets.Constant(),
    budgets.Schedule(SCHEDULE),
    ShareOfTheLoss(0.2),
    ascents.FullBatch(),
    ascents.Fraction(0.25),
    ascents.Previous(),
    ascents.Momentum(0.8),
    ascents.Every(3, ascents.Fraction(0.5)),
    estimators.FirstOrder(),
    estimators.Exact("forward_over_reverse"),
    estimators.Secant(),
]


@pytest.mark.parametrize("strategy", OBJECTS, ids=lambda s: type(s).__name__)
def test_it_is_saved_by_its_arguments(strategy):
    serialized = keras.saving.serialize_keras_object(strategy)
    other = keras.saving.deserialize_keras_object(serialized)
    assert type(other) is type(strategy)
    assert other.get_config() == strategy.get_config()
    if "object at" not in repr(strategy):
        assert repr(other) == repr(strategy)


@pytest.mark.parametrize("strategy", OBJECTS, ids=lambda s: type(s).__name__)
def test_it_is_immutable_and_says_what_to_do(strategy):
    with pytest.raises(AttributeError, match=r"immutable.*replace.*rho=7"):
        strategy.rho = 7
    copied = copy.deepcopy(strategy)
    with pytest.raises(AttributeError, match="immutable"):
        copied.rho = 7


def test_a_subclass_does_not_lose_its_arguments():
    rule = Scaled(2.0, offset=0.1, rho=0.2)
    assert rule.get_config() == {"factor": 2.0, "offset": 0.1, "rho": 0.2}
    assert rule.replace(rho=0.3).rho == 0.3
    assert rule.replace(rho=0.3).factor == 2.0
    assert rule.rho == 0.2


def test_signatures_are_those_of_the_constructors():
    assert [*inspect.signature(rules.ASAM).parameters] == ["rho", "eta"]
    assert "offset" in inspect.signature(Scaled).parameters


def test_arguments_without_a_name_are_refused():
    class Unnamed(rules.SAM):
        def __init__(self, *numbers):
            super().__init__()

    with pytest.raises(TypeError, match=r"cannot be saved.*\(1, 2\)"):
        Unnamed(1, 2)


def fitted(*arguments, data=None, **options):
    x, y = classification_data() if data is None else data
    net = dense_net()
    model = SharpnessAwareModel(net, *arguments, **options)
    return model, train(model, x, y)


def test_an_update_of_its_own_is_not_ignored():
    """Without any flag; it was, silently, where `combines` was not set."""
    mean, _ = fitted(HalfPlain(0.5))
    wsam, _ = fitted(rules.WSAM(0.5, gamma=1 / 3))  # h / 2 + g / 2
    sam, _ = fitted(rules.SAM(0.5))
    for a, b in zip(mean.get_weights(), wsam.get_weights()):
        np.testing.assert_allclose(a, b, atol=1e-6)
    assert not np.allclose(mean.get_weights()[0], sam.get_weights()[0])


def test_a_state_of_its_own_is_kept_and_saved(tmp_path):
    model, _ = fitted(Counting(0.1))
    assert [w.name for w in model.weights if "steps" in w.name] == [
        "rule.steps"
    ]
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    for one in (model, loaded):
        [steps] = [w for w in one.weights if w.name == "rule.steps"]
        assert float(steps.numpy()) == 9  # 3 epochs of 3 steps
    assert_same_weights(model, loaded)


def test_a_state_of_another_structure_is_refused_by_name():
    class Forgetful(Counting):
        def update(self, plain, perturbed, state):
            return perturbed, {}

    with pytest.raises(ValueError, match="`update` must return a state like"):
        fitted(Forgetful(0.1))


def test_a_budget_goes_by_the_loss_of_the_step():
    x, y = classification_data(rows=32)
    model = SharpnessAwareModel(
        dense_net(), rules.LossEquated(), ShareOfTheLoss(0.1)
    )
    model.compile("sgd", crossentropy())
    for _ in range(3):
        model.reset_metrics()
        logs = model.train_on_batch(x, y, return_dict=True)
        np.testing.assert_allclose(logs["sigma"], 0.1 * logs["loss"], rtol=1e-5)
        np.testing.assert_allclose(
            logs["rho"] * logs["gradient_norm"], logs["sigma"], rtol=1e-5
        )


@pytest.mark.parametrize(
    "options",
    [
        {"num_batch_splits": 2},
        {"ascent": ascents.Fraction(0.5)},
        {"ascent": ascents.Every(2)},
        {"curvature": "hvp"},
        {"curvature": "secant"},
    ],
    ids=str,
)
def test_a_budget_by_the_loss_goes_with_everything_else(options):
    _, history = fitted(rules.LossEquated(), ShareOfTheLoss(0.1), **options)
    assert np.isfinite(history["loss"]).all()
    assert history["rho"][-1] > 0


def test_a_budget_has_a_state():
    x, y = classification_data(rows=32)
    model = SharpnessAwareModel(dense_net(), rules.LossEquated(), MeanLoss())
    model.compile(keras.optimizers.SGD(0.0), crossentropy())
    sigmas = []
    for _ in range(3):
        model.reset_metrics()
        logs = model.train_on_batch(x, y, return_dict=True)
        sigmas.append(logs["sigma"] / logs["loss"])
    np.testing.assert_allclose(sigmas, [0.0, 0.05, 0.075], rtol=1e-5)


def test_a_budget_that_never_answers_is_refused():
    class Silent(budgets.Budget):
        def __call__(self, progress, losses, state):
            return None

    with pytest.raises(ValueError, match=r"Silent\(\) must return a scalar"):
        fitted(rules.LossEquated(), Silent())


def test_numbers_and_schedules_stand_for_budgets():
    model = SharpnessAwareModel(dense_net(), budget=0.3)
    assert repr(model.budget) == "Constant(sigma=0.3, warmup=0.0, anneal=0.0)"
    model = SharpnessAwareModel(dense_net(), budget=SCHEDULE)
    assert model.budget.schedule is SCHEDULE
    model = SharpnessAwareModel(
        dense_net(), rules.SAM(0.2), budgets.Constant(warmup=0.1)
    )
    assert model.budget.sigma == 0.2
    # LE-SAM's own is that of LESAMModel.
    assert repr(SharpnessAwareModel(dense_net()).budget) == repr(
        LESAMModel(dense_net()).budget
    )


@pytest.mark.parametrize(
    ("general", "facade"),
    [
        (
            lambda net: SharpnessAwareModel(
                net, rules.LossEquated(1.0), budgets.Constant(0.1, 0.1, 0.2)
            ),
            lambda net: LESAMModel(net, 0.1),
        ),
        (
            lambda net: SharpnessAwareModel(
                net, rules.LossEquated(1.0), budgets.Relative(0.3)
            ),
            LESAMModel,
        ),
        (
            lambda net: SharpnessAwareModel(net, rules.SAM(0.1)),
            lambda net: SAMModel(net, rho=0.1),
        ),
        (
            lambda net: SharpnessAwareModel(
                net,
                rules.SAM(0.1),
                ascent=ascents.Every(2, ascents.Fraction(0.5)),
            ),
            lambda net: SAMModel(
                net, rho=0.1, ascent_every=2, ascent_fraction=0.5
            ),
        ),
        (
            lambda net: SharpnessAwareModel(net, rules.LookSAM(0.1, every=2)),
            lambda net: SAMModel(net, rules.LookSAM(0.1, every=2)),
        ),
        (
            lambda net: SharpnessAwareModel(
                net, rules.LossEquated(), 0.1, ascents.Momentum()
            ),
            lambda net: LESAMModel(
                *(net, 0.1, None),
                **{"warmup": 0, "anneal": 0, "ascent_from": "momentum"},
            ),
        ),
    ],
)
def test_the_general_model_is_that_of_the_constructors(
    general, facade, tmp_path
):
    x, y = classification_data()
    models = [general(dense_net()), facade(dense_net())]
    histories = [train(model, x, y) for model in models]
    assert_same_weights(models[0].model, models[1].model)
    for log in histories[1]:
        assert histories[0][log] == histories[1][log]
    models[0].save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    config = {**models[0].get_config(), "model": None}
    assert {**loaded.get_config(), "model": None} == config
    assert_same_weights(loaded, models[0])


def test_sam_model_by_its_radius():
    assert SAMModel(dense_net(), rho=0.07).rule.rho == 0.07
    assert SAMModel(dense_net(), rho=0.07).rho == 0.07
    with pytest.raises(ValueError, match=r"rules.ASAM\(rho=0.1\)"):
        SAMModel(dense_net(), rules.ASAM(), rho=0.1)


def test_the_rule_of_a_model_is_the_rule():
    rule = rules.GSAM(0.1)
    model = SAMModel(dense_net(), rule)
    assert model.rule is rule
    with pytest.raises(AttributeError, match=r"immutable.*model\.rho"):
        model.rule.rho = 0.5
    model.rho = 0.5
    assert model.rule.rho == model.rho == model.budget.sigma == 0.5
    assert rule.rho == 0.1
    lesam = LESAMModel(dense_net(), 0.1, 1.0)
    lesam.rho_max = None
    lesam.sigma = 0.2
    assert (lesam.rule.rho_max, lesam.budget.sigma) == (None, 0.2)


REFUSED = [
    ((rules.SAM,), {}, TypeError, "`rule`.*not its class"),
    ((0.05,), {}, TypeError, "`rule` must be one of keras_lesam.rules"),
    ((None, "x"), {}, TypeError, "`budget` must be a number.*'x'"),
    ((None, -1.0), {}, ValueError, "`budget` must.*-1"),
    (
        (rules.SAM(0.2), 0.1),
        *({}, ValueError, "given twice.*rho=0.2.*sigma=0.1"),
    ),
    (
        (rules.SAM(SCHEDULE), budgets.Constant(warmup=0.1)),
        *({}, ValueError, "`rho` is a schedule"),
    ),
    (
        (),
        {"ascent": ascents.Every},
        *(TypeError, "`ascent`.*not its class"),
    ),
    ((), {"ascent": 4}, TypeError, "`ascent` must be one of.*ascent=4"),
    ((), {"curvature": "exact"}, ValueError, "`curvature` must.*'exact'"),
    (
        (rules.SAM(),),
        {"curvature": "secant"},
        *(ValueError, r"does not go by the curvature.*Secant\(\)"),
    ),
    (
        (HalfPlain(0.1),),
        {"ascent": ascents.Momentum()},
        *(ValueError, "which this rule asks for.*HalfPlain"),
    ),
    (
        (rules.LossEquated(), ShareOfTheLoss(0.1)),
        {"ascent": ascents.Previous()},
        *(ValueError, "no loss for the budget.*ShareOfTheLoss"),
    ),
    (
        (rules.LossEquated(),),
        {"ascent": ascents.Fraction(0.5), "curvature": "secant"},
        *(ValueError, "ascent_fraction=0.5"),
    ),
    (
        (rules.LookSAM(every=3),),
        {"ascent": ascents.Every(2)},
        *(ValueError, "`every` of its own.*ascent_every=2"),
    ),
]


@pytest.mark.parametrize(
    ("arguments", "options", "error", "match"),
    REFUSED,
    ids=range(len(REFUSED)),
)
def test_what_excludes_what(arguments, options, error, match):
    with pytest.raises(error, match=f"(?s){match}"):
        SharpnessAwareModel(dense_net(), *arguments, **options)


def test_a_rule_without_a_budget_of_its_own_asks_for_one():
    class Bare(rules.Rule):
        def radius(self, norm, budget, curvature=None):
            return rules.usable_radius(budget, norm)

    with pytest.raises(ValueError, match="Bare has no budget of its own"):
        SharpnessAwareModel(dense_net(), Bare())
    model, history = fitted(Bare(), budgets.Constant(0.1))
    np.testing.assert_allclose(history["rho"], 0.1, rtol=1e-6)
    assert isinstance(model.rule, Bare)


class Halving(rules.LossEquated):
    def update(self, plain, perturbed, state):
        return [None if h is None else 0.5 * h for h in perturbed], state


def second_step(budget, ascent):
    """How far the second step goes, in lengths of a plain one from there."""
    x, y = classification_data(rows=32)
    net, plain = dense_net(), dense_net()
    model = SharpnessAwareModel(net, Halving(), budget, ascent)
    model.compile(keras.optimizers.SGD(1.0), crossentropy())
    model.train_on_batch(x, y)
    before = net.get_weights()
    model.train_on_batch(x, y)
    plain.set_weights(before)
    plain.compile(keras.optimizers.SGD(1.0), crossentropy())
    plain.train_on_batch(x, y)
    return [
        np.linalg.norm(a - b) / np.linalg.norm(c - b)
        for a, b, c in zip(net.get_weights(), before, plain.get_weights())
    ]


def test_a_step_between_two_ascents_is_up_to_the_rule():
    lengths = second_step(budgets.Constant(0.1), ascents.Every(2))
    np.testing.assert_allclose(lengths, 0.5, rtol=1e-4)


@pytest.mark.parametrize("ascent", [ascents.FullBatch(), ascents.Every(2)])
def test_a_step_without_a_budget_is_plain_whatever_the_rule(ascent):
    zero = keras.optimizers.schedules.PiecewiseConstantDecay([0], [0.1, 0.0])
    lengths = second_step(budgets.Schedule(zero), ascent)
    np.testing.assert_allclose(lengths, 1.0, rtol=1e-4)
