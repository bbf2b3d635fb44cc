"""Sharpness-aware steps: first pass, perturbation, second pass, update.

Pure functions of a `StepContext`, a batch and `StepInputs`; nothing is written
to the model, and nothing here knows of `fit`.
"""

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from keras_lesam import _allowance
from keras_lesam import _change
from keras_lesam import _data
from keras_lesam import _guard
from keras_lesam import _host_random
from keras_lesam import _passes
from keras_lesam import _reference
from keras_lesam import _results
from keras_lesam import _vectors
from keras_lesam import estimators
from keras_lesam._data import Batch
from keras_lesam._passes import LossAndGradients
from keras_lesam._records import FirstPass
from keras_lesam._records import Step
from keras_lesam._records import StepContext
from keras_lesam._records import StepInputs
from keras_lesam._rule import Perturbation
from keras_lesam._vectors import Tensors
from keras_lesam.budgets import Losses

StepFunction = Callable[[StepContext, Batch, StepInputs], Step]


def plain_step(context: StepContext, batch: Batch, inputs: StepInputs) -> Step:
    """Take a step of plain training; the ascent norm is logged all the same.

    Args:
        context: The `StepContext`.
        batch: A `Batch`.
        inputs: The `StepInputs`.
    """
    plain = context._replace(estimator=estimators.FirstOrder())
    inputs = inputs.only_if(tf.constant(False))
    first = first_pass(plain, batch, inputs)
    return finish(first, perturb(first), first.point.gradients)


def two_pass_step(
    context: StepContext, batch: Batch, inputs: StepInputs
) -> Step:
    """Take a step of two passes; of one where there is no ascent."""
    first = first_pass(context, batch, inputs)
    perturbation = perturb(first)
    radius, norm = perturbation.radius, perturbation.norm
    plain, zero = first.point.gradients, tf.zeros((), context.dtype)

    def ascend() -> tuple[Tensors, tf.Tensor, tf.Tensor, tf.Tensor]:
        second = second_pass(first, _in_branch(first, perturbation), batch)
        rise = tf.cast(second.loss - first.point.loss, context.dtype)
        gradients = select_gradients(first, second)
        change = _change.measure(first, norm, gradients, in_branch=True)
        is_usable = _change.are_finite(first, gradients, change)
        is_usable &= tf.math.is_finite(rise)
        return gradients, _vectors.or_zero(rise, is_usable), is_usable, change

    gradients, rise, is_usable, change = _passes.either(
        context.use_cond,
        radius > 0,
        ascend,
        lambda: (plain, zero, tf.constant(True), zero),
    )
    is_usable, rise = _guard.agree_on_mean(context, is_usable, rise)
    if context.is_global:
        change = _change.measure(first, norm, gradients, in_branch=False)
    # Where the ascent ends at no loss or no gradient, do not follow it.
    gradients, rise = _passes.either(
        context.use_cond,
        is_usable,
        lambda: (gradients, rise),
        lambda: (plain, zero),
    )
    followed = perturbation._replace(radius=_vectors.or_zero(radius, is_usable))
    step = finish(first, followed, gradients, rise)
    states = _change.update(context, step.states, change, is_usable, radius)
    step = step._replace(states=states)
    return _guard.tell_loss_scale(context, step, ~is_usable)


def fraction_step(
    context: StepContext, batch: Batch, inputs: StepInputs, fraction: float
) -> Step:
    """Take a step whose first pass sees only a fraction of the rows.

    The sharpness is not known: the two losses are of different rows.
    """
    rows = _data.fraction_of(_data.count_rows(batch), fraction)
    first = first_pass(context, _data.take_rows(batch, 0, rows), inputs)
    perturbation = perturb(first)
    # Even at radius 0: the gradient of the whole batch is still to come.
    second = second_pass(first, perturbation, batch)
    gradients = select_gradients(first, second)
    is_usable = _guard.agree(
        context,
        tf.math.is_finite(second.loss) & _vectors.are_finite(gradients),
    )
    stay = first.point.gradients
    if not context.use_cond:
        # One choice for both: rows of an embedding are others in each.
        gradients, stay = _vectors.dense(gradients), _vectors.dense(stay)
    # Where the ascent ends at no loss or gradient, the first rows must do.
    gradients = _passes.either(
        context.use_cond, is_usable, lambda: gradients, lambda: stay
    )
    followed = perturbation._replace(
        radius=_vectors.or_zero(perturbation.radius, is_usable)
    )
    step = finish(first, followed, gradients)
    return _guard.tell_loss_scale(context, step, ~is_usable)


def memory_step(
    context: StepContext, batch: Batch, inputs: StepInputs, decay: float
) -> Step:
    """Take a step of one pass, at `w + eps`, along earlier gradients.

    Loss, outputs and state are those of the one pass. The ascent's state is
    the running mean of the gradients, which forgets a share of 1 - `decay` in
    each step: `decay` 0 is the gradient of the step before.
    """
    model = context.model
    weights = _passes.read(model.trainable_variables)
    means = inputs.states["ascent"]["mean"]
    losses = _reference.remembered(inputs)
    limit = _allowance.limit(context, losses)
    budget = inputs.spendable(
        _allowance.allowed(context, inputs, losses, limit)
    )
    found = context.rule.perturb(means, weights, budget, inputs.states["rule"])
    perturbation = context.rule.limit(
        _checked(context, found, weights), None, limit
    )
    weights = _moved(weights, perturbation)
    point = context.passes.there(model, weights, batch, inputs.model_state)
    gradients = [*context.gradients(point.gradients, perturbation.radius)]
    mean = _vectors.running_mean(means, gradients, decay)
    losses, reference = _reference.measure(
        context, inputs, batch, weights, point
    )
    is_usable = _guard.agree(context, _vectors.are_finite(point.gradients))
    # From the weights themselves next time, and not from there again.
    is_kept = _guard.excuse(context, is_usable)
    mean = [None if m is None else _vectors.or_zero(m, is_kept) for m in mean]
    states = {**inputs.states, "ascent": {"mean": mean}}
    states |= _told(context, inputs, losses, reference)
    point = _guard.without_gradients_unless(is_usable, point)
    step = Step(
        gradients=point.gradients,
        batch=batch,
        loss=point.logged_loss,
        outputs=point.outputs,
        model_state=point.state,
        statistics=_statistics(perturbation, budget, None),
        states=states,
    )
    return _guard.tell_loss_scale(context, step, ~is_usable)


def in_parts(
    step: StepFunction, context: StepContext, batch: Batch, inputs: StepInputs
) -> Step:
    """Take a step for each part of the batch, for one update: m-sharpness.

    The update is the mean of the parts' gradients, as it is over replicas; so
    are the states. Each part starts from the model state that the part before
    left.
    """
    owner = getattr(step, "__self__", step)
    if context.num_batch_splits == 1:
        found = step(context, batch, inputs)
        return _results.instance(owner, "step", found, Step)
    steps, weights = [], []
    model_state = {id(v): (v, value) for v, value in inputs.model_state}
    rows = _data.count_rows(batch)
    for start, stop, weight in _data.split_rows(rows, context.num_batch_splits):
        part = _data.take_rows(batch, start, stop)
        started = inputs._replace(model_state=list(model_state.values()))
        found = step(context, part, started)
        steps.append(_results.instance(owner, "step", found, Step))
        weights.append(weight)
        for variable, value in steps[-1].model_state:
            _, before = model_state.get(id(variable), (None, variable.value))
            value = _data.if_used(weight, value, before)
            model_state[id(variable)] = variable, value
    return _mean_step(context, steps, weights, list(model_state.values()))


def first_pass(
    context: StepContext, batch: Batch, inputs: StepInputs
) -> FirstPass:
    """Make the pass at the weights, and ask for the budget."""
    model = context.model
    weights = _passes.read(model.trainable_variables)
    sources = context.passes.sources(model, weights)
    host_random = _host_random.get_state()
    with context.estimator.recording(sources) as tape:
        point = context.passes.here(model, weights, batch, inputs.model_state)
        # Inside, so that a tape sees it: rows that repeat are summed.
        scaled = _vectors.dense(
            [
                g if is_perturbed else None
                for g, is_perturbed in zip(
                    point.gradients, context.perturb_mask
                )
            ]
        )
    losses, reference = _reference.measure(
        context, inputs, batch, weights, point
    )
    limit = _allowance.limit(context, losses)
    allowed = _allowance.allowed(context, inputs, losses, limit)
    return FirstPass(
        context=context,
        inputs=inputs,
        batch=batch,
        weights=_after(model, weights, point),
        point=point,
        sources=sources,
        scaled=scaled,
        gradients=context.scales().unscale(scaled),
        losses=losses,
        reference=reference,
        limit=limit,
        allowed=allowed,
        budget=inputs.spendable(allowed),
        tape=tape,
        host_random=host_random,
    )


def perturb(first: FirstPass) -> Perturbation:
    """Return the perturbation that the rule makes of the first pass."""
    context, states = first.context, first.inputs.states
    curvature = _results.curvature(
        context.estimator,
        context.estimator.estimate(first, states["curvature"]),
        context.dtype,
    )
    perturbation = context.rule.perturb(
        first.gradients,
        first.weights,
        first.budget,
        states["rule"],
        curvature,
    )
    perturbation = _checked(context, perturbation, first.weights)
    return context.rule.limit(perturbation, first.gradients, first.limit)


def _in_branch(first: FirstPass, perturbation: Perturbation) -> Perturbation:
    """Return the perturbation, made in the branch that is being traced.

    Where most steps don't ascend. What a branch takes from outside is computed
    in all steps, and `eps` is as large as the weights; made anew it costs the
    steps that do ascend the norm once more. A curvature would cost a product.
    """
    is_rare = first.inputs.gate is not None
    is_cheap = isinstance(
        first.context.estimator, estimators.FirstOrder | estimators.Secant
    )
    return perturb(first) if is_rare and is_cheap else perturbation


def _checked(
    context: StepContext, perturbation: Any, weights: Tensors
) -> Perturbation:
    """Return what a rule has made, which may be a user's own."""
    rule, dtype = context.rule, context.dtype
    _results.instance(rule, "perturb", perturbation, Perturbation)
    eps, radius, norm = perturbation
    return Perturbation(
        _results.like_weights(rule, "perturb", "`eps`", eps, weights),
        _results.scalar(rule, "perturb", radius, dtype),
        _results.scalar(rule, "perturb", norm, dtype),
    )


def second_pass(
    first: FirstPass, perturbation: Perturbation, batch: Batch
) -> LossAndGradients:
    """Make the pass at `w + eps`, from the same state as the first."""
    with _host_random.replaying(first.host_random):
        return first.context.passes.there(
            first.context.model,
            _moved(first.weights, perturbation),
            batch,
            first.inputs.model_state,
        )


def select_gradients(first: FirstPass, point: LossAndGradients) -> Tensors:
    """Return the gradients at a point, and for what is no weight the first."""
    return [
        h if is_weight else g
        for g, h, is_weight in zip(
            first.point.gradients, point.gradients, first.context.is_weight
        )
    ]


def finish(
    first: FirstPass,
    perturbation: Perturbation,
    gradients: Tensors,
    rise: tf.Tensor | None = None,
) -> Step:
    """Make the step that ends with gradients found by `select_gradients`.

    Outside of any branch: replicas may have to meet for it.

    Args:
        first: The first pass.
        perturbation: Its `radius` is 0 where it was not followed.
        gradients: List like the weights, of the scale of a pass.
        rise: Scalar tensor, `L(w + eps) - L(w)`; `None` if it is not known.
    """
    states = dict(first.inputs.states)
    context = first.context
    gradients, states["rule"] = _update(first, perturbation, gradients)
    states |= _told(context, first.inputs, first.losses, first.reference)
    if rise is not None:
        states["curvature"] = _results.state(
            context.estimator,
            "update",
            context.estimator.update(
                first, perturbation, rise, states["curvature"]
            ),
        )
    return Step(
        gradients=gradients,
        batch=first.batch,
        loss=first.point.logged_loss,
        outputs=first.point.outputs,
        model_state=first.point.state,
        statistics=_statistics(perturbation, first.budget, rise),
        states=states,
    )


def _told(
    context: StepContext,
    inputs: StepInputs,
    losses: Losses | None,
    reference: dict[str, Any],
) -> dict[str, dict[str, Any]]:
    """Return the states that go by the losses of a step."""
    states = {"reference": reference} if reference else {}
    if losses is not None:
        new = context.budget.update(losses, inputs.states["budget"])
        states["budget"] = _results.state(context.budget, "update", new)
    return states


def _update(
    first: FirstPass, perturbation: Perturbation, scaled: Tensors
) -> tuple[Tensors, dict[str, Any]]:
    """Return what the optimizer is given, and the state of the rule."""
    context = first.context
    zero = tf.zeros_like(perturbation.radius)
    plain = context.gradients(first.point.gradients, zero)
    perturbed = context.gradients(scaled, perturbation.radius)
    updated, state = _results.update(
        context.rule,
        context.rule.update(plain, perturbed, first.inputs.states["rule"]),
        perturbed,
        first.weights,
    )
    if updated is perturbed:
        return scaled, state
    gradients = _passes.either(
        context.use_cond,
        _is_up_to_the_rule(first, perturbation),
        lambda: perturbed.rescale(updated),
        lambda: _vectors.dense(scaled),
    )
    is_usable = _guard.agree(context, _vectors.are_finite(gradients))
    gradients = _passes.either(
        context.use_cond,
        _guard.excuse(context, is_usable),
        lambda: gradients,
        lambda: _vectors.dense(first.point.gradients),
    )
    return gradients, state


def _is_up_to_the_rule(
    first: FirstPass, perturbation: Perturbation
) -> tf.Tensor:
    """Return False for steps that are plain, whatever the rule makes of them.

    Those without a budget, and those whose ascent was not to be made: no slope,
    or no loss at its end.
    """
    has_ascended = perturbation.radius > 0
    if first.inputs.gate is None:
        return has_ascended
    return has_ascended | ((first.allowed > 0) & ~first.inputs.gate)


def _after(
    model: keras.Model, weights: Tensors, point: LossAndGradients
) -> Tensors:
    """Return the weights after a pass, which the model may have assigned."""
    assigned = {id(variable): value for variable, value in point.state}
    return [
        assigned.get(id(variable), weight)
        for variable, weight in zip(model.trainable_variables, weights)
    ]


def _moved(weights: Tensors, perturbation: Perturbation) -> Tensors:
    """Return `w + eps`."""
    return [
        w if eps is None else w + tf.cast(eps, w.dtype)
        for w, eps in zip(weights, perturbation.eps)
    ]


def _statistics(
    perturbation: Perturbation, budget: tf.Tensor, rise: tf.Tensor | None
) -> dict[str, tf.Tensor]:
    return {
        "rho": perturbation.radius,
        "gradient_norm": perturbation.norm,
        "sharpness": tf.zeros_like(budget) if rise is None else rise,
        "sigma": budget,
    }


def _mean_step(
    context: StepContext,
    steps: list[Step],
    weights: list[Any],
    model_state: list[tuple[Any, Any]],
) -> Step:
    """Return the mean of steps for the parts of a batch."""
    batch, outputs = _data.join_rows(
        [(s.batch, s.outputs) for s in steps], weights
    )
    gradients = [
        _mean_gradient(g, weights, is_weight)
        for *g, is_weight in zip(
            *(s.gradients for s in steps), context.is_weight
        )
    ]
    return Step(
        gradients=gradients,
        batch=batch,
        loss=_mean([tf.reduce_mean(s.loss) for s in steps], weights),
        outputs=outputs,
        model_state=model_state,
        statistics={
            name: _mean([s.statistics[name] for s in steps], weights)
            for name in steps[0].statistics
        },
        states=tf.nest.map_structure(
            lambda *values: _mean([*values], weights),
            *(s.states for s in steps),
        ),
    )


def _mean(values: list[Any], weights: list[Any]) -> Any:
    if values[0] is None or all(v is values[0] for v in values):
        return values[0]
    return tf.add_n(
        [v * tf.cast(weight, v.dtype) for v, weight in zip(values, weights)]
    )


def _mean_gradient(
    gradients: list[Any], weights: list[Any], is_weight: bool
) -> Any:
    if gradients[0] is None or not is_weight:
        return gradients[-1]
    if not isinstance(gradients[0], tf.IndexedSlices):
        return _mean(gradients, weights)
    values = [
        g.values * tf.cast(weight, g.dtype)
        for g, weight in zip(gradients, weights)
    ]
    return tf.IndexedSlices(
        tf.concat(values, 0),
        tf.concat([g.indices for g in gradients], 0),
        gradients[0].dense_shape,
    )
