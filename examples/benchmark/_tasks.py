"""The tasks: small sets of real pictures, in which generalisation shows.

A task is data, a net and a length of training. Its test set is the same in
all runs. Each seed splits the other pictures anew into training and validation
data, and makes some of the training labels wrong.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any
from typing import NamedTuple

import _common
import _nets
import numpy as np


class Data(NamedTuple):
    """The data of a run; only training labels may be wrong.

    Attributes:
        x: Float32 array of pictures to train on.
        y: Their labels, some of them wrong if the task says so.
        validation: `(x, y)` to choose settings by.
        test: `(x, y)` to report.
    """

    x: np.ndarray
    y: np.ndarray
    validation: tuple
    test: tuple


@dataclasses.dataclass(frozen=True)
class Task:
    """One task of the benchmark.

    Attributes:
        name: String.
        load: Callable without arguments that gives pictures and labels, a
            pool and a test set: `(x, y, x_test, y_test)`.
        build: Callable from the shape of a picture to a net.
        train: Integer, how many pictures to train on.
        validation: Integer, how many to choose settings by.
        epochs: Integer.
        batch_size: Integer.
        noise: Float, the fraction of wrong labels.
        imbalance: Float, ratio of the pictures of the most frequent class to
            those of the rarest; geometric in between.
        adam: Whether the optimizer is AdamW, not SGD with momentum.
        seeds: Integer, how many runs to report.
        studies: Names of further studies: "cheaper", "tail", "start",
            "ablations".
        weight: Float, rough seconds of a plain run, for the time left.
        augment: Whether pictures are shifted and mirrored in training.
        fixed: Dict from the names of the methods that are compared to their
            one setting; or `None`: all methods, tuned.
    """

    name: str
    load: Callable[[], Any]
    build: Callable[[tuple], Any]
    train: int
    validation: int
    epochs: int
    batch_size: int = 50
    noise: float = 0.0
    imbalance: float = 1.0
    adam: bool = False
    seeds: int = 5
    studies: tuple = ()
    weight: float = 1.0
    augment: bool = False
    fixed: dict | None = None

    @property
    def net(self):
        """The name of its net, for which a method costs the same."""
        return self.name.split(", ")[-1]

    def data(self, seed):
        """Make the `Data` of a seed."""
        x, y, x_test, y_test = self.load()
        rng = np.random.default_rng(seed)
        order = rng.permutation(len(x))
        chosen = order[: self.validation]
        rest = self._imbalanced(y, order[self.validation :])[: self.train]
        wrong = _common.mislabel(y[rest], self.noise, seed)
        # Whole batches: a step of another shape would be traced again.
        rows = len(rest) // self.batch_size * self.batch_size
        return Data(
            x[rest][:rows],
            wrong[:rows],
            (x[chosen], y[chosen]),
            (x_test, y_test),
        )

    def _imbalanced(self, y, order):
        """Keep rows of `order`, fewer of each class than of the one before."""
        if self.imbalance == 1:
            return order
        shares = self.imbalance ** (
            -np.arange(_common.CLASSES) / (_common.CLASSES - 1)
        )
        least = min(np.sum(y[order] == c) for c in range(_common.CLASSES))
        kept = np.zeros(len(order), bool)
        for label, share in enumerate(shares):
            rows = np.flatnonzero(y[order] == label)
            kept[rows[: max(1, round(share * least))]] = True
        return order[kept]


@functools.cache
def digits8():
    """Load the 8 x 8 digits of scikit-learn: a pool of 1,297, 500 to test."""
    found = _common.load_digits8(train=1297)
    return found.x_train, found.y_train, found.x_test, found.y_test


@functools.cache
def mnist14():
    """Load 5,000 MNIST digits, averaged to 14 x 14 pixels; 1,500 to test."""
    found = _common.load_mnist5k(train=3500)
    halved = [
        x.reshape(-1, 14, 2, 14, 2, 1).mean((2, 4))
        for x in (found.x_train, found.x_test)
    ]
    return halved[0], found.y_train, halved[1], found.y_test


def cifar10(data_dir=None):
    """Load CIFAR-10 from TensorFlow Datasets, pixels in [0, 1].

    Args:
        data_dir: Folder of the prepared data, or `None` for the default one
            of TensorFlow Datasets, after a download.
    """
    _common.require("tensorflow_datasets")
    import tensorflow_datasets as tfds

    parts = tfds.load(
        "cifar10",
        split=["train", "test"],
        batch_size=-1,
        as_supervised=True,
        data_dir=data_dir,
        download=data_dir is None,
    )
    (x, y), (x_test, y_test) = tfds.as_numpy(parts)
    scaled = [np.asarray(a, "float32") / 255 for a in (x, x_test)]
    return scaled[0], y, scaled[1], y_test


def _resnet(shape):
    return _nets.resnet(shape, width=8)


def _vit(shape):
    return _nets.vit(shape, dim=32)


_DIGITS = {"load": digits8, "validation": 297, "train": 1000}
_MNIST = {"load": mnist14, "validation": 500, "train": 1200}

TASKS = [
    Task(
        "digits, 200 clean, conv",
        **{**_DIGITS, "train": 200},
        build=_nets.conv,
        epochs=60,
        batch_size=20,
        seeds=10,
        weight=1.0,
    ),
    Task(
        "digits, 40% wrong, resnet",
        **_DIGITS,
        studies=("cheaper", "ablations", "forms"),
        build=_resnet,
        epochs=30,
        noise=0.4,
        weight=2.4,
    ),
    Task(
        "digits, 60% wrong, resnet",
        **_DIGITS,
        studies=("forms",),
        build=_resnet,
        epochs=30,
        noise=0.6,
        weight=2.4,
    ),
    Task(
        "digits, 20% wrong, vit",
        **_DIGITS,
        build=_vit,
        epochs=30,
        noise=0.2,
        adam=True,
        weight=3.6,
    ),
    Task(
        "MNIST, 20% wrong, conv",
        **_MNIST,
        studies=("start", "forms"),
        build=_nets.conv,
        epochs=25,
        noise=0.2,
        weight=1.5,
    ),
    Task(
        "MNIST, 40% wrong, resnet",
        **_MNIST,
        studies=("cheaper", "ablations"),
        build=_resnet,
        epochs=20,
        noise=0.4,
        weight=2.8,
    ),
    Task(
        "MNIST, long-tailed, resnet",
        **{**_MNIST, "train": 3000},
        studies=("tail", "forms"),
        build=_resnet,
        epochs=50,
        imbalance=50.0,
        weight=5.0,
    ),
]


def cifar_tasks(data_dir):
    """Make the tasks of real photographs, which take hours."""
    load = functools.cache(functools.partial(cifar10, data_dir))
    shared = {
        "load": load,
        "build": _resnet,
        "train": 1500,
        "validation": 1000,
        "epochs": 25,
        "seeds": 3,
        "weight": 15.0,
    }
    # More pictures and epochs, at the price of all tuning.
    larger = {
        **shared,
        **{"train": 8000, "epochs": 40, "batch_size": 100, "weight": 110.0},
        "augment": True,
        "fixed": {
            "plain": {"learning_rate": 0.1, "weight_decay": 0.005},
            "SAM": {"rho": 0.05},
            "LE-SAM": {"sigma": 0.1},
            "default, untuned": {"share": 0.1},
            "share 0.7, limited": {"share": 0.7},
            "share 0.3, limited": {"share": 0.3},
            "share 0.2, limited": {"share": 0.2},
            "share 0.15, limited": {"share": 0.15},
        },
    }
    return [
        Task("CIFAR-10, 1,500, 20% wrong, resnet", noise=0.2, **shared),
        Task("CIFAR-10, 8,000, untuned, resnet", **larger),
    ]
