"""Several replicas on logical CPUs against one device, by equivalence."""

import os
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from keras_lesam import SharpnessAwareModel
from keras_lesam import budgets
from keras_lesam import rules
from keras_lesam.curvature import top_eigenvalues
from tests.helpers import assert_close_weights
from tests.helpers import classification_data
from tests.helpers import constant_lesam
from tests.helpers import crossentropy
from tests.helpers import dense_net
from tests.helpers import mirrored
from tests.helpers import train

OPTIMIZERS = {
    "momentum": lambda: keras.optimizers.SGD(0.1, momentum=0.9),
    "adamw": lambda: keras.optimizers.AdamW(0.01, weight_decay=0.05),
}
CURVATURES = ("none", "hvp", "secant")
# One process can have mirrors of one size only.
REPLICAS = int(os.environ.get("REPLICAS", 2))


def regularized_net(inputs=6, classes=4):
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((inputs,)),
            layers.Dense(8, "tanh", kernel_regularizer=keras.regularizers.L2()),
            layers.Dense(classes, activity_regularizer="l2"),
        ]
    )


def train_here(build, x, y, optimizer="momentum", epochs=5, **options):
    """20 steps of 16 rows; the model and its logs."""
    model = constant_lesam(build(), **options)
    history = train(
        *(model, x, y),
        optimizer=OPTIMIZERS[optimizer](),
        **{"shuffle": False, "batch_size": 16, "epochs": epochs},
    )
    return model, history


def train_replicated(count, *args, **options):
    strategy = mirrored(count)
    with strategy.scope():
        model, history = train_here(*args, **options)
    assert_replicas_agree(strategy, model, count)
    return model, history


def assert_replicas_agree(strategy, model, count):
    """Bit for bit; all that is trained."""
    for variable in [*model.trainable_variables, *model.optimizer.variables]:
        copies = strategy.experimental_local_results(variable.value)
        assert len(copies) == count
        for copy in copies[1:]:
            np.testing.assert_array_equal(copies[0], copy)


def assert_same_training(found, expected, logs):
    (model, history), (other, other_history) = found, expected
    assert_close_weights(model.model, other.model, atol=1e-7)
    for name in logs:
        np.testing.assert_allclose(
            history[name], other_history[name], rtol=1e-6, err_msg=name
        )


LOGS = ("loss", "rho", "gradient_norm", "sharpness", "sigma")
CASES = [
    (REPLICAS, optimizer, curvature, adaptive)
    for optimizer, adaptive in (("momentum", False), ("adamw", True))
    for curvature in CURVATURES
]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("count", "optimizer", "curvature", "adaptive"), CASES)
def test_global_is_one_device_on_the_whole_batch(
    count, optimizer, curvature, adaptive
):
    options = {
        **{"optimizer": optimizer, "curvature": curvature},
        **{"adaptive": adaptive, "alpha": 0.1},
    }
    data = (regularized_net, *classification_data(rows=64))
    assert_same_training(
        train_replicated(count, *data, perturbation_scope="global", **options),
        train_here(*data, **options),
        LOGS,
    )


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("count", "optimizer", "curvature", "adaptive"), CASES)
def test_replica_is_one_device_with_parts(
    count, optimizer, curvature, adaptive
):
    options = {
        **{"optimizer": optimizer, "curvature": curvature},
        **{"adaptive": adaptive, "alpha": 0.1},
    }
    data = (regularized_net, *classification_data(rows=64))
    assert_same_training(
        train_replicated(count, *data, **options),
        train_here(*data, num_batch_splits=count, **options),
        LOGS,
    )


def test_four_replicas():
    """The two tests above, by momentum, in a process of their own."""
    finished = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-n0"),
            *(__file__, "-k", "one_device and momentum"),
        ],
        env={**os.environ, "REPLICAS": "4"},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stdout
    assert "6 passed" in finished.stdout


@pytest.mark.usefixtures("float64")
def test_the_two_scopes_differ():
    """Or the tests above would show nothing."""
    data = (regularized_net, *classification_data(rows=64))
    one, _ = train_replicated(2, *data)
    other, _ = train_replicated(2, *data, perturbation_scope="global")
    gap = np.abs(one.model.get_weights()[0] - other.model.get_weights()[0])
    assert gap.max() > 1e-4


@pytest.mark.usefixtures("float64")
def test_global_parts_are_parts_of_all_replicas():
    """Two parts each in two replicas: two perturbations of the whole."""
    x, y = classification_data(rows=64)
    # A replica has rows 0 to 7 of a batch, the other 8 to 15: a part of both
    # is rows 0 to 3 and 8 to 11.
    order = np.arange(64).reshape(4, 2, 2, 4).transpose(0, 2, 1, 3).ravel()
    options = {"num_batch_splits": 2}
    assert_same_training(
        train_replicated(
            *(2, regularized_net, x, y),
            **{"perturbation_scope": "global", **options},
        ),
        train_here(regularized_net, x[order], y[order], **options),
        LOGS,
    )


class ShareOfTheLosses(budgets.Budget):
    """Goes by the loss of the step, and by the mean of those before."""

    def init_state(self):
        return {"mean": tf.zeros((), tf.float64)}

    def __call__(self, progress, losses, state):
        return None if losses is None else 0.1 * losses.plain + state["mean"]

    def update(self, losses, state):
        return {"mean": 0.9 * state["mean"] + 0.01 * losses.plain}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("scope", ["replica", "global"])
def test_a_budget_by_the_loss_is_that_of_who_takes_the_perturbation(scope):
    """Of the whole batch, or of the replica's part; both have one state."""
    x, y = classification_data(rows=64)

    def trained(**options):
        model = SharpnessAwareModel(
            *(regularized_net(), rules.LossEquated(), ShareOfTheLosses()),
            **options,
        )
        fit = {"shuffle": False, "batch_size": 16}
        return model, train(
            model, x, y, optimizer=OPTIMIZERS["momentum"](), **fit
        )

    with mirrored(2).scope():
        found = trained(perturbation_scope=scope)
    parts = 1 if scope == "global" else 2
    assert_same_training(found, trained(num_batch_splits=parts), LOGS)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("scope", ["replica", "global"])
def test_a_fraction_of_the_rows_finds_the_perturbation(scope):
    data = (regularized_net, *classification_data(rows=64))
    options = {"ascent_fraction": 0.5}
    found = train_replicated(2, *data, perturbation_scope=scope, **options)
    if scope == "replica":
        expected = train_here(*data, num_batch_splits=2, **options)
        assert_same_training(found, expected, ("loss", "rho"))
    else:
        assert np.all(np.isfinite(found[1]["rho"]))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("scope", ["replica", "global"])
def test_uneven_last_batch(scope):
    """31 rows are 16 and 15; the mean over replicas is Keras's."""
    data = (regularized_net, *classification_data(rows=31))
    found = train_replicated(2, *data, perturbation_scope=scope)
    if scope == "replica":
        # Parts of one device are cut at other rows: 7 and 8 of 15.
        x, y = data[1:]
        expected = train_replicated(2, regularized_net, x, y)
        assert_close_weights(found[0].model, expected[0].model, atol=0)
    assert np.all(np.isfinite(found[1]["loss"]))
    assert np.all(np.array(found[1]["sharpness"]) > 0)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("curvature", CURVATURES)
def test_synchronized_batch_norm_is_batch_norm_of_the_whole_batch(curvature):
    """Its statistics are summed over the replicas in every pass."""

    def build(synchronized):
        keras.utils.set_random_seed(0)
        return keras.Sequential(
            [
                keras.Input((6,)),
                layers.Dense(8),
                layers.BatchNormalization(synchronized=synchronized),
                layers.Activation("tanh"),
                layers.Dense(4),
            ]
        )

    data = classification_data(rows=64)
    options = {"curvature": curvature}
    found = train_replicated(
        *(2, lambda: build(True), *data),
        **{"perturbation_scope": "global", **options},
    )
    expected = train_here(lambda: build(False), *data, **options)
    assert_same_training(found, expected, ("loss", "sharpness"))


def noisy(policy="float32"):
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((5,)),
            layers.Embedding(9, 4),
            layers.Flatten(),
            layers.Dense(8),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.Dropout(0.2),
            layers.Dense(4, dtype="float32", kernel_regularizer="l2"),
        ]
    )


@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
@pytest.mark.parametrize("scope", ["replica", "global"])
@pytest.mark.parametrize("curvature", CURVATURES)
def test_all_that_a_real_net_has(curvature, scope, policy):
    """Sparse gradients, batch norm of each replica, dropout, float16."""
    keras.config.set_dtype_policy(policy)
    x, y = np.random.randint(9, size=(64, 5)), np.random.randint(4, size=64)
    strategy = mirrored(2)
    with strategy.scope():
        model = constant_lesam(
            noisy(), 0.05, perturbation_scope=scope, curvature=curvature
        )
        history = train(
            *(model, x, y),
            **{"optimizer": keras.optimizers.SGD(0.02), "epochs": 4},
            metrics=["accuracy"],
        )
        results = model.evaluate(x, y, verbose=0, return_dict=True)
        outputs = model.predict(x, verbose=0)
    assert_replicas_agree(strategy, model, 2)
    assert history["sharpness"][-1] == pytest.approx(0.05, rel=0.4)
    assert sorted(results) == ["accuracy", "loss"]
    assert outputs.shape == (64, 4)


def test_no_budget_is_plain_training():
    data = classification_data(rows=64)
    weights = []
    for wrap in (lambda net: net, lambda net: constant_lesam(net, 0.0)):
        with mirrored(2).scope():
            net = regularized_net()
            train(wrap(net), *data)
        weights.append(net.get_weights())
    for a, b in zip(*weights):
        np.testing.assert_array_equal(a, b)


def test_one_device():
    """`OneDeviceStrategy` is no strategy at all."""
    data = (regularized_net, *classification_data(rows=64))
    expected, _ = train_here(*data)
    for scope in ("replica", "global"):
        with tf.distribute.OneDeviceStrategy("CPU:0").scope():
            found, _ = train_here(*data, perturbation_scope=scope)
        assert_close_weights(found.model, expected.model, atol=1e-6)


def test_curvature_tools_on_a_replicated_model():
    x, y = classification_data(rows=64)
    model, _ = train_replicated(2, regularized_net, x, y)
    local, _ = train_here(regularized_net, x, y, num_batch_splits=2)
    np.testing.assert_allclose(
        top_eigenvalues(model, x, y, verbose=0),
        top_eigenvalues(local, x, y, verbose=0),
        rtol=1e-3,
    )


def collectives(strategy, wrap):
    """How many collective operations a replica's train step has."""
    x, y = classification_data(rows=16)
    with strategy.scope():
        model = wrap(dense_net())
        model.compile(keras.optimizers.SGD(0.1), crossentropy())
    model.fit(x, y, batch_size=16, verbose=0)
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(16)
    batch = next(iter(strategy.experimental_distribute_dataset(data)))
    step = tf.function(lambda b: strategy.run(model.train_step, args=(b,)))
    graph = step.get_concrete_function(batch).graph.as_graph_def()
    nodes = [*graph.node]
    for function in graph.library.function:
        nodes += function.node_def
    found = [node for node in nodes if node.op.startswith("Collective")]
    return len(found) / strategy.num_replicas_in_sync


@pytest.mark.parametrize(
    ("options", "added"),
    [
        ({}, 0),
        ({"curvature": "hvp"}, 0),
        ({"curvature": "secant"}, 0),
        # The gradients of the first pass, all at once; and whether to follow
        # the second, with the rise.
        ({"perturbation_scope": "global"}, 2),
        ({"perturbation_scope": "global", "curvature": "secant"}, 2),
        # And one number.
        ({"perturbation_scope": "global", "curvature": "hvp"}, 3),
    ],
    ids=str,
)
def test_what_is_communicated(options, added):
    strategy = mirrored(2)
    plain = collectives(strategy, lambda net: net)
    assert plain == 1
    found = collectives(strategy, lambda net: constant_lesam(net, **options))
    assert found == plain + added


@pytest.mark.parametrize(
    ("optimizer", "options", "message"),
    [
        (
            {"gradient_accumulation_steps": 2},
            {},
            "`gradient_accumulation_steps` on 2 replicas; leave it None. "
            "Received: gradient_accumulation_steps=2",
        ),
        (
            {},
            {"steps_per_execution": 4},
            "`steps_per_execution` on 2 replicas; leave it 1. "
            "Received: steps_per_execution=4",
        ),
        (
            {},
            {"jit_compile": True},
            "`jit_compile` on 2 replicas; leave it False. "
            "Received: jit_compile=True",
        ),
    ],
    ids=str,
)
def test_limits_of_keras_are_refused_at_compile(optimizer, options, message):
    """Each fails in plain Keras, in the middle of TensorFlow."""
    x, y = classification_data(rows=32)
    with mirrored(2).scope():
        model = constant_lesam(dense_net())
        with pytest.raises(ValueError, match=message):
            model.compile(
                keras.optimizers.SGD(0.1, **optimizer),
                crossentropy(),
                **options,
            )
        plain = dense_net()
        plain.compile(
            keras.optimizers.SGD(0.1, **optimizer), crossentropy(), **options
        )
    with pytest.raises(Exception):  # noqa: B017
        plain.fit(x, y, batch_size=8, verbose=0)
    # On one device they work.
    model = constant_lesam(dense_net())
    model.compile(keras.optimizers.SGD(**optimizer), crossentropy(), **options)
    model.fit(x, y, batch_size=8, verbose=0)


def test_the_wrapper_belongs_into_the_scope_of_its_model():
    strategy = mirrored(2)
    with strategy.scope():
        net = dense_net()
    with pytest.raises(ValueError, match=r"same `strategy\.scope\(\)`"):
        constant_lesam(net)
    net = dense_net()
    with (
        strategy.scope(),
        pytest.raises(ValueError, match=r"same `strategy\.scope\(\)`"),
    ):
        constant_lesam(net)


def test_an_unbuilt_model_is_built_in_the_scope():
    x, y = classification_data(rows=32)
    strategy = mirrored(2)
    with strategy.scope():
        net = keras.Sequential([layers.Dense(4, "tanh"), layers.Dense(4)])
        model = constant_lesam(net, perturbation_scope="global")
        train(model, x, y)
    assert_replicas_agree(strategy, model, 2)
