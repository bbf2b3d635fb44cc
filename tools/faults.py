"""What is left of a training when things go wrong?

    python tools/faults.py
    python tools/faults.py --only kills --kills 5
    python tools/faults.py --quick

Three tallies, each with plain Keras beside it, on small nets:

kills   Trainings with epoch backups are killed at random moments (SIGKILL)
        and resumed by another process. They must end as if nothing had been,
        to the last bit; a kill while the backup is written may tear it, as it
        does in plain Keras, and is counted apart.
faults  A number that is not finite, or an exception, at one place in one step:
        what plain Keras survives must be survived.
long    Many steps in one process: memory, traces and the time of a step stay
        what they were.

Exits with 1 if one of them fails. Takes half an hour on two cores.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import pathlib
import random
import statistics
import sys
import tempfile
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import keras
import numpy as np
import tensorflow as tf

from keras_lesam import LESAMModel
from keras_lesam import SAMModel
from keras_lesam import budgets
from keras_lesam import rules

# From a net, and the steps of its training where `fit` does not know them.
METHODS = {
    "plain": lambda net, **_: net,
    "first order": lambda net, **length: LESAMModel(net, 0.1, **length),
    "relative": lambda net, **_: LESAMModel(net, budgets.Relative(0.3)),
    "secant": lambda net, **length: LESAMModel(
        net, 0.1, curvature="secant", **length
    ),
    "hvp": lambda net, **length: LESAMModel(
        net, 0.1, curvature="hvp", **length
    ),
    "LookSAM": lambda net, **_: SAMModel(net, rules.LookSAM(0.1, every=3)),
    "momentum": lambda net, **_: SAMModel(net, rho=0.1, ascent_from="momentum"),
    "Friendly SAM": lambda net, **_: SAMModel(net, rules.FriendlySAM(0.1)),
    "fraction": lambda net, **_: SAMModel(net, rho=0.1, ascent_fraction=0.5),
    "parts": lambda net, **_: SAMModel(net, rho=0.1, num_batch_splits=2),
}
KILLED = (
    *("plain", "first order", "relative", "secant", "hvp", "LookSAM"),
    "momentum",
)
ROWS, BATCH = 1024, 16


def main():
    args = parse_args()
    tallies = {"kills": kills, "faults": faults, "long": long}
    started, is_good = time.perf_counter(), True
    print(f"Keras {keras.__version__}, TensorFlow {tf.__version__}")
    for name in args.only:
        is_good &= tallies[name](args)
    minutes = (time.perf_counter() - started) / 60
    print(f"\n{'Passed' if is_good else 'FAILED'}, {minutes:.1f} minutes.")
    sys.exit(not is_good)


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    every = ("kills", "faults", "long")
    add("--only", nargs="+", choices=every, default=every)
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    add("--modes", nargs="+", choices=MODES, default=list(MODES))
    add("--kills", type=int, default=20, help="of each method")
    add("--steps", type=int, default=20000, help="of the long training")
    add("--quick", action="store_true", help="a little of each")
    args = parser.parse_args()
    if args.quick:
        args.methods, args.modes = ["plain", "secant"], ["graph"]
        args.kills, args.steps = 1, 400
    return args


def tell(text):
    """Print what is to be kept."""
    progress("")
    print(text, flush=True)


def progress(text):
    """Show on a terminal what is being done, without a line of its own."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def make_data(rows=ROWS):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, 8)).astype("float32")
    return x, (x @ rng.normal(size=(8, 1)) > 0).astype("float32")


# Kills.


def kills(args):
    """Kill trainings of each method; return whether all went on well."""
    tell(f"\n## {args.kills} kills at random moments\n")
    tell("| method | identical | torn backups | other | seconds |")
    tell("|---|---|---|---|---|")
    # One import of TensorFlow; each training is a process forked from it.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tensorflow", "keras", "keras_lesam"])
    is_good = True
    for method in (m for m in KILLED if m in args.methods):
        started = time.perf_counter()
        found = kill_all(context, method, args.kills)
        counts = {o: found.count(o) for o in ("identical", "torn", "other")}
        seconds = time.perf_counter() - started
        cells = [method, *map(str, counts.values()), f"{seconds:.0f}"]
        tell(f"| {' | '.join(cells)} |")
        is_good &= not counts["other"]
    return is_good


def kill_all(context, method, count):
    """Return the outcome of each of `count` killed and resumed trainings."""
    moments = random.Random(method)
    with tempfile.TemporaryDirectory() as folder:
        whole = pathlib.Path(folder, "whole")
        seconds = run(context, method, whole)
        outcomes = []
        for i in range(count):
            progress(f"{method}: kill {i + 1} of {count}")
            part = pathlib.Path(folder, str(i))
            run(context, method, part, moments.uniform(0, seconds))
            run(context, method, part)
            outcomes.append(compare(part, whole))
        return outcomes


def run(context, method, folder, kill_after=None):
    """Train in a process of its own; return its seconds after a first step."""
    has_begun = context.Event()
    arguments = (method, str(folder), has_begun)
    process = context.Process(target=train, args=arguments)
    process.start()
    while process.is_alive() and not has_begun.wait(0.01):
        pass
    started = time.perf_counter()
    process.join(kill_after)
    if process.is_alive():
        process.kill()
    process.join()
    return time.perf_counter() - started


def train(method, folder, has_begun):
    """Train with backups, from the last one if there is one; save the end."""
    folder = pathlib.Path(folder)
    folder.mkdir(exist_ok=True)
    keras.utils.set_random_seed(0)
    net = keras.Sequential(
        [
            keras.Input((8,)),
            keras.layers.Dense(64, "relu"),
            keras.layers.BatchNormalization(),
            keras.layers.Dense(64, "relu", kernel_regularizer="l2"),
            keras.layers.Dense(1),
        ]
    )
    model = METHODS[method](net)
    model.compile(
        keras.optimizers.Adam(0.01),
        keras.losses.BinaryCrossentropy(from_logits=True),
    )
    backup = folder / "backup"
    callbacks = [
        keras.callbacks.BackupAndRestore(str(backup), delete_checkpoint=False),
        Begins(folder / "torn", has_begun),
    ]
    fit = {"batch_size": BATCH, "epochs": 12, "shuffle": False, "verbose": 0}
    try:
        model.fit(*make_data(), callbacks=callbacks, **fit)
    except (OSError, json.JSONDecodeError):
        # A file that was not written to the end.
        (folder / "torn").touch()
        return
    variables = [*model.weights, *model.optimizer.variables]
    np.savez(folder / "end.npz", *[v.numpy() for v in variables])


class Begins(keras.callbacks.Callback):
    """Says when there was a step, and that a backup was torn.

    Keras writes its weights, and then the number of the epoch.
    """

    def __init__(self, torn, has_begun):
        super().__init__()
        self.torn = torn
        self.has_begun = has_begun

    def on_epoch_begin(self, epoch, logs=None):
        done = int(self.model.optimizer.iterations) * BATCH // ROWS
        if done != epoch:
            self.torn.touch()

    def on_train_batch_end(self, batch, logs=None):
        self.has_begun.set()


def compare(part, whole):
    """Return "identical", "torn" (the backup) or "other"."""
    end = part / "end.npz"
    if (part / "torn").exists():
        return "torn"
    if not end.exists():
        return "other"
    with np.load(end) as found, np.load(whole / "end.npz") as expected:
        same = set(found) == set(expected) and all(
            np.array_equal(found[name], expected[name]) for name in expected
        )
    return "identical" if same else "other"


# Faults.

PLACES = ("outputs", "gradient", "loss", "metric")
# These are seen where weights are not those of the step before.
PLACES += ("outputs at w + eps", "gradient at w + eps")
KINDS = {"nan": np.nan, "inf": np.inf, "exception": 0.0}
MODES = {
    "graph": {"jit_compile": False},
    "eager": {"run_eagerly": True},
    "XLA": {"jit_compile": True},
}
STEPS = (0, 1, 4)


class Fault:
    """One fault, in variables that a training reads in each of its steps.

    Attributes:
        place: Number of the place, or -1 for none.
        value: What is added there; 0 for an exception.
    """

    def __init__(self):
        self.place = tf.Variable(-1, trainable=False)
        self.value = tf.Variable(0.0, trainable=False)

    def set(self, place, kind):
        self.place.assign(PLACES.index(place))
        self.value.assign(KINDS[kind])

    def clear(self):
        self.place.assign(-1)

    def at(self, place, tensor, condition=True):
        """Return a tensor, or what has become of it."""
        is_here = tf.equal(self.place, PLACES.index(place)) & condition
        fails = is_here & tf.equal(self.value, 0.0)
        tf.debugging.assert_equal(fails, False, message="fault")
        return tensor + tf.where(is_here, self.value, 0.0)


class Faulty(keras.layers.Layer):
    """A dense layer that has a fault, and knows whether it was moved."""

    def __init__(self, fault):
        super().__init__()
        self.fault = fault
        self.dense = keras.layers.Dense(1)
        self.before = tf.Variable(tf.zeros((16, 1)), trainable=False)

    def build(self, shape):
        self.dense.build(shape)
        self.built = True

    def call(self, x):
        kernel = tf.convert_to_tensor(self.dense.kernel)
        is_moved = tf.reduce_any(kernel != self.before)

        @tf.custom_gradient
        def faulty(outputs):
            def gradient(dy):
                dy = self.fault.at("gradient", dy)
                return self.fault.at("gradient at w + eps", dy, is_moved)

            return tf.identity(outputs), gradient

        outputs = self.fault.at("outputs", self.dense(x))
        outputs = self.fault.at("outputs at w + eps", outputs, is_moved)
        return faulty(outputs)


class Trainee:
    """A model whose training can be set back to its start, and be faulty."""

    def __init__(self, method, mode):
        keras.utils.set_random_seed(0)
        self.fault = Fault()
        self.layer = Faulty(self.fault)
        net = keras.Sequential(
            [keras.Input((8,)), keras.layers.Dense(16, "relu"), self.layer]
        )
        self.model = METHODS[method](net, total_steps=100)
        self.model.compile(
            keras.optimizers.Adam(0.01),
            lambda y, p: self.fault.at("loss", tf.square(y - p)),
            metrics=[lambda y, p: self.fault.at("metric", tf.abs(y - p))],
            **MODES[mode],
        )
        self.data = make_data(32)
        self.step()
        variables = [*self.model.variables, *self.model.optimizer.variables]
        self.start = [(v, v.numpy()) for v in variables]

    def step(self):
        self.layer.before.assign(self.layer.dense.kernel)
        self.model.train_on_batch(*self.data)

    def survives(self, place, kind, at):
        """Return whether all weights are finite some steps after a fault."""
        for variable, value in self.start:
            variable.assign(value)
        for i in range(at + 4):
            if i == at:
                self.fault.set(place, kind)
            try:
                self.step()
            except (tf.errors.OpError, ValueError):
                pass
            finally:
                self.fault.clear()
        return all(np.isfinite(v.numpy()).all() for v in self.model.weights)


def faults(args):
    """Try each fault with each method; return whether none is lost."""
    tell("\n## Faults: runs that survive, and that only plain Keras survives\n")
    tell("| method | mode | survive | plain only |")
    tell("|---|---|---|---|")
    matrix = [*itertools.product(PLACES, KINDS, STEPS)]
    plain, lost = {}, []
    for mode, method in itertools.product(args.modes, args.methods):
        progress(f"{method}, {mode}: {len(matrix)} faults")
        trainee = Trainee(method, mode)
        found = {fault: trainee.survives(*fault) for fault in matrix}
        if method == "plain":
            plain[mode] = found
        worse = [f for f in matrix if plain[mode][f] and not found[f]]
        lost += [(method, mode, *fault) for fault in worse]
        survived = f"{sum(found.values())} of {len(matrix)}"
        tell(f"| {method} | {mode} | {survived} | {len(worse)} |")
    for fault in lost:
        tell(f"lost: {', '.join(map(str, fault))}")
    return not lost


# A long training.


class Watch(keras.callbacks.Callback):
    """Notes the time of each step, and the memory after the first 1000."""

    def __init__(self, warm):
        super().__init__()
        self.warm = warm
        self.seconds = []
        self.memory = []

    def on_train_batch_begin(self, batch, logs=None):
        self.started = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        self.seconds.append(time.perf_counter() - self.started)
        if len(self.seconds) % self.warm == 0:
            self.memory.append(resident())


def resident():
    """Return the megabytes of memory that this process has."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


class Counter(keras.layers.Layer):
    """Counts how often it is traced."""

    traces = 0

    def call(self, x):
        self.traces += 1
        return x


def long(args):
    """Train for long; return whether nothing has grown."""
    keras.utils.set_random_seed(0)
    counter = Counter()
    net = keras.Sequential(
        [keras.Input((8,)), counter, keras.layers.Dense(32, "relu")]
    )
    net.add(keras.layers.Dense(1))
    model = LESAMModel(net, 0.1, curvature="secant")
    model.compile("adam", "mse", metrics=["mae"])
    warm = min(1000, args.steps // 4)
    watch, traces = Watch(warm), []
    epochs = args.steps * BATCH // ROWS
    note = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: traces.append(counter.traces)
    )
    model.fit(
        *make_data(),
        **{"batch_size": BATCH, "epochs": epochs, "verbose": 0},
        callbacks=[watch, note],
    )
    first, last = watch.seconds[warm // 5 : warm], watch.seconds[-warm:]
    first, last = (1e3 * statistics.median(s) for s in (first, last))
    grown = watch.memory[-1] - watch.memory[0]
    new = traces[-1] - traces[0]
    tell(f"\n## {len(watch.seconds)} steps\n")
    tell(
        f"Memory {watch.memory[0]:.0f} MB after {warm} steps, and "
        f"{grown:+.1f} MB at the end.\n"
        f"{new} new traces after the first epoch.\n"
        f"{first:.2f} ms a step at first, {last:.2f} ms at last (medians)."
    )
    return grown < 20 and not new


if __name__ == "__main__":
    main()
