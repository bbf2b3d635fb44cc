"""Hessian-vector products of all that Keras exports, against differences.

Each layer, loss and activation is put into a tiny net in float64. What its
second derivative should be is known from differences of the gradients that
plain Keras takes: central ones, exact to about the fourth power of the step.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers as L

from keras_lesam.curvature import hessian_vector_product

ROWS = 3
VECTOR, SERIES, IMAGE, VOLUME = (4,), (5, 3), (6, 6, 3), (4, 4, 4, 2)


class Affine(L.Layer):
    """`w x + b`, elementwise: weights ahead of what has none."""

    def __init__(self, start=1.0):
        super().__init__()
        self.start = start

    def build(self, shape):
        normal = keras.initializers.RandomNormal(self.start, 0.1, seed=1)
        self.w = self.add_weight(shape=shape[1:], initializer=normal)
        self.b = self.add_weight(shape=shape[1:], initializer="zeros")

    def call(self, x):
        return self.w * x + self.b


def two(layer):
    return lambda h: layer()([h, Affine(0.5)(h)])


def attend(layer):
    return lambda h: layer()(h, Affine(0.5)(h))


def one(layer, *args, **kwargs):
    return lambda h: getattr(L, layer)(*args, **kwargs)(h)


def augment(layer, *args, **kwargs):
    """Of images between 0 and 1, which the net keeps between 0 and 1."""
    return lambda h: getattr(L, layer)(*args, **kwargs)(
        L.Activation("sigmoid")(h)
    )


class Inside(L.Layer):
    """Calls a layer that cannot be called with symbolic inputs."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def call(self, x, training=None):
        return self.layer(x, training=training)

    def compute_output_shape(self, shape):
        return shape


def rnn(make_cell):
    return lambda h: L.RNN(make_cell())(h)


def pooling(n, shape):
    kinds = ("Average", "Max")
    return {
        **{
            f"{k}Pooling{n}D": (shape, one(f"{k}Pooling{n}D", 2)) for k in kinds
        },
        **{
            f"Global{k}Pooling{n}D": (shape, one(f"Global{k}Pooling{n}D"))
            for k in kinds
        },
        **{
            f"Adaptive{k}Pooling{n}D": (
                shape,
                one(f"Adaptive{k}Pooling{n}D", 2),
            )
            for k in kinds
        },
    }


def spatial(n, shape):
    return {
        f"Conv{n}D": (shape, one(f"Conv{n}D", 2, 2)),
        f"Conv{n}DTranspose": (shape, one(f"Conv{n}DTranspose", 2, 2)),
        f"ConvLSTM{n}D": ((2, *shape), one(f"ConvLSTM{n}D", 1, 2)),
        f"Cropping{n}D": (shape, one(f"Cropping{n}D", 1)),
        f"SpatialDropout{n}D": (shape, one(f"SpatialDropout{n}D", 0.4)),
        f"UpSampling{n}D": (shape, one(f"UpSampling{n}D", 2)),
        f"ZeroPadding{n}D": (shape, one(f"ZeroPadding{n}D", 1)),
        **pooling(n, shape),
    }


RANGE = {"value_range": (0, 1)}
# From the name to the shape of a row, and what is made of a tensor like it.
LAYERS = {
    **spatial(1, SERIES),
    **spatial(2, IMAGE),
    **spatial(3, VOLUME),
    "Activation": (VECTOR, one("Activation", "tanh")),
    "ActivityRegularization": (VECTOR, one("ActivityRegularization", l2=0.1)),
    "Add": (VECTOR, two(L.Add)),
    "AdditiveAttention": (SERIES, two(L.AdditiveAttention)),
    "AlphaDropout": (VECTOR, one("AlphaDropout", 0.4)),
    "Attention": (SERIES, two(L.Attention)),
    "AutoContrast": (IMAGE, augment("AutoContrast", **RANGE)),
    "Average": (VECTOR, two(L.Average)),
    "BatchNormalization": (VECTOR, one("BatchNormalization")),
    "Bidirectional": (SERIES, lambda h: L.Bidirectional(L.SimpleRNN(2))(h)),
    "CenterCrop": (IMAGE, one("CenterCrop", 3, 3)),
    "Concatenate": (VECTOR, two(L.Concatenate)),
    "ContrastLimitedAdaptiveHistogramEqualization": (
        IMAGE,
        augment("ContrastLimitedAdaptiveHistogramEqualization", **RANGE),
    ),
    "CutMix": (IMAGE, augment("CutMix")),
    "Dense": (VECTOR, one("Dense", 3)),
    "DepthwiseConv1D": (SERIES, one("DepthwiseConv1D", 2)),
    "DepthwiseConv2D": (IMAGE, one("DepthwiseConv2D", 2)),
    "Dot": (VECTOR, two(lambda: L.Dot(1))),
    "Dropout": (VECTOR, one("Dropout", 0.4)),
    "ELU": (VECTOR, one("ELU")),
    "EinsumDense": (SERIES, one("EinsumDense", "abc,cd->abd", (5, 2))),
    "Embedding": (VECTOR, one("Embedding", 7, 2)),
    "Equalization": (IMAGE, lambda h: Inside(L.Equalization((0, 1)))(h)),
    "Flatten": (IMAGE, one("Flatten")),
    "GRU": (SERIES, one("GRU", 2)),
    "GRUCell": (SERIES, rnn(lambda: L.GRUCell(2))),
    "GaussianDropout": (VECTOR, one("GaussianDropout", 0.4)),
    "GaussianNoise": (VECTOR, one("GaussianNoise", 0.4)),
    "GroupNormalization": (IMAGE, one("GroupNormalization", 3)),
    "GroupQueryAttention": (
        SERIES,
        attend(lambda: L.GroupQueryAttention(2, 2, 1)),
    ),
    "Identity": (VECTOR, one("Identity")),
    "LSTM": (SERIES, one("LSTM", 2)),
    "LSTMCell": (SERIES, rnn(lambda: L.LSTMCell(2))),
    "Lambda": (VECTOR, one("Lambda", lambda x: x**3)),
    "LayerNormalization": (VECTOR, one("LayerNormalization")),
    "LeakyReLU": (VECTOR, one("LeakyReLU")),
    "Masking": (SERIES, lambda h: L.SimpleRNN(2)(L.Masking()(h))),
    "Maximum": (VECTOR, two(L.Maximum)),
    "MelSpectrogram": (
        (64,),
        one("MelSpectrogram", fft_length=16, sequence_stride=8, num_mel_bins=4),
    ),
    "Minimum": (VECTOR, two(L.Minimum)),
    "MixUp": (IMAGE, augment("MixUp")),
    "MultiHeadAttention": (SERIES, attend(lambda: L.MultiHeadAttention(2, 2))),
    "Multiply": (VECTOR, two(L.Multiply)),
    "Normalization": (VECTOR, one("Normalization", mean=0.3, variance=2.0)),
    "PReLU": (VECTOR, one("PReLU", alpha_initializer="ones")),
    "Permute": (SERIES, one("Permute", (2, 1))),
    "Pipeline": (VECTOR, lambda h: L.Pipeline([L.Rescaling(2.0)])(h)),
    "RMSNormalization": (VECTOR, one("RMSNormalization")),
    "RNN": (SERIES, rnn(lambda: L.SimpleRNNCell(2))),
    "RandAugment": (IMAGE, augment("RandAugment", **RANGE)),
    "RandomBrightness": (IMAGE, augment("RandomBrightness", 0.2, (0, 1))),
    "RandomColorDegeneration": (
        IMAGE,
        augment("RandomColorDegeneration", 0.5, **RANGE),
    ),
    "RandomColorJitter": (
        IMAGE,
        augment("RandomColorJitter", (0, 1), 0.2, 0.2, 0.2, 0.2),
    ),
    "RandomContrast": (IMAGE, augment("RandomContrast", 0.3, **RANGE)),
    "RandomCrop": (IMAGE, augment("RandomCrop", 4, 4)),
    "RandomElasticTransform": (
        IMAGE,
        augment("RandomElasticTransform", 1.0, **RANGE),
    ),
    "RandomErasing": (IMAGE, augment("RandomErasing", **RANGE)),
    "RandomFlip": (IMAGE, augment("RandomFlip")),
    "RandomGaussianBlur": (IMAGE, augment("RandomGaussianBlur", **RANGE)),
    "RandomGrayscale": (IMAGE, lambda h: Inside(L.RandomGrayscale())(h)),
    "RandomHue": (IMAGE, augment("RandomHue", 0.3, (0, 1))),
    "RandomInvert": (IMAGE, augment("RandomInvert", **RANGE)),
    "RandomPerspective": (IMAGE, augment("RandomPerspective")),
    "RandomPosterization": (
        IMAGE,
        augment("RandomPosterization", 4, **RANGE),
    ),
    "RandomRotation": (IMAGE, augment("RandomRotation", 0.2)),
    "RandomSaturation": (IMAGE, augment("RandomSaturation", 0.4, (0, 1))),
    "RandomSharpness": (IMAGE, augment("RandomSharpness", 0.4, (0, 1))),
    "RandomShear": (IMAGE, augment("RandomShear", 0.3, 0.3)),
    "RandomTranslation": (IMAGE, augment("RandomTranslation", 0.2, 0.2)),
    "RandomZoom": (IMAGE, augment("RandomZoom", 0.2)),
    "ReLU": (VECTOR, one("ReLU")),
    "RepeatVector": (VECTOR, one("RepeatVector", 2)),
    "Rescaling": (VECTOR, one("Rescaling", 0.3, 0.1)),
    "Reshape": (VECTOR, one("Reshape", (2, 2))),
    "Resizing": (IMAGE, one("Resizing", 4, 5)),
    "ReversibleEmbedding": (VECTOR, one("ReversibleEmbedding", 7, 2)),
    "STFTSpectrogram": (
        (64, 1),
        one("STFTSpectrogram", frame_length=16, frame_step=8, fft_length=16),
    ),
    "SeparableConv1D": (SERIES, one("SeparableConv1D", 2, 2)),
    "SeparableConv2D": (IMAGE, one("SeparableConv2D", 2, 2)),
    "SimpleRNN": (SERIES, one("SimpleRNN", 2)),
    "SimpleRNNCell": (SERIES, rnn(lambda: L.SimpleRNNCell(2))),
    "Softmax": (VECTOR, one("Softmax")),
    "Solarization": (
        IMAGE,
        augment("Solarization", 0.1, 0.5, value_range=(0, 1)),
    ),
    "StackedRNNCells": (
        SERIES,
        rnn(lambda: L.StackedRNNCells([L.SimpleRNNCell(2), L.GRUCell(2)])),
    ),
    "Subtract": (VECTOR, two(L.Subtract)),
    "TimeDistributed": (SERIES, lambda h: L.TimeDistributed(L.Dense(2))(h)),
    "UnitNormalization": (VECTOR, one("UnitNormalization")),
}
for method in ("nearest", "bilinear", "bicubic", "lanczos3", "lanczos5"):
    LAYERS[f"UpSampling2D {method}"] = (
        IMAGE,
        one("UpSampling2D", 2, interpolation=method),
    )
    LAYERS[f"Resizing {method}"] = (
        IMAGE,
        one("Resizing", 4, 5, interpolation=method),
    )
LAYERS["Resizing antialias"] = (IMAGE, one("Resizing", 4, 5, antialias=True))
TOKENS = {"Embedding", "ReversibleEmbedding"}
# TensorFlow computes them in float32 at some place, whatever they are given.
FLOAT32_INSIDE = {
    "RandomShear",
    "RandomTranslation",
    "RandomZoom",
    "Resizing",
    *(
        f"{layer} {method}"
        for layer in ("UpSampling2D", "Resizing")
        for method in ("bilinear", "bicubic")
    ),
}
# For float64 they have no kernel, or mix it with float32.
FLOAT32_ONLY = {
    "AdaptiveAveragePooling3D",
    "AdaptiveMaxPooling3D",
    "AveragePooling3D",
    "MaxPooling3D",
    "MelSpectrogram",
    "RandAugment",
    "RandomRotation",
    "Resizing antialias",
    *(
        f"{layer} {method}"
        for layer in ("UpSampling2D", "Resizing")
        for method in ("lanczos3", "lanczos5")
    ),
}
# Of these plain Keras has no gradient: of colours by hue and saturation, of
# steps and of histograms.
NO_GRADIENT = {
    "ContrastLimitedAdaptiveHistogramEqualization",
    "Equalization",
    "RandomColorJitter",
    "RandomHue",
    "RandomPosterization",
    "RandomSaturation",
}

# What cannot be in a net, or has nothing in it to be differentiated.
NOT_ALONE = {
    "AugMix": "chooses with Python's generator, anew in each pass",
    "CategoryEncoding": "of integers",
    "Discretization": "to integers",
    "FlaxLayer": "of another backend",
    "HashedCrossing": "of strings or integers",
    "Hashing": "of strings or integers",
    "InputLayer": "is in every net below",
    "InputSpec": "is no layer",
    "IntegerLookup": "of integers",
    "JaxLayer": "of another backend",
    "Layer": "is abstract",
    "MaxNumBoundingBoxes": "of boxes, which are data",
    "SpectralNormalization": (
        "takes vectors that depend on its kernel for constants: what it gives "
        "is no gradient of the loss, and has no symmetric derivative"
    ),
    "StringLookup": "of strings",
    "TFSMLayer": "reads a file; its weights are of no pass",
    "TextVectorization": "of strings",
    "TorchModuleWrapper": "of another backend",
    "Wrapper": "is abstract",
}


def exported(module):
    """Public classes, each by one name: `Conv1D`, not `Convolution1D` too."""
    found = {}
    for name in dir(module):
        value = getattr(module, name)
        if isinstance(value, type):
            found[value] = (
                name if name == value.__name__ else found.get(value, name)
            )
    return sorted(found.values())


def net_of(shape, make, tokens=False):
    x = keras.Input(shape, dtype="int32" if tokens else None)
    y = make(x if tokens else Affine()(x))
    net = keras.Model(x, L.Flatten()(y))
    net.compile("sgd", "mse")
    return net


def gradients(net, x, y, state, shift, vectors):
    """Those of plain Keras, `shift` along the vectors."""
    for variable, value in state:
        variable.assign(value)
    for variable, vector in zip(net.trainable_variables, vectors):
        variable.assign_add(shift * vector)
    with tf.GradientTape() as tape:
        outputs = net(x, training=True)
        loss = net.compute_loss(x, y, outputs)
    found = tape.gradient(loss, [v.value for v in net.trainable_variables])
    for variable, value in state:
        variable.assign(value)
    return [
        np.zeros(v.shape) if g is None else tf.convert_to_tensor(g).numpy()
        for g, v in zip(found, net.trainable_variables)
    ]


def differences(net, x, y, vectors, step=1e-4):
    """`H v`, from gradients at five-point stencils."""
    state = [(v, v.numpy()) for v in net.variables]

    def difference(step):
        ahead, behind = (
            gradients(net, x, y, state, s, vectors) for s in (step, -step)
        )
        return [a - b for a, b in zip(ahead, behind)]

    near, far = difference(step), difference(2 * step)
    return [(8 * n - f) / (12 * step) for n, f in zip(near, far)]


def product(net, x, y, vectors, **kwargs):
    found = hessian_vector_product(net, x, y, vectors, **kwargs)
    return [
        np.zeros(v.shape) if h is None else h.numpy()
        for h, v in zip(found, vectors)
    ]


def directions(net, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=v.shape) for v in net.trainable_variables]


def data(net, shape, tokens=False, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(ROWS, *shape))
    if tokens:
        x = rng.integers(7, size=(ROWS, *shape))
    return x, rng.normal(size=(ROWS, *net.output_shape[1:]))


def assert_right(net, x, y, atol=1e-6, step=1e-4, **kwargs):
    vectors = directions(net)
    expected = differences(net, x, y, vectors, step)
    scale = max(np.abs(e).max() for e in expected)
    assert scale > 0
    for found, e in zip(product(net, x, y, vectors, **kwargs), expected):
        np.testing.assert_allclose(found, e, atol=atol * scale)


def assert_layer(name, **kwargs):
    shape, make = LAYERS[name]
    keras.config.set_floatx("float32" if name in FLOAT32_ONLY else "float64")
    keras.config.set_dtype_policy(keras.config.floatx())
    net = net_of(shape, make, name in TOKENS)
    # No two numbers of a window so close that a step of float32 swaps them.
    x, y = data(net, shape, name in TOKENS, seed=5 * ("MaxPool" in name))
    if name in NO_GRADIENT:
        assert not any(g.any() for g in product(net, x, y, directions(net)))
        assert not any(g.any() for g in differences(net, x, y, directions(net)))
    elif name in FLOAT32_INSIDE | FLOAT32_ONLY:
        assert_right(net, x, y, 0.02, 3e-3, **kwargs)
    else:
        assert_right(net, x, y, **kwargs)


EXPORTED = exported(L)


def test_every_layer_is_here():
    """A new one has to be added above."""
    names = {name for name in LAYERS if " " not in name} | {*NOT_ALONE}
    assert not {*EXPORTED} - names
    # Earlier versions of Keras have fewer.
    assert {*EXPORTED} == names or keras.__version__ < "3.15"


@pytest.mark.parametrize(
    "name", [n for n in LAYERS if n.split()[0] in EXPORTED]
)
def test_layer(name):
    assert_layer(name)


@pytest.mark.parametrize("name", [n for n in LAYERS if "2D " in n])
def test_resizing_in_forward_mode(name):
    assert_layer(name, method="forward_over_reverse")


def halves(y):
    return 0.2 + 0.6 * (y > 0)


def shares(y):
    exponential = np.exp(y)
    return exponential / exponential.sum(-1, keepdims=True)


def hot(y):
    return np.eye(y.shape[-1])[y.argmax(-1)]


def signs(y):
    return np.where(y > 0, 1.0, -1.0)


# What outputs are made with, and what targets are.
LOSSES = {
    "BinaryCrossentropy": ("sigmoid", halves),
    "BinaryFocalCrossentropy": ("sigmoid", lambda y: 1.0 * (y > 0)),
    "CTC": ("linear", lambda y: np.array([[1, 2], [3, 1], [2, 2]])),
    "CategoricalCrossentropy": ("softmax", shares),
    "CategoricalFocalCrossentropy": ("softmax", hot),
    "CategoricalGeneralizedCrossEntropy": ("softmax", lambda y: y.argmax(-1)),
    "CategoricalHinge": ("tanh", hot),
    "Circle": ("tanh", lambda y: np.array([0, 1, 0])),
    "CosineSimilarity": ("tanh", np.asarray),
    "Dice": ("sigmoid", halves),
    "Hinge": ("tanh", signs),
    "Huber": ("linear", np.asarray),
    "KLDivergence": ("softmax", shares),
    "LogCosh": ("linear", np.asarray),
    "MeanAbsoluteError": ("tanh", np.asarray),
    "MeanAbsolutePercentageError": ("tanh", np.asarray),
    "MeanSquaredError": ("linear", np.asarray),
    "MeanSquaredLogarithmicError": ("softplus", np.abs),
    "Poisson": ("softplus", np.abs),
    "SparseCategoricalCrossentropy": ("softmax", lambda y: y.argmax(-1)),
    "SquaredHinge": ("tanh", signs),
    "Tversky": ("sigmoid", halves),
}
ABSTRACT_LOSSES = {"Loss"}


def test_every_loss_is_here():
    assert {*exported(keras.losses)} == {*LOSSES} | ABSTRACT_LOSSES


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", LOSSES)
def test_loss(name):
    activation, targets = LOSSES[name]
    shape = (7, 5) if name == "CTC" else VECTOR
    x = keras.Input(shape)
    net = keras.Model(x, L.Activation(activation)(Affine()(x)))
    net.compile("sgd", getattr(keras.losses, name)())
    x, y = data(net, shape)
    if name == "CTC":
        assert_right(net, x, targets(y), 0.02, 3e-3)
    else:
        assert_right(net, x, targets(y))


NO_ACTIVATIONS = {"deserialize", "get", "serialize"}
ARGUMENTS = {"threshold": (0.3, 0.1)}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    "name",
    sorted(
        n
        for n in dir(keras.activations)
        if n[0] != "_" and n not in NO_ACTIVATIONS
    ),
)
@pytest.mark.parametrize("method", ["auto", "forward_over_reverse"])
def test_activation(name, method):
    function = getattr(keras.activations, name)
    arguments = ARGUMENTS.get(name, ())
    net = net_of(VECTOR, one("Lambda", lambda x: function(x, *arguments)))
    assert_right(net, *data(net, VECTOR), method=method)
