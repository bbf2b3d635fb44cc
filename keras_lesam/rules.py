"""SAM and its relatives, as rules for `SAMModel`.

```
from keras_lesam import SAMModel, rules

model = SAMModel(net, rules.ASAM(rho=0.5, eta=0.01))
```

A rule says how far to climb, and along what; the passes, and all that Keras
wants of a step, are the same for all. In what follows `g` is the gradient of
the loss at the weights `w`, and `h` the one at `w + eps`. The optimizer is
given `h` where nothing else is said.

| rule              | the climb                             | the update     |
|-------------------|---------------------------------------|----------------|
| `SAM`             | `eps = rho g / ||g||`                 | `h`            |
| `ASAM`            | `eps = rho T^2 g / ||T g||`           | `h`            |
| `UnnormalizedSAM` | `eps = rho g`                         | `h`            |
| `GSAM`            | as SAM                                | less `g` aside |
| `FriendlySAM`     | `eps` along `g` less its running mean | `h`            |
| `WSAM`            | as SAM                                | `g` and `h`    |
| `LookSAM`         | as SAM, in one step of several        | see there      |

LE-SAM itself is `keras_lesam.LESAMModel`. A rule of your own is a subclass
of one of these with another `radius`, `scaling`, `ascent` or `descent`.

The norm is over all weights that move, as one vector, biases and the weights
of normalization layers included; several implementations of ASAM leave those
out of `T`.
"""

import keras
import tensorflow as tf

from keras_lesam import _checks
from keras_lesam import _rule

__all__ = [
    "ASAM",
    "GSAM",
    "SAM",
    "WSAM",
    "FriendlySAM",
    "LookSAM",
    "UnnormalizedSAM",
]

_register = keras.saving.register_keras_serializable(package="keras_lesam")


@_register
class SAM(_rule.Rule):
    """Sharpness-Aware Minimization: a climb of fixed length.

    `eps = rho g / ||g||`, the first-order solution of `max L(w + eps)` over
    `||eps|| <= rho` (Foret et al. 2021, equation 2).

    Example:

    >>> import keras, numpy as np
    >>> from keras_lesam import SAMModel, rules
    >>> net = keras.Sequential([keras.layers.Dense(1)])
    >>> model = SAMModel(net, rules.SAM(rho=0.05))
    >>> model.compile("sgd", "mse")
    >>> history = model.fit(np.ones((8, 2)), np.ones((8, 1)), verbose=0)
    >>> round(history.history["rho"][0], 3)
    0.05

    Args:
        rho: Float >= 0, the length (weight-space distance), or a
            `keras.optimizers.schedules.LearningRateSchedule` from
            `optimizer.iterations` to it.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if one is out of range.

    References:
        Foret, Kleiner, Mobahi, Neyshabur, "Sharpness-Aware Minimization for
        Efficiently Improving Generalization", ICLR 2021, arXiv 2010.01412.
    """

    def __init__(self, rho=0.05):
        if not _checks.is_schedule(rho):
            rho = _checks.number("rho", rho, 0)
        self.rho = rho

    def radius(self, slope, budget, curvature=None):
        """`rho`; 0 where there is no direction to go."""
        del curvature
        return _rule.usable_radius(budget, slope)

    def get_config(self):
        """The arguments of the constructor, serialized."""
        if _checks.is_schedule(self.rho):
            return {"rho": keras.saving.serialize_keras_object(self.rho)}
        return {"rho": self.rho}

    @classmethod
    def from_config(cls, config, custom_objects=None):
        """The rule of a `get_config`."""
        config = dict(config)
        if isinstance(config["rho"], dict):
            config["rho"] = keras.saving.deserialize_keras_object(
                config["rho"], custom_objects=custom_objects
            )
        return cls(**config)

    def __repr__(self):
        arguments = vars(self).items()
        names = [f"{k}={v!r}" for k, v in arguments if not k.startswith("_")]
        return f"{type(self).__name__}({', '.join(names)})"


@_register
class ASAM(SAM):
    """Adaptive SAM: a climb of fixed length where weights are unit length.

    `eps = rho T^2 g / ||T g||` with `T = |w| + eta` element by element (Kwon
    et al. 2021, equation 6): scaling the weights of a layer, and undoing it
    in the next, does not change what is minimised, if `eta` is 0.

    Args:
        rho: As in `SAM`; typically ten times as large.
        eta: Float >= 0, so that weights near 0 can move.

    References:
        Kwon, Kim, Park, Choi, "ASAM: Adaptive Sharpness-Aware Minimization
        for Scale-Invariant Learning of Deep Neural Networks", ICML 2021,
        arXiv 2102.11600.
    """

    def __init__(self, rho=0.5, eta=0.01):
        super().__init__(rho)
        self.eta = _checks.number("eta", eta, 0)

    def scaling(self, weights):
        return [tf.abs(w) + self.eta for w in weights]

    def get_config(self):
        return {**super().get_config(), "eta": self.eta}


@_register
class UnnormalizedSAM(SAM):
    """SAM without the norm: `eps = rho g`, longer where it is steeper.

    What it minimises is `L + rho/2 ||g||^2` to first order, where SAM's is
    `L + rho ||g||` and LE-SAM's `L + sigma log ||g||`: the three differ in
    what normalization does, and in nothing else.

    Args:
        rho: As in `SAM`, but squared weight-space distance per loss unit. The
            logged `rho` is the distance, `rho ||g||`.

    References:
        Andriushchenko, Flammarion, "Towards Understanding Sharpness-Aware
        Minimization", ICML 2022, arXiv 2206.06232, section 3.
    """

    def radius(self, slope, budget, curvature=None):
        """`rho ||g||`."""
        del curvature
        return _rule.usable_radius(budget * slope, slope)


@_register
class GSAM(SAM):
    """Surrogate Gap Guided SAM: also narrows the gap `L(w + eps) - L(w)`.

    `g_hat = h - alpha g_perp`, where `g_perp = g - (g.h / ||h||^2) h` is the
    part of the plain gradient aside of `h`: going up along it raises the loss
    at `w`, and leaves that at `w + eps` alone (Zhuang et al. 2022, algorithm
    1). Their `rho` follows the learning rate: give a schedule.

    Args:
        rho: As in `SAM`.
        alpha: Float >= 0, the weight of the gap. 0 is SAM.

    References:
        Zhuang, Gong, Yuan, Cui, Adam, Dvornek, Tatikonda, Duncan, Liu,
        "Surrogate Gap Minimization Improves Sharpness-Aware Training", ICLR
        2022, arXiv 2203.08065.
    """

    needs_products = True
    combines = True

    def __init__(self, rho=0.05, alpha=0.4):
        super().__init__(rho)
        self.alpha = _checks.number("alpha", alpha, 0)

    def descent(self, products):
        """`h - alpha (g - c h)` with `c = g.h / ||h||^2`."""
        c = tf.math.divide_no_nan(products.inner, products.perturbed)
        return 1 + self.alpha * c, -self.alpha

    def get_config(self):
        return {**super().get_config(), "alpha": self.alpha}


@_register
class FriendlySAM(SAM):
    """Friendly SAM: climbs by what a batch's gradient has of its own.

    `eps = rho d / ||d||` with `d = g - share m`, where `m` estimates the
    gradient of the whole data: `m <- decay m + (1 - decay) g`, from the raw
    gradients, and the first of them at first. In the first step `d = g`. (Li
    et al. 2024, equation 11, in the order of their code: `d` is made before
    `m` is renewed. With share 1 the other order is the same but for a factor,
    which the norm takes away.)

    `m` is a weight of the model, saved with it, one for all replicas; to
    renew it, gradients are summed over the replicas once more. The logged
    `gradient_norm` is `||d||`.

    Args:
        rho: As in `SAM`.
        decay: Float in [0, 1), of the running mean.
        share: Float in [0, 1], how much of the mean is taken out. 0 is SAM.

    References:
        Li, Zhou, He, Cheng, Huang, "Friendly Sharpness-Aware Minimization",
        CVPR 2024, arXiv 2403.12350.
    """

    keeps = {"mean": False}

    def __init__(self, rho=0.05, decay=0.9, share=1.0):
        super().__init__(rho)
        self.decay = _checks.number("decay", decay, 0, 1, below=True)
        self.share = _checks.number("share", share, 0, 1)

    def ascent(self, gradients, scale, memory):
        """`d = g - share m`, times the scale."""
        return [
            None if g is None else g - self.share * tf.cast(scale, m.dtype) * m
            for g, m in zip(gradients, memory["mean"])
        ]

    def remember(self, memory, plain, perturbed, products, climbed):
        """`m <- decay m + (1 - decay) g`."""
        del perturbed, products, climbed
        return {"mean": _rule.running_mean(memory["mean"], plain, self.decay)}

    def get_config(self):
        own = {"decay": self.decay, "share": self.share}
        return {**super().get_config(), **own}


@_register
class WSAM(SAM):
    """Weighted SAM: the sharpness as a regularizer of a weight of its own.

    The loss is `L(w) + gamma / (1 - gamma) (L(w + eps) - L(w))`, so that
    `g_hat = a h + (1 - a) g` with `a = gamma / (1 - gamma)` (Yue et al. 2023,
    equation 5). This is their coupled form, in which the optimizer sees the
    sum; in the other one the sharpness's part goes past the optimizer, which
    a wrapper that writes no weights of its own does not do.

    Args:
        rho: As in `SAM`.
        gamma: Float in [0, 1). 0 is plain training, 0.5 SAM; above, sharpness
            counts for more than in SAM.

    References:
        Yue, Zhang, Wang, Ye, Xu, "Sharpness-Aware Minimization Revisited:
        Weighted Sharpness as a Regularization Term", KDD 2023, arXiv
        2305.15817.
    """

    combines = True

    def __init__(self, rho=0.05, gamma=0.9):
        super().__init__(rho)
        self.gamma = _checks.number("gamma", gamma, 0, 1, below=True)

    def descent(self, products):
        """`a h + (1 - a) g`."""
        del products
        a = self.gamma / (1 - self.gamma)
        return a, 1 - a

    def get_config(self):
        return {**super().get_config(), "gamma": self.gamma}


@_register
class LookSAM(SAM):
    """LookSAM: climbs in one step of `every`, and remembers what it found.

    A step with a climb is a step of SAM, and keeps `v = h - (g.h / ||g||^2)
    g`, the part of `h` aside of the gradient, which changes slowly. The steps
    between have one pass, and `g_hat = g + alpha ||g|| / ||v|| v` (Liu et al.
    2022, algorithm 1).

    `v` is a weight of the model, saved with it, one for all replicas; to
    renew it, gradients are summed over the replicas once more.

    Example, what kept most for its cost in this library's benchmark:

    >>> import keras
    >>> from keras_lesam import SAMModel, rules
    >>> net = keras.Sequential([keras.layers.Dense(1)])
    >>> rule = rules.LookSAM(rho=0.2, alpha=0.5, every=4)
    >>> model = SAMModel(net, rule, warmup=0.1, anneal=0.2)

    Args:
        rho: As in `SAM`.
        alpha: Float >= 0, the share of `v` in the steps between.
        every: Integer > 0, the steps from one climb to the next. A step costs
            `1 + 1 / every` plain ones, and passes over the weights that count
            where a step takes a few milliseconds only.

    References:
        Liu, Mai, Chen, Hsieh, You, "Towards Efficient and Scalable
        Sharpness-Aware Minimization", CVPR 2022, arXiv 2203.02714.
    """

    keeps = {"aside": True}
    needs_products = True

    def __init__(self, rho=0.05, alpha=0.7, every=5):
        super().__init__(rho)
        self.alpha = _checks.number("alpha", alpha, 0)
        self.every = _checks.integer("every", every, 1)

    def remember(self, memory, plain, perturbed, products, climbed):
        """`v = h - c g` with `c = g.h / ||g||^2`; without a climb as it was."""
        aside = memory["aside"]

        def renewed():
            finite = tf.math.is_finite(products.perturbed)
            c = tf.math.divide_no_nan(products.inner, products.plain)
            return [
                v
                if h is None
                else tf.where(finite, h - tf.cast(c, h.dtype) * g, v)
                for v, h, g in zip(aside, perturbed, plain)
            ]

        return {"aside": tf.cond(climbed, renewed, lambda: aside)}

    def reuse(self, gradients, memory, dtype):
        """`alpha ||g|| / ||v|| v`; nothing before the first climb."""
        aside = memory["aside"]
        ones = [None] * len(aside)
        factor = self.alpha * tf.math.divide_no_nan(
            _rule.slope(gradients, ones, dtype),
            _rule.slope(aside, ones, dtype),
        )
        return [
            None if v is None else tf.cast(factor, v.dtype) * v for v in aside
        ]

    def get_config(self):
        own = {"alpha": self.alpha, "every": self.every}
        return {**super().get_config(), **own}
