"""The folder of a run: enough, alone, to resume it, to fine-tune from it, or to predict with it.

    config.json       the whole config          checkpoints/   parameters and optimizer state
    environment.json  command, versions         log.jsonl      results, nothing that depends on the clock
    tokenizer/        its own files             rates.jsonl    speeds
    labels.json       class names, if any       tensorboard/, results.json, curves.png
    best.json         fine-tuned: the score that chooses; predictions_*, confusion.png, submission/
    lock.json         whose it is, while a process works in it
"""

import contextlib
import hashlib
import json
import pathlib
import platform
import sys
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from bert_jax import checkpoint, cli, distributed, lock, paths, renamed
from bert_jax.cli import UserError
from bert_jax.data import tokenizer as tokenizers

# Where and how a run is computed, not what: these may change when it resumes.
MACHINE = ('store', 'mesh', 'pipeline', 'accumulation', 'eval_batch_size', 'remat', 'model.run.unroll',
           'model.run.remat', 'model.run.kernel')
TEST_ONLY = ('task.test_file', 'model.targets.multiple_choice.num_choices')  # of what is predicted, not learned
FILES = ('task.train_file', 'task.dev_file', 'task.dev_share', 'task.folder')  # hashes say what is in them
ADDED = ('data', 'keep_head', 'task.sentence_column')  # workdirs of older versions say nothing of these
PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy', 'tokenizers', 'sentencepiece')
SWEEP = {'runs', 'sweep.json', 'sweep.tsv', 'sweep.png', paths.LOCK}  # what a sweep's folder holds


@contextlib.contextmanager
def opened(path: str, config: ConfigDict, tokenizer: tokenizers.Tokenizer) -> Iterator[epath.Path]:
    """A workdir that is this run's alone until the end of the block; the run there is the one that `config` describes.

    Where nothing has been trained yet it is begun anew, whatever it was begun with: a setting that turned out wrong can
    be put right.

    Raises:
      UserError: a folder that is none of ours; one that another process works in; a run of another config, on other
        data (what differs is named) or with another tokenizer; another folder on other hosts.
    """
    check(path)
    workdir = epath.Path(path)
    with _held(workdir):
        described, begun = describe(config), bool(checkpoint.Checkpoints(workdir / 'checkpoints').steps())
        if begun:
            must_agree(workdir, renamed.current(paths.read_json(workdir / 'config.json')), described)
            if tokenizers.load(workdir).hash != tokenizer.hash:
                raise UserError(f'{workdir}: its tokenizer is not the one of the data.')
        if jax.process_index() == 0:
            workdir.mkdir(parents=True, exist_ok=True)
            paths.write_json(workdir / 'config.json', described)  # first: from now on the folder is a workdir
            if not begun:
                tokenizer.save(workdir / 'tokenizer')
                paths.write_json(workdir / 'environment.json', {
                    'command': sys.argv, 'python': platform.python_version(), 'devices': str(jax.devices()),
                    'packages': {name: metadata.version(name) for name in PACKAGES}})
        distributed.meet('workdir')
        seen = (workdir / 'config.json').exists()
        distributed.agree({'the workdir (one folder for all: gs:// or a shared disk)': 'there' if seen else 'empty'})
        yield workdir


def check(path: str) -> None:
    """Refuses a folder that holds something but no run, and one that has no name."""
    paths.refuse_empty(path, '--workdir')
    folder = epath.Path(path)
    if not paths.is_free(folder) and not is_workdir(folder):
        raise UserError(f'{path}: not an empty folder, and not a workdir (no config.json of a run in it); give another '
                        '--workdir.')


def is_workdir(folder: epath.Path) -> bool:
    """Whether a run has begun there."""
    file = folder / 'config.json'
    if not file.exists():
        return False
    content = paths.read_json(file)
    return isinstance(content, dict) and isinstance(content.get('model'), dict)


@contextlib.contextmanager
def opened_sweep(path: str) -> Iterator[epath.Path]:
    """The folder of a sweep, this process's alone until the end of the block.

    Raises:
      UserError: it holds something else, or another process works in it.
    """
    paths.refuse_empty(path, '--workdir')
    folder = epath.Path(path)
    others = sorted(one.name for one in folder.iterdir() if one.name not in SWEEP) if folder.exists() else []
    if others:
        raise UserError(f'{path}: not an empty folder, and not a sweep ({", ".join(others[:5])}); give '
                        'another --workdir.')
    with lock.hold(folder):
        yield folder


@contextlib.contextmanager
def _held(workdir: epath.Path) -> Iterator[None]:
    """The lock, which the first of many processes holds; all raise the same error when it cannot be had."""
    with contextlib.ExitStack() as stack:
        said = 'free'
        if jax.process_index() == 0:
            try:
                stack.enter_context(lock.hold(workdir))
            except UserError as error:
                if jax.process_count() == 1:
                    raise
                said = str(error)
        distributed.agree({'the lock of the workdir': said if jax.process_index() == 0 else 'free'})
        yield


def describe(config: ConfigDict) -> dict[str, Any]:
    """A config as config.json holds it."""
    return json.loads(json.dumps(config.to_dict()))


def must_agree(workdir: epath.Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Refuses to go on with a run of another config or on other data; names what differs."""
    there, here = flat(found), flat(wanted)
    if 'data.train' in here.keys() - there.keys():
        cli.note(f'{workdir}: begun by an older version, which says nothing of its data; what is given now counts.')
    free = {*MACHINE, *TEST_ONLY, *(FILES if 'data.train' in there else ())}
    free |= {key for key in here.keys() - there.keys() if key.startswith(ADDED)}
    keys = sorted((there.keys() | here.keys()) - free)
    different = {key: f'{key} ({there.get(key)!r} there, {here.get(key)!r} now)' for key in keys
                 if there.get(key) != here.get(key)}
    if not different:
        return
    if all(key.startswith('data.') for key in different):
        raise UserError(f'{workdir} holds a run on other data; what differs: {", ".join(different.values())}. Give the '
                        'data that it was begun with to resume it, or another --workdir.')
    raise UserError(f'{workdir} holds a run of another config; these keys differ: {", ".join(different.values())}. '
                    'Give the same config to resume it, or another --workdir.')


def read_config(path: str) -> ConfigDict:
    """The config of the run in a workdir."""
    file = epath.Path(path) / 'config.json'
    if not file.exists():
        raise UserError(f'{path}: not a workdir (no config.json in it).')
    return ConfigDict(renamed.current(paths.read_json(file)))


def flat(described: dict[str, Any], prefix: str = '') -> dict[str, Any]:
    """The values of a nested dict by the names that overrides have: 'model.encoder.num_layers'."""
    found = {}
    for key, value in described.items():
        found |= flat(value, f'{prefix}{key}.') if isinstance(value, dict) else {f'{prefix}{key}': value}
    return found


def code_version() -> str:
    """A hash of the package's own source, and JAX's version."""
    files = sorted(pathlib.Path(__file__).parent.rglob('*.py'))
    source = hashlib.sha256(b''.join(file.read_bytes() for file in files)).hexdigest()
    return f'{source[:12]} with jax {jax.__version__}'
