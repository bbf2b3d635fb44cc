"""Small image classifiers, with and without normalization, for the scripts.

Each builder takes the shape of an image, `(rows, columns, channels)`, and
returns a built `keras.Model` whose outputs are logits.
"""

import _common
import keras
from keras import layers


def dense(shape, units=128, depth=2):
    """Build hidden layers of rectified units, without normalization."""
    hidden = [layers.Dense(units, activation="relu") for _ in range(depth)]
    return _sequential(shape, layers.Flatten(), *hidden)


def deep_dense(shape):
    """Build eight narrow hidden layers: small gradients at the start."""
    return dense(shape, units=64, depth=8)


def conv(shape, normalize=False):
    """Build four convolutions, two of them with strides."""
    stack = []
    for filters, strides in [(16, 1), (32, 2), (32, 1), (64, 2)]:
        stack += _convolution(filters, strides, normalize)
    return _sequential(shape, *stack, layers.Flatten())


def conv_bn(shape):
    """Build the net of `conv` with batch normalization."""
    return conv(shape, normalize=True)


def vit(shape, dim=48, heads=4, depth=2):
    """Build a vision transformer of pre-norm blocks on about 7 x 7 patches."""
    patch = max(2, shape[0] // 7)
    inputs = keras.Input(shape)
    x = layers.Rescaling(4.0, -1.0)(inputs)
    x = layers.Conv2D(dim, patch, strides=patch)(x)
    x = layers.Reshape((-1, dim))(x)
    x = PositionEmbedding()(x)
    for _ in range(depth):
        x = _attention_block(x, dim, heads)
    x = layers.LayerNormalization()(x)
    x = layers.GlobalAveragePooling1D()(x)
    return keras.Model(inputs, layers.Dense(_common.CLASSES)(x))


def lstm(shape, units=64):
    """Build an LSTM that reads an image row by row."""
    rows, columns, channels = shape
    by_row = layers.Reshape((rows, columns * channels))
    return _sequential(shape, by_row, layers.LSTM(units))


def resnet(shape, width=16, depth=3):
    """Build residual blocks with batch normalization, of doubling widths."""
    inputs = keras.Input(shape)
    x = _apply(_convolution(width, 1, normalize=True), inputs)
    for i in range(depth):
        x = _residual_block(x, width * 2**i, strides=1 if i == 0 else 2)
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(_common.CLASSES)(x))


class PositionEmbedding(layers.Layer):
    """Adds a trainable vector for each position of a sequence."""

    def build(self, input_shape):
        self.embedding = self.add_weight(
            shape=input_shape[1:],
            initializer=keras.initializers.RandomNormal(stddev=0.02),
            name="embedding",
        )

    def call(self, inputs):
        return inputs + self.embedding


NETS = {
    builder.__name__: builder
    for builder in (dense, deep_dense, conv, conv_bn, vit, lstm, resnet)
}


def _sequential(shape, *stack):
    return keras.Sequential(
        [keras.Input(shape), *stack, layers.Dense(_common.CLASSES)]
    )


def _apply(stack, x):
    for layer in stack:
        x = layer(x)
    return x


def _convolution(filters, strides, normalize, activation="relu"):
    """Return the layers of a 3 x 3 convolution; without bias if normalized."""
    convolution = layers.Conv2D(
        filters, 3, strides=strides, padding="same", use_bias=not normalize
    )
    normalization = (
        [layers.BatchNormalization(momentum=0.9)] if normalize else []
    )
    return [convolution, *normalization, layers.Activation(activation)]


def _residual_block(x, filters, strides):
    stack = _convolution(filters, strides, normalize=True)
    stack += _convolution(filters, 1, normalize=True, activation="linear")
    residual = _apply(stack, x)
    if x.shape != residual.shape:
        x = layers.Conv2D(filters, 1, strides=strides)(x)
    return layers.Activation("relu")(layers.Add()([x, residual]))


def _attention_block(x, dim, heads):
    normalized = layers.LayerNormalization()(x)
    attention = layers.MultiHeadAttention(heads, dim // heads)
    x = layers.Add()([x, attention(normalized, normalized)])
    mlp = [
        layers.LayerNormalization(),
        layers.Dense(2 * dim, activation="gelu"),
        layers.Dense(dim),
    ]
    return layers.Add()([x, _apply(mlp, x)])
