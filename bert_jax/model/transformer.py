"""The encoder of BERT (Devlin et al. 2019; Vaswani et al. 2017)."""

import math
from collections.abc import Mapping
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from bert_jax import partition
from bert_jax.cli import UserError, check_range, choose
from bert_jax.model import parts
from bert_jax.model.layers import ACTIVATIONS, DENSE, KEPT, Attention, Dropout, LayerNorm, Mlp
from bert_jax.model.parts import Batch, Encoded, Read, Run

Kept = dict[str, jax.Array]  # 'hidden', 'query', 'key', 'value' -> [layers read, B, ...]


class TransformerLayer(nn.Module):
    """One post-norm block; the carry is that of a scan over layers."""

    num_heads: int
    mlp_size: int
    activation: str
    dropout_rate: float
    attention_dropout_rate: float
    kernel: str
    causal: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, carry: tuple[jax.Array, Kept], slots: dict[str, jax.Array], mask: jax.Array,
                 lengths: jax.Array | None, train: bool) -> tuple[tuple[jax.Array, Kept], None]:
        """x [B, L, D] and what is kept of the layers so far -> the same after this one, which may be kept in `slots`.

        mask: bool [B, 1, L, L]; lengths: int32 [B], where rows hold one example.
        """
        x, kept = carry
        x = partition.constrain(x, 'batch', 'length', 'hidden')
        attention = Attention(self.num_heads, self.attention_dropout_rate, self.kernel, self.causal, self.dtype,
                              name='attention')
        attended, found = attention(x, mask, lengths, train=train)
        dropout = Dropout(self.dropout_rate)
        x = checkpoint_name(x + dropout(attended, train=train), KEPT)
        x = LayerNorm(self.dtype, name='attention_norm')(x)
        changed = Mlp(self.mlp_size, self.activation, self.dtype, name='mlp')(x)
        x = checkpoint_name(x + Dropout(self.dropout_rate)(changed, train=train), KEPT)
        x = LayerNorm(self.dtype, name='mlp_norm')(x)
        x = partition.constrain(x, 'batch', 'length', 'hidden')
        found['hidden'] = x
        return (x, {kind: kept[kind].at[slots[kind]].set(found[kind], mode='drop') for kind in kept}), None


class Transformer(nn.Module):
    """N equal layers, their parameters one stack with the layer as leading axis.

    Attributes:
      num_layers: N.
      num_heads: H.
      mlp_size: F.
      activation: an ACTIVATIONS name.
      dropout_rate: after attention and MLP.
      attention_dropout_rate: on the attention probabilities.
      sees: a SEES name: what a position attends to.
      run: how it is computed.
      reads: what of which layers is kept, as targets ask for it.
    """

    num_layers: int
    num_heads: int
    mlp_size: int
    activation: str
    dropout_rate: float
    attention_dropout_rate: float
    sees: str
    run: Run
    reads: tuple[Read, ...] = ()

    GIVES: ClassVar = ('hidden', 'query', 'key', 'value')
    RANGES: ClassVar = {'num_layers': (1, math.inf), 'num_heads': (1, math.inf), 'mlp_size': (1, math.inf),
                        'dropout_rate': (0, 0.99), 'attention_dropout_rate': (0, 0.99)}

    def check(self, input_size: int) -> None:
        """Refuses values that are unknown or do not fit each other, or D = `input_size`."""
        check_range('model.run.unroll', self.run.unroll, 1, math.inf)
        choose('activation', ACTIVATIONS, self.activation)
        choose('sees', SEES, self.sees)
        choose('kernel', KERNELS, self.run.kernel)
        choose('remat', REMAT, self.run.remat)
        if input_size % self.num_heads:
            raise UserError(f'hidden_size {input_size} is not a multiple of num_heads {self.num_heads}.')

    def width(self, input_size: int) -> int:
        """D of what comes out."""
        return input_size

    def flops(self, input_size: int, contents: Mapping[str, float]) -> float:
        """Of the forward pass for a row: 2 N (4 D^2 + 2 D F) tokens + 4 N D tokens^2."""
        products = 2 * self.num_layers * (4 * input_size**2 + 2 * input_size * self.mlp_size) * contents['tokens']
        return products + 4 * self.num_layers * input_size * contents['squared_tokens']

    @nn.compact
    def __call__(self, x: jax.Array, batch: Batch, *, train: bool) -> Encoded:
        """x [B, L, D], input_mask [B, L] (0 = padding, k = the row's k-th example) -> Encoded."""
        example = batch['input_mask']
        mask = (example[:, None, :, None] == example[:, None, None, :]) & (example[:, None, None, :] > 0)
        mask &= SEES[self.sees](batch)
        lengths = None
        if batch['cls_positions'].shape[1] == 1 and self.sees != 'prefix':  # rows of one example: lengths say it all
            lengths = jnp.maximum(jnp.sum(example > 0, axis=1, dtype=jnp.int32), 1)
        layers = {kind: parts.chosen_layers(self.reads, kind, self.num_layers) for kind in self.GIVES}
        layers = {kind: numbers for kind, numbers in layers.items() if numbers}
        kept = self._empty(x, layers)
        policy = REMAT[self.run.remat]
        block = TransformerLayer
        if policy or partition.gathers():
            block = nn.remat(block, policy=policy or partition.keep_parts, prevent_cse=self.run.unroll > 1,
                             static_argnums=(5,))
        stack = nn.scan(block, length=self.num_layers, unroll=self.run.unroll, variable_axes={'params': 0},
                        split_rngs={'params': True, 'dropout': True},
                        in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast))
        layer = stack(self.num_heads, self.mlp_size, self.activation, self.dropout_rate, self.attention_dropout_rate,
                      choose_kernel(self, train), self.sees == 'left', self.run.dtype, name='layers')
        slots = {kind: _slots(numbers, self.num_layers) for kind, numbers in layers.items()}
        (hidden, kept), _ = layer((x, kept), slots, mask, lengths, train)
        found = {kind: dict(zip(layers[kind], kept[kind])) for kind in kept}
        return Encoded(hidden, parts.picked(self.reads, found, self.num_layers))

    def _empty(self, x: jax.Array, layers: dict[str, tuple[int, ...]]) -> Kept:
        """Room for what is read, the embeddings in their place."""
        heads = (x.shape[0], self.num_heads, x.shape[1], x.shape[2] // self.num_heads)
        kept = {kind: jnp.zeros((len(numbers), *(x.shape if kind == 'hidden' else heads)), self.run.dtype)
                for kind, numbers in layers.items()}
        if 0 in layers.get('hidden', ()):
            kept['hidden'] = kept['hidden'].at[0].set(x)
        return kept


def _slots(numbers: tuple[int, ...], count: int) -> jax.Array:
    """int32 [N]: where each layer is kept; len(numbers), which is nowhere, for those that nobody reads."""
    return jnp.array([numbers.index(layer) if layer in numbers else len(numbers) for layer in range(1, count + 1)])


def choose_kernel(encoder: Transformer, train: bool) -> str:
    """'xla' or 'cudnn', which needs an NVIDIA GPU, 16 bits and no attention dropout; 'auto' takes it where it can.

    Dropout is a matter of training: where it forbids 'cudnn' there, 'auto' still takes it to evaluate and predict.

    Raises:
      UserError: 'cudnn' is asked for where it cannot be.
    """
    kernel = encoder.run.kernel
    if kernel == 'xla':
        return 'xla'
    drops = encoder.attention_dropout_rate > 0 and (train or kernel == 'cudnn')
    missing = [what for what, there in {
        'an NVIDIA GPU': jax.default_backend() == 'gpu',
        '--config.model.run.dtype=bfloat16': encoder.run.dtype.itemsize == 2,
        '--config.model.encoder.attention_dropout_rate=0': not drops}.items() if not there]
    if missing and kernel == 'cudnn':
        raise UserError(f'kernel=cudnn needs {" and ".join(missing)}; kernel=auto takes it where it can.')
    return 'xla' if missing else 'cudnn'


def _left(batch: Batch) -> jax.Array:
    """bool [1, 1, L, L]: what is not after a position."""
    place = jnp.arange(batch['input_mask'].shape[1])
    return (place[:, None] >= place)[None, None]


def _prefix(batch: Batch) -> jax.Array:
    """bool [B, 1, L, L]: the first segment, and what is not after a position (Dong et al. 2019, 3.2)."""
    return (batch['segment_ids'] == 0)[:, None, None, :] | _left(batch)


SEES = {'both': lambda batch: True, 'left': _left, 'prefix': _prefix}
KERNELS = {'xla': 'every mask, dropout', 'cudnn': 'on NVIDIA GPUs, in 16 bits, without dropout', 'auto': 'cudnn or xla'}
REMAT = {
    'none': None,                                                               # everything is kept
    'elementwise': jax.checkpoint_policies.save_only_these_names(DENSE, KEPT),  # all but activations, dropout and norms
    'dots': jax.checkpoint_policies.save_only_these_names(DENSE),               # the outputs of dense layers
    'full': jax.checkpoint_policies.nothing_saveable,                           # each layer's input alone
}
