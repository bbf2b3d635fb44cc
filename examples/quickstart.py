"""Trains a small net by SGD and by LE-SAM, and compares them.

    python quickstart.py
    python quickstart.py --data digits --epochs 60

All trainings start from the same weights and see the same batches: few
images, some with a wrong label, so that memorising them does not generalise.
That is repeated with other weights, batches and wrong labels. LE-SAM has its
default settings, and the larger share that is advised for wrong labels. The
best epoch is chosen on images that are kept aside for it. Prints one table,
draws one picture, and serves a trained net from a SavedModel. Takes about three
minutes on two cores.
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

METHODS = {
    "SGD": lambda net: net,
    "LE-SAM": LESAMModel,
    "share 0.7": lambda net: LESAMModel(net, share=0.7),
}
COLORS = {"SGD": "#0072B2", "LE-SAM": "#009E73", "share 0.7": "#D55E00"}

VALIDATION = 500  # Images that choose the best epoch.
# Student's t for a 95% interval of the mean, by the number of seeds.
T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31}
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
        history: Dict of lists, the logs of `fit`; those that begin with
            "val_" are of the validation images.
        last: Float, the test accuracy after the last epoch.
        best: Float, that after the epoch of the best validation accuracy.
        memorised: Float, the fraction of the wrong labels that the net
            predicts.
        losses: Array (directions, distances), the training loss around the
            minimum.
    """

    name: str
    model: keras.Model
    history: dict
    last: float
    best: float
    memorised: float
    losses: np.ndarray

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
    tell_task(data, args)

    runs = {method: [] for method in METHODS}
    for seed in range(args.seed, args.seed + args.seeds):
        for method in METHODS:
            runs[method].append(train(method, data, seed, args))
    tell_results(runs, time_epochs(data, args))

    args.output.mkdir(parents=True, exist_ok=True)
    draw(runs, args.output / "quickstart.png")
    serve(runs["share 0.7"][0].model, data, args.output / "saved_model")
    print(f"All in {time.perf_counter() - begin:.0f} seconds, without imports.")


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--epochs", type=int, default=30, help="epochs of each training")
    add("--seed", type=int, default=0, help="the first of the seeds")
    add("--seeds", type=int, choices=range(1, 10), default=5, help="how many")
    add("--data", choices=("mnist", "digits"), default="mnist", help="images")
    add(
        "--output",
        type=pathlib.Path,
        default="quickstart_output",
        help="folder for picture and SavedModel",
    )
    args = parser.parse_args()
    if args.epochs < 1:
        parser.error("--epochs: at least 1")
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
        f"label, on purpose. {VALIDATION:,} others choose the best epoch, and "
        f"{len(data.x_test) - VALIDATION:,} more are for the test; their "
        f"labels are right. {args.seeds} seeds. LE-SAM: LESAMModel(net), with "
        "its defaults; share 0.7: LESAMModel(net, share=0.7). All: SGD with "
        f"momentum 0.9, and a learning rate from {LEARNING_RATE} to 0 on a "
        "cosine."
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


def new_model(method, data, seed, args):
    """Make the compiled model; the seed gives all methods the same weights."""
    keras.utils.set_random_seed(seed)
    model = METHODS[method](small_net(data.x_train.shape[1:]))
    steps = args.epochs * -(-len(data.x_train) // BATCH_SIZE)
    learning_rate = keras.optimizers.schedules.CosineDecay(LEARNING_RATE, steps)
    optimizer = keras.optimizers.SGD(learning_rate, momentum=0.9)
    model.compile(optimizer, LOSS, metrics=["accuracy"])
    return model


class BestWeights(keras.callbacks.Callback):
    """Keeps the weights of the epoch of the best validation accuracy."""

    accuracy = -1.0

    def on_epoch_end(self, epoch, logs):
        if logs["val_accuracy"] > self.accuracy:
            self.accuracy = logs["val_accuracy"]
            self.weights = self.model.get_weights()


def train(method, data, seed, args):
    """Train a new model and measure the loss around its minimum.

    Args:
        method: String, one of `METHODS`.
        data: The `_common.Digits`.
        seed: Integer, of weights, batches and wrong labels.
        args: The command line.

    Returns:
        A `Run`.
    """
    labels = _common.mislabel(data.y_train, WRONG_LABELS, seed)
    model = new_model(method, data, seed, args)
    best = BestWeights()
    history = model.fit(
        data.x_train,
        labels,
        batch_size=BATCH_SIZE,
        epochs=args.epochs,
        validation_data=(data.x_test[:VALIDATION], data.y_test[:VALIDATION]),
        validation_batch_size=VALIDATION,
        verbose=0,
        callbacks=[_common.ProgressBar(f"{method} {seed}"), best],
    )
    last = model.get_weights()
    model.set_weights(best.weights)
    at_best = accuracy(model, data)
    model.set_weights(last)
    return Run(
        name=method,
        model=model,
        history=history.history,
        last=accuracy(model, data),
        best=at_best,
        memorised=memorised(model, data, labels),
        losses=_common.losses_around(
            model, LOSS, data.x_train, labels, DIRECTIONS, DISTANCES
        ),
    )


def accuracy(model, data):
    """Compute the accuracy on the test images."""
    x, y = data.x_test[VALIDATION:], data.y_test[VALIDATION:]
    logits = model.predict(x, batch_size=500, verbose=0)
    return np.mean(logits.argmax(-1) == y)


def time_epochs(data, args):
    """Measure the seconds of an epoch of each method, without the first.

    The methods take turns, so that other load on the computer slows down both.

    Returns:
        Dict of arrays (`TIMED_EPOCHS`,), by method.
    """
    models = {
        method: new_model(method, data, args.seed, args) for method in METHODS
    }
    watches = {method: _common.Stopwatch() for method in METHODS}
    for _ in range(1 + TIMED_EPOCHS):
        for method, model in models.items():
            model.fit(
                data.x_train,
                data.y_train,
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


def tell_results(runs, seconds):
    """Print the table: means over the seeds, some with intervals."""
    print(
        "\n"
        "            test accuracy             training  wrong labels  "
        "sharpness  cost\n"
        "            last epoch   best epoch   loss      learnt"
    )
    for method, found in runs.items():
        ratio = np.median(seconds[method] / seconds["SGD"])
        print(
            f"{method:<12}{percent([run.last for run in found]):<13}"
            f"{percent([run.best for run in found]):<13}"
            f"{np.mean([run.loss for run in found]):<10.3f}"
            f"{np.mean([run.memorised for run in found]):<14.1%}"
            f"{np.mean([run.rises.mean() for run in found]):<11.3f}{ratio:.2f}"
        )
        if method != "SGD":
            tell_difference([*zip(runs["SGD"], found)])
    print()
    tell(
        f"Means of {len(runs['SGD'])} seeds in percent, with 95% intervals; "
        "differences are seed by seed. Best epoch: of the best validation "
        f"accuracy. Sharpness: rise of the training loss at distance {RADIUS} "
        f"from the minimum, both ways along {DIRECTIONS} random "
        "filter-normalised directions (at distance 1, each filter has moved by "
        "its own norm). Training loss and sharpness count the wrong labels in. "
        f"Cost: median of {TIMED_EPOCHS} pairs of epochs, without the first."
    )


def tell_difference(pairs):
    """Print by how much the second run of each pair is better."""
    print(
        f"{'  to SGD':<12}"
        f"{percent([b.last - a.last for a, b in pairs], '+'):<13}"
        f"{percent([b.best - a.best for a, b in pairs], '+')}"
    )


def percent(values, sign=""):
    """Write the mean of fractions in percent, with its 95% interval."""
    text = f"{100 * np.mean(values):{sign}.1f}"
    if len(values) < 2:
        return text
    error = np.std(values, ddof=1) / np.sqrt(len(values))
    return f"{text} ± {100 * T95[len(values)] * error:.1f}"


def draw(runs, path):
    """Draw the curves of the trainings and the loss around their minima.

    Accuracies of all seeds, the rest of the first one.
    """
    import matplotlib.pyplot as plt

    firsts = [found[0] for found in runs.values()]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplot_mosaic(
            [["loss", "budget"], ["loss", "rho"], ["accuracy", "around"]],
            figsize=(10, 7.5),
            height_ratios=(1, 1, 2),
            layout="constrained",
        )
        draw_loss(axes["loss"], firsts)
        draw_accuracy(axes["accuracy"], runs)
        draw_budgets(axes["budget"], firsts[1:])
        draw_rhos(axes["rho"], firsts[1:])
        draw_around(axes["around"], firsts)
        figure.savefig(path, dpi=160)
        plt.close(figure)
    tell(f"Picture: {path}")


def draw_loss(axis, runs):
    for run in runs:
        plot(axis, run, "loss", color=COLORS[run.name], label=run.name)
    axis.set(
        title=f"Training: {WRONG_LABELS:.0%} of the labels are wrong",
        xlabel="epoch",
        ylabel="loss",
        yscale="log",
    )
    axis.legend(loc="lower left")


def draw_accuracy(axis, runs):
    for method, found in runs.items():
        values = np.array([run.history["val_accuracy"] for run in found])
        epochs, color = np.arange(values.shape[1]) + 1, COLORS[method]
        span = values.min(0), values.max(0)
        axis.fill_between(epochs, *span, color=color, alpha=0.2, lw=0)
        axis.plot(epochs, values.mean(0), color=color, label=method)
    axis.set(
        title=f"Validation, all labels right: {len(found)} seeds",
        xlabel="epoch",
        ylabel="accuracy: mean, range",
    )
    axis.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g}%")
    axis.legend(loc="lower right")


def draw_budgets(axis, runs):
    for run in runs:
        plot(axis, run, "sharpness", color=COLORS[run.name])
        plot(axis, run, "sigma", color=COLORS[run.name], linestyle="--")
    axis.set(
        title="Ascent steps, by epoch",
        ylabel="loss",
        # Room for the legend.
        ylim=(0, 1.7 * max(max(run.history["sharpness"]) for run in runs)),
    )
    axis.tick_params(labelbottom=False)
    names = "sharpness: the rise reached", "sigma: the budget"
    axis.legend(axis.lines[:2], names, loc="upper right", labelcolor="black")


def draw_rhos(axis, runs):
    for run in runs:
        plot(axis, run, "rho", color=COLORS[run.name])
    rho_max = runs[0].model.rho_max
    axis.axhline(rho_max, color="black", linestyle=":")
    axis.set(
        xlabel="epoch",
        ylabel="weight-space\ndistance",
        ylim=(0, 1.1 * rho_max),
    )
    axis.legend(
        [axis.lines[0], axis.lines[-1]],
        ["rho: the length of the perturbation", "rho_max: its cap"],
        loc="upper center",
        bbox_to_anchor=(0.5, 0.9),
    )


def draw_around(axis, runs):
    for run in runs:
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
