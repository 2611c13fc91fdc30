"""Hugging Face folders: config.json, model.safetensors, tokenizer files, a model card."""

import json
import pathlib
import re
from collections.abc import Callable
from typing import Any

import huggingface_hub
import numpy as np
import safetensors
import safetensors.numpy
from ml_collections import ConfigDict

from bert_jax import cli, paths, weight_files, weights
from bert_jax.cli import UserError, unknown
from bert_jax.data import tokenizer as tokenizers
from bert_jax.model.layers import ACTIVATIONS
from bert_jax.weights import Pretrained

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
            'add_cross_attention': False, 'tie_word_embeddings': True}
FILES = ['config.json', '*.safetensors', 'model.safetensors.index.json', 'vocab.txt', 'tokenizer*.json', '*.model']
PICKLES = ['pytorch_model*.bin', 'pytorch_model.bin.index.json']  # where there are no safetensors
LAYER = re.compile(r'bert\.encoder\.layer\.(\d+)\.')
OTHERS = ('lm_head.', 'roberta.', 'deberta.', 'electra.', 'distilbert.', 'generator_', 'discriminator_')
BUFFERS = re.compile(r'(bert\.)?embeddings\.(position_ids|token_type_ids)$')
TIED = {'cls.predictions.decoder.weight': 'bert.embeddings.word_embeddings.weight',
        'cls.predictions.decoder.bias': 'cls.predictions.bias'}


def is_folder(path: pathlib.Path) -> bool:
    """Whether a local folder is in Hugging Face's format."""
    file = path / 'config.json'
    return file.is_file() and 'model' not in paths.read_json(file)


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
    """Reads a folder: any BERT, with the heads that it has.

    Raises:
      UserError: another architecture, damaged or missing files, a tensor that is missing or of another shape,
        a vocabulary that is longer or shorter than its table.
    """
    config = paths.read_json(folder / 'config.json')
    _check_config(folder, config)
    tokenizer = tokenizers.load(folder)
    if tokenizer.vocab_size != config['vocab_size']:
        raise UserError(f'{folder}: its tokenizer has {tokenizer.vocab_size} entries, but its embedding table '
                        f'{config["vocab_size"]} (vocab_size in config.json).')
    readers = weight_files.open_folder(folder)

    def get(name: str) -> np.ndarray:
        return readers[name](name)

    theirs = {_canonical(name): name for name in readers if not BUFFERS.match(name)}
    heads = _heads(folder, config, theirs)
    dropout = config.get('classifier_dropout')
    model = weights.model_config(config, SIZES, config['hidden_act'], heads, _num_labels(theirs, get),
                                 config['hidden_dropout_prob'] if dropout is None else dropout)
    pooler = 'bert.pooler.dense.weight' in theirs
    weights.check_pooler(str(folder), heads, pooler)
    params, converted = weights.empty_params(model, pooler), set()
    _check_tied(folder, theirs, get)
    wanted = list(weights.tensors(model.encoder.num_layers, heads, pooler))
    for tensor in wanted:
        name = theirs.pop(tensor.huggingface, None)
        if name is None:
            raise UserError(f'{folder}: {tensor.huggingface} is missing.')
        array = get(name)
        if array.dtype != np.float32:
            converted.add(str(array.dtype))
            array = array.astype(np.float32)
        weights.check_finite(f'{folder}: {name}', array)
        expected = weights.fill(params, tensor, array, tensor.huggingface_transposed, config['vocab_size'])
        if expected:
            raise UserError(f'{folder}: {tensor.huggingface} is {array.shape}; config.json asks for {expected}.')
    rest = sorted(name for name in theirs if name not in TIED)
    _check_rest(folder, rest, model.encoder.num_layers)
    for dtype in sorted(converted):
        cli.note(f'{folder}: weights are {dtype} there; converted to float32.')
    if rest:
        cli.note(f'{folder}: left out, without a counterpart here: {", ".join(rest)}.')
    return Pretrained(model, params, tokenizer, _labels(folder, config, heads, model), {
        'source': f'Hugging Face, {folder}', 'config': _run_of(folder)})


def _run_of(folder: pathlib.Path) -> dict[str, Any]:
    """What predict needs to know of a fine-tuning: the tokens that it read."""
    file = folder / 'tokenizer_config.json'
    length = paths.read_json(file).get('model_max_length') if file.exists() else None
    positions = paths.read_json(folder / 'config.json')['max_position_embeddings']
    return {'max_length': length} if isinstance(length, int) and 3 <= length < positions else {}


def _check_rest(folder: pathlib.Path, rest: list[str], num_layers: int) -> None:
    """Refuses arrays that say the config is not theirs: more layers, another model's heads."""
    layers = {int(match[1]) for name in rest if (match := LAYER.match(name))}
    if layers:
        raise UserError(f'{folder}: the weights have {max(layers) + 1} layers, config.json says {num_layers} '
                        '(num_hidden_layers).')
    other = next((name for name in rest if name.startswith(OTHERS)), '')
    if other:
        raise UserError(f'{folder}: {other} belongs to another model than BERT (a RoBERTa without its names?).')


def _check_config(folder: pathlib.Path, config: Any) -> None:
    if not isinstance(config, dict):
        raise UserError(f'{folder}: config.json is no JSON object.')
    known = ', '.join(dict.fromkeys(ARCHITECTURES.values()))
    for name in (config.get('architectures') or ['BertModel']):
        if config.get('model_type', 'bert') != 'bert' or name not in ARCHITECTURES.values():
            kind = config.get('model_type')
            raise UserError(f'{folder}: {name} (model_type {kind!r}) is not supported; known: {known}.')
    missing = [key for key in SIZES if key not in config]
    if missing:
        raise UserError(f'{folder}: config.json lacks {", ".join(missing)}.')
    for key, (_, name) in SIZES.items():
        value, is_rate = config[key], name.endswith('rate')
        fine = isinstance(value, str) if key == 'hidden_act' else (
            isinstance(value, (int, float)) and 0 <= value < 1 if is_rate else type(value) is int and value > 0)
        if not fine:
            raise UserError(f'{folder}: {key} is {value!r} in config.json.')
    if config['hidden_act'] not in ACTIVATIONS:
        raise unknown(f'hidden_act in {folder}/config.json', config['hidden_act'], ACTIVATIONS)
    if config['hidden_size'] % config['num_attention_heads']:
        raise UserError(f'{folder}: hidden_size {config["hidden_size"]} is not a multiple of num_attention_heads '
                        f'{config["num_attention_heads"]}.')
    if config.get('quantization_config'):
        raise UserError(f'{folder}: the weights are quantized (quantization_config in config.json); float32, float16 '
                        'and bfloat16 are read.')
    for key, value in EXPECTED.items():
        if config.get(key, value) != value:
            raise UserError(f'{folder}: {key} is {config[key]!r} there; only {value!r} is supported.')


def _canonical(name: str) -> str:
    """BertModel's names with their prefix, old names of LayerNorm with their new ones."""
    if name.startswith(('embeddings.', 'encoder.', 'pooler.')):
        name = f'bert.{name}'
    return name.replace('LayerNorm.gamma', 'LayerNorm.weight').replace('LayerNorm.beta', 'LayerNorm.bias')


def _heads(folder: pathlib.Path, config: dict[str, Any], names: dict[str, str]) -> tuple[str, ...]:
    """By the tensors that are there; three kinds share the name `classifier`, and the architecture tells them apart."""
    if 'cls.predictions.bias' not in names and 'cls.predictions.decoder.bias' in names:
        names['cls.predictions.bias'] = names.pop('cls.predictions.decoder.bias')
    present = {'mlm': 'cls.predictions.transform.dense.weight', 'nsp': 'cls.seq_relationship.weight',
               'span': 'qa_outputs.weight'}
    heads = tuple(head for head, name in present.items() if name in names)
    if 'classifier.weight' not in names:
        return heads
    named = [heads for heads, name in ARCHITECTURES.items() if name in (config.get('architectures') or ())]
    if not named or named[0][:1] not in (('classification',), ('tagging',), ('multiple_choice',)):
        raise UserError(f'{folder}: there is a classifier; architectures in config.json does not say of which kind.')
    head = named[0][0]
    if head == 'classification':
        problem = config.get('problem_type') or ('regression' if len(config.get('id2label') or '12') == 1 else None)
        head = {problem: head for head, problem in PROBLEMS.items()}.get(problem, head)
    return (*heads, head)


def _num_labels(names: dict[str, str], get: Callable[[str], np.ndarray]) -> int:
    return get(names['classifier.weight']).shape[0] if 'classifier.weight' in names else 0


def _check_tied(folder: pathlib.Path, names: dict[str, str], get: Callable[[str], np.ndarray]) -> None:
    for copy, original in TIED.items():
        if copy in names and original in names and not np.array_equal(get(names[copy]), get(names[original])):
            raise UserError(f'{folder}: {copy} is not equal to {original}; only tied output embeddings are supported.')


def _labels(folder: pathlib.Path, config: dict[str, Any], heads: tuple[str, ...], model: ConfigDict) -> tuple[str, ...]:
    head = next((head for head in heads if head in ('classification', 'multilabel', 'tagging')), None)
    if head is None:
        return ()
    count, names = model.targets[head].num_classes, config.get('id2label') or {}
    if names and sorted(names) != sorted(map(str, range(count))):
        raise UserError(f'{folder}: the classifier has {count} classes, id2label in config.json names {len(names)} '
                        f'({", ".join(map(str, names))}).')
    return tuple(str(names.get(str(i), f'LABEL_{i}')) for i in range(count))


def write(model: Pretrained, folder: pathlib.Path, name: str, licence: str) -> list[str]:
    """Writes a folder that AutoModelFor*.from_pretrained and AutoTokenizer.from_pretrained take as it is.

    Args:
      model: what to write.
      folder: an existing, empty folder.
      name: the model's name in its card.
      licence: the licence field of the card, an identifier of the hub.

    Returns:
      What has no counterpart there, for people.
    """
    heads = tuple(head for head in weights.HEADS if head in model.model.targets)
    if heads not in ARCHITECTURES:
        raise UserError(f'No class of transformers has the heads {", ".join(heads)} together.')
    notes = [f'left out, transformers has no such head: {target}.' for target in model.model.targets
             if target not in weights.HEADS]
    arrays = {}
    for tensor in weights.of(model):
        array = weights.view(model.params, tensor, model.tokenizer.vocab_size)
        key = tensor.huggingface if heads else tensor.huggingface.removeprefix('bert.')
        arrays[key] = weights.matrix(tensor, array, tensor.huggingface_transposed)
    save_tensors(arrays, folder / 'model.safetensors')
    (folder / 'config.json').write_text(json.dumps(_their_config(model, heads), indent=2, ensure_ascii=False) + '\n')
    read = model.about.get('config', {}).get('max_length', model.model.embeddings.max_length)
    write_tokenizer(model.tokenizer, folder, read)
    (folder / 'README.md').write_text(card(model, heads, name, licence))
    return notes


def save_tensors(arrays: dict[str, np.ndarray], file: pathlib.Path) -> None:
    """Writes a safetensors file."""
    try:
        safetensors.numpy.save_file(arrays, file, metadata={'format': 'pt'})
    except safetensors.SafetensorError as error:
        raise UserError(f'{file.name}: could not be written ({error}).') from error


def _their_config(model: Pretrained, heads: tuple[str, ...]) -> dict[str, Any]:
    config = {theirs: model.model[part][name] for theirs, (part, name) in SIZES.items()}
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
        if 'dropout_rate' in model.model.targets[head]:
            config['classifier_dropout'] = model.model.targets[head].dropout_rate
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
    size = ', '.join(f'{key} {model.model[part][ours]}' for key, (part, ours) in SIZES.items() if 'prob' not in key)
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
