"""The folder of a run: enough, alone, to resume it, to fine-tune from it, or to predict with it.

    config.json       the whole config          checkpoints/   parameters and optimizer state
    environment.json  command, versions         log.jsonl      results, nothing that depends on the clock
    tokenizer/        its own files             rates.jsonl    speeds
    labels.json       class names, if any       tensorboard/, results.json, curves.png
    best.json         fine-tuned: the score that chooses; predictions_*, confusion.png, submission/
"""

import json
import platform
import sys
from importlib import metadata
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from bert_jax import distributed, paths
from bert_jax.cli import UserError
from bert_jax.data import tokenizer as tokenizers

# Where and how a run is computed, not what: these may change when it goes on.
MACHINE = ('store', 'mesh', 'pipeline', 'accumulation', 'eval_batch_size', 'remat', 'model.encoder.unroll',
           'model.encoder.remat', 'model.encoder.attention')
PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy', 'tokenizers', 'sentencepiece')


def start(path: str, config: ConfigDict, tokenizer: tokenizers.Tokenizer) -> epath.Path:
    """Opens a workdir: writes what describes the run, or checks that the run there is this one.

    Raises:
      UserError: the folder holds a run with another config (the keys that differ are named) or tokenizer; it is
        another folder on other hosts.
    """
    workdir = epath.Path(path)
    described = describe(config)
    if (workdir / 'config.json').exists():
        found = paths.read_json(workdir / 'config.json')
        must_agree(workdir, found, described)
        if tokenizers.load(workdir).hash != tokenizer.hash:
            raise UserError(f'{workdir}: its tokenizer is not the one of the data.')
    elif jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        tokenizer.save(workdir / 'tokenizer')
        paths.write_json(workdir / 'environment.json', {
            'command': sys.argv, 'python': platform.python_version(), 'devices': str(jax.devices()),
            'packages': {name: metadata.version(name) for name in PACKAGES}})
        paths.write_json(workdir / 'config.json', described)
    distributed.meet('workdir')
    seen = (workdir / 'config.json').exists()
    distributed.agree({'the workdir (one folder for all: gs:// or a shared disk)': 'there' if seen else 'empty'})
    return workdir


def describe(config: ConfigDict) -> dict[str, Any]:
    """A config as config.json holds it."""
    return json.loads(json.dumps(config.to_dict()))


def must_agree(workdir: epath.Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Refuses to go on with a run of another config; names the keys that differ."""
    there, here = flat(found), flat(wanted)
    keys = sorted((there.keys() | here.keys()) - set(MACHINE))
    different = [f'{key} ({there.get(key)!r} there, {here.get(key)!r} now)' for key in keys
                 if there.get(key) != here.get(key)]
    if different:
        raise UserError(f'{workdir} holds a run of another config; these keys differ: {", ".join(different)}. '
                        'Give the same config to resume it, or another --workdir.')


def read_config(path: str) -> ConfigDict:
    """The config of the run in a workdir."""
    file = epath.Path(path) / 'config.json'
    if not file.exists():
        raise UserError(f'{path}: not a workdir (no config.json in it).')
    return ConfigDict(paths.read_json(file))


def flat(described: dict[str, Any], prefix: str = '') -> dict[str, Any]:
    """The values of a nested dict by the names that overrides have: 'model.encoder.num_layers'."""
    found = {}
    for key, value in described.items():
        found |= flat(value, f'{prefix}{key}.') if isinstance(value, dict) else {f'{prefix}{key}': value}
    return found
