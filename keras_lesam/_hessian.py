"""Hessian-vector products of a pass: two exact ways to differentiate twice.

    forward_over_reverse    a ForwardAccumulator around the pass: the tangent
                            of its gradient is H v
    reverse_over_reverse    a second GradientTape around the pass: the
                            gradient of g.v is H v

Forward mode (Pearlmutter 1994, "Fast exact multiplication by the Hessian")
cannot enter the loops of recurrent layers; reverse mode can. As in every
pass, nothing is written, and random layers draw what the step's own passes
draw.
"""

import contextlib
from collections.abc import Iterator

import keras
import tensorflow as tf

from keras_lesam import _passes
from keras_lesam import _vectors
from keras_lesam import _workarounds
from keras_lesam._data import Batch
from keras_lesam._vectors import Tensors

FORWARD_OVER_REVERSE = "forward_over_reverse"
REVERSE_OVER_REVERSE = "reverse_over_reverse"

METHODS = (FORWARD_OVER_REVERSE, REVERSE_OVER_REVERSE)
CHOICES = ("auto", *METHODS)

# Operations that forward mode has no rule for.
_LOOPS = {"While", "StatelessWhile"}
# Operations whose second derivative XLA computes from numbers of 16 bits.
_MAX_POOLING = {"MaxPool", "MaxPoolV2", "MaxPool3D"}


def resolve(method: str) -> str:
    """Return the method that "auto" stands for, the cheaper and wider one.

    Reverse mode needs no forward pass of its own, and enters loops.
    """
    return REVERSE_OVER_REVERSE if method == "auto" else method


def product(
    model: keras.Model,
    weights: Tensors,
    batch: Batch,
    vectors: Tensors,
    method: str,
    state: _passes.ModelState = (),
) -> Tensors:
    """Return `H v` of the scaled loss at `weights`.

    Args:
        model: A compiled and built Keras model.
        weights: List of tensors, parallel to `model.trainable_variables`.
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
        with recording(weights) as tape:
            point = _passes.compute_loss_and_gradients(
                model, weights, batch, state
            )
            gradients = _vectors.dense(point.gradients)
        return differentiate(tape, gradients, weights, vectors)
    with (
        _workarounds.twice_differentiable_moments(),
        _accumulator(weights, vectors) as accumulator,
    ):
        point = _passes.compute_loss_and_gradients(model, weights, batch, state)
        # Inside, or the tangents of sparse gradients are lost.
        gradients = _vectors.dense(point.gradients)
    return [
        None
        if g is None or v is None
        else accumulator.jvp(g, unconnected_gradients="zero")
        for g, v in zip(gradients, vectors)
    ]


@contextlib.contextmanager
def recording(weights: Tensors) -> Iterator[tf.GradientTape]:
    """Open a tape that sees a pass at `weights`, to differentiate it again."""
    with (
        _workarounds.twice_differentiable_moments(),
        tf.GradientTape(watch_accessed_variables=False) as tape,
    ):
        tape.watch(weights)
        yield tape


def differentiate(
    tape: tf.GradientTape,
    gradients: Tensors,
    weights: Tensors,
    vectors: Tensors,
) -> Tensors:
    """Return `H v` from a tape that saw the gradients being computed.

    `gradients`, `weights` and `vectors` are parallel lists; the result is
    that of `product`.
    """
    perturbed = [
        i
        for i, (g, v) in enumerate(zip(gradients, vectors))
        if g is not None and v is not None
    ]
    products = tape.gradient(
        [gradients[i] for i in perturbed],
        [weights[i] for i in perturbed],
        output_gradients=[vectors[i] for i in perturbed],
        unconnected_gradients="zero",
    )
    all_products: Tensors = [None] * len(weights)
    for i, value in zip(perturbed, products):
        all_products[i] = tf.convert_to_tensor(value)
    return all_products


def operations(model: keras.Model, batch: Batch) -> set[str]:
    """Return the types of operations that a forward pass is made of."""
    weights = _passes.read(model.trainable_variables)
    # In inference mode: in training, replicas may have to meet on the way.
    trace = tf.function(
        lambda: _passes.forward(model, weights, batch, training=False)[0],
        autograph=False,
    )
    definition = trace.get_concrete_function().graph.as_graph_def()
    nodes = [*definition.node]
    for function in definition.library.function:
        nodes += function.node_def
    return {node.op for node in nodes}


def has_max_pooling(operations: set[str]) -> bool:
    """Return whether XLA would get the second derivative wrong."""
    return bool(_MAX_POOLING & operations)


def refuse_loops(operations: set[str], method: str, argument: str) -> None:
    """Raise `ValueError` for a loop and a method that is forward mode.

    `argument` is the name under which the user gave the method.
    """
    if method == FORWARD_OVER_REVERSE and _LOOPS & operations:
        raise ValueError(
            "Forward-mode differentiation has no rule for the loops of "
            "recurrent layers; use 'reverse_over_reverse' or 'auto'. "
            f"Received: {argument}={method!r}"
        )


def refuse_max_pooling(operations: set[str]) -> None:
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
