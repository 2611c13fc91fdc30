"""[B, L] ids -> [B, L, D]."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from bert_jax import partition
from bert_jax.model import kernels
from bert_jax.model.layers import Dropout, LayerNorm, kernel_init

VOCAB_MULTIPLE = 128  # what hardware likes; the extra rows never leave the program


def padded_vocab_size(vocab_size: int) -> int:
    """V rounded up to a multiple of 128."""
    return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


class BertEmbeddings(nn.Module):
    """Token + position + segment embeddings, normalised (Devlin et al. 2019, figure 2).

    Attributes:
      vocab_size: V, unpadded.
      hidden_size: D.
      max_length: positions in the table.
      num_segments: 2 for sentence A and B.
      dropout_rate: on the normalised sum.
      dtype: what is computed in.
      table: the token table [parts, V padded, D], which output layers share: a copy for each part of the batch, so that
        its gradients of both are added where they are before they are reduced, once.
    """

    vocab_size: int
    hidden_size: int
    max_length: int
    num_segments: int
    dropout_rate: float
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        """Parameters: token [V padded, D], position [max_length, D], segment [num_segments, D]."""
        token = self.param('token', kernel_init, (padded_vocab_size(self.vocab_size), self.hidden_size))
        self.table = partition.copies(token.astype(self.dtype), ('vocab', 'hidden'))
        self.position = self.param('position', kernel_init, (self.max_length, self.hidden_size))
        self.segment = self.param('segment', kernel_init, (self.num_segments, self.hidden_size))
        self.norm = LayerNorm(self.dtype)
        self.dropout = Dropout(self.dropout_rate)

    def __call__(self, batch: dict[str, jax.Array], *, train: bool) -> jax.Array:
        """input_ids, segment_ids, position_ids [B, L] -> [B, L, D]."""
        x = kernels.lookup(self.table, batch['input_ids']).astype(jnp.float32)
        x += jnp.take(self.position, batch['position_ids'], axis=0)
        segments = jax.nn.one_hot(batch['segment_ids'].reshape(-1), self.num_segments, dtype=x.dtype)
        x += (segments @ self.segment).reshape(x.shape)
        return self.dropout(self.norm(x), train=train)


EMBEDDINGS = {'bert': BertEmbeddings}
