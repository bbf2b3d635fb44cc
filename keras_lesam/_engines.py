"""Two engines of passes with one contract.

`StatelessPasses` gives the model tensors in place of its variables, and writes
nothing: see `_passes`. `InPlacePasses` moves the variables themselves and puts
them back, for models that the first one cannot see through. Which of them a
model needs is found out when it is built: see `_inspection`.

To both, a pass is a function of weights, state and batch: after it, all
variables are what they were, and the state that it brought about is returned.
"""

import concurrent.futures
import contextlib
import warnings
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_lesam import _calls
from keras_lesam import _host_random
from keras_lesam import _inspection
from keras_lesam import _passes
from keras_lesam._data import Batch
from keras_lesam._passes import LossAndGradients
from keras_lesam._passes import ModelState
from keras_lesam._vectors import Tensors


class StatelessPasses:
    """Passes that write nothing: tensors in place of variables."""

    is_in_place = False

    def here(
        self,
        model: keras.Model,
        weights: Tensors,
        batch: Batch,
        state: ModelState = (),
    ) -> LossAndGradients:
        """Make the pass at the weights as they are, which are `weights`."""
        return _passes.compute_loss_and_gradients(model, weights, batch, state)

    there = here

    def loss_there(
        self, model: keras.Model, weights: Tensors, batch: Batch
    ) -> tf.Tensor:
        """Compute the loss at other weights, in inference mode."""
        loss = _passes.forward(model, weights, batch, training=False)[1]
        return tf.reduce_sum(loss)

    def sources(self, model: keras.Model, weights: Tensors) -> list[Any]:
        """Return what gradients of a pass at `weights` are taken by."""
        del model
        return weights

    def looking_again(
        self, model: keras.Model, weights: Tensors, point: LossAndGradients
    ) -> contextlib.AbstractContextManager[None]:
        """Let losses be computed once more after a pass, and write nothing."""
        return _passes.looking_again(model, weights, point)

    def recover(self) -> None:
        """Put back what a pass that failed has left: nothing."""


class InPlacePasses:
    """Passes that move the variables and put them back, on one replica.

    Args:
        model: The model.
        touched: The variables that a pass may write.
    """

    is_in_place = True

    def __init__(self, model: keras.Model, touched: Sequence[Any]) -> None:
        self._touched = [*touched]
        with tf.init_scope():
            self._weights_guard = _Guard(model.trainable_variables)
            self._state_guard = _Guard(self._touched)

    def here(
        self,
        model: keras.Model,
        weights: Tensors,
        batch: Batch,
        state: ModelState = (),
    ) -> LossAndGradients:
        """Make the pass at the weights as they are."""
        del weights
        with self._state_guard.restoring():
            _passes.commit(state)
            return self._compute(model, batch)

    def there(
        self,
        model: keras.Model,
        weights: Tensors,
        batch: Batch,
        state: ModelState = (),
    ) -> LossAndGradients:
        """Make the pass at other weights."""
        with self._weights_guard.restoring(), self._state_guard.restoring():
            _passes.commit(state)
            _passes.commit([*zip(model.trainable_variables, weights)])
            return self._compute(model, batch)

    def loss_there(
        self, model: keras.Model, weights: Tensors, batch: Batch
    ) -> tf.Tensor:
        """Compute the loss at other weights, in inference mode."""
        with self._weights_guard.restoring(), self._state_guard.restoring():
            _passes.commit([*zip(model.trainable_variables, weights)])
            outputs = model(batch.x, training=False)
            loss = _passes.compute_loss(model, batch, outputs, training=False)
            return tf.reduce_sum(loss)

    def sources(self, model: keras.Model, weights: Tensors) -> list[Any]:
        """Return what gradients of a pass are taken by: the variables."""
        del weights
        return [v.value for v in model.trainable_variables]

    @contextlib.contextmanager
    def looking_again(
        self, model: keras.Model, weights: Tensors, point: LossAndGradients
    ) -> Iterator[None]:
        """Let losses be computed once more after a pass; put all back."""
        del point  # The layers have what was given to `add_loss`.
        with self._weights_guard.restoring(), self._state_guard.restoring():
            _passes.commit([*zip(model.trainable_variables, weights)])
            yield

    def recover(self) -> None:
        """Put back what a pass that failed has left moved."""
        self._weights_guard.recover()
        self._state_guard.recover()

    def _compute(self, model: keras.Model, batch: Batch) -> LossAndGradients:
        variables = self.sources(model, [])
        with tf.GradientTape() as tape:
            tape.watch(variables)
            outputs = _calls.outputs(model, batch.x, training=True)
            loss = _passes.compute_loss(model, batch, outputs, training=True)
            scaled_loss = loss
            if model.optimizer is not None:
                scaled_loss = model.optimizer.scale_loss(loss)
        # Before the weights are put back: it may compute the pass again.
        gradients = tape.gradient(scaled_loss, variables)
        return LossAndGradients(
            loss=tf.reduce_sum(loss),
            logged_loss=loss,
            outputs=outputs,
            gradients=gradients,
            state=[*zip(self._touched, _passes.read(self._touched))],
        )


class _Guard:
    """Puts variables back to what they were, also after an exception.

    In a graph nothing is done after an operation has failed: what the
    variables were is kept in others, for `recover`.
    """

    def __init__(self, variables: Sequence[Any]) -> None:
        self._variables = [*variables]
        self._saved = [
            tf.Variable(tf.zeros_like(v.value), trainable=False)
            for v in variables
        ]
        self._is_moved = tf.Variable(False, trainable=False)

    @contextlib.contextmanager
    def restoring(self) -> Iterator[None]:
        """Restore the variables at the end of the context, bit for bit."""
        values = _passes.read(self._variables)
        saved = [s.assign(v) for s, v in zip(self._saved, values)]
        with tf.control_dependencies(saved):
            moved = self._is_moved.assign(True)
        try:
            with tf.control_dependencies([moved]):
                yield
        finally:
            _passes.commit([*zip(self._variables, values)])
            restored = _passes.read(self._variables)
            with tf.control_dependencies(restored):
                self._is_moved.assign(False)

    def recover(self) -> None:
        """Restore the variables if a step has failed before it could."""
        if bool(self._is_moved):
            for variable, saved in zip(self._variables, self._saved):
                variable.assign(saved)
            self._is_moved.assign(False)


Passes = StatelessPasses | InPlacePasses


@contextlib.contextmanager
def recovering(passes: Callable[[], Passes]) -> Iterator[None]:
    """Put back what is moved if an exception ends the context.

    Args:
        passes: Function that returns the engine, which may be chosen inside.
    """
    try:
        yield
    except BaseException:
        passes().recover()
        raise


def choose(
    model: keras.Model, stock: _inspection.StockPass | None, batch: Batch
) -> Passes:
    """Return the engine that sees all of a model.

    Args:
        model: A compiled and built Keras model.
        stock: Its stock pass, or `None` where it could not be traced.
        batch: A batch like those of the training.

    Raises:
        ValueError: if it is `InPlacePasses`, and there are several replicas.
    """
    if stock is None:
        findings = _inspection.Findings(
            hidden=[],
            has_nested_state=False,
            assigned=[],
            closures=[*model.trainable_variables],
            accessed=[*model.variables, *model.metrics_variables],
        )
    else:
        findings = _inspection.inspect(model, stock)
    unseen = [*findings.hidden, *findings.assigned]
    has_unseen = bool(unseen or findings.has_nested_state)
    if not has_unseen and findings.closures:
        unseen = _wrong_gradients(model, findings, batch)
        has_unseen = bool(unseen)
    if not has_unseen:
        return StatelessPasses()
    reason = _describe(findings, unseen)
    if _passes.replicas() > 1:
        raise ValueError(
            f"`model` cannot be trained on several replicas: {reason}. Their "
            "weights would have to be moved in place, which one replica can "
            f"do. Received: model={model.name!r}"
        )
    warnings.warn(
        f"{model.name!r} moves its weights in place and puts them back in each "
        f"step, which takes longer: {reason}.",
        stacklevel=2,
    )
    return InPlacePasses(model, _touched(model, findings))


def _touched(model: keras.Model, findings: _inspection.Findings) -> list[Any]:
    """Return what a pass may write: no weights but those that are assigned."""
    trainable = {id(v) for v in model.trainable_variables}
    assigned = {id(v) for v in findings.assigned}
    return [
        v
        for v in findings.accessed
        if id(v) not in trainable or id(v) in assigned
    ]


def _describe(findings: _inspection.Findings, unseen: list[Any]) -> str:
    if findings.hidden:
        what = "behind a `tf.function`"
    elif findings.assigned:
        what = "assigned by the model itself"
    elif findings.has_nested_state:
        return "it writes state inside of a branch, a loop or a `tf.function`"
    else:
        what = "used by a function with a gradient of its own (`keras.remat`)"
    names = ", ".join(v.path for v in unseen[:3])
    more = f" and {len(unseen) - 3} more" if len(unseen) > 3 else ""
    return f"the weights {names}{more} are {what}"


def _wrong_gradients(
    model: keras.Model, findings: _inspection.Findings, batch: Batch
) -> list[Any]:
    """Return the weights whose gradient the stateless passes get wrong.

    Of those that functions with gradients of their own use; all of these if it
    cannot be found out.
    """
    sample = _sample(batch)
    if sample is None or _passes.replicas() > 1:
        return findings.closures
    engines = StatelessPasses(), InPlacePasses(model, _touched(model, findings))

    def gradients(batch: Batch) -> list[Any]:
        weights = _passes.read(model.trainable_variables)
        state = _host_random.get_state()
        found = []
        for engine in engines:
            with _host_random.replaying(state):
                found.append(engine.here(model, weights, batch).gradients)
        return found

    def compare(gradients: Callable[[Batch], list[Any]]) -> list[bool]:
        return [are_close(a, b) for a, b in zip(*gradients(sample))]

    try:
        if tf.executing_eagerly():
            found = compare(gradients)
        else:
            # In a thread of its own, which is in no graph and under no tape.
            traced = tf.function(gradients, autograph=False)
            with concurrent.futures.ThreadPoolExecutor(1) as executor:
                found = executor.submit(compare, traced).result()
    except (tf.errors.OpError, ValueError, TypeError):
        return findings.closures
    return [
        variable
        for variable, is_close in zip(model.trainable_variables, found)
        if not is_close
    ]


def are_close(a: Any, b: Any) -> bool:
    """Return whether a gradient is the stock one `b`; `None` is 0."""
    if b is None or a is None:
        return a is None and (b is None or not np.any(tf.convert_to_tensor(b)))
    a, b = (tf.cast(t, tf.float64).numpy() for t in (a, b))
    return bool(np.allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(b).max()))


def _sample(batch: Batch) -> Any:
    """Return a batch of numbers like a symbolic one, or `None`."""
    rng = np.random.default_rng(0)

    def sample(leaf: Any) -> Any:
        if leaf is None or not tf.is_symbolic_tensor(leaf):
            return leaf
        shape = [2 if d is None else d for d in leaf.shape.as_list()]
        if leaf.dtype.is_floating:
            return rng.normal(size=shape).astype(leaf.dtype.as_numpy_dtype)
        if leaf.dtype.is_integer or leaf.dtype.is_bool:
            return rng.integers(2, size=shape).astype(leaf.dtype.as_numpy_dtype)
        return np.full(shape, "a")

    leaves = [leaf for leaf in tf.nest.flatten(batch) if leaf is not None]
    if any(isinstance(x, tf.RaggedTensor | tf.SparseTensor) for x in leaves):
        return None
    return tf.nest.map_structure(sample, batch)
