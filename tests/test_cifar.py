"""examples/cifar.py: the recipe, and short trainings by it.

The pictures are made up. Where the environment variable `KERAS_LESAM_CIFAR`
names a folder with data sets that TensorFlow Datasets has prepared, the
trainings are run on those too.
"""

import importlib
import os
import pathlib
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

from tests.helpers import mirrored

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"
NETS = {"cifar10": "resnet18", "cifar100": "wrn28_10"}
CLASSES = {"cifar10": 10, "cifar100": 100}


def real():
    """`(data set, arguments of the script)` of what is there."""
    folder = os.environ.get("KERAS_LESAM_CIFAR")
    if not folder:
        return []
    found = [d for d in NETS if pathlib.Path(folder, d).is_dir()]
    size = ("--batch-size", "64", "--limit", "128")
    return [(d, ("--data-dir", folder, *size)) for d in found]


@pytest.fixture
def cifar(monkeypatch):
    """The script, as a module."""
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("cifar")


@pytest.fixture
def made_up():
    """Each data set has 16 pictures of noise; nothing is downloaded."""
    with tfds.testing.mock_data(16, policy=tfds.testing.MockPolicy.USE_CODE):
        yield


@pytest.fixture
def train(cifar, tmp_path):
    """Runs the script for two epochs of a few steps, on a narrow net."""

    def run(*arguments):
        cifar.main(
            [
                *("--width", "0.05", "--epochs", "2", "--batch-size", "8"),
                *("--limit", "16", "--folder", str(tmp_path), *arguments),
            ]
        )

    return run


@pytest.fixture
def two_replicas(cifar, monkeypatch):
    """What the script takes for the devices that are there."""
    strategy = mirrored(2)
    monkeypatch.setattr(
        cifar.distributed, "choose_strategy", lambda args: strategy
    )
    return strategy


# Trainings.


def check(dataset, output, folder):
    """A training has reported, and left a model that takes pictures."""
    assert output.count("Test accuracy") == 1
    assert f"{NETS[dataset]}, {dataset})" in output
    exported = tf.saved_model.load(folder / "saved_model")
    logits = exported.serve(np.full((3, 32, 32, 3), 255, "float32"))
    assert logits.shape == (3, CLASSES[dataset])
    assert np.isfinite(logits).all()


@pytest.mark.parametrize(("dataset", "source"), [("cifar100", ()), *real()])
def test_trains(train, dataset, source, request, tmp_path, capsys):
    if not source:
        request.getfixturevalue("made_up")
    train("--dataset", dataset, "--net", NETS[dataset], *source)
    output = capsys.readouterr().out
    check(dataset, output, tmp_path)
    assert "sharpness" in output


@pytest.mark.usefixtures("made_up")
def test_trains_in_mixed_precision(train, tmp_path, capsys):
    train("--mixed-precision", "mixed_bfloat16", "--curvature", "secant")
    check("cifar10", capsys.readouterr().out, tmp_path)


@pytest.mark.usefixtures("made_up", "two_replicas")
def test_trains_plainly_on_two_replicas(train, tmp_path, capsys):
    train("--method", "sgd", "--tensorboard", str(tmp_path / "logs"))
    output = capsys.readouterr().out
    check("cifar10", output, tmp_path)
    assert "sharpness" not in output
    assert list((tmp_path / "logs" / "train").iterdir())


class Interruption(keras.callbacks.Callback):
    """What a machine may do in the second epoch."""

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 1:
            raise KeyboardInterrupt


@pytest.mark.usefixtures("made_up")
def test_goes_on_after_an_interruption(
    cifar, train, monkeypatch, tmp_path, capsys
):
    new_callbacks = cifar.new_callbacks
    with monkeypatch.context() as patch:
        patch.setattr(
            cifar,
            "new_callbacks",
            lambda *args: [*new_callbacks(*args), Interruption()],
        )
        with pytest.raises(KeyboardInterrupt):
            train()
    assert "Epoch 1/2" in capsys.readouterr().out
    train()
    output = capsys.readouterr().out
    assert "Epoch 1/2" not in output
    assert "Epoch 2/2" in output
    check("cifar10", output, tmp_path)


def test_help(cifar, capsys):
    with pytest.raises(SystemExit):
        cifar.main(["--help"])
    assert "usage:" in capsys.readouterr().out


def test_says_what_is_missing(cifar, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(SystemExit, match="needs tensorflow_datasets"):
        cifar.main([])


def test_refuses_less_than_a_batch(cifar, capsys):
    with pytest.raises(SystemExit):
        cifar.parse_args(["--limit", "127"])
    assert "lower --batch-size" in capsys.readouterr().err


# The recipe.


def test_recipe_is_the_paper_s(cifar):
    args = cifar.parse_args(["--width", "0.05"])
    assert (args.epochs, args.batch_size) == (200, 128)
    model = cifar.new_model(args, steps=1000)
    assert (model.sigma, model.rho_max) == (0.35, 0.3)
    # 10 of 200 epochs, and the last 40.
    assert (model.warmup, model.anneal) == (0.05, 0.2)
    assert model.curvature == "none"
    optimizer = model.optimizer
    assert (optimizer.momentum, optimizer.decay) == (0.9, 1e-3)


def test_no_cap(cifar):
    args = cifar.parse_args(["--width", "0.05", "--rho-max", "none"])
    assert cifar.new_model(args, steps=10).rho_max is None


def test_learning_rate_falls_to_zero(cifar):
    rates = cifar.learning_rates(1000)
    found = [float(rates(step)) for step in (0, 500, 1000)]
    np.testing.assert_allclose(found, [0.05, 0.025, 0], atol=1e-8)


def test_weight_decay_is_pytorch_s(cifar):
    """At a constant rate: v = 0.9 v + g + decay w, w = w - rate v."""
    variable = keras.Variable([1.0, -2.0])
    optimizer = cifar.CoupledSGD(0.1, momentum=0.9, decay=0.5)
    weights, velocity = np.array([1.0, -2.0]), 0
    for gradient in np.array([[0.3, 0.2], [-1.0, 0.4], [0.1, 0.0]]):
        optimizer.apply([tf.constant(gradient, "float32")], [variable])
        velocity = 0.9 * velocity + gradient + 0.5 * weights
        weights = weights - 0.1 * velocity
    np.testing.assert_allclose(variable.numpy(), weights, rtol=1e-6)


@pytest.mark.parametrize("scaled", [False, True])
def test_weight_decays_once_a_step(cifar, two_replicas, scaled):
    """Not by replica, and not by loss scale."""
    with two_replicas.scope():
        variable = keras.Variable([1.0])
        optimizer = cifar.CoupledSGD(0.1, decay=0.5)
        if scaled:
            optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
        optimizer.build([variable])
    step = tf.function(lambda: optimizer.apply([tf.zeros(1)], [variable]))
    two_replicas.run(step)
    np.testing.assert_allclose(variable.numpy(), [0.95], rtol=1e-6)


def test_weight_decay_is_saved(cifar):
    optimizer = cifar.CoupledSGD(0.1, decay=0.5)
    config = keras.optimizers.serialize(optimizer)
    assert keras.optimizers.deserialize(config).decay == 0.5


# The nets.


def count(variables):
    return sum(int(np.prod(v.shape)) for v in variables)


@pytest.mark.parametrize(
    ("net", "trainable", "statistics"),
    [("resnet18", 11_173_962, 9_600), ("wrn28_10", 36_479_194, 17_952)],
)
def test_parameters_are_those_known(cifar, net, trainable, statistics):
    """Exactly: no biases but the last, and no weights of the colors' mean.

    What is not trained is the moving statistics of batch normalization, two
    numbers a channel.
    """
    model = cifar.new_net(cifar.parse_args(["--net", net]))
    assert count(model.trainable_variables) == trainable
    assert count(model.non_trainable_variables) == statistics


@pytest.mark.parametrize("dataset", NETS)
def test_net_takes_pictures_as_they_are(cifar, dataset):
    """The mean color is 0 to the net, one standard deviation more is 1."""
    args = cifar.parse_args(["--dataset", dataset, "--width", "0.05"])
    task = cifar.TASKS[dataset]
    net = cifar.new_net(args)
    assert net.output_shape == (None, CLASSES[dataset])
    (normalization,) = (
        x for x in net.layers if isinstance(x, keras.layers.Normalization)
    )
    colors = [task.mean, np.add(task.mean, task.deviation)]
    pictures = 255 * np.broadcast_to(colors, (1, 32, 2, 3))
    found = normalization(pictures)
    np.testing.assert_allclose(found[..., 0, :], 0, atol=1e-5)
    np.testing.assert_allclose(found[..., 1, :], 1, atol=1e-5)


# The pictures.


@pytest.fixture
def pictures():
    """Eight pictures of noise, none of it black; the labels count them."""
    x = np.random.default_rng(0).integers(1, 256, (8, 32, 32, 3), "uint8")
    return tf.data.Dataset.from_tensor_slices((x, np.arange(8)))


@pytest.fixture
def args(cifar):
    return cifar.parse_args(["--batch-size", "4"])


def values(dataset):
    """Pictures and labels of one pass over batches."""
    x, y = zip(*dataset.as_numpy_iterator())
    return np.concatenate(x), np.concatenate(y)


def test_changes_keep_shape_and_dtype(cifar, pictures, args):
    batches = cifar.training_batches(pictures, args)
    (shape, label) = batches.element_spec
    assert (shape.shape, shape.dtype) == ((4, 32, 32, 3), tf.uint8)
    assert (label.shape, label.dtype) == ((4,), tf.int64)


def windows(picture):
    """All that a picture may become."""
    padded = np.pad(picture, ((4, 4), (4, 4), (0, 0)))
    for row in range(9):
        for column in range(9):
            window = padded[row : row + 32, column : column + 32]
            yield window
            yield window[:, ::-1]


def test_changes_are_shifts_and_mirror_images(cifar, pictures, args):
    originals, _ = values(pictures.batch(8))
    x, y = values(cifar.training_batches(pictures, args))
    assert sorted(y) == list(range(8))
    assert not np.array_equal(x, originals[y])
    for picture, label in zip(x, y):
        matches = [
            np.array_equal(picture, w) for w in windows(originals[label])
        ]
        assert sum(matches) == 1


def test_changes_reach_all_shifts_evenly(cifar):
    """Each of nine shifts both ways, mirrored or not, about as often."""
    picture = np.random.default_rng(0).integers(1, 256, (32, 32, 3), "uint8")
    names = {w.tobytes(): i for i, w in enumerate(windows(picture))}
    seeds = tf.data.Dataset.random(0).batch(4).take(4000)
    changed = seeds.map(lambda seed: cifar.augment(picture, seed))
    found = [names[x.tobytes()] for x in changed.as_numpy_iterator()]
    counts = np.bincount(found, minlength=162)
    assert counts.min() > 5
    # Mirrored or not has nothing to do with the shift.
    assert abs(counts[::2].sum() - 2000) < 150


def test_changes_are_new_in_each_epoch(cifar, pictures, args):
    first, second = (cifar.training_batches(pictures, args) for _ in range(2))
    epochs = [values(first), values(first)]
    again = [values(second), values(second)]
    assert not np.array_equal(epochs[0][0], epochs[1][0])
    assert not np.array_equal(epochs[0][1], epochs[1][1])
    # The seed decides.
    for x, y in zip(epochs, again):
        np.testing.assert_array_equal(x[0], y[0])
        np.testing.assert_array_equal(x[1], y[1])


def test_limit(cifar, pictures):
    args = cifar.parse_args(["--batch-size", "2", "--limit", "5"])
    _, y = values(cifar.training_batches(pictures, args))
    assert len(y) == 4
    assert set(y) < set(range(5))


def test_test_pictures_are_not_changed(cifar, pictures, args):
    x, y = values(cifar.evaluation_batches(pictures, args))
    originals, labels = values(pictures.batch(8))
    np.testing.assert_array_equal(x, originals)
    np.testing.assert_array_equal(y, labels)
