"""Parts that encoders share: attention, MLP, LSTM, normalisation, dropout."""

import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from bert_jax import partition
from bert_jax.model import kernels

DENSE = 'dense'  # outputs of dense layers,
KEPT = 'kept'    # and what else the backward pass cannot compute again cheaply: attention, sums before a norm
INITIAL_DEVIATION = 0.02  # of weights (Devlin et al. 2019, their code's initializer_range)
ACTIVATIONS: dict[str, Callable] = {
    'gelu': functools.partial(kernels.gelu, approximate=False),      # erf: Hugging Face's default
    'gelu_new': functools.partial(kernels.gelu, approximate=True),   # tanh: the original code's `gelu`
    'relu': jax.nn.relu,
}


def kernel_init(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """Normal numbers of INITIAL_DEVIATION, cut at two deviations, as nn.initializers.truncated_normal makes them.

    Drawn with `kernels.random_bits`: on CPU a model's initialisation compiles in a third of the time.
    """
    bits = kernels.random_bits(jax.random.bits(key, (2,)), shape)
    uniform = ((bits >> 9).astype(jnp.float32) + 0.5) * 2.0**-23  # exact
    normal = math.sqrt(2) * jax.lax.erf_inv((2 * uniform - 1) * math.erf(math.sqrt(2)))
    return (INITIAL_DEVIATION * normal).astype(dtype)


def _kernel(module: nn.Module, *shape: int) -> jax.Array:
    """The kernel of a layer as it is used: in the layer's dtype, and whole where `fsdp` splits it."""
    kernel = module.param('kernel', kernel_init, shape).astype(module.dtype)
    return partition.whole(kernel, '/'.join((*module.path, 'kernel')))


class Dense(nn.Module):
    """x @ kernel + bias.

    Attributes:
      features: F.
      dtype: what is computed in.
    """

    features: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., D] -> [..., F]."""
        kernel = _kernel(self, x.shape[-1], self.features)
        bias = self.param('bias', nn.initializers.zeros, (self.features,)).astype(self.dtype)
        return kernels.affine(x.astype(self.dtype), kernel, bias)


class QueryKeyValue(nn.Module):
    """Attention's three projections, whose parameters are one array, heads first, as `tensor` splits them."""

    heads: tuple[int, int]
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, ...]:
        """x [B, L, D] -> query, key, value [B, H, L, K]."""
        shape = (self.heads[0], 3, self.heads[1])
        kernel = _kernel(self, x.shape[-1], *shape)
        bias = self.param('bias', nn.initializers.zeros, shape).astype(self.dtype)
        return kernels.split_heads(x.astype(self.dtype), kernel, bias)


class Output(nn.Module):
    """Attention's last projection, of all heads together."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, H, L, K] -> [B, L, D]."""
        heads = x.shape[1], x.shape[3]
        width = math.prod(heads)
        kernel = _kernel(self, *heads, width)
        bias = self.param('bias', nn.initializers.zeros, (width,)).astype(self.dtype)
        return kernels.join_heads(x, kernel, bias)


class LayerNorm(nn.Module):
    """Layer normalisation (Ba et al. 2016) with epsilon 1e-12; computed in float32, given back as `dtype`."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., D] -> the same shape."""
        scale = self.param('scale', nn.initializers.ones, x.shape[-1:])
        bias = self.param('bias', nn.initializers.zeros, x.shape[-1:])
        return kernels.layer_norm(x.astype(self.dtype), scale, bias)


class Dropout(nn.Module):
    """Zeroes a share `rate` of the entries and scales the rest by 1 / (1 - rate)."""

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """x of any shape -> the same shape."""
        if not train or self.rate == 0:
            return x
        return kernels.drop(x, jax.random.bits(self.make_rng('dropout'), (2,)), self.rate)


class Attention(nn.Module):
    """Multi-head self-attention within each example of a row.

    Attributes:
      num_heads: H; the head size K is D / H.
      attention_dropout_rate: dropout on the attention probabilities.
      kernel: 'xla', or 'cudnn', which has no dropout.
      causal: whether the mask hides what is after a position: `lengths` do not say so.
      dtype: what is computed in; the softmax is float32 always.
    """

    num_heads: int
    attention_dropout_rate: float
    kernel: str
    causal: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, lengths: jax.Array | None, *, train: bool
                 ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """x [B, L, D], mask bool [B, 1, L, L] -> [B, L, D], and query, key, value [B, H, L, K]."""
        heads = (self.num_heads, x.shape[-1] // self.num_heads)
        query, key, value = (checkpoint_name(one, DENSE) for one in QueryKeyValue(heads, self.dtype, name='qkv')(x))
        if self.kernel == 'xla':
            mixed = self._mix(query, key, value, mask, train)
        else:
            mixed = kernels.fused_attention(query, key, value, mask, lengths, self.causal, self.kernel)
        out = checkpoint_name(Output(self.dtype, name='out')(checkpoint_name(mixed, KEPT)), DENSE)
        return out, {'query': query, 'key': key, 'value': value}

    def _mix(self, query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array, train: bool) -> jax.Array:
        scores = jnp.einsum('BHqK,BHkK->BHqk', query * query.shape[-1] ** -0.5, key,
                            preferred_element_type=jnp.float32)
        scores = jnp.where(mask, scores, -1e9)
        weights = checkpoint_name(kernels.softmax(scores, self.dtype), KEPT)      # [B, H, L, L]
        weights = Dropout(self.attention_dropout_rate)(weights, train=train)
        return jnp.einsum('BHqk,BHkK->BHqK', weights, value)


class Mlp(nn.Module):
    """Two dense layers, [B, L, D] -> [B, L, F] -> [B, L, D]."""

    mlp_size: int
    activation: str
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, L, D] -> [B, L, D]."""
        hidden = checkpoint_name(Dense(self.mlp_size, self.dtype, name='up')(x), DENSE)
        hidden = ACTIVATIONS[self.activation](hidden)
        return checkpoint_name(Dense(x.shape[-1], self.dtype, name='down')(hidden), DENSE)


class Lstm(nn.Module):
    """One direction of an LSTM (Hochreiter and Schmidhuber 1997), whose state begins anew in each example of a row.

    All tokens' inputs are multiplied at once, not token by token as in flax's nn.RNN.

    Attributes:
      hidden_size: H.
      reverse: from the last token to the first.
      dtype: what is computed in.
    """

    hidden_size: int
    reverse: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, input_mask: jax.Array) -> jax.Array:
        """x [B, L, D], input_mask [B, L] (0 = padding, k = the row's k-th example) -> [B, L, H]."""
        inputs = nn.Dense(4 * self.hidden_size, dtype=self.dtype, name='inputs')(x)
        recurrent = self.param('recurrent', nn.initializers.orthogonal(), (self.hidden_size, 4 * self.hidden_size))
        order = slice(None, None, -1 if self.reverse else 1)
        mask = input_mask.T[order]                                         # [L, B], as it is walked through
        goes_on = jnp.zeros_like(mask).at[1:].set((mask[1:] == mask[:-1]) & (mask[1:] > 0))
        hidden = kernels.lstm(inputs.swapaxes(0, 1)[order], recurrent.astype(self.dtype),
                              goes_on[..., None].astype(self.dtype))
        return hidden[order].swapaxes(0, 1)


def gather(x: jax.Array, positions: jax.Array) -> jax.Array:
    """Rows of x [B, L, D] at positions [B, P] -> [B, P, D]."""
    return jnp.take_along_axis(x, positions[..., None], axis=1)
