"""Does what Keras tests of its models hold for wrapped ones?

    python tools/keras_tests.py
    python tools/keras_tests.py --variant zero climb --files trainer_test
    python tools/keras_tests.py --quick

Takes Keras's own tests of trainers, callbacks, saving, models and export out
of the installed Keras, puts a wrapper around each model that they make, and
runs them once for each variant of the wrapper. Those that fail are run again
without it: what plain Keras fails here, too, says nothing. Prints a table of
the tests that passed, that were refused by a clear sentence of this package,
that cannot apply (`CANNOT_APPLY` below, by name and reason) and that failed;
exits 1 if any did.

Not all versions of Keras bring their tests along: `--tests` takes the folder
`keras/src` of the source distribution of the version that is installed. A
variant takes five to ten minutes on two cores, `--quick` less than one.
"""

import argparse
import ast
import collections
import fnmatch
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

FOLDERS = ("trainers", "callbacks", "saving", "models", "export")
QUICK = ["early_stopping_test", "terminate_on_nan_test", "sequential_test"]

# A budget in all steps, also of the shortest training.
CLIMB = {"sigma": 0.05, "warmup": 0, "anneal": 0}
VARIANTS = {
    "zero": {"sigma": 0.0},
    "climb": CLIMB,
    "default": {},
    "momentum": {**CLIMB, "ascent_from": "momentum"},
    "secant": {**CLIMB, "curvature": "secant"},
    "hvp": {**CLIMB, "curvature": "hvp"},
    "splits": {**CLIMB, "num_batch_splits": 2},
    "fraction": {**CLIMB, "ascent_fraction": 0.5},
    "LookSAM": {"rule": "LookSAM"},
}

# Tests that compare all of the logs: they get a wrapper with none of its own.
COUNT_THE_LOGS = [
    "*csv_logger_test*::test_CSVLogger",
    "*remote_monitor_test*::test_RemoteMonitorWithJsonPayload",
    "*tensorboard_test*::test_TensorBoard_*",
    "*tensorboard_test*::test_custom_summary",
    "*model_test*::test_functional_*",
    "*trainer_test*::test_callback_methods_keys",
    "*trainer_test*::test_on_batch_methods_*",
    "*trainer_test*::test_recompile",
]
NUMBERS = "numbers after steps of plain training: equal at zero budget only"
CANNOT_APPLY = {
    NUMBERS: [
        "*trainer_test*::test_on_batch_methods_*",
        "*trainer_test*::test_loss_weights",
        "*trainer_test*::test_nested_inputs",
    ],
    "compares trainings of which `fit` is told other lengths, and a warm-up is "
    "a share of that": [
        "*trainer_test*::test_steps_per_execution_steps_per_epoch_match_multi*",
        "*trainer_test*::test_steps_per_*epoch_not_match_but_high_enough_*",
    ],
    "`clone_model` takes these arguments for two classes of Keras's only, and "
    "`.model` is of one of them": [
        "*cloning_test*::test_call_fn",
        "*cloning_test*::test_custom_clone_function_*",
        "*cloning_test*::test_input_tensors_*",
        "*cloning_test*::test_recursive*",
        "*cloning_test*::test_structured_io_cloning",
    ],
    "Keras finds the class of a model within another by its registered name, "
    "and here it has none": [
        "*cloning_test*::test_cloning_correctness_subclassed",
    ],
    "the config of a wrapper is given to the class of the model inside": [
        "*functional_test*::test_for_functional_in_sequential",
        "*functional_test*::test_restored_multi_output_type_*",
        "*model_test*::test_reviving_functional_from_config_custom_*",
    ],
    "the wrapper has a name and a class of its own": [
        "*functional_test*::test_basic_flow_multi_input",
        "*saving_lib_test*::test_saved_module_paths_and_class_names",
    ],
    "counts the metrics, of which a wrapper has one more": [
        "*trainer_test*::test_metric_tracking",
        "*trainer_test*::test_multiple_compiles",
        "*trainer_test*::test_nested_trainer_metrics*",
        "*trainer_test*::test_symbolic_build",
    ],
    "calls a private function instead of `model.export`": [
        "*tfsm_layer_test*::test_errors",
    ],
    "takes a model that a function has compiled before it is wrapped": [
        "*variable_mapping_test*::test_basics",
    ],
}


# In the process of the tests, where this module is a plugin of pytest.

VARIANT = os.environ.get("KERAS_TESTS_VARIANT", "plain")
RESULTS = os.environ.get("KERAS_TESTS_RESULTS")
# The name of the test, and how many models it has made.
running = {"test": "", "models": 0}


def wrap(value):
    """Return a wrapper around a model, and anything else as it is."""
    import keras

    from keras_lesam import SharpnessAwareModel

    if not isinstance(value, keras.Model):
        return value
    running["models"] += 1
    if VARIANT == "plain" or isinstance(value, SharpnessAwareModel):
        return value
    return make_wrapper(value, matches(running["test"], COUNT_THE_LOGS))


def make_wrapper(model, is_quiet):
    from keras_lesam import LESAMModel
    from keras_lesam import SAMModel
    from keras_lesam import rules

    arguments = VARIANTS[VARIANT]
    of_family = "rule" in arguments
    if of_family:
        arguments = {"rule": getattr(rules, arguments["rule"])(0.05)}
    wrapper = SAMModel if of_family else LESAMModel
    if is_quiet:
        name = f"Quiet{wrapper.__name__}"
        # Where pickle finds it.
        quiet = type(name, (wrapper,), {"LOGS": ()})
        wrapper = globals().setdefault(name, quiet)
    return wrapper(model, **arguments)


def inner(value):
    """Return the model in a wrapper, and anything else as it is."""
    from keras_lesam import SharpnessAwareModel

    return value.model if isinstance(value, SharpnessAwareModel) else value


def matches(test, patterns):
    return any(fnmatch.fnmatchcase(test, pattern) for pattern in patterns)


def pytest_runtest_setup(item):
    running.update(test=item.nodeid, models=0)


def pytest_runtest_makereport(item, call):
    error = call.excinfo and call.excinfo.value
    if RESULTS and (call.when == "call" or error is not None):
        record(item.nodeid, call.excinfo.typename if error else None, error)


def pytest_collectreport(report):
    if RESULTS and report.failed:
        record(report.nodeid, "ImportError", report.longreprtext)


def record(test, kind, error):
    """Write down what became of a test, as a line of JSON."""
    here = os.getcwd()
    line = {
        "test": test,
        "models": running["models"],
        "kind": kind,
        "error": None if error is None else str(error).replace(here, "."),
        "refusal": refusal(error) if isinstance(error, Exception) else None,
    }
    with open(RESULTS, "a") as file:
        file.write(json.dumps(line) + "\n")


def refusal(error):
    """Return what this package says of an argument, if that is the error."""
    while error is not None:
        frames = error.__traceback__
        while frames is not None and frames.tb_next is not None:
            frames = frames.tb_next
        if (
            isinstance(error, ValueError | TypeError | NotImplementedError)
            and frames is not None
            and frames.tb_frame.f_globals["__name__"].startswith("keras_lesam")
            and re.search(r"`\w+|Received", str(error))
        ):
            return str(error)
        error = error.__cause__ or error.__context__
    return None


# Before: the tests are rewritten.

CONFTEST = """
import keras
import pytest


def skip_if_backend(backend, reason):
    return pytest.mark.skipif(keras.backend.backend() == backend, reason=reason)
"""


class Wrapping(ast.NodeTransformer):
    """Puts `wrap` around the models of a module of tests.

    After what a test assigns to a name, and before what is compiled. What asks
    for the class of a model, or what only that class has, gets the model that
    is in the wrapper.
    """

    def __init__(self):
        self.is_test = False

    def visit_Module(self, node):
        self.generic_visit(node)
        node.body.insert(0, statement("import keras_tests"))
        return ast.fix_missing_locations(node)

    def visit_ClassDef(self, node):
        """Make a model of a layer that is mixed in with a trainer."""
        bases = {ast.unparse(base) for base in node.bases}
        if "Trainer" in bases:
            bases = sorted(bases - {"Trainer", "layers.Layer"})
            node.bases = [
                statement(base).value for base in [*bases, "models.Model"]
            ]
            # Which a model keeps for itself.
            for part in ast.walk(node):
                if ast.unparse(part) == "self.layers":
                    part.attr = "own_layers"
        return self.visit_within(node, is_test=False)

    def visit_FunctionDef(self, node):
        is_test = re.match("_?test|setUp", node.name) is not None
        return self.visit_within(node, self.is_test or is_test)

    def visit_within(self, node, is_test):
        before, self.is_test = self.is_test, is_test
        self.generic_visit(node)
        self.is_test = before
        return node

    def visit_Import(self, node):
        """Do without what is not installed: not all tests need it."""
        module = getattr(node, "module", None) or node.names[0].name
        package = module.split(".")[0]
        if package == "conftest" or importlib.util.find_spec(package):
            return node
        names = [a.asname or a.name.split(".")[0] for a in node.names]
        return statement(" = ".join(names) + " = None")

    visit_ImportFrom = visit_Import  # noqa: N815

    def visit_Assign(self, node):
        self.generic_visit(node)
        is_one = len(node.targets) == 1 and isinstance(
            node.targets[0], ast.Name | ast.Attribute
        )
        if self.is_test and is_one and isinstance(node.value, ast.Call):
            return [node, wrapping(node.targets[0])]
        return node

    def visit_Expr(self, node):
        self.generic_visit(node)
        method = getattr(node.value, "func", None)
        if getattr(method, "attr", None) != "compile":
            return node
        if ast.unparse(method.value) == "self" or not isinstance(
            method.value, ast.Name | ast.Attribute
        ):
            return node
        return [wrapping(method.value), node]

    def visit_Attribute(self, node):
        self.generic_visit(node)
        if self.is_test and node.attr in ("_functional", "_operations"):
            node.value = inside(node.value)
        return node

    def visit_Call(self, node):
        self.generic_visit(node)
        if self.is_test and ast.unparse(node.func) == "self.assertIsInstance":
            node.args[0] = inside(node.args[0])
        return node


def statement(code):
    return ast.parse(code).body[0]


def inside(model):
    return statement(f"keras_tests.inner({ast.unparse(model)})").value


def wrapping(model):
    """Return the statement that wraps what a name or an attribute is."""
    name = ast.unparse(model)
    owner = name.removesuffix(".model")
    if owner not in (name, "self"):
        return statement(f"{owner}.set_model(keras_tests.wrap({name}))")
    return statement(f"{name} = keras_tests.wrap({name})")


def rewrite(sources, folder):
    """Write the tests in `sources` into a folder, their models wrapped."""
    (folder / "conftest.py").write_text(CONFTEST)
    for source in sources:
        tree = Wrapping().visit(ast.parse(source.read_text()))
        name = f"{source.parent.name}_{source.name}"
        (folder / name).write_text(ast.unparse(tree))


# They are run.


def run(folder, variant, tests=(".",)):
    """Run tests, all by default; return what was recorded of each, by name."""
    results = folder / f"{variant}.jsonl"
    results.write_text("")
    here = pathlib.Path(__file__).parent
    paths = [str(here), str(here.parent), os.environ.get("PYTHONPATH", "")]
    (folder / "pytest.ini").write_text("[pytest]\n")
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "pytest", "-v", "--tb=short"),
            *("-p", "keras_tests", "-p", "no:cacheprovider", "-W", "ignore"),
            *("--continue-on-collection-errors", *tests),
        ],
        cwd=folder,
        env={
            "TF_CPP_MIN_LOG_LEVEL": "3",
            **os.environ,
            "CUDA_VISIBLE_DEVICES": "",
            "KERAS_BACKEND": "tensorflow",
            "KERAS_TESTS_RESULTS": str(results),
            "KERAS_TESTS_VARIANT": variant,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "PYTHONUNBUFFERED": "1",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    output = with_progress(process.stdout, variant)
    (folder / f"{variant}.log").write_text(output)
    if process.wait() not in (0, 1):
        raise SystemExit(f"pytest has ended early.\n{output[-5000:]}")
    records = map(json.loads, results.read_text().splitlines())
    return {record["test"]: record for record in records}


def with_progress(lines, variant):
    """Return the output of pytest, after showing how far it comes."""
    read, shown = [], ""
    for line in lines:
        read.append(line)
        done = re.search(r"^(\w+)\.py::.*\[ *(\d+%)\]$", line.rstrip())
        if done and done[2] != shown:
            shown = done[2]
            print(
                f"{variant:8} {shown:>4} {done[1]:40}",
                end="\r" if sys.stderr.isatty() else "\n",
                file=sys.stderr,
                flush=True,
            )
    return "".join(read)


# After: what became of them.

OUTCOMES = ("passed", "refused", "can't apply", "failed")


def outcome(record, variant, plain):
    """Return one of `OUTCOMES`, or why the test says nothing, and a reason."""
    test = record["test"]
    if record["kind"] == "Skipped":
        return "skipped", record["error"]
    if record["kind"] is None:
        return ("passed" if record["models"] else "no model"), ""
    before = plain.get(test)
    if before is not None and before["kind"] is not None:
        lines = before["error"].strip().splitlines() or [before["kind"]]
        return "fails without a wrapper", lines[-1]
    if record["refusal"]:
        return "refused", record["refusal"].partition("Received")[0]
    for reason, patterns in CANNOT_APPLY.items():
        if matches(test, patterns) and (reason, variant) != (NUMBERS, "zero"):
            return "can't apply", reason
    return "failed", f"{record['kind']}: {record['error']}"


def judge(runs, plain):
    """Return the tests of each outcome, variant and reason."""
    judged = collections.defaultdict(set)
    for variant, records in runs.items():
        for test, record in records.items():
            what, reason = outcome(record, variant, plain)
            judged[what, variant, " ".join(reason.split())].add(test)
    return judged


def tables(judged, variants):
    """Yield the lines of the report."""
    yield "| variant | " + " | ".join(OUTCOMES) + " |"
    yield "|" + " --- |" * (len(OUTCOMES) + 1)
    for variant in variants:
        counts = [count(judged, what, variant) for what in OUTCOMES]
        yield f"| {variant} | " + " | ".join(map(str, counts)) + " |"
    silent = ("no model", "skipped", "fails without a wrapper")
    numbers = [max(count(judged, what, v) for v in variants) for what in silent]
    yield (
        f"\nOf the other tests {numbers[0]} make no model, {numbers[1]} are "
        f"skipped, and {numbers[2]} fail without a wrapper, too. "
        f"Keras {importlib.metadata.version('keras')}."
    )
    for what in (*OUTCOMES[1:], silent[-1]):
        reasons = sorted({key[2] for key in judged if key[0] == what})
        if reasons:
            yield f"\n## {what[0].upper()}{what[1:]}"
        for reason in reasons:
            yield f"\n{reason[:500]}\n"
            yield from names(judged, what, reason, variants)


def count(judged, what, variant):
    return sum(
        len(tests)
        for key, tests in judged.items()
        if key[:2] == (what, variant)
    )


def names(judged, what, reason, variants):
    """Yield the tests of an outcome, and the variants if it is not in all."""
    where = collections.defaultdict(list)
    for variant in variants:
        for test in judged.get((what, variant, reason), ()):
            where[test].append(variant)
    for test in sorted(where):
        file, _, name = test.partition(".py::")
        some = "" if len(where[test]) == len(variants) else where[test]
        yield f"- {file} {name.split('::')[-1]}" + (
            f" ({', '.join(some)})" if some else ""
        )


def stale(judged):
    """Yield the patterns of `CANNOT_APPLY` that no failing test needs."""
    for reason, patterns in CANNOT_APPLY.items():
        needed = [
            test
            for (what, _, why), tests in judged.items()
            for test in tests
            if (what, why) == ("can't apply", reason)
        ]
        for pattern in patterns:
            if not fnmatch.filter(needed, pattern):
                yield pattern


def main():
    args = parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(args.folder or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        rewrite(find_tests(args), folder)
        runs = {variant: run(folder, variant) for variant in args.variant}
        failing = sorted(
            {
                test
                for records in runs.values()
                for test, record in records.items()
                if record["kind"] not in (None, "Skipped")
            }
        )
        plain = run(folder, "plain", failing) if failing else {}
    judged = judge(runs, plain)
    for line in tables(judged, args.variant):
        print(line)
    if set(args.variant) == set(VARIANTS) and not args.files:
        for pattern in stale(judged):
            print(f"\nNothing that fails needs {pattern!r} in `CANNOT_APPLY`.")
    return int(any(key[0] == "failed" for key in judged))


def find_tests(args):
    """Return the files of Keras's tests, or exit and say where they are."""
    keras = importlib.util.find_spec("keras").origin
    root = pathlib.Path(args.tests or pathlib.Path(keras).parent / "src")
    found = [
        path
        for name in FOLDERS
        for path in sorted((root / name).glob("*_test.py"))
        if not args.files or path.stem in args.files
    ]
    if not found:
        raise SystemExit(
            f"There are no such tests in {root}. This Keras may have come "
            "without: pass `--tests`, the folder `keras/src` of the source "
            f"distribution of version {importlib.metadata.version('keras')}."
        )
    return found


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--variant", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    add("--files", nargs="+", help="names of test files, as `trainer_test`")
    add("--tests", help="the folder `keras/src` to take the tests from")
    add("--folder", help="where to leave the rewritten tests and the logs")
    add("--quick", action="store_true", help="three files, one variant")
    args = parser.parse_args()
    if args.quick:
        args.files = args.files or QUICK
        args.variant = ["climb"]
    return args


if __name__ == "__main__":
    raise SystemExit(main())
