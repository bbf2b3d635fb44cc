"""CIFAR-10 and CIFAR-100 by the recipe of the LE-SAM paper.

    python cifar.py                              # ResNet-18 on CIFAR-10
    python cifar.py --dataset cifar100 --net wrn28_10 --rho-max none
    python cifar.py --method sgd --folder sgd    # the same by plain SGD
    python cifar.py --mixed-precision mixed_bfloat16 --jit
    python cifar.py --width 0.125 --limit 2000 --epochs 5     # without a GPU

The recipe: SGD with momentum 0.9, batches of 128, 200 epochs, a learning rate
from 0.05 to 0 on a cosine, weight decay 1e-3, pictures shifted by up to 4
pixels and mirrored; a loss budget of 0.35 and a cap on the radius of 0.3 or
none, warmed up over 10 epochs and annealed from epoch 160 on. All replicas
take the same ascent step, as in the paper: their number does not change the
training, except that batch normalization takes its statistics over the rows
of each replica.

The paper reports test accuracies of up to 97.63% on CIFAR-10 and 85.91% on
CIFAR-100, with its best architectures. Independently, the published logs of
F-SAM have, for ResNet-18 on CIFAR-100 by this recipe plus cutout, 80.78% with
SAM of radius 0.2 and 81.32% with F-SAM. None of these numbers was reproduced
here: that takes a GPU and a day.

The pictures come from TensorFlow Datasets, which downloads what is not in
`--data-dir` yet. Strategies, and resuming after an interruption, are those of
distributed.py; a training that resumes gets the pictures in the order of its
first epochs again. Plain Keras, and so `--method sgd`, cannot train on
several machines. It was run on CPUs, and not on GPUs or TPUs.
"""

import argparse
import pathlib
from typing import NamedTuple

import _common
import distributed
import keras
import numpy as np
import tensorflow as tf
from keras import layers

from keras_lesam import LESAMModel
from keras_lesam.callbacks import ProgressBar

SIDE = 32
SHIFT = 4


class Task(NamedTuple):
    """Constants of a data set.

    Attributes:
        classes: Integer.
        mean: Mean of each color over the training set, of pixels in [0, 1].
        deviation: Their standard deviations.
    """

    classes: int
    mean: tuple
    deviation: tuple


TASKS = {
    "cifar10": Task(10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": Task(100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}


def main(argv=None):
    args = parse_args(argv)
    _common.require("tensorflow_datasets")
    strategy = distributed.choose_strategy(args)
    chief = distributed.is_chief()
    keras.config.set_dtype_policy(args.mixed_precision)
    keras.utils.set_random_seed(args.seed)
    pictures, test_pictures = load(args)
    train = training_batches(pictures, args)
    test = evaluation_batches(test_pictures, args)
    with strategy.scope():
        model = new_model(args, steps=args.epochs * int(train.cardinality()))
    model.fit(
        train,
        validation_data=test,
        epochs=args.epochs,
        shuffle=False,  # The data set shuffles; Keras would warn.
        verbose=1 if chief else 0,
        callbacks=new_callbacks(args, chief),
    )
    results = model.evaluate(test, verbose=0, return_dict=True)
    if chief:
        name = f"{args.method}, {args.net}, {args.dataset}"
        print(f"Test accuracy {results['accuracy']:.2%} ({name})")
        model.export(args.folder / "saved_model", verbose=False)
        print(f"SavedModel: {args.folder / 'saved_model'}")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--dataset", choices=TASKS, default="cifar10")
    add("--net", choices=NETS, default="resnet18")
    add("--width", type=float, default=1.0, help="times the net's channels")
    add("--method", choices=("lesam", "sgd"), default="lesam")
    add("--sigma", type=float, default=0.35)
    add("--rho-max", type=number_or_none, default=0.3, help="or none")
    add("--curvature", choices=("none", "secant", "hvp"), default="none")
    add("--epochs", type=int, default=200)
    add("--batch-size", type=int, default=128, help="of all replicas together")
    add("--limit", type=int, default=-1, help="pictures to train on; -1: all")
    add(
        "--mixed-precision",
        choices=("float32", "mixed_bfloat16", "mixed_float16"),
        default="float32",
        help="float32 is none",
    )
    add("--jit", action="store_true", help="compile by XLA, on CPUs as well")
    add("--logical-cpus", type=int, default=1, help="replicas on one CPU")
    add("--seed", type=int, default=0)
    add("--data-dir", help="where TensorFlow Datasets keeps its data")
    add("--tensorboard", type=pathlib.Path, metavar="FOLDER", help="for logs")
    add(
        "--folder",
        type=pathlib.Path,
        default="cifar_output",
        help="for the backup and the SavedModel of this training alone",
    )
    args = parser.parse_args(argv)
    if 0 <= args.limit < args.batch_size:
        parser.error("--limit leaves less than a batch: lower --batch-size")
    return args


def number_or_none(text):
    return None if text == "none" else float(text)


# The pictures.


def load(args):
    """Load the pictures to train on and to test, as bytes, with labels."""
    import tensorflow_datasets as tfds

    return tfds.load(
        args.dataset,
        split=["train", "test"],
        data_dir=args.data_dir,
        as_supervised=True,
        # Only the pictures within `--limit` are cached, later on.
        read_config=tfds.ReadConfig(try_autocache=False),
    )


def training_batches(pictures, args):
    """Make batches, in each epoch in a new order and augmented anew."""
    pictures = pictures.take(args.limit).cache()
    shuffled = pictures.shuffle(int(pictures.cardinality()), seed=args.seed)
    # A seed for each picture: the result does not depend on thread timing.
    seeds = tf.data.Dataset.random(args.seed, rerandomize_each_iteration=True)
    seeds = seeds.batch(4, drop_remainder=True)
    changed = tf.data.Dataset.zip(shuffled, seeds).map(
        lambda pair, seed: (augment(pair[0], seed), pair[1]),
        num_parallel_calls=tf.data.AUTOTUNE,
    )
    # Whole batches: TPUs need static shapes.
    return distribute(changed.batch(args.batch_size, drop_remainder=True))


def augment(picture, seed):
    """Shift a picture, with black borders, and mirror it one time in two.

    Args:
        picture: Tensor (32, 32, 3).
        seed: Tensor of four integers; they determine the result.
    """
    side = SIDE + 2 * SHIFT
    padded = tf.image.resize_with_crop_or_pad(picture, side, side)
    window = tf.image.stateless_random_crop(padded, picture.shape, seed[:2])
    return tf.image.stateless_random_flip_left_right(window, seed[2:])


def evaluation_batches(pictures, args):
    """Make batches of the pictures, not augmented."""
    return distribute(pictures.batch(args.batch_size).cache())


def distribute(batches):
    """Shard batches among machines by rows; all of them read all files."""
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = (
        tf.data.experimental.AutoShardPolicy.DATA
    )
    return batches.with_options(options).prefetch(tf.data.AUTOTUNE)


# The nets.


def new_net(args):
    """Build the net from pictures in [0, 255] to logits: it normalizes them."""
    task = TASKS[args.dataset]
    pictures = keras.Input((SIDE, SIDE, 3), name="pictures")
    # In float32, as the logits: half precision is too coarse for both.
    x = layers.Normalization(
        mean=255 * np.array(task.mean),
        variance=np.square(255 * np.array(task.deviation)),
        dtype="float32",
    )(pictures)
    x = NETS[args.net](x, args.width)
    x = layers.GlobalAveragePooling2D()(x)
    logits = layers.Dense(task.classes, dtype="float32")(x)
    return keras.Model(pictures, logits)


def resnet18(x, width):
    """Apply ResNet-18 (He et al. 2016) without strides and pooling at first.

    Args:
        x: Keras tensor (batch, rows, columns, channels).
        width: Float, a multiplier of all channels.

    Returns:
        Keras tensor (batch, rows / 8, columns / 8, 512 * width).
    """
    x = normalized_relu(convolution(x, channels(64, width)))
    for stage in range(4):
        for block in range(2):
            strides = 2 if stage and not block else 1
            x = basic_block(x, channels(64 * 2**stage, width), strides)
    return x


def basic_block(x, filters, strides):
    """Apply two normalized convolutions with a residual connection."""
    y = normalized_relu(convolution(x, filters, 3, strides))
    y = normalize(convolution(y, filters))
    if x.shape != y.shape:
        x = normalize(convolution(x, filters, 1, strides))
    return layers.ReLU()(layers.Add()([x, y]))


def wrn28_10(x, width):
    """Apply a Wide ResNet (Zagoruyko and Komodakis 2016) without dropout.

    Arguments and return value are like those of `resnet18`.
    """
    x = convolution(x, channels(16, width))
    for stage in range(3):
        for block in range(4):
            strides = 2 if stage and not block else 1
            x = preactivated_block(x, channels(160 * 2**stage, width), strides)
    return normalized_relu(x)


def preactivated_block(x, filters, strides):
    """Apply a residual block that normalizes before each convolution."""
    activated = normalized_relu(x)
    y = normalized_relu(convolution(activated, filters, 3, strides))
    y = convolution(y, filters)
    if x.shape != y.shape:
        x = convolution(activated, filters, 1, strides)
    return layers.Add()([x, y])


NETS = {"resnet18": resnet18, "wrn28_10": wrn28_10}


def channels(count, width):
    return max(1, round(count * width))


def convolution(x, filters, size=3, strides=1):
    return layers.Conv2D(
        filters,
        size,
        strides=strides,
        padding="same",
        use_bias=False,
        kernel_initializer="he_normal",
    )(x)


def normalize(x):
    # The recipe was made with PyTorch: its momentum and epsilon.
    return layers.BatchNormalization(momentum=0.9, epsilon=1e-5)(x)


def normalized_relu(x):
    return layers.ReLU()(normalize(x))


# The training.


@keras.saving.register_keras_serializable(package="keras_lesam_examples")
class CoupledSGD(keras.optimizers.SGD):
    """SGD with weight decay as in PyTorch: a part of the gradient.

    The optimizer adds `decay` times the weights to the gradient it is given.
    The decay enters the momentum, and is no part of the loss of the ascent
    step. An L2 regularizer would be part of that loss, and
    `SGD(weight_decay=...)` of Keras does not enter the momentum: at 0.9 it
    decays a tenth as much. One difference to PyTorch remains: here the
    momentum sums gradients times the learning rate of their own step, where
    PyTorch sums gradients, and multiplies by the rate of the current step.
    With a constant rate both are the same.

    Args:
        decay: Float, in units of a gradient over a weight.

    The other arguments are those of `keras.optimizers.SGD`.
    """

    def __init__(self, *args, decay=0.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.decay = decay

    def update_step(self, gradient, variable, learning_rate):
        # Here gradients are summed over replicas and unscaled already.
        gradient = gradient + self.decay * variable
        super().update_step(gradient, variable, learning_rate)

    def get_config(self):
        return {**super().get_config(), "decay": self.decay}


def new_model(args, steps):
    """Make the compiled model for a training of `steps` steps."""
    model = new_net(args)
    if args.method == "lesam":
        model = LESAMModel(
            model,
            args.sigma,
            args.rho_max,
            warmup=0.05,
            anneal=0.2,
            curvature=args.curvature,
            perturbation_scope="global",
        )
    model.compile(
        CoupledSGD(learning_rates(steps), momentum=0.9, decay=1e-3),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile=True if args.jit else "auto",
    )
    return model


def learning_rates(steps):
    """Make the schedule from 0.05 to 0 over `steps` steps."""
    return keras.optimizers.schedules.CosineDecay(0.05, steps)


def new_callbacks(args, chief):
    callbacks = [distributed.backup(args.folder, chief)]
    if args.method == "lesam":
        callbacks.append(ProgressBar(["rho", "sharpness"]))
    if args.tensorboard and chief:
        callbacks.append(keras.callbacks.TensorBoard(args.tensorboard))
    return callbacks


if __name__ == "__main__":
    main()
