"""Where pre-trained models come from: a workdir, a Hugging Face folder or hub name, a TF1 folder."""

import os
import pathlib
import re
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from bert_jax import checkpoint, cli, paths, workdir
from bert_jax.cli import UserError
from bert_jax.data import tokenizer as tokenizers
from bert_jax.formats import huggingface, tf1, weights
from bert_jax.formats.weights import Pretrained

HUB_NAME = re.compile(r'[\w.-]+(/[\w.-]+)?')


def load(path: str | os.PathLike) -> Pretrained:
    """The model that `path` names; of a workdir its best step, if it has a best, else its newest.

    Raises:
      UserError: nothing of a known kind there, or what is there is damaged or not a BERT.
    """
    path = str(path)
    if (epath.Path(path) / 'sweep.json').exists():
        path = str(epath.Path(path) / 'runs' / _named(epath.Path(path) / 'sweep.json', 'chosen'))
    if paths.is_remote(epath.Path(path)) or (epath.Path(path) / 'checkpoints').exists():
        return _load_workdir(path)
    folder = pathlib.Path(path)
    if not folder.exists():
        if not HUB_NAME.fullmatch(path):
            raise UserError(f'{path}: no such folder.')
        folder = huggingface.download(path)
    reader = next((form for form in (huggingface, tf1) if form.is_folder(folder)), None)
    if reader is not None:
        return reader.read(folder)
    raise UserError(f'{path}: no model there; expected a workdir (config.json, checkpoints/), a Hugging Face folder '
                    '(config.json, model.safetensors) or a TF1 folder (bert_config.json, bert_model.ckpt.*).')


def _load_workdir(path: str) -> Pretrained:
    config = workdir.read_config(path)
    config.model.run.kernel = 'auto'  # a matter of the machine, not of the model
    tokenizer, entries = tokenizers.load(path), config.model.embeddings.vocab_size
    if tokenizer.vocab_size != entries:
        raise UserError(f'{path}: its tokenizer has {tokenizer.vocab_size} entries, but its embedding table {entries} '
                        '(vocab_size in config.json).')
    params, step, scores = checkpoint.load_params(path, best=_best(path, config))
    labels = epath.Path(path) / 'labels.json'
    names = paths.read_json(labels) if labels.exists() else []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f'{labels}: a list of names is expected.')
    for target in config.model.targets.values():
        if 'num_classes' in target:
            weights.check_labels(names, target.num_classes, str(labels))
    about = {'source': config.get('source', f'a bert_jax workdir, {epath.Path(path).name}'), 'step': step,
             'scores': scores, 'config': config.to_dict()}
    return Pretrained(config.model, params, tokenizer, tuple(names), about)


def _best(path: str, config: ConfigDict) -> str:
    """The score whose best checkpoint a fine-tuned workdir offers; '' for one that was pre-trained.

    Raises:
      UserError: best.json names a score that no checkpoint has.
    """
    file, saved = epath.Path(path) / 'best.json', checkpoint.Checkpoints(epath.Path(path) / 'checkpoints')
    steps = saved.steps()
    known = sorted({name for step in steps for name in saved.scores(step)})
    if not file.exists():
        if 'task' in config and len(steps) > 1:
            cli.note(f'{file} is missing, which names the score of the best checkpoint; the newest is taken.')
        return ''
    score = _named(file, 'score')
    if steps and score not in known:
        if known:
            raise UserError(f'{file}: no checkpoint there has the score {score!r}; they have {", ".join(known)}.')
        cli.note(f'{path}: no checkpoint there has scores yet; the newest is taken.')
    return score


def _named(file: epath.Path, key: str) -> str:
    """One name in a JSON file of ours."""
    content = paths.read_json(file)
    if not isinstance(content, dict) or not isinstance(content.get(key), str):
        raise UserError(f'{file}: damaged; an object with "{key}" is expected.')
    return content[key]


def check_segments(model: ConfigDict, rows: Iterable[Any]) -> None:
    """Refuses pairs of texts for a model that has no segment for the second; transformers ends in an index error.

    Args:
      model: its config.
      rows: what is to be read, each an `tokenized.Tokenized`.
    """
    if model.embeddings.num_segments < 2 and any((one.a_lengths < np.diff(one.starts)).any() for one in rows):
        raise UserError('Pairs of texts: this model has one segment (type_vocab_size 1 in its config), and none for '
                        'the second text; give it single texts, or take another model.')


def write_workdir(model: Pretrained, folder: pathlib.Path) -> None:
    """Writes a workdir to fine-tune from, predict with, or go on from; nothing is lost in it."""
    made = model.about.get('config', {})  # what predict needs of a fine-tuned one: its task and max_length
    config = ConfigDict({'model': model.config.to_dict(), 'source': model.about['source']} | {
        key: made[key] for key in ('task', 'max_length') if key in made})
    with workdir.opened(str(folder), config, model.tokenizer) as opened:
        if model.labels:
            paths.write_json(opened / 'labels.json', list(model.labels))
        leaves, tree = jax.tree.flatten(model.params)
        model.params = None
        for i, leaf in enumerate(leaves):  # one by one: NumPy's copy goes as JAX's comes
            leaves[i] = jax.device_put(leaf)
        checkpoint.write_params(opened / 'checkpoints', jax.tree.unflatten(tree, leaves), model.about.get('scores', {}))


def check_fits(model: ConfigDict, source: Pretrained, path: str) -> None:
    """Refuses a checkpoint of another architecture than the config's, with both values of all that differs.

    Raises:
      UserError: sizes, positions or activation differ.
    """
    different = [f'{part}.{key} is {source.config[part].get(key)!r} there, {model[part].get(key)!r} in the config'
                 for part in ('embeddings', 'encoder') for key in {**source.config[part], **model[part]}
                 if not key.endswith('dropout_rate') and source.config[part].get(key) != model[part].get(key)]
    if different:
        raise UserError(f'{path} is another architecture: {"; ".join(different)}. '
                        '--config.model.PART.KEY=VALUE changes the config.')


def longest_seen(source: Pretrained) -> int:
    """The tokens of the longest sequences that a pre-trained workdir's model was trained on; 0 where nobody says."""
    return max((length for _, length, _ in source.about.get('config', {}).get('phases', ())), default=0)


def size_in_bytes(model: Pretrained) -> int:
    """Of all parameters."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
