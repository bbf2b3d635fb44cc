"""Each rule's steps by hand, and by NumPy, in float64.

The loss is `mean (x w - y)^2` of a layer without a bias, whose gradient is
`2 x^T (x w - y) / n`.
"""

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

from keras_lesam import LESAMModel
from keras_lesam import SAMModel
from keras_lesam import rules
from tests.helpers import assert_close_weights
from tests.helpers import classification_data
from tests.helpers import constant_lesam
from tests.helpers import dense_net
from tests.helpers import train

pytestmark = pytest.mark.usefixtures("float64")
# Keras keeps it in float32, which has this one exactly.
RATE = 0.0625
RHO = 0.25


def linear(weights):
    weights = np.asarray(weights, float)
    net = keras.Sequential(
        [keras.Input(weights.shape), keras.layers.Dense(1, use_bias=False)]
    )
    net.set_weights([weights[:, None]])
    return net


def compiled(net, rule, rate=RATE, **options):
    model = SAMModel(net, rule, **options)
    model.compile(keras.optimizers.SGD(rate), "mse")
    return model


@pytest.mark.parametrize(
    ("rule", "rho", "g_hat"),
    [
        # L = w^2 at w = 3: g = 6; at w + 0.5, h = 7.
        (rules.SAM(0.5), 0.5, 7.0),
        # T = |w| + 1 = 4; eps = 0.5 * 16 * 6 / 24 = 2.
        (rules.ASAM(0.5, eta=1.0), 0.5, 10.0),
        # eps = 0.5 * 6 = 3.
        (rules.UnnormalizedSAM(0.5), 3.0, 12.0),
        # In one dimension nothing of g is aside of h.
        (rules.GSAM(0.5, alpha=0.3), 0.5, 7.0),
        # In the first step d = g.
        (rules.FriendlySAM(0.5), 0.5, 7.0),
        # a = 3: 3 h - 2 g.
        (rules.WSAM(0.5, gamma=0.75), 0.5, 9.0),
        (rules.LookSAM(0.5), 0.5, 7.0),
        (rules.StableSAM(0.5), 0.5, 6.0),
    ],
    ids=repr,
)
def test_one_weight_by_hand(rule, rho, g_hat):
    net = linear([3.0])
    model = compiled(net, rule, rate=1.0)
    logs = model.train_on_batch(np.ones((1, 1)), np.zeros(1), return_dict=True)
    np.testing.assert_allclose(3.0 - net.get_weights()[0], g_hat)
    np.testing.assert_allclose(logs["rho"], rho)


# By NumPy. An oracle takes `gradient`, a function of the weights, the weights
# and what it remembers (`None` at first), and gives the update and what to
# remember.


def climb(direction, rho=RHO):
    return rho * direction / np.linalg.norm(direction)


def sam(gradient, w, memory):
    return gradient(w + climb(gradient(w))), memory


def asam(gradient, w, memory):
    g, t = gradient(w), np.abs(w) + 0.1
    return gradient(w + RHO * t**2 * g / np.linalg.norm(t * g)), memory


def unnormalized(gradient, w, memory):
    return gradient(w + RHO * gradient(w)), memory


def gsam(gradient, w, memory):
    g = gradient(w)
    h = gradient(w + climb(g))
    along = h / np.linalg.norm(h)
    return h - 0.3 * (g - (g @ along) * along), memory


def friendly(gradient, w, mean):
    g = gradient(w)
    direction = g if mean is None else g - 0.8 * mean
    mean = g if mean is None else 0.7 * mean + 0.3 * g
    return gradient(w + climb(direction)), mean


def wsam(gradient, w, memory):
    g = gradient(w)
    h = gradient(w + climb(g))
    return g + 0.8 / 0.2 * (h - g), memory


def look(gradient, w, memory):
    step, v = memory or (0, None)
    g = gradient(w)
    if step % 3:
        g_hat = g + 0.6 * np.linalg.norm(g) / np.linalg.norm(v) * v
    else:
        g_hat = gradient(w + climb(g))
        v = g_hat - (g @ g_hat) / (g @ g) * g
    return g_hat, (step + 1, v)


def stable(gradient, w, memory):
    h = sam(gradient, w, memory)[0]
    return np.linalg.norm(gradient(w)) / np.linalg.norm(h) * h, memory


def previous(gradient, w, before):
    h = gradient(w if before is None else w + climb(before))
    return h, h


def momentum(gradient, w, mean):
    h = gradient(w if mean is None else w + climb(mean))
    return h, h if mean is None else 0.9 * mean + 0.1 * h


def every_third(gradient, w, step):
    step = step or 0
    g_hat = gradient(w) if step % 3 else sam(gradient, w, None)[0]
    return g_hat, step + 1


ORACLES = [
    (sam, rules.SAM(RHO), {}),
    (asam, rules.ASAM(RHO, eta=0.1), {}),
    (unnormalized, rules.UnnormalizedSAM(RHO), {}),
    (gsam, rules.GSAM(RHO, alpha=0.3), {}),
    (friendly, rules.FriendlySAM(RHO, decay=0.7, share=0.8), {}),
    (wsam, rules.WSAM(RHO, gamma=0.8), {}),
    (look, rules.LookSAM(RHO, alpha=0.6, every=3), {}),
    (stable, rules.StableSAM(RHO), {}),
    (previous, rules.SAM(RHO), {"ascent_from": "previous"}),
    (momentum, rules.SAM(RHO), {"ascent_from": "momentum"}),
    (every_third, rules.SAM(RHO), {"ascent_every": 3}),
]


@pytest.mark.parametrize(
    ("oracle", "rule", "options"),
    ORACLES,
    ids=lambda o: getattr(o, "__name__", repr(o)),
)
def test_steps_by_numpy(oracle, rule, options):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(10, 8, 3)), rng.normal(size=(10, 8))
    w, memory = rng.normal(size=3), None
    net = linear(w)
    model = compiled(net, rule, **options)
    for rows, targets in zip(x, y):

        def gradient(w, rows=rows, targets=targets):
            return 2 * rows.T @ (rows @ w - targets) / len(rows)

        update, memory = oracle(gradient, w, memory)
        w = w - RATE * update
        model.train_on_batch(rows, targets)
    np.testing.assert_allclose(net.get_weights()[0][:, 0], w, rtol=1e-9)


@pytest.mark.parametrize(
    "rule",
    [
        rules.GSAM(0.1, alpha=0.0),
        rules.FriendlySAM(0.1, share=0.0),
        rules.WSAM(0.1, gamma=0.5),
        rules.LookSAM(0.1, every=1),
    ],
    ids=repr,
)
def test_what_is_sam(rule):
    x, y = classification_data()
    net, sam_net = dense_net(), dense_net()
    train(SAMModel(net, rule), x, y)
    train(SAMModel(sam_net, rules.SAM(0.1)), x, y)
    assert_close_weights(net, sam_net, atol=1e-12)


def test_wsam_without_a_weight_is_plain_training():
    x, y = classification_data()
    net, plain = dense_net(), dense_net()
    train(SAMModel(net, rules.WSAM(0.1, gamma=0.0)), x, y)
    train(plain, x, y)
    assert_close_weights(net, plain, atol=1e-12)


def test_lesam_is_sam_of_radius_sigma_over_the_slope():
    """One step; and a cap that always binds makes it SAM for good."""
    x, y = classification_data()
    one = {"batch_size": len(x), "epochs": 1}
    net, other = dense_net(), dense_net()
    history = train(constant_lesam(net, 0.1, rho_max=None), x, y, **one)
    train(SAMModel(other, rules.SAM(history["rho"][0])), x, y, **one)
    assert_close_weights(net, other, atol=1e-9)
    capped, sam_net = dense_net(), dense_net()
    train(constant_lesam(capped, 1e6, rho_max=0.125), x, y)
    train(SAMModel(sam_net, rules.SAM(0.125)), x, y)
    assert_close_weights(capped, sam_net, atol=1e-12)


@settings(deadline=None, max_examples=10)
@given(st.floats(0.1, 10.0))
def test_asam_does_not_see_the_scale_of_layers(factor):
    """The rise of the loss, if one layer is scaled and the next one back."""
    x = np.array([[1.0, -2.0], [0.5, 1.5]])
    rises = []
    for scale in (1.0, factor):
        net = keras.Sequential(
            [keras.Input((2,))]
            + [keras.layers.Dense(n, use_bias=False) for n in (3, 1)]
        )
        first = np.array([[0.3, -0.6, 1.0], [0.8, 0.2, -0.4]])
        second = np.array([[1.0], [-0.5], [0.7]])
        net.set_weights([scale * first, second / scale])
        model = compiled(net, rules.ASAM(0.05, eta=0.0))
        logs = model.train_on_batch(x, np.ones(2), return_dict=True)
        rises.append(logs["sharpness"])
    np.testing.assert_allclose(rises[0], rises[1], rtol=1e-6)


BAD_NUMBERS = [
    (rules.SAM, "rho", -0.1),
    (rules.SAM, "rho", float("nan")),
    (rules.SAM, "rho", float("inf")),
    (rules.ASAM, "eta", -1e-3),
    (rules.UnnormalizedSAM, "rho", -1),
    (rules.GSAM, "alpha", -0.4),
    (rules.FriendlySAM, "decay", 1.0),
    (rules.FriendlySAM, "decay", -0.1),
    (rules.FriendlySAM, "share", 1.1),
    (rules.WSAM, "gamma", 1.0),
    (rules.WSAM, "gamma", -0.1),
    (rules.LookSAM, "alpha", -0.1),
    (rules.LookSAM, "every", 0),
]


@pytest.mark.parametrize(("rule", "name", "value"), BAD_NUMBERS)
def test_numbers_out_of_range(rule, name, value):
    with pytest.raises(ValueError, match=f"`{name}` must .*: {name}={value!r}"):
        rule(**{name: value})


@pytest.mark.parametrize(
    ("rule", "name"), sorted({(r, n) for r, n, _ in BAD_NUMBERS}, key=str)
)
@pytest.mark.parametrize("value", ["0.1", None, True, [0.1]], ids=repr)
def test_what_is_not_a_number(rule, name, value):
    with pytest.raises(TypeError, match=f"`{name}` must be .*: {name}="):
        rule(**{name: value})


SCHEDULE = keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.9)
REFUSED = [
    ({"rule": rules.SAM}, TypeError, r"not its class.*rules\.SAM\(rho"),
    ({"rule": 0.05}, TypeError, "one of keras_lesam.rules.*rule=0.05"),
    ({"rule": "sam"}, TypeError, "rule='sam'"),
    ({"warmup": -0.1}, ValueError, "`warmup`.*warmup=-0.1"),
    ({"warmup": 0.7, "anneal": 0.7}, ValueError, "at most 1"),
    (
        {"rule": rules.SAM(SCHEDULE), "warmup": 0.1},
        *(ValueError, "`rho` is a schedule.*warmup=0.1"),
    ),
    (
        {"rule": rules.LookSAM(), "ascent_every": 2},
        *(ValueError, "`every` of its own.*ascent_every=2"),
    ),
]
REFUSED_BY_BOTH = [
    ({"ascent_every": 0}, ValueError, "`ascent_every` must.*ascent_every=0"),
    ({"ascent_every": 1.5}, TypeError, "`ascent_every` must be an integer"),
    ({"ascent_from": "next"}, ValueError, "`ascent_from`.*'next'"),
    (
        {"ascent_from": "previous", "ascent_every": 2},
        *(ValueError, "ascent_from='previous'.*ascent_every=2"),
    ),
    (
        {"ascent_from": "momentum", "ascent_fraction": 0.5},
        *(ValueError, "ascent_from='momentum'.*ascent_fraction=0.5"),
    ),
]
REFUSED_RULES = [
    {"rule": rules.GSAM(), "ascent_from": "previous"},
    {"rule": rules.WSAM(), "ascent_from": "momentum"},
    {"rule": rules.FriendlySAM(), "ascent_from": "previous"},
    {"rule": rules.LookSAM(), "ascent_from": "momentum"},
]


@pytest.mark.parametrize(
    ("options", "error", "match"), REFUSED + REFUSED_BY_BOTH
)
def test_arguments_of_sam_model(options, error, match):
    net = dense_net()
    with pytest.raises(error, match=f"(?s){match}"):
        SAMModel(net, **options)


@pytest.mark.parametrize(("options", "error", "match"), REFUSED_BY_BOTH)
def test_arguments_of_lesam_model(options, error, match):
    with pytest.raises(error, match=f"(?s){match}"):
        LESAMModel(dense_net(), **options)


@pytest.mark.parametrize("options", REFUSED_RULES)
def test_a_rule_of_two_gradients_wants_two_passes(options):
    with pytest.raises(ValueError, match="ascent_from"):
        SAMModel(dense_net(), **options)


def test_lesam_takes_no_memory_with_its_curvature_or_alpha():
    for options in ({"curvature": "hvp"}, {"alpha": 0.1}):
        with pytest.raises(ValueError, match="ascent_from"):
            LESAMModel(dense_net(), ascent_from="previous", **options)
