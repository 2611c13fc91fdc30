"""Fine-tuning tasks: files -> rows -> encoded examples -> batches.

A task is a function of its settings that reads the splits; TASKS names them.
"""

import csv
import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Iterator, Sequence

import numpy as np

from bert_jax.cli import UserError
from bert_jax.data import draws
from bert_jax.data.tokenizer import Tokenizer

BUCKETS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512)
GROUP = 32  # batches of one group are cut from examples sorted by length
ORDER, BATCH_ORDER = range(2)  # streams of draws


@dataclasses.dataclass(frozen=True)
class Row:
    """One example as text; `label` is None in a test split, `where` is its file and line."""

    text: str
    pair: str | None
    label: str | None
    where: str


@dataclasses.dataclass(frozen=True)
class TaskData:
    """The rows of each split ('train', 'dev', 'test'; test may be empty) and the label names."""

    splits: dict[str, list[Row]]
    labels: tuple[str, ...]


def classification(*, train_file: str, dev_file: str, test_file: str, text_column: str, text_pair_column: str,
                   label_column: str, labels: Sequence[str], dev_share: float) -> TaskData:
    """Sentences or pairs from CSV, TSV or JSON lines, with the user's own column names.

    Args:
      train_file, dev_file, test_file: paths; without dev_file a share of the training rows is cut off by
        a hash of their text; without test_file nothing is predicted but dev.
      text_column, text_pair_column, label_column: names; no pair column, no pairs.
      labels: the label names; empty: those of the training file, sorted.
      dev_share: how much becomes dev when there is no dev_file.

    Raises:
      UserError: a missing file or column, a row of another width, an unknown label (file and line).
    """
    if not train_file:
        raise UserError('--config.task.train_file=FILE is missing (.csv, .tsv or .jsonl).')
    read = functools.partial(_read, text=text_column, pair=text_pair_column)
    train = read(train_file, label=label_column)
    dev = read(dev_file, label=label_column) if dev_file else None
    if dev is None:
        train, dev = _cut_dev(train, dev_share)
    test = read(test_file, label='') if test_file else []
    return _checked({'train': train, 'dev': dev, 'test': test}, tuple(labels))


def glue(*, folder: str, text: str, pair: str, label: str, labels: tuple[str, ...]) -> TaskData:
    """A folder in GLUE's own TSV layout; the file for `test` may be missing."""
    if not folder:
        raise UserError('--config.task.folder=FOLDER is missing: the folder with train.tsv and dev.tsv.')
    splits = {}
    for split in ('train', 'dev', 'test'):
        file = os.path.join(folder, f'{split}.tsv')
        if split == 'test' and not os.path.exists(file):
            splits[split] = []
        else:
            splits[split] = _read(file, text, pair, '' if split == 'test' else label)
    return _checked(splits, labels)


def _read(file: str, text: str, pair: str, label: str) -> list[Row]:
    rows = []
    for where, record in read_table(file):
        for column in filter(None, (text, pair, label)):
            if column not in record:
                raise UserError(f'{where}: no column {column!r}; there are: {", ".join(record)}.')
        rows.append(Row(str(record[text]), str(record[pair]) if pair else None,
                        str(record[label]) if label else None, where))
    if not rows:
        raise UserError(f'{file}: no rows in it.')
    return rows


def read_table(file: str) -> Iterator[tuple[str, dict[str, str]]]:
    """(file:line, record) of each row of a .csv, .tsv or .jsonl file; in a .tsv quotes are only quotes."""
    try:
        with open(file, newline='', encoding='utf-8-sig') as lines:
            if file.endswith(('.jsonl', '.json')):
                yield from _json_rows(file, lines)
            else:
                yield from _separated_rows(file, lines)
    except OSError as error:
        raise UserError(f'{file}: {error.strerror}.') from error
    except UnicodeDecodeError as error:
        with open(file, 'rb') as content:
            line = content.read().count(b'\n', 0, error.start) + 1
        raise UserError(f'{file}:{line}: not valid UTF-8 ({error.reason}).') from error


def _json_rows(file: str, lines: Iterator[str]) -> Iterator[tuple[str, dict[str, str]]]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f'{file}:{number}: not JSON ({error.msg}).') from error
            if not isinstance(record, dict):
                raise UserError(f'{file}:{number}: a JSON object a line is expected.')
            yield f'{file}:{number}', record


def _separated_rows(file: str, lines: Iterator[str]) -> Iterator[tuple[str, dict[str, str]]]:
    if file.endswith('.csv'):
        reader = csv.reader(lines, strict=True)
    else:
        reader = csv.reader(lines, delimiter='\t', quoting=csv.QUOTE_NONE)
    header = None
    try:
        for row in reader:
            if header is None:
                header = row
            elif row:
                if len(row) != len(header):
                    raise UserError(f'{file}:{reader.line_num}: {len(row)} columns where the header has '
                                    f'{len(header)} ({", ".join(header)}).')
                yield f'{file}:{reader.line_num}', dict(zip(header, row))
    except csv.Error as error:
        raise UserError(f'{file}:{reader.line_num}: not readable as CSV ({error}).') from error


def _cut_dev(rows: list[Row], share: float) -> tuple[list[Row], list[Row]]:
    """By a hash of the text: equal texts fall on one side, whatever the order of the file."""
    def is_dev(row: Row) -> bool:
        digest = hashlib.blake2b(f'{row.text}\0{row.pair}'.encode(), digest_size=8).digest()
        return int.from_bytes(digest, 'little') < share * 2**64

    train, dev = [row for row in rows if not is_dev(row)], [row for row in rows if is_dev(row)]
    if not train or not dev:
        raise UserError(f'{rows[0].where.rpartition(":")[0]}: {len(rows)} rows are too few to cut a dev split of '
                        f'{share:g} from; give --config.task.dev_file.')
    return train, dev


def _checked(splits: dict[str, list[Row]], labels: tuple[str, ...]) -> TaskData:
    labels = labels or tuple(sorted({row.label for row in splits['train']}))
    if len(labels) < 2:
        raise UserError(f'{splits["train"][0].where.rpartition(":")[0]}: only one label, {labels[0]!r}.')
    for row in splits['train'] + splits['dev']:
        if row.label not in labels:
            raise UserError(f'{row.where}: label {row.label!r} is not in the label set: {", ".join(labels)}.')
    return TaskData(splits, labels)


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedRows:
    """Rows as ids, ready to be cut into batches of static lengths.

    Attributes:
      ids: every row's [CLS] A [SEP] (B [SEP]), one after the other.
      starts: int64 [N + 1], where each row begins in `ids`.
      a_lengths: int64 [N], [CLS] A [SEP] of each row: where segment 1 begins.
      label_ids: int32 [N], -1 for none.
      truncated: rows that were longer than the model's window.
      pad_id: the id of padding.
      max_length: the longest bucket.
    """

    ids: np.ndarray
    starts: np.ndarray
    a_lengths: np.ndarray
    label_ids: np.ndarray
    truncated: int
    pad_id: int
    max_length: int

    def __len__(self) -> int:
        return len(self.label_ids)

    def steps(self, batch_size: int) -> int:
        """Batches an epoch; the last may be padded."""
        return -(-len(self) // batch_size)

    def batch(self, step: int, batch_size: int, seed: int) -> dict[str, np.ndarray]:
        """Training batch `step`, a pure function: shuffled each epoch, rows of like length together."""
        epoch, number = divmod(step, self.steps(batch_size))
        order = self._epoch(epoch, batch_size, seed)
        return self.make(order[number * batch_size:(number + 1) * batch_size], batch_size)

    @functools.lru_cache(maxsize=2)  # noqa: B019 - a run holds one of these for its whole life
    def _epoch(self, epoch: int, batch_size: int, seed: int) -> np.ndarray:
        order = draws.permutation(len(self), seed, epoch, ORDER)
        lengths = np.diff(self.starts)
        groups = [order[i:i + GROUP * batch_size] for i in range(0, len(order), GROUP * batch_size)]
        order = np.concatenate([group[np.argsort(lengths[group], kind='stable')] for group in groups])
        full = len(self) // batch_size
        batches = order[:full * batch_size].reshape(full, batch_size)
        batches = batches[draws.permutation(full, seed, epoch, BATCH_ORDER)]
        return np.concatenate([batches.ravel(), order[full * batch_size:]])

    def evaluation_batches(self, batch_size: int) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
        """(row numbers, batch): every row once, shortest first."""
        order = np.argsort(np.diff(self.starts), kind='stable')
        for start in range(0, len(self), batch_size):
            rows = order[start:start + batch_size]
            yield rows, self.make(rows, batch_size)

    def make(self, rows: np.ndarray, batch_size: int) -> dict[str, np.ndarray]:
        """The rows as arrays of the smallest bucket that holds them, filled up with weightless rows."""
        lengths = (self.starts[rows + 1] - self.starts[rows])
        length = bucket(int(lengths.max()), self.max_length)
        ids = np.full((batch_size, length), self.pad_id, np.int32)
        for row, start, size in zip(ids, self.starts[rows].tolist(), lengths.tolist()):
            row[:size] = self.ids[start:start + size]
        fill = (0, batch_size - len(rows))
        place = np.arange(length, dtype=np.int32)
        lengths = np.pad(lengths, fill)[:, None]
        a_lengths = np.pad(self.a_lengths[rows], fill)[:, None]
        return {
            'input_ids': ids,
            'input_mask': (place < lengths).astype(np.int32),
            'segment_ids': ((place >= a_lengths) & (place < lengths)).astype(np.int32),
            'position_ids': np.ascontiguousarray(np.broadcast_to(place, ids.shape)),
            'cls_positions': np.zeros((batch_size, 1), np.int32),
            'label_ids': np.pad(np.maximum(self.label_ids[rows], 0), fill).astype(np.int32),
            'is_real_example': np.pad(np.ones(len(rows), np.int32), fill),
        }


def bucket(length: int, max_length: int) -> int:
    """The smallest static length that holds `length`."""
    return min([size for size in BUCKETS if size >= length] + [max_length])


def encode(rows: Sequence[Row], labels: Sequence[str], tokenizer: Tokenizer, max_length: int) -> EncodedRows:
    """Tokenizes rows; too long ones lose tokens at the end of the longer text, as in run_classifier.py."""
    ids_of = {label: i for i, label in enumerate(labels)}
    a_ids, a_lengths = tokenizer.encode_batch([row.text for row in rows])
    b_ids, b_lengths = tokenizer.encode_batch([row.pair or '' for row in rows])
    a_starts, b_starts = np.cumsum(a_lengths) - a_lengths, np.cumsum(b_lengths) - b_lengths
    pieces, kept_a, sizes, truncated = [], [], [], 0
    for row, a_start, a, b_start, b in zip(rows, a_starts, a_lengths, b_starts, b_lengths):
        budget = max_length - (2 if row.pair is None else 3)
        truncated += a + b > budget
        while a + b > budget:
            a, b = (a - 1, b) if a > b else (a, b - 1)
        one = [tokenizer.cls_id, *a_ids[a_start:a_start + a].tolist(), tokenizer.sep_id]
        kept_a.append(len(one))
        if row.pair is not None:
            one += [*b_ids[b_start:b_start + b].tolist(), tokenizer.sep_id]
        sizes.append(len(one))
        pieces += one
    return EncodedRows(
        ids=np.array(pieces, np.int32), starts=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
        a_lengths=np.array(kept_a, np.int64),
        label_ids=np.array([-1 if row.label is None else ids_of[row.label] for row in rows], np.int32),
        truncated=int(truncated), pad_id=tokenizer.pad_id, max_length=max_length)


TASKS = {
    'classification': classification,
    'sst2': functools.partial(glue, text='sentence', pair='', label='label', labels=('0', '1')),
    'mrpc': functools.partial(glue, text='#1 String', pair='#2 String', label='Quality', labels=('0', '1')),
}
