"""Tell the package's own calls of a model from those of others.

Another model or a loop may hold a wrapper and call it for its own training.
That trains the net inside plainly, which has to be said.
"""

import contextlib
import threading
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import tensorflow as tf


class _OwnCalls(threading.local):
    depth = 0


_own_calls = _OwnCalls()
_warned: weakref.WeakSet[Any] = weakref.WeakSet()


@contextlib.contextmanager
def own() -> Iterator[None]:
    """Let calls in the context be those of a sharpness-aware step."""
    _own_calls.depth += 1
    try:
        yield
    finally:
        _own_calls.depth -= 1


def outputs(model: Any, x: Any, training: bool) -> Any:
    """Call a model from a step of its own."""
    with own():
        return model(x, training=training)


def watch(wrapper: Any, training: Any) -> None:
    """Warn once if a wrapper is called in the training of somebody else.

    Of a call that is made eagerly it can't be told: dropout at inference looks
    the same.
    """
    is_own = bool(_own_calls.depth) or tf.executing_eagerly()
    if training is not True or is_own or wrapper in _warned:
        return
    _warned.add(wrapper)
    warnings.warn(
        f"{wrapper.name!r} is called for training by another model or loop, "
        "which trains the net inside plainly, without any ascent. Put the "
        "wrapper around the outermost model, or train with "
        "keras_lesam.SharpnessAwareGradients; for anything else call `.model`, "
        "the net inside.",
        stacklevel=2,
    )
