"""Costs of several replicas: LE-SAM against plain `fit`, same strategy.

    python scaling.py
    python scaling.py --nets vit --pairs 9 --markdown

Under `MirroredStrategy` on logical CPUs, which share the cores of one
machine: the time of a step says nothing about two machines, but its ratio to
plain `fit` under the same strategy does. Beside it, what a step communicates:
the collective operations in its traced graph, and their bytes, per replica.

Takes about five minutes on two cores.
"""

import argparse
import functools
import statistics

import _common
import keras
import speed
import tensorflow as tf

from keras_lesam import LESAMModel

METHODS = {
    "plain": speed.plain_fit,
    "replica": functools.partial(
        LESAMModel, perturbation_scope="replica", warmup=0, anneal=0
    ),
    "global": functools.partial(
        LESAMModel, perturbation_scope="global", warmup=0, anneal=0
    ),
}
ROW = "{:<8}{:<10}{:<10}{:<8}{:<13}{}"
MARKDOWN = "| {:<8}| {:<10}| {:<10}| {:<8}| {:<13}| {:<12}|"


def main():
    args = parse_args()
    _common.require("keras_lesam")
    row = MARKDOWN if args.markdown else ROW
    head = ("net", "replicas", "scope", "ratio", "collectives", "their MB")
    print(row.format(*head))
    if args.markdown:
        print(row.format(*["---"] * 6))
    for replicas in (1, 2):
        strategy = mirrored(replicas)
        for net in args.nets:
            for cells in measure(net, replicas, strategy, args):
                print(row.format(net, replicas, *cells), flush=True)
    print(
        f"\nMedian ratio of {args.pairs} pairs of blocks of {args.steps} steps "
        f"of {speed.BATCH_SIZE} images to plain `fit` under\nthe same "
        "strategy; collective operations in the graph of a step, per replica, "
        "and what they sum\nover the replicas."
    )


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--nets", nargs="+", choices=speed.NETS, default=["dense", "resnet"])
    add("--pairs", type=int, default=7)
    add("--steps", type=int, default=8, help="steps in a block")
    add("--markdown", action="store_true", help="print the table in Markdown")
    add("--quick", action="store_true", help="2 pairs of blocks of 2 steps")
    args = parser.parse_args()
    if args.quick:
        args.pairs, args.steps = 2, 2
    split_cpu(2)
    return args


def split_cpu(count):
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0],
        [tf.config.LogicalDeviceConfiguration()] * count,
    )


def mirrored(replicas):
    if replicas == 1:
        return tf.distribute.get_strategy()
    devices = [f"CPU:{i}" for i in range(replicas)]
    return tf.distribute.MirroredStrategy(devices)


def measure(net, replicas, strategy, args):
    """Yield the rows of the table for one net: a list for each method."""
    keras.utils.set_random_seed(0)
    data = speed.random_data(speed.NETS[net][0], args.steps)
    trainees = {}
    for method, wrap in METHODS.items():
        if method == "global" and replicas == 1:
            continue  # The same as "replica".
        with strategy.scope():
            trainees[method] = speed.Trainee(
                net, "graph", "stateless", data, wrap
            )
        trainees[method].block()
    rounds = [
        {method: trainee.block() for method, trainee in trainees.items()}
        for _ in range(args.pairs)
    ]
    for method, trainee in trainees.items():
        ratio = statistics.median(r[method] / r["plain"] for r in rounds)
        sizes = collectives(strategy, trainee)
        yield [
            method,
            f"{ratio:.2f}x",
            len(sizes),
            f"{sum(sizes) / 1e6:.2f}",
        ]


def collectives(strategy, trainee):
    """List the bytes of each collective operation in a step of a replica."""
    rows = [d[: speed.BATCH_SIZE] for d in trainee.data]
    data = tf.data.Dataset.from_tensors(tuple(rows))
    batch = next(iter(strategy.experimental_distribute_dataset(data)))
    step = tf.function(
        lambda b: strategy.run(trainee.model.train_step, args=(b,))
    )
    graph = step.get_concrete_function(batch).graph
    found = [
        op.outputs[0]
        for op in graph.get_operations()
        if op.type.startswith("Collective")
    ]
    sizes = [t.shape.num_elements() * t.dtype.size for t in found]
    return sizes[:: strategy.num_replicas_in_sync]


if __name__ == "__main__":
    main()
