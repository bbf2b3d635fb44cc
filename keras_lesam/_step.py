"""One sharpness-aware step: climb by the rule, look again, combine.

Works on a compiled model, a rule and the passes; knows nothing of `fit`.
"""

from typing import Any
from typing import NamedTuple

import keras
import tensorflow as tf

from keras_lesam import _curvature
from keras_lesam import _passes
from keras_lesam import _workarounds


class Step(NamedTuple):
    """What a step found, before anything is written.

    Attributes:
        gradients: List like the weights, for `optimizer.apply_gradients`
            (times the loss scale); `None` where the loss has no gradient.
        batch: The rows that `loss` and `outputs` are of, a `_passes.Batch`.
        loss: Scalar tensor, the loss at the weights in loss units.
        outputs: The model's outputs at the weights.
        state: List of `(variable, tensor)` to commit.
        statistics: Dict of scalar tensors: `rho`, `gradient_norm`,
            `sharpness`, `sigma`.
        learnt: What `Problem.curvature` has learnt, a tensor, or `None`.
    """

    gradients: list
    batch: _passes.Batch
    loss: tf.Tensor
    outputs: Any
    state: list
    statistics: dict
    learnt: Any = None


class Problem(NamedTuple):
    """What stays the same from step to step.

    Attributes:
        model: A compiled and built Keras model.
        rule: The rule that gives the perturbation and the descent.
        perturbed: List of bools like the weights: which may be moved.
        curvature: Where the curvature along a climb comes from, one of the
            kinds of `_curvature`.
        shared: Whether all replicas climb as one, by the same perturbation;
            if not, each climbs by itself.
        conditional: Whether a pass that is not needed is left out at run
            time; if not, it is made, and its result is not used.
    """

    model: keras.Model
    rule: Any
    perturbed: list
    curvature: Any
    shared: bool = False
    conditional: bool = True


def plain(problem, batch, sigma, state=()):
    """The step of plain training; the slope is logged all the same.

    Args:
        problem: A `Problem`.
        batch: A `_passes.Batch`.
        sigma: Scalar tensor, the budget in loss units; taken for 0.
        state: List of `(variable, tensor)` to start from.

    Returns:
        A `Step`.
    """
    problem = problem._replace(curvature=_curvature.FirstOrder())
    first = _FirstPass(problem, batch, tf.zeros_like(sigma), state)
    return first.step(first.point.gradients)


def perturbed(problem, batch, sigma, state=()):
    """Two passes over one batch; one where there is nothing to climb.

    Arguments and result are those of `plain`.
    """
    first = _FirstPass(problem, batch, sigma, state)

    def two_passes():
        second = first.second_pass(batch)
        rise = tf.cast(second.loss - first.point.loss, sigma.dtype)
        # Where the climb ends at no loss at all, do not follow it.
        return _passes.either(
            problem.conditional,
            tf.math.is_finite(rise),
            lambda: (first.descend(second), first.climb.rho, rise),
            one_pass,
        )

    def one_pass():
        zero = tf.zeros_like(sigma)
        return first.descend(first.point), zero, zero

    gradients, rho, rise = _passes.either(
        problem.conditional, first.climb.rho > 0, two_passes, one_pass
    )
    learnt = problem.curvature.learn(first, rho, rise)
    return first.step(gradients, rho, rise, learnt)


def perturbed_from_share(problem, batch, sigma, state=(), *, share):
    """Two passes, the first of which sees only a share of the rows.

    Arguments and result are those of `plain`; `share` is in (0, 1]. The
    sharpness is not known: the two losses are of different rows.
    """
    rows = _share_of_rows(_passes.count_rows(batch), share)
    first = _FirstPass(problem, _passes.take_rows(batch, 0, rows), sigma, state)
    # Even at rho = 0: the gradient of the whole batch is still to come.
    second = first.second_pass(batch)
    if not problem.conditional:
        return first.step(first.descend(second), first.climb.rho)
    # Where the climb ends at no loss at all, the share's gradient must do.
    gradients, rho = tf.cond(
        tf.math.is_finite(second.loss),
        lambda: (first.descend(second), first.climb.rho),
        lambda: (first.descend(first.point), tf.zeros_like(sigma)),
    )
    return first.step(gradients, rho)


def in_parts(step, parts, problem, batch, sigma):
    """m-sharpness: a step for each part of the batch, one update.

    The update is the mean of the parts' gradients, as it is over replicas;
    each part starts from the state that the part before left. A batch of
    fewer rows than `parts` is taken row by row.

    Args:
        step: One of the steps above.
        parts: Int, the number of parts.
        problem: A `Problem`.
        batch: A `_passes.Batch`.
        sigma: Scalar tensor, the budget in loss units.

    Returns:
        A `Step`.
    """
    steps, shares, state = [], [], {}
    for start, stop, share in _parts(_passes.count_rows(batch), parts):
        part = _passes.take_rows(batch, start, stop)
        steps.append(step(problem, part, sigma, list(state.values())))
        shares.append(share)
        state.update({id(v): (v, value) for v, value in steps[-1].state})
    batch, outputs = _join([(s.batch, s.outputs) for s in steps], shares)
    gradients = zip(*(s.gradients for s in steps))
    return Step(
        gradients=[
            _mean_gradient(g, shares, variable)
            for g, variable in zip(gradients, problem.model.trainable_variables)
        ],
        batch=batch,
        loss=_mean([s.loss for s in steps], shares),
        outputs=outputs,
        state=list(state.values()),
        statistics={
            name: _mean([s.statistics[name] for s in steps], shares)
            for name in steps[0].statistics
        },
        learnt=None
        if steps[0].learnt is None
        else _mean([s.learnt for s in steps], shares),
    )


class _FirstPass:
    """The first pass and the climb that follows from it."""

    def __init__(self, problem, batch, sigma, state):
        self.problem, self.batch = problem, batch
        self.sigma, self.state = sigma, state
        model = problem.model
        self.weights = _passes.read(model.trainable_variables)
        scale = _passes.loss_scale if problem.shared else _passes.gradient_scale
        self.scale = tf.cast(scale(model.optimizer), sigma.dtype)
        with problem.curvature.recording(self.weights) as self.tape:
            self.point = _passes.evaluate(model, self.weights, batch, state)
            # Of the weights that move, without repeated rows.
            self.gradients = [
                _dense(g) if moves and g is not None else None
                for g, moves in zip(self.point.gradients, problem.perturbed)
            ]
        self.climb = problem.rule.climb(
            self.over_replicas(self.gradients),
            self.weights,
            sigma,
            self.scale,
            problem.curvature.along(self),
        )

    def over_replicas(self, tensors):
        """Sums of a nest of gradients, or of what is linear in them."""
        if not self.problem.shared:
            return tensors
        found = _passes.sum_over_replicas(
            [t for t in tf.nest.flatten(tensors) if t is not None]
        )
        found = iter(found)
        return tf.nest.map_structure(
            lambda t: None if t is None else next(found), tensors
        )

    def second_pass(self, batch):
        """The model at `w + eps`, from the same state."""
        weights = [
            w if eps is None else w + eps
            for w, eps in zip(self.weights, self.climb.perturbation)
        ]
        return _passes.evaluate(self.problem.model, weights, batch, self.state)

    def descend(self, point):
        """`g_hat` for every weight, from the gradients at `point`."""
        return [
            self._descend(g, h, variable)
            for g, h, variable in zip(
                self.point.gradients,
                point.gradients,
                self.problem.model.trainable_variables,
            )
        ]

    def _descend(self, gradient, other, variable):
        if gradient is None or not _passes.is_weight(variable):
            return gradient
        if not self.problem.rule.alpha:
            return other
        if other is gradient:
            return _dense(gradient)
        gradient, other = _dense(gradient), _dense(other)
        g_hat = self.problem.rule.descent(other, gradient)
        # A climb of no length is a plain step, all of it.
        return tf.where(self.climb.rho > 0, g_hat, other)

    def step(self, gradients, rho=None, rise=None, learnt=None):
        zero = tf.zeros_like(self.sigma)
        return Step(
            gradients=gradients,
            batch=self.batch,
            loss=self.point.loss,
            outputs=self.point.outputs,
            state=self.point.state,
            statistics={
                "rho": zero if rho is None else rho,
                "gradient_norm": self.climb.slope,
                "sharpness": zero if rise is None else rise,
                "sigma": self.sigma,
            },
            learnt=learnt,
        )


def _dense(gradient):
    # Rows that occur more than once are summed here; a norm needs the sum.
    return tf.convert_to_tensor(gradient)


def _share_of_rows(rows, share):
    if isinstance(rows, int):
        return max(1, -int(-rows * share // 1))
    wanted = tf.math.ceil(tf.cast(rows, tf.float64) * share)
    return tf.maximum(1, tf.cast(wanted, tf.int32))


def _parts(rows, parts):
    """`(start, stop, share)` of each part: its rows, its part of the mean."""
    if isinstance(rows, int):
        parts = min(parts, rows)
    for i in range(parts):
        start, stop = i * rows // parts, (i + 1) * rows // parts
        if isinstance(rows, int):
            yield start, stop, 1 / parts
        else:
            # An empty part borrows a row, and weighs nothing.
            share = tf.cast(stop > start, tf.float64)
            share /= tf.cast(tf.minimum(parts, rows), tf.float64)
            yield start, tf.maximum(stop, start + 1), share


def _join(nests, shares):
    """Nests of tensors joined along their rows, but for those of share 0."""

    def join(*tensors):
        if not isinstance(shares[0], float):
            tensors = [
                _passes.take_rows(
                    t, 0, tf.where(share > 0, _passes.count_rows(t), 0)
                )
                for t, share in zip(tensors, shares)
            ]
        if isinstance(tensors[0], tf.SparseTensor):
            return tf.sparse.concat(0, tensors)
        return tf.concat(tensors, 0)

    return keras.tree.map_structure(
        lambda *tensors: (
            None
            if tensors[0] is None
            else _workarounds.map_with_masks(join, tensors)
        ),
        *nests,
    )


def _mean(values, shares):
    return tf.add_n([v * tf.cast(s, v.dtype) for v, s in zip(values, shares)])


def _mean_gradient(gradients, shares, variable):
    if gradients[0] is None or not _passes.is_weight(variable):
        return gradients[-1]
    if not isinstance(gradients[0], tf.IndexedSlices):
        return _mean(gradients, shares)
    values = [g.values * tf.cast(s, g.dtype) for g, s in zip(gradients, shares)]
    return tf.IndexedSlices(
        tf.concat(values, 0),
        tf.concat([g.indices for g in gradients], 0),
        gradients[0].dense_shape,
    )
