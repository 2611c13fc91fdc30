"""TF1 folders of google-research/bert: bert_model.ckpt.*, bert_config.json, vocab.txt."""

import functools
import json
import pathlib
import re
from typing import Any

import numpy as np

from bert_jax import cli, paths
from bert_jax.cli import UserError
from bert_jax.data import tokenizer as tokenizers
from bert_jax.formats import tf_bundle, weights
from bert_jax.formats.tensor_files import Stored
from bert_jax.formats.weights import Pretrained

SIZES = {  # the original's name -> part and name of ours
    'vocab_size': ('embeddings', 'vocab_size'), 'hidden_size': ('embeddings', 'hidden_size'),
    'max_position_embeddings': ('embeddings', 'max_length'), 'type_vocab_size': ('embeddings', 'num_segments'),
    'num_hidden_layers': ('encoder', 'num_layers'), 'num_attention_heads': ('encoder', 'num_heads'),
    'intermediate_size': ('encoder', 'mlp_size'), 'hidden_dropout_prob': ('encoder', 'dropout_rate'),
    'attention_probs_dropout_prob': ('encoder', 'attention_dropout_rate')}
ACTIVATIONS = {'gelu': 'gelu_new', 'relu': 'relu'}  # the original's name -> ours: its gelu is the tanh form
SLOTS = re.compile(r'(.*/)?(adam_[mv]|Adam(_1)?|AdamWeightDecayOptimizer.*|lamb_[mv])$|global_step$|beta[12]_power$')
PREFIX = 'bert_model.ckpt'


def is_folder(path: pathlib.Path) -> bool:
    """Whether a local folder is in TF1's format."""
    return (path / 'bert_config.json').is_file() or bool(list(path.glob('*.ckpt*.index')))


def read(folder: pathlib.Path) -> Pretrained:
    """Reads a folder with the heads that it has; optimizer slots are left out with a note.

    Raises:
      UserError: missing or damaged files, sizes that no BERT has, a variable that is missing or of another shape, a
        vocabulary that is longer or shorter than its table.
    """
    config = _read_config(folder)
    tokenizer = tokenizers.load(folder)
    if tokenizer.vocab_size != config['vocab_size']:
        raise UserError(f'{folder}: its vocab.txt has {tokenizer.vocab_size} entries, but its embedding table '
                        f'{config["vocab_size"]} (vocab_size in bert_config.json).')
    prefix, reader = _open(folder)
    names = set(reader.entries)
    present = {'mlm': 'cls/predictions/output_bias', 'nsp': 'cls/seq_relationship/output_weights',
               'classification': 'output_weights', 'span': 'cls/squad/output_weights'}
    heads = tuple(head for head, name in present.items() if name in names)
    classes = (*reader.entries['output_weights'].shape, 0)[0] if 'classification' in heads else 0
    model = weights.model_config(config, SIZES, ACTIVATIONS[config['hidden_act']], heads, classes,
                                 dropout_rate=0.1)  # run_classifier.py's constant
    slots = {name for name in names if SLOTS.match(name)}
    stored = {name: Stored(entry.dtype.name, entry.shape, functools.partial(_get, prefix, reader, name))
              for name, entry in reader.entries.items() if name not in slots}
    params, rest = weights.read_params(model, 'tf1', stored, prefix, 'bert_config.json')
    if slots:
        cli.note(f'left out: {len(slots)} variables of the optimizer.')
    if rest:
        cli.note(f'left out, without a counterpart here: {", ".join(rest)}.')
    labels = tuple(f'LABEL_{i}' for i in range(classes))
    return Pretrained(model, params, tokenizer, labels, {'source': f'TF1 checkpoint, {prefix}'})


def _read_config(folder: pathlib.Path) -> dict[str, Any]:
    file = folder / 'bert_config.json'
    config = paths.read_json(file)
    weights.check_sizes(config, file, SIZES, ACTIVATIONS)
    return config


def _open(folder: pathlib.Path) -> tuple[str, tf_bundle.Reader]:
    prefixes = sorted(str(file).removesuffix('.index') for file in folder.glob('*.index'))
    if len(prefixes) != 1:
        found = ', '.join(prefixes) or 'none'
        raise UserError(f'{folder}: one checkpoint (NAME.index, NAME.data-*) is expected there; found: {found}.')
    for file in folder.glob(f'{pathlib.Path(prefixes[0]).name}.*'):
        paths.refuse_pointer(file)
    try:
        return prefixes[0], tf_bundle.Reader(prefixes[0])
    except tf_bundle.Damaged as error:
        raise UserError(f'{prefixes[0]}: {error}.') from error


def _get(prefix: str, reader: tf_bundle.Reader, name: str) -> np.ndarray:
    try:
        return reader.read(name)
    except tf_bundle.Damaged as error:
        raise UserError(f'{prefix}: {error}.') from error
    except OSError as error:
        raise UserError(f'{error.filename}: {error.strerror}.') from error


def write(model: Pretrained, folder: pathlib.Path) -> None:
    """Writes a folder with the original code's variable names; notes what has no counterpart there."""
    weights.check_is_bert(model, 'the original code')
    if model.tokenizer.kind != 'wordpiece':
        cli.note('the original code reads vocab.txt only; tokenizer.model stands in its place.')
    activation = {ours: theirs for theirs, ours in ACTIVATIONS.items()}.get(model.config.encoder.activation)
    if activation is None:
        activation = 'gelu'
        cli.note(f'activation {model.config.encoder.activation} (erf) does not exist in the original code; its '
                 "'gelu', the tanh form, is written: outputs differ in the fourth digit.")
    heads = {tensor.ours.split('/')[0] for tensor in weights.of(model) if tensor.tf1 is None}
    heads |= {f'targets_{target}' for target in model.config.targets if target not in weights.KNOWN_HEADS}
    for head in sorted(heads):
        cli.note(f'left out, the original code has no such head: {head.removeprefix("targets_")}.')
    if model.labels:
        cli.note('the original code keeps no label names; labels.txt has them.')
        (folder / 'labels.txt').write_text('\n'.join(model.labels) + '\n')

    def array_of(tensor: weights.Tensor) -> np.ndarray:
        array = weights.view(model.params, tensor, model.tokenizer.vocab_size)
        return weights.matrix(tensor, array, tensor.tf1_transposed)

    tf_bundle.write(str(folder / PREFIX), {
        tensor.tf1: functools.partial(array_of, tensor) for tensor in weights.of(model) if tensor.tf1 is not None})
    config = {theirs: model.config[part][name] for theirs, (part, name) in SIZES.items()}
    config |= {'hidden_act': activation, 'initializer_range': 0.02}
    (folder / 'bert_config.json').write_text(json.dumps(dict(sorted(config.items())), indent=2) + '\n')
    model.tokenizer.save(folder)
