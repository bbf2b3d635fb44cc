"""The budget that is a share of what the model has learnt, in every corner."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from keras_lesam import LESAMModel
from keras_lesam import SAMModel
from keras_lesam import SharpnessAwareModel
from keras_lesam import ascents
from keras_lesam import budgets
from keras_lesam import rules
from tests.helpers import assert_close_weights
from tests.helpers import assert_same_weights
from tests.helpers import classification_data
from tests.helpers import crossentropy
from tests.helpers import dense_net
from tests.helpers import mirrored
from tests.helpers import traces
from tests.helpers import train

SHARE = 0.4
CANDIDATES = (1.0, 0.001)  # of the mean of the outputs
LOGS = ("loss", "rho", "gradient_norm", "sharpness", "sigma")


def relative(net, share=SHARE, reference_loss=None, **options):
    budget = budgets.Relative(share, reference_loss)
    return LESAMModel(net, budget, None, **options)


def closed_form(loss, reference, share=SHARE):
    return share * loss * max(reference - loss, 0.0) / reference


def step(model, *data, **kwargs):
    """The logs of one step alone."""
    model.reset_metrics()
    return model.train_on_batch(*data, return_dict=True, **kwargs)


def ignoring(outputs, weights=None):
    """Outputs whose rows are all their mean, in NumPy."""
    outputs = np.asarray(outputs, "float64")
    if weights is None:
        mean = outputs.mean(0, keepdims=True)
    else:
        weights = weights.reshape(weights.shape + (1,) * 9)
        weights = weights.reshape(weights.shape[: outputs.ndim])
        total = weights.sum(0, keepdims=True)
        mean = (weights * outputs).sum(0, keepdims=True) / np.maximum(
            total, 1e-12
        )
    return np.broadcast_to(mean, outputs.shape)


def reference_of(loss, y, outputs, weights=None):
    """The lesser loss of the mean of outputs and of a thousandth of it."""
    mean = ignoring(outputs, weights)
    return min(
        float(loss(y, factor * mean, sample_weight=weights))
        for factor in CANDIDATES
    )


def expected(net, x, y, loss, weights=None):
    """The budget by hand, of the net as it is now."""
    outputs = keras.ops.convert_to_numpy(net(x, training=False))
    here = float(loss(y, outputs, sample_weight=weights))
    return closed_form(here, reference_of(loss, y, outputs, weights))


_WEIGHTS = {}


def learnt(net, x, y, loss, steps=60):
    """A net that has learnt something, so that there is a gain.

    Trained once for all tests that want it.
    """
    if not net.built:
        net(x)
    shapes = [(w.name, *w.shape) for w in net.weights]
    key = str((shapes, getattr(loss, "name", loss), steps, np.sum(x)))
    if key not in _WEIGHTS:
        net.compile(keras.optimizers.Adam(0.1), loss)
        net.fit(x, y, epochs=steps, batch_size=len(x), verbose=0)
        _WEIGHTS[key] = net.get_weights()
    net.set_weights(_WEIGHTS[key])
    return net


def softmax_net():
    return keras.Sequential([*dense_net().layers, layers.Softmax()])


def regression_net(outputs=1):
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(8, "tanh"),
            layers.Dense(outputs),
        ]
    )


def regression_data(rows=32, offset=0.0, scale=1.0):
    x, _ = classification_data(rows)
    return x, scale * (x[:, :1] * x[:, 1:2] + x[:, 2:3] + offset)


LOSSES = {
    "logits": (dense_net, classification_data(32), crossentropy),
    "probabilities": (
        softmax_net,
        classification_data(32),
        keras.losses.SparseCategoricalCrossentropy,
    ),
    "mse": (regression_net, regression_data(), keras.losses.MeanSquaredError),
    "far from 0": (
        regression_net,
        regression_data(offset=50.0),
        keras.losses.MeanSquaredError,
    ),
    "mae": (regression_net, regression_data(), keras.losses.MeanAbsoluteError),
    "huber": (regression_net, regression_data(), keras.losses.Huber),
    "binary": (
        regression_net,
        (regression_data()[0], (regression_data()[1] > 0) * 1.0),
        lambda: keras.losses.BinaryCrossentropy(from_logits=True),
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_closed_form(name):
    build, (x, y), loss = LOSSES[name]
    net = learnt(build(), x, y, loss())
    model = relative(net)
    model.compile(keras.optimizers.SGD(0.01), loss())
    for _ in range(3):
        sigma = expected(net, x, y, loss())
        logs = step(model, x, y)
        np.testing.assert_allclose(logs["sigma"], sigma, rtol=2e-4)
        assert logs["sigma"] > 1e-4
        np.testing.assert_allclose(
            logs["rho"] * logs["gradient_norm"], logs["sigma"], rtol=1e-4
        )


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("factor", "curvature"),
    [(1e-6, "none"), (1e9, "none"), (1e3, "hvp"), (1e-3, "secant")],
)
def test_the_unit_of_the_loss_does_not_matter(factor, curvature):
    x, y = classification_data(32)
    found = []
    for c in (1.0, factor):
        net = learnt(dense_net(), x, y, crossentropy())
        model = relative(net, curvature=curvature)

        def loss(y, outputs, c=c):
            return c * keras.losses.sparse_categorical_crossentropy(
                y, outputs, from_logits=True
            )

        model.compile(keras.optimizers.SGD(0.01 / c), loss)
        logs = [step(model, x, y) for _ in range(4)]
        found.append((net, [one["rho"] for one in logs], logs[-1]["sigma"] / c))
    (net, rho, sigma), (other, other_rho, other_sigma) = found
    assert min(rho) > 0.01
    np.testing.assert_allclose(rho, other_rho, rtol=1e-6)
    np.testing.assert_allclose(sigma, other_sigma, rtol=1e-6)
    assert_close_weights(net, other, rtol=1e-6)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("unit", [1e-3, 1e4])
def test_the_unit_of_targets_does_not_matter(unit):
    radii = []
    for c in (1.0, unit):
        x, y = regression_data(scale=c)
        net = keras.Sequential([*regression_net().layers, layers.Rescaling(c)])
        model = relative(net)
        model.compile(keras.optimizers.SGD(0.1 / c**2), "mse")
        radii.append([step(model, x, y)["rho"] for _ in range(20)])
    assert max(radii[0]) > 0.01
    np.testing.assert_allclose(*radii, rtol=1e-6, atol=1e-9)


class Counted(layers.Layer):
    """Counts the passes of a step at run time."""

    def __init__(self):
        super().__init__()
        self.counter = tf.Variable(0)

    def call(self, x):
        with tf.control_dependencies([self.counter.assign_add(1)]):
            return tf.identity(x)


def counted_step(model, counter, *data):
    before = int(counter)
    logs = step(model, *data)
    return int(counter) - before, logs


@pytest.mark.parametrize(
    ("loss", "splits", "rows"),
    [("crossentropy", 1, 32), ("mse", 1, 7), ("binary", 2, 32)],
)
def test_one_pass_where_nothing_is_learnt(loss, splits, rows):
    """Where the outputs don't depend on the inputs, whatever they are."""
    x, y = classification_data(rows)
    classes, loss = {
        "crossentropy": (4, crossentropy()),
        "mse": (1, "mse"),
        "binary": (1, keras.losses.BinaryCrossentropy(from_logits=True)),
    }[loss]
    y = y if classes > 1 else y > 1
    count = Counted()
    head = layers.Dense(classes, kernel_initializer="zeros")
    head.build((None, 6))
    head.bias.assign(np.linspace(0.3, 0.7, classes))
    net = keras.Sequential([keras.Input((6,)), count, head])
    model = relative(net, num_batch_splits=splits)
    model.compile(keras.optimizers.SGD(0.0), loss)
    for _ in range(3):
        passes, logs = counted_step(model, count.counter, x, y)
        assert passes == splits
        assert logs["sigma"] == logs["rho"] == 0
    wanted = np.eye(4)[y] if classes > 1 else y[:, None] * 1.0
    head.kernel.assign(np.linalg.lstsq(x, wanted - wanted.mean(0))[0])
    passes, logs = counted_step(model, count.counter, x, y)
    assert passes > splits
    assert logs["sigma"] > 0


def test_worse_than_ignoring_the_input_is_no_gain():
    x, y = classification_data(32)
    count = Counted()
    net = keras.Sequential([keras.Input((6,)), count, *dense_net().layers])
    net.layers[-1].kernel.assign(20 * net.layers[-1].kernel)
    model = relative(net)
    model.compile("sgd", crossentropy())
    passes, logs = counted_step(model, count.counter, x, y)
    assert (passes, logs["sigma"]) == (1, 0)


@pytest.mark.usefixtures("float64")
def test_regularizers_and_added_losses_cancel():
    x, y = classification_data(32)
    regularized = keras.regularizers.L2(0.3)

    class Adds(layers.Layer):
        def call(self, x):
            self.add_loss(7.0 + 0.0 * keras.ops.sum(x))
            return x

    found = []
    for penalty, extra in ((None, []), (regularized, [Adds()])):
        keras.utils.set_random_seed(0)
        net = keras.Sequential(
            [
                keras.Input((6,)),
                *extra,
                layers.Dense(8, "tanh", kernel_regularizer=penalty),
                layers.Dense(4, activity_regularizer=penalty),
            ]
        )
        net.set_weights(learnt(dense_net(), x, y, crossentropy()).get_weights())
        model = relative(net)
        model.compile("sgd", crossentropy())
        found.append((step(model, x, y), net))
    (plain, _), (other, _) = found
    assert other["loss"] > plain["loss"] + 6
    np.testing.assert_allclose(other["sigma"], plain["sigma"], rtol=1e-6)


def two_outputs():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6,))
    hidden = layers.Dense(8, "tanh")(inputs)
    outputs = {
        "label": layers.Dense(4, name="label")(hidden),
        "value": layers.Dense(1, name="value")(hidden),
        "index": layers.Lambda(
            lambda h: keras.ops.argmax(h, -1), output_shape=()
        )(hidden),
    }
    return keras.Model(inputs, outputs)


@pytest.mark.parametrize("weighted", [False, True])
def test_several_outputs(weighted):
    """A dict of losses with weights; one output of integers without a loss."""
    x, label = classification_data(32)
    value = regression_data()[1]
    net = two_outputs()
    losses = {
        "label": crossentropy(),
        "value": keras.losses.MeanSquaredError(),
    }
    y = {"label": label, "value": value}
    share = {"label": 1.0, "value": 0.2}
    weights = None
    if weighted:
        rng = np.random.default_rng(1)
        weights = {name: rng.uniform(0, 1, 32) for name in y}
    model = relative(net)
    model.compile(
        keras.optimizers.Adam(0.05),
        {**losses, "index": None},
        loss_weights={**share, "index": None},
    )
    y["index"] = np.zeros(32)
    if weighted:
        weights["index"] = np.ones(32)
    for _ in range(30):
        outputs = net(x)
        here, there = 0.0, np.zeros(2)
        for name, loss in losses.items():
            w = weights[name] if weighted else None
            found = outputs[name].numpy()
            mean = ignoring(found, w)
            here += share[name] * float(loss(y[name], found, w))
            there += share[name] * np.array(
                [float(loss(y[name], c * mean, w)) for c in CANDIDATES]
            )
        logs = step(model, x, y, sample_weight=weights)
        np.testing.assert_allclose(
            logs["sigma"], closed_form(here, min(there)), rtol=1e-3, atol=1e-5
        )
    assert logs["sigma"] > 0.01


def token_net(mask):
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((5,), dtype="int32"),
            layers.Embedding(9, 6, mask_zero=mask),
            layers.Dense(4),
        ]
    )


@pytest.mark.parametrize("kind", ["plain", "mask", "rows", "positions"])
def test_sequences_have_a_mean_for_each_position(kind):
    rng = np.random.default_rng(0)
    x = rng.integers(1, 9, (16, 5))
    x[:8, 3:] = 0
    y = np.where(x > 4, 1, rng.integers(0, 4, (16, 5)))
    weights = {
        "rows": rng.uniform(0, 2, (16, 1)),
        "positions": rng.uniform(0, 2, (16, 5)),
    }.get(kind)
    net = token_net(kind == "mask")
    learnt(net, x, y, crossentropy(), 30)
    model = relative(net)
    model.compile("sgd", crossentropy())
    counted = weights
    if kind == "mask":
        counted = (x > 0) * 1.0
    elif kind == "rows":
        counted = np.repeat(weights, 5, 1)
    outputs = net(x).numpy()
    # A mean over what counts; Keras divides by the mask, not by the weights.
    losses = [
        keras.losses.sparse_categorical_crossentropy(y, o, from_logits=True)
        for o in (
            outputs,
            *(c * ignoring(outputs, counted) for c in CANDIDATES),
        )
    ]
    losses = [np.asarray(loss, "float64") for loss in losses]
    if counted is None:
        here, *there = (loss.mean() for loss in losses)
    elif kind == "mask":
        here, *there = ((counted * o).sum() / counted.sum() for o in losses)
    else:
        here, *there = ((counted * o).mean() for o in losses)
    logs = step(model, x, y, sample_weight=weights)
    np.testing.assert_allclose(logs["loss"], here, rtol=1e-4)
    np.testing.assert_allclose(
        logs["sigma"], closed_form(here, min(there)), rtol=1e-3
    )
    assert logs["sigma"] > 0.01


def test_pictures_have_a_mean_for_each_pixel():
    x, _ = classification_data(16, (6, 6, 2))
    y = x[..., ::-1] + np.linspace(0, 3, 6)[:, None, None]
    net = keras.Sequential(
        [keras.Input((6, 6, 2)), layers.Conv2D(2, 3, padding="same")]
    )
    loss = keras.losses.MeanSquaredError()
    learnt(net, x, y, loss, 100)
    model = relative(net)
    model.compile("sgd", loss)
    sigma = expected(net, x, y, loss)
    assert sigma > 0.01
    np.testing.assert_allclose(step(model, x, y)["sigma"], sigma, rtol=1e-4)


def test_class_weights_count_as_weights_of_rows():
    x, y = classification_data(32)
    net = learnt(dense_net(), x, y, crossentropy())
    of_class = {0: 0.2, 1: 1.0, 2: 5.0, 3: 0.0}
    model = relative(net)
    model.compile("sgd", crossentropy())
    weights = np.array([of_class[label] for label in y])
    sigma = expected(net, x, y, crossentropy(), weights)
    logs = step(model, x, y, class_weight=of_class)
    np.testing.assert_allclose(logs["sigma"], sigma, rtol=1e-4)


def test_ragged_outputs():
    class Ragged(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(1)

        def call(self, x):
            lengths = tf.constant([1, 2] * 8)
            values = self.dense(tf.gather(x, tf.repeat(tf.range(16), lengths)))
            return tf.RaggedTensor.from_row_lengths(values, lengths)

    def loss(y, outputs):
        y = tf.repeat(y, tf.constant([1, 2] * 8))
        values = getattr(outputs, "flat_values", outputs)
        return tf.reduce_mean(tf.square(values[:, 0] - tf.cast(y, tf.float32)))

    class Own(Ragged):
        def compute_loss(self, x, y, y_pred, sample_weight, training=True):
            return loss(y, y_pred)

    x, _ = classification_data(16)
    y = x[:, 0]
    model = relative(Own())
    model.compile(keras.optimizers.Adam(0.1), run_eagerly=False)
    for _ in range(30):
        outputs = None if not model.model.built else model.model(x).flat_values
        logs = step(model, x, y)
    here = float(loss(y, outputs))
    mean = tf.zeros_like(outputs) + tf.reduce_mean(outputs)
    there = min(float(loss(y, c * mean)) for c in CANDIDATES)
    np.testing.assert_allclose(
        logs["sigma"], closed_form(here, there), rtol=1e-3
    )
    assert logs["sigma"] > 0


@pytest.mark.parametrize(
    ("policy", "narrow_outputs"),
    [("mixed_float16", True), ("mixed_bfloat16", False)],
)
def test_mixed_precision(policy, narrow_outputs):
    keras.config.set_dtype_policy(policy)
    x, y = classification_data(32)
    keras.utils.set_random_seed(0)
    dtype = None if narrow_outputs else "float32"
    net = keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(8, "tanh"),
            layers.Dense(4, dtype=dtype),
        ]
    )
    model = relative(net)
    model.compile(keras.optimizers.Adam(0.05), crossentropy())
    assert step(model, x, y)["sigma"] < 0.1
    for _ in range(40):
        sigma = expected(net, x, y, crossentropy())
        logs = step(model, x, y)
    np.testing.assert_allclose(logs["sigma"], sigma, rtol=0.05)
    assert logs["sigma"] > 0.05


class Few:
    """The running mean of outputs and the budget of few rows, in NumPy."""

    def __init__(self):
        self.mean, self.rows = 0.0, 0.0

    def __call__(self, outputs, y, loss):
        rows = len(outputs)
        mean = outputs.mean(0)
        share = min((rows - 1) / 7, 1.0) if self.rows else 1.0
        used = share * mean + (1 - share) * self.mean
        seen = min(self.rows + rows, max(rows, 64))
        self.mean = self.mean + (mean - self.mean) * rows / seen
        self.rows = seen
        used = np.broadcast_to(used, outputs.shape).astype("float32")
        there = min(float(loss(y, c * used)) for c in CANDIDATES)
        return closed_form(float(loss(y, outputs)), there)


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_few_rows_have_a_running_mean(rows):
    x, y = classification_data(40)
    net = learnt(dense_net(), x, y, crossentropy())
    model = relative(net)
    model.compile(keras.optimizers.SGD(0.01), crossentropy())
    by_hand, found = Few(), []
    for start in range(0, 40, rows):
        part = slice(start, start + rows)
        wanted = by_hand(net(x[part]).numpy(), y[part], crossentropy())
        found.append(step(model, x[part], y[part])["sigma"])
        np.testing.assert_allclose(found[-1], wanted, rtol=1e-3, atol=1e-6)
    # Of a single row there is nothing to compare with at first.
    assert (found[0] == 0) == (rows == 1)
    assert np.mean(found) > 0.02


def test_a_batch_without_rows_leaves_no_trace():
    x, y = classification_data(2)
    model = relative(dense_net())
    model.compile(keras.optimizers.SGD(0.0), crossentropy())
    step(model, x[:0], y[:0])
    for _ in range(2):
        step(model, x, y)
    before = {w.path: w.numpy() for w in model.weights}
    step(model, x[:0], y[:0])
    for weight in model.weights:
        np.testing.assert_array_equal(weight, before[weight.path])
        assert np.isfinite(weight).all()


def test_few_rows_of_a_padded_sequence_and_of_a_picture():
    """The running mean is over rows and positions that count."""
    tokens = np.array([[1, 2, 3, 0, 0]])
    net = token_net(mask=True)
    model = relative(net)
    model.compile(keras.optimizers.SGD(0.0), crossentropy())
    labels = np.ones((1, 5), int)
    first = net(tokens).numpy()
    step(model, tokens, labels)
    mean = model._state.variables["reference.mean_0"]
    np.testing.assert_allclose(mean, first[0, :3].mean(0), rtol=1e-5)
    pictures, _ = classification_data(1, (4, 4, 2))
    net = keras.Sequential([keras.Input((4, 4, 2)), layers.Conv2D(3, 1)])
    model = relative(net)
    model.compile(keras.optimizers.SGD(0.0), "mse")
    step(model, pictures, np.zeros((1, 4, 4, 3)))
    mean = model._state.variables["reference.mean_0"]
    np.testing.assert_allclose(
        mean, net(pictures).numpy().mean((0, 1, 2)), rtol=1e-4
    )


@pytest.mark.parametrize("built", [True, False])
def test_the_running_mean_is_saved_and_resumed(tmp_path, built):
    """Before a first batch it is not known what a model returns."""
    x, y = classification_data(30)

    def new():
        net = learnt(dense_net(), x, y, crossentropy())
        model = relative(net)
        model.compile(keras.optimizers.SGD(0.1), crossentropy())
        return model

    whole = new()
    fit = {"batch_size": 3, "shuffle": False, "verbose": 0}
    whole.fit(x, y, epochs=1, **fit)
    whole.save(tmp_path / "model.keras")
    whole.save_weights(tmp_path / "model.weights.h5")
    history = whole.fit(x, y, epochs=1, **fit).history
    if built:
        other = keras.models.load_model(tmp_path / "model.keras")
        # Also of a file that was saved before a first batch.
        other.save(tmp_path / "again.keras")
        other = keras.models.load_model(tmp_path / "again.keras")
    else:
        other = new()
        other.load_weights(tmp_path / "model.weights.h5")
    resumed = other.fit(x, y, epochs=1, **fit).history
    assert resumed["sigma"] == history["sigma"]
    assert_same_weights(other, whole)


OWN = "does not go by the outputs"


class OnlyAdded(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(1)

    def call(self, x):
        self.add_loss(keras.ops.mean((self.dense(x) - x[:, :1] * 3 - 1) ** 2))
        return x


class LooksElsewhere(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(1)

    def call(self, x):
        self.found = self.dense(x)
        return x

    def compute_loss(self, x, y, y_pred, sample_weight, training=True):
        return keras.ops.mean((self.found - x[:, :1] * 3 - 1) ** 2)


@pytest.mark.parametrize(
    ("build", "run_eagerly"), [(OnlyAdded, False), (LooksElsewhere, True)]
)
def test_losses_that_do_not_go_by_outputs_go_by_the_first_steps(
    build, run_eagerly
):
    x, _ = classification_data(32)
    model = relative(build())
    model.compile(keras.optimizers.SGD(0.02), run_eagerly=run_eagerly)
    logs = []
    with pytest.warns(UserWarning, match=f"{OWN}.*`reference_loss`"):
        logs.append(step(model, x, None))
    logs += [step(model, x, None) for _ in range(14)]
    losses = [one["loss"] for one in logs]
    assert [one["sigma"] for one in logs[:10]] == [0.0] * 10
    start = np.mean(losses[:10])
    for one in logs[10:]:
        wanted = closed_form(one["loss"], start)
        np.testing.assert_allclose(one["sigma"], wanted, rtol=1e-4)
    assert logs[-1]["sigma"] > 0.1


@pytest.mark.parametrize("build", [OnlyAdded, LooksElsewhere])
def test_a_reference_loss_is_taken_at_its_word(build, recwarn):
    x, _ = classification_data(32)
    model = relative(build(), reference_loss=20.0)
    model.compile(keras.optimizers.SGD(0.02))
    logs = step(model, x, None)
    wanted = closed_form(logs["loss"], 20.0)
    np.testing.assert_allclose(logs["sigma"], wanted, rtol=1e-4)
    assert not any(OWN in str(w.message) for w in recwarn)


def test_a_reference_loss_for_a_stock_loss():
    x, y = classification_data(32)
    net = dense_net()
    net.layers[0].kernel_regularizer = keras.regularizers.L2(0.1)
    net.layers[0].kernel.regularizer = keras.regularizers.L2(0.1)
    model = relative(net, reference_loss=np.log(9.0))
    model.compile("sgd", crossentropy())
    here = float(crossentropy()(y, net(x)))
    logs = step(model, x, y)
    assert logs["loss"] > here + 0.1
    np.testing.assert_allclose(
        logs["sigma"], closed_form(here, np.log(9.0)), rtol=1e-4
    )


def test_an_own_loss_of_the_outputs_is_compared_as_any(recwarn):
    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.net = dense_net()

        def call(self, x):
            return {"deep": [self.net(x)]}

        def compute_loss(self, x, y, y_pred, sample_weight, training=True):
            losses = keras.losses.sparse_categorical_crossentropy(
                y, y_pred["deep"][0], from_logits=True
            )
            return 3 * keras.ops.mean(losses)

    x, y = classification_data(32)
    own = Own()
    learnt(own.net, x, y, crossentropy())
    model = relative(own)
    model.compile("sgd")
    sigma = 3 * expected(own.net, x, y, crossentropy())
    np.testing.assert_allclose(step(model, x, y)["sigma"], sigma, rtol=1e-4)
    assert not any(OWN in str(w.message) for w in recwarn)


def contrastive(y, outputs):
    """Each row beside its neighbour, against all others."""
    outputs = keras.ops.normalize(outputs, -1)
    near = keras.ops.matmul(outputs, keras.ops.transpose(outputs)) * 5
    labels = keras.ops.roll(keras.ops.arange(32), 1)
    near = near - 1e6 * keras.ops.eye(32)
    return keras.losses.sparse_categorical_crossentropy(
        labels, near, from_logits=True
    ) + 0 * keras.ops.cast(y, "float32")


def test_a_contrastive_loss_has_its_collapse_as_reference():
    """All rows alike: log of the number of others."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(32, 6)).astype("float32").cumsum(0)
    model = relative(dense_net())
    model.compile(keras.optimizers.Adam(0.02), contrastive)
    for _ in range(60):
        logs = step(model, x, np.zeros(32))
    wanted = closed_form(logs["loss"], np.log(31))
    np.testing.assert_allclose(logs["sigma"], wanted, rtol=1e-3)
    assert logs["sigma"] > 0.05


def test_a_loss_that_cannot_be_compared_says_what_to_do():
    class Picky(keras.Model):
        def __init__(self):
            super().__init__()
            self.net = dense_net()

        def call(self, x):
            self.outputs_seen = self.net(x)
            return self.outputs_seen

        def compute_loss(self, x, y, y_pred, sample_weight, training=True):
            if y_pred is not self.outputs_seen:
                raise RuntimeError("not mine")
            return keras.ops.mean(y_pred**2)

    x, y = classification_data(32)
    model = relative(Picky())
    model.compile("sgd")
    with pytest.raises(ValueError, match=r"`reference_loss`.*not mine"):
        model.train_on_batch(x, y)
    model = relative(Picky(), reference_loss=100.0)
    model.compile("sgd")
    logs = step(model, x, y)
    np.testing.assert_allclose(
        logs["sigma"], closed_form(logs["loss"], 100.0), rtol=1e-4
    )


@pytest.mark.parametrize("level", [-2.0, -0.4])
def test_a_loss_below_0_has_no_floor(level):
    """The budget is a share of the gain alone."""
    x, y = regression_data(offset=1.0)
    net = learnt(regression_net(), x, y, keras.losses.CosineSimilarity(), 5)
    net = learnt(net, x, y, "mse", 100)

    def loss(y, outputs):
        return level + 0.1 * (y - outputs) ** 2

    outputs = net(x).numpy()
    there = min(np.mean((y - c * ignoring(outputs)) ** 2) for c in CANDIDATES)
    gain = 0.1 * (there - np.mean((y - outputs) ** 2))
    model = relative(net)
    model.compile("sgd", loss)
    logs = step(model, x, y)
    assert logs["loss"] < 0
    np.testing.assert_allclose(logs["sigma"], SHARE * gain, rtol=1e-3)


@pytest.mark.parametrize("loss", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_has_no_budget(loss):
    x, y = classification_data(32)
    model = relative(dense_net())
    model.compile(
        keras.optimizers.SGD(0.0), lambda y, z: keras.ops.sum(z) * 0 + loss
    )
    assert step(model, x, y)["rho"] == 0.0


OPTIONS = [
    {"num_batch_splits": 2},
    {"num_batch_splits": 5},
    {"ascent_fraction": 0.5},
    {"ascent_every": 2},
    {"ascent_every": 2, "ascent_fraction": 0.25},
    {"ascent_from": "previous"},
    {"ascent_from": "momentum"},
    {"curvature": "hvp"},
    {"curvature": "secant"},
    {"adaptive": True},
    {"alpha": 0.2},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_it_goes_with_everything_else(options, tmp_path):
    x, y = classification_data()
    y = (x[:, 0] > 0) + 2 * (x[:, 1] > 0)
    model = relative(dense_net(), **options)
    history = train(
        *(model, x, y),
        **{"epochs": 6, "jit_compile": "num_batch_splits" in options},
        optimizer=keras.optimizers.Adam(0.03),
    )
    assert np.isfinite(history["loss"]).all()
    assert history["sigma"][-1] > history["sigma"][0]
    assert history["sigma"][-1] > 0.005
    assert history["rho"][-1] > 0
    model.save(tmp_path / "model.keras")
    other = keras.models.load_model(tmp_path / "model.keras")
    assert other.get_config()["sigma"] == model.get_config()["sigma"]
    assert repr(other.budget) == repr(model.budget) == repr(other.sigma)


def test_earlier_losses_where_there_is_no_pass_at_the_weights():
    """Those of the step before, at its `w + eps`."""
    x, y = classification_data(32)
    net = learnt(dense_net(), x, y, crossentropy())
    model = relative(net, ascent_from="previous")
    model.compile(keras.optimizers.SGD(0.01), crossentropy())
    first, *logs = [step(model, x, y) for _ in range(5)]
    assert first["sigma"] == first["rho"] == 0
    # The first step was made at the weights.
    net = learnt(dense_net(), x, y, crossentropy())
    np.testing.assert_allclose(
        logs[0]["sigma"], expected(net, x, y, crossentropy()), rtol=1e-4
    )
    assert all(one["rho"] > 0 for one in logs)


def replicated(count, build_options, rows=64, batch_size=16):
    x, y = classification_data(rows)
    model = relative(dense_net(), **build_options)
    history = train(
        *(model, x, y),
        **{"epochs": 4, "shuffle": False, "batch_size": batch_size},
        optimizer=keras.optimizers.Adam(0.03),
    )
    return model, history


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("batch_size", [16, 4])
@pytest.mark.parametrize("scope", ["replica", "global"])
def test_replicas_are_parts_or_the_whole(scope, batch_size):
    with mirrored(2).scope():
        model, history = replicated(
            2, {"perturbation_scope": scope}, 32, batch_size
        )
    options = {"num_batch_splits": 2} if scope == "replica" else {}
    other, others = replicated(1, options, 32, batch_size)
    assert_close_weights(model.model, other.model, atol=1e-7)
    for name in LOGS:
        np.testing.assert_allclose(
            history[name], others[name], rtol=1e-6, err_msg=name
        )
    assert history["sigma"][-1] > 0.01


@pytest.mark.filterwarnings("ignore:.*moves its weights in place")
def test_in_place():
    """By the state that the passes write, once; loss trackers too."""

    class Hidden(layers.Layer):
        def build(self, shape):
            self.w = self.add_weight(shape=(shape[-1], 4), name="w")

        @tf.function
        def helper(self, x):
            return x @ self.w

        def call(self, x):
            self.add_loss(0.01 * keras.ops.sum(self.w**2))
            return self.helper(x)

    class Seen(Hidden):
        def call(self, x):
            self.add_loss(0.01 * keras.ops.sum(self.w**2))
            return x @ self.w

    x, y = classification_data()
    found = []
    for layer in (Hidden, Seen):
        keras.utils.set_random_seed(0)
        inputs = keras.Input((6,))
        hidden = layers.BatchNormalization()(layer()(inputs))
        outputs = [
            layers.Dense(4, name="a")(hidden),
            layers.Dense(1, name="b")(hidden),
        ]
        net = keras.Model(inputs, outputs)
        model = relative(net)
        history = train(
            *(model, x, [y, x[:, :1]]),
            loss=[crossentropy(), "mse"],
            optimizer=keras.optimizers.Adam(0.03),
            epochs=5,
        )
        found.append((model, history))
    (model, history), (other, others) = found
    assert history["sigma"][-1] > 0.01
    for name, values in history.items():
        np.testing.assert_allclose(
            values, others[name], rtol=1e-3, err_msg=name
        )
    assert_close_weights(model.model, other.model, rtol=1e-2, atol=1e-4)


def test_losses_of_outputs_are_tracked_once():
    x, label = classification_data(32)
    y = {"label": label, "value": x[:, :1], "index": np.zeros(32)}
    logs = []
    for wrap in (relative, lambda net: LESAMModel(net, 0.0)):
        model = wrap(two_outputs())
        model.compile(
            "sgd", {"label": crossentropy(), "value": "mse", "index": None}
        )
        logs.append(step(model, x, y))
    for name in ("loss", "label_loss", "value_loss"):
        np.testing.assert_allclose(logs[0][name], logs[1][name], rtol=1e-5)


def test_no_length_is_asked_for(recwarn):
    x, y = classification_data(32)
    model = relative(dense_net())
    model.compile("sgd", crossentropy())
    seen = traces(model)
    model.train_on_batch(x, y)
    before = len(seen)
    model.train_on_batch(x, y)
    assert len(seen) == before
    stop = keras.callbacks.EarlyStopping("loss")
    data = tf.data.Dataset.from_tensors((x, y)).repeat(3)
    data = data.filter(lambda x, y: True)
    model.fit(data, epochs=2, verbose=0, callbacks=[stop])
    assert not [w for w in recwarn if "EarlyStopping" in str(w.message)]


def test_a_share_of_0_is_plain_training():
    x, y = classification_data()
    nets = []
    for wrap in (lambda net: net, lambda net: relative(net, 0.0)):
        net = dense_net()
        train(wrap(net), x, y)
        nets.append(net)
    assert_same_weights(*nets)


REFUSED = [
    (lambda: budgets.Relative(-0.1), "`share` must.*-0.1"),
    (lambda: budgets.Relative(0.1, 0.0), "`reference_loss` must.*0"),
    (lambda: budgets.Constant(0.1, guard=0), "`guard` must.*0"),
    (
        lambda: LESAMModel(dense_net(), budgets.Relative(0.1), warmup=0.1),
        r"`sigma` is a budget.*leave.*Relative\(share=0.1\), warmup=0.1",
    ),
    (
        lambda: LESAMModel(dense_net(), budgets.Relative(0.1), guard=0.1),
        "`sigma` is a budget.*guard=0.1",
    ),
    (
        lambda: SharpnessAwareModel(
            dense_net(), rules.SAM(0.1), budgets.Relative(0.1)
        ),
        "a rise of the loss, and that of this rule a radius.*SAM",
    ),
]


@pytest.mark.parametrize(("make", "match"), REFUSED, ids=range(len(REFUSED)))
def test_what_is_refused(make, match):
    with pytest.raises(ValueError, match=f"(?s){match}"):
        make()


def test_a_budget_that_does_not_ask_is_not_told():
    with pytest.raises(ValueError, match="`needs_reference` is True"):
        _ = budgets.Losses(tf.constant(1.0)).gain


# The guard of other budgets.


def gain_of(net, x, y):
    outputs = net(x).numpy()
    loss = crossentropy()
    return reference_of(loss, y, outputs) - float(loss(y, outputs))


@pytest.mark.parametrize(
    ("sigma", "curvature"), [(0.001, "none"), (5.0, "none"), (5.0, "hvp")]
)
def test_a_guard_of_the_loss_budget(sigma, curvature):
    x, y = classification_data(32)
    net = learnt(dense_net(), x, y, crossentropy(), 10)
    model = LESAMModel(
        *(net, sigma, None),
        **{"warmup": 0, "anneal": 0, "guard": 0.25, "curvature": curvature},
    )
    model.compile("sgd", crossentropy())
    gain = gain_of(net, x, y)
    logs = step(model, x, y)
    np.testing.assert_allclose(
        logs["sigma"], min(sigma, 0.25 * gain), rtol=1e-4
    )


FAMILY = [
    rules.SAM,
    rules.ASAM,
    rules.UnnormalizedSAM,
    rules.GSAM,
    rules.FriendlySAM,
    rules.WSAM,
    rules.LookSAM,
]


@pytest.mark.parametrize(
    ("rule", "rho"), [(rules.SAM, 1e-3), *((rule, 10.0) for rule in FAMILY)]
)
def test_a_guard_of_the_radius(rule, rho):
    """`rho g.d` is at most a share of the gain, and `rho` if that is less."""
    x, y = classification_data(32)
    net = learnt(dense_net(), x, y, crossentropy(), 10)
    copy = keras.models.clone_model(net)
    copy.set_weights(net.get_weights())
    models = [SAMModel(net, rule(rho), guard=0.25), SAMModel(copy, rule(rho))]
    for model in models:
        model.compile("sgd", crossentropy())
    gain = gain_of(net, x, y)
    logs, free = (step(model, x, y) for model in models)
    rise = free["rho"] * free["gradient_norm"]
    factor = min(1.0, 0.25 * gain / rise)
    np.testing.assert_allclose(logs["rho"], factor * free["rho"], rtol=1e-3)
    assert (factor == 1) == (rho < 1)


@pytest.mark.parametrize("rule", [rules.SAM, rules.LookSAM])
def test_where_nothing_is_learnt_a_guard_leaves_one_pass(rule):
    x, y = classification_data(32)
    count = Counted()
    head = layers.Dense(4, kernel_initializer="zeros")
    net = keras.Sequential([keras.Input((6,)), count, head])
    model = SAMModel(net, rule(0.1), guard=0.5)
    model.compile(keras.optimizers.SGD(0.0), crossentropy())
    passes, logs = counted_step(model, count.counter, x, y)
    assert (passes, logs["rho"]) == (1, 0)


@pytest.mark.parametrize(
    ("wrap", "ascent_from"), [(LESAMModel, "previous"), (SAMModel, "momentum")]
)
def test_a_guard_goes_by_earlier_losses(wrap, ascent_from):
    x, y = classification_data(32)
    net = learnt(dense_net(), x, y, crossentropy(), 10)
    options = {"sigma": 9.0} if wrap is LESAMModel else {"rho": 9.0}
    model = wrap(
        *(net,),
        **{"warmup": 0, "anneal": 0, "guard": 0.1, **options},
        ascent_from=ascent_from,
    )
    model.compile(keras.optimizers.SGD(0.001), crossentropy())
    gain = gain_of(net, x, y)
    assert step(model, x, y)["rho"] == 0
    logs = step(model, x, y)
    np.testing.assert_allclose(
        logs["rho"] * logs["gradient_norm"], 0.1 * gain, rtol=1e-4
    )


@pytest.mark.parametrize(
    ("wrap", "schedule"), [(LESAMModel, True), (SAMModel, False)]
)
def test_a_guard_is_saved_and_off_by_default(wrap, schedule, tmp_path):
    amount = 0.2
    if schedule:
        amount = keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.9)
    options = {("sigma" if wrap is LESAMModel else "rho"): amount}
    assert wrap(dense_net(), **options).guard is None
    model = wrap(dense_net(), guard=0.5, **options)
    model.compile("sgd", crossentropy())
    model.save(tmp_path / "model.keras")
    other = keras.models.load_model(tmp_path / "model.keras")
    assert other.guard == other.budget.guard == model.guard == 0.5
    if not schedule:
        setattr(other, next(iter(options)), 0.3)
        assert other.guard == 0.5


def test_a_guard_with_a_rule_and_budget_of_ones_own():
    x, y = classification_data(32)

    class Mine(rules.Rule):
        def radius(self, norm, budget, curvature=None):
            return rules.usable_radius(2 * budget, norm)

    net = learnt(dense_net(), x, y, crossentropy(), 10)
    model = SharpnessAwareModel(
        *(net, Mine(), budgets.Constant(9.0, guard=0.1)),
        ascents.Every(1),
    )
    model.compile("sgd", crossentropy())
    gain = gain_of(net, x, y)
    logs = step(model, x, y)
    np.testing.assert_allclose(
        logs["rho"] * logs["gradient_norm"], 0.1 * gain, rtol=1e-4
    )


def test_a_share_assigned_later_takes_effect_without_a_retrace():
    x, y = classification_data(rows=64)
    shares, budgets_met = (0.2, 0.8, 0.4), []
    for first in (0.2, 0.0):
        model = relative(learnt(dense_net(), x, y, crossentropy()), first)
        model.compile(keras.optimizers.SGD(0.0), crossentropy())
        step(model, x, y)
        model.share = shares[0]
        step(model, x, y)
        seen = traces(model)
        count = len(seen)
        budgets_met.clear()
        for share in shares:
            model.share = share
            budgets_met.append(step(model, x, y)["sigma"] / share)
        assert budgets_met[0] > 0
        np.testing.assert_allclose(budgets_met, budgets_met[0], rtol=1e-5)
        assert len(seen) == count


def functional_net():
    inputs = keras.Input((8,))
    outputs = {"a": layers.Dense(3)(inputs), "b": layers.Dense(1)(inputs)}
    return keras.Model(inputs, outputs)


@pytest.mark.parametrize("build", [dense_net, functional_net])
def test_the_weights_are_as_many_before_a_training_as_after(build):
    """So that what was taken before can be put back."""
    x, y = classification_data(rows=16)
    if build is functional_net:
        x, y = np.ones((16, 8)), {"a": np.ones((16, 3)), "b": np.ones((16, 1))}
    model = LESAMModel(build())
    loss = crossentropy() if build is dense_net else "mse"
    model.compile(keras.optimizers.SGD(0.1), loss)
    before, paths = model.get_weights(), [v.path for v in model.weights]
    first = model.fit(x, y, verbose=0, shuffle=False).history
    assert [v.path for v in model.weights] == paths
    model.set_weights(before)
    model.optimizer.iterations.assign(0)
    assert model.fit(x, y, verbose=0, shuffle=False).history == first
