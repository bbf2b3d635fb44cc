"""The models that users have, against the reference of tests/reference.py.

Each is trained for a few steps by both; weights, and state such as moving
averages, must agree.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_lesam import SAMModel
from tests import reference
from tests.helpers import assert_close_weights
from tests.helpers import assert_same_weights
from tests.helpers import classification_data
from tests.helpers import constant_lesam
from tests.helpers import crossentropy
from tests.helpers import dense_net
from tests.helpers import train

LAYERS = keras.layers
ROWS, CLASSES = 24, 3


def numbers(*shape):
    return np.random.default_rng(1).normal(size=(ROWS, *shape))


def tokens():
    # Few of them: every batch has rows of the table that occur repeatedly.
    return np.random.default_rng(2).integers(1, 5, size=(ROWS, 6))


def labels():
    return np.random.default_rng(3).integers(CLASSES, size=ROWS)


def sequential(*layers, shape):
    return keras.Sequential(
        [keras.Input(shape), *layers, LAYERS.Dense(CLASSES)]
    )


def convolutional():
    return sequential(
        LAYERS.Conv2D(4, 3, activation="relu", kernel_regularizer="l2"),
        LAYERS.DepthwiseConv2D(3, padding="same"),
        LAYERS.BatchNormalization(momentum=0.9),
        LAYERS.MaxPooling2D(),
        LAYERS.Flatten(),
        shape=(6, 6, 2),
    )


def recurrent(cell):
    return sequential(cell(5, return_sequences=True), cell(4), shape=(4, 3))


def embedding():
    return sequential(
        LAYERS.Embedding(20, 4),
        LAYERS.GlobalAveragePooling1D(),
        shape=(6,),
    )


def masked_embedding():
    return sequential(
        LAYERS.Embedding(20, 4, mask_zero=True), LAYERS.LSTM(4), shape=(6,)
    )


def attention():
    inputs = keras.Input((4, 6))
    x = LAYERS.LayerNormalization()(inputs)
    x = inputs + LAYERS.MultiHeadAttention(2, 3)(x, x)
    x = LAYERS.GlobalAveragePooling1D()(x)
    return keras.Model(inputs, LAYERS.Dense(CLASSES)(x))


def frozen():
    net = sequential(
        LAYERS.Dense(6, activation="tanh"),
        LAYERS.BatchNormalization(),
        LAYERS.Dense(6, activation="tanh"),
        shape=(5,),
    )
    net.layers[0].trainable = False
    return net


def added_loss():
    class Penalty(LAYERS.Layer):
        def call(self, x):
            self.add_loss(0.1 * keras.ops.mean(keras.ops.square(x)))
            return x

    return sequential(
        LAYERS.Dense(6, activation="tanh", activity_regularizer="l2"),
        Penalty(),
        LAYERS.Dense(4, kernel_regularizer="l2", bias_regularizer="l2"),
        shape=(5,),
    )


def shared_layer():
    inputs = keras.Input((5,))
    dense = LAYERS.Dense(5, activation="tanh")
    return keras.Model(inputs, LAYERS.Dense(CLASSES)(dense(dense(inputs))))


def nested():
    return sequential(
        sequential(LAYERS.Dense(4, activation="tanh"), shape=(5,)),
        LAYERS.UnitNormalization(),
        shape=(5,),
    )


class Subclassed(keras.Model):
    """With a branch that the loss does not touch, and no `training`."""

    def __init__(self):
        super().__init__()
        self.hidden = LAYERS.Dense(6, activation="tanh")
        self.out = LAYERS.Dense(CLASSES)
        self.unused = LAYERS.Dense(2)

    def call(self, x):
        x = self.hidden(x)
        self.unused(x)
        return self.out(x)


def subclassed():
    net = Subclassed()
    net(np.zeros((1, 5)))
    return net


MODELS = {
    "convolutional": (convolutional, lambda: numbers(6, 6, 2)),
    "lstm": (lambda: recurrent(LAYERS.LSTM), lambda: numbers(4, 3)),
    "gru": (lambda: recurrent(LAYERS.GRU), lambda: numbers(4, 3)),
    "embedding": (embedding, tokens),
    "masked embedding": (masked_embedding, tokens),
    "attention": (attention, lambda: numbers(4, 6)),
    "frozen layers": (frozen, lambda: numbers(5)),
    "added losses": (added_loss, lambda: numbers(5)),
    "shared layer": (shared_layer, lambda: numbers(5)),
    "nested": (nested, lambda: numbers(5)),
    "subclassed": (subclassed, lambda: numbers(5)),
}


def pair(build):
    """Two nets with the same weights."""
    net, twin = build(), build()
    twin.set_weights(net.get_weights())
    return net, twin


def fit_both(build, x, y, *, options=None, compile_arguments=None):
    net, twin = pair(build)
    loss = crossentropy()
    arguments = {"sigma": 0.1, "batch_size": 8, "epochs": 2}
    reference.fit(twin, loss, x, y, **arguments, **(options or {}))
    model = constant_lesam(net, 0.1, **(options or {}))
    model.compile(keras.optimizers.SGD(0.1), loss, **(compile_arguments or {}))
    model.fit(x, y, batch_size=8, epochs=2, shuffle=False, verbose=0)
    return net, twin


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("options", [{}, {"adaptive": True, "alpha": 0.4}])
def test_model(name, options, float64):
    build, inputs = MODELS[name]
    before = build().get_weights()
    net, twin = fit_both(build, inputs(), labels(), options=options)
    assert_close_weights(net, twin, rtol=1e-5, atol=1e-7)
    moved = [np.any(a != b) for a, b in zip(before, net.get_weights())]
    assert any(moved)


@pytest.mark.parametrize(
    "name", ["convolutional", "lstm", "embedding", "subclassed"]
)
def test_model_in_parts(name, float64):
    build, inputs = MODELS[name]
    net, twin = pair(build)
    x, y = inputs(), labels()
    reference.fit(twin, crossentropy(), x, y, sigma=0.1, batch_size=8, parts=3)
    model = constant_lesam(net, 0.1, num_batch_splits=3)
    train(model, x, y, batch_size=8, epochs=2, shuffle=False)
    assert_close_weights(net, twin, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["convolutional", "embedding", "attention"])
def test_model_under_xla(name, float64):
    build, inputs = MODELS[name]
    net, twin = fit_both(
        build,
        inputs(),
        labels(),
        compile_arguments={"jit_compile": True},
    )
    assert_close_weights(net, twin, rtol=1e-5, atol=1e-7)


def test_sparse_gradients_stay_sparse():
    """Adam's moments of rows that a batch does not have are left alone."""
    kinds = []

    class Spy(keras.optimizers.SGD):
        def apply(self, grads, trainable_variables=None):
            kinds.append([type(g) for g in grads])
            return super().apply(grads, trainable_variables)

    for parts in (1, 2):
        net = embedding()
        model = constant_lesam(net, num_batch_splits=parts)
        train(model, tokens(), labels(), optimizer=Spy(0.1), epochs=1)
        assert kinds[-1][0] is tf.IndexedSlices


# Several inputs and outputs, weights of rows and losses.


def two_headed():
    left = keras.Input((5,), name="left")
    right = keras.Input((4, 3), name="right")
    x = LAYERS.Concatenate()(
        [LAYERS.Dense(6, activation="tanh")(left), LAYERS.LSTM(4)(right)]
    )
    outputs = {
        "kind": LAYERS.Dense(CLASSES, name="kind")(x),
        "size": LAYERS.Dense(1, name="size")(x),
    }
    return keras.Model({"left": left, "right": right}, outputs)


def two_headed_data():
    x = {"left": numbers(5), "right": numbers(4, 3)}
    return x, {"kind": labels(), "size": numbers(1)}


def weighted_sum(y, outputs, sample_weight=None):
    """The reference's words for loss_weights={"kind": 1, "size": 0.3}."""
    kind, size = (
        (None, None)
        if sample_weight is None
        else (
            sample_weight["kind"],
            sample_weight["size"],
        )
    )
    return crossentropy()(y["kind"], outputs["kind"], kind) + 0.3 * (
        keras.losses.MeanSquaredError()(y["size"], outputs["size"], size)
    )


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("weighted", [False, True])
def test_several_inputs_and_outputs(parts, weighted, float64):
    x, y = two_headed_data()
    weight = None
    if weighted:
        weight = {
            "kind": np.linspace(0.5, 1.5, ROWS),
            "size": np.linspace(2.0, 0.1, ROWS),
        }
    net, twin = pair(two_headed)
    reference.fit(
        twin,
        weighted_sum,
        x,
        y,
        sigma=0.1,
        batch_size=8,
        sample_weight=weight,
        parts=parts,
    )
    model = constant_lesam(net, 0.1, num_batch_splits=parts)
    history = train(
        model,
        x,
        y,
        loss={"kind": crossentropy(), "size": "mse"},
        loss_weights={"kind": 1.0, "size": 0.3},
        metrics={"kind": "accuracy"},
        sample_weight=weight,
        batch_size=8,
        epochs=2,
        shuffle=False,
    )
    assert_close_weights(net, twin, rtol=1e-5, atol=1e-7)
    assert {"kind_loss", "size_loss", "kind_accuracy"} <= set(history)
    # The trackers of the outputs saw each batch once.
    total = np.array(history["kind_loss"]) + 0.3 * np.array(
        history["size_loss"]
    )
    np.testing.assert_allclose(history["loss"], total, rtol=1e-6)


def test_class_weight(float64):
    x, y = numbers(5), labels()
    class_weight = {0: 0.5, 1: 1.0, 2: 3.0}
    weight = np.array([class_weight[label] for label in y])
    net, twin = pair(shared_layer)
    reference.fit(
        twin,
        crossentropy(),
        x,
        y,
        sigma=0.1,
        batch_size=8,
        epochs=1,
        sample_weight=weight,
    )
    model = constant_lesam(net, 0.1)
    train(
        model,
        x,
        y,
        class_weight=class_weight,
        batch_size=8,
        epochs=1,
        shuffle=False,
    )
    assert_close_weights(net, twin, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("eagerly", [False, True])
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_models_unbuilt_until_the_first_batch(eagerly, share):
    def unbuilt(seed):
        keras.utils.set_random_seed(seed)
        net = keras.Sequential(
            [
                LAYERS.Dense(6, activation="tanh"),
                LAYERS.BatchNormalization(),
                LAYERS.Dropout(0.2, seed=1),
                LAYERS.Dense(CLASSES),
            ]
        )
        return net

    x, y = numbers(5).astype("float32"), labels()
    nets = [unbuilt(0), unbuilt(0)]
    nets[1].build((None, 5))
    for net in nets:
        model = constant_lesam(net, 0.1, ascent_fraction=share)
        assert model.built == net.built
        history = train(
            model,
            x,
            y,
            optimizer=keras.optimizers.Adam(0.01),
            metrics=["accuracy"],
            run_eagerly=eagerly,
            shuffle=False,
        )
        assert model.built
        assert "accuracy" in history
    assert_same_weights(*nets)


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_unbuilt_losses_of_several_outputs_accumulate(share):
    """Trackers that the first batch creates are not baked into the graph."""
    x, y = two_headed_data()
    history = train(
        constant_lesam(two_headed(), 0.1, ascent_fraction=share),
        x,
        y,
        loss={"kind": crossentropy(), "size": "mse"},
        batch_size=8,
        epochs=2,
    )
    total = np.array(history["kind_loss"]) + np.array(history["size_loss"])
    np.testing.assert_allclose(history["loss"], total, rtol=1e-5)


def test_masks_of_outputs_reach_loss_and_metrics_in_parts():
    def net():
        keras.utils.set_random_seed(0)
        return keras.Sequential(
            [
                keras.Input((6,)),
                LAYERS.Embedding(20, 4, mask_zero=True),
                LAYERS.Dense(CLASSES),
            ]
        )

    x = tokens() * np.random.default_rng(5).integers(2, size=(ROWS, 6))
    y = np.random.default_rng(3).integers(CLASSES, size=(ROWS, 6))
    histories = []
    for parts in (1, 4):
        model = constant_lesam(net(), 1e-12, num_batch_splits=parts)
        histories.append(
            train(
                model,
                x,
                y,
                optimizer=keras.optimizers.SGD(0.0),
                metrics=["sparse_categorical_accuracy"],
            )
        )
    name = "sparse_categorical_accuracy"
    assert histories[0][name] == histories[1][name]


@pytest.mark.parametrize("kind", ["ragged", "sparse"])
def test_ragged_and_sparse_inputs_in_parts(kind):
    if kind == "ragged":
        rows = [list(range(1 + i % 4)) for i in range(12)]
        x = tf.ragged.constant(rows, dtype=tf.float32)
        shape = {"shape": (None,), "ragged": True, "dtype": "float32"}
        layers = [
            LAYERS.Lambda(lambda t: tf.reduce_sum(t, axis=1, keepdims=True))
        ]
    else:
        x = tf.sparse.from_dense(np.eye(12, 5, dtype="float32"))
        shape, layers = {"shape": (5,), "sparse": True}, []
    net = keras.Sequential(
        [keras.Input(**shape), *layers, LAYERS.Dense(CLASSES)]
    )
    data = tf.data.Dataset.from_tensor_slices((x, labels()[:12])).batch(5)
    model = constant_lesam(net, num_batch_splits=2)
    model.compile("sgd", crossentropy())
    history = model.fit(data, epochs=2, verbose=0).history
    assert np.all(np.isfinite(history["loss"]))
    assert min(history["rho"]) > 0


def test_without_trainable_weights_nothing_is_trained():
    net = sequential(shape=(5,))
    net.trainable = False
    with pytest.warns(UserWarning, match="does not have any trainable"):
        history = train(constant_lesam(net), numbers(5), labels(), epochs=1)
    assert np.isfinite(history["loss"][0])


def rematerialized():
    keras.utils.set_random_seed(0)
    with keras.RematScope(mode="full"):
        inner = LAYERS.Dense(4, activation="tanh", name="inner")
        return sequential(inner, shape=(5,))


def test_layers_that_recompute_their_weights_are_refused_in_graphs():
    """Plain Keras cannot train them there."""
    net = rematerialized()
    before = net.get_weights()
    with pytest.raises(ValueError, match=r"RematScope.*Received: .*'inner'"):
        train(constant_lesam(net), numbers(5), labels())
    for a, b in zip(before, net.get_weights()):
        np.testing.assert_array_equal(a, b)


@pytest.mark.filterwarnings("ignore:.*moves its weights in place")
def test_layers_that_recompute_their_weights_train_eagerly():
    plain, net = rematerialized(), rematerialized()
    train(plain, numbers(5), labels(), run_eagerly=True)
    model = SAMModel(net, rho=1e-30)
    train(model, numbers(5), labels(), run_eagerly=True)
    assert model._passes.is_in_place
    assert_close_weights(net, plain, atol=1e-6)


def test_layers_that_recompute_only_activations_train(float64):
    def build():
        with keras.RematScope(mode="activations"):
            return sequential(LAYERS.Dense(4, activation="tanh"), shape=(5,))

    net, twin = fit_both(build, numbers(5), labels())
    assert_close_weights(net, twin, rtol=1e-5, atol=1e-7)


def test_noise_of_the_global_seed_is_one_for_both_passes():
    """A layer that draws without a seed of its own, from Keras's global one."""

    class Noise(LAYERS.Layer):
        def call(self, x, training=False):
            return x + keras.random.normal(keras.ops.shape(x))

    net = sequential(Noise(), shape=(5,))
    history = train(
        constant_lesam(net, 0.1, 1e-30), numbers(5), labels(), epochs=2
    )
    assert history["sharpness"] == [0.0, 0.0]
    # ... and another one in the next step.
    assert history["loss"][0] != history["loss"][1]


def test_a_loss_that_is_only_added():
    """No `loss` in `compile`, no targets."""
    net = keras.Sequential(
        [keras.Input((5,)), LAYERS.Dense(3, activity_regularizer="l2")]
    )
    model = constant_lesam(net, 0.01)
    model.compile("sgd")
    history = model.fit(numbers(5).astype("float32"), epochs=2, verbose=0)
    assert min(history.history["rho"]) > 0
    assert history.history["loss"][1] < history.history["loss"][0]


def test_outputs_that_depend_on_training():
    """An auxiliary head that only training sees."""

    class Auxiliary(keras.Model):
        def __init__(self):
            super().__init__()
            self.main, self.aux = LAYERS.Dense(CLASSES), LAYERS.Dense(CLASSES)

        def call(self, x, training=False):
            main, aux = self.main(x), self.aux(x)
            return (main, aux) if training else main

        def compute_loss(
            self, x=None, y=None, y_pred=None, sample_weight=None, training=True
        ):
            heads = y_pred if training else (y_pred,)
            return sum(crossentropy()(y, head) for head in heads)

    model = constant_lesam(Auxiliary())
    history = train(model, numbers(5).astype("float32"), labels())
    assert min(history["rho"]) > 0


# Losses that are a vector over the rows: plain Keras minimises their sum.


def no_reduction(net):
    return net, keras.losses.SparseCategoricalCrossentropy(
        from_logits=True, reduction="none"
    )


def own_vector(net):
    class OwnVector(keras.Model):
        def compute_loss(
            self, x=None, y=None, y_pred=None, sample_weight=None, training=True
        ):
            return keras.losses.sparse_categorical_crossentropy(
                y, y_pred, from_logits=True
            ) + sum(self.losses)

    return OwnVector(net.inputs, net.outputs), None


@pytest.mark.parametrize("vector", [no_reduction, own_vector])
def test_the_sum_of_a_vector_of_losses_is_minimised(vector):
    x, y = classification_data(rows=72)
    nets, histories = [], []
    for wrap in (lambda net: net, lambda net: SAMModel(net, rho=1e-30)):
        net, loss = vector(dense_net())
        model = wrap(net)
        model.compile(keras.optimizers.SGD(0.01), loss)
        histories.append(model.fit(x, y, epochs=2, verbose=0).history)
        nets.append(net)
    assert_close_weights(*nets, atol=1e-6)
    np.testing.assert_allclose(histories[0]["loss"], histories[1]["loss"])


@pytest.mark.usefixtures("float64")
def test_the_budget_of_a_vector_of_losses_is_that_of_their_sum():
    """A batch of 8 rows: a budget of 0.8 is one of 0.1 for the mean."""
    x, y = classification_data(rows=8)
    mean, total = (
        keras.losses.SparseCategoricalCrossentropy(
            from_logits=True, reduction=reduction
        )
        for reduction in ("sum_over_batch_size", "none")
    )
    rhos = []
    for loss, sigma in ((mean, 0.1), (total, 0.8)):
        model = constant_lesam(dense_net(), sigma)
        model.compile(keras.optimizers.SGD(0.0), loss)
        rhos.append(model.fit(x, y, batch_size=8, verbose=0).history["rho"])
    np.testing.assert_allclose(*rhos)


@pytest.mark.parametrize(
    "options", [{"num_batch_splits": 2}, {"ascent_fraction": 0.5}], ids=str
)
def test_parts_of_a_batch_are_not_for_stateful_layers(options):
    net = keras.Sequential(
        [
            keras.Input(batch_shape=(8, 4, 3)),
            keras.layers.LSTM(5, stateful=True, name="memory"),
            keras.layers.Dense(1),
        ]
    )
    model = SAMModel(net, rho=0.1, **options)
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match=r"stateful.*\['memory'\]"):
        model.fit(np.ones((8, 4, 3)), np.ones((8, 1)), batch_size=8, verbose=0)
