"""A small student learns from a teacher and from wrong labels, by LE-SAM.

    python distillation.py              # half a minute on two CPU cores

The teacher is trained by `fit` and stays as it is. The student's loss, of its
own labels and of what the teacher says, is a function of a loop of one's own:
once with plain gradients (`share` 0), once with those of LE-SAM.
"""

import argparse

import _common
import keras
import tensorflow as tf

from keras_lesam import SharpnessAwareGradients
from keras_lesam import budgets
from keras_lesam import rules

TEMPERATURE = 3.0


def main():
    args = parse_args()
    _common.require("sklearn")
    data = _common.load_digits8()
    keras.utils.set_random_seed(args.seed)
    teacher = new_net(32)
    teacher.compile("adam", crossentropy(), metrics=["accuracy"])
    teacher.fit(data.x_train, data.y_train, epochs=args.epochs, verbose=0)
    print(f"Teacher: test accuracy {accuracy(teacher, data):.1%}")
    labels = _common.mislabel(data.y_train, args.wrong)
    for name, share in (("plain", 0.0), ("LE-SAM", args.share)):
        keras.utils.set_random_seed(args.seed)
        student = new_net(8)
        train(student, teacher, data.x_train, labels, share, args)
        print(f"Student, {name}: test accuracy {accuracy(student, data):.1%}")


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--epochs", type=int, default=40)
    add("--batch-size", type=int, default=64)
    add("--wrong", type=float, default=0.4, help="share of wrong labels")
    add("--share", type=float, default=0.3, help="of the relative budget")
    add("--hard", type=float, default=0.9, help="share of the loss of labels")
    add("--seed", type=int, default=0)
    return parser.parse_args()


def new_net(filters):
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(filters, 3, padding="same", use_bias=False),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(_common.CLASSES),
        ]
    )


def crossentropy():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def accuracy(net, data):
    return (net.predict(data.x_test, verbose=0).argmax(1) == data.y_test).mean()


def train(student, teacher, x, y, share, args):
    hard, soft = crossentropy(), keras.losses.KLDivergence()

    def loss(y, scores, told):
        """Of the labels, and of what the teacher tells."""
        told, said = (tf.nn.softmax(t / TEMPERATURE) for t in (told, scores))
        return args.hard * hard(y, scores) + (
            1 - args.hard
        ) * TEMPERATURE**2 * soft(told, said)

    # The loss of a student that has learnt nothing: all classes are alike.
    told = teacher(x, training=False)
    reference = float(loss(y, tf.zeros_like(told), told))
    lesam = SharpnessAwareGradients(
        rules.LossEquated(rho_max=1.0), budgets.Relative(share, reference)
    )
    optimizer = keras.optimizers.Adam(2e-3)
    variables = student.trainable_variables

    @tf.function
    def step(x, y, state):
        told = teacher(x, training=False)

        def loss_fn():
            return loss(y, student(x, training=True), told)

        gradients, record = lesam(loss_fn, variables, state, optimizer)
        optimizer.apply(gradients, variables)
        return record.state

    data = tf.data.Dataset.from_tensor_slices((x, y))
    data = data.shuffle(len(x), seed=args.seed).batch(args.batch_size)
    state = lesam.init_state(variables)
    for batch in data.repeat(args.epochs):
        state = step(*batch, state)


if __name__ == "__main__":
    main()
