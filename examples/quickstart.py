"""Trains one small net twice, by SGD and by LE-SAM, and compares the two.

    python quickstart.py
    python quickstart.py --data digits --epochs 60

Both trainings start from the same weights and see the same batches: few
images, some with a wrong label, so that memorising them does not generalise.
Prints one table, draws one picture, and serves the trained net from a
SavedModel. Takes about half a minute on two cores.
"""

import argparse
import pathlib
import textwrap
import time
from typing import NamedTuple

import _common
import keras
import numpy as np
import tensorflow as tf

from keras_lesam import LESAMModel

WRONG_LABELS = 0.2
BATCH_SIZE = 50
LEARNING_RATE = 0.05
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

METHODS = {"SGD": lambda net, sigma: net, "LE-SAM": LESAMModel}
COLORS = {"SGD": "#0072B2", "LE-SAM": "#D55E00"}

TIMED_EPOCHS = 11
DIRECTIONS = 20
DISTANCES = np.linspace(-1, 1, 21)
RADIUS = 0.5
STYLE = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 11,
    "grid.alpha": 0.3,
    "legend.frameon": False,
}


class Run(NamedTuple):
    """One training, and what was measured after it.

    Attributes:
        name: String, the method.
        model: The `keras.Model` that was fitted.
        history: Dict of lists, the logs of `fit`.
        memorised: Float, the fraction of the wrong labels that the net
            predicts.
        losses: Array (directions, distances), the training loss around the
            minimum.
    """

    name: str
    model: keras.Model
    history: dict
    memorised: float
    losses: np.ndarray

    @property
    def accuracy(self):
        """Return the final test accuracy."""
        return self.history["val_accuracy"][-1]

    @property
    def loss(self):
        """Return the final training loss."""
        return self.losses[0, DISTANCES == 0].item()

    @property
    def rises(self):
        """Return the rises of the training loss at `RADIUS`, both ways."""
        return self.losses[:, np.isclose(abs(DISTANCES), RADIUS)] - self.loss


def main():
    begin = time.perf_counter()
    args = parse_args()
    _common.require("matplotlib", "tqdm")
    data = load(args.data)
    labels = _common.mislabel(data.y_train, WRONG_LABELS)
    tell_task(data, args)

    sgd = train("SGD", data, labels, args)
    lesam = train("LE-SAM", data, labels, args)
    tell_results(sgd, lesam, time_epochs(data, labels, args))

    args.output.mkdir(parents=True, exist_ok=True)
    draw(sgd, lesam, args.output / "quickstart.png")
    serve(lesam.model, data, args.output / "saved_model")
    print(f"All in {time.perf_counter() - begin:.0f} seconds, without imports.")


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--epochs", type=int, default=30, help="epochs of each training")
    add("--seed", type=int, default=0, help="of weights and data order")
    add("--data", choices=("mnist", "digits"), default="mnist", help="images")
    add("--sigma", type=float, default=0.2, help="loss budget of LE-SAM")
    add(
        "--output",
        type=pathlib.Path,
        default="quickstart_output",
        help="folder for picture and SavedModel",
    )
    args = parser.parse_args()
    if args.epochs < 1:
        parser.error("--epochs: at least 1")
    if args.sigma < 0:
        parser.error("--sigma: at least 0")
    return args


def load(name):
    """Load 2,000 MNIST digits or 1,000 8 x 8 digits to train on."""
    if name == "mnist":
        return _common.load_mnist5k(train=2000)
    return _common.load_digits8(train=1000)


def tell_task(data, args):
    rows, cols = data.x_train.shape[1:3]
    tell(
        f"Training on {len(data.x_train):,} images of digits "
        f"({rows} x {cols} pixels), of which {WRONG_LABELS:.0%} have a wrong "
        f"label, on purpose. Testing on {len(data.x_test):,} others, whose "
        f"labels are right. LE-SAM's budget: sigma = {args.sigma}."
    )


def small_net(input_shape):
    """Build two convolutions and two dense layers; outputs are ten logits."""
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input(input_shape),
            layers.Conv2D(16, 3, 2, padding="same", activation="relu"),
            layers.Conv2D(32, 3, 2, padding="same", activation="relu"),
            layers.Flatten(),
            layers.Dense(64, activation="relu"),
            layers.Dense(_common.CLASSES),
        ]
    )


def new_model(method, data, args):
    """Make the compiled model; the seed gives all methods the same weights."""
    keras.utils.set_random_seed(args.seed)
    model = METHODS[method](small_net(data.x_train.shape[1:]), args.sigma)
    steps = args.epochs * -(-len(data.x_train) // BATCH_SIZE)
    learning_rate = keras.optimizers.schedules.CosineDecay(LEARNING_RATE, steps)
    optimizer = keras.optimizers.SGD(learning_rate, momentum=0.9)
    model.compile(optimizer, LOSS, metrics=["accuracy"])
    return model


def train(method, data, labels, args):
    """Train a new model and measure the loss around its minimum.

    Args:
        method: String, one of `METHODS`.
        data: The `_common.Digits`.
        labels: Labels of the training images, some of them wrong.
        args: The command line.

    Returns:
        A `Run`.
    """
    model = new_model(method, data, args)
    history = model.fit(
        data.x_train,
        labels,
        batch_size=BATCH_SIZE,
        epochs=args.epochs,
        validation_data=(data.x_test, data.y_test),
        validation_batch_size=500,
        verbose=0,
        callbacks=[_common.ProgressBar(method)],
    )
    return Run(
        name=method,
        model=model,
        history=history.history,
        memorised=memorised(model, data, labels),
        losses=_common.losses_around(
            model, LOSS, data.x_train, labels, DIRECTIONS, DISTANCES
        ),
    )


def time_epochs(data, labels, args):
    """Measure the seconds of an epoch of each method, without the first.

    The methods take turns, so that other load on the computer slows down both.

    Returns:
        Dict of arrays (`TIMED_EPOCHS`,), by method.
    """
    models = {method: new_model(method, data, args) for method in METHODS}
    watches = {method: _common.Stopwatch() for method in METHODS}
    for _ in range(1 + TIMED_EPOCHS):
        for method, model in models.items():
            model.fit(
                data.x_train,
                labels,
                batch_size=BATCH_SIZE,
                verbose=0,
                callbacks=[watches[method]],
            )
    return {m: np.array(watch.seconds[1:]) for m, watch in watches.items()}


def memorised(model, data, labels):
    """Compute the fraction of the wrong labels that the model predicts."""
    wrong = labels != data.y_train
    logits = model.predict_on_batch(data.x_train[wrong])
    return np.mean(logits.argmax(-1) == labels[wrong])


def tell(text):
    print(textwrap.fill(text, 79), end="\n\n", flush=True)


def tell_results(sgd, lesam, seconds):
    print(
        "\n"
        "       test      training  wrong labels  sharpness     seconds of\n"
        "       accuracy  loss      learnt        mean   max    an epoch  ratio"
    )
    for run in sgd, lesam:
        own = seconds[run.name]
        print(
            f"{run.name:<7}{run.accuracy:<10.1%}{run.loss:<10.3f}"
            f"{run.memorised:<14.1%}"
            f"{run.rises.mean():<7.3f}{run.rises.max():<7.3f}"
            f"{np.median(own):<10.3f}{np.median(own / seconds['SGD']):.2f}"
        )
    print()
    tell(
        f"Sharpness: rise of the training loss at distance {RADIUS} from the "
        f"minimum, both ways along {DIRECTIONS} random filter-normalised "
        "directions (at distance 1, each filter has moved by its own norm). "
        "Training loss and sharpness count the wrong labels in. Seconds, "
        f"ratio: medians of {TIMED_EPOCHS} pairs of epochs, without the first."
    )


def draw(sgd, lesam, path):
    """Draw the curves of both trainings and the loss around both minima."""
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE):
        figure, axes = plt.subplot_mosaic(
            [["loss", "budget"], ["loss", "rho"], ["accuracy", "around"]],
            figsize=(10, 7.5),
            height_ratios=(1, 1, 2),
            layout="constrained",
        )
        draw_loss(axes["loss"], sgd, lesam)
        draw_accuracy(axes["accuracy"], sgd, lesam)
        draw_budget(axes["budget"], lesam)
        draw_rho(axes["rho"], lesam)
        draw_around(axes["around"], sgd, lesam)
        figure.savefig(path, dpi=160)
        plt.close(figure)
    tell(f"Picture: {path}")


def draw_loss(axis, sgd, lesam):
    for run in sgd, lesam:
        plot(axis, run, "loss", color=COLORS[run.name], label=run.name)
    axis.set(
        title=f"Training: {WRONG_LABELS:.0%} of the labels are wrong",
        xlabel="epoch",
        ylabel="loss",
        yscale="log",
    )
    axis.legend(loc="lower left")


def draw_accuracy(axis, sgd, lesam):
    for run in sgd, lesam:
        plot(axis, run, "val_accuracy", color=COLORS[run.name], label=run.name)
    axis.set(
        title="Test: all labels are right", xlabel="epoch", ylabel="accuracy"
    )
    axis.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g}%")
    axis.legend(loc="lower right")


def draw_budget(axis, lesam):
    plot(axis, lesam, "sharpness", color=COLORS[lesam.name])
    plot(axis, lesam, "sigma", color="black", linestyle="--")
    axis.set(
        title="The climb of LE-SAM: mean of each epoch",
        ylabel="loss",
        ylim=(0, None),
    )
    axis.tick_params(labelbottom=False)
    axis.legend(
        ["sharpness: the rise reached", "sigma: the budget"],
        loc="lower center",
    )


def draw_rho(axis, lesam):
    plot(axis, lesam, "rho", color=COLORS[lesam.name])
    axis.axhline(lesam.model.rho_max, color="black", linestyle=":")
    axis.set(
        xlabel="epoch",
        ylabel="weight-space\ndistance",
        ylim=(0, 1.1 * lesam.model.rho_max),
    )
    axis.legend(
        ["rho: the distance climbed", "rho_max: its cap"],
        loc="upper center",
        bbox_to_anchor=(0.5, 0.9),
    )


def draw_around(axis, sgd, lesam):
    for run in sgd, lesam:
        color = COLORS[run.name]
        low, high = run.losses.min(0), run.losses.max(0)
        axis.fill_between(DISTANCES, low, high, color=color, alpha=0.2, lw=0)
        axis.plot(DISTANCES, run.losses.mean(0), color=color, label=run.name)
    axis.set(
        title=f"Around the minimum: {DIRECTIONS} directions",
        xlabel="distance (at 1, each filter has moved by its norm)",
        ylabel="training loss: mean, range",
        ylim=(0, None),
        xticks=(-1, -0.5, 0, 0.5, 1),
    )
    axis.legend(loc="upper center")


def plot(axis, run, name, **line):
    values = run.history[name]
    axis.plot(np.arange(len(values)) + 1, values, **line)


def serve(model, data, path, rows=100):
    """Export the trained net, and predict some digits by the SavedModel."""
    model.export(str(path), verbose=False)
    # The variables are deleted with the object that `load` returns.
    loaded = tf.saved_model.load(str(path))
    batch = data.x_test[:rows]
    logits = loaded.serve(batch).numpy()
    predicted = model.predict(batch, batch_size=rows, verbose=0)
    difference = abs(logits - predicted).max()
    right = np.sum(logits.argmax(-1) == data.y_test[:rows])
    tell(
        f"SavedModel: {path}. It needs neither Keras nor keras_lesam, reads "
        f"{right} of the first {rows} test digits right, and its logits are "
        f"within {difference:.1e} of those of model.predict."
    )


if __name__ == "__main__":
    main()
