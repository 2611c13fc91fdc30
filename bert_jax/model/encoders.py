"""[B, L, D] -> Encoded."""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from bert_jax import partition
from bert_jax.cli import UserError, choose, unknown
from bert_jax.model.layers import DENSE, KEPT, Attention, Dropout, LayerNorm, Mlp


@flax.struct.dataclass
class Encoded:
    """What an encoder gives.

    Attributes:
      hidden: [B, L, D], the last layer.
      layers: what `layer_outputs` asked for: 'hidden' [N + 1, B, L, D] with row 0 the embeddings,
        'query', 'key', 'value' [N, B, H, L, K].
      pooled: [B, E, D], tanh(dense) of each example's [CLS], when a target reads it.
    """

    hidden: jax.Array
    layers: dict[str, jax.Array]
    pooled: jax.Array | None = None


class TransformerLayer(nn.Module):
    """One post-norm block; the carry and the outputs are those of a scan over layers."""

    num_heads: int
    mlp_size: int
    activation: str
    dropout_rate: float
    attention_dropout_rate: float
    attention: str
    layer_outputs: tuple[str, ...]
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, lengths: jax.Array | None, train: bool
                 ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """x [B, L, D], mask [B, 1, L, L] -> x [B, L, D] and this layer's share of `layers`."""
        x = partition.constrain(x, 'batch', 'length', 'hidden')
        attention = Attention(self.num_heads, self.attention_dropout_rate, self.attention, self.dtype, name='attention')
        attended, heads = attention(x, mask, lengths, train=train)
        dropout = Dropout(self.dropout_rate)
        x = checkpoint_name(x + dropout(attended, train=train), KEPT)
        x = LayerNorm(self.dtype, name='attention_norm')(x)
        changed = Mlp(self.mlp_size, self.activation, self.dtype, name='mlp')(x)
        x = checkpoint_name(x + Dropout(self.dropout_rate)(changed, train=train), KEPT)
        x = LayerNorm(self.dtype, name='mlp_norm')(x)
        x = partition.constrain(x, 'batch', 'length', 'hidden')
        heads['hidden'] = x
        return x, {name: heads[name] for name in self.layer_outputs}


class Transformer(nn.Module):
    """BERT's encoder: N equal layers, their parameters one stack with the layer as leading axis.

    Attributes:
      num_layers: N.
      num_heads: H.
      mlp_size: F.
      activation: an ACTIVATIONS name.
      dropout_rate: after attention and MLP.
      attention_dropout_rate: on the attention probabilities.
      attention: an ATTENTIONS name: how it is computed.
      layer_outputs: which of 'hidden', 'query', 'key', 'value' to keep of every layer.
      unroll: layers a step of the scan; N makes an unrolled program, the same but for rounding.
      remat: a REMAT name: what the forward pass keeps for the backward pass, which computes the rest again.
      dtype: what is computed in.
    """

    num_layers: int
    num_heads: int
    mlp_size: int
    activation: str
    dropout_rate: float
    attention_dropout_rate: float
    attention: str = 'xla'
    layer_outputs: tuple[str, ...] = ()
    unroll: int = 1
    remat: str = 'none'
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, batch: dict[str, jax.Array], *, train: bool) -> Encoded:
        """x [B, L, D], input_mask [B, L] (0 = padding, k = the row's k-th example) -> Encoded."""
        mask = batch['input_mask']
        packed = batch['cls_positions'].shape[1] > 1
        lengths = None if packed else jnp.maximum(jnp.sum(mask > 0, axis=1, dtype=jnp.int32), 1)
        mask = (mask[:, None, :, None] == mask[:, None, None, :]) & (mask[:, None, None, :] > 0)
        kept = choose('remat', REMAT, self.remat)
        block = TransformerLayer
        if kept or partition.gathers():
            block = nn.remat(block, policy=kept or partition.keep_parts, prevent_cse=self.unroll > 1,
                             static_argnums=(4,))
        stack = nn.scan(block, length=self.num_layers, unroll=self.unroll,
                        variable_axes={'params': 0}, split_rngs={'params': True, 'dropout': True},
                        in_axes=(nn.broadcast, nn.broadcast, nn.broadcast))
        layer = stack(self.num_heads, self.mlp_size, self.activation, self.dropout_rate,
                      self.attention_dropout_rate, choose_attention(self, train), tuple(self.layer_outputs), self.dtype,
                      name='layers')
        hidden, layers = layer(x, mask, lengths, train)
        if 'hidden' in layers:
            layers['hidden'] = jnp.concatenate([x[None], layers['hidden']])  # [N + 1, B, L, D]
        return Encoded(hidden, layers)


def choose_attention(encoder: Transformer, train: bool) -> str:
    """'xla' or 'cudnn', which needs an NVIDIA GPU, 16 bits and no attention dropout; 'auto' takes it where it can.

    Dropout is a matter of training: where it forbids 'cudnn' there, 'auto' still takes it to evaluate and predict.

    Raises:
      UserError: 'cudnn' is asked for where it cannot be.
    """
    if encoder.attention not in ATTENTIONS:
        raise unknown('attention', encoder.attention, ATTENTIONS)
    if encoder.attention == 'xla':
        return 'xla'
    drops = encoder.attention_dropout_rate > 0 and (train or encoder.attention == 'cudnn')
    missing = [what for what, there in {
        'an NVIDIA GPU': jax.default_backend() == 'gpu',
        '--config.model.dtype=bfloat16': encoder.dtype.itemsize == 2,
        '--config.model.encoder.attention_dropout_rate=0': not drops}.items() if not there]
    if missing and encoder.attention == 'cudnn':
        raise UserError(f'attention=cudnn needs {" and ".join(missing)}; attention=auto takes it where it can.')
    return 'xla' if missing else 'cudnn'


ATTENTIONS = ('xla', 'cudnn', 'auto')
REMAT = {
    'none': None,                                                               # everything is kept
    'elementwise': jax.checkpoint_policies.save_only_these_names(DENSE, KEPT),  # all but activations, dropout and norms
    'dots': jax.checkpoint_policies.save_only_these_names(DENSE),               # the outputs of dense layers
    'full': jax.checkpoint_policies.nothing_saveable,                           # each layer's input alone
}
ENCODERS = {'transformer': Transformer}
