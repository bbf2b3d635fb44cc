"""`SAMModel`: any Keras model, trained by a rule of the SAM family."""

import keras

from keras_lesam import _rule
from keras_lesam import rules
from keras_lesam._wrapper import SharpnessAwareModel
from keras_lesam._wrapper import check_shares


@keras.saving.register_keras_serializable(package="keras_lesam")
class SAMModel(SharpnessAwareModel):
    """Trains a Keras model by SAM, or by one of its relatives.

    The same two passes, and the same care for what Keras wants of a step, as
    in `LESAMModel`, with another rule for the climb: see `keras_lesam.rules`.

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

    The logs of `fit` are those of `LESAMModel` without `sigma`.

    Args:
        model: As in `LESAMModel`.
        rule: One of `keras_lesam.rules`. `None`: `rules.SAM()`.
        warmup: Float in [0, 1], the share of the training over which the
            rule's `rho` rises linearly from 0. 0 by default: SAM as published
            has neither warm-up nor annealing.
        anneal: Float in [0, 1], the share of the training over which `rho`
            falls to 0 on a cosine, at its end. Together with `warmup` at most
            1. Where `rho` is a schedule, leave both alone.
        total_steps: As in `LESAMModel`; so are the arguments below.
        num_batch_splits: Integer > 0, m-sharpness.
        ascent_from: `"batch"`, `"previous"` or `"momentum"`. For `SAM`, `ASAM`
            and `UnnormalizedSAM`: the others ask for the gradient of the
            batch at the weights.
        ascent_fraction: Float in (0, 1].
        ascent_every: Integer > 0; `LookSAM` has an `every` of its own.
        perturbation_scope: `"replica"` or `"global"`.
        perturb: Callable from a `keras.Variable` to bool, or `None`.
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

    def __init__(
        self,
        model,
        rule=None,
        *,
        warmup=None,
        anneal=None,
        total_steps=None,
        num_batch_splits=1,
        ascent_from="batch",
        ascent_fraction=1.0,
        ascent_every=1,
        perturbation_scope="replica",
        perturb=None,
        name=None,
    ):
        rule = rules.SAM() if rule is None else _check_rule(rule)
        warmup, anneal = check_shares("rho", rule.rho, warmup, anneal, (0, 0))
        super().__init__(
            model,
            rule,
            rule.rho,
            warmup=warmup,
            anneal=anneal,
            total_steps=total_steps,
            logs=["rho", "gradient_norm", "sharpness"],
            num_batch_splits=num_batch_splits,
            ascent_from=ascent_from,
            ascent_fraction=ascent_fraction,
            ascent_every=ascent_every,
            perturbation_scope=perturbation_scope,
            perturb=perturb,
            name=name,
        )

    def get_config(self):
        rule = keras.saving.serialize_keras_object(self.rule)
        return {**super().get_config(), "rule": rule}

    @property
    def rule(self):
        """The rule, with `rho` as it is now."""
        config = self._rule.get_config()
        if not isinstance(config["rho"], dict):
            config["rho"] = self.rho
        return type(self._rule).from_config(config)

    @property
    def rho(self):
        """The rule's `rho`. May be assigned to, which does not retrace."""
        return self._budget.sigma

    @rho.setter
    def rho(self, value):
        self._assign_budget("rho", value)


def _check_rule(rule):
    if isinstance(rule, type) and issubclass(rule, _rule.Rule):
        raise TypeError(
            "`rule` must be a rule, not its class: make one, as in "
            f"rules.{rule.__name__}(rho=0.05). Received: rule={rule!r}"
        )
    if not isinstance(rule, rules.SAM):
        raise TypeError(
            "`rule` must be one of keras_lesam.rules, such as "
            "rules.SAM(rho=0.05); for LE-SAM use LESAMModel. "
            f"Received: rule={rule!r}"
        )
    return rule
