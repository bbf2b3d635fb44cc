"""`SAMModel`: any Keras model, trained by a rule of the SAM family."""

from collections.abc import Callable
from typing import Any

import keras

from keras_lesam import _amounts
from keras_lesam import _checks
from keras_lesam import ascents
from keras_lesam import rules
from keras_lesam._facade import AscentArguments
from keras_lesam._wrapper import SharpnessAwareModel


@keras.saving.register_keras_serializable(package="keras_lesam")
class SAMModel(AscentArguments, SharpnessAwareModel):
    """Trains a Keras model by SAM, or by one of its relatives.

    The same two passes, and the same care for what Keras wants of a step, as
    in `LESAMModel`, with another rule for the perturbation: see
    `keras_lesam.rules`.

    Example:

    >>> import keras, numpy as np
    >>> from keras_lesam import SAMModel, rules
    >>> net = keras.Sequential([keras.layers.Dense(10, activation="softmax")])
    >>> model = SAMModel(net, rules.GSAM(rho=0.1, alpha=0.2))
    >>> model.compile("sgd", "sparse_categorical_crossentropy")
    >>> x, y = np.random.rand(64, 8), np.random.randint(10, size=64)
    >>> history = model.fit(x, y, epochs=2, verbose=0)
    >>> sorted(history.history)
    ['gradient_norm', 'loss', 'rho', 'sharpness']

    The logs of `fit` are those of `LESAMModel` without `sigma`. The arguments
    are in this order, and few need more than the first three:

    ```
    the model    model, rule, rho
    budget       warmup, anneal, guard, max_change, total_steps: `rho` over time
    ascent       ascent_from, ascent_fraction, ascent_every, num_batch_splits
    scope        perturb, perturbation_scope
    ```

    Args:
        model: As in `LESAMModel`.
        rule: One of `keras_lesam.rules`. `None`: `rules.SAM(rho)`.
        rho: Float >= 0 or a schedule, the radius of SAM, if `rule` is left
            out. 0.05 by default.
        warmup: Float in [0, 1], the share of the training over which the
            rule's `rho` rises linearly from 0. 0 by default: SAM as published
            has neither warm-up nor annealing.
        anneal: Float in [0, 1], the share of the training over which `rho`
            falls to 0 on a cosine, at its end. Together with `warmup` at most
            1. Where `rho` is a schedule, leave both alone.
        guard: Float > 0, or `None` for none. The perturbation is made shorter
            where it would raise the loss, to first order, by more than this
            share of what the model has learnt; see `LESAMModel`.
        max_change: Float > 0, or `None` for none. By how much the ascent may
            change the gradient, on average, as a share of it: `rho` is made
            smaller where it does by more. See `budgets.Relative`.
        total_steps: As in `LESAMModel`; so are the arguments below.
        ascent_from: `"batch"`, `"previous"` or `"momentum"`. For `SAM`, `ASAM`
            and `UnnormalizedSAM`: the others ask for the gradient of the
            batch at the weights.
        ascent_fraction: Float in (0, 1].
        ascent_every: Integer > 0; `LookSAM` has an `every` of its own.
        num_batch_splits: Integer > 0, m-sharpness.
        perturb: Callable from a `keras.Variable` to bool, or `None`.
        perturbation_scope: `"replica"` or `"global"`.
        name: Name of the model.

    Attributes:
        model: The wrapped model itself.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if one is out of range, if two of them exclude each other,
            or if `model` has training logic that cannot be honoured.

    References:
        Foret, Kleiner, Mobahi, Neyshabur, ICLR 2021, arXiv 2010.01412, for
        SAM; each rule names its own.
    """

    LOGS = ("rho", "gradient_norm", "sharpness")

    def __init__(
        self,
        model: keras.Model,
        rule: rules.Rule | None = None,
        *,
        rho: Any = None,
        warmup: float | None = None,
        anneal: float | None = None,
        guard: float | None = None,
        max_change: float | None = None,
        total_steps: int | None = None,
        num_batch_splits: int = 1,
        ascent_from: str = "batch",
        ascent_fraction: float = 1.0,
        ascent_every: int = 1,
        perturbation_scope: str = "replica",
        perturb: Callable[[Any], bool] | None = None,
        name: str | None = None,
    ) -> None:
        rule = _check_rule(rule, rho)
        super().__init__(
            model,
            rule,
            _amounts.from_number(
                "rho", rule.rho, warmup, anneal, (0.0, 0.0), guard, max_change
            ),
            ascents.from_arguments(ascent_from, ascent_fraction, ascent_every),
            total_steps=total_steps,
            num_batch_splits=num_batch_splits,
            perturbation_scope=perturbation_scope,
            perturb=perturb,
            name=name,
        )
        self._keep_ascent(ascent_from, ascent_fraction, ascent_every)

    def get_config(self) -> dict[str, Any]:
        """Return all arguments of the constructor, serialized."""
        rule = keras.saving.serialize_keras_object(self.rule)
        return {**self._facade_config(), "rule": rule}

    @property
    def rho(self) -> Any:
        """The rule's `rho`. May be assigned to, which does not retrace."""
        return _amounts.amount_of(self.budget)

    @rho.setter
    def rho(self, value: float) -> None:
        self._set_amount("rho", value, rho=value)


def _check_rule(rule: Any, rho: Any) -> rules.SAM:
    if rule is None:
        return rules.SAM() if rho is None else rules.SAM(rho)
    if rho is not None:
        raise ValueError(
            "`rho` is for SAM itself: give that of another rule to the rule, "
            "as in rules.ASAM("
            f"rho={_checks.short(rho)}). Received: rho={_checks.short(rho)}, "
            f"rule={_checks.short(rule)}"
        )
    if isinstance(rule, type) and issubclass(rule, rules.Rule):
        raise TypeError(
            "`rule` must be a rule, not its class: make one, as in "
            f"rules.{rule.__name__}(rho=0.05). Received: "
            f"rule={_checks.short(rule)}"
        )
    if not isinstance(rule, rules.SAM):
        raise TypeError(
            "`rule` must be one of keras_lesam.rules, such as "
            "rules.SAM(rho=0.05). For LE-SAM use LESAMModel; for a rule "
            "without a `rho`, SharpnessAwareModel. "
            f"Received: rule={_checks.short(rule)}"
        )
    return rule
