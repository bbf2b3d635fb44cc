"""The methods: how each wraps a net, and the settings it is tuned over.

All but one have six settings. Plain training tunes learning rate and weight
decay; the others take these over, and tune hyperparameters of their own.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import keras

from keras_lesam import LESAMModel
from keras_lesam import SAMModel
from keras_lesam import budgets
from keras_lesam import rules

PLAIN = "plain"
SAM = "SAM"
# By the paper's budget, and by a share of the loss: without a limit, and with
# one to the change of the gradient; tuned, that of the default, and the one
# that is advised for wrong labels.
LESAM = "LE-SAM"
RELATIVE = "relative"
LIMITED = "relative, limited"
UNTUNED = "default, untuned"
STRONG = "share 0.7, limited"
MAX_CHANGE = 0.6

_RHOS = (0.02, 0.05, 0.1, 0.2, 0.4, 0.8)
_SIGMAS = (0.02, 0.05, 0.1, 0.2, 0.4, 0.8)
_SHARES = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0)


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to train.

    Attributes:
        name: String.
        wrap: Callable from a net and a setting to the model to fit.
        settings: List of dicts to choose from.
        budget: Name of the attribute of the model, and of the entry of a
            setting, that may change without a new model; or `None`.
        cost: Float, rough cost of a step in plain steps, for the time left.
        smoothing: Name of the entry of a setting that is the label smoothing
            of the training loss, or `None` for none.
        constant: Float, the share of the training before the learning rate
            decays.
        is_steady: Whether all epochs cost the same.
    """

    name: str
    wrap: Callable[[Any, dict], Any]
    settings: list
    budget: str | None = "rho"
    cost: float = 1.8
    smoothing: str | None = None
    constant: float = 0.0
    is_steady: bool = True


def _grid(**values):
    """Return all combinations of the values, as dicts."""
    found = [{}]
    for name, choices in values.items():
        found = [{**f, name: choice} for f in found for choice in choices]
    return found


def plain(adam):
    """Make plain training, which tunes learning rate and weight decay."""
    rates = (0.001, 0.002, 0.004) if adam else (0.03, 0.1, 0.3)
    decays = (0.01, 0.1) if adam else (0.0, 0.005)
    settings = _grid(learning_rate=rates, weight_decay=decays)
    return Method(PLAIN, lambda net, _: net, settings, budget=None, cost=1.0)


def smoothed(name, smoothings):
    """Make plain training by a loss of smoothed labels."""
    settings = _grid(smoothing=smoothings)
    return Method(name, lambda net, _: net, settings, None, 1.0, "smoothing")


def _sam_rule(name, rule, **values):
    def wrap(net, setting):
        return SAMModel(net, rule(**setting))

    return Method(name, wrap, _grid(**values))


def lesam(name, cost=1.8, sigmas=_SIGMAS, **options):
    """Make a `Method` of `LESAMModel` with these options."""

    def wrap(net, setting):
        return LESAMModel(net, setting["sigma"], **options)

    return Method(name, wrap, _grid(sigma=sigmas), "sigma", cost)


def relative(
    name, cost=1.8, shares=_SHARES, rho_max=1.0, max_change=None, **options
):
    """Make a `Method` of `LESAMModel` whose budget is a share of the loss."""

    def wrap(net, setting):
        budget = budgets.Relative(setting["share"], max_change=max_change)
        return LESAMModel(net, budget, rho_max, **options)

    return Method(name, wrap, _grid(share=shares), "share", cost)


def _guarded(net, setting):
    return SAMModel(net, rho=setting["rho"], guard=0.5)


def _limited(net, setting):
    return SAMModel(net, rho=setting["rho"], max_change=MAX_CHANGE)


def _default(net, setting):
    # Its share is assigned, and is what it was.
    return LESAMModel(net)


METHODS = [
    smoothed("label smoothing 0.1", (0.1,)),
    smoothed("label smoothing", (0.05, 0.1, 0.2, 0.3, 0.4, 0.5)),
    _sam_rule(SAM, rules.SAM, rho=_RHOS),
    # As published, with the radius that most people take.
    _sam_rule("SAM, untuned", rules.SAM, rho=(0.05,)),
    _sam_rule("ASAM", rules.ASAM, rho=(0.1, 0.25, 0.5, 1.0, 2.0, 4.0)),
    _sam_rule("GSAM", rules.GSAM, alpha=(0.1, 0.4), rho=(0.05, 0.1, 0.2)),
    _sam_rule(
        "Friendly SAM", rules.FriendlySAM, decay=(0.6, 0.9), rho=(0.1, 0.2, 0.4)
    ),
    lesam(LESAM),
    lesam("LE-SAM secant", curvature="secant"),
    lesam("LE-SAM hvp", cost=3.3, curvature="hvp"),
    Method(UNTUNED, _default, _grid(share=(0.1,)), "share"),
    relative(STRONG, shares=(0.7,), max_change=MAX_CHANGE),
    relative(LIMITED, max_change=MAX_CHANGE),
    relative("share 0.3", shares=(0.3,)),
    relative(RELATIVE),
    relative("relative secant", curvature="secant"),
    Method("SAM, guarded", _guarded, _grid(rho=_RHOS)),
    Method("SAM, limited", _limited, _grid(rho=_RHOS)),
    _sam_rule("StableSAM", rules.StableSAM, rho=_RHOS),
]


# Cheaper ways. All have LE-SAM's six budgets, or SAM's six radii.


def is_of_normalization(variable):
    """Return whether it is a scale or offset of normalization (SAM-ON)."""
    return variable.name in ("gamma", "beta")


class Window(keras.optimizers.schedules.LearningRateSchedule):
    """A budget in one window of the training, and 0 outside of it.

    Args:
        budget: Float.
        start: Integer, the first step with a budget.
        stop: Integer, the first step after it without one.
        warmup: Integer, the number of steps over which it rises.
    """

    def __init__(self, budget, start, stop, warmup):
        self.budget, self.start, self.stop = budget, start, stop
        self.warmup = warmup

    def __call__(self, step):
        step = keras.ops.cast(step, "float32")
        rise = keras.ops.clip((step - self.start) / self.warmup, 0.0, 1.0)
        inside = keras.ops.cast(step < self.stop, "float32")
        return self.budget * rise * inside

    def get_config(self):
        return dict(vars(self))


def within(name, start, stop, steps, cost):
    """Make LE-SAM with a budget in a part of a training of `steps` steps."""

    def wrap(net, setting):
        window = Window(
            setting["sigma"], start * steps, stop * steps, 0.1 * steps
        )
        return LESAMModel(net, window)

    settings = _grid(sigma=_SIGMAS)
    return Method(name, wrap, settings, None, cost, is_steady=False)


@keras.saving.register_keras_serializable(package="benchmark")
class AtTheEnd(budgets.Relative):
    """A share of the loss in the last part of the training, 0 before.

    Args:
        share: Float >= 0.
        start: Float in [0, 1], the share of the training that is plain.
    """

    def __init__(self, share=0.3, start=0.7):
        super().__init__(share)
        self.start = start

    def __call__(self, progress, losses, state):
        allowed = super().__call__(progress, losses, state)
        if losses is None:
            return allowed
        has_begun = progress.fraction >= self.start
        return keras.ops.where(has_begun, allowed, 0.0)

    @property
    def needs_length(self):
        return True


def at_the_end(name, start, constant=0.0):
    """Make the relative budget in the last part of a training alone."""

    def wrap(net, setting):
        return LESAMModel(net, AtTheEnd(setting["share"], start))

    settings = _grid(share=_SHARES)
    return Method(
        *(name, wrap, settings, "share", 1.3),
        **{"constant": constant, "is_steady": False},
    )


def cheaper(steps):
    """List the cheaper methods, for a training of `steps` steps."""

    def look(every, net, setting, **options):
        return SAMModel(net, rules.LookSAM(every=every, **setting), **options)

    shares_and_rhos = _grid(alpha=(0.5, 0.7), rho=(0.1, 0.2, 0.4))
    large = (0.2, 0.4, 0.8, 1.6, 3.2, 6.4)
    # Spent in one step of several, as many times as much.
    twice = tuple(2 * share for share in _SHARES)
    four_times = tuple(4 * share for share in _SHARES)
    return [
        # 12 of 50 rows: with 13, TensorFlow 2.21's oneDNN kernels sometimes
        # fail in the gradient, in plain training too.
        lesam("rows: a quarter", 1.25, ascent_fraction=0.24),
        lesam("steps: every 2nd", 1.4, ascent_every=2),
        lesam("steps: every 4th", 1.2, ascent_every=4),
        lesam("weights: normalization", 1.7, perturb=is_of_normalization),
        within("time: last 30%", 0.7, 1.0, steps, 1.25),
        lesam("gradient: previous", 1.05, ascent_from="previous"),
        lesam("gradient: momentum", 1.05, ascent_from="momentum"),
        Method(
            "LookSAM, every 4th",
            functools.partial(look, 4),
            _grid(rho=_RHOS),
            cost=1.2,
        ),
        # Added later, when validation accuracies had shown that rarer ascent
        # steps need a larger radius, and LookSAM a warm-up.
        lesam(
            "steps: every 4th, cap 2", 1.2, large, rho_max=2.0, ascent_every=4
        ),
        *(
            Method(
                f"LookSAM, every {every}th, warmed up",
                functools.partial(look, every, warmup=0.1, anneal=0.2),
                shares_and_rhos,
                cost=1.2,
            )
            for every in (4, 5)
        ),
        relative(*("share: every 2nd, cap 2", 1.5, twice, 2.0), ascent_every=2),
        relative(
            *("share: every 4th, cap 3", 1.25, four_times, 3.0), ascent_every=4
        ),
        relative(
            *("share: every 4th, limited", 1.25, four_times, 3.0, MAX_CHANGE),
            ascent_every=4,
        ),
        relative("share: a quarter of the rows", 1.25, ascent_fraction=0.24),
        relative("share: momentum", 1.05, ascent_from="momentum"),
        at_the_end("share: last 30%", 0.7),
        at_the_end("share: last 30%, with the decay", 0.7, constant=0.7),
    ]


def weaker():
    """List smaller shares with the limit of the default, of one setting."""
    return [
        relative(
            f"share {share:g}, limited", shares=(share,), max_change=MAX_CHANGE
        )
        for share in (0.15, 0.2, 0.3)
    ]


# Other forms of the share, with the limit of the default.


@keras.saving.register_keras_serializable(package="benchmark")
class OfGain(budgets.Relative):
    """A share of `gain (L / L0)^power`: a power of 1 is `Relative`.

    Args:
        share: Float >= 0.
        power: Float >= 0; 0: of all that has been learnt.
    """

    def __init__(self, share=0.3, power=0.0):
        super().__init__(share, max_change=MAX_CHANGE)
        self.power = power

    def __call__(self, progress, losses, state):
        allowed = super().__call__(progress, losses, state)
        if losses is None:
            return allowed
        remains = keras.ops.clip(losses.data / losses.reference, 1e-6, 1.0)
        return allowed * remains ** (self.power - 1.0)


def forms():
    """List the shares of what has been learnt, and half-way to `Relative`."""

    def of_gain(power):
        def wrap(net, setting):
            return LESAMModel(net, OfGain(setting["share"], power))

        return wrap

    names = {"gain, limited": 0.0, "gain x sqrt(L / L0), limited": 0.5}
    return [
        Method(name, of_gain(power), _grid(share=_SHARES), "share")
        for name, power in names.items()
    ]


# On long tails, where large climbs cost accuracy: one setting each.


def is_of_features(variable):
    """Return whether it is no weight of the output layer, the last one."""
    return not variable.path.split("/")[-2].startswith("dense")


def tail():
    """List LE-SAM's ways to climb less, or elsewhere."""
    one = (0.3,)
    return [
        relative("share 0.1", shares=(0.1,)),
        relative("share 0.3, cap 0.3", 1.8, one, 0.3),
        relative("share 0.3, cap 0.1", 1.8, one, 0.1),
        relative("share 0.3, features", shares=one, perturb=is_of_features),
        relative(
            "share 0.3, normalization",
            shares=one,
            perturb=is_of_normalization,
        ),
    ]


# Longer warm-ups and a smaller cap, for nets whose gradients start small.


def start():
    """List LE-SAM and SAM with longer warm-up, LE-SAM with a smaller cap."""

    def warmed(net, setting):
        return SAMModel(net, rules.SAM(setting["rho"]), warmup=0.5, anneal=0.2)

    return [
        lesam("LE-SAM, warm-up 0.3", warmup=0.3),
        lesam("LE-SAM, warm-up 0.5", warmup=0.5),
        lesam("LE-SAM, cap 0.1", rho_max=0.1),
        Method("SAM, warm-up 0.5", warmed, _grid(rho=_RHOS)),
    ]


# Ablations, at the budget and radius that were chosen.


def ablations(steps, sigma, rho, mean_rhos):
    """List the ablations: methods of one setting each.

    Args:
        steps: Integer, number of steps of a training.
        sigma: Float, the budget that LE-SAM has chosen.
        rho: Float, the radius that SAM has chosen.
        mean_rhos: List of floats, LE-SAM's mean radius in each epoch.
    """

    def warmed(net, setting):
        return SAMModel(net, rules.SAM(setting["rho"]), warmup=0.1, anneal=0.2)

    def replay(net, setting):
        del setting
        epoch = steps // len(mean_rhos)
        schedule = keras.optimizers.schedules.PiecewiseConstantDecay(
            [i * epoch - 1 for i in range(1, len(mean_rhos))], mean_rhos
        )
        return SAMModel(net, rules.SAM(schedule))

    def constant(net, setting):
        return LESAMModel(net, setting["sigma"], anneal=0)

    def uncapped(net, setting):
        return LESAMModel(net, setting["sigma"], None)

    one = {"sigma": sigma}
    early = within("LE-SAM, first half", 0.0, 0.5, steps, 1.4)
    late = within("LE-SAM, second half", 0.5, 1.0, steps, 1.4)
    return [
        Method("SAM, warmed up and annealed", warmed, [{"rho": rho}]),
        Method("SAM at LE-SAM's mean rho", replay, [one], None),
        Method("LE-SAM, not annealed", constant, [one], "sigma"),
        Method("LE-SAM, no cap", uncapped, [one], "sigma"),
        dataclasses.replace(early, settings=[one]),
        dataclasses.replace(late, settings=[one]),
    ]


# The sweep: two decades and more, in thirds of a decade, around the usual sigma
# and rho, and around a share of 0.3 without the limit and of 0.7 with it.
DEFAULTS = {SAM: 0.05, LESAM: 0.1, RELATIVE: 0.3, LIMITED: 0.1}
SWEEP = {
    SAM: (0.01, 0.0215, 0.0464, 0.1, 0.215, 0.464, 1.0),
    LESAM: (0.01, 0.0215, 0.0464, 0.1, 0.215, 0.464, 1.0),
    RELATIVE: (0.03, 0.065, 0.14, 0.3, 0.65, 1.4, 3.0),
    LIMITED: (0.03, 0.07, 0.15, 0.325, 0.7, 1.5, 3.25, 7.0),
}
