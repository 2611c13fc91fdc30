"""Formats in and out: nothing lost, nothing silent, nothing half-written."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import zipfile

import jax
import numpy as np
import peers
import pytest
import safetensors.numpy
import torch
import transformers
from conftest import ROOT, call_module, expect_error, run_module

from bert_jax import cli, convert
from bert_jax.cli import UserError
from bert_jax.formats import pretrained, tf_bundle

ORIGINAL = {  # google-research/bert, modeling.py: name -> shape as a function of sizes, written down from its code
    'bert/embeddings/word_embeddings': lambda s: (s['V'], s['D']),
    'bert/embeddings/token_type_embeddings': lambda s: (s['T'], s['D']),
    'bert/embeddings/position_embeddings': lambda s: (s['P'], s['D']),
    'bert/embeddings/LayerNorm/beta': lambda s: (s['D'],),
    'bert/embeddings/LayerNorm/gamma': lambda s: (s['D'],),
    'bert/encoder/layer_%d/attention/self/query/kernel': lambda s: (s['D'], s['D']),
    'bert/encoder/layer_%d/attention/self/query/bias': lambda s: (s['D'],),
    'bert/encoder/layer_%d/attention/self/key/kernel': lambda s: (s['D'], s['D']),
    'bert/encoder/layer_%d/attention/self/key/bias': lambda s: (s['D'],),
    'bert/encoder/layer_%d/attention/self/value/kernel': lambda s: (s['D'], s['D']),
    'bert/encoder/layer_%d/attention/self/value/bias': lambda s: (s['D'],),
    'bert/encoder/layer_%d/attention/output/dense/kernel': lambda s: (s['D'], s['D']),
    'bert/encoder/layer_%d/attention/output/dense/bias': lambda s: (s['D'],),
    'bert/encoder/layer_%d/attention/output/LayerNorm/beta': lambda s: (s['D'],),
    'bert/encoder/layer_%d/attention/output/LayerNorm/gamma': lambda s: (s['D'],),
    'bert/encoder/layer_%d/intermediate/dense/kernel': lambda s: (s['D'], s['F']),
    'bert/encoder/layer_%d/intermediate/dense/bias': lambda s: (s['F'],),
    'bert/encoder/layer_%d/output/dense/kernel': lambda s: (s['F'], s['D']),
    'bert/encoder/layer_%d/output/dense/bias': lambda s: (s['D'],),
    'bert/encoder/layer_%d/output/LayerNorm/beta': lambda s: (s['D'],),
    'bert/encoder/layer_%d/output/LayerNorm/gamma': lambda s: (s['D'],),
    'bert/pooler/dense/kernel': lambda s: (s['D'], s['D']),
    'bert/pooler/dense/bias': lambda s: (s['D'],),
    'cls/predictions/transform/dense/kernel': lambda s: (s['D'], s['D']),
    'cls/predictions/transform/dense/bias': lambda s: (s['D'],),
    'cls/predictions/transform/LayerNorm/beta': lambda s: (s['D'],),
    'cls/predictions/transform/LayerNorm/gamma': lambda s: (s['D'],),
    'cls/predictions/output_bias': lambda s: (s['V'],),
    'cls/seq_relationship/output_weights': lambda s: (2, s['D']),
    'cls/seq_relationship/output_bias': lambda s: (2,)}
SIZES = {'V': 67, 'D': 48, 'F': 80, 'T': 2, 'P': 40}
HEADS = [
    'BertForPreTraining',
    'BertForMaskedLM',
    'BertForNextSentencePrediction',
    'BertModel',
    'BertForSequenceClassification',
    'BertForTokenClassification',
    'BertForQuestionAnswering',
    'BertForMultipleChoice',
]


def original(layers=2, **sizes):
    """Random variables under the original code's names and shapes."""
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape(SIZES | sizes)).astype(np.float32)
            for pattern, shape in ORIGINAL.items()
            for name in ([pattern % i for i in range(layers)] if '%d' in pattern else [pattern])}


def tf1_folder(folder, variables, **config):
    """As the original code leaves one, written by TensorFlow itself."""
    import tensorflow as tf

    folder.mkdir()
    tf.raw_ops.SaveV2(prefix=str(folder / 'bert_model.ckpt'), tensor_names=list(variables),
                      shape_and_slices=[''] * len(variables), tensors=list(variables.values()))
    return describe_tf1(folder, **config)


def describe_tf1(folder, **config):
    """Sizes and vocabulary of a TF1 folder."""
    (folder / 'bert_config.json').write_text(json.dumps({
        'vocab_size': 67, 'hidden_size': 48, 'num_hidden_layers': 2, 'num_attention_heads': 4, 'intermediate_size': 80,
        'hidden_act': 'gelu', 'max_position_embeddings': 40, 'type_vocab_size': 2, 'hidden_dropout_prob': 0.1,
        'attention_probs_dropout_prob': 0.1, 'initializer_range': 0.02} | config))
    (folder / 'vocab.txt').write_text('\n'.join(peers.SPECIALS + [f'w{i}' for i in range(62)]) + '\n')
    return folder


@pytest.fixture
def hf(tmp_path):
    return peers.save(peers.model(), tmp_path / 'hf')


def tensors(folder):
    return safetensors.numpy.load_file(folder / 'model.safetensors')


@pytest.mark.parametrize('architecture', HEADS)
def test_hugging_face_there_and_back_is_bit_identical(architecture, tmp_path, capfd):
    peer = peers.model(architecture, **({'num_labels': 3, 'id2label': {0: 'no', 1: 'maybe', 2: 'yes'}}
                                        if 'Sequence' in architecture or 'Token' in architecture else {}))
    source = peers.save(peer, tmp_path / 'hf')
    convert.convert(str(source), str(tmp_path / 'work'), 'workdir')
    convert.convert(str(tmp_path / 'work'), str(tmp_path / 'back'), 'hf')
    before, after = tensors(source), tensors(tmp_path / 'back')
    assert before.keys() == after.keys()
    for name in before:
        assert before[name].dtype == after[name].dtype and before[name].tobytes() == after[name].tobytes(), name
    assert 'left out' not in capfd.readouterr().err
    again, info = getattr(transformers, architecture).from_pretrained(tmp_path / 'back', output_loading_info=True)
    assert not any(info.values()), info
    auto = transformers.AutoConfig.from_pretrained(tmp_path / 'back')
    assert auto.architectures == [architecture] and auto.id2label == peer.config.id2label
    example = peers.inputs(peers.batch(peer.config))
    if architecture == 'BertForMultipleChoice':
        example = {name: x.unflatten(0, (-1, 2)) for name, x in example.items()}
    with torch.no_grad():
        for ours, theirs in zip(again.eval()(**example).to_tuple(), peer(**example).to_tuple()):
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def test_tf1_there_and_back_is_bit_identical_and_tensorflow_reads_it(tmp_path, capfd):
    import tensorflow as tf

    variables = original()
    slots = {f'{name}/adam_m': value for name, value in variables.items()} | {'global_step': np.int64(7)}
    source = tf1_folder(tmp_path / 'tf1', variables | slots)
    convert.convert(str(source), str(tmp_path / 'work'), 'workdir')
    assert f'left out: {len(slots)} variables of the optimizer' in capfd.readouterr().err
    convert.convert(str(tmp_path / 'work'), str(tmp_path / 'back'), 'tf1')
    assert 'note' not in capfd.readouterr().err
    reader = tf.train.load_checkpoint(str(tmp_path / 'back' / 'bert_model.ckpt'))
    assert reader.get_variable_to_shape_map().keys() == variables.keys()
    for name, value in variables.items():
        assert reader.get_tensor(name).tobytes() == value.tobytes(), name
    before, after = (json.loads((folder / 'bert_config.json').read_text()) for folder in (source, tmp_path / 'back'))
    assert before == after
    assert (source / 'vocab.txt').read_bytes() == (tmp_path / 'back' / 'vocab.txt').read_bytes()


def test_a_tf1_model_computes_the_same_in_transformers(tmp_path):
    """Its gelu is the tanh form; matrices keep their direction, which square shapes would hide."""
    source = tf1_folder(tmp_path / 'tf1', original())
    convert.convert(str(source), str(tmp_path / 'hf'), 'hf')
    peer = transformers.AutoModelForPreTraining.from_pretrained(tmp_path / 'hf').eval()
    assert peer.config.hidden_act == 'gelu_new'
    state, variables = peer.state_dict(), original()
    np.testing.assert_array_equal(state['bert.encoder.layer.1.attention.self.key.weight'],
                                  variables['bert/encoder/layer_1/attention/self/key/kernel'].T)
    np.testing.assert_array_equal(
        state['cls.seq_relationship.weight'], variables['cls/seq_relationship/output_weights']
    )
    with torch.no_grad():
        theirs = peer(**peers.inputs(example := peers.batch(peer.config)))
    ours = pretrained.load(str(source))
    from bert_jax.model import model as models

    out = models.build(ours.config).apply({'params': ours.params}, example, train=False)
    at = torch.tensor(example['masked_lm_positions']).long()[..., None]
    np.testing.assert_allclose(
        out['mlm']['logits'][..., :67], torch.take_along_dim(theirs.prediction_logits, at, 1), atol=2e-3
    )


@pytest.mark.parametrize(
    'names', [('output_weights', 'output_bias'), ('cls/squad/output_weights', 'cls/squad/output_bias')]
)
def test_tf1_heads_of_fine_tuning_travel(names, tmp_path):
    rng = np.random.default_rng(1)
    head = dict(zip(names, (rng.normal(size=(2, 48)).astype(np.float32), rng.normal(size=2).astype(np.float32))))
    body = {name: value for name, value in original().items() if name.startswith('bert/')}
    source = tf1_folder(tmp_path / 'tf1', body | head)
    convert.convert(str(source), str(tmp_path / 'hf'), 'hf')
    convert.convert(str(tmp_path / 'hf'), str(tmp_path / 'back'), 'tf1')
    reader = tf_bundle.Reader(str(tmp_path / 'back' / 'bert_model.ckpt'))
    assert reader.entries.keys() == (body | head).keys()
    for name, value in (body | head).items():
        assert reader.read(name).tobytes() == value.tobytes()


def test_the_bundle_reader_reads_what_tensorflow_writes(tmp_path):
    """Several shards, several blocks of the index, other types, a scalar, an empty array."""
    import tensorflow as tf

    rng = np.random.default_rng(0)
    variables = {
        f'{"long/" * 40}scope/variable_{i}': rng.normal(size=(i % 7, 3)).astype(np.float32) for i in range(3000)
    }
    variables |= {'int': np.int64(-5), 'half': np.float16([1.5, 2]), 'double': np.float64([[1 / 3]])}
    for part, names in enumerate((list(variables)[::2], list(variables)[1::2])):
        tf.raw_ops.SaveV2(prefix=str(tmp_path / f'part{part}'), tensor_names=names, shape_and_slices=[''] * len(names),
                          tensors=[variables[name] for name in names])
    tf.raw_ops.MergeV2Checkpoints(checkpoint_prefixes=[str(tmp_path / f'part{i}') for i in range(2)],
                                  destination_prefix=str(tmp_path / 'whole'))
    reader = tf_bundle.Reader(str(tmp_path / 'whole'))
    assert reader.entries.keys() == variables.keys()
    for name, value in variables.items():
        assert reader.read(name).dtype == value.dtype and reader.read(name).tobytes() == value.tobytes()


def test_every_way_to_keep_the_weights_is_read_alike(tmp_path):
    peer = peers.model()
    reference = tensors(peers.save(peer, tmp_path / 'plain'))
    state = peer.state_dict()
    folders = {name: tmp_path / name for name in ('sharded', 'bin', 'gamma', 'bare')}
    peers.save(peer, folders['sharded'], max_shard_size='40KB')
    assert len(list(folders['sharded'].glob('*.safetensors'))) > 2
    for name in ('bin', 'gamma', 'bare'):
        shutil.copytree(tmp_path / 'plain', folders[name])
        (folders[name] / 'model.safetensors').unlink()
    torch.save(state, folders['bin'] / 'pytorch_model.bin')
    old = {
        k.replace('LayerNorm.weight', 'LayerNorm.gamma').replace('LayerNorm.bias', 'LayerNorm.beta'): v
        for k, v in state.items()
    }
    torch.save(old | {'bert.embeddings.position_ids': torch.arange(40)}, folders['gamma'] / 'pytorch_model.bin')
    torch.save({k.removeprefix('bert.'): v for k, v in state.items()}, folders['bare'] / 'pytorch_model.bin')
    for name, folder in folders.items():
        convert.convert(str(folder), str(tmp_path / f'{name}_out'), 'hf')
        again = tensors(tmp_path / f'{name}_out')
        assert again.keys() == reference.keys()
        assert all(again[k].tobytes() == reference[k].tobytes() for k in reference), name


def test_half_precision_is_converted_with_a_word(tmp_path, capfd):
    peers.save(peers.model().to(torch.bfloat16), tmp_path / 'bf16')
    convert.convert(str(tmp_path / 'bf16'), str(tmp_path / 'out'), 'hf')
    assert 'weights are bfloat16 there; converted to float32' in capfd.readouterr().err
    assert {array.dtype for array in tensors(tmp_path / 'out').values()} == {np.dtype('float32')}


def test_what_has_no_counterpart_is_named(tmp_path, capfd):
    peer = peers.model('BertForTokenClassification', num_labels=3)
    source = peers.save(peer, tmp_path / 'hf')
    state = tensors(source) | {'crf.transitions': np.ones((3, 3), np.float32)}
    safetensors.numpy.save_file(state, source / 'model.safetensors')
    convert.convert(str(source), str(tmp_path / 'out'), 'tf1')
    said = capfd.readouterr().err
    assert 'without a counterpart here: crf.transitions' in said
    assert 'no such head: tagging' in said and 'erf' in said and 'labels.txt' in said


def test_our_own_model_goes_out_and_comes_back(pretrained, tmp_path):
    """From a workdir that was trained here: scores and config in the card, the vocabulary's padding nowhere."""
    done = call_module(
        'convert',
        '--from',
        pretrained,
        '--to',
        tmp_path / 'hf',
        '--format',
        'hf',
        '--name',
        'me/topics',
        '--license',
        'apache-2.0',
    )
    assert done.returncode == 0, done.stderr
    assert f'hf upload me/topics {tmp_path / "hf"}' in done.stdout
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / 'hf')
    model = transformers.AutoModelForPreTraining.from_pretrained(tmp_path / 'hf')
    assert {
        len(tokenizer),
        model.config.vocab_size,
        *(
            t.shape[0]
            for n, t in tensors(tmp_path / 'hf').items()
            if 'word_embeddings' in n or n == 'cls.predictions.bias'
        ),
    } == {1003}
    card = (tmp_path / 'hf' / 'README.md').read_text()
    for word in ('license: apache-2.0', 'held_out/mlm/loss', 'Steps: 10', '"max_length"', 'fill-mask', 'me/topics'):
        assert word in card, word
    pipe = transformers.pipeline('fill-mask', str(tmp_path / 'hf'))
    guess = pipe('the [MASK] statement', top_k=3)
    import bert_jax

    ours = bert_jax.load(str(pretrained))('the [MASK] statement', top_k=3)['masks'][0]
    assert [g['token_str'] for g in guess] == [g['token'] for g in ours]
    np.testing.assert_allclose([g['score'] for g in guess], [g['score'] for g in ours], atol=1e-5)
    done = call_module('convert', '--from', tmp_path / 'hf', '--to', tmp_path / 'work', '--format', 'workdir')
    assert done.returncode == 0, done.stderr
    a, b = (
        sorted((p.name, p.read_bytes()) for p in (folder / 'tokenizer').iterdir())
        for folder in (pretrained, tmp_path / 'work')
    )
    assert a == b


def test_tokenizers_of_hugging_face_folders_equal_ours(vocab, sentencepiece_vocab, corpus, tmp_path):
    from bert_jax.data import tokenizer as tokenizers
    from bert_jax.formats import huggingface

    lines = [*corpus.read_text().splitlines()[:2000],
             '  two  spaces ', 'Ｆｕｌｌ width, naïve café — ½ ﬁ', '한국어 中文', '']
    for name, path in (('wordpiece', vocab), ('sentencepiece', sentencepiece_vocab)):
        ours, folder = tokenizers.load(path), tmp_path / name
        folder.mkdir()
        huggingface.write_tokenizer(ours, folder, 128)
        peers.model(vocab_size=ours.vocab_size, max_position_embeddings=128).config.save_pretrained(folder)
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        assert theirs.mask_token_id == ours.mask_id and theirs.model_max_length == 128
        for line in lines:
            ids = theirs(line, add_special_tokens=False)['input_ids']
            if re.search(r'([^\w\s])\1{7}', line):  # pieces of equal score in any order
                ids, line = sorted(ids), sorted(ours.encode(line))
                assert ids == line
                continue
            assert ids == ours.encode(line), line
        pair = theirs('the import', 'statement', return_tensors='np')
        expected = [ours.cls_id, *ours.encode('the import'), ours.sep_id, *ours.encode('statement'), ours.sep_id]
        assert pair['input_ids'][0].tolist() == expected
        assert pair['token_type_ids'][0].sum() == len(ours.encode('statement')) + 1
        assert tokenizers.load(folder).hash == ours.hash


def test_a_hub_name_comes_from_the_cache_without_a_network(hf, tmp_path):
    cache = tmp_path / 'hub' / 'models--some--bert'
    (cache / 'refs').mkdir(parents=True)
    (cache / 'refs' / 'main').write_text('abc123')
    shutil.copytree(hf, cache / 'snapshots' / 'abc123')
    env = {'HF_HUB_CACHE': str(tmp_path / 'hub'), 'HF_HUB_OFFLINE': '1'}
    done = run_module('predict', '--init_from', 'some/bert', 'w1 [MASK] w3', env=env)
    assert done.returncode == 0 and 'w1 [MASK] w3' in done.stdout, done.stderr
    expect_error(
        run_module('predict', '--init_from', 'some/other', 'w1', env=env), 'some/other', 'hf download some/other'
    )


def cut(file, share=0.7):
    file.write_bytes(file.read_bytes()[:int(file.stat().st_size * share)])


def flip(file, at=0.5):
    content = bytearray(file.read_bytes())
    content[int(len(content) * at)] ^= 255
    file.write_bytes(content)


def spoil_config(**changes):
    def spoil(folder):
        config = json.loads((folder / 'config.json').read_text())
        (folder / 'config.json').write_text(json.dumps(config | changes))
    return spoil


def drop_shard(folder):
    peers.save(peers.model(), folder, max_shard_size='40KB')
    (folder / 'model.safetensors').unlink(missing_ok=True)
    sorted(folder.glob('model-*.safetensors'))[1].unlink()


def evil_pickle(folder):
    """As torch.save would write it, but with a call inside."""
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(folder / 'was_run'),)

    (folder / 'model.safetensors').unlink()
    with zipfile.ZipFile(folder / 'pytorch_model.bin', 'w') as archive:
        archive.writestr('archive/data.pkl', pickle.dumps({'a': Evil()}))
        archive.writestr('archive/version', '3\n')


def as_bin(folder):
    torch.save(peers.model().state_dict(), folder / 'pytorch_model.bin')
    (folder / 'model.safetensors').unlink()
    cut(folder / 'pytorch_model.bin')


def change_tensors(change):
    def spoil(folder):
        state = tensors(folder)
        change(state)
        safetensors.numpy.save_file(state, folder / 'model.safetensors')
    return spoil


def longer_vocab(folder):
    with (folder / 'vocab.txt').open('a') as out:
        out.write('one_more\n')


@pytest.mark.parametrize(
    'spoil, words',
    [
        (lambda folder: cut(folder / 'model.safetensors'), ('model.safetensors', 'damaged or cut short')),
        (lambda folder: flip(folder / 'model.safetensors', 0.0), ('model.safetensors', 'damaged or cut short')),
        (as_bin, ('pytorch_model.bin', 'damaged or cut short')),
        (evil_pickle, ('pytorch_model.bin', 'would run code')),
        (drop_shard, ('this shard is missing', 'model.safetensors.index.json')),
        (lambda folder: (folder / 'model.safetensors').unlink(), ('no weights there', 'pytorch_model.bin')),
        (longer_vocab, ('68', '67')),
        (lambda folder: (folder / 'vocab.txt').write_text('\n'.join(peers.SPECIALS)), ('has 5 entries', '67')),
        (
            spoil_config(architectures=['RobertaForMaskedLM'], model_type='roberta'),
            ('RobertaForMaskedLM', 'BertForPreTraining'),
        ),
        (spoil_config(architectures=['BertLMHeadModel']), ('BertLMHeadModel', 'BertForMaskedLM')),
        (spoil_config(position_embedding_type='relative_key'), ('relative_key', 'absolute')),
        (spoil_config(layer_norm_eps=1e-5), ('layer_norm_eps', '1e-05', '1e-12')),
        (spoil_config(hidden_act='silu'), ("'silu'", 'gelu_new')),
        (spoil_config(intermediate_size=90), ('intermediate.dense.weight', '(80, 48)', '(90, 48)')),
        (spoil_config(num_hidden_layers=3), ('bert.encoder.layer.2.attention.self.query.weight is missing',)),
        (
            change_tensors(lambda s: s.pop('bert.embeddings.LayerNorm.bias')),
            ('bert.embeddings.LayerNorm.bias is missing',),
        ),
        (
            change_tensors(lambda s: s.update({'cls.predictions.decoder.weight': np.ones((67, 48), np.float32)})),
            ('tied',),
        ),
        (
            change_tensors(lambda s: s.update({'classifier.weight': np.ones((2, 48), np.float32)})),
            ('classifier', 'architectures'),
        ),
    ],
)
def test_bad_hugging_face_folders(hf, tmp_path, spoil, words):
    spoil(hf)
    with pytest.raises(UserError) as error:
        convert.convert(str(hf), str(tmp_path / 'out'), 'workdir')
    assert all(word in str(error.value) for word in words), error.value
    assert not (tmp_path / 'out').exists() and not (hf / 'was_run').exists()
    assert {p.name for p in tmp_path.iterdir()} == {'hf'}


@pytest.mark.parametrize('spoil, words', [
    (lambda f: cut(f / 'bert_model.ckpt.index'), ('bert_model.ckpt', 'cut short')),
    (lambda f: flip(f / 'bert_model.ckpt.index', 0.3), ('bert_model.ckpt', 'damaged')),
    (lambda f: cut(f / 'bert_model.ckpt.data-00000-of-00001'), ('cut short',)),
    (lambda f: flip(f / 'bert_model.ckpt.data-00000-of-00001'), ('not those that were written',)),
    (lambda f: (f / 'bert_model.ckpt.data-00000-of-00001').unlink(), ('data-00000-of-00001', 'No such file')),
    (lambda f: (f / 'bert_config.json').write_text('{"vocab_size": 67}'), ('hidden_size', 'bert_config.json')),
    (longer_vocab, ('68', '67')),
])
def test_bad_tf1_folders(tmp_path, spoil, words):
    source = tf1_folder(tmp_path / 'tf1', original())
    spoil(source)
    with pytest.raises(UserError) as error:
        convert.convert(str(source), str(tmp_path / 'out'), 'hf')
    assert all(word in str(error.value) for word in words), error.value
    assert not (tmp_path / 'out').exists()


def test_bad_targets(hf, tmp_path):
    (tmp_path / 'full').mkdir()
    (tmp_path / 'full' / 'mine').write_text('precious')
    expect_error(
        call_module('convert', '--from', hf, '--to', tmp_path / 'full', '--format', 'hf'), 'not an empty folder'
    )
    assert [p.name for p in (tmp_path / 'full').iterdir()] == ['mine']
    expect_error(
        call_module('convert', '--from', tmp_path / 'nowhere here', '--to', tmp_path / 'x', '--format', 'hf'),
        'no such folder',
    )
    expect_error(
        call_module('convert', '--from', ROOT / 'docs', '--to', tmp_path / 'x', '--format', 'hf'),
        'no model there',
        'workdir',
    )


@pytest.mark.parametrize('form', ['hf', 'tf1', 'workdir'])
def test_no_space_left(hf, tmp_path, form):
    """The limit on the size of a file stands in for a full disk."""
    code = (f'import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); '
            f'resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)); '
            f'sys.argv = ["convert", "--from", {str(hf)!r}, "--to", {str(tmp_path / "out")!r}, "--format", {form!r}]; '
            'from bert_jax import cli, convert; cli.run(convert.main)')
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, text=True, capture_output=True,
                          env=os.environ | {'PYTHONPATH': str(ROOT)})
    expect_error(done, 'could not be written')
    assert {p.name for p in tmp_path.iterdir()} == {'hf'}


def test_training_goes_on_from_a_hugging_face_folder(store_path, vocab, tmp_path):
    """Continued pre-training without NSP, then a checkpoint that disagrees is refused with both values."""
    peer = peers.model(vocab_size=1003, hidden_size=32, num_attention_heads=2, intermediate_size=128,
                       max_position_embeddings=128, hidden_act='gelu_new')
    peer.save_pretrained(tmp_path / 'hf')
    for file in vocab.iterdir():
        shutil.copy(file, tmp_path / 'hf' / file.name)
    from conftest import TINY

    args = ('pretrain', '--config', 'configs/pretrain.py:tiny,no_nsp', f'--config.store={store_path}',
            f'--config.init_from={tmp_path / "hf"}', *TINY, '--config.phases=((2,64,8),)')
    done = call_module(*args, '--workdir', tmp_path / 'work')
    assert done.returncode == 0, done.stderr
    assert 'left behind: pooler, targets_nsp' in done.stdout
    expect_error(call_module(*args, '--config.model.encoder.num_layers=3', '--workdir', tmp_path / 'bad'),
                 'another architecture', 'num_layers is 2 there, 3')
    source = pretrained.load(str(tmp_path / 'hf'))
    for override, words in {
        'encoder.activation=gelu': "activation is 'gelu_new' there, 'gelu' in the config",
        'encoder.num_heads=4': 'num_heads is 2 there, 4',
        'embeddings.max_length=112': 'max_length is 128 there, 112',
    }.items():
        config = cli.load_config('configs/pretrain.py:tiny,no_nsp', [*TINY, f'--config.model.{override}'])
        config.model.embeddings.vocab_size = 1003
        with pytest.raises(UserError, match=words):
            pretrained.check_fits(config.model, source, 'hf')
    shutil.copytree(tmp_path / 'hf', tmp_path / 'other')
    pieces = (vocab / 'vocab.txt').read_text().split('\n')
    (tmp_path / 'other' / 'vocab.txt').write_text('\n'.join([*pieces[:-3], pieces[-2], pieces[-3], '']))
    expect_error(
        call_module(*args[:4], f'--config.init_from={tmp_path / "other"}', *args[5:], '--workdir', tmp_path / 'bad'),
        'its tokenizer',
        'is not the one of the data',
    )


def test_fine_tuning_and_prediction_start_from_tf1(tmp_path):
    """And go out to transformers; every task of test_tasks starts from a Hugging Face folder."""
    rows = [f'{"w1 w2" if i % 2 else "w3 w4"} w{i % 7 + 5},{"ab"[i % 2]}' for i in range(48)]
    (tmp_path / 'rows.csv').write_text('text,label\n' + '\n'.join(rows) + '\n')
    source = tf1_folder(tmp_path / 'tf1', original())
    done = call_module(
        'finetune',
        '--config',
        'configs/finetune.py:classification',
        f'--config.init_from={source}',
        f'--config.task.train_file={tmp_path / "rows.csv"}',
        '--config.max_length=16',
        '--config.num_lengths=1',
        '--config.batch_size=8',
        '--config.epochs=2',
        '--workdir',
        tmp_path / 'tuned',
    )
    assert done.returncode == 0, done.stderr
    convert.convert(str(tmp_path / 'tuned'), str(tmp_path / 'out'), 'hf')
    pipe = transformers.pipeline('text-classification', str(tmp_path / 'out'), top_k=None)
    theirs = {row['label']: row['score'] for row in pipe('w1 w2 w9')[0]}
    done = call_module('predict', '--init_from', tmp_path / 'out', '--json', 'w1 w2 w9')
    ours = json.loads(done.stdout)['scores']
    assert ours.keys() == theirs.keys() == {'a', 'b'}
    np.testing.assert_allclose([ours[k] for k in 'ab'], [theirs[k] for k in 'ab'], atol=1e-5)


def test_a_tree_survives_its_own_names(hf):
    source = pretrained.load(str(hf))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(source.params))
    assert not source.params['embeddings']['token'][67:].any()
