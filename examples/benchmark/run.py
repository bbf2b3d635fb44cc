"""Does sharpness-aware training generalise better, on real data, and which?

    python run.py                 about 85 minutes on two cores
    python run.py --quick         everything, too short to mean anything
    python run.py --cifar --data-dir ~/tensorflow_datasets
    python run.py --report        tables and pictures of the finished runs

Every method chooses among six settings by a validation split, which has no
picture of the test set: all six with one seed, the best three again with
another. Then it trains at the chosen setting with other seeds (initial
weights, order of the batches, split, wrong labels). The tables have means of
the test accuracy after the last epoch, their 95% intervals, and differences to
SAM seed by seed.

Runs are parallel, one process for each core, since such small nets gain
nothing from several cores; costs are measured at the end, one by one (with
`--quick` in parallel to the runs, where they mean nothing). Each finished run
is a line of the results file. A benchmark that was stopped resumes; delete
lines to repeat their runs.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import multiprocessing
import os
import pathlib
import sys
import threading

# The modules that all examples share are one folder up.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import _common
import _methods
import _report
import _results
import _study
import _tasks

HERE = pathlib.Path(__file__).parent


def main(argv=None):
    args = parse_args(argv)
    tasks = chosen_tasks(args)
    if not args.report:
        *phases, costs = _study.Study.PHASES
        bar = Bar(tasks, args)
        threads = max(1, os.cpu_count() // args.jobs)
        with processes(args.jobs, threads, args.quick) as pool:
            for phase in phases:
                run_phase(pool, phase, tasks, args, bar)
        # One by one: parallel runs would slow each other down.
        with processes(1, 1, args.quick) as pool:
            run_phase(pool, costs, tasks, args, bar)
        bar.close()
    results = _results.Results(args.results)
    _report.show(results, tasks, args.picture)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--tasks", nargs="+", metavar="WORD", help="names that contain it")
    add("--methods", nargs="+", metavar="NAME", help="these beside plain")
    add("--cifar", action="store_true", help="the CIFAR-10 task, and no other")
    add("--data-dir", help="where TensorFlow Datasets has CIFAR-10")
    add("--results", type=pathlib.Path, help="the file of finished runs")
    add("--picture", type=pathlib.Path, help="where to draw the picture")
    add("--report", action="store_true", help="do not train")
    add("--quick", action="store_true", help="200 pictures, two epochs")
    add("--jobs", type=int, default=os.cpu_count(), help="parallel runs")
    args = parser.parse_args(argv)
    name = "quick" if args.quick else "cifar" if args.cifar else "results"
    args.results = args.results or HERE / f"{name}.jsonl"
    args.picture = args.picture or HERE / f"{name}.png"
    return args


def chosen_tasks(args):
    tasks = _tasks.TASKS
    if args.cifar:
        tasks = _tasks.cifar_tasks(args.data_dir)
    if args.tasks:
        tasks = [t for t in tasks if any(w in t.name for w in args.tasks)]
    if args.quick:
        short = {"train": 200, "epochs": 2, "seeds": 2}
        tasks = [dataclasses.replace(t, **short) for t in tasks]
    return tasks


def chosen_units(phase, tasks, args):
    """List pairs of the name of a task and of a unit."""
    return [
        (task.name, name)
        for task in tasks
        for name in _study.units(task, phase)
        if name == _methods.PLAIN or not args.methods or name in args.methods
    ]


def processes(count, threads, quick):
    """Make an executor of `count` processes of `threads` threads each."""
    return concurrent.futures.ProcessPoolExecutor(
        count,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=prepare,
        initargs=(threads, quick),
    )


def run_phase(pool, phase, tasks, args, bar):
    """Do the runs of a phase, each unit in one of the processes."""
    waiting = {
        pool.submit(run_unit, args, phase, *unit)
        for unit in chosen_units(phase, tasks, args)
    }
    try:
        while waiting:
            done, waiting = concurrent.futures.wait(waiting, timeout=1)
            for future in done:
                future.result()
            bar.update(phase)
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise


def prepare(threads, quick):
    """Limit the threads of a new process, and end it with its parent."""
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(threads)
    if quick:
        # Optimizing a graph takes longer than it saves in a few steps.
        tf.config.optimizer.set_experimental_options(
            {"disable_meta_optimizer": True}
        )
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)


def run_unit(args, phase, task, name):
    study = study_of(task, args)
    study.results.read()
    study.run(phase, name)


class Latest:
    """The current study of this process, the only one: graphs are large."""

    name = study = None


def study_of(name, args):
    if Latest.name != name:
        task = next(t for t in chosen_tasks(args) if t.name == name)
        results = _results.Results(args.results)
        Latest.study = _study.Study(task, results, args.quick)
        Latest.name = name
    return Latest.study


class Bar:
    """A bar of the work that is done, and the time left for the rest."""

    def __init__(self, tasks, args):
        _common.require("tqdm")
        from tqdm import tqdm

        self.args, self.tasks = args, {task.name: task for task in tasks}
        done = self._done()
        self._bar = tqdm(
            total=max(done, sum(work(task, args) for task in tasks)),
            initial=done,
            bar_format="{percentage:3.0f}% |{bar:20}| {elapsed} gone, "
            "{remaining} left{postfix}",
            file=sys.stderr,
        )

    def _done(self):
        """Estimate the seconds of the finished runs."""
        return sum(
            self.tasks[line["task"]].weight * relative_cost(line["method"])
            for line in _results.Results(self.args.results).lines
            if line["task"] in self.tasks and "test" in line
        )

    def update(self, phase):
        done = self._done()
        # More than planned if runs of another learning rate are there.
        self._bar.total = max(self._bar.total, done)
        self._bar.n = done
        self._bar.set_postfix_str(phase)
        self._bar.refresh()

    def close(self):
        self._bar.close()


def work(task, args):
    """Estimate the seconds of all runs of a task."""
    runs = 0.0
    for phase in ("plain", "methods", "studies"):
        for _, name in chosen_units(phase, [task], args):
            runs += relative_cost(name) * runs_of(name, task, args.quick)
    return task.weight * runs


def runs_of(name, task, quick):
    if name.startswith(_study.SWEEP):
        return 2 if quick else 3 * 7
    single = [*_methods.ablations(1, 0, 0, [0]), *_methods.tail()]
    if name in [m.name for m in single]:
        return task.seeds
    tuning = 0 if quick else 6 + _results.FINALISTS
    return tuning + task.seeds


@functools.cache
def relative_cost(name):
    """Return the rough cost of a step of a method, in plain steps."""
    name = name.removeprefix(_study.SWEEP)
    methods = _report.all_methods()
    return next(m.cost for m in methods if m.name == name)


if __name__ == "__main__":
    main()
