"""Hessian-vector products of a pass: two exact ways to differentiate twice.

    forward_over_reverse    a ForwardAccumulator around the pass: the tangent
                            of its gradient is H v
    reverse_over_reverse    a second GradientTape around the pass: the
                            gradient of g.v is H v

Forward mode (Pearlmutter 1994, "Fast exact multiplication by the Hessian")
cannot enter loops and branches; reverse mode can. As in every pass, nothing
is written, and random layers draw what the step's own passes draw.

What neither can differentiate, since TensorFlow cannot, is refused by name.
"""

import contextlib
from collections.abc import Iterable
from collections.abc import Iterator
from typing import Any

import keras
import tensorflow as tf

from keras_lesam import _passes
from keras_lesam import _unsupported
from keras_lesam import _vectors
from keras_lesam._data import Batch
from keras_lesam._engines import Passes
from keras_lesam._reach import Operation
from keras_lesam._reach import reached
from keras_lesam._second_derivatives import twice_differentiable
from keras_lesam._vectors import Tensors

FORWARD_OVER_REVERSE = "forward_over_reverse"
REVERSE_OVER_REVERSE = "reverse_over_reverse"

METHODS = (FORWARD_OVER_REVERSE, REVERSE_OVER_REVERSE)
CHOICES = ("auto", *METHODS)

# Operations that forward mode has no rule for.
_LOOPS = {"While", "StatelessWhile"}
_BRANCHES = {"If", "StatelessIf", "Case", "StatelessCase"}
# Operations whose second derivative XLA computes from numbers of 16 bits.
_MAX_POOLING = {"MaxPool", "MaxPoolV2", "MaxPool3D"}


def resolve(method: str) -> str:
    """Return the method that "auto" stands for, the cheaper and wider one.

    Reverse mode needs no forward pass of its own, and enters loops.
    """
    return REVERSE_OVER_REVERSE if method == "auto" else method


def product(
    passes: Passes,
    model: keras.Model,
    weights: Tensors,
    batch: Batch,
    vectors: Tensors,
    method: str,
    state: _passes.ModelState = (),
) -> Tensors:
    """Return `H v` of the scaled loss at `weights`.

    Args:
        passes: The engine of passes that sees all of the model.
        model: A compiled and built Keras model.
        weights: Its weights as they are, a list of tensors.
        batch: A `Batch`.
        vectors: List of tensors like the weights, `None` for zeros.
        method: `FORWARD_OVER_REVERSE` or `REVERSE_OVER_REVERSE`.
        state: List of `(variable, tensor)` to see in place of the variables.

    Returns:
        List of tensors, parallel to the weights: the product of `vectors` with
        the Hessian of `_passes.gradient_scale(optimizer)` times the loss;
        `None` where `vectors` is, or where the loss has no gradient.
    """
    if method == REVERSE_OVER_REVERSE:
        sources = passes.sources(model, weights)
        with recording(sources) as tape:
            point = passes.here(model, weights, batch, state)
            gradients = _vectors.dense(point.gradients)
        return differentiate(tape, gradients, sources, vectors)
    with (
        twice_differentiable(),
        _accumulator(weights, vectors) as accumulator,
    ):
        point = passes.here(model, weights, batch, state)
        # Inside, or the tangents of sparse gradients are lost.
        gradients = _vectors.dense(point.gradients)
    return [
        None
        if g is None or v is None
        else accumulator.jvp(g, unconnected_gradients="zero")
        for g, v in zip(gradients, vectors)
    ]


@contextlib.contextmanager
def recording(sources: list[Any]) -> Iterator[tf.GradientTape]:
    """Open a tape that sees a pass, to differentiate it again by `sources`."""
    with (
        twice_differentiable(),
        tf.GradientTape(watch_accessed_variables=False) as tape,
    ):
        tape.watch(sources)
        yield tape


def differentiate(
    tape: tf.GradientTape,
    gradients: Tensors,
    sources: list[Any],
    vectors: Tensors,
) -> Tensors:
    """Return `H v` from a tape that saw the gradients being computed.

    `gradients`, `sources` and `vectors` are parallel lists; the result is
    that of `product`.
    """
    perturbed = [
        i
        for i, (g, v) in enumerate(zip(gradients, vectors))
        if g is not None and v is not None
    ]
    with _unsupported.named_errors():
        products = tape.gradient(
            [gradients[i] for i in perturbed],
            [sources[i] for i in perturbed],
            output_gradients=[vectors[i] for i in perturbed],
            unconnected_gradients="zero",
        )
    all_products: Tensors = [None] * len(sources)
    for i, value in zip(perturbed, products):
        all_products[i] = tf.convert_to_tensor(value)
    return all_products


def operations(
    passes: Passes, model: keras.Model, batch: Batch
) -> list[Operation]:
    """Return the operations of a pass, forward and back, that weights reach."""
    if passes.is_in_place:
        return _operations_in_place(passes, model, batch)
    weights = _passes.read(model.trainable_variables)

    # In training, replicas may have to meet on the way, which a trace cannot.
    is_alone = _passes.replicas() == 1

    def trace(weights: Tensors, batch: Batch) -> tuple[tf.Tensor, Tensors]:
        with recording(weights) as tape:
            loss = _passes.forward(model, weights, batch, (), is_alone)[0]
        return loss, _vectors.dense(tape.gradient(loss, weights))

    # The batch is an argument, or branches that it decides would be gone.
    traced = tf.function(trace, autograph=False).get_concrete_function(
        [tf.TensorSpec(w.shape, w.dtype) for w in weights], batch
    )
    variables = model.trainable_variables if is_alone else ()
    return reached(traced, len(weights), variables)


def _operations_in_place(
    passes: Passes, model: keras.Model, batch: Batch
) -> list[Operation]:
    """Return those of a model that reads its variables by itself."""

    def trace(batch: Batch) -> tuple[tf.Tensor, Tensors]:
        with recording(passes.sources(model, [])):
            point = passes.here(model, [], batch)
        return point.loss, _vectors.dense(point.gradients)

    traced = tf.function(trace, autograph=False).get_concrete_function(batch)
    return reached(traced, 0, model.trainable_variables)


def refuse_forward_mode(passes: Passes, method: str, argument: str) -> None:
    """Raise `ValueError` for forward mode, where variables are moved."""
    if passes.is_in_place and method == FORWARD_OVER_REVERSE:
        raise ValueError(
            "Forward-mode differentiation does not go by variables, as it "
            "would have to for this model; use 'reverse_over_reverse' or "
            f"'auto'. Received: {argument}={method!r}"
        )


def _types(operations: Iterable[Operation]) -> set[str]:
    return {operation.type for operation in operations}


def has_max_pooling(operations: Iterable[Operation]) -> bool:
    """Return whether XLA would get the second derivative wrong."""
    return bool(_MAX_POOLING & _types(operations))


def refuse_unsupported(
    operations: Iterable[Operation], method: str, argument: str
) -> None:
    """Raise `ValueError` for what cannot be differentiated twice.

    `argument` is the name under which the user gave the method.
    """
    _unsupported.refuse(operations)
    if method != FORWARD_OVER_REVERSE:
        return
    types = _types(operations)
    if _LOOPS & types:
        what = "the loops of recurrent layers"
    elif _BRANCHES & types:
        what = "branches such as those of `keras.ops.cond`"
    else:
        return
    raise ValueError(
        f"Forward-mode differentiation has no rule for {what}; use "
        f"'reverse_over_reverse' or 'auto'. Received: {argument}={method!r}"
    )


def refuse_max_pooling(operations: Iterable[Operation]) -> None:
    """Raise `ValueError` for a model that XLA would differentiate wrongly."""
    if has_max_pooling(operations):
        raise ValueError(
            "XLA computes the second derivative of max pooling from numbers "
            "of 16 bits, wrong by several percent. Compile with "
            "`jit_compile=False`, or use curvature='secant', or average "
            "pooling. Received: jit_compile=True with curvature='hvp'"
        )


def _accumulator(
    weights: Tensors, vectors: Tensors
) -> tf.autodiff.ForwardAccumulator:
    pairs = [(w, v) for w, v in zip(weights, vectors) if v is not None]
    return tf.autodiff.ForwardAccumulator(
        [w for w, _ in pairs], [tf.cast(v, w.dtype) for w, v in pairs]
    )
