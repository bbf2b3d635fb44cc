"""Trains on whatever there is: TPU, GPUs, several machines, or one device.

    python distributed.py                        # what this machine has
    python distributed.py --logical-cpus 2       # two replicas on one CPU
    TF_CONFIG='{"cluster": {"worker": ["10.0.0.1:2222", "10.0.0.2:2222"]},
                "task": {"type": "worker", "index": 0}}' \\
        python distributed.py --folder /shared   # one of two machines

The script is the same everywhere; only the strategy differs. The ascent step
is computed by each replica from its own rows (`--scope replica`), or from the
rows of all replicas (`--scope global`). A run that was interrupted resumes:
the chief saves the state of the training after every epoch into `--folder`,
which all machines must share, and all of them resume from it.

With TF_CONFIG, start it on every machine. It was run on CPUs, in one process
and in two, and not on GPUs or TPUs.
"""

import argparse
import json
import os
import pathlib

import _common
import keras
import numpy as np
import tensorflow as tf

from keras_lesam import LESAMModel


def main():
    args = parse_args()
    _common.require("mlxtend", "sklearn")
    strategy = choose_strategy(args)
    chief = is_chief()
    if chief:
        replicas = strategy.num_replicas_in_sync
        print(f"Replicas: {replicas} ({type(strategy).__name__})", flush=True)
    data = _common.load_mnist5k()
    with strategy.scope():
        model = new_model(args)
    # All machines need the same order of the rows: each takes some of them.
    keras.utils.set_random_seed(args.seed)
    model.fit(
        datasets(data.x_train, data.y_train, args, shuffle=True),
        validation_data=datasets(data.x_test, data.y_test, args),
        epochs=args.epochs,
        verbose=2 if chief else 0,
        callbacks=[backup(args.folder, chief)],
    )
    results = model.evaluate(
        datasets(data.x_test, data.y_test, args), verbose=0, return_dict=True
    )
    if chief:
        print(f"Test accuracy {results['accuracy']:.1%}")
        model.export(args.folder / "saved_model", verbose=False)
        print(f"SavedModel: {args.folder / 'saved_model'}")


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--epochs", type=int, default=10)
    add("--batch-size", type=int, default=128, help="of all replicas together")
    add("--sigma", type=float, default=0.1)
    add("--curvature", choices=("none", "secant", "hvp"), default="secant")
    add("--scope", choices=("replica", "global"), default="replica")
    add("--logical-cpus", type=int, default=1, help="replicas on one CPU")
    add("--seed", type=int, default=0)
    add(
        "--folder",
        type=pathlib.Path,
        default="distributed_output",
        help="for backups and the SavedModel",
    )
    return parser.parse_args()


def choose_strategy(args):
    """Choose the strategy for the devices of this machine or cluster."""
    if "TF_CONFIG" in os.environ:
        return tf.distribute.MultiWorkerMirroredStrategy()
    if "TPU_NAME" in os.environ or "TPU_WORKER_ID" in os.environ:
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver()
        tf.config.experimental_connect_to_cluster(resolver)
        tf.tpu.experimental.initialize_tpu_system(resolver)
        return tf.distribute.TPUStrategy(resolver)
    if len(tf.config.list_physical_devices("GPU")) > 1:
        return tf.distribute.MirroredStrategy()
    if args.logical_cpus > 1:
        tf.config.set_logical_device_configuration(
            tf.config.list_physical_devices("CPU")[0],
            [tf.config.LogicalDeviceConfiguration()] * args.logical_cpus,
        )
        devices = [f"CPU:{i}" for i in range(args.logical_cpus)]
        return tf.distribute.MirroredStrategy(devices)
    return tf.distribute.get_strategy()


def is_chief():
    """Return whether this is the first worker, or the only process."""
    config = json.loads(os.environ.get("TF_CONFIG", "{}"))
    task = config.get("task", {"type": "worker", "index": 0})
    return task["type"] == "chief" or (
        task["index"] == 0 and "chief" not in config.get("cluster", {})
    )


def datasets(x, y, args, shuffle=False):
    """Make global batches, which `fit` shards among the replicas by rows."""
    dataset = tf.data.Dataset.from_tensor_slices((x, y))
    if shuffle:
        dataset = dataset.shuffle(len(x), seed=args.seed)
    # Whole batches in training: TPUs need static shapes.
    dataset = dataset.batch(args.batch_size, drop_remainder=shuffle)
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = (
        tf.data.experimental.AutoShardPolicy.DATA
    )
    return dataset.with_options(options).prefetch(tf.data.AUTOTUNE)


def new_model(args):
    keras.utils.set_random_seed(args.seed)
    layers = keras.layers
    net = keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            layers.Conv2D(16, 3, 2, padding="same", use_bias=False),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.Conv2D(32, 3, 2, padding="same", use_bias=False),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.Flatten(),
            layers.Dense(_common.CLASSES),
        ]
    )
    model = LESAMModel(
        net,
        args.sigma,
        curvature=args.curvature,
        perturbation_scope=args.scope,
    )
    model.compile(
        keras.optimizers.SGD(0.05, momentum=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


def backup(folder, chief):
    """Make the callback: the chief saves after every epoch, all restore."""
    if chief:
        folder.mkdir(parents=True, exist_ok=True)
    never = {"save_freq": np.iinfo(np.int64).max, "delete_checkpoint": False}
    return keras.callbacks.BackupAndRestore(
        folder / "backup", **({} if chief else never)
    )


if __name__ == "__main__":
    main()
