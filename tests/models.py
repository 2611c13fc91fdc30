"""Small models and batches for the tests, with sizes that cannot be confused: B, L, P, D, V = 8, 13, 3, 32, 67."""

import jax
import jax.numpy as jnp
import numpy as np

from bert_jax import cli
from bert_jax.model import model as models

B, L, P, D, V = 8, 13, 3, 32, 67


def config(*overrides, arg='tiny'):
    c = cli.load_config('configs/pretrain.py:' + arg, [f'--config.{o}' for o in (
        'model.encoder.num_layers=2', f'model.embeddings.hidden_size={D}', 'model.encoder.num_heads=4',
        'model.encoder.mlp_size=48', 'model.embeddings.max_length=16', f'model.embeddings.vocab_size={V}', *overrides)])
    return c.model


def batch(rng=None, padded=True):
    """Examples whose masked positions, labels and padding differ row by row."""
    rng = rng or np.random.default_rng(0)
    lengths = rng.integers(5, L + 1, B) if padded else np.full(B, L)
    place = np.arange(L)
    mask = (place < lengths[:, None]).astype(np.int32)
    weights = (np.arange(P) < rng.integers(0, P + 1, B)[:, None]).astype(np.float32)
    weights[0] = 1
    return {
        'input_ids': (rng.integers(5, V, (B, L)) * mask).astype(np.int32),
        'input_mask': mask,
        'segment_ids': ((place >= lengths[:, None] // 2) * mask).astype(np.int32),
        'position_ids': np.broadcast_to(place, (B, L)).astype(np.int32).copy(),
        'masked_lm_positions': np.sort(rng.integers(1, 5, (B, P))).astype(np.int32),
        'masked_lm_ids': rng.integers(5, V, (B, P)).astype(np.int32),
        'masked_lm_weights': weights,
        'cls_positions': np.zeros((B, 1), np.int32),
        'next_sentence_labels': rng.integers(0, 2, (B, 1)).astype(np.int32),
        'next_sentence_weights': np.ones((B, 1), np.float32),
        'label_ids': rng.integers(0, 3, B).astype(np.int32),
        'is_real_example': np.ones(B, np.int32),
    }


def packed_batch():
    """Two examples a row, of 3 to 8 tokens, and padding after them."""
    rng, example = np.random.default_rng(1), batch(padded=False)
    first, both = rng.integers(3, 6, B)[:, None], rng.integers(8, L + 1, B)[:, None]
    place = np.arange(L)
    example['input_mask'] = ((place < both) * (1 + (place >= first))).astype(np.int32)
    example['position_ids'] = np.where(place < first, place, place - first).astype(np.int32)
    example['cls_positions'] = np.concatenate([np.zeros_like(first), first], 1).astype(np.int32)
    for name in ('next_sentence_labels', 'next_sentence_weights'):
        example[name] = np.repeat(example[name], 2, 1)
    example['masked_lm_positions'] = np.minimum(example['masked_lm_positions'], both - 1).astype(np.int32)
    return example


def random_params(model, example, seed=0, scale=0.2):
    """Every tensor random and of realistic size, LayerNorm scales and biases too, so that no swap can hide."""
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), example, train=False))['params']
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        base = 1.0 if path[-1].key == 'scale' else 0.0
        return jnp.asarray(base + scale * rng.normal(size=leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, params)


def build(*overrides, arg='tiny', reads=()):
    return models.build(config(*overrides, arg=arg), reads)
