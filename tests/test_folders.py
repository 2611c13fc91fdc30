"""Other people's folders: read as transformers reads them, or refused by name."""

import json
import shutil
import zipfile

import jax
import ml_dtypes
import numpy as np
import peers
import pytest
import safetensors.numpy
import safetensors.torch
import tokenizers
import torch
import transformers
from conftest import call_module, expect_error
from test_convert import describe_tf1, original, spoil_config, tensors

from bert_jax import checkpoint, convert, export, features, paths, predict
from bert_jax.cli import UserError
from bert_jax.data import tokenizer
from bert_jax.formats import huggingface, pretrained, tf_bundle
from bert_jax.tasks import texts

POINTER = f'version https://git-lfs.github.com/spec/v1\noid sha256:{"4d7a" * 16}\nsize 12345\n'
CASED = [
    *peers.SPECIALS,
    'Go',
    'go',
    'É',
    'é',
    'E',
    'e',
    'Café',
    'café',
    'Cafe',
    'cafe',
    '中',
    '##国',
    '中国',
    '<s>',
    '[new]',
    '##s',
    ',',
]
TEXTS = ['Go', 'go, Café', 'CAFÉ cafés', 'É é e E', '中国 go', '中国',
         'Go\u0301 e\u0301', 'Gos [new] <s> go', '', '[new]']


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    """Folders of several architectures, made once."""
    made = {}

    def make(architecture='BertForPreTraining', **kwargs):
        key = (architecture, *sorted((name, str(value)) for name, value in kwargs.items()))
        if key not in made:
            made[key] = peers.save(peers.model(architecture, **kwargs), tmp_path_factory.mktemp('saved') / 'hf')
        return made[key]
    return make


@pytest.fixture
def folder(saved, tmp_path):
    """architecture -> a copy of its folder to spoil."""
    return lambda *args, **kwargs: shutil.copytree(saved(*args, **kwargs), tmp_path / 'hf', dirs_exist_ok=True)


def write(folder, **files):
    """JSON files by their names without .json."""
    for name, content in files.items():
        (folder / f'{name}.json').write_text(json.dumps(content))
    return folder


def tf1_folder(folder, variables, **config):
    folder.mkdir()
    tf_bundle.write(str(folder / 'bert_model.ckpt'), {name: lambda x=x: x for name, x in variables.items()})
    return describe_tf1(folder, **config)


def refused(folder, *words, load=pretrained.load):
    with pytest.raises(UserError) as error:
        load(folder)
    assert '\n' not in str(error.value).strip()
    for word in words:
        assert word in str(error.value), error.value


# Tokenizers. The witness is AutoTokenizer.


def library(pieces=CASED, added=(), post_processor=None, **options):
    backend = tokenizers.Tokenizer(tokenizers.models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token='[UNK]'))
    backend.normalizer = tokenizers.normalizers.BertNormalizer(**options)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    backend.add_special_tokens(peers.SPECIALS)
    backend.add_tokens(list(added))
    backend.post_processor = post_processor
    return json.loads(backend.to_str())


def tokenizer_folder(folder, vocab=True, **files):
    folder.mkdir(exist_ok=True)
    if vocab:
        (folder / 'vocab.txt').write_text('\n'.join(CASED) + '\n')
    return write(folder, **{'config': {'model_type': 'bert'}} | files)


CASED_JSON, LOWER_JSON = library(lowercase=False), library(lowercase=True)


@pytest.mark.parametrize(
    'files',
    [
        {},
        {'tokenizer_config': {'do_lower_case': False}},
        {'tokenizer_config': {'do_lower_case': True, 'strip_accents': False}},
        {'tokenizer_config': {'do_lower_case': False, 'tokenize_chinese_chars': False}},
        {'tokenizer': CASED_JSON},
        {'tokenizer': CASED_JSON, 'tokenizer_config': {'do_lower_case': True}},
        {'tokenizer': LOWER_JSON, 'tokenizer_config': {'do_lower_case': False}},
        {'tokenizer': LOWER_JSON, 'tokenizer_config': {'tokenizer_class': 'BertTokenizerFast', 'do_lower_case': False}},
        {
            'tokenizer': LOWER_JSON,
            'tokenizer_config': {'tokenizer_class': 'PreTrainedTokenizerFast', 'do_lower_case': False},
        },
        {'tokenizer': CASED_JSON, 'config': {'model_type': 'bert', 'tokenizer_class': 'PreTrainedTokenizerFast'}},
        {'tokenizer': library(lowercase=False, strip_accents=True), 'tokenizer_config': {'do_lower_case': False}},
        {
            'tokenizer': library(lowercase=True, strip_accents=False),
            'tokenizer_config': {'do_lower_case': True, 'strip_accents': None},
        },
        {
            'tokenizer': library(lowercase=False, handle_chinese_chars=False),
            'tokenizer_config': {'do_lower_case': False},
        },
        {'tokenizer_config': {'do_lower_case': False, 'tokenizer_class': 'ElectraTokenizer'}},
        {'tokenizer_config': {'cls_token': 'Go'}, 'special_tokens_map': {'cls_token': '[CLS]'}},
        {
            'special_tokens_map': {
                'mask_token': {
                    'content': '[MASK]',
                    'lstrip': True,
                    'rstrip': False,
                    'normalized': False,
                    'single_word': False,
                }
            }
        },
        {'added_tokens': {'[MASK]': 4}},
    ],
    ids=str,
)
def test_ids_are_those_of_transformers(tmp_path, files):
    folder = tokenizer_folder(tmp_path / 'folder', **files)
    ours, theirs = tokenizer.load(folder), transformers.AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        assert ours.encode(text) == theirs(text, add_special_tokens=False)['input_ids'], text
    if theirs.cls_token_id is not None:
        assert [ours.cls_id, ours.sep_id, ours.pad_id, ours.mask_id] == [
            theirs.cls_token_id, theirs.sep_token_id, theirs.pad_token_id, theirs.mask_token_id]


def test_a_vocabulary_is_the_one_that_transformers_takes(tmp_path, sentencepiece_vocab):
    """tokenizer.json before vocab.txt, and both before a .model that lies beside them."""
    folder = tokenizer_folder(tmp_path / 'folder', tokenizer=library([*peers.SPECIALS, 'other', 'go'], lowercase=True))
    shutil.copy(sentencepiece_vocab / 'tokenizer.model', folder / 'spiece.model')
    for _ in range(2):
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        assert tokenizer.load(folder).encode('go other') == theirs('go other', add_special_tokens=False)['input_ids']
        (folder / 'tokenizer.json').unlink(missing_ok=True)


def test_what_transformers_takes_from_elsewhere_is_said(tmp_path, capsys):
    tokenizer.load(tokenizer_folder(tmp_path / 'a', tokenizer=CASED_JSON))
    said = capsys.readouterr().err
    assert 'capitals' in said and 'do_lower_case is False there; True is taken' in said
    tokenizer.load(tokenizer_folder(tmp_path / 'b', tokenizer=CASED_JSON, tokenizer_config={'do_lower_case': False}))
    assert not capsys.readouterr().err
    ours = tokenizer.load(tokenizer_folder(tmp_path / 'c', config={'model': {}}))  # no folder of transformers
    assert ours.encode('Go') == [CASED.index('Go')] and not capsys.readouterr().err


def frame(*single):
    return tokenizers.processors.TemplateProcessing(
        single=' '.join(single), pair='[CLS] $A [SEP] [SEP] $B [SEP]', special_tokens=[('[CLS]', 2), ('[SEP]', 3)])


FAST = {'tokenizer_class': 'PreTrainedTokenizerFast'}


@pytest.mark.parametrize(
    'files, words',
    [
        (
            {'tokenizer_config': {'tokenizer_class': 'BertJapaneseTokenizer'}},
            ('BertJapaneseTokenizer', 'BertTokenizer'),
        ),
        (
            {'tokenizer_config': {'tokenizer_class': 'RoFormerTokenizerFast'}, 'tokenizer': LOWER_JSON},
            ('RoFormerTokenizer',),
        ),
        ({'config': {'model_type': 'bert', 'tokenizer_class': 'BertweetTokenizer'}}, ('BertweetTokenizer',)),
        ({'tokenizer_config': {'cls_token': 'Go'}}, ('cls_token', "'Go'", "'[CLS]'")),
        ({'special_tokens_map': {'sep_token': {'content': '<s>'}}}, ('sep_token', "'<s>'")),
        (
            {
                'tokenizer_config': {'added_tokens_decoder': {}, 'mask_token': 'Go'},
                'special_tokens_map': {'mask_token': '[MASK]'},
            },
            ('mask_token', "'Go'"),
        ),
        ({'added_tokens': {'<entity>': 22}}, ("'<entity>'", 'added_tokens.json')),
        ({'added_tokens': {'[new]': 19}}, ("'[new]'",)),
        ({'tokenizer_config': {'added_tokens_decoder': {'19': {'content': '[new]'}}}}, ("'[new]'",)),
        ({'tokenizer_config': {'extra_special_tokens': ['[new]']}}, ("'[new]'",)),
        ({'tokenizer_config': {'extra_special_tokens': {'image_token': '[new]'}}}, ("'[new]'",)),
        ({'special_tokens_map': {'additional_special_tokens': ['[new]']}}, ("'[new]'",)),
        ({'tokenizer_config': {'bos_token': '<s>'}}, ("'<s>'",)),
        ({'tokenizer': library(lowercase=True, added=['[new]'])}, ("'[new]'",)),
        ({'tokenizer': library(lowercase=True, added=['<s>'])}, ("'<s>'",)),
        (
            {
                'tokenizer': library(lowercase=True, post_processor=frame('[CLS]', '$A', '[SEP]')),
                'tokenizer_config': FAST,
            },
            ('[CLS] a', 'BERT has'),
        ),
        ({'tokenizer_config': {'do_lower_case': 'false'}}, ('do_lower_case', "'false'")),
        ({'tokenizer_config': ['do_lower_case']}, ('tokenizer_config.json', 'list')),
        ({'added_tokens': 3}, ('added_tokens.json', 'int')),
    ],
    ids=str,
)
def test_tokenizers_that_are_not_read(tmp_path, files, words):
    refused(tokenizer_folder(tmp_path / 'folder', **files), *words, load=tokenizer.load)


def test_a_sentencepiece_model_that_is_not_the_tokenizer_json(tmp_path, sentencepiece_vocab):
    huggingface.write_tokenizer(tokenizer.load(sentencepiece_vocab), tmp_path, 64)
    assert tokenizer.load(tmp_path).vocab_size == 1003
    content = json.loads((tmp_path / 'tokenizer.json').read_text())
    content['model']['vocab'][7], content['model']['vocab'][8] = (
        content['model']['vocab'][8],
        content['model']['vocab'][7],
    )
    write(tmp_path, tokenizer=content)
    refused(tmp_path, 'tokenizer.json', 'tokenizer.model', load=tokenizer.load)
    write(tmp_path, tokenizer_config={'tokenizer_class': 'AlbertTokenizer'})
    refused(tmp_path, 'AlbertTokenizer', load=tokenizer.load)


# Weights. The witness is from_pretrained.


def change(folder, change):
    state = tensors(folder)
    change(state)
    safetensors.numpy.save_file(state, folder / 'model.safetensors')
    return folder


POOLER = 'bert.pooler.dense.weight'


@pytest.mark.parametrize('dtype', [np.int8, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, np.int32, np.bool_])
def test_weights_that_are_no_floats(folder, dtype):
    if np.dtype(dtype).name.startswith('float8'):
        source = folder()
        state = {name: torch.tensor(array) for name, array in tensors(source).items()}
        state[POOLER] = state[POOLER].to(getattr(torch, np.dtype(dtype).name))
        safetensors.torch.save_file(state, source / 'model.safetensors')
    else:
        source = change(folder(), lambda state: state.update({POOLER: state[POOLER].astype(dtype)}))
    refused(source, POOLER, 'quantized')


def test_a_quantization_config_is_refused(folder):
    source = folder()
    spoil_config(quantization_config={'quant_method': 'bitsandbytes', 'load_in_8bit': True})(source)
    refused(source, 'quantization_config', 'bitsandbytes')


@pytest.mark.parametrize(
    'dtype, words',
    [
        (torch.float16, 'float16 there; converted to float32.'),
        (torch.bfloat16, 'bfloat16'),
        (torch.float64, 'float64 there; converted to float32, which keeps fewer digits'),
    ],
)
@pytest.mark.parametrize('form', ['safetensors', 'bin'])
def test_other_floats_are_converted_and_named(saved, tmp_path, capsys, dtype, words, form):
    peer = peers.model().to(dtype)
    source = peers.save(peer, tmp_path / 'hf')
    if form == 'bin':
        torch.save(peer.state_dict(), source / 'pytorch_model.bin')
        (source / 'model.safetensors').unlink()
    model = pretrained.load(source)
    assert words in capsys.readouterr().err
    np.testing.assert_array_equal(model.params['pooler']['dense']['bias'], peer.bert.pooler.dense.bias.detach().float())


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite(folder, tmp_path, value):
    source = change(folder(), lambda state: state[POOLER].__setitem__((3, 5), value))
    refused(source, POOLER, 'not finite')
    change(source, lambda state: state.update({POOLER: np.full((48, 48), 1e39)}))
    refused(source, POOLER, 'not finite')
    variables = original()
    variables['bert/pooler/dense/bias'][3] = value
    refused(tf1_folder(tmp_path / 'tf1', variables), 'bert/pooler/dense/bias', 'not finite')


def as_bin(source, state=None):
    state = {name: torch.tensor(array) for name, array in tensors(source).items()} if state is None else state
    (source / 'model.safetensors').unlink(missing_ok=True)
    torch.save(state, source / 'pytorch_model.bin')
    return source / 'pytorch_model.bin'


def rezip(file, method, edit=lambda name, content: content):
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, 'w', method) as archive:
        for name, content in members.items():
            archive.writestr(name, edit(name, content))


def swap(name, content):
    if name.endswith('byteorder'):
        return b'big'
    return np.frombuffer(content, '<f4').astype('>f4').tobytes() if '/data/' in name else content


@pytest.mark.parametrize(
    'spoil',
    [
        lambda file, state: rezip(file, zipfile.ZIP_DEFLATED),
        lambda file, state: rezip(file, zipfile.ZIP_STORED),
        lambda file, state: rezip(file, zipfile.ZIP_STORED, swap),
        lambda file, state: torch.save(state, file, _use_new_zipfile_serialization=False),
        lambda file, state: torch.save({name: torch.nn.Parameter(x) for name, x in state.items()} | {'epoch': 3}, file),
        lambda file, state: torch.save(
            {name: x.mT.contiguous().mT if x.ndim == 2 else x for name, x in state.items()}, file
        ),
    ],
    ids=['compressed', 'stored', 'big_endian', 'legacy', 'parameters', 'strided'],
)
def test_odd_files_of_pytorch_are_read_right(folder, spoil):
    source = folder()
    expected = pretrained.load(source).params
    state = {name: torch.tensor(array) for name, array in tensors(source).items()}
    spoil(as_bin(source), state)
    jax.tree.map(np.testing.assert_array_equal, pretrained.load(source).params, expected)


@pytest.mark.parametrize(
    'spoil, words',
    [
        (lambda file, state: rezip(file, zipfile.ZIP_LZMA), ('damaged',)),
        (lambda file, state: file.write_text('<html>404: not found</html>'), ('not a file of PyTorch',)),
        (lambda file, state: file.write_bytes(b''), ('not a file of PyTorch',)),
        (lambda file, state: file.write_text(POINTER), ('Git LFS pointer', 'git lfs pull')),
        (lambda file, state: torch.save([1, 2], file), ('a list',)),
        (lambda file, state: torch.save({'model': state, 'epoch': 3}, file), ("'model', 'epoch'",)),
        (lambda file, state: torch.save(state | {POOLER: torch.ones(48, 48).to_sparse()}, file), (POOLER, 'sparse')),
        (lambda file, state: torch.save(state | {POOLER: torch.ones(48, 48, device='meta')}, file), (POOLER, 'meta')),
        (
            lambda file, state: torch.save(state | {POOLER: torch.ones(48, 48).to(torch.float8_e4m3fn)}, file),
            (POOLER, 'float8'),
        ),
        (
            lambda file, state: torch.save(state | {POOLER: torch.ones(48, 48, dtype=torch.complex64)}, file),
            (POOLER, 'complex64'),
        ),
        (lambda file, state: np.savez(file.open('wb'), **{'a': np.ones(3)}), ('damaged',)),
        (lambda file, state: (file.unlink(), file.mkdir()), ('cannot be read',)),
    ],
    ids=['lzma', 'html', 'empty', 'pointer', 'list', 'nested', 'sparse', 'meta', 'float8', 'complex', 'npz', 'folder'],
)
def test_odd_files_of_pytorch_are_refused(folder, spoil, words):
    source = folder()
    state = {name: torch.tensor(array) for name, array in tensors(source).items()}
    spoil(as_bin(source), state)
    refused(source, 'pytorch_model.bin' if 'pooler' not in words[0] else '', *words)


@pytest.mark.parametrize(
    'name', ['model.safetensors', 'vocab.txt', 'config.json', 'tokenizer.json', 'tokenizer_config.json']
)
def test_a_git_lfs_pointer_says_so(folder, name):
    source = folder()
    (source / name).write_text(POINTER)
    refused(source, name, 'Git LFS pointer', 'git lfs pull')


@pytest.mark.parametrize(
    'name', ['bert_model.ckpt.index', 'bert_model.ckpt.data-00000-of-00001', 'vocab.txt', 'bert_config.json']
)
def test_a_git_lfs_pointer_in_a_tf1_folder_says_so(tmp_path, name):
    source = tf1_folder(tmp_path / 'tf1', original())
    (source / name).write_text(POINTER)
    refused(source, name, 'Git LFS pointer', 'git lfs pull')


@pytest.mark.parametrize('architecture, head', [
    ('BertForSequenceClassification', 'classification'), ('BertForNextSentencePrediction', 'nsp'),
    ('BertForMultipleChoice', 'multiple_choice'), ('BertForPreTraining', 'mlm, nsp')])
def test_a_head_without_its_pooler(folder, architecture, head):
    """transformers draws a random one, with a warning."""
    source = folder(architecture)
    change(source, lambda state: [state.pop(name) for name in list(state) if 'pooler' in name])
    refused(source, 'bert.pooler is missing', head)


def test_half_of_a_pooler_or_head(folder):
    source = change(folder('BertModel'), lambda state: state.pop('pooler.dense.weight'))
    refused(source, 'bert.pooler.dense.weight is missing')
    refused(
        change(folder(), lambda state: state.pop('cls.seq_relationship.bias')), 'cls.seq_relationship.bias is missing'
    )


@pytest.mark.parametrize('head', ['output_weights', 'cls/seq_relationship/output_weights'])
def test_a_head_of_tf1_without_its_pooler(tmp_path, head):
    variables = {name: value for name, value in original().items() if name.startswith('bert/') and 'pooler' not in name}
    variables |= {head: np.ones((2, 48), np.float32), head.replace('weights', 'bias'): np.ones(2, np.float32)}
    refused(tf1_folder(tmp_path / 'tf1', variables), 'bert/pooler is missing')


def test_heads_that_need_no_pooler_have_none(folder):
    for architecture in ('BertForMaskedLM', 'BertForTokenClassification', 'BertForQuestionAnswering'):
        assert 'pooler' not in pretrained.load(folder(architecture)).params


def test_a_head_that_is_not_there_is_said(folder, capsys):
    source = folder('BertModel')
    spoil_config(architectures=['BertForMaskedLM'])(source)
    assert not pretrained.load(source).config.targets
    assert 'BertForMaskedLM' in capsys.readouterr().err


@pytest.mark.parametrize(
    'change_layers, words',
    [
        (-1, ('bert.encoder.layer.1.', '1 layers')),
        (1, ('bert.encoder.layer.2.attention.self.query.weight is missing',)),
        (10**9, ('bert.encoder.layer.2.attention.self.query.weight is missing',)),
    ],
)
def test_other_numbers_of_layers(folder, tmp_path, change_layers, words):
    source = folder()
    spoil_config(num_hidden_layers=2 + change_layers)(source)
    refused(source, *words)
    source = tf1_folder(tmp_path / 'tf1', original(), num_hidden_layers=2 + change_layers)
    refused(source, *(word.replace('bert.encoder.layer.', 'bert/encoder/layer_').split('.')[0] for word in words))


@pytest.mark.parametrize(
    'name',
    [
        'bert.encoder.layer.0.attention.self.distance_embedding.weight',
        'bert.embeddings.task_type_embeddings.weight',
        'bert.encoder.relative_attention_bias.weight',
    ],
)
def test_tensors_inside_the_encoder_that_bert_has_not(folder, name):
    refused(change(folder(), lambda state: state.update({name: np.ones((3, 3), np.float32)})), name)


def test_one_tensor_under_two_names(folder):
    twice = 'bert.embeddings.LayerNorm.gamma'
    refused(change(folder(), lambda state: state.update({twice: np.ones(48, np.float32)})), twice, 'LayerNorm.weight')


@pytest.fixture
def shards(tmp_path):
    """A folder of several shards, and its index."""
    folder = peers.save(peers.model(), tmp_path / 'shards', max_shard_size='60KB')
    return folder, json.loads((folder / 'model.safetensors.index.json').read_text())


def reindexed(shards, change):
    folder, index = shards
    change(index['weight_map'])
    write(folder, **{'model.safetensors.index': index})
    return folder


def other_shard(weight_map):
    return next(shard for shard in weight_map.values() if shard != weight_map[POOLER])


def test_a_tensor_in_another_shard_than_the_index_says(shards):
    right = shards[1]['weight_map'][POOLER]
    refused(
        reindexed(shards, lambda index: index.update({POOLER: other_shard(index)})), f'{POOLER}, which is in {right}'
    )


def test_a_tensor_in_two_shards(shards):
    folder, index = shards
    file = folder / other_shard(index['weight_map'])
    safetensors.numpy.save_file(safetensors.numpy.load_file(file) | {POOLER: np.ones((48, 48), np.float32)}, file)
    refused(folder, POOLER, 'two shards')


def test_a_tensor_that_no_shard_has(shards):
    refused(
        reindexed(shards, lambda index: index.update({'bert.nobody': index[POOLER]})), 'bert.nobody, which is in none'
    )


def test_a_tensor_that_the_index_does_not_name_is_read_as_transformers_does(shards):
    reindexed(shards, lambda index: index.pop(POOLER))
    theirs = transformers.AutoModelForPreTraining.from_pretrained(shards[0]).bert.pooler.dense.weight.detach().numpy()
    np.testing.assert_array_equal(pretrained.load(shards[0]).params['pooler']['dense']['kernel'], theirs.T)


@pytest.mark.parametrize(
    'path', ['../../x.safetensors', '/etc/passwd', '..', '', 'sub/x.bin', 'x.h5', 'a\0.bin', 5, None]
)
def test_an_index_names_files_of_its_folder(shards, path):
    refused(
        reindexed(shards, lambda index: index.update({POOLER: path})),
        'model.safetensors.index.json',
        'not the name of a file',
    )


@pytest.mark.parametrize('index', [[], {}, {'weight_map': []}, {'weight_map': {}}, 'x'])
def test_an_index_that_is_none(shards, index):
    refused(write(shards[0], **{'model.safetensors.index': index}), 'weight_map')


# What a folder is.


@pytest.fixture
def unnamed_roberta(tmp_path):
    """RobertaModel's tensors have BertModel's names; one segment, and positions from pad_token_id + 1."""
    config = transformers.RobertaConfig(
        vocab_size=67,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=80,
        type_vocab_size=1,
        max_position_embeddings=42,
        layer_norm_eps=1e-12,
    )
    transformers.RobertaModel(config).save_pretrained(tmp_path / 'roberta')
    pieces = ['<s>', '<pad>', '</s>', '<unk>', *(f'w{i}' for i in range(62)), '<mask>']
    (tmp_path / 'roberta' / 'vocab.txt').write_text('\n'.join(pieces) + '\n')
    return tmp_path / 'roberta'


def without(folder, *keys):
    config = json.loads((folder / 'config.json').read_text())
    return write(folder, config={key: value for key, value in config.items() if key not in keys})


def test_a_roberta_without_its_names(unnamed_roberta):
    refused(unnamed_roberta, 'RobertaModel')
    names = {f'{role}_token': f'<{role}>' for role in ('pad', 'unk', 'mask')} | {
        'cls_token': '<s>',
        'sep_token': '</s>',
    }
    write(unnamed_roberta, tokenizer_config=names)
    refused(
        without(unnamed_roberta, 'architectures', 'model_type'),
        'no architecture',
        'begin with <s>',
        'position 1 is empty',
    )
    peer_vocab = '\n'.join([*peers.SPECIALS, *(f'w{i}' for i in range(62))])
    (unnamed_roberta / 'vocab.txt').write_text(peer_vocab)
    write(unnamed_roberta, tokenizer_config={})
    refused(unnamed_roberta, 'no architecture', 'pad_token_id is 1', 'RoBERTa')
    refused(without(unnamed_roberta, 'pad_token_id'), 'no architecture', 'position 1 is empty')


def test_a_bert_without_its_names_is_one(folder):
    source = without(folder(), 'architectures', 'model_type', 'pad_token_id')
    assert set(pretrained.load(source).config.targets) == {'mlm', 'nsp'}


@pytest.mark.parametrize('start', ['roberta', 'distilbert', 'module.bert', 'electra'])
def test_tensors_of_another_model_are_named(folder, start):
    source = change(
        folder('BertModel'), lambda state: [state.update({f'{start}.{name}': state.pop(name)}) for name in list(state)]
    )
    refused(source, 'bert.embeddings.word_embeddings.weight is missing', start.split('.')[0])


@pytest.mark.parametrize('changes, words', [
    ({'id2label': {'0': 'a', '1': 'b'}}, ('id2label has 0, 1', '3 classes')),
    ({'id2label': {str(i): str(i) for i in range(4)}}, ('0, 1, 2, 3', '3 classes')),
    ({'id2label': {'1': 'a', '2': 'b', '3': 'c'}}, ('1, 2, 3', '3 classes')),
    ({'id2label': ['a', 'b', 'c']}, ('id2label', '3 classes')),
    ({'id2label': {'0': 'a', '1': 'b', '2': 'a'}}, ("'a' names two",)),
    ({'label2id': {'a': 1, 'b': 0, 'c': 2}}, ("label2id gives 'a' the id 1",)),
    ({'problem_type': 'ranking'}, ("'ranking'", 'single_label_classification')),
    ({'problem_type': ['x']}, ('problem_type',)),
    ({'classifier_dropout': 'none'}, ('classifier_dropout', "'none'")),
])
def test_labels_that_are_not_those_of_the_head(folder, changes, words):
    source = folder('BertForSequenceClassification', num_labels=3, id2label={0: 'a', 1: 'b', 2: 'c'})
    spoil_config(**changes)(source)
    refused(source, *words)


@pytest.mark.parametrize('changes', [{'label2id': {'LABEL_0': 0, 'LABEL_1': 1, 'LABEL_2': 2}}, {'label2id': None},
                                     {'label2id': {'a': 0, 'b': 1, 'c': 2}}])
def test_labels_that_agree(folder, changes):
    source = folder('BertForSequenceClassification', num_labels=3, id2label={0: 'a', 1: 'b', 2: 'c'})
    spoil_config(**changes)(source)
    assert pretrained.load(source).labels == ('a', 'b', 'c')


@pytest.mark.parametrize(
    'content, words',
    [
        ('{', ('config.json', 'JSON')),
        ('[]', ('config.json', 'list')),
        ('3', ('config.json', 'int')),
        ('[' * 100000, ('config.json',)),
        ({'hidden_size': '48'}, ('hidden_size', "'48'")),
        ({'hidden_size': 0}, ('hidden_size', '0')),
        ({'num_hidden_layers': -1}, ('num_hidden_layers', '-1')),
        ({'num_hidden_layers': True}, ('num_hidden_layers', 'True')),
        ({'intermediate_size': 80.5}, ('intermediate_size', '80.5')),
        ({'type_vocab_size': None}, ('type_vocab_size', 'None')),
        ({'num_attention_heads': 7}, ('48', 'num_attention_heads 7')),
        ({'hidden_act': 'swish'}, ("'swish'", 'gelu_new')),
        ({'hidden_act': ['gelu']}, ('hidden_act',)),
        ({'hidden_dropout_prob': 1.5}, ('hidden_dropout_prob', '1.5')),
        ({'attention_probs_dropout_prob': '0.1'}, ('attention_probs_dropout_prob',)),
        ({'hidden_size': 10**12}, ('hidden_size',)),
        ({'hidden_size': 4 * 10**8}, ('bert.embeddings.word_embeddings.weight', '(67, 400000000)')),
        ({'architectures': 'BertModel'}, ('architectures', 'list')),
        ({'architectures': [{}]}, ('not supported',)),
    ],
    ids=str,
)
def test_a_config_that_is_none(folder, content, words):
    source = folder()
    if isinstance(content, str):
        (source / 'config.json').write_text(content)
    else:
        spoil_config(**content)(source)
    refused(source, *words)


@pytest.mark.parametrize(
    'changes, words',
    [
        ({'hidden_size': '48'}, ("'48'",)),
        ({'num_attention_heads': 7}, ('num_attention_heads 7',)),
        ({'hidden_act': 'gelu_new'}, ("'gelu_new'", 'relu')),
    ],
)
def test_a_config_of_tf1_that_is_none(tmp_path, changes, words):
    refused(tf1_folder(tmp_path / 'tf1', original(), **changes), 'bert_config.json', *words)


def test_variables_of_tf1_that_are_no_floats(tmp_path, monkeypatch):
    source = tf1_folder(tmp_path / 'tf1', original())
    monkeypatch.setitem(tf_bundle.DTYPES, 1, np.int32)
    refused(source, 'bert/embeddings/word_embeddings', 'int32')


# One segment.


def test_pairs_need_two_segments(folder):
    """transformers ends in an index error."""
    peer = peers.model('BertForSequenceClassification', type_vocab_size=1)
    with pytest.raises(IndexError):
        peer(torch.tensor([[2, 5, 3, 6, 3]]), token_type_ids=torch.tensor([[0, 0, 0, 1, 1]]))
    source = str(folder('BertForSequenceClassification', type_vocab_size=1))
    model = predict.load(source)
    assert set(model('w1 w2')['scores']) == {'LABEL_0', 'LABEL_1'}
    with pytest.raises(UserError, match='one segment'):
        model(('w1', 'w2'))
    with pytest.raises(UserError, match='one segment'):
        predict.load(str(folder('BertForPreTraining', type_vocab_size=1)))(('w1', '[MASK]'))
    rows = folder('BertModel', type_vocab_size=1).parent / 'rows.csv'
    rows.write_text('text,text_pair,label\n' + ''.join(f'w1,w{i},{"ab"[i % 2]}\n' for i in range(5, 65)))
    expect_error(
        call_module(
            'finetune',
            '--config',
            'configs/finetune.py:classification',
            f'--config.init_from={source}',
            '--config.max_length=16',
            f'--config.task.train_file={rows}',
            f'--config.task.dev_file={rows}',
            '--config.task.text_pair_column=text_pair',
            '--workdir',
            rows.parent / 'work',
        ),
        'one segment',
    )
    with pytest.raises(UserError, match='one segment'):
        features.Extractor(source, ['-1'], 'mean', 0)([texts.Row('w1', 'w2', None, '')], 1)
    assert not (rows.parent / 'work').exists()


def test_pretraining_on_pairs_needs_two_segments(store_path, tmp_path):
    expect_error(
        call_module(
            'pretrain',
            '--config',
            'configs/pretrain.py:tiny',
            f'--config.store={store_path}',
            '--config.model.embeddings.num_segments=1',
            '--workdir',
            tmp_path / 'work',
        ),
        'num_segments is 1',
    )


# Workdirs.


@pytest.fixture
def tuned(folder, tmp_path):
    """What fine-tuning leaves: two checkpoints with scores, the first one the better; small, and not trained."""
    source = pretrained.load(folder('BertForSequenceClassification', num_labels=3, id2label={0: 'a', 1: 'b', 2: 'c'}))
    source.about |= {'config': {'task': {'name': 'classification'}, 'max_length': 16}}
    work = tmp_path / 'work'
    params = source.params
    pretrained.write_workdir(source, work)
    shutil.move(work / 'checkpoints' / '00000000', work / 'checkpoints' / '00000007')
    checkpoint.write_params(work / 'checkpoints', params, {'dev/f1': 0.9, 'dev/loss': 1.0})
    step = work / 'checkpoints' / '00000007'
    checkpoint._write_manifest(step, 7, {'dev/f1': 0.5, 'dev/loss': 0.5}, checkpoint._hashes(step))
    paths.write_json(work / 'best.json', {'score': 'dev/f1'})
    return work


def test_the_best_checkpoint_by_the_score_that_is_named(tuned, capsys):
    assert pretrained.load(tuned).about['step'] == 0 and not capsys.readouterr().err
    (tuned / 'best.json').unlink()
    assert pretrained.load(tuned).about['step'] == 7
    assert 'best.json is missing' in capsys.readouterr().err
    write(tuned, best={'score': 'dev/accuracy'})
    refused(tuned, 'best.json', "'dev/accuracy'", 'dev/f1, dev/loss')
    write(tuned, best={})
    refused(tuned, 'best.json', 'score')


def test_a_converted_workdir_has_one_checkpoint_and_needs_no_note(tuned, capsys):
    (tuned / 'best.json').unlink()
    shutil.rmtree(tuned / 'checkpoints' / '00000007')
    assert pretrained.load(tuned).about['step'] == 0 and not capsys.readouterr().err


@pytest.mark.parametrize(
    'labels, words',
    [
        (['a', 'b'], ('2 labels', '3 classes')),
        (['a', 'b', 'c', 'd'], ('4 labels', '3 classes')),
        (['a', 'b', 'b'], ("'b'",)),
        ({'0': 'a'}, ('list',)),
        ([1, 2, 3], ('list',)),
        ([], ('0 labels',)),
    ],
)
def test_labels_of_a_workdir_that_are_not_those_of_the_head(tuned, labels, words):
    refused(write(tuned, labels=labels), 'labels.json', *words)


def test_a_sweep_that_names_no_run(tmp_path):
    refused(write(tmp_path, sweep={}), 'sweep.json', 'chosen')


# What leaves.


def test_the_max_length_of_fine_tuning_travels(tuned, tmp_path):
    for form, name in (('hf', 'out'), ('workdir', 'again')):
        convert.convert(str(tuned if form == 'hf' else tmp_path / 'out'), str(tmp_path / name), form)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / 'out')
    assert theirs.model_max_length == 16
    assert len(theirs('w1 ' * 30, truncation=True)['input_ids']) == 16
    ours = predict.load(str(tmp_path / 'out'))
    long, cut = ours('w1 ' * 30)['scores'], ours('w1 ' * 14)['scores']
    assert long == cut and ours.truncated == 1
    assert pretrained.load(tmp_path / 'again').about['config']['max_length'] == 16


@pytest.mark.parametrize('length', [40, 512, int(1e30), None, 'x', 2])
def test_a_model_max_length_beyond_the_positions_says_nothing(folder, length):
    source = write(folder(), tokenizer_config={'do_lower_case': True, 'model_max_length': length})
    assert 'config' not in pretrained.load(source).about


def test_exported_programs_read_no_more_than_predict(tuned, tmp_path, capsys):
    export.export(str(tuned), [8, 32], str(tmp_path / 'out'))
    assert 'max_length 16' in capsys.readouterr().err
    about = json.loads((tmp_path / 'out' / 'export.json').read_text())
    assert about['lengths'] == [8, 16] and about['segments'] == 2
    assert json.loads((tmp_path / 'out' / 'tokenizer_config.json').read_text())['model_max_length'] == 16


def test_notes_reach_every_command(folder, capfd):
    source = change(
        folder('BertForSequenceClassification'), lambda state: state.update({'crf.x': np.ones(3, np.float32)})
    )
    done = call_module('predict', '--init_from', source, '--json', 'w1')
    assert 'crf.x' in done.stderr and json.loads(done.stdout)['text'] == 'w1'
