"""What TensorFlow cannot differentiate twice, refused by name.

`UNSUPPORTED` is what TensorFlow registers as not differentiable, or does not
register at all, among the operations that gradients are made of, but for those
whose derivative is zero. A test compares it with TensorFlow's registry.
"""

import collections
import contextlib
import re
from collections.abc import Iterable
from collections.abc import Iterator

from keras_lesam._reach import Operation
from keras_lesam._second_derivatives import MARK

# The name of the operation by which `tf.nn.moments` makes a constant.
_MOMENTS = re.compile(r"moments(_\d+)?/StopGradient$")
# The same of its replacement, beside it.
_REPLACED = re.compile(MARK + r"(_\d+)?/StopGradient$")

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


# Calls of Python, whose gradients are constants; gradients that say so.
_ELSEWHERE = {"EagerPyFunc", "PreventGradient"}
_REMEDY = (
    "Use curvature='secant' or 'none' for training, and other layers or "
    "losses where the curvature is to be measured. Received: "
)


def refuse(operations: Iterable[Operation]) -> None:
    """Raise `ValueError` for what TensorFlow cannot differentiate twice.

    `operations` are those of the loss and of its gradient that depend on the
    weights.
    """
    wrong = [
        f"{o.type} ({o.name!r})"
        for o in operations
        if o.type in UNSUPPORTED | _ELSEWHERE and MARK not in o.name
    ]
    if wrong:
        raise ValueError(
            "TensorFlow has no second derivative, or a wrong one, of these "
            f"operations. {_REMEDY}{', '.join(sorted({*wrong}))}"
        )
    _refuse_old_moments(operations)


def _refuse_old_moments(operations: Iterable[Operation]) -> None:
    """Raise `ValueError` for moments that were not replaced.

    Such as in a `tf.function` that a model calls: if it was traced before, it
    is not traced again for its gradient to be differentiated.
    """
    counts: dict[str, int] = collections.defaultdict(int)
    names: dict[str, str] = {}
    for o in operations:
        if o.type != "StopGradient":
            continue
        if _REPLACED.search(o.name):
            counts[o.function] -= 1
        elif _MOMENTS.search(o.name):
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
