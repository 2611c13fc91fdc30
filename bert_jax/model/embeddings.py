"""[B, L] ids -> [B, L, E], and back: [.., E] -> logits [.., V].

The contract of embeddings, a Linen module:

    vocab_size, hidden_size              V, E
    max_length, num_segments             the most tokens and segments that it knows
    __call__(batch, *, train)            -> [B, L, E]
    attend(x, bias)                      -> logits [.., V padded], -1e9 where there is no token
    nll(x, bias, ids, weights)           -> {'loss': Mean, 'accuracy': Mean}: attend and cross_entropy for many places
"""

import functools
import math
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from bert_jax import partition
from bert_jax.metrics import Mean, cross_entropy
from bert_jax.model import kernels
from bert_jax.model.layers import Dropout, LayerNorm, kernel_init

VOCAB_MULTIPLE = 128  # what hardware likes; the extra rows never leave the program
TILE = 32             # places of a row whose logits are there at once


def padded_vocab_size(vocab_size: int) -> int:
    """V rounded up to a multiple of 128."""
    return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


class BertEmbeddings(nn.Module):
    """Token + position + segment embeddings, normalised (Devlin et al. 2019, figure 2).

    Attributes:
      vocab_size: V, unpadded.
      hidden_size: E.
      max_length: positions in the table.
      num_segments: 2 for sentence A and B.
      dropout_rate: on the normalised sum.
      dtype: what is computed in.
    """

    vocab_size: int
    hidden_size: int
    max_length: int
    num_segments: int
    dropout_rate: float
    dtype: jnp.dtype = jnp.float32

    RANGES: ClassVar = {'vocab_size': (1, math.inf), 'hidden_size': (1, math.inf), 'max_length': (1, math.inf),
                        'num_segments': (1, math.inf), 'dropout_rate': (0, 0.99)}

    def setup(self) -> None:
        """Parameters: token [V padded, E], position [max_length, E], segment [num_segments, E]."""
        token = self.param('token', kernel_init, (padded_vocab_size(self.vocab_size), self.hidden_size))
        # [parts, V padded, E], a copy for each part of the batch: gradients of all uses are added where they are,
        # before they are reduced, once.
        self.table = partition.copies(token.astype(self.dtype), ('vocab', 'hidden'))
        self.position = self.param('position', kernel_init, (self.max_length, self.hidden_size))
        self.segment = self.param('segment', kernel_init, (self.num_segments, self.hidden_size))
        self.norm = LayerNorm(self.dtype)
        self.dropout = Dropout(self.dropout_rate)

    def __call__(self, batch: dict[str, jax.Array], *, train: bool) -> jax.Array:
        """input_ids, segment_ids, position_ids [B, L] -> [B, L, E]."""
        x = kernels.lookup(self.table, batch['input_ids']).astype(jnp.float32)
        x += jnp.take(self.position, batch['position_ids'], axis=0)
        segments = jax.nn.one_hot(batch['segment_ids'].reshape(-1), self.num_segments, dtype=x.dtype)
        x += (segments @ self.segment).reshape(x.shape)
        return self.dropout(self.norm(x), train=train)

    def attend(self, x: jax.Array, bias: jax.Array) -> jax.Array:
        """x [B, T, E] times the token table, plus bias [V padded] -> logits float32 [B, T, V padded]."""
        return _logits(x, self.table, bias, self.vocab_size)

    def nll(self, x: jax.Array, bias: jax.Array, ids: jax.Array, weights: jax.Array) -> dict[str, Mean]:
        """Cross-entropy of `attend` in nats, and accuracy; [B, T, V] is never whole, neither forward nor backward.

        x [B, T, E], bias [V padded], ids and weights [B, T].
        """
        tiles = -(-x.shape[1] // TILE)

        def cut(x: jax.Array) -> jax.Array:  # [B, T, ...] -> [tiles, B, TILE, ...]
            x = jnp.pad(x, [(0, 0), (0, tiles * TILE - x.shape[1])] + [(0, 0)] * (x.ndim - 2))
            return x.reshape(x.shape[0], tiles, TILE, *x.shape[2:]).swapaxes(0, 1)

        @jax.checkpoint
        def add(sums: dict[str, Mean], tile: tuple[jax.Array, ...]) -> tuple[dict[str, Mean], None]:
            x, ids, weights = tile
            found = cross_entropy(_logits(x, self.table, bias, self.vocab_size), ids, weights)
            return jax.tree.map(jnp.add, sums, found), None

        zero = Mean(jnp.zeros(()), jnp.zeros(()))
        return jax.lax.scan(add, {'loss': zero, 'accuracy': zero}, (cut(x), cut(ids), cut(weights)))[0]


def _logits(x: jax.Array, table: jax.Array, bias: jax.Array, vocab_size: int) -> jax.Array:
    parts, size, width = table.shape
    bias = jnp.where(jnp.arange(size) < vocab_size, bias, -1e9)
    product = functools.partial(jnp.einsum, 'nE,VE->nV', preferred_element_type=jnp.float32)
    logits = kernels.each_part(product, x.reshape(parts, -1, width), table)    # [parts, B * T / parts, V padded]
    logits = (logits + bias).reshape(*x.shape[:2], -1)
    return partition.constrain(logits, 'batch', 'predictions', 'vocab')


EMBEDDINGS = {'bert': BertEmbeddings}
