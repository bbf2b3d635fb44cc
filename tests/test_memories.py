"""What steps remember, when it is not finite or out of all proportion.

By name: whatever rule, ascent, estimator or budget has a state is tried.
"""

import inspect

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_lesam import SharpnessAwareModel
from keras_lesam import ascents
from keras_lesam import budgets
from keras_lesam import estimators
from keras_lesam import rules
from keras_lesam._data import Batch
from tests.helpers import classification_data
from tests.helpers import crossentropy
from tests.helpers import dense_net

# Those that cannot be made without arguments.
ARGUMENTS = {
    "Fraction": lambda: ascents.Fraction(0.5),
    "Every": lambda: ascents.Every(2),
    "LookSAM": lambda: rules.LookSAM(every=2),
    "LossEquated": lambda: rules.LossEquated(rho_max=1.0),
    "Constant": lambda: budgets.Constant(0.1),
    "Schedule": lambda: budgets.Schedule(
        keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.9)
    ),
}
KINDS = {
    "rule": (rules, rules.Rule),
    "ascent": (ascents, ascents.Ascent),
    "curvature": (estimators, estimators.CurvatureEstimator),
    "budget": (budgets, budgets.Budget),
}
MODES = {
    "graph": {},
    "eager": {"run_eagerly": True},
    "XLA": {"jit_compile": True},
}
VALUES = {"nan": np.nan, "inf": np.inf, "-inf": -np.inf, "huge": 1e30}


def strategies():
    """All public ones: `(component, name)`."""
    for component, (module, base) in KINDS.items():
        for name in module.__all__:
            found = getattr(module, name)
            if (
                inspect.isclass(found)
                and issubclass(found, base)
                and found is not base
            ):
                yield component, name


def wrap(component, name, net):
    """A model with one of them, and what goes with it."""
    module, _ = KINDS[component]
    strategy = ARGUMENTS.get(name, getattr(module, name))()
    parts = {"rule": rules.SAM(0.05), component: strategy}
    if component in ("budget", "curvature"):
        parts["rule"] = rules.LossEquated(rho_max=1.0)
        parts.setdefault("budget", budgets.Constant(0.1))
    if name == "LossEquated":
        parts["budget"] = budgets.Constant(0.1)
    return SharpnessAwareModel(net, total_steps=100, **parts)


def memory_of(model):
    """The weights that are the wrapper's own."""
    of_net = {id(w) for w in model.model.weights}
    return [w for w in model.weights if id(w) not in of_net]


REMEMBERING = [
    (component, name)
    for component, name in strategies()
    if memory_of(wrap(component, name, dense_net()))
]


def test_they_are_found():
    assert {
        ("rule", "FriendlySAM"),
        ("rule", "LookSAM"),
        ("ascent", "Previous"),
        ("ascent", "Momentum"),
        ("curvature", "Secant"),
    } <= set(REMEMBERING)


def spoiled(value, bad, everywhere):
    """A state with a bad value in all places, or in one."""
    if everywhere:
        return np.full_like(value, bad)
    value = np.array(value)
    value.flat[-1] = bad
    return value


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("component", "name"), REMEMBERING)
def test_a_bad_memory_heals(component, name, mode, tmp_path):
    """After a few steps all is finite, and the ascents go on."""
    x, y = classification_data(rows=16)
    net = dense_net()
    model = wrap(component, name, net)
    model.compile(keras.optimizers.SGD(0.05), crossentropy(), **MODES[mode])
    file = tmp_path / "model.weights.h5"

    def steps(count):
        radii = []
        for _ in range(count):
            model.reset_metrics()
            logs = model.train_on_batch(x, y, return_dict=True)
            assert all(np.isfinite(w).all() for w in net.get_weights())
            assert np.isfinite(logs["loss"])
            radii.append(logs["rho"])
        return radii

    steps(3)
    good = [w.numpy() for w in memory_of(model)]
    start = net.get_weights()
    for kind, bad in VALUES.items():
        for everywhere in (True, False):
            net.set_weights(start)
            for state, value in zip(memory_of(model), good):
                state.assign(spoiled(value, bad, everywhere))
            if kind == "nan":
                model.save_weights(file)
                model.load_weights(file)
            assert max(steps(9)[-2:]) > 0, kind
            for state in memory_of(model):
                found = np.abs(state.numpy())
                assert np.isfinite(found).all(), (kind, state.name)
                assert found.max() < 0.9 * VALUES["huge"], (kind, state.name)
                if kind != "huge":
                    assert found.max() < 1e3, (kind, state.name)


@pytest.mark.parametrize("mode", ["graph", "eager"])
@pytest.mark.parametrize(("component", "name"), sorted(strategies()))
def test_a_healthy_step_makes_no_bad_number(component, name, mode):
    """Not on the way either: every operation is looked at."""
    x, y = classification_data(rows=16)
    # One whose gradient is 0 is healthy too.
    for factor in (1.0, 0.0):
        model = wrap(component, name, dense_net())
        model.compile(
            "sgd", lambda y, p, factor=factor: factor * crossentropy()(y, p)
        )
        model.train_on_batch(x, y)

        def step(model=model):
            context = model._step_context()
            inputs = model._step_inputs(context)
            found = model._plan.ascent.run(
                context, Batch(x, y, None), inputs, lambda found: found
            )
            model._state.assign(found.states, inputs.states)

        tf.debugging.enable_check_numerics()
        try:
            step = tf.function(step) if mode == "graph" else step
            for _ in range(3):
                step()
        finally:
            tf.debugging.disable_check_numerics()
