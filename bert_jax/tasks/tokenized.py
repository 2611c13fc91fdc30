"""Labelled examples as ids, cut into batches of a few static lengths."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import numpy as np

from bert_jax.data import draws
from bert_jax.data.tokenizer import Tokenizer

GROUP = 32  # batches of one group are cut from examples sorted by length
ORDER, BATCH_ORDER = range(2)  # streams of draws
STEP = 8  # lengths are multiples of it
SHORTEST = 8  # of max_length: room for a pair with [CLS] and [SEP]s


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenized:
    """N examples of `group` rows each (a question's choices; else one), R = N * group rows.

    Attributes:
      ids: every row's [CLS] A [SEP] (B [SEP]), one after the other.
      starts: int64 [R + 1], where each row begins in `ids`.
      a_lengths: int64 [R], [CLS] A [SEP] of each row: where segment 1 begins.
      labels: name -> [R, ...]: what a row is to be; must hold 'is_real_example', 0 for a row that fills a group.
      token_labels: name -> int32 like `ids`; -1 beyond a row's end.
      owners: int64 [N], the row of the file that each example was made from (windows share theirs).
      pad_id: the id of padding.
      lengths: the static lengths, ascending; the last holds the longest row.
      group: rows an example.
      truncated: rows that lost tokens.
      notes: on what else was lost, in words.
    """

    ids: np.ndarray
    starts: np.ndarray
    a_lengths: np.ndarray
    labels: dict[str, np.ndarray]
    token_labels: dict[str, np.ndarray]
    owners: np.ndarray
    pad_id: int
    lengths: tuple[int, ...]
    group: int = 1
    truncated: int = 0
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.owners)

    @functools.cached_property
    def longest(self) -> np.ndarray:
        """int64 [N], tokens of each example's longest row."""
        return np.diff(self.starts).reshape(-1, self.group).max(1)

    @property
    def shapes(self) -> str:
        """The shapes of rows, for people."""
        return f'lengths {", ".join(map(str, self.lengths))}'

    def steps(self, batch_size: int) -> int:
        """Batches an epoch; the last may be padded."""
        return -(-len(self) // batch_size)

    def batch(self, step: int, batch_size: int, seed: int) -> dict[str, np.ndarray]:
        """Training batch `step`, a pure function: shuffled each epoch, examples of like length together."""
        epoch, number = divmod(step, self.steps(batch_size))
        order = self.epoch(epoch, batch_size, seed)
        return self.make(order[number * batch_size:(number + 1) * batch_size], batch_size)

    @functools.lru_cache(maxsize=2)  # noqa: B019 - a run holds one of these for its whole life
    def epoch(self, epoch: int, batch_size: int, seed: int) -> np.ndarray:
        """Numbers of all examples in the order of an epoch, batch after batch."""
        order = self.arrange(draws.permutation(len(self), seed, epoch, ORDER), batch_size)
        full = len(self) // batch_size
        batches = order[:full * batch_size].reshape(full, batch_size)
        batches = batches[draws.permutation(full, seed, epoch, BATCH_ORDER)]
        return np.concatenate([batches.ravel(), order[full * batch_size:]])

    def arrange(self, order: np.ndarray, batch_size: int) -> np.ndarray:
        """The same examples, those of like length together as far as they are not far apart."""
        groups = [order[i:i + GROUP * batch_size] for i in range(0, len(order), GROUP * batch_size)]
        return np.concatenate([group[np.argsort(self.longest[group], kind='stable')] for group in groups])

    def evaluation_batches(self, batch_size: int) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
        """(example numbers, batch): every example once, shortest first."""
        order = np.argsort(self.longest, kind='stable')
        for start in range(0, len(self), batch_size):
            examples = order[start:start + batch_size]
            yield examples, self.make(examples, batch_size)

    def make(self, examples: np.ndarray, batch_size: int) -> dict[str, np.ndarray]:
        """The examples as arrays [batch_size * group, L] of the smallest length that holds them.

        Filled up with rows of padding, whose is_real_example is 0.
        """
        rows = (examples[:, None] * self.group + np.arange(self.group)).ravel()
        sizes = self.starts[rows + 1] - self.starts[rows]
        length = next(length for length in self.lengths if length >= sizes.max())
        count, place = batch_size * self.group, np.arange(length, dtype=np.int32)
        fill = (0, count - len(rows))
        inside = place < sizes[:, None]                                              # [rows, L]
        at = np.where(inside, self.starts[rows][:, None] + place, 0)

        def tokens(flat: np.ndarray, empty: int) -> np.ndarray:
            return np.pad(np.where(inside, flat[at], empty).astype(np.int32), (fill, (0, 0)), constant_values=empty)

        def whole(values: np.ndarray) -> np.ndarray:
            return np.pad(values[rows], (fill, *[(0, 0)] * (values.ndim - 1)))

        return {
            'input_ids': tokens(self.ids, self.pad_id),
            'input_mask': np.pad(inside, (fill, (0, 0))).astype(np.int32),
            'segment_ids': np.pad(inside & (place >= self.a_lengths[rows][:, None]), (fill, (0, 0))).astype(np.int32),
            'position_ids': np.ascontiguousarray(np.broadcast_to(place, (count, length))),
            'cls_positions': np.zeros((count, 1), np.int32),
            **{name: tokens(values, -1) for name, values in self.token_labels.items()},
            **{name: whole(values) for name, values in self.labels.items()}}


def collect(rows: Sequence[tuple[list[int], int]], labels: dict[str, np.ndarray], *, pad_id: int,
            lengths: tuple[int, ...], token_labels: dict[str, np.ndarray] | None = None,
            owners: np.ndarray | None = None, group: int = 1, truncated: int = 0, notes: tuple[str, ...] = ()
            ) -> Tokenized:
    """A Tokenized of (ids, length of the first segment) of each row."""
    starts = np.concatenate([[0], np.cumsum([len(ids) for ids, _ in rows])]).astype(np.int64)
    ids = np.fromiter((i for ids, _ in rows for i in ids), np.int32, starts[-1])
    labels = {'is_real_example': np.ones(len(rows), np.int32)} | labels
    owners = np.arange(len(rows) // group) if owners is None else owners
    return Tokenized(ids, starts, np.array([a for _, a in rows], np.int64), labels, token_labels or {}, owners, pad_id,
                   lengths, group, truncated, notes)


def join(tokenizer: Tokenizer, a: Sequence[int], b: Sequence[int] | None, max_length: int
         ) -> tuple[tuple[list[int], int], bool]:
    """([CLS] A [SEP] (B [SEP]), length of the first segment), and whether tokens were lost.

    A pair that is too long loses tokens at the end of the longer text, as in run_classifier.py.
    """
    a, b, budget = list(a), None if b is None else list(b), max_length - (2 if b is None else 3)
    over = len(a) + len(b or ()) - budget
    while len(a) + len(b or ()) > budget:
        (a if b is None or len(a) > len(b) else b).pop()
    first = [tokenizer.cls_id, *a, tokenizer.sep_id]
    return (first + ([] if b is None else [*b, tokenizer.sep_id]), len(first)), over > 0


def choose_lengths(sizes: np.ndarray, max_length: int, count: int) -> tuple[int, ...]:
    """At most `count` static lengths for rows of these sizes, with the least padding, and max_length after them.

    A program is compiled for each length that occurs, so few are better than many. Exact, by dynamic programming
    over the multiples of 8.
    """
    steps = -(-np.minimum(sizes, max_length) // STEP)
    most = int(steps.max())
    rows = np.bincount(steps, minlength=most + 1).cumsum()                             # rows of at most that length
    best = {0: (0, ())}                                                                # length -> (cost, lengths)
    for _ in range(count):
        best = {end: min(((cost + end * int(rows[end] - rows[begin]), (*chosen, end))
                          for begin, (cost, chosen) in best.items() if begin < end), default=(np.inf, ()))
                for end in range(1, most + 1)} | {0: (0, ())}
        if best[most][0] < np.inf:
            result = best[most][1]
    lengths = tuple(min(STEP * end, max_length) for end in result)
    return lengths if lengths[-1] == max_length else (*lengths, max_length)
