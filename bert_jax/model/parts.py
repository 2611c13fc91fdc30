"""What the parts of a model share: how it is computed (Run), and what an encoder gives (Encoded)."""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from bert_jax.metrics import Mean

Batch = dict[str, jax.Array]
Read = str | tuple[str, int | str]  # 'pooled', or what of which layer: ('hidden', -1), ('query', 12), ('hidden', 'all')


@dataclasses.dataclass(frozen=True)
class Run:
    """How a model is computed, not what: config.model.run. It may differ from machine to machine.

    Attributes:
      dtype: of the arithmetic; parameters, logits and losses are float32.
      kernel: a KERNELS name: how attention is computed.
      unroll: layers a step of the scan; the number of layers makes an unrolled program, the same but for rounding.
      remat: a REMAT name: what the forward pass keeps for the backward pass, which computes the rest again.
    """

    dtype: jnp.dtype
    kernel: str
    unroll: int
    remat: str


@flax.struct.dataclass
class Encoded:
    """What an encoder gives.

    Attributes:
      hidden: [B, L, D], the last layer.
      layers: what targets read of other layers: ('hidden', n) -> [B, L, D], where layer 0 is the embeddings, 1 the
        first layer and -1 the last; ('query' | 'key' | 'value', n) -> [B, H, L, K]; (..., 'all') -> those of layers 1
        to N, stacked.
      pooled: [B, E, D], tanh(dense) of each example's [CLS], when a target reads it.
    """

    hidden: jax.Array
    layers: dict[Read, jax.Array] = flax.struct.field(default_factory=dict)
    pooled: jax.Array | None = None


def chosen_layers(reads: tuple[Read, ...], kind: str, count: int) -> tuple[int, ...]:
    """The layers, counted from 1, of which `kind` is read; 0, the embeddings, among them where they are."""
    found = set()
    for read in reads:
        if read[0] == kind and read != 'pooled':
            found |= set(range(1, count + 1)) if read[1] == 'all' else {resolve(read[1], count)}
    return tuple(sorted(found))


def resolve(layer: int, count: int) -> int:
    """A layer counted from 1, of one that may be counted from the last (-1)."""
    return layer if layer >= 0 else count + 1 + layer


def picked(reads: tuple[Read, ...], kept: dict[str, dict[int, jax.Array]], count: int) -> dict[Read, jax.Array]:
    """Encoded.layers: each of `reads` by the name that it was asked for.

    Args:
      reads: what targets read.
      kept: kind -> layer, counted from 1 -> array.
      count: layers of the encoder.
    """
    return {(kind, layer): jnp.stack([kept[kind][n] for n in range(1, count + 1)]) if layer == 'all' else
            kept[kind][resolve(layer, count)] for kind, layer in set(reads) - {'pooled'}}


def of_outputs(target: Any, encoded: Encoded, batch: Batch, embeddings: Any, *, train: bool
               ) -> dict[str, Mean]:
    """`losses` of a target whose loss follows from what it predicts."""
    return target.terms(target.outputs(encoded, batch, embeddings, train=train), batch)
