"""Logits over the vocabulary: all at once, and in tiles."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import B, D, L, V, batch

from bert_jax.metrics import cross_entropy
from bert_jax.model.embeddings import EMBEDDINGS, TILE, BertEmbeddings

SETTINGS = {'bert': {'vocab_size': V, 'hidden_size': D, 'max_length': 16, 'num_segments': 2, 'dropout_rate': 0.4}}


@pytest.mark.parametrize('name', EMBEDDINGS)
def test_the_contract_of_embeddings(name):
    """A vector a token that follows id, place and segment; dropout in training alone; logits of no padded token."""
    embeddings, example = EMBEDDINGS[name](**SETTINGS[name]), batch()
    params = jax.tree.map(lambda x: x + 0.1, embeddings.init(jax.random.key(0), example, train=False))
    x = embeddings.apply(params, example, train=False)
    assert x.shape == (B, L, embeddings.hidden_size) and embeddings.vocab_size == V
    for field in ('input_ids', 'position_ids', 'segment_ids'):
        other = example | {field: np.roll(example[field], 1, axis=1)}
        moved = np.abs(embeddings.apply(params, other, train=False) - x).max(-1) > 1e-6
        np.testing.assert_array_equal(moved, other[field] != example[field])
    dropped = embeddings.apply(params, example, train=True, rngs={'dropout': jax.random.key(0)})
    assert abs((dropped == 0).mean() - 0.4) < 0.03
    logits = embeddings.apply(params, x, jnp.zeros(128), method='attend')
    assert logits.shape == (B, L, 128) and (logits[..., V:] < -1e8).all() and np.isfinite(logits).all()
    assert max(SETTINGS[name]['max_length'], 16) == embeddings.max_length and embeddings.num_segments == 2


def made(length):
    rng = np.random.default_rng(0)
    embeddings = BertEmbeddings(V, D, 16, 2, 0.0)
    zeros = np.zeros((1, 4), np.int32)
    params = embeddings.init(
        jax.random.key(0), dict.fromkeys(('input_ids', 'segment_ids', 'position_ids'), zeros), train=False
    )
    params['params']['token'] = jnp.asarray(rng.normal(size=(128, D)), jnp.float32)
    x, bias = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((B, length, D), (128,)))
    ids, weights = rng.integers(0, V, (B, length)), rng.integers(0, 2, (B, length)).astype(np.float32)

    def whole(params, x, bias):
        return cross_entropy(embeddings.apply(params, x, bias, method='attend'), ids, weights)

    def tiled(params, x, bias):
        return embeddings.apply(params, x, bias, ids, weights, method='nll')

    return whole, tiled, (params, x, bias)


@pytest.mark.parametrize('length', [1, TILE, TILE + 1, 3 * TILE - 2])
def test_a_loss_in_tiles_is_that_of_all_places(length):
    """Value, accuracy and every gradient; tiles that the length does not fill count for nothing."""
    whole, tiled, args = made(length)
    for one, other in zip(jax.tree.leaves(whole(*args)), jax.tree.leaves(tiled(*args))):
        np.testing.assert_allclose(one, other, rtol=1e-5)
    gradients = [jax.grad(lambda *args, f=f: f(*args)['loss'].total, argnums=(0, 1, 2))(*args) for f in (whole, tiled)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), *gradients)
    assert np.abs(gradients[0][0]['params']['token']).max() > 1


def test_a_loss_in_tiles_never_holds_the_logits_of_all_places():
    """Forward and backward: neither in the program's text nor in its memory."""
    whole, tiled, args = made(8 * TILE)
    texts, sizes = [], []
    for function in (whole, tiled):
        program = (
            jax.jit(jax.grad(lambda *args, f=function: f(*args)['loss'].total, argnums=(0, 1, 2)))
            .lower(*args)
            .compile()
        )
        texts.append(program.as_text())
        sizes.append(program.memory_analysis().temp_size_in_bytes)
    everywhere = re.compile(rf'f32\[(8,{B},{TILE},128|{B},{8 * TILE},128|{B * 8 * TILE},128)\]')
    assert everywhere.search(texts[0]) and not everywhere.search(texts[1])
    assert sizes[1] < sizes[0] / 2
