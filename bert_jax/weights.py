"""A pre-trained model with all that belongs to it, and the names its arrays have elsewhere.

Hugging Face's names are those of transformers' modeling_bert.py; TF1's those of the original code
(google-research/bert: modeling.py, run_pretraining.py, run_classifier.py, run_squad.py).
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from bert_jax.cli import UserError
from bert_jax.data.tokenizer import Tokenizer
from bert_jax.model import model as models


@dataclasses.dataclass
class Pretrained:
    """A model as it travels between formats.

    Attributes:
      model: what `models.build` takes.
      params: the parameter tree, float32.
      tokenizer: the one its ids belong to.
      labels: class names, () without a classifier.
      about: for the model card: 'source', and where known 'step', 'scores', 'config'.
    """

    model: ConfigDict
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
HEADS = tuple(_HEADS)


def tensors(num_layers: int, heads: tuple[str, ...], pooler: bool) -> Iterator[Tensor]:
    """Every array of a BERT with these heads (targets), in the order of the network."""
    yield from _expand(_EMBEDDINGS)
    for layer in range(num_layers):
        yield from _expand(_LAYER, layer)
    if pooler:
        yield from _expand(_POOLER)
    for head in heads:
        yield from _expand(_HEADS[head])


POOLED = ('nsp', 'classification', 'multilabel', 'regression', 'multiple_choice')


def check_pooler(source: str, heads: tuple[str, ...], pooler: bool) -> None:
    """Refuses heads that read a pooler which is not there; zeros in its place would say the same of every text."""
    reading = [head for head in heads if head in POOLED]
    if reading and not pooler:
        raise UserError(f'{source}: its head for {", ".join(reading)} reads the pooler, which is missing.')


def check_finite(name: str, array: np.ndarray) -> None:
    """Refuses an array that holds NaN or infinity."""
    if not np.isfinite(array).all():
        raise UserError(f'{name} holds numbers that are not finite.')


def _expand(rows: tuple, layer: int | None = None) -> Iterator[Tensor]:
    for kind, ours, huggingface, tf1 in rows:
        if layer is not None:
            ours, huggingface = f'encoder/layers/{ours}', f'bert.encoder.layer.{layer}.{huggingface}'
            tf1 = f'bert/encoder/layer_{layer}/{tf1}'
        for our_end, their_end, tf1_end, huggingface_transposed, tf1_transposed in _PARTS[kind]:
            yield Tensor(ours + our_end, layer, huggingface + their_end,
                         None if tf1 is None else (tf1 + tf1_end).lstrip('/'), huggingface_transposed, tf1_transposed)


def model_config(found: dict[str, Any], sizes: dict[str, tuple[str, str]], activation: str, heads: tuple[str, ...],
                 num_classes: int, dropout_rate: float) -> ConfigDict:
    """What `models.build` takes, of a config of another format.

    Args:
      found: that config.
      sizes: its keys -> part and name of ours.
      activation: our name for it.
      heads, num_classes, dropout_rate: which heads there are, and what those of fine-tuning have.
    """
    model = ConfigDict({'embeddings': {'name': 'bert'}, 'encoder': {'name': 'transformer'}, 'targets': {},
                        'dtype': 'float32'})
    for theirs, (part, name) in sizes.items():
        model[part][name] = found[theirs]
    model.embeddings.dropout_rate = model.encoder.dropout_rate
    model.encoder.activation = activation
    model.encoder.layer_outputs = ()
    model.encoder.attention = 'auto'
    model.encoder.unroll = model.encoder.num_layers
    classes = {'num_classes': num_classes, 'dropout_rate': dropout_rate}
    options = {'mlm': {'vocab_size': model.embeddings.vocab_size, 'activation': activation},
               **dict.fromkeys(('classification', 'multilabel', 'tagging'), classes),
               'regression': {'dropout_rate': dropout_rate},
               'multiple_choice': {'num_choices': 2, 'dropout_rate': dropout_rate}}  # as many as a question has
    for head in heads:
        model.targets[head] = ConfigDict(options.get(head, {}) | {'weight': 1.0})
    return model


def of(model: Pretrained) -> list[Tensor]:
    """The arrays of a model that have names elsewhere."""
    heads = tuple(head for head in HEADS if head in model.model.targets)
    return list(tensors(model.model.encoder.num_layers, heads, 'pooler' in model.params))


def empty_params(model: ConfigDict, pooler: bool) -> Any:
    """A parameter tree of zeros for a config, with a pooler even where no target reads it."""
    batch = {name: np.zeros((1, 4), np.int32) for name in (
        'input_ids', 'input_mask', 'segment_ids', 'position_ids', 'masked_lm_positions')}
    batch |= {'cls_positions': np.zeros((1, 1), np.int32), 'is_real_example': np.ones(1, np.int32)}
    if 'multiple_choice' in model.targets:
        batch = {name: np.repeat(x, model.targets.multiple_choice.num_choices, 0) for name, x in batch.items()}
    module = models.build(model)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), batch, train=False))['params']
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    if pooler and 'pooler' not in params:
        width = model.embeddings.hidden_size
        params['pooler'] = {'dense': {'kernel': np.zeros((width, width), np.float32),
                                      'bias': np.zeros(width, np.float32)}}
    return params


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


def fill(params: Any, tensor: Tensor, array: np.ndarray, transposed: bool, vocab_size: int) -> tuple[int, ...] | None:
    """Writes an array of another format into our tree; when it does not fit, the shape it should have had."""
    target = view(params, tensor, vocab_size)
    expected = _flat_shape(tensor, target.shape)[::-1 if transposed else 1]
    if array.shape != expected:
        return expected
    target[...] = (array.T if transposed else array).reshape(target.shape)
    return None


def _flat_shape(tensor: Tensor, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Heads and head size as one axis: the output of a projection, the input of attention's last one."""
    if tensor.ours.endswith('kernel'):
        inputs = math.prod(shape[:-1]) if tensor.ours.endswith('attention/out/kernel') else shape[0]
        return inputs, math.prod(shape) // inputs
    return (math.prod(shape),) if tensor.ours.endswith('bias') else shape
