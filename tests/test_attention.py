"""The implementations of attention agree, on padded rows and on packed ones."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import call_module, expect_error
from models import L, batch, build, packed_batch, random_params

from bert_jax.model import kernels, transformer

ON_GPU = jax.default_backend() == 'gpu'


@pytest.mark.parametrize('implementation', ['xla', pytest.param('cudnn', marks=pytest.mark.skipif(
    not ON_GPU, reason='cuDNN attention needs an NVIDIA GPU'))])
@pytest.mark.parametrize('example', [batch(), packed_batch()], ids=['padded', 'packed'])
@pytest.mark.parametrize('sees', transformer.SEES)
def test_fused_attention_gives_the_same_losses_and_gradients(sees, example, implementation, monkeypatch):
    """On a CPU through jax.nn.dot_product_attention's own XLA path: the masks, lengths and scale are what is tested."""
    dtype = 'bfloat16' if implementation == 'cudnn' else 'float32'
    # cuDNN takes masks of even lengths alone
    example = {
        name: np.pad(value, ((0, 0), (0, 1))) if value.shape[1:] == (L,) else value for name, value in example.items()
    }
    plain, fused = (
        build(
            'model.encoder.attention_dropout_rate=0',
            f'model.run.dtype={dtype}',
            f'model.encoder.sees={sees}',
            arg='tiny,no_nsp' if sees == 'left' else 'tiny',
        )
        for _ in range(2)
    )
    params = random_params(plain, example)

    def value_and_gradient(model):
        def loss(params):
            losses = model.apply({'params': params}, example, train=False, method='losses')
            return sum(terms['loss'].total / terms['loss'].count for terms in losses.values())

        with jax.default_matmul_precision('highest'):  # on GPUs float32 products are TF32 otherwise
            return jax.jit(jax.value_and_grad(loss))(params)

    expected = value_and_gradient(plain)
    monkeypatch.setattr(transformer, 'choose_kernel', lambda *_: 'cudnn')  # any but 'xla' goes the fused way
    monkeypatch.setattr(
        kernels, 'fused_attention', functools.partial(as_implementation, implementation, kernels.fused_attention)
    )
    found = value_and_gradient(fused)
    tolerance = {'float32': {'rtol': 1e-5, 'atol': 1e-6}, 'bfloat16': {'rtol': 2e-2, 'atol': 2e-2}}[dtype]
    close = functools.partial(np.testing.assert_allclose, **tolerance)
    close(found[0], expected[0])
    jax.tree.map(close, found[1], expected[1])


def as_implementation(implementation, fused, query, key, value, mask, lengths, causal, _):
    assert query.ndim == 4 and (lengths is None or lengths.shape == (len(query),))
    return fused(query, key, value, mask, lengths, causal, implementation)


@pytest.mark.parametrize(
    ('attention', 'dropout', 'dtype', 'backend', 'chosen'),
    [
        ('xla', 0, 'bfloat16', 'gpu', 'xla'),
        ('auto', 0, 'bfloat16', 'gpu', 'cudnn'),
        ('auto', 0.1, 'bfloat16', 'gpu', 'xla'),
        ('auto', 0, 'float32', 'gpu', 'xla'),
        ('auto', 0, 'bfloat16', 'cpu', 'xla'),
        ('auto', 0, 'bfloat16', 'tpu', 'xla'),
        ('cudnn', 0, 'bfloat16', 'gpu', 'cudnn'),
    ],
)
def test_auto_takes_cudnn_where_it_can(attention, dropout, dtype, backend, chosen, monkeypatch):
    monkeypatch.setattr(jax, 'default_backend', lambda: backend)
    encoder = build(
        f'model.run.kernel={attention}', f'model.encoder.attention_dropout_rate={dropout}', f'model.run.dtype={dtype}'
    ).encoder
    assert encoder.run.dtype == jnp.dtype(dtype) and transformer.choose_kernel(encoder, train=True) == chosen
    assert transformer.choose_kernel(encoder, train=False) == (chosen if dropout == 0 else 'cudnn')


@pytest.mark.parametrize('kernel, words', [
    ('cudnn', ('an NVIDIA GPU', 'bfloat16', 'attention_dropout_rate=0', 'auto')), ('flash', ("'flash'", 'cudnn'))])
def test_a_kernel_that_cannot_be_is_refused(kernel, words, store_path, tmp_path):
    args = ('--config', 'configs/pretrain.py:tiny', f'--config.store={store_path}', '--workdir', tmp_path / 'w')
    expect_error(call_module('pretrain', *args, f'--config.model.run.kernel={kernel}'), *words)
