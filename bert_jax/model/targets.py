"""Encoded + labels -> loss and metric terms.

The contract of a target, a Linen module:

    uses_pooled: bool                                 whether it reads Encoded.pooled
    outputs(encoded, batch, table, *, train)          -> dict of arrays: what prediction and evaluation read
    losses(outputs, batch)                            -> {'loss': Mean, '<metric>': Mean, ...}
    count(batch)                                      -> the loss's count, from the labels alone

docs/new_target.md adds one from the data side to the config.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from bert_jax.metrics import Mean
from bert_jax.model.encoders import Encoded
from bert_jax.model.layers import ACTIVATIONS, Dense, Dropout, LayerNorm, gather

Batch = dict[str, jax.Array]


class MaskedLM(nn.Module):
    """Predicts the masked tokens (Devlin et al. 2019, 3.1): dense, activation, norm, tied table, bias.

    Attributes:
      vocab_size: V, unpadded; ids beyond it can never be predicted.
      activation: an ACTIVATIONS name.
      dtype: what is computed in; logits and loss are float32.
    """

    vocab_size: int
    activation: str
    dtype: jnp.dtype = jnp.float32
    uses_pooled = False

    @nn.compact
    def outputs(self, encoded: Encoded, batch: Batch, table: jax.Array, *, train: bool) -> Batch:
        """masked_lm_positions [B, P] -> logits float32 [B, P, V padded]."""
        x = gather(encoded.hidden, batch['masked_lm_positions'])           # [B, P, D]
        x = Dense((x.shape[-1],), self.dtype, name='dense')(x)
        x = LayerNorm(self.dtype, name='norm')(ACTIVATIONS[self.activation](x))
        bias = self.param('bias', nn.initializers.zeros, (table.shape[0],))
        bias = jnp.where(jnp.arange(table.shape[0]) < self.vocab_size, bias, -1e9)
        logits = jax.lax.dot_general(x.reshape(-1, x.shape[-1]), table.astype(self.dtype), (((1,), (1,)), ((), ())),
                                     preferred_element_type=jnp.float32)   # [B * P, V padded]
        logits = (logits + bias).reshape(*x.shape[:2], -1)
        return {'logits': nn.with_logical_constraint(logits, ('batch', 'predictions', 'vocab'))}

    def losses(self, outputs: Batch, batch: Batch) -> dict[str, Mean]:
        """Cross-entropy in nats and accuracy over the masked places."""
        return _cross_entropy(outputs['logits'], batch['masked_lm_ids'], batch['masked_lm_weights'])

    def count(self, batch: Batch) -> jax.Array:
        """Masked places."""
        return jnp.sum(batch['masked_lm_weights'])


class NextSentence(nn.Module):
    """Predicts whether B follows A (label 0) or is random (label 1) (Devlin et al. 2019, 3.1)."""

    dtype: jnp.dtype = jnp.float32
    uses_pooled = True

    @nn.compact
    def outputs(self, encoded: Encoded, batch: Batch, table: jax.Array, *, train: bool) -> Batch:
        """pooled [B, E, D] -> logits float32 [B, E, 2]."""
        logits = Dense((2,), self.dtype, name='dense')(encoded.pooled)
        return {'logits': logits.astype(jnp.float32)}

    def losses(self, outputs: Batch, batch: Batch) -> dict[str, Mean]:
        """Cross-entropy in nats and accuracy over the pairs."""
        return _cross_entropy(outputs['logits'], batch['next_sentence_labels'], batch['next_sentence_weights'])

    def count(self, batch: Batch) -> jax.Array:
        """Pairs."""
        return jnp.sum(batch['next_sentence_weights'])


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
        """pooled [B, 1, D] -> logits float32 [B, C]."""
        x = Dropout(self.dropout_rate)(encoded.pooled[:, 0], train=train)
        logits = Dense((self.num_classes,), self.dtype, name='dense')(x)
        return {'logits': logits.astype(jnp.float32)}

    def losses(self, outputs: Batch, batch: Batch) -> dict[str, Mean]:
        """Cross-entropy in nats and accuracy over the real examples."""
        return _cross_entropy(outputs['logits'], batch['label_ids'], batch['is_real_example'])

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
        """pooled [B, 1, D] -> logits float32 [B, C]."""
        x = Dropout(self.dropout_rate)(encoded.pooled[:, 0], train=train)
        return {'logits': Dense((self.num_classes,), self.dtype, name='dense')(x).astype(jnp.float32)}

    def losses(self, outputs: Batch, batch: Batch) -> dict[str, Mean]:
        """Binary cross-entropy in nats, the mean over the labels; label_ids [B, C], 0 or 1."""
        logits, labels = outputs['logits'], batch['label_ids']
        nll = jax.nn.softplus(logits) - labels * logits
        return {'loss': Mean.of(nll.mean(-1), batch['is_real_example'])}

    def count(self, batch: Batch) -> jax.Array:
        """Real examples."""
        return jnp.sum(batch['is_real_example'].astype(jnp.float32))


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
        """pooled [B, 1, D] -> logits float32 [B], the number itself."""
        x = Dropout(self.dropout_rate)(encoded.pooled[:, 0], train=train)
        return {'logits': Dense((1,), self.dtype, name='dense')(x)[:, 0].astype(jnp.float32)}

    def losses(self, outputs: Batch, batch: Batch) -> dict[str, Mean]:
        """Squared error; label_ids [B]."""
        return {'loss': Mean.of((outputs['logits'] - batch['label_ids']) ** 2, batch['is_real_example'])}

    def count(self, batch: Batch) -> jax.Array:
        """Real examples."""
        return jnp.sum(batch['is_real_example'].astype(jnp.float32))


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
        x = Dropout(self.dropout_rate)(encoded.hidden, train=train)
        return {'logits': Dense((self.num_classes,), self.dtype, name='dense')(x).astype(jnp.float32)}

    def losses(self, outputs: Batch, batch: Batch) -> dict[str, Mean]:
        """Cross-entropy in nats and accuracy over the tokens with a label; label_ids [B, L], -1 for none."""
        labels = batch['label_ids']
        return _cross_entropy(outputs['logits'], jnp.maximum(labels, 0), labels >= 0)

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
        logits = Dense((2,), self.dtype, name='dense')(encoded.hidden).astype(jnp.float32)
        logits = jnp.where(batch['input_mask'][..., None] > 0, logits, -1e9)
        return {'start_logits': logits[..., 0], 'end_logits': logits[..., 1]}

    def losses(self, outputs: Batch, batch: Batch) -> dict[str, Mean]:
        """Mean cross-entropy of start and end in nats, and how often both are right."""
        weights = batch['is_real_example']
        start = _cross_entropy(outputs['start_logits'], batch['start_positions'], weights)['loss']
        end = _cross_entropy(outputs['end_logits'], batch['end_positions'], weights)['loss']
        right = [jnp.argmax(outputs[f'{side}_logits'], -1) == batch[f'{side}_positions'] for side in ('start', 'end')]
        return {'loss': Mean((start.total + end.total) / 2, start.count),
                'exact': Mean.of(right[0] & right[1], weights)}

    def count(self, batch: Batch) -> jax.Array:
        """Real examples."""
        return jnp.sum(batch['is_real_example'].astype(jnp.float32))


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
        """pooled [B, 1, D] -> logits float32 [B / C, C], -1e9 where there is no choice."""
        x = Dropout(self.dropout_rate)(encoded.pooled[:, 0], train=train)
        scores = Dense((1,), self.dtype, name='dense')(x)[:, 0].astype(jnp.float32)
        scores = jnp.where(batch['is_real_example'] > 0, scores, -1e9)
        return {'logits': scores.reshape(-1, self.num_choices)}

    def losses(self, outputs: Batch, batch: Batch) -> dict[str, Mean]:
        """Cross-entropy in nats and accuracy over the questions."""
        right = (batch['label_ids'] * batch['is_real_example']).reshape(-1, self.num_choices)
        return _cross_entropy(outputs['logits'], jnp.argmax(right, -1), jnp.max(right, -1))

    def count(self, batch: Batch) -> jax.Array:
        """Questions."""
        return jnp.sum((batch['label_ids'] * batch['is_real_example']).astype(jnp.float32))


def _cross_entropy(logits: jax.Array, labels: jax.Array, weights: jax.Array) -> dict[str, Mean]:
    """logits [..., C], labels and weights [...]."""
    right = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    best = jnp.max(logits, axis=-1)
    nll = jax.nn.logsumexp(logits, axis=-1) - right
    return {'loss': Mean.of(nll, weights), 'accuracy': Mean.of(right >= best, weights)}


TARGETS = {'mlm': MaskedLM, 'nsp': NextSentence, 'classification': Classification, 'multilabel': MultiLabel,
           'regression': Regression, 'tagging': Tagging, 'span': Span, 'multiple_choice': MultipleChoice}
