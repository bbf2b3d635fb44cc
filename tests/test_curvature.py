"""Eigenvalues, trace and spectrum against the dense Hessian, in float64."""

import csv

import keras
import numpy as np
import pytest
import scipy.sparse.linalg
import tensorflow as tf
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
from keras import layers

from keras_lesam import LESAMModel
from keras_lesam import _lanczos
from keras_lesam.callbacks import Curvature
from keras_lesam.curvature import HessianOperator
from keras_lesam.curvature import spectral_density
from keras_lesam.curvature import top_eigenvalues
from keras_lesam.curvature import trace
from tests.helpers import classification_data
from tests.helpers import constant_lesam
from tests.helpers import crossentropy
from tests.helpers import dense_net
from tests.helpers import noisy_net
from tests.helpers import train
from tests.test_hessian import dense_hessian
from tests.test_hessian import flatten

QUIET = {"verbose": 0}


class Matrix:
    """A symmetric matrix as the operators that `_lanczos` takes."""

    def __init__(self, matrix):
        self.matrix, self.size, self.products = matrix, len(matrix), 0
        self.progress = self

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def __call__(self, vector):
        self.products += 1
        return self.matrix @ vector


def with_spectrum(eigenvalues, seed=0):
    rng = np.random.default_rng(seed)
    q, _ = np.linalg.qr(rng.normal(size=(len(eigenvalues),) * 2))
    return Matrix(q @ np.diag(eigenvalues) @ q.T)


def rng():
    return np.random.default_rng(1)


# Linear algebra alone.


@pytest.mark.parametrize("k", [1, 3, 40])
@pytest.mark.parametrize("size", [40, 200])
def test_largest_eigenvalues_of_a_matrix(k, size):
    eigenvalues = np.linspace(-50, 20, size) ** 3
    operator = with_spectrum(eigenvalues)
    values, vectors = _lanczos.largest(operator, k, 0.0, 10_000, rng())
    np.testing.assert_allclose(values, eigenvalues[::-1][:k], rtol=1e-8)
    residual = operator.matrix @ vectors - vectors * values
    assert np.abs(residual).max() < 1e-6 * np.abs(eigenvalues).max()


def test_all_eigenvalues_of_a_small_matrix():
    values, _ = _lanczos.largest(with_spectrum([3.0, 1, 2]), 3, 0, 9, rng())
    np.testing.assert_allclose(values, [3, 2, 1])


def test_a_wider_tolerance_takes_fewer_products():
    counts = []
    for tolerance in (1e-1, 1e-9):
        operator = with_spectrum(np.linspace(0, 1, 300))
        _lanczos.largest(operator, 1, tolerance, 10_000, rng())
        counts.append(operator.products)
    assert counts[0] < counts[1]


def test_no_convergence_is_an_error():
    operator = with_spectrum(np.linspace(1, 1.0001, 400))
    with pytest.raises(RuntimeError, match=r"`max_products`.*Received: .*=30"):
        _lanczos.largest(operator, 3, 0.0, 30, rng())


def test_trace_of_a_diagonal_matrix_is_exact():
    """`v.(D v)` is the trace for every vector of signs."""
    operator = Matrix(np.diag([1.0, 2.0, -5.0]))
    value, error, samples = _lanczos.trace(operator, 0.01, 100, rng())
    assert (value, error, samples) == (-2.0, 0.0, 10)


def test_standard_error_of_the_trace():
    """Of many estimates, 95% lie within two of theirs."""
    operator = with_spectrum(np.linspace(-1, 3, 60))
    true = np.trace(operator.matrix)
    hits = 0
    for seed in range(200):
        value, error, _ = _lanczos.trace(
            operator, 1e-9, 30, np.random.default_rng(seed)
        )
        hits += abs(value - true) < 2 * error
    assert 0.88 < hits / 200 < 1


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(-100, 100), min_size=2, max_size=12),
    st.integers(1, 12),
)
def test_tridiagonal_matrix_has_the_moments_of_its_start(spectrum, steps):
    """`steps` steps have the first `2 steps - 1` moments, if any are made."""
    operator = with_spectrum(np.array(spectrum))
    start = np.random.default_rng(0).normal(size=len(spectrum))
    start /= np.linalg.norm(start)
    diagonal, beside = _lanczos.tridiagonal(operator, start, steps)
    t = np.diag(diagonal) + np.diag(beside, 1) + np.diag(beside, -1)
    scale = 1 + np.abs(spectrum).max()
    for order in range(min(2 * steps, 4)):
        expected = start @ np.linalg.matrix_power(operator.matrix, order)
        found = np.linalg.matrix_power(t, order)[0, 0]
        assert abs(found - expected @ start) < 1e-5 * scale**order


# Of models.


def classifier():
    """A trained net, its data and its dense Hessian."""
    x, y = classification_data(rows=40)
    net = dense_net()
    train(net, x, y, epochs=5, batch_size=8)
    return net, x, y, dense_hessian(net, x, y)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("wrapped", [False, True])
def test_eigenvalues_are_those_of_the_dense_hessian(wrapped):
    net, x, y, hessian = classifier()
    if wrapped:
        net = LESAMModel(net)
        net.compile("sgd", crossentropy())
    expected = np.linalg.eigvalsh(hessian)[::-1]
    # Batches of 16, 16 and 8 rows: the mean over all rows.
    found = top_eigenvalues(net, x, y, k=5, batch_size=16, **QUIET)
    assert found.shape == (5,)
    assert found.dtype == "float64"
    np.testing.assert_allclose(found, expected[:5], rtol=1e-4)
    exact = top_eigenvalues(net, x, y, k=5, tolerance=0, **QUIET)
    np.testing.assert_allclose(exact, expected[:5], rtol=1e-6)


@pytest.mark.usefixtures("float64")
def test_eigenvectors():
    net, x, y, hessian = classifier()
    values, vectors = top_eigenvalues(
        net, x, y, k=2, tolerance=0, return_vectors=True, **QUIET
    )
    for value, vector in zip(values, vectors):
        assert [v.shape for v in vector] == [v.shape for v in net.weights]
        flat = flatten(vector).numpy()
        np.testing.assert_allclose(np.linalg.norm(flat), 1)
        np.testing.assert_allclose(hessian @ flat, value * flat, atol=1e-6)


@pytest.mark.usefixtures("float64")
def test_the_operator_is_the_dense_hessian():
    net, x, y, hessian = classifier()
    operator = HessianOperator(net, x, y, batch_size=16)
    assert operator.size == len(hessian)
    assert operator.shapes == [tuple(v.shape) for v in net.trainable_variables]
    vector = np.random.default_rng(0).normal(size=operator.size)
    np.testing.assert_allclose(operator(vector), hessian @ vector, atol=1e-6)
    linear = operator.to_scipy()
    assert linear.shape == hessian.shape
    np.testing.assert_allclose(linear @ vector, hessian @ vector, atol=1e-6)
    np.testing.assert_allclose(linear.T @ vector, hessian @ vector, atol=1e-6)
    # What SciPy makes of it: the smallest eigenvalue, of either sign.
    [least] = scipy.sparse.linalg.eigsh(
        linear, 1, which="SA", return_eigenvectors=False
    )
    np.testing.assert_allclose(least, np.linalg.eigvalsh(hessian)[0], atol=1e-6)
    pieces = operator.unflatten(vector)
    np.testing.assert_array_equal(
        np.concatenate([np.ravel(piece) for piece in pieces]), vector
    )


@pytest.mark.usefixtures("float64")
def test_the_operator_follows_the_weights():
    net, x, y, _ = classifier()
    operator = HessianOperator(net, x, y)
    vector = np.ones(operator.size)
    train(net, x, y)
    np.testing.assert_allclose(
        operator(vector), dense_hessian(net, x, y) @ vector, atol=1e-5
    )


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"batch_size": 0}, "`batch_size`.*batch_size=0"),
        ({"method": "finite"}, "`method`.*'finite'"),
        ({"variables": []}, "`variables` must be trainable"),
    ],
    ids=str,
)
def test_arguments_of_the_operator(options, match):
    net = dense_net()
    net.compile("sgd", crossentropy())
    with pytest.raises(ValueError, match=match):
        HessianOperator(net, *classification_data(rows=8), **options)


@pytest.mark.usefixtures("float64")
def test_a_layer_has_a_block_of_the_hessian():
    net, x, y, hessian = classifier()
    variables = net.layers[-1].trainable_variables
    size = sum(v.shape.num_elements() for v in map(tf.constant, variables))
    block = hessian[-size:, -size:]
    options = {"variables": variables, "tolerance": 1e-8, **QUIET}
    np.testing.assert_allclose(
        top_eigenvalues(net, x, y, k=2, **options),
        np.linalg.eigvalsh(block)[::-1][:2],
        rtol=1e-4,
    )


@pytest.mark.usefixtures("float64")
def test_trace_is_within_its_error():
    net, x, y, hessian = classifier()
    found = trace(net, x, y, tolerance=0.02, max_samples=3000, **QUIET)
    assert found.standard_error <= 0.02 * abs(found.value)
    assert abs(found.value - np.trace(hessian)) < 3 * found.standard_error


@pytest.mark.usefixtures("float64")
def test_density_has_the_moments_of_the_dense_hessian():
    net, x, y, hessian = classifier()
    eigenvalues = np.linalg.eigvalsh(hessian)
    found = spectral_density(net, x, y, probes=60, steps=20, **QUIET)
    assert found.weights.sum() == pytest.approx(1)
    assert np.all(found.weights >= 0)
    assert np.all(np.diff(found.eigenvalues) >= 0)
    for order in (1, 2, 3):
        expected = np.mean(eigenvalues**order)
        assert found.moment(order) == pytest.approx(expected, rel=0.15)
    np.testing.assert_allclose(
        found.eigenvalues[[0, -1]], eigenvalues[[0, -1]], rtol=1e-3
    )
    grid = np.linspace(-5, 5, 4001)
    density = found.density(grid, width=0.1)
    assert np.sum(density) * (grid[1] - grid[0]) == pytest.approx(1, abs=1e-3)


@pytest.mark.usefixtures("float64")
def test_batch_norm_and_dropout_stay_as_they_are():
    net = noisy_net()
    net.compile("sgd", crossentropy())
    x, y = classification_data(rows=16, shape=(8, 8, 1))
    before = [v.numpy() for v in net.variables]
    first = top_eigenvalues(net, x, y, **QUIET)
    np.testing.assert_array_equal(top_eigenvalues(net, x, y, **QUIET), first)
    assert trace(net, x, y, **QUIET) == trace(net, x, y, **QUIET)
    for variable, value in zip(net.variables, before):
        np.testing.assert_array_equal(variable, value)


@pytest.mark.usefixtures("float64")
def test_seeds():
    net, x, y, _ = classifier()
    options = {"max_samples": 10, **QUIET}
    assert trace(net, x, y, **options) == trace(net, x, y, **options)
    assert trace(net, x, y, seed=1, **options) != trace(net, x, y, **options)


class Pairs(keras.utils.PyDataset):
    """Batches of 16 rows."""

    def __init__(self, *data):
        super().__init__()
        self.data = data

    def __len__(self):
        return -(-len(self.data[0]) // 16)

    def __getitem__(self, i):
        return tuple(d[16 * i : 16 * (i + 1)] for d in self.data)


@pytest.mark.usefixtures("float64")
def test_datasets_are_arrays_in_batches():
    net, x, y, _ = classifier()
    w = np.linspace(0, 2, len(x))
    expected = top_eigenvalues(
        net, x, y, sample_weight=w, batch_size=16, **QUIET
    )
    dataset = tf.data.Dataset.from_tensor_slices((x, y, w)).batch(16)
    for data in (dataset, Pairs(x, y, w)):
        found = top_eigenvalues(net, data, **QUIET)
        np.testing.assert_allclose(found, expected, rtol=1e-9)
    # One that yields other batches each time is kept as it came.
    shuffled = dataset.unbatch().shuffle(40, seed=0).batch(16)
    found = top_eigenvalues(net, shuffled, **QUIET)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.usefixtures("float64")
def test_several_inputs_and_outputs():
    a, b = keras.Input((3,)), keras.Input((2,))
    shared = layers.Concatenate()([a, b])
    outputs = {
        "one": layers.Dense(1, name="one")(shared),
        "two": layers.Dense(1, name="two")(shared),
    }
    net = keras.Model({"a": a, "b": b}, outputs)
    net.compile("sgd", loss={"one": "mse", "two": "mse"})
    r = np.random.default_rng(0)
    x = {"a": r.normal(size=(20, 3)), "b": r.normal(size=(20, 2))}
    y = {"one": r.normal(size=(20, 1)), "two": r.normal(size=(20, 1))}
    design = np.hstack([x["a"], x["b"], np.ones((20, 1))])
    expected = np.linalg.eigvalsh(2 * design.T @ design / 20)[::-1]
    found = top_eigenvalues(net, x, y, k=2, batch_size=7, **QUIET)
    np.testing.assert_allclose(found, expected[[0, 0]], rtol=1e-6)


def test_float32():
    net, x, y, hessian = classifier()
    expected = np.linalg.eigvalsh(hessian)[-1]
    found = top_eigenvalues(net, x, y, **QUIET)
    np.testing.assert_allclose(found, [expected], rtol=1e-2)


def test_progress_has_a_target_where_there_is_one(capsys):
    """A net of 92 weights; ARPACK alone makes as many products as it needs."""
    net, x, y, _ = classifier()
    bias = [net.layers[-1].bias]
    probes = {"probes": 2, "steps": 5}
    for call, target in (
        (lambda **o: trace(net, x, y, max_samples=10, **o), "10/10"),
        # May end before: 10 samples are enough, of 200.
        (lambda **o: trace(net, x, y, tolerance=9, **o), "10/200"),
        (lambda **o: spectral_density(net, x, y, **probes, **o), "/10"),
        (
            lambda **o: spectral_density(
                net, x, y, probes=2, variables=bias, **o
            ),
            "/8",
        ),
        (lambda **o: top_eigenvalues(net, x, y, variables=bias, **o), "4/4"),
        (lambda **o: top_eigenvalues(net, x, y, **o), "/Unknown"),
    ):
        call()
        shown = capsys.readouterr().out
        assert target in shown
        assert ("Unknown" in shown) == (target == "/Unknown")
        assert shown.endswith("\n")
        call(**QUIET)
        assert not capsys.readouterr().out


def test_progress_of_products_of_ones_own(capsys):
    net, x, y, _ = classifier()
    operator = HessianOperator(net, x, y, verbose=1)
    trace_of = _lanczos.trace(operator, 9.0, 12, rng())
    assert trace_of[2] == 10
    assert "/12" in capsys.readouterr().out
    with operator.progress:
        operator(np.ones(operator.size))
    assert "1/Unknown" in capsys.readouterr().out


def test_small_eigenvalues_are_as_accurate_as_large_ones():
    """ARPACK by itself takes what is below 1e-11 for converged."""
    spectrum = np.linspace(0, 1, 401)
    for scale in (1.0, 1e-20):
        operator = with_spectrum(scale * spectrum)
        [value], _ = _lanczos.largest(operator, 1, 1e-8, 10_000, rng())
        assert value == pytest.approx(scale, rel=1e-6)


BAD = [
    ({"k": 0}, ValueError, "`k` must be at least 1"),
    ({"k": 1.5}, TypeError, "`k` must be an integer"),
    ({"k": True}, TypeError, "`k` must be an integer"),
    ({"k": 10_000}, ValueError, "number of weights. Received: k=10000"),
    ({"tolerance": -1}, ValueError, "`tolerance`"),
    ({"max_products": 0}, ValueError, "`max_products`"),
    ({"batch_size": 0}, ValueError, "`batch_size`"),
    ({"method": "forward"}, ValueError, "`method` must be one of"),
    ({"variables": []}, ValueError, "`variables` must be trainable"),
    ({"variables": [3]}, ValueError, "`variables` must be trainable"),
    ({"y": np.zeros(3)}, ValueError, r"same number of rows.*\[3, 40\]"),
    ({"x": np.zeros((0, 6)), "y": np.zeros(0)}, ValueError, "no rows"),
    (
        {"x": tf.data.Dataset.from_tensors(1).repeat(), "y": None},
        ValueError,
        "no end.*take",
    ),
    ({"x": tf.data.Dataset.from_tensors(1)}, ValueError, "leave them None"),
]


@pytest.mark.parametrize(("changed", "error", "message"), BAD)
def test_bad_arguments(changed, error, message):
    net = dense_net()
    net.compile("sgd", crossentropy())
    x, y = classification_data(rows=40)
    arguments = {"x": x, "y": y, **QUIET, **changed}
    with pytest.raises(error, match=message):
        top_eigenvalues(net, **arguments)


@pytest.mark.parametrize(
    "argument", [{"max_samples": 1}, {"tolerance": 0.0}], ids=str
)
def test_bad_arguments_of_trace(argument):
    net = dense_net()
    net.compile("sgd", crossentropy())
    with pytest.raises(ValueError, match="Received"):
        trace(net, *classification_data(rows=8), **argument)


# The callback.


def test_callback_logs_at_the_ends_of_epochs(tmp_path):
    x, y = classification_data()
    model = constant_lesam(dense_net())
    watch = Curvature(x[:32], y[:32])
    log = tmp_path / "log.csv"
    others = [
        keras.callbacks.CSVLogger(log),
        keras.callbacks.TensorBoard(tmp_path / "board"),
    ]
    model.compile("sgd", crossentropy())
    history = model.fit(
        x, y, epochs=2, callbacks=[watch, *others], verbose=0
    ).history
    options = {"tolerance": 1e-2, **QUIET}
    expected = top_eigenvalues(model, x[:32], y[:32], **options)[0]
    assert history["top_eigenvalue"][-1] == pytest.approx(expected, rel=0.03)
    assert np.all(np.isfinite(history["hessian_trace"]))
    with open(log) as file:
        rows = list(csv.DictReader(file))
    assert float(rows[1]["top_eigenvalue"]) == history["top_eigenvalue"][1]
    events = b"".join(
        p.read_bytes() for p in (tmp_path / "board").rglob("*tfevents*")
    )
    assert b"epoch_top_eigenvalue" in events
    assert b"epoch_hessian_trace" in events


def test_callback_measures_every_so_many_epochs_and_the_last():
    x, y = classification_data()
    net = dense_net()
    net.compile("sgd", crossentropy())
    watch = Curvature(x[:16], y[:16], every=2, trace_samples=0)
    history = net.fit(x, y, epochs=5, callbacks=[watch], verbose=0).history
    measured = np.isfinite(history["top_eigenvalue"])
    assert measured.tolist() == [False, True, False, True, True]
    assert "hessian_trace" not in history


def test_callback_changes_nothing_in_training():
    x, y = classification_data(shape=(8, 8, 1))
    weights = []
    for watch in ([], [Curvature(x[:16], y[:16])]):
        net = noisy_net()
        net.compile("sgd", crossentropy())
        keras.utils.set_random_seed(1)
        net.fit(x, y, epochs=2, verbose=0, callbacks=watch)
        weights.append(net.get_weights())
    for a, b in zip(*weights):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "argument",
    [{"every": 0}, {"tolerance": 0}, {"trace_samples": 1}, {"batch_size": 0}],
    ids=str,
)
def test_callback_bad_arguments(argument):
    [name] = argument
    with pytest.raises(ValueError, match=f"`{name}`.*Received"):
        Curvature(np.ones((2, 3)), np.ones(2), **argument)
