"""Two replicas on one GPU, against one device."""

import _gpu
import keras
import tensorflow as tf

from keras_lesam import LESAMModel


def main():
    args = _gpu.parse_args()
    devices = split_device()
    tf.config.experimental.enable_tensor_float_32_execution(False)
    _gpu.describe()
    table = _gpu.Table(args.output / "replicas.jsonl")
    strategy = tf.distribute.MirroredStrategy(
        devices,
        # NCCL does not have two replicas on one GPU.
        cross_device_ops=tf.distribute.ReductionToOneDevice(),
    )
    for scope, splits in (("replica", 2), ("global", 1)):
        table.attempt(
            f"scope {scope}, two replicas against num_batch_splits={splits}",
            1e-3,
            lambda scope=scope, splits=splits: compare(strategy, scope, splits),
        )
    return table.tell()


def split_device():
    """Make two devices of the first; return their names."""
    kind = _gpu.device()[1:4]
    physical = tf.config.list_physical_devices(kind)[0]
    limit = {"memory_limit": 8192} if kind == "GPU" else {}
    tf.config.set_logical_device_configuration(
        physical, [tf.config.LogicalDeviceConfiguration(**limit)] * 2
    )
    return [f"{kind}:{i}" for i in range(2)]


def net():
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((16, 16, 3)),
            keras.layers.Conv2D(16, 3, strides=2),
            keras.layers.LayerNormalization(),
            keras.layers.Activation("gelu"),
            keras.layers.Flatten(),
            keras.layers.Dense(10),
        ]
    )


def train(scope="replica", splits=1):
    model = LESAMModel(
        *(net(), 0.1, 0.5),
        num_batch_splits=splits,
        perturbation_scope=scope,
        **_gpu.CONSTANT,
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    optimizer = keras.optimizers.SGD(0.05, momentum=0.9)
    model.compile(optimizer, loss, jit_compile=False)
    x, y = _gpu.small_data()
    model.fit(x, y, batch_size=64, epochs=2, shuffle=False, verbose=0)
    return model


def compare(strategy, scope, splits):
    """Return how far the replicas' training ends from that of one device."""
    with strategy.scope():
        replicated = train(scope=scope)
    with tf.device(_gpu.device()):
        alone = train(splits=splits)
    return _gpu.distance(replicated.model, alone.model, net())


if __name__ == "__main__":
    raise SystemExit(main())
