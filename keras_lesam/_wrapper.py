"""The wrapper: a Keras model whose `train_step` climbs before it descends.

What all public models have in common; which rule, and what its arguments are
called, is theirs.
"""

import contextlib
import functools
import inspect
import math

import keras
import tensorflow as tf

from keras_lesam import _checks
from keras_lesam import _curvature
from keras_lesam import _delegation
from keras_lesam import _passes
from keras_lesam import _step
from keras_lesam import _workarounds
from keras_lesam._budget import Budget
from keras_lesam._budget import tell_length
from keras_lesam._statistics import StepStatistics

# Where the ascent comes from, and what its mean keeps in each step.
ASCENTS = {"batch": None, "previous": 0.0, "momentum": 0.9}


class SharpnessAwareModel(_workarounds.MultiWorkerModel):
    """Trains a Keras model by steps of a `rule`.

    Args:
        model: A `keras.Model`.
        rule: A `_rule.Rule`.
        budget: Float or schedule, what the rule makes the climb from.
        warmup: Share of the training over which the budget rises.
        anneal: Share of the training over which it falls.
        total_steps: Steps of the training, or `None`.
        logs: Names of the statistics in the logs.

    The other arguments are those of `LESAMModel`.
    """

    def __init__(
        self,
        model,
        rule,
        budget,
        *,
        warmup,
        anneal,
        total_steps,
        logs,
        num_batch_splits,
        ascent_from,
        ascent_fraction,
        ascent_every,
        perturbation_scope,
        perturb,
        name,
    ):
        _check_model(model)
        # The inner model's policy: it decides whether `compile` scales the
        # loss. No autocast: what comes in is for the inner model to cast.
        super().__init__(
            name=_check_name(name), dtype=model.dtype_policy, autocast=False
        )
        if total_steps is not None:
            total_steps = _checks.integer("total_steps", total_steps, 1)
        self._perturbation_scope = _checks.choice(
            "perturbation_scope", perturbation_scope, ("replica", "global")
        )
        self._num_batch_splits = _checks.integer(
            "num_batch_splits", num_batch_splits, 1
        )
        self._ascent_fraction = _checks.number(
            "ascent_fraction", ascent_fraction, 0, 1, above=True
        )
        self._ascent_every = _checks.integer("ascent_every", ascent_every, 1)
        self._ascent_from = _checks.choice("ascent_from", ascent_from, ASCENTS)
        self._check_ascent(rule)
        if perturb is not None and not callable(perturb):
            raise TypeError(
                "`perturb` must be a callable from a variable to bool, or "
                f"None. Received: perturb={perturb!r}"
            )
        self._perturb = perturb
        self._rule = rule
        dtype = scalar_dtype(model)
        self._budget = Budget(budget, warmup, anneal, total_steps, dtype)
        if self._ascent_fraction < 1 or self._ascent_from != "batch":
            logs = [name for name in logs if name != "sharpness"]
        self._statistics = StepStatistics(logs)
        self._kept = {}
        self._train_functions = {}
        self._built_for_training = False
        self._fitting = False
        self._evaluating = False
        self.model = model
        if model.built:
            self.built = True
            self._make_memory()

    def _check_ascent(self, rule):
        if rule.every > 1 and self._ascent_every > 1:
            raise ValueError(
                "The rule has an `every` of its own: leave `ascent_every` "
                f"alone. Received: ascent_every={self._ascent_every}, {rule!r}"
            )
        if self._ascent_from == "batch":
            return
        given = f"Received: ascent_from={self._ascent_from!r}"
        if self._ascent_fraction < 1 or self._ascent_every > 1:
            raise ValueError(
                "With `ascent_from` 'previous' or 'momentum' a step has one "
                "pass, and nothing to save: leave `ascent_fraction` and "
                f"`ascent_every` at 1. {given}, ascent_fraction="
                f"{self._ascent_fraction}, ascent_every={self._ascent_every}"
            )
        if rule.combines or rule.keeps:
            raise ValueError(
                "With `ascent_from` 'previous' or 'momentum' the gradient at "
                "the weights is not known, which this rule asks for: use "
                f"'batch'. {given}, rule {type(rule).__name__}"
            )

    def train_step(self, data):
        """One step: two passes, one update, logs. Called by `fit`."""
        if self._budget.is_zero or (
            self.built and not self.trainable_variables
        ):
            return self._plain_train_step(data)
        batch = _passes.Batch(*keras.utils.unpack_x_y_sample_weight(data))
        self._build_for_training(batch)
        budget, between = self._budget_of_step()

        def take(step):
            return self._take(step, batch, budget, between)

        if self._ascent_fraction == 1 or not self._conditional():
            found = take(self._two_passes())
        else:
            # Where the budget is 0, the one pass sees the whole batch.
            found = tf.cond(
                budget > 0,
                lambda: take(self._two_passes()),
                lambda: take(_step.plain),
            )
        gradients, learnt, statistics, logs = found

        self._remember(learnt, between)
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

    def _budget_of_step(self):
        """The budget, and whether this is a step between two climbs."""
        iterations = tf.convert_to_tensor(self.optimizer.iterations)
        budget = self._budget(iterations)
        every = max(self._ascent_every, self._rule.every)
        if every == 1:
            return budget, None
        climbs = tf.equal(iterations % every, 0)
        between = (budget > 0) & ~climbs
        return tf.where(climbs, budget, tf.zeros_like(budget)), between

    def _remember(self, learnt, between):
        """Writes what the next step may know of this one."""

        def write():
            for variable, value in zip(self._memory_variables(), learnt):
                variable.assign(value)

        in_a_branch = self._conditional() and _passes.replicas() == 1
        if self._rule.every > 1 and in_a_branch:
            # Between climbs nothing is learnt: no copy of what is known.
            tf.cond(between, lambda: None, write)
        else:
            write()

    def _two_passes(self):
        """The kind of step that the arguments ask for."""
        if self._ascent_from != "batch":
            decay = ASCENTS[self._ascent_from]
            return functools.partial(_step.perturbed_from_memory, decay=decay)
        if self._ascent_fraction < 1:
            share = self._ascent_fraction
            return functools.partial(_step.perturbed_from_share, share=share)
        return _step.perturbed

    def _take(self, step, batch, budget, between):
        """Gradients, what was learnt, statistics and logs of a step.

        Commits its state, but not what was learnt: replicas may have to meet
        for that, which they cannot do in a branch.
        """
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
            memory=self._memory(),
            between=between,
        )
        found = step(problem, batch, budget)
        _passes.commit(found.state)
        self._loss_metric().update_state(
            found.loss, sample_weight=_passes.count_rows(found.batch.x)
        )
        logs = self.compute_metrics(
            found.batch.x,
            found.batch.y,
            found.outputs,
            sample_weight=found.batch.sample_weight,
        )
        learnt = {id(variable): value for variable, value in found.learnt}
        learnt = [learnt[id(v)] for v in self._memory_variables()]
        return found.gradients, learnt, found.statistics, logs

    # What a step tells the next.

    def _kept_names(self):
        """Names of what is kept for each weight, and whether for all."""
        ahead = {} if self._ascent_from == "batch" else {_step.AHEAD: False}
        return {**self._rule.keeps, **ahead}

    def _make_memory(self):
        """Makes what is missing: weights of this model, saved with it."""
        names = self._kept_names()
        if not names:
            return
        variables = self.trainable_variables
        for name, of_all in names.items():
            kept = self._kept.setdefault(name, {})
            for variable, moves in zip(variables, self._perturbed_weights()):
                wanted = moves or (of_all and _passes.is_weight(variable))
                if wanted and id(variable) not in kept:
                    kept[id(variable)] = self.add_memory(
                        variable.shape, variable.dtype, f"{name}_{len(kept)}"
                    )

    def add_memory(self, shape, dtype, name):
        """A weight, 0 at first, one for all replicas: the mean of theirs."""
        return self.add_weight(
            shape=shape,
            initializer="zeros",
            dtype=dtype,
            trainable=False,
            autocast=False,
            aggregation="mean",
            name=name,
        )

    def _memory(self):
        """`Problem.memory`: lists like the trainable variables."""
        return {
            name: [kept.get(id(v)) for v in self.trainable_variables]
            for name, kept in self._kept.items()
        }

    def _memory_variables(self):
        """All that a step may learn, in one order."""
        return [
            v for kept in self._memory().values() for v in kept if v is not None
        ]

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
        return _curvature.FirstOrder()

    def _loss_metric(self):
        return next(m for m in self.metrics if m.name == "loss")

    def _build_for_training(self, batch):
        if self._built_for_training:
            return
        if not (self._budget.has_length or self._fitting):
            raise ValueError(_NO_LENGTH)
        self._prepare_for_training(batch)
        self._built_for_training = True

    def _prepare_for_training(self, batch):
        """Refuses what cannot be trained; makes what waits for a batch."""
        _workarounds.refuse_rematerialized_layers(self.model)
        _passes.build(self, batch)
        with tf.init_scope(), _workarounds.unlocked(self):
            self._make_memory()

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
        is_schedule = self._budget.schedule is not None
        return {
            "model": _delegation.serialize(self.model),
            "warmup": None if is_schedule else self.warmup,
            "anneal": None if is_schedule else self.anneal,
            "total_steps": self.total_steps,
            "num_batch_splits": self.num_batch_splits,
            "ascent_from": self.ascent_from,
            "ascent_fraction": self.ascent_fraction,
            "ascent_every": self.ascent_every,
            "perturbation_scope": self.perturbation_scope,
            "perturb": None
            if self.perturb is None
            else keras.saving.serialize_keras_object(self.perturb),
            "name": self.name,
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        """The wrapper of a `get_config`, around a new inner model."""
        return cls(
            **{
                key: keras.saving.deserialize_keras_object(
                    value, custom_objects=custom_objects
                )
                if isinstance(value, dict)
                else value
                for key, value in config.items()
            }
        )

    def load_own_variables(self, store):
        """What steps have told the next; a file may have none of it."""
        if len(store.keys()) == len(self._own_weights()):
            super().load_own_variables(store)

    def _own_weights(self):
        return [v for kept in self._kept.values() for v in kept.values()]

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

    def _assign_budget(self, name, value):
        """Another number for the budget, which does not retrace."""
        if _checks.is_schedule(value) or self._budget.schedule is not None:
            raise TypeError(
                f"`{name}` can be assigned a number where it was a number; for "
                f"a schedule make a new {type(self).__name__} around `.model`. "
                f"Received: {name}={value!r}"
            )
        value = _checks.number(name, value, 0)
        if value and self._fitting:
            self._budget.require_steps()
        self._budget.sigma = value
        if self.train_function is not None:
            self.make_train_function()

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
    def num_batch_splits(self):
        return self._num_batch_splits

    @property
    def ascent_from(self):
        return self._ascent_from

    @property
    def ascent_fraction(self):
        return self._ascent_fraction

    @property
    def ascent_every(self):
        return self._ascent_every

    @property
    def perturbation_scope(self):
        return self._perturbation_scope

    @property
    def perturb(self):
        return self._perturb


def check_shares(name, budget, warmup, anneal, defaults):
    """`warmup` and `anneal` as shares, `defaults` where they are `None`.

    Args:
        name: String, what the budget is called.
        budget: A number or a schedule, which says it all.
        warmup: What was received.
        anneal: What was received.
        defaults: Two floats.
    """
    if _checks.is_schedule(budget):
        if warmup is not None or anneal is not None:
            raise ValueError(
                f"`{name}` is a schedule, which is the whole budget over time: "
                "leave `warmup` and `anneal` alone. "
                f"Received: warmup={warmup!r}, anneal={anneal!r}"
            )
        return 0.0, 0.0
    warmup = defaults[0] if warmup is None else warmup
    anneal = defaults[1] if anneal is None else anneal
    warmup = _checks.number("warmup", warmup, 0, 1)
    anneal = _checks.number("anneal", anneal, 0, 1)
    if warmup + anneal > 1 + 1e-9:
        raise ValueError(
            "`warmup` and `anneal` are shares of one training: together they "
            f"must be at most 1. Received: warmup={warmup}, anneal={anneal}"
        )
    return warmup, anneal


def scalar_dtype(model):
    """The dtype of slope, rho and budget: that of the weights, or float32."""
    wide = "float64" in (
        model.dtype_policy.variable_dtype,
        keras.config.floatx(),
    )
    return "float64" if wide else "float32"


_NO_LENGTH = (
    "The budget's warm-up and annealing are shares of the whole training, and "
    "how long it is only `fit` knows. Pass `total_steps` to the model, or set "
    "warmup=0 and anneal=0. Received: total_steps=None"
)


def _check_model(model):
    if isinstance(model, SharpnessAwareModel):
        raise ValueError(
            f"`model` is a {type(model).__name__} already; wrap its `.model`. "
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
                "`model` and its wrapper must be made in the same "
                "`strategy.scope()`. Received: a model made "
                f"{'in' if made else 'outside of'} the scope of one with "
                "several replicas"
            )


def _check_name(name):
    if name is not None and not isinstance(name, str):
        raise TypeError(f"`name` must be a string. Received: name={name!r}")
    return name
