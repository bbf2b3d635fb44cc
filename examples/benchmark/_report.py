"""What the results file shows: tables, and accuracy against cost."""

import statistics

import _methods
import numpy as np
from scipy import stats

TUNING_SEED = 1000
COST = "cost"
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


def chosen(lines, task, method):
    """The setting with the best validation accuracy, or `None`."""
    tuned = [
        line
        for line in of_method(lines, task, method)
        if line["seed"] == TUNING_SEED
    ]
    if tuned:
        return max(tuned, key=lambda line: line["validation"])["setting"]
    # A method of one setting, or one that was not tuned.
    settings = [line["setting"] for line in of_method(lines, task, method)]
    return settings[0] if settings else None


def of_method(lines, task, method):
    return [
        line
        for line in lines
        if line["task"] == task and line["method"] == method
    ]


def finals(lines, task, method):
    """The runs to report, by seed: those at the chosen setting."""
    setting = chosen(lines, task, method)
    return {
        line["seed"]: line
        for line in of_method(lines, task, method)
        if line["setting"] == setting
        and line["seed"] not in (TUNING_SEED, COST)
    }


def cost(lines, task, method):
    """Median of the paired ratios to plain training, or `None`."""
    if method == _methods.PLAIN:
        return 1.0
    setting = chosen(lines, task, method)
    for line in of_method(lines, task, method):
        if line["seed"] == COST and line["setting"] == setting:
            return statistics.median(line["ratios"])
    return None


def mean_and_interval(values):
    """Mean and half of its 95% interval, by Student's t; nan for one value."""
    values = np.asarray(values, float)
    if len(values) < 2:
        return values.mean(), np.nan
    error = values.std(ddof=1) / np.sqrt(len(values))
    return values.mean(), stats.t.ppf(0.975, len(values) - 1) * error


def row(lines, task, method):
    """Cells of the table for one method."""
    runs = finals(lines, task, method)
    sam = finals(lines, task, _methods.SAM)
    paired = sorted(set(runs) & set(sam))
    differences = [runs[s]["test"] - sam[s]["test"] for s in paired]
    ratio = cost(lines, task, method)
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


def methods_of(lines, task):
    """Names of those with runs to report, in the order they were run."""
    names = dict.fromkeys(
        line["method"] for line in lines if line["task"] == task
    )
    return [name for name in names if finals(lines, task, name)]


def show(lines, tasks, picture):
    """Prints a table for each task, and draws accuracy against cost."""
    shown = [task.name for task in tasks if methods_of(lines, task.name)]
    for task in shown:
        rows = [row(lines, task, name) for name in methods_of(lines, task)]
        print(f"\n{task}\n\n{markdown(rows)}")
    if shown:
        draw(lines, shown, picture)


def markdown(rows):
    rule = ["---"] * len(HEADER)
    return "\n".join(
        f"| {' | '.join(cells)} |" for cells in (HEADER, rule, *rows)
    )


def draw(lines, tasks, picture):
    """Accuracy against cost, a panel for each task."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(3, len(tasks))
    rows = -(-len(tasks) // columns)
    figure, axes = plt.subplots(
        *(rows, columns),
        figsize=(4.6 * columns, 3.6 * rows),
        squeeze=False,
        layout="constrained",
    )
    for axis in axes.flat[len(tasks) :]:
        axis.axis("off")
    for axis, task in zip(axes.flat, tasks):
        draw_task(axis, lines, task)
    figure.savefig(picture, dpi=110)
    plt.close(figure)


def draw_task(axis, lines, task):
    main = [_methods.PLAIN, *(m.name for m in _methods.METHODS)]
    for name in methods_of(lines, task):
        ratio = cost(lines, task, name)
        if ratio is None:
            continue
        accuracies = [r["test"] for r in finals(lines, task, name).values()]
        mean, interval = mean_and_interval(accuracies)
        color = "tab:red" if name.startswith(_methods.LESAM) else "tab:blue"
        color = color if name in main else "tab:gray"
        axis.errorbar(
            *(ratio, 100 * mean, 100 * interval),
            fmt="o",
            color=color,
            elinewidth=1,
        )
        axis.annotate(
            *(name, (ratio, 100 * mean)),
            xytext=(5, 3),
            textcoords="offset points",
            fontsize=6.5,
        )
    axis.set_title(task, fontsize=10)
    axis.set_xlabel("cost (x plain training)")
    axis.set_ylabel("test accuracy, %")
    axis.margins(x=0.2)
