"""Tables of the results file; the pictures are in `_drawings`."""

import statistics

import _drawings
import _methods
import numpy as np
from scipy import stats

HEADER = (
    "method",
    "setting",
    "test accuracy",
    "against SAM",
    "at the best epoch",
    "cost",
    "eigenvalue",
    "rise",
    "died",
)
# The settings that a sweep is judged by are within this factor of the default.
FACTOR = 3.01


def show(results, tasks, picture):
    """Print all tables, and draw the pictures.

    Args:
        results: A `_results.Results`.
        tasks: List of `_tasks.Task`.
        picture: `pathlib.Path` of the picture of the differences to SAM; the
            picture of the sweep is saved beside it.
    """
    shown = [t.name for t in tasks if methods_of(results, t.name)]
    print(f"\nAfter the last epoch\n\n{summary(results, shown)}")
    print(f"\nAt the best epoch\n\n{summary(results, shown, 'best_test')}")
    cheaper = [t for t in shown if gains(results, t)]
    if cheaper:
        print(f"\n{gain_table(results, cheaper)}")
    for task in shown:
        rows = [row(results, task, name) for name in methods_of(results, task)]
        print(f"\n{task}\n\n{markdown(HEADER, rows)}")
        by_class = class_rows(results, task)
        if by_class:
            print(f"\n{markdown(['of class', *'0123456789'], by_class)}")
    swept = [t for t in shown if sweep(results, t, _methods.RELATIVE)]
    if swept:
        print(f"\n{sweep_table(results, swept)}")
        beside = picture.with_name(f"{picture.stem}_sweep{picture.suffix}")
        curves = {
            task: {m: sweep(results, task, m) for m in _methods.SWEEP}
            for task in swept
        }
        _drawings.draw_sweeps(curves, plain_means(results, swept), beside)
    if shown:
        _drawings.draw_differences(
            {t: forest(results, t) for t in shown}, picture
        )


def all_methods():
    """List all methods, in the order of the tables."""
    return [
        _methods.plain(adam=False),
        *_methods.METHODS,
        *_methods.cheaper(1),
        *_methods.weaker(),
        *_methods.forms(),
        *_methods.tail(),
        *_methods.start(),
        *_methods.ablations(1, 0, 0, [0]),
    ]


def methods_of(results, task):
    """List the names of the methods with runs to report."""
    names = [method.name for method in all_methods()]
    return [name for name in names if results.finals(task, name)]


def mean_and_interval(values):
    """Return the mean and half its 95% interval by Student's t, or nan."""
    values = np.asarray(values, float)
    if len(values) < 2:
        return values.mean(), np.nan
    error = values.std(ddof=1) / np.sqrt(len(values))
    return values.mean(), stats.t.ppf(0.975, len(values) - 1) * error


def summary(results, tasks, which="test"):
    """Make the table of the test accuracies of all tasks.

    Args:
        results: A `_results.Results`.
        tasks: Names of the tasks.
        which: "test", or "best_test" at the epoch of the best validation
            accuracy.
    """
    names = [_methods.PLAIN, *(method.name for method in _methods.METHODS)]
    rows = []
    for name in names:
        cells = [name]
        for task in tasks:
            runs = results.finals(task, name).values()
            runs = [run for run in runs if which in run]
            cells.append(accuracy_text(runs, which) if runs else "-")
        rows.append(cells)
    return markdown(["", *tasks], rows)


def accuracy_text(runs, which="test"):
    """Write the mean accuracy of the runs that did not die, and the deaths.

    At its best epoch a run may have lived.
    """
    runs = list(runs)
    dead = [run for run in runs if which == "test" and run["died"]]
    alive = [run[which] for run in runs if run not in dead]
    text = percent(alive) if alive else ""
    if dead:
        text = f"{len(dead)}/{len(runs)} died" + (f", else {text}" * bool(text))
    return text


def gains(results, task):
    """Compute the fraction of LE-SAM's gain of each cheaper way, by name.

    For each seed: its gain over the mean of plain, divided by the mean gain.
    """
    names = (_methods.PLAIN, _methods.LESAM)
    plain, lesam = (accuracies(results, task, name) for name in names)
    found = {}
    first = (
        _methods.LESAM,
        _methods.UNTUNED,
        _methods.STRONG,
        _methods.LIMITED,
    )
    for name in (*first, *(m.name for m in _methods.cheaper(1))):
        cheaper = accuracies(results, task, name)
        if plain and lesam and cheaper:
            mean = statistics.mean(plain)
            gain = statistics.mean(lesam) - mean
            found[name] = [(test - mean) / gain for test in cheaper]
    return found if len(found) > len(first) else {}


def accuracies(results, task, name):
    """List the test accuracies of all seeds."""
    return [line["test"] for line in results.finals(task, name).values()]


def gain_table(results, tasks):
    """Make the table of the fractions of the gain, and costs."""
    by_task = {task: gains(results, task) for task in tasks}
    rows = []
    for name in dict.fromkeys(n for found in by_task.values() for n in found):
        cells = [name]
        for task, found in by_task.items():
            if name not in found:
                cells.append("-")
                continue
            ratio = results.cost(task, name)
            cost = "" if ratio is None else f" at {ratio:.2f}x"
            share, interval = mean_and_interval(found[name])
            cells.append(f"{100 * share:.0f} ± {100 * interval:.0f}%{cost}")
        rows.append(cells)
    return markdown(["share of LE-SAM's gain", *tasks], rows)


def row(results, task, method):
    """Make the cells of the table for one method."""
    runs = results.finals(task, method)
    differences = differences_to_sam(results, task, method)
    ratio = results.cost(task, method)
    values = list(runs.values())
    eigenvalues = [r["eigenvalue"] for r in values if "eigenvalue" in r]
    setting = ", ".join(f"{v:g}" for v in values[0]["setting"].values())
    best = [r for r in values if "best_test" in r]
    itself = method == _methods.SAM or not differences
    return [
        method,
        setting,
        accuracy_text(values),
        "-" if itself else percent(differences, sign="+"),
        accuracy_text(best, "best_test") if best else "-",
        "-" if ratio is None else f"{ratio:.2f}",
        f"{statistics.mean(eigenvalues):.2f}" if eigenvalues else "-",
        f"{statistics.mean(r['rise'] for r in values):.3f}",
        f"{sum(r['died'] for r in values)}/{len(values)}",
    ]


def differences_to_sam(results, task, method):
    """List the differences of test accuracies, seed by seed.

    Without the seeds of which one of the two died.
    """
    runs = results.finals(task, method)
    sam = results.finals(task, _methods.SAM)
    return [
        runs[seed]["test"] - sam[seed]["test"]
        for seed in sorted(set(runs) & set(sam))
        if not (runs[seed]["died"] or sam[seed]["died"])
    ]


def forest(results, task):
    """List what the picture shows of each method: a dict for each."""
    found = []
    methods = [*_methods.METHODS, *_methods.weaker()]
    for name in (_methods.PLAIN, *(m.name for m in methods)):
        runs = results.finals(task, name).values()
        if runs:
            differences = differences_to_sam(results, task, name)
            mean, interval = np.nan, np.nan
            if differences:
                mean, interval = mean_and_interval(differences)
            found.append(
                {
                    "name": name,
                    "mean": 100 * mean,
                    "interval": 100 * interval,
                    "cost": results.cost(task, name),
                    "died": sum(run["died"] for run in runs),
                    "runs": len(runs),
                }
            )
    return found


def class_rows(results, task):
    """Make the rows of the mean accuracies of each class, where known."""
    rows = []
    for name in methods_of(results, task):
        runs = results.finals(task, name).values()
        found = [run["by_class"] for run in runs if "by_class" in run]
        if found:
            means = np.mean(found, axis=0)
            rows.append([name, *(f"{100 * mean:.0f}" for mean in means)])
    return rows


def plain_means(results, tasks):
    """Compute plain training's mean test accuracy on each task."""
    return {
        task: statistics.mean(accuracies(results, task, _methods.PLAIN))
        for task in tasks
    }


def percent(values, sign=""):
    mean, interval = mean_and_interval(values)
    return f"{100 * mean:{sign}.1f} ± {100 * interval:.1f}"


def markdown(header, rows):
    rule = ["---"] * len(header)
    return "\n".join(
        f"| {' | '.join(cells)} |" for cells in (header, rule, *rows)
    )


def sweep(results, task, method):
    """List pairs of a value of the method and the test accuracies with it."""
    budget = {m.name: m.budget for m in _methods.METHODS}[method]
    found = []
    for value in _methods.SWEEP[method]:
        # The same seeds for all, though the chosen one may have more.
        runs = results.at(task, method, {budget: value})
        accuracies = [r["test"] for seed, r in runs.items() if seed < 3]
        if accuracies:
            found.append((value, accuracies))
    return found if len(found) > 1 else []


def sweep_table(results, tasks):
    """Make the table of the sweep: means, and how bad a near value can be."""
    rows = []
    for task in tasks:
        for name, default in _methods.DEFAULTS.items():
            means = {
                v: 100 * statistics.mean(a)
                for v, a in sweep(results, task, name)
            }
            if not means:
                continue
            near = [
                mean
                for value, mean in means.items()
                if default / FACTOR <= value <= default * FACTOR
            ]
            texts = [f"{mean:.1f} ({value:g})" for value, mean in means.items()]
            lost = max(means.values()) - min(near)
            rows.append([f"{task}: {name}", f"{lost:.1f}", *texts])
    count = max(len(row) for row in rows) - 2
    header = ["sweep", "lost within a factor of 3", *[""] * count]
    return markdown(header, rows)
