"""A pre-trained model with all that belongs to it, and the names its arrays have elsewhere.

Hugging Face's names are those of transformers' modeling_bert.py; TF1's those of the original code
(google-research/bert: modeling.py, run_pretraining.py, run_classifier.py, run_squad.py).
"""

import dataclasses
import math
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from bert_jax import cli
from bert_jax.cli import UserError, unknown
from bert_jax.data.tokenizer import Tokenizer
from bert_jax.formats.tensor_files import FLOATS, Stored
from bert_jax.model import model as models


@dataclasses.dataclass
class Pretrained:
    """A model as it travels between formats.

    Attributes:
      config: what `models.build` takes.
      params: the parameter tree, float32.
      tokenizer: the one its ids belong to.
      labels: class names, () without a classifier.
      about: for the model card: 'source', and where known 'step', 'scores', 'config'.
    """

    config: ConfigDict
    params: Any
    tokenizer: Tokenizer
    labels: tuple[str, ...] = ()
    about: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One array of a BERT, under its three names.

    Attributes:
      ours: path in the parameter tree, as if query, key and value were arrays of their own.
      layer: which of the stacked layers, None outside of them.
      huggingface, tf1: its names; tf1 is None where the original code has no such array.
      huggingface_transposed, tf1_transposed: a matrix is [out, in] there, where ours is [in, out].
    """

    ours: str
    layer: int | None
    huggingface: str
    tf1: str | None
    huggingface_transposed: bool = False
    tf1_transposed: bool = False


_PARTS = {  # kind -> ours, Hugging Face's, TF1's ending; transposed there
    'table': (('', '.weight', '', False, False),),
    'norm': (('/scale', '.weight', '/gamma', False, False), ('/bias', '.bias', '/beta', False, False)),
    'dense': (('/kernel', '.weight', '/kernel', True, False), ('/bias', '.bias', '/bias', False, False)),
    'head': (('/kernel', '.weight', '/output_weights', True, True), ('/bias', '.bias', '/output_bias', False, False)),
    'bias': (('/bias', '.bias', '/output_bias', False, False),)}

_EMBEDDINGS = (
    ('table', 'embeddings/token', 'bert.embeddings.word_embeddings', 'bert/embeddings/word_embeddings'),
    ('table', 'embeddings/position', 'bert.embeddings.position_embeddings', 'bert/embeddings/position_embeddings'),
    ('table', 'embeddings/segment', 'bert.embeddings.token_type_embeddings', 'bert/embeddings/token_type_embeddings'),
    ('norm', 'embeddings/norm', 'bert.embeddings.LayerNorm', 'bert/embeddings/LayerNorm'))
_LAYER = (
    ('dense', 'attention/query', 'attention.self.query', 'attention/self/query'),
    ('dense', 'attention/key', 'attention.self.key', 'attention/self/key'),
    ('dense', 'attention/value', 'attention.self.value', 'attention/self/value'),
    ('dense', 'attention/out', 'attention.output.dense', 'attention/output/dense'),
    ('norm', 'attention_norm', 'attention.output.LayerNorm', 'attention/output/LayerNorm'),
    ('dense', 'mlp/up', 'intermediate.dense', 'intermediate/dense'),
    ('dense', 'mlp/down', 'output.dense', 'output/dense'),
    ('norm', 'mlp_norm', 'output.LayerNorm', 'output/LayerNorm'))
_POOLER = (('dense', 'pooler/dense', 'bert.pooler.dense', 'bert/pooler/dense'),)
_HEADS = {
    'mlm': (
        ('dense', 'targets_mlm/dense', 'cls.predictions.transform.dense', 'cls/predictions/transform/dense'),
        ('norm', 'targets_mlm/norm', 'cls.predictions.transform.LayerNorm', 'cls/predictions/transform/LayerNorm'),
        ('bias', 'targets_mlm', 'cls.predictions', 'cls/predictions')),
    'nsp': (('head', 'targets_nsp/dense', 'cls.seq_relationship', 'cls/seq_relationship'),),
    'classification': (('head', 'targets_classification/dense', 'classifier', ''),),
    'multilabel': (('head', 'targets_multilabel/dense', 'classifier', None),),
    'regression': (('head', 'targets_regression/dense', 'classifier', None),),
    'tagging': (('head', 'targets_tagging/dense', 'classifier', None),),
    'multiple_choice': (('head', 'targets_multiple_choice/dense', 'classifier', None),),
    'span': (('head', 'targets_span/dense', 'qa_outputs', 'cls/squad'),)}
KNOWN_HEADS = tuple(_HEADS)


def tensors(num_layers: int, heads: tuple[str, ...], pooler: bool) -> Iterator[Tensor]:
    """Every array of a BERT with these heads (targets), in the order of the network."""
    yield from _expand(_EMBEDDINGS)
    for layer in range(num_layers):
        yield from _expand(_LAYER, layer)
    if pooler:
        yield from _expand(_POOLER)
    for head in heads:
        yield from _expand(_HEADS[head])


def _expand(rows: tuple, layer: int | None = None) -> Iterator[Tensor]:
    for kind, ours, huggingface, tf1 in rows:
        if layer is not None:
            ours, huggingface = f'encoder/layers/{ours}', f'bert.encoder.layer.{layer}.{huggingface}'
            tf1 = f'bert/encoder/layer_{layer}/{tf1}'
        for our_end, their_end, tf1_end, huggingface_transposed, tf1_transposed in _PARTS[kind]:
            yield Tensor(ours + our_end, layer, huggingface + their_end,
                         None if tf1 is None else (tf1 + tf1_end).lstrip('/'), huggingface_transposed, tf1_transposed)


def check_sizes(config: Any, file: pathlib.Path, sizes: dict[str, tuple[str, str]], activations: Iterable[str]) -> None:
    """Refuses a config of another format that lacks a size, or has one that no BERT can have.

    Args:
      config: what `file` holds.
      sizes: its keys -> part and name of ours.
      activations: what hidden_act may be.
    """
    if not isinstance(config, dict):
        raise UserError(f'{file}: a JSON object is expected, it holds a {type(config).__name__}.')
    missing = [key for key in (*sizes, 'hidden_act') if key not in config]
    if missing:
        raise UserError(f'{file}: lacks {", ".join(dict.fromkeys(missing))}.')
    for key, (_, name) in sizes.items():
        value, number = config[key], isinstance(config[key], (int, float)) and not isinstance(config[key], bool)
        if name.endswith('_rate') and not (number and 0 <= value < 1):
            raise UserError(f'{file}: {key} is {value!r}; a number from 0 to below 1 is expected.')
        if key != 'hidden_act' and not name.endswith('_rate') and not (type(value) is int and 0 < value < 1 << 31):
            raise UserError(f'{file}: {key} is {value!r}; a whole number above 0 is expected.')
    if config['hidden_act'] not in list(activations):
        raise unknown(f'hidden_act in {file}', config['hidden_act'], activations)
    if config['hidden_size'] % config['num_attention_heads']:
        raise UserError(f'{file}: hidden_size {config["hidden_size"]} is not a multiple of num_attention_heads '
                        f'{config["num_attention_heads"]}.')


def model_config(found: dict[str, Any], sizes: dict[str, tuple[str, str]], activation: str, heads: tuple[str, ...],
                 num_classes: int, dropout_rate: float) -> ConfigDict:
    """What `models.build` takes, of a config of another format.

    Args:
      found: that config.
      sizes: its keys -> part and name of ours.
      activation: our name for it.
      heads, num_classes, dropout_rate: which heads there are, and what those of fine-tuning have.
    """
    model = ConfigDict({'embeddings': {'name': 'bert'}, 'encoder': {'name': 'transformer', 'sees': 'both'},
                        'targets': {}, 'run': {'dtype': 'float32', 'kernel': 'auto', 'remat': 'none'}})
    for theirs, (part, name) in sizes.items():
        model[part][name] = found[theirs]
    model.embeddings.dropout_rate = model.encoder.dropout_rate
    model.encoder.activation = activation
    model.run.unroll = model.encoder.num_layers
    classes = {'num_classes': num_classes, 'dropout_rate': dropout_rate}
    options = {'mlm': {'vocab_size': model.embeddings.vocab_size, 'activation': activation},
               **dict.fromkeys(('classification', 'multilabel', 'tagging'), classes),
               'regression': {'dropout_rate': dropout_rate},
               'multiple_choice': {'num_choices': 2, 'dropout_rate': dropout_rate}}  # as many as a question has
    for head in heads:
        model.targets[head] = ConfigDict(options.get(head, {}) | {'weight': 1.0})
    return model


def max_length(model: Pretrained) -> int:
    """The tokens that a model reads: its fine-tuning's max_length, else its positions."""
    return model.about.get('config', {}).get('max_length', model.config.embeddings.max_length)


def check_labels(labels: Sequence[str], classes: int, where: str) -> None:
    """Refuses label names that are not one for each class of a head, or are not different."""
    if len(labels) != classes:
        raise UserError(f'{where}: has {len(labels)} labels, but the head {classes} classes.')
    twice = next((label for i, label in enumerate(labels) if label in labels[:i]), None)
    if twice is not None:
        raise UserError(f'{where}: the label {twice!r} names two classes.')


def check_is_bert(model: Pretrained, form: str) -> None:
    """Refuses a model that `form`, which knows BERT alone, would compute otherwise."""
    encoder = model.config.encoder
    if encoder.name != 'transformer' or encoder.sees != 'both':
        what = f'an encoder {encoder.name}' + (f' that sees {encoder.sees}' if 'sees' in encoder else '')
        raise UserError(f'{what}: {form} has BERT alone, whose transformer sees both sides; --format workdir keeps it.')


def of(model: Pretrained) -> list[Tensor]:
    """The arrays of a model that have names elsewhere."""
    heads = tuple(head for head in KNOWN_HEADS if head in model.config.targets)
    return list(tensors(model.config.encoder.num_layers, heads, 'pooler' in model.params))


def read_params(model: ConfigDict, form: str, stored: Mapping[str, Stored], where: str, config_file: str
                ) -> tuple[Any, list[str]]:
    """The parameter tree of arrays in another format, and the names there that are no part of it.

    All names, types and shapes are compared before an array is read.

    Args:
      model: what `models.build` takes; with a pooler where a target reads it or it is there.
      form: 'huggingface' or 'tf1'.
      stored: that format's names -> its arrays.
      where, config_file: for messages.

    Raises:
      UserError: an array that is missing, not of floats or of another shape, is no part of a BERT of this config, or
        holds numbers that are not finite.
    """
    core = {'huggingface': 'bert.', 'tf1': 'bert/'}[form]
    pooler = any(name.startswith(f'{core}pooler') for name in stored)
    heads = tuple(head for head in KNOWN_HEADS if head in model.targets)
    wanted = {}
    for tensor in tensors(model.encoder.num_layers, heads, pooler):
        name = getattr(tensor, form)
        if name not in stored:
            raise UserError(f'{where}: {name} is missing{_others(core, stored)}.')
        wanted[name] = tensor
    params, vocab_size = _empty_params(model, pooler), model.embeddings.vocab_size
    if 'pooler' in params and not pooler:
        raise UserError(f'{where}: {core}pooler is missing; a head there ({", ".join(heads)}) reads it.')
    for name, tensor in wanted.items():
        if stored[name].dtype not in FLOATS.values():
            raise UserError(f'{where}: {name} is {stored[name].dtype}; only weights that are floats are read '
                            f'({", ".join(FLOATS.values())}), no quantized ones.')
        shape = _flat_shape(tensor, view(params, tensor, vocab_size).shape)
        shape = shape[::-1] if getattr(tensor, f'{form}_transposed') else shape
        if stored[name].shape != shape:
            raise UserError(f'{where}: {name} is {stored[name].shape}; {config_file} asks for {shape}.')
    rest = sorted(stored.keys() - wanted.keys())
    strange = [name for name in rest if name.startswith(core)]
    if strange:
        raise UserError(f'{where}: {", ".join(strange[:3])} ({len(strange)} tensors) are no part of a BERT with '
                        f'{model.encoder.num_layers} layers, as {config_file} describes it.')
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), params)
    for name, tensor in wanted.items():
        with np.errstate(over='ignore'):  # float64 beyond float32 is infinite there
            array = stored[name].read().astype(np.float32, copy=False)
        if not np.isfinite(array).all():
            raise UserError(f'{where}: {name} holds numbers that are not finite (NaN, infinite) in float32.')
        target = view(params, tensor, vocab_size)
        target[...] = (array.T if getattr(tensor, f'{form}_transposed') else array).reshape(target.shape)
    for kind in sorted({stored[name].dtype for name in wanted} - {'float32'}):
        lost = ', which keeps fewer digits' if kind == 'float64' else ''
        cli.note(f'weights are {kind} there; converted to float32{lost}.')
    return params, rest


def _others(core: str, names: Iterable[str]) -> str:
    """What the tensors of another model begin with."""
    found = sorted({re.split('[./]', name)[0] for name in names})
    return '' if core[:-1] in found else f'; what is there begins with {", ".join(found[:5]) or "nothing"}'


def _empty_params(model: ConfigDict, pooler: bool) -> Any:
    """A config's parameter tree of zeros that take no memory, with a pooler even where no target reads it."""
    batch = {name: np.zeros((1, 4), np.int32) for name in (
        'input_ids', 'input_mask', 'segment_ids', 'position_ids', 'masked_lm_positions')}
    batch |= {'cls_positions': np.zeros((1, 1), np.int32), 'is_real_example': np.ones(1, np.int32)}
    if 'multiple_choice' in model.targets:
        batch = {name: np.repeat(x, model.targets.multiple_choice.num_choices, 0) for name, x in batch.items()}
    module = models.build(model)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), batch, train=False))['params']
    if pooler and 'pooler' not in shapes:
        width = model.embeddings.hidden_size
        shapes['pooler'] = {'dense': {name: jax.ShapeDtypeStruct(shape, np.float32)
                                      for name, shape in (('kernel', (width, width)), ('bias', (width,)))}}
    return jax.tree.map(lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape), shapes)


def view(params: Any, tensor: Tensor, vocab_size: int) -> np.ndarray:
    """The part of a parameter tree that is `tensor`, to read or to write: padding of the vocabulary cut off."""
    *path, last = tensor.ours.split('/')
    part = {'query': 0, 'key': 1, 'value': 2}.get(path[-1])
    if part is not None:
        path[-1] = 'qkv'
    node = params
    for key in (*path, last):
        node = node[key]
    if tensor.layer is not None:
        node = node[tensor.layer]
    if part is not None:
        return node[..., part, :]                        # [D, H, K] or [H, K]
    return node[:vocab_size] if tensor.ours in ('embeddings/token', 'targets_mlm/bias') else node


def matrix(tensor: Tensor, array: np.ndarray, transposed: bool) -> np.ndarray:
    """One of our arrays as others keep it: at most two axes, [out, in] when transposed."""
    array = array.reshape(_flat_shape(tensor, array.shape))
    return np.ascontiguousarray(array.T if transposed else array)


def _flat_shape(tensor: Tensor, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Heads and head size as one axis: the output of a projection, the input of attention's last one."""
    if tensor.ours.endswith('kernel'):
        inputs = math.prod(shape[:-1]) if tensor.ours.endswith('attention/out/kernel') else shape[0]
        return inputs, math.prod(shape) // inputs
    return (math.prod(shape),) if tensor.ours.endswith('bias') else shape
