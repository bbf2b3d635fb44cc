"""Loss-Equated SAM for Keras: sharpness-aware training by loss budget."""

import keras as _keras

if _keras.config.backend() != "tensorflow":
    raise ImportError(
        "keras_lesam trains with the TensorFlow backend of Keras. Set the "
        "environment variable KERAS_BACKEND=tensorflow before keras is "
        "imported. "
        f"Received: keras.config.backend()={_keras.config.backend()!r}"
    )

from keras_lesam._model import LESAMModel
from keras_lesam._version import __version__

__all__ = ["LESAMModel", "__version__"]
