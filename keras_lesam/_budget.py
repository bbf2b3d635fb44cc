"""The budget over time: which step of how many a training is at."""

import keras
import tensorflow as tf

from keras_lesam import _rule


class Budget:
    """The loss budget `sigma` of each step, with its warm-up and annealing.

    Steps are counted by `optimizer.iterations`: updates, where gradients are
    accumulated. All that changes between steps or fits is in variables: none
    of it retraces the training step. None of it needs saving either: `fit`
    says anew at each epoch where in the training it is.

    Args:
        sigma: Float, or a `keras.optimizers.schedules.LearningRateSchedule`
            from the step to the budget.
        warmup: Share of the training over which the budget rises from 0.
        anneal: Share of the training over which it falls to 0.
        total_steps: Steps of the whole training, or `None`: `begin_epoch`
            says it.
        dtype: Float dtype of the budget.
    """

    def __init__(self, sigma, warmup, anneal, total_steps, dtype):
        self.warmup = warmup
        self.anneal = anneal
        self.total_steps = total_steps
        self.dtype = dtype
        self.knows_steps = False
        self.schedule = None
        if isinstance(sigma, keras.optimizers.schedules.LearningRateSchedule):
            self.schedule = sigma
        else:
            self._number = sigma
            self._sigma = scalar_variable(sigma, dtype, "sigma")
        self._start = scalar_variable(0, "int64", "budget_start")
        self._total = scalar_variable(total_steps or 0, "int64", "budget_total")

    @property
    def sigma(self):
        """The full budget as it was given: a float or a schedule."""
        return self._number if self.schedule is None else self.schedule

    @sigma.setter
    def sigma(self, number):
        self._number = number
        self._sigma.assign(number)

    @property
    def is_zero(self):
        """Whether there is no budget now, nor later in the schedule."""
        return self.schedule is None and self._number == 0

    @property
    def has_length(self):
        """False where `fit` has to say how long the training is."""
        return self.total_steps is not None or not (self.warmup or self.anneal)

    def require_steps(self):
        """Raises `ValueError` if `fit` does not know the steps of an epoch."""
        if not self.knows_steps:
            raise ValueError(
                "The budget's warm-up and annealing are shares of the whole "
                "training, and the number of steps in an epoch of this data "
                "is not known. Pass `steps_per_epoch` to `fit`, or "
                "`total_steps` to the model, or set warmup=0 and anneal=0. "
                f"Received: warmup={self.warmup}, anneal={self.anneal}, "
                "total_steps=None"
            )

    def begin_epoch(self, done, total, iterations):
        """Places the training: `done` of `total` steps at an epoch's start."""
        self._start.assign(iterations - done)
        self._total.assign(total)

    def __call__(self, iterations):
        """The budget of the step that `iterations` steps came before.

        Args:
            iterations: Integer scalar tensor.

        Returns:
            Scalar tensor in loss units, not negative.
        """
        if self.schedule is not None:
            sigma = tf.cast(self.schedule(iterations), self.dtype)
            return tf.maximum(sigma, 0)
        sigma = tf.convert_to_tensor(self._sigma.value)
        if not (self.warmup or self.anneal):
            return sigma
        step = tf.cast(iterations, tf.int64) - self._start.value
        progress = tf.math.divide_no_nan(
            tf.cast(step, self.dtype), tf.cast(self._total.value, self.dtype)
        )
        return _rule.budget(sigma, progress, self.warmup, self.anneal)


def tell_length(budget, callbacks, model):
    """The `callbacks` of `fit`, and one that tells `budget` where it is."""
    teller = _LengthTeller(budget)
    if isinstance(callbacks, keras.callbacks.CallbackList):
        # The caller has set it up already, and `fit` leaves it at that.
        teller.set_model(model)
        teller.set_params(callbacks.params)
        callbacks.callbacks.append(teller)
        return callbacks
    return [*keras.tree.flatten(callbacks or []), teller]


class _LengthTeller(keras.callbacks.Callback):
    """Tells a model's `Budget` which part of the training `fit` is at.

    Raises `ValueError` before the first step where `fit` does not know the
    steps of an epoch.
    """

    def __init__(self, budget):
        super().__init__()
        self._budget = budget

    def on_train_begin(self, logs=None):
        self._budget.knows_steps = self.params.get("steps") is not None
        if not self._budget.is_zero:
            self._budget.require_steps()

    def on_epoch_begin(self, epoch, logs=None):
        if self.params.get("steps") is None:
            return
        optimizer = self.model.optimizer
        iterations = int(keras.ops.convert_to_numpy(optimizer.iterations))
        # Those are updates; with gradient accumulation one of several batches.
        optimizer = getattr(optimizer, "inner_optimizer", optimizer)
        batches = optimizer.gradient_accumulation_steps or 1
        done = epoch * self.params["steps"] // batches
        total = max(1, self.params["epochs"] * self.params["steps"] // batches)
        self._budget.begin_epoch(done, total, iterations)


def scalar_variable(value, dtype, name):
    """A number that may change between steps without a new graph."""
    return keras.Variable(
        value,
        dtype=dtype,
        trainable=False,
        autocast=False,
        aggregation="only_first_replica",
        name=name,
    )
