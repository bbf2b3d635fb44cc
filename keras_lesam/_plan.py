"""Rule, budget, ascent and curvature together: defaults and exclusions."""

import dataclasses
import inspect
from collections.abc import Iterator
from typing import Any

import keras

from keras_lesam import _amounts
from keras_lesam import _change
from keras_lesam import _checks
from keras_lesam import _reference
from keras_lesam import _results
from keras_lesam import ascents
from keras_lesam import budgets
from keras_lesam import estimators
from keras_lesam import rules
from keras_lesam._strategy import Strategy

# That of `LESAMModel` without arguments, where its ascent allows for it.
DEFAULT_BUDGET = rules.LossEquated().default_budget()


@dataclasses.dataclass(frozen=True)
class TrainingPlan:
    """How a model trains: four immutable objects that go together.

    Attributes:
        rule: A `rules.Rule`.
        budget: A `budgets.Budget` with an amount.
        ascent: An `ascents.Ascent`.
        estimator: An `estimators.CurvatureEstimator`.
    """

    rule: rules.Rule
    budget: budgets.Budget
    ascent: ascents.Ascent
    estimator: estimators.CurvatureEstimator

    def check_dtype(self, dtype: str) -> None:
        """Raise `ValueError` for numbers that a step's dtype cannot hold."""
        for owner in ("rule", "budget"):
            for name, value in _floats_of(getattr(self, owner)):
                _checks.representable(name, value, dtype, owner)

    def init_state(
        self, weights: rules.Weights, outputs: Any, dtype: str
    ) -> Any:
        """Return the states before the first step, by component.

        Args:
            weights: The weights of the model.
            outputs: A `tf.TensorSpec` of each output; `None`: not known yet.
            dtype: Of all scalars.
        """
        is_remembered = not self.ascent.makes_plain_pass and (
            self.budget.needs_reference or self.budget.takes_earlier_losses
        )
        reference = _reference.init_state(
            self.budget, is_remembered, outputs, dtype
        )
        made = {
            "budget": (self.budget, self.budget.init_state()),
            "curvature": (self.estimator, self.estimator.init_state(dtype)),
            "ascent": (self.ascent, self.ascent.init_state(weights)),
            "rule": (self.rule, self.rule.init_state(weights)),
            "reference": (self.budget, reference),
            "change": (self.budget, _change.init_state(self.budget, dtype)),
        }
        return {
            component: _results.state(owner, "init_state", value)
            for component, (owner, value) in made.items()
        }

    @classmethod
    def of(
        cls, rule: Any, budget: Any, ascent: Any, curvature: Any
    ) -> "TrainingPlan":
        """Check the arguments of a model, alone and together.

        Args:
            rule: A rule, or `None` for LE-SAM.
            budget: A budget, a number or a schedule; `None`: the rule's own.
            ascent: An ascent; `None`: what the rule asks for.
            curvature: An estimator, or the name of one.
        """
        rule = rules.LossEquated() if rule is None else rule
        _check_kind("rule", rule, rules.Rule, "rules.SAM(rho=0.05)")
        ascent = ascents.FullBatch() if ascent is None else ascent
        _check_kind("ascent", ascent, ascents.Ascent, "ascents.Every(4)")
        ascent = rule.default_ascent(ascent)
        budget = _resolve_budget(rule, budget)
        if budget is DEFAULT_BUDGET and not ascent.knows_rise:
            budget = budgets.Relative()
        plan = cls(
            rule=rule,
            budget=budget,
            ascent=ascent,
            estimator=estimators.from_argument(curvature),
        )
        plan._check_together()
        return plan

    def _check_together(self) -> None:
        self.ascent.check(self.rule, self.budget, self.estimator)
        is_first_order = isinstance(self.estimator, estimators.FirstOrder)
        if not is_first_order and not self.rule.uses_curvature:
            raise ValueError(
                "The radius of this rule does not go by the curvature: leave "
                "`curvature` at 'none', or use rules.LossEquated. Received: "
                f"curvature={self.estimator!r}, rule={self.rule!r}"
            )
        if self.budget.max_change is not None:
            # It may be an attribute of a user's own class.
            _checks.number("max_change", self.budget.max_change, 0, above=True)
        if self.budget.max_change is not None and not self.ascent.knows_rise:
            raise ValueError(
                "`max_change` compares the gradients of two passes over the "
                "same rows, which this ascent does not make: leave it out, "
                f"and choose a smaller budget. Received: {self.budget!r}, "
                f"{self.ascent.keywords()}"
            )
        if self.budget.is_in_loss_units and isinstance(self.rule, rules.SAM):
            raise ValueError(
                "This budget is a rise of the loss, and that of this rule a "
                "radius: use rules.LossEquated, or limit the rise by "
                "budgets.Constant(guard=0.5). Received: "
                f"budget={self.budget!r}, rule={self.rule!r}"
            )
        own = getattr(self.rule, "rho", None)
        amount = _amounts.amount_of(self.budget)
        if own is not None and not _are_equal(own, amount):
            raise ValueError(
                "For this rule the budget is the radius, which is given twice: "
                "leave one of them out, as in budgets.Constant(warmup=0.1), or "
                f"give both the same. Received: rule={self.rule!r}, "
                f"budget={self.budget!r}"
            )


def budget_and_ascent(
    budget: tuple[Any, Any, Any, Any, Any, Any], ascent: tuple[Any, Any, Any]
) -> tuple[budgets.Budget, ascents.Ascent]:
    """Make budget and ascent of the keyword arguments of `LESAMModel`.

    Args:
        budget: Sigma, share, warmup, anneal, guard and max_change.
        ascent: Those of `ascents.from_arguments`.
    """
    made = ascents.from_arguments(*ascent)
    return _loss_budget(*budget, made.knows_rise), made


def _loss_budget(
    sigma: Any,
    share: float | None,
    warmup: float | None,
    anneal: float | None,
    guard: float | None,
    max_change: float | None,
    may_limit: bool,
) -> budgets.Budget:
    """Make a budget of the keyword arguments of `LESAMModel`.

    With a `share` it is relative, with the limit of the default where the
    ascent allows for it. With any of the others it is the paper's, if `sigma`
    does not say it all.
    """
    if share is not None:
        _refuse_beside_share(
            share, sigma=sigma, warmup=warmup, anneal=anneal, guard=guard
        )
        if max_change is None and may_limit:
            max_change = DEFAULT_BUDGET.max_change
        return budgets.Relative(share, max_change=max_change)
    if sigma is DEFAULT_BUDGET:
        given = (warmup, anneal, guard, max_change)
        if all(argument is None for argument in given):
            return DEFAULT_BUDGET
        sigma = rules.DEFAULT_SIGMA
    return _amounts.from_number(
        "sigma",
        sigma,
        warmup,
        anneal,
        (rules.DEFAULT_WARMUP, rules.DEFAULT_ANNEAL),
        guard,
        max_change,
    )


def _refuse_beside_share(share: float, **others: Any) -> None:
    """Refuse what says something else of the budget than `share` does."""
    for name, value in others.items():
        if value is not None and value is not DEFAULT_BUDGET:
            raise ValueError(
                "`share` is the whole budget, which has no schedule and no "
                f"guard: leave `{name}` out. Received: share={share!r}, "
                f"{name}={_checks.short(value)}"
            )


def _floats_of(strategy: Strategy) -> Iterator[tuple[str, float]]:
    """Yield the arguments that are floats, by name.

    Not those of a user's own class, which may mean anything.
    """
    ours = next(
        cls
        for cls in type(strategy).__mro__
        if cls.__module__.startswith("keras_lesam.")
    )
    for name in inspect.signature(ours).parameters:
        value = getattr(strategy, name, None)
        if isinstance(value, float):
            yield name, value


def _check_kind(name: str, value: Any, kind: type, example: str) -> None:
    if isinstance(value, type) and issubclass(value, kind):
        raise TypeError(
            f"`{name}` must be an object, not its class: make one, as in "
            f"{example}. Received: {name}={_checks.short(value)}"
        )
    if not isinstance(value, kind):
        raise TypeError(
            f"`{name}` must be one of keras_lesam.{name}s, such as {example}. "
            f"Received: {name}={_checks.short(value)}"
        )


def _resolve_budget(rule: rules.Rule, budget: Any) -> budgets.Budget:
    """Return a budget with an amount: its own, or that of the rule."""
    if budget is None:
        return rule.default_budget()
    if not isinstance(budget, budgets.Budget):
        return _amounts.from_number("budget", budget, None, None, (0.0, 0.0))
    if not isinstance(budget, budgets.Constant) or budget.sigma is not None:
        return budget
    amount = _amounts.amount_of(rule.default_budget())
    if amount is None and isinstance(rule, rules.LossEquated):
        amount = rules.DEFAULT_SIGMA
    if amount is None:
        raise ValueError(
            "This budget has no number, and the rule has none for it: give "
            "one, as in budgets.Constant(0.1). Received: "
            f"budget={budget!r}, rule={_checks.short(rule)}"
        )
    if _checks.is_schedule(amount):
        raise ValueError(
            "`rho` is a schedule, which is the whole budget over time: leave "
            "`budget` out. Received: "
            f"rule={_checks.short(rule)}, "
            f"budget={_checks.short(budget)}"
        )
    return budget.replace(sigma=amount)


def _are_equal(own: Any, amount: Any) -> bool:
    """Return whether two numbers or schedules are the same.

    True for a budget of another kind, which has no amount to compare.
    """
    if amount is None:
        return True
    if _checks.is_schedule(own) and _checks.is_schedule(amount):
        serialize = keras.saving.serialize_keras_object
        return bool(own is amount or serialize(own) == serialize(amount))
    return bool(own == amount)
