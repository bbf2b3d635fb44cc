"""What a loss function of a loop can do, and what is refused by name."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from keras_lesam import SharpnessAwareGradients
from keras_lesam import ascents
from keras_lesam import budgets
from keras_lesam import rules
from tests.helpers import classification_data
from tests.helpers import dense_net

LESAM = rules.LossEquated()
SIGMA = budgets.Constant(0.1)


def build(net):
    net(np.zeros((2, 6), "float32"))
    return net


def behind_a_function(traced):
    net = dense_net()
    function = tf.function(lambda x: net(x, training=True))
    if traced:
        function(tf.zeros((8, 6)))
    return net, lambda x: tf.reduce_mean(function(x) ** 2)


def partly_behind_a_function():
    net = dense_net()
    function = tf.function(lambda x: net.layers[1](x))
    return net, lambda x: tf.reduce_mean(function(net.layers[0](x)) ** 2)


def in_a_remat():
    net = dense_net()
    function = keras.remat(net.layers[0].call)
    return net, lambda x: tf.reduce_mean(net.layers[1](function(x)) ** 2)


def twice_of_which_one_is_in_a_remat():
    net = build(keras.Sequential([layers.Dense(6, use_bias=False)]))
    function = keras.remat(net.layers[0].call)
    return net, lambda x: tf.reduce_mean(net.layers[0](function(x)) ** 2)


class Assigning(layers.Dense):
    def call(self, x):
        self.kernel.assign(self.kernel / keras.ops.norm(self.kernel))
        return super().call(x)


def assigned():
    net = build(keras.Sequential([Assigning(4)]))
    return net, lambda x: tf.reduce_mean(net(x) ** 2)


def random():
    net = dense_net()
    return net, lambda x: tf.reduce_mean(net(x + tf.random.normal((6,))) ** 2)


def generator():
    net, numbers = dense_net(), tf.random.Generator.from_seed(1)
    return net, lambda x: tf.reduce_mean(net(x + numbers.normal((6,))) ** 2)


def random_in_a_branch():
    net = dense_net()

    def noise():
        return tf.random.uniform((6,))

    return net, lambda x: tf.reduce_mean(
        net(x + tf.cond(x[0, 0] > 0, noise, lambda: tf.zeros((6,)))) ** 2
    )


def own_variable():
    net, count = dense_net(), tf.Variable(0.0)

    def loss(x):
        count.assign_add(1.0)
        return tf.reduce_mean(net(x) ** 2)

    return net, loss


def state_behind_a_function():
    """A net that is not trained, and whose batch norm advances."""
    net = dense_net()
    other = build(keras.Sequential([layers.BatchNormalization()]))
    function = tf.function(lambda x: other(x, training=True))
    function(tf.zeros((8, 6)))
    return net, lambda x: tf.reduce_mean(net(function(x)) ** 2)


def state_in_a_branch():
    net = build(keras.Sequential([layers.BatchNormalization()]))

    def there(x):
        return net(x, training=True)

    return net, lambda x: tf.reduce_mean(
        tf.cond(x[0, 0] > 0, lambda: there(x), lambda: 2 * there(x)) ** 2
    )


REFUSED = {
    "function": (lambda: behind_a_function(False), "behind a `tf.function`"),
    "traced": (lambda: behind_a_function(True), "behind a `tf.function`"),
    "partly": (partly_behind_a_function, "behind a `tf.function`"),
    "remat": (in_a_remat, "gradient of its own"),
    "half remat": (twice_of_which_one_is_in_a_remat, "gradient of its own"),
    "assigned": (assigned, "assigns weights"),
    "random": (random, "draws random numbers"),
    "generator": (generator, "random numbers|writes a `tf.Variable`"),
    "branch": (random_in_a_branch, "draws random numbers"),
    "variable": (own_variable, "writes a `tf.Variable`"),
    "state": (state_behind_a_function, "state behind a `tf.function`"),
    "nested": (state_in_a_branch, "State is written inside of a branch"),
}


# In eager mode there are no branches; what is written is seen in a graph only.
NOT_EAGER, NOT_BY_VALUES = {"nested"}, {"nested", "variable", "state", "branch"}
CASES = [
    *((name, "graph") for name in REFUSED),
    *((name, "eager") for name in REFUSED if name not in NOT_EAGER),
    *((name, "values") for name in REFUSED if name not in NOT_BY_VALUES),
]


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_refused_by_name(name, mode):
    """In a graph, in eager mode, and where the function needs values."""
    make, message = REFUSED[name]
    if mode == "values":
        message = "gradient|draws|assigns"
    net, loss = make()
    lesam = SharpnessAwareGradients(LESAM, SIGMA)
    variables = net.trainable_variables
    before = net.get_weights()

    def step(x, state):
        def loss_fn():
            found = loss(x)
            return float(found) * 0 + found if mode == "values" else found

        return lesam(loss_fn, variables, state, None)

    step = tf.function(step) if mode == "graph" else step
    with pytest.raises(ValueError, match=message):
        step(
            tf.constant(classification_data(8)[0]), lesam.init_state(variables)
        )
    for a, b in zip(before, net.get_weights()):
        np.testing.assert_array_equal(a, b)


def straight_through():
    """A function with a gradient of its own that takes the weight."""
    net = dense_net()
    kernel = net.layers[0].kernel

    @tf.custom_gradient
    def rounded(w):
        return tf.round(4 * w) / 4, lambda upstream: upstream

    return net, lambda x: tf.reduce_mean(
        (x @ rounded(tf.convert_to_tensor(kernel)) + 1) ** 2
    )


def frozen_teacher():
    """Behind a `tf.function`, which weights that stay may be."""
    net, teacher = dense_net(), dense_net(seed=1)
    function = tf.function(lambda x: teacher(x, training=False))
    return net, lambda x: tf.reduce_mean((net(x) - function(x)) ** 2)


def recurrent():
    """Loops, and functions with gradients of their own inside of them."""
    keras.utils.set_random_seed(0)
    net = keras.Sequential(
        [keras.Input((3, 2)), layers.LSTM(4, activation="silu")]
    )
    return net, lambda x: tf.reduce_mean(net(tf.reshape(x, (-1, 3, 2))) ** 2)


def unused():
    net = dense_net()
    return net, lambda x: tf.reduce_mean(net.layers[0](x) ** 2)


def keras_random():
    net, seed = dense_net(), keras.random.SeedGenerator(1)

    def loss(x):
        noise = keras.random.normal((6,), seed=seed)
        return tf.reduce_mean(net(x + noise) ** 2)

    return net, loss


ALLOWED = (straight_through, frozen_teacher, recurrent, unused, keras_random)


@pytest.mark.parametrize("mode", ["graph", "eager", "values"])
@pytest.mark.parametrize("make", ALLOWED)
def test_what_a_loss_function_can_do(make, mode):
    """The gradient of no distance is that of a tape."""
    net, loss = make()
    variables = net.trainable_variables
    x = tf.constant(classification_data(8)[0])
    state = [v.numpy() for v in net.non_trainable_variables]
    lesam = SharpnessAwareGradients(rules.SAM(1e-20))

    def step(x, state):
        def loss_fn():
            found = loss(x)
            return float(found) * 0 + found if mode == "values" else found

        return lesam(loss_fn, variables, state, None)

    step = tf.function(step) if mode == "graph" else step
    gradients, record = step(x, lesam.init_state(variables))
    assert float(record.sharpness) == 0
    if make is not keras_random:
        with tf.GradientTape() as tape:
            expected = loss(x)
        found = tape.gradient(expected, [v.value for v in variables])
        for a, b in zip(gradients, found):
            assert (a is None) == (b is None)
            if a is not None:
                np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    assert len(state) == len(net.non_trainable_variables)


W = keras.Variable([1.0, 2.0], name="w")
BAD_LOSSES = {
    "no tensor": (lambda: 1.0, TypeError, "scalar tensor.*Received: 1.0"),
    "rows": (lambda: W**2, TypeError, "scalar tensor"),
    "integer": (lambda: tf.constant(1), TypeError, "scalar tensor of floats"),
    "nothing": (lambda: None, TypeError, "Received: None"),
    "three": (lambda: (tf.constant(1.0), 1, 2), TypeError, "or a pair"),
}


@pytest.mark.parametrize("mode", ["graph", "eager"])
@pytest.mark.parametrize("name", BAD_LOSSES)
def test_losses_that_are_none(name, mode):
    loss_fn, error, message = BAD_LOSSES[name]
    lesam = SharpnessAwareGradients(LESAM, SIGMA)

    def step(state):
        return lesam(loss_fn, [W], state, None)

    step = tf.function(step) if mode == "graph" else step
    with pytest.raises(error, match=message):
        step(lesam.init_state([W]))


def test_arguments():
    lesam = SharpnessAwareGradients(rules.FriendlySAM(0.05))
    frozen = keras.Variable([1.0], trainable=False, name="frozen")
    bad = [
        (W, TypeError, "must be a list"),
        (None, TypeError, "must be a list"),
        ([tf.Variable(1.0)], TypeError, "must be Keras variables"),
        ([], ValueError, "at least one"),
        ([W, frozen], ValueError, "trainable.*'frozen'"),
        ([W, W], ValueError, "different ones"),
    ]
    state = lesam.init_state([W])
    loss_fn = lambda: tf.reduce_sum(W**2)  # noqa: E731
    for variables, error, message in bad:
        with pytest.raises(error, match=f"`variables`.*{message}"):
            lesam.init_state(variables)
        with pytest.raises(error, match=f"`variables`.*{message}"):
            lesam(loss_fn, variables, state, None)
    with pytest.raises(TypeError, match="`loss_fn` must be a function"):
        lesam(tf.constant(1.0), [W], state, None)
    with pytest.raises(TypeError, match="`optimizer` must be a Keras"):
        lesam(loss_fn, [W], state, "sgd")
    for wrong in (None, {}, {"iterations": 0}, {**state, "more": 0}):
        with pytest.raises(ValueError, match="`state` must be what"):
            lesam(loss_fn, [W], wrong, None)
    with pytest.raises(ValueError, match=r"'rule.mean.0' of shape \(3,\)"):
        lesam(loss_fn, [W], {**state, "rule.mean.0": np.zeros(3)}, None)
    none = SharpnessAwareGradients(LESAM, SIGMA, perturb=lambda v: False)
    with pytest.raises(ValueError, match="`perturb` selects none"):
        none.init_state([W])


def test_methods():
    """What excludes what, as for models; and what a loss has not."""
    make = SharpnessAwareGradients
    with pytest.raises(ValueError, match=r"no rows.*Fraction"):
        make(LESAM, SIGMA, ascents.Fraction(0.5))
    with pytest.raises(ValueError, match=r"no rows.*Fraction"):
        make(LESAM, SIGMA, ascents.Every(2, ascents.Fraction(0.5)))
    with pytest.raises(ValueError, match="pass its `total_steps`"):
        make(LESAM, budgets.Constant(0.1, warmup=0.1))
    with pytest.raises(ValueError, match="`total_steps` must be at least 1"):
        make(LESAM, SIGMA, total_steps=0)
    with pytest.raises(ValueError, match="`perturbation_scope`"):
        make(LESAM, SIGMA, perturbation_scope="all")
    with pytest.raises(TypeError, match="`rule`"):
        make("sam")
    with pytest.raises(TypeError, match="`perturb`"):
        make(LESAM, SIGMA, perturb=1)
    with pytest.raises(ValueError, match="does not go by the curvature"):
        make(rules.SAM(), curvature="hvp")
