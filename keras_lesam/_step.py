"""One sharpness-aware step: climb by the rule, look again, combine.

Works on a compiled model, a rule and the passes; knows nothing of `fit`.
"""

from typing import Any
from typing import NamedTuple

import keras
import tensorflow as tf

from keras_lesam import _curvature
from keras_lesam import _passes
from keras_lesam import _rule
from keras_lesam import _workarounds

# What `perturbed_from_memory` keeps: the mean gradient of the steps before.
AHEAD = "ahead"


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
            `sharpness`, `sigma` (the budget).
        learnt: List of `(variable, tensor)`, what the next step may know of
            this one: a mean over parts and replicas.
    """

    gradients: list
    batch: _passes.Batch
    loss: tf.Tensor
    outputs: Any
    state: list
    statistics: dict
    learnt: list


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
        memory: Dict from names to what is kept for each weight: lists like
            the weights, of variables, or `None` where nothing is.
        between: Bool scalar tensor, whether this is a step between two
            climbs; `None` if there are none.
    """

    model: keras.Model
    rule: Any
    perturbed: list
    curvature: Any
    shared: bool = False
    conditional: bool = True
    memory: dict = {}
    between: Any = None


def plain(problem, batch, budget, state=()):
    """The step of plain training; the slope is logged all the same.

    Args:
        problem: A `Problem`.
        batch: A `_passes.Batch`.
        budget: Scalar tensor, how much the rule may climb; taken for 0.
        state: List of `(variable, tensor)` to start from.

    Returns:
        A `Step`.
    """
    problem = problem._replace(curvature=_curvature.FirstOrder())
    first = _FirstPass(problem, batch, tf.zeros_like(budget), state)
    return first.step(first.point.gradients)


def perturbed(problem, batch, budget, state=()):
    """Two passes over one batch; one where there is nothing to climb.

    Arguments and result are those of `plain`.
    """
    first = _FirstPass(problem, batch, budget, state)

    def two_passes():
        second = first.second_pass(batch)
        rise = tf.cast(second.loss - first.point.loss, budget.dtype)
        # Where the climb ends at no loss at all, do not follow it.
        return _passes.either(
            problem.conditional,
            tf.math.is_finite(rise),
            lambda: (first.follow(second), first.climb.rho, rise),
            one_pass,
        )

    def one_pass():
        zero = tf.zeros_like(budget)
        return first.follow(first.point), zero, zero

    gradients, rho, rise = _passes.either(
        problem.conditional, first.climb.rho > 0, two_passes, one_pass
    )
    return first.step(gradients, rho, rise)


def perturbed_from_share(problem, batch, budget, state=(), *, share):
    """Two passes, the first of which sees only a share of the rows.

    Arguments and result are those of `plain`; `share` is in (0, 1]. The
    sharpness is not known: the two losses are of different rows.
    """
    rows = _share_of_rows(_passes.count_rows(batch), share)
    part = _passes.take_rows(batch, 0, rows)
    first = _FirstPass(problem, part, budget, state)
    # Even at rho = 0: the gradient of the whole batch is still to come.
    second = first.second_pass(batch)
    if not problem.conditional:
        return first.step(first.follow(second), first.climb.rho)
    # Where the climb ends at no loss at all, the share's gradient must do.
    gradients, rho = tf.cond(
        tf.math.is_finite(second.loss),
        lambda: (first.follow(second), first.climb.rho),
        lambda: (first.follow(first.point), tf.zeros_like(budget)),
    )
    return first.step(gradients, rho)


def perturbed_from_memory(problem, batch, budget, state=(), *, decay):
    """One pass, at `w + eps`, along the gradients of the steps before.

    Arguments and result are those of `plain`. Loss, outputs and state are
    those of the one pass. `problem.memory[AHEAD]` is the running mean of the
    gradients, which forgets a share of 1 - `decay` in each step: `decay` 0 is
    the gradient of the step before.
    """
    model = problem.model
    weights = _passes.read(model.trainable_variables)
    means = _read_memory(problem)[AHEAD]
    climb = problem.rule.climb(means, weights, budget)
    moved = _moved(weights, climb.perturbation)
    point = _passes.evaluate(model, moved, batch, state)
    scale = _passes.gradient_scale(model.optimizer)
    found = _rule.running_mean(means, _unscaled(point.gradients, scale), decay)
    statistics = {"rho": climb.rho, "gradient_norm": climb.slope}
    return Step(
        gradients=point.gradients,
        batch=batch,
        loss=point.loss,
        outputs=point.outputs,
        state=point.state,
        statistics={**statistics, "sigma": budget},
        learnt=_pairs(problem.memory, {AHEAD: found}),
    )


def in_parts(step, parts, problem, batch, budget):
    """m-sharpness: a step for each part of the batch, one update.

    The update is the mean of the parts' gradients, as it is over replicas;
    each part starts from the state that the part before left. A batch of
    fewer rows than `parts` is taken row by row.

    Args:
        step: One of the steps above.
        parts: Int, the number of parts.
        problem: A `Problem`.
        batch: A `_passes.Batch`.
        budget: Scalar tensor, how much the rule may climb.

    Returns:
        A `Step`.
    """
    steps, shares, state = [], [], {}
    for start, stop, share in _parts(_passes.count_rows(batch), parts):
        part = _passes.take_rows(batch, start, stop)
        steps.append(step(problem, part, budget, list(state.values())))
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
        learnt=[
            (found[0][0], _mean([value for _, value in found], shares))
            for found in zip(*(s.learnt for s in steps))
        ],
    )


class _FirstPass:
    """The first pass and the climb that follows from it."""

    def __init__(self, problem, batch, budget, state):
        self.problem, self.batch = problem, batch
        self.budget, self.state = budget, state
        model = problem.model
        self.weights = _passes.read(model.trainable_variables)
        self.memory = _read_memory(problem)
        scale = _passes.loss_scale if problem.shared else _passes.gradient_scale
        self.scale = tf.cast(scale(model.optimizer), budget.dtype)
        with problem.curvature.recording(self.weights) as self.tape:
            self.point = _passes.evaluate(model, self.weights, batch, state)
            # Of the weights that move, without repeated rows.
            self.gradients = _of_those_that_move(problem, self.point.gradients)
        self.climb = problem.rule.climb(
            problem.rule.ascent(
                self.over_replicas(self.gradients), self.scale, self.memory
            ),
            self.weights,
            budget,
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
        weights = _moved(self.weights, self.climb.perturbation)
        return _passes.evaluate(self.problem.model, weights, batch, self.state)

    def follow(self, point):
        """The gradients at `point`, and for what is no weight those here."""
        followed = [
            h if _passes.is_weight(variable) else g
            for g, h, variable in zip(
                self.point.gradients, point.gradients, self._variables
            )
        ]
        return _all_dense(followed) if self._looks_at_both else followed

    def step(self, gradients, rho=None, rise=None):
        """The step that ends with the `gradients` found by `follow`.

        Of a climb of length `rho` along which the loss rose by `rise`.
        """
        zero = tf.zeros_like(self.budget)
        learnt = []
        if rho is None:
            rho = zero
        if rise is not None:
            learnt += self.problem.curvature.learn(self, rho, rise)
        if self._looks_at_both:
            gradients, remembered = self._look_at_both(gradients, rho > 0)
            learnt += _pairs(self.problem.memory, remembered)
        return Step(
            gradients=gradients,
            batch=self.batch,
            loss=self.point.loss,
            outputs=self.point.outputs,
            state=self.point.state,
            statistics={
                "rho": rho,
                "gradient_norm": self.climb.slope,
                "sharpness": zero if rise is None else rise,
                "sigma": self.budget,
            },
            learnt=learnt,
        )

    @property
    def _variables(self):
        return self.problem.model.trainable_variables

    @property
    def _looks_at_both(self):
        """Whether the rule wants more of the gradients than the second."""
        return bool(self.problem.rule.combines or self.problem.rule.keeps)

    def _look_at_both(self, perturbed, climbed):
        """`g_hat`, and what the rule remembers.

        Outside of any branch: replicas may have to meet for it.
        """
        rule, memory = self.problem.rule, self.memory
        plain = _all_dense(self.point.gradients)
        products = _Products(self, plain, perturbed)
        scale = _passes.gradient_scale(self.problem.model.optimizer)
        remembered = rule.remember(
            memory,
            _unscaled(self._weights_only(plain), scale),
            _unscaled(self._weights_only(perturbed), scale),
            products,
            climbed,
        )
        gradients = perturbed
        if rule.combines:
            gradients = self._combine(perturbed, plain, products, climbed)
        if rule.every > 1:
            gradients = self._reuse(gradients, products.totals[0])
        return gradients, remembered

    def _combine(self, perturbed, plain, products, climbed):
        """`a h + b g`; a climb of no length is a plain step, all of it."""
        a, b = self.problem.rule.descent(products)
        return [
            h
            if g is None or not _passes.is_weight(variable)
            else tf.where(climbed, _times(a, h) + _times(b, g), h)
            for h, g, variable in zip(perturbed, plain, self._variables)
        ]

    def _reuse(self, gradients, plain):
        """With what an earlier climb has found, in a step between."""
        problem = self.problem
        replicas = _passes.replicas() if problem.shared else 1

        def reused():
            found = problem.rule.reuse(plain, self.memory, self.budget.dtype)
            return [
                g if g is None or v is None else g + _over(v, replicas)
                for g, v in zip(gradients, found)
            ]

        return _passes.either(
            problem.conditional, problem.between, reused, lambda: gradients
        )

    def _weights_only(self, tensors):
        return [
            t if _passes.is_weight(variable) else None
            for t, variable in zip(tensors, self._variables)
        ]


class _Products:
    """Inner products of the two gradients of a step, made when looked at.

    Over all weights, and over the replicas where those climb as one: they
    meet here, so that a rule may look in a branch.

    Attributes:
        totals: The plain gradients and the perturbed ones, two lists; `None`
            where the rule does not ask for them.
    """

    def __init__(self, first, plain, perturbed):
        self._dtype = first.budget.dtype
        self.totals = None
        if first.problem.rule.needs_products:
            weights = [first._weights_only(g) for g in (plain, perturbed)]
            self.totals = first.over_replicas(weights)

    def _dot(self, i, j):
        return _rule.dot(self.totals[i], self.totals[j], self._dtype)

    @property
    def inner(self):
        return self._dot(0, 1)

    @property
    def plain(self):
        return self._dot(0, 0)

    @property
    def perturbed(self):
        return self._dot(1, 1)


def _read_memory(problem):
    return {
        name: [
            None if v is None else tf.convert_to_tensor(v.value) for v in kept
        ]
        for name, kept in problem.memory.items()
    }


def _pairs(memory, found):
    """`(variable, tensor)` of all that is kept."""
    return [
        (variable, value)
        for name, kept in memory.items()
        for variable, value in zip(kept, found[name])
        if variable is not None
    ]


def _over(tensor, replicas):
    """A replica's part; no division by 1, which would be a copy."""
    return tensor if replicas == 1 else tensor / replicas


def _moved(weights, perturbation):
    """`w + eps`."""
    return [
        w if eps is None else w + eps for w, eps in zip(weights, perturbation)
    ]


def _of_those_that_move(problem, gradients):
    return [
        _dense(g) if moves and g is not None else None
        for g, moves in zip(gradients, problem.perturbed)
    ]


def _unscaled(gradients, scale):
    """Gradients of the loss, from those of `scale` times the loss."""
    return [
        None if g is None else _dense(g) / tf.cast(scale, g.dtype)
        for g in gradients
    ]


def _all_dense(gradients):
    return [None if g is None else _dense(g) for g in gradients]


def _times(factor, tensor):
    # A Python number that is cast is rounded to float32 first.
    if tf.is_tensor(factor):
        factor = tf.cast(factor, tensor.dtype)
    return factor * tensor


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
