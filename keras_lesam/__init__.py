"""Loss-Equated SAM for Keras: sharpness-aware training by loss budget."""

import importlib as _importlib
import os as _os
import sys as _sys
from typing import TYPE_CHECKING
from typing import Any as _Any


def _require_tensorflow(backend: str) -> None:
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

from keras_lesam import ascents
from keras_lesam import budgets
from keras_lesam import estimators
from keras_lesam import rules
from keras_lesam._loop import GradientRecord
from keras_lesam._loop import SharpnessAwareGradients
from keras_lesam._model import LESAMModel
from keras_lesam._sam import SAMModel
from keras_lesam._version import __version__
from keras_lesam._wrapper import SharpnessAwareModel

if TYPE_CHECKING:
    from keras_lesam import callbacks
    from keras_lesam import curvature
    from keras_lesam import landscape

__all__ = [
    "GradientRecord",
    "LESAMModel",
    "SAMModel",
    "SharpnessAwareGradients",
    "SharpnessAwareModel",
    "__version__",
    "ascents",
    "budgets",
    "callbacks",
    "curvature",
    "estimators",
    "landscape",
    "rules",
]

# Not needed for training; they import SciPy.
_LAZY = ("callbacks", "curvature", "landscape")


def __getattr__(name: str) -> _Any:
    if name in _LAZY:
        return _importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
