"""Trajectories of independent implementations, for test_golden_family.py.

    pip install tf-keras optax torch pytorch_optimizer
    python tests/golden_family/make.py

Writes a file for each rule and library beside this script: 20 steps in
float64 on a tanh network, cross-entropy from logits, batches in order, SGD
with momentum. Each in a process of its own: the libraries do not share one.
"""

import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys

import numpy as np

HERE = pathlib.Path(__file__).parent
STEPS, BATCH = 20, 16
META = {"steps": STEPS, "batch": BATCH, "learning_rate": 0.1, "momentum": 0.9}

# Of each file: the library, what it calls the rule, and with which arguments;
# then our rule, and the units of the net's layers (no biases if there is one).
CASES = {
    "sam_tf_keras": ("tf_keras", "", {"rho": 0.1}, "SAM", {"rho": 0.1}),
    "sam_optax": ("optax", "", {"rho": 0.1}, "SAM", {"rho": 0.1}),
    "sam_pytorch": ("torch", "SAM", {"rho": 0.1}, "SAM", {"rho": 0.1}),
    "asam_pytorch": (
        *("torch", "SAM", {"rho": 0.5, "adaptive": True}),
        *("ASAM", {"rho": 0.5, "eta": 0.0}),
    ),
    "gsam_pytorch": (
        *("torch", "GSAM", {"rho": 0.1, "alpha": 0.4}),
        *("GSAM", {"rho": 0.1, "alpha": 0.4}),
    ),
    "wsam_pytorch": (
        *("torch", "WSAM", {"rho": 0.1, "gamma": 0.8, "decouple": False}),
        *("WSAM", {"rho": 0.1, "gamma": 0.8}),
    ),
    "friendly_pytorch": (
        *("torch", "FriendlySAM", {"rho": 0.1, "sigma": 0.8, "lmbda": 0.6}),
        *("FriendlySAM", {"rho": 0.1, "share": 0.8, "decay": 0.6}),
    ),
    # It takes the norms weight by weight, where the paper takes all as one
    # vector: the same for a net that has only one.
    "look_pytorch": (
        *("torch", "LookSAM", {"rho": 0.1, "alpha": 0.7, "k": 3}),
        *("LookSAM", {"rho": 0.1, "alpha": 0.7, "every": 3}),
    ),
}
PACKAGES = {
    "tf_keras": "tf-keras",
    "optax": "optax",
    "torch": "pytorch_optimizer",
}


def problem(case):
    """Data and initial weights: kernels and biases, or one kernel."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 6))
    y = rng.integers(4, size=64)
    shapes = (
        [(6, 4)] if case.startswith("look") else [(6, 8), (8,), (8, 4), (4,)]
    )
    return x, y, [rng.normal(size=shape) / 2 for shape in shapes]


def batches(x, y):
    for step in range(STEPS):
        start = step * BATCH % len(x)
        yield x[start : start + BATCH], y[start : start + BATCH]


def run_torch(name, options, x, y, initial):
    import pytorch_optimizer
    import torch

    torch.set_default_dtype(torch.float64)
    weights = [torch.nn.Parameter(torch.tensor(w)) for w in initial]
    net = torch.nn.Module()
    for i, weight in enumerate(weights):
        net.register_parameter(f"weight_{i}", weight)

    def logits(inputs):
        if len(weights) == 1:
            return inputs @ weights[0]
        hidden = torch.tanh(inputs @ weights[0] + weights[1])
        return hidden @ weights[2] + weights[3]

    net.forward = logits
    sgd = {"lr": META["learning_rate"], "momentum": META["momentum"]}
    kind = getattr(pytorch_optimizer, name)
    if name == "GSAM":
        constant = type("Constant", (), {"step": lambda _: options["rho"]})()
        optimizer = kind(
            *(weights, torch.optim.SGD(weights, **sgd), net, constant),
            alpha=options["alpha"],
        )
    elif name == "WSAM":
        optimizer = kind(net, weights, torch.optim.SGD, **options, **sgd)
    else:
        optimizer = kind(weights, torch.optim.SGD, **options, **sgd)
    loss = torch.nn.CrossEntropyLoss()
    for inputs, labels in batches(torch.tensor(x), torch.tensor(y)):
        if name == "GSAM":
            optimizer.set_closure(loss, inputs, labels)
            optimizer.step()
            continue

        def closure(inputs=inputs, labels=labels):
            optimizer.zero_grad()
            value = loss(net(inputs), labels)
            value.backward()
            return value

        if name != "WSAM":
            closure()
        optimizer.step(closure)
    return [w.detach().numpy() for w in weights]


def run_tf_keras(name, options, x, y, initial):
    del name
    import tf_keras

    tf_keras.backend.set_floatx("float64")
    net = tf_keras.Sequential(
        [
            tf_keras.layers.Dense(8, activation="tanh"),
            tf_keras.layers.Dense(4),
        ]
    )
    model = tf_keras.models.experimental.SharpnessAwareMinimization(
        net, **options
    )
    net.build((None, 6))
    net.set_weights(initial)
    model.compile(
        tf_keras.optimizers.SGD(META["learning_rate"], META["momentum"]),
        tf_keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    for inputs, labels in batches(x, y):
        model.train_on_batch(inputs, labels)
    return net.get_weights()


def run_optax(name, options, x, y, initial):
    del name
    import jax
    import optax

    jax.config.update("jax_enable_x64", True)

    def loss(weights, inputs, labels):
        hidden = jax.numpy.tanh(inputs @ weights[0] + weights[1])
        logits = hidden @ weights[2] + weights[3]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean()

    ascent = optax.chain(optax.contrib.normalize(), optax.sgd(options["rho"]))
    descent = optax.sgd(META["learning_rate"], META["momentum"])
    optimizer = optax.contrib.sam(
        descent, ascent, sync_period=2, opaque_mode=True
    )
    weights = [jax.numpy.asarray(w) for w in initial]
    state = optimizer.init(weights)
    for inputs, labels in batches(x, y):

        def gradient(weights, _, inputs=inputs, labels=labels):
            return jax.grad(loss)(weights, inputs, labels)

        updates, state = optimizer.update(
            gradient(weights, 0), state, weights, grad_fn=gradient
        )
        weights = optax.apply_updates(weights, updates)
    return [np.asarray(w) for w in weights]


def write(case):
    library, name, options, rule, arguments = CASES[case]
    x, y, initial = problem(case)
    run = {"torch": run_torch, "tf_keras": run_tf_keras, "optax": run_optax}
    final = run[library](name, options, x, y, initial)
    version = importlib.metadata.version(PACKAGES[library])
    meta = {
        **META,
        "source": f"{PACKAGES[library]} {version} {name}".strip(),
        "rule": rule,
        "arguments": arguments,
    }
    np.savez_compressed(
        HERE / f"{case}.npz",
        x=x,
        y=y,
        meta=json.dumps(meta),
        **{f"initial_{i}": w for i, w in enumerate(initial)},
        **{f"final_{i}": w for i, w in enumerate(final)},
    )


if __name__ == "__main__":
    if len(sys.argv) == 2:
        write(sys.argv[1])
    else:
        environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
        for case in CASES:
            print(case)
            subprocess.run(
                [sys.executable, __file__, case], check=True, env=environment
            )
