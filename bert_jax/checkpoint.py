"""Save, resume, restore: the only file that says orbax.

    workdir/checkpoints/00001000/params/...     the model's parameters
    workdir/checkpoints/00001000/rest/...       step and optimizer state
    workdir/checkpoints/00001000/manifest.json  SHA-256 of every file; written last

A step without a manifest is unfinished. Orbax restores flipped bytes without a word, so the manifest is
checked first; a damaged or unfinished step is reported, and the one before it is used.
"""

import concurrent.futures
import functools
import hashlib
import json
import logging
import sys
import warnings
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from bert_jax import cli, distributed, paths
from bert_jax.cli import UserError, last_line


@functools.cache  # once a process: the hook keeps the one before it
def _quiet_failures() -> None:
    """A write that fails is one line of ours.

    Orbax would log its traceback, and the others of that save, which fail a little later, would each report that
    nobody waits for them any more.
    """
    logging.getLogger('absl').setLevel(logging.CRITICAL)
    logging.getLogger('asyncio').setLevel(logging.CRITICAL)
    before = sys.unraisablehook
    sys.unraisablehook = lambda info: str(info.exc_value) == 'Event loop is closed' or before(info)


class Checkpoints:
    """The saved states of one run.

    Args:
      folder: where they are; may be gs://.
      keep: how many of the newest to keep.
      best: a score whose highest step is kept as well, e.g. 'dev/accuracy'.
    """

    def __init__(self, folder: epath.PathLike, keep: int = 3, best: str = '') -> None:
        self._folder, self._keep, self._best = paths.absolute(folder), keep, best
        self._orbax: ocp.AsyncCheckpointer | None = None
        self._finisher = concurrent.futures.ThreadPoolExecutor(1)
        self._saving: concurrent.futures.Future | None = None

    def save(self, step: int, state: Any, scores: dict[str, float] | None = None) -> None:
        """Saves a TrainState in the background; waits only for the save before it.

        Raises:
          UserError: that one failed (disk full, say); older checkpoints are untouched.
        """
        self.wait()
        folder = self._folder / f'{step:08d}'
        if jax.process_index() == 0 and folder.exists():  # left unfinished, or damaged, by an earlier run
            folder.rmtree()
        distributed.meet(f'save {step}')
        rest = {'step': state.step, 'opt_state': state.opt_state}
        if self._orbax is None:
            _quiet_failures()
            self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        try:
            self._orbax.save(folder, args=ocp.args.Composite(
                params=ocp.args.StandardSave(state.params), rest=ocp.args.StandardSave(rest)))
        except (OSError, ValueError, RuntimeError) as error:
            if distributed.others_are_gone(error):
                raise
            raise self._failed(folder, error) from error
        self._saving = self._finisher.submit(self._finish, folder, step, dict(scores or {}))

    def wait(self) -> None:
        """Returns when nothing is being saved."""
        saving, self._saving = self._saving, None
        if saving is not None:
            try:
                saving.result()
            except UserError:
                raise
            except Exception as error:  # tensorstore and orbax raise many kinds
                if distributed.others_are_gone(error):
                    raise
                raise self._failed(self._folder, error) from error
            distributed.meet('saved')  # the first process has written the manifest

    def _finish(self, folder: epath.Path, step: int, scores: dict[str, float]) -> None:
        self._orbax.wait_until_finished()
        if jax.process_index() == 0:
            _write_manifest(folder, step, scores, _hashes(folder))
            self._delete_old()

    def _failed(self, folder: epath.Path, error: Exception) -> UserError:
        steps = self.steps()
        last = f'the last good checkpoint is step {steps[-1]}' if steps else 'there is no good checkpoint before it'
        return UserError(f'{folder}: the checkpoint could not be saved ({last_line(error)}); '
                         f'{last}. Put that right (a full disk?) and give the same command again: it resumes.')

    def _delete_old(self) -> None:
        """What need not be kept; what was never finished, which is gigabytes too (nothing is being saved now)."""
        for folder in list(self._folder.iterdir()):
            if folder.name[:8].isdigit() and not (folder / 'manifest.json').exists():  # also *.orbax-checkpoint-tmp
                folder.rmtree()
        steps = self.steps()
        kept = set(steps[-self._keep:])
        if self._best:
            kept.add(self.best_step())
        for step in set(steps) - kept:
            _delete(self._folder / f'{step:08d}')

    def steps(self) -> list[int]:
        """Finished steps, oldest first."""
        return [step for step, finished in self._found() if finished]

    def _found(self) -> list[tuple[int, bool]]:
        if not self._folder.exists():
            return []
        return sorted((int(folder.name), (folder / 'manifest.json').exists())
                      for folder in self._folder.iterdir() if folder.name.isdigit())

    def scores(self, step: int) -> dict[str, float]:
        """What the last evaluation before the save found."""
        return (_read_manifest(self._folder / f'{step:08d}') or {'scores': {}})['scores']

    def best_step(self) -> int | None:
        """The finished step with the highest best-score; the earliest of equals."""
        return next(iter(self._ranked()), None)

    def best_whole(self) -> int | None:
        """The best step whose every file is as its manifest says; passes over others with a word."""
        return self._first_whole((step, True) for step in self._ranked())

    def _ranked(self) -> list[int]:
        scores = {step: self.scores(step) for step in self.steps()}
        steps = [step for step in scores if self._best in scores[step]]
        return sorted(steps, key=lambda step: (-scores[step][self._best], step))

    def resume(self, state: Any) -> Any:
        """The newest whole state, laid out as `state` is; `state` itself when there is none, or only parameters of it.

        Newer steps, which are damaged then, count as unfinished from here on.
        """
        step = self.newest_whole() if jax.process_index() == 0 else None
        if step is not None and not (self._folder / f'{step:08d}' / 'rest').exists():
            step = None
        for newer in self.steps() if jax.process_index() == 0 else ():
            if step is None or newer > step:
                (self._folder / f'{newer:08d}' / 'manifest.json').unlink()
        if jax.process_count() > 1:  # one reads and compares; all do as it says
            step = int(multihost_utils.broadcast_one_to_all(np.int32(-1 if step is None else step)))
            step = None if step < 0 else step
        if step is None:
            return state
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        params = self.restore(step, 'params', abstract.params)
        rest = self.restore(step, 'rest', {'step': abstract.step, 'opt_state': abstract.opt_state})
        return state.replace(params=params, **rest)

    def newest_whole(self) -> int | None:
        """The newest step whose every file is as its manifest says; passes over others with a word."""
        return self._first_whole(reversed(self._found()))

    def _first_whole(self, steps: Iterable[tuple[int, bool]]) -> int | None:
        for step, finished in steps:
            problem = self.problem(step) if finished else 'it was never finished'
            if not problem:
                return step
            cli.note(f'checkpoint {step} in {self._folder} is passed over: {problem}.')
        return None

    def problem(self, step: int) -> str:
        """What is wrong with a finished step, '' when nothing."""
        folder = self._folder / f'{step:08d}'
        manifest = _read_manifest(folder)
        if manifest is None:
            return 'manifest.json is damaged'
        found = _hashes(folder)
        for name, expected in sorted(manifest['files'].items()):
            if name not in found:
                return f'{name} is missing'
            if expected != found[name]:
                return f'{name} is damaged'
        return ''

    def keep_best_params(self) -> None:
        """Deletes what a finished run needs no more: every step but the best, and the best one's optimizer state."""
        if not any((self._folder / f'{step:08d}' / 'rest').exists() for step in self.steps()):
            return
        best = self.best_whole()
        for step in self.steps() if best is not None else ():
            folder = self._folder / f'{step:08d}'
            if step != best:
                _delete(folder)
            elif (folder / 'rest').exists():
                manifest = _read_manifest(folder)
                files = {name: sha for name, sha in manifest['files'].items() if not name.startswith('rest/')}
                _write_manifest(folder, step, manifest['scores'], files)  # from now on the rest is no part of it
                (folder / 'rest').rmtree()

    def restore(self, step: int, item: str, abstract: Any = None) -> Any:
        """One item ('params' or 'rest') of a step, as arrays on the shardings of `abstract`."""
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader, warnings.catch_warnings():
            warnings.simplefilter('ignore')  # "no sharding given": one device is what is meant then
            args = ocp.args.Composite(**{item: ocp.args.StandardRestore(abstract)})
            return reader.restore(self._folder / f'{step:08d}', args=args)[item]


def write_params(folder: epath.PathLike, params: Any, scores: dict[str, float]) -> None:
    """Writes parameters that come from elsewhere, and the scores known of them, as step 0 of a run's checkpoints.

    Raises:
      UserError: they could not be written.
    """
    step = paths.absolute(folder) / f'{0:08d}'
    _quiet_failures()
    try:
        with ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler()) as writer:
            writer.save(step, args=ocp.args.Composite(params=ocp.args.StandardSave(params)))
        _write_manifest(step, 0, scores, _hashes(step))
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f'{step}: could not be written ({last_line(error)[:200]}).') from error


def _delete(folder: epath.Path) -> None:
    (folder / 'manifest.json').unlink()  # from now on unfinished, whatever happens next
    folder.rmtree()


def _write_manifest(folder: epath.Path, step: int, scores: dict[str, float], files: dict[str, str]) -> None:
    content = {'step': step, 'scores': scores, 'files': files}
    paths.write_whole(folder / 'manifest.json', json.dumps(content | {'sha256': _seal(content)}, indent=1))


def _read_manifest(folder: epath.Path) -> dict[str, Any] | None:
    """A step's manifest; None when it is not as it was written."""
    try:
        content = json.loads((folder / 'manifest.json').read_text())
        return content if content.pop('sha256') == _seal(content) else None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _seal(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _hashes(folder: epath.Path) -> dict[str, str]:
    """SHA-256 of every file below a checkpoint but the manifest."""
    hashes = {}
    for path in sorted(_files(folder)):
        if path.name not in ('manifest.json', 'manifest.json.partial'):
            with path.open('rb') as content:
                hashes[str(path.relative_to(folder))] = hashlib.file_digest(content, 'sha256').hexdigest()
    return hashes


def _files(folder: epath.Path) -> list[epath.Path]:
    found = []
    for path in folder.iterdir():
        found += _files(path) if path.is_dir() else [path]
    return found


def load_params(workdir: epath.PathLike, best: str = '') -> tuple[Any, int, dict[str, float]]:
    """The parameters a workdir offers, their step and its scores: its best step by a score, else the newest.

    Of damaged steps it says so, and takes the next.

    Raises:
      UserError: no workdir, or no whole checkpoint in it.
    """
    checkpoints = Checkpoints(epath.Path(workdir) / 'checkpoints', best=best)
    step = checkpoints.best_whole() if best else None
    if step is None:
        step = checkpoints.newest_whole()
    if step is None:
        raise UserError(f'{workdir}: no finished checkpoint there.')
    return checkpoints.restore(step, 'params'), step, checkpoints.scores(step)
