"""Loss-Equated SAM for Keras: sharpness-aware training by loss budget."""

import os as _os
import sys as _sys


def _require_tensorflow(backend):
    if backend != "tensorflow":
        raise ImportError(
            "keras_lesam trains with the TensorFlow backend of Keras. Set the "
            "environment variable KERAS_BACKEND=tensorflow before keras is "
            f"imported. Received: keras.config.backend()={backend!r}"
        )


# Before Keras is imported, which may fail for want of the other backend, and
# after, for a backend from Keras's configuration file.
if "keras" not in _sys.modules:
    _require_tensorflow(_os.environ.get("KERAS_BACKEND") or "tensorflow")

import keras as _keras

_require_tensorflow(_keras.config.backend())

from keras_lesam import rules
from keras_lesam._model import LESAMModel
from keras_lesam._sam import SAMModel
from keras_lesam._version import __version__

__all__ = ["LESAMModel", "SAMModel", "__version__", "rules"]
