"""Running means of the numbers that a step logs beside loss and metrics."""

from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf


class StepStatistics(keras.metrics.Metric):
    """Means over steps of several numbers at once.

    One vector of sums and one of counts, so that a step pays for two
    assignments whatever the number of names. A value that is not finite (a
    step that overflowed in mixed precision) is left out of its mean.

    Args:
        names: Sequence of strings, the names in the logs.
        name: Name of the metric.
    """

    def __init__(
        self,
        names: Sequence[str],
        name: str = "step_statistics",
        **kwargs: Any,
    ) -> None:
        super().__init__(name=name, **kwargs)
        self.names = tuple(names)
        shape = (len(self.names),)
        self.total = self.add_variable(shape, "zeros", name="total")
        self.count = self.add_variable(shape, "zeros", name="count")

    def update_state(self, values: Mapping[str, tf.Tensor | float]) -> None:
        """Add one step: `values` maps each name to a scalar tensor."""
        vector = tf.stack([tf.cast(values[n], self.dtype) for n in self.names])
        finite = tf.math.is_finite(vector)
        self.total.assign_add(tf.where(finite, vector, 0.0))
        self.count.assign_add(tf.cast(finite, self.dtype))

    def result(self) -> dict[str, tf.Tensor]:
        """Return the means; 0 where nothing was observed, as in Keras."""
        means = tf.math.divide_no_nan(
            tf.convert_to_tensor(self.total.value), self.count.value
        )
        return dict(zip(self.names, tf.unstack(means)))

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "names": self.names}
