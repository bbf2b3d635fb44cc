"""Code that looks at a wrapper finds the model inside."""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_lesam import LESAMModel
from keras_lesam import SAMModel
from keras_lesam import SharpnessAwareGradients
from keras_lesam import SharpnessAwareModel
from keras_lesam import rules
from tests.helpers import assert_same_weights
from tests.helpers import classification_data
from tests.helpers import constant_lesam
from tests.helpers import crossentropy
from tests.helpers import dense_net
from tests.helpers import noisy_net
from tests.helpers import train

LAYERS = keras.layers


def functional():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6,), name="features")
    x = LAYERS.Dense(8, activation="tanh", name="hidden")(inputs)
    x = LAYERS.BatchNormalization(name="norm")(x)
    return keras.Model(inputs, LAYERS.Dense(4, name="logits")(x))


class Annealed(keras.Model):
    """With a number that a callback changes, and one for itself."""

    def __init__(self):
        super().__init__()
        self.hidden = LAYERS.Dense(8, activation="tanh")
        self.head = LAYERS.Dense(4)
        self.beta = keras.Variable(0.0, trainable=False, name="beta")
        self._own = "inner"

    def call(self, x):
        return self.head(self.hidden(x))

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None):
        loss = super().compute_loss(x, y, y_pred, sample_weight)
        return loss + self.beta * keras.ops.mean(keras.ops.square(y_pred))

    @property
    def width(self):
        return self.hidden.units

    @width.setter
    def width(self, value):
        raise ValueError(f"built with {self.hidden.units}, not {value}")


def annealed():
    keras.utils.set_random_seed(0)
    net = Annealed()
    net(np.zeros((1, 6)))
    return net


# What `keras.Model` offers, name by name.

_SAME = """
add_metric compute_dtype compute_mask
compute_output_shape compute_output_spec count_params dtype dtype_policy
get_build_config get_layer get_quantization_layer_structure get_weights input
layers losses non_trainable_variables non_trainable_weights output
quantization_mode quantized_build rematerialized_call set_weights summary
supports_masking trainable trainable_variables trainable_weights
variable_dtype variables weights symbolic_call stateless_call
"""
SAME = _SAME.split()

DIFFERENT = {
    "training is the wrapper's": """
        compile compile_from_config compiled_loss compiled_metrics
        compute_loss compute_metrics evaluate fit
        get_compile_config get_metrics_result loss make_predict_function
        make_test_function make_train_function metrics metrics_names
        metrics_variables predict predict_on_batch predict_step reset_metrics
        test_on_batch test_step train_on_batch train_step jit_compile
        run_eagerly stateless_compute_loss distribute_strategy
        distribute_reduction_method
        """,
    "what is added would be the wrapper's own": """
        add_loss add_variable add_weight
        """,
    "made around the inner model again": """
        from_config get_config to_json
        """,
    "files have the state of the training, too (test_build_and_files)": """
        load_own_variables load_weights save save_own_variables save_weights
        get_state_tree set_state_tree
        """,
    "tested in test_build_and_files": "build build_from_config",
    "tested in test_export": "export",
    "quantizes in place: tested below": "quantize quantized_call",
    "what comes in is for the inner model to check and to cast": """
        input_spec input_dtype
        """,
    "takes what the inner model's takes: tested below": "call",
    "names of its own": "path",
}


def test_everything_that_a_model_offers_is_accounted_for():
    public = {name for name in dir(keras.Model) if not name.startswith("_")}
    listed = [*SAME]
    for names in DIFFERENT.values():
        listed += names.split()
    assert len(listed) == len(set(listed))
    # Older versions of Keras offer a little less.
    assert public <= set(listed)


CALLS = {
    "get_layer": lambda m: m.get_layer(index=1),
    "compute_mask": lambda m: m.compute_mask(np.ones((2, 6)), None),
    "compute_output_shape": lambda m: m.compute_output_shape((5, 6)),
    "compute_output_spec": lambda m: (
        m.compute_output_spec(keras.KerasTensor((5, 6))).shape
    ),
    "count_params": lambda m: m.count_params(),
    "get_build_config": lambda m: m.get_build_config(),
    "get_weights": lambda m: [w.tolist() for w in m.get_weights()],
    "set_weights": lambda m: m.set_weights(m.get_weights()),
    "summary": lambda m: printed(m.summary),
    "symbolic_call": lambda m: m.symbolic_call(keras.KerasTensor((5, 6))).shape,
    "rematerialized_call": lambda m: m.rematerialized_call(abs),
    "get_quantization_layer_structure": lambda m: (
        m.get_quantization_layer_structure("gptq")
    ),
    "stateless_call": lambda m: (
        m.stateless_call(
            m.trainable_variables, m.non_trainable_variables, np.ones((2, 6))
        )[0]
        .numpy()
        .tolist()
    ),
    "add_metric": lambda m: m.add_metric("anything"),
    "quantized_build": lambda m: m.quantized_build((5, 6), "int8"),
}


def printed(summary):
    lines = []
    summary(print_fn=lambda line, **_: lines.append(line))
    return lines


def result(model, name):
    """What it gives, or the kind of error that it raises."""
    look = CALLS.get(name, lambda m: getattr(m, name))
    try:
        found = look(model)
    except Exception as error:
        return type(error)
    if isinstance(found, list) and found and hasattr(found[0], "path"):
        return [id(item) for item in found]
    return found


@pytest.mark.parametrize("build", [functional, dense_net, annealed])
# Some are not in all versions of Keras.
@pytest.mark.parametrize("name", [n for n in SAME if hasattr(keras.Model, n)])
def test_as_the_inner_model(name, build):
    net = build()
    wrapper = LESAMModel(net)
    assert result(wrapper, name) == result(net, name)


@pytest.mark.parametrize("build", [functional, dense_net, annealed])
def test_attributes_that_only_the_inner_model_has(build):
    net = build()
    wrapper = LESAMModel(net)
    names = {name for name in dir(net) if not name.startswith("_")}
    for name in names - set(dir(keras.Model)) - {"name", "compiled", "loss"}:
        if name in ("autocast", "call_signature_parameters"):
            continue
        ours = result(wrapper, name)
        theirs = result(net, name)
        assert ours is theirs or ours == theirs, name


def test_shapes_of_several_inputs_and_outputs():
    inputs = {name: keras.Input((3,), name=name) for name in "ab"}
    joined = LAYERS.Concatenate()(list(inputs.values()))
    outputs = [LAYERS.Dense(n, name=f"out{n}")(joined) for n in (1, 2)]
    net = keras.Model(inputs, outputs)
    wrapper = SAMModel(net)
    assert wrapper.input_shape == net.input_shape
    assert wrapper.output_shape == [(None, 1), (None, 2)]
    assert [x.name for x in wrapper.inputs] == ["a", "b"]
    assert wrapper.input is net.input
    assert wrapper.output_names == ["out1", "out2"]
    # A model of parts of it, as is made to look at features.
    features = keras.Model(wrapper.input, wrapper.get_layer("out2").output)
    assert features.output_shape == (None, 2)
    with pytest.raises(ValueError, match="No such layer: nothing"):
        wrapper.get_layer("nothing")


def test_a_part_that_does_not_exist_is_named():
    wrapper = LESAMModel(keras.Sequential([LAYERS.Dense(2)]))
    with pytest.raises(AttributeError, match="no defined inputs yet"):
        _ = wrapper.inputs
    with pytest.raises(AttributeError, match="nothing"):
        _ = wrapper.nothing
    for name in ("optimizer", "history", "_functional"):
        assert not hasattr(LESAMModel(dense_net()), name)
    assert not hasattr(LESAMModel(annealed()), "_own")


# Reading and writing.


class Anneal(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        self.model.beta.assign(0.1 * epoch)


class Replace(keras.callbacks.Callback):
    """Assigns the attribute, and has the step traced anew."""

    def on_epoch_begin(self, epoch, logs=None):
        self.model.beta = keras.ops.convert_to_tensor(0.1 * epoch)
        self.model.make_train_function(force=True)


class Plain(Annealed):
    def __init__(self):
        super().__init__()
        del self.beta
        self.beta = 0.0


@pytest.mark.parametrize(("cls", "callback"), [(Annealed, Anneal)])
def test_a_callback_assigns_to_a_variable_of_the_model(cls, callback):
    x, y = classification_data()
    nets = [annealed(), annealed()]
    for model in (nets[0], LESAMModel(nets[1], 0.0)):
        model.compile("sgd", crossentropy())
        model.fit(
            *(x, y),
            **{"epochs": 3, "shuffle": False, "verbose": 0},
            callbacks=[callback()],
        )
    assert float(nets[1].beta) == pytest.approx(0.2)
    assert_same_weights(*nets)


def test_a_callback_assigns_an_attribute_of_the_model():
    x, y = classification_data()
    nets = []
    for wrap in (lambda net: net, lambda net: LESAMModel(net, 0.0)):
        keras.utils.set_random_seed(0)
        net = Plain()
        model = wrap(net)
        model.compile("sgd", crossentropy())
        model.fit(
            *(x, y),
            **{"epochs": 3, "shuffle": False, "verbose": 0},
            callbacks=[Replace()],
        )
        nets.append(net)
    assert float(nets[1].beta) == pytest.approx(0.2)
    assert_same_weights(*nets)


def test_writing_goes_where_the_attribute_is():
    net = annealed()
    wrapper = constant_lesam(net)
    wrapper.beta = 1.0
    assert net.beta == 1.0
    assert "beta" not in vars(wrapper)
    with pytest.raises(ValueError, match="built with 8, not 3"):
        wrapper.width = 3
    wrapper.note = "of the wrapper"
    assert not hasattr(net, "note")
    wrapper.sigma = 0.3
    assert float(wrapper.budget.sigma) == 0.3
    del wrapper.beta
    assert not hasattr(net, "beta")


STATE = {
    "layer": lambda: LAYERS.Dense(5),
    "variable": lambda: keras.Variable(1.0, name="extra"),
    "metric": lambda: keras.metrics.Mean(name="extra"),
    "seed": lambda: keras.random.SeedGenerator(3),
    "list": lambda: [LAYERS.Dense(5), LAYERS.Dense(2)],
    "dict": lambda: {"a": keras.Variable(1.0), "b": 2},
}
every_state = pytest.mark.parametrize("make", STATE.values(), ids=STATE)


@every_state
@pytest.mark.parametrize("build", [functional, dense_net])
@pytest.mark.filterwarnings("ignore:.*Gradients do not exist")
def test_state_attached_to_a_built_graph(build, make):
    """The inner model takes it, and it is saved and trained with that."""
    x, y = classification_data()
    nets = [build(), build()]
    nets[0].extra = make()
    wrapper = constant_lesam(nets[1], 0.0)
    wrapper.extra = make()
    assert wrapper.extra is nets[1].extra
    assert "extra" not in vars(wrapper)
    assert len(nets[0].weights) == len(nets[1].weights)
    train(nets[0], x, y)
    train(wrapper, x, y)
    assert_same_weights(*nets)


@every_state
def test_state_that_a_built_model_refuses(make):
    net = annealed()
    for model in (net, LESAMModel(net)):
        with pytest.raises(ValueError, match="cannot add new elements of stat"):
            model.extra = make()
    LESAMModel(Annealed()).extra = make()


@pytest.mark.parametrize("build", [functional, dense_net, annealed])
@pytest.mark.parametrize("name", ["layers", "input", "output"])
def test_what_describes_the_model_cannot_be_assigned(name, build):
    net = build()
    errors = []
    for model in (net, LESAMModel(net)):
        with pytest.raises((AttributeError, ValueError)) as error:
            setattr(model, name, [LAYERS.Dense(4)])
        errors.append(repr(error.value))
    assert errors[0] == errors[1]


def test_training_of_the_inner_model_before_is_not_the_wrappers():
    x, y = classification_data()
    net = dense_net()
    train(net, x, y)
    before = net.optimizer
    wrapper = constant_lesam(net)
    assert not hasattr(wrapper, "optimizer")
    assert not hasattr(wrapper, "history")
    train(wrapper, x, y)
    assert net.optimizer is before is not wrapper.optimizer
    assert wrapper.history is not net.history
    wrapper.stop_training = True
    assert net.stop_training is False


def test_names_listed():
    assert {"beta", "head", "width", "model", "sigma"} <= set(
        dir(LESAMModel(annealed()))
    )


# Freezing.


@pytest.mark.parametrize("wrap", [LESAMModel, SAMModel])
def test_freezing_through_the_wrapper(wrap):
    x, y = classification_data()
    net = functional()
    wrapper = wrap(net)
    for layer in wrapper.layers[:-1]:
        layer.trainable = False
    assert len(wrapper.trainable_variables) == 2
    before = net.get_weights()
    train(wrapper, x, y, epochs=1)
    moved = [np.any(a != b) for a, b in zip(before, net.get_weights())]
    assert [v.path for v, m in zip(net.weights, moved) if m] == (
        ["logits/kernel", "logits/bias"]
    )


def test_freezing_the_model_and_a_part():
    net = dense_net()
    wrapper = LESAMModel(net)
    wrapper.trainable = False
    assert net.trainable is wrapper.trainable is False
    assert wrapper.trainable_variables == []
    wrapper.trainable = True
    wrapper.get_layer(index=0).trainable = False
    assert len(wrapper.trainable_variables) == 2
    net.trainable = False
    assert not wrapper.trainable


class Thaw(keras.callbacks.Callback):
    """As Keras's documentation says."""

    def on_epoch_begin(self, epoch, logs=None):
        self.model.layers[0].trainable = epoch > 0
        self.model.make_train_function(force=True)


@pytest.mark.parametrize("rule", [rules.SAM, rules.FriendlySAM, rules.LookSAM])
def test_thawing_in_a_callback(rule):
    x, y = classification_data()
    net = dense_net()
    model = SharpnessAwareModel(net, rule(0.05))
    model.compile(keras.optimizers.SGD(0.1), crossentropy())
    model.optimizer.build(net.trainable_variables)
    seen = []
    record = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: seen.append(net.get_weights()[0])
    )
    before = net.get_weights()[0]
    model.fit(x, y, epochs=2, verbose=0, callbacks=[Thaw(), record])
    np.testing.assert_array_equal(before, seen[0])
    assert np.any(seen[1] != before)


class ResetState(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        for layer in self.model.layers:
            if isinstance(layer, LAYERS.BatchNormalization):
                layer.moving_mean.assign(layer.moving_mean * 0)


def test_a_callback_that_walks_over_the_layers():
    x, y = classification_data(rows=32, shape=(8, 8, 1))
    nets = [noisy_net(), noisy_net()]
    for model in (nets[0], LESAMModel(nets[1], 0.0)):
        model.compile("sgd", crossentropy())
        keras.utils.set_random_seed(1)
        model.fit(x, y, epochs=3, verbose=0, callbacks=[ResetState()])
    assert_same_weights(*nets)


def test_layers_are_not_seen_twice():
    net = functional()
    wrapper = LESAMModel(net)
    flat = wrapper._flatten_layers()
    assert len(flat) == len({id(layer) for layer in flat}) == 6
    assert flat[:2] == [wrapper, net]
    assert len(wrapper.weights) == len(net.weights)
    assert wrapper.count_params() == net.count_params()


# Calling.


class TwoInputs(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = LAYERS.Dense(2)

    def call(self, a, b, scale=1.0):
        return self.dense(a) + scale * self.dense(b)


class Noisy(keras.Model):
    """`training` is not the second argument."""

    def __init__(self):
        super().__init__()
        self.noise = LAYERS.Dropout(0.5)

    def call(self, x, factor=2.0, training=None):
        return factor * self.noise(x, training=training)


def test_several_arguments():
    x = np.ones((4, 3))
    net = TwoInputs()
    wrapper = LESAMModel(net)
    found = wrapper(x, 2 * x, scale=0.5)
    np.testing.assert_array_equal(found, net(x, 2 * x, scale=0.5))
    np.testing.assert_array_equal(wrapper(a=x, b=x), net(x, x))
    assert wrapper.built
    with pytest.raises(TypeError, match="missing a required argument: 'b'"):
        wrapper(x)


def test_the_mode_is_passed_on():
    wrapper = LESAMModel(Noisy())
    x = np.ones((50, 50))
    assert np.all(wrapper(x) == 2.0)
    assert np.all(wrapper(x, factor=3.0, training=False) == 3.0)
    assert np.mean(wrapper(x, training=True) == 0.0) > 0.3


@pytest.mark.parametrize("built", [True, False])
def test_masks(built):
    keras.utils.set_random_seed(0)
    first = [keras.Input((5, 3))] if built else []
    net = keras.Sequential([*first, LAYERS.LSTM(2)])
    x = np.random.rand(4, 5, 3)
    mask = np.array([[True, True, False, False, False]] * 4)
    found = LESAMModel(net)(x, mask=mask)
    np.testing.assert_array_equal(found, net(x, mask=mask))
    assert np.any(found != net(x))


def test_masks_that_inputs_carry():
    inputs = {name: keras.Input((5,), name=name) for name in "ab"}
    embed = LAYERS.Embedding(7, 3, mask_zero=True)
    x = LAYERS.Add()([embed(tensor) for tensor in inputs.values()])
    inner = keras.Model(inputs, x)
    tokens = {name: np.array([[1, 2, 0, 0, 0]]) for name in "ab"}
    net = keras.Model(inputs, LAYERS.LSTM(2)(inner(inputs)))
    wrapper = LESAMModel(net)
    np.testing.assert_array_equal(wrapper(tokens), net(tokens))
    masked = LESAMModel(inner)(tokens)
    np.testing.assert_array_equal(masked._keras_mask, inner(tokens)._keras_mask)


@pytest.mark.parametrize("build", [functional, dense_net, annealed])
def test_in_another_model(build):
    """Symbolically, as a layer."""
    net = build()
    wrapper = LESAMModel(net)
    inputs = keras.Input((6,))
    outer = keras.Model(inputs, wrapper(inputs))
    x = np.ones((2, 6), "float32")
    np.testing.assert_array_equal(outer(x), net(x))
    first = keras.Sequential([keras.Input((6,)), wrapper, LAYERS.Flatten()])
    np.testing.assert_array_equal(first(x), net(x))


@pytest.mark.parametrize("name", ["input", "output"])
def test_never_called_on_symbols(name):
    """Says so, as the inner model would."""
    wrapper = LESAMModel(annealed())
    with pytest.raises(AttributeError, match="has never been called"):
        getattr(wrapper, name)
    getattr(wrapper, name, None)


# What training lends.


class ReadsTheOptimizer(keras.Model):
    """In everything that is called in a step."""

    def __init__(self):
        super().__init__()
        self.dense = LAYERS.Dense(4)
        self.at = keras.metrics.Mean(name="at")

    @property
    def step(self):
        return keras.ops.cast(self.optimizer.iterations, "float32")

    def call(self, x, training=False):
        outputs = self.dense(x)
        return outputs + 0.01 * self.step if training else outputs

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None):
        loss = super().compute_loss(x, y, y_pred, sample_weight)
        return loss * (1.0 + 0.1 * self.step)

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        results = super().compute_metrics(x, y, y_pred, sample_weight)
        self.at.update_state(self.step)
        return {**results, "at": self.at.result()}


class OnlyInCall(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = LAYERS.Dense(4)

    def call(self, x):
        rate = self.optimizer.learning_rate
        return self.dense(x) * keras.ops.cast(rate, "float32")


@pytest.mark.parametrize("eagerly", [False, True])
@pytest.mark.parametrize("cls", [ReadsTheOptimizer, OnlyInCall])
def test_the_optimizer_in_the_inner_model(cls, eagerly):
    x, y = classification_data()
    nets, histories = [], []
    for wrap in (lambda net: net, lambda net: LESAMModel(net, 0.0)):
        keras.utils.set_random_seed(0)
        nets.append(cls())
        model = wrap(nets[-1])
        histories.append(train(model, x, y, run_eagerly=eagerly))
        model.evaluate(x, y, verbose=0)
        model.predict(x, verbose=0)
    assert_same_weights(*nets)
    expected, found = histories
    assert {log: found[log] for log in expected} == expected
    assert getattr(nets[1], "optimizer", None) is None


def test_the_optimizer_with_a_budget_and_after_an_error():
    x, y = classification_data()
    keras.utils.set_random_seed(0)
    net = ReadsTheOptimizer()
    history = train(constant_lesam(net), x, y)
    assert history["at"] == [1.0, 4.0, 7.0]

    class Fails(OnlyInCall):
        def call(self, x):
            raise RuntimeError(self.optimizer.name)

    net = Fails()
    own = net.optimizer = keras.optimizers.SGD(name="own")
    wrapper = LESAMModel(net)
    wrapper.compile(keras.optimizers.SGD(name="lent"), crossentropy())
    with pytest.raises(RuntimeError, match="lent"):
        wrapper(x)
    assert net.optimizer is own


# Tools.


@pytest.mark.parametrize("build", [functional, dense_net, annealed])
def test_serving_signature(build, tmp_path):
    x, _ = classification_data(rows=5)
    net = build()
    net(x)
    wrapper = LESAMModel(net)
    tf.saved_model.save(wrapper, str(tmp_path / "wrapper"))
    loaded = tf.saved_model.load(str(tmp_path / "wrapper"))
    serve = loaded.signatures["serving_default"]
    (name,) = serve.structured_input_signature[1]
    (found,) = serve(**{name: tf.constant(x)}).values()
    np.testing.assert_allclose(found, net(x), atol=1e-6)


def tokens():
    return keras.Sequential(
        [
            keras.Input((6,), dtype="int32"),
            LAYERS.Embedding(9, 3),
            LAYERS.Flatten(),
            LAYERS.Dense(2),
        ]
    )


@pytest.mark.filterwarnings("ignore:.*tf.lite.Interpreter is deprecated")
@pytest.mark.parametrize("build", [functional, tokens, annealed])
def test_converted_by_tflite(build):
    x = np.arange(30).reshape((5, 6)) % 9
    x = x.astype("int32" if build is tokens else "float32")
    net = build()
    converter = tf.lite.TFLiteConverter.from_keras_model(LESAMModel(net))
    runner = tf.lite.Interpreter(
        model_content=converter.convert()
    ).get_signature_runner()
    (name,) = runner.get_input_details()
    (found,) = runner(**{name: x}).values()
    np.testing.assert_allclose(found, net(x), atol=1e-5)


@pytest.mark.parametrize("mode", ["int8", "float8"])
def test_quantized_through_the_wrapper(mode):
    x, y = classification_data()
    plain, net = functional(), functional()
    wrapper = LESAMModel(net, 0.0)
    for model in (plain, wrapper):
        model.compile(keras.optimizers.SGD(0.1), crossentropy())
        model.fit(x, y, shuffle=False, verbose=0)
        model.predict(x, verbose=0)
        model.quantize(mode)
    np.testing.assert_array_equal(
        wrapper.predict(x, verbose=0), plain.predict(x, verbose=0)
    )
    if mode == "float8":
        for model in (plain, wrapper):
            train(model, x, y)
        assert_same_weights(net, plain)


def test_compiling_the_model_inside_does_not_count():
    x, y = classification_data()
    net = dense_net()
    net.compile("sgd", crossentropy())
    model = constant_lesam(net)
    for method in ("fit", "evaluate", "train_on_batch", "test_on_batch"):
        with pytest.raises(ValueError, match=r"`compile\(\)` of the wrapper"):
            getattr(model, method)(x, y)


@pytest.mark.parametrize("trainable", [True, False])
def test_nothing_to_train_and_not_built(trainable):
    """As plain Keras, which warns."""
    x, y = classification_data(classes=2, shape=(2,))
    layers = [LAYERS.Dense(2)] if not trainable else [LAYERS.Rescaling(2.0)]
    net = keras.Sequential([*layers, LAYERS.Softmax()])
    net.trainable = trainable
    for curvature in ("none", "hvp"):
        model = constant_lesam(net, curvature=curvature)
        model.compile("sgd", "sparse_categorical_crossentropy")
        before = net.get_weights()
        with pytest.warns(UserWarning, match="does not have any trainable"):
            history = model.fit(x, y, epochs=2, verbose=0).history
        assert np.all(np.isfinite(history["loss"]))
        if before:
            np.testing.assert_array_equal(before[0], net.get_weights()[0])


STRATEGIES = {
    "central storage": lambda: (
        tf.distribute.experimental.CentralStorageStrategy(
            compute_devices=["CPU:0", "CPU:1"], parameter_device="CPU:0"
        )
    ),
    "mirrored, of one": lambda: tf.distribute.MirroredStrategy(["CPU:0"]),
    "one device": lambda: tf.distribute.OneDeviceStrategy("CPU:0"),
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_scope_of_a_strategy(name):
    x, y = classification_data()
    strategy = STRATEGIES[name]()
    histories, nets = [], []
    for wrap in (lambda net: net, lambda net: LESAMModel(net, 0.0)):
        with strategy.scope():
            nets.append(dense_net())
            model = wrap(nets[-1])
            histories.append(train(model, x, y))
    assert histories[1]["loss"] == histories[0]["loss"]
    assert_same_weights(*nets)


def test_outside_of_the_scope():
    with STRATEGIES["central storage"]().scope():
        net = dense_net()
    with pytest.raises(ValueError, match="in the same `strategy"):
        LESAMModel(net)
    net = dense_net()
    with (
        STRATEGIES["central storage"]().scope(),
        pytest.raises(ValueError, match="in the same `strategy"),
    ):
        LESAMModel(net)


# A wrapper inside of another model.

WARNING = "called for training by another model or loop"


def outer_sequential(wrapper):
    return keras.Sequential([keras.Input((6,)), wrapper])


def outer_functional(wrapper):
    inputs = keras.Input((6,))
    return keras.Model(inputs, keras.layers.Softmax()(wrapper(inputs)))


class Outer(keras.Model):
    """Holds a model as an attribute."""

    def __init__(self, model):
        super().__init__()
        self.inside = model

    def call(self, x, training=None):
        return self.inside(x, training=training)


@pytest.mark.parametrize("outer", [outer_sequential, outer_functional, Outer])
def test_training_as_a_part_of_another_model_is_said_to_be_plain(outer):
    model = outer(LESAMModel(dense_net()))
    model.compile("sgd", "mse")
    x, y = np.ones((8, 6), "float32"), np.ones((8, 4), "float32")
    model.evaluate(x, y, verbose=0)
    with pytest.warns(UserWarning, match=WARNING) as caught:
        model.fit(x, y, verbose=0)
    assert sum(WARNING in str(w.message) for w in caught) == 1


@pytest.mark.parametrize("sigma", [0.0, 0.1])
@pytest.mark.parametrize("eager", [False, True])
def test_training_by_itself_is_not(sigma, eager):
    model = LESAMModel(dense_net(), sigma, warmup=0, anneal=0)
    model.compile("sgd", "mse", run_eagerly=eager)
    x, y = np.ones((8, 6), "float32"), np.ones((8, 4), "float32")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=f".*{WARNING}")
        model.fit(x, y, verbose=0)
        model.train_on_batch(x, y)
        tf.function(model.train_step)((tf.constant(x), tf.constant(y)))
        # As for dropout at inference.
        model(x, training=True)


def test_nor_is_a_step_of_a_loop_with_an_ascent_of_its_own():
    model = LESAMModel(dense_net())
    x, variables = tf.ones((8, 6)), model.trainable_variables
    lesam = SharpnessAwareGradients()

    @tf.function
    def step(state):
        def loss_fn():
            return tf.reduce_mean(model(x, training=True) ** 2)

        return lesam(loss_fn, variables, state, None)[0]

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=f".*{WARNING}")
        step(lesam.init_state(variables))
