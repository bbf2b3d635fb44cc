"""Nets of the sizes that people train on a GPU."""

import cifar
import keras
from keras import layers

CLASSES = 10


def resnet18(shape):
    """Build ResNet-18 for small pictures: 11 million parameters."""
    pictures = keras.Input(shape)
    x = cifar.resnet18(pictures, 1.0)
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(pictures, layers.Dense(CLASSES, dtype="float32")(x))


def vit(shape, dim=512, heads=8, depth=6, patch=4):
    """Build a vision transformer of pre-norm blocks: 19 million parameters."""
    pictures = keras.Input(shape)
    x = layers.Conv2D(dim, patch, strides=patch)(pictures)
    x = layers.Reshape((-1, dim))(x)
    positions = layers.Embedding(x.shape[1], dim)
    x = layers.Add()([x, positions(keras.ops.arange(x.shape[1]))[None]])
    for _ in range(depth):
        y = layers.LayerNormalization()(x)
        y = layers.MultiHeadAttention(heads, dim // heads)(y, y)
        x = layers.Add()([x, y])
        y = layers.LayerNormalization()(x)
        y = layers.Dense(4 * dim, activation="gelu")(y)
        x = layers.Add()([x, layers.Dense(dim)(y)])
    x = layers.GlobalAveragePooling1D()(layers.LayerNormalization()(x))
    return keras.Model(pictures, layers.Dense(CLASSES, dtype="float32")(x))


def dense(shape, units=4096, depth=4):
    """Build rectified layers without normalization."""
    hidden = [layers.Dense(units, activation="relu") for _ in range(depth)]
    return keras.Sequential(
        [keras.Input(shape), *hidden, layers.Dense(CLASSES, dtype="float32")]
    )
