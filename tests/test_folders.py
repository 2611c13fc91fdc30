"""Folders of other people: read as transformers reads them, or refused by name; never silently something else."""

import json
import shutil
import zipfile

import numpy as np
import peers
import pytest
import safetensors.torch
import tokenizers
import torch
import transformers

from bert_jax import checkpoint, convert, huggingface, paths, predict, pretrained, tf1
from bert_jax.cli import UserError
from bert_jax.data import tokenizer

PIECES = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', 'e', 'é', 'E', 'É', 'a', '##b', '中', '文', '##文', 'ab', '.', 'ç', 'c']
TEXTS = ['É 中文 E', 'e\u0301 Ç.', 'ab AB. 文中文', 'x \u4e2d']


def folder_of(path, in_json, in_config, kind='BertTokenizer'):
    path.mkdir()
    (path / 'vocab.txt').write_text('\n'.join(PIECES) + '\n')
    (path / 'config.json').write_text(json.dumps({'model_type': 'bert', 'vocab_size': len(PIECES)}))
    if in_json is not None:
        backend = tokenizers.Tokenizer(tokenizers.models.WordPiece({piece: i for i, piece in enumerate(PIECES)}, unk_token='[UNK]'))
        backend.normalizer = tokenizers.normalizers.BertNormalizer(**in_json)
        backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
        backend.save(str(path / 'tokenizer.json'))
    if in_config is not None:
        (path / 'tokenizer_config.json').write_text(json.dumps(in_config | {'tokenizer_class': kind}))
    return path


LOWER, CASED = ({'lowercase': lower, 'strip_accents': None, 'handle_chinese_chars': True} for lower in (True, False))


@pytest.mark.parametrize('in_json, in_config, kind', [
    (LOWER, {'do_lower_case': False}, 'BertTokenizer'), (CASED, {'do_lower_case': True}, 'BertTokenizerFast'), (CASED, {}, 'BertTokenizer'),
    (CASED, None, ''), (LOWER, {'do_lower_case': True, 'strip_accents': False}, 'BertTokenizer'),
    (LOWER | {'handle_chinese_chars': False}, {'do_lower_case': True}, 'BertTokenizer'),
    (LOWER, {'tokenize_chinese_chars': False}, 'BertTokenizer'), (LOWER, {'do_lower_case': False}, 'PreTrainedTokenizerFast'),
    (None, {'do_lower_case': False}, 'BertTokenizer')])
def test_options_are_those_that_transformers_takes(tmp_path, in_json, in_config, kind):
    folder = folder_of(tmp_path / 'f', in_json, in_config, kind)
    theirs = transformers.AutoTokenizer.from_pretrained(str(folder))
    ours = tokenizer.load(folder)
    for text in TEXTS:
        assert ours.encode(text) == theirs(text, add_special_tokens=False)['input_ids'], text


@pytest.mark.parametrize('name, content, words', [
    ('tokenizer_config.json', {'tokenizer_class': 'BertJapaneseTokenizer'}, 'is a BertJapaneseTokenizer, which is not BERT WordPiece'),
    ('config.json', {'model_type': 'bert', 'tokenizer_class': 'RoFormerTokenizer'}, 'is a RoFormerTokenizer'),
    ('added_tokens.json', {'<ent>': 18}, "'<ent>' added to the vocabulary"), ('added_tokens.json', {'ab': 14}, "'ab' added to the vocabulary"),
    ('special_tokens_map.json', {'cls_token': {'content': '<s>'}}, r"its cls_token is '<s>'; '\[CLS\]' is expected"),
    ('special_tokens_map.json', {'additional_special_tokens': ['<e1>']}, "'<e1>' added"),
    ('tokenizer_config.json', {'added_tokens_decoder': {'15': {'content': '.'}}}, r"'\.' added"),
    ('tokenizer_config.json', [1], 'a JSON object is expected')])
def test_tokenizers_that_are_something_else(tmp_path, name, content, words):
    folder = folder_of(tmp_path / 'f', None, None if name == 'config.json' else {})
    (folder / name).write_text(json.dumps(content))
    with pytest.raises(UserError, match=words):
        tokenizer.load(folder)
    (folder / 'vocab.txt').write_text('version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n')
    with pytest.raises(UserError, match=f'a Git LFS pointer|{words}'):
        tokenizer.load(folder)


def test_special_tokens_that_are_only_listed_once_more_are_fine(tmp_path):
    folder = folder_of(tmp_path / 'f', LOWER, {'do_lower_case': True, 'added_tokens_decoder': {'2': {'content': '[CLS]'}}, 'pad_token': '[PAD]'})
    (folder / 'added_tokens.json').write_text('{"[MASK]": 4}')
    (folder / 'special_tokens_map.json').write_text(json.dumps({'cls_token': '[CLS]', 'mask_token': {'content': '[MASK]'}}))
    assert tokenizer.load(folder).vocab_size == len(PIECES)


@pytest.fixture(scope='module')
def classifier(tmp_path_factory):
    return peers.save(peers.model('BertForSequenceClassification', num_labels=3), tmp_path_factory.mktemp('c') / 'hf')


def change(folder, **tensors):
    """The weights with these instead; None takes one away."""
    state = safetensors.torch.load_file(folder / 'model.safetensors')
    state |= tensors
    safetensors.torch.save_file({name: x for name, x in state.items() if x is not None}, folder / 'model.safetensors', {'format': 'pt'})


QUERY = 'bert.encoder.layer.0.attention.self.query.weight'


@pytest.mark.parametrize('tensors, words', [
    ({QUERY: torch.ones(48, 48, dtype=torch.int8)}, f'{QUERY} is I8; float32'), ({QUERY: torch.ones(48, 48).to(torch.float8_e4m3fn)}, 'F8_E4M3'),
    ({QUERY: torch.full((48, 48), float('nan'))}, f'{QUERY} holds numbers that are not finite'),
    ({'classifier.bias': torch.full((3,), float('inf'))}, 'not finite'),
    ({'bert.pooler.dense.weight': None, 'bert.pooler.dense.bias': None}, 'its head for classification reads the pooler, which is missing'),
    ({'bert.encoder.layer.5.output.dense.bias': torch.ones(48)}, r'the weights have 6 layers, config.json says 2 \(num_hidden_layers\)'),
    ({'lm_head.bias': torch.ones(67)}, 'lm_head.bias belongs to another model than BERT')])
def test_weights_that_are_something_else(classifier, tmp_path, tensors, words):
    folder = shutil.copytree(classifier, tmp_path / 'hf')
    change(folder, **tensors)
    with pytest.raises(UserError, match=words):
        huggingface.read(folder)


@pytest.mark.parametrize('changed, words', [
    ([], 'no JSON object'), ({'hidden_size': '48'}, "hidden_size is '48'"), ({'num_hidden_layers': 0}, 'num_hidden_layers is 0'),
    ({'vocab_size': -3}, 'vocab_size is -3'), ({'hidden_dropout_prob': 1.5}, 'hidden_dropout_prob is 1.5'), ({'intermediate_size': True}, 'is True'),
    ({'num_attention_heads': 5}, 'hidden_size 48 is not a multiple of num_attention_heads 5'), ({'hidden_act': 'silly'}, "'silly'; known: gelu"),
    ({'quantization_config': {'bits': 8}}, 'the weights are quantized'), ({'id2label': {'0': 'a', '1': 'b'}}, 'has 3 classes, id2label in config.json names 2'),
    ({'id2label': {'0': 'a', '1': 'b', '3': 'c'}}, r'names 3 \(0, 1, 3\)')])
def test_configs_that_are_something_else(classifier, tmp_path, changed, words):
    folder = shutil.copytree(classifier, tmp_path / 'hf')
    config = json.loads((folder / 'config.json').read_text())
    (folder / 'config.json').write_text(json.dumps(config | changed if isinstance(changed, dict) else changed))
    with pytest.raises(UserError, match=words):
        huggingface.read(folder)


def test_shards_that_do_not_fit_their_index(classifier, tmp_path):
    folder = shutil.copytree(classifier, tmp_path / 'hf')
    state = safetensors.torch.load_file(folder / 'model.safetensors')
    (folder / 'model.safetensors').unlink()
    names = sorted(state)
    halves = {'a.safetensors': names[:9], 'b.safetensors': names[9:]}

    def write(more=(), **moved):
        for file, mine in halves.items():
            safetensors.torch.save_file({name: state[name] for name in [*mine, *(more if file[0] == 'b' else ())]}, folder / file)
        home = {name: file for file, mine in halves.items() for name in mine} | moved
        (folder / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': home}))

    write()
    assert np.array_equal(huggingface.read(folder).params['targets_classification']['dense']['bias'], state['classifier.bias'])
    write(**{names[0]: 'b.safetensors'})
    with pytest.raises(UserError, match=f'says that {names[0]} is in b.safetensors; it is in a.safetensors'):
        huggingface.read(folder)
    write(**{'ghost': 'b.safetensors'})
    with pytest.raises(UserError, match='says that ghost is in b.safetensors; it is in no shard'):
        huggingface.read(folder)
    write(more=[names[0]])
    with pytest.raises(UserError, match=f'{names[0]} is in two shards, a.safetensors and b.safetensors'):
        huggingface.read(folder)
    for outside in ('../x.safetensors', '/etc/x.safetensors'):
        write(**{names[0]: outside})
        with pytest.raises(UserError, match='which is not a file of that folder'):
            huggingface.read(folder)
    (folder / 'model.safetensors.index.json').write_text('{"weight_map": []}')
    with pytest.raises(UserError, match='no weight_map'):
        huggingface.read(folder)


def test_a_pickle_packed_once_more_is_read_right(classifier, tmp_path):
    """Its tensors do not lie in it as they are: read through a memory map they were noise."""
    folder = shutil.copytree(classifier, tmp_path / 'hf')
    state = safetensors.torch.load_file(folder / 'model.safetensors')
    (folder / 'model.safetensors').unlink()
    torch.save(state, tmp_path / 'plain.bin')
    with zipfile.ZipFile(tmp_path / 'plain.bin') as plain, zipfile.ZipFile(folder / 'pytorch_model.bin', 'w', zipfile.ZIP_DEFLATED) as packed:
        for member in plain.infolist():
            packed.writestr(member.filename, plain.read(member))
    kernel = huggingface.read(folder).params['targets_classification']['dense']['kernel']
    assert np.array_equal(kernel, state['classifier.weight'].T)
    (folder / 'pytorch_model.bin').write_bytes(b'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n')
    with pytest.raises(UserError, match='a Git LFS pointer, not the file itself; `git lfs pull`'):
        huggingface.read(folder)


def test_one_segment_takes_no_pairs(tmp_path):
    peer = peers.model('BertForSequenceClassification', num_labels=2, type_vocab_size=1)
    model = predict.load(str(peers.save(peer, tmp_path / 'hf')))
    assert model('w1 w2')['label'] in ('LABEL_0', 'LABEL_1')
    with pytest.raises(UserError, match=r'knows one segment \(type_vocab_size 1\), so it takes single texts'):
        model(('w1', 'w2'))


def test_tf1_without_a_pooler_or_with_more_layers_or_nan(classifier, tmp_path):
    convert.convert(str(classifier), str(tmp_path / 'tf1'), 'tf1')
    model = pretrained.load(str(tmp_path / 'tf1'))
    config = json.loads((tmp_path / 'tf1/bert_config.json').read_text())
    (tmp_path / 'tf1/bert_config.json').write_text(json.dumps(config | {'num_hidden_layers': 1}))
    with pytest.raises(UserError, match='the checkpoint has 2 layers, bert_config.json says 1'):
        tf1.read(tmp_path / 'tf1')
    model.params['embeddings']['norm']['bias'][0] = np.nan
    (tmp_path / 'nan').mkdir()
    tf1.write(model, tmp_path / 'nan')
    with pytest.raises(UserError, match='LayerNorm/beta holds numbers that are not finite'):
        tf1.read(tmp_path / 'nan')
    del model.params['pooler']
    (tmp_path / 'no_pooler').mkdir()
    tf1.write(model, tmp_path / 'no_pooler')
    with pytest.raises(UserError, match='classification reads the pooler, which is missing'):
        tf1.read(tmp_path / 'no_pooler')


def test_a_workdirs_labels_and_best_score_are_those_of_its_head(classifier, tmp_path, capsys):
    convert.convert(str(classifier), str(tmp_path / 'w'), 'workdir')
    work = tmp_path / 'w'
    paths.write_json(work / 'labels.json', ['a', 'b'])
    with pytest.raises(UserError, match='labels.json: 2 names, but the head classification has 3 classes'):
        pretrained.load(str(work))
    paths.write_json(work / 'labels.json', ['a', 'b', 'c'])
    paths.write_json(work / 'best.json', {'score': 'dev/f1'})
    step = work / 'checkpoints' / '00000000'
    files = json.loads((step / 'manifest.json').read_text())['files']
    checkpoint._write_manifest(step, 0, {'dev/accuracy': 0.5}, files)
    with pytest.raises(UserError, match="no checkpoint has the score 'dev/f1'; they have dev/accuracy"):
        pretrained.load(str(work))
    paths.write_json(work / 'best.json', {'score': 'dev/accuracy'})
    assert pretrained.load(str(work)).about['scores'] == {'dev/accuracy': 0.5}
    (work / 'best.json').unlink()
    config = paths.read_json(work / 'config.json')
    paths.write_json(work / 'config.json', config | {'seeds': 1})  # as a fine-tuning leaves it
    capsys.readouterr()
    pretrained.load(str(work))
    assert 'no best.json, which says by what score a checkpoint is chosen' in capsys.readouterr().err


def test_the_length_of_fine_tuning_leaves_as_model_max_length(classifier, tmp_path):
    model = huggingface.read(classifier)
    model.about['config'] = {'max_length': 24}
    (tmp_path / 'out').mkdir()
    huggingface.write(model, tmp_path / 'out', 'x', 'mit')
    assert transformers.AutoTokenizer.from_pretrained(str(tmp_path / 'out')).model_max_length == 24
    assert pretrained.load(str(tmp_path / 'out')).about['config'] == {'max_length': 24}
