"""What a file of text is, by how it begins; unpacked on the way."""

import bz2
import gzip
import json
import lzma
import re
import zlib
from typing import IO

from bert_jax.cli import UserError

HEAD_BYTES = 1 << 16  # of a file, by which it is recognised
UNREADABLE = (OSError, EOFError, zlib.error, lzma.LZMAError)  # what reading a damaged file raises
PACKED = {b'\x1f\x8b': gzip.open, b'BZh': bz2.open, b'\xfd7zXZ\x00': lzma.open}
PACKED_ENDINGS = ('.gz', '.bz2', '.xz')
UTF_16 = 'UTF-16; iconv -f UTF-16 -t UTF-8 makes it UTF-8'
NOT_TEXT = {  # how a file begins -> what it is, and what to do
    b'\x28\xb5\x2f\xfd': 'packed with zstd; unpack it first (zstd -d)',
    b'PK\x03\x04': 'a zip archive (as .docx and .xlsx are); unpack it first, or save it as text',
    b'\xd0\xcf\x11\xe0': 'an old Office file; save it as text',
    b'%PDF': 'a PDF; pdftotext takes its text out',
    b'\xff\xfe': UTF_16, b'\xfe\xff': UTF_16}
MARKUP = re.compile(rb'<(!doctype html|html|mediawiki|\?xml)\b', re.IGNORECASE)
DOC = re.compile(rb'<doc\b[^>\n]*>')  # WikiExtractor
TABLES = ('csv', 'tsv')


def open_unpacked(name: str) -> IO[bytes]:
    """A file, unpacked on the way if it is gzip, bzip2 or xz, whatever its ending."""
    try:
        with open(name, 'rb') as file:
            head = file.read(8)
        unpack = next((unpack for magic, unpack in PACKED.items() if head.startswith(magic)), open)
        if unpack is open and head and name.endswith(PACKED_ENDINGS):
            raise UserError(f'{name}: cannot be read (by its name it is packed, but it is not).')
        return unpack(name, 'rb')
    except OSError as error:
        raise UserError(f'{name}: {error.strerror}.') from error


def recognise(name: str) -> str:
    """'jsonl', 'parquet' or 'wikiextractor' by how a file begins, or else by its ending; '' for plain text.

    Raises:
      UserError: what is no text, or is a table; says what it is and what to do.
    """
    suffix = re.sub(r'\.(gz|bz2|xz)$', '', name).rpartition('.')[2].lower()
    if suffix in TABLES:
        raise UserError(f'{name}: a table; give its texts as JSON lines or Parquet (--text_column), or one a line in a '
                        '.txt file.')
    try:
        with open_unpacked(name) as file:
            head = file.read(HEAD_BYTES)
    except UNREADABLE as error:
        raise UserError(f'{name}: cannot be read ({error}).') from error
    if head.startswith(b'PAR1') or suffix == 'parquet':
        return 'parquet'
    what = next((what for magic, what in NOT_TEXT.items() if head.startswith(magic)), '')
    if what or b'\0' in head:
        raise UserError(f'{name}: no text, but {what or "binary data (it holds zero bytes)"}.')
    first = head.removeprefix(b'\xef\xbb\xbf').lstrip()
    if DOC.match(first):
        return 'wikiextractor'
    if MARKUP.match(first):
        raise UserError(f'{name}: markup ({first[:20].decode(errors="replace")}...), not text; take the text out first '
                        '(WikiExtractor does for Wikipedia).')
    return 'jsonl' if _is_json(name, first) or suffix in ('jsonl', 'json') else ''


def _is_json(name: str, first: bytes) -> bool:
    """Whether a file's first line is a JSON object; prose may begin with a brace too."""
    line, whole, _ = first.partition(b'\n')
    if re.match(rb'\[\s*\{\s*"', first):
        raise UserError(f'{name}: a JSON array; JSON lines, an object a line, are expected.')
    if not whole and len(first) > HEAD_BYTES // 2:
        return bool(re.match(rb'\{\s*"[^"\n]*"\s*:', line))
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False
