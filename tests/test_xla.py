"""What a TPU asks for, as far as a CPU can show it: the step under XLA.

Static shapes, no callback to the host, no Python state: a step that is
compiled whole, for every option, and does what it does in a graph.
"""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.helpers import classification_data
from tests.helpers import constant_lesam
from tests.helpers import crossentropy
from tests.helpers import dense_net
from tests.helpers import kernels_only

OPTIONS = [
    {},
    {"adaptive": True},
    {"alpha": 0.3},
    {"rho_max": 0.05},
    {"curvature": "hvp"},
    {"curvature": "hvp", "hvp_method": "forward_over_reverse"},
    {"curvature": "secant"},
    {"num_batch_splits": 3},
    {"ascent_fraction": 0.5},
    {"ascent_every": 2},
    {"ascent_from": "momentum"},
    {"perturb": kernels_only},
    {"warmup": 0.5, "anneal": 0.2, "total_steps": 10},
    {"perturbation_scope": "global"},
]
# They call the host, or have shapes that depend on values.
FOREIGN = ("PyFunc", "Print", "Assert", "Where", "Unique", "BooleanMask")


def compiled(jit_compile, options):
    model = constant_lesam(dense_net(), **options)
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), crossentropy())
    model.build((12, 6))
    # One function around the step, as `fit` makes it.
    return model, tf.function(
        model.train_step, jit_compile=jit_compile, autograph=False
    )


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("options", OPTIONS, ids="-".join)
def test_the_whole_step_compiles(options):
    x, y = classification_data(rows=12)
    batch = tf.constant(x), tf.constant(y)
    model, step = compiled(True, options)
    twin, expected = compiled(False, options)
    step(batch), expected(batch)
    traces = step.experimental_get_tracing_count()
    for _ in range(3):
        logs, others = step(batch), expected(batch)
        assert logs.keys() == others.keys()
    for name in logs:
        np.testing.assert_allclose(logs[name], others[name], rtol=1e-9)
    for a, b in zip(model.get_weights(), twin.get_weights()):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)
    assert step.experimental_get_tracing_count() == traces


@pytest.mark.parametrize("options", OPTIONS, ids="-".join)
def test_nothing_calls_the_host_and_all_shapes_are_static(options):
    x, y = classification_data(rows=12)
    _, step = compiled(True, options)
    graph = step.get_concrete_function((tf.constant(x), tf.constant(y))).graph
    definition = graph.as_graph_def()
    nodes = [*definition.node]
    for function in definition.library.function:
        nodes += function.node_def
    assert nodes
    for node in nodes:
        assert not any(word in node.op for word in FOREIGN), node.name
    for op in graph.get_operations():
        for tensor in op.outputs:
            is_number = tensor.dtype not in (tf.resource, tf.variant)
            if is_number and op.type not in ("Placeholder",):
                assert tensor.shape.is_fully_defined(), op.name
