"""What each model that was trained and dropped leaves behind.

    python tools/leaks.py [--models 40] [--steps 3] [--units 16]

A sweep makes, trains and drops thousands of models in one process. For plain
Keras and for the kinds of step of this library, a process of its own prints
per model: the memory that is not given back (MB of resident set size, after
`gc.collect()` and `keras.backend.clear_session()`), and the functions that
TensorFlow's eager context still knows.

What is left is left by plain Keras too: its optimizers sum gradients over the
replicas, even over a single one, and TensorFlow registers the gradient of that
sum for ever, and with it the graph of the training step and the weights that
this reads. `--mended` leaves the sum out, and shows that nothing else stays.
"""

import argparse
import ctypes
import gc
import re
import resource
import subprocess
import sys

KINDS = {
    "plain": None,
    "sigma 0": {"sigma": 0.0},
    "first order": {},
    "secant": {"curvature": "secant"},
    "hvp": {"curvature": "hvp"},
    "fraction": {"ascent_fraction": 0.5},
    "previous": {"ascent_from": "previous"},
    "2 splits": {"num_batch_splits": 2},
    "every 2": {"ascent_every": 2},
}
WARM_UP = 5


def resident():
    """MB of this process, what C's allocator could give back given back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20


def functions():
    # For measurement only: there is no public list.
    from tensorflow.python.eager import context

    return [*context.context().list_function_names()]


def mend():
    """Leave out the sum over replicas, of which there is one."""
    from keras.src.backend.tensorflow.optimizer import TFOptimizer

    TFOptimizer._all_reduce_sum_gradients = lambda self, pairs: pairs


def train(kind, steps, units=16):
    import keras
    import numpy as np

    from keras_lesam import LESAMModel

    net = keras.Sequential(
        [
            keras.Input((8,)),
            keras.layers.Dense(units, "relu"),
            keras.layers.Dense(4),
        ]
    )
    options = KINDS[kind]
    if options is None:
        model = net
    else:
        model = LESAMModel(net, warmup=0.0, anneal=0.0, **options)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.1), loss)
    x = np.ones((8 * steps, 8), "float32")
    y = np.zeros(8 * steps, "int64")
    model.fit(x, y, batch_size=8, verbose=0)


def measure(kind, models, steps, units):
    import keras

    def sweep(count):
        for _ in range(count):
            train(kind, steps, units)
            gc.collect()
            keras.backend.clear_session()

    sweep(WARM_UP)
    memory, names = resident(), {*functions()}
    sweep(models)
    left = [name for name in functions() if name not in names]
    kinds = sorted({re.sub(r"_*\d+", "", name) for name in left})
    print(
        f"{kind:12} {(resident() - memory) / models:8.2f} MB "
        f"{len(left) / models:8.1f} functions  {', '.join(kinds)[:300]}"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=int, default=40)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--units", type=int, default=16)
    parser.add_argument("--mended", action="store_true")
    parser.add_argument("--kind", choices=KINDS)
    args = parser.parse_args()
    if args.mended:
        mend()
    if args.kind:
        measure(args.kind, args.models, args.steps, args.units)
        return
    print(
        f"left by each of {args.models} models of {args.steps} steps",
        flush=True,
    )
    for kind in KINDS:
        command = [sys.executable, __file__, "--kind", kind, *sys.argv[1:]]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
