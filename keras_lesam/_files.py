"""Files of a wrapper, which the model inside can load, and the other way.

Keras names what it saves by the attributes that lead to it. A wrapper has the
attributes of its model, so that both files are laid out alike; the wrapper's
has the state of its training besides. Files of version 0.1 have all of the
inner model under `layers/<its class>`.
"""

import io
import os
import re
import zipfile
from typing import Any

import h5py
import keras

# Where the state of the training is, and what tells a wrapper's file.
STATE = "_saved_state"
_FORMATS = (".weights.h5", ".weights.json", ".keras")


class SavedState(keras.losses.Loss):
    """What Keras saves the state of a wrapper's training by.

    A `Loss` because Keras saves those, in all versions, and counts them among
    neither layers nor metrics.

    Args:
        wrapper: A `StandIn`.
    """

    def __init__(self, wrapper: Any) -> None:
        super().__init__(name=STATE)
        # Not as an attribute that Keras would go back to the wrapper by.
        self.save_own_variables = lambda store: wrapper._save_state(store)
        self.load_own_variables = lambda store: wrapper._load_state(store)


def names_of(model: keras.Model) -> list[str]:
    """Return attributes of a model that its wrapper is to have, too.

    Without the layers that Keras saves before it looks at attributes.
    """
    names = set(dir(model)) - set(dir(keras.Model))
    names = {name for name in names if not name.startswith("_")}
    is_graph = hasattr(type(model), "operations")
    if not (is_graph or isinstance(model, keras.Sequential)):
        return sorted(names)
    layers = {id(layer) for layer in model.layers}
    return sorted(
        name for name in names if id(getattr(model, name, None)) not in layers
    )


def share_with_inner_model(filepath: Any) -> None:
    """Let the inner model find its part of a weights file under its names.

    Both names lead to one copy.
    """
    if not (str(filepath).endswith(".weights.h5") and os.path.exists(filepath)):
        return
    with h5py.File(filepath, "r") as file:
        names = set(file.get("model", ())) - set(file)
    if names:
        with h5py.File(filepath, "r+") as file:
            for name in names:
                file[name] = file["model"][name]


def is_of_wrapper(filepath: Any, model: keras.Model) -> bool:
    """Return whether a file is a wrapper's, and not its inner model's."""
    path = str(filepath)
    if not path.endswith(_FORMATS):
        return False
    if not os.path.exists(path):
        return True  # Keras opens it, or says why it cannot.
    if path.endswith(".weights.json"):
        with open(path) as text:
            return STATE in text.read()
    if path.endswith(".keras"):
        with zipfile.ZipFile(path) as archive:
            if "model.weights.h5" not in archive.namelist():
                return True
            weights = io.BytesIO(archive.read("model.weights.h5"))
        with h5py.File(weights, "r") as file:
            return STATE in file or is_of_0_1(file, model)
    with h5py.File(path, "r") as file:
        return STATE in file or is_of_0_1(file, model)


def is_of_0_1(file: Any, model: keras.Model) -> bool:
    """Return whether an HDF5 file is that of a wrapper of version 0.1."""
    prefix = _prefix_in_0_1(model)
    if STATE in file or prefix not in file or len(file["layers"]) != 1:
        return False
    # A model in a model of the same class has such a file, too.
    inner = [f"layers/{_snake_case(layer)}" for layer in model.layers[:1]]
    return inner != [prefix] or f"{prefix}/{prefix}" in file


def read_as_0_1(store: Any, model: keras.Model) -> None:
    """Let Keras read the rest of a store of version 0.1."""
    store.h5_file = _FileOf01(store.h5_file, _prefix_in_0_1(model))


class _FileOf01:
    """A file of version 0.1, seen as one of this version.

    Args:
        file: An `h5py.File`.
        prefix: Where the inner model is.
    """

    def __init__(self, file: Any, prefix: str) -> None:
        self._file = file
        self._prefix = prefix

    def _path(self, path: str) -> str:
        first, _, rest = path.partition("/")
        if first in ("vars", "optimizer"):
            return path
        return f"{self._prefix}/{rest if first == 'model' else path}".strip("/")

    def __contains__(self, path: str) -> bool:
        return self._path(path) in self._file

    def __getitem__(self, path: str) -> Any:
        return self._file[self._path(path)]

    def get(self, path: str, *args: Any, **kwargs: Any) -> Any:
        """Get an entry, or its kind, as of an `h5py.File`."""
        return self._file.get(self._path(path), *args, **kwargs)

    def __bool__(self) -> bool:
        return bool(self._file)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _prefix_in_0_1(model: keras.Model) -> str:
    return f"layers/{_snake_case(model)}"


def _snake_case(instance: Any) -> str:
    """Return the name that Keras gives instances of a class in files."""
    name = re.sub(r"\W+", "", type(instance).__name__)
    name = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub("([a-z])([A-Z])", r"\1_\2", name).lower()
