"""What is installed and used for a minute on each Python, oldest and newest.

    python tools/matrix.py [--python PATH ...] [--only oldest]

For each interpreter two fresh virtual environments: the oldest TensorFlow and
Keras that pyproject.toml admits, and the newest that pip finds. In each, the
wheel of this checkout is installed and a short smoke is run outside of it:
build, two epochs by each public model and by a loop, save and load, export. One
line each. Packages are installed by uv if that is there, else by pip.
Interpreters are python3.10 to python3.13 on the path, those of
pyenv, and those that are given.
"""

import argparse
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parents[1]
PYTHONS = ("3.10", "3.11", "3.12", "3.13")


def main():
    args = parse_args()
    if args.smoke:
        print(json.dumps(smoke()))
        return
    print("| Python | versions | TensorFlow | Keras | result |")
    print("|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        wheel = build(folder)
        for version in PYTHONS:
            python = find(version, args.python)
            for which in args.only or ("oldest", "newest"):
                row = ["", "", "not run: no interpreter here"]
                if python is not None:
                    row = try_out(python, which, wheel, folder)
                print("|", " | ".join([version, which, *row]), "|", flush=True)


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--python", nargs="*", default=[], help="paths of interpreters")
    add("--only", nargs="*", choices=("oldest", "newest"))
    add("--smoke", action="store_true", help="run the smoke itself, here")
    return parser.parse_args()


def build(folder):
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-q"]
    subprocess.run([*command, "-w", folder, ROOT], check=True)
    return next(folder.glob("*.whl"))


def find(version, given):
    """Return the path of an interpreter of a version, or `None`."""
    pyenv = pathlib.Path.home() / ".pyenv" / "versions"
    candidates = [
        *given,
        *sorted(pyenv.glob(f"{version}.*/bin/python")),
        shutil.which(f"python{version}"),
    ]
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    for path in candidates:
        if path is None:
            continue
        process = subprocess.run(
            [path, "-c", code], capture_output=True, text=True, check=False
        )
        if process.stdout.strip() == version:
            return path
    return None


def try_out(python, which, wheel, folder):
    """Return versions of TensorFlow and Keras, and what came of it."""
    venv = folder / "venv"
    shutil.rmtree(venv, ignore_errors=True)
    here = venv / "bin" / "python"
    install = [here, "-m", "pip", "install", "-q"]
    if uv := shutil.which("uv"):
        # It keeps what it has once unpacked.
        install = [uv, "pip", "install", "-q", "--python", here]
    subprocess.run(
        [python, "-m", "venv", *(["--without-pip"] if uv else []), venv],
        check=True,
    )
    install += [wheel, *(oldest() if which == "oldest" else [])]
    process = subprocess.run(
        install, capture_output=True, text=True, check=False
    )
    if process.returncode:
        return ["", "", f"not installed: {why(process.stderr)}"]
    process = subprocess.run(
        [here, pathlib.Path(__file__).resolve(), "--smoke"],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": "", "TF_CPP_MIN_LOG_LEVEL": "3"},
    )
    if process.returncode:
        return ["", "", f"fails: {process.stderr.strip().splitlines()[-1]}"]
    found = json.loads(process.stdout.splitlines()[-1])
    return [found["tensorflow"], found["keras"], "works"]


def why(errors):
    """Return what pip or uv says of what it cannot install, on one line."""
    if re.search("No matching distribution|no wheels", errors):
        return "there are no wheels for this Python"
    return " ".join(errors.split())[-300:]


def oldest():
    """Return the lower bounds of pyproject.toml, as pins."""
    text = (ROOT / "pyproject.toml").read_text()
    return [
        f"{name}=={bound}.*"
        for name, bound in re.findall(r'"(tensorflow|keras)>=([\d.]+)"', text)
    ]


def smoke():
    """Use what is public for a minute; return the versions."""
    import keras
    import numpy as np
    import tensorflow as tf

    import keras_lesam
    from keras_lesam import SharpnessAwareGradients
    from keras_lesam import rules

    def net():
        keras.utils.set_random_seed(0)
        layers = keras.layers
        return keras.Sequential(
            [
                keras.Input((8, 8, 1)),
                layers.Conv2D(4, 3, activation="relu"),
                layers.BatchNormalization(),
                layers.Flatten(),
                layers.Dense(3),
            ]
        )

    assert ROOT not in pathlib.Path(keras_lesam.__file__).parents
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 8, 8, 1)).astype("float32")
    y = rng.integers(3, size=64)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    models = {
        "defaults": keras_lesam.LESAMModel(net()),
        "secant": keras_lesam.LESAMModel(net(), 0.1, curvature="secant"),
        "hvp": keras_lesam.LESAMModel(net(), 0.1, curvature="hvp"),
        "friendly": keras_lesam.SAMModel(net(), rules.FriendlySAM(0.05)),
        "eager": keras_lesam.SAMModel(net()),
    }
    for name, model in models.items():
        eagerly = name == "eager"
        model.compile("adam", loss, metrics=["accuracy"], run_eagerly=eagerly)
        history = model.fit(x, y, epochs=2, verbose=0).history
        assert np.isfinite(history["loss"]).all(), name
        model.save(f"{name}.keras")
        loaded = keras.models.load_model(f"{name}.keras")
        expected = model.predict(x, verbose=0)
        np.testing.assert_array_equal(loaded.predict(x, verbose=0), expected)
        assert loaded.fit(x, y, verbose=0).history["loss"], name
        model.export(name, verbose=False)
        exported = tf.saved_model.load(name)
        served = exported.serve(x)
        np.testing.assert_allclose(served, expected, rtol=1e-4, atol=1e-5)
    keras_lesam.curvature.top_eigenvalues(model, x, y, k=1)

    trained, lesam = net(), SharpnessAwareGradients(rules.SAM(0.05))
    optimizer = keras.optimizers.Adam()
    variables = trained.trainable_variables
    state = lesam.init_state(variables)

    @tf.function
    def step(state):
        gradients, record = lesam(
            lambda: loss(y, trained(x, training=True)),
            *(variables, state, optimizer),
        )
        optimizer.apply(gradients, variables)
        return record

    first = step(state)
    assert float(step(first.state).loss) < float(first.loss)
    return {"tensorflow": tf.__version__, "keras": keras.__version__}


if __name__ == "__main__":
    main()
