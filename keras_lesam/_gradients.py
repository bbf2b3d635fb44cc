"""The gradients of a step, as its rule sees them."""

from collections.abc import Iterator
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import keras
import tensorflow as tf

from keras_lesam import _passes
from keras_lesam import _vectors
from keras_lesam._vectors import Tensors


class Scales(NamedTuple):
    """How the gradients of a pass differ from those of the loss.

    Attributes:
        local: Of a replica's gradients: what the loss was multiplied by
            before it was differentiated; a float or a scalar tensor.
        whole: Of their sum over all replicas.
        dtype: Of scalars.
        is_global: Whether all replicas take one perturbation.
    """

    local: Any
    whole: Any
    dtype: Any
    is_global: bool

    @classmethod
    def of(cls, model: keras.Model, dtype: Any, is_global: bool) -> "Scales":
        """Read the scales of a compiled model, as they are in this step."""
        return cls(
            local=_passes.gradient_scale(model.optimizer),
            whole=_passes.loss_scale(model.optimizer),
            dtype=dtype,
            is_global=is_global,
        )

    def unscale(self, scaled: Tensors) -> Tensors:
        """Return gradients of the loss, from dense ones of a pass.

        Of the whole batch over all replicas where those take one perturbation,
        of the replica's own part elsewhere.
        """
        if not self.is_global:
            return _divided(scaled, self.local)
        return _divided(_passes.sum_over_replicas(scaled), self.whole)

    def unscale_scalar(self, scaled: tf.Tensor) -> tf.Tensor:
        """Return what is linear in the loss, as `unscale`."""
        if self.is_global:
            scaled = _passes.sum_over_replicas(scaled)
        scale = self.whole if self.is_global else self.local
        return scaled / _scale(scale, scaled.dtype)


class Gradients(Sequence[Any]):
    """Gradients of the loss at one point, one for each trainable variable.

    A sequence of dense tensors (in loss units per weight-space distance,
    without any loss scale), or `None` where the loss has no gradient. Under
    `tf.distribute` they are those of the replica's own part of the batch; the
    mean over replicas is the gradient of the whole.

    Rows of an embedding are only made dense when an item is looked at. A rule
    that returns the object itself keeps them sparse for the optimizer.

    Attributes:
        radius: Scalar tensor, the distance between this point and the weights:
            0 at the weights themselves.
    """

    def __init__(
        self,
        scaled: Tensors,
        radius: tf.Tensor,
        scales: Scales,
        is_weight: list[bool],
    ) -> None:
        self.scaled = scaled
        self.radius = radius
        self._scales = scales
        self._is_weight = is_weight
        self._totals: Tensors | None = None
        self._graph = _graph()

    def __len__(self) -> int:
        return len(self.scaled)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        if not self._is_weight[index] or self.scaled[index] is None:
            return None
        [gradient] = _divided(
            _vectors.dense([self.scaled[index]]), self._scales.local
        )
        return gradient

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))

    def dot(self, other: "Gradients") -> tf.Tensor:
        """Return the inner product over all weights, a scalar tensor.

        Where all replicas take one perturbation it is that of the gradients
        of the whole batch. They have to meet for it, which they cannot do in
        a branch: call `dot` or `reduce_with` before `tf.cond`.

        Raises:
            RuntimeError: in a branch, where replicas would have to meet.
        """
        self.reduce_with(other)
        return _vectors.dot(self._whole(), other._whole(), self._scales.dtype)

    def norm(self) -> tf.Tensor:
        """Return the norm over all weights; see `dot`.

        Right wherever it is within range, which its square need not be.
        """
        self.reduce_with(self)
        return _vectors.norm(self._whole(), self._scales.dtype)

    def orthogonal_to(self, other: "Gradients") -> Tensors:
        """Return the component orthogonal to others, `v - (v.o / ||o||^2) o`.

        Right wherever both norms are within range, and `v` where the others
        are 0. See `dot` for replicas.

        Returns:
            List like the gradients, in float32 where those have 16 bits.
        """
        self.reduce_with(other)
        length = other.norm()
        size = _vectors.component(self._whole(), other._whole(), length)
        return [
            v
            if v is None or o is None
            else _vectors.wide(v) - _vectors.along(o, size, length)
            for v, o in zip(self, other)
        ]

    def reduce_with(self, other: "Gradients") -> None:
        """Let inner products of both be taken in a branch too.

        Where all replicas take one perturbation, the gradients are summed over
        the replicas, in one collective. Elsewhere it does nothing.

        Raises:
            RuntimeError: in a branch, where replicas would have to meet.
        """
        pair = {id(g): g for g in (self, other)}.values()
        missing = [g for g in pair if g._totals is None]
        if not self._scales.is_global or not missing:
            return
        if _graph() is not self._graph:
            raise RuntimeError(
                "Inner products of gradients cannot be taken in a branch where "
                "all replicas take one perturbation: call `dot`, `norm` or "
                "`reduce_with` before `tf.cond`."
            )
        sums = _passes.sum_over_replicas([g._scaled_weights() for g in missing])
        for gradients, total in zip(missing, sums):
            gradients._totals = _divided(total, self._scales.whole)

    def _whole(self) -> Tensors:
        """Return the gradients that inner products are taken of."""
        return [*self] if self._totals is None else self._totals

    def _scaled_weights(self) -> Tensors:
        return [
            g if is_weight else None
            for g, is_weight in zip(
                _vectors.dense(self.scaled), self._is_weight
            )
        ]

    def rescale(self, unscaled: Sequence[Any]) -> Tensors:
        """Return gradients for the optimizer, of the scale of this pass.

        What is no weight keeps what the pass found.
        """
        dense = _vectors.dense(self.scaled)
        return [
            old
            if new is None or old is None or not is_weight
            else _multiplied(new, self._scales.local, old.dtype)
            for new, old, is_weight in zip(unscaled, dense, self._is_weight)
        ]


def _divided(vector: Tensors, scale: Any) -> Tensors:
    """Divide by a scale, in float32 where the numbers have 16 bits.

    The loss scale is what keeps float16 gradients from underflow: without it
    they need a wider type.
    """
    if _is_one(scale):
        return vector
    wide = [None if v is None else _vectors.wide(v) for v in vector]
    return [None if v is None else v / _scale(scale, v.dtype) for v in wide]


def _multiplied(tensor: tf.Tensor, scale: Any, dtype: Any) -> tf.Tensor:
    if not _is_one(scale):
        tensor = tensor * _scale(scale, tensor.dtype)
    return tf.cast(tensor, dtype)


def _is_one(scale: Any) -> bool:
    return isinstance(scale, float) and scale == 1.0


def _scale(scale: Any, dtype: Any) -> Any:
    # A Python number that is cast is rounded to float32 first.
    return scale if isinstance(scale, float) else tf.cast(scale, dtype)


def _graph() -> Any:
    """Return the graph being built, or `None` where operations run at once."""
    if tf.executing_eagerly():
        return None
    return tf.compat.v1.get_default_graph()
