"""Second derivatives that TensorFlow lacks, for the passes that need them.

Within `twice_differentiable`, and for the thread that opened it alone, some
functions of TensorFlow are replaced by ones with the same values and the same
gradients, to the last bit, whose gradients can be differentiated. Outside of
it, and for all other threads, they are TensorFlow's own.

What has no replacement is in `UNSUPPORTED`; a test compares that list with
what TensorFlow registers.
"""

import collections
import contextlib
import functools
import re
import threading
import weakref
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

from keras_lesam import _ctc
from keras_lesam._reach import Operation

# In the names of the operations whose gradients can be differentiated.
MARK = "twice_differentiable"
# The name of the operation by which `tf.nn.moments` makes a constant.
_MOMENTS = re.compile(r"moments(_\d+)?/StopGradient$")

# Operations of gradients whose own gradient TensorFlow lacks, or takes for
# zero where it is not.
UNSUPPORTED = frozenset(
    {
        "BatchCholeskyGrad",
        "BatchNormWithGlobalNormalizationGrad",
        "BlockLSTMGrad",
        "BlockLSTMGradV2",
        "CholeskyGrad",
        "Conv2DBackpropFilterV2",
        "Conv2DBackpropInputV2",
        "Conv3DBackpropFilter",
        "Conv3DBackpropInput",
        "CropAndResizeGradBoxes",
        "CropAndResizeGradImage",
        "CudnnRNNBackprop",
        "CudnnRNNBackpropV2",
        "CudnnRNNBackpropV3",
        "Dilation2DBackpropFilter",
        "Dilation2DBackpropInput",
        "FakeQuantWithMinMaxArgsGradient",
        "FakeQuantWithMinMaxVarsGradient",
        "FakeQuantWithMinMaxVarsPerChannelGradient",
        "FractionalAvgPoolGrad",
        "FractionalMaxPoolGrad",
        "GRUBlockCellGrad",
        "IgammaGradA",
        "LRNGrad",
        "LSTMBlockCellGrad",
        "MaxPoolGradGradV2",
        "MaxPoolGradGradWithArgmax",
        "MaxPoolGradWithArgmax",
        "RaggedFillEmptyRowsGrad",
        "RaggedTensorToVariantGradient",
        "RandomGammaGrad",
        "ResizeBicubicGrad",
        "ResizeBilinearGrad",
        "ResizeNearestNeighborGrad",
        "ScaleAndTranslateGrad",
        "SoftsignGrad",
        "SparseAddGrad",
        "SparseFillEmptyRowsGrad",
        "SparseMatrixSoftmaxGrad",
        "SparseSegmentMeanGrad",
        "SparseSegmentMeanGradV2",
        "SparseSegmentSqrtNGrad",
        "SparseSegmentSqrtNGradV2",
        "SparseSegmentSumGrad",
        "SparseSegmentSumGradV2",
        "SparseSliceGrad",
        "SymbolicGradient",
        "TileGrad",
        "UnbatchGrad",
    }
)


# What else stands in the way of a second derivative, and why.
_ELSEWHERE = {
    "EagerPyFunc": "`tf.py_function`",
    "PreventGradient": "a gradient that must not be differentiated",
}
_REMEDY = (
    "Use curvature='secant' or 'none' for training, and other layers or "
    "losses where the curvature is to be measured. Received: "
)


def refuse_unsupported(operations: Iterable[Operation]) -> None:
    """Raise `ValueError` for what TensorFlow cannot differentiate twice.

    `operations` are those of the loss and of its gradient that depend on the
    weights.
    """
    wrong = [
        f"{o.type} ({o.name!r})"
        for o in operations
        if (o.type in UNSUPPORTED or o.type in _ELSEWHERE)
        and MARK not in o.name
    ]
    if wrong:
        raise ValueError(
            "TensorFlow has no second derivative, or a wrong one, of these "
            f"operations. {_REMEDY}{', '.join(sorted({*wrong}))}"
        )
    _refuse_old_moments(operations)


def _refuse_old_moments(operations: Iterable[Operation]) -> None:
    """Raise `ValueError` for moments that were traced before; see `_moments`.

    A `tf.function` that a model calls is not traced again for its gradient to
    be differentiated.
    """
    counts: dict[str, int] = collections.defaultdict(int)
    names: dict[str, str] = {}
    for o in operations:
        if o.type == "StopGradient" and MARK in o.name:
            counts[o.function] -= 1
        elif o.type == "StopGradient" and _MOMENTS.search(o.name):
            counts[o.function] += 1
            names[o.function] = o.name
    old = [names[function] for function, count in counts.items() if count > 0]
    if old:
        raise ValueError(
            "The second derivative of a variance would be wrong: it is in a "
            "`tf.function` that was traced before, or that does not call "
            "`tf.nn.moments` by that name. Use the model without that "
            f"`tf.function`. Received: {', '.join(sorted(old))}"
        )


@contextlib.contextmanager
def named_errors() -> Iterator[None]:
    """Raise `ValueError` for a gradient that turns out to have none."""
    try:
        yield
    except (LookupError, NotImplementedError) as error:
        raise ValueError(
            "TensorFlow has no second derivative of this model. "
            f"{_REMEDY}{error}"
        ) from error


class twice_differentiable:  # noqa: N801
    """Let gradients be differentiated within the context, in this thread.

    May be nested. It ends with the `with` statement in any way: what is
    replaced is put back when the context is dropped, even if an exception
    came between two instructions and `__exit__` was never called.
    """

    def __enter__(self) -> "twice_differentiable":
        self._close = weakref.finalize(self, _uninstall_if_unused)
        self._close.atexit = False
        _threads.open.append(weakref.ref(self))
        with _lock:
            _open.add(self)
            _install()
        return self

    def __exit__(self, *exception: Any) -> None:
        _threads.open = [
            scope for scope in _threads.open if scope() not in (None, self)
        ]
        _open.discard(self)
        self._close()


class _Threads(threading.local):
    """What differs between threads.

    Attributes:
        open: Weak references to the contexts that this thread has opened.
        replacing: Whether it is in a replacement, which calls the original.
    """

    def __init__(self) -> None:
        self.open: list[Any] = []
        self.replacing = False

    @property
    def active(self) -> bool:
        """Whether replacements are to be used now."""
        return not self.replacing and any(
            scope() is not None for scope in self.open
        )


_threads = _Threads()
_open: "weakref.WeakSet[twice_differentiable]" = weakref.WeakSet()
# Taken again by the same thread, if a context is dropped while it is held.
_lock = threading.RLock()


class _Switch:
    """Stands where a function of TensorFlow was, and calls one of two.

    Attributes:
        original: What was there: TensorFlow's function, or somebody's patch.
    """

    def __init__(self, original: Any, replacement: Any) -> None:
        self.original = original
        self._replacement = replacement
        functools.update_wrapper(self, original)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the replacement where this thread wants it."""
        if not _threads.active:
            return self.original(*args, **kwargs)
        # A patch on top of another switch must not lead to two replacements.
        _threads.replacing = True
        try:
            return self._replacement(self.original, *args, **kwargs)
        finally:
            _threads.replacing = False


def _install() -> None:
    """Put switches where there are none, over whatever is there."""
    for module, name, replacement in _REPLACEMENTS:
        current = getattr(module, name)
        if not isinstance(current, _Switch):
            setattr(module, name, _Switch(current, replacement))


def _uninstall_if_unused() -> None:
    """Put back what was there, but for what others have patched since."""
    with _lock:
        if len(_open):
            return
        for module, name, _ in _REPLACEMENTS:
            current = getattr(module, name)
            if isinstance(current, _Switch):
                setattr(module, name, current.original)


def _moments(original: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """Compute mean and variance.

    `tf.nn.moments`, which Keras's normalization layers call, computes the
    variance about a mean that it takes for a constant. That is right for the
    gradient and silently wrong for every derivative of the gradient:
    https://github.com/tensorflow/tensorflow/pull/19609
    """
    mean, variance = original(*args, **kwargs)
    # Var x = E (x - c)^2 - (E x - c)^2 for any constant c. TensorFlow
    # omits the last term: with the mean for c, it is 0, and so is its
    # gradient, but not its second derivative.
    with tf.name_scope(MARK):
        return mean, variance - tf.square(mean - tf.stop_gradient(mean))


def _resize(original: Any, images: Any, *args: Any, **kwargs: Any) -> Any:
    """Resize images, by any method: all are linear.

    TensorFlow takes the gradient of bilinear resizing for a constant and has
    none for the gradients of the others.
    """
    images = tf.convert_to_tensor(images)
    if not images.dtype.is_floating:
        return original(images, *args, **kwargs)
    return _linear(lambda x: original(x, *args, **kwargs), images)


def _softsign(original: Any, features: Any, name: str | None = None) -> Any:
    """Compute `x / (1 + |x|)`, of which TensorFlow has one derivative only."""

    def second(x: tf.Tensor, dy: tf.Tensor, d2: tf.Tensor) -> list[tf.Tensor]:
        # Of dy / (1 + |x|)^2.
        root = 1 / (1 + tf.abs(x))
        slope = -2 * tf.sign(x) * root**3
        return [d2 * dy * slope, d2 * root**2]

    return _twice(
        lambda x: original(x, name=name),
        second,
        tf.convert_to_tensor(features),
    )


def _ctc_loss(
    original: Any,
    labels: Any,
    logits: Any,
    label_length: Any,
    logit_length: Any,
    logits_time_major: bool = True,
    unique: Any = None,
    blank_index: int | None = None,
    name: str | None = None,
) -> Any:
    """Compute CTC, whose gradient TensorFlow differentiates to nan.

    For sparse labels it does not differentiate it at all.
    """

    def function(logits: tf.Tensor) -> tf.Tensor:
        return original(
            labels,
            logits,
            label_length,
            logit_length,
            logits_time_major,
            unique,
            blank_index,
            name,
        )

    def gradient(logits: tf.Tensor, dy: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            tape.watch(logits)
            frames = tf.cast(logits, tf.float32)
            if not logits_time_major:
                frames = tf.transpose(frames, [1, 0, 2])
            loss = _ctc.ctc_loss(
                tf.convert_to_tensor(labels),
                frames,
                tf.convert_to_tensor(label_length),
                tf.convert_to_tensor(logit_length),
                (blank_index or 0) % int(logits.shape[2]),
            )
            loss = tf.cast(loss, logits.dtype)
        return tape.gradient(loss, logits, output_gradients=dy)

    def second(x: tf.Tensor, dy: tf.Tensor, d2: tf.Tensor) -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            tape.watch([x, dy])
            first = gradient(x, dy)
        return tape.gradient(first, [x, dy], output_gradients=d2)

    logits = tf.convert_to_tensor(logits)
    if isinstance(labels, tf.SparseTensor):
        return function(logits)
    return _twice(function, second, logits)


def _linear(function: Callable[[tf.Tensor], tf.Tensor], x: tf.Tensor) -> Any:
    """Return a linear function of `x` that can be differentiated ever again.

    Its gradient is a linear function of the upstream gradient; the gradient
    of that is the function itself.
    """
    recorded = _Recorded(function, x)

    def forward(u: tf.Tensor) -> tf.Tensor:
        return _with_gradient(function(tf.stop_gradient(u)), backward, u)

    def backward(dy: tf.Tensor) -> tf.Tensor | None:
        value = recorded.gradient(dy)
        # TensorFlow has none for bicubic resizing of half precision.
        return None if value is None else _with_gradient(value, forward, dy)

    return _with_gradient(recorded.y, backward, x)


def _twice(
    function: Callable[[tf.Tensor], tf.Tensor],
    second: Callable[[tf.Tensor, tf.Tensor, tf.Tensor], list[tf.Tensor]],
    x: tf.Tensor,
) -> tf.Tensor:
    """Return a function of `x` that can be differentiated twice.

    `second(x, dy, d2)` is the gradient of its gradient, which is a function
    of `x` and of the upstream gradient `dy`, for the upstream gradient `d2`.
    """
    recorded = _Recorded(function, x)

    def first(dy: tf.Tensor) -> tf.Tensor:
        return _with_gradient(
            recorded.gradient(dy), lambda d2: second(x, dy, d2), x, dy
        )

    return _with_gradient(recorded.y, first, x)


class _Recorded:
    """The value of a function and TensorFlow's gradient of it.

    Both are constants to whoever records derivatives. The tape is opened now:
    within the gradient, in forward mode, it would see nothing.

    Attributes:
        y: The value.
    """

    def __init__(
        self, function: Callable[[tf.Tensor], tf.Tensor], x: tf.Tensor
    ) -> None:
        self._x = tf.stop_gradient(x)
        with (
            tf.name_scope(MARK),
            tf.GradientTape(persistent=True) as self._tape,
        ):
            self._tape.watch(self._x)
            y = function(self._x)
        self._y = y
        self.y = tf.stop_gradient(y)

    def gradient(self, dy: tf.Tensor) -> tf.Tensor | None:
        """Return the gradient at an upstream gradient."""
        return self._tape.gradient(
            self._y, self._x, output_gradients=tf.stop_gradient(dy)
        )


def _with_gradient(
    value: tf.Tensor, gradient: Callable[..., Any], *inputs: tf.Tensor
) -> tf.Tensor:
    """Return `value` as a function of `inputs` that has a gradient."""

    @tf.custom_gradient
    def constant(*_: tf.Tensor) -> tuple[tf.Tensor, Callable[..., Any]]:
        return value, gradient

    if tf.executing_eagerly():
        return constant(*inputs)
    # In a graph, forward mode sees the gradients of functions, but passes by
    # those of `tf.custom_gradient`.
    return tf.function(constant, autograph=False)(*inputs)


_REPLACEMENTS = (
    (tf.nn, "moments", _moments),
    (tf.nn, "softsign", _softsign),
    (tf.nn, "ctc_loss", _ctc_loss),
    (tf.image, "resize", _resize),
)
