"""What does a step of SAM cost, in this and in other libraries?

    python speed.py > ../results/speed_libraries.md   an hour on two cores
    python speed.py --nets embedding embedding_adam --methods SAM
    python speed.py --libraries keras_lesam tf-keras --nets dense
    python speed.py --quick       all rows, too short to mean anything

Each library is compared with its own plain step, on the same four nets:
LE-SAM and SAM of keras_lesam in Keras 3, SAM as one would write it by hand for
Keras 3 (`_by_hand.py`), SAM of tf-keras, and SAM of pytorch_optimizer in
PyTorch. Plain training and the method take turns in one
process, an epoch each, and neighbours are compared; two passes are a ratio of
2.

"first" is the seconds of the first epoch, tracing and compiling included, of
plain training and of the method, each in a process of its own; "first CPU" the
seconds of all cores together, which other work on the machine changes less.
"memory" is the peak of a process that trains
by the method less that of one that trains plainly (after the first epoch), in
megabytes and in units of the size of the parameters, which in a small net is
small beside that of the activations. `embedding` is one of a million words,
whose gradient is sparse, trained by SGD without momentum, or by Adam.

Libraries that are not installed have a row that says so
(`pip install tf_keras torch pytorch_optimizer`).
"""

import argparse
import importlib.util
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

# The modules that all examples share are one folder up.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import _trainees
import numpy as np

BATCH_SIZE = 128
CLASSES = 10
METHODS = {
    "keras_lesam": (
        *("LE-SAM", "LE-SAM default", "LE-SAM secant", "SAM"),
        *("LE-SAM, every 4th", "LookSAM, every 4th"),
    ),
    "by hand": ("SAM",),
    "tf-keras": ("SAM",),
    "pytorch_optimizer": ("SAM",),
}
MODES = {
    "keras_lesam": ("graph", "XLA"),
    "by hand": ("graph", "XLA"),
    "tf-keras": ("graph", "XLA"),
    "pytorch_optimizer": ("eager", "compiled"),
}
MODULES = {
    "keras_lesam": ("keras_lesam",),
    "by hand": ("keras",),
    "tf-keras": ("tf_keras",),
    "pytorch_optimizer": ("torch", "pytorch_optimizer"),
}
HEADER = (
    *("library", "method", "net", "mode", "parameters"),
    *(
        "ratio",
        "min",
        "max",
        "plain ms",
        "first s",
        "first CPU s",
        "memory MB",
        "x parameters",
    ),
)


def main(argv=None):
    args = parse_args(argv)
    if args.child:
        print(json.dumps(measure(**json.loads(args.child))))
        return
    print(f"| {' | '.join(HEADER)} |\n|{' --- |' * len(HEADER)}", flush=True)
    for row in with_progress(list(rows_of(args))):
        print(f"| {' | '.join(measured(row, args))} |", flush=True)
    print(
        f"\nMedian, least and largest ratio of {args.pairs} pairs of epochs of "
        f"{args.steps} steps, batches of {BATCH_SIZE}."
    )


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--libraries", nargs="+", choices=METHODS, default=METHODS)
    add("--methods", nargs="+", metavar="NAME", help="LE-SAM, SAM ...")
    modes = sorted({mode for modes in MODES.values() for mode in modes})
    add("--modes", nargs="+", choices=modes, default=modes)
    nets = {**_trainees.SHAPES, **_trainees.WORDS}
    add("--nets", nargs="+", choices=nets, default=_trainees.SHAPES)
    add("--pairs", type=int, default=5, help="of epochs to compare")
    add("--steps", type=int, default=20, help="steps of an epoch")
    add("--quick", action="store_true", help="2 pairs of epochs of 2 steps")
    add("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.quick:
        args.pairs, args.steps = 2, 2
    return args


def rows_of(args):
    """Yield the arguments of each row as a dict, net by net."""
    for net in args.nets:
        for library in args.libraries:
            if library == "pytorch_optimizer" and net in _trainees.WORDS:
                continue
            for mode in [m for m in MODES[library] if m in args.modes]:
                for method in METHODS[library]:
                    if args.methods and method not in args.methods:
                        continue
                    yield {
                        "library": library,
                        "net": net,
                        "method": method,
                        "mode": mode,
                    }


def with_progress(rows):
    try:
        from tqdm import tqdm
    except ImportError:
        return rows
    return tqdm(rows, file=sys.stderr)


def measured(row, args):
    """Measure a row; return its cells."""
    names = [row[key] for key in ("library", "method", "net", "mode")]
    for module in MODULES[row["library"]]:
        if importlib.util.find_spec(module) is None:
            return [*names, f"{module} is not installed"]
    times = child(args, task="time", **row)
    if "error" in times:
        return [*names, times["error"]]
    ratios = times["ratios"]
    other = alone(args, row)
    plain = alone(args, {**row, "method": _trainees.PLAIN})
    for found in (plain, other):
        if "error" in found:
            return [*names, found["error"]]
    more = other["peak"] - plain["peak"]
    size = 4 * times["parameters"]
    return [
        *names,
        f"{times['parameters']:,}",
        f"{statistics.median(ratios):.2f}x",
        *(f"{min(ratios):.2f}", f"{max(ratios):.2f}"),
        f"{times['plain_ms']:.1f}",
        f"{plain['first']:.1f} to {other['first']:.1f}",
        f"{plain['first_cpu']:.1f} to {other['first_cpu']:.1f}",
        *(f"{more / 1e6:+.0f}", f"{more / size:+.1f}"),
    ]


ALONE = {}


def alone(args, row):
    """Return what a process finds; measure plain training only once."""
    # Plain Keras is the same in both.
    library = row["library"].replace("by hand", "keras_lesam")
    key = (library, row["net"], row["method"], row["mode"])
    if row["method"] != _trainees.PLAIN:
        return child(args, task="alone", **row)
    if key not in ALONE:
        ALONE[key] = child(args, task="alone", **row)
    return ALONE[key]


def child(args, **task):
    """Run `measure` in a process of its own; return its result."""
    task = {**task, "pairs": args.pairs, "steps": args.steps}
    done = subprocess.run(
        [sys.executable, __file__, "--child", json.dumps(task)],
        capture_output=True,
        text=True,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return {"error": f"fails: {lines[-1] if lines else 'no message'}"}
    return json.loads(done.stdout.splitlines()[-1])


def measure(task, library, net, method, mode, pairs, steps):
    """Measure time or memory in this process; return a dict."""
    data = made_up(net, steps * BATCH_SIZE)

    def trainee(method):
        make = _trainees.TRAINEES[library]
        return make(library, net, method, mode, data, BATCH_SIZE)

    if task == "alone":
        return run_alone(trainee(method)[0])
    plain, parameters = trainee(_trainees.PLAIN)
    other, _ = trainee(method)
    plain(), other()
    seconds = [take_turns(plain, other, i) for i in range(pairs)]
    plain_seconds = statistics.median(a for a, _ in seconds)
    return {
        "parameters": parameters,
        "ratios": [b / a for a, b in seconds],
        "plain_ms": 1e3 * plain_seconds / steps,
    }


def made_up(net, rows):
    """Make up data that can be learnt: where nothing is, the default is plain.

    Returns:
        Arrays `(x, y)`: pictures (float32) or words (int32), and labels.
    """
    rng = np.random.default_rng(0)
    y = rng.integers(CLASSES, size=rows)
    if net in _trainees.WORDS:
        # Of each class a tenth of the words.
        words = _trainees.EMBEDDING[0] // CLASSES
        x = rng.integers(words, size=(rows, *_trainees.WORDS[net]))
        return (x + words * y[:, None]).astype("int32"), y
    shape = _trainees.SHAPES[net]
    centers = rng.uniform(size=(CLASSES, *shape))
    x = 3 * centers[y] + rng.uniform(size=(rows, *shape))
    return x.astype("float32"), y


def take_turns(plain, other, i):
    """Measure the seconds of an epoch of both; the order alternates."""
    if i % 2:
        return tuple(reversed([other(), plain()]))
    return plain(), other()


def run_alone(epoch):
    """Measure the first epoch of this process, and its peak memory in another.

    Returns:
        Dict of `first` and `first_cpu` (seconds) and `peak` (bytes).
    """
    cpu = time.process_time()
    first = epoch()
    cpu = time.process_time() - cpu
    # Resets the peak: tracing and compiling do not count.
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    epoch()
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            peak = 1024 * int(line.split()[1])
            return {"first": first, "first_cpu": cpu, "peak": peak}
    raise RuntimeError("Linux tells a process its peak memory; this is not.")


if __name__ == "__main__":
    main()
