"""ResNet-18 on 10,000 real pictures: plain, SAM and LE-SAM, several seeds.

6,000 pictures to train on, 1,000 to validate, 3,000 to test. Nothing is tuned:
the recipe is that of examples/cifar.py, with fewer epochs.
"""

import argparse
import json
import time

import _gpu
import cifar
import keras
import numpy as np
import tensorflow as tf

from keras_lesam import LESAMModel
from keras_lesam import SAMModel

METHODS = {
    "plain": lambda net: net,
    "SAM": lambda net: SAMModel(net, rho=0.05),
    "LE-SAM": LESAMModel,
}
SPLIT = (6000, 7000)
BATCH_SIZE = 128
# Student's t for a 95% interval of the mean, by degrees of freedom.
T95 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31}


def main():
    args = _gpu.parse_args()
    _gpu.describe()
    parts = load(args.pictures, args.quick)
    epochs, path = (1 if args.quick else 60), args.output / "pictures.jsonl"
    path.unlink(missing_ok=True)
    rows, longest = [], 0.0
    for seed in range(1 if args.quick else 9):
        for name in METHODS:
            start = time.monotonic()
            if start + longest > args.end:
                print("no time left for", name, seed)
                return tell(rows)
            found = train(name, seed, epochs, *parts)
            rows.append(
                {"method": name, "seed": seed, "epochs": epochs, **found}
            )
            path.open("a").write(json.dumps(rows[-1]) + "\n")
            longest = max(longest, time.monotonic() - start)
            print(rows[-1], flush=True)
    return tell(rows)


def load(file, quick):
    """Return pairs of pictures and labels: train, validation, test."""
    arrays = np.load(file)
    order = np.random.default_rng(0).permutation(len(arrays["x"]))
    order = order[:: 20 if quick else 1]
    x, y = arrays["x"][order], arrays["y"][order].astype("int64")
    bounds = [len(x) * s // 10_000 for s in SPLIT]
    return [*zip(np.split(x, bounds), np.split(y, bounds))]


def train(name, seed, epochs, training, validation, test):
    """Train once; return accuracies after the last epoch, and the seconds."""
    keras.utils.set_random_seed(seed)
    net = argparse.Namespace(dataset="cifar10", net="resnet18", width=1.0)
    model = METHODS[name](cifar.new_net(net))
    options = argparse.Namespace(limit=-1, seed=seed, batch_size=BATCH_SIZE)
    batches = cifar.training_batches(
        tf.data.Dataset.from_tensor_slices(training), options
    )
    steps = epochs * int(batches.cardinality())
    model.compile(
        cifar.CoupledSGD(
            keras.optimizers.schedules.CosineDecay(0.1, steps),
            momentum=0.9,
            decay=5e-4,
        ),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    start = time.monotonic()
    model.fit(batches, epochs=epochs, shuffle=False, verbose=0)
    seconds = time.monotonic() - start
    accuracies = {
        part: model.evaluate(*data, verbose=0, return_dict=True)["accuracy"]
        for part, data in (("validation", validation), ("test", test))
    }
    return {**accuracies, "seconds": round(seconds, 1)}


def tell(rows):
    """Print means with intervals, where there are three seeds or more."""
    for name in METHODS:
        found = [r["test"] for r in rows if r["method"] == name]
        if len(found) < 3:
            print(f"{name:8} {len(found)} seeds: no table")
            continue
        half = T95[len(found) - 1] * np.std(found, ddof=1) / len(found) ** 0.5
        print(f"{name:8} {np.mean(found):.2%} ± {half:.2%}, {len(found)} seeds")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
