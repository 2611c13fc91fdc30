"""This BERT is BERT: outputs, gradients and training against Hugging Face on PyTorch."""

import copy

import jax
import numpy as np
import peers
import pytest
import torch
from test_optimizer import SETTINGS, numpy_steps

from bert_jax import optimizer, partition, train
from bert_jax.formats import pretrained, weights
from bert_jax.model import model as models

GRID = [  # sizes, activation, vocabulary and segments: no two alike, none a multiple of anything
    {'hidden_act': 'gelu', 'vocab_size': 67, 'type_vocab_size': 2},
    {'hidden_act': 'gelu_new', 'vocab_size': 131, 'type_vocab_size': 1, 'hidden_size': 36, 'num_attention_heads': 3},
    {'hidden_act': 'relu', 'vocab_size': 1003, 'type_vocab_size': 3, 'num_hidden_layers': 5, 'intermediate_size': 50},
    {'hidden_act': 'gelu', 'vocab_size': 257, 'hidden_size': 128, 'num_attention_heads': 2, 'num_hidden_layers': 3,
     'intermediate_size': 512, 'max_position_embeddings': 31},
    {'hidden_act': 'gelu_new', 'vocab_size': 128, 'num_hidden_layers': 1, 'num_attention_heads': 1},
]


def load(peer, folder):
    """Our model of a peer, by way of its saved folder: the model with all hidden states, its parameters, the source."""
    source = pretrained.load(str(peers.save(peer, folder)))
    return models.build(source.config, (('hidden', 0), ('hidden', 'all'))), source.params, source


def assert_as_exact(ours, float32, float64, real=...):
    """No further from float64 than twice PyTorch's own float32, and within 5e-5 of that."""
    ours, float32, float64 = (np.asarray(x, np.float64)[real] for x in (ours, float32.detach(), float64.detach()))
    assert abs(ours - float64).max() <= 2 * max(abs(float32 - float64).max(), 1e-6)
    assert abs(ours - float32).max() <= 5e-5


@pytest.mark.parametrize('sizes', GRID, ids=lambda sizes: '-'.join(map(str, sizes.values())))
def test_every_layer_and_the_pretraining_heads(sizes, tmp_path):
    peer = peers.model(**sizes)
    exact = copy.deepcopy(peer).double()
    model, params, _ = load(peer, tmp_path)
    example = peers.batch(peer.config)
    real = example['input_mask'] > 0
    both = [p(**peers.inputs(example), output_hidden_states=True) for p in (peer, exact)]
    encoded = model.apply({'params': params}, example, train=False, method='encode')
    layers = [out.hidden_states for out in both]
    found = [encoded.layers['hidden', 0], *encoded.layers['hidden', 'all']]
    assert len(found) == len(layers[0]) == peer.config.num_hidden_layers + 1
    for ours, float32, float64 in zip(found, *layers):
        assert_as_exact(ours, float32, float64, real)
    pooled = [p.bert(**peers.inputs(example)).pooler_output for p in (peer, exact)]
    assert_as_exact(encoded.pooled[:, 0], *pooled)
    out = model.apply({'params': params}, example, train=False)
    at = torch.tensor(example['masked_lm_positions']).long()[..., None]
    assert_as_exact(out['mlm']['logits'][..., :peer.config.vocab_size],
                    *(torch.take_along_dim(o.prediction_logits, at, 1) for o in both))
    assert_as_exact(out['nsp']['logits'][:, 0], *(o.seq_relationship_logits for o in both))


@pytest.mark.parametrize('architecture, target, keys', [
    ('BertForSequenceClassification', 'classification', ('logits',)),
    ('BertForTokenClassification', 'tagging', ('logits',)),
    ('BertForQuestionAnswering', 'span', ('start_logits', 'end_logits')),
    ('BertForMultipleChoice', 'multiple_choice', ('logits',)),
    ('BertForMaskedLM', 'mlm', ('logits',)),
    ('BertForNextSentencePrediction', 'nsp', ('logits',)),
])
def test_each_head(architecture, target, keys, tmp_path):
    peer = peers.model(architecture, **({'num_labels': 5} if target in ('classification', 'tagging') else {}))
    exact = copy.deepcopy(peer).double()
    model, params, source = load(peer, tmp_path)
    assert list(source.config.targets) == [target] and len(source.labels) == (
        5 if target in ('classification', 'tagging') else 0
    )
    example = peers.batch(peer.config)
    theirs = peers.inputs(example)
    if target == 'multiple_choice':
        theirs = {name: x.unflatten(0, (-1, 2)) for name, x in theirs.items()}
    both = [p(**theirs) for p in (peer, exact)]
    out = model.apply({'params': params}, example, train=False)[target]
    for key in keys:
        expected = [getattr(o, key) for o in both]
        ours, real = out[key], ...
        if target == 'mlm':
            at = torch.tensor(example['masked_lm_positions']).long()[..., None]
            expected, ours = [torch.take_along_dim(e, at, 1) for e in expected], ours[..., :peer.config.vocab_size]
        if target == 'nsp':
            ours = ours[:, 0]
        if target in ('tagging', 'span'):
            real = example['input_mask'] > 0
        assert ours.shape == expected[0].shape
        assert_as_exact(ours, *expected, real)


def by_their_names(tree, source):
    """A tree of ours under Hugging Face's names."""
    tree = jax.tree.map(np.asarray, tree)
    return {tensor.huggingface: weights.matrix(tensor, weights.view(tree, tensor, source.tokenizer.vocab_size),
                                               tensor.huggingface_transposed) for tensor in weights.of(source)}


@pytest.mark.parametrize('activation', ['gelu', 'gelu_new', 'relu'])
def test_the_loss_and_the_gradient_of_every_parameter(activation, tmp_path):
    peer = peers.model(hidden_act=activation, num_hidden_layers=3)
    model, params, source = load(peer, tmp_path)
    example = peers.batch(peer.config)
    expected = peers.loss(peer, example)
    expected.backward()

    def loss(params):
        losses = model.apply({'params': params}, example, train=True, method='losses')
        return sum(v['loss'].total / v['loss'].count for v in losses.values())

    value, gradient = jax.value_and_grad(loss)(params)
    assert float(value) == pytest.approx(expected.item(), rel=1e-5)
    ours = by_their_names(gradient, source)
    theirs = {name: p.grad.numpy() for name, p in peer.named_parameters()}
    assert ours.keys() == theirs.keys()
    whole = np.sqrt(sum((g**2).sum() for g in theirs.values()))
    for name, grad in theirs.items():
        assert np.linalg.norm(ours[name] - grad) <= 1e-4 * max(np.linalg.norm(grad), 1e-3 * whole), name


def our_losses(model, params, examples, rate, name, **settings):
    """The loss before each of the updates that train_step makes."""
    mesh = partition.make_mesh((1, 1, 1))
    tx = optimizer.make_optimizer(name, **settings)
    params = jax.tree.map(jax.numpy.array, params)
    state = train.TrainState(jax.numpy.zeros([], 'int32'), params, tx.init(params))
    step = train.make_train_step(model, tx, mesh, 1, state)
    losses = []
    for example in examples:
        state, metrics = step(state, {'text': example}, train.as_hyper(rate, {'mlm': 1.0, 'nsp': 1.0}, 0))
        losses.append(float(metrics['loss'].total / metrics['loss'].count))
    return np.array(losses)


def assert_same_course(ours, theirs):
    assert theirs[-5:].mean() < 0.8 * theirs[:5].mean()  # it learns
    np.testing.assert_allclose(ours, theirs, rtol=1e-3)


def test_fifty_steps_of_adamw_equal_pytorch(tmp_path):
    peer = peers.model()
    model, params, _ = load(peer, tmp_path)
    examples = [peers.batch(peer.config, seed=step % 5) for step in range(50)]
    ours = our_losses(model, params, examples, 2e-3, 'adamw', bias_correction=True, **SETTINGS)
    decayed = [p for n, p in peer.named_parameters() if 'bias' not in n and 'LayerNorm' not in n]
    rest = [p for n, p in peer.named_parameters() if 'bias' in n or 'LayerNorm' in n]
    tx = torch.optim.AdamW([{'params': decayed, 'weight_decay': 0.01}, {'params': rest, 'weight_decay': 0.0}],
                           lr=2e-3, betas=(0.9, 0.999), eps=1e-6)
    theirs = []
    for example in examples:
        tx.zero_grad()
        loss = peers.loss(peer, example)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
        tx.step()
        theirs.append(loss.item())
    assert_same_course(ours, np.array(theirs))


@pytest.mark.parametrize('name, rate', [('adamw', 1e-3), ('lamb', 1e-2)])
def test_fifty_steps_of_the_original_optimizers_equal_float64_numpy(name, rate, tmp_path):
    """Gradients by PyTorch in float64, updates by NumPy, each of Hugging Face's matrices on its own."""
    peer = peers.model()
    model, params, _ = load(peer, tmp_path)
    examples = [peers.batch(peer.config, seed=step % 5) for step in range(50)]
    settings = SETTINGS | {'bias_correction': name == 'lamb'}
    ours = our_losses(model, params, examples, rate, name, **settings)
    peer = peer.double()
    names = [n for n, _ in peer.named_parameters()]
    tree = {n.replace('LayerNorm.weight', 'scale'): p.detach().numpy().copy() for n, p in peer.named_parameters()}
    theirs = []

    def gradients():
        for example in examples:
            peer.zero_grad()
            loss = peers.loss(peer, example)
            loss.backward()
            theirs.append(loss.item())
            yield {n.replace('LayerNorm.weight', 'scale'): p.grad.numpy().copy() for n, p in peer.named_parameters()}

    def install(tree):
        with torch.no_grad():
            for n, p in peer.named_parameters():
                p.copy_(torch.tensor(tree[n.replace('LayerNorm.weight', 'scale')]))

    assert len(tree) == len(names)
    numpy_steps(tree, gradients(), rate, settings['bias_correction'], name == 'lamb', **SETTINGS, after=install)
    assert_same_course(ours, np.array(theirs))
