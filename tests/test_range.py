"""Rules over the whole range of their dtypes, against NumPy.

The oracles are the formulas, in extended precision, whose squares of float64
numbers are in range.
"""

import functools
import inspect
import itertools

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import assume
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

from keras_lesam import _rule
from keras_lesam import _vectors
from keras_lesam import rules
from keras_lesam._gradients import Gradients
from keras_lesam._gradients import Scales

# The least and the largest exponent of ten of gradients, and a tolerance.
DTYPES = {
    "float16": (-6.5, 4.5, 2e-3),
    "bfloat16": (-37, 37.5, 2e-2),
    "float32": (-37, 37.5, 2e-5),
    "float64": (-300, 300, 1e-12),
}
RHO, ETA, SHARE, ALPHA, GAMMA, SIGMA, RHO_MAX = (
    0.05,
    0.1,
    0.8,
    0.4,
    0.9,
    0.1,
    2.0,
)
SIZES = (3, 4)
MODES = {"graph": False, "XLA": True}
in_each = pytest.mark.parametrize(
    ("dtype", "mode"),
    [
        *((dtype, "graph") for dtype in DTYPES),
        ("float16", "XLA"),
        ("float32", "XLA"),
    ],
)


def wide(array):
    return np.asarray(array, np.longdouble)


def norm(vector):
    return np.sqrt(np.sum(wide(vector) ** 2))


def scalars_of(dtype):
    return tf.float64 if dtype == "float64" else tf.float32


def rounded(vector, dtype):
    """What is left of numbers in a dtype, flat."""
    return wide(tf.cast(tf.constant(np.float64(vector)), dtype).numpy())


@st.composite
def vectors(draw, dtype, spread=3):
    """A flat vector of numbers that are some orders of magnitude apart."""
    low, high, _ = DTYPES[dtype]
    size = sum(SIZES)
    top = draw(st.floats(low, high))
    below = draw(
        st.lists(st.floats(0, spread), min_size=size - 1, max_size=size - 1)
    )
    exponents = np.maximum(top - np.array([0, *below]), low)
    signs = draw(
        st.lists(st.sampled_from([-1, 1]), min_size=size, max_size=size)
    )
    return rounded(np.array(signs) * 10**exponents, dtype)


weights = st.integers(0, 99).map(
    lambda seed: np.random.default_rng(seed).normal(size=sum(SIZES))
)


def tensors(vector, dtype):
    """A list of tensors, with a weight in between that takes no part."""
    first, second = np.split(np.float64(vector), SIZES[:1])
    return [
        tf.cast(tf.constant(first), dtype),
        None,
        tf.cast(tf.constant(second.reshape(2, 2)), dtype),
    ]


def weights_like(vector, dtype):
    """The same, with a weight that has no gradient."""
    return [
        tf.ones((2,), dtype) if t is None else t for t in tensors(vector, dtype)
    ]


def flat(found):
    return np.concatenate([wide(f).ravel() for f in found if f is not None])


@functools.cache
def compiled(function, mode):
    """Traced once for all examples."""
    return tf.function(function, jit_compile=MODES[mode], autograph=False)


def dtype_tiny(dtype):
    """The least normal number: what is below may count as 0."""
    if dtype == "bfloat16":
        return np.finfo("float32").tiny
    return np.finfo(dtype).tiny


# Perturbations: the rule, whether it is adaptive, its radius for a norm.
PERTURBATIONS = {
    "SAM": (rules.SAM(RHO), None, lambda s: RHO),
    "ASAM": (rules.ASAM(RHO, ETA), ETA, lambda s: RHO),
    "UnnormalizedSAM": (rules.UnnormalizedSAM(RHO), None, lambda s: RHO * s),
    "StableSAM": (rules.StableSAM(RHO), None, lambda s: RHO),
    "GSAM": (rules.GSAM(RHO), None, lambda s: RHO),
    "FriendlySAM": (rules.FriendlySAM(RHO, 0.9, SHARE), None, lambda s: RHO),
    "WSAM": (rules.WSAM(RHO), None, lambda s: RHO),
    "LookSAM": (rules.LookSAM(RHO), None, lambda s: RHO),
    "LossEquated": (
        rules.LossEquated(RHO_MAX),
        None,
        lambda s: min(SIGMA / s, RHO_MAX),
    ),
    "LossEquated adaptive": (
        rules.LossEquated(RHO_MAX, adaptive=True),
        0.0,
        lambda s: min(SIGMA / s, RHO_MAX),
    ),
}


def test_all_rules_are_here():
    names = {
        name
        for name in rules.__all__
        if inspect.isclass(getattr(rules, name))
        and issubclass(getattr(rules, name), rules.Rule)
    }
    assert names - {"Rule"} <= set(PERTURBATIONS)
    assert names - {"Rule", "SAM", "ASAM", "UnnormalizedSAM"} <= set(UPDATES)


@functools.cache
def perturbing(name):
    rule, _, _ = PERTURBATIONS[name]

    def perturb(gradients, weights, mean, budget):
        return rule.perturb(gradients, weights, budget, {"mean": mean})

    return perturb


@in_each
@pytest.mark.parametrize("name", PERTURBATIONS)
@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_perturbations(name, dtype, mode, data):
    _, eta, radius = PERTURBATIONS[name]
    g = data.draw(vectors(dtype))
    m = data.draw(vectors(dtype)) if name == "FriendlySAM" else 0 * g
    w = rounded(data.draw(weights), dtype)
    budget = SIGMA if "Loss" in name else RHO
    found = compiled(perturbing(name), mode)(
        *(tensors(g, dtype), weights_like(w, dtype), tensors(m, dtype)),
        tf.constant(budget, scalars_of(dtype)),
    )
    d = g - SHARE * m if name == "FriendlySAM" else g
    t = 1.0 if eta is None else np.abs(w) + eta
    s = norm(t * d)
    scalars = scalars_of(dtype).name
    tolerance, tiny = DTYPES[dtype][2], dtype_tiny(dtype)
    eps = flat(found.eps)
    assert np.isfinite(eps).all()
    if s > np.finfo(scalars).max / 2 or radius(s) < np.finfo(scalars).tiny * 9:
        assert found.radius == 0 or s < np.finfo(scalars).max
        return
    # Where d is a small difference, it is as good as g and m are.
    tolerance *= max(norm(g), norm(m)) / norm(d)
    assume(tolerance < 0.1)
    rho = radius(s)
    np.testing.assert_allclose(wide(found.norm), s, rtol=tolerance)
    np.testing.assert_allclose(wide(found.radius), rho, rtol=tolerance)
    expected = rho * t**2 * d / s
    np.testing.assert_allclose(
        *(eps, expected),
        rtol=2 * tolerance,
        atol=float(tolerance * np.abs(expected).max() + 2 * tiny),
    )


@functools.cache
def measuring(k_is_known):
    def radius(s, sigma, rho_max, k):
        return _rule.loss_equated_radius(
            s, sigma, rho_max, k if k_is_known else None
        )

    return radius


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("k_is_known", [False, True])
@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_radius_of_the_budget(dtype, mode, k_is_known, data):
    low, high, tolerance = DTYPES[dtype]
    exponent = st.floats(low + 1, high - 1)
    s, k = (wide(10) ** data.draw(exponent) for _ in range(2))
    k *= data.draw(st.sampled_from([-1, 0, 1]))
    sigma = wide(10) ** data.draw(st.floats(-6, 3))
    rho_max = data.draw(st.sampled_from([0.5, 1e4]))
    found = compiled(measuring(k_is_known), mode)(
        *(tf.constant(np.float64(v), dtype) for v in (s, sigma, rho_max, k))
    )
    square = s**2 + 2 * k * sigma if k_is_known else s**2
    # Near a double root it is as good as the difference.
    assume(abs(square) > 1e-3 * s**2)
    expected = min(2 * sigma / (s + np.sqrt(max(square, 0))), rho_max)
    atol = 2 * np.finfo(dtype).tiny
    np.testing.assert_allclose(
        wide(found), expected, rtol=500 * tolerance, atol=atol
    )


# Updates, of g, h and v, with a bound of their terms.


def orthogonal(v, other):
    return v - (v @ other) / (other @ other) * other


def gsam(g, h, v):
    return h - ALPHA * orthogonal(g, h)


def wsam(g, h, v):
    a = GAMMA / (1 - GAMMA)
    return a * h + (1 - a) * g


def reused(g, h, v):
    return g + ALPHA * norm(g) / norm(v) * v


UPDATES = {
    "GSAM": (rules.GSAM(RHO, ALPHA), gsam, 2.0),
    "WSAM": (rules.WSAM(RHO, GAMMA), wsam, 10.0),
    "StableSAM": (
        rules.StableSAM(RHO),
        lambda g, h, v: norm(g) / norm(h) * h,
        3.0,
    ),
    "LossEquated": (
        rules.LossEquated(alpha=ALPHA),
        lambda g, h, v: h - ALPHA * g,
        2.0,
    ),
    "FriendlySAM": (rules.FriendlySAM(RHO), lambda g, h, v: h, 1.0),
    "LookSAM": (rules.LookSAM(RHO, ALPHA), lambda g, h, v: h, 1.0),
    "LookSAM between": (rules.LookSAM(RHO, ALPHA), reused, 2.0),
}


@functools.cache
def updating(name, scalars):
    rule = UPDATES[name][0]
    scales = Scales(1.0, 1.0, scalars, False)

    def update(g, h, v, radius):
        plain, perturbed = (
            Gradients(x, r, scales, [True] * len(x))
            for x, r in ((g, tf.zeros_like(radius)), (h, radius))
        )
        updated, state = rule.update(
            plain, perturbed, {"orthogonal": v, "mean": v}
        )
        return [*updated], state

    return update


@in_each
@pytest.mark.parametrize("name", UPDATES)
@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_updates(name, dtype, mode, data):
    _, oracle, factor = UPDATES[name]
    _, _, tolerance = DTYPES[dtype]
    between = name.endswith("between")
    g, v = data.draw(vectors(dtype)), data.draw(vectors(dtype))
    h = data.draw(vectors(dtype) | st.just(g))
    found, state = compiled(updating(name, scalars_of(dtype)), mode)(
        *(tensors(x, dtype) for x in (g, g if between else h, v)),
        tf.constant(0.0 if between else RHO, scalars_of(dtype)),
    )
    expected = oracle(g, h, v)
    most = float(tf.as_dtype(dtype).max)
    length = np.abs(expected).max() / most
    assume(not 0.98 < length < 1.02)
    if length > 1:
        expected = g if between else h
    for size in map(norm, (g, h, v)):
        assume(size < np.finfo(scalars_of(dtype).name).max / 2)
    size = max(np.abs(x).max() for x in (g, g if between else h))
    tiny = dtype_tiny(dtype)
    np.testing.assert_allclose(
        *(flat(found), expected),
        rtol=tolerance,
        atol=float(factor * tolerance * size + 20 * tiny),
    )
    if name == "LookSAM":
        expected = orthogonal(h, g)
        np.testing.assert_allclose(
            *(flat(state["orthogonal"]), expected),
            rtol=tolerance,
            atol=float(4 * tolerance * np.abs(h).max() + 20 * tiny),
        )


@functools.cache
def averaging(decay):
    return lambda m, v: _vectors.running_mean(m, v, decay)


@in_each
@pytest.mark.parametrize("decay", [0.0, 0.9])
@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_running_means(decay, dtype, mode, data):
    m, v = data.draw(vectors(dtype)), data.draw(vectors(dtype))
    _, _, tolerance = DTYPES[dtype]
    for old, expected in ((m, decay * m + (1 - decay) * v), (0 * m, v)):
        found = compiled(averaging(decay), mode)(
            tensors(old, dtype), tensors(v, dtype)
        )
        np.testing.assert_allclose(
            *(flat(found), expected),
            rtol=tolerance,
            atol=float(tolerance * np.abs(expected).max())
            + 2 * dtype_tiny(dtype),
        )


@in_each
@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_relative_distances(dtype, mode, data):
    """How much a gradient has changed, wherever its norm is."""
    g = data.draw(vectors(dtype))
    factors = data.draw(st.lists(st.floats(-2, 2), min_size=7, max_size=7))
    h, length = rounded(np.array(factors) * g, dtype), norm(g)
    scalar = scalars_of(dtype)
    assume(dtype_tiny(scalar.name) < length < scalar.max)
    found = compiled(_vectors.relative_distance, mode)(
        tensors(h, dtype), tensors(g, dtype), tf.constant(length, scalar)
    )
    assert float(found) == pytest.approx(
        float(norm(h - g) / length), rel=1e-5, abs=1e-6
    )


BAD = {"nan": np.nan, "inf": np.inf, "-inf": -np.inf}


@in_each
@pytest.mark.parametrize("bad", BAD)
def test_running_means_that_are_not_finite(bad, dtype, mode):
    """Bad values change nothing; a bad mean is begun again."""
    good = rounded(np.arange(1.0, 8.0), dtype)
    worse = np.where(np.arange(7) == 5, BAD[bad], good)
    function = compiled(averaging(0.5), mode)

    def mean(m, v):
        return flat(function(tensors(m, dtype), tensors(v, dtype)))

    np.testing.assert_array_equal(mean(good, worse), good)
    np.testing.assert_array_equal(mean(worse, 3 * good), 3 * good)
    np.testing.assert_array_equal(mean(worse, worse), 0 * good)


@in_each
@pytest.mark.parametrize("name", PERTURBATIONS)
def test_no_perturbation_of_what_is_not_finite(name, dtype, mode):
    """0, and not 0 times infinity."""
    w = np.linspace(-1, 1, 7)  # One of them is 0, which hides nothing.
    for place, bad in itertools.product(range(7), BAD.values()):
        g = np.where(np.arange(7) == place, bad, 1.0)
        found = compiled(perturbing(name), mode)(
            *(tensors(g, dtype), weights_like(w, dtype)),
            tensors(0 * w, dtype),
            tf.constant(0.1, scalars_of(dtype)),
        )
        assert found.radius == 0
        np.testing.assert_array_equal(flat(found.eps), 0 * w)


@pytest.mark.parametrize("bad", [0.0, *BAD.values()])
def test_nor_with_a_curvature_of_the_direction(bad):
    """The direction that is differentiated along is finite."""
    seen = []

    def curvature(direction):
        seen.append(flat(direction))
        return tf.constant(2.0)

    g = [tf.constant([bad, 0.0]), None]
    found = rules.LossEquated().perturb(
        g, [g[0], g[0]], tf.constant(0.1), {}, curvature
    )
    np.testing.assert_array_equal(flat(found.eps), [0, 0])
    np.testing.assert_array_equal(seen, [[0, 0]])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("mode", MODES)
def test_numbers_whose_sum_overflows_are_finite(dtype, mode):
    most = float(tf.as_dtype(dtype).max)
    vector = [tf.cast(tf.fill([9], tf.constant(most, tf.float64)), dtype)]
    assert compiled(_vectors.are_finite, mode)(vector)
    for bad in BAD.values():
        worse = tf.concat([vector[0], tf.constant([bad], dtype)], 0)
        assert not compiled(_vectors.are_finite, mode)([*vector, worse])
