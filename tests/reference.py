"""An independent LE-SAM, eager and by hand: it moves the weights and back.

Slow, stateful and short, so that it can be checked by reading; what the
package does in another way has to agree with it.
"""

import math

import keras
import numpy as np
import tensorflow as tf


def fit(
    net,
    loss,
    x,
    y,
    *,
    sigma,
    learning_rate=0.1,
    optimizer=None,
    batch_size=32,
    epochs=2,
    sample_weight=None,
    parts=1,
    **rule,
):
    """Trains `net` by SGD, or an optimizer, on LE-SAM gradients.

    Batches are taken in order.

    Returns the list of each step's `(rho, slope, loss, rise)`.
    """
    rows = len(keras.tree.flatten(x)[0])
    steps = []
    for _ in range(epochs):
        for start in range(0, rows, batch_size):
            batch = [
                None if part is None else rows_of(part, start, batch_size)
                for part in (x, y, sample_weight)
            ]
            size = len(keras.tree.flatten(batch[0])[0])
            found = [
                step(
                    net,
                    loss,
                    [
                        rows_between(
                            b, size * i // parts, size * (i + 1) // parts
                        )
                        for b in batch
                    ],
                    sigma,
                    **rule,
                )
                for i in range(parts)
            ]
            gradients = [
                np.mean(g, axis=0) for g in zip(*(f[0] for f in found))
            ]
            if optimizer is not None:
                optimizer.apply(gradients, net.trainable_variables)
            else:
                for v, gradient in zip(net.trainable_variables, gradients):
                    v.assign_sub(learning_rate * gradient)
            steps.append(tuple(np.mean([f[1] for f in found], axis=0)))
    return steps


def step(
    net,
    loss,
    batch,
    sigma,
    rho_max=math.inf,
    adaptive=False,
    alpha=0.0,
    share=1.0,
    perturb=lambda variable: True,
    second_order=False,
):
    """`g_hat` as NumPy arrays, and `(rho, slope, loss, rise)`."""
    variables = net.trainable_variables
    weights = [v.numpy() for v in variables]
    rows = len(keras.tree.flatten(batch[0])[0])
    seen = [rows_between(b, 0, math.ceil(rows * share)) for b in batch]
    state = [v.numpy() for v in net.non_trainable_variables]
    value, gradient = loss_and_gradients(net, loss, seen)
    after = [v.numpy() for v in net.non_trainable_variables]

    scaling = [
        np.zeros_like(w)
        if not perturb(v)
        else np.abs(w)
        if adaptive
        else np.ones_like(w)
        for v, w in zip(variables, weights)
    ]
    slope = math.sqrt(
        sum(np.sum((t * g) ** 2) for t, g in zip(scaling, gradient))
    )
    rho = sigma / slope
    if second_order:
        direction = [t**2 * g / slope for t, g in zip(scaling, gradient)]
        restore(net.non_trainable_variables, state)
        k = curvature_along(net, loss, seen, weights, direction, state)
        restore(variables, weights)
        rho = 2 * sigma / (slope + math.sqrt(max(slope**2 + 2 * k * sigma, 0)))
    rho = min(rho, rho_max)
    for v, w, t, g in zip(variables, weights, scaling, gradient):
        v.assign(w + rho * t**2 * g / slope)
    restore(net.non_trainable_variables, state)
    perturbed_value, perturbed = loss_and_gradients(net, loss, batch)
    restore(variables, weights)
    restore(net.non_trainable_variables, after)
    g_hat = [p - alpha * g for p, g in zip(perturbed, gradient)]
    return g_hat, (rho, slope, value, perturbed_value - value)


def curvature_along(net, loss, batch, weights, direction, state, step=1e-4):
    """`d.(H d)` by the difference of two gradients."""
    slopes = []
    for sign in (1, -1):
        for v, w, d in zip(net.trainable_variables, weights, direction):
            v.assign(w + sign * step * d)
        restore(net.non_trainable_variables, state)
        _, gradient = loss_and_gradients(net, loss, batch)
        slopes.append(sum(np.sum(g * d) for g, d in zip(gradient, direction)))
    return (slopes[0] - slopes[1]) / (2 * step)


def loss_and_gradients(net, loss, batch):
    """Data loss and everything in `net.losses`, with its dense gradients."""
    x, y, sample_weight = batch
    with tf.GradientTape() as tape:
        total = loss(y, net(x, training=True), sample_weight)
        total += sum(net.losses)
    gradients = tape.gradient(
        total,
        [v.value for v in net.trainable_variables],
        unconnected_gradients="zero",
    )
    return float(total), [tf.convert_to_tensor(g).numpy() for g in gradients]


def restore(variables, values):
    for variable, value in zip(variables, values):
        variable.assign(value)


def rows_of(nest, start, size):
    return rows_between(nest, start, start + size)


def rows_between(nest, start, stop):
    return keras.tree.map_structure(
        lambda leaf: None if leaf is None else leaf[start:stop], nest
    )
