"""The pictures of the benchmark."""

import _methods
import numpy as np

# How far a panel goes: beyond it a difference is an arrow.
LIMITS = (-12.0, 11.0)
COLORS = {
    _methods.SAM: "tab:blue",
    _methods.LESAM: "tab:orange",
    _methods.RELATIVE: "tab:pink",
    _methods.LIMITED: "tab:red",
}
LABELS = {
    _methods.SAM: "SAM: rho (0.05)",
    _methods.LESAM: "LE-SAM, the paper's budget: sigma (0.1)",
    _methods.RELATIVE: "LE-SAM, relative budget: share (0.3)",
    _methods.LIMITED: "LE-SAM, relative budget, limited: share (0.1)",
}


def draw_differences(by_task, path):
    """Draw the paired differences to SAM: a panel a task, a row a method.

    Args:
        by_task: Dict from the name of a task to a list of dicts with "name",
            "mean" and "interval" in points, "cost" or `None`, "died", "runs".
        path: `pathlib.Path` of the picture.
    """
    plt = _pyplot()
    names = list(dict.fromkeys(m["name"] for f in by_task.values() for m in f))
    columns = min(4, len(by_task))
    rows = -(-len(by_task) // columns)
    figure, axes = plt.subplots(
        *(rows, columns),
        figsize=(1.8 + 1.9 * columns, 0.5 + rows * (0.7 + 0.23 * len(names))),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis in axes.flat[len(by_task) :]:
        axis.axis("off")
    for axis, (task, found) in zip(axes.flat, by_task.items()):
        _draw_forest(axis, found, names)
        axis.set_title(task.replace(", ", ",\n", 1), fontsize=9)
    axes[0, 0].set_yticks(range(len(names)), names, fontsize=9)
    axes[0, 0].set_ylim(len(names) - 0.4, -0.6)
    figure.supxlabel(
        "test accuracy after the last epoch: points above tuned SAM, seed by "
        "seed,\nmean and 95% interval; right of it the cost in plain steps",
        fontsize=9,
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_forest(axis, found, names):
    low, high = LIMITS
    axis.axvline(0, color="tab:blue", lw=1, alpha=0.6)
    for method in found:
        y, mean = names.index(method["name"]), method["mean"]
        is_ours = method["name"] in (_methods.UNTUNED, _methods.STRONG)
        color = "tab:red" if is_ours else "0.25"
        if np.isfinite(mean) and mean < low:
            axis.annotate(
                f"{mean:.0f}",
                *((low + 0.3, y), (low + 3.5, y)),
                arrowprops={"arrowstyle": "->", "color": color},
                **{"va": "center", "fontsize": 8, "color": color},
            )
        elif np.isfinite(mean):
            interval = np.nan_to_num(method["interval"])
            axis.errorbar(
                *(mean, y),
                xerr=interval,
                fmt="D" if is_ours else "o",
                ms=4.5,
                lw=1.2,
                color=color,
            )
        if method["died"]:
            axis.text(
                *(
                    low + 0.4,
                    y - 0.42,
                    f"{method['died']}/{method['runs']} died",
                ),
                **{"fontsize": 7, "color": "tab:purple", "va": "center"},
            )
        if method["cost"] is not None:
            axis.text(
                *(high + 4.6, y, f"{method['cost']:.1f}x"),
                **{"fontsize": 7.5, "color": "0.4", "ha": "right"},
                va="center",
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
            )
    axis.set_xlim(low, high + 5)
    axis.set_xticks([-10, -5, 0, 5, 10])
    axis.tick_params(axis="x", labelsize=8)
    axis.grid(axis="both", alpha=0.25)


def draw_sweeps(curves, plain, path):
    """Draw accuracy against each method's number, in units of its default.

    Args:
        curves: Dict from a task to a dict from a method to pairs of a value
            and the accuracies with it.
        plain: Dict from a task to plain training's mean accuracy.
        path: `pathlib.Path` of the picture.
    """
    plt = _pyplot()
    columns = min(3, len(curves))
    rows = -(-len(curves) // columns)
    figure, axes = plt.subplots(
        *(rows, columns),
        figsize=(3.0 * columns, 2.5 * rows + 0.8),
        squeeze=False,
        layout="constrained",
    )
    for axis in axes.flat[len(curves) :]:
        axis.axis("off")
    for axis, (task, by_method) in zip(axes.flat, curves.items()):
        _draw_sweep(axis, by_method, plain[task])
        axis.set_title(task, fontsize=10)
    for axis in axes[:, 0]:
        axis.set_ylabel("test accuracy, %")
    found = {}
    for axis in axes.flat:
        found.update(zip(*reversed(axis.get_legend_handles_labels())))
    figure.legend(
        *(found.values(), found.keys()),
        loc="outside lower center",
        ncols=2 if columns > 1 else 1,
        fontsize=9,
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_sweep(axis, by_method, plain):
    for name, pairs in by_method.items():
        if not pairs:
            continue
        values, accuracies = zip(*pairs)
        factors = np.array(values) / _methods.DEFAULTS[name]
        accuracies = 100 * np.array(accuracies)
        color = COLORS[name]
        axis.plot(
            *(factors, accuracies.mean(1), "o-"),
            **{"color": color, "ms": 4, "label": LABELS[name]},
        )
        span = accuracies.min(1), accuracies.max(1)
        axis.fill_between(factors, *span, color=color, alpha=0.13, lw=0)
    axis.axhline(100 * plain, color="gray", ls="--", label="plain")
    axis.axvspan(1 / 3, 3, color="0.5", alpha=0.1, lw=0)
    axis.set_xscale("log")
    axis.set_xlabel("value / default", fontsize=9)
    axis.grid(alpha=0.3)


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
