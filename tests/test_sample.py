"""What the curvature tools take as data, and how they refuse the rest."""

import inspect

import keras
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import tensorflow as tf
from hypothesis import HealthCheck
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from keras import layers

from keras_lesam import curvature
from keras_lesam import landscape
from keras_lesam.callbacks import Curvature
from tests.helpers import classification_data
from tests.helpers import crossentropy
from tests.helpers import dense_net

QUIET = {"verbose": 0}
X, Y = classification_data(rows=24)
W = np.linspace(0.5, 1.5, 24).astype("float32")


def compiled(**options):
    net = dense_net(**options)
    net.compile("sgd", crossentropy())
    return net


def loss_along(net, x, y=None, **options):
    direction = [np.zeros(v.shape) for v in net.trainable_variables]
    return landscape.loss_along(
        net, x, y, direction=direction, distances=[0.0], **QUIET, **options
    )


TOOLS = {
    "operator": curvature.HessianOperator,
    "top_eigenvalues": lambda *a, **k: curvature.top_eigenvalues(
        *a, **k, **QUIET
    ),
    "loss_along": loss_along,
    "callback": lambda net, *a, **k: Curvature(*a, **k),
}
EVERY_TOOL = pytest.mark.parametrize("tool", TOOLS.values(), ids=TOOLS)


def batches():
    yield X, Y


class Endless:
    """Like a loader of a stream: it yields, and has no length."""

    def __iter__(self):
        while True:
            yield X, Y


class NoLength(Endless):
    def __len__(self):
        raise TypeError("a stream has no length")


REFUSED = {
    "a generator": ({"x": batches(), "y": None}, "`x`.*generator"),
    "a generator and targets": ({"x": batches()}, "`x`.*generator"),
    "an iterator": ({"x": iter([(X, Y)]), "y": None}, "`x`.*list_iterator"),
    "zip": ({"x": zip(X, Y), "y": None}, "`x`.*zip"),
    "a stream": ({"x": Endless(), "y": None}, "`x`.*Endless"),
    "a loader of one": ({"x": NoLength(), "y": None}, "`x`.*NoLength"),
    "iterator of a dataset": (
        {"x": iter(tf.data.Dataset.from_tensors((X, Y))), "y": None},
        "`x`.*terator",
    ),
    "a list of rows": ({"x": X.tolist()}, "`x`.*list of rows.*type list"),
    "a list of numbers as y": ({"y": Y.tolist()}, "`y`.*type list.*type int"),
    "a list of arrays": ({"x": [*X]}, "`x`.*(same number|each input)"),
    "a tuple of data": ({"x": (X, X), "y": Y}, "`x` must have one array"),
    "a set": ({"x": {1, 2}}, "`x`.*type set"),
    "a word": ({"x": "mnist"}, "`x`.*type str"),
    "an object": ({"x": object()}, "`x`.*type object"),
    "a function": ({"x": lambda: X}, "`x`.*type function"),
    "a class": ({"x": Endless}, "`x`.*type type"),
    "nothing": ({"x": None}, "`x`.*x=None"),
    "a list of nothing": ({"x": [None]}, "`x`.*None"),
    "an empty list": ({"x": []}, r"`x`.*x=\[\]"),
    "a scalar": ({"x": 3.0}, "`x`.*type float"),
    "a scalar of NumPy": ({"x": np.float32(3)}, "`x`.*scalar"),
    "a scalar tensor": ({"x": tf.constant(3.0)}, "`x`.*scalar"),
    "a scalar target": ({"y": np.array(1)}, "`y`.*scalar"),
    "a scalar weight": (
        {"sample_weight": np.float32(1)},
        "`sample_weight`.*scalar",
    ),
    "a Python weight": ({"sample_weight": 1.0}, "`sample_weight`.*type float"),
    "no rows": ({"x": X[:0], "y": Y[:0]}, "`x` has no rows"),
    "no batches": (
        {"x": tf.data.Dataset.from_tensors((X, Y)).take(0), "y": None},
        "`x` has no rows",
    ),
    "empty batches": (
        {"x": tf.data.Dataset.from_tensors((X[:0], Y[:0])), "y": None},
        "`x` has no rows",
    ),
    "another number of rows": ({"y": Y[:7]}, r"same number of rows.*y: \[7\]"),
    "of weights": (
        {"sample_weight": W[:7]},
        r"same number.*sample_weight: \[7\]",
    ),
    "a masked array": ({"x": np.ma.masked_less(X, 0)}, "`x`.*masked array"),
    "masked targets": ({"y": np.ma.masked_less(Y, 1)}, "`y`.*masked array"),
    "masked weights": (
        {"sample_weight": np.ma.masked_less(W, 1)},
        "`sample_weight`.*masked array",
    ),
    "objects": ({"x": X.astype(object)}, "`x`.*dtype object"),
    "dates": ({"y": Y.astype("datetime64[s]")}, "`y`.*dtype datetime"),
    "a dataset of rows": (
        {"x": tf.data.Dataset.from_tensor_slices((X, Y)), "y": None},
        "Batch 0 of the dataset `x`.*`y` must have rows",
    ),
    "batches in a list": (
        {"x": [(X, Y)], "y": None},
        "`x` must have one array",
    ),
    "a dataset and targets": (
        {"x": tf.data.Dataset.from_tensors((X, Y))},
        "leave them None",
    ),
    "batches of four": (
        {"x": tf.data.Dataset.from_tensors((X, Y, W, W)), "y": None},
        "`x` must yield.*4 parts",
    ),
}


@pytest.mark.parametrize(
    ("name", "tool"),
    [
        (name, tool)
        for name, (_, message) in REFUSED.items()
        for tool in TOOLS.values()
        # A callback knows the model later.
        if not (tool is TOOLS["callback"] and "one array" in message)
    ],
)
def test_one_sentence_names_the_argument(name, tool):
    changed, message = REFUSED[name]
    arguments = {"x": X, "y": Y, **changed}
    calls = []
    net = compiled()
    net.call = lambda *a, **k: calls.append(a)
    with pytest.raises((TypeError, ValueError), match=message) as info:
        tool(net, arguments.pop("x"), arguments.pop("y"), **arguments)
    assert "\n" not in str(info.value)
    assert len(str(info.value)) < 400
    assert not calls


@pytest.mark.parametrize(
    "data",
    [
        (X, None),
        (tf.data.Dataset.from_tensors((X,)), None),
        (tf.data.Dataset.from_tensors(X), None),
    ],
    ids=["arrays", "dataset of tuples", "dataset of inputs"],
)
@pytest.mark.parametrize("built", [False, True])
@pytest.mark.parametrize("tool", ["operator", "top_eigenvalues", "loss_along"])
def test_a_loss_needs_its_targets(tool, built, data):
    net = compiled()
    if not built:
        net = keras.Sequential([layers.Dense(4)])
        net.compile("sgd", crossentropy())
        if tool == "loss_along":
            net(X)
    with pytest.raises(ValueError, match="`y` is missing"):
        TOOLS[tool](net, *data)


def test_a_loss_of_no_targets_needs_none():
    class Autoencoder(keras.Sequential):
        def compute_loss(self, x, y, y_pred, sample_weight=None, training=True):
            return keras.ops.mean(keras.ops.square(y_pred - x))

    net = Autoencoder([keras.Input((6,)), layers.Dense(6)])
    net.compile("sgd")
    assert curvature.top_eigenvalues(net, X, **QUIET) > 0


def test_inputs_may_be_the_name_of_something_else():
    class Net(keras.Model):
        def __init__(self):
            super().__init__()
            self.inputs = layers.Dense(3)
            self.outputs = layers.Dense(4)

        def call(self, x):
            return self.outputs(self.inputs(x[0]) * self.inputs(x[1]))

    net = Net()
    net.compile("sgd", crossentropy())
    assert np.isfinite(curvature.trace(net, [X, X], Y, **QUIET).value)


def test_ragged_inputs():
    lengths = np.arange(24) % 3 + 1
    x = tf.RaggedTensor.from_row_lengths(np.arange(lengths.sum()) % 9, lengths)

    class Bag(keras.Model):
        def __init__(self):
            super().__init__()
            self.table = self.add_weight(shape=(9, 4))

        def call(self, x):
            rows = tf.ragged.map_flat_values(
                lambda i: tf.gather(tf.convert_to_tensor(self.table), i), x
            )
            return tf.reduce_sum(rows, 1)

    found = []
    for batch_size in (5, 24):
        keras.utils.set_random_seed(0)
        net = Bag()
        net.compile("sgd", crossentropy())
        found.append(
            curvature.top_eigenvalues(net, x, Y, batch_size=batch_size, **QUIET)
        )
    np.testing.assert_allclose(*found, rtol=1e-3)


class Loader:
    """Like the DataLoader of PyTorch: a length, an iterator, lists."""

    def __init__(self, *data, rows=5):
        self.data, self.rows = data, rows

    def __len__(self):
        return -(-len(self.data[0]) // self.rows)

    def __iter__(self):
        for i in range(0, len(self.data[0]), self.rows):
            yield [OtherTensor(d[i : i + self.rows]) for d in self.data]


class OtherTensor:
    """An array of another library."""

    def __init__(self, array):
        self.array = array

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.array, dtype)


class Indexed:
    """No iterator: items by number, without an end of its own."""

    def __len__(self):
        return 2

    def __getitem__(self, i):
        return X[12 * (i % 2) :][:12], Y[12 * (i % 2) :][:12]


SPARSE = scipy.sparse.csr_matrix(np.where(X > 0.5, X, 0))
TAKEN = {
    "a loader": (Loader(X, Y), None),
    "items": (Indexed(), None),
    "a data frame": (pd.DataFrame(X, index=np.arange(24) * 7), pd.Series(Y)),
    "float64": (X.astype("float64"), Y.astype("float64")),
    "tensors": (tf.constant(X), tf.constant(Y)),
    "of another library": (OtherTensor(X), OtherTensor(Y)),
    "a list of one": ([X], Y),
    "some batches without rows": (
        tf.data.Dataset.from_tensors((X, Y)).concatenate(
            tf.data.Dataset.from_tensors((X[:0], Y[:0]))
        ),
        None,
    ),
}


@pytest.mark.parametrize("name", TAKEN)
def test_what_fit_takes_is_taken(name):
    x, y = TAKEN[name]
    expected = curvature.top_eigenvalues(compiled(), X, Y, **QUIET)
    for options in ({}, {"batch_size": 5}):
        found = curvature.top_eigenvalues(compiled(), x, y, **options, **QUIET)
        np.testing.assert_allclose(found, expected, rtol=1e-3)
    net = compiled()
    history = net.fit(X, Y, verbose=0, callbacks=[Curvature(x, y)]).history
    assert np.isfinite(history["top_eigenvalue"]).all()


@pytest.mark.parametrize("batch_size", [5, 24])
@pytest.mark.parametrize(
    "x", [SPARSE, SPARSE.tocoo(), tf.sparse.from_dense(SPARSE.toarray())]
)
def test_sparse_inputs(x, batch_size):
    expected = curvature.top_eigenvalues(
        compiled(), SPARSE.toarray(), Y, **QUIET
    )
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6,), sparse=True)
    hidden = layers.Dense(8, activation="tanh")(inputs)
    net = keras.Model(inputs, layers.Dense(4)(hidden))
    net.compile("sgd", crossentropy())
    found = curvature.top_eigenvalues(net, x, Y, batch_size=batch_size, **QUIET)
    np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_batches_of_one_product():
    """Of one batch: no datasets; in a graph, numbers of rows wait."""
    net = compiled()
    vectors = [np.ones(v.shape) for v in net.trainable_variables]
    for x, message in (
        (tf.data.Dataset.from_tensors((X, Y)), "one batch.*HessianOperator"),
        (batches(), "`x` must be the arrays of one batch"),
        (X.tolist(), "`x`.*list of rows"),
        (X[:0], "no rows|same number"),
        (np.ma.masked_less(X, 0), "`x`.*masked"),
        (None, "`x`"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            curvature.hessian_vector_product(net, x, Y, vectors)
    with pytest.raises(ValueError, match="`y` is missing"):
        curvature.hessian_vector_product(net, X, None, vectors)
    expected = curvature.hessian_vector_product(net, X, Y, vectors)

    @tf.function(
        input_signature=[
            tf.TensorSpec((None, 6), tf.float32),
            tf.TensorSpec((None,), tf.int64),
        ]
    )
    def in_graph(x, y):
        return curvature.hessian_vector_product(net, x, y, vectors)

    for a, b in zip(expected, in_graph(X, Y)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


# Other arguments.

not_numbers = st.one_of(
    st.none(), st.text(), st.booleans(), st.lists(st.floats()), st.just(1j)
)
not_integers = st.one_of(not_numbers, st.floats())
not_seeds = st.one_of(not_integers, st.integers(max_value=-1))
FAST = settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def check(name, call):
    with pytest.raises((TypeError, ValueError)) as info:
        call()
    assert f"`{name}" in str(info.value)
    assert "Received" in str(info.value)


@FAST
@given(not_seeds)
def test_seeds(seed):
    net = compiled()
    for tool in ("top_eigenvalues", "trace", "spectral_density"):
        function = getattr(curvature, tool)
        check("seed", lambda f=function: f(net, X, Y, seed=seed, **QUIET))
    check("seed", lambda: Curvature(X, Y, seed=seed))
    check("seed", lambda: landscape.filter_normalized_direction(net, seed))


@FAST
@given(st.one_of(not_integers, st.integers(max_value=0)))
def test_numbers_of_things(value):
    net = compiled()
    for tool, names in {
        "top_eigenvalues": ["k", "max_products", "batch_size"],
        "trace": ["max_samples"],
        "spectral_density": ["probes", "steps"],
    }.items():
        for name in names:
            check(
                name,
                lambda t=tool, n=name: getattr(curvature, t)(
                    net, X, Y, **{n: value}, **QUIET
                ),
            )
    for name in ("every", "batch_size"):
        check(name, lambda n=name: Curvature(X, Y, **{n: value}))
    if value != 0:
        check("trace_samples", lambda: Curvature(X, Y, trace_samples=value))


@FAST
@given(
    st.one_of(
        not_numbers,
        st.floats(max_value=-1e-300),
        st.just(np.nan),
        st.just(np.inf),
    )
)
def test_tolerances(value):
    net = compiled()
    for tool in ("top_eigenvalues", "trace"):
        function = getattr(curvature, tool)
        check(
            "tolerance",
            lambda f=function: f(net, X, Y, tolerance=value, **QUIET),
        )
    check("tolerance", lambda: Curvature(X, Y, tolerance=value))


def bad_variables():
    net, other = compiled(), compiled()
    frozen = compiled()
    frozen.layers[0].trainable = False
    kernel = net.layers[0].kernel
    return {
        "one": (net, kernel),
        "a tensor": (net, tf.ones(3)),
        "a word": (net, "kernel"),
        "a number": (net, 1),
        "a dict": (net, {"kernel": kernel}),
        "a generator": (net, (v for v in [kernel])),
        "none of them": (net, []),
        "paths": (net, [kernel.path]),
        "values": (net, [kernel.numpy()]),
        "of another model": (net, [kernel, other.layers[0].kernel]),
        "frozen": (frozen, [frozen.layers[0].kernel]),
        "nested": (net, [[kernel]]),
        "nothing": (net, [None]),
    }


@pytest.mark.parametrize("name", bad_variables())
def test_variables(name):
    net, variables = bad_variables()[name]
    check(
        "variables",
        lambda: curvature.HessianOperator(net, X, Y, variables=variables),
    )
    check(
        "variables",
        lambda: curvature.trace(net, X, Y, variables=variables, **QUIET),
    )


def test_vectors_of_another_size():
    operator = curvature.HessianOperator(compiled(), X, Y)
    for vector in (np.ones(operator.size - 1), 1.0, []):
        check("vector", lambda v=vector: operator(v))


def test_all_have_the_same_batch_size_by_default():
    defaults = {
        name: inspect.signature(tool).parameters["batch_size"].default
        for name, tool in {
            **{n: getattr(curvature, n) for n in curvature.__all__},
            **{n: getattr(landscape, n) for n in landscape.__all__},
            "callback": Curvature,
        }.items()
        if "batch_size" in inspect.signature(tool).parameters
    }
    assert len(defaults) == 7
    assert set(defaults.values()) == {256}
