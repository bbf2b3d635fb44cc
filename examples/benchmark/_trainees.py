"""The same nets, trained plainly and by SAM, in three libraries.

A trainee is `(epoch, parameters)`: a callable that trains for one epoch over
the data of `speed.py` and returns its seconds, and the number of trainable
parameters. Each library is imported only when it is used.
"""

import importlib
import math
import sys
import time

RHO = 0.05
LEARNING_RATE = 0.01
MOMENTUM = 0.9
PLAIN = "plain"
SHAPES = {
    "dense": (28, 28, 1),
    "conv": (28, 28, 1),
    "resnet": (32, 32, 3),
    "vit": (28, 28, 1),
}
# Not of pictures but of words, `EMBEDDING` of them; with each optimizer.
EMBEDDING = (1_000_000, 64)
WORDS = {"embedding": (32,), "embedding_adam": (32,)}
UNITS = 2048


def keras_trainee(library, net, method, mode, data, batch_size):
    """Make a trainee of Keras 3 or tf-keras, trained by `fit`.

    Args:
        library: "keras_lesam", "by hand" or "tf-keras".
        net: A key of `SHAPES` or `WORDS`.
        method: "plain", or one of `speed.METHODS` for the library.
        mode: "graph" or "XLA".
        data: Arrays of pictures and labels.
        batch_size: Integer.
    """
    if library == "tf-keras":
        # The nets are written for Keras 3; these layers are the same in both.
        sys.modules["keras"] = importlib.import_module("tf_keras")
    import _common
    import keras

    inner = _keras_net(net)
    model = _WRAPPERS[library, method](inner)
    optimizer = keras.optimizers.SGD(LEARNING_RATE, momentum=MOMENTUM)
    if net == "embedding":
        optimizer = keras.optimizers.SGD(LEARNING_RATE)
    elif net == "embedding_adam":
        optimizer = keras.optimizers.Adam(LEARNING_RATE)
    model.compile(
        optimizer,
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=mode == "XLA",
    )

    def epoch():
        watch = _common.Stopwatch()
        model.fit(
            *data,
            batch_size=batch_size,
            shuffle=False,
            verbose=0,
            callbacks=[watch],
        )
        return watch.seconds[0]

    shapes = [tuple(v.shape) for v in inner.trainable_weights]
    return epoch, sum(math.prod(shape) for shape in shapes)


def _keras_net(net):
    import _nets
    from keras import Input
    from keras import Sequential
    from keras import layers

    if net in SHAPES:
        options = {"units": UNITS} if net == "dense" else {}
        return getattr(_nets, net)(SHAPES[net], **options)
    return Sequential(
        [
            Input(WORDS[net], dtype="int32"),
            layers.Embedding(*EMBEDDING),
            layers.GlobalAveragePooling1D(),
            layers.Dense(10),
        ]
    )


def _plain(net):
    return net


def _lesam(**options):
    def wrap(net):
        from keras_lesam import LESAMModel

        # All steps have two passes.
        return LESAMModel(net, sigma=0.1, warmup=0, anneal=0, **options)

    return wrap


def _lesam_by_default(net):
    from keras_lesam import LESAMModel

    return LESAMModel(net)


def _sam(net):
    from keras_lesam import SAMModel
    from keras_lesam import rules

    return SAMModel(net, rules.SAM(RHO))


def _look(net):
    from keras_lesam import SAMModel
    from keras_lesam import rules

    return SAMModel(net, rules.LookSAM(RHO, every=4))


def _by_hand(net):
    from _by_hand import HandWrittenSAM

    return HandWrittenSAM(net, RHO)


def _tf_keras_sam(net):
    import tf_keras

    wrapper = tf_keras.models.experimental.SharpnessAwareMinimization
    return wrapper(net, rho=RHO)


_WRAPPERS = {
    ("keras_lesam", PLAIN): _plain,
    ("keras_lesam", "SAM"): _sam,
    ("keras_lesam", "LE-SAM"): _lesam(),
    ("keras_lesam", "LE-SAM default"): _lesam_by_default,
    ("keras_lesam", "LE-SAM secant"): _lesam(curvature="secant"),
    ("keras_lesam", "LE-SAM, every 4th"): _lesam(ascent_every=4),
    ("keras_lesam", "LookSAM, every 4th"): _look,
    ("by hand", PLAIN): _plain,
    ("by hand", "SAM"): _by_hand,
    ("tf-keras", PLAIN): _plain,
    ("tf-keras", "SAM"): _tf_keras_sam,
}


def torch_trainee(library, net, method, mode, data, batch_size):
    """Make a trainee of PyTorch, trained by the usual loop over batches.

    Args:
        library: "pytorch_optimizer".
        net: A key of `SHAPES`.
        method: "plain" or "SAM".
        mode: "eager" or "compiled" (`torch.compile` of the net).
        data: Arrays of pictures, channels last, and labels.
        batch_size: Integer.
    """
    del library
    import _torch_nets
    import torch

    module = getattr(_torch_nets, net)(SHAPES[net])
    forward = torch.compile(module) if mode == "compiled" else module
    loss = torch.nn.CrossEntropyLoss()
    x = torch.from_numpy(data[0]).permute(0, 3, 1, 2).contiguous()
    y = torch.from_numpy(data[1]).long()
    step = _torch_step(module, method)

    def epoch():
        begin = time.perf_counter()
        for i in range(0, len(x), batch_size):
            rows = slice(i, i + batch_size)
            step(lambda: loss(forward(x[rows]), y[rows]).backward())  # noqa: B023
        return time.perf_counter() - begin

    return epoch, sum(p.numel() for p in module.parameters())


def _torch_step(module, method):
    """Return the step: it takes the callable that computes gradients."""
    import torch

    options = {"lr": LEARNING_RATE, "momentum": MOMENTUM}
    if method == PLAIN:
        optimizer = torch.optim.SGD(module.parameters(), **options)

        def step(backward):
            optimizer.zero_grad()
            backward()
            optimizer.step()

        return step

    from pytorch_optimizer import SAM

    sam = SAM(module.parameters(), torch.optim.SGD, rho=RHO, **options)

    def sam_step(backward):
        backward()
        sam.first_step(zero_grad=True)
        backward()
        sam.second_step(zero_grad=True)

    return sam_step


TRAINEES = {
    "keras_lesam": keras_trainee,
    "by hand": keras_trainee,
    "tf-keras": keras_trainee,
    "pytorch_optimizer": torch_trainee,
}
