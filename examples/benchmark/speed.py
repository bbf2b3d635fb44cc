"""What does a step of SAM cost, in this and in other libraries?

    python speed.py               about half an hour on two cores
    python speed.py --libraries keras_lesam tf-keras --nets dense
    python speed.py --quick       all rows, too short to mean anything

Each library is compared with its own plain step, on the same three nets:
LE-SAM and SAM of keras_lesam in Keras 3, SAM of tf-keras, and SAM of
pytorch_optimizer in PyTorch. Plain training and the method take turns in one
process, an epoch each, and neighbours are compared; two passes are a ratio of
2.

"first" is the seconds of the first epoch, tracing and compiling included, of
plain training and of the method. "memory" is the peak of a process that trains
by the method less that of one that trains plainly (after the first epoch), in
megabytes and in units of the size of the parameters, which in a small net is
small beside that of the activations.

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

# The modules that all examples share are one folder up.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import _trainees
import numpy as np

BATCH_SIZE = 128
CLASSES = 10
METHODS = {
    "keras_lesam": (
        *("LE-SAM", "LE-SAM secant", "SAM"),
        *("LE-SAM, every 4th", "LookSAM, every 4th"),
    ),
    "tf-keras": ("SAM",),
    "pytorch_optimizer": ("SAM",),
}
MODES = {
    "keras_lesam": ("graph", "XLA"),
    "tf-keras": ("graph", "XLA"),
    "pytorch_optimizer": ("eager", "compiled"),
}
MODULES = {
    "keras_lesam": ("keras_lesam",),
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
    add("--nets", nargs="+", choices=_trainees.SHAPES, default=_trainees.SHAPES)
    add("--pairs", type=int, default=5, help="of epochs to compare")
    add("--steps", type=int, default=8, help="steps of an epoch")
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
            for mode in MODES[library]:
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
    more = peak(args, row) - peak(args, {**row, "method": _trainees.PLAIN})
    size = 4 * times["parameters"]
    first = " to ".join(f"{s:.1f}" for s in times["first"])
    return [
        *names,
        f"{times['parameters']:,}",
        f"{statistics.median(ratios):.2f}x",
        *(f"{min(ratios):.2f}", f"{max(ratios):.2f}"),
        f"{times['plain_ms']:.1f}",
        first,
        *(f"{more / 1e6:+.0f}", f"{more / size:+.1f}"),
    ]


PEAKS = {}


def peak(args, row):
    """Return the peak memory in bytes; measure plain training only once."""
    key = tuple(row.values())
    if key not in PEAKS:
        PEAKS[key] = child(args, task="memory", **row)["peak"]
    return PEAKS[key]


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
    rng = np.random.default_rng(0)
    shape = (steps * BATCH_SIZE, *_trainees.SHAPES[net])
    x = rng.uniform(size=shape).astype("float32")
    data = x, rng.integers(CLASSES, size=len(x))

    def trainee(method):
        make = _trainees.TRAINEES[library]
        return make(library, net, method, mode, data, BATCH_SIZE)

    if task == "memory":
        return {"peak": peak_of(trainee(method)[0])}
    plain, parameters = trainee(_trainees.PLAIN)
    other, _ = trainee(method)
    first = [plain(), other()]
    seconds = [take_turns(plain, other, i) for i in range(pairs)]
    plain_seconds = statistics.median(a for a, _ in seconds)
    return {
        "parameters": parameters,
        "first": first,
        "ratios": [b / a for a, b in seconds],
        "plain_ms": 1e3 * plain_seconds / steps,
    }


def take_turns(plain, other, i):
    """Measure the seconds of an epoch of both; the order alternates."""
    if i % 2:
        return tuple(reversed([other(), plain()]))
    return plain(), other()


def peak_of(epoch):
    """Measure the peak memory of this process while it trains an epoch."""
    epoch()
    # Resets the peak: tracing and compiling do not count.
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    epoch()
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("Linux tells a process its peak memory; this is not.")


if __name__ == "__main__":
    main()
