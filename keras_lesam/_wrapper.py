"""`SharpnessAwareModel`: what users call, with any rule, budget and ascent."""

import contextlib
import dataclasses
import inspect
from collections.abc import Callable
from collections.abc import Iterator
from typing import Any

import keras

from keras_lesam import _checks
from keras_lesam import ascents
from keras_lesam import budgets
from keras_lesam import rules
from keras_lesam._delegation import DelegatingModel
from keras_lesam._delegation import signature_of
from keras_lesam._engines import recovering
from keras_lesam._monitor import StuckTraining
from keras_lesam._plan import TrainingPlan
from keras_lesam._progress import NO_LENGTH
from keras_lesam._progress import STATISTICS
from keras_lesam._progress import ScheduleProgress
from keras_lesam._progress import warn_of_early_stopping
from keras_lesam._progress import with_callback
from keras_lesam._progress import with_progress_bar
from keras_lesam._trainer import SharpnessAwareTrainer


@keras.saving.register_keras_serializable(package="keras_lesam")
class SharpnessAwareModel(SharpnessAwareTrainer):
    """Trains a Keras model by any rule, budget and ascent.

    The general form of `LESAMModel` and `SAMModel`. A step asks the `ascent`
    for a gradient, the `budget` for what may be spent and the `rule` for the
    perturbation, and applies what the rule makes of both gradients.

    Example:

    >>> import keras, numpy as np
    >>> from keras_lesam import SharpnessAwareModel, ascents, budgets, rules
    >>> net = keras.Sequential([keras.layers.Dense(1)])
    >>> model = SharpnessAwareModel(
    ...     net,
    ...     rules.LossEquated(rho_max=1.0),
    ...     budgets.Constant(0.1, warmup=0.1),
    ...     ascents.Every(2),
    ... )
    >>> model.compile("sgd", "mse")
    >>> history = model.fit(np.ones((8, 2)), np.ones((8, 1)), verbose=0)
    >>> sorted(history.history)
    ['gradient_norm', 'loss', 'rho', 'sharpness', 'sigma']

    The logs are those of `LESAMModel`; `sigma` is the budget, whatever its
    unit. Rule, budget, ascent and curvature have arguments of their own.

    Args:
        model: A `keras.Model`; see `LESAMModel`.
        rule: One of `keras_lesam.rules`. `None`: `rules.LossEquated()`.
        budget: One of `keras_lesam.budgets`, or a number, or a schedule.
            `None`: the rule's own. For `SAM` and its relatives it is the
            radius, and has to be the rule's `rho`.
        ascent: One of `keras_lesam.ascents`. `None`: `ascents.FullBatch()`, or
            what the rule asks for.
        curvature: One of `keras_lesam.estimators`, or `"none"`, `"hvp"`,
            `"secant"`.
        total_steps: Integer > 0, or `None`; see `LESAMModel`.
        num_batch_splits: Integer > 0, m-sharpness.
        perturbation_scope: `"replica"` or `"global"`.
        perturb: Callable from a `keras.Variable` to bool, or `None`.
        name: Name of the model.

    Attributes:
        model: The wrapped model itself.
        rule: The rule, an immutable object; so are `budget`, `ascent` and
            `curvature`.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if one is out of range, if two of them exclude each other,
            or if `model` has training logic that cannot be honoured.
    """

    LOGS: tuple[str, ...] = STATISTICS

    def __init__(
        self,
        model: keras.Model,
        rule: rules.Rule | None = None,
        budget: Any = None,
        ascent: ascents.Ascent | None = None,
        curvature: Any = "none",
        *,
        total_steps: int | None = None,
        num_batch_splits: int = 1,
        perturbation_scope: str = "replica",
        perturb: Callable[[Any], bool] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(
            model,
            TrainingPlan.of(rule, budget, ascent, curvature),
            self.LOGS,
            total_steps=total_steps,
            num_batch_splits=num_batch_splits,
            perturbation_scope=perturbation_scope,
            perturb=perturb,
            name=name,
        )

    # What users call.

    @signature_of(keras.Model.compile)
    def compile(self, *args: Any, **kwargs: Any) -> None:
        # What jit_compile="auto" goes by.
        estimator = self._plan.estimator
        self.supports_jit = estimator.supports_jit(self.model)
        super().compile(*args, **kwargs)
        self._built_for_training = False
        self._train_functions.clear()

    compile.__doc__ = DelegatingModel.compile.__doc__

    @signature_of(keras.Model.fit)
    def fit(self, *args: Any, **kwargs: Any) -> Any:
        """Train as `keras.Model.fit`, telling the budget how long it will be.

        Raises:
            ValueError: before training starts, if `warmup` or `anneal` are
                shares of a training of unknown length: the number of steps in
                an epoch is unknown and `total_steps` was not given.
        """
        stock = super().fit
        bound = inspect.signature(stock).bind(*args, **kwargs)
        arguments = bound.arguments
        callbacks = with_progress_bar(
            arguments.get("callbacks"), arguments.get("verbose", "auto")
        )
        if not self.budget.is_zero:
            callbacks = with_callback(callbacks, StuckTraining(), self)
        if not self._has_length:
            warn_of_early_stopping(callbacks, self.budget)
            progress = ScheduleProgress(self._progress, lambda: self.budget)
            callbacks = with_callback(callbacks, progress, self)
        arguments["callbacks"] = callbacks
        self._is_fitting = not self._has_length
        try:
            with recovering(lambda: self._passes):
                return stock(*bound.args, **bound.kwargs)
        finally:
            self._is_fitting = False

    @signature_of(keras.Model.train_on_batch)
    def train_on_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Train as `keras.Model.train_on_batch`, if the length is known.

        Raises:
            ValueError: if `warmup` or `anneal` are not 0 and `total_steps`
                was not given.
        """
        if not (self._has_length or self.budget.is_zero):
            raise ValueError(NO_LENGTH)
        with recovering(lambda: self._passes):
            return super().train_on_batch(*args, **kwargs)

    @signature_of(keras.Model.evaluate)
    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate as `keras.Model.evaluate`, with plain Keras's logs."""
        with self._evaluation():
            return super().evaluate(*args, **kwargs)

    @signature_of(keras.Model.test_on_batch)
    def test_on_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Test as `keras.Model.test_on_batch`, with plain Keras's logs."""
        with self._evaluation():
            return super().test_on_batch(*args, **kwargs)

    @contextlib.contextmanager
    def _evaluation(self) -> Iterator[None]:
        before, self._is_evaluating = self._is_evaluating, True
        try:
            yield
        finally:
            self._is_evaluating = before

    @property
    def metrics(self) -> list[Any]:
        """Metrics of the training; of evaluation, while that runs."""
        metrics = [m for m in super().metrics if m is not self._statistics]
        return metrics if self._is_evaluating else [*metrics, self._statistics]

    def get_config(self) -> dict[str, Any]:
        """Return all arguments of the constructor, serialized."""
        serialize = keras.saving.serialize_keras_object
        return {
            **super().get_config(),
            "rule": serialize(self.rule),
            "budget": serialize(self.budget),
            "ascent": serialize(self.ascent),
            "curvature": serialize(self._plan.estimator),
            **self._common_config(),
        }

    def _common_config(self) -> dict[str, Any]:
        perturb = self.perturb
        if perturb is not None:
            perturb = keras.saving.serialize_keras_object(perturb)
        return {
            "total_steps": self.total_steps,
            "num_batch_splits": self.num_batch_splits,
            "perturbation_scope": self.perturbation_scope,
            "perturb": perturb,
        }

    # The arguments.

    def _set_amount(
        self, name: str, value: Any, of: str = "sigma", **changes: Any
    ) -> None:
        """Take another number `of` the budget, which does not retrace.

        `changes` are those of the rule, if it says the number too.
        """
        budget = self.budget
        if _checks.is_schedule(value) or of not in budget.numbers():
            raise TypeError(
                f"`{name}` can be assigned a number where it was a number; for "
                f"another budget make a new {type(self).__name__} around "
                f"`.model`. Received: {name}={_checks.short(value)}, "
                f"budget={_checks.short(budget)}"
            )
        value = _checks.number(name, value, 0)
        if value and self._is_fitting:
            self._progress.require_steps(budget)
        self._set(
            rule=self.rule.replace(**changes),
            budget=budget.replace(**{of: value}),
        )
        if self.train_function is not None:
            self.make_train_function()

    def _set(self, **changes: Any) -> None:
        """Replace rule or budget by one that differs in its numbers only."""
        plan = dataclasses.replace(self._plan, **changes)
        plan.check_dtype(self._scalar_dtype)
        self._plan = plan
        for owner, strategy in changes.items():
            self._numbers.assign(owner, strategy)

    @property
    def rule(self) -> rules.Rule:
        return self._plan.rule

    @property
    def budget(self) -> budgets.Budget:
        return self._plan.budget

    @property
    def ascent(self) -> ascents.Ascent:
        return self._plan.ascent

    @property
    def curvature(self) -> Any:
        return self._plan.estimator

    @property
    def total_steps(self) -> int | None:
        return self._progress.total_steps

    @property
    def num_batch_splits(self) -> int:
        return self._num_batch_splits

    @property
    def perturbation_scope(self) -> str:
        return self._perturbation_scope

    @property
    def perturb(self) -> Callable[[Any], bool] | None:
        return self._perturb
