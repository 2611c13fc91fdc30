"""Parts that encoders share: attention, MLP, normalisation, dropout.

Post-norm Transformer block of Devlin et al. 2019 (after Vaswani et al. 2017):
x = LN(x + drop(attention(x))); x = LN(x + drop(mlp(x))).
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

ACTIVATIONS: dict[str, Callable] = {
    'gelu': functools.partial(jax.nn.gelu, approximate=False),      # erf: Hugging Face's default
    'gelu_new': functools.partial(jax.nn.gelu, approximate=True),   # tanh: the original code's `gelu`
    'relu': jax.nn.relu,
}
kernel_init = nn.initializers.truncated_normal(stddev=0.02, lower=-2.0, upper=2.0)
LayerNorm = functools.partial(nn.LayerNorm, epsilon=1e-12)


class Dropout(nn.Module):
    """Zeroes a share `rate` of the entries and scales the rest by 1 / (1 - rate).

    Draws 16 bits an entry, so the rate is held to 2**-17; half the random bits of `nn.Dropout`.
    """

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """x of any shape -> the same shape."""
        if not train or self.rate == 0:
            return x
        threshold = round(self.rate * 65536)
        bits = jax.random.bits(self.make_rng('dropout'), (*x.shape[:-1], -(-x.shape[-1] // 2)), jnp.uint32)
        halves = jax.lax.bitcast_convert_type(bits, jnp.uint16)        # [..., n/2, 2]
        halves = halves.reshape(*x.shape[:-1], -1)[..., :x.shape[-1]]
        return jnp.where(halves >= threshold, x / (1 - threshold / 65536), jnp.zeros_like(x))


class Attention(nn.Module):
    """Multi-head self-attention within each example of a row.

    Attributes:
      num_heads: H; the head size K is D / H.
      attention_dropout_rate: dropout on the attention probabilities.
      dtype: what is computed in; the softmax is float32 always.
    """

    num_heads: int
    attention_dropout_rate: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, *, train: bool) -> tuple[jax.Array, dict[str, jax.Array]]:
        """x [B, L, D], mask bool [B, 1, L, L] -> [B, L, D], and query, key, value [B, L, H, K]."""
        width = x.shape[-1]
        heads = (self.num_heads, width // self.num_heads)
        qkv = nn.DenseGeneral((3, *heads), kernel_init=kernel_init, dtype=self.dtype, name='qkv')(x)
        query, key, value = (qkv[..., i, :, :] for i in range(3))          # [B, L, H, K]
        scores = jnp.einsum('BqHK,BkHK->BHqk', query * heads[1] ** -0.5, key,
                            preferred_element_type=jnp.float32)
        scores = jnp.where(mask, scores, -1e9)
        weights = jax.nn.softmax(scores).astype(self.dtype)                # [B, H, L, L]
        weights = Dropout(self.attention_dropout_rate)(weights, train=train)
        mixed = jnp.einsum('BHqk,BkHK->BqHK', weights, value)
        out = nn.DenseGeneral(width, axis=(-2, -1), kernel_init=kernel_init, dtype=self.dtype, name='out')(mixed)
        return out, {'query': query, 'key': key, 'value': value}


class Mlp(nn.Module):
    """Two dense layers, [B, L, D] -> [B, L, F] -> [B, L, D]."""

    mlp_size: int
    activation: str
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, L, D] -> [B, L, D]."""
        hidden = nn.Dense(self.mlp_size, kernel_init=kernel_init, dtype=self.dtype, name='up')(x)
        hidden = ACTIVATIONS[self.activation](hidden)
        return nn.Dense(x.shape[-1], kernel_init=kernel_init, dtype=self.dtype, name='down')(hidden)


def gather(x: jax.Array, positions: jax.Array) -> jax.Array:
    """Rows of x [B, L, D] at positions [B, P] -> [B, P, D]."""
    return jnp.take_along_axis(x, positions[..., None], axis=1)
