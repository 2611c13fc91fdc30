"""Learning from a teacher's attention (Wang et al. 2021, MiniLMv2: Multi-Head Self-Attention Relation Distillation)."""

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from bert_jax import partition
from bert_jax.cli import UserError
from bert_jax.metrics import Mean
from bert_jax.model.parts import Batch, Encoded, Read

KINDS = ('query', 'key', 'value')


class Relations(nn.Module):
    """Makes the relations of one layer's queries, keys and values those of a teacher's (equations 2 to 6).

    Relations of query with query, key with key and value with value count the same. The batch brings the teacher's
    vectors as teacher_query, teacher_key, teacher_value [B, H, L, K], of any H and K: see `teaching`.

    Attributes:
      num_heads: R, relation heads; it divides D of both.
      layer: the student's, counted from 1, or from the last (-1).
      dtype: of the model; relations are float32.
    """

    num_heads: int
    layer: int
    dtype: jnp.dtype = jnp.float32
    sees = 'both'

    RANGES: ClassVar = {'num_heads': (1, math.inf)}

    @property
    def reads(self) -> tuple[Read, ...]:
        """Query, key and value of one layer."""
        return tuple((kind, self.layer) for kind in KINDS)

    def check(self, input_size: int) -> None:
        """Refuses heads that do not divide D."""
        if input_size % self.num_heads:
            raise UserError(f'relations: num_heads {self.num_heads} does not divide the width {input_size}.')

    def losses(self, encoded: Encoded, batch: Batch, embeddings: nn.Module, *, train: bool) -> dict[str, Mean]:
        """'loss', nats a token of an example, and its parts 'query', 'key', 'value'; means over the examples."""
        mask, count = batch['input_mask'], self.count(batch)
        same = (mask[:, :, None] == mask[:, None, :]) & (mask > 0)[:, None, :]                      # [B, L, L]
        size = jnp.maximum(jnp.sum(same, -1), 1)                                                    # [B, L], |x|
        weights = (mask > 0) * _real(batch)[:, None] / size / self.num_heads
        found = {}
        for kind in KINDS:
            teacher, student = (split_heads(x, self.num_heads) for x in (
                batch[f'teacher_{kind}'], encoded.layers[kind, self.layer]))
            found[kind] = Mean(relation_loss(teacher, student, same, weights), count)
        return {'loss': Mean(sum(one.total for one in found.values()), count), **found}

    def outputs(self, encoded: Encoded, batch: Batch, embeddings: nn.Module, *, train: bool) -> Batch:
        """Nothing is predicted."""
        return {}

    def count(self, batch: Batch) -> jax.Array:
        """Examples."""
        return jnp.sum(jnp.max(batch['input_mask'], axis=1) * _real(batch))

    def flops(self, input_size: int, embeddings: nn.Module, contents: Mapping[str, float]) -> float:
        """Teacher's and student's: 12 D tokens^2."""
        return 12 * input_size * contents['squared_tokens']


def _real(batch: Batch) -> jax.Array:
    """float32 [B]: 1 but for rows that fill up a batch of evaluation."""
    return batch.get('is_real_example', jnp.ones(len(batch['input_mask']))).astype(jnp.float32)


def split_heads(x: jax.Array, count: int) -> jax.Array:
    """[B, H, L, K] -> [R, B, L, H K / R]: the heads side by side, cut anew.

    Raises:
      UserError: R does not divide H K.
    """
    batch, heads, length, size = x.shape
    if heads * size % count:
        raise UserError(f'relations: num_heads {count} does not divide the width {heads * size}.')
    x = x.swapaxes(1, 2).reshape(batch, length, -1)
    x = partition.constrain(x, 'batch', 'length', 'hidden')  # whole over `tensor`: R is walked along
    return x.reshape(batch, length, count, -1).transpose(2, 0, 1, 3)


def relation_loss(teacher: jax.Array, student: jax.Array, same: jax.Array, weights: jax.Array) -> jax.Array:
    """The sum of KL(teacher's relations, student's), weighted: one head at a time, computed again backward.

    teacher [R, B, L, d], student [R, B, L, d'], same bool [B, L, L] (rows of one example), weights [B, L].
    """
    def relations(x: jax.Array) -> jax.Array:  # [B, L, d] -> log probabilities [B, L, L]
        scores = jnp.einsum('BqK,BkK->Bqk', x * x.shape[-1] ** -0.5, x, preferred_element_type=jnp.float32)
        return jax.nn.log_softmax(jnp.where(same, scores, -1e9))

    @jax.checkpoint
    def add(total: jax.Array, heads: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        right, ours = (relations(x) for x in heads)
        divergence = jnp.sum(jnp.exp(right) * (right - ours), -1)                                   # [B, L]
        return total + jnp.sum(divergence * weights), None

    return jax.lax.scan(add, jnp.zeros(()), (teacher, student))[0]


def reads(layer: int) -> tuple[Read, ...]:
    """What `teaching` reads of a teacher's layer, for models.build."""
    return tuple((kind, layer) for kind in KINDS)


def teaching(teacher: nn.Module, layer: int) -> Callable[[Any, Batch], Batch]:
    """(fixed, batch) -> the batch with a frozen teacher's vectors of one layer.

    fixed: {'params': the teacher's, 'ids': int32 [V], the teacher's id of each of ours}.
    """
    def annotate(fixed: Any, batch: Batch) -> Batch:
        seen = batch | {'input_ids': fixed['ids'][batch['input_ids']]}
        layers = teacher.apply({'params': fixed['params']}, seen, train=False, method='encode').layers
        return batch | {f'teacher_{kind}': layers[kind, layer] for kind in KINDS}

    return annotate


def map_ids(pieces: list[str], teacher_pieces: list[str], where: str) -> list[int]:
    """The teacher's id of each of the student's pieces.

    Raises:
      UserError: a piece that the teacher does not have.
    """
    places = {piece: number for number, piece in enumerate(teacher_pieces)}
    missing = [piece for piece in pieces if piece not in places]
    if missing:
        raise UserError(f'{where}: {len(missing):,} of the student\'s {len(pieces):,} pieces are none of this '
                        f'teacher\'s {len(teacher_pieces):,}, {", ".join(map(repr, missing[:3]))} among them; it needs '
                        'a mapping of ids, or a store of its own tokenizer.')
    return [places[piece] for piece in pieces]
