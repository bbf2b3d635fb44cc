"""A small GAN of digits, whose two nets are trained by LE-SAM in one loop.

    python gan.py                 # a minute on two CPU cores
    python gan.py --plain         # the same loop with plain gradients

Each net has its own variables, optimizer and state. What is random (the codes
of the pictures) is drawn before the loss functions, which both passes of a
step call; dropout in the critic draws the same in both.
"""

import argparse
import pathlib

import _common
import keras
import numpy as np
import tensorflow as tf

from keras_lesam import SharpnessAwareGradients
from keras_lesam import budgets
from keras_lesam import rules

CODE = 16


def main():
    args = parse_args()
    _common.require("sklearn", "matplotlib")
    keras.utils.set_random_seed(args.seed)
    pictures = _common.load_digits8().x_train * 2 - 1
    data = tf.data.Dataset.from_tensor_slices(pictures)
    data = data.shuffle(len(pictures), seed=args.seed)
    data = data.batch(args.batch_size, drop_remainder=True)
    generator, critic = new_generator(), new_critic()
    step, states = new_step(
        generator, critic, 0.0 if args.plain else args.sigma
    )
    for epoch in range(args.epochs):
        for real in data:
            records = step(real, states)
            states = {name: r.state for name, r in records.items()}
        if (epoch + 1) % args.every == 0:
            losses = ", ".join(
                f"{name}: loss {float(r.loss):.3f}, rho {float(r.rho):.3f}"
                for name, r in records.items()
            )
            print(f"Epoch {epoch + 1:3}. {losses}", flush=True)
    show(generator, args.output)


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--epochs", type=int, default=60)
    add("--every", type=int, default=10, help="epochs between two lines")
    add("--batch-size", type=int, default=64)
    add("--sigma", type=float, default=0.02, help="the budget of each step")
    add("--plain", action="store_true", help="no budget: plain gradients")
    add("--seed", type=int, default=0)
    add("--output", type=pathlib.Path, default="gan.png")
    return parser.parse_args()


def new_generator():
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((CODE,)),
            layers.Dense(2 * 2 * 64, use_bias=False),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.Reshape((2, 2, 64)),
            layers.Conv2DTranspose(32, 4, 2, padding="same", use_bias=False),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.Conv2DTranspose(1, 4, 2, padding="same", activation="tanh"),
        ],
        name="generator",
    )


def new_critic():
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(32, 4, 2, padding="same"),
            layers.LeakyReLU(0.2),
            layers.Conv2D(64, 4, 2, padding="same"),
            layers.LeakyReLU(0.2),
            layers.Flatten(),
            layers.Dropout(0.3),
            layers.Dense(1),
        ],
        name="critic",
    )


def new_step(generator, critic, sigma):
    """Return a function `(pictures, states) -> records`, and the states."""
    lesam = SharpnessAwareGradients(
        rules.LossEquated(rho_max=0.5), budgets.Constant(sigma)
    )
    loss = keras.losses.BinaryCrossentropy(from_logits=True)
    variables = {
        net.name: net.trainable_variables for net in (generator, critic)
    }
    optimizers = {
        name: keras.optimizers.Adam(5e-4, beta_1=0.5) for name in variables
    }

    def update(name, loss_fn, state):
        gradients, record = lesam(
            loss_fn, variables[name], state, optimizers[name]
        )
        optimizers[name].apply(gradients, variables[name])
        return record

    @tf.function
    def step(real, states):
        codes = tf.random.normal((tf.shape(real)[0], CODE))
        fake = generator(codes, training=True)
        ones = tf.ones((tf.shape(real)[0], 1))

        def critic_loss():
            # One call: batches of the same size, the same dropout.
            scores = critic(tf.concat([real, fake], 0), training=True)
            targets = tf.concat([0.9 * ones, 0 * ones], 0)
            return loss(targets, scores)

        def generator_loss():
            scores = critic(generator(codes, training=True), training=True)
            return loss(ones, scores)

        return {
            "critic": update("critic", critic_loss, states["critic"]),
            "generator": update(
                "generator", generator_loss, states["generator"]
            ),
        }

    return step, {name: lesam.init_state(v) for name, v in variables.items()}


def show(generator, path):
    """Save pictures of the same codes each time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    codes = keras.random.normal((32, CODE), seed=0)
    pictures = np.asarray(generator(codes, training=False))[..., 0]
    print(
        f"Pixels of generated pictures: standard deviation {pictures.std():.2f}"
    )
    grid = pictures.reshape(4, 8, 8, 8).swapaxes(1, 2).reshape(32, 64)
    plt.imsave(path, np.kron(grid, np.ones((8, 8))), cmap="gray")
    print(f"Picture: {path}")


if __name__ == "__main__":
    main()
