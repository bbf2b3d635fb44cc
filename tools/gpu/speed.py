"""Steps and peak memory against plain `fit`, with the data on the device.

The seconds are those of blocks of steps, plain and by a method in turns; a
block ends when its last loss has come to the host.
"""

import gc
import json
import statistics
import time

import _gpu
import keras
import nets
import numpy as np
import tensorflow as tf

from keras_lesam import LESAMModel

# The shape of a row, the rows of a batch, and the net.
NETS = {
    "resnet18, 128": ((32, 32, 3), 128, nets.resnet18),
    "vit, 128": ((32, 32, 3), 128, nets.vit),
    "dense 4x4096, 512": ((1024,), 512, nets.dense),
    "resnet18, 512": ((32, 32, 3), 512, nets.resnet18),
}
TINY = {"dense, 32": ((64,), 32, lambda shape: nets.dense(shape, 64))}
METHODS = {
    **_gpu.METHODS,
    # The budget is a schedule, which is zero: decided in the graph.
    "no budget": lambda net: LESAMModel(
        net,
        keras.optimizers.schedules.PiecewiseConstantDecay([10**9], [0.0, 0.1]),
    ),
}
FEW = ("LE-SAM", "secant", "no budget")
COLUMNS = "{:18} {:9} {:6} {:21} {:>6} {:>6} {:>6} {:>8} {:>8} {:>7}"


def main():
    args = _gpu.parse_args()
    _gpu.describe()
    path = args.output / "speed.jsonl"
    path.unlink(missing_ok=True)
    rows = []
    for case in cases(args.quick):
        if time.monotonic() > args.end:
            print("no time left for", *case)
            break
        try:
            rows += measure(*case, args)
        except tf.errors.OpError as error:
            print(*case, type(error).__name__, str(error)[:300])
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tell(rows)
    return 0


def cases(quick):
    """Yield nets, dtypes and modes, those that matter most first."""
    sizes = TINY if quick else NETS
    for dtype in ("float32", "mixed_bfloat16"):
        for name in sizes:
            for jit in (True, False):
                yield name, dtype, jit


def measure(name, dtype, jit, args):
    """Return the rows of one net: each method beside plain steps."""
    keras.utils.clear_session()
    keras.config.set_dtype_policy(dtype)
    shape, batch_size, build = (TINY if args.quick else NETS)[name]
    data = resident(shape, batch_size)
    methods = [*METHODS] if dtype == "float32" and jit else FEW
    steps, pairs = (2, 2) if args.quick else (20, 5)
    rows = []
    plain = Trainee(build(shape), lambda net: net, data, jit)
    for method in methods:
        if time.monotonic() > args.end:
            break
        trainee = Trainee(build(shape), METHODS[method], data, jit)
        ratios, seconds = [], []
        for _ in range(pairs):
            a, b = plain.block(steps), trainee.block(steps)
            ratios.append(b / a)
            seconds.append((a, b))
        plain_s, step_s = (statistics.median(s) for s in zip(*seconds))
        rows.append(
            {
                **{"net": name, "dtype": dtype, "jit": jit, "method": method},
                **{"ratios": ratios, "plain_ms": 1e3 * plain_s},
                **{"ms": 1e3 * step_s, "first_s": trainee.first},
                "memory": ratio(trainee.peak, plain.peak),
                "parameters": trainee.parameters,
            }
        )
        print(f"{name} {dtype} {method}: {statistics.median(ratios):.2f}x")
        del trainee
        gc.collect()
    keras.config.set_dtype_policy("float32")
    return rows


def resident(shape, batch_size):
    """Return a batch that is on the device."""
    rng = np.random.default_rng(0)
    with tf.device(_gpu.device()):
        x = tf.constant(rng.normal(size=(batch_size, *shape)), tf.float32)
        return x, tf.constant(rng.integers(10, size=batch_size))


class Trainee:
    """A compiled model and its step, of a batch that stays where it is.

    Attributes:
        first: Float, seconds of the first step, tracing and compiling included.
        peak: Integer, bytes of the device at most, or `None` on a CPU.
        parameters: Integer.
    """

    def __init__(self, net, method, data, jit):
        with tf.device(_gpu.device()):
            self.model = method(net)
            self.parameters = net.count_params()
            self.model.compile(
                keras.optimizers.SGD(0.01, momentum=0.9),
                keras.losses.SparseCategoricalCrossentropy(from_logits=True),
                jit_compile=jit,
            )
            self._step = tf.function(
                lambda: self.model.train_step(data), jit_compile=jit
            )
            reset_memory()
            self.first = self.block(1)
            self.block(2)
        self.peak = peak_memory()

    def block(self, steps):
        """Take steps; return the seconds of one."""
        start = time.perf_counter()
        with tf.device(_gpu.device()):
            for _ in range(steps):
                logs = self._step()
        float(logs["loss"])
        return (time.perf_counter() - start) / steps


def reset_memory():
    if _gpu.device() == "/GPU:0":
        tf.config.experimental.reset_memory_stats("GPU:0")


def peak_memory():
    if _gpu.device() != "/GPU:0":
        return None
    return tf.config.experimental.get_memory_info("GPU:0")["peak"]


def ratio(a, b):
    return a / b if a and b else None


def tell(rows):
    """Print the slowest first."""
    print(
        COLUMNS.format(
            *("net, batch", "dtype", "mode", "method", "ratio", "min", "max"),
            *("plain ms", "step ms", "memory"),
        )
    )
    for row in sorted(rows, key=lambda r: -statistics.median(r["ratios"])):
        memory = row["memory"]
        print(
            COLUMNS.format(
                row["net"],
                row["dtype"].removeprefix("mixed_"),
                "XLA" if row["jit"] else "graph",
                row["method"],
                f"{statistics.median(row['ratios']):.2f}x",
                f"{min(row['ratios']):.2f}",
                f"{max(row['ratios']):.2f}",
                f"{row['plain_ms']:.2f}",
                f"{row['ms']:.2f}",
                f"{memory:.2f}x" if memory else "-",
            )
        )


if __name__ == "__main__":
    raise SystemExit(main())
