"""store -> the epoch's table of examples.

BERT's algorithm (create_pretraining_data.py of google-research/bert) hands unused sentences back, so
where an example starts depends on the draws before it. It needs sentence lengths only, so it is run
here once an epoch, all documents side by side, and leaves one row an example: which tokens are A and
which are B. Every draw is a hash of (seed, epoch, length, sentence), so the table is rebuilt bit for
bit from its arguments, and there is no loader state to save.
"""

import tempfile
from collections.abc import Callable

import numpy as np

from bert_jax.cli import UserError, choose
from bert_jax.data import draws
from bert_jax.data.store import Split

EXAMPLE = np.dtype([
    ('a_start', '<i8'), ('b_start', '<i8'),    # where A and B begin in the split's tokens
    ('a_length', '<u2'), ('b_length', '<u2'),  # their tokens, after truncation
    ('label', 'u1'),                           # next_sentence_labels: 0 = B follows A, 1 = random B
    ('sentences', '<u2'),                      # sentences of the chunk that was cut (1 forces label 1)
])
MIN_LENGTH = 8
SHORT, CUT, RANDOM, OTHER, WHERE, TRIM_A, TRIM_B, ORDER = range(8)  # streams of draws


def plan(split: Split, pairing: str, seed: int, epoch: int, length: int, short_rate: float) -> np.ndarray:
    """The examples of one epoch in training order, EXAMPLE [N], memory-mapped on a temporary file.

    Args:
      split: the documents.
      pairing: a PAIRINGS name.
      seed: the run's seed.
      epoch: from 0.
      length: L, [CLS] and [SEP] included.
      short_rate: share of documents whose target length is drawn from 2..max.

    Raises:
      UserError: a length too small, no documents, or just one where pairs need another.
    """
    make, specials = choose('pairing', PAIRINGS, pairing)
    if length < MIN_LENGTH:
        raise UserError(f'max_length {length} is too short for examples; at least {MIN_LENGTH} is needed.')
    if not len(split.document_lengths):
        raise UserError('This side of the store holds no documents; prepare it with another --held_out.')
    key = int(draws.bits64(seed, epoch, length)[0])
    budget = length - specials
    documents = np.arange(len(split.document_lengths))
    short = draws.chance(draws.bits64(key, SHORT, documents), short_rate)
    drawn = 2 + draws.below(draws.bits64(key, SHORT, documents, 1), budget - 1)
    target = np.where(short, drawn, budget)
    table = make(split, key, budget, target)
    order = draws.permutation(len(table), key, ORDER)
    with tempfile.TemporaryFile() as file:
        mapped = np.memmap(file, EXAMPLE, 'w+', shape=table.shape)
        np.take(table, order, out=mapped)
        return np.asarray(mapped)


def lengths(table: np.ndarray, pairing: str) -> np.ndarray:
    """Tokens of each example of a plan, [CLS] and [SEP] counted: int64 [N]."""
    _, specials = PAIRINGS[pairing]
    return table['a_length'].astype(np.int64) + table['b_length'] + specials


def _next_sentence(split: Split, key: int, budget: int, target: np.ndarray) -> np.ndarray:
    """Pairs for next-sentence prediction (Devlin et al. 2019, appendix A.2)."""
    if len(split.document_lengths) < 2:
        raise UserError('Next-sentence pairs need at least two documents, this side of the store has one: '
                        'separate documents by blank lines, hold out more (--held_out), '
                        'or train without pairs (--config configs/pretrain.py:SIZE,no_nsp).')
    if split.document_lengths.max() == 1:
        raise UserError('Every document of this side of the store has one sentence, so next-sentence prediction has '
                        'one answer: give text with one sentence a line and blank lines between documents, or train '
                        'without pairs (--config configs/pretrain.py:SIZE,no_nsp).')
    starts = split.sentence_starts

    def step(document: np.ndarray, first: np.ndarray, stop: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        count = stop - first
        cut = first + 1 + draws.below(draws.bits64(key, CUT, first), np.maximum(count - 1, 1))
        is_random = (count == 1) | draws.chance(draws.bits64(key, RANDOM, first), 0.5)
        b_first, b_stop = _random_b(split, key, document, first, target[document] - (starts[cut] - starts[first]))
        b_first, b_stop = np.where(is_random, b_first, cut), np.where(is_random, b_stop, stop)
        rows = make_rows(starts, first, cut, b_first, b_stop, is_random, count)
        return rows, np.where(is_random, cut, stop)  # after a random B the unused sentences go back

    return truncate(walk(split, target, step), key, budget)


def _random_b(split: Split, key: int, document: np.ndarray, first: np.ndarray, wanted: np.ndarray
              ) -> tuple[np.ndarray, np.ndarray]:
    """Sentences [first, stop) from a random place of another document, up to `wanted` tokens."""
    other = draws.below(draws.bits64(key, OTHER, first), len(split.document_lengths) - 1)
    other += other >= document
    b_first = split.document_starts[other] + draws.below(
        draws.bits64(key, WHERE, first), split.document_lengths[other])
    return b_first, _until(split, b_first, wanted, split.document_starts[other + 1])


def _single(split: Split, key: int, budget: int, target: np.ndarray) -> np.ndarray:
    """Runs of sentences of one document, no pair: [CLS] A [SEP]."""
    starts = split.sentence_starts

    def step(document: np.ndarray, first: np.ndarray, stop: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return make_rows(starts, first, stop, stop, stop, np.zeros(len(first), bool), stop - first), stop

    return truncate(walk(split, target, step), key, budget)


def walk(split: Split, target: np.ndarray, step: Callable) -> np.ndarray:
    """Walks all documents at once, a chunk of about `target` tokens each time; rows in document order."""
    document = np.arange(len(split.document_lengths))
    first, end = split.document_starts[:-1], split.document_starts[1:]
    tables, owners = [], []
    while len(document):
        stop = _until(split, first, target[document], end)
        rows, first = step(document, first, stop)
        tables.append(rows)
        owners.append(document)
        going = first < end
        if not going.all():
            document, first, end = document[going], first[going], end[going]
    return np.concatenate(tables)[np.argsort(np.concatenate(owners), kind='stable')]


def _until(split: Split, first: np.ndarray, wanted: np.ndarray, end: np.ndarray) -> np.ndarray:
    """First sentence after `first` at which `wanted` tokens are reached, at most `end`."""
    starts = split.sentence_starts
    stop = np.searchsorted(starts, starts[first] + wanted)
    return np.clip(stop, first + 1, end)


def make_rows(starts: np.ndarray, a_first: np.ndarray, a_stop: np.ndarray, b_first: np.ndarray,
              b_stop: np.ndarray, label: np.ndarray, sentences: np.ndarray) -> np.ndarray:
    """Examples from sentences: A is [a_first, a_stop), B is [b_first, b_stop); not truncated yet."""
    rows = np.empty(len(a_first), _UNTRUNCATED)
    rows['first'], rows['label'], rows['sentences'] = a_first, label, np.minimum(sentences, 0xFFFF)
    rows['a_start'], rows['b_start'] = starts[a_first], starts[b_first]
    rows['a_length'], rows['b_length'] = starts[a_stop] - starts[a_first], starts[b_stop] - starts[b_first]
    return rows


_UNTRUNCATED = np.dtype([('first', '<i8'), ('a_start', '<i8'), ('b_start', '<i8'), ('a_length', '<i8'),
                         ('b_length', '<i8'), ('label', 'u1'), ('sentences', '<u2')])


def truncate(rows: np.ndarray, key: int, budget: int) -> np.ndarray:
    """Cuts A + B to `budget`: one token at a time off the longer (B when equal), front or back by a coin."""
    a, b = rows['a_length'], rows['b_length']
    a_kept = np.minimum(a, np.where(b <= budget // 2, budget - b, (budget + 1) // 2))
    b_kept = np.minimum(b, budget - a_kept)
    table = np.empty(len(rows), EXAMPLE)
    table['label'], table['sentences'] = rows['label'], rows['sentences']
    table['a_length'], table['b_length'] = a_kept, b_kept
    table['a_start'] = rows['a_start'] + _heads(key, TRIM_A, rows['first'], a - a_kept)
    table['b_start'] = rows['b_start'] + _heads(key, TRIM_B, rows['first'], b - b_kept)
    return table


def _heads(key: int, stream: int, first: np.ndarray, tosses: np.ndarray) -> np.ndarray:
    """How many of `tosses` coins fall on the front; coin i is bit i % 64 of the draw of word i // 64."""
    heads = np.zeros(len(first), np.int64)
    word, left = 0, tosses.astype(np.int64)
    (at,) = np.nonzero(left > 0)
    while len(at):
        used = np.minimum(left[at], 64)
        mask = np.uint64(0xFFFFFFFFFFFFFFFF) >> (64 - used).astype(np.uint64)
        heads[at] += np.bitwise_count(draws.bits64(key, stream, first[at], word) & mask)
        left[at] -= used
        at, word = at[left[at] > 0], word + 1
    return heads


PAIRINGS = {  # name -> (table of untrimmed examples, special tokens of an example)
    'next_sentence': (_next_sentence, 3),
    'single': (_single, 2),
}
