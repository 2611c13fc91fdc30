"""Encoded + labels -> losses.

The contract of a target, a Linen module:

    reads                                             what it reads besides the last layer's hidden vectors (parts.Read)
    sees                                              'both', or 'left': no position may have seen what is to its right
    losses(encoded, batch, embeddings, *, train)      -> {'loss': Mean, '<metric>': Mean, ...}
    outputs(encoded, batch, embeddings, *, train)     -> dict of arrays: what prediction reads
    count(batch)                                      -> the loss's count, from the labels alone
    flops(input_size, embeddings, contents)           -> of the forward pass for a row; input_size is the encoder's D
    check(input_size), RANGES                         where there is something to refuse

`embeddings` gives logits over the vocabulary (embeddings.py). docs/new_target.md adds a target from the data side to
the config.
"""

import math
from collections.abc import Mapping
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from bert_jax.cli import choose
from bert_jax.metrics import Mean, cross_entropy
from bert_jax.model.embeddings import padded_vocab_size
from bert_jax.model.heads import HEADS
from bert_jax.model.layers import ACTIVATIONS, Dense, LayerNorm, gather
from bert_jax.model.parts import Batch, Encoded, of_outputs
from bert_jax.model.relations import Relations


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
    reads = ()
    sees = 'both'
    losses = of_outputs

    RANGES: ClassVar = {'vocab_size': (1, math.inf)}

    def check(self, input_size: int) -> None:
        """Refuses an unknown activation."""
        choose('activation', ACTIVATIONS, self.activation)

    @nn.compact
    def outputs(self, encoded: Encoded, batch: Batch, embeddings: nn.Module, *, train: bool) -> Batch:
        """masked_lm_positions [B, P] -> logits float32 [B, P, V padded]."""
        x = gather(encoded.hidden, batch['masked_lm_positions'])           # [B, P, D]
        x = Dense(embeddings.hidden_size, self.dtype, name='dense')(x)     # [B, P, E]
        x = LayerNorm(self.dtype, name='norm')(ACTIVATIONS[self.activation](x))
        bias = self.param('bias', nn.initializers.zeros, (padded_vocab_size(self.vocab_size),))
        return {'logits': embeddings.attend(x, bias)}

    def terms(self, outputs: Batch, batch: Batch) -> dict[str, Mean]:
        """Cross-entropy in nats and accuracy over the masked places."""
        return cross_entropy(outputs['logits'], batch['masked_lm_ids'], batch['masked_lm_weights'])

    def count(self, batch: Batch) -> jax.Array:
        """Masked places."""
        return jnp.sum(batch['masked_lm_weights'])

    def flops(self, input_size: int, embeddings: nn.Module, contents: Mapping[str, float]) -> float:
        """2 P (E V + D E)."""
        width = embeddings.hidden_size
        return 2 * contents['predictions'] * (width * embeddings.vocab_size + input_size * width)


class NextSentence(nn.Module):
    """Predicts whether B follows A (label 0) or is random (label 1) (Devlin et al. 2019, 3.1)."""

    dtype: jnp.dtype = jnp.float32
    reads = ('pooled',)
    sees = 'both'
    losses = of_outputs

    @nn.compact
    def outputs(self, encoded: Encoded, batch: Batch, embeddings: nn.Module, *, train: bool) -> Batch:
        """pooled [B, E, D] -> logits float32 [B, E, 2]."""
        logits = Dense(2, self.dtype, name='dense')(encoded.pooled)
        return {'logits': logits.astype(jnp.float32)}

    def terms(self, outputs: Batch, batch: Batch) -> dict[str, Mean]:
        """Cross-entropy in nats and accuracy over the pairs."""
        return cross_entropy(outputs['logits'], batch['next_sentence_labels'], batch['next_sentence_weights'])

    def count(self, batch: Batch) -> jax.Array:
        """Pairs."""
        return jnp.sum(batch['next_sentence_weights'])

    def flops(self, input_size: int, embeddings: nn.Module, contents: Mapping[str, float]) -> float:
        """Too little to count."""
        return 0.0


class LeftToRightLM(nn.Module):
    """Predicts each token from those before it (Radford et al. 2018, equation 1): dense to E, tied table, bias.

    Logits are made a tile of places at a time: [B, L, V] is never whole.

    Attributes:
      vocab_size: V, unpadded.
      dtype: what is computed in; logits and loss are float32.
    """

    vocab_size: int
    dtype: jnp.dtype = jnp.float32
    reads = ()
    sees = 'left'

    RANGES: ClassVar = {'vocab_size': (1, math.inf)}

    @nn.compact
    def states(self, encoded: Encoded, embeddings: nn.Module) -> tuple[jax.Array, jax.Array]:
        """hidden [B, L, D] -> [B, L, E], bias [V padded]."""
        bias = self.param('bias', nn.initializers.zeros, (padded_vocab_size(self.vocab_size),))
        return Dense(embeddings.hidden_size, self.dtype, name='dense')(encoded.hidden), bias

    def losses(self, encoded: Encoded, batch: Batch, embeddings: nn.Module, *, train: bool) -> dict[str, Mean]:
        """Cross-entropy in nats and accuracy over the tokens that have one before them in their example."""
        x, bias = self.states(encoded, embeddings)
        return embeddings.nll(x[:, :-1], bias, batch['input_ids'][:, 1:], _has_next(batch))

    def outputs(self, encoded: Encoded, batch: Batch, embeddings: nn.Module, *, train: bool) -> Batch:
        """Logits float32 [B, V padded] of what follows each row's last token."""
        x, bias = self.states(encoded, embeddings)
        last = jnp.maximum(jnp.sum(batch['input_mask'] > 0, axis=1) - 1, 0)
        return {'logits': embeddings.attend(gather(x, last[:, None]), bias)[:, 0]}

    def count(self, batch: Batch) -> jax.Array:
        """Tokens that have one before them in their example."""
        return jnp.sum(_has_next(batch))

    def flops(self, input_size: int, embeddings: nn.Module, contents: Mapping[str, float]) -> float:
        """2 (tokens - examples) (E V + D E)."""
        width, places = embeddings.hidden_size, contents['tokens'] - contents['examples']
        return 2 * places * (width * embeddings.vocab_size + input_size * width)


def _has_next(batch: Batch) -> jax.Array:
    """float32 [B, L - 1]: 1 where the next token is of the same example, which is a real one."""
    mask = batch['input_mask']
    same = (mask[:, 1:] == mask[:, :-1]) & (mask[:, 1:] > 0)
    return same * batch.get('is_real_example', jnp.ones(len(mask), jnp.int32))[:, None].astype(jnp.float32)


TARGETS = {'mlm': MaskedLM, 'nsp': NextSentence, 'lm': LeftToRightLM, 'relations': Relations, **HEADS}
