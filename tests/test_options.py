"""Optimizers and the arguments of `compile` and `fit`."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_lesam import SAMModel
from keras_lesam import rules
from tests import reference
from tests.helpers import assert_close_weights
from tests.helpers import assert_same_weights
from tests.helpers import classification_data
from tests.helpers import constant_lesam
from tests.helpers import crossentropy
from tests.helpers import dense_net
from tests.helpers import train

OPTIMIZERS = {
    "momentum": lambda: keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True),
    "adam": lambda: keras.optimizers.Adam(0.01),
    "decoupled weight decay": lambda: keras.optimizers.AdamW(
        0.01, weight_decay=0.1
    ),
    "global clipnorm": lambda: keras.optimizers.SGD(0.1, global_clipnorm=0.2),
    "clipnorm": lambda: keras.optimizers.SGD(0.1, clipnorm=0.1),
    "clipvalue": lambda: keras.optimizers.SGD(0.1, clipvalue=0.01),
    "moving average": lambda: keras.optimizers.SGD(
        0.1, use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=2
    ),
    "accumulation": lambda: keras.optimizers.SGD(
        0.1, momentum=0.9, gradient_accumulation_steps=2
    ),
    "schedule": lambda: keras.optimizers.SGD(
        keras.optimizers.schedules.CosineDecay(0.1, 10)
    ),
    "constant loss scale": lambda: keras.optimizers.SGD(
        0.1, loss_scale_factor=64.0
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_applies_to_the_second_gradient_alone(name, float64):
    """Clipping, decay and averages see g_hat and w, never w + eps."""
    x, y = classification_data(rows=64)
    net, twin = dense_net(), dense_net()
    history = train(
        constant_lesam(net, 0.2),
        x,
        y,
        optimizer=OPTIMIZERS[name](),
        epochs=2,
        batch_size=16,
        shuffle=False,
    )
    scaled = OPTIMIZERS[name]()
    scaled.loss_scale_factor = None
    steps = reference.fit(
        twin,
        crossentropy(),
        x,
        y,
        sigma=0.2,
        optimizer=scaled,
        batch_size=16,
    )
    if name == "moving average":
        scaled.finalize_variable_values(twin.trainable_variables)
    assert_close_weights(net, twin, rtol=1e-5, atol=1e-7)
    rho = np.reshape([s[0] for s in steps], (2, 4)).mean(axis=1)
    np.testing.assert_allclose(history["rho"], rho, rtol=1e-5)


@pytest.mark.parametrize("steps", [2, 3])
def test_steps_per_execution(steps):
    x, y = classification_data(rows=96)
    net, twin = dense_net(), dense_net()
    single = train(constant_lesam(twin), x, y, batch_size=16)
    several = train(
        constant_lesam(net), x, y, batch_size=16, steps_per_execution=steps
    )
    assert_same_weights(net, twin)
    assert several == single


def test_eager_graph_and_xla_agree(float64):
    x, y = classification_data(rows=64)
    nets = []
    for mode in ({}, {"run_eagerly": True}, {"jit_compile": True}):
        nets.append(dense_net())
        train(constant_lesam(nets[-1]), x, y, **mode)
    assert_close_weights(nets[0], nets[1], rtol=1e-9)
    assert_close_weights(nets[0], nets[2], rtol=1e-9)


def test_float64_throughout(float64):
    """A loss that float32 cannot tell from a constant still has a slope."""
    x = np.zeros((8, 1))
    y = np.full((8, 1), 1.0)
    net = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    tiny = 1e-12

    def loss(y_true, y_pred):
        return 1.0 + tiny * (y_pred - y_true)

    model = constant_lesam(net, sigma=1e-14)
    history = train(model, x, y, loss=loss, epochs=1)
    np.testing.assert_allclose(history["gradient_norm"], [tiny], rtol=1e-12)
    np.testing.assert_allclose(history["rho"], [0.01], rtol=1e-12)
    # A float64 near 1 resolves 2.2e-16.
    np.testing.assert_allclose(history["sharpness"], [1e-14], atol=4.5e-16)


def test_the_second_pass_is_left_out_where_there_is_no_budget():
    """At run time, by a counter in the graph; for share and parts too."""
    x, y = classification_data(rows=32)
    counter = tf.Variable(0)

    class Counted(keras.layers.Layer):
        def call(self, x):
            with tf.control_dependencies([counter.assign_add(1)]):
                return tf.identity(x)

    class LateBudget(keras.optimizers.schedules.LearningRateSchedule):
        def __call__(self, step):
            return keras.ops.where(step < 3, 0.0, 0.1)

        def get_config(self):
            return {}

    for options, per_step in (({}, 1), ({"num_batch_splits": 2}, 2)):
        net = keras.Sequential(
            [keras.Input((6,)), Counted(), keras.layers.Dense(4)]
        )
        model = constant_lesam(
            net, LateBudget(), warmup=None, anneal=None, **options
        )
        model.compile("sgd", crossentropy())
        seen = []
        for _ in range(5):
            before = int(counter)
            model.train_on_batch(x, y)
            seen.append(int(counter) - before)
        assert seen == [per_step] * 3 + [2 * per_step] * 2


# A perturbation is a product of gradients that never is nan.
PERTURBATION = "MulNoNan"


def taken_into_branches(model):
    """List the operations whose matrices a branch of the step is given."""
    x, y = map(tf.constant, classification_data(rows=32))
    model.compile("sgd", crossentropy(), jit_compile=False)
    model.fit(x, y, verbose=0)
    step = tf.function(model.train_step, autograph=False)
    graph = step.get_concrete_function((x, y)).graph
    return {
        tensor.op.type
        for operation in graph.get_operations()
        if operation.type in ("If", "StatelessIf")
        for tensor in operation.inputs
        if tensor.shape.rank == 2
    }


@pytest.mark.parametrize(
    "make",
    [
        lambda net: constant_lesam(net, ascent_every=4),
        lambda net: SAMModel(net, rules.LookSAM(0.1, every=4)),
    ],
    ids=["every", "LookSAM"],
)
def test_a_step_between_two_ascents_makes_no_perturbation(make):
    """It is made in the branch: what a branch is given is made in all steps."""
    assert PERTURBATION not in taken_into_branches(make(dense_net()))
    # Where all steps ascend it is given, and this would see it.
    always = taken_into_branches(constant_lesam(dense_net()))
    assert PERTURBATION in always


def test_an_exception_in_the_second_pass_leaves_the_weights():
    x, y = classification_data(rows=32)
    calls = []

    class Fails(keras.layers.Layer):
        def call(self, x):
            calls.append(None)
            if len(calls) > 2:  # once to build, once in the first pass
                raise RuntimeError("in the second pass")
            return x

    net = keras.Sequential(
        [
            keras.layers.Dense(4),
            keras.layers.BatchNormalization(),
            Fails(),
        ]
    )
    net.build((None, 6))
    calls.clear()
    before = net.get_weights()
    with pytest.raises(RuntimeError, match="second pass"):
        train(constant_lesam(net), x, y, run_eagerly=True)
    for a, b in zip(before, net.get_weights()):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_a_climb_off_the_end_of_the_loss_is_a_plain_step(share):
    """The loss at w + eps is not a number: the update is plain SGD's."""
    x, y = np.ones((4, 1), "float32"), np.ones((4, 1), "float32")

    def loss(y_true, y_pred):
        # log: not a number beyond 1, and the climb goes there
        return -keras.ops.log(1.0 - y_pred) * y_true

    nets = []
    for wrap in (
        lambda net: net,
        lambda net: constant_lesam(net, sigma=3.0, ascent_fraction=share),
    ):
        net = keras.Sequential(
            [keras.Input((1,)), keras.layers.Dense(1, use_bias=False)]
        )
        net.set_weights([np.array([[0.5]], "float32")])
        history = train(wrap(net), x, y, loss=loss, epochs=1)
        nets.append(net)
    assert_same_weights(*nets)
    assert np.isfinite(nets[1].get_weights()[0]).all()
    assert history["rho"] == [0.0]
