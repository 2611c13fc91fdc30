"""Labelled examples as batches without padding: several short ones share a row, as in pre-training (see packing.py).

The examples are dealt out like cards, so that every batch has about as many tokens as every other: one shape, and one
compiled program, holds them all, and the rows are full.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import numpy as np

from bert_jax.data import packing
from bert_jax.tasks.tokenized import GROUP, STEP, Tokenized

SEAT = 4     # tokens of a row for each example that may sit in it
SAMPLE = 64  # batches, those with the most tokens, by which the length of rows is chosen
ATTENTION = 6 * 768  # tokens in a row at which attention costs as much as all else, in BERT-base


@dataclasses.dataclass(frozen=True, eq=False)
class Packed(Tokenized):
    """Examples of which several share a row; their labels and outputs are [rows * seats, ...], most of them empty.

    Attributes:
      row_length: L of the rows.
      multiple: of what the number of rows is a multiple (the devices, say).
    """

    row_length: int = 0
    multiple: int = 1

    @functools.cached_property
    def sizes(self) -> np.ndarray:
        """int64 [N], tokens of each example's rows together."""
        return np.diff(self.starts).reshape(-1, self.group).sum(1)

    @property
    def shapes(self) -> str:
        """The shape of rows, for people."""
        return f'several in a row of {self.row_length}'

    @property
    def seats(self) -> int:
        """The most examples in a row."""
        return max(1, self.row_length // SEAT // self.group)

    def arrange(self, order: np.ndarray, batch_size: int) -> np.ndarray:
        """The same examples dealt out, so that whole batches have about as many tokens each.

        A hand is as many examples of like length as there are batches: one for each. The shorter ones are dealt as they
        come; of the long ones a batch that has few tokens gets the longest.
        """
        whole = len(order) // batch_size * batch_size
        if not whole:  # one batch holds them all
            return order
        hands = order[np.sort(np.argsort(-self.sizes[order[:whole]], kind='stable').reshape(batch_size, -1))]
        balancing = batch_size // 4
        total = self.sizes[hands[balancing:]].sum(0)
        for hand in hands[:balancing]:
            hand[np.argsort(total, kind='stable')] = hand[np.argsort(-self.sizes[hand], kind='stable')]
            total += self.sizes[hand]
        return np.concatenate([hands.T.ravel(), order[whole:]])

    def evaluation_batches(self, batch_size: int) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
        """(the example at each place of the outputs, -1 for none; batch): every example once, all batches of one shape.

        Rows are filled from many batches' examples, and then cut into batches of about `batch_size` of them.
        """
        count = 0
        for part in _cut(np.arange(len(self)), GROUP * batch_size):
            rows = self._fill(part)
            count = count or self._rounded(_one_of_few(-(-len(rows) * min(batch_size, len(part)) // len(part))))
            yield from (self._lay(part, some, count) for some in _cut(rows, count))

    def make(self, examples: np.ndarray, batch_size: int) -> dict[str, np.ndarray]:
        """The examples as arrays [R, L], their labels [R * seats * group, ...].

        R is what the first epoch's batches need; one that needs more has more, at the price of a compilation.
        """
        rows = self._fill(examples)
        return self._lay(examples, rows, max(self._rows(batch_size), self._rounded(len(rows))))[1]

    @functools.lru_cache(maxsize=8)  # noqa: B019 - a run holds one of these for its whole life
    def _rows(self, batch_size: int) -> int:
        return self._rounded(max(len(self._fill(part)) for part in self._first_epoch(batch_size)))

    def fullest(self, batch_size: int) -> list[np.ndarray]:
        """The examples of the batches with the most tokens, of the first epoch."""
        return sorted(self._first_epoch(batch_size), key=lambda part: -self.sizes[part].sum())[:SAMPLE]

    def _first_epoch(self, batch_size: int) -> list[np.ndarray]:
        return _cut(self.epoch(0, batch_size, 0), batch_size)

    def _rounded(self, rows: int) -> int:
        return -(-rows // self.multiple) * self.multiple

    def _fill(self, examples: np.ndarray) -> list[list[int]]:
        return packing.fill(self.sizes[examples].tolist(), self.row_length, self.seats)

    def _lay(self, examples: np.ndarray, filled: Sequence[Sequence[int]], count: int
             ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """(the example at each seat, batch): the examples of a row one after the other, in `count` rows."""
        order = examples[np.concatenate(filled)]
        owner = np.repeat(np.arange(len(filled)), [len(one) for one in filled])
        place = owner * self.seats + np.concatenate([np.arange(len(one)) for one in filled])
        numbers = np.full(count * self.seats, -1)
        numbers[place] = order

        rows, seat = ((x[:, None] * self.group + np.arange(self.group)).ravel() for x in (order, place))
        owner, sizes = np.repeat(owner, self.group), self.starts[rows + 1] - self.starts[rows]
        first = packing.before(owner, sizes)                                          # where each begins in its row
        inside = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)  # a token's place in its own text
        at = np.repeat(owner, sizes), np.repeat(first, sizes) + inside
        seats = self.seats * self.group

        def tokens(values: np.ndarray, empty: int = 0) -> np.ndarray:
            made = np.full((count, self.row_length), empty, np.int32)
            made[at] = values
            return made

        def by_seat(values: np.ndarray) -> np.ndarray:
            made = np.zeros((count * seats, *values.shape[1:]), values.dtype)
            made[seat] = values
            return made

        return numbers, {
            'input_ids': tokens(self.ids[np.repeat(self.starts[rows], sizes) + inside], self.pad_id),
            'input_mask': tokens(np.repeat(seat % seats + 1, sizes)),
            'segment_ids': tokens(inside >= np.repeat(self.a_lengths[rows], sizes)),
            'position_ids': tokens(inside),
            'cls_positions': by_seat(first.astype(np.int32)).reshape(count, seats),
            **{name: by_seat(values[rows]) for name, values in self.labels.items()}}


def _cut(values: Sequence, size: int) -> list[Sequence]:
    return [values[start:start + size] for start in range(0, len(values), size)]


def _one_of_few(count: int) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16, 24, ...: few shapes, and at most half as many again."""
    power = 1 << (count - 1).bit_length()
    return power * 3 // 4 if power > 2 and count <= power * 3 // 4 else power


def pack(data: Tokenized, batch_size: int, multiple: int) -> Packed:
    """The same examples, in rows of the length that costs a training step least; for targets that read [CLS] alone."""
    unshaped = _unshaped(data)
    longest, fullest = -(-int(unshaped.sizes.max()) // STEP) * STEP, unshaped.fullest(batch_size)

    def cost(made: Packed) -> float:
        return _cost(made._rounded(max(len(made._fill(one)) for one in fullest)), made.row_length)

    return min((dataclasses.replace(unshaped, row_length=length, multiple=multiple)
                for length in range(longest, 2 * longest + 1, STEP)), key=cost)


def pack_into(data: Tokenized, lengths: Sequence[int], batch_size: int) -> Packed:
    """The same examples, in rows of that one of `lengths` that costs least to evaluate; for targets as above.

    Args:
      data: if the choices of a question are too many for the last length, rows are a multiple of it.
      lengths: ascending.
      batch_size: of `evaluation_batches`.
    """
    unshaped = _unshaped(data)
    some, longest = np.arange(min(len(data), GROUP * batch_size)), int(unshaped.sizes.max())
    enough = [length for length in lengths if longest <= length] or [-(-longest // lengths[-1]) * lengths[-1]]
    made = [dataclasses.replace(unshaped, row_length=length) for length in enough]
    return min(made, key=lambda one: _cost(len(one._fill(some)), one.row_length))


def _unshaped(data: Tokenized) -> Packed:
    return Packed(**{field.name: getattr(data, field.name) for field in dataclasses.fields(Tokenized)})


def _cost(rows: int, length: int) -> float:
    return rows * length * (1 + length / ATTENTION)
