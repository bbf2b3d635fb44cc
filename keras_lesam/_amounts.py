"""Between the numbers of a model's arguments and budgets."""

from typing import Any

from keras_lesam import _checks
from keras_lesam.budgets import Budget
from keras_lesam.budgets import Constant
from keras_lesam.budgets import Schedule


def from_number(
    name: str,
    amount: Any,
    warmup: float | None,
    anneal: float | None,
    defaults: tuple[float, float],
    guard: float | None = None,
    max_change: float | None = None,
) -> Budget:
    """Make the budget of the keyword arguments of a model.

    Args:
        name: What the model calls the amount, for errors.
        amount: A number; or a schedule or a budget, which say it all.
        warmup: What was received; `None` for the default.
        anneal: What was received; `None` for the default.
        defaults: Those of `warmup` and `anneal`.
        guard: That of the budget.
        max_change: That of the budget.
    """
    if isinstance(amount, Budget):
        given = (warmup, anneal, guard, max_change)
        if any(argument is not None for argument in given):
            raise ValueError(
                f"`{name}` is a budget, which says it all: leave `warmup`, "
                "`anneal`, `guard` and `max_change` alone. Received: "
                f"{name}={amount!r}, warmup={warmup!r}, anneal={anneal!r}, "
                f"guard={guard!r}, max_change={max_change!r}"
            )
        return amount
    if _checks.is_schedule(amount):
        if warmup is not None or anneal is not None:
            raise ValueError(
                f"`{name}` is a schedule, which is the whole budget over time: "
                "leave `warmup` and `anneal` alone. "
                "Received: "
                f"warmup={_checks.short(warmup)}, "
                f"anneal={_checks.short(anneal)}"
            )
        return Schedule(amount, guard, max_change)
    return Constant(
        _checks.number(name, amount, 0),
        defaults[0] if warmup is None else warmup,
        defaults[1] if anneal is None else anneal,
        guard,
        max_change,
    )


def amount_of(budget: Budget) -> Any:
    """Return the number or the schedule of a budget that has one, or `None`."""
    if isinstance(budget, Constant):
        return budget.sigma
    return budget.schedule if isinstance(budget, Schedule) else None
