"""Optimizers and schedule against float64 NumPy, and against optax where it has the same thing."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import watch

from bert_jax import optimizer
from bert_jax.cli import UserError

SETTINGS = {'b1': 0.9, 'b2': 0.999, 'eps': 1e-6, 'weight_decay': 0.01, 'clip_norm': 1.0}


def params():
    rng = np.random.default_rng(0)
    return {'encoder': {'layers': {'dense': {'kernel': rng.normal(size=(3, 4, 5)), 'bias': rng.normal(size=(3, 5))},
                                   'norm': {'scale': rng.normal(size=(3, 5)), 'bias': rng.normal(size=(3, 5))}}},
            'embeddings': {'token': rng.normal(size=(7, 4))}}


def numpy_steps(tree, grads, rate, correct, lamb, b1, b2, eps, weight_decay, clip_norm, after=lambda tree: None):
    """Loshchilov & Hutter's AdamW and You et al.'s LAMB, a leaf and a layer at a time, in float64."""
    flat, layout = jax.tree.flatten(tree)
    names = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(tree)]
    ms, vs = [np.zeros_like(p) for p in flat], [np.zeros_like(p) for p in flat]
    for t, grad in enumerate(grads, 1):
        gs = jax.tree.leaves(grad)
        norm = np.sqrt(sum((g**2).sum() for g in gs))
        gs = [g * min(1, clip_norm / norm) for g in gs]
        for i, (g, name) in enumerate(zip(gs, names)):
            ms[i] = b1 * ms[i] + (1 - b1) * g
            vs[i] = b2 * vs[i] + (1 - b2) * g**2
            m, v = (ms[i] / (1 - b1**t), vs[i] / (1 - b2**t)) if correct else (ms[i], vs[i])
            u = m / (np.sqrt(v) + eps)
            if 'bias' in name or 'scale' in name:
                flat[i] = flat[i] - rate * u
                continue
            u = u + weight_decay * flat[i]
            if lamb:
                layers = range(3) if 'layers' in name else [...]
                u = u.copy()
                for layer in layers:
                    u[layer] *= np.linalg.norm(flat[i][layer]) / np.linalg.norm(u[layer])
            flat[i] = flat[i] - rate * u
        after(jax.tree.unflatten(layout, flat))
    return jax.tree.unflatten(layout, flat)


@pytest.mark.parametrize('name', ['adamw', 'lamb'])
@pytest.mark.parametrize('correct', [False, True])
def test_against_float64_numpy(name, correct):
    rng = np.random.default_rng(1)
    grads = [jax.tree.map(lambda p: rng.normal(size=p.shape), params()) for _ in range(10)]
    expected = numpy_steps(params(), grads, 1e-2, correct, name == 'lamb', **SETTINGS)
    tx = optimizer.make_optimizer(name, bias_correction=correct, **SETTINGS)
    tree = jax.tree.map(jnp.float32, params())
    state = tx.init(tree)
    for grad in grads:
        updates, state = tx.update(jax.tree.map(jnp.float32, grad), state, tree)
        tree = jax.tree.map(lambda p, u: p - 1e-2 * u, tree, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), tree, expected)


@pytest.mark.parametrize('name', ['adamw', 'lamb'])
def test_against_optax_on_unstacked_parameters(name):
    tree = {'dense': {'kernel': jnp.arange(1.0, 13).reshape(3, 4), 'bias': jnp.ones(4)}}
    mask = optimizer.decay_mask  # optax.lamb scales biases too, unlike its authors' code
    peer = optax.chain(
        optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-6),
        optax.add_decayed_weights(0.01, mask),
        *([optax.masked(optax.scale_by_trust_ratio(), mask)] if name == 'lamb' else []),
        optax.scale(-1e-2),
    )
    tx = optimizer.make_optimizer(name, bias_correction=True, **(SETTINGS | {'clip_norm': 0.0}))
    ours, theirs, a, b = tree, tree, tx.init(tree), peer.init(tree)
    for i in range(5):
        grad = jax.tree.map(lambda p: jnp.sin(p * (i + 1)), tree)  # noqa: B023
        updates, a = tx.update(grad, a, ours)
        ours = jax.tree.map(lambda p, u: p - 1e-2 * u, ours, updates)
        updates, b = peer.update(grad, b, theirs)
        theirs = optax.apply_updates(theirs, updates)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), ours, theirs)


def test_decay_goes_by_name():
    mask = optimizer.decay_mask(params())
    assert mask['encoder']['layers'] == {
        'dense': {'kernel': True, 'bias': False},
        'norm': {'scale': False, 'bias': False},
    }
    assert mask['embeddings']['token'] is True


def test_schedule_is_the_original_codes():
    rate = lambda step: optimizer.learning_rate(step, peak=2.0, warmup_share=0.1, num_steps=100)  # noqa: E731
    assert [rate(s) for s in (0, 5, 9)] == [0.0, 1.0, 1.8]
    assert rate(10) == pytest.approx(2 * 0.9)                # the decay line starts at step 0
    assert rate(55) == pytest.approx(0.9) and rate(100) == 0 and rate(120) == 0
    assert optimizer.learning_rate(0, peak=2.0, warmup_share=0.0, num_steps=100) == 2


def test_unknown_optimizer():
    with pytest.raises(UserError, match="Unknown optimizer 'adam'; known: adamw, lamb"):
        optimizer.make_optimizer('adam')


def test_the_norm_of_arrays_of_any_shape_and_no_squares_in_memory():
    rng = np.random.default_rng(0)
    tree = [np.float32(rng.normal(size=shape)) for shape in ((3, 48, 160), (5, 7), (9,), (), (4, 3, 5, 2, 6))]
    expected = np.sqrt(sum((x.astype(np.float64)**2).sum() for x in tree))
    np.testing.assert_allclose(jax.jit(optimizer.global_norm)(tree), expected, rtol=1e-6)
    large = jax.ShapeDtypeStruct((12, 256, 320), np.float32)
    compiled = jax.jit(optimizer.global_norm).lower([large]).compile()
    assert compiled.memory_analysis().temp_size_in_bytes <= 4 * large.size / 16 + 65536


@pytest.mark.parametrize('branch', ['cpu', 'other'])
def test_the_norm_and_its_clipping_on_every_platform(branch, monkeypatch):
    """Whichever branch `platform_dependent` takes: the norm, its gradient, and gradients scaled to the norm allowed."""
    rng, taken = np.random.default_rng(0), []
    tree = [np.float32(rng.normal(size=shape)) for shape in ((3, 48, 33), (5, 7), (9,), ())]
    expected = np.sqrt(sum((x.astype(np.float64)**2).sum() for x in tree))
    with watch.forced(monkeypatch, branch, taken):
        norm, gradient = jax.value_and_grad(optimizer.global_norm)(tree)
        clipped = {limit: optimizer._clip(limit).update(tree, None)[0] for limit in (0.0, 0.5 * expected, 2 * expected)}
    assert len(taken) == 3 * len(tree) and norm == pytest.approx(expected, rel=1e-6)
    for limit, factor in ((0.0, 1), (0.5 * expected, 0.5), (2 * expected, 1)):  # 0: no clipping
        for one, other in zip(clipped[limit], tree):
            np.testing.assert_allclose(one, other * factor, rtol=1e-5)
    jax.tree.map(lambda g, x: np.testing.assert_allclose(g, x / expected, rtol=1e-5, atol=1e-8), gradient, tree)
