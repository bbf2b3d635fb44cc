"""One run: from a task, method, setting and seed to a line of results."""

import functools
import math
import statistics
import time

import _common
import _methods
import keras
import numpy as np
import tensorflow as tf

from keras_lesam import callbacks

# Rows of the training data for curvature and sharpness, and the distance along
# the gradient at which the rise of the loss is measured.
SAMPLE = 500
DISTANCE = 0.1
# Length of a block of plain training where costs are compared.
BLOCK_SECONDS = 0.4
# Batches are so many times as large there: steps of at least 20 ms.
LARGER = 8


class Bench:
    """Trains on one task; models are built once and reused.

    New weights, data, learning rates, and values of rho or sigma do not trace
    a new graph.

    Args:
        task: A `_tasks.Task`.
    """

    def __init__(self, task):
        keras.utils.clear_session()
        self.task = task
        self.steps = len(task.data(0).x) // task.batch_size
        self._models = {}

    def run(self, method, setting, base, seed, closely=False, curvature=False):
        """Train once; return the results as a dict.

        Args:
            method: A `_methods.Method`.
            setting: Dict, one of its settings.
            base: Dict, learning rate and weight decay.
            seed: Integer, for split, wrong labels, initial weights, order.
            closely: Whether to find the best epoch, too, by validation data,
                and the accuracy of each class.
            curvature: Whether to measure the top eigenvalue.
        """
        data = self._data(seed)
        net, model = self._model(method, setting, base)
        self._reset(net, model, seed)
        if method.budget:
            setattr(model, method.budget, setting[method.budget])
        watch = _common.Stopwatch()
        epochs = EachEpoch(self._measure(net), data) if closely else None
        start = time.perf_counter()
        history = model.fit(
            self._batches(data, seed),
            epochs=self.task.epochs,
            verbose=0,
            callbacks=[
                self._rate(base, method.constant),
                watch,
                *filter(None, [epochs]),
            ],
        ).history
        test = self._accuracy(net, *data.test)
        return {
            "test": test,
            "validation": self._accuracy(net, *data.validation),
            **(epochs.best() | self._by_class(net, data) if epochs else {}),
            "train": round(history["accuracy"][-1], 4),
            "loss": round(history["loss"][-1], 5),
            # Little better than chance.
            "died": test < 1.5 / _common.CLASSES,
            **self._look_around(net, seed, data, curvature),
            **{
                name: [round(v, 5) for v in history[name]]
                for name in ("rho", "sharpness", "sigma", "gradient_norm")
                if name in history
            },
            "epoch_seconds": round(float(np.median(watch.seconds)), 4),
            "seconds": round(time.perf_counter() - start, 2),
        }

    def cost(self, method, setting, base, pairs):
        """Measure the ratios of training time to plain training, in pairs.

        In larger batches than it trains with: what a step takes beside its
        passes would drown the rest in steps of 3 ms. Where all epochs cost the
        same, of the median epoch, since other load on the computer easily
        delays small steps.
        """
        plain = self._model(_methods.plain(self.task.adam), base, base)[1]
        model = self._model(method, setting, base)[1]
        # The first epoch of each includes tracing.
        seconds = self._seconds(plain, 2)[1]
        self._seconds(model, 1)
        epochs, of_block = self.task.epochs, math.fsum
        if method.is_steady:
            # The first epoch of a block is left out.
            epochs = min(epochs, 1 + math.ceil(BLOCK_SECONDS / seconds))
            of_block = _median_of_later

        def block(model):
            return of_block(self._seconds(model, epochs))

        return [round(_ratio(block, plain, model, i), 3) for i in range(pairs)]

    def _seconds(self, model, epochs):
        """Measure the seconds of each epoch."""
        watch = _common.Stopwatch()
        data = self._data(0)
        rows = np.arange(len(data.x) * LARGER) % len(data.x)
        data = data._replace(x=data.x[rows], y=data.y[rows])
        size = self.task.batch_size * LARGER
        batches = self._batches(data, 0, size)
        model.fit(batches, epochs=epochs, verbose=0, callbacks=[watch])
        return watch.seconds

    @functools.cache  # noqa: B019, as long as the bench
    def _data(self, seed):
        return self.task.data(seed)

    def _batches(self, data, seed, size=None):
        pictures = (
            tf.data.Dataset.from_tensor_slices((data.x, data.y))
            .cache()
            .shuffle(len(data.x), seed=seed)
        )
        if self.task.augment:
            seeds = tf.data.Dataset.random(
                seed, rerandomize_each_iteration=True
            ).batch(4, drop_remainder=True)
            pictures = tf.data.Dataset.zip(pictures, seeds).map(
                lambda pair, seed: (_augment(pair[0], seed), pair[1])
            )
        size = size or self.task.batch_size
        return pictures.batch(size, drop_remainder=True).prefetch(4)

    def _model(self, method, setting, base):
        """Return the net and the compiled model that trains it."""
        fixed = {k: v for k, v in setting.items() if k != method.budget}
        if method.name == _methods.PLAIN:
            fixed = {}
        if method.smoothing:
            fixed = {method.smoothing: setting[method.smoothing]}
        key = (method.name, *fixed.items(), base["weight_decay"])
        if key not in self._models:
            net = self._net()
            model = method.wrap(net, setting)
            kind = keras.optimizers.SGD
            options = {"momentum": 0.9}
            if self.task.adam:
                kind, options = keras.optimizers.AdamW, {}
            decay = base["weight_decay"] or None
            model.compile(
                kind(base["learning_rate"], weight_decay=decay, **options),
                _loss(setting.get(method.smoothing, 0.0)),
                metrics=["accuracy"],
                steps_per_execution=self.steps,
            )
            self._models[key] = net, model
        return self._models[key]

    def _net(self):
        return self.task.build(self._data(0).x.shape[1:])

    def _reset(self, net, model, seed):
        """Reset to new initial weights, and all other state to zeros."""
        keras.utils.set_random_seed(seed)
        _common.restart(model, net, self._net().get_weights())

    def _rate(self, base, constant=0.0):
        """Make the callback of a cosine learning rate, epoch by epoch."""

        def rate(epoch):
            done = epoch / self.task.epochs
            done = max(0.0, done - constant) / (1 - constant)
            return base["learning_rate"] * 0.5 * (1 + math.cos(math.pi * done))

        return keras.callbacks.LearningRateScheduler(rate)

    def _accuracy(self, net, x, y):
        outputs = net.predict(x, batch_size=500, verbose=0)
        return round(float(np.mean(np.argmax(outputs, -1) == y)), 4)

    @functools.cache  # noqa: B019, as long as the bench
    def _measure(self, net):
        """Make the compiled function of pictures and labels: the accuracy."""

        @tf.function
        def measure(x, y):
            found = tf.argmax(net(x, training=False), -1)
            return tf.reduce_mean(tf.cast(found == y, "float32"))

        return measure

    def _by_class(self, net, data):
        """Measure the test accuracy of each class, where some are rare."""
        if self.task.imbalance == 1:
            return {}
        x, y = data.test
        found = np.argmax(net.predict(x, batch_size=500, verbose=0), -1)
        rates = [np.mean(found[y == c] == c) for c in range(_common.CLASSES)]
        return {"by_class": [round(float(rate), 4) for rate in rates]}

    def _look_around(self, net, seed, data, curvature):
        probe = self._probe
        probe.set_weights(net.get_weights())
        x, y = data.x[:SAMPLE], data.y[:SAMPLE]
        rise = self._rise(tf.constant(x), tf.constant(y))
        found = {"rise": round(float(rise), 5)}
        if curvature:
            logs = {}
            self._watch(seed).on_epoch_end(0, logs)
            found["eigenvalue"] = round(float(logs["top_eigenvalue"]), 3)
        return found

    @functools.cached_property
    def _probe(self):
        """The one net whose curvature and rise are measured."""
        probe = self._net()
        probe.compile(loss=_loss())
        return probe

    @functools.cached_property
    def _rise(self):
        """Function of the rise of the loss at `DISTANCE` along its gradient."""
        state = self._probe.non_trainable_variables
        loss = _loss()

        def at(weights, x, y):
            outputs, _ = self._probe.stateless_call(weights, state, x)
            return loss(y, outputs)

        @tf.function
        def rise(x, y):
            weights = [v.value for v in self._probe.trainable_variables]
            weights = [tf.convert_to_tensor(w) for w in weights]
            with tf.GradientTape() as tape:
                tape.watch(weights)
                here = at(weights, x, y)
            gradients = tape.gradient(here, weights)
            length = DISTANCE / tf.maximum(
                tf.linalg.global_norm(gradients), 1e-12
            )
            moved = [w + length * g for w, g in zip(weights, gradients)]
            return at(moved, x, y) - here

        return rise

    @functools.cache  # noqa: B019, as long as the bench
    def _watch(self, seed):
        """Make the callback that measures the Hessian of the probe."""
        data = self._data(seed)
        watch = callbacks.Curvature(
            *(data.x[:SAMPLE], data.y[:SAMPLE]),
            batch_size=SAMPLE,
            trace_samples=0,
        )
        watch.set_model(self._probe)
        watch.set_params({"epochs": 1})
        watch.on_train_begin()
        return watch


def _augment(picture, seeds):
    """Shift a picture by up to 4 pixels, and mirror it one time in two."""
    side = picture.shape[0] + 8
    padded = tf.image.resize_with_crop_or_pad(picture, side, side)
    window = tf.image.stateless_random_crop(padded, picture.shape, seeds[:2])
    return tf.image.stateless_random_flip_left_right(window, seeds[2:])


class EachEpoch(keras.callbacks.Callback):
    """Accuracies on validation and test data after each epoch.

    Args:
        measure: Callable from pictures and labels to the accuracy.
        data: A `_tasks.Data`.
    """

    def __init__(self, measure, data):
        super().__init__()
        self._measure = measure
        self._parts = [
            (tf.constant(x), tf.constant(y, tf.int64))
            for x, y in (data.validation, data.test)
        ]
        self._accuracies = []

    def on_epoch_end(self, epoch, logs=None):
        self._accuracies.append([float(self._measure(*p)) for p in self._parts])

    def best(self):
        """Return the first of the epochs of the best validation accuracy."""
        epoch = int(np.argmax([a[0] for a in self._accuracies]))
        test = round(self._accuracies[epoch][1], 4)
        return {"best_epoch": epoch + 1, "best_test": test}


def _ratio(block, plain, model, i):
    """Measure the ratio of a block to a plain one; the order alternates."""
    if i % 2:
        after = block(model)
        return after / block(plain)
    before = block(plain)
    return block(model) / before


def _median_of_later(seconds):
    return statistics.median(seconds[1:])


def _loss(smoothing=0.0):
    if not smoothing:
        return keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    def smoothed(y, outputs):
        y = keras.ops.one_hot(keras.ops.reshape(y, (-1,)), _common.CLASSES)
        return keras.losses.categorical_crossentropy(
            y, outputs, from_logits=True, label_smoothing=smoothing
        )

    return smoothed
