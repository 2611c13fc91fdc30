"""The token store: written once by `bert_jax.prepare`, memory-mapped ever after.

    STORE/store.json          format version, counts, tokenizer hash, inputs, SHA-256 of every file
    STORE/tokenizer/          the tokenizer's own files
    STORE/train.tokens        token ids, uint16 (uint32 for V > 65,536), little-endian, no specials
    STORE/train.sentences     tokens of each sentence, uint16
    STORE/train.documents     sentences of each document, uint32
    STORE/held_out.*          the same for the held-out documents
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from typing import Any

import numpy as np

from bert_jax import paths
from bert_jax.cli import UserError
from bert_jax.data import tokenizer as tokenizers

FORMAT_VERSION = 1
SPLITS = ('train', 'held_out')
FILES = tuple(f'{split}.{part}' for split in SPLITS for part in ('tokens', 'sentences', 'documents'))
SENTENCE_TYPE, DOCUMENT_TYPE = np.dtype('<u2'), np.dtype('<u4')
MAX_SENTENCE = np.iinfo(SENTENCE_TYPE).max  # longer sentences are cut in several


@dataclasses.dataclass(frozen=True)
class Split:
    """One side of a store.

    Attributes:
      tokens: ids [T].
      sentence_lengths: tokens of each sentence [S].
      document_lengths: sentences of each document [N].
    """

    tokens: np.ndarray
    sentence_lengths: np.ndarray
    document_lengths: np.ndarray

    @functools.cached_property
    def sentence_starts(self) -> np.ndarray:
        """int64 [S + 1], where each sentence begins in `tokens`, and the end."""
        return _starts(self.sentence_lengths)

    @functools.cached_property
    def document_starts(self) -> np.ndarray:
        """int64 [N + 1], each document's first sentence, and the end."""
        return _starts(self.document_lengths)

    def unigrams(self, vocab_size: int) -> np.ndarray:
        """How often each id occurs, int64 [V]."""
        counts = np.zeros(vocab_size, np.int64)
        for start in range(0, len(self.tokens), 1 << 24):
            counts += np.bincount(self.tokens[start:start + (1 << 24)], minlength=vocab_size)
        return counts


@dataclasses.dataclass(frozen=True)
class Store:
    """An opened store: what it says of itself, its tokenizer, its two splits."""

    path: pathlib.Path
    info: dict[str, Any]
    tokenizer: tokenizers.Tokenizer
    train: Split
    held_out: Split


def load(path: str | os.PathLike) -> Store:
    """Opens a store and checks every byte of it (about a second a gigabyte).

    Raises:
      UserError: no finished store there, another format version, a damaged or truncated file, a
        tokenizer that is not the one that made it.
    """
    path = pathlib.Path(path)
    info = read_info(path)
    for name, expected in info['files'].items():
        _check(path / name, expected)
    tokenizer = tokenizers.load(path / 'tokenizer')
    if tokenizer.hash != info['tokenizer_hash']:
        raise UserError(f'{path}: store and tokenizer do not belong together: it was made with tokenizer '
                        f'{info["tokenizer_hash"][:12]}, the one in it is {tokenizer.hash[:12]}.')
    splits = {split: Split(_map(path / f'{split}.tokens', np.dtype(info['id_type'])),
                           _map(path / f'{split}.sentences', SENTENCE_TYPE),
                           _map(path / f'{split}.documents', DOCUMENT_TYPE)) for split in SPLITS}
    return Store(path, info, tokenizer, **splits)


def read_info(path: pathlib.Path) -> dict[str, Any]:
    """The checked contents of store.json."""
    file = path / 'store.json'
    if not file.exists():
        raise UserError(f'{path}: no finished store there; make one with python -m bert_jax.prepare '
                        '(the same command continues an unfinished one).')
    try:
        text = file.read_text()
        info = json.loads(text)
        body = {key: value for key, value in info.items() if key != 'sha256'}
        version, whole = info['format_version'], info['sha256'] == info_hash(body) and text == _render(info)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f'{file}: damaged ({type(error).__name__}); prepare the store again.') from error
    if version != FORMAT_VERSION:
        raise UserError(f'{file}: store format {version}, this version reads {FORMAT_VERSION}; '
                        'prepare the store again.')
    if not whole:
        raise UserError(f'{file}: damaged (its own SHA-256 differs); prepare the store again.')
    return info


def info_hash(body: dict[str, Any]) -> str:
    """SHA-256 of store.json's contents but this hash."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def finish(path: pathlib.Path, body: dict[str, Any]) -> None:
    """Writes store.json, last and whole: from now on the store exists."""
    files = [path / name for name in FILES] + sorted((path / 'tokenizer').iterdir())
    body = body | {'format_version': FORMAT_VERSION, 'files': {
        str(file.relative_to(path)): {'bytes': file.stat().st_size, 'sha256': file_hash(file)}
        for file in files}}
    write_json(path / 'store.json', body | {'sha256': info_hash(body)})


def write_json(path: pathlib.Path, content: Any) -> None:
    """Writes a JSON file that appears whole or not at all."""
    paths.write_whole(path, _render(content))


def _render(content: Any) -> str:
    return json.dumps(content, indent=2, sort_keys=True) + '\n'


def file_hash(path: pathlib.Path) -> str:
    """SHA-256 of a file."""
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def _check(file: pathlib.Path, expected: dict[str, Any]) -> None:
    if not file.exists():
        raise UserError(f'{file}: missing from the store; prepare it again.')
    size = file.stat().st_size
    if size != expected['bytes']:
        raise UserError(f'{file}: {size:,} bytes where {expected["bytes"]:,} were written (truncated?); '
                        'prepare the store again.')
    if file_hash(file) != expected['sha256']:
        raise UserError(f'{file}: damaged (SHA-256 differs from store.json); prepare the store again.')


def _map(path: pathlib.Path, dtype: np.dtype) -> np.ndarray:
    """A read-only array over the file; plain ndarray, since slicing np.memmap is ten times slower."""
    if not path.stat().st_size:
        return np.zeros(0, dtype)
    return np.asarray(np.memmap(path, dtype, 'r'))


def _starts(lengths: np.ndarray) -> np.ndarray:
    starts = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=starts[1:])
    return starts


def is_held_out(document: list[str], share: float) -> bool:
    """Whether a document is held out: by its text alone, so the same in every store."""
    text = ' '.join(' '.join(document).split())
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, 'little') < share * 2**64
