"""plan + example numbers -> batches of pre-training examples, as a pure function of (settings, step)."""

import dataclasses
import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from bert_jax.cli import UserError, choose
from bert_jax.data import draws, fields, masking, packing
from bert_jax.data import plan as plans
from bert_jax.data.store import Split
from bert_jax.data.tokenizer import Tokenizer

MIXTURE = 0x3A1F         # a stream of draws
EVALUATION_SEED = 0x5EED  # held-out pairs and masks are the same in every run


@dataclasses.dataclass(frozen=True)
class Examples:
    """The stream of training batches of one length: `batch(step)` is all there is to know of it.

    Attributes:
      split: the documents to draw from.
      tokenizer: the one that made them.
      seed: the run's seed.
      max_length: L.
      pairing: a PAIRINGS name.
      masking: a MASKINGS name.
      mask_rate: share of tokens predicted.
      replacement: shares of those that become [MASK] and a random token.
      short_rate: share of documents cut to a random shorter length.
      pack_lengths: 0: an example a row; n: rows of n * max_length tokens, filled with several.
    """

    split: Split
    tokenizer: Tokenizer
    seed: int
    max_length: int
    pairing: str
    masking: str
    mask_rate: float
    replacement: tuple[float, float]
    short_rate: float
    pack_lengths: int
    _cache: dict = dataclasses.field(default_factory=dict, repr=False, compare=False)
    _lock: threading.Lock = dataclasses.field(default_factory=threading.Lock, repr=False, compare=False)

    def plan(self, epoch: int) -> np.ndarray:
        """The epoch's table of examples."""
        return self._kept('plan', epoch, lambda: plans.plan(
            self.split, self.pairing, self.seed, epoch, self.max_length, self.short_rate))

    def rows(self, epoch: int) -> packing.Packing:
        """Which examples of the epoch's plan share a row, when they are packed."""
        plan = self.plan(epoch)
        return self._kept('rows', epoch, lambda: self._pack(plan, epoch))

    def _pack(self, plan: np.ndarray, epoch: int) -> packing.Packing:
        predictions = masking.num_predictions(np.arange(self.max_length + 1), self.max_length, self.mask_rate)
        key = int(draws.bits64(self.seed, epoch, self.max_length)[0])
        return packing.pack(plans.lengths(plan, self.pairing), predictions, self.row_length,
                            masking.max_predictions(self.row_length, self.mask_rate), key)

    def _kept(self, what: str, epoch: int, make: Callable[[], Any]) -> Any:
        """The first epoch's and the last one or two used stay in memory."""
        with self._lock:
            if (what, epoch) not in self._cache:
                for old in [key for key in self._cache if key[0] == what and key[1] not in (0, epoch - 1)]:
                    del self._cache[old]
                self._cache[what, epoch] = make()
            return self._cache[what, epoch]

    @property
    def row_length(self) -> int:
        """L of the arrays."""
        return self.max_length * max(1, self.pack_lengths)

    @functools.cached_property
    def epoch_size(self) -> int:
        """Rows an epoch: those of epoch 0, whatever the draws of a later one (within about 0.1 %)."""
        return len(self.rows(0) if self.pack_lengths else self.plan(0))

    def batch(self, step: int, batch_size: int, rows: slice | np.ndarray = slice(None), begin: int = 0
              ) -> dict[str, np.ndarray]:
        """The `rows` of the global batch of one step, counted from row `begin`; the same on any number of hosts."""
        return self.at(begin + step * batch_size + np.arange(batch_size)[rows])

    def at(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
        """Rows by their numbers in the whole stream, epoch after epoch."""
        epochs = numbers // self.epoch_size
        parts = [self.make(int(epoch), numbers[epochs == epoch] % self.epoch_size) for epoch in np.unique(epochs)]
        if len(parts) == 1:
            return parts[0]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def evaluation_batch(self, number: int, batch_size: int, limit: int) -> dict[str, np.ndarray]:
        """Batch `number` of the first `limit` examples, each once; the last is padded with weightless rows."""
        count = min(limit, self.epoch_size)
        numbers = number * batch_size + np.arange(batch_size)
        real = numbers < count
        return fields.emptied(self.make(0, np.where(real, numbers, 0)), real)

    def make(self, epoch: int, numbers: np.ndarray) -> dict[str, np.ndarray]:
        """Rows [len(numbers), L] of one epoch, masked, by their number in its plan."""
        if not self.pack_lengths:
            return self._masked(epoch, numbers % len(self.plan(epoch)))
        rows = self.rows(epoch)
        members, owners = rows.examples(numbers % len(rows))
        return packing.join(self._masked(epoch, members), owners, len(numbers), self.row_length,
                            masking.max_predictions(self.row_length, self.mask_rate), self.tokenizer.pad_id)

    def _masked(self, epoch: int, numbers: np.ndarray) -> dict[str, np.ndarray]:
        batch, candidates = unmasked(self.split.tokens, self.plan(epoch)[numbers], self.max_length, self.tokenizer)
        keys = draws.bits64(self.seed, epoch, self.max_length, numbers)
        return masking.mask(batch, candidates, keys, self.tokenizer, masking=self.masking,
                            mask_rate=self.mask_rate, replacement=self.replacement)


def unmasked(tokens: np.ndarray, rows: np.ndarray, length: int, tokenizer: Tokenizer
             ) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """[CLS] A [SEP] (B [SEP]) as arrays, and the places that may be masked (bool [B, L])."""
    width = len(rows)
    ids = np.full((width, length), tokenizer.pad_id, np.int32)
    columns = [rows[name].tolist() for name in ('a_start', 'a_length', 'b_start', 'b_length')]
    for row, a_start, a_length, b_start, b_length in zip(ids, *columns):
        row[1:1 + a_length] = tokens[a_start:a_start + a_length]
        if b_length:
            row[2 + a_length:2 + a_length + b_length] = tokens[b_start:b_start + b_length]
    first_sep = 1 + rows['a_length'].astype(np.int32)[:, None]         # [B, 1]
    b_length = rows['b_length'].astype(np.int32)[:, None]
    end = first_sep + 1 + b_length + (b_length > 0)
    every = np.arange(width)
    ids[:, 0] = tokenizer.cls_id
    ids[every, first_sep[:, 0]] = tokenizer.sep_id
    ids[every, end[:, 0] - 1] = tokenizer.sep_id
    place = np.arange(length, dtype=np.int32)
    real = place < end
    candidates = real & (place > 0) & (place != first_sep) & (place != end - 1)
    batch = {
        'input_ids': ids,
        'input_mask': real.astype(np.int32),
        'segment_ids': (real & (place > first_sep)).astype(np.int32),
        'position_ids': np.broadcast_to(place, ids.shape),
        'cls_positions': np.zeros((width, 1), np.int32),
        'next_sentence_labels': rows['label'].astype(np.int32)[:, None],
        'next_sentence_weights': (b_length > 0).astype(np.float32),
    }
    return batch, candidates


@dataclasses.dataclass(frozen=True)
class Mixture:
    """The rows of several streams of one length, so many of each in every block of rows, in a drawn order.

    Which stream a row comes from, and which of its rows it is, follow from the row's number alone; so a run resumes at
    any step.

    Attributes:
      streams: whose rows.
      weights: rows of each in a block of sum(weights).
      seed: the run's seed.
    """

    streams: tuple[Examples, ...]
    weights: tuple[int, ...]
    seed: int

    def batch(self, step: int, batch_size: int, rows: slice | np.ndarray = slice(None), begin: int = 0
              ) -> dict[str, np.ndarray]:
        """As Examples.batch."""
        return self.at(begin + step * batch_size + np.arange(batch_size)[rows])

    def at(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
        """Rows by their numbers in the whole stream."""
        source, number = self.origin(numbers)
        parts = {k: stream.at(number[source == k]) for k, stream in enumerate(self.streams) if (source == k).any()}
        order = np.argsort(np.concatenate([np.flatnonzero(source == k) for k in parts]))
        return {name: np.concatenate([part[name] for part in parts.values()])[order]
                for name in next(iter(parts.values()))}

    def origin(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(which stream, which row of it) for rows of the whole."""
        size = sum(self.weights)
        block, place = np.divmod(numbers, size)
        keys = draws.bits64(self.seed, MIXTURE, block[:, None], np.arange(size))           # [rows, block]
        order = np.repeat(np.arange(len(self.weights)), self.weights)[np.argsort(keys, axis=1, kind='stable')]
        source = order[np.arange(len(numbers)), place]
        earlier = (order == source[:, None]) & (np.arange(size) < place[:, None])          # of its own in its block
        return source, block * np.array(self.weights)[source] + earlier.sum(1)


Stream = Examples | Mixture


def mixed(splits: Sequence[Split], tokenizer: Tokenizer, seed: int, max_length: int, *, name: str,
          mixture: Sequence[int], **settings: Any) -> Stream:
    """The stream of one store's split, or of several.

    Args:
      splits: a side of each store.
      tokenizer: of the stores.
      seed, max_length: of the stream.
      name: an EXAMPLES name.
      mixture: rows of each split in a block; () for one of each.
      settings: of the stream.

    Raises:
      UserError: an unknown name or setting, weights that do not fit the stores.
    """
    make = choose('examples', EXAMPLES, name)
    streams = tuple(make(split, tokenizer, seed, max_length, **settings) for split in splits)
    weights = tuple(mixture) or (1,) * len(streams)
    if len(weights) != len(streams) or min(weights) < 1:
        raise UserError(f'--config.examples.mixture={tuple(mixture)}: a whole number of 1 or more for each of the '
                        f'{len(streams)} stores is expected.')
    return streams[0] if len(streams) == 1 else Mixture(streams, weights, seed)


def empty(batch_size: int, max_length: int, mask_rate: float, pack_lengths: int, **_: Any) -> dict[str, np.ndarray]:
    """Arrays of the names, shapes and types of a stream's batch, that need no text and no memory."""
    length = max_length * max(1, pack_lengths)
    widths = {'length': length, 'predictions': masking.max_predictions(length, mask_rate),
              'pairs': packing.slots(length) if pack_lengths else 1}
    return {name: np.broadcast_to(fields.full(name, ()), (batch_size, widths[field.axis]))
            for name, field in fields.FIELDS.items() if field.axis in widths}


EXAMPLES = {'documents': Examples}
