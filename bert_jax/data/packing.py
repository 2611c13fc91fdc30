"""Several examples in a row, so that no row is padding: which go together, and how they lie.

After Krell et al. 2021, "Efficient Sequence Packing without Cross-contamination": lengths are known before any
text is read, so whole classes of equal lengths are put together at once, longest first, each into the fullest row
that still has room. Attention joins the examples of a row no more than those of different rows (`input_mask`).
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from bert_jax.data import draws, fields


def slots(length: int) -> int:
    """E, the most examples in a row of this length."""
    return max(2, length // 16)


@dataclasses.dataclass(frozen=True)
class Packing:
    """The rows of an epoch.

    Attributes:
      numbers: int64 [N], every example once, row by row.
      starts: int64 [rows + 1], where each row begins in `numbers`.
    """

    numbers: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1

    def examples(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(numbers of the examples of these rows, in order; the place 0.. in `rows` of each)."""
        sizes = self.starts[rows + 1] - self.starts[rows]
        owners = np.repeat(np.arange(len(rows)), sizes)
        first = np.cumsum(sizes) - sizes
        return self.numbers[np.arange(len(owners)) - first[owners] + self.starts[rows][owners]], owners


def pack(lengths: np.ndarray, predictions: np.ndarray, length: int, most_predictions: int, key: int) -> Packing:
    """Packs examples into rows of `length` tokens and at most `most_predictions` masked places, in a keyed order.

    Args:
      lengths: tokens of each example [N], [CLS] and [SEP] counted.
      predictions: masked places of an example, by its tokens: [the longest + 1].
      length: L.
      most_predictions: P.
      key: of the order of the rows.
    """
    classes = _classes(np.bincount(lengths, minlength=len(predictions)), predictions, length, most_predictions)
    waiting = np.argsort(lengths, kind='stable')                      # examples by length, in the plan's order
    taken = np.searchsorted(lengths[waiting], np.arange(len(predictions) + 1))  # where each length's begin
    parts, sizes = [], []
    for count, members in classes:
        rows = np.empty((count, len(members)), np.int64)
        for column, size in enumerate(members):
            rows[:, column] = waiting[taken[size]:taken[size] + count]
            taken[size] += count
        parts.append(rows.ravel())
        sizes.append(np.full(count, len(members)))
    numbers, sizes = np.concatenate(parts), np.concatenate(sizes)
    order = draws.permutation(len(sizes), key)
    starts = np.concatenate([[0], np.cumsum(sizes[order])])
    first = (np.cumsum(sizes) - sizes)[order]
    return Packing(numbers[np.arange(len(numbers)) + np.repeat(first - starts[:-1], sizes[order])], starts)


def fill(sizes: Sequence[int], length: int, most: int) -> list[list[int]]:
    """Rows of at most `length` tokens and `most` examples: longest first, each into the fullest row that has room."""
    rows: list[tuple[int, list[int]]] = []  # tokens left, examples
    for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        fitting = [at for at, (left, members) in enumerate(rows) if left >= sizes[number] and len(members) < most]
        if fitting:
            at = min(fitting, key=lambda at: rows[at][0])
            rows[at] = rows[at][0] - sizes[number], [*rows[at][1], number]
        else:
            rows.append((length - sizes[number], [number]))
    return [members for _, members in rows]


def _classes(counts: np.ndarray, predictions: np.ndarray, length: int, most_predictions: int
             ) -> list[tuple[int, tuple[int, ...]]]:
    """(how many rows, the lengths in each), covering `counts` examples of each length."""
    most = slots(length)
    rooms: list[list[tuple[int, int, tuple[int, ...]]]] = [[] for _ in range(length + 1)]  # by tokens left
    for size in range(len(counts) - 1, 0, -1):
        left, masked = int(counts[size]), int(predictions[size])
        room = size
        while left and room <= length:
            at = next((i for i, (_, free, members) in enumerate(rooms[room])
                       if free >= masked and len(members) < most), None)
            if at is None:
                room += 1
                continue
            count, free, members = rooms[room].pop(at)
            used = min(count, left)
            if count > used:
                rooms[room].append((count - used, free, members))
            rooms[room - size].append((used, free - masked, (*members, size)))
            left -= used
            room = size
        together = max(1, min(length // size, most_predictions // max(masked, 1), most))
        for count, copies in ((left // together, together), (int(left % together > 0), left % together)):
            if count:
                rooms[length - size * copies].append((count, most_predictions - masked * copies, (size,) * copies))
    return [(count, members) for room in rooms for count, _, members in room]


def join(batch: dict[str, np.ndarray], owners: np.ndarray, rows: int, length: int, most_predictions: int, pad_id: int
         ) -> dict[str, np.ndarray]:
    """Masked examples, one a row -> the same, several a row: example i in row owners[i], after those before it.

    Args:
      batch: as from `masking.mask`; N examples.
      owners: ascending [N].
      rows: B.
      length: L of the rows.
      most_predictions: P of the rows.
      pad_id: what stands after a row's last example.

    Returns:
      Arrays [B, L], [B, P] and [B, E].
    """
    real, masked = batch['input_mask'] > 0, batch['masked_lm_weights'] > 0
    number, place = before(owners, np.ones(len(owners), np.int64)), before(owners, real.sum(1))
    widths = {'length': length, 'predictions': most_predictions, 'pairs': slots(length)}
    cells = {'length': real, 'predictions': masked, 'pairs': np.ones((len(owners), 1), bool)}  # what holds something
    begins = {'length': place, 'predictions': before(owners, masked.sum(1)), 'pairs': number}  # in the row
    joined = {}
    for name, values in batch.items():
        field = fields.FIELDS[name]
        example, column = np.nonzero(cells[field.axis])
        added = {'': 0, 'place': place[example], 'number': number[example]}[field.adds]
        joined[name] = fields.full(name, (rows, widths[field.axis]), pad_id)
        joined[name][owners[example], begins[field.axis][example] + column] = values[example, column] + added
    return joined


def before(owners: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """The sum of the sizes of the examples that stand before each in its row."""
    total = np.cumsum(sizes) - sizes
    first = np.searchsorted(owners, owners)
    return total - total[first]
