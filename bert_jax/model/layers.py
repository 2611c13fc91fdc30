"""Parts that encoders share: attention, MLP, normalisation, dropout.

Post-norm Transformer block of Devlin et al. 2019 (after Vaswani et al. 2017):
x = LN(x + drop(attention(x))); x = LN(x + drop(mlp(x))).
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from bert_jax import partition
from bert_jax.metrics import Mean

FEW_ROWS = 512  # of a product, whose gradient is then transposed on CPU
DENSE = 'dense'  # outputs of dense layers,
KEPT = 'kept'    # and what else the backward pass cannot compute again cheaply: attention, sums before a norm
INITIAL_DEVIATION = 0.02  # of weights (Devlin et al. 2019, their code's initializer_range)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def gelu(x: jax.Array, approximate: bool) -> jax.Array:
    """x * P(N(0, 1) <= x) (Hendrycks and Gimpel 2016), by erf, or by tanh when approximate.

    Its gradient mirrors the argument, so that the compiler does not find the forward pass's erf or tanh in it
    and keep that [B, L, F] array in memory: computing it again is faster than reading it. jax.nn.gelu takes erfc, for
    which XLA on CPU goes over the array several times.
    """
    if approximate:
        return jax.nn.gelu(x)
    return (x * (0.5 + 0.5 * jax.lax.erf(x.astype(jnp.float32) * math.sqrt(0.5)))).astype(x.dtype)


def _gelu_backward(approximate: bool, x: jax.Array, grad: jax.Array) -> tuple[jax.Array]:
    x = x.astype(jnp.float32)
    if approximate:
        scale, cubic = math.sqrt(2 / math.pi), 0.044715
        tanh = -jnp.tanh(-x * (scale + scale * cubic * x * x))
        slope = 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh * tanh) * (scale + 3 * scale * cubic * x * x)
    else:
        below = 0.5 - 0.5 * jax.lax.erf(x * -math.sqrt(0.5))
        slope = below + x * jnp.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    return ((grad * slope).astype(grad.dtype),)


gelu.defvjp(lambda x, approximate: (gelu(x, approximate), x), _gelu_backward)

ACTIVATIONS: dict[str, Callable] = {
    'gelu': functools.partial(gelu, approximate=False),      # erf: Hugging Face's default
    'gelu_new': functools.partial(gelu, approximate=True),   # tanh: the original code's `gelu`
    'relu': jax.nn.relu,
}


def _by_platform(cpu: Callable, other: Callable) -> Callable:
    """A function of arrays that is `cpu` on CPUs and `other` elsewhere, and so is its gradient.

    `platform_dependent` alone would keep for the backward pass what either of them needs.
    """
    @jax.custom_vjp
    def chosen(*args: jax.Array) -> Any:
        return jax.lax.platform_dependent(*args, cpu=cpu, default=other)

    def backward(args: tuple, grad: Any) -> tuple:
        def gradient(function: Callable) -> Callable:
            return lambda grad, *args: jax.vjp(function, *args)[1](grad)

        return jax.lax.platform_dependent(grad, *args, cpu=gradient(cpu), default=gradient(other))

    chosen.defvjp(lambda *args: (chosen(*args), args), backward)
    return chosen


def _sum_rows(x: jax.Array) -> jax.Array:
    """x [..., D] -> [D], as a product with a row of ones: ten times faster than XLA's sum over rows on CPU."""
    x = x.reshape(-1, x.shape[-1])
    ones = jnp.ones((1, x.shape[0]), x.dtype)
    return jax.lax.dot(ones, x, precision='highest', preferred_element_type=jnp.float32)[0]


@jax.custom_vjp
def _add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    """x [..., D] + bias [D]."""
    return x + bias


_add_bias.defvjp(lambda x, bias: (x + bias, None), lambda _, grad: (grad, _sum_rows(grad).astype(grad.dtype)))


@jax.custom_vjp
def _product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [N, D] @ kernel [D, F].

    The gradient of x is a product with the transposed kernel, which XLA on CPU does at two thirds of the speed of
    others. For few rows it is faster to transpose them, before the product and after it.
    """
    return x @ kernel


def _product_backward(saved: tuple[jax.Array, jax.Array], grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    if len(x) > FEW_ROWS:
        return grad @ kernel.T, x.T @ grad
    keep = jax.lax.optimization_barrier
    return keep(kernel @ keep(grad.T)).T, x.T @ grad


_product.defvjp(lambda x, kernel: (x @ kernel, (x, kernel)), _product_backward)


def _affine(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """x [..., D] @ kernel [D, F] + bias [F] -> [..., F].

    Rows are flattened first, so that forward and backward pass are plain matrix products: given more axes, XLA
    transposes the gradient before it, which on CPU costs half as much as the product.
    """
    return _add_bias(_product(x.reshape(-1, x.shape[-1]), kernel), bias).reshape(*x.shape[:-1], -1)


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
        return _affine(x.astype(self.dtype), kernel, bias)


def _plain_split(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> tuple[jax.Array, ...]:
    flat = _affine(x, kernel.reshape(x.shape[-1], -1), bias.reshape(-1))
    every = flat.reshape(*x.shape[:2], *bias.shape)                     # [B, L, H, 3, K]
    return tuple(every[:, :, :, which].swapaxes(1, 2) for which in range(3))


def _plain_join(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    flat = x.swapaxes(1, 2).reshape(x.shape[0], x.shape[2], -1)
    return _affine(flat, kernel.reshape(-1, kernel.shape[-1]), bias)


def _direct_split(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(jnp.einsum('BLD,DHK->BHLK', x, kernel[:, :, which]) + bias[:, None, which] for which in range(3))


def _direct_join(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    return jnp.einsum('BHLK,HKD->BLD', x, kernel) + bias


# Accelerators write a product's result in the order that the next one wants; on CPU it is copied to it, and one large
# product is faster than three. On accelerators three cut out of one would be copied before and after.
_split_heads = _by_platform(_plain_split, _direct_split)  # [B, L, D], [D, H, 3, K], [H, 3, K] -> three [B, H, L, K]
_join_heads = _by_platform(_plain_join, _direct_join)     # [B, H, L, K], [H, K, D], [D] -> [B, L, D]


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
        return _split_heads(x.astype(self.dtype), kernel, bias)


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
        return _join_heads(x, kernel, bias)


@jax.custom_vjp
def _layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    """x [..., D], float32 scale and bias [D] -> (x - mean) / sqrt(variance + 1e-12) * scale + bias, as x's dtype."""
    return _layer_norm_forward(x, scale, bias)[0]


def _layer_norm_forward(x: jax.Array, scale: jax.Array, bias: jax.Array) -> tuple[jax.Array, tuple]:
    given, x = x, x.astype(jnp.float32)
    mean = x.mean(-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.mean((x - mean)**2, -1, keepdims=True) + 1e-12)
    return ((x - mean) * inverse * scale + bias).astype(given.dtype), (given, mean, inverse, scale)


def _layer_norm_backward(saved: tuple, grad: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, mean, inverse, scale = saved
    x, grad, dtype = x.astype(jnp.float32), grad.astype(jnp.float32), x.dtype
    normed, scaled = (x - mean) * inverse, grad * scale
    to_x = inverse * (scaled - scaled.mean(-1, keepdims=True) - normed * jnp.mean(scaled * normed, -1, keepdims=True))
    return to_x.astype(dtype), _sum_rows(grad * normed), _sum_rows(grad)


_layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


class LayerNorm(nn.Module):
    """Layer normalisation (Ba et al. 2016) with epsilon 1e-12; computed in float32, given back as `dtype`."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., D] -> the same shape."""
        scale = self.param('scale', nn.initializers.ones, x.shape[-1:])
        bias = self.param('bias', nn.initializers.zeros, x.shape[-1:])
        return _layer_norm(x.astype(self.dtype), scale, bias)


def random_bits(seeds: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """uint32 bits for dropout and first weights: MurmurHash3's finalizer of (seeds uint32 [2], row, column).

    A fifth of threefry's work, and of each element alone: nothing is stored or communicated, whatever the sharding.
    """
    counters = [jax.lax.broadcasted_iota(jnp.uint32, shape, axis) for axis in range(len(shape))]
    row = jnp.zeros((), jnp.uint32)
    for size, counter in zip(shape[:-1], counters[:-1]):
        row = row * jnp.uint32(size) + counter
    bits = (row * jnp.uint32(0x9E3779B1) + seeds[0]) ^ (counters[-1] * jnp.uint32(0x85EBCA77) + seeds[1])
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
    return bits ^ (bits >> 16)


def kernel_init(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """Normal numbers of INITIAL_DEVIATION, cut at two deviations, as nn.initializers.truncated_normal makes them.

    Drawn with `random_bits`: on CPU a model's initialisation compiles in a third of the time.
    """
    uniform = ((random_bits(jax.random.bits(key, (2,)), shape) >> 9).astype(jnp.float32) + 0.5) * 2.0**-23  # exact
    normal = math.sqrt(2) * jax.lax.erf_inv((2 * uniform - 1) * math.erf(math.sqrt(2)))
    return (INITIAL_DEVIATION * normal).astype(dtype)


class Dropout(nn.Module):
    """Zeroes a share `rate` of the entries and scales the rest by 1 / (1 - rate)."""

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """x of any shape -> the same shape."""
        if not train or self.rate == 0:
            return x
        return _drop(x, jax.random.bits(self.make_rng('dropout'), (2,)), self.rate)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _drop(x: jax.Array, seeds: jax.Array, rate: float) -> jax.Array:
    """Dropout whose backward pass draws the mask again: it is never kept."""
    keep = random_bits(seeds, x.shape) >= jnp.uint32(round(rate * 2**32))
    return jnp.where(keep, x * (1 / (1 - rate)), jnp.zeros_like(x))


_drop.defvjp(lambda x, seeds, rate: (_drop(x, seeds, rate), seeds),
             lambda rate, seeds, grad: (_drop(grad, seeds, rate), None))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _softmax(scores: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """float32 scores [B, H, L, L] -> probabilities as `dtype`, which are all that is kept for the backward pass."""
    return jax.nn.softmax(scores).astype(dtype)


def _softmax_forward(scores: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    weights = _softmax(scores, dtype)
    return weights, weights


def _softmax_backward(dtype: jnp.dtype, weights: jax.Array, grad: jax.Array) -> tuple[jax.Array]:
    weights, grad = weights.astype(jnp.float32), grad.astype(jnp.float32)
    return (weights * (grad - jnp.sum(weights * grad, -1, keepdims=True)),)


_softmax.defvjp(_softmax_forward, _softmax_backward)


def fused_attention(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array, lengths: jax.Array | None,
                    implementation: str) -> jax.Array:
    """Attention whose [B, H, L, L] scores never reach memory (Dao et al. 2022); without dropout.

    Args:
      query, key, value: [B, H, L, K].
      mask: bool [B, 1, L, L].
      lengths: int32 [B], tokens of rows that hold one example: cheaper than the mask; None for packed rows.
      implementation: 'cudnn', or 'xla' to check it by.

    Returns:
      [B, H, L, K]; at padding anything finite.
    """
    which = {'mask': mask} if lengths is None else {'query_seq_lengths': lengths, 'key_value_seq_lengths': lengths}
    mixed = jax.nn.dot_product_attention(*(one.swapaxes(1, 2) for one in (query, key, value)), **which,
                                         implementation=implementation)
    return mixed.swapaxes(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention within each example of a row.

    Attributes:
      num_heads: H; the head size K is D / H.
      attention_dropout_rate: dropout on the attention probabilities.
      implementation: 'xla', or 'cudnn', which has no dropout.
      dtype: what is computed in; the softmax is float32 always.
    """

    num_heads: int
    attention_dropout_rate: float
    implementation: str
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, lengths: jax.Array | None, *, train: bool
                 ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """x [B, L, D], mask bool [B, 1, L, L] -> [B, L, D], and query, key, value [B, H, L, K]."""
        heads = (self.num_heads, x.shape[-1] // self.num_heads)
        query, key, value = (checkpoint_name(one, DENSE) for one in QueryKeyValue(heads, self.dtype, name='qkv')(x))
        if self.implementation == 'xla':
            mixed = self._mix(query, key, value, mask, train)
        else:
            mixed = fused_attention(query, key, value, mask, lengths, self.implementation)
        out = checkpoint_name(Output(self.dtype, name='out')(checkpoint_name(mixed, KEPT)), DENSE)
        return out, {'query': query, 'key': key, 'value': value}

    def _mix(self, query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array, train: bool) -> jax.Array:
        scores = jnp.einsum('BHqK,BHkK->BHqk', query * query.shape[-1] ** -0.5, key,
                            preferred_element_type=jnp.float32)
        scores = jnp.where(mask, scores, -1e9)
        weights = checkpoint_name(_softmax(scores, self.dtype), KEPT)      # [B, H, L, L]
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


def each_part(function: Callable, *args: jax.Array) -> jax.Array:
    """vmap(function), but of one part the function itself: a batch of one product is slower than the product on CPU."""
    return function(*(arg[0] for arg in args))[None] if len(args[0]) == 1 else jax.vmap(function)(*args)


def gather(x: jax.Array, positions: jax.Array) -> jax.Array:
    """Rows of x [B, L, D] at positions [B, P] -> [B, P, D]."""
    return jnp.take_along_axis(x, positions[..., None], axis=1)


def cross_entropy(logits: jax.Array, labels: jax.Array, weights: jax.Array) -> dict[str, Mean]:
    """Cross-entropy in nats and accuracy; logits [..., C], labels and weights [...]."""
    right = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    best = jnp.max(logits, axis=-1)
    nll = jax.nn.logsumexp(logits, axis=-1) - right
    return {'loss': Mean.of(nll, weights), 'accuracy': Mean.of(right >= best, weights)}
