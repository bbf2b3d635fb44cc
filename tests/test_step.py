"""Steps as pure functions: gradients, budgets and gates, in float64.

The loss is `mean (x w)^2` with `x` the identity, whose gradient is `2 w / n`.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_lesam import _passes
from keras_lesam import _step
from keras_lesam import ascents
from keras_lesam import budgets
from keras_lesam import estimators
from keras_lesam import rules
from keras_lesam._data import Batch
from keras_lesam._engines import StatelessPasses
from keras_lesam._gradients import Gradients
from keras_lesam._gradients import Scales
from keras_lesam._records import StepContext
from keras_lesam._records import StepInputs

pytestmark = pytest.mark.usefixtures("float64")

WEIGHTS = np.array([3.0, -4.0])


def scalar(value):
    return tf.constant(value, tf.float64)


def context(rule, **options):
    net = keras.Sequential(
        [keras.Input((2,)), keras.layers.Dense(1, use_bias=False)]
    )
    net.set_weights([WEIGHTS[:, None]])
    net.compile(keras.optimizers.SGD(0.1), "mse")
    defaults = {
        "model": net,
        "passes": StatelessPasses(),
        "rule": rule,
        "budget": budgets.Constant(0.5),
        "estimator": estimators.FirstOrder(),
        "perturb_mask": [True],
        "is_weight": [True],
        "num_batch_splits": 1,
        "is_global": False,
        "use_cond": True,
        "dtype": tf.float64,
    }
    return StepContext(**{**defaults, **options})


BATCH = Batch(tf.eye(2, dtype=tf.float64), tf.zeros((2, 1), tf.float64), None)


def inputs(budget=0.5, **options):
    states = {"rule": {}, "budget": {}, "ascent": {}, "curvature": {}}
    progress = budgets.Progress(tf.constant(7, tf.int64), scalar(0.5))
    budget = None if budget is None else scalar(budget)
    return StepInputs(progress, states, budget, **options)


def gradient(w):
    return w  # 2 w / n of two rows


@pytest.mark.parametrize("use_cond", [True, False])
def test_two_passes_by_hand(use_cond):
    step = _step.two_pass_step(
        context(rules.SAM(), use_cond=use_cond), BATCH, inputs()
    )
    eps = 0.5 * gradient(WEIGHTS) / 5
    np.testing.assert_allclose(step.gradients[0][:, 0], WEIGHTS + eps)
    np.testing.assert_allclose(step.loss, 12.5)
    np.testing.assert_allclose(step.statistics["rho"], 0.5)
    np.testing.assert_allclose(step.statistics["gradient_norm"], 5.0)
    rise = (np.sum((WEIGHTS + eps) ** 2) - 25) / 2
    np.testing.assert_allclose(step.statistics["sharpness"], rise)


@pytest.mark.parametrize(
    "gated",
    [
        inputs(0.0),
        inputs().only_if(tf.constant(False)),
        inputs().only_if(tf.constant(True)).only_if(tf.constant(False)),
    ],
)
def test_without_a_budget_or_behind_a_gate_it_is_plain(gated):
    for step in (_step.two_pass_step, _step.plain_step):
        found = step(context(rules.GSAM()), BATCH, gated)
        np.testing.assert_array_equal(found.gradients[0][:, 0], WEIGHTS)
        assert found.statistics["rho"] == 0.0
        assert found.statistics["sigma"] == 0.0


def test_a_budget_by_the_loss_is_asked_after_the_first_pass():
    asked = []

    class Half(budgets.Budget):
        def __call__(self, progress, losses, state):
            asked.append(float(losses.plain))
            return 0.5 * losses.plain

    step = _step.two_pass_step(
        context(rules.LossEquated(), budget=Half()), BATCH, inputs(None)
    )
    assert asked == [12.5]
    np.testing.assert_allclose(step.statistics["sigma"], 6.25)
    np.testing.assert_allclose(step.statistics["rho"], 6.25 / 5)


def test_an_exact_curvature_meets_the_budget():
    step = _step.two_pass_step(
        context(rules.LossEquated(), estimator=estimators.Exact()),
        *(BATCH, inputs(0.5)),
    )
    np.testing.assert_allclose(step.statistics["sharpness"], 0.5)


def test_parts_are_means():
    whole = context(rules.SAM(), num_batch_splits=2)
    step = _step.in_parts(_step.two_pass_step, whole, BATCH, inputs())
    # Each row sees its own weight only: g = 2 w, eps = 0.5 in its direction.
    expected = [(3.5 * 2) / 2, (-4.5 * 2) / 2]
    np.testing.assert_allclose(step.gradients[0][:, 0], expected)
    np.testing.assert_allclose(step.loss, 12.5)
    assert step.outputs.shape == (2, 1)


def test_every_gates_by_the_iterations():
    found = []
    for n in (7, 2):
        ascents.Every(n).run(
            context(rules.SAM()),
            BATCH,
            inputs(),
            lambda step: found.append(float(step.statistics["rho"])),
        )
    assert found == [0.5, 0.0]


# Gradients, as a rule sees them.


def gradients(scaled, local=1.0, is_weight=None, radius=0.0, is_global=False):
    scales = Scales(local, local, tf.float64, is_global)
    is_weight = is_weight or [True] * len(scaled)
    return Gradients(scaled, scalar(radius), scales, is_weight)


def test_gradients_are_unscaled_and_dense():
    rows = tf.IndexedSlices(
        scalar([[1.0], [2.0]]), tf.constant([1, 1]), tf.constant([3, 1])
    )
    found = gradients([scalar([8.0]), None, rows], local=scalar(4.0))
    np.testing.assert_allclose(found[0], [2.0])
    assert found[1] is None
    np.testing.assert_allclose(found[2], [[0.0], [0.75], [0.0]])
    np.testing.assert_allclose(found.norm(), np.hypot(2.0, 0.75))
    assert len(found) == len([*found]) == 3


def test_sparse_gradients_stay_sparse_where_a_rule_does_not_look():
    x = np.array([[1], [1], [2]])
    net = keras.Sequential(
        [keras.layers.Embedding(5, 2), keras.layers.Flatten()]
    )
    net.build((None, 1))
    net.compile("sgd", "mse")
    batch = Batch(tf.constant(x), tf.zeros((3, 2), tf.float64), None)
    for rule, is_sparse in ((rules.SAM(), True), (rules.GSAM(), False)):
        found = _step.two_pass_step(
            context(rule, model=net), batch, inputs()
        ).gradients
        assert isinstance(found[0], tf.IndexedSlices) == is_sparse


def test_what_is_no_weight_is_not_seen_and_not_changed():
    found = gradients(
        [scalar([1.0]), scalar([9.0])], is_weight=[True, False], radius=1.0
    )
    assert found[1] is None
    np.testing.assert_allclose(found.norm(), 1.0)
    changed = found.rescale(rules.combine(found, found, 2.0, 1.0))
    np.testing.assert_allclose(changed, [[3.0], [9.0]])


def test_float16_gradients_are_unscaled_in_float32():
    """At the loss scale they are numbers, below it they underflow."""
    tiny = tf.constant([0.25], tf.float16)
    found = gradients([tiny], local=tf.constant(2.0**30))
    np.testing.assert_allclose(found[0], [0.25 / 2**30])
    [back] = found.rescale([*found])
    assert back.dtype == tf.float16
    np.testing.assert_array_equal(back, tiny)


@pytest.mark.parametrize("scale", [1.0, 1 / 3])
def test_python_scales_are_not_rounded_to_float32(scale):
    found = gradients([scalar([1.0])], local=scale)
    np.testing.assert_allclose(found[0], [1 / scale], rtol=1e-15)
    np.testing.assert_allclose(found.rescale([*found])[0], [1.0], rtol=1e-15)


def test_combine_is_plain_where_there_was_no_ascent():
    g, h = gradients([scalar([1.0])]), gradients([scalar([3.0])], radius=0.1)
    np.testing.assert_allclose(rules.combine(g, h, 1.0, -0.25), [[2.75]])
    stays = gradients([scalar([3.0])], radius=0.0)
    np.testing.assert_allclose(rules.combine(g, stays, 1.0, -0.25), [[3.0]])


def test_inner_products_in_a_branch_are_refused_where_replicas_meet():
    @tf.function
    def branch(is_global):
        a = gradients([scalar([3.0])], is_global=is_global)
        return tf.cond(scalar(1.0) > 0, lambda: a.dot(a), lambda: scalar(0.0))

    assert branch(False) == 9.0
    with pytest.raises(RuntimeError, match=r"`reduce_with` before `tf.cond`"):
        branch(True)


def test_reduced_gradients_may_be_looked_at_in_a_branch():
    @tf.function
    def branch():
        a = gradients([scalar([3.0])], is_global=True)
        a.reduce_with(a)
        return tf.cond(scalar(1.0) > 0, lambda: a.dot(a), lambda: scalar(0.0))

    assert branch() == 9.0


def test_passes_are_not_made_where_they_are_not_needed():
    """What `passes` says is what is traced."""
    for ascent, expected in (
        (ascents.FullBatch(), 2.0),
        (ascents.Fraction(0.25), 1.25),
        (ascents.Momentum(), 1.0),
        (ascents.Every(4), 1.25),
        (ascents.Every(4, ascents.Fraction(0.5)), 1.125),
    ):
        assert ascent.passes == expected


def test_memory_goes_along_earlier_gradients():
    before = inputs()
    mean = {"mean": [scalar([[0.0], [1.0]])]}
    states = {**before.states, "ascent": mean}
    step = ascents.Momentum(0.9).step(
        context(rules.SAM()), BATCH, before._replace(states=states)
    )
    there = WEIGHTS + np.array([0.0, 0.5])
    np.testing.assert_allclose(step.gradients[0][:, 0], there)
    np.testing.assert_allclose(
        step.states["ascent"]["mean"][0][:, 0],
        0.9 * np.array([0.0, 1.0]) + 0.1 * there,
    )


def test_the_weights_are_read_only_through_the_passes(monkeypatch):
    """A step makes its passes by `compute_loss_and_gradients`, and no other."""
    points = []
    original = _passes.compute_loss_and_gradients

    def recording(model, weights, *args):
        points.append(np.ravel(weights[0]))
        return original(model, weights, *args)

    monkeypatch.setattr(_passes, "compute_loss_and_gradients", recording)
    _step.two_pass_step(context(rules.SAM()), BATCH, inputs())
    np.testing.assert_allclose(points[0], WEIGHTS)
    np.testing.assert_allclose(points[1], WEIGHTS * 1.1)
