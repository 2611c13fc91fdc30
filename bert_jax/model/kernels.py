"""Functions of arrays, made faster: gradients written by hand, choices by platform, tricks of a compiler.

Each is the jnp function that its name says; tests hold them equal. A reader may skip this file.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

FEW_ROWS = 512  # of a product, whose gradient is then transposed on CPU


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


def by_platform(cpu: Callable, other: Callable) -> Callable:
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


def sum_rows(x: jax.Array) -> jax.Array:
    """x [..., D] -> [D], as a product with a row of ones: ten times faster than XLA's sum over rows on CPU."""
    x = x.reshape(-1, x.shape[-1])
    ones = jnp.ones((1, x.shape[0]), x.dtype)
    return jax.lax.dot(ones, x, precision='highest', preferred_element_type=jnp.float32)[0]


@jax.custom_vjp
def _add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    """x [..., D] + bias [D]."""
    return x + bias


_add_bias.defvjp(lambda x, bias: (x + bias, None), lambda _, grad: (grad, sum_rows(grad).astype(grad.dtype)))


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


def affine(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """x [..., D] @ kernel [D, F] + bias [F] -> [..., F].

    Rows are flattened first, so that forward and backward pass are plain matrix products: given more axes, XLA
    transposes the gradient before it, which on CPU costs half as much as the product.
    """
    return _add_bias(_product(x.reshape(-1, x.shape[-1]), kernel), bias).reshape(*x.shape[:-1], -1)


def _plain_split(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> tuple[jax.Array, ...]:
    flat = affine(x, kernel.reshape(x.shape[-1], -1), bias.reshape(-1))
    every = flat.reshape(*x.shape[:2], *bias.shape)                     # [B, L, H, 3, K]
    return tuple(every[:, :, :, which].swapaxes(1, 2) for which in range(3))


def _plain_join(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    flat = x.swapaxes(1, 2).reshape(x.shape[0], x.shape[2], -1)
    return affine(flat, kernel.reshape(-1, kernel.shape[-1]), bias)


def _direct_split(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(jnp.einsum('BLD,DHK->BHLK', x, kernel[:, :, which]) + bias[:, None, which] for which in range(3))


def _direct_join(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    return jnp.einsum('BHLK,HKD->BLD', x, kernel) + bias


# Accelerators write a product's result in the order that the next one wants; on CPU it is copied to it, and one large
# product is faster than three. On accelerators three cut out of one would be copied before and after.
split_heads = by_platform(_plain_split, _direct_split)  # [B, L, D], [D, H, 3, K], [H, 3, K] -> three [B, H, L, K]
join_heads = by_platform(_plain_join, _direct_join)     # [B, H, L, K], [H, K, D], [D] -> [B, L, D]


@jax.custom_vjp
def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
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
    return to_x.astype(dtype), sum_rows(grad * normed), sum_rows(grad)


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def drop(x: jax.Array, seeds: jax.Array, rate: float) -> jax.Array:
    """Dropout whose backward pass draws the mask again: it is never kept."""
    keep = random_bits(seeds, x.shape) >= jnp.uint32(round(rate * 2**32))
    return jnp.where(keep, x * (1 / (1 - rate)), jnp.zeros_like(x))


drop.defvjp(lambda x, seeds, rate: (drop(x, seeds, rate), seeds),
             lambda rate, seeds, grad: (drop(grad, seeds, rate), None))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def softmax(scores: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """float32 scores [B, H, L, L] -> probabilities as `dtype`, which are all that is kept for the backward pass."""
    return jax.nn.softmax(scores).astype(dtype)


def _softmax_forward(scores: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    weights = softmax(scores, dtype)
    return weights, weights


def _softmax_backward(dtype: jnp.dtype, weights: jax.Array, grad: jax.Array) -> tuple[jax.Array]:
    weights, grad = weights.astype(jnp.float32), grad.astype(jnp.float32)
    return (weights * (grad - jnp.sum(weights * grad, -1, keepdims=True)),)


softmax.defvjp(_softmax_forward, _softmax_backward)


def fused_attention(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array, lengths: jax.Array | None,
                    causal: bool, implementation: str) -> jax.Array:
    """Attention whose [B, H, L, L] scores never reach memory (Dao et al. 2022); without dropout.

    Args:
      query, key, value: [B, H, L, K].
      mask: bool [B, 1, L, L].
      lengths: int32 [B], tokens of rows that hold one example: with `causal` all that the mask says, and cheaper;
        None for other masks.
      causal: whether the mask hides what is after a position.
      implementation: 'cudnn', or 'xla' to check it by.

    Returns:
      [B, H, L, K]; at padding anything finite.
    """
    which = {'mask': mask} if lengths is None else {
        'query_seq_lengths': lengths, 'key_value_seq_lengths': lengths, 'is_causal': causal}
    mixed = jax.nn.dot_product_attention(*(one.swapaxes(1, 2) for one in (query, key, value)), **which,
                                         implementation=implementation)
    return mixed.swapaxes(1, 2)


def each_part(function: Callable, *args: Any) -> Any:
    """vmap(function), but of one part the function itself: a batch of one product is slower than the product on CPU."""
    if len(args[0]) == 1:
        return jax.tree.map(lambda x: x[None], function(*(arg[0] for arg in args)))
    return jax.vmap(function)(*args)


@jax.custom_vjp
def lookup(table: jax.Array, ids: jax.Array) -> jax.Array:
    """Rows of a table [parts, V, D] at ids [B, L] -> [B, L, D]; the gradient is summed in float32."""
    found = each_part(lambda table, ids: jnp.take(table, ids, axis=0), table, ids.reshape(len(table), -1))
    return found.reshape(*ids.shape, -1)


def _lookup_backward(saved: tuple, grad: jax.Array) -> tuple[jax.Array, None]:
    table, ids = saved
    parts, size, width = table.shape
    added = each_part(lambda ids, grad: jnp.zeros((size, width), jnp.float32).at[ids].add(grad), ids.reshape(parts, -1),
                      grad.astype(jnp.float32).reshape(parts, -1, width))
    return added.astype(table.dtype), None


lookup.defvjp(lambda table, ids: (lookup(table, ids), (table, ids)), _lookup_backward)


def _lstm_cell(gates: jax.Array, cell: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(hidden, cell) after a token, from the cell before it; gates in PyTorch's order."""
    write, keep, new, read = jnp.split(gates, 4, -1)
    cell = jax.nn.sigmoid(keep) * cell + jax.nn.sigmoid(write) * jnp.tanh(new)
    return jax.nn.sigmoid(read) * jnp.tanh(cell), cell


@jax.custom_vjp
def lstm(inputs: jax.Array, recurrent: jax.Array, goes_on: jax.Array) -> jax.Array:
    """An LSTM's recurrence (Hochreiter and Schmidhuber 1997).

    inputs [L, B, 4 H], recurrent [H, 4 H], goes_on [L, B, 1] (1, or 0 where the state begins anew) -> hidden [L, B, H].
    With a gradient of its own: that of `recurrent` is one product over all tokens instead of a sum that is read and
    written at each of them.
    """
    return _lstm_forward(inputs, recurrent, goes_on)[0]


def _lstm_forward(inputs: jax.Array, recurrent: jax.Array, goes_on: jax.Array) -> tuple[jax.Array, tuple]:
    def step(state: tuple, now: tuple) -> tuple:
        from_input, keep = now
        hidden, cell = (x * keep for x in state)
        gates = from_input + hidden @ recurrent
        after = _lstm_cell(gates, cell)
        return after, (after[0], gates, hidden, cell)

    start = jnp.zeros((inputs.shape[1], recurrent.shape[0]), inputs.dtype)
    _, (hidden, *kept) = jax.lax.scan(step, (start, start), (inputs, goes_on))
    return hidden, (recurrent, goes_on, *kept)


def _lstm_backward(kept: tuple, d_hidden: jax.Array) -> tuple:
    recurrent, goes_on, gates, hidden, cell = kept
    back = jax.lax.optimization_barrier(recurrent.T)  # as an array of its own: 6 times as fast a product on CPU

    def step(d_after: tuple, now: tuple) -> tuple:
        d_out, keep, gates, cell = now
        _, pull = jax.vjp(_lstm_cell, gates, cell)
        d_gates, d_cell = pull((d_after[0] + d_out, d_after[1]))
        return (d_gates @ back * keep, d_cell * keep), d_gates

    end = jnp.zeros_like(hidden[0])
    _, d_gates = jax.lax.scan(step, (end, end), (d_hidden, goes_on, gates, cell), reverse=True)
    return d_gates, jnp.einsum('lbh,lbg->hg', hidden, d_gates), None


lstm.defvjp(_lstm_forward, _lstm_backward)
