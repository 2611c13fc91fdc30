"""Hugging Face folders: config.json, model.safetensors, tokenizer files, a model card."""

import json
import pathlib
import re
from typing import Any

import huggingface_hub
import numpy as np

from bert_jax import cli, paths
from bert_jax.cli import UserError
from bert_jax.data import tokenizer as tokenizers
from bert_jax.data.tokenizer_settings import read_settings
from bert_jax.formats import tensor_files, weights
from bert_jax.formats.tensor_files import Stored
from bert_jax.formats.weights import Pretrained
from bert_jax.model.layers import ACTIVATIONS
from bert_jax.tasks.tokenized import SHORTEST

ARCHITECTURES = {  # targets -> the class that has just these heads
    (): 'BertModel', ('mlm', 'nsp'): 'BertForPreTraining', ('mlm',): 'BertForMaskedLM',
    ('nsp',): 'BertForNextSentencePrediction', ('classification',): 'BertForSequenceClassification',
    ('multilabel',): 'BertForSequenceClassification', ('regression',): 'BertForSequenceClassification',
    ('tagging',): 'BertForTokenClassification', ('span',): 'BertForQuestionAnswering',
    ('multiple_choice',): 'BertForMultipleChoice'}
PROBLEMS = {'classification': 'single_label_classification', 'multilabel': 'multi_label_classification',
            'regression': 'regression'}
PIPELINES = {'mlm': 'fill-mask', **dict.fromkeys(PROBLEMS, 'text-classification'), 'tagging': 'token-classification',
             'span': 'question-answering', 'multiple_choice': 'multiple-choice'}
SIZES = {  # Hugging Face's name -> part and name of ours
    'vocab_size': ('embeddings', 'vocab_size'), 'hidden_size': ('embeddings', 'hidden_size'),
    'max_position_embeddings': ('embeddings', 'max_length'), 'type_vocab_size': ('embeddings', 'num_segments'),
    'num_hidden_layers': ('encoder', 'num_layers'), 'num_attention_heads': ('encoder', 'num_heads'),
    'intermediate_size': ('encoder', 'mlp_size'), 'hidden_act': ('encoder', 'activation'),
    'hidden_dropout_prob': ('encoder', 'dropout_rate'),
    'attention_probs_dropout_prob': ('encoder', 'attention_dropout_rate')}
EXPECTED = {'layer_norm_eps': 1e-12, 'position_embedding_type': 'absolute', 'is_decoder': False,
            'add_cross_attention': False, 'tie_word_embeddings': True, 'quantization_config': None,
            'compression_config': None, 'pruned_heads': {}}
FILES = ['config.json', '*.safetensors', 'model.safetensors.index.json', 'vocab.txt', 'tokenizer*.json', '*.model',
         'added_tokens.json', 'special_tokens_map.json']
PICKLES = ['pytorch_model*.bin', 'pytorch_model.bin.index.json']  # where there are no safetensors
BUFFERS = re.compile(r'(bert\.)?embeddings\.(position_ids|token_type_ids)$')
TIED = {'cls.predictions.decoder.weight': 'bert.embeddings.word_embeddings.weight',
        'cls.predictions.decoder.bias': 'cls.predictions.bias'}


def is_folder(path: pathlib.Path) -> bool:
    """Whether a local folder is in Hugging Face's format."""
    file = path / 'config.json'
    if not file.is_file():
        return False
    config = paths.read_json(file)
    return not (isinstance(config, dict) and 'model' in config)  # as a workdir's has


def download(name: str) -> pathlib.Path:
    """The folder of a model on the hub, such as google-bert/bert-base-cased, from the cache or the network.

    Raises:
      UserError: it could not be had; what to do instead.
    """
    try:
        folder = pathlib.Path(huggingface_hub.snapshot_download(name, allow_patterns=FILES))
        if not list(folder.glob('*.safetensors')):
            huggingface_hub.snapshot_download(name, allow_patterns=PICKLES)
        return folder
    except Exception as error:  # the hub's own errors, those of its HTTP client, OSError
        raise UserError(
            f'{name}: no such folder here, and not to be had from the Hugging Face hub ({type(error).__name__}: '
            f'{cli.first_line(error)[:120]}). Without a network: run `hf download {name}` where there is '
            'one, and copy its cache here (HF_HOME), or give the path of a folder.') from error


def read(folder: pathlib.Path) -> Pretrained:
    """Reads a folder: any BERT, with the heads that it has; what is left out or changed is noted.

    Raises:
      UserError: another architecture, damaged or missing files, a tensor that is missing or of another shape,
        a vocabulary that is longer or shorter than its table, labels that are not those of the head.
    """
    config = paths.read_json(folder / 'config.json')
    _check_architecture(folder, config)
    tokenizer = tokenizers.load(folder)
    if tokenizer.vocab_size != config['vocab_size']:
        raise UserError(f'{folder}: its tokenizer has {tokenizer.vocab_size} entries, but its embedding table '
                        f'{config["vocab_size"]} (vocab_size in config.json).')
    stored = _by_canonical_name(folder, tensor_files.open_folder(folder))
    heads = _heads(folder, config, stored)
    dropout = config.get('classifier_dropout')
    if dropout is not None and not (type(dropout) in (int, float) and 0 <= dropout < 1):
        raise UserError(f'{folder}: classifier_dropout is {dropout!r}; a number from 0 to below 1 is expected.')
    classes = (*stored['classifier.weight'].shape, 0)[0] if 'classifier.weight' in stored else 0
    model = weights.model_config(config, SIZES, config['hidden_act'], heads, classes,
                                 config['hidden_dropout_prob'] if dropout is None else dropout)
    labels = _labels(folder, config, heads, classes)
    untied = {name: array for name, array in stored.items() if name not in TIED}
    params, rest = weights.read_params(model, 'huggingface', untied, str(folder), 'config.json')
    _check_tied(folder, stored)
    if rest:
        cli.note('left out, without a counterpart here: ' + ', '.join(rest) + '.')
    if not (config.get('model_type') or config.get('architectures')):
        _check_unnamed(folder, config, tokenizer, params['embeddings']['position'])
    for name in config.get('architectures') or ():
        if not any(set(needed) <= set(heads) for needed, known in ARCHITECTURES.items() if known == name):
            cli.note(f'config.json says {name}, but its head is not among the weights.')
    about = {'source': f'Hugging Face, {folder}'}
    longest = read_settings(folder).get('model_max_length')
    if type(longest) is int and SHORTEST <= longest < model.embeddings.max_length:
        about['config'] = {'max_length': longest}
    return Pretrained(model, params, tokenizer, labels, about)


def _check_architecture(folder: pathlib.Path, config: Any) -> None:
    known, file = ', '.join(dict.fromkeys(ARCHITECTURES.values())), folder / 'config.json'
    if not isinstance(config, dict):
        raise UserError(f'{file}: a JSON object is expected, it holds a {type(config).__name__}.')
    names = config.get('architectures') or ['BertModel']
    if not isinstance(names, list):
        raise UserError(f'{file}: architectures is {names!r}; a list of names is expected.')
    for name in names:
        if (config.get('model_type') or 'bert') != 'bert' or name not in ARCHITECTURES.values():
            kind = config.get('model_type')
            raise UserError(f'{folder}: {name} (model_type {kind!r}) is not supported; known: {known}.')
    weights.check_sizes(config, file, SIZES, ACTIVATIONS)
    for key, value in EXPECTED.items():
        if config.get(key, value) != value:
            raise UserError(f'{folder}: {key} is {config[key]!r} there; only {value!r} is supported.')


def _by_canonical_name(folder: pathlib.Path, stored: dict[str, Stored]) -> dict[str, Stored]:
    """BertModel's names with their prefix, old names of LayerNorm with their new ones, buffers left out."""
    found, theirs = {}, {}
    for name in stored:
        if BUFFERS.match(name):
            continue
        ours = f'bert.{name}' if name.startswith(('embeddings.', 'encoder.', 'pooler.')) else name
        ours = ours.replace('LayerNorm.gamma', 'LayerNorm.weight').replace('LayerNorm.beta', 'LayerNorm.bias')
        if ours in found:
            raise UserError(f'{folder}: {theirs[ours]} and {name} are two names of one tensor.')
        found[ours], theirs[ours] = stored[name], name
    if 'cls.predictions.bias' not in found and 'cls.predictions.decoder.bias' in found:
        found['cls.predictions.bias'] = found.pop('cls.predictions.decoder.bias')
    return found


def _heads(folder: pathlib.Path, config: dict[str, Any], stored: dict[str, Stored]) -> tuple[str, ...]:
    """By the tensors that are there; three kinds share the name `classifier`, and the architecture tells them apart."""
    present = {'mlm': 'cls.predictions.transform.', 'nsp': 'cls.seq_relationship.', 'span': 'qa_outputs.'}
    heads = tuple(head for head, start in present.items() if any(name.startswith(start) for name in stored))
    if 'classifier.weight' not in stored:
        return heads
    named = [heads for heads, name in ARCHITECTURES.items() if name in (config.get('architectures') or ())]
    if not named or named[0][:1] not in (('classification',), ('tagging',), ('multiple_choice',)):
        raise UserError(f'{folder}: there is a classifier; architectures in config.json does not say of which kind.')
    head = named[0][0]
    if head == 'classification':
        names = config.get('id2label')
        guess = 'regression' if isinstance(names, dict) and len(names) == 1 else 'classification'
        kinds = {problem: head for head, problem in PROBLEMS.items()}
        head = cli.choose(f'problem_type in {folder / "config.json"}', kinds,
                          str(config.get('problem_type') or PROBLEMS[guess]))
    return (*heads, head)


def _check_tied(folder: pathlib.Path, stored: dict[str, Stored]) -> None:
    for copy, original in TIED.items():
        if copy in stored and original in stored and not np.array_equal(stored[copy].read(), stored[original].read()):
            raise UserError(f'{folder}: {copy} is not equal to {original}; only tied output embeddings are supported.')


def _check_unnamed(folder: pathlib.Path, config: dict[str, Any], tokenizer: tokenizers.Tokenizer, positions: np.ndarray
                   ) -> None:
    """RoBERTa's tensors have BERT's names; where config.json names no architecture, other signs tell them apart."""
    first, pad = tokenizer.pieces[tokenizer.cls_id], config.get('pad_token_id', tokenizer.pad_id)
    signs = [f'texts begin with {first}'] if first != '[CLS]' else []
    signs += [f'pad_token_id is {pad}, not {tokenizer.pad_id}'] if pad != tokenizer.pad_id else []
    signs += ['position 1 is empty'] if len(positions) > 1 and not positions[1].any() else []
    if signs:
        raise UserError(f'{folder}: config.json names no architecture, and {", ".join(signs)}: as in a RoBERTa, whose '
                        'positions begin elsewhere. If it is a BERT, add "model_type": "bert" there.')


def _labels(folder: pathlib.Path, config: dict[str, Any], heads: tuple[str, ...], classes: int) -> tuple[str, ...]:
    """The label names of the head that has some, in the order of its outputs."""
    if not set(heads) & {'classification', 'multilabel', 'tagging'}:
        return ()
    names, ids, file = config.get('id2label'), config.get('label2id'), folder / 'config.json'
    if not names:
        return tuple(f'LABEL_{i}' for i in range(classes))
    if not isinstance(names, dict) or names.keys() != {str(i) for i in range(classes)}:
        found = ', '.join(names) if isinstance(names, dict) else names
        raise UserError(f'{file}: id2label has {found}; the head has {classes} classes, 0 to {classes - 1}.')
    labels = tuple(str(names[str(i)]) for i in range(classes))
    weights.check_labels(labels, classes, str(file))
    for label, i in ids.items() if isinstance(ids, dict) else ():
        if label in labels and labels.index(label) != i:
            raise UserError(f'{file}: label2id gives {label!r} the id {i}, id2label {labels.index(label)}.')
    return labels


def write(model: Pretrained, folder: pathlib.Path, name: str, licence: str) -> None:
    """Writes a folder that AutoModelFor*.from_pretrained and AutoTokenizer.from_pretrained take as it is.

    What has no counterpart there is noted.

    Args:
      model: what to write.
      folder: an existing, empty folder.
      name: the model's name in its card.
      licence: the licence field of the card, an identifier of the hub.
    """
    weights.check_is_bert(model, 'a Hugging Face folder')
    heads = tuple(head for head in weights.KNOWN_HEADS if head in model.config.targets)
    if heads not in ARCHITECTURES:
        raise UserError(f'No class of transformers has the heads {", ".join(heads)} together.')
    for target in model.config.targets:
        if target not in weights.KNOWN_HEADS:
            cli.note(f'left out, transformers has no such head: {target}.')
    arrays = {}
    for tensor in weights.of(model):
        array = weights.view(model.params, tensor, model.tokenizer.vocab_size)
        key = tensor.huggingface if heads else tensor.huggingface.removeprefix('bert.')
        arrays[key] = weights.matrix(tensor, array, tensor.huggingface_transposed)
    tensor_files.save(arrays, folder / 'model.safetensors')
    (folder / 'config.json').write_text(json.dumps(_their_config(model, heads), indent=2, ensure_ascii=False) + '\n')
    write_tokenizer(model.tokenizer, folder, weights.max_length(model))
    (folder / 'README.md').write_text(card(model, heads, name, licence))


def _their_config(model: Pretrained, heads: tuple[str, ...]) -> dict[str, Any]:
    config = {theirs: model.config[part][name] for theirs, (part, name) in SIZES.items()}
    config |= {'architectures': [ARCHITECTURES[heads]], 'model_type': 'bert', 'initializer_range': 0.02,
               'layer_norm_eps': 1e-12, 'pad_token_id': model.tokenizer.pad_id, 'torch_dtype': 'float32',
               'tie_word_embeddings': True}
    if model.labels:
        config |= {'id2label': {str(i): label for i, label in enumerate(model.labels)},
                   'label2id': {label: i for i, label in enumerate(model.labels)}}
    for head in heads:
        if head in PROBLEMS:
            config['problem_type'] = PROBLEMS[head]
        if head == 'regression':
            config |= {'id2label': {'0': 'LABEL_0'}, 'label2id': {'LABEL_0': 0}}
        if 'dropout_rate' in model.config.targets[head]:
            config['classifier_dropout'] = model.config.targets[head].dropout_rate
    return config


def write_tokenizer(tokenizer: tokenizers.Tokenizer, folder: pathlib.Path, max_length: int) -> None:
    """The tokenizer's own files, and tokenizer.json and tokenizer_config.json for AutoTokenizer."""
    tokenizer.save(folder)
    tokenizer.as_library(max_length).save(str(folder / 'tokenizer.json'))
    options = {'tokenizer_class': 'BertTokenizer' if tokenizer.kind == 'wordpiece' else 'PreTrainedTokenizerFast',
               'model_max_length': max_length, 'model_input_names': ['input_ids', 'token_type_ids', 'attention_mask'],
               'clean_up_tokenization_spaces': False}
    options |= {f'{role}_token': tokenizer.pieces[getattr(tokenizer, f'{role}_id')] for role in tokenizers.SPECIALS}
    beside = folder / 'tokenizer_config.json'
    if beside.exists():
        options |= json.loads(beside.read_text())
    beside.write_text(json.dumps(options, indent=2) + '\n')


def card(model: Pretrained, heads: tuple[str, ...], name: str, licence: str) -> str:
    """The model card: what it is, how it was made, how it scored, how to use it."""
    pipeline = PIPELINES.get(heads[0] if heads else '', 'feature-extraction')
    size = ', '.join(f'{key} {model.config[part][ours]}' for key, (part, ours) in SIZES.items() if 'prob' not in key)
    about, lines = model.about, ['---', f'license: {licence}', 'library_name: transformers',
                                 f'pipeline_tag: {pipeline}', 'tags: [bert, bert_jax]', '---', '', f'# {name}', '']
    lines += [f'A BERT encoder ({ARCHITECTURES[heads]}; {size}), made with bert_jax.', '', '## How it was made', '']
    lines += [f'From: {about["source"]}']
    lines += [f'Steps: {about["step"]:,}'] if 'step' in about else []
    if model.labels:
        lines += [f'Labels: {", ".join(model.labels)}']
    if about.get('config'):
        lines += ['', '<details><summary>Config</summary>', '', '```json', json.dumps(about['config'], indent=2),
                  '```', '', '</details>']
    if about.get('scores'):
        lines += ['', '## Held-out scores', '', '| score | value |', '|---|---|']
        lines += [f'| {key} | {value:.4f} |' for key, value in about['scores'].items()]
    lines += ['', '## How to use it', '', '```python', *_usage(name, heads, model), '```', '']
    return '\n'.join(lines)


def _usage(name: str, heads: tuple[str, ...], model: Pretrained) -> list[str]:
    mask = model.tokenizer.pieces[model.tokenizer.mask_id]
    example = f'Paris is the {mask} of France.' if 'mlm' in heads else 'A text.'
    if heads and heads[0] in ('mlm', 'tagging', *PROBLEMS):
        return ['from transformers import pipeline', '',
                f'pipe = pipeline({PIPELINES[heads[0]]!r}, {name!r})', f'print(pipe({example!r}))']
    inputs = f"tokenizer({example!r}, return_tensors='pt')"
    if heads == ('multiple_choice',):
        inputs = ("{k: x[None] for k, x in tokenizer(['A context.'] * 2, ['One choice.', 'Another.'], padding=True, "
                  "return_tensors='pt').items()}")
    return ['from transformers import AutoTokenizer, ' + ARCHITECTURES[heads], '',
            f'tokenizer = AutoTokenizer.from_pretrained({name!r})',
            f'model = {ARCHITECTURES[heads]}.from_pretrained({name!r})',
            f'print(model(**{inputs}))']
