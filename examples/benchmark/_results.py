"""The file of finished runs, and the settings chosen by them."""

import collections
import json
import statistics

import _methods

# All settings are tried with the first, the finalists again with the second.
TUNING_SEEDS = (1000, 1001)
FINALISTS = 3
# Stands for the seed in lines that hold the cost of a method.
COST = "cost"


class Results:
    """Lines of a file, one for each finished run, and queries of them.

    All queries are about the runs with the learning rate and weight decay that
    plain training has chosen for the task.

    Args:
        path: `pathlib.Path` of the file; it need not exist.

    Attributes:
        lines: List of dicts.
    """

    def __init__(self, path):
        self.path = path
        self.lines = []
        self._end_the_last_line()
        self.read()

    def _end_the_last_line(self):
        """End the last line, which is cut if the benchmark was killed."""
        if self.path.exists():
            text = self.path.read_text()
            if text and not text.endswith("\n"):
                with self.path.open("a") as file:
                    file.write("\n")

    def read(self):
        """Read the file again."""
        self.lines.clear()
        text = self.path.read_text() if self.path.exists() else ""
        for line in text.splitlines():
            # A cut line is ignored, and its run repeated.
            try:
                self.lines.append(json.loads(line))
            except json.JSONDecodeError:
                continue

    def add(self, line):
        """Append a line in one write, since several processes append."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.lines.append(line)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def find(self, **key):
        """Return the line with these entries, or `None`."""
        for line in self.lines:
            if all(line.get(k) == v for k, v in key.items()):
                return line
        return None

    def of_method(self, task, method):
        """List the lines of a method on a task."""
        found = [
            line
            for line in self.lines
            if line["task"] == task and line["method"] == method
        ]
        if method == _methods.PLAIN:
            return found
        base = self.chosen(task, _methods.PLAIN)
        return [line for line in found if line["base"] == base]

    def validation(self, task, method):
        """List pairs of a setting and its validation accuracies in tuning."""
        settings = {}
        accuracies = collections.defaultdict(list)
        for line in self.of_method(task, method):
            if line["seed"] in TUNING_SEEDS:
                key = json.dumps(line["setting"])
                settings[key] = line["setting"]
                accuracies[key].append(line["validation"])
        return [(settings[key], accuracies[key]) for key in settings]

    def finalists(self, task, method):
        """List the settings that were best with the first tuning seed."""
        tried = self.validation(task, method)
        tried.sort(key=lambda pair: pair[1][0], reverse=True)
        return [setting for setting, _ in tried[:FINALISTS]]

    def chosen(self, task, method):
        """Return the finalist of the best validation accuracy, or `None`."""
        tried = self.validation(task, method)
        if tried:
            rounds = max(len(accuracies) for _, accuracies in tried)
            finalists = [pair for pair in tried if len(pair[1]) == rounds]
            best = max(finalists, key=lambda pair: statistics.mean(pair[1]))
            return best[0]
        # A method of one setting.
        settings = [line["setting"] for line in self.of_method(task, method)]
        return settings[0] if settings else None

    def finals(self, task, method):
        """Return the runs to report, by seed: those at the chosen setting."""
        return self.at(task, method, self.chosen(task, method))

    def at(self, task, method, setting):
        """Return the runs at a setting, by seed, without those of tuning."""
        return {
            line["seed"]: line
            for line in self.of_method(task, method)
            if line["setting"] == setting
            and line["seed"] not in (*TUNING_SEEDS, COST)
        }

    def cost(self, task, method):
        """Return the median of the ratios to plain training, or `None`.

        Of the task's net, whatever it was trained on.
        """
        if method == _methods.PLAIN:
            return 1.0
        net = task.split(", ")[-1]
        line = self.find(method=method, net=net, seed=COST)
        return None if line is None else statistics.median(line["ratios"])
