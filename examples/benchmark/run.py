"""Does sharpness-aware training generalise better, on real data, and which?

    python run.py                 about 90 minutes on two cores
    python run.py --quick         everything, too short to mean anything
    python run.py --cifar --data-dir ~/tensorflow_datasets
    python run.py --report        the tables and the picture of what is there

Every method chooses among six settings on a validation split that the test
set never meets, then trains with other seeds (initial weights, order of the
batches, split, wrong labels) at the chosen one. The tables have means of the
test accuracy after the last epoch, their 95% intervals, and differences to
SAM seed by seed.

Each finished run is a line of the results file. A benchmark that was stopped
goes on where it was; delete lines to have them made again.
"""

import argparse
import dataclasses
import json
import pathlib
import sys

# What all examples share is a folder up.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import _common
import _methods
import _report
import _runs
import _tasks

HERE = pathlib.Path(__file__).parent
# Of so many seeds the minimum is looked at closely.
CURVATURE_SEEDS = 3
# Where the ablations, the cheaper variants and the sweep are run.
STUDIED = ["digits, 40% wrong, resnet", "MNIST, 40% wrong, resnet"]


def main(argv=None):
    args = parse_args(argv)
    results = Results(args.results)
    tasks = args.tasks_to_run
    if not args.report:
        bar = Bar(args)
        for task in tasks:
            Study(task, results, args, bar).run()
        bar.close()
    _report.show(results.lines, tasks, args.picture)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--tasks", nargs="+", metavar="WORD", help="those with such a word")
    add("--cifar", action="store_true", help="the CIFAR-10 task, and no other")
    add("--data-dir", help="where TensorFlow Datasets has CIFAR-10")
    add("--results", type=pathlib.Path, help="the file of finished runs")
    add("--picture", type=pathlib.Path, help="where to draw the picture")
    add("--report", action="store_true", help="train nothing")
    add("--quick", action="store_true", help="two epochs, two seeds")
    args = parser.parse_args(argv)
    name = "quick" if args.quick else "cifar" if args.cifar else "results"
    args.results = args.results or HERE / f"{name}.jsonl"
    args.picture = args.picture or HERE / f"{name}.png"
    args.tasks_to_run = chosen_tasks(args)
    return args


def chosen_tasks(args):
    tasks = _tasks.TASKS
    if args.cifar:
        tasks = _tasks.cifar_tasks(args.data_dir)
    if args.tasks:
        tasks = [t for t in tasks if any(w in t.name for w in args.tasks)]
    if args.quick:
        tasks = [dataclasses.replace(t, epochs=2, seeds=2) for t in tasks]
    return tasks


class Results:
    """The file of finished runs.

    Attributes:
        lines: List of dicts.
    """

    def __init__(self, path):
        self.path = path
        self.lines = []
        if path.exists():
            for line in path.read_text().splitlines():
                # The last line of a benchmark that was killed may be half.
                try:
                    self.lines.append(json.loads(line))
                except json.JSONDecodeError:
                    continue

    def find(self, **key):
        """The line with these entries, or `None`."""
        for line in self.lines:
            if all(line.get(k) == v for k, v in key.items()):
                return line
        return None

    def add(self, line):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.lines.append(line)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


class Study:
    """All runs of one task, in their order; those that are there are not made.

    Args:
        task: A `_tasks.Task`.
        results: A `Results`.
        args: What `parse_args` gives.
        bar: A `Bar`.
    """

    def __init__(self, task, results, args, bar):
        self.task, self.results, self.args, self.bar = task, results, args, bar
        self.bench = _runs.Bench(task, task.epochs)
        self.base = None

    def run(self):
        plain = _methods.plain(self.task.adam)
        self.base = self.compare(plain)
        for method in _methods.METHODS:
            self.compare(method)
        if self.task.name in STUDIED:
            self.study()

    def compare(self, method):
        """Chooses a setting and trains with all seeds; returns the choice."""
        settings = method.settings[:2] if self.args.quick else method.settings
        found = [self.train(method, s, _report.TUNING_SEED) for s in settings]
        best = max(range(len(found)), key=lambda i: found[i]["validation"])
        chosen = settings[best]
        self.repeat(method, chosen)
        if method.name != _methods.PLAIN:
            self.time(method, chosen)
        return chosen

    def repeat(self, method, setting):
        """A setting with all seeds."""
        for seed in range(self.task.seeds):
            self.train(method, setting, seed, seed < CURVATURE_SEEDS)

    def study(self):
        """Cheaper variants, ablations and the sweep."""
        steps = self.bench.steps * self.task.epochs
        for method in _methods.cheaper(steps):
            self.compare(method)
        sigma = self.chosen(_methods.LESAM)["sigma"]
        rho = self.chosen(_methods.SAM)["rho"]
        for method in _methods.ablations(steps, sigma, rho, self.mean_rhos()):
            self.repeat(method, method.settings[0])
        seeds = range(1 if self.args.quick else 3)
        for method in _methods.SWEEP:
            for setting in method.settings:
                for seed in seeds:
                    self.train(method, setting, seed)

    def chosen(self, name):
        return _report.chosen(self.results.lines, self.task.name, name)

    def mean_rhos(self):
        """LE-SAM's mean radius in each epoch, over the seeds."""
        setting = self.chosen(_methods.LESAM)
        runs = [
            self.results.find(**self.key(_methods.LESAM, setting, seed))["rho"]
            for seed in range(self.task.seeds)
        ]
        return [sum(rhos) / len(rhos) for rhos in zip(*runs)]

    def key(self, name, setting, seed):
        return {
            "task": self.task.name,
            "method": name,
            "setting": setting,
            "seed": seed,
        }

    def train(self, method, setting, seed, curvature=False):
        """The line of a run, made if it is not there."""
        key = self.key(method.name, setting, seed)
        line = self.results.find(**key)
        if line is None:
            self.bar.tell(self.task.name, method.name)
            base = self.base or setting
            found = self.bench.run(method, setting, base, seed, curvature)
            line = {**key, **found}
            self.results.add(line)
            self.bar.advance(self.task.weight * method.cost)
        return line

    def time(self, method, setting):
        key = self.key(method.name, setting, _report.COST)
        if self.results.find(**key) is None:
            self.bar.tell(self.task.name, f"{method.name}, cost")
            pairs = 5 if method.budget else 2
            ratios = self.bench.cost(method, setting, self.base, pairs)
            self.results.add({**key, "ratios": ratios})


class Bar:
    """The share of the work that is done, and the time left for the rest."""

    def __init__(self, args):
        _common.require("tqdm")
        from tqdm import tqdm

        total = sum(work(task, args.quick) for task in args.tasks_to_run)
        self._bar = tqdm(
            total=total,
            bar_format="{percentage:3.0f}% |{bar:20}| {elapsed} gone, "
            "{remaining} left{postfix}",
            file=sys.stderr,
        )

    def tell(self, task, method):
        self._bar.set_postfix_str(f"{task}: {method}")

    def advance(self, work):
        self._bar.update(work)

    def close(self):
        self._bar.close()


def work(task, quick):
    """Roughly the seconds of a task's runs that a `Study` makes."""
    settings = 2 if quick else 6
    methods = [_methods.plain(task.adam), *_methods.METHODS]
    runs = {m.name: m.cost * (settings + task.seeds) for m in methods}
    if task.name in STUDIED:
        for method in _methods.cheaper(1):
            runs[method.name] = method.cost * (settings + task.seeds)
        for method in _methods.ablations(1, 0, 0, [0]):
            runs[method.name] = method.cost * task.seeds
        sweep = sum(m.cost * len(m.settings) for m in _methods.SWEEP)
        runs["sweep"] = sweep * (1 if quick else 3)
    return task.weight * sum(runs.values())


if __name__ == "__main__":
    main()
