"""Tables and pictures of the results file."""

import statistics

import _methods
import numpy as np
from scipy import stats

HEADER = (
    "method",
    "setting",
    "test accuracy",
    "against SAM",
    "cost",
    "eigenvalue",
    "rise",
    "died",
)
# In the sweep, a setting is good if its accuracy is within this of the best.
NEAR = 0.03


def show(results, tasks, picture):
    """Print a table for each task, and draw the pictures.

    Args:
        results: A `_results.Results`.
        tasks: List of `_tasks.Task`.
        picture: `pathlib.Path` of the picture of accuracy against cost; the
            picture of the sweep is saved beside it.
    """
    shown = [t.name for t in tasks if methods_of(results, t.name)]
    print(f"\n{summary(results, shown)}")
    cheaper = [t for t in shown if gains(results, t)]
    if cheaper:
        print(f"\n{gain_table(results, cheaper)}")
    for task in shown:
        rows = [row(results, task, name) for name in methods_of(results, task)]
        print(f"\n{task}\n\n{markdown(HEADER, rows)}")
    swept = [t for t in shown if sweep(results, t, _methods.LESAM)]
    if swept:
        print(f"\n{sweep_table(results, swept)}")
        beside = picture.with_name(f"{picture.stem}_sweep{picture.suffix}")
        draw(results, swept, beside, draw_sweep)
    if shown:
        draw(results, shown, picture, draw_costs)


def all_methods():
    """List all methods, in the order of the tables."""
    return [
        _methods.plain(adam=False),
        *_methods.METHODS,
        *_methods.cheaper(1),
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


def summary(results, tasks):
    """Make the table of the test accuracies of all tasks."""
    names = [_methods.PLAIN, *(method.name for method in _methods.METHODS)]
    rows = []
    for name in names:
        cells = [name]
        for task in tasks:
            runs = results.finals(task, name).values()
            cells.append(percent([r["test"] for r in runs]) if runs else "-")
        rows.append(cells)
    return markdown(["", *tasks], rows)


def gains(results, task):
    """Compute the fraction of LE-SAM's gain of each cheaper way, by name.

    For each seed: its gain over the mean of plain, divided by the mean gain.
    """
    names = (_methods.PLAIN, _methods.LESAM)
    plain, lesam = (accuracies(results, task, name) for name in names)
    found = {}
    for name in (_methods.LESAM, *(m.name for m in _methods.cheaper(1))):
        cheaper = accuracies(results, task, name)
        if plain and lesam and cheaper:
            mean = statistics.mean(plain)
            gain = statistics.mean(lesam) - mean
            found[name] = [(test - mean) / gain for test in cheaper]
    return found if len(found) > 1 else {}


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
            ratio = results.cost(task, name)
            cost = "" if ratio is None else f" at {ratio:.2f}x"
            share, interval = mean_and_interval(found[name])
            cells.append(f"{100 * share:.0f} ± {100 * interval:.0f}%{cost}")
        rows.append(cells)
    return markdown(["share of LE-SAM's gain", *tasks], rows)


def row(results, task, method):
    """Make the cells of the table for one method."""
    runs = results.finals(task, method)
    sam = results.finals(task, _methods.SAM)
    paired = sorted(set(runs) & set(sam))
    differences = [runs[s]["test"] - sam[s]["test"] for s in paired]
    ratio = results.cost(task, method)
    values = list(runs.values())
    eigenvalues = [r["eigenvalue"] for r in values if "eigenvalue" in r]
    setting = ", ".join(f"{v:g}" for v in values[0]["setting"].values())
    itself = method == _methods.SAM or not differences
    return [
        method,
        setting,
        percent([r["test"] for r in values]),
        "-" if itself else percent(differences, sign="+"),
        "-" if ratio is None else f"{ratio:.2f}",
        f"{statistics.mean(eigenvalues):.2f}" if eigenvalues else "-",
        f"{statistics.mean(r['rise'] for r in values):.3f}",
        f"{sum(r['died'] for r in values)}/{len(values)}",
    ]


def percent(values, sign=""):
    mean, interval = mean_and_interval(values)
    return f"{100 * mean:{sign}.1f} ± {100 * interval:.1f}"


def markdown(header, rows):
    rule = ["---"] * len(header)
    return "\n".join(
        f"| {' | '.join(cells)} |" for cells in (header, rule, *rows)
    )


def sweep(results, task, method):
    """List pairs of a radius or budget and the test accuracies with it."""
    budget = {m.name: m.budget for m in _methods.METHODS}[method]
    found = []
    for value in _methods.SWEEP:
        # The same seeds for all, though the chosen one may have more.
        runs = results.at(task, method, {budget: value})
        accuracies = [r["test"] for seed, r in runs.items() if seed < 3]
        if accuracies:
            found.append((value, accuracies))
    return found if len(found) > 1 else []


def sweep_table(results, tasks):
    """Make the table of the sweep: means, and how many settings are good."""
    header = ["sweep", "", *(f"{value:g}" for value in _methods.SWEEP)]
    rows = []
    for task in tasks:
        names = [_methods.SAM, _methods.LESAM]
        found = {name: dict(sweep(results, task, name)) for name in names}
        means = {
            name: {v: statistics.mean(a) for v, a in by_value.items()}
            for name, by_value in found.items()
        }
        best = max(max(by_value.values()) for by_value in means.values())
        for name, by_value in means.items():
            good = sum(m > best - NEAR for m in by_value.values())
            rows.append(
                [
                    f"{task}: {name}",
                    f"{good} of {len(by_value)} good",
                    *(
                        f"{100 * by_value[v]:.1f}" if v in by_value else "-"
                        for v in _methods.SWEEP
                    ),
                ]
            )
    return markdown(header, rows)


def draw(results, tasks, picture, draw_task):
    """Draw a panel for each task, and one legend for all."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(3, len(tasks))
    rows = -(-len(tasks) // columns)
    figure, axes = plt.subplots(
        *(rows, columns),
        figsize=(4.4 * columns, 3.7 * rows + 1.2),
        squeeze=False,
        layout="constrained",
    )
    for axis in axes.flat[len(tasks) :]:
        axis.axis("off")
    handles = {}
    for axis, task in zip(axes.flat, tasks):
        draw_task(axis, results, task)
        axis.set_title(task, fontsize=10)
        axis.set_ylabel("test accuracy, %")
        handles.update(zip(*reversed(axis.get_legend_handles_labels())))
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=min(5, len(handles)),
        fontsize=8.5,
    )
    figure.savefig(picture, dpi=110)
    plt.close(figure)


def styles():
    """Choose marker and color of each method; ten colors to a marker."""
    from matplotlib import colormaps

    groups = [
        ([_methods.PLAIN], "X"),
        ([m.name for m in _methods.METHODS if "LE-SAM" not in m.name], "o"),
        ([m.name for m in _methods.METHODS if "LE-SAM" in m.name], "D"),
        ([m.name for m in _methods.cheaper(1)], "v^"),
        ([m.name for m in _methods.start()], "P"),
    ]
    colors = colormaps["tab10"].colors
    return {
        name: {
            "marker": markers[i // len(colors)],
            "color": colors[i % len(colors)],
        }
        for names, markers in groups
        for i, name in enumerate(names)
    }


def draw_costs(axis, results, task):
    """Draw accuracy against cost, without methods that mostly died."""
    shown = styles()
    lowest = []
    for name in methods_of(results, task):
        ratio = results.cost(task, name)
        runs = results.finals(task, name).values()
        died = statistics.mean(r["died"] for r in runs)
        if ratio is None or name not in shown or died > 0.5:
            continue
        mean, interval = mean_and_interval([r["test"] for r in runs])
        axis.errorbar(
            *(ratio, 100 * mean, 100 * interval),
            **shown[name],
            label=name,
            linestyle="none",
            markersize=6.5,
            elinewidth=0.8,
        )
        lowest.append(100 * (mean - (0 if died else interval)))
    if lowest:
        axis.set_ylim(min(lowest) - 2, min(axis.get_ylim()[1], 101))
    axis.set_xlabel("cost (x plain training)")
    axis.grid(alpha=0.3)


def draw_sweep(axis, results, task):
    """Draw accuracy against radius and budget, and the range of the seeds."""
    for name, color in [
        (_methods.SAM, "tab:blue"),
        (_methods.LESAM, "tab:red"),
    ]:
        values, accuracies = zip(*sweep(results, task, name))
        accuracies = 100 * np.array(accuracies)
        label = "SAM, by rho" if name == _methods.SAM else "LE-SAM, by sigma"
        axis.plot(values, accuracies.mean(1), "o-", color=color, label=label)
        span = accuracies.min(1), accuracies.max(1)
        axis.fill_between(values, *span, color=color, alpha=0.15)
    plain = [r["test"] for r in results.finals(task, _methods.PLAIN).values()]
    axis.axhline(
        100 * statistics.mean(plain), color="gray", ls="--", label="plain"
    )
    axis.set_xscale("log")
    axis.set_xlabel("rho (weight-space distance) or sigma (loss)")
    axis.grid(alpha=0.3)
