"""The CTC loss in terms that can be differentiated as often as one likes.

The forward recursion of Graves et al. (2006), "Connectionist temporal
classification", over the labels with a blank before, between and after them.
"""

import tensorflow as tf

# Stands for log 0: infinities would leave nan in the derivatives.
_LOG_ZERO = -1e30


def ctc_loss(
    labels: tf.Tensor,
    logits: tf.Tensor,
    label_length: tf.Tensor,
    logit_length: tf.Tensor,
    blank_index: int,
) -> tf.Tensor:
    """Return the negative log-likelihoods, a tensor of shape `(batch,)`.

    Args:
        labels: Integers of shape `(batch, labels)`.
        logits: Floats of shape `(frames, batch, classes)`.
        label_length: Integers of shape `(batch,)`.
        logit_length: Integers of shape `(batch,)`.
        blank_index: The class that stands for no label, not negative.
    """
    states, may_skip = _states(labels, label_length, blank_index)
    classes = tf.shape(logits)[2]
    emissions = tf.einsum(
        "tbc,bsc->tbs",
        tf.nn.log_softmax(logits),
        tf.one_hot(states, classes, dtype=logits.dtype),
    )
    position = tf.range(tf.shape(states)[1])[None]

    def advance(alpha: tf.Tensor, frame: tuple[tf.Tensor, ...]) -> tf.Tensor:
        emission, time = frame
        skipped = tf.where(may_skip, _shift(alpha, 2), _log_zero(alpha))
        arrived = tf.stack([alpha, _shift(alpha, 1), skipped])
        ahead = tf.reduce_logsumexp(arrived, 0) + emission
        return tf.where((time < logit_length)[:, None], ahead, alpha)

    first = tf.where(position < 2, emissions[0], _log_zero(emissions[0]))
    times = tf.range(1, tf.shape(logits)[0], dtype=logit_length.dtype)
    alpha = tf.foldl(advance, (emissions[1:], times), first)
    end = 2 * tf.cast(label_length, position.dtype)[:, None]
    is_end = (position == end) | (position == end - 1)
    return -tf.reduce_logsumexp(tf.where(is_end, alpha, _log_zero(alpha)), 1)


def _states(
    labels: tf.Tensor, label_length: tf.Tensor, blank_index: int
) -> tuple[tf.Tensor, tf.Tensor]:
    """Return labels between blanks, and where the blank before may be left out.

    Both are of shape `(batch, 2 labels + 1)`.
    """
    within = tf.sequence_mask(label_length, tf.shape(labels)[1])
    blank = tf.constant(blank_index, labels.dtype)
    labels = tf.where(within, labels, blank)
    pairs = tf.stack([tf.fill(tf.shape(labels), blank), labels], 2)
    pairs = tf.reshape(pairs, [tf.shape(labels)[0], -1])
    states = tf.pad(pairs, [[0, 0], [0, 1]], constant_values=blank)
    two_before = tf.pad(states, [[0, 0], [2, 0]], constant_values=blank)
    two_before = two_before[:, :-2]
    return states, (states != blank) & (states != two_before)


def _shift(alpha: tf.Tensor, by: int) -> tf.Tensor:
    """Move scores to later states; the first ones cannot be reached."""
    padded = tf.pad(alpha, [[0, 0], [by, 0]], constant_values=_LOG_ZERO)
    return padded[:, :-by]


def _log_zero(like: tf.Tensor) -> tf.Tensor:
    return tf.fill(tf.shape(like), tf.constant(_LOG_ZERO, like.dtype))
