"""The rule on paper: closed forms, in float64."""

import math

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

from keras_lesam import _rule


def scalar(value, dtype=tf.float64):
    return tf.constant(value, dtype)


def climb(gradients, weights, sigma, rho_max=math.inf, adaptive=False, scale=1):
    rule = _rule.LossEquated(scalar(rho_max), adaptive)
    tensors = [None if g is None else scalar(g) for g in gradients]
    return rule.climb(
        tensors, [scalar(w) for w in weights], scalar(sigma), scale
    )


def test_first_order_radius_is_sigma_over_the_slope():
    found = climb([[3.0, 0.0], [4.0]], [[1.0, 1.0], [1.0]], sigma=0.5)
    assert found.slope == 5.0
    assert found.rho == 0.1
    np.testing.assert_allclose(found.perturbation[0], [0.06, 0.0])
    np.testing.assert_allclose(found.perturbation[1], [0.08])


def test_adaptive_climb_is_loss_equated():
    gradient, weight = np.array([1.0, -2.0, 3.0]), np.array([2.0, -0.5, 0.0])
    found = climb([gradient], [weight], sigma=0.3, adaptive=True)
    slope = math.hypot(2.0, 1.0)  # ||  |w| g  ||
    np.testing.assert_allclose(found.slope, slope)
    np.testing.assert_allclose(found.rho, 0.3 / slope)
    np.testing.assert_allclose(
        found.perturbation[0], 0.3 / slope**2 * weight**2 * gradient
    )
    # To first order the loss rises by the budget.
    np.testing.assert_allclose(gradient @ found.perturbation[0].numpy(), 0.3)


def test_cap():
    found = climb([[3.0, 4.0]], [[0.0, 0.0]], sigma=0.5, rho_max=0.02)
    assert found.rho == 0.02
    np.testing.assert_allclose(found.perturbation[0], [0.012, 0.016])


def test_the_scale_of_the_gradients_cancels():
    plain = climb([[3.0, 4.0]], [[0.0, 0.0]], sigma=0.5)
    scaled = climb([[3e4, 4e4]], [[0.0, 0.0]], sigma=0.5, scale=1e4)
    np.testing.assert_allclose(scaled.rho, plain.rho)
    np.testing.assert_allclose(scaled.slope, plain.slope)
    np.testing.assert_allclose(scaled.perturbation[0], plain.perturbation[0])


@pytest.mark.parametrize("bad", [0.0, math.inf, -math.inf, math.nan])
def test_no_climb_without_a_finite_slope(bad):
    found = climb([[bad, 0.0]], [[1.0, 1.0]], sigma=0.5)
    assert found.rho == 0.0
    if math.isfinite(bad):
        np.testing.assert_array_equal(found.perturbation[0], [0.0, 0.0])


def test_weights_without_gradient_stay():
    found = climb([None, [2.0]], [[1.0], [1.0]], sigma=1.0)
    assert found.perturbation[0] is None
    assert found.slope == 2.0


def test_float16_gradients_are_summed_in_float32():
    gradient = tf.fill([1000], tf.constant(300.0, tf.float16))
    slope = _rule.slope([gradient], [None], tf.float32)
    np.testing.assert_allclose(slope, 300 * math.sqrt(1000), rtol=1e-6)


@pytest.mark.parametrize("curvature", [-3.0, 0.0, 0.2, 8.0])
def test_second_order_radius_solves_its_quadratic(curvature):
    slope, sigma = 2.0, 0.4
    rho = _rule.radius(
        scalar(slope), scalar(sigma), scalar(math.inf), scalar(curvature)
    )
    np.testing.assert_allclose(slope * rho + curvature * rho**2 / 2, sigma)


def test_second_order_radius_at_a_minimum_is_finite():
    rho = _rule.radius(
        scalar(1e-12), scalar(0.1), scalar(math.inf), scalar(5.0)
    )
    np.testing.assert_allclose(rho, math.sqrt(2 * 0.1 / 5.0), rtol=1e-6)


def test_no_curvature_is_the_first_order():
    arguments = scalar(0.7), scalar(0.2), scalar(math.inf)
    np.testing.assert_allclose(
        _rule.radius(*arguments, curvature=scalar(0.0)),
        _rule.radius(*arguments),
    )


def test_descent_removes_a_share_of_the_gradient():
    rule = _rule.LossEquated(scalar(math.inf), alpha=0.25)
    assert rule.descent(None) == (1.0, -0.25)


@pytest.mark.parametrize(
    ("progress", "share"),
    [
        (0.0, 0.0),
        (0.05, 0.5),
        (0.1, 1.0),
        (0.5, 1.0),
        (0.8, 1.0),
        (0.9, 0.5),
        (0.95, math.cos(0.375 * math.pi) ** 2),
        (1.0, 0.0),
        (7.0, 0.0),
    ],
)
def test_budget_over_time(progress, share):
    budget = _rule.budget(scalar(0.3), scalar(progress), 0.1, 0.2)
    np.testing.assert_allclose(budget, 0.3 * share, atol=1e-15)


def test_budget_without_shares_is_constant():
    for progress in (0.0, 0.3, 1.0):
        assert _rule.budget(scalar(0.3), scalar(progress), 0.0, 0.0) == 0.3


finite = st.floats(-(2.0**100), 2.0**100, width=32)


@settings(max_examples=300, deadline=None)
@given(
    gradient=st.lists(finite, min_size=1, max_size=5),
    sigma=st.floats(0, 2.0**20, width=32),
    rho_max=st.none() | st.floats(1e-3, 1e6),
    adaptive=st.booleans(),
    seed=st.integers(0, 9),
)
def test_finite_gradients_give_finite_perturbations(
    gradient, sigma, rho_max, adaptive, seed
):
    """Over the whole of float32, subnormal and overflowing norms included."""
    weight = np.random.default_rng(seed).normal(size=len(gradient))
    cap = math.inf if rho_max is None else rho_max
    rule = _rule.LossEquated(tf.constant(cap, tf.float32), adaptive)
    found = rule.climb(
        [tf.constant(gradient, tf.float32)],
        [tf.constant(weight, tf.float32)],
        tf.constant(sigma, tf.float32),
    )
    assert np.isfinite(found.rho)
    assert found.rho >= 0
    if rho_max is not None:
        assert found.rho <= np.float32(rho_max)
    assert np.all(np.isfinite(found.perturbation[0]))
    if not adaptive:
        length = np.linalg.norm(np.float64(found.perturbation[0]))
        # Where squares underflow, eps is shorter, never longer.
        assert length <= found.rho * (1 + 1e-5)


@settings(max_examples=200, deadline=None)
@given(
    slope=st.floats(1e-6, 1e6),
    sigma=st.floats(0, 1e3),
    curvature=st.floats(-1e3, 1e3),
)
def test_radius_meets_the_budget_wherever_it_can(slope, sigma, curvature):
    rho = float(
        _rule.radius(
            scalar(slope), scalar(sigma), scalar(math.inf), scalar(curvature)
        )
    )
    rise = slope * rho + curvature * rho**2 / 2
    if slope**2 + 2 * curvature * sigma >= 0:
        assert rise == pytest.approx(sigma, rel=1e-6, abs=1e-12)
    else:
        assert rise <= sigma * (1 + 1e-9)
