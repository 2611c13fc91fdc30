"""Model = embeddings, encoder, targets; `build` makes it from a config."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from bert_jax import cli
from bert_jax.cli import UserError, choose, unknown
from bert_jax.metrics import Mean
from bert_jax.model import parts
from bert_jax.model.embeddings import EMBEDDINGS
from bert_jax.model.encoders import ENCODERS
from bert_jax.model.layers import Dense, gather
from bert_jax.model.parts import Batch, Encoded, Read, Run
from bert_jax.model.targets import TARGETS


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
        """The outputs of every target: what prediction reads."""
        return self._each('outputs', batch, train)

    def losses(self, batch: Batch, *, train: bool) -> dict[str, dict[str, Mean]]:
        """Loss and metric terms of every target."""
        return self._each('losses', batch, train)

    def _each(self, method: str, batch: Batch, train: bool) -> dict[str, Any]:
        encoded = self.encode(batch, train=train)
        return {name: getattr(target, method)(encoded, batch, self.embeddings, train=train)
                for name, target in self.targets.items()}

    def encode(self, batch: Batch, *, train: bool) -> Encoded:
        """input_ids, input_mask, segment_ids, position_ids [B, L], cls_positions [B, E] -> Encoded."""
        encoded = self.encoder(self.embeddings(batch, train=train), batch, train=train)
        if any('pooled' in target.reads for target in self.targets.values()):
            encoded = encoded.replace(pooled=self.pooler(encoded.hidden, batch['cls_positions']))
        return encoded

    def counts(self, batch: Batch) -> dict[str, jax.Array]:
        """The count of every target's loss, from the labels alone."""
        return {name: target.count(batch) for name, target in self.targets.items()}

    def flops(self, contents: Mapping[str, float]) -> float:
        """Model FLOPs of a training step for a row; padding, look-ups, norms and softmax are not counted.

        Forward and backward, for BERT: 3 [2 N (4 D^2 + 2 D F) S + 4 N D S^2 + 2 P (D V + D^2)].

        Args:
          contents: of a row, or means: 'tokens' S, 'squared_tokens' (of each example, summed), 'predictions' P,
            'examples'.
        """
        width = self.embeddings.hidden_size
        forward = self.encoder.flops(width, contents)
        for target in self.targets.values():
            forward += target.flops(self.encoder.width(width), self.embeddings, contents)
        return 3 * forward


DTYPES = {name: jnp.dtype(name) for name in ('float32', 'bfloat16')}


def build(config: ConfigDict, reads: tuple[Read, ...] = ()) -> Model:
    """The module a config describes: `embeddings`, `encoder`, `targets`: what is computed; `run`: how.

    Args:
      config: a config's `model`.
      reads: what a caller of `encode` reads of the encoder's layers, in addition to targets.

    Raises:
      UserError: an unknown name or keyword, a value out of range, sizes that do not fit each other, an encoder that
        cannot give what a target reads or that shows it its answers.
    """
    run = _run(config.run)
    embeddings = _construct('embeddings', EMBEDDINGS, config.embeddings, dtype=run.dtype)
    targets = {name: _construct(f'targets.{name}', TARGETS, {'name': name, **target}, dtype=run.dtype)
               for name, target in config.targets.items()}
    wanted = dict.fromkeys(reads) | {read: None for target in targets.values() for read in target.reads}
    encoder = _construct('encoder', ENCODERS, config.encoder, run=run,
                         reads=tuple(read for read in wanted if read != 'pooled'))
    encoder.check(embeddings.hidden_size)
    for name, target in targets.items():
        if hasattr(target, 'check'):
            target.check(encoder.width(embeddings.hidden_size))
        _check_fits(f'The target {name}', target, config.encoder.name, encoder)
    _check_gives('What is asked for', reads, config.encoder.name, encoder)
    return Model(embeddings, encoder, Pooler(run.dtype), flax.core.freeze(targets))  # hashable: JAX traces it once


def target_weights(config: ConfigDict) -> dict[str, float]:
    """What each target's mean loss counts in the sum."""
    return {name: float(target.weight) for name, target in config.targets.items()}


def _run(config: ConfigDict) -> Run:
    known = [field.name for field in dataclasses.fields(Run)]
    for key in config:
        if key not in known:
            raise unknown('model.run key', key, known)
    return Run(**config.to_dict() | {'dtype': choose('dtype', DTYPES, config.dtype)})


def _construct(part: str, registry: dict[str, type], config: Mapping[str, Any], **given: Any) -> nn.Module:
    """`registry[name](**config, **given)`, with errors that list what is known; a target's weight is not its own."""
    kind, kwargs = part.split('.')[0].removesuffix('s') if part != 'embeddings' else part, dict(config)
    name = kwargs.pop('name')
    module = choose(kind, registry, name)
    if kind == 'target':
        kwargs.pop('weight', None)
    hidden = {'parent', 'name', 'dtype', 'run', 'reads'}
    known = [field.name for field in dataclasses.fields(module) if field.name not in hidden]
    for key in kwargs:
        if key in {field.name for field in dataclasses.fields(Run)}:
            raise UserError(f'model.{part}.{key}: how a model is computed is not a matter of its parts; '
                            f'model.run.{key} says it.')
        if key not in known:
            raise unknown(f'{kind} {name} key', key, known)
        if key in getattr(module, 'RANGES', ()):
            cli.check_range(f'model.{part}.{key}', kwargs[key], *module.RANGES[key])
    return module(**{k: tuple(v) if isinstance(v, list) else v for k, v in kwargs.items()}, **given)


def _check_fits(what: str, target: nn.Module, encoder_name: str, encoder: nn.Module) -> None:
    """Refuses an encoder that shows a target its answers, or has not what it reads."""
    if target.sees == 'left' and encoder.sees != 'left':
        raise UserError(f'{what} predicts each token from those before it, but the encoder {encoder_name} sees more '
                        f'(sees={encoder.sees}), its answers too. --config.model.encoder.sees=left fits, or an lstm.')
    if 'pooled' in target.reads and encoder.sees == 'left':
        raise UserError(f'{what} reads the first token of a text, which has seen nothing else in the encoder '
                        f'{encoder_name} (sees=left); one that sees both sides fits.')
    _check_gives(what, target.reads, encoder_name, encoder)


def _check_gives(what: str, reads: tuple[Read, ...], encoder_name: str, encoder: nn.Module) -> None:
    for read in reads:
        if read == 'pooled':
            continue
        kind, layer = read
        if kind not in encoder.GIVES:
            raise UserError(f'{what} reads the {kind} of layers, but the encoder {encoder_name} gives '
                            f'{", ".join(encoder.GIVES)}; a transformer fits.')
        known = layer == 'all' or read == ('hidden', 0)
        if not known and not 1 <= parts.resolve(layer, encoder.num_layers) <= encoder.num_layers:
            raise UserError(f'{what} reads layer {layer}, but the encoder {encoder_name} has {encoder.num_layers} '
                            'layers.')
