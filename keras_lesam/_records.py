"""The immutable records that the parts of a step hand to each other."""

from typing import TYPE_CHECKING
from typing import Any
from typing import NamedTuple

import keras
import tensorflow as tf

from keras_lesam._data import Batch
from keras_lesam._engines import Passes
from keras_lesam._gradients import Gradients
from keras_lesam._gradients import Scales
from keras_lesam._passes import LossAndGradients
from keras_lesam._vectors import Tensors
from keras_lesam.budgets import Budget
from keras_lesam.budgets import Losses
from keras_lesam.budgets import Progress

if TYPE_CHECKING:
    from keras_lesam._rule import Rule
    from keras_lesam.estimators import CurvatureEstimator

# What steps tell the next: from each component to its state.
States = dict[str, dict[str, Any]]


class StepContext(NamedTuple):
    """What stays the same from step to step; resolved before a trace.

    Attributes:
        model: A compiled and built Keras model.
        passes: The engine of passes that sees all of the model.
        rule: From gradients and budget to perturbation and update.
        budget: What the ascent of a step may spend.
        estimator: Where the curvature along the ascent comes from.
        perturb_mask: List of bools like the weights: which are perturbed.
        is_weight: List of bools like the weights: False for float8 scales.
        num_batch_splits: Integer, the parts of a batch in m-sharpness.
        is_global: Whether all replicas take one perturbation; if not, each
            takes its own.
        use_cond: Whether a pass that is not needed is left out at run time; if
            not, it is made, and its result is not used.
        dtype: Float dtype of all scalars.
    """

    model: keras.Model
    passes: Passes
    rule: "Rule"
    budget: Budget
    estimator: "CurvatureEstimator"
    perturb_mask: list[bool]
    is_weight: list[bool]
    num_batch_splits: int
    is_global: bool
    use_cond: bool
    dtype: Any

    def scales(self) -> Scales:
        """Return how gradients of a pass differ from those of the loss."""
        return Scales.of(self.model, self.dtype, self.is_global)

    def gradients(self, scaled: Tensors, radius: tf.Tensor) -> Gradients:
        """Return what a rule sees of the gradients of a pass."""
        return Gradients(scaled, radius, self.scales(), self.is_weight)


class StepInputs(NamedTuple):
    """What a step is told.

    Attributes:
        progress: A `budgets.Progress`.
        states: The state of each component: "rule", "budget", "ascent",
            "curvature", "reference", "change".
        budget: Scalar tensor, what the budget allows; `None` if it goes by the
            losses of the step.
        gate: Bool scalar tensor, whether the ascent is made in this step;
            `None`: it is.
        model_state: List of `(variable, tensor)` to start from, which the part
            of the batch before has left.
    """

    progress: Progress
    states: States
    budget: tf.Tensor | None
    gate: tf.Tensor | None = None
    model_state: Any = ()

    def only_if(self, gate: tf.Tensor | None) -> "StepInputs":
        """Return the inputs of a step that ascends only if `gate` holds."""
        if gate is None:
            return self
        both = gate if self.gate is None else self.gate & gate
        return self._replace(gate=both)

    def spendable(self, allowed: tf.Tensor) -> tf.Tensor:
        """Return what is allowed, and 0 in steps without an ascent."""
        if self.gate is None:
            return allowed
        return tf.where(self.gate, allowed, tf.zeros_like(allowed))


class FirstPass(NamedTuple):
    """What the first pass of a step has found.

    Attributes:
        context: The `StepContext`.
        inputs: The `StepInputs`.
        batch: The rows that were seen.
        weights: List of tensors, the point that it was made at.
        point: A `LossAndGradients`, of the scale of a pass.
        sources: What gradients of the pass are taken by: `weights`, or the
            variables themselves.
        scaled: Its gradients by the weights that are perturbed, dense, `None`
            elsewhere.
        gradients: The same, of the loss; of the whole batch where all replicas
            take one perturbation.
        losses: The `budgets.Losses` of the step; `None` if the budget does
            not go by them.
        reference: The state of what `losses` are measured by, for the next
            step.
        limit: Scalar tensor, the most that the loss may rise to first order,
            or `None`.
        allowed: Scalar tensor, what the budget allows.
        budget: Scalar tensor, what this step may spend of it: 0 in a step
            without an ascent.
        tape: What the estimator has recorded, or `None`.
        host_random: The state of Python's and NumPy's generators before it.
    """

    context: StepContext
    inputs: StepInputs
    batch: Batch
    weights: Tensors
    point: LossAndGradients
    sources: list[Any]
    scaled: Tensors
    gradients: Tensors
    losses: Losses | None
    reference: dict[str, Any]
    limit: tf.Tensor | None
    allowed: tf.Tensor
    budget: tf.Tensor
    tape: Any
    host_random: Any


class Step(NamedTuple):
    """What a step has found, before anything is written.

    Attributes:
        gradients: List like the weights, for `optimizer.apply_gradients` (of
            the scale of a pass); `None` where the loss has no gradient.
        batch: The rows that `loss` and `outputs` are of.
        loss: The loss at the weights in loss units, as Keras logs it.
        outputs: The model's outputs at the weights.
        model_state: List of `(variable, tensor)` to commit.
        statistics: Dict of scalar tensors: `rho`, `gradient_norm`,
            `sharpness`, `sigma` (the budget).
        states: The state of each component, for the next step.
    """

    gradients: Tensors
    batch: Batch
    loss: tf.Tensor
    outputs: Any
    model_state: list[tuple[Any, Any]]
    statistics: dict[str, tf.Tensor]
    states: States
