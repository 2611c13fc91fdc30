"""Means that merge exactly, and the writer of logs."""

import importlib
import json
import sys
import time
import types
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from bert_jax import paths
from bert_jax.cli import UserError

REMOTE_SECONDS = 60  # between two writes of a log to gs://


@flax.struct.dataclass
class Mean:
    """A mean as its sum and its count, so that devices, micro-batches and steps merge exactly."""

    total: jax.Array
    count: jax.Array

    @classmethod
    def of(cls, values: jax.Array, weights: jax.Array) -> 'Mean':
        """The weighted mean of values, both of one shape."""
        weights = weights.astype(jnp.float32)
        return cls(jnp.sum(values.astype(jnp.float32) * weights), jnp.sum(weights))


def merge(means: list[dict[str, Mean]]) -> dict[str, float]:
    """The values of a list of metric dicts (already on the host), summed in float64."""
    merged = {}
    for name in means[0]:
        total = np.sum([np.float64(m[name].total) for m in means])
        count = np.sum([np.float64(m[name].count) for m in means])
        merged[name] = float(total / count) if count else float('nan')
    return merged


def _tensorboardx() -> types.ModuleType:
    """The library, without the torch that it would import for nothing: six seconds where it is installed."""
    hidden = sys.modules.setdefault('torch', None) is None
    try:
        return importlib.import_module('tensorboardX')
    finally:
        if hidden:
            del sys.modules['torch']


class Writer:
    """Writes each record to `log.jsonl` and to TensorBoard files; rates go to `rates.jsonl`.

    `log.jsonl` holds nothing that depends on the clock, so two runs with equal numbers have equal logs. Of many
    processes the first alone writes. On gs://, where a file is written anew for each line, it does so once a minute.
    """

    def __init__(self, workdir: epath.Path, step: int) -> None:
        self._board = None
        if jax.process_index():
            return
        self._files = {name: workdir / f'{name}.jsonl' for name in ('log', 'rates')}
        self._pending = dict.fromkeys(self._files, '')
        self._seconds, self._flushed = REMOTE_SECONDS if paths.is_remote(workdir) else 0, time.monotonic()
        for file in self._files.values():
            cut_back(file, step)
        try:
            self._board = _tensorboardx().SummaryWriter(str(workdir / 'tensorboard'), purge_step=step + 1)
        except ImportError as error:  # gs:// needs google-cloud-storage
            raise UserError(f'{workdir}: {error}') from error

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """One record of results."""
        self._append('log', step, values)

    def write_rates(self, step: int, values: Mapping[str, Any]) -> None:
        """One record of speeds, kept apart since no two runs agree on them."""
        self._append('rates', step, values)

    def _append(self, name: str, step: int, values: Mapping[str, Any]) -> None:
        if self._board is None:
            return
        self._pending[name] += json.dumps({'step': step, **values}) + '\n'
        for key, value in values.items():
            if isinstance(value, (int, float)):
                self._board.add_scalar(key, value, step)
        if time.monotonic() - self._flushed >= self._seconds:
            self.flush()

    def flush(self) -> None:
        """Writes what is not written yet: before a checkpoint is saved, after which it would not come again."""
        if self._board is None:
            return
        for name, text in self._pending.items():
            if text:
                paths.append(self._files[name], text)
                self._pending[name] = ''
        self._board.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        """Ends the files."""
        self.flush()
        if self._board is not None:
            self._board.close()


def cut_back(file: epath.Path, step: int) -> None:
    """Drops records after `step`, and a last line that was cut short."""
    if not file.exists():
        return
    kept = []
    for line in file.read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break
        if record['step'] <= step:
            kept.append(line + '\n')
    paths.write_whole(file, ''.join(kept))


def read_log(file: epath.Path) -> list[dict[str, Any]]:
    """The records of a log."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
