"""Targets of fine-tuning: one a kind of answer; the contract is in targets.py."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from bert_jax.metrics import Mean
from bert_jax.model.encoders import Encoded
from bert_jax.model.layers import Dense, Dropout, cross_entropy

Batch = dict[str, jax.Array]


def _logits(head: nn.Module, x: jax.Array, width: int, train: bool) -> jax.Array:
    """Dropout and a dense layer, within a head's compact method: x [..., D] -> float32 [..., width]."""
    x = Dropout(head.dropout_rate)(x, train=train)
    return Dense(width, head.dtype, name='dense')(x).astype(jnp.float32)


def _pooled(encoded: Encoded) -> jax.Array:
    """[B, E, D] -> [B E, D]: each example's [CLS], with several in a row too."""
    return encoded.pooled.reshape(-1, encoded.pooled.shape[-1])


class Classification(nn.Module):
    """One label an example, from the pooled [CLS] (Devlin et al. 2019, 4.1).

    Attributes:
      num_classes: C.
      dropout_rate: on the pooled vector.
      dtype: what is computed in.
    """

    num_classes: int
    dropout_rate: float
    dtype: jnp.dtype = jnp.float32
    uses_pooled = True

    @nn.compact
    def outputs(self, encoded: Encoded, batch: Batch, table: jax.Array, *, train: bool) -> Batch:
        """pooled [B, E, D] -> logits float32 [B E, C]."""
        return {'logits': _logits(self, _pooled(encoded), self.num_classes, train)}

    def losses(self, outputs: Batch, batch: Batch) -> dict[str, Mean]:
        """Cross-entropy in nats and accuracy over the real examples."""
        return cross_entropy(outputs['logits'], batch['label_ids'], batch['is_real_example'])

    def count(self, batch: Batch) -> jax.Array:
        """Real examples."""
        return jnp.sum(batch['is_real_example'].astype(jnp.float32))


class MultiLabel(nn.Module):
    """Any number of labels an example, each a yes or no of its own, from the pooled [CLS].

    Attributes:
      num_classes: C.
      dropout_rate: on the pooled vector.
      dtype: what is computed in.
    """

    num_classes: int
    dropout_rate: float
    dtype: jnp.dtype = jnp.float32
    uses_pooled = True

    @nn.compact
    def outputs(self, encoded: Encoded, batch: Batch, table: jax.Array, *, train: bool) -> Batch:
        """pooled [B, E, D] -> logits float32 [B E, C]."""
        return {'logits': _logits(self, _pooled(encoded), self.num_classes, train)}

    def losses(self, outputs: Batch, batch: Batch) -> dict[str, Mean]:
        """Binary cross-entropy in nats, the mean over the labels; label_ids [B, C], 0 or 1."""
        logits, labels = outputs['logits'], batch['label_ids']
        nll = jax.nn.softplus(logits) - labels * logits
        return {'loss': Mean.of(nll.mean(-1), batch['is_real_example'])}

    count = Classification.count


class Regression(nn.Module):
    """A number an example, from the pooled [CLS] (STS-B in Devlin et al. 2019, appendix B.1).

    Attributes:
      dropout_rate: on the pooled vector.
      dtype: what is computed in.
    """

    dropout_rate: float
    dtype: jnp.dtype = jnp.float32
    uses_pooled = True

    @nn.compact
    def outputs(self, encoded: Encoded, batch: Batch, table: jax.Array, *, train: bool) -> Batch:
        """pooled [B, E, D] -> logits float32 [B E], the number itself."""
        return {'logits': _logits(self, _pooled(encoded), 1, train)[:, 0]}

    def losses(self, outputs: Batch, batch: Batch) -> dict[str, Mean]:
        """Squared error; label_ids [B]."""
        return {'loss': Mean.of((outputs['logits'] - batch['label_ids']) ** 2, batch['is_real_example'])}

    count = Classification.count


class Tagging(nn.Module):
    """One label a token (Devlin et al. 2019, 5.3).

    Attributes:
      num_classes: C.
      dropout_rate: on the hidden vectors.
      dtype: what is computed in.
    """

    num_classes: int
    dropout_rate: float
    dtype: jnp.dtype = jnp.float32
    uses_pooled = False

    @nn.compact
    def outputs(self, encoded: Encoded, batch: Batch, table: jax.Array, *, train: bool) -> Batch:
        """hidden [B, L, D] -> logits float32 [B, L, C]."""
        return {'logits': _logits(self, encoded.hidden, self.num_classes, train)}

    def losses(self, outputs: Batch, batch: Batch) -> dict[str, Mean]:
        """Cross-entropy in nats and accuracy over the tokens with a label; label_ids [B, L], -1 for none."""
        labels = batch['label_ids']
        return cross_entropy(outputs['logits'], jnp.maximum(labels, 0), labels >= 0)

    def count(self, batch: Batch) -> jax.Array:
        """Tokens with a label."""
        return jnp.sum((batch['label_ids'] >= 0).astype(jnp.float32))


class Span(nn.Module):
    """Where an answer starts and ends (Devlin et al. 2019, 4.2)."""

    dtype: jnp.dtype = jnp.float32
    uses_pooled = False

    @nn.compact
    def outputs(self, encoded: Encoded, batch: Batch, table: jax.Array, *, train: bool) -> Batch:
        """hidden [B, L, D] -> start_logits, end_logits float32 [B, L], -1e9 at padding."""
        logits = Dense(2, self.dtype, name='dense')(encoded.hidden).astype(jnp.float32)
        logits = jnp.where(batch['input_mask'][..., None] > 0, logits, -1e9)
        return {'start_logits': logits[..., 0], 'end_logits': logits[..., 1]}

    def losses(self, outputs: Batch, batch: Batch) -> dict[str, Mean]:
        """Mean cross-entropy of start and end in nats, and how often both are right."""
        weights = batch['is_real_example']
        start = cross_entropy(outputs['start_logits'], batch['start_positions'], weights)['loss']
        end = cross_entropy(outputs['end_logits'], batch['end_positions'], weights)['loss']
        right = [jnp.argmax(outputs[f'{side}_logits'], -1) == batch[f'{side}_positions'] for side in ('start', 'end')]
        return {'loss': Mean((start.total + end.total) / 2, start.count),
                'exact': Mean.of(right[0] & right[1], weights)}

    count = Classification.count


class MultipleChoice(nn.Module):
    """The best of several continuations (Devlin et al. 2019, 4.4): a score for each, softmax over the choices.

    The rows of a batch are the choices, those of one question together. A question with fewer than
    num_choices has rows of padding, where is_real_example is 0; label_ids [B] is 1 at the right choice.

    Attributes:
      num_choices: C, the most of any question.
      dropout_rate: on the pooled vector.
      dtype: what is computed in.
    """

    num_choices: int
    dropout_rate: float
    dtype: jnp.dtype = jnp.float32
    uses_pooled = True

    @nn.compact
    def outputs(self, encoded: Encoded, batch: Batch, table: jax.Array, *, train: bool) -> Batch:
        """pooled [B, E, D] -> logits float32 [B E / C, C], -1e9 where there is no choice."""
        scores = _logits(self, _pooled(encoded), 1, train)[:, 0]
        scores = jnp.where(batch['is_real_example'] > 0, scores, -1e9)
        return {'logits': scores.reshape(-1, self.num_choices)}

    def losses(self, outputs: Batch, batch: Batch) -> dict[str, Mean]:
        """Cross-entropy in nats and accuracy over the questions."""
        right = (batch['label_ids'] * batch['is_real_example']).reshape(-1, self.num_choices)
        return cross_entropy(outputs['logits'], jnp.argmax(right, -1), jnp.max(right, -1))

    def count(self, batch: Batch) -> jax.Array:
        """Questions."""
        return jnp.sum((batch['label_ids'] * batch['is_real_example']).astype(jnp.float32))


def _lstm_cell(gates: jax.Array, hidden: jax.Array, cell: jax.Array, real: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(hidden, cell) after a token from those before it; both stay where the token is padding (real [B, 1])."""
    write, keep, new, read = jnp.split(gates, 4, -1)
    after = jnp.where(real, jax.nn.sigmoid(keep) * cell + jax.nn.sigmoid(write) * jnp.tanh(new), cell)
    return jnp.where(real, jax.nn.sigmoid(read) * jnp.tanh(after), hidden), after


@jax.custom_vjp
def _lstm(inputs: jax.Array, recurrent: jax.Array, real: jax.Array) -> jax.Array:
    """inputs [L, B, 4 H], recurrent [H, 4 H], real bool [L, B, 1] -> hidden [L, B, H].

    With a gradient of its own: that of `recurrent` is one product over all tokens instead of a sum that is read and
    written at each of them.
    """
    return _lstm_forward(inputs, recurrent, real)[0]


def _lstm_forward(inputs: jax.Array, recurrent: jax.Array, real: jax.Array) -> tuple[jax.Array, tuple]:
    def step(before: tuple, now: tuple) -> tuple:
        from_input, is_real = now
        gates = from_input + before[0] @ recurrent
        after = _lstm_cell(gates, *before, is_real)
        return after, (after[0], gates, *before)

    start = jnp.zeros((inputs.shape[1], recurrent.shape[0]), inputs.dtype)
    _, (hidden, *kept) = jax.lax.scan(step, (start, start), (inputs, real))
    return hidden, (recurrent, real, *kept)


def _lstm_backward(kept: tuple, d_hidden: jax.Array) -> tuple:
    recurrent, real, gates, hidden, cell = kept
    back = jax.lax.optimization_barrier(recurrent.T)  # as an array of its own: 6 times as fast a product on CPU

    def step(d_after: tuple, now: tuple) -> tuple:
        d_out, is_real, *before = now
        _, pull = jax.vjp(lambda *x: _lstm_cell(*x, is_real), *before)
        d_gates, d_hidden, d_cell = pull((d_after[0] + d_out, d_after[1]))
        return (d_hidden + d_gates @ back, d_cell), d_gates

    end = jnp.zeros_like(hidden[0])
    _, d_gates = jax.lax.scan(step, (end, end), (d_hidden, real, gates, hidden, cell), reverse=True)
    return d_gates, jnp.einsum('lbh,lbg->hg', hidden, d_gates), None


_lstm.defvjp(_lstm_forward, _lstm_backward)


class Lstm(nn.Module):
    """One direction of an LSTM (Hochreiter and Schmidhuber 1997), gates in PyTorch's order, padding at the end.

    All tokens' inputs are multiplied at once, not token by token as in flax's nn.RNN.
    """

    hidden_size: int
    reverse: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, real: jax.Array) -> jax.Array:
        """x [B, L, D], real bool [B, L] -> [B, L, hidden_size]."""
        inputs = nn.Dense(4 * self.hidden_size, dtype=self.dtype, name='inputs')(x)
        recurrent = self.param('recurrent', nn.initializers.orthogonal(), (self.hidden_size, 4 * self.hidden_size))
        order = slice(None, None, -1 if self.reverse else 1)
        hidden = _lstm(inputs.swapaxes(0, 1)[order], recurrent.astype(self.dtype), real.T[order, :, None])
        return hidden[order].swapaxes(0, 1)


class BiLstmTagging(nn.Module):
    """One label a token from frozen activations, by a two-layer BiLSTM (Devlin et al. 2019, 5.3 and table 7).

    Needs the encoder's layer_outputs to hold 'hidden'.

    Attributes:
      num_classes: C.
      features: which activations: 'embeddings', 'second_to_last', 'last', 'sum_last4' and 'sum_all' (a learned
        weighted sum, softmax weights times a scale, as in Peters et al. 2018), 'concat_last4'.
      hidden_size: of each direction of the LSTM.
      dropout_rate: on the activations and between the layers.
      dtype: what is computed in.
    """

    num_classes: int
    features: str
    hidden_size: int
    dropout_rate: float
    dtype: jnp.dtype = jnp.float32
    uses_pooled = False

    @nn.compact
    def outputs(self, encoded: Encoded, batch: Batch, table: jax.Array, *, train: bool) -> Batch:
        """layers['hidden'] [N + 1, B, L, D] -> logits float32 [B, L, C]."""
        x = self._features(encoded.layers['hidden'])
        for layer in range(2):
            x = Dropout(self.dropout_rate)(x, train=train)
            sides = [Lstm(self.hidden_size, reverse, self.dtype, name=f'{side}_{layer}')
                     for side, reverse in (('forward', False), ('backward', True))]
            x = jnp.concatenate([side(x, batch['input_mask'] > 0) for side in sides], -1)
        return {'logits': _logits(self, x, self.num_classes, train)}

    def _features(self, hidden: jax.Array) -> jax.Array:
        if self.features in ('embeddings', 'second_to_last', 'last'):
            return hidden[{'embeddings': 0, 'second_to_last': -2, 'last': -1}[self.features]]
        if self.features == 'concat_last4':
            return jnp.concatenate(list(hidden[-4:]), -1)
        hidden = {'sum_last4': hidden[-4:], 'sum_all': hidden[1:]}[self.features]
        weights = jax.nn.softmax(self.param('mix', nn.initializers.zeros, hidden.shape[:1]))
        return jnp.einsum('n,nblw->blw', weights, hidden) * self.param('scale', nn.initializers.ones, ())

    losses, count = Tagging.losses, Tagging.count


HEADS = {'classification': Classification, 'multilabel': MultiLabel, 'regression': Regression, 'tagging': Tagging,
         'bilstm_tagging': BiLstmTagging, 'span': Span, 'multiple_choice': MultipleChoice}
