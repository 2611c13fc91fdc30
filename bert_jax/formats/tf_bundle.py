"""TensorFlow's checkpoint files (NAME.index, NAME.data-00000-of-00001) without TensorFlow.

The format is tensorflow/core/util/tensor_bundle: the index is a LevelDB table (lib/io/format.h) from a variable's
name to a BundleEntryProto (protobuf/tensor_bundle.proto), the data files are the variables' bytes one after the other.
Both are guarded by masked CRC32C sums, which are checked here.
"""

import math
import pathlib
import struct
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import ml_dtypes
import numpy as np

from bert_jax import paths

MAGIC = 0xDB4775248B80FB57
FOOTER = 48  # bytes
DTYPES = {1: np.float32, 2: np.float64, 3: np.int32, 9: np.int64, 14: ml_dtypes.bfloat16, 19: np.float16}  # types.proto
HEADER = b'\x08\x01\x1a\x02\x08\x01'  # BundleHeaderProto: num_shards 1, little endian, version {producer 1}


class Damaged(Exception):
    """What is wrong with the files."""


class Entry(NamedTuple):
    """Where a variable is."""

    dtype: np.dtype
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    crc: int


class Reader:
    """The variables of a checkpoint.

    Args:
      prefix: the path without .index.

    Raises:
      Damaged: the index cannot be read; OSError: it is not there.
    """

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        entries = dict(_read_table(pathlib.Path(f'{prefix}.index').read_bytes()))
        if b'' not in entries:
            raise Damaged('its index has no header')
        header = _fields(entries.pop(b''))
        if header.get(2, 0):
            raise Damaged('it is big-endian')
        self._shards = header.get(1, 1)
        self.entries = {name.decode(): _entry(value) for name, value in sorted(entries.items())}

    def read(self, name: str) -> np.ndarray:
        """One variable.

        Raises:
          Damaged: its bytes are not all there, or not those that were written.
        """
        entry = self.entries[name]
        file = f'{self._prefix}.data-{entry.shard:05d}-of-{self._shards:05d}'
        with open(file, 'rb') as opened:
            opened.seek(entry.offset)
            content = opened.read(entry.size)
            if len(content) != entry.size:
                raise Damaged(f'{name}: {file} is cut short')
        if paths.masked_crc(content) != entry.crc:
            raise Damaged(f'{name}: its bytes in {file} are not those that were written')
        return np.frombuffer(content, entry.dtype).reshape(entry.shape)


def write(prefix: str, variables: Mapping[str, Callable[[], np.ndarray]]) -> None:
    """Writes float32 variables, each made when its turn comes, for tf.train.load_checkpoint(prefix) and TF1's Saver."""
    offset, rows = 0, [(b'', HEADER)]
    with open(f'{prefix}.data-00000-of-00001', 'wb') as data:
        for name in sorted(variables, key=str.encode):
            array = variables[name]()
            content = array.astype('<f4', copy=False).tobytes()
            data.write(content)
            rows.append((name.encode(), _entry_bytes(array.shape, offset, len(content), paths.masked_crc(content))))
            offset += len(content)
    pathlib.Path(f'{prefix}.index').write_bytes(_table(rows))


# Protocol buffers: just the messages above.


def _varint(content: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = content[at]
        value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128:
            return value, at


def _varint_bytes(value: int) -> bytes:
    parts = bytearray()
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes([*parts, value])


def _fields(message: bytes) -> dict[int, int | bytes]:
    return dict(_all_fields(message))


def _all_fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        if key & 7 == 0:
            value, at = _varint(message, at)
        elif key & 7 == 2:
            size, at = _varint(message, at)
            value, at = message[at:at + size], at + size
        elif key & 7 == 5:
            value, at = struct.unpack_from('<I', message, at)[0], at + 4
        else:
            raise Damaged('its index has a field of an unknown kind')
        yield key >> 3, value


def _entry(message: bytes) -> Entry:
    fields = _fields(message)
    if fields.get(1) not in DTYPES:
        raise Damaged(f'a variable has the unknown type {fields.get(1)}')
    if 7 in fields:
        raise Damaged('a variable is stored in slices')
    shape = tuple(_fields(size).get(1, 0) for number, size in _all_fields(fields.get(2, b'')) if number == 2)
    shard, offset, size, crc = (fields.get(number, 0) for number in (3, 4, 5, 6))
    entry = Entry(np.dtype(DTYPES[fields[1]]), shape, shard, offset, size, crc)
    if math.prod(shape) * entry.dtype.itemsize != size:
        raise Damaged('a variable has another size than its shape')
    return entry


def _entry_bytes(shape: tuple[int, ...], offset: int, size: int, crc: int) -> bytes:
    sizes = [b'\x08' + _varint_bytes(n) for n in shape]
    dims = b''.join(b'\x12' + _varint_bytes(len(n)) + n for n in sizes)
    return (b'\x08\x01\x12' + _varint_bytes(len(dims)) + dims + (b'\x20' + _varint_bytes(offset) if offset else b'')
            + b'\x28' + _varint_bytes(size) + b'\x35' + struct.pack('<I', crc))


# LevelDB tables: blocks of sorted (key, value), an index of the blocks, a footer.


def _read_table(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    if len(content) < FOOTER or struct.unpack('<Q', content[-8:])[0] != MAGIC:
        raise Damaged('its index is cut short or not one')
    try:
        footer = content[-FOOTER:]
        _, at = _varint(footer, 0)      # the first handle (offset, size) is that of an unused block
        _, at = _varint(footer, at)
        for _, handle in _read_block(content, footer[at:]):
            yield from _read_block(content, handle)
    except (IndexError, struct.error) as error:
        raise Damaged('its index is damaged') from error


def _read_block(content: bytes, handle: bytes) -> list[tuple[bytes, bytes]]:
    offset, at = _varint(handle, 0)
    size, _ = _varint(handle, at)
    block, trailer = content[offset:offset + size], content[offset + size:offset + size + 5]
    if len(trailer) < 5 or paths.masked_crc(block + trailer[:1]) != struct.unpack('<I', trailer[1:])[0]:
        raise Damaged('its index is damaged')
    if trailer[0]:
        raise Damaged('its index is compressed')
    rows, at, key = [], 0, b''
    end = size - 4 - 4 * struct.unpack('<I', block[-4:])[0]
    while at < end:
        shared, at = _varint(block, at)
        rest, at = _varint(block, at)
        length, at = _varint(block, at)
        key = key[:shared] + block[at:at + rest]
        rows.append((key, block[at + rest:at + rest + length]))
        at += rest + length
    return rows


def _table(rows: list[tuple[bytes, bytes]]) -> bytes:
    """All rows in one block: a BERT's index has a few hundred."""
    content, handles = b'', []
    for block in (_block(rows), _block([]), None):
        if block is None:
            block = _block([(rows[-1][0], handles[0])])
        handles.append(_varint_bytes(len(content)) + _varint_bytes(len(block)))
        content += block + b'\0' + struct.pack('<I', paths.masked_crc(block + b'\0'))
    return content + (handles[1] + handles[2]).ljust(FOOTER - 8, b'\0') + struct.pack('<Q', MAGIC)


def _block(rows: list[tuple[bytes, bytes]]) -> bytes:
    content, restarts = b'', []
    for key, value in rows:
        restarts.append(len(content))
        content += b'\0' + _varint_bytes(len(key)) + _varint_bytes(len(value)) + key + value
    restarts = restarts or [0]
    return content + struct.pack(f'<{len(restarts) + 1}I', *restarts, len(restarts))
