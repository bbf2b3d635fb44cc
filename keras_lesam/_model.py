"""`LESAMModel`: any Keras model, trained by Loss-Equated SAM."""

import contextlib
import functools
import inspect
import math

import keras
import tensorflow as tf

from keras_lesam import _checks
from keras_lesam import _curvature
from keras_lesam import _delegation
from keras_lesam import _hessian
from keras_lesam import _passes
from keras_lesam import _rule
from keras_lesam import _step
from keras_lesam import _workarounds
from keras_lesam._budget import Budget
from keras_lesam._budget import scalar_variable
from keras_lesam._budget import tell_length
from keras_lesam._statistics import StepStatistics

DEFAULT_SIGMA = 0.1
DEFAULT_RHO_MAX = 1.0
DEFAULT_WARMUP = 0.1
DEFAULT_ANNEAL = 0.2


@keras.saving.register_keras_serializable(package="keras_lesam")
class LESAMModel(_workarounds.MultiWorkerModel):
    """Trains a Keras model by Loss-Equated Sharpness-Aware Minimization.

    Wrap a model, `compile` and `fit` as ever. Each step looks at the batch
    twice: once at the weights `w`, to find the direction in which the loss
    rises, and once at `w + eps`, so far along it that the loss has risen by
    the budget `sigma`. The optimizer then applies the gradient found there to
    `w`. SAM (Foret et al. 2021) fixes the length of `eps` instead; how much
    the loss rises over it then depends on the gradient.

    ```
    s       = ||T g||                      slope, logged as gradient_norm
    eps     = rho T^2 g / s                rho = min(sigma / s, rho_max)
    g_hat   = grad L(w + eps) - alpha g    what the optimizer applies
    ```

    `L` is the loss that `fit` minimises: data loss, `add_loss` and
    regularizers, before any loss scaling. Random layers draw the same numbers
    in both passes; batch normalization statistics, seeds and metrics advance
    once, from the first. The weights themselves are never moved to `w + eps`.
    Where the budget or the slope is 0, the step is a step of plain `fit`, at
    the cost of one.

    Example:

    >>> import keras, numpy as np
    >>> from keras_lesam import LESAMModel
    >>> net = keras.Sequential([keras.layers.Dense(10, activation="softmax")])
    >>> model = LESAMModel(net, sigma=0.1)
    >>> model.compile("sgd", "sparse_categorical_crossentropy")
    >>> x, y = np.random.rand(64, 8), np.random.randint(10, size=64)
    >>> history = model.fit(x, y, epochs=2, verbose=0)
    >>> sorted(history.history)
    ['gradient_norm', 'loss', 'rho', 'sharpness', 'sigma']
    >>> model.model is net  # a plain Keras model, with the trained weights
    True

    The logs of `fit` (never those of `evaluate`) have, as means over the
    steps of an epoch: `sigma`, the budget (loss units); `gradient_norm`, the
    slope `s` (loss units per weight-space distance); `rho` (weight-space
    distance); and `sharpness`, the rise `L(w + eps) - L(w)` that was reached
    (loss units). With `sigma=0` nothing looks at the gradients, and
    `gradient_norm` is nan.

    Args:
        model: A `keras.Model`: functional, sequential or subclassed, built or
            not. Its own `compute_loss` and `compute_metrics` are honoured;
            a `train_step` of its own is refused.
        sigma: Float >= 0, the loss budget in loss units, or a
            `keras.optimizers.schedules.LearningRateSchedule` from
            `optimizer.iterations` to the budget. May be assigned to later:
            `model.sigma = 0.2` does not retrace.
        rho_max: Float > 0, the largest `rho` (weight-space distance), or
            `None` for no cap. A small one turns LE-SAM into SAM. May be
            assigned to later.
        warmup: Float in [0, 1], the share of the training over which the
            budget rises linearly from 0. Defaults to 0.1, or to 0 if `sigma`
            is a schedule, which says it all.
        anneal: Float in [0, 1], the share of the training over which the
            budget falls to 0 on a cosine, at its end. Defaults to 0.2, or to
            0 if `sigma` is a schedule. Together with `warmup` at most 1.
        total_steps: Integer > 0, the steps of the training that `warmup` and
            `anneal` are shares of, counted by `optimizer.iterations`, over
            several calls of `fit` or `train_on_batch`. By default it is what
            each `fit` is about to do: steps of an epoch times `epochs`. If
            you call `fit` in a loop, pass it: each call would warm up and
            anneal anew.
        curvature: How `k`, the curvature along the climb, is taken into
            account, for a budget met to second order: `"none"`, the paper's
            first order; `"hvp"`, exactly, by a Hessian-vector product of each
            batch; `"secant"`, at no extra pass, by a running mean of what the
            steps before have shown (`ascent_fraction` must be 1).
        hvp_method: How `"hvp"` differentiates twice:
            `"reverse_over_reverse"`, which `"auto"` is, goes everywhere and
            makes no forward pass of its own; or `"forward_over_reverse"`,
            which has no rule for the loops of recurrent layers.
        adaptive: Bool. `T` is `|w|` (ASAM, Kwon et al. 2021) instead of 1.
        alpha: Float in [0, 1], the share of the plain gradient left out of
            the update. 0 is the paper's default.
        num_batch_splits: Integer > 0, m-sharpness (Foret et al. 2021): each
            batch in so many parts, each with its own `eps`; the update is the
            mean of their `g_hat`. State such as batch normalization
            statistics advances once a part.
        ascent_fraction: Float in (0, 1], the share of the rows of a batch (or
            part of it) that finds `eps`; the step then costs 1 + share. The
            loss and metrics logged are those of these rows; sharpness is not
            logged.
        perturbation_scope: Under `tf.distribute`, `"replica"`: each replica
            climbs on its own part of the batch, as with `num_batch_splits`,
            and nothing more is communicated than in plain training; or
            `"global"`: all climb as one device would on the whole batch, for
            which the gradients of the first pass are summed over the replicas.
        perturb: Callable from a `keras.Variable` to bool: which weights are
            perturbed (the others have `T` = 0). `None`: all. To save the
            model, register it with `keras.saving`.
        name: Name of the model.

    Attributes:
        model: The wrapped model itself, never a copy: with the trained
            weights, and nothing to undo.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if one is out of range, or `model` has training logic that
            cannot be honoured.

    References:
        Wang, Liu, Xie, Gao, "Loss-Equated Sharpness-Aware Minimization", ICML
        2026, arXiv 2605.10183.
    """

    def __init__(
        self,
        model,
        sigma=DEFAULT_SIGMA,
        rho_max=DEFAULT_RHO_MAX,
        *,
        warmup=None,
        anneal=None,
        total_steps=None,
        curvature="none",
        hvp_method="auto",
        adaptive=False,
        alpha=0.0,
        num_batch_splits=1,
        ascent_fraction=1.0,
        perturbation_scope="replica",
        perturb=None,
        name=None,
    ):
        _check_model(model)
        # The inner model's policy: it decides whether `compile` scales the
        # loss. No autocast: what comes in is for the inner model to cast.
        super().__init__(
            name=_check_name(name), dtype=model.dtype_policy, autocast=False
        )
        warmup, anneal = _check_shares(sigma, warmup, anneal)
        if not _is_schedule(sigma):
            sigma = _checks.number("sigma", sigma, 0)
        if total_steps is not None:
            total_steps = _checks.integer("total_steps", total_steps, 1)
        self._curvature, self._hvp_method = _check_curvature(
            curvature, hvp_method, ascent_fraction
        )
        self._perturbation_scope = _checks.choice(
            "perturbation_scope", perturbation_scope, ("replica", "global")
        )
        self._num_batch_splits = _checks.integer(
            "num_batch_splits", num_batch_splits, 1
        )
        self._ascent_fraction = _checks.number(
            "ascent_fraction", ascent_fraction, 0, 1, above=True
        )
        if perturb is not None and not callable(perturb):
            raise TypeError(
                "`perturb` must be a callable from a variable to bool, or "
                f"None. Received: perturb={perturb!r}"
            )
        self._perturb = perturb
        dtype = _scalar_dtype(model)
        self._budget = Budget(sigma, warmup, anneal, total_steps, dtype)
        # The rule reads a variable: a new cap is not a new graph.
        self._rho_max = _check_rho_max(rho_max)
        self._rule = _rule.LossEquated(
            rho_max=scalar_variable(self._rho_max, dtype, "rho_max"),
            adaptive=_checks.boolean("adaptive", adaptive),
            alpha=_checks.number("alpha", alpha, 0, 1),
        )
        names = ["rho", "gradient_norm", "sharpness", "sigma"]
        if self._ascent_fraction < 1:
            names.remove("sharpness")
        self._statistics = StepStatistics(names)
        if self._curvature == "secant":
            # A weight of the model: saved, restored, and one for all replicas.
            self._secant = self.add_weight(
                shape=(2,),
                initializer="zeros",
                dtype=dtype,
                trainable=False,
                autocast=False,
                aggregation="mean",
                name="secant",
            )
        self._train_functions = {}
        self._built_for_training = False
        self._fitting = False
        self._evaluating = False
        self.model = model
        if model.built:
            self.built = True

    def train_step(self, data):
        """One step: two passes, one update, logs. Called by `fit`."""
        if self._budget.is_zero or (
            self.built and not self.trainable_variables
        ):
            return self._plain_train_step(data)
        batch = _passes.Batch(*keras.utils.unpack_x_y_sample_weight(data))
        self._build_for_training(batch)
        sigma = self._budget(tf.convert_to_tensor(self.optimizer.iterations))

        if self._ascent_fraction == 1:
            found = self._take(_step.perturbed, batch, sigma)
        elif not self._conditional():
            found = self._take(self._perturbed_from_share, batch, sigma)
        else:
            # Where the budget is 0, the one pass sees the whole batch.
            found = tf.cond(
                sigma > 0,
                lambda: self._take(self._perturbed_from_share, batch, sigma),
                lambda: self._take(_step.plain, batch, sigma),
            )
        gradients, statistics, logs = found

        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables))
        self._statistics.update_state(statistics)
        return _workarounds.reducible({**logs, **self._statistics.result()})

    def _plain_train_step(self, data):
        """The stock step, to the last bit: nothing looks at its gradients.

        A norm of the gradients, merely logged, would keep the graph optimizer
        from fusing them with the update, and change how sums are rounded.
        """
        logs = super().train_step(data)
        statistics = dict.fromkeys(self._statistics.names, 0.0)
        self._statistics.update_state({**statistics, "gradient_norm": math.nan})
        return _workarounds.reducible({**logs, **self._statistics.result()})

    def test_step(self, data):
        """The stock step."""
        return _workarounds.reducible(super().test_step(data))

    def make_train_function(self, force=False):
        """As in Keras; one function for no budget at all, one for the rest.

        Each is traced once, whatever `sigma` is assigned in between.
        """
        if force:
            self._train_functions.clear()
        is_zero = self._budget.is_zero
        self.train_function = self._train_functions.get(is_zero)
        super().make_train_function(force)
        self._train_functions[is_zero] = self.train_function

    def _take(self, step, batch, sigma):
        """Gradients, statistics and logs of a step; commits its state."""
        if self._num_batch_splits > 1:
            step = functools.partial(
                _step.in_parts, step, self._num_batch_splits
            )
        problem = _step.Problem(
            self,
            self._rule,
            self._perturbed_weights(),
            self._curvature_source(),
            shared=self._shared(),
            conditional=self._conditional(),
        )
        found = step(problem, batch, sigma)
        _passes.commit(found.state)
        if found.learnt is not None:
            self._secant.assign(found.learnt)
        self._loss_metric().update_state(
            found.loss, sample_weight=_passes.count_rows(found.batch.x)
        )
        logs = self.compute_metrics(
            found.batch.x,
            found.batch.y,
            found.outputs,
            sample_weight=found.batch.sample_weight,
        )
        return found.gradients, found.statistics, logs

    def _perturbed_from_share(self, *args):
        return _step.perturbed_from_share(*args, share=self._ascent_fraction)

    def _perturbed_weights(self):
        variables = self.trainable_variables
        moves = [
            _passes.is_weight(v)
            and (self._perturb is None or bool(self._perturb(v)))
            for v in variables
        ]
        if not any(moves):
            raise ValueError(
                "`perturb` selects none of the trainable variables. "
                f"Received: perturb={self._perturb!r}, for variables "
                f"{[v.path for v in variables]}"
            )
        return moves

    def _shared(self):
        """Whether several replicas climb as one."""
        return self._perturbation_scope == "global" and _passes.replicas() > 1

    def _conditional(self):
        """Whether a pass can be left out at run time.

        Not where replicas have to meet on the way, which they cannot do in a
        branch.
        """
        return (
            _workarounds.has_fast_conditionals(self)
            and not (self._shared() and self._ascent_fraction < 1)
            and not _workarounds.synchronizes_replicas(self.model)
        )

    def _curvature_source(self):
        """Of the climb of a step; reads what earlier steps have learnt."""
        if self._curvature == "secant":
            return _curvature.Secant(self._secant)
        if self._curvature == "hvp":
            return _curvature.Exact(self._exact_method())
        return _curvature.FirstOrder()

    def _exact_method(self):
        if self._hvp_method != "auto":
            return self._hvp_method
        # It needs no forward pass of its own, and goes everywhere.
        return _hessian.REVERSE_OVER_REVERSE

    def _loss_metric(self):
        return next(m for m in self.metrics if m.name == "loss")

    def _build_for_training(self, batch):
        if self._built_for_training:
            return
        if not (self._budget.has_length or self._fitting):
            raise ValueError(_NO_LENGTH)
        _workarounds.refuse_rematerialized_layers(self.model)
        _passes.build(self, batch)
        if self._curvature == "hvp":
            self._check_differentiable(batch)
        self._built_for_training = True

    def _check_differentiable(self, batch):
        operations = _hessian.operations(self, batch)
        method = self._exact_method()
        _hessian.refuse_loops(operations, method, "hvp_method")
        if self.jit_compile:
            _hessian.refuse_max_pooling(operations)

    # The model, as Keras sees it.

    def call(self, inputs, training=None):
        """The inner model's outputs."""
        del training  # The inner model sees it in the call's context.
        return self.model(inputs)

    def compute_loss(
        self, x=None, y=None, y_pred=None, sample_weight=None, training=True
    ):
        """The loss that `fit` minimises; the inner model's, if it has one."""
        if not _delegation.has_own_loss_or_metrics(self.model):
            return super().compute_loss(x, y, y_pred, sample_weight, training)
        return _delegation.compute_loss(
            self.model, x, y, y_pred, sample_weight, training
        )

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        """Updates and returns the metrics; the inner model's, if it has any."""
        if not _delegation.has_own_loss_or_metrics(self.model):
            return super().compute_metrics(x, y, y_pred, sample_weight)
        results = self.model.compute_metrics(x, y, y_pred, sample_weight)
        return {**results, **self.get_metrics_result()}

    def predict_step(self, data):
        """The inner model's."""
        return self.model.predict_step(data)

    @property
    def metrics(self):
        """Metrics of the training; of evaluation, while that runs."""
        own = _delegation.own_metrics(self.model)
        if _delegation.has_own_loss_or_metrics(self.model):
            found = [m for m in super().metrics if m.name == "loss"] + own
            found.append(self._statistics)
        else:
            found = super().metrics + own
        if self._evaluating:
            found = [m for m in found if m is not self._statistics]
        return found

    def reset_metrics(self):
        """Resets all metrics, the inner model's too."""
        super().reset_metrics()
        if _delegation.has_own_loss_or_metrics(self.model):
            self.model.reset_metrics()

    # What users call.

    def compile(self, *args, **kwargs):
        """As `keras.Model.compile`, scaling the loss as the inner model would.

        An inner model with `compute_loss` or `compute_metrics` of its own is
        compiled along, without an optimizer, so that they can call `super()`.

        Raises:
            ValueError: for what Keras cannot do on several replicas: gradient
                accumulation, several steps per execution, XLA.
        """
        if self._curvature == "hvp":
            # What jit_compile="auto" goes by.
            self.supports_jit = not _workarounds.has_max_pooling(self.model)
        given = inspect.signature(super().compile).bind(*args, **kwargs)
        _workarounds.refuse_limits_of_keras(
            self.distribute_strategy, given.arguments
        )
        super().compile(*args, **kwargs)
        self._built_for_training = False
        self._train_functions.clear()
        if _delegation.has_own_loss_or_metrics(self.model):
            _delegation.compile_along(self.model, super().compile, args, kwargs)

    def compile_from_config(self, config):
        """Compiles as the model in a saved file was compiled."""
        config = keras.saving.deserialize_keras_object(config)
        self.compile(**config)
        if self.optimizer is not None and self.built:
            self.optimizer.build(self.trainable_variables)

    def fit(self, *args, **kwargs):
        """As `keras.Model.fit`; also tells the budget how long it will be.

        Raises:
            ValueError: before training starts, if `warmup` or `anneal` are
                shares of a training of unknown length: the number of steps in
                an epoch is unknown and `total_steps` was not given.
        """
        if self._budget.has_length:
            return super().fit(*args, **kwargs)
        fit = inspect.signature(super().fit).bind(*args, **kwargs)
        fit.arguments["callbacks"] = tell_length(
            self._budget, fit.arguments.get("callbacks"), self
        )
        self._fitting = True
        try:
            return super().fit(*fit.args, **fit.kwargs)
        finally:
            self._fitting = False

    def train_on_batch(self, *args, **kwargs):
        """As `keras.Model.train_on_batch`, if the training's length is known.

        Raises:
            ValueError: if `warmup` or `anneal` are not 0 and `total_steps`
                was not given.
        """
        if not self._budget.has_length:
            raise ValueError(_NO_LENGTH)
        return super().train_on_batch(*args, **kwargs)

    def evaluate(self, *args, **kwargs):
        """As `keras.Model.evaluate`, with plain Keras's logs."""
        with self._evaluation():
            return super().evaluate(*args, **kwargs)

    def test_on_batch(self, *args, **kwargs):
        """As `keras.Model.test_on_batch`, with plain Keras's logs."""
        with self._evaluation():
            return super().test_on_batch(*args, **kwargs)

    @contextlib.contextmanager
    def _evaluation(self):
        before, self._evaluating = self._evaluating, True
        try:
            yield
        finally:
            self._evaluating = before

    def export(self, filepath, *args, **kwargs):
        """Exports the inner model, as `keras.Model.export` would.

        The artifact has its input names and needs neither this package nor
        Keras to serve.
        """
        return self.model.export(filepath, *args, **kwargs)

    # Saving.

    def get_config(self):
        """All arguments of the constructor, serialized."""
        sigma = self.sigma
        is_schedule = _is_schedule(sigma)
        serialize = keras.saving.serialize_keras_object
        return {
            "model": _delegation.serialize(self.model),
            "sigma": serialize(sigma) if is_schedule else sigma,
            "rho_max": self.rho_max,
            "warmup": None if is_schedule else self.warmup,
            "anneal": None if is_schedule else self.anneal,
            "total_steps": self.total_steps,
            "curvature": self.curvature,
            "hvp_method": self.hvp_method,
            "adaptive": self.adaptive,
            "alpha": self.alpha,
            "num_batch_splits": self.num_batch_splits,
            "ascent_fraction": self.ascent_fraction,
            "perturbation_scope": self.perturbation_scope,
            "perturb": None
            if self.perturb is None
            else serialize(self.perturb),
            "name": self.name,
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        """The wrapper of a `get_config`, around a new inner model."""
        config = dict(config)
        for key in ("model", "sigma", "perturb"):
            if isinstance(config[key], dict):
                config[key] = keras.saving.deserialize_keras_object(
                    config[key], custom_objects=custom_objects
                )
        return cls(**config)

    def load_own_variables(self, store):
        """What `curvature="secant"` has learnt; a file may have none of it."""
        if len(store.keys()) == len(self._own_weights()):
            super().load_own_variables(store)

    def _own_weights(self):
        return [] if self._curvature != "secant" else [self._secant]

    def get_build_config(self):
        """Nothing: the inner model knows how it was built."""
        return None

    def build_from_config(self, config):
        """Built when the inner model is."""
        del config
        self.built = self.model.built

    @property
    def output_names(self):
        """Names of the inner model's outputs, for dicts of losses."""
        return self.model.output_names

    # The arguments.

    @property
    def sigma(self):
        return self._budget.sigma

    @sigma.setter
    def sigma(self, value):
        if _is_schedule(value) or self._budget.schedule is not None:
            raise TypeError(
                "`sigma` can be assigned a number where it was a number; for "
                "a schedule make a new LESAMModel around `.model`. "
                f"Received: sigma={value!r}"
            )
        value = _checks.number("sigma", value, 0)
        if value and self._fitting:
            self._budget.require_steps()
        self._budget.sigma = value
        if self.train_function is not None:
            self.make_train_function()

    @property
    def rho_max(self):
        return None if math.isinf(self._rho_max) else self._rho_max

    @rho_max.setter
    def rho_max(self, value):
        self._rho_max = _check_rho_max(value)
        self._rule.rho_max.assign(self._rho_max)

    @property
    def warmup(self):
        return self._budget.warmup

    @property
    def anneal(self):
        return self._budget.anneal

    @property
    def total_steps(self):
        return self._budget.total_steps

    @property
    def curvature(self):
        return self._curvature

    @property
    def hvp_method(self):
        return self._hvp_method

    @property
    def adaptive(self):
        return self._rule.adaptive

    @property
    def alpha(self):
        return self._rule.alpha

    @property
    def num_batch_splits(self):
        return self._num_batch_splits

    @property
    def ascent_fraction(self):
        return self._ascent_fraction

    @property
    def perturbation_scope(self):
        return self._perturbation_scope

    @property
    def perturb(self):
        return self._perturb


_NO_LENGTH = (
    "The budget's warm-up and annealing are shares of the whole training, and "
    "how long it is only `fit` knows. Pass `total_steps` to LESAMModel, or set "
    "warmup=0 and anneal=0. Received: total_steps=None"
)


def _check_model(model):
    if isinstance(model, LESAMModel):
        raise ValueError(
            "`model` is a LESAMModel already; wrap its `.model`. "
            f"Received: model={model!r}"
        )
    if not isinstance(model, keras.Model):
        raise TypeError(
            "`model` must be a keras.Model (of Keras 3; a model of tf_keras "
            "is not one). "
            f"Received: model={model!r} of type {type(model).__module__}."
            f"{type(model).__name__}"
        )
    _delegation.refuse_custom_steps(model)
    # A model that is not built yet will be, in the scope of the wrapper.
    replicated = _passes.replicas() > 1
    for variable in model.variables[:1]:
        made = isinstance(variable.value, tf.distribute.DistributedValues)
        if made != replicated:
            raise ValueError(
                "`model` and LESAMModel must be made in the same "
                "`strategy.scope()`. Received: a model made "
                f"{'in' if made else 'outside of'} the scope of one with "
                "several replicas"
            )


def _check_shares(sigma, warmup, anneal):
    if _is_schedule(sigma):
        if warmup is not None or anneal is not None:
            raise ValueError(
                "`sigma` is a schedule, which is the whole budget over time: "
                "leave `warmup` and `anneal` alone. "
                f"Received: warmup={warmup!r}, anneal={anneal!r}"
            )
        return 0.0, 0.0
    warmup = DEFAULT_WARMUP if warmup is None else warmup
    anneal = DEFAULT_ANNEAL if anneal is None else anneal
    warmup = _checks.number("warmup", warmup, 0, 1)
    anneal = _checks.number("anneal", anneal, 0, 1)
    if warmup + anneal > 1 + 1e-9:
        raise ValueError(
            "`warmup` and `anneal` are shares of one training: together they "
            f"must be at most 1. Received: warmup={warmup}, anneal={anneal}"
        )
    return warmup, anneal


def _check_rho_max(rho_max):
    if rho_max is None:
        return math.inf
    return _checks.number("rho_max", rho_max, 0, above=True)


def _check_name(name):
    if name is not None and not isinstance(name, str):
        raise TypeError(f"`name` must be a string. Received: name={name!r}")
    return name


def _check_curvature(curvature, hvp_method, ascent_fraction):
    _checks.choice("curvature", curvature, ("none", "hvp", "secant"))
    _checks.choice("hvp_method", hvp_method, ("auto", *_hessian.METHODS))
    if hvp_method != "auto" and curvature != "hvp":
        raise ValueError(
            "`hvp_method` is for curvature='hvp'. "
            f"Received: hvp_method={hvp_method!r}, curvature={curvature!r}"
        )
    if curvature == "secant" and ascent_fraction != 1:
        raise ValueError(
            "curvature='secant' learns from the rise of the loss, which is "
            "not known where the two passes see different rows. Use 'none' or "
            f"'hvp', or ascent_fraction=1. Received: curvature={curvature!r}, "
            f"ascent_fraction={ascent_fraction!r}"
        )
    return curvature, hvp_method


def _is_schedule(sigma):
    return isinstance(sigma, keras.optimizers.schedules.LearningRateSchedule)


def _scalar_dtype(model):
    """The dtype of slope, rho and budget: that of the weights, or float32."""
    wide = "float64" in (
        model.dtype_policy.variable_dtype,
        keras.config.floatx(),
    )
    return "float64" if wide else "float32"
