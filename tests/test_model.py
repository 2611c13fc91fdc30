"""The contracts of the model's parts, and what each promises; test_weights has its parity with Hugging Face."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import plain
import pytest
import scipy.special
import scipy.stats
import torch
import watch
from conftest import ROOT
from models import D, L, P, V, batch, build, config, packed_batch, random_params

from bert_jax.cli import UserError
from bert_jax.model import layers, transformer
from bert_jax.model import model as models
from bert_jax.model.embeddings import padded_vocab_size
from bert_jax.model.encoders import ENCODERS
from bert_jax.model.kernels import FEW_ROWS, gelu, lookup, random_bits
from bert_jax.model.layers import Attention, Dense, Dropout, LayerNorm, Lstm
from bert_jax.model.parts import Encoded
from bert_jax.model.targets import TARGETS


def test_padding_of_the_vocabulary_can_never_be_predicted():
    """Not one of its rows, the last among them, whatever its table and bias hold."""
    model, example = build(), batch()
    params = random_params(model, example)
    token, bias = (np.array(part) for part in (params['embeddings']['token'], params['targets_mlm']['bias']))
    token[V:], bias[V:] = 100 * token[:128 - V], 1e4
    params['embeddings']['token'], params['targets_mlm']['bias'] = jnp.asarray(token), jnp.asarray(bias)
    logits = np.asarray(model.apply({'params': params}, example, train=False)['mlm']['logits'])
    assert logits.shape == (8, P, 128) and (logits[..., V:] < -1e8).all()
    chances = np.asarray(jax.nn.softmax(logits))
    assert (chances[..., :V] > 0).all() and (chances[..., V:] == 0).all()  # every real one can be
    grads = jax.grad(lambda p: model.apply({'params': p}, example, train=False, method='losses')['mlm']['loss'].total)(
        params
    )
    assert not grads['targets_mlm']['bias'][V:].any() and not grads['embeddings']['token'][V:].any()
    assert grads['targets_mlm']['bias'][:V].all()


@pytest.mark.parametrize('size, padded', [(1, 128), (127, 128), (128, 128), (129, 256), (30522, 30592)])
def test_vocabularies_are_padded_to_multiples_of_128(size, padded):
    assert padded_vocab_size(size) == padded


def test_padding_and_neighbours_in_a_row_change_nothing():
    """A row with two examples gives each what it gets alone."""
    model, example = build(), batch()
    params = random_params(model, example)
    short = {k: v[:, :6] if v.ndim == 2 and v.shape[1] == L else v for k, v in batch(padded=False).items()}
    two = {k: np.concatenate([short[k], short[k][::-1]], 1) for k in ('input_ids', 'segment_ids', 'position_ids')}
    two |= {'input_mask': np.repeat([[1] * 6 + [2] * 6], 8, 0).astype(np.int32),
            'cls_positions': np.array([[0, 6]] * 8, np.int32)}
    encode = lambda b: model.apply({'params': params}, b, train=False, method='encode')  # noqa: E731
    alone, packed = encode(short), encode(two)
    np.testing.assert_allclose(packed.hidden[:, :6], alone.hidden, atol=1e-5)
    np.testing.assert_allclose(packed.hidden[:, 6:], alone.hidden[::-1], atol=1e-5)
    np.testing.assert_allclose(packed.pooled[:, 1], alone.pooled[::-1, 0], atol=1e-5)


def test_scanned_and_unrolled_are_the_same_dropout_included():
    example = batch()
    results = []
    for unroll in (1, 2):
        model = build(f'model.run.unroll={unroll}', 'model.embeddings.dropout_rate=0.3')
        params = random_params(model, example)
        results.append(jax.jit(lambda p, m=model: m.apply(
            {'params': p}, example, train=True, rngs={'dropout': jax.random.key(1)}))(params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *results)


def test_rematerialisation_changes_memory_and_no_gradient():
    """What the backward pass keeps shrinks from none to full; dropout is drawn again as it was."""
    example = {name: np.tile(x, (8, 1)) for name, x in batch().items() if x.ndim == 2}
    sizes, gradients = {}, {}
    for remat in ('none', 'elementwise', 'dots', 'full'):
        model = build(
            'model.encoder.num_layers=6',
            'model.run.unroll=1',
            'model.embeddings.dropout_rate=0.2',
            f'model.run.remat={remat}',
        )
        params = random_params(model, example)

        def loss(params, model=model):
            losses = model.apply(
                {'params': params}, example, train=True, rngs={'dropout': jax.random.key(1)}, method='losses'
            )
            return losses['mlm']['loss'].total + losses['nsp']['loss'].total

        compiled = jax.jit(jax.grad(loss)).lower(params).compile()
        sizes[remat], gradients[remat] = compiled.memory_analysis().temp_size_in_bytes, compiled(params)
    assert (
        sizes['none'] > sizes['elementwise'] > sizes['dots'] > 1.3 * sizes['full']
        and sizes['none'] > 1.5 * sizes['dots']
    ), sizes
    for remat in ('elementwise', 'dots', 'full'):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), gradients[remat], gradients['none']
        )


def test_dots_keeps_what_dense_layers_give():
    """The backward pass computes again almost nothing of what `full` does: attention's two products."""
    example, work = batch(), {}
    for remat in ('none', 'dots', 'full'):
        model = build('model.run.unroll=2', f'model.run.remat={remat}')

        def loss(params, model=model):
            return model.apply({'params': params}, example, train=False, method='losses')['mlm']['loss'].total

        work[remat] = jax.jit(jax.grad(loss)).lower(random_params(model, example)).compile().cost_analysis()['flops']
    assert work['none'] < work['dots'] < work['none'] + 0.4 * (work['full'] - work['none']), work


def encoder_config(name, **changes):
    """Each encoder by its name, of two layers; the LSTM's width is not the embeddings'."""
    c = config()
    if name == 'lstm':
        c.encoder = {'name': 'lstm', 'num_layers': 2, 'hidden_size': 24, 'dropout_rate': 0.1}
        c.targets = {'lm': {'vocab_size': V, 'weight': 1.0}}
    c.encoder.update(changes)
    if c.encoder.get('sees') == 'left':
        c = config('model.encoder.sees=left', arg='tiny,no_nsp')
    return c


@pytest.mark.parametrize('name', ENCODERS)
def test_the_contract_of_encoders(name):
    """Shapes, layers by their numbers; examples of a row know nothing of each other, nor of what they may not see."""
    encoder = ENCODERS[name]
    c, example = encoder_config(name), packed_batch()
    reads = (('hidden', 0), *((kind, layer) for kind in encoder.GIVES for layer in (1, 2, -1, 'all')))
    model = models.build(c, reads)
    params = random_params(model, example)
    encode = lambda b: model.apply({'params': params}, b, train=False, method='encode')  # noqa: E731
    encoded, width = encode(example), model.encoder.width(D)
    assert (
        isinstance(encoded, Encoded) and encoded.hidden.shape == (8, L, width) and encoded.layers.keys() == set(reads)
    )
    embedded = model.apply({'params': params}, example, method=lambda m, b: m.embeddings(b, train=False))
    np.testing.assert_allclose(encoded.layers['hidden', 0], embedded, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(encoded.layers['hidden', 2], encoded.hidden, rtol=1e-5, atol=1e-6)
    for kind in encoder.GIVES:
        one, two, last = (encoded.layers[kind, layer] for layer in (1, 2, -1))
        assert one.shape == two.shape and not np.allclose(one, two)
        np.testing.assert_array_equal(two, last)
        np.testing.assert_array_equal(jnp.stack([one, two]), encoded.layers[kind, 'all'])
    second = example['input_mask'] == 2
    changed = example | {'input_ids': np.where(second, 5, example['input_ids'])}
    np.testing.assert_allclose(encode(changed).hidden[example['input_mask'] == 1],
                               encoded.hidden[example['input_mask'] == 1], atol=1e-6)
    assert not np.allclose(encode(changed).hidden[second], encoded.hidden[second])


@pytest.mark.parametrize('sees', transformer.SEES)
def test_what_a_position_sees(sees):
    """A changed token changes the positions that see it and no other, whatever computes attention."""
    model = models.build(encoder_config('transformer', sees=sees))
    example = batch(padded=False)
    example['segment_ids'] = np.broadcast_to(np.arange(L) >= 6, (8, L)).astype(np.int32)
    params = random_params(model, example)
    encode = lambda b: model.apply({'params': params}, b, train=False, method='encode').hidden  # noqa: E731
    for at in (3, 9):
        changed = {k: v.copy() for k, v in example.items()}
        changed['input_ids'][:, at] = 5 + (changed['input_ids'][:, at] - 4) % (V - 5)
        moved = np.abs(encode(changed) - encode(example)).max((0, 2)) > 1e-5
        expected = {'both': np.ones(L, bool), 'left': np.arange(L) >= at,
                    'prefix': np.full(L, at < 6) | (np.arange(L) >= at)}[sees]
        np.testing.assert_array_equal(moved, expected)


@pytest.mark.parametrize('reads', [(), ('hidden', 'query', 'key', 'value')])
def test_each_layer_of_a_transformer(reads):
    """Against a plain transcription; what is read changes nothing of what is computed."""
    model = build(reads=tuple((kind, 'all') for kind in reads))
    example = packed_batch()
    params = random_params(model, example)
    encoded = model.apply({'params': params}, example, train=False, method='encode')
    tree = plain.tensors(params)
    hidden, heads = plain.encode(tree, example)
    real = example['input_mask'] > 0
    np.testing.assert_allclose(encoded.hidden[real], hidden[-1].detach()[real], atol=1e-5)
    np.testing.assert_allclose(encoded.pooled, plain.pool(tree, hidden[-1], example).detach(), atol=1e-5)
    for layer in range(2) if reads else ():
        np.testing.assert_allclose(
            encoded.layers['hidden', 'all'][layer][real], hidden[layer + 1].detach()[real], atol=1e-5
        )
    for i, part in enumerate(reads[1:]):
        assert encoded.layers[part, 'all'].shape == (2, 8, 4, L, D // 4)
        for layer in range(2):
            both = encoded.layers[part, 'all'][layer], heads[layer][i].detach().numpy()
            np.testing.assert_allclose(*(x.swapaxes(1, 2)[real] for x in both), atol=1e-5)


def fine_tuning_labels(name):
    """Labels of each kind, some of them missing."""
    rng = np.random.default_rng(1)
    if name == 'multilabel':
        return {'label_ids': rng.integers(0, 2, (8, 3)).astype(np.float32)}
    if name == 'regression':
        return {'label_ids': rng.normal(size=8).astype(np.float32)}
    if name.endswith('tagging'):
        return {'label_ids': rng.integers(-1, 3, (8, L)).astype(np.int32)}
    if name == 'span':
        return {f'{side}_positions': rng.integers(0, 5, 8).astype(np.int32) for side in ('start', 'end')} | {
            'is_real_example': np.array([1, 1, 1, 0, 1, 1, 0, 1], np.int32)}
    if name == 'multiple_choice':  # the second question has one choice only, the last row pair is padding
        return {'label_ids': np.array([0, 1, 1, 0, 1, 0, 0, 0], np.int32),
                'is_real_example': np.array([1, 1, 1, 0, 1, 1, 0, 0], np.int32)}
    return {}


@pytest.mark.parametrize('name', TARGETS)
def test_the_contract_of_targets(name):
    c = config()
    kwargs = {
        'mlm': {'vocab_size': V, 'activation': 'gelu'},
        'nsp': {},
        'lm': {'vocab_size': V},
        'relations': {'num_heads': 8, 'layer': -1},
        'classification': {'num_classes': 3, 'dropout_rate': 0.1},
        'tagging': {'num_classes': 3, 'dropout_rate': 0.1},
        'multilabel': {'num_classes': 3, 'dropout_rate': 0.1},
        'regression': {'dropout_rate': 0.1},
        'bilstm_tagging': {'num_classes': 3, 'features': 'sum_all', 'hidden_size': 5, 'dropout_rate': 0.1},
        'span': {},
        'multiple_choice': {'num_choices': 2, 'dropout_rate': 0.1},
    }
    c.targets = {name: {'weight': 1.0, **kwargs[name]}}
    c.encoder.sees = TARGETS[name].sees
    model, example = models.build(c), batch() | fine_tuning_labels(name)
    if name == 'relations':
        example |= {f'teacher_{kind}': np.random.default_rng(1).normal(size=(8, 2, L, 12)).astype(np.float32)
                    for kind in ('query', 'key', 'value')}
    params = random_params(model, example)
    losses = model.apply({'params': params}, example, train=False, method='losses')[name]
    counts = model.apply({}, example, method='counts')
    assert float(losses['loss'].count) == float(counts[name]) > 0
    halves = [{k: v[s] for k, v in example.items()} for s in (slice(0, 2), slice(2, 8))]  # a loss is a sum and a count
    parts = [model.apply({'params': params}, half, train=False, method='losses')[name] for half in halves]
    for term, mean in losses.items():
        both = jax.tree.map(jnp.add, parts[0][term], parts[1][term])
        np.testing.assert_allclose([both.total, both.count], [mean.total, mean.count], rtol=1e-5)
    assert ('pooler' in params) == model.targets[name].reads.__contains__('pooled')


def test_losses_of_tags_spans_and_choices_against_pytorch():
    """Cross-entropy over the labelled tokens; start and end alike; a softmax over the choices that exist."""
    example = batch() | {'input_mask': batch()['input_mask']}
    for name, target, outputs, expected in (
        (
            'tagging',
            TARGETS['tagging'](3, 0.0),
            {'logits': np.random.default_rng(0).normal(size=(8, L, 3))},
            lambda o, e: torch.nn.functional.cross_entropy(
                o['logits'].flatten(0, 1), e['label_ids'].long().flatten(), ignore_index=-1
            ),
        ),
        (
            'span',
            TARGETS['span'](),
            {f'{side}_logits': np.random.default_rng(i).normal(size=(8, L)) for i, side in enumerate(('start', 'end'))},
            lambda o, e: (
                sum(
                    torch.nn.functional.cross_entropy(
                        o[f'{side}_logits'], e[f'{side}_positions'].long(), reduction='none'
                    )[e['is_real_example'] > 0].mean()
                    for side in ('start', 'end')
                )
                / 2
            ),
        ),
        (
            'multilabel',
            TARGETS['multilabel'](3, 0.0),
            {'logits': np.random.default_rng(0).normal(size=(8, 3))},
            lambda o, e: torch.nn.functional.binary_cross_entropy_with_logits(o['logits'], e['label_ids'].double()),
        ),
        (
            'regression',
            TARGETS['regression'](0.0),
            {'logits': np.random.default_rng(0).normal(size=8)},
            lambda o, e: torch.nn.functional.mse_loss(o['logits'], e['label_ids'].double()),
        ),
        (
            'multiple_choice',
            TARGETS['multiple_choice'](2, 0.0),
            {
                'logits': np.where(
                    np.reshape([1, 1, 1, 0, 1, 1, 0, 0], (4, 2)), np.random.default_rng(0).normal(size=(4, 2)), -1e9
                )
            },
            lambda o, e: torch.nn.functional.cross_entropy(o['logits'][:3], torch.tensor([1, 0, 0])),
        ),
    ):
        labels = example | fine_tuning_labels(name)
        loss = target.terms({k: jnp.asarray(v, jnp.float32) for k, v in outputs.items()}, labels)['loss']
        theirs = expected(
            {k: torch.tensor(v) for k, v in outputs.items()}, {k: torch.tensor(v) for k, v in labels.items()}
        )
        assert float(loss.total / loss.count) == pytest.approx(float(theirs), rel=1e-5), name


def test_what_metrics_of_heads_count():
    """A row that is no example counts nowhere; a span is right where both of its ends are."""
    real = np.array([1, 1, 1, 0], np.int32)
    span = TARGETS['span']().terms(
        {'start_logits': jnp.eye(4, 6) * 9, 'end_logits': jnp.eye(4, 6, 1) * 9},
        {'start_positions': jnp.array([0, 1, 0, 3]), 'end_positions': jnp.array([1, 5, 3, 4]),
         'is_real_example': real})['exact']
    assert (float(span.total), float(span.count)) == (1, 3)
    classes = TARGETS['classification'](3, 0.0).terms(
        {'logits': jnp.eye(4, 3)}, {'label_ids': jnp.array([0, 2, 2, 0]), 'is_real_example': real})
    assert (float(classes['accuracy'].total), float(classes['accuracy'].count)) == (2, 3)
    labels = np.array([[1, 0], [0, 1], [1, 1], [0, 0]], np.float32)
    for target, logits, given, total in (
            (TARGETS['multilabel'](2, 0.0), np.ones((4, 2)), labels, 6 * np.log(1 + np.e) / 2 - 2),
            (TARGETS['regression'](0.0), np.array([3, 3, 3, 9]), labels[:, 0], 4 + 9 + 4)):
        given = {'label_ids': given, 'is_real_example': real}
        loss = target.terms({'logits': jnp.asarray(logits, jnp.float32)}, given)['loss']
        assert float(loss.total) == pytest.approx(total) and float(loss.count) == 3
    choices = TARGETS['multiple_choice'](2, 0.0).terms({'logits': jnp.array([[1.0, 2.0], [2.0, 1.0]])}, {
        'label_ids': np.array([0, 1, 0, 1]), 'is_real_example': np.ones(4, np.int32)})['accuracy']
    assert (float(choices.total), float(choices.count)) == (1, 2)


def test_heads_hide_what_is_no_place_and_no_choice():
    hidden = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, D)), jnp.float32)
    mask = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], np.int32)
    dense = {'params': {'dense': {'kernel': jnp.eye(D)[:, :2], 'bias': jnp.ones(2)}}}
    call = {'train': False, 'method': 'outputs'}
    found = TARGETS['span']().apply(dense, Encoded(hidden, {}), {'input_mask': mask}, None, **call)
    for i, side in enumerate(('start', 'end')):
        np.testing.assert_allclose(found[f'{side}_logits'], np.where(mask > 0, hidden[..., i] + 1, -1e9), rtol=1e-6)
    one = {'params': {'dense': {'kernel': jnp.eye(D)[:, :1], 'bias': jnp.ones(1)}}}
    given = Encoded(None, {}, hidden), {'is_real_example': mask.ravel()}, None
    found = TARGETS['multiple_choice'](5, 0.0).apply(one, *given, **call)['logits']
    np.testing.assert_allclose(found, np.where(mask > 0, hidden[..., 0] + 1, -1e9), rtol=1e-6)


@pytest.mark.parametrize('shape', [(64, 64), (32, 5, 7, 33)])
@pytest.mark.parametrize('rate', [0.1, 0.5])
def test_dropout_rate_and_scale(shape, rate):
    x = jnp.ones((50, *shape))
    y = Dropout(rate).apply({}, x, train=True, rngs={'dropout': jax.random.key(0)})
    assert abs((y == 0).mean() - rate) < 4 * (rate * (1 - rate) / x.size) ** 0.5 + 1e-5
    np.testing.assert_allclose(y[y != 0], 1 / (1 - rate), rtol=1e-4)
    assert Dropout(rate).apply({}, x, train=False) is x
    by_column = (y == 0).reshape(-1, shape[-1]).mean(0)       # no column is favoured
    assert abs(by_column - rate).max() < 0.05


@pytest.mark.parametrize('rate', [0.25, 0.6])
def test_the_gradient_of_dropout(rate):
    """Against finite differences with the same key: what was dropped has no gradient, the rest 1 / (1 - rate)."""
    rng = np.random.default_rng(0)
    x, weights = jnp.asarray(rng.normal(size=(7, 9)), jnp.float32), rng.normal(size=(7, 9)).astype(np.float32)

    def total(x):
        return jnp.sum(weights * Dropout(rate).apply({}, x, train=True, rngs={'dropout': jax.random.key(5)}))

    found = jax.grad(total)(x)
    ones = np.eye(63, dtype=np.float32).reshape(63, 7, 9)
    differences = jax.vmap(lambda one: (total(x + one) - total(x - one)) / 2)(ones)
    np.testing.assert_allclose(found.ravel(), differences, atol=2e-5)
    assert 8 < (found == 0).sum() < 55


def test_where_each_dropout_stands():
    """After the embeddings' norm, on the probabilities, on what is added before each norm: with the masks drawn."""
    model = build(
        'model.embeddings.dropout_rate=0.3', 'model.run.unroll=1', reads=tuple(('hidden', n) for n in range(3))
    )
    example, rngs = batch(), {'dropout': jax.random.key(1)}
    params, real = random_params(model, example), example['input_mask'] > 0
    with watch.dropout() as sites:
        encoded = model.apply({'params': params}, example, train=True, rngs=rngs, method='encode')
    hidden, _ = plain.encode(plain.tensors(params), example, watch.factors(sites))
    for layer, expected in enumerate(hidden):
        np.testing.assert_allclose(encoded.layers['hidden', layer][real], expected.detach()[real], atol=2e-5)


def test_dropout_bits_are_independent():
    """Neighbours along every axis, other keys, and single bits of an entry do not know of each other."""
    shape = (8, 64, 256)
    bits = np.asarray(random_bits(jax.random.bits(jax.random.key(3), (2,)), shape))
    other = np.asarray(random_bits(jax.random.bits(jax.random.key(4), (2,)), shape))
    flags = [(b >> shift & 1).astype(bool) for b in (bits, other) for shift in (31, 30, 16, 0)]
    noise = 5 / np.sqrt(bits.size)
    for i, a in enumerate(flags):
        assert abs(a.mean() - 0.5) < noise
        assert all(abs((a == b).mean() - 0.5) < noise for b in flags[:i])
        for axis, size in enumerate(shape):
            for lag in {1, 2, 3, size // 2} - {size}:
                assert abs((a == np.roll(a, lag, axis)).mean() - 0.5) < noise, (axis, lag)
    assert len(np.unique(bits)) > 0.999 * bits.size


@pytest.mark.parametrize('approximate', [False, True])
def test_the_gradient_of_gelu(approximate):
    """Against the derivative in float64, tails included: no worse than what JAX derives in float32."""
    x = np.linspace(-12, 12, 20_001).astype(np.float32)
    with jax.enable_x64(True):
        exact = jax.vmap(jax.grad(lambda v: jax.nn.gelu(v, approximate=approximate)))(jnp.asarray(x, jnp.float64))
        value = np.asarray(jax.nn.gelu(jnp.asarray(x, jnp.float64), approximate=approximate))
        exact = np.asarray(exact)
    np.testing.assert_allclose(gelu(x, approximate), value, atol=1e-6)
    slope = jax.vmap(jax.grad(lambda v: gelu(v, approximate)))(x)
    derived = jax.vmap(jax.grad(lambda v: jax.nn.gelu(v, approximate=approximate)))(x)
    assert abs(slope - exact).max() <= 1.2 * abs(derived - exact).max() + 2e-7


def test_every_choice_by_platform_is_forced_both_ways_here():
    """A new one needs a test that runs both of its branches on CPU, as those below and test_optimizer do."""
    found = {path.name: path.read_text().count('platform_dependent(') for path in (ROOT / 'bert_jax').rglob('*.py')}
    assert {name: count for name, count in found.items() if count} == {'kernels.py': 2, 'optimizer.py': 1}
    text = (ROOT / 'bert_jax/model/kernels.py').read_text()
    assert text.count('by_platform(') == 1 + 2  # its definition, the heads' split and their join


@pytest.mark.parametrize('branch', ['cpu', 'other'])
def test_the_projections_of_attention_on_every_platform(branch, monkeypatch):
    """Forward and backward against float64, whichever branch is taken; B, L, D, H, K = 2, 13, 32, 4, 8."""
    rng = np.random.default_rng(0)
    x, mixed = rng.normal(size=(2, L, D)), rng.normal(size=(2, 4, L, 8))
    kernels = {'qkv': rng.normal(size=(D, 4, 3, 8)), 'out': rng.normal(size=(4, 8, D))}
    biases = {'qkv': rng.normal(size=(4, 3, 8)), 'out': rng.normal(size=D)}
    with jax.enable_x64(True):
        def split(x, kernel, bias):
            every = jnp.einsum('BLD,DHcK->cBHLK', x, kernel) + bias.swapaxes(0, 1)[:, None, :, None]
            return tuple(every)

        def join(x, kernel, bias):
            return jnp.einsum('BHLK,HKD->BLD', x, kernel) + bias

        exact = {name: jax.vjp(plainly, jnp.asarray(given), jnp.asarray(kernels[name]), jnp.asarray(biases[name]))
                 for name, plainly, given in (('qkv', split, x), ('out', join, mixed))}
        grads = {name: jax.tree.map(lambda y: rng.normal(size=y.shape), out) for name, (out, _) in exact.items()}
        exact = {name: jax.tree.map(np.asarray, (out, back(jax.tree.map(jnp.asarray, grads[name]))))
                 for name, (out, back) in exact.items()}
    taken = []
    with watch.forced(monkeypatch, branch, taken):
        for name, module, given in (('qkv', layers.QueryKeyValue((4, 8), jnp.float32), x),
                                    ('out', layers.Output(jnp.float32), mixed)):
            apply = lambda x, *w: module.apply({'params': dict(zip(('kernel', 'bias'), w))}, x)  # noqa: B023, E731
            out, back = jax.vjp(apply, *(jnp.asarray(one, jnp.float32) for one in (given, kernels[name], biases[name])))
            found = out, back(jax.tree.map(jnp.float32, grads[name]))
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4), found, exact[name])
    assert len(taken) == 4  # forward and backward of both


@pytest.mark.parametrize('rows', [FEW_ROWS, FEW_ROWS + 1])
def test_the_gradients_of_a_product(rows):
    """Few rows take another way than many."""
    rng = np.random.default_rng(0)
    x, kernel, grad = rng.normal(size=(rows, 24)), rng.normal(size=(24, 40)), rng.normal(size=(rows, 40))
    apply = lambda x, kernel: Dense(40, jnp.float32).apply({'params': {'kernel': kernel, 'bias': jnp.zeros(40)}}, x)  # noqa: E731
    found = jax.jit(lambda *args: jax.vjp(apply, *args)[1](jnp.float32(grad)))(jnp.float32(x), jnp.float32(kernel))
    for one, expected in zip(found, (grad @ kernel.T, x.T @ grad)):
        np.testing.assert_allclose(one, expected, rtol=1e-4, atol=1e-4)


def test_layer_norm_far_from_zero():
    """Against float64, on rows whose mean is a thousand times their spread; forward and backward."""
    rng = np.random.default_rng(0)
    x, grad = rng.normal(1000, 1, (40, 64)), rng.normal(size=(40, 64))
    scale, bias = rng.normal(1, 0.2, 64), rng.normal(size=64)

    def norm(x, scale, bias):
        centred = x - x.mean(-1, keepdims=True)
        return centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-12) * scale + bias

    x = x.astype(np.float32)
    with jax.enable_x64(True):
        exact, backward = jax.vjp(norm, *(jnp.asarray(a, jnp.float64) for a in (x, scale, bias)))
        exact = [np.asarray(a) for a in (exact, *backward(jnp.asarray(grad)))]
    module = LayerNorm(jnp.float32)
    ours, backward = jax.vjp(lambda x, s, b: module.apply({'params': {'scale': s, 'bias': b}}, x),
                             x, scale.astype(np.float32), bias.astype(np.float32))
    for a, b in zip((ours, *backward(jnp.asarray(grad, jnp.float32))), exact, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-3)


def recorded_masks(**rates):
    """Which entries each dropout site of a training pass put to zero, found by Flax's own interception."""
    overrides = [f'model.{k.replace("__", ".")}={v}' for k, v in rates.items()]
    model, example = build('model.run.unroll=1', 'model.embeddings.dropout_rate=0.0', *overrides), batch(padded=False)
    params = random_params(model, example)

    def run(seed):
        with watch.dropout() as sites:
            model.apply(
                {'params': params}, example, train=True, rngs={'dropout': jax.random.key(seed)}, method='losses'
            )
        return {path: [call[:2] for call in calls] for path, calls in sites.items()}

    return run


def test_each_dropout_site_has_its_own_rate():
    sites = recorded_masks(
        embeddings__dropout_rate=0.1, encoder__dropout_rate=0.3, encoder__attention_dropout_rate=0.5
    )(0)
    rates = {name: np.mean([(out == 0).mean() for _, out in calls]) for name, calls in sites.items()}
    scales = {
        name: np.nanmedian([np.median((out / into)[out != 0]) for into, out in calls]) for name, calls in sites.items()
    }
    expected = dict(zip(watch.SITES, (0.1, 0.5, 0.3, 0.3)))
    assert rates.keys() == expected.keys()
    for name, rate in expected.items():
        assert abs(rates[name] - rate) < 0.04, name
        assert scales[name] == pytest.approx(1 / (1 - rate), rel=1e-3)


def test_dropout_masks_differ_by_layer_site_and_step():
    run = recorded_masks(embeddings__dropout_rate=0.5, encoder__dropout_rate=0.5, encoder__attention_dropout_rate=0.5)
    one, two = run(0), run(1)
    masks = [out == 0 for calls in (*one.values(), *two.values()) for _, out in calls]
    hidden = [m for m in masks if m.shape == (8, L, D)]
    assert len(hidden) == 2 * (1 + 2 * 2)                     # embeddings, two sites in each of two layers, two steps
    attention = [m for m in masks if m.shape == (8, 4, L, L)]
    assert len(attention) == 2 * 2                            # probabilities, in each of two layers, two steps
    for same_shape in (hidden, attention):
        for i, a in enumerate(same_shape):
            for b in same_shape[:i]:
                assert abs((a == b).mean() - 0.5) < 0.06
    again = run(0)
    assert all(np.array_equal(a[1], b[1]) for k in one for a, b in zip(one[k], again[k]))


def test_a_classifier_drops_its_pooled_vector():
    c = config('model.embeddings.dropout_rate=0.0')
    c.targets = {'classification': {'num_classes': 3, 'dropout_rate': 0.5, 'weight': 1.0}}
    model, example = models.build(c), batch()
    params = random_params(model, example)
    a, b = (
        model.apply({'params': params}, example, train=True, rngs={'dropout': jax.random.key(s)})['classification'][
            'logits'
        ]
        for s in (0, 1)
    )
    assert not np.allclose(a, b)
    head = TARGETS['classification'](num_classes=64, dropout_rate=0.3)  # whose logits are the pooled vector itself:
    weights = {'params': {'dense': {'kernel': jnp.eye(64), 'bias': jnp.zeros(64)}}}
    encoded = Encoded(None, {}, jnp.ones((500, 1, 64)))
    seen = head.apply(weights, encoded, {}, None, train=True, method='outputs', rngs={'dropout': jax.random.key(0)})[
        'logits'
    ]
    assert abs((seen == 0).mean() - 0.3) < 0.01
    np.testing.assert_allclose(seen[seen != 0], 1 / 0.7, rtol=1e-4)


def test_bf16_computes_in_bf16_over_fp32_weights():
    model, exact, example = build(arg='tiny,bf16'), build(), batch()
    params = random_params(model, example)
    encoded = model.apply({'params': params}, example, train=False, method='encode')
    assert encoded.hidden.dtype == encoded.pooled.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype('float32')}
    ours, exactly = (one.apply({'params': params}, example, train=False) for one in (model, exact))
    for name, real in (('mlm', V), ('nsp', 2)):
        assert ours[name]['logits'].dtype == jnp.float32
        error = (ours[name]['logits'] - exactly[name]['logits'])[..., :real]
        assert abs(error).mean() < 0.03 * exactly[name]['logits'][..., :real].std(), name
    text = jax.jit(lambda p: model.apply({'params': p}, example, train=False)).lower(params).as_text()
    products = re.findall(r'stablehlo.dot_general .*: \((.*)\) ->', text)
    inputs = [set(re.findall(r'x(b?f\d+)>', one)) for one in products]
    assert len(products) >= 10
    assert [one for one in inputs if one != {'bf16'}] == [{'f32'}]  # of segments with their table


def test_logits_of_bf16_are_accumulated_in_float32():
    """Against float64 from the same bf16 numbers; a logit rounded to bf16 would be out by 4e-3 of itself."""
    model, example, seen = build(arg='tiny,bf16'), batch(), []
    params = random_params(model, example)

    def record(call, args, kwargs, context):
        out = call(*args, **kwargs)
        if context.module.path == ('targets_mlm', 'norm'):
            seen.append(out)
        return out

    with nn.intercept_methods(record):
        logits = model.apply({'params': params}, example, train=False)['mlm']['logits']
    (x,) = seen
    assert x.dtype == jnp.bfloat16
    table, bias = params['embeddings']['token'].astype(jnp.bfloat16), params['targets_mlm']['bias']
    expected = np.asarray(x, np.float64) @ np.asarray(table, np.float64).T + np.asarray(bias, np.float64)
    np.testing.assert_allclose(logits[..., :V], expected[..., :V], rtol=1e-5, atol=1e-5)


def test_attention_scores_of_bf16_are_accumulated_in_float32():
    """Scores above 16, whose neighbours in bf16 are an eighth apart: rounded, probabilities would be out by 6 %."""
    rng, size = np.random.default_rng(0), 16
    module = Attention(1, 0.0, 'xla', False, jnp.bfloat16)
    kernel = jnp.asarray(rng.normal(size=(size, 1, 3, size)) * 1.2, jnp.float32)
    params = {'qkv': {'kernel': kernel, 'bias': jnp.zeros((1, 3, size))},
              'out': {'kernel': jnp.eye(size)[None], 'bias': jnp.zeros(size)}}
    x = jnp.asarray(rng.normal(size=(4, L, size)), jnp.bfloat16)
    mixed, heads = module.apply({'params': params}, x, jnp.ones((4, 1, L, L), bool), None, train=False)
    assert {one.dtype for one in heads.values()} == {jnp.dtype('bfloat16')}
    query, key, value = (np.asarray(heads[name], np.float64) for name in ('query', 'key', 'value'))
    scores = np.einsum('bhqk,bhlk->bhql', query / 4, key)
    assert np.median(scores.max(-1)) > 16
    expected = np.einsum('bhql,bhlk->bhqk', scipy.special.softmax(scores, -1), value)[:, 0]
    assert abs(np.asarray(mixed, np.float64) - expected).max() < 0.01 * abs(expected).max()


def test_the_gradient_of_a_table_of_bf16_is_summed_in_float32():
    """A thousand times 1: in bf16 the sum would stay at 256, where 1 is less than half of what comes next."""
    table, ids = jnp.zeros((1, 3, 2), jnp.bfloat16), jnp.full((10, 100), 1)
    grad = jax.grad(lambda table: lookup(table, ids).astype(jnp.float32).sum())(table)
    assert grad.dtype == jnp.bfloat16 and np.asarray(grad[0], np.float32).tolist() == [[0, 0], [1000, 1000], [0, 0]]


def test_layer_norm_of_bf16_is_computed_in_float32():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(30, 1, (40, 64)), jnp.bfloat16)
    found = LayerNorm(jnp.bfloat16).apply({'params': {'scale': jnp.ones(64), 'bias': jnp.zeros(64)}}, x)
    exact = np.asarray(x, np.float64)
    exact = (exact - exact.mean(-1, keepdims=True)) / exact.std(-1, keepdims=True)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(found, np.float64), exact, rtol=2**-8, atol=1e-3)


def test_no_buffer_of_all_positions_times_the_vocabulary():
    model, example = build(), batch()
    params = random_params(model, example)
    text = jax.jit(lambda p, b: model.apply({'params': p}, b, train=False)).lower(params, example).as_text()
    assert f'8x{P}x128xf32' in text
    assert f'8x{L}x128xf32' not in text and f'{8 * L}x128xf32' not in text


@pytest.mark.parametrize(
    'change, words',
    [
        ({'encoder.name': 'transfomer'}, ("Unknown encoder 'transfomer'", 'known: transformer')),
        ({'encoder.num_layer': 3}, ("Unknown encoder transformer key 'num_layer'", 'num_layers')),
        ({'encoder.activation': 'gelu_fast'}, ("Unknown activation 'gelu_fast'", 'gelu_new')),
        ({'encoder.num_heads': 5}, ('hidden_size 32 is not a multiple of num_heads 5',)),
        ({'encoder.remat': 'full'}, ('model.encoder.remat', 'model.run.remat says it')),
        ({'encoder.kernel': 'xla'}, ('model.run.kernel says it',)),
        ({'run.attention': 'xla'}, ("Unknown model.run key 'attention'", 'kernel')),
        ({'run.unroll': 0}, ('model.run.unroll=0', '1 or more')),
        ({'run.remat': 'some'}, ("Unknown remat 'some'", 'elementwise')),
        ({'encoder.num_layers': 0}, ('model.encoder.num_layers=0', '1 or more')),
        ({'encoder.dropout_rate': 1.5}, ('model.encoder.dropout_rate=1.5', '0 to 0.99')),
        ({'encoder.sees': 'right'}, ("Unknown sees 'right'", 'prefix')),
        (
            {
                'targets.bilstm_tagging': {
                    'num_classes': 3,
                    'features': 'second_to_last',
                    'hidden_size': 5,
                    'dropout_rate': 0.1,
                    'weight': 1.0,
                },
                'encoder.num_layers': 1,
            },
            ('reads layer -2', 'has 1 layers'),
        ),
        ({'targets.mlmm': {'weight': 1.0}}, ("Unknown target 'mlmm'", 'mlm')),
    ],
)
def test_bad_configs_name_the_choices(change, words):
    c = config()
    with c.unlocked():
        for key, value in change.items():
            part, name = key.split('.')
            c[part][name] = value
    with pytest.raises(UserError) as error:
        models.build(c)
    assert all(word in str(error.value) for word in words), error.value


def test_initialisation_is_the_papers():
    model = build('model.embeddings.hidden_size=128', 'model.encoder.mlp_size=512')
    params = model.init(jax.random.key(0), batch(), train=False)['params']
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = path[-1].key
        if name == 'bias':
            assert not leaf.any()
        elif name == 'scale':
            assert (leaf == 1).all()
        else:
            assert abs(leaf).max() <= 0.04, path               # cut at two standard deviations of 0.02,
            assert leaf.size < 1000 or abs(leaf.std() - 0.0176) < 0.001, path  # which leaves this one
    cut_normal = scipy.stats.truncnorm(-2, 2, scale=0.02)
    entries = np.asarray(params['encoder']['layers']['mlp']['up']['kernel'])  # [N, D, F]
    assert scipy.stats.kstest(entries.ravel(), cut_normal.cdf).pvalue > 0.01
    for axis in range(entries.ndim):  # neighbours, the next layer among them, do not know of each other
        both = np.corrcoef(entries.ravel(), np.roll(entries, 1, axis).ravel())[0, 1]
        assert abs(both) < 5 / np.sqrt(entries.size), axis


def test_models_of_one_config_are_equal_so_that_jax_traces_them_once():
    traced = []
    apply = jax.jit(lambda model: traced.append(1) or jnp.zeros(()), static_argnums=0)
    for overrides in ((), (), ('model.encoder.num_layers=3',)):
        apply(build(*overrides))
    assert len(traced) == 2


@pytest.mark.parametrize('reverse', [False, True])
def test_an_lstm_begins_anew_in_each_example_of_a_row(reverse):
    """Packed rows against each example alone, forward and backward; torch's LSTM as the witness of one example."""
    rng, layer = np.random.default_rng(0), Lstm(6, reverse, jnp.float32)
    mask = np.array([[1] * 4 + [2] * 5 + [3] * 2 + [0] * 2, [1] * 13])
    x = jnp.asarray(rng.normal(size=(2, 13, 5)), jnp.float32)
    params = layer.init(jax.random.key(0), x, mask)
    params = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), params)
    wanted = jnp.asarray(rng.normal(size=(2, 13, 6)), jnp.float32) * (mask > 0)[..., None]

    def gradients(x, mask, wanted):
        return jax.value_and_grad(lambda p, x: jnp.sum(layer.apply(p, x, mask) * wanted), (0, 1))(params, x)

    found, (to_params, to_x) = gradients(x, mask, wanted)
    total, summed = 0.0, jax.tree.map(jnp.zeros_like, params)
    for row, first, last in ((0, 0, 4), (0, 4, 9), (0, 9, 11), (1, 0, 13)):
        part = x[row:row + 1, first:last]
        value, (alone, x_alone) = gradients(part, np.ones((1, last - first), int), wanted[row:row + 1, first:last])
        np.testing.assert_allclose(to_x[row, first:last], x_alone[0], atol=1e-5)
        total, summed = total + value, jax.tree.map(jnp.add, summed, alone)
        peer = torch.nn.LSTM(5, 6, batch_first=True)
        weights = params['params']
        with torch.no_grad():
            peer.weight_ih_l0.copy_(torch.tensor(np.asarray(weights['inputs']['kernel'].T)))
            peer.weight_hh_l0.copy_(torch.tensor(np.asarray(weights['recurrent'].T)))
            peer.bias_ih_l0.copy_(torch.tensor(np.asarray(weights['inputs']['bias'])))
            peer.bias_hh_l0.zero_()
        turn = slice(None, None, -1 if reverse else 1)
        theirs = peer(torch.tensor(np.asarray(part)[:, turn].copy()))[0].detach().numpy()[:, turn]
        np.testing.assert_allclose(layer.apply(params, x, mask)[row, first:last], theirs[0], atol=1e-5)
    np.testing.assert_allclose(found, total, rtol=1e-5)
    for one, other in zip(jax.tree.leaves(to_params), jax.tree.leaves(summed)):
        np.testing.assert_allclose(one, other, atol=2e-5)
    np.testing.assert_allclose(to_x[0, 11:], 0, atol=1e-6)
