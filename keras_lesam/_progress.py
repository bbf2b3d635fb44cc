"""Where in the training a step is, and what the progress bar shows of it."""

import warnings
from collections.abc import Callable
from collections.abc import Collection
from typing import Any

import keras
import tensorflow as tf

from keras_lesam import _checks
from keras_lesam._state import scalar_variable
from keras_lesam.budgets import Progress

# What a step logs beside loss and metrics.
STATISTICS = ("rho", "gradient_norm", "sharpness", "sigma")

NO_LENGTH = (
    "The budget's warm-up and annealing are shares of the whole training, and "
    "how long it is only `fit` knows. Pass `total_steps` to the model, or set "
    "warmup=0 and anneal=0. Received: total_steps=None"
)
_NO_STEPS = (
    "The budget's warm-up and annealing are shares of the whole training, and "
    "the number of steps in an epoch of this data is not known. Pass "
    "`steps_per_epoch` to `fit`, or `total_steps` to the model, or set "
    "warmup=0 and anneal=0. Received: {budget!r}, total_steps=None"
)


class TrainingProgress:
    """Counts the steps of a training, as shares of the whole.

    Steps are counted by `optimizer.iterations`: updates, where gradients are
    accumulated. What changes between steps or fits is in variables, so that
    none of it retraces the training step. None of it needs saving either:
    `fit` says anew at each epoch where in the training it is.

    Args:
        total_steps: Steps of the whole training, or `None`: `begin_epoch`
            says it.
        dtype: Float dtype of the fraction.
    """

    def __init__(self, total_steps: int | None, dtype: Any) -> None:
        self.total_steps = total_steps
        self.knows_steps = False
        self._dtype = dtype
        self._start = scalar_variable(0, "int64", "training_start")
        self._total = scalar_variable(
            total_steps or 0, "int64", "training_total"
        )

    def require_steps(self, budget: Any) -> None:
        """Raise `ValueError` if `fit` does not know the steps of an epoch."""
        if not self.knows_steps:
            raise ValueError(_NO_STEPS.format(budget=budget))

    def begin_epoch(self, done: int, total: int, iterations: int) -> None:
        """Place an epoch's start at `done` of `total` steps."""
        self._start.assign(iterations - done)
        self._total.assign(total)

    def __call__(self, iterations: Any) -> Progress:
        """Return the `Progress` of the step after so many iterations."""
        iterations = tf.convert_to_tensor(iterations)
        step = tf.cast(iterations, tf.int64) - self._start.value
        fraction = tf.math.divide_no_nan(
            tf.cast(step, self._dtype), tf.cast(self._total.value, self._dtype)
        )
        return Progress(iterations=iterations, fraction=fraction)


class ScheduleProgress(keras.callbacks.Callback):
    """Tells a `TrainingProgress` which part of the training `fit` is at.

    Raises `ValueError` before the first step where `fit` does not know the
    steps of an epoch.

    Args:
        progress: The `TrainingProgress`.
        budget: Function that returns the budget as it is now.
    """

    def __init__(
        self, progress: TrainingProgress, budget: Callable[[], Any]
    ) -> None:
        super().__init__()
        self._progress = progress
        self._budget = budget

    def on_train_begin(self, logs: Any = None) -> None:
        del logs
        self._progress.knows_steps = self.params.get("steps") is not None
        if not self._budget().is_zero:
            self._progress.require_steps(self._budget())

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        del logs
        if self.params.get("steps") is None:
            return
        optimizer = self.model.optimizer
        iterations = int(keras.ops.convert_to_numpy(optimizer.iterations))
        # Those are updates; with gradient accumulation one of several batches.
        optimizer = getattr(optimizer, "inner_optimizer", optimizer)
        batches = optimizer.gradient_accumulation_steps or 1
        done = epoch * self.params["steps"] // batches
        total = max(1, self.params["epochs"] * self.params["steps"] // batches)
        self._progress.begin_epoch(done, total, iterations)


def warn_of_early_stopping(callbacks: Any, budget: Any) -> None:
    """Warn that shares of a training that ends early are of another length.

    Args:
        callbacks: Those of `fit`.
        budget: The budget, which goes by the length of the training.
    """
    listed = getattr(callbacks, "callbacks", callbacks) or []
    if budget.is_zero or not any(
        isinstance(callback, keras.callbacks.EarlyStopping)
        for callback in keras.tree.flatten(listed)
    ):
        return
    warnings.warn(
        "The budget's warm-up and annealing are shares of all the epochs of "
        "this `fit`, which EarlyStopping may end long before: then the budget "
        "stays small. Pass the steps that you expect as `total_steps`, or set "
        f"warmup=0 and anneal=0. Received: {budget!r}",
        stacklevel=3,
    )


def with_callback(callbacks: Any, callback: Any, model: keras.Model) -> Any:
    """Return the `callbacks` of `fit` with one more."""
    if isinstance(callbacks, keras.callbacks.CallbackList):
        # The caller has set it up already, and `fit` leaves it at that.
        callback.set_model(model)
        callback.set_params(callbacks.params)
        callbacks.callbacks.append(callback)
        return callbacks
    return [*keras.tree.flatten(callbacks or []), callback]


class ProgressBar(keras.callbacks.ProgbarLogger):
    """Shows progress as `fit` does, with some of the step's numbers.

    By default the bar of `fit` (`verbose=1`) is that of the plain model: four
    more numbers would not fit in the line of a terminal, which then keeps a
    stale line of each refresh. `History`, the other callbacks and the lines of
    `verbose=2` have all numbers. A number that is 0 is left out of the bar, as
    at the start of a warm-up.

    Example:

    >>> import keras, numpy as np
    >>> from keras_lesam import LESAMModel
    >>> from keras_lesam.callbacks import ProgressBar
    >>> model = LESAMModel(keras.Sequential([keras.layers.Dense(1)]))
    >>> model.compile("sgd", "mse")
    >>> x, y = np.random.rand(64, 3), np.random.rand(64, 1)
    >>> bar = ProgressBar(["rho", "sharpness"])
    >>> history = model.fit(x, y, callbacks=[bar], verbose=0)

    Args:
        numbers: Names of the numbers to show beside the loss and the metrics:
            any of `"rho"`, `"gradient_norm"`, `"sharpness"`, `"sigma"`.

    Raises:
        TypeError: if `numbers` is no list, tuple or set.
        ValueError: if one of the names is another.
    """

    def __init__(self, numbers: Collection[str] = ("rho",)) -> None:
        super().__init__()
        if not isinstance(numbers, list | tuple | set | frozenset):
            raise TypeError(
                "`numbers` must be a list of names. "
                f"Received: numbers={_checks.short(numbers)}"
            )
        self.numbers = tuple(
            _checks.choice("numbers", name, STATISTICS) for name in numbers
        )

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        super().on_train_batch_end(batch, self._shown(logs))

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        super().on_epoch_end(epoch, self._shown(logs))

    def _shown(self, logs: Any) -> dict[str, Any]:
        return {
            name: value
            for name, value in (logs or {}).items()
            if name not in STATISTICS or (name in self.numbers and value)
        }


def with_progress_bar(callbacks: Any, verbose: Any) -> Any:
    """Return the `callbacks` of `fit`, with the bar of a plain model."""
    if verbose not in ("auto", 1) or isinstance(
        callbacks, keras.callbacks.CallbackList
    ):
        return callbacks
    listed = keras.tree.flatten(callbacks or [])
    if any(isinstance(c, keras.callbacks.ProgbarLogger) for c in listed):
        return callbacks
    return [*listed, ProgressBar(())]
