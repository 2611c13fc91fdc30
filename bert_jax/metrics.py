"""Means that merge exactly, and the writer of logs."""

import importlib
import json
import os
import re
import socket
import struct
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

from bert_jax import cli, paths
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


def cross_entropy(logits: jax.Array, labels: jax.Array, weights: jax.Array) -> dict[str, Mean]:
    """Cross-entropy in nats and accuracy; logits [..., C], labels and weights [...]."""
    right = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    best = jnp.max(logits, axis=-1)
    nll = jax.nn.logsumexp(logits, axis=-1) - right
    return {'loss': Mean.of(nll, weights), 'accuracy': Mean.of(right >= best, weights)}


def flat(losses: Mapping[str, Mapping[str, Mean]]) -> dict[str, Mean]:
    """{'target/term': mean}."""
    return {f'{name}/{term}': mean for name, terms in losses.items() for term, mean in terms.items()}


def merge(means: list[dict[str, Mean]]) -> dict[str, float]:
    """The values of a list of metric dicts (already on the host), summed in float64."""
    merged = {}
    for name in means[0]:
        total = np.sum([np.float64(m[name].total) for m in means])
        count = np.sum([np.float64(m[name].count) for m in means])
        merged[name] = float(total / count) if count else float('nan')
    return merged


class Board:
    """Scalars as TensorBoard reads them, written where they are made: no thread, whose death could block a run.

    What cannot be written is dropped with a note: a board is a picture of the run, not a part of it.
    """

    def __init__(self, folder: epath.Path, step: int) -> None:
        self._protos = [_tensorboardx(f'proto.{name}_pb2') for name in ('event', 'summary')]
        self._file = folder / f'events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}'
        self._pending, self._failed = b'', False
        event = self._protos[0]
        self._add(file_version='brain.Event:2')
        self._add(step=step + 1, session_log=event.SessionLog(status=event.SessionLog.START))  # what was after is void

    def add(self, step: int, values: Mapping[str, Any]) -> None:
        """One record's numbers."""
        summary = self._protos[1].Summary
        numbers = {name: value for name, value in values.items() if isinstance(value, (int, float))}
        self._add(step=step, summary=summary(value=[
            summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]))

    def _add(self, **contents: Any) -> None:
        record = self._protos[0].Event(wall_time=time.time(), **contents).SerializeToString()
        size = struct.pack('<Q', len(record))
        for part in (size, record):
            self._pending += part + struct.pack('<I', paths.masked_crc(part))

    def flush(self) -> None:
        """Writes what is not written yet."""
        if self._failed or not self._pending:
            return
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            paths.append(self._file, self._pending)
        except (UserError, OSError) as error:
            self._failed = True
            cli.note(f'{self._file.parent}: TensorBoard files are not written any more ({cli.first_line(error)}).')
        self._pending = b''


def _tensorboardx(module: str) -> types.ModuleType:
    """A module of the library, without the torch that it would import for nothing, which takes six seconds."""
    hidden = sys.modules.setdefault('torch', None) is None
    try:
        return importlib.import_module(f'tensorboardX.{module}')
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
        self._board = Board(workdir / 'tensorboard', step)

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
        self._board.add(step, values)
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


SCORES = re.compile(r'loss|accuracy|matthews|spearman|exact|f1(?!\[)')  # but those of single classes
SPEEDS = {'padding': 'padding {:.1%}', 'tokens_per_second': '{:,.0f} tokens/s', 'mfu': 'MFU {:.1%}'}


def describe(values: Mapping[str, float]) -> str:
    """Metrics in a line for people."""
    shown = [f'{name} {value:.4f}' for name, value in values.items() if SCORES.search(name)]
    shown += [form.format(values[name]) for name, form in SPEEDS.items() if name in values]
    return ', '.join(shown)
