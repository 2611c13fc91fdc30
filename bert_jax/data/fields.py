"""The arrays of a batch: a row of FIELDS is all that the data side knows of one.

Empty batches, packing and evaluation's padding follow from it, so a new array is one row here, what makes it, and the
target that reads it.
"""

from typing import NamedTuple

import numpy as np

PAD = 'pad'  # the tokenizer's id of padding


class Field(NamedTuple):
    """One array [B, ...].

    Attributes:
      axis: what its second axis counts: 'length' (L tokens), 'predictions' (P masked places), 'pairs' (E examples of a
        row); 'example' for one value, or one vector, an example.
      dtype: of its values.
      empty: what stands where nothing is.
      adds: what packing adds to a value: 'place', where its example begins in the row; 'number', how many there are
        before it.
      is_weight: whether 0 takes a place out of a loss: what evaluation fills a batch up with.
    """

    axis: str
    dtype: type = np.int32
    empty: int | str = 0
    adds: str = ''
    is_weight: bool = False


FIELDS = {
    'input_ids': Field('length', empty=PAD),
    'input_mask': Field('length', adds='number'),        # 0 = padding, k = the row's k-th example
    'segment_ids': Field('length'),
    'position_ids': Field('length'),
    'masked_lm_positions': Field('predictions', adds='place'),
    'masked_lm_ids': Field('predictions'),
    'masked_lm_weights': Field('predictions', np.float32, is_weight=True),
    'cls_positions': Field('pairs', adds='place'),
    'next_sentence_labels': Field('pairs'),
    'next_sentence_weights': Field('pairs', np.float32, is_weight=True),
    'is_real_example': Field('example', is_weight=True),
}


def full(name: str, shape: tuple[int, ...], pad_id: int = 0) -> np.ndarray:
    """An array of a field that holds nothing yet."""
    field = FIELDS[name]
    return np.full(shape, pad_id if field.empty == PAD else field.empty, field.dtype)


def emptied(batch: dict[str, np.ndarray], real: np.ndarray) -> dict[str, np.ndarray]:
    """A batch whose rows weigh nothing where `real` (bool [B]) is False, with `is_real_example` to say so."""
    weights = {name: values * real[:, None].astype(values.dtype) for name, values in batch.items()
               if FIELDS[name].is_weight}
    return batch | weights | {'is_real_example': real.astype(np.int32)}
