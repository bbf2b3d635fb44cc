"""All runs of one task, in units that can run in parallel."""

import _methods
import _results
import _runs

# Number of seeds for which the top eigenvalue is measured.
CURVATURE_SEEDS = 3
# A cost is the median of this number of pairs of blocks.
PAIRS = 3
SWEEP = "sweep: "


class Study:
    """The runs of a task; those in the results already are skipped.

    A unit is all runs of one method. Units of one phase are independent of
    each other; they need those of the phases before.

    Args:
        task: A `_tasks.Task`.
        results: A `_results.Results`.
        quick: Whether to use the first setting only, and to tune with one
            run of plain training only.
    """

    PHASES = ("plain", "methods", "studies", "costs")

    def __init__(self, task, results, quick=False):
        self.task, self.results, self.quick = task, results, quick
        self.bench = _runs.Bench(task)

    def units(self, phase):
        """List the names of the units of a phase."""
        return list(units(self.task, phase))

    def run(self, phase, name):
        """Do the runs of a unit; if quick, measure its cost at once."""
        if phase == "costs":
            self.time(self.method(name))
        elif name.startswith(SWEEP):
            self.sweep(self.method(name.removeprefix(SWEEP)))
        else:
            self.compare(self.method(name))
            if self.quick and name in units(self.task, "costs"):
                self.time(self.method(name))

    def method(self, name):
        for method in self._all_methods():
            if method.name == name:
                return method
        raise KeyError(name)

    def _all_methods(self):
        yield _methods.plain(self.task.adam)
        yield from _methods.METHODS
        steps = self.bench.steps * self.task.epochs
        yield from _methods.cheaper(steps)
        yield from _methods.weaker()
        yield from _methods.forms()
        yield from _methods.tail()
        yield from _methods.start()
        sigma, rho = (
            (self.results.chosen(self.task.name, name) or {}).get(budget, 0)
            for name, budget in [
                (_methods.LESAM, "sigma"),
                (_methods.SAM, "rho"),
            ]
        )
        yield from _methods.ablations(steps, sigma, rho, self.mean_rhos())

    def mean_rhos(self):
        """List LE-SAM's mean radius in each epoch, over the seeds."""
        runs = self.results.finals(self.task.name, _methods.LESAM).values()
        rhos = [sum(r) / len(r) for r in zip(*(line["rho"] for line in runs))]
        return rhos or [0.0]

    def compare(self, method):
        """Choose a setting and train with all seeds."""
        settings = method.settings
        if self.task.fixed:
            settings = [self.task.fixed[method.name]]
        if self.quick and method.name != _methods.PLAIN:
            settings = settings[:1]
        if len(settings) > 1:
            self.tune(method, settings)
            settings = [self.results.chosen(self.task.name, method.name)]
        # In a short training, eigenvalues would take most of the time.
        close = (
            int(method.name == _methods.PLAIN)
            if self.quick
            else CURVATURE_SEEDS
        )
        for seed in range(self.task.seeds):
            self.train(method, settings[0], seed, seed < close)

    def tune(self, method, settings):
        first, second = _results.TUNING_SEEDS
        for setting in settings[:1] if self.quick else settings:
            self.train(method, setting, first)
        if not self.quick:
            task = self.task.name
            for setting in self.results.finalists(task, method.name):
                self.train(method, setting, second)

    def sweep(self, method):
        budgets = _methods.SWEEP[method.name]
        for budget in budgets[:2] if self.quick else budgets:
            for seed in range(1 if self.quick else 3):
                setting = {method.budget: budget}
                self.train(method, setting, seed, sweep=True)

    def train(self, method, setting, seed, curvature=False, sweep=False):
        """Train and add the line of a run, unless it is there already."""
        key = self.key(method, setting, seed)
        if self.results.find(**key) is None:
            base = key.get("base", setting)
            closely = (
                seed in range(self.task.seeds)
                and not sweep
                and not self.task.fixed
            )
            found = self.bench.run(
                method, setting, base, seed, closely, curvature
            )
            self.results.add({**key, **found})

    def time(self, method):
        of_net = {"method": method.name, "net": self.task.net}
        if self.results.find(**of_net, seed=_results.COST) is None:
            setting = self.results.chosen(self.task.name, method.name)
            key = self.key(method, setting, _results.COST)
            pairs = 1 if self.quick else PAIRS
            ratios = self.bench.cost(method, setting, key["base"], pairs)
            self.results.add({**key, **of_net, "ratios": ratios})

    def key(self, method, setting, seed):
        key = {
            "task": self.task.name,
            "method": method.name,
            "setting": setting,
            "seed": seed,
        }
        if method.name != _methods.PLAIN:
            key["base"] = self.results.chosen(self.task.name, _methods.PLAIN)
        return key


def units(task, phase):
    """List the names of the units of a phase of a task."""
    compared = [method.name for method in _methods.METHODS]
    if task.fixed:
        compared = [name for name in task.fixed if name != _methods.PLAIN]
    studies = {
        "cheaper": [m.name for m in _methods.cheaper(1)],
        "forms": [m.name for m in _methods.forms()],
        "tail": [m.name for m in _methods.tail()],
        "start": [m.name for m in _methods.start()],
        "ablations": [m.name for m in _methods.ablations(1, 0, 0, [0])],
        "sweep": [SWEEP + name for name in _methods.SWEEP],
    }
    studied = () if task.fixed else ("sweep", *task.studies)
    chosen = [name for study in studied for name in studies[study]]
    if phase == "plain":
        return [_methods.PLAIN]
    if phase == "methods":
        return compared
    if phase == "studies":
        return chosen
    timed = [s for s in ("cheaper", "start") if s in task.studies]
    return compared + [name for study in timed for name in studies[study]]
