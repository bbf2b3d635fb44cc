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

import tensorflow as tf

from keras_lesam import _passes
from keras_lesam import _workarounds

FORWARD_OVER_REVERSE = "forward_over_reverse"
REVERSE_OVER_REVERSE = "reverse_over_reverse"

METHODS = (FORWARD_OVER_REVERSE, REVERSE_OVER_REVERSE)

# Operations that forward mode has no rule for.
_LOOPS = {"While", "StatelessWhile"}
# Operations whose second derivative XLA computes from numbers of 16 bits.
_MAX_POOLING = {"MaxPool", "MaxPoolV2", "MaxPool3D"}


def product(model, weights, batch, vectors, method, state=()):
    """`H v` of the scaled loss at `weights`.

    Args:
        model: A compiled and built Keras model.
        weights: List of tensors, parallel to `model.trainable_variables`.
        batch: A `_passes.Batch`.
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
            point = _passes.evaluate(model, weights, batch, state)
            gradients = dense(point.gradients)
        return differentiate(tape, gradients, weights, vectors)
    with (
        _workarounds.twice_differentiable_moments(),
        _accumulator(weights, vectors) as accumulator,
    ):
        point = _passes.evaluate(model, weights, batch, state)
        # Inside, or the tangents of sparse gradients are lost.
        gradients = dense(point.gradients)
    return [
        None
        if g is None or v is None
        else accumulator.jvp(g, unconnected_gradients="zero")
        for g, v in zip(gradients, vectors)
    ]


@contextlib.contextmanager
def recording(weights):
    """A tape that sees a pass at `weights`, to differentiate it again."""
    with (
        _workarounds.twice_differentiable_moments(),
        tf.GradientTape(watch_accessed_variables=False) as tape,
    ):
        tape.watch(weights)
        yield tape


def differentiate(tape, gradients, weights, vectors):
    """`H v` from a tape that saw the gradients being computed.

    `gradients`, `weights` and `vectors` are parallel lists; the result is
    that of `product`.
    """
    moved = [
        i
        for i, (g, v) in enumerate(zip(gradients, vectors))
        if g is not None and v is not None
    ]
    products = tape.gradient(
        [gradients[i] for i in moved],
        [weights[i] for i in moved],
        output_gradients=[vectors[i] for i in moved],
        unconnected_gradients="zero",
    )
    found = [None] * len(weights)
    for i, value in zip(moved, products):
        found[i] = tf.convert_to_tensor(value)
    return found


def dense(gradients):
    """Gradients without `tf.IndexedSlices`; rows that repeat are summed."""
    return [None if g is None else tf.convert_to_tensor(g) for g in gradients]


def operations(model, batch):
    """Types of the operations that a pass forward is made of, as a set."""
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


def has_loops(operations):
    """Whether forward mode is out of the question."""
    return bool(_LOOPS & operations)


def has_max_pooling(operations):
    """Whether XLA would get the second derivative wrong."""
    return bool(_MAX_POOLING & operations)


def refuse_loops(operations, method, argument):
    """Raises `ValueError` for a loop and a method that is forward mode.

    `argument` is the name under which the user gave the method.
    """
    if method != REVERSE_OVER_REVERSE and has_loops(operations):
        raise ValueError(
            "Forward-mode differentiation has no rule for the loops of "
            "recurrent layers; use 'reverse_over_reverse' or 'auto'. "
            f"Received: {argument}={method!r}"
        )


def refuse_max_pooling(operations):
    """Raises `ValueError` for a model that XLA would differentiate wrongly."""
    if has_max_pooling(operations):
        raise ValueError(
            "XLA computes the second derivative of max pooling from numbers "
            "of 16 bits, wrong by several percent. Compile with "
            "`jit_compile=False`, or use curvature='secant', or average "
            "pooling. Received: jit_compile=True with curvature='hvp'"
        )


def _accumulator(weights, vectors):
    moved = [(w, v) for w, v in zip(weights, vectors) if v is not None]
    return tf.autodiff.ForwardAccumulator(
        [w for w, _ in moved], [tf.cast(v, w.dtype) for w, v in moved]
    )
