"""Sharpness-aware training of the model that a wrapper stands for.

The `train_step`, what waits for a first batch, and what is saved of a step.
"""

import functools
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from keras_lesam import _allowance
from keras_lesam import _calls
from keras_lesam import _checks
from keras_lesam import _engines
from keras_lesam import _guard
from keras_lesam import _inspection
from keras_lesam import _mask
from keras_lesam import _passes
from keras_lesam import _results
from keras_lesam import _workarounds
from keras_lesam import rules
from keras_lesam._commit import Commit
from keras_lesam._data import Batch
from keras_lesam._data import count_rows
from keras_lesam._delegation import DelegatingModel
from keras_lesam._plan import TrainingPlan
from keras_lesam._progress import NO_LENGTH
from keras_lesam._progress import TrainingProgress
from keras_lesam._records import States
from keras_lesam._records import Step
from keras_lesam._records import StepContext
from keras_lesam._records import StepInputs
from keras_lesam._state import Numbers
from keras_lesam._state import StepState
from keras_lesam._state import add_variable
from keras_lesam._state import scalar_dtype
from keras_lesam._statistics import StepStatistics
from keras_lesam.ascents import Ascent


class SharpnessAwareTrainer(DelegatingModel):
    """The training of a `SharpnessAwareModel`: steps, their state, their logs.

    Args:
        model: The `keras.Model` to train.
        plan: How: a `TrainingPlan`.
        logs: Names of the statistics in the logs.

    The other arguments are those of `SharpnessAwareModel`.
    """

    def __init__(
        self,
        model: keras.Model,
        plan: TrainingPlan,
        logs: tuple[str, ...],
        *,
        total_steps: int | None,
        num_batch_splits: int,
        perturbation_scope: str,
        perturb: Callable[[Any], bool] | None,
        name: str | None,
    ) -> None:
        super().__init__(model, name)
        if total_steps is not None:
            total_steps = _checks.integer("total_steps", total_steps, 1)
        self._num_batch_splits = _checks.integer(
            "num_batch_splits", num_batch_splits, 1
        )
        self._perturbation_scope = _checks.choice(
            "perturbation_scope", perturbation_scope, ("replica", "global")
        )
        self._perturb = _mask.check(perturb)
        self._plan = plan
        self._scalar_dtype = scalar_dtype(model.dtype_policy.variable_dtype)
        plan.check_dtype(self._scalar_dtype)
        self._numbers = Numbers(
            {"rule": plan.rule, "budget": plan.budget},
            self._scalar_dtype,
        )
        self._progress = TrainingProgress(total_steps, self._scalar_dtype)
        knows_rise = plan.ascent.knows_rise
        self._statistics = StepStatistics(
            [log for log in logs if log != "sharpness" or knows_rise]
        )
        # Where `tf.train.Checkpoint` finds state that is no weight.
        self._checkpointed = tf.Module()
        self._state = StepState(functools.partial(add_variable, self))
        self._passes: _engines.Passes = _engines.StatelessPasses()
        self._output_specs: Any = None  # Of a batch, once there was one.
        self._train_functions: dict[bool, Any] = {}
        self._metrics_can_wait = False
        self._built_for_training = False
        self._is_fitting = False
        self._is_evaluating = False
        self._build_state()

    # Nor does `fit` let autograph convert it.
    @tf.autograph.experimental.do_not_convert
    def train_step(self, data: Any) -> dict[str, Any]:
        """Take one step: gradients by the ascent, one update, logs."""
        if self._is_plain:
            return self._plain_train_step(data)
        batch = Batch(*keras.utils.unpack_x_y_sample_weight(data))
        self._build_for_training(batch)
        if self._is_plain:
            return self._plain_train_step(data)
        commit = Commit()
        context = self._step_context()
        inputs = self._step_inputs(context)

        def report(step: Step) -> tuple[Any, States, list[Any], Any]:
            values, logs = commit.note(
                step.model_state,
                lambda: self._update_metrics(step),
                self._metrics_can_wait,
            )
            return step.gradients, step.states, values, logs

        ascent = self._plan.ascent
        gradients, states, values, logs = _results.report(
            ascent, ascent.run(context, batch, inputs, report)
        )
        # Outside of any branch: replicas may have to meet for it.
        commit.write(
            *(self, _guard.in_unison(self.optimizer, gradients), values),
            lambda: self._state.assign(states, inputs.states),
        )
        return _workarounds.reducible(logs)

    @property
    def _is_plain(self) -> bool:
        """Whether all steps are plain ones."""
        return self._plan.budget.is_zero or (
            self.built and not self.trainable_variables
        )

    def _plain_train_step(self, data: Any) -> dict[str, Any]:
        """Take the stock step, to the last bit: nothing looks at its gradients.

        A norm of the gradients, merely logged, would keep the graph optimizer
        from fusing them with the update, and change how sums are rounded.
        """
        with _calls.own():
            logs = super().train_step(data)
        self._statistics.update_state(
            dict.fromkeys(self._statistics.names, 0.0)
        )
        return _workarounds.reducible({**logs, **self._statistics.result()})

    def make_train_function(self, force: bool = False) -> None:
        """Make one function for no budget at all, and one for the rest.

        Each is traced once, whatever the budget is assigned in between.
        """
        if force or self.train_function is None:
            # What it was traced for may have changed: layers, weights.
            self._train_functions.clear()
            self._built_for_training = False
        is_zero = self._plan.budget.is_zero
        self.train_function = self._train_functions.get(is_zero)
        super().make_train_function(force)
        self._train_functions[is_zero] = self.train_function

    def _step_context(self) -> StepContext:
        """Return what stays the same from step to step of a trace."""
        plan = self._plan
        is_global = (
            self._perturbation_scope == "global" and _passes.replicas() > 1
        )
        return StepContext(
            model=self,
            passes=self._passes,
            rule=self._numbers.bind("rule", plan.rule),
            budget=self._numbers.bind("budget", plan.budget),
            estimator=plan.estimator,
            perturb_mask=self._perturb_mask(),
            is_weight=[_passes.is_weight(v) for v in self.trainable_variables],
            num_batch_splits=self._num_batch_splits,
            is_global=is_global,
            # Not where replicas have to meet on the way, which they cannot do
            # in a branch.
            use_cond=_workarounds.has_fast_conditionals(self)
            and plan.ascent.can_branch(is_global)
            and not _workarounds.synchronizes_replicas(self.model),
            dtype=tf.as_dtype(self._scalar_dtype),
        )

    def _step_inputs(self, context: StepContext) -> StepInputs:
        """Return what this step is told."""
        progress = self._progress(self.optimizer.iterations)
        return _allowance.inputs(context, progress, self._state.read())

    def _update_metrics(self, step: Step) -> dict[str, Any]:
        """Update loss, metrics and statistics; return the logs."""
        x, y, sample_weight = step.batch
        loss = next(m for m in self.metrics if m.name == "loss")
        loss.update_state(step.loss, sample_weight=count_rows(x))
        self._statistics.update_state(step.statistics)
        logs = self.compute_metrics(x, y, step.outputs, sample_weight)
        return {**logs, **self._statistics.result()}

    # What waits for a first batch.

    @_workarounds.creating_now()
    def _build_for_training(self, batch: Batch) -> None:
        if self._built_for_training:
            return
        if not (self._has_length or self._is_fitting):
            raise ValueError(NO_LENGTH)
        _refuse_stateful_parts(
            self.model, self._plan.ascent, self._num_batch_splits
        )
        if not tf.executing_eagerly():
            _workarounds.refuse_rematerialized_layers(self.model)
        stock, self._output_specs = _passes.build(self, batch)
        if not self.trainable_variables:
            return
        _mask.refuse_none(self._perturb, self.trainable_variables)
        with tf.init_scope():
            self._build_state()
        self._passes = _engines.choose(self, stock, batch)
        self._metrics_can_wait = stock is not None and not (
            _inspection.has_nested_metrics(stock)
        )
        self._plan.estimator.check(self._passes, self, batch)
        self._built_for_training = True

    @property
    def _has_length(self) -> bool:
        """False where `fit` has to say how long the training is."""
        return (
            self._progress.total_steps is not None
            or not self._plan.budget.needs_length
        )

    def _build_state(self) -> None:
        """Make the variables of the state, once the weights are there."""
        if not self.model.built:
            return
        positions = {id(v): i for i, v in enumerate(self.model.weights)}
        variables = self.trainable_variables
        if variables:
            with _workarounds.unlocked(self):
                self._state.build(
                    self._initial_state(), [positions[id(v)] for v in variables]
                )

    def _initial_state(self) -> States:
        """Return the states before the first step."""
        return self._plan.init_state(
            rules.Weights.of(self.trainable_variables, self._perturb_mask()),
            self._output_specs,
            self._scalar_dtype,
        )

    def reset_step_state(self) -> None:
        """Forget what earlier steps have told the next.

        Such as mean gradients, mean outputs, or by how much the budget is
        shortened: for a training from new weights. The optimizer keeps its
        own state.

        Example:

        >>> import keras
        >>> from keras_lesam import LESAMModel
        >>> net = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
        >>> model = LESAMModel(net)
        >>> model.compile("sgd", "mse")
        >>> net.set_weights(keras.models.clone_model(net).get_weights())
        >>> model.reset_step_state()
        """
        self._build_state()
        if self._state.variables:
            self._state.assign(self._initial_state(), self._state.read())

    def _perturb_mask(self) -> list[bool]:
        """Return which of the trainable variables are perturbed."""
        return _mask.of(self._perturb, self.trainable_variables)

    def _save_state(self, store: Any) -> None:
        """Save what steps have told the next, by name."""
        self._state.save(store)

    def _load_state(self, store: Any) -> None:
        """Load what steps have told the next; a file may have none of it."""
        # The inner model may have been built since, by a first batch.
        self._build_state()
        self._state.load(store)


def _refuse_stateful_parts(
    model: keras.Model, ascent: Ascent, num_batch_splits: int
) -> None:
    """Raise `ValueError` for state that is one of each row of a batch."""
    if num_batch_splits == 1 and ascent.sees_all_rows:
        return
    stateful = [
        layer.name
        for layer in model._flatten_layers()
        if getattr(layer, "stateful", False)
    ]
    if stateful:
        raise ValueError(
            "A stateful recurrent layer has a state of each row of a "
            "batch, and cannot see parts of it: leave `num_batch_splits` "
            f"and `ascent_fraction` at 1. Received: layers {stateful}, "
            f"num_batch_splits={num_batch_splits}, {ascent.keywords()}"
        )
