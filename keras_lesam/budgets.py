"""Budgets: what the ascent of each step may spend.

```
from keras_lesam import SharpnessAwareModel, budgets, rules

budget = budgets.Constant(0.1, warmup=0.1, anneal=0.2)
model = SharpnessAwareModel(net, rules.LossEquated(), budget)
```

For LE-SAM it is a rise of the loss (loss units); for SAM and its relatives the
radius (weight-space distance).

| budget     | what a step may spend                                        |
|------------|--------------------------------------------------------------|
| `Constant` | a number, with a warm-up and annealing as shares of training |
| `Schedule` | a `LearningRateSchedule` of the step                         |
| `Relative` | a share of the loss, as far as the model has learnt (LE-SAM) |

A budget of your own is a subclass of `Budget` with a `__call__`.
"""

import math
from typing import Any
from typing import NamedTuple

import keras
import tensorflow as tf

from keras_lesam import _checks
from keras_lesam._strategy import Strategy

__all__ = ["Budget", "Constant", "Losses", "Progress", "Relative", "Schedule"]

_register = keras.saving.register_keras_serializable(package="keras_lesam")


class Progress(NamedTuple):
    """Where in the training a step is.

    Attributes:
        iterations: Int64 scalar tensor, the optimizer's updates before.
        fraction: Scalar tensor, the share of the whole training done; beyond 1
            where training goes on. 0 where its length is not known: see
            `Budget.needs_length`. Its dtype is that of all scalars of a step.
    """

    iterations: tf.Tensor
    fraction: tf.Tensor


class Losses(NamedTuple):
    """What is known of the loss once the first pass of a step is made.

    Attributes:
        plain: Scalar tensor, the loss at the weights in loss units: of the rows
            of the first pass, over all replicas where those take one
            perturbation. Of a step that makes no pass there (`ascent_from`
            "previous" or "momentum") it is that of the step before, at its
            `w + eps`, and 0 in the first step, for a budget whose
            `takes_earlier_losses` is True.
        data: Scalar tensor, the part of it that goes by the outputs of the
            model, without regularizers and `add_loss`. That is all of it for a
            model with a `compute_loss` of its own, and where nothing goes by
            the outputs. `None` if the budget doesn't ask: see
            `Budget.needs_reference`.
        reference: Scalar tensor, what `data` would be of a prediction that
            ignores the input; `None` if the budget doesn't ask.
    """

    plain: tf.Tensor
    data: tf.Tensor | None = None
    reference: tf.Tensor | None = None

    @property
    def gain(self) -> tf.Tensor:
        """What has been learnt: `max(reference - data, 0)`, a scalar tensor.

        0 where either is not finite.
        """
        if self.data is None or self.reference is None:
            raise ValueError(
                "What has been learnt is known to budgets whose "
                f"`needs_reference` is True. Received: {self!r}"
            )
        gain = self.reference - self.data
        is_gain = tf.math.is_finite(gain) & (gain > 0)
        return tf.where(is_gain, gain, tf.zeros_like(gain))


class Budget(Strategy):
    """What the ascent of a step may spend.

    Immutable; its methods are pure functions of tensors.

    Example, half of the loss, and nothing in the first hundred steps:

    >>> import keras, numpy as np, tensorflow as tf
    >>> from keras_lesam import SharpnessAwareModel, budgets, rules
    >>> @keras.saving.register_keras_serializable("mine")
    ... class HalfOfTheLoss(budgets.Budget):
    ...     def __call__(self, progress, losses, state):
    ...         if losses is None:
    ...             return None  # Ask again when the first pass is made.
    ...         started = progress.iterations >= 100
    ...         return tf.where(started, 0.5 * losses.plain, 0.0)
    >>> net = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    >>> model = SharpnessAwareModel(net, rules.LossEquated(), HalfOfTheLoss())
    >>> model.compile("sgd", "mse")
    >>> history = model.fit(np.ones((8, 2)), np.ones((8, 1)), verbose=0)
    >>> history.history["sigma"]
    [0.0]

    Attributes:
        guard: Float or `None`. No step may raise the loss, to first order, by
            more than this share of what the model has learnt, `Losses.gain`,
            whatever the budget. `None`: no such limit.
        max_change: Float or `None`. By how much the ascent may change the
            gradient, as a share of it: `||T (h - g)|| / ||T g||`, of the
            gradients `g` at the weights and `h` at the end of the ascent.
            Each step measures it, and multiplies the budget of the next ones
            by a factor, 0.1 at first and at most 1, that keeps it on average.
            `None`: no such limit, and nothing is measured.
        reference_loss: Float or `None`. `Losses.reference` as a number; `None`:
            it is measured.
    """

    guard: float | None = None
    max_change: float | None = None
    reference_loss: float | None = None
    _options = ("guard", "max_change", "reference_loss")

    def init_state(self) -> dict[str, Any]:
        """Return the state before the first step, a dict of tensors."""
        return {}

    def __call__(
        self, progress: Progress, losses: Losses | None, state: dict[str, Any]
    ) -> tf.Tensor | None:
        """Return what this step may spend.

        Called before the first pass, with `losses=None`. A budget that goes by
        the losses returns `None` there, and is called again once the first
        pass is made. One that goes by time alone answers at once, so that a
        step without a budget can leave out a pass.

        Args:
            progress: A `Progress`.
            losses: The `Losses` of the step, or `None`.
            state: What `update` returned in the step before.

        Returns:
            Scalar tensor of the dtype of `progress.fraction`, not negative; or
            `None`, only where `losses` is.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must define `__call__`."
        )

    def update(self, losses: Losses, state: dict[str, Any]) -> dict[str, Any]:
        """Return the state of the next step, from the losses of this one."""
        del losses
        return state

    @property
    def learns(self) -> bool:
        """Whether `update` looks at the losses; if not, it is not called."""
        return type(self).update is not Budget.update

    @property
    def needs_reference(self) -> bool:
        """Whether it asks for `Losses.data` and `Losses.reference`."""
        return self.guard is not None

    @property
    def takes_earlier_losses(self) -> bool:
        """Whether the losses of the step before will do.

        If not, a budget that goes by the losses is refused where a step makes
        no pass at the weights.
        """
        return False

    @property
    def is_in_loss_units(self) -> bool:
        """Whether it can only be a rise of the loss, and no radius."""
        return False

    @property
    def needs_length(self) -> bool:
        """Whether it goes by `Progress.fraction`.

        Then `fit`, or `total_steps`, has to say how long the training is.
        """
        return False

    @property
    def is_zero(self) -> bool:
        """Whether there is no budget now, nor later: all steps are plain."""
        return False


@_register
class Constant(Budget):
    """The same budget throughout, with a warm-up and annealing.

    Linear from 0 over the first `warmup` of the training, `sigma` in between,
    and to 0 on a half cosine over the last `anneal`.

    Example:

    >>> import tensorflow as tf
    >>> from keras_lesam import budgets
    >>> budget = budgets.Constant(0.2, warmup=0.1, anneal=0.2)
    >>> points = [budgets.Progress(0, tf.constant(done))
    ...           for done in (0.0, 0.05, 0.5, 0.9)]
    >>> [round(float(budget(point)), 3) for point in points]
    [0.0, 0.1, 0.2, 0.1]

    Args:
        sigma: Float >= 0: loss units for LE-SAM, the radius for SAM. `None`:
            the rule's own, which is its `rho`, or 0.1 for LE-SAM.
        warmup: Float in [0, 1], a share of the whole training.
        anneal: Float in [0, 1]. Together with `warmup` at most 1.
        guard: Float > 0 or `None`. The most that a step may raise the loss to
            first order, as a share of what the model has learnt (see
            `Relative`): LE-SAM's budget is at most `guard * (L0 - L)`, and
            SAM's perturbation is made shorter where its slope is steep.
        max_change: Float > 0 or `None`. By how much the ascent may change the
            gradient, on average, as a share of it; see `Relative`.

    Raises:
        TypeError: if an argument is no number.
        ValueError: if one is out of range.
    """

    def __init__(
        self,
        sigma: float | None = None,
        warmup: float = 0.0,
        anneal: float = 0.0,
        guard: float | None = None,
        max_change: float | None = None,
    ) -> None:
        self.guard = _positive("guard", guard)
        self.max_change = _positive("max_change", max_change)
        if sigma is not None:
            sigma = _checks.number("sigma", sigma, 0)
        self.sigma = sigma
        self.warmup = _checks.number("warmup", warmup, 0, 1)
        self.anneal = _checks.number("anneal", anneal, 0, 1)
        if self.warmup + self.anneal > 1 + 1e-9:
            raise ValueError(
                "`warmup` and `anneal` are shares of one training: together "
                f"they must be at most 1. Received: warmup={self.warmup}, "
                f"anneal={self.anneal}"
            )

    def numbers(self) -> dict[str, float]:
        return {} if self.sigma is None else {"sigma": self.sigma}

    def __call__(
        self,
        progress: Progress,
        losses: Losses | None = None,
        state: dict[str, Any] | None = None,
    ) -> tf.Tensor:
        """Return the budget of a step, a scalar tensor."""
        del losses, state
        dtype = progress.fraction.dtype
        if tf.is_tensor(self.sigma):
            budget = tf.cast(self.sigma, dtype)
        else:
            budget = tf.constant(self.sigma, dtype)
        if self.warmup:
            begun = progress.fraction / self.warmup
            budget *= tf.clip_by_value(begun, 0.0, 1.0)
        if self.anneal:
            # sin^2 of what remains, which is 0 at the end and not nearly 0:
            # 0.5 (1 + cos(pi done)) is the same on paper.
            remains = (1 - progress.fraction) / self.anneal
            remains = tf.clip_by_value(remains, 0.0, 1.0)
            budget *= tf.square(tf.sin(0.5 * math.pi * remains))
        return budget

    @property
    def needs_length(self) -> bool:
        return bool(self.warmup or self.anneal)

    @property
    def is_zero(self) -> bool:
        return self.sigma == 0


@_register
class Schedule(Budget):
    """A budget by a schedule, from `optimizer.iterations` to a number.

    Args:
        schedule: A `keras.optimizers.schedules.LearningRateSchedule`. What is
            below 0 counts as 0.
        guard: Float > 0 or `None`; see `Constant`.
        max_change: Float > 0 or `None`; see `Constant`.

    Raises:
        TypeError: if it is no schedule.
    """

    def __init__(
        self,
        schedule: Any,
        guard: float | None = None,
        max_change: float | None = None,
    ) -> None:
        self.guard = _positive("guard", guard)
        self.max_change = _positive("max_change", max_change)
        if not _checks.is_schedule(schedule):
            raise TypeError(
                "`schedule` must be a keras.optimizers.schedules."
                "LearningRateSchedule. Received: "
                f"schedule={_checks.short(schedule)}"
            )
        self.schedule = schedule

    def __call__(
        self,
        progress: Progress,
        losses: Losses | None = None,
        state: dict[str, Any] | None = None,
    ) -> tf.Tensor:
        """Return the budget of a step, a scalar tensor."""
        del losses, state
        budget = tf.cast(
            self.schedule(progress.iterations), progress.fraction.dtype
        )
        return tf.maximum(budget, 0)


@_register
class Relative(Budget):
    """A share of the loss, as far as the model has learnt: no unit, no clock.

    ```
    L     the loss of the batch, without regularizers and `add_loss`
    L0    that of a prediction that ignores the input: the mean of the outputs
          over the rows of the batch, in the place of the outputs; or a
          thousandth of it, where the loss of that is less
    gain  = max(L0 - L, 0), what the model has learnt
    sigma = share L gain / L0
    ```

    It is 0 on the plateau where all trainings begin (and nets die that climb
    too far there), largest half-way, and goes to 0 with the loss, so that no
    schedule is needed, nor how long the training will be. The loss in other
    units, as of targets in other units, leaves the perturbation what it is.
    Where there is no gain a step has one pass. For LE-SAM only.

    With `max_change` the budget is also as small as it takes for the gradient
    `h` at the end of the ascent to be still about that at the weights, `g`:

    ```
    change  = ||T (h - g)|| / ||T g||    0 where the loss is linear
    log m  -= 0.1 log(change / max_change)    once a step; 0.1 at first, <= 1
    sigma   = m share L gain / L0
    ```

    The rise is then off `sigma` by about half of `max_change` at most. It is
    what keeps deep nets without normalization, which a large share stops on
    their plateaus, and a bad start from being harmed; and it makes the share
    matter less. It costs one more look at the gradients a step. Replicas that
    take perturbations of their own share `m`; those that take one sum their
    gradients once more.

    L0 costs no pass, only the loss of two other outputs, as follows. The second
    of them tells no class from another where the outputs are logits: their mean
    may be far from 0, and a bad guess, when a net starts from a large loss.

    - The mean is over rows alone: each position of a sequence or picture, and
      each of several outputs, has its own. Rows and positions count by their
      sample weights and masks. Ragged outputs: over all positions.
    - In a batch (or part of one, or of a replica) of fewer than 8 rows an
      output has too much of a say in the mean. It is mixed with a running mean
      over rows and positions of the steps before, a state of one number a
      channel; of one row nothing else is left.
    - A loss that doesn't go by the outputs (`add_loss` alone, a `compute_loss`
      that looks at something else) has no L0. In its place is the mean loss of
      the first 10 steps, with no budget in these, and a warning says so; or
      `reference_loss`. A fine-tuned model needs the latter.
    - A loss below 0 has no 0 to go to: there, `sigma = share gain`.

    Example:

    >>> import keras, numpy as np
    >>> from keras_lesam import LESAMModel, budgets
    >>> net = keras.Sequential([keras.layers.Dense(1)])
    >>> model = LESAMModel(net, budgets.Relative(0.7, max_change=0.6))
    >>> model.compile("adam", "mse")
    >>> x = np.random.rand(64, 4)
    >>> history = model.fit(x, x.sum(axis=1), epochs=2, verbose=0)

    Args:
        share: Float >= 0. 0.1 costs no net much, 0.7 is for nets that learn
            wrong labels by heart, and 1 is a lot.
        reference_loss: Float > 0, L0 as a number in loss units, such as
            `log(classes)`; `None`: it is measured.
        max_change: Float > 0: by how much the ascent may change the gradient,
            on average, as a share of it. `None`: no limit. Needs two passes
            over the same rows: not for `ascents.Fraction`, `Previous` and
            `Momentum`.

    Raises:
        TypeError: if an argument is no number.
        ValueError: if one is out of range.
    """

    def __init__(
        self,
        share: float = 0.1,
        reference_loss: float | None = None,
        max_change: float | None = None,
    ) -> None:
        self.share = _checks.number("share", share, 0)
        self.reference_loss = _positive("reference_loss", reference_loss)
        self.max_change = _positive("max_change", max_change)

    def numbers(self) -> dict[str, float]:
        return {"share": self.share}

    def __call__(
        self, progress: Progress, losses: Losses | None, state: dict[str, Any]
    ) -> tf.Tensor | None:
        """Return the budget of a step, once its losses are known."""
        del state
        if losses is None:
            return None
        gain = losses.gain
        data, reference = losses.data, losses.reference
        assert data is not None
        assert reference is not None
        has_floor = (gain > 0) & (data >= 0)
        one = tf.ones_like(gain)
        remains = tf.where(has_floor, data, one) / tf.where(
            has_floor, reference, one
        )
        return tf.cast(self.share, progress.fraction.dtype) * gain * remains

    @property
    def needs_reference(self) -> bool:
        return True

    @property
    def takes_earlier_losses(self) -> bool:
        return True

    @property
    def is_in_loss_units(self) -> bool:
        return True

    @property
    def is_zero(self) -> bool:
        return self.share == 0


def _positive(name: str, value: Any) -> float | None:
    if value is None:
        return None
    return _checks.number(name, value, 0, above=True)
