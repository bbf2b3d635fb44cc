"""Hessians that are zero, of low rank, tiny, or not finite."""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from keras_lesam import _lanczos
from keras_lesam import curvature
from keras_lesam.callbacks import Curvature
from tests.helpers import assert_same_weights
from tests.helpers import classification_data
from tests.helpers import constant_lesam
from tests.helpers import crossentropy
from tests.helpers import dense_net
from tests.test_curvature import Matrix
from tests.test_curvature import rng
from tests.test_curvature import with_spectrum

QUIET = {"verbose": 0}


# Matrices.

SPECTRA = {
    "zero": np.zeros(60),
    "of rank 1": np.r_[3.0, np.zeros(59)],
    "of rank 2, negative": np.r_[-3.0, -1.0, np.zeros(58)],
    "a multiple of the identity": np.full(60, 0.02),
    "a projection": np.r_[np.ones(20), np.zeros(40)],
    "tiny": np.linspace(-1, 1, 60) * 1e-25,
    "at the least number of float32": np.linspace(0, 1, 60) * 1e-44,
    "at its largest": np.linspace(-1, 1, 60) * 1e38,
}


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("size", [7, 60])
@pytest.mark.parametrize("name", SPECTRA)
def test_eigenvalues_of_degenerate_matrices(name, size, k):
    """Small ones densely, others by ARPACK; vectors are orthonormal."""
    spectrum = np.sort(SPECTRA[name][:: 60 // size])[::-1]
    operator = with_spectrum(spectrum)
    values, vectors = _lanczos.largest(operator, k, 1e-6, 1000, rng())
    scale = np.abs(spectrum).max()
    np.testing.assert_allclose(values, spectrum[:k], atol=1e-5 * scale)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(k), atol=1e-9)
    residual = operator.matrix @ vectors - vectors * values
    assert np.abs(residual).max() <= 1e-2 * scale


@pytest.mark.parametrize("name", SPECTRA)
def test_trace_and_density_of_degenerate_matrices(name):
    spectrum = SPECTRA[name]
    operator = with_spectrum(spectrum)
    scale = np.abs(spectrum).max()
    value, error, _ = _lanczos.trace(operator, 1e-9, 400, rng())
    assert abs(value - spectrum.sum()) <= 4 * error + 1e-12 * scale
    nodes, weights = _lanczos.density(operator, 30, 60, rng())
    assert weights.sum() == pytest.approx(1)
    found = nodes @ weights - spectrum.mean()
    assert abs(found) <= 0.1 * scale


@pytest.mark.parametrize("size", [5, 60])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_finite_is_one_sentence(bad, size):
    matrix = np.eye(size)
    matrix[2, 2] = bad
    operator = Matrix(matrix)
    for compute in (
        lambda: _lanczos.largest(operator, 1, 1e-6, 1000, rng()),
        lambda: _lanczos.trace(operator, 0.1, 100, rng()),
        lambda: _lanczos.density(operator, 2, 5, rng()),
    ):
        operator.products = 0
        with (
            np.errstate(invalid="ignore"),
            pytest.raises(RuntimeError, match="Hessian is not finite") as info,
        ):
            compute()
        assert "ARPACK" not in str(info.value)
        assert operator.products <= 3


def test_nan_in_the_midst_of_the_iteration():
    operator = with_spectrum(np.linspace(0, 1, 80))
    multiply = operator.matrix.__matmul__

    def product(vector):
        operator.products += 1
        return multiply(vector) * (np.nan if operator.products > 9 else 1)

    operator.matrix = type("M", (), {"__matmul__": lambda _, v: product(v)})()
    with pytest.raises(RuntimeError, match="Hessian is not finite"):
        _lanczos.largest(operator, 1, 0.0, 1000, rng())


# Models.


def net_of(*layers_, inputs=30):
    keras.utils.set_random_seed(0)
    return keras.Sequential([keras.Input((inputs,)), *layers_])


ZERO = {
    "dead units": (
        lambda: net_of(
            layers.Dense(
                8,
                "relu",
                bias_initializer=keras.initializers.Constant(-1e3),
            ),
            layers.Dense(1, use_bias=False),
        ),
        "mse",
    ),
    "a linear net and loss": (
        lambda: net_of(layers.Dense(1)),
        lambda y, p: keras.ops.mean(p - y),
    ),
    "a loss of no weight": (
        lambda: net_of(layers.Dense(3), layers.Activation(keras.ops.sign)),
        "mse",
    ),
    "a small net": (
        lambda: net_of(layers.Dense(1), inputs=4),
        lambda y, p: keras.ops.mean(p - y),
    ),
}


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("name", ZERO)
def test_a_model_without_curvature(name, wrapped):
    build, loss = ZERO[name]
    net = build()
    model = constant_lesam(net) if wrapped else net
    model.compile("sgd", loss)
    r = np.random.default_rng(0)
    x, y = r.normal(size=(16, *net.input_shape[1:])), r.normal(size=(16, 1))
    values, vectors = curvature.top_eigenvalues(
        model, x, y, k=3, return_vectors=True, **QUIET
    )
    np.testing.assert_array_equal(values, np.zeros(3))
    flat = [np.concatenate([np.ravel(a) for a in v]) for v in vectors]
    np.testing.assert_allclose(np.inner(flat, flat), np.eye(3), atol=1e-12)
    assert curvature.trace(model, x, y, **QUIET)[:2] == (0, 0)
    spectrum = curvature.spectral_density(model, x, y, **QUIET)
    np.testing.assert_array_equal(spectrum.eigenvalues, 0)
    assert spectrum.weights.sum() == pytest.approx(1)
    history = model.fit(
        x, y, epochs=2, verbose=0, callbacks=[Curvature(x, y)]
    ).history
    assert history["top_eigenvalue"] == [0, 0]
    assert history["hessian_trace"] == [0, 0]


def nan_weights(net):
    net.layers[0].kernel.assign(np.full(net.layers[0].kernel.shape, np.nan))


def test_a_model_that_is_not_finite():
    x, y = classification_data(rows=16)
    bad_row = x.copy()
    bad_row[3] = np.inf
    broken = dense_net()
    nan_weights(broken)
    for net, data in ((dense_net(), (bad_row, y)), (broken, (x, y))):
        net.compile("sgd", crossentropy())
        for tool in ("top_eigenvalues", "trace", "spectral_density"):
            with pytest.raises(RuntimeError, match=r"not finite.*Look for"):
                getattr(curvature, tool)(net, *data, **QUIET)


def test_a_loss_without_second_derivative():
    """A norm at 0: the loss is finite, its Hessian is not."""
    net = net_of(layers.Dense(1, use_bias=False, kernel_initializer="zeros"))
    net.compile("sgd", lambda y, p: keras.ops.sqrt(keras.ops.sum(p * p)))
    x = np.ones((4, 30))
    with pytest.raises(RuntimeError, match="no second"):
        curvature.top_eigenvalues(net, x, x[:, :1], **QUIET)


# The callback.


class Explode(keras.callbacks.Callback):
    """Makes the weights nan after an epoch."""

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 1:
            nan_weights(self.model)


class NoSecondDerivative(layers.Layer):
    """Raises when it is differentiated twice."""

    def call(self, x):
        @tf.custom_gradient
        def f(x):
            @tf.custom_gradient
            def g(upstream):
                def raises(_):
                    raise LookupError("no rule for this")

                return upstream * 1.0, raises

            return x * 1.0, g

        return f(x)


TROUBLE = {
    "a sample of another shape": (
        lambda x, y: Curvature(x[:, :3], y),
        dense_net,
        "shape",
    ),
    "no targets": (lambda x, y: Curvature(x), dense_net, "`y` is missing"),
    "targets of another shape": (
        lambda x, y: Curvature(x, np.zeros((len(x), 2, 2))),
        dense_net,
        "",
    ),
    "labels out of range": (
        lambda x, y: Curvature(x, y + 1000),
        dense_net,
        "",
    ),
    "no rule": (
        Curvature,
        lambda: keras.Sequential(
            [keras.Input((6,)), layers.Dense(4), NoSecondDerivative()]
        ),
        "no rule for this",
    ),
    "no convergence": (
        lambda x, y: Curvature(x, y, tolerance=1e-300),
        dense_net,
        None,
    ),
}


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("built", [False, True])
@pytest.mark.parametrize("name", TROUBLE)
def test_the_callback_never_ends_a_training(name, built, wrapped):
    """Nor changes it: the weights are those of a training without it."""
    make, build, message = TROUBLE[name]
    x, y = classification_data(rows=32)
    models = []
    for callbacks in ([], [make(x, y)]):
        net = build()
        if not built:
            net = keras.Sequential(net.layers)
        model = constant_lesam(net) if wrapped else net
        model.compile("sgd", crossentropy())
        keras.utils.set_random_seed(0)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            history = model.fit(
                x, y, epochs=3, verbose=0, callbacks=callbacks
            ).history
        models.append(model)
    assert_same_weights(*models)
    assert len(history["top_eigenvalue"]) == 3
    if message is None:
        return
    assert np.isnan(history["top_eigenvalue"]).all()
    assert np.isnan(history["hessian_trace"]).all()
    told = [w for w in caught if "callbacks.Curvature" in str(w.message)]
    assert len(told) == 1
    assert "training goes on" in str(told[0].message)
    assert message in str(told[0].message)


def test_the_callback_measures_until_the_weights_are_nan():
    x, y = classification_data(rows=32)
    net = dense_net()
    net.compile("sgd", crossentropy())
    watch = Curvature(x, y)
    for _ in range(2):
        with pytest.warns(UserWarning, match="Hessian is not finite") as told:
            history = net.fit(
                x, y, epochs=3, verbose=0, callbacks=[watch, Explode()]
            ).history
        assert sum("Curvature" in str(w.message) for w in told) == 1
        assert np.isfinite(history["top_eigenvalue"]).tolist() == [True] + 2 * [
            False
        ]
        assert np.isfinite(history["hessian_trace"]).sum() == 1
        net.set_weights([np.ones(w.shape) for w in net.get_weights()])


def test_the_callback_lets_the_user_stop():
    class Stop(Curvature):
        def _rng(self):
            raise KeyboardInterrupt

    x, y = classification_data(rows=32)
    net = dense_net()
    net.compile("sgd", crossentropy())
    with pytest.raises(KeyboardInterrupt):
        net.fit(x, y, verbose=0, callbacks=[Stop(x, y)])


class Freeze(keras.callbacks.Callback):
    """Leaves fewer variables to train."""

    def __init__(self, when):
        super().__init__()
        self.when = when

    def on_train_begin(self, logs=None):
        if self.when == "begin":
            self.model.layers[0].trainable = False

    def on_epoch_begin(self, epoch, logs=None):
        if self.when == epoch:
            self.model.layers[0].trainable = False


@pytest.mark.parametrize("when", ["begin", 1])
def test_the_callback_follows_what_is_trainable(when):
    x, y = classification_data(rows=32)
    net = dense_net()
    net.compile("sgd", crossentropy())
    history = net.fit(
        *(x, y),
        epochs=2,
        verbose=0,
        callbacks=[Curvature(x, y, tolerance=1e-6), Freeze(when)],
    ).history
    expected = curvature.top_eigenvalues(net, x, y, tolerance=1e-6, **QUIET)
    assert history["top_eigenvalue"][-1] == pytest.approx(expected[0], 1e-3)


def test_the_operator_tells_that_it_is_of_other_variables():
    x, y = classification_data(rows=32)
    net = dense_net()
    net.compile("sgd", crossentropy())
    operator = curvature.HessianOperator(net, x, y)
    net.layers[0].trainable = False
    with pytest.raises(RuntimeError, match="make a new one"):
        operator(np.ones(operator.size))
