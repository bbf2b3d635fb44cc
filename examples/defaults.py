"""Trains a panel of small nets plainly and by LE-SAM: is any worse off?

    python defaults.py --results panel.jsonl
    python defaults.py --settings share=0.3,max_change=none
    python defaults.py --quick

A cell of the panel is a net, an optimizer and a task: clean digits of MNIST or
of scikit-learn, digits of which a fifth have a wrong label, digits of which
some classes are rare (20 to 1), digits in batches of four. "x20" is a net whose
output layer is 20 times too large when the training begins.

Without --settings, shares of the loss over the whole range that is advised,
with the limit to the change of the gradient that the default has. A setting of
`sigma` is the paper's budget, with its schedule. With --results,
each finished run is saved in that file, and a later call does not repeat it;
delete the file after a change of the library.

Accuracies are of validation data, after the last epoch, means over the seeds;
no picture of the benchmark's test set is among them. Differences are in points,
to plain training of the same seeds. A run has died where its accuracy is little
better than chance and that of plain training is not. rho is the median over
epochs; "at cap" is the fraction of the steps whose rho is rho_max; rise/sigma
is the median over the steps of the rise of the loss in the ascent step, divided
by its budget.
"""

import argparse
import concurrent.futures
import functools
import itertools
import json
import math
import multiprocessing
import os
import pathlib
import statistics
import sys
import warnings

sys.path.insert(0, str(pathlib.Path(__file__).parent / "benchmark"))

import _common
import _nets
import _tasks
import keras
import numpy as np

from keras_lesam import LESAMModel
from keras_lesam import budgets

CHANCE = 1.5 / _common.CLASSES  # An accuracy that is little better.
AT_CAP = 0.999  # Fraction of rho_max from which the cap binds.

SHARES = (0.05, 0.1, 0.3, 0.7, 1.0)
MAX_CHANGE = 0.6
SETTING = ("share", "max_change", "sigma", "rho_max", "warmup", "anneal")
SETTING_HELP = "share=0.3,max_change=none or sigma=0.1,rho_max=1,warmup=0.1,"
SETTING_HELP += "anneal=0.2 or part of it; may be given several times"


def scaled_outputs(build, factor, shape):
    """Build a net, and make its output layer `factor` times as large."""
    net = build(shape)
    output = net.layers[-1]
    output.set_weights([factor * w for w in output.get_weights()])
    return net


NETS = {
    **{
        name: getattr(_nets, name)
        for name in ("dense", "deep_dense", "conv", "conv_bn", "vit", "lstm")
    },
    "conv x20": functools.partial(scaled_outputs, _nets.conv, 20.0),
}
_DIGITS = {"load": _tasks.digits8, "validation": 297, "train": 1000}
_TASK = functools.partial(
    _tasks.Task, "", build=None, epochs=20, batch_size=64, **_DIGITS
)
TASKS = {
    "MNIST": _TASK(load=_tasks.mnist14, train=2000, validation=1000),
    "digits": _TASK(),
    "20% wrong": _TASK(noise=0.2),
    "long-tailed": _TASK(imbalance=20.0, batch_size=32),
    "batches of 4": _TASK(batch_size=4, epochs=5),
}
OPTIMIZERS = {
    "sgd": lambda rate: keras.optimizers.SGD(rate, momentum=0.9),
    "adam": keras.optimizers.Adam,
}
LEARNING_RATES = {
    "sgd": {"vit": 0.01, "lstm": 0.1, "conv_bn": 0.02, "default": 0.05},
    "adam": {"vit": 0.002, "lstm": 0.003, "default": 0.001},
}
# Of batches of four: the same noise of the gradients, for each optimizer.
SMALLER = {"sgd": 1 / 16, "adam": 1 / 4}


def main():
    args = parse_args()
    _common.require("tqdm", "mlxtend", "sklearn")
    runs = plan(args)
    results = read(args.results)
    try:
        train_missing(runs, results, args)
    except KeyboardInterrupt:
        raise SystemExit("Stopped; --results has what was finished.") from None
    tell(args.settings, runs, results, args.markdown)


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--nets", nargs="+", choices=NETS, default=[*NETS])
    add("--optimizers", nargs="+", choices=OPTIMIZERS, default=[*OPTIMIZERS])
    add("--tasks", nargs="+", choices=TASKS, default=[*TASKS])
    add("--settings", type=parse_setting, action="append", help=SETTING_HELP)
    add("--seeds", type=int, default=3, help="trainings of each cell")
    add("--jobs", type=int, default=os.cpu_count(), help="parallel cells")
    add("--results", type=pathlib.Path, help="file to keep finished runs in")
    add("--markdown", action="store_true", help="print tables in Markdown")
    add("--quick", action="store_true", help="one net, one task, one seed")
    args = parser.parse_args()
    # A repeated setting counts once.
    settings = args.settings or [
        {"share": share, "max_change": MAX_CHANGE} for share in SHARES
    ]
    args.settings = [s for i, s in enumerate(settings) if s not in settings[:i]]
    if args.quick:
        args.nets, args.tasks = ("dense",), ("digits",)
        args.seeds = args.jobs = 1
    return args


def parse_setting(text):
    """Parse `"share=0.3,rho_max=none"` into a setting, a dict."""
    setting = {}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        if name not in SETTING:
            raise argparse.ArgumentTypeError(f"{name!r} is not in {SETTING}")
        setting[name] = None if value.lower() == "none" else float(value)
    try:
        wrap(keras.Sequential(), setting)
    except (TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return setting


def wrap(net, setting):
    """Wrap a net: by a share of the loss, or by the paper's budget."""
    options = dict(setting)
    if "share" in options:
        options["sigma"] = budgets.Relative(
            options.pop("share"), max_change=options.pop("max_change", None)
        )
    return LESAMModel(net, **options)


# The runs.


def plan(args):
    """List all runs, each as a dict that determines it; plain ones first."""
    cells = itertools.product(args.tasks, args.nets, args.optimizers)
    return [
        {
            "net": net,
            "optimizer": optimizer,
            "task": task,
            "seed": seed,
            "setting": setting,
        }
        for task, net, optimizer in cells
        for setting in [None, *args.settings]
        for seed in range(args.seeds)
    ]


def learning_rate(run):
    rates = LEARNING_RATES[run["optimizer"]]
    rate = rates.get(run["net"], rates["default"])
    if TASKS[run["task"]].batch_size == 4:
        rate *= SMALLER[run["optimizer"]]
    return rate


def cell_of(run):
    return run["net"], run["optimizer"], run["task"]


def key(run):
    return json.dumps(run, sort_keys=True)


def read(path):
    """Read the outcomes of earlier calls as a dict by `key(run)`."""
    if path is None or not path.exists():
        return {}
    records = map(json.loads, path.read_text().splitlines())
    return {key(record["run"]): record["outcome"] for record in records}


def train_missing(runs, results, args):
    """Train the runs that are not in `results` yet, and add them there."""
    from tqdm import tqdm

    cells = {}
    for run in runs:
        if key(run) not in results:
            cells.setdefault(cell_of(run), []).append(run)
    total = sum(map(len, cells.values()))
    threads = max(1, os.cpu_count() // args.jobs)
    with (
        tqdm(total=total, smoothing=0, unit="run", disable=not total) as bar,
        concurrent.futures.ProcessPoolExecutor(
            args.jobs,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=limit_threads,
            initargs=(threads,),
        ) as pool,
    ):
        futures = [pool.submit(train_cell, cell) for cell in cells.values()]
        for future in concurrent.futures.as_completed(futures):
            for run, outcome in future.result():
                results[key(run)] = outcome
                append(args.results, run, outcome)
                bar.update()


def limit_threads(count):
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(count)
    tf.config.threading.set_inter_op_parallelism_threads(count)


def append(path, run, outcome):
    if path is not None:
        with path.open("a") as file:
            file.write(json.dumps({"run": run, "outcome": outcome}) + "\n")


def train_cell(runs):
    """Train the runs of one cell; return pairs of a run and its outcome.

    A model is traced once, and begins again from new weights for each run.
    """
    warnings.filterwarnings("ignore", message=".*shuffle=True.*")
    keras.utils.clear_session()
    models, outcomes = {}, []
    for run in runs:
        setting = run["setting"]
        # Another share is no other graph.
        same = setting and {**setting, "share": "share" in setting}
        if str(same) not in models:
            models[str(same)] = compiled(run)
        outcomes.append((run, train(run, *models[str(same)])))
    return outcomes


def compiled(run):
    """Return a new net, and the compiled model that trains it."""
    shape = TASKS[run["task"]].data(0).x.shape[1:]
    net = NETS[run["net"]](shape)
    model = net if run["setting"] is None else wrap(net, run["setting"])
    model.compile(
        OPTIMIZERS[run["optimizer"]](learning_rate(run)),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return net, model


def train(run, net, model):
    """Train from new weights; return the outcome as a dict of numbers."""
    task, setting = TASKS[run["task"]], run["setting"]
    data = task.data(run["seed"])
    keras.utils.set_random_seed(run["seed"])
    fresh = NETS[run["net"]](data.x.shape[1:])
    _common.restart(model, net, fresh.get_weights())
    steps = []
    if setting is not None:
        steps = [StepRecord()]
        if "share" in setting:
            model.share = setting["share"]
    history = model.fit(
        *(data.x, data.y),
        batch_size=task.batch_size,
        epochs=task.epochs,
        callbacks=steps,
        verbose=0,
    ).history
    x, y = data.validation
    found = np.argmax(net.predict(x, batch_size=500, verbose=0), -1)
    outcome = {
        "loss": history["loss"][-1],
        "accuracy": float(np.mean(found == y)),
    }
    if setting is not None:
        outcome["rho"] = statistics.median(history["rho"])
        outcome |= steps[0].summary(model.rho_max)
    return outcome


class StepRecord(keras.callbacks.Callback):
    """The numbers of each step, from the running means that `fit` logs.

    Exact to about 1e-6 of the largest step. Needs `steps_per_execution=1`.

    Attributes:
        steps: List of dicts of floats, one for each step.
    """

    names = ("rho", "sharpness", "sigma")

    def __init__(self):
        super().__init__()
        self.steps = []

    def on_epoch_begin(self, epoch, logs=None):
        self._sums = dict.fromkeys(self.names, 0.0)

    def on_train_batch_end(self, batch, logs=None):
        sums = {name: (batch + 1) * float(logs[name]) for name in self.names}
        self.steps.append({n: sums[n] - self._sums[n] for n in self.names})
        self._sums = sums

    def summary(self, rho_max):
        """Return the fraction of steps at the cap, the median rise/budget."""
        cap = math.inf if rho_max is None else AT_CAP * rho_max
        at_cap = [step["rho"] >= cap for step in self.steps]
        rises = [
            step["sharpness"] / step["sigma"]
            for step in self.steps
            # A tiny budget is lost in the rounding of the means.
            if step["sigma"] > 1e-4
        ]
        return {
            "at_cap": statistics.fmean(at_cap),
            "rise": statistics.median(rises) if rises else None,
        }


# The report.


def tell(settings, runs, results, markdown):
    """Print the accuracies of all settings, and a line for each of them."""
    names = [name_of(setting) for setting in settings]
    cells = dict.fromkeys(map(cell_of, runs))
    pairs = {
        cell: [pairs_of(cell, s, runs, results) for s in settings]
        for cell in cells
    }
    lines = [("net", "optimizer", "task", "plain", *names)]
    for cell, by_setting in pairs.items():
        plain = statistics.fmean(p["accuracy"] for p, _ in by_setting[0])
        texts = [difference_text(found) for found in by_setting]
        lines.append((*cell, f"{100 * plain:.1f}", *texts))
    print("\n" + table(lines, markdown), end="\n\n")
    print(table(net_lines(names, pairs), markdown), end="\n\n")
    header = ("setting", "cells", "runs that died", "mean difference")
    header += ("worst net", "worst cell", "beyond 1 point below", "rho")
    header += ("at cap", "rise/sigma")
    rows = [
        (name, *summary({cell: pairs[cell][i] for cell in cells}))
        for i, name in enumerate(names)
    ]
    print(table([header, *rows], markdown))


def net_lines(names, pairs):
    """Make the lines of a net and an optimizer each: means over the tasks."""
    lines = [("net", "optimizer", *names)]
    by_net = [
        by_net_of({cell: found[i] for cell, found in pairs.items()})
        for i in range(len(names))
    ]
    for net in by_net[0]:
        lines.append((*net, *(f"{means[net]:+.1f}" for means in by_net)))
    return lines


def by_net_of(by_cell):
    """Return the mean difference over the tasks, by net and optimizer."""
    found = {}
    for (net, optimizer, _), pairs in by_cell.items():
        found.setdefault((net, optimizer), []).append(difference(pairs))
    return {net: statistics.fmean(values) for net, values in found.items()}


def name_of(setting):
    """Write a setting as on the command line."""
    values = {
        name: "none" if value is None else f"{value:g}"
        for name, value in setting.items()
    }
    return ",".join(f"{k}={v}" for k, v in values.items()) or "defaults"


def pairs_of(cell, setting, runs, results):
    """List pairs of outcomes, plain and by a setting, one for each seed."""
    return [
        (results[key({**run, "setting": None})], results[key(run)])
        for run in runs
        if cell_of(run) == cell and run["setting"] == setting
    ]


def died(plain, found):
    # Written so that an accuracy of nan counts as a death, too.
    return plain["accuracy"] > CHANCE and not found["accuracy"] > CHANCE


def difference(pairs):
    """Return the mean difference of a cell's accuracies, in points."""
    return 100 * statistics.fmean(
        found["accuracy"] - plain["accuracy"] for plain, found in pairs
    )


def difference_text(pairs):
    deaths = sum(died(*pair) for pair in pairs)
    text = f"{difference(pairs):+.1f}"
    return f"{text} ({deaths} of {len(pairs)} died)" if deaths else text


def summary(by_cell):
    """Return the cells of a setting's line, from its pairs by cell."""
    differences = {c: difference(pairs) for c, pairs in by_cell.items()}
    worst = min(differences, key=differences.get)
    nets = by_net_of(by_cell)
    worst_net = min(nets, key=nets.get)
    outcomes = [found for pairs in by_cell.values() for _, found in pairs]
    rises = [o["rise"] for o in outcomes if o["rise"] is not None]
    deaths = sum(died(*pair) for pairs in by_cell.values() for pair in pairs)
    return (
        str(len(by_cell)),
        f"{deaths} of {len(outcomes)}",
        f"{statistics.fmean(differences.values()):+.2f}",
        f"{nets[worst_net]:+.1f} ({', '.join(worst_net)})",
        f"{differences[worst]:+.1f} ({', '.join(worst)})",
        str(sum(d < -1 for d in differences.values())),
        f"{statistics.median(o['rho'] for o in outcomes):.3f}",
        f"{statistics.median(o['at_cap'] for o in outcomes):.0%}",
        f"{statistics.median(rises):.2f}" if rises else "-",
    )


def table(lines, markdown):
    """Align lines of cells, in plain text or in Markdown."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines = [[c.ljust(w) for c, w in zip(line, widths)] for line in lines]
    if not markdown:
        return "\n".join("  ".join(line).rstrip() for line in lines)
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
