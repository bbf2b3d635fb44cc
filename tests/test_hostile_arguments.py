"""Hostile values for every argument of the public names.

The names and their arguments are read from the package: what is added to it is
tested too. Each value is taken, and then of use, or refused by one TypeError or
ValueError that names the argument, before the model is called.
"""

import datetime
import decimal
import fractions
import functools
import inspect
import math

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_lesam
from keras_lesam import SharpnessAwareModel
from keras_lesam import ascents
from keras_lesam import budgets
from keras_lesam import callbacks
from keras_lesam import curvature
from keras_lesam import estimators
from keras_lesam import landscape
from keras_lesam import rules
from tests.helpers import classification_data
from tests.helpers import crossentropy
from tests.helpers import dense_net

HOSTILE = {
    "None": None,
    "nan": math.nan,
    "inf": math.inf,
    "-1": -1,
    "0": 0,
    "1": 1,
    "0.5": 0.5,
    "1e308": 1e308,
    "1e-320": 1e-320,
    "1e-40": 1e-40,
    "2**63": 2**63,
    "2**64": 2**64,
    "10**400": 10**400,
    "-10**5000": -(10**5000),
    "True": True,
    "np.True_": np.True_,
    "'1'": "1",
    "''": "",
    "b'1'": b"1",
    "[]": [],
    "()": (),
    "{}": {},
    "set": {1, 2},
    "[[1], [1, 2]]": [[1], [1, 2]],
    "object": object(),
    "masked": np.ma.masked,
    "a masked array": np.ma.masked_array([1.0, 2.0], [True, False]),
    "nan of numpy": np.float32("nan"),
    "an array of nan": np.full(3, np.nan),
    "an array of one": np.array([0.5]),
    "an empty array": np.zeros((0, 6)),
    "an array of objects": np.array([None, "a"], object),
    "complex": 1j,
    "complex of numpy": np.complex64(1),
    "a date of numpy": np.datetime64("2020-01-01"),
    "a date": datetime.date(2020, 1, 1),
    "a tensor": tf.constant(0.5),
    "a tensor of strings": tf.constant(["a"]),
    "a symbolic tensor": keras.KerasTensor((2,)),
    "a class": rules.SAM,
    "a lambda": lambda *args: None,
    "a decimal": decimal.Decimal("0.5"),
    "a fraction": fractions.Fraction(1, 2),
    "NotImplemented": NotImplemented,
    "a generator": (i for i in range(3)),
}
X, Y = classification_data(rows=8)
CALLS = []


class Net(keras.Model):
    """Counts its calls."""

    def __init__(self):
        super().__init__()
        self.inner = dense_net(units=2)
        self.build((None, 6))

    def call(self, x):
        CALLS.append(None)
        return self.inner(x)


@functools.cache
def net():
    return Net()


@functools.cache
def compiled():
    model = Net()
    model.compile("sgd", crossentropy(), run_eagerly=True)
    return model


def direction(model):
    return [np.ones(v.shape) for v in model.trainable_variables]


def spectrum():
    return curvature.SpectralDensity(np.arange(3.0), np.ones(3) / 3)


HISTORY = {"rho": [1.0], "sigma": [1.0], "sharpness": [1.0]}
# Arguments without a default; and those that make a call cheap.
NEEDED = {
    "LESAMModel": lambda: {"model": net()},
    "SAMModel": lambda: {"model": net()},
    "SharpnessAwareModel": lambda: {"model": net()},
    "Schedule": lambda: {
        "schedule": keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.9)
    },
    "Fraction": lambda: {"fraction": 0.5},
    "Every": lambda: {"n": 2},
    "HessianOperator": lambda: {"model": compiled(), "x": X, "y": Y},
    "hessian_vector_product": lambda: (
        lambda model: {
            "model": model,
            "x": X,
            "y": Y,
            "vectors": direction(model),
        }
    )(compiled()),
    "top_eigenvalues": lambda: {"model": compiled(), "x": X, "y": Y},
    "trace": lambda: {"model": compiled(), "x": X, "y": Y, "max_samples": 2},
    "spectral_density": lambda: {
        "model": compiled(),
        "x": X,
        "y": Y,
        "probes": 1,
        "steps": 2,
    },
    "Curvature": lambda: {"x": X, "y": Y},
    "filter_normalized_direction": lambda: {"model": compiled()},
    "loss_along": lambda: (
        lambda model: {
            "model": model,
            "x": X,
            "y": Y,
            "direction": direction(model),
            "distances": [0.0],
        }
    )(compiled()),
    "loss_on_plane": lambda: (
        lambda model: {
            "model": model,
            "x": X,
            "y": Y,
            "directions": [direction(model)] * 2,
            "distances": ([0.0], [0.0]),
        }
    )(compiled()),
    "plot_line": lambda: {"distances": [0.0, 1.0], "losses": [1.0, 2.0]},
    "plot_plane": lambda: {
        "distances": ([0.0, 1.0], [0.0, 1.0]),
        "losses": np.arange(4.0).reshape(2, 2),
    },
    "plot_spectrum": lambda: {"spectrum": spectrum()},
    "plot_budget": lambda: {"history": HISTORY},
}
MODULES = (
    *(keras_lesam, rules, budgets, ascents, estimators),
    *(curvature, callbacks, landscape),
)
# What the library makes and hands to a strategy, functions of tensors that a
# strategy calls, and bases that are there to be derived from.
NOT_CALLED_BY_USERS = {
    *("Rule", "Budget", "Ascent", "CurvatureEstimator"),
    *("Gradients", "Weights", "combine", "usable_radius"),
}
# What is right is only known of a built model, or of its outputs.
KNOWN_LATE = ("x", "y", "sample_weight", "variables", "k", "perturb")


def targets():
    """All public classes and functions that are called with values."""
    found = {}
    for module in MODULES:
        for name in module.__all__:
            value = getattr(module, name)
            is_record = isinstance(value, type) and issubclass(value, tuple)
            if callable(value) and not is_record:
                found[name] = value
    return {k: v for k, v in found.items() if k not in NOT_CALLED_BY_USERS}


TARGETS = targets()
CASES = [
    (target, argument.name)
    for target, function in TARGETS.items()
    for argument in inspect.signature(function).parameters.values()
    if argument.kind is not argument.VAR_KEYWORD
]


def use(result):
    """Make use of what was made with an argument that was taken."""
    initial()
    parts = {
        rules.Rule: "rule",
        budgets.Budget: "budget",
        ascents.Ascent: "ascent",
        estimators.CurvatureEstimator: "curvature",
    }
    for kind, name in parts.items():
        if isinstance(result, kind):
            rule = {} if name == "rule" else {"rule": rules.LossEquated()}
            made = SharpnessAwareModel(net(), **{**rule, name: result})
            use(made)
    if isinstance(result, curvature.HessianOperator):
        result(np.ones(result.size))
    if isinstance(result, SharpnessAwareModel):
        result.compile("sgd", crossentropy(), run_eagerly=True)
        result.fit(X, Y, batch_size=8, verbose=0)
        assert all(np.isfinite(w).all() for w in result.get_weights())
        net().set_weights(initial())


@functools.cache
def initial():
    return net().get_weights()


def outcome(target, argument, value):
    """Return what is wrong with how a value was met; `None` if nothing is."""
    arguments = NEEDED.get(target, dict)()
    model = arguments.get("model")
    before = None if model is None else model.get_weights()
    CALLS.clear()
    try:
        result = TARGETS[target](**{**arguments, argument: value})
        use(result)
        if before is not None:
            model.set_weights(before)
    except (TypeError, ValueError) as error:
        message = str(error)
        if f"`{argument}`" not in message and f"{argument}=" not in message:
            return f"unnamed: {type(error).__name__}: {message[:300]}"
        if CALLS and argument not in KNOWN_LATE:
            return f"after the model was called: {message[:300]}"
        if before is not None and not all(
            np.array_equal(a, b) for a, b in zip(model.get_weights(), before)
        ):
            return f"after the weights had changed: {message[:300]}"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:300]}"
    return None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("target", "argument"), CASES)
def test_hostile_values(target, argument):
    if target.startswith("plot"):
        pytest.importorskip("matplotlib").use("agg")
    wrong = {
        name: found
        for name, value in HOSTILE.items()
        if (found := outcome(target, argument, value)) is not None
    }
    assert not wrong, "\n".join(f"{k}: {v}" for k, v in wrong.items())


STRATEGIES = [
    value
    for module in (rules, budgets, ascents, estimators)
    for name in module.__all__
    if name in TARGETS and isinstance(value := getattr(module, name), type)
]


@pytest.mark.parametrize("kind", STRATEGIES, ids=lambda kind: kind.__name__)
def test_hostile_configs(kind):
    """Missing and other arguments, and what is no config at all."""
    arguments = NEEDED.get(kind.__name__, dict)()
    config = kind(**arguments).get_config()
    assert kind.from_config(config).get_config() == config
    with pytest.raises(TypeError, match=r"`config` must have.*other"):
        kind.from_config({**config, "other": 1})
    for name in arguments:
        rest = {k: v for k, v in config.items() if k != name}
        with pytest.raises(TypeError, match=f"`config` must have.*{name}"):
            kind.from_config(rest)
    for value in HOSTILE.values():
        if not isinstance(value, dict):
            with pytest.raises(TypeError, match="`config` must be a dict"):
                kind.from_config(value)
    with pytest.raises(TypeError, match="has no argument `other`"):
        kind(**arguments).replace(other=1)


@pytest.mark.parametrize(
    "answer", [tf.constant(True), np.ones(2), NotImplemented], ids=str
)
def test_a_choice_of_weights_that_is_no_bool(answer):
    with pytest.raises(TypeError, match="`perturb` must return True or False"):
        keras_lesam.LESAMModel(net(), perturb=lambda variable: answer)
