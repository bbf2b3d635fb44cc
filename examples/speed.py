"""How much longer does a step of LE-SAM take than one of plain Keras `fit`?

    python speed.py
    python speed.py --nets vit --pairs 11 --markdown
    python speed.py --curvature none secant hvp forward_over_reverse
    python speed.py --passes stateless in_place

Trains each net twice from the same weights, plainly and by LE-SAM, in blocks
of one epoch that take turns, and compares the seconds of neighbours. There is
neither warm-up nor annealing: all steps of LE-SAM have two passes. Two passes
are a ratio of 2; the optimizer and the input are paid once in both. With
`--curvature`, other ways to meet the budget than to first order: by secants, or
by Hessian-vector products, with each of the ways to differentiate twice (`hvp`
is the default one, `reverse_over_reverse`). With `--passes in_place`, what it
costs that a net has one weight which is read behind a `tf.function`: the step
then moves the weights in place and puts them back.

Takes a few minutes on two cores; all curvatures, ten.
"""

import argparse
import functools
import statistics
import warnings

import _common
import _nets
import keras
import numpy as np
import tensorflow as tf

from keras_lesam import LESAMModel

BATCH_SIZE = 128
MODES = {"graph": False, "XLA": True}
NETS = {
    "dense": ((28, 28, 1), lambda shape: _nets.dense(shape, units=2048)),
    "resnet": ((32, 32, 3), _nets.resnet),
    "vit": ((28, 28, 1), _nets.vit),
}
CURVATURES = {
    "none": {"curvature": "none"},
    "secant": {"curvature": "secant"},
    "hvp": {"curvature": "hvp"},
    "forward_over_reverse": {
        "curvature": "hvp",
        "hvp_method": "forward_over_reverse",
    },
}
COLUMNS = {
    "net": 8,
    "mode": 5,
    "curvature": 20,
    "passes": 9,
    "ratio": 6,
    "min": 6,
    "max": 6,
    "plain ms": 8,
    "LE-SAM ms": 9,
    "rho": 6,
    "new traces": 10,
    "first s": 7,
}


def main():
    args = parse_args()
    # That the weights are moved in place, which the table says.
    warnings.filterwarnings("ignore", ".* moves its weights in place")
    tell(COLUMNS, args.markdown)
    if args.markdown:
        tell(["-" * width for width in COLUMNS.values()], args.markdown)
    for net in args.nets:
        for mode in args.modes:
            for curvature in args.curvature:
                for passes in args.passes:
                    row = measure(net, mode, curvature, passes, args)
                    tell(row, args.markdown)
    print(
        f"\nMedian, least and largest ratio of {args.pairs} pairs of blocks, "
        f"{args.steps} steps of {BATCH_SIZE} images each; median milliseconds "
        "of a step;\nrho of LE-SAM's last block; traces of the step after its "
        "first epoch, which\ntook `first s` seconds, tracing and compiling "
        f"included. Keras {keras.__version__}."
    )


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--nets", nargs="+", choices=NETS, default=NETS)
    add("--modes", nargs="+", choices=MODES, default=MODES)
    add("--curvature", nargs="+", choices=CURVATURES, default=["none"])
    add("--passes", nargs="+", choices=PASSES, default=["stateless"])
    add("--pairs", type=int, default=9, help="of blocks to compare")
    add("--steps", type=int, default=20, help="steps in a block")
    add("--markdown", action="store_true", help="print the table in Markdown")
    add("--quick", action="store_true", help="3 pairs of blocks of 3 steps")
    args = parser.parse_args()
    if args.quick:
        args.pairs, args.steps = 3, 3
    return args


def measure(net, mode, curvature, passes, args):
    """Measure a row of the table: one net, with or without XLA."""
    keras.utils.clear_session()
    keras.utils.set_random_seed(0)
    shape, _ = NETS[net]
    data = random_data(shape, args.steps)
    plain = Trainee(net, mode, passes, data, plain_fit)
    wrap = functools.partial(lesam_fit, **CURVATURES[curvature])
    lesam = Trainee(net, mode, passes, data, wrap)
    lesam.net.set_weights(plain.net.get_weights())
    plain.block()
    first = lesam.block() * args.steps
    traces = lesam.counter.traces
    pairs = [take_turns(plain, lesam, i) for i in range(args.pairs)]
    ratios = [b / a for a, b in pairs]
    plain_ms, lesam_ms = (1e3 * statistics.median(s) for s in zip(*pairs))
    return [
        *(net, mode, curvature, passes, f"{statistics.median(ratios):.2f}x"),
        *(f"{min(ratios):.2f}", f"{max(ratios):.2f}"),
        *(f"{plain_ms:.1f}", f"{lesam_ms:.1f}"),
        *(f"{lesam.logs['rho']:.3f}", str(lesam.counter.traces - traces)),
        f"{first:.1f}",
    ]


def random_data(shape, steps):
    rng = np.random.default_rng(0)
    x = rng.uniform(size=(steps * BATCH_SIZE, *shape)).astype("float32")
    return x, rng.integers(_common.CLASSES, size=len(x))


def take_turns(plain, lesam, i):
    """Measure the seconds of a step of both; the order alternates."""
    if i % 2:
        return tuple(reversed([lesam.block(), plain.block()]))
    return plain.block(), lesam.block()


class Trainee:
    """A compiled model whose training is timed.

    Args:
        net: String, a key of `NETS`.
        mode: String, a key of `MODES`.
        passes: String, a key of `PASSES`.
        data: Arrays of images and labels, one block of training.
        method: Callable from the net to the model to fit.

    Attributes:
        net: The `keras.Model` that `method` was given.
        counter: The `TraceCounter` in it.
        logs: Dict of floats, the logs of the last block.
    """

    def __init__(self, net, mode, passes, data, method):
        shape, build = NETS[net]
        self.data = data
        self.counter = PASSES[passes]()
        self.net = keras.Sequential(
            [keras.Input(shape), self.counter, build(shape)]
        )
        self.model = method(self.net)
        self.model.compile(
            keras.optimizers.SGD(0.01, momentum=0.9),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            jit_compile=MODES[mode],
        )

    def block(self):
        """Train for an epoch; return the seconds of a step."""
        stopwatch = _common.Stopwatch()
        history = self.model.fit(
            *self.data,
            batch_size=BATCH_SIZE,
            shuffle=False,
            verbose=0,
            callbacks=[stopwatch],
        ).history
        self.logs = {name: values[-1] for name, values in history.items()}
        return stopwatch.seconds[-1] * BATCH_SIZE / len(self.data[0])


class TraceCounter(keras.layers.Layer):
    """Returns its input, and counts how often it is traced.

    Attributes:
        traces: Integer, how often `call` was run by Python. Steps of a graph
            that was traced before do not count.
    """

    def __init__(self):
        super().__init__()
        self.traces = 0

    def call(self, inputs):
        self.traces += 1
        return inputs


class HiddenScale(TraceCounter):
    """Scales its input by a weight that is read behind a `tf.function`."""

    def build(self, shape):
        self.scale = self.add_weight(shape=(), initializer="ones")

    def call(self, inputs):
        return self.scaled(super().call(inputs))

    @tf.function
    def scaled(self, inputs):
        return inputs * self.scale


PASSES = {"stateless": TraceCounter, "in_place": HiddenScale}


def plain_fit(net):
    return net


def lesam_fit(net, **options):
    constant = {"warmup": 0, "anneal": 0}
    return LESAMModel(net, sigma=0.1, rho_max=0.5, **constant, **options)


def tell(cells, markdown):
    """Print a line of the table."""
    widths = COLUMNS.values()
    cells = [cell.ljust(width) for cell, width in zip(cells, widths)]
    line = f"| {' | '.join(cells)} |" if markdown else "  ".join(cells).rstrip()
    print(line, flush=True)


if __name__ == "__main__":
    main()
