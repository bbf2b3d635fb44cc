"""The rule on paper: closed forms, in float64."""

import math

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st

from keras_lesam import _rule
from keras_lesam import _vectors
from keras_lesam import budgets
from keras_lesam import rules


def scalar(value, dtype=tf.float64):
    return tf.constant(value, dtype)


def perturb(gradients, weights, sigma, rho_max=None, adaptive=False):
    rule = rules.LossEquated(rho_max, adaptive)
    tensors = [None if g is None else scalar(g) for g in gradients]
    return rule.perturb(
        tensors, [scalar(w) for w in weights], scalar(sigma), {}
    )


def test_first_order_radius_is_sigma_over_the_slope():
    found = perturb([[3.0, 0.0], [4.0]], [[1.0, 1.0], [1.0]], sigma=0.5)
    assert found.norm == 5.0
    assert found.radius == 0.1
    np.testing.assert_allclose(found.eps[0], [0.06, 0.0])
    np.testing.assert_allclose(found.eps[1], [0.08])


def test_adaptive_perturbation_is_loss_equated():
    gradient, weight = np.array([1.0, -2.0, 3.0]), np.array([2.0, -0.5, 0.0])
    found = perturb([gradient], [weight], sigma=0.3, adaptive=True)
    slope = math.hypot(2.0, 1.0)  # ||  |w| g  ||
    np.testing.assert_allclose(found.norm, slope)
    np.testing.assert_allclose(found.radius, 0.3 / slope)
    np.testing.assert_allclose(
        found.eps[0], 0.3 / slope**2 * weight**2 * gradient
    )
    # To first order the loss rises by the budget.
    np.testing.assert_allclose(gradient @ found.eps[0].numpy(), 0.3)


def test_cap():
    found = perturb([[3.0, 4.0]], [[0.0, 0.0]], sigma=0.5, rho_max=0.02)
    assert found.radius == 0.02
    np.testing.assert_allclose(found.eps[0], [0.012, 0.016])


@pytest.mark.parametrize("bad", [0.0, math.inf, -math.inf, math.nan])
def test_no_perturbation_without_a_finite_slope(bad):
    found = perturb([[bad, 0.0]], [[1.0, 1.0]], sigma=0.5)
    assert found.radius == 0.0
    if math.isfinite(bad):
        np.testing.assert_array_equal(found.eps[0], [0.0, 0.0])


def test_weights_without_gradient_stay():
    found = perturb([None, [2.0]], [[1.0], [1.0]], sigma=1.0)
    assert found.eps[0] is None
    assert found.norm == 2.0


def test_float16_gradients_are_summed_in_float32():
    gradient = tf.fill([1000], tf.constant(300.0, tf.float16))
    slope = _vectors.norm([gradient], tf.float32)
    np.testing.assert_allclose(slope, 300 * math.sqrt(1000), rtol=1e-6)


@pytest.mark.parametrize("curvature", [-3.0, 0.0, 0.2, 8.0])
def test_second_order_radius_solves_its_quadratic(curvature):
    slope, sigma = 2.0, 0.4
    rho = _rule.loss_equated_radius(
        scalar(slope), scalar(sigma), scalar(math.inf), scalar(curvature)
    )
    np.testing.assert_allclose(slope * rho + curvature * rho**2 / 2, sigma)


def test_second_order_radius_at_a_minimum_is_finite():
    rho = _rule.loss_equated_radius(
        scalar(1e-12), scalar(0.1), scalar(math.inf), scalar(5.0)
    )
    np.testing.assert_allclose(rho, math.sqrt(2 * 0.1 / 5.0), rtol=1e-6)


def test_no_curvature_is_the_first_order():
    arguments = scalar(0.7), scalar(0.2), scalar(math.inf)
    np.testing.assert_allclose(
        _rule.loss_equated_radius(*arguments, curvature=scalar(0.0)),
        _rule.loss_equated_radius(*arguments),
    )


def budget_at(fraction, **shares):
    return budgets.Constant(0.3, **shares)(
        budgets.Progress(scalar(0, tf.int64), scalar(fraction)), None, {}
    )


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
    budget = budget_at(progress, warmup=0.1, anneal=0.2)
    np.testing.assert_allclose(budget, 0.3 * share, atol=1e-15)


def test_budget_without_shares_is_constant():
    for progress in (0.0, 0.3, 1.0):
        assert budget_at(progress) == 0.3


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
    found = rules.LossEquated(rho_max, adaptive).perturb(
        [tf.constant(gradient, tf.float32)],
        [tf.constant(weight, tf.float32)],
        tf.constant(sigma, tf.float32),
        {},
    )
    assert np.isfinite(found.radius)
    assert found.radius >= 0
    if rho_max is not None:
        assert found.radius <= np.float32(rho_max)
    assert np.all(np.isfinite(found.eps[0]))
    if not adaptive:
        length = np.linalg.norm(np.float64(found.eps[0]))
        # Where squares underflow, eps is shorter, never longer.
        assert length <= found.radius * (1 + 1e-5)


@settings(max_examples=200, deadline=None)
@given(
    slope=st.floats(1e-6, 1e6),
    sigma=st.floats(0, 1e3),
    curvature=st.floats(-1e3, 1e3),
)
def test_radius_meets_the_budget_wherever_it_can(slope, sigma, curvature):
    rho = float(
        _rule.loss_equated_radius(
            scalar(slope), scalar(sigma), scalar(math.inf), scalar(curvature)
        )
    )
    rise = slope * rho + curvature * rho**2 / 2
    if slope**2 + 2 * curvature * sigma >= 0:
        assert rise == pytest.approx(sigma, rel=1e-6, abs=1e-12)
    else:
        assert rise <= sigma * (1 + 1e-9)
