"""Second derivatives that TensorFlow lacks, for the passes that need them.

Within `twice_differentiable`, and for the thread that opened it alone, some
functions of TensorFlow are replaced by ones with the same values and the same
gradients, to the last bit, whose gradients can be differentiated. Outside of
it, and for all other threads, they are TensorFlow's own.

What has no replacement is in `_unsupported.py`.
"""

import functools
import threading
import weakref
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from keras_lesam import _ctc

# In the names of the operations whose gradients can be differentiated.
MARK = "twice_differentiable"


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
        with _lock:
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
        if [*_open]:  # Of a set of weak references, those that are alive.
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


def _logsumexp(
    original: Any,
    input_tensor: Any,
    axis: Any = None,
    keepdims: bool = False,
    name: str | None = None,
) -> Any:
    """Compute it, of nothing but `log 0` too: masked rows of pairwise losses.

    There TensorFlow's derivatives are nan; that of the loss is masked with it,
    the one after it is not.
    """

    def second(x: tf.Tensor, dy: tf.Tensor, d2: tf.Tensor) -> list[tf.Tensor]:
        # Of dy softmax(x).
        total = original(x, axis, True)
        finite = tf.where(tf.math.is_finite(total), total, 0)
        softmax = tf.exp(x - finite)
        mean = tf.reduce_sum(softmax * d2, axis, keepdims=True)
        along_x = tf.reshape(dy, tf.shape(total)) * softmax * (d2 - mean)
        return [along_x, tf.reshape(mean, tf.shape(dy))]

    return _twice(
        lambda x: original(x, axis, keepdims, name),
        second,
        tf.convert_to_tensor(input_tensor),
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

    def forward(_: tf.Tensor, u: tf.Tensor) -> tf.Tensor:
        return _with_gradient(function(tf.stop_gradient(u)), backward, u)

    def backward(_: tf.Tensor, dy: tf.Tensor) -> tf.Tensor | None:
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

    def first(x: tf.Tensor, dy: tf.Tensor) -> tf.Tensor:
        return _with_gradient(recorded.gradient(dy), second, x, dy)

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
    """Return `value` as a function of `inputs` that has a gradient.

    `gradient(*inputs, dy)` must use the inputs that it is given: those from
    around it may be of a loop or function that is over when it is called.
    """

    @tf.custom_gradient
    def constant(*inputs: tf.Tensor) -> tuple[tf.Tensor, Callable[..., Any]]:
        return value, lambda dy: gradient(*inputs, dy)

    if tf.executing_eagerly():
        return constant(*inputs)
    # In a graph, forward mode sees the gradients of functions, but passes by
    # those of `tf.custom_gradient`.
    return tf.function(constant, autograph=False)(*inputs)


_REPLACEMENTS = (
    (tf.math, "reduce_logsumexp", _logsumexp),
    (tf.nn, "moments", _moments),
    (tf.nn, "softsign", _softsign),
    (tf.nn, "ctc_loss", _ctc_loss),
    (tf.image, "resize", _resize),
)
