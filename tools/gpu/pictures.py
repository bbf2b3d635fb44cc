"""ResNet-18 on 10,000 real pictures: plain, SAM and LE-SAM, several seeds.

6,000 pictures to train on, 1,000 to validate, 3,000 to test. Nothing is tuned:
the recipe is that of examples/cifar.py, with fewer epochs.
"""

import json
import time

import _gpu
import keras
import nets
import numpy as np

from keras_lesam import LESAMModel
from keras_lesam import SAMModel

METHODS = {
    "plain": lambda net: net,
    "SAM": lambda net: SAMModel(net, rho=0.05),
    "LE-SAM": LESAMModel,
}
SPLIT = (6000, 7000)
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
    """Return pairs of pictures in [-1, 1] and labels: train, valid, test."""
    arrays = np.load(file)
    order = np.random.default_rng(0).permutation(len(arrays["x"]))
    x, y = arrays["x"][order] / np.float32(127.5) - 1, arrays["y"][order]
    if quick:
        x, y = x[::200], y[::200]
    bounds = [len(x) * s // 10_000 for s in SPLIT]
    return [*zip(np.split(x, bounds), np.split(y, bounds))]


def new_net(seed):
    """Build ResNet-18 behind random shifts and flips."""
    keras.utils.set_random_seed(seed)
    pictures = keras.Input((32, 32, 3))
    x = keras.layers.ZeroPadding2D(4)(pictures)
    x = keras.layers.RandomCrop(32, 32)(x)
    x = keras.layers.RandomFlip("horizontal")(x)
    return keras.Model(pictures, nets.resnet18((32, 32, 3))(x))


def train(name, seed, epochs, training, validation, test):
    """Train once; return accuracies after the last epoch, and the seconds."""
    model = METHODS[name](new_net(seed))
    steps = epochs * -(-len(training[0]) // 128)
    model.compile(
        keras.optimizers.SGD(
            keras.optimizers.schedules.CosineDecay(0.1, steps),
            momentum=0.9,
            weight_decay=5e-4,
        ),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    start = time.monotonic()
    model.fit(*training, batch_size=128, epochs=epochs, verbose=0)
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
