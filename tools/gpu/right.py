"""Trajectories known beforehand, the CPU's, and half precision."""

import json

import _gpu
import keras
import numpy as np
import tensorflow as tf

from keras_lesam import LESAMModel
from tests import test_golden

STEPS = 20


def main():
    args = _gpu.parse_args()
    _gpu.describe()
    table = _gpu.Table(args.output / "right.jsonl")
    for jit in (False, True):
        mode = "XLA" if jit else "graph"
        for file in test_golden.FILES:
            table.attempt(
                f"golden {file.stem}, float64, {mode}",
                1e-5,
                lambda file=file, jit=jit: golden(file, jit),
            )
        half_precision(table, jit, mode)
        methods = list(_gpu.METHODS)[: 2 if args.quick else None]
        for name in methods:
            table.attempt(
                f"{name} against the CPU, float32, {mode}",
                1e-2,
                lambda name=name, jit=jit: against_cpu(name, jit),
            )
    table.attempt("LE-SAM against the CPU, TF32, graph", 0.2, with_tf32)
    return table.tell()


def golden(file, jit):
    """Return how far a trajectory is from the one in a file, relatively."""
    keras.config.set_dtype_policy("float64")
    keras.config.set_floatx("float64")
    try:
        with tf.device(_gpu.device()):
            return _golden(np.load(file), jit)
    finally:
        keras.config.set_floatx("float32")
        keras.config.set_dtype_policy("float32")


def _golden(golden, jit):
    meta = json.loads(str(golden["meta"]))
    net = test_golden.golden_net(meta, golden)
    model = LESAMModel(
        *(net, meta["sigma"], meta["rho_max"]),
        alpha=meta["alpha"],
        **_gpu.CONSTANT,
    )
    model.compile(
        test_golden.golden_optimizer(meta),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=jit,
    )
    rho = []
    for x, y in test_golden.batches(golden, meta):
        model.reset_metrics()
        rho.append(model.train_on_batch(x, y, return_dict=True)["rho"])
    worst = np.max(np.abs(rho / golden["rho"] - 1))
    expected = test_golden.weights_of(golden, "final")
    for found, wanted in zip(net.get_weights(), expected):
        error = np.abs(found - wanted) / (1 + np.abs(wanted))
        worst = max(worst, error.max())
    return worst


def against_cpu(name, jit):
    """Return how far 20 steps in float32 end from those on the CPU."""
    tf.config.experimental.enable_tensor_float_32_execution(False)
    nets = [_gpu.small_net(), _gpu.small_net()]
    for net, where in zip(nets, (_gpu.device(), "/CPU:0")):
        keras.utils.set_random_seed(1)
        _gpu.fit(net, _gpu.METHODS[name], jit=jit, where=where)
    return _gpu.distance(*nets, _gpu.small_net())


def with_tf32():
    nets = [_gpu.small_net(), _gpu.small_net()]
    for net, where in zip(nets, (_gpu.device(), "/CPU:0")):
        is_gpu = where != "/CPU:0"
        tf.config.experimental.enable_tensor_float_32_execution(is_gpu)
        _gpu.fit(net, _gpu.METHODS["LE-SAM"], jit=False, where=where)
    tf.config.experimental.enable_tensor_float_32_execution(True)
    return _gpu.distance(*nets, _gpu.small_net())


def half_precision(table, jit, mode):
    """Compare the first step's numbers with float32's; overflow a step."""
    for policy, limit in (("mixed_float16", 0.05), ("mixed_bfloat16", 0.2)):
        table.attempt(
            f"first step, {policy}, {mode}",
            limit,
            lambda policy=policy: first_step(policy, jit),
        )
    table.attempt(f"an overflow, mixed_float16, {mode}", 0, lambda: skips(jit))


def first_step(policy, jit):
    """Return how far the slope, undone the loss scale, is from float32's."""
    slopes = []
    for p in (policy, "float32"):
        keras.config.set_dtype_policy(p)
        try:
            history = _gpu.fit(
                *(_gpu.small_net(), _gpu.METHODS["LE-SAM"]),
                jit=jit,
                epochs=1,
                steps_per_epoch=1,
            )
        finally:
            keras.config.set_dtype_policy("float32")
        slopes.append(history["gradient_norm"][0])
    return abs(slopes[0] / slopes[1] - 1)


def skips(jit):
    """Return 0 if a step that overflows changes no weight, and the scale."""
    keras.config.set_dtype_policy("mixed_float16")
    try:
        net = _gpu.small_net()
    finally:
        keras.config.set_dtype_policy("float32")
    optimizer = keras.optimizers.LossScaleOptimizer(
        keras.optimizers.SGD(0.05), initial_scale=2.0**40
    )
    before = [w.numpy() for w in net.trainable_variables]
    options = {"epochs": 1, "steps_per_epoch": 1}
    method = _gpu.METHODS["LE-SAM"]
    _gpu.fit(net, method, jit=jit, optimizer=optimizer, **options)
    changed = [
        np.any(a != b.numpy()) for a, b in zip(before, net.trainable_variables)
    ]
    scale = float(keras.ops.convert_to_numpy(optimizer.dynamic_scale))
    return float(any(changed) or scale >= 2.0**40)


if __name__ == "__main__":
    raise SystemExit(main())
