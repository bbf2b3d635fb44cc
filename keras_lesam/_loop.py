"""Sharpness-aware gradients for a `train_step` or a loop of one's own."""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import keras
import tensorflow as tf

from keras_lesam import _allowance
from keras_lesam import _checks
from keras_lesam import _guard
from keras_lesam import _hessian
from keras_lesam import _mask
from keras_lesam import _passes
from keras_lesam import _results
from keras_lesam import _state
from keras_lesam import _workarounds
from keras_lesam import ascents
from keras_lesam import budgets
from keras_lesam import estimators
from keras_lesam import rules
from keras_lesam._commit import Commit
from keras_lesam._engines import StatelessPasses
from keras_lesam._loss_function import NO_BATCH
from keras_lesam._loss_function import LossFunction
from keras_lesam._loss_function import replicas_meet
from keras_lesam._plan import TrainingPlan
from keras_lesam._records import States
from keras_lesam._records import Step
from keras_lesam._records import StepContext
from keras_lesam._vectors import Tensors

# The steps that were made, in a state.
ITERATIONS = "iterations"


class GradientRecord(NamedTuple):
    """What `SharpnessAwareGradients` has found beside the gradients.

    All numbers are scalar tensors, in float64 if a variable is, in float32
    elsewhere. Under `tf.distribute` they are those of the replica's own rows,
    or of the whole batch where all replicas take one perturbation.

    Attributes:
        loss: The loss at the weights, in loss units: without a loss scale, and
            not divided by the replicas. Of a step that makes no pass there
            (`ascents.Previous`, `ascents.Momentum`), at its `w + eps`.
        aux: What `loss_fn` has returned beside it in that pass, or `None`.
        state: For the next step: a dict from names to tensors.
        rho: The radius (weight-space distance), 0 in a plain step.
        gradient_norm: The ascent norm (loss units per weight-space distance).
        sharpness: The rise `L(w + eps) - L(w)` (loss units); `None` where the
            ascent does not know it.
        sigma: The budget (loss units for LE-SAM, the radius for SAM).
    """

    loss: tf.Tensor
    aux: Any
    state: dict[str, tf.Tensor]
    rho: tf.Tensor
    gradient_norm: tf.Tensor
    sharpness: tf.Tensor | None
    sigma: tf.Tensor


class SharpnessAwareGradients:
    """Makes sharpness-aware gradients of any loss, for a loop of one's own.

    What `SharpnessAwareModel` does in `fit`, for those who write their own
    `train_step` or loop: in the place of `tape.gradient`, of any function that
    computes a loss, by any rule, budget and ascent.

    Example:

    >>> import keras, numpy as np, tensorflow as tf
    >>> from keras_lesam import SharpnessAwareGradients, budgets, rules
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    >>> variables = model.trainable_variables
    >>> optimizer = keras.optimizers.SGD(0.1)
    >>> lesam = SharpnessAwareGradients(
    ...     rules.LossEquated(rho_max=1.0), budgets.Constant(0.1))
    >>> @tf.function
    ... def step(x, y, state):
    ...     def loss_fn():
    ...         return tf.reduce_mean((model(x, training=True) - y) ** 2)
    ...     gradients, record = lesam(loss_fn, variables, state, optimizer)
    ...     optimizer.apply(gradients, variables)
    ...     return record
    >>> x, y = np.ones((8, 4), "float32"), np.zeros((8, 1), "float32")
    >>> state = lesam.init_state(variables)
    >>> for _ in range(3):
    ...     record = step(x, y, state)
    ...     state = record.state
    >>> int(state["iterations"])
    3

    `loss_fn` is called once for each pass, and sees the weights `w + eps` in
    the second one; the variables themselves are never moved. What it writes to
    Keras variables (batch normalization statistics, seeds, metrics) is written
    once, from the first pass, and both passes start from the same: dropout
    draws one mask. It is traced once or twice more, to be looked at, each time
    a graph is made of the step, and before the first step where none is.

    - It has to compute the loss from Keras layers and variables themselves: a
      `tf.function` goes around the whole step, not around the model.
    - It draws random numbers by Keras (layers, `keras.random` with a
      `SeedGenerator`), or is given them.
    - Under `tf.distribute` it runs in a replica (`strategy.run`), and returns
      what plain gradients would be taken of there: a share of the loss, whose
      sum over replicas is the loss of the batch. Losses of Keras are divided
      by the number of replicas; others are to be.
    - With mixed precision it returns the loss as it is, and `optimizer` scales
      it.

    A loss of any kind has no outputs whose mean would tell what has been
    learnt: `budgets.Relative` and a budget's `guard` need a `reference_loss`,
    or go by the mean loss of the first 10 steps, which have no budget. Nor has
    it rows: `ascents.Fraction` is refused.

    Args:
        rule: One of `keras_lesam.rules`. `None`: `rules.LossEquated()`.
        budget: One of `keras_lesam.budgets`, or a number, or a schedule.
            `None`: the rule's own, which for `LossEquated` is a share of the
            loss.
        ascent: One of `keras_lesam.ascents`. `None`: `ascents.FullBatch()`, or
            what the rule asks for.
        curvature: One of `keras_lesam.estimators`, or `"none"`, `"hvp"`,
            `"secant"`.
        total_steps: Integer > 0, the steps of the whole training, which
            warm-up and annealing of a budget are shares of; or `None`.
        perturbation_scope: `"replica"` or `"global"`; see `LESAMModel`.
        perturb: Callable from a `keras.Variable` to bool: which variables are
            perturbed. `None`: all.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if one is out of range, if two of them exclude each other,
            or if the budget goes by the length of the training and
            `total_steps` is `None`.
    """

    def __init__(
        self,
        rule: rules.Rule | None = None,
        budget: Any = None,
        ascent: ascents.Ascent | None = None,
        curvature: Any = "none",
        *,
        total_steps: int | None = None,
        perturbation_scope: str = "replica",
        perturb: Callable[[Any], bool] | None = None,
    ) -> None:
        self._plan = TrainingPlan.of(rule, budget, ascent, curvature)
        if total_steps is not None:
            total_steps = _checks.integer("total_steps", total_steps, 1)
        self._total_steps = total_steps
        self._scope = _checks.choice(
            "perturbation_scope", perturbation_scope, ("replica", "global")
        )
        self._perturb = _mask.check(perturb)
        _check_plan(self._plan, total_steps)
        # What was found out, so as not to look again.
        self._layouts: dict[Any, _Layout] = {}
        self._meeting: dict[Any, bool] = {}

    def init_state(self, variables: Sequence[Any]) -> dict[str, tf.Tensor]:
        """Return the state before the first step.

        Args:
            variables: The Keras variables to train, in the order in which they
                will be given.

        Returns:
            Dict from names to tensors: `"iterations"`, an int64 scalar, the
            steps made; and what rule, budget, ascent and curvature remember,
            such as `"rule.mean.0"`, of the first variable. They may be kept
            and saved in any way, as variables too.

        Raises:
            TypeError: if `variables` are not Keras variables.
            ValueError: if there are none, or one twice, or one that is not
                trainable.
        """
        variables = _check_variables(variables)
        initial = self._initial(variables)
        layout = _Layout.of(initial, len(variables))
        return {
            ITERATIONS: tf.zeros((), tf.int64),
            **_state.unpack(layout.names, initial, layout.shapes),
        }

    @tf.autograph.experimental.do_not_convert
    def __call__(
        self,
        loss_fn: Callable[[], Any],
        variables: Sequence[Any],
        state: Mapping[str, Any],
        optimizer: Any,
    ) -> tuple[Tensors, GradientRecord]:
        """Return gradients for an optimizer, and a record of the step.

        Writes what `loss_fn` writes to Keras variables, once, after all else
        is done, and nothing else.

        Args:
            loss_fn: Function without arguments that returns the loss, a scalar
                tensor, or `(loss, aux)`; see above.
            variables: List of Keras variables, such as
                `model.trainable_variables`.
            state: What `init_state` returned, or the step before in its
                record; tensors or variables. In a `tf.function` an argument of
                it, or variables.
            optimizer: The Keras optimizer that the gradients are for: they are
                multiplied by its loss scale, which it takes away. `None` for
                gradients of the loss itself.

        Returns:
            `(gradients, record)`: a list like `variables` of tensors,
            `tf.IndexedSlices` or `None` where the loss has no gradient, for
            `optimizer.apply(gradients, variables)`; and a `GradientRecord`.

        Raises:
            TypeError: if an argument is of the wrong type, or `loss_fn` does
                not return a scalar of floats.
            ValueError: if `variables` or `state` are not those of
                `init_state`, or if `loss_fn` does what two passes would get
                wrong: it reads the variables behind a `tf.function` or a
                `keras.remat`, assigns one of them, writes a `tf.Variable`, or
                draws random numbers of TensorFlow.
        """
        variables = _check_variables(variables)
        _check_call(loss_fn, optimizer, variables)
        commit = Commit()
        function = LossFunction(loss_fn, variables, optimizer)
        context, refusals = self._look_at(function)
        layout = self._layout(variables)
        states, iterations = layout.read(state)
        progress = _progress(iterations, self._total_steps, context.dtype)
        inputs = _allowance.inputs(context, progress, states)

        def report(step: Step) -> tuple[Any, States, list[Any], Any]:
            values, _ = commit.note(step.model_state, lambda: None, True)
            found = step.loss, step.outputs.aux, step.statistics
            return step.gradients, step.states, values, found

        with tf.control_dependencies(refusals):
            ascent = self._plan.ascent
            gradients, states, values, found = _results.report(
                ascent, ascent.run(context, NO_BATCH, inputs, report)
            )
            gradients = _guard.in_unison(optimizer, gradients)
            new = layout.next_state(states, inputs.states)
        loss, aux, statistics = found
        if not ascent.knows_rise:
            statistics = {**statistics, "sharpness": None}
        new[ITERATIONS] = iterations + 1
        record = GradientRecord(loss, aux, new, **statistics)
        commit.write_state(values, [gradients, record])
        return gradients, record

    def _initial(self, variables: Sequence[Any]) -> States:
        """Return the states before the first step."""
        dtype = _dtype(variables)
        self._plan.check_dtype(dtype)
        _mask.refuse_none(self._perturb, variables)
        mask = _mask.of(self._perturb, variables)
        weights = rules.Weights.of(variables, mask)
        # There are no outputs, and that is known.
        return self._plan.init_state(weights, (), dtype)

    def _layout(self, variables: Sequence[Any]) -> "_Layout":
        """Return the names and shapes of the states of variables."""
        key = tuple((v.path, tuple(v.shape), v.dtype) for v in variables)
        if key not in self._layouts:
            with tf.init_scope():
                initial = self._initial(variables)
            self._layouts[key] = _Layout.of(initial, len(variables))
        return self._layouts[key]

    def _look_at(
        self, function: LossFunction
    ) -> tuple[StepContext, list[tf.Tensor]]:
        """Return what stays the same from step to step.

        And operations that fail where XLA would get a step wrong.
        """
        plan, variables = self._plan, function.trainable_variables
        is_global = self._scope == "global" and _passes.replicas() > 1
        context = StepContext(
            model=function,
            passes=StatelessPasses(),
            rule=plan.rule,
            budget=plan.budget,
            estimator=plan.estimator,
            perturb_mask=_mask.of(self._perturb, variables),
            is_weight=[_passes.is_weight(v) for v in variables],
            num_batch_splits=1,
            is_global=is_global,
            use_cond=plan.ascent.can_branch(is_global),
            dtype=tf.as_dtype(_dtype(variables)),
        )
        # Where no graph is made each step is a new function of the same code.
        code = getattr(function.function, "__code__", None)
        key = (code, *map(id, variables))
        is_known = code is not None and key in self._meeting
        refusals: list[tf.Tensor] = []
        if not (is_known and tf.executing_eagerly()):
            self._meeting[key] = replicas_meet(function)
            plan.estimator.check(context.passes, function, NO_BATCH)
            refusals = _refusals(context)
        use_cond = context.use_cond and not self._meeting[key]
        return context._replace(use_cond=use_cond), refusals


class _Layout(NamedTuple):
    """Names and values of a state, as users keep it.

    Attributes:
        names: In the structure of the states, `None` where there is none.
        specs: A `tf.TensorSpec` of each, by name.
    """

    names: States
    specs: dict[str, tf.TensorSpec]

    @classmethod
    def of(cls, initial: States, count: int) -> "_Layout":
        """Make the layout of the states of so many variables."""
        names = _state.names_of(initial, [*range(count)])
        pairs = zip(tf.nest.flatten(names), tf.nest.flatten(initial))
        return cls(
            names,
            {
                name: tf.TensorSpec(value.shape, value.dtype)
                for name, value in pairs
                if name is not None
            },
        )

    @property
    def shapes(self) -> dict[str, Any]:
        """The shape of each value, by name."""
        return {name: spec.shape for name, spec in self.specs.items()}

    def read(self, state: Mapping[str, Any]) -> tuple[States, tf.Tensor]:
        """Return the states as steps are told them, and the steps made."""
        specs = {ITERATIONS: tf.TensorSpec((), tf.int64), **self.specs}
        if not isinstance(state, Mapping) or {*state} != {*specs}:
            raise ValueError(
                "`state` must be what `init_state` returned for these "
                f"variables, or the record of the step before: {[*specs]}. "
                f"Received: state={_checks.short(state)}"
            )
        _checks.changing("state", state[ITERATIONS])
        values = {
            name: _tensor(name, state[name], spec)
            for name, spec in specs.items()
        }
        return _state.pack(self.names, values), values[ITERATIONS]

    def next_state(self, states: States, before: States) -> dict[str, Any]:
        """Return states by name; of several replicas, their mean.

        As of a model, in whose variables they are. Outside of any branch.
        """
        found = _state.unpack(self.names, states, self.shapes)
        old = _state.unpack(self.names, before, self.shapes)
        changed = {
            name: value
            for name, value in found.items()
            if value is not old[name] and value.dtype.is_floating
        }
        replicas = _passes.replicas()
        if changed and replicas > 1:
            sums = _passes.sum_over_replicas(changed)
            found |= {name: value / replicas for name, value in sums.items()}
        return found


def _check_plan(plan: TrainingPlan, total_steps: int | None) -> None:
    """Raise `ValueError` for what a loss function has not."""
    if plan.budget.needs_length and total_steps is None:
        raise ValueError(
            "The budget's warm-up and annealing are shares of the whole "
            "training: pass its `total_steps`, or set warmup=0 and "
            f"anneal=0. Received: budget={plan.budget!r}, "
            "total_steps=None"
        )
    if not plan.ascent.sees_all_rows:
        raise ValueError(
            "A loss function has no rows to take a fraction of: use "
            "another ascent, such as ascents.Every(4). Received: "
            f"ascent={plan.ascent!r}"
        )


def _refusals(context: StepContext) -> list[tf.Tensor]:
    """Return operations that fail where XLA would get a step wrong."""
    if not isinstance(context.estimator, estimators.Exact):
        return []
    operations = _hessian.operations(context.passes, context.model, NO_BATCH)
    if not _hessian.has_max_pooling(operations):
        return []
    return [_workarounds.refuse_xla()]


def _progress(
    iterations: tf.Tensor, total_steps: int | None, dtype: Any
) -> budgets.Progress:
    """Return where in the training a step is; 0 if its length is unknown."""
    if total_steps is None:
        return budgets.Progress(iterations, tf.zeros((), dtype))
    fraction = tf.cast(iterations, dtype) / total_steps
    return budgets.Progress(iterations, fraction)


def _dtype(variables: Sequence[Any]) -> str:
    """Return the dtype of all scalars."""
    return _state.scalar_dtype(*(v.dtype for v in variables))


def _check_variables(variables: Any) -> list[Any]:
    """Check for Keras variables that can be trained, each once."""
    if isinstance(variables, keras.Variable) or not isinstance(
        variables, Sequence
    ):
        raise TypeError(
            "`variables` must be a list of Keras variables, such as "
            "model.trainable_variables. Received: "
            f"variables={_checks.short(variables)}"
        )
    for variable in variables:
        if not isinstance(variable, keras.Variable):
            raise TypeError(
                "`variables` must be Keras variables, those of layers and "
                f"`keras.Variable`. Received: {_checks.short(variable)} of "
                f"type {type(variable).__name__}"
            )
    if not variables:
        raise ValueError(
            "`variables` must have at least one: build the model before its "
            "trainable_variables are taken. Received: variables=[]"
        )
    wrong = [v.path for v in variables if not v.trainable]
    if wrong:
        raise ValueError(
            "`variables` must be trainable, such as "
            f"model.trainable_variables. Received: {wrong[:3]} among them"
        )
    if len({id(v) for v in variables}) < len(variables):
        raise ValueError(
            "`variables` must be different ones. Received: "
            f"{[v.path for v in variables]}"
        )
    return [*variables]


def _check_call(loss_fn: Any, optimizer: Any, variables: list[Any]) -> None:
    """Check the other arguments, and build the optimizer."""
    if isinstance(loss_fn, type) or not callable(loss_fn):
        raise TypeError(
            "`loss_fn` must be a function without arguments. Received: "
            f"loss_fn={_checks.short(loss_fn)}"
        )
    if _passes.replicas() > 1 and tf.distribute.get_replica_context() is None:
        raise ValueError(
            "Gradients of several replicas are computed by each of them: call "
            "the step by `strategy.run`. Received: a call outside of it"
        )
    if optimizer is None:
        return
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise TypeError(
            "`optimizer` must be a Keras optimizer, or None. Received: "
            f"optimizer={_checks.short(optimizer)} of type "
            f"{type(optimizer).__name__}"
        )
    if not optimizer.built:
        # Its loss scale is a constant until then, also in a graph.
        with tf.init_scope():
            optimizer.build(variables)


def _tensor(name: str, value: Any, expected: tf.TensorSpec) -> tf.Tensor:
    """Return a value of a state as a tensor of a shape and dtype."""
    value = value.value if isinstance(value, keras.Variable) else value
    shape = getattr(value, "shape", ())
    if not tf.TensorShape(shape).is_compatible_with(expected.shape):
        raise ValueError(
            "`state` must be what `init_state` returned for these variables. "
            f"Received: {name!r} of shape {tuple(shape)}, where it was "
            f"{tuple(expected.shape)}"
        )
    return tf.convert_to_tensor(value, expected.dtype)
