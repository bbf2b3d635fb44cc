"""The loss around a minimum, on closed forms, and pictures of it."""

import keras
import matplotlib as mpl
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from keras_lesam import landscape
from keras_lesam.curvature import SpectralDensity
from keras_lesam.curvature import spectral_density
from keras_lesam.curvature import top_eigenvalues
from tests.helpers import classification_data
from tests.helpers import constant_lesam
from tests.helpers import crossentropy
from tests.helpers import dense_net
from tests.helpers import noisy_net
from tests.helpers import train

mpl.use("Agg")
QUIET = {"verbose": 0}
WRONG = (TypeError, ValueError)


def line():
    """A net `y = w x` with `w = 1`, and data that wants `w = 3`."""
    net = keras.Sequential(
        [
            keras.Input((1,)),
            layers.Dense(
                1,
                use_bias=False,
                kernel_initializer="ones",
                kernel_regularizer=keras.regularizers.L2(0.5),
            ),
        ]
    )
    net.compile("sgd", "mse")
    x = np.arange(1.0, 6.0)[:, None]
    return net, x, 3 * x


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("batch_size", [1, 2, 5, 9])
def test_a_quadratic_is_a_parabola(batch_size):
    """Regularizer included; uneven batches weighed by their rows."""
    net, x, y = line()
    distances = np.linspace(-2, 5, 8)
    found = landscape.loss_along(
        *(net, x, y),
        **{"direction": [[[2.0]]], "distances": distances, **QUIET},
        batch_size=batch_size,
    )
    w = 1 + 2 * distances
    expected = np.mean(x**2) * (w - 3) ** 2 + 0.5 * w**2
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("takes_training", [True, False])
def test_a_loss_of_its_own_whether_or_not_it_takes_training(takes_training):
    """And in inference mode, which the loss is told if it asks."""
    told = []

    class New(keras.Sequential):
        def compute_loss(self, x, y, y_pred, sample_weight=None, training=True):
            told.append(training)
            return keras.ops.mean(keras.ops.square(y - y_pred))

    class Old(keras.Sequential):
        def compute_loss(self, x, y, y_pred, sample_weight=None):
            return keras.ops.mean(keras.ops.square(y - y_pred))

    net = (New if takes_training else Old)(
        [
            keras.Input((1,)),
            layers.Dense(1, use_bias=False, kernel_initializer="ones"),
        ]
    )
    net.compile("sgd")
    x = np.arange(1.0, 6.0, dtype="float32")[:, None]
    told.clear()
    losses = landscape.loss_along(
        *(net, x, 3 * x),
        **{"direction": [[[1.0]]], "distances": [0, 2], **QUIET},
    )
    np.testing.assert_allclose(losses, [4 * np.mean(x**2), 0.0], atol=1e-9)
    assert told[-1:] == ([False] if takes_training else [])


@pytest.mark.usefixtures("float64")
def test_a_plane_is_two_lines():
    net = keras.Sequential([keras.Input((2,)), layers.Dense(1)])
    net.compile("sgd", "mse")
    x, y = np.random.rand(9, 2), np.random.rand(9, 1)
    a, b = [[[1.0], [0.0]], [0.0]], [[[0.0], [1.0]], [2.0]]
    rows, columns = [-1.0, 0.0, 2.0], [0.0, 1.0]
    found = landscape.loss_on_plane(
        *(net, x, y),
        **{"directions": (a, b), "distances": (rows, columns), **QUIET},
    )
    kernel, bias = net.get_weights()
    for i, s in enumerate(rows):
        for j, t in enumerate(columns):
            outputs = x @ (kernel + np.array([[s], [t]])) + bias + 2 * t
            np.testing.assert_allclose(found[i, j], np.mean((outputs - y) ** 2))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("wrapped", [False, True])
def test_here_it_is_the_loss_of_evaluate(wrapped):
    """In inference mode; and nothing is written."""
    x, y = classification_data(rows=40, shape=(8, 8, 1))
    net = noisy_net()
    model = constant_lesam(net) if wrapped else net
    train(model, x, y)
    direction = landscape.filter_normalized_direction(model)
    before = [v.numpy() for v in model.variables]
    found = landscape.loss_along(
        *(model, x, y),
        **{"direction": direction, "distances": [0.0, 0.5], **QUIET},
        batch_size=16,
    )
    for variable, value in zip(model.variables, before):
        np.testing.assert_array_equal(variable, value)
    expected = model.evaluate(x, y, batch_size=16, **QUIET)
    assert found[0] == pytest.approx(expected, rel=1e-12)
    assert found[1] != found[0]


@pytest.mark.usefixtures("float64")
def test_sample_weights_and_datasets():
    net, x, y = line()
    w = np.array([1.0, 0.0, 2.0, 0.0, 1.0])
    options = {"direction": [[[1.0]]], "distances": [0, 1], **QUIET}
    found = landscape.loss_along(net, x, y, sample_weight=w, **options)
    expected = np.mean(w * x[:, 0] ** 2) * np.array([4, 1])
    np.testing.assert_allclose(found, expected + np.array([0.5, 2]))
    data = tf.data.Dataset.from_tensor_slices((x, y, w)).batch(2)
    np.testing.assert_allclose(
        landscape.loss_along(net, data, **options), found
    )


def test_filters_have_the_norms_of_the_model():
    net = noisy_net()
    direction = landscape.filter_normalized_direction(net, seed=3)
    for d, variable in zip(direction, net.trainable_variables):
        assert d.shape == variable.shape
        if d.ndim < 2:
            assert not d.any()
            continue
        axes = tuple(range(d.ndim - 1))
        np.testing.assert_allclose(
            np.sqrt(np.sum(d**2, axes)),
            np.sqrt(np.sum(variable.numpy() ** 2, axes)),
            rtol=1e-5,
        )
    again = landscape.filter_normalized_direction(net, seed=3)
    np.testing.assert_array_equal(direction[0], again[0])
    other = landscape.filter_normalized_direction(net, seed=4)
    assert np.any(direction[0] != other[0])


def test_all_points_are_one_trace():
    calls = []

    class Counter(layers.Layer):
        def call(self, x):
            calls.append(x)
            return x

    net = keras.Sequential([keras.Input((6,)), Counter(), layers.Dense(4)])
    net.compile("sgd", crossentropy())
    data = classification_data(rows=32)
    direction = landscape.filter_normalized_direction(net)
    options = {"direction": direction, "batch_size": 16, **QUIET}
    counts = []
    for distances in ([0.0], np.linspace(0, 1, 20)):
        del calls[:]
        landscape.loss_along(net, *data, distances=distances, **options)
        counts.append(len(calls))
    assert counts[0] == counts[1]


def test_an_eigenvector_is_a_direction():
    """Along it the loss has the eigenvalue for its second difference."""
    x, y = classification_data(rows=40)
    net = dense_net()
    train(net, x, y)
    [value], [direction] = top_eigenvalues(
        net, x, y, return_vectors=True, tolerance=0, **QUIET
    )
    step = 0.05
    below, here, above = landscape.loss_along(
        *(net, x, y),
        **{"direction": direction, "distances": [-step, 0, step], **QUIET},
    )
    second = (below - 2 * here + above) / step**2
    assert second == pytest.approx(value, rel=0.02)


def test_progress_is_shown(capsys):
    net, x, y = line()
    options = {"direction": [[[1.0]]], "distances": [0, 1, 2]}
    landscape.loss_along(net, x, y, **options)
    assert "3/3" in capsys.readouterr().out


def test_bad_arguments():
    net, x, y = line()
    here = {"distances": [0.0], **QUIET}
    for direction in ([], [[1.0]], [[[1.0]], [0.0]]):
        with pytest.raises(ValueError, match=r"Received: shapes \["):
            landscape.loss_along(net, x, y, direction=direction, **here)
    for name in ("directions", "distances"):
        pair = {"directions": ([[[1.0]]],) * 2, "distances": ([0], [0])}
        pair[name] = pair[name][:1]
        with pytest.raises(ValueError, match=f"`{name}` must be two"):
            landscape.loss_on_plane(net, x, y, **pair)
    with pytest.raises(ValueError, match="must be compiled"):
        landscape.loss_along(
            dense_net(), x, y, direction=[np.ones((1, 1))], **here
        )
    with pytest.raises(ValueError, match="`batch_size`"):
        landscape.loss_along(
            net, x, y, direction=[[[1.0]]], batch_size=0, **here
        )


NOT_DISTANCES = {
    "nothing": None,
    "a number": 1.0,
    "a word": "0, 1",
    "words": ["0", "1"],
    "rows": [[0.0, 1.0]],
    "uneven rows": [[0.0], [1.0, 2.0]],
    "none of them": [],
    "nan": [0.0, np.nan],
    "infinity": np.array([0.0, np.inf]),
    "complex": [1j],
    "a dict": {0.0: 1.0},
}


@pytest.mark.parametrize("name", NOT_DISTANCES)
def test_distances(name):
    net, x, y = line()
    here = {"distances": NOT_DISTANCES[name], **QUIET}
    with pytest.raises(WRONG, match=r"`distances` must.*Received"):
        landscape.loss_along(net, x, y, direction=[[[1.0]]], **here)
    plane = {"directions": ([[[1.0]]],) * 2, **QUIET}
    for i in range(2):
        pair = [[0.0], [0.0]]
        pair[i] = here["distances"]
        with pytest.raises(WRONG, match=r"`distances` must.*Received"):
            landscape.loss_on_plane(net, x, y, distances=pair, **plane)


NOT_DIRECTIONS = {
    "nothing": None,
    "a number": 1.0,
    "a word": "kernel",
    "none of them": [],
    "a list of nothing": [None],
    "a list of words": ["kernel"],
    "an array of another shape": [[1.0, 2.0]],
    "one for each weight": [[[1.0]], [1.0]],
    "uneven": [[[1.0], [1.0, 2.0]]],
    "nan": [[[np.nan]]],
    "complex": [[[1j]]],
    "a generator": (d for d in [[[1.0]]]),
    "a dict": {"kernel": [[1.0]]},
}


@pytest.mark.parametrize("name", NOT_DIRECTIONS)
def test_directions(name):
    net, x, y = line()
    direction = NOT_DIRECTIONS[name]
    with pytest.raises(WRONG, match=r"`direction` must.*Received"):
        landscape.loss_along(
            *(net, x, y), direction=direction, distances=[0.0], **QUIET
        )
    with pytest.raises(WRONG, match=r"`directions` must.*Received"):
        landscape.loss_on_plane(
            *(net, x, y),
            directions=([[[1.0]]], direction),
            distances=([0.0], [0.0]),
            **QUIET,
        )


def test_numbers_of_all_kinds_are_distances_and_directions():
    net, x, y = line()
    expected = landscape.loss_along(
        net, x, y, direction=[[[1.0]]], distances=[0.0, 1.0], **QUIET
    )
    for direction, distances in (
        (np.ones((1, 1, 1)), np.arange(2)),
        ((tf.ones((1, 1)),), range(2)),
        ([net.layers[0].kernel], tf.range(2)),
        ([np.ones((1, 1), int)], (t for t in (0, 1))),
    ):
        found = landscape.loss_along(
            *(net, x, y), direction=direction, distances=distances, **QUIET
        )
        np.testing.assert_array_equal(found, expected)


def test_filters_are_of_a_built_model():
    with pytest.raises(TypeError, match=r"`model`.*list"):
        landscape.filter_normalized_direction([])
    with pytest.raises(ValueError, match=r"`model`.*not built"):
        landscape.filter_normalized_direction(
            keras.Sequential([layers.Dense(1)])
        )


# Pictures.


def test_lines_share_axes():
    ax = landscape.plot_line([0, 1], [2.0, 3.0], label="one", color="#0072B2")
    again = landscape.plot_line([0, 1], [1.0, 0.0], ax=ax, label="two")
    assert again is ax
    assert [line.get_label() for line in ax.lines] == ["one", "two"]
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), [2, 3])


def test_plane():
    losses = np.add.outer(np.arange(5.0) ** 2, np.arange(4.0))
    distances = (np.linspace(-2, 2, 5), np.linspace(-1, 2, 4))
    ax = landscape.plot_plane(distances, losses)
    # The first direction is drawn to the right.
    assert ax.get_xlim() == (-2, 2)
    assert ax.get_ylim() == (-1, 2)
    assert [a.get_ylabel() for a in ax.figure.axes] == [
        "distance along the second",
        "loss",
    ]


def test_spectrum():
    net = dense_net()
    net.compile("sgd", crossentropy())
    spectrum = spectral_density(
        net, *classification_data(rows=16), probes=2, steps=5, **QUIET
    )
    ax = landscape.plot_spectrum(spectrum, label="net")
    assert ax.get_yscale() == "log"
    [line] = ax.lines
    grid, density = line.get_xdata(), line.get_ydata()
    mass = np.sum(density) * (grid[1] - grid[0])
    assert mass == pytest.approx(1, abs=0.02)


def drawn(ax):
    """What of the lines is within the limits, and these."""
    low, high = ax.get_ylim()
    densities = [np.array(line.get_ydata()) for line in ax.lines]
    return low, high, densities


def spectrum_of(weights, outliers=(12.0, 28.0), bulk=(-0.1, 0.0, 0.1)):
    """Of a net of so many weights: each outlier is one of its eigenvalues."""
    masses = np.r_[
        np.full(len(bulk), (1 - len(outliers) / weights) / len(bulk)),
        np.full(len(outliers), 1 / weights),
    ]
    return SpectralDensity(np.r_[bulk, outliers], masses)


@pytest.mark.parametrize("width", [None, 1e-3, 0.5])
@pytest.mark.parametrize("weights", [1e2, 1e4, 2e6, 2.5e7, 1e9])
def test_limits_show_every_eigenvalue_and_nothing_else(weights, width):
    ax = landscape.plot_spectrum(spectrum_of(weights), width=width)
    low, high, [density] = drawn(ax)
    grid = ax.lines[0].get_xdata()
    for outlier in (12.0, 28.0):
        peak = density[np.abs(grid - outlier) < 1].max()
        assert low < peak / 3
        assert low > peak / 1e3
    assert density.max() < high < 10 * density.max()


def test_limits_are_of_all_spectra():
    ax = landscape.plot_spectrum(spectrum_of(1e8), label="large")
    ax.axvline(3.0)
    landscape.plot_spectrum(spectrum_of(1e3, bulk=(0.0,)), ax=ax, label="small")
    low, high, densities = drawn(ax)
    densities = [d for d in densities if len(d) > 2]
    assert low < 1e-8
    assert high > max(d.max() for d in densities)
    # And in the other order.
    again = landscape.plot_spectrum(spectrum_of(1e3, bulk=(0.0,)))
    landscape.plot_spectrum(spectrum_of(1e8), ax=again)
    np.testing.assert_allclose(again.get_ylim(), (low, high))


@pytest.mark.parametrize(
    "eigenvalues",
    [[0.0], [0.0, 0.0], [5.0], [5.0, 5.0 + 1e-15], [-2e-9, 1e-9], [-3.0]],
    ids=str,
)
def test_limits_of_narrow_spectra(eigenvalues):
    masses = np.full(len(eigenvalues), 1 / len(eigenvalues))
    ax = landscape.plot_spectrum(SpectralDensity(np.array(eigenvalues), masses))
    low, high, [density] = drawn(ax)
    assert 0 < low < density.max() < high < np.inf
    left, right = ax.get_xlim()
    assert left < eigenvalues[0] <= eigenvalues[-1] < right
    assert np.all(np.diff(ax.lines[0].get_xdata()) > 0)


@pytest.mark.parametrize("width", [0, -1.0, np.nan, "wide"])
def test_widths(width):
    with pytest.raises(WRONG, match=r"`width`.*Received"):
        landscape.plot_spectrum(spectrum_of(10), width=width)


def test_budget():
    x, y = classification_data()
    model = constant_lesam(dense_net())
    model.compile("sgd", crossentropy())
    history = model.fit(x, y, epochs=3, validation_data=(x, y), verbose=0)
    for given in (history, history.history):
        above, below = landscape.plot_budget(given)
        assert len(above.lines) == 2
        np.testing.assert_array_equal(
            below.lines[0].get_ydata(), history.history["rho"]
        )
    with pytest.raises(ValueError, match="Received: one without rho, sigma"):
        landscape.plot_budget({"loss": [1.0]})


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"keras_lesam\[landscape\]"):
        landscape.plot_line([0], [0])
