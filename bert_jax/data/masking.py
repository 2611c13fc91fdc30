"""Which places of an example are predicted, and what stands there instead (Devlin et al. 2019, 3.1)."""

from collections.abc import Callable

import numpy as np

from bert_jax.cli import choose
from bert_jax.data import draws
from bert_jax.data.tokenizer import Tokenizer

CHOICE, REPLACEMENT, RANDOM_TOKEN = range(3)  # streams of draws
NEVER = np.uint32(0xFFFFFFFF)


def max_predictions(length: int, mask_rate: float) -> int:
    """P, the most places an example of this length can predict: 20 at 128, 77 at 512."""
    return int(np.ceil(length * mask_rate))


def num_predictions(tokens: np.ndarray, length: int, mask_rate: float) -> np.ndarray:
    """How many places an example of so many tokens predicts: int64, min(P, max(1, round(mask_rate * tokens)))."""
    return np.clip(np.rint(mask_rate * tokens), 1, max_predictions(length, mask_rate)).astype(np.int64)


def mask(batch: dict[str, np.ndarray], candidates: np.ndarray, row_keys: np.ndarray, tokenizer: Tokenizer, *,
         masking: str, mask_rate: float, replacement: tuple[float, float]) -> dict[str, np.ndarray]:
    """Adds masked_lm_positions, masked_lm_ids, masked_lm_weights [B, P] and rewrites input_ids.

    An example of n tokens, [CLS] and [SEP] counted, predicts `num_predictions` of them.

    Args:
      batch: unmasked examples.
      candidates: bool [B, L], the places that may be chosen: no padding, no [CLS], no [SEP].
      row_keys: uint64 [B], what the draws of each row depend on.
      tokenizer: for the mask id, the word starts and the ids that may replace.
      masking: a MASKINGS name.
      mask_rate: 0.15 in the paper.
      replacement: shares of chosen places that become [MASK] and a random token; the rest stays.
    """
    ids = batch['input_ids']
    width, most = len(ids), max_predictions(ids.shape[1], mask_rate)
    wanted = num_predictions((batch['input_mask'] > 0).sum(1), ids.shape[1], mask_rate)
    chosen = choose('masking', MASKINGS, masking)(candidates, row_keys, wanted, tokenizer.word_starts, ids)
    rows, columns = np.nonzero(chosen)
    slots = np.arange(len(rows)) - np.searchsorted(rows, np.arange(width))[rows]
    positions = np.zeros((width, most), np.int32)
    answers, weights = np.zeros_like(positions), np.zeros((width, most), np.float32)
    positions[rows, slots], answers[rows, slots], weights[rows, slots] = columns, ids[rows, columns], 1
    masked = ids.copy()
    masked[rows, columns] = _replace(ids[rows, columns], row_keys[rows], columns, tokenizer, replacement)
    return batch | {'input_ids': masked, 'masked_lm_positions': positions,
                    'masked_lm_ids': answers, 'masked_lm_weights': weights}


def _replace(ids: np.ndarray, keys: np.ndarray, columns: np.ndarray, tokenizer: Tokenizer,
             replacement: tuple[float, float]) -> np.ndarray:
    """[MASK], a random regular token, or the token itself."""
    to_mask, to_random = replacement
    draw = draws.bits32(keys, columns, REPLACEMENT) / 2.0**32
    random = tokenizer.regular_ids[
        (draws.bits32(keys, columns, RANDOM_TOKEN).astype(np.uint64) * np.uint64(len(tokenizer.regular_ids))
         >> np.uint64(32)).astype(np.int64)]
    return np.where(draw < to_mask, tokenizer.mask_id, np.where(draw < to_mask + to_random, random, ids))


def _choose_tokens(candidates: np.ndarray, row_keys: np.ndarray, wanted: np.ndarray,
                   word_starts: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """bool [B, L]: the `wanted` candidates of each row that drew lowest."""
    keys = _ordered_draws(row_keys, candidates.shape[1])
    keys[~candidates] = NEVER
    lowest = np.sort(keys, axis=1)
    last = lowest[np.arange(len(keys)), wanted - 1]
    return (keys <= last[:, None]) & candidates


def _ordered_draws(row_keys: np.ndarray, length: int) -> np.ndarray:
    """uint32 [B, L], a draw for each place; the low bits hold the place, so that no two are equal."""
    place = np.arange(length, dtype=np.uint32)
    low = np.uint32((1 << int(length - 1).bit_length()) - 1)
    return (draws.bits32(row_keys[:, None], place, CHOICE) & ~low) | place


def _choose_words(candidates: np.ndarray, row_keys: np.ndarray, wanted: np.ndarray,
                  word_starts: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """bool [B, L]: whole words in drawn order; a word that would overshoot `wanted` is skipped.

    A word is a candidate that starts one and the pieces that go on with it; a piece with no start
    before it (a sentence cut in the middle of a word) begins a word too.
    """
    width, length = candidates.shape
    before = np.zeros_like(candidates)
    before[:, 1:] = candidates[:, :-1]
    begins = candidates & (word_starts[ids] | ~before)
    word = np.cumsum(begins, 1) - 1                                   # [B, L], each place's word
    sizes = np.zeros((width, length), np.int64)
    np.add.at(sizes, (np.nonzero(candidates)[0], word[candidates]), 1)
    keys = _ordered_draws(row_keys, length)
    keys[sizes == 0] = NEVER
    order = np.argsort(keys, axis=1)
    ordered_sizes = np.take_along_axis(sizes, order, 1)
    taken = np.zeros_like(candidates)                                 # [B, rank]
    left, rows = wanted.copy(), np.arange(width)
    for rank in range(length):
        size = ordered_sizes[rows, rank]
        fits = (size > 0) & (size <= left[rows])
        taken[rows, rank] = fits
        left[rows] -= size * fits
        rows = rows[(left[rows] > 0) & (size > 0)]
        if not len(rows):
            break
    by_word = np.zeros_like(candidates)
    np.put_along_axis(by_word, order, taken, 1)
    return np.take_along_axis(by_word, np.maximum(word, 0), 1) & candidates


def _choose_none(candidates: np.ndarray, *_: np.ndarray) -> np.ndarray:
    """bool [B, L]: none; for targets that read the text as it stands."""
    return np.zeros_like(candidates)


MASKINGS: dict[str, Callable] = {'token': _choose_tokens, 'whole_word': _choose_words, 'none': _choose_none}
