"""Schedule, decay mask, AdamW, LAMB.

A transformation here gives the update direction; the training step multiplies it by the learning
rate of its step, so that a sweep over rates compiles once.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from bert_jax.cli import choose

NOT_DECAYED = ('bias', 'scale')  # biases and LayerNorm
STACKED = 'layers'  # parameters below it have the layer as leading axis
JOINED = 'qkv'      # arrays [..., 3, K] that are three of the original's


def learning_rate(step: int, *, peak: float, warmup_share: float, num_steps: int) -> float:
    """The rate of update `step` (from 0): linear warm-up from 0, then the line from peak at 0 to 0 at the end.

    The decay line starts at step 0 and warm-up overrides it, as in optimization.py of google-research/bert.
    """
    warmup_steps = round(warmup_share * num_steps)
    if step < warmup_steps:
        return peak * step / warmup_steps
    return peak * max(0.0, 1 - step / num_steps)


def adamw(*, b1: float, b2: float, eps: float, weight_decay: float, clip_norm: float, bias_correction: bool
          ) -> optax.GradientTransformation:
    """Adam with decoupled weight decay, after clipping by global norm; the original has no bias correction."""
    return optax.chain(_clip(clip_norm), _adam(b1, b2, eps, bias_correction), _decay(weight_decay))


def lamb(*, b1: float, b2: float, eps: float, weight_decay: float, clip_norm: float, bias_correction: bool
         ) -> optax.GradientTransformation:
    """LAMB (You et al. 2020, algorithm 2): AdamW's direction times ||w|| / ||direction||, layer by layer.

    As in the authors' code, what is not decayed is not scaled either: a bias starts at 0, and would stay near it.
    """
    return optax.chain(_clip(clip_norm), _adam(b1, b2, eps, bias_correction), _decay(weight_decay),
                       _trust_ratio())


def make_optimizer(name: str, **kwargs: float) -> optax.GradientTransformation:
    """The OPTIMIZERS entry with its keywords."""
    return choose('optimizer', OPTIMIZERS, name)(**kwargs)


class AdamState(NamedTuple):
    """Adam's moments, and the updates made."""

    count: jax.Array
    mu: optax.Params
    nu: optax.Params


def _adam(b1: float, b2: float, eps: float, bias_correction: bool) -> optax.GradientTransformation:
    """optax.scale_by_adam with a switch for bias correction."""

    def init(params: optax.Params) -> AdamState:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return AdamState(jnp.zeros([], jnp.int32), zeros, jax.tree.map(jnp.copy, zeros))

    def update(grads: optax.Updates, state: AdamState, params: optax.Params | None = None
               ) -> tuple[optax.Updates, AdamState]:
        count = state.count + 1
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, grads)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state.nu, grads)
        c1, c2 = (1 - b1**count, 1 - b2**count) if bias_correction else (1.0, 1.0)
        return jax.tree.map(lambda m, v: (m / c1) / (jnp.sqrt(v / c2) + eps), mu, nu), AdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def _clip(norm: float) -> optax.GradientTransformation:
    """Clipping by global norm, as one factor that fuses into what reads the gradients."""
    if not norm:
        return optax.identity()

    def scale(grads: optax.Updates, _: optax.Params | None) -> optax.Updates:
        factor = jnp.minimum(1, norm / global_norm(grads))
        return jax.tree.map(lambda g: g * factor, grads)

    return optax.stateless(scale)


def global_norm(tree: optax.Params) -> jax.Array:
    """The Euclidean norm of all arrays together."""
    return jnp.sqrt(sum(jax.lax.platform_dependent(x, cpu=_sum_square_in_parts, default=_sum_square)
                        for x in jax.tree.leaves(tree)))


def _sum_square(x: jax.Array) -> jax.Array:
    return jnp.sum(x * x)


def _sum_square_in_parts(x: jax.Array) -> jax.Array:
    """Sixteen squares at a time, as they are read; of larger sums XLA on CPU first writes all squares to memory."""
    x = jnp.atleast_1d(x)
    parts = (x * x).reshape(*x.shape[:-1], -1, math.gcd(x.shape[-1], 16)).sum(-1)
    return jnp.sum(jax.lax.optimization_barrier(parts))


def _decay(weight_decay: float) -> optax.GradientTransformation:
    return optax.add_decayed_weights(weight_decay, mask=decay_mask)


def decay_mask(params: optax.Params) -> optax.Params:
    """True for what is decayed: by name, since the biases of stacked layers have two dimensions."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in NOT_DECAYED, params)


def _trust_ratio() -> optax.GradientTransformation:
    def scale(path: tuple, update: jax.Array, param: jax.Array) -> jax.Array:
        names = [key.key for key in path]
        if names[-1] in NOT_DECAYED:
            return update
        apart = {0} if STACKED in names else set()                         # each layer on its own,
        apart |= {param.ndim - 2} if JOINED in names else set()            # and query, key and value
        axes = tuple(sorted(set(range(param.ndim)) - apart))
        norm = jnp.sqrt(jnp.sum(param**2, axes, keepdims=True))
        size = jnp.sqrt(jnp.sum(update**2, axes, keepdims=True))
        ratio = jnp.where((norm > 0) & (size > 0), norm / jnp.where(size > 0, size, 1), 1.0)
        return update * ratio

    return optax.stateless(
        lambda updates, params: jax.tree_util.tree_map_with_path(scale, updates, params))


OPTIMIZERS = {'adamw': adamw, 'lamb': lamb}
