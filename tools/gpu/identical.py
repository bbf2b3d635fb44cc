"""Without a budget a training is that of plain Keras, to the last bit."""

import _gpu
import keras
import numpy as np
import tensorflow as tf

from keras_lesam import LESAMModel
from keras_lesam import SAMModel

METHODS = {
    "LE-SAM, sigma=0": lambda net: LESAMModel(net, 0.0),
    "SAM, rho=0": lambda net: SAMModel(net, rho=0.0),
}


def main():
    args = _gpu.parse_args()
    tf.config.experimental.enable_op_determinism()
    _gpu.describe()
    table = _gpu.Table(args.output / "identical.jsonl")
    for jit in (False,) if args.quick else (False, True):
        mode = "XLA" if jit else "graph"
        for name, method in {"plain, again": None, **METHODS}.items():
            table.attempt(
                f"{name} against plain fit, {mode}",
                0,
                lambda method=method, jit=jit: difference(method, jit),
            )
    return table.tell()


def difference(method, jit):
    """Return how many weights differ from those of plain Keras."""
    nets = []
    for wrap in (lambda net: net, method or (lambda net: net)):
        net = _gpu.small_net()
        keras.utils.set_random_seed(1)
        _gpu.fit(net, wrap, jit=jit)
        nets.append(net)
    pairs = zip(*(net.get_weights() for net in nets))
    return sum(int(np.sum(a != b)) for a, b in pairs)


if __name__ == "__main__":
    raise SystemExit(main())
