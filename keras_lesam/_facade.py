"""The keyword arguments that `LESAMModel` and `SAMModel` share."""

from typing import TYPE_CHECKING
from typing import Any

from keras_lesam import budgets

if TYPE_CHECKING:
    from keras_lesam._wrapper import SharpnessAwareModel as _Model
else:
    _Model = object


class AscentArguments(_Model):
    """Numbers and strings in place of a budget and an ascent.

    To be inherited from beside `SharpnessAwareModel`.
    """

    def _keep_ascent(
        self, ascent_from: str, ascent_fraction: float, ascent_every: int
    ) -> None:
        self._ascent_from = ascent_from
        self._ascent_fraction = float(ascent_fraction)
        self._ascent_every = int(ascent_every)

    def _facade_config(self) -> dict[str, Any]:
        """Return the arguments that both have, serialized."""
        has_shares = isinstance(self.budget, budgets.Constant)
        has_limits = has_shares or isinstance(self.budget, budgets.Schedule)
        config = super().get_config()
        for name in ("rule", "budget", "ascent", "curvature"):
            del config[name]
        return {
            **config,
            "warmup": self.warmup if has_shares else None,
            "anneal": self.anneal if has_shares else None,
            "guard": self.guard if has_limits else None,
            "max_change": self.max_change if has_limits else None,
            "ascent_from": self.ascent_from,
            "ascent_fraction": self.ascent_fraction,
            "ascent_every": self.ascent_every,
        }

    @property
    def warmup(self) -> float:
        budget = self.budget
        return budget.warmup if isinstance(budget, budgets.Constant) else 0.0

    @property
    def anneal(self) -> float:
        budget = self.budget
        return budget.anneal if isinstance(budget, budgets.Constant) else 0.0

    @property
    def guard(self) -> float | None:
        return self.budget.guard

    @property
    def max_change(self) -> float | None:
        return self.budget.max_change

    @property
    def ascent_from(self) -> str:
        return self._ascent_from

    @property
    def ascent_fraction(self) -> float:
        return self._ascent_fraction

    @property
    def ascent_every(self) -> int:
        return self._ascent_every
