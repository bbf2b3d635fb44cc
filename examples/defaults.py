"""Trains a panel of small nets plainly and by LE-SAM: does any collapse?

    python defaults.py --results panel.jsonl
    python defaults.py --settings sigma=0.2,rho_max=none --settings warmup=0
    python defaults.py --quick

A cell of the panel is a net, an optimizer and a data set. Without --settings
LE-SAM has the defaults of `LESAMModel`; a setting changes those that it names.
With --results, each finished run is saved in that file, and a later call does
not repeat it; delete the file after a change of the library.

The losses are those of the training data after training, and a cell has
collapsed where LE-SAM's is more than 0.7 above the plain one. rho is the
median over epochs; "at cap" is the fraction of the steps whose rho is
rho_max; rise/sigma is the median over the steps of the rise of the loss in
the ascent step, divided by its budget.

All 24 cells take about a quarter of an hour on two cores, with one setting.
"""

import argparse
import itertools
import json
import math
import pathlib
import statistics

import _common
import _nets
import keras

from keras_lesam import LESAMModel

COLLAPSE = 0.7  # Training loss above that of plain training, in loss units.
AT_CAP = 0.999  # Fraction of rho_max from which the cap binds.
BATCH_SIZE = 64

NETS = ("dense", "deep_dense", "conv", "conv_bn", "vit", "lstm")
DATA = {
    "mnist5k": lambda: _common.load_mnist5k(train=2000),
    "digits": _common.load_digits8,
}
OPTIMIZERS = {
    "sgd": lambda rate: keras.optimizers.SGD(rate, momentum=0.9),
    "adam": keras.optimizers.Adam,
}
LEARNING_RATES = {
    "sgd": {"vit": 0.01, "lstm": 0.1, "conv_bn": 0.02, "default": 0.05},
    "adam": {"vit": 0.002, "lstm": 0.003, "default": 0.001},
}
SETTING = ("sigma", "rho_max", "warmup", "anneal")
SETTING_HELP = "sigma=0.1,rho_max=none,warmup=0.1,anneal=0.2 or part of it; "
SETTING_HELP += "may be given several times"
HEADER = (
    *("net", "optimizer", "data", "plain loss", "LE-SAM loss", "difference"),
    *("collapsed", "plain acc.", "LE-SAM acc."),
    *("rho", "at cap", "rise/sigma"),
)


def main():
    args = parse_args()
    _common.require("tqdm", "mlxtend", "sklearn")
    runs = plan(args)
    results = read(args.results)
    try:
        train_missing(runs, results, args.results)
    except KeyboardInterrupt:
        raise SystemExit("Stopped; --results has what was finished.") from None
    for setting in args.settings:
        tell(setting, summarize(runs, setting, results), args.markdown)


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--nets", nargs="+", choices=NETS, default=NETS)
    add("--optimizers", nargs="+", choices=OPTIMIZERS, default=OPTIMIZERS)
    add("--data", nargs="+", choices=DATA, default=DATA)
    add("--settings", type=parse_setting, action="append", help=SETTING_HELP)
    add("--epochs", type=int, default=20)
    add("--seeds", type=int, default=1, help="trainings of each cell")
    add("--results", type=pathlib.Path, help="file to keep finished runs in")
    add("--markdown", action="store_true", help="print tables in Markdown")
    add("--quick", action="store_true", help="one net, 8 x 8 digits, 3 epochs")
    args = parser.parse_args()
    # Without a setting, the defaults; a repeated setting counts once.
    settings = args.settings or [parse_setting("")]
    args.settings = [s for i, s in enumerate(settings) if s not in settings[:i]]
    if args.quick:
        args.nets, args.data, args.epochs = ("dense",), ("digits",), 3
    return args


def parse_setting(text):
    """Parse `"sigma=0.1,rho_max=none"` into arguments of `LESAMModel`."""
    setting = {}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        if name not in SETTING:
            raise argparse.ArgumentTypeError(f"{name!r} is not in {SETTING}")
        setting[name] = None if value.lower() == "none" else float(value)
    try:
        model = LESAMModel(keras.Sequential(), **setting)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return {name: getattr(model, name) for name in SETTING} | setting


# The runs.


def plan(args):
    """List all runs, each as a dict that determines it; plain ones first."""
    cells = itertools.product(
        range(args.seeds), args.optimizers, args.nets, args.data
    )
    return [
        {
            "net": net,
            "optimizer": optimizer,
            "data": data,
            "learning_rate": learning_rate(optimizer, net),
            "batch_size": BATCH_SIZE,
            "epochs": args.epochs,
            "seed": seed,
            "setting": setting,
        }
        for seed, optimizer, net, data in cells
        for setting in [None, *args.settings]
    ]


def learning_rate(optimizer, net):
    rates = LEARNING_RATES[optimizer]
    return rates.get(net, rates["default"])


def key(run):
    return json.dumps(run, sort_keys=True)


def read(path):
    """Read the outcomes of earlier calls as a dict by `key(run)`."""
    if path is None or not path.exists():
        return {}
    records = map(json.loads, path.read_text().splitlines())
    return {key(record["run"]): record["outcome"] for record in records}


def append(path, run, outcome):
    if path is not None:
        with path.open("a") as file:
            file.write(json.dumps({"run": run, "outcome": outcome}) + "\n")


def train_missing(runs, results, path):
    """Train the runs that are not in `results` yet, and add them there."""
    from tqdm import tqdm

    missing = [run for run in runs if key(run) not in results]
    data = {name: DATA[name]() for name in {run["data"] for run in missing}}
    # The bar counts passes over the data: they predict the time left best.
    total = sum(map(passes, missing))
    with tqdm(total=total, smoothing=0, unit="pass", disable=not total) as bar:
        for run in missing:
            bar.set_description(" ".join([run["net"], run["optimizer"]]))
            results[key(run)] = train(run, data[run["data"]])
            append(path, run, results[key(run)])
            bar.update(passes(run))


def passes(run):
    return run["epochs"] * (1 if run["setting"] is None else 2)


def train(run, data):
    """Train a new net; return the outcome as a dict of numbers."""
    keras.utils.clear_session()
    keras.utils.set_random_seed(run["seed"])
    model = _nets.NETS[run["net"]](data.x_train.shape[1:])
    steps = []
    if run["setting"] is not None:
        model = LESAMModel(model, **run["setting"])
        steps = [StepRecord()]
    compile_as(run, model)
    history = model.fit(
        data.x_train,
        data.y_train,
        batch_size=run["batch_size"],
        epochs=run["epochs"],
        callbacks=steps,
        verbose=0,
    ).history
    outcome = evaluate(model, data)
    if run["setting"] is not None:
        outcome["rho"] = statistics.median(history["rho"])
        outcome |= steps[0].summary(run["setting"]["rho_max"])
    return outcome


def compile_as(run, model):
    model.compile(
        OPTIMIZERS[run["optimizer"]](run["learning_rate"]),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )


def evaluate(model, data):
    loss, _ = model.evaluate(
        data.x_train, data.y_train, batch_size=500, verbose=0
    )
    _, accuracy = model.evaluate(
        data.x_test, data.y_test, batch_size=500, verbose=0
    )
    return {"loss": loss, "accuracy": accuracy}


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
            if step["sigma"] > 0
        ]
        return {
            "at_cap": statistics.fmean(at_cap),
            "rise": statistics.median(rises) if rises else math.nan,
        }


# The report.


def summarize(runs, setting, results):
    """Make the rows of the table, one for each cell: means over the seeds."""
    cells = {}
    for run in runs:
        if run["setting"] == setting:
            plain = results[key({**run, "setting": None})]
            name = run["net"], run["optimizer"], run["data"]
            cells.setdefault(name, []).append((plain, results[key(run)]))
    return [cell(name, pairs) for name, pairs in cells.items()]


def cell(name, pairs):
    """Make a row from the name of a cell and its pairs of outcomes."""

    def mean(which, number):
        return statistics.fmean(pair[which][number] for pair in pairs)

    rises = [lesam["loss"] - plain["loss"] for plain, lesam in pairs]
    return {
        **dict(zip(HEADER, name)),
        "plain loss": mean(0, "loss"),
        "LE-SAM loss": mean(1, "loss"),
        "difference": statistics.fmean(rises),
        # Written so that a loss of nan counts as a collapse, too.
        "collapsed": sum(not rise <= COLLAPSE for rise in rises),
        "plain acc.": mean(0, "accuracy"),
        "LE-SAM acc.": mean(1, "accuracy"),
        **{"rho": mean(1, "rho"), "at cap": mean(1, "at_cap")},
        "rise/sigma": mean(1, "rise"),
    }


def tell(setting, rows, markdown):
    """Print the table of a setting and a line that summarizes it."""
    print(
        "\n"
        + ", ".join(f"{name}={value}" for name, value in setting.items())
        + "\n"
    )
    lines = [HEADER, *(format_row(row) for row in rows)]
    print(table(lines, markdown), end="\n\n")
    worst = max(rows, key=lambda row: (row["collapsed"], row["difference"]))
    at_cap = statistics.median(row["at cap"] for row in rows)
    print(
        f"{len(rows)} cells, {sum(row['collapsed'] > 0 for row in rows)} "
        f"collapsed; largest loss difference {worst['difference']:+.3f} "
        f"({worst['net']}, {worst['optimizer']}, {worst['data']}); "
        f"median share of steps at the cap {at_cap:.0%}"
    )


def format_row(row):
    collapsed = "-" if not row["collapsed"] else f"{row['collapsed']} run(s)"
    formats = {
        **dict.fromkeys(("plain loss", "LE-SAM loss"), "{:.4f}"),
        **dict.fromkeys(("plain acc.", "LE-SAM acc."), "{:.1%}"),
        **{"difference": "{:+.4f}", "collapsed": collapsed},
        **{"rho": "{:.3f}", "at cap": "{:.0%}", "rise/sigma": "{:.2f}"},
    }
    return [formats.get(name, "{}").format(row[name]) for name in HEADER]


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
