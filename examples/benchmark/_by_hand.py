"""SAM as most people would write it for Keras: what there is to compare with.

It moves the weights, puts them back by a subtraction, updates the statistics of
batch normalization twice, and draws other random numbers in the second pass.
"""

import keras
import tensorflow as tf


class HandWrittenSAM(keras.Model):
    def __init__(self, model, rho=0.05):
        super().__init__()
        self.model = model
        self.rho = rho

    def call(self, x, training=None):
        return self.model(x, training=training)

    def train_step(self, data):
        x, y = data
        weights = self.trainable_variables
        loss, outputs, gradients = self.gradients(x, y)
        scale = self.rho / (tf.linalg.global_norm(gradients) + 1e-12)
        eps = [scale * gradient for gradient in gradients]
        for weight, e in zip(weights, eps):
            weight.assign_add(e)
        *_, gradients = self.gradients(x, y)
        for weight, e in zip(weights, eps):
            weight.assign_sub(e)
        self.optimizer.apply_gradients(zip(gradients, weights))
        for metric in self.metrics:
            metric.update_state(
                *((loss,) if metric.name == "loss" else (y, outputs))
            )
        return {metric.name: metric.result() for metric in self.metrics}

    def gradients(self, x, y):
        with tf.GradientTape() as tape:
            outputs = self(x, training=True)
            loss = self.compute_loss(x=x, y=y, y_pred=outputs)
        return loss, outputs, tape.gradient(loss, self.trainable_variables)
