"""Model = embeddings, encoder, targets; `build` makes it from a config."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from bert_jax.cli import UserError, choose, unknown
from bert_jax.metrics import Mean
from bert_jax.model.embeddings import EMBEDDINGS
from bert_jax.model.encoders import ENCODERS, Encoded
from bert_jax.model.layers import ACTIVATIONS, Dense, gather
from bert_jax.model.targets import TARGETS

Batch = dict[str, jax.Array]


class Pooler(nn.Module):
    """tanh(dense) of each example's first token (Devlin et al. 2019, 4.1: the [CLS] vector C)."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, hidden: jax.Array, cls_positions: jax.Array) -> jax.Array:
        """hidden [B, L, D], cls_positions [B, E] -> [B, E, D]."""
        x = gather(hidden, cls_positions)
        return jnp.tanh(Dense(x.shape[-1], self.dtype, name='dense')(x))


class Model(nn.Module):
    """The whole network.

    Its parameter tree is the architecture: `embeddings`, `encoder`, `pooler` (when a target reads the
    pooled vector) and `targets_<name>` for each target.
    """

    embeddings: nn.Module
    encoder: nn.Module
    pooler: nn.Module
    targets: Mapping[str, nn.Module]

    def __call__(self, batch: Batch, *, train: bool) -> dict[str, Batch]:
        """The outputs of every target."""
        encoded = self.encode(batch, train=train)
        return {name: target.outputs(encoded, batch, self.embeddings.table, train=train)
                for name, target in self.targets.items()}

    def encode(self, batch: Batch, *, train: bool) -> Encoded:
        """input_ids, input_mask, segment_ids, position_ids [B, L], cls_positions [B, E] -> Encoded."""
        encoded = self.encoder(self.embeddings(batch, train=train), batch, train=train)
        if any(target.uses_pooled for target in self.targets.values()):
            encoded = encoded.replace(pooled=self.pooler(encoded.hidden, batch['cls_positions']))
        return encoded

    def losses(self, batch: Batch, *, train: bool) -> dict[str, dict[str, Mean]]:
        """Loss and metric terms of every target."""
        outputs = self(batch, train=train)
        return {name: target.losses(outputs[name], batch) for name, target in self.targets.items()}

    def counts(self, batch: Batch) -> dict[str, jax.Array]:
        """The count of every target's loss, from the labels alone."""
        return {name: target.count(batch) for name, target in self.targets.items()}


DTYPES = {name: jnp.dtype(name) for name in ('float32', 'bfloat16')}


def build(config: ConfigDict) -> Model:
    """The module a config describes: `embeddings`, `encoder`, `targets`, and one `dtype` for all.

    Raises:
      UserError: an unknown name or keyword, a size that does not divide.
    """
    dtype = choose('dtype', DTYPES, config.dtype)
    embeddings = _construct('embeddings', EMBEDDINGS, config.embeddings.to_dict(), dtype)
    encoder = _construct('encoder', ENCODERS, config.encoder.to_dict(), dtype)
    if embeddings.hidden_size % encoder.num_heads:
        raise UserError(f'hidden_size {embeddings.hidden_size} is not a multiple of num_heads {encoder.num_heads}.')
    targets = {name: _construct('target', TARGETS, {'name': name, **_without_weight(target)}, dtype)
               for name, target in config.targets.items()}
    return Model(embeddings, encoder, Pooler(dtype), flax.core.freeze(targets))  # hashable, so that JAX traces it once


def target_weights(config: ConfigDict) -> dict[str, float]:
    """What each target's mean loss counts in the sum."""
    return {name: float(target.weight) for name, target in config.targets.items()}


def _without_weight(target: ConfigDict) -> dict[str, Any]:
    return {key: value for key, value in target.to_dict().items() if key != 'weight'}


def _construct(kind: str, registry: dict[str, type], kwargs: dict[str, Any], dtype: jnp.dtype) -> nn.Module:
    """`registry[name](**kwargs)`, with errors that list what is known."""
    name = kwargs.pop('name')
    module = choose(kind, registry, name)
    known = [field.name for field in dataclasses.fields(module) if field.name not in ('parent', 'name', 'dtype')]
    for key in kwargs:
        if key not in known:
            raise unknown(f'{kind} {name} key', key, known)
    if 'activation' in kwargs:
        choose('activation', ACTIVATIONS, kwargs['activation'])
    return module(**{k: tuple(v) if isinstance(v, list) else v for k, v in kwargs.items()}, dtype=dtype)
