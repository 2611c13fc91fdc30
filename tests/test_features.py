"""Vectors of texts against Hugging Face, and the frozen encoder under a BiLSTM."""

import json
import types

import h5py
import jax
import numpy as np
import peers
import pytest
import safetensors.numpy
import torch
from conftest import LONG, call_module, expect_error
from test_tasks import config, make, model  # noqa: F401 - a fixture

import bert_jax
from bert_jax import finetune
from bert_jax.cli import UserError
from bert_jax.data import tokenizer
from bert_jax.model.heads import BiLstmTagging

TEXTS = ['w1 w2 w3', 'w4', 'w5 ' * 60, 'w6 w7\tw8 w9', *(f'w{i} w{i + 1}' for i in range(10, 24))]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return peers.save(peers.model(num_hidden_layers=5), tmp_path_factory.mktemp('features') / 'hf')


def hidden_states(folder, text):
    """[N + 1, tokens, D] from transformers, and the ids."""
    import transformers

    tok = tokenizer.load(folder)
    parts = [tok.encode(part) for part in text.split('\t')]
    ids, segments = [tok.cls_id, *parts[0][:38], tok.sep_id], [0] * (min(len(parts[0]), 38) + 2)
    for part in parts[1:]:
        ids, segments = [*ids, *part, tok.sep_id], segments + [1] * (len(part) + 1)
    peer = transformers.BertModel.from_pretrained(folder).eval()
    with torch.no_grad():
        states = peer(
            torch.tensor([ids]), token_type_ids=torch.tensor([segments]), output_hidden_states=True
        ).hidden_states
    return torch.stack(states)[:, 0].numpy(), ids


@pytest.mark.parametrize('form', ['safetensors', 'hdf5', 'jsonl'])
def test_vectors_equal_hugging_face(folder, tmp_path, form):
    (tmp_path / 'in.txt').write_text('\n'.join(TEXTS) + '\n')
    done = call_module(
        'features',
        '--from',
        folder,
        '--input',
        tmp_path / 'in.txt',
        '--output',
        tmp_path / 'out',
        '--format',
        form,
        '--layers',
        'embeddings,2,-1,sum_last4,concat4',
        '--part_size',
        '7',
        '--batch_size',
        '4',
    )
    assert done.returncode == 0, done.stderr
    parts = sorted(p for p in (tmp_path / 'out').iterdir() if p.name.startswith('part-'))
    assert len(parts) == 3
    for number in (0, 2, 3, 15):
        states, ids = hidden_states(folder, TEXTS[number])
        expected = {'embeddings': states[0], '2': states[2], '-1': states[-1], 'sum_last4': states[-4:].sum(0),
                    'concat4': np.concatenate(list(states[-4:]), -1)}
        part = parts[number // 7]
        for layer, vectors in expected.items():
            if form == 'safetensors':
                found = safetensors.numpy.load_file(part)[f'{number}/{layer}']
                assert safetensors.numpy.load_file(part)[f'{number}/ids'].tolist() == ids
            elif form == 'hdf5':
                with h5py.File(part) as file:
                    found = file[f'{number}/{layer}'][:]
            else:
                found = np.array(json.loads(part.read_text().splitlines()[number % 7])[layer])
            np.testing.assert_allclose(found, vectors, atol=5e-5)


def test_pooled_and_resumed(folder, tmp_path):
    (tmp_path / 'in.txt').write_text('\n'.join(TEXTS) + '\n')
    for pool, of in (('cls', lambda x: x[0]), ('mean', lambda x: x.mean(0))):
        args = (
            'features',
            '--from',
            folder,
            '--input',
            tmp_path / 'in.txt',
            '--output',
            tmp_path / pool,
            '--pool',
            pool,
            '--part_size',
            '5',
        )
        assert call_module(*args).returncode == 0
        states, _ = hidden_states(folder, TEXTS[3])
        found = safetensors.numpy.load_file(tmp_path / pool / 'part-00000.safetensors')['3/-1']
        np.testing.assert_allclose(found, of(states[-1]), atol=5e-5)
    second = tmp_path / 'mean' / 'part-00001.safetensors'
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in (tmp_path / 'mean').iterdir()}
    second.unlink()
    assert call_module(*args).returncode == 0
    after = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in (tmp_path / 'mean').iterdir()}
    assert {p for p in before if before[p] != after[p]} == {second} and before[second][0] == after[second][0]
    expect_error(call_module(*args, '--layers', '2'), 'other settings (layers)')
    (tmp_path / 'in.txt').write_text('\n'.join(['w2 w1', *TEXTS[1:]]) + '\n')
    expect_error(call_module(*args), 'other settings (sha256)')


@pytest.mark.parametrize(
    'args, words',
    [
        (('--layers', '6'), ('--layers 6', '1 to 5', 'concat_last4')),
        (('--max_length', '41'), ('8 to 40',)),
        (('--max_length', '2'), ('8 to 40',)),
    ],
)
def test_bad_input(folder, tmp_path, args, words):
    (tmp_path / 'in.txt').write_text('w1\n')
    expect_error(
        call_module('features', '--from', folder, '--input', tmp_path / 'in.txt', '--output', tmp_path / 'out', *args),
        *words,
    )
    assert not (tmp_path / 'out').exists()


def test_the_last_four_of_three_layers_are_refused(tmp_path):
    small = peers.save(peers.model(num_hidden_layers=3), tmp_path / 'hf')
    (tmp_path / 'in.txt').write_text('w1\n')
    args = ('features', '--from', small, '--input', tmp_path / 'in.txt')
    expect_error(call_module(*args, '--output', tmp_path / 'out', '--layers', 'sum4'), '3 layers')
    expect_error(call_module(*args, '--output', tmp_path / 'in.txt'), 'not an empty folder')


@pytest.mark.parametrize('features', ['concat_last4', pytest.param('sum_all', marks=LONG)])
def test_a_bilstm_over_a_frozen_encoder_learns_and_the_encoder_stays(features, folder, tmp_path):
    c = config(
        'conll2003',
        folder,
        make('conll2003', tmp_path),
        'epochs=30.0',
        'evals_per_epoch=1',
        f'task.features={features}',
        'task.lstm_size=24',
        'task.document_context=False',
        'schedule.peak=1e-2',
    )
    job = finetune.Job(c, finetune.read_task(c))
    state = job.run.init(0)
    slots = {
        '/'.join(str(getattr(key, 'key', '')) for key in path)
        for path, _ in jax.tree_util.tree_leaves_with_path(state.opt_state)
    }
    assert not any('encoder' in name or 'embeddings' in name for name in slots) and any(
        'targets_bilstm' in name for name in slots
    )
    results = finetune.train_task(job, c, str(tmp_path / 'work'))
    assert results['dev/f1'] == 1, results
    from bert_jax import checkpoint

    params, _, _ = checkpoint.load_params(tmp_path / 'work', best='dev/f1')
    for part in ('embeddings', 'encoder'):
        jax.tree.map(np.testing.assert_array_equal, params[part], job.source.params[part])
    lines = (tmp_path / 'work' / 'predictions_dev.conll').read_text().split('\n\n')
    sentences = [[line.split() for line in part.strip().splitlines()] for part in lines]
    for found, sentence in zip(
        bert_jax.load(str(tmp_path / 'work'))([' '.join(word for word, *_ in one) for one in sentences]), sentences
    ):
        assert (
            found['tags'] == [tag for *_, tag in sentence] and 0.4 < min(found['scores']) <= max(found['scores']) <= 1
        )
        for entity in found['entities']:
            assert entity['score'] == pytest.approx(np.mean(found['scores'][entity['begin']:entity['end']]), abs=1e-5)


def test_too_few_layers_for_a_row_of_table_7(model, tmp_path):  # noqa: F811
    c = config('conll2003', model, make('conll2003', tmp_path), 'task.features=concat_last4')
    small = peers.save(peers.model(num_hidden_layers=3, max_position_embeddings=64), tmp_path / 'small')
    c.init_from = str(small)
    with pytest.raises(UserError, match='reads layer -4, .* has 3 layers'):
        finetune.Job(c, finetune.read_task(c))


def test_which_layers_each_row_of_table_7_takes():
    hidden = np.random.default_rng(0).normal(size=(13, 2, 3, 4)).astype(np.float32)  # embeddings and twelve layers
    expected = {
        'embeddings': hidden[0],
        'second_to_last': hidden[11],
        'last': hidden[12],
        'concat_last4': np.concatenate(hidden[9:], -1),
        'sum_last4': hidden[9:].mean(0),
        'sum_all': hidden[1:].mean(0),
    }  # before anything is learned the weights are equal
    for features, wanted in expected.items():
        reads = BiLstmTagging(3, features, 5, 0.0).reads
        head = types.SimpleNamespace(
            features=features, reads=reads, param=lambda name, init, shape: init(jax.random.key(0), shape)
        )
        found = BiLstmTagging._features(
            head, {read: hidden[1:] if read[1] == 'all' else hidden[read[1]] for read in reads}
        )
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_the_bilstm_equals_pytorch():
    """Both layers, both directions, rows of different lengths."""
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(3, 4, 9, 6)).astype(np.float32)
    lengths = np.array([9, 4, 7, 1])
    example = {'input_mask': (np.arange(9) < lengths[:, None]).astype(np.int32)}
    ours = BiLstmTagging(5, 'last', 7, 0.0)
    from bert_jax.model.parts import Encoded

    encoded = Encoded(hidden[-1], {('hidden', -1): hidden[-1]})
    apply = lambda p: ours.apply({'params': p}, encoded, example, None, train=False, method='outputs')['logits']  # noqa: E731
    params = ours.init(jax.random.key(0), encoded, example, None, train=False, method='outputs')['params']
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32) * 0.4, params)
    theirs = torch.nn.LSTM(6, 7, 2, batch_first=True, bidirectional=True)
    with torch.no_grad():
        for layer in range(2):
            for side, ending in (('forward', ''), ('backward', '_reverse')):
                cell = params[f'{side}_{layer}']
                for name, array in (('weight_ih', cell['inputs']['kernel'].T), ('weight_hh', cell['recurrent'].T),
                                    ('bias_hh', cell['inputs']['bias'])):
                    getattr(theirs, f'{name}_l{layer}{ending}').copy_(torch.tensor(array))
                getattr(theirs, f'bias_ih_l{layer}{ending}').zero_()
    packed = torch.nn.utils.rnn.pack_padded_sequence(
        torch.tensor(hidden[-1]), torch.tensor(lengths), True, enforce_sorted=False
    )
    out, _ = torch.nn.utils.rnn.pad_packed_sequence(theirs(packed)[0], True)
    expected = out @ torch.tensor(params['dense']['kernel']) + torch.tensor(params['dense']['bias'])
    real = example['input_mask'] > 0
    np.testing.assert_allclose(apply(params)[real], expected.detach().numpy()[real], atol=1e-5)
    weights = rng.normal(size=expected.shape).astype(np.float32) * real[..., None]
    (expected * torch.tensor(weights)).sum().backward()
    found = jax.grad(lambda p: (apply(p) * weights).sum())(params)
    for layer in range(2):
        for side, ending in (('forward', ''), ('backward', '_reverse')):
            for name, array in (
                ('weight_ih', found[f'{side}_{layer}']['inputs']['kernel'].T),
                ('bias_hh', found[f'{side}_{layer}']['inputs']['bias']),
                ('weight_hh', found[f'{side}_{layer}']['recurrent'].T),
            ):
                np.testing.assert_allclose(array, getattr(theirs, f'{name}_l{layer}{ending}').grad.numpy(), atol=1e-5)
