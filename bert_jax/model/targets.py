"""Encoded + labels -> loss and metric terms.

The contract of a target, a Linen module:

    uses_pooled: bool                                 whether it reads Encoded.pooled
    outputs(encoded, batch, table, *, train)          -> dict of arrays: what prediction and evaluation read; table is
                                                         the token table [parts, V padded, D], of equal parts
    losses(outputs, batch)                            -> {'loss': Mean, '<metric>': Mean, ...}
    count(batch)                                      -> the loss's count, from the labels alone

docs/new_target.md adds one from the data side to the config.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from bert_jax import partition
from bert_jax.metrics import Mean, cross_entropy
from bert_jax.model import kernels
from bert_jax.model.encoders import Encoded
from bert_jax.model.heads import HEADS
from bert_jax.model.layers import ACTIVATIONS, Dense, LayerNorm, gather

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
        x = Dense(x.shape[-1], self.dtype, name='dense')(x)
        x = LayerNorm(self.dtype, name='norm')(ACTIVATIONS[self.activation](x))
        parts, size, width = table.shape
        bias = self.param('bias', nn.initializers.zeros, (size,))
        bias = jnp.where(jnp.arange(size) < self.vocab_size, bias, -1e9)
        product = functools.partial(jnp.einsum, 'nD,VD->nV', preferred_element_type=jnp.float32)
        logits = kernels.each_part(product, x.reshape(parts, -1, width), table)    # [parts, B * P / parts, V padded]
        logits = (logits + bias).reshape(*x.shape[:2], -1)
        return {'logits': partition.constrain(logits, 'batch', 'predictions', 'vocab')}

    def losses(self, outputs: Batch, batch: Batch) -> dict[str, Mean]:
        """Cross-entropy in nats and accuracy over the masked places."""
        return cross_entropy(outputs['logits'], batch['masked_lm_ids'], batch['masked_lm_weights'])

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
        logits = Dense(2, self.dtype, name='dense')(encoded.pooled)
        return {'logits': logits.astype(jnp.float32)}

    def losses(self, outputs: Batch, batch: Batch) -> dict[str, Mean]:
        """Cross-entropy in nats and accuracy over the pairs."""
        return cross_entropy(outputs['logits'], batch['next_sentence_labels'], batch['next_sentence_weights'])

    def count(self, batch: Batch) -> jax.Array:
        """Pairs."""
        return jnp.sum(batch['next_sentence_weights'])


TARGETS = {'mlm': MaskedLM, 'nsp': NextSentence, **HEADS}
