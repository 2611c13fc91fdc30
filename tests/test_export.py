"""Exported programs run on their own and say what predict says."""

import ast
import json
import os
import subprocess
import sys

import numpy as np
import peers
import pytest
from conftest import call_module, expect_error
from jax import export

import bert_jax


def run_example(folder, *texts):
    """In a directory and with a path of its own, so that nothing of bert_jax can be found."""
    env = {name: value for name, value in os.environ.items() if name not in ('PYTHONPATH', 'XLA_FLAGS')}
    done = subprocess.run(
        [sys.executable, folder / 'example.py', *texts], cwd='/', text=True, capture_output=True, env=env
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope='module')
def classifier(tmp_path_factory):
    folder = tmp_path_factory.mktemp('classifier')
    peer = peers.model('BertForSequenceClassification', num_labels=3, id2label={0: 'no', 1: 'maybe', 2: 'yes'})
    return peers.save(peer, folder / 'hf')


@pytest.mark.parametrize('texts', [('w1 w2 w3',), ('w4 w9', 'w8'), ('w7 ' * 40,), ('w7 ' * 40, 'w1 ' * 9), ('',)])
def test_a_classifier_equals_predict(classifier, tmp_path_factory, texts):
    output = classifier.parent / 'exported'
    if not output.exists():
        done = call_module('export', '--from', classifier, '--lengths', '16,8,40', '--output', output)
        assert done.returncode == 0, done.stderr
        assert 'cpu, cuda, tpu' in done.stdout
    ours = bert_jax.load(str(classifier))(texts if len(texts) == 2 else texts[0])['scores']
    theirs = run_example(output, *texts)
    assert list(theirs) == ['no', 'maybe', 'yes']
    np.testing.assert_allclose(list(theirs.values()), list(ours.values()), atol=1e-5)


@pytest.mark.parametrize('kind', ['wordpiece', 'sentencepiece'])
def test_a_masked_language_model_equals_predict(kind, vocab, sentencepiece_vocab, tmp_path):
    peer = peers.model(vocab_size=1003)
    peer.save_pretrained(tmp_path / 'hf')
    from bert_jax.data import tokenizer

    tokenizer.load({'wordpiece': vocab, 'sentencepiece': sentencepiece_vocab}[kind]).save(tmp_path / 'hf')
    done = call_module('export', '--from', tmp_path / 'hf', '--lengths', '24', '--output', tmp_path / 'out')
    assert done.returncode == 0, done.stderr
    text = 'The [MASK] statement imports a [MASK].'
    ours = bert_jax.load(str(tmp_path / 'hf'))(text)['masks']
    theirs = run_example(tmp_path / 'out', text)
    assert [list(mask) for mask in theirs] == [[guess['token'] for guess in mask] for mask in ours]
    np.testing.assert_allclose(
        [list(mask.values()) for mask in theirs], [[g['score'] for g in mask] for mask in ours], atol=1e-5
    )


def test_what_is_in_the_folder(classifier, tmp_path):
    done = call_module('export', '--from', classifier, '--lengths', '8', '--output', tmp_path / 'out')
    assert done.returncode == 0, done.stderr
    program = export.deserialize(bytearray((tmp_path / 'out' / 'program_8.bin').read_bytes()))
    assert program.platforms == ('cpu', 'cuda', 'tpu')
    weights = np.load(tmp_path / 'out' / 'weights.npz')
    assert weights['embeddings/token'].shape == (67, 48)  # without padding
    tree = ast.parse((tmp_path / 'out' / 'example.py').read_text())
    imported = {
        name.name.split('.')[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names
    }
    imported |= {node.module.split('.')[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported - set(sys.stdlib_module_names) == {'jax', 'numpy', 'tokenizers', 'sentencepiece'}


def test_bad_input(classifier, tmp_path):
    bad = lambda *args: call_module('export', '--from', classifier, '--output', tmp_path / 'out', *args)  # noqa: E731
    expect_error(bad('--lengths', '8,sixteen'), 'whole numbers')
    expect_error(bad('--lengths', '8,64'), 'from 3 to 40')
    encoder = peers.save(peers.model('BertModel'), tmp_path / 'encoder')
    expect_error(call_module('export', '--from', encoder, '--output', tmp_path / 'out'), 'none', 'classification')
    assert not (tmp_path / 'out').exists()
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / 'mine').write_text('precious')
    expect_error(bad('--lengths', '8'), 'not an empty folder')
