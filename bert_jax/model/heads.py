"""Targets of fine-tuning: one a kind of answer; the contract is in targets.py.

Their losses follow from their outputs: terms(outputs, batch) -> {'loss': Mean, ...}, so that evaluation computes both
at once.
"""

import math
from collections.abc import Mapping
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from bert_jax.cli import choose
from bert_jax.metrics import Mean, cross_entropy
from bert_jax.model.layers import Dense, Dropout, Lstm
from bert_jax.model.parts import Batch, Encoded, Read, of_outputs


def too_little(target: nn.Module, input_size: int, embeddings: nn.Module, contents: Mapping[str, float]) -> float:
    """`flops` of a target that has few products compared with the encoder's: not counted."""
    return 0.0


RATE = {'dropout_rate': (0, 0.99)}
CLASSES = {'num_classes': (1, math.inf)} | RATE


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
    reads = ('pooled',)
    sees = 'both'
    losses = of_outputs
    flops = too_little

    RANGES: ClassVar = CLASSES

    @nn.compact
    def outputs(self, encoded: Encoded, batch: Batch, embeddings: nn.Module, *, train: bool) -> Batch:
        """pooled [B, E, D] -> logits float32 [B E, C]."""
        return {'logits': _logits(self, _pooled(encoded), self.num_classes, train)}

    def terms(self, outputs: Batch, batch: Batch) -> dict[str, Mean]:
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
    reads = ('pooled',)
    sees = 'both'
    losses = of_outputs
    flops = too_little

    RANGES: ClassVar = CLASSES

    @nn.compact
    def outputs(self, encoded: Encoded, batch: Batch, embeddings: nn.Module, *, train: bool) -> Batch:
        """pooled [B, E, D] -> logits float32 [B E, C]."""
        return {'logits': _logits(self, _pooled(encoded), self.num_classes, train)}

    def terms(self, outputs: Batch, batch: Batch) -> dict[str, Mean]:
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
    reads = ('pooled',)
    sees = 'both'
    losses = of_outputs
    flops = too_little

    RANGES: ClassVar = RATE

    @nn.compact
    def outputs(self, encoded: Encoded, batch: Batch, embeddings: nn.Module, *, train: bool) -> Batch:
        """pooled [B, E, D] -> logits float32 [B E], the number itself."""
        return {'logits': _logits(self, _pooled(encoded), 1, train)[:, 0]}

    def terms(self, outputs: Batch, batch: Batch) -> dict[str, Mean]:
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
    reads = ()
    sees = 'both'
    losses = of_outputs
    flops = too_little

    RANGES: ClassVar = CLASSES

    @nn.compact
    def outputs(self, encoded: Encoded, batch: Batch, embeddings: nn.Module, *, train: bool) -> Batch:
        """hidden [B, L, D] -> logits float32 [B, L, C]."""
        return {'logits': _logits(self, encoded.hidden, self.num_classes, train)}

    def terms(self, outputs: Batch, batch: Batch) -> dict[str, Mean]:
        """Cross-entropy in nats and accuracy over the tokens with a label; label_ids [B, L], -1 for none."""
        labels = batch['label_ids']
        return cross_entropy(outputs['logits'], jnp.maximum(labels, 0), labels >= 0)

    def count(self, batch: Batch) -> jax.Array:
        """Tokens with a label."""
        return jnp.sum((batch['label_ids'] >= 0).astype(jnp.float32))


class Span(nn.Module):
    """Where an answer starts and ends (Devlin et al. 2019, 4.2)."""

    dtype: jnp.dtype = jnp.float32
    reads = ()
    sees = 'both'
    losses = of_outputs
    flops = too_little

    RANGES: ClassVar = {}

    @nn.compact
    def outputs(self, encoded: Encoded, batch: Batch, embeddings: nn.Module, *, train: bool) -> Batch:
        """hidden [B, L, D] -> start_logits, end_logits float32 [B, L], -1e9 at padding."""
        logits = Dense(2, self.dtype, name='dense')(encoded.hidden).astype(jnp.float32)
        logits = jnp.where(batch['input_mask'][..., None] > 0, logits, -1e9)
        return {'start_logits': logits[..., 0], 'end_logits': logits[..., 1]}

    def terms(self, outputs: Batch, batch: Batch) -> dict[str, Mean]:
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
    reads = ('pooled',)
    sees = 'both'
    losses = of_outputs
    flops = too_little

    RANGES: ClassVar = {'num_choices': (1, math.inf)} | RATE

    @nn.compact
    def outputs(self, encoded: Encoded, batch: Batch, embeddings: nn.Module, *, train: bool) -> Batch:
        """pooled [B, E, D] -> logits float32 [B E / C, C], -1e9 where there is no choice."""
        scores = _logits(self, _pooled(encoded), 1, train)[:, 0]
        scores = jnp.where(batch['is_real_example'] > 0, scores, -1e9)
        return {'logits': scores.reshape(-1, self.num_choices)}

    def terms(self, outputs: Batch, batch: Batch) -> dict[str, Mean]:
        """Cross-entropy in nats and accuracy over the questions."""
        right = (batch['label_ids'] * batch['is_real_example']).reshape(-1, self.num_choices)
        return cross_entropy(outputs['logits'], jnp.argmax(right, -1), jnp.max(right, -1))

    def count(self, batch: Batch) -> jax.Array:
        """Questions."""
        return jnp.sum((batch['label_ids'] * batch['is_real_example']).astype(jnp.float32))


class BiLstmTagging(nn.Module):
    """One label a token from frozen activations, by a two-layer BiLSTM (Devlin et al. 2019, 5.3 and table 7).

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
    sees = 'both'
    losses = of_outputs
    flops = too_little

    RANGES: ClassVar = {'hidden_size': (1, math.inf)} | CLASSES

    @property
    def reads(self) -> tuple[Read, ...]:
        """The layers of its features."""
        return _FEATURES[self.features]

    def check(self, input_size: int) -> None:
        """Refuses unknown features."""
        choose('features', _FEATURES, self.features)

    @nn.compact
    def outputs(self, encoded: Encoded, batch: Batch, embeddings: nn.Module, *, train: bool) -> Batch:
        """layers[('hidden', ...)] [B, L, D] -> logits float32 [B, L, C]."""
        x = self._features(encoded.layers)
        for layer in range(2):
            x = Dropout(self.dropout_rate)(x, train=train)
            sides = [Lstm(self.hidden_size, reverse, self.dtype, name=f'{side}_{layer}')
                     for side, reverse in (('forward', False), ('backward', True))]
            x = jnp.concatenate([side(x, batch['input_mask']) for side in sides], -1)
        return {'logits': _logits(self, x, self.num_classes, train)}

    def _features(self, layers: dict[Read, jax.Array]) -> jax.Array:
        hidden = [layers[read] for read in self.reads]
        if not self.features.startswith('sum'):
            return jnp.concatenate(hidden, -1)
        hidden = hidden[0] if self.features == 'sum_all' else jnp.stack(hidden)
        weights = jax.nn.softmax(self.param('mix', nn.initializers.zeros, hidden.shape[:1]))
        return jnp.einsum('n,nblw->blw', weights, hidden) * self.param('scale', nn.initializers.ones, ())

    terms, count = Tagging.terms, Tagging.count


_LAST4 = tuple(('hidden', layer) for layer in (-4, -3, -2, -1))
_FEATURES: dict[str, tuple[Read, ...]] = {
    'embeddings': (('hidden', 0),), 'second_to_last': (('hidden', -2),), 'last': (('hidden', -1),),
    'sum_last4': _LAST4, 'concat_last4': _LAST4, 'sum_all': (('hidden', 'all'),)}
HEADS = {'classification': Classification, 'multilabel': MultiLabel, 'regression': Regression, 'tagging': Tagging,
         'bilstm_tagging': BiLstmTagging, 'span': Span, 'multiple_choice': MultipleChoice}
