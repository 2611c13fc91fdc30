"""Named text sources -> documents of sentences.

A source is read in blocks: whole documents, a few megabytes at a time, cheap for the reader; a worker
process then decodes a block and splits it. So memory stays bounded and order is the input's own.
"""

import dataclasses
import glob
import html
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import IO, Any

import pyarrow.parquet

from bert_jax.cli import UserError, choose, first_line
from bert_jax.data import stdlib, text_files

BLOCK_BYTES = 1 << 20  # what a worker takes at a time
LINE_BYTES = 1 << 20  # a longer line in one-sentence-a-line text is a mistake
DOCUMENT_BYTES = 256 << 20
SENTENCE_END = re.compile(
    r'(?<=[.!?…؟۔।])["\'”’»)\]]*\s+(?=["\'“‘«„(\[¿¡]*(?P<next>[^\W_]))|(?<=[。！？])["\'”’」』）]*')
ABBREVIATION = re.compile(
    r'(?:\b(?:Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|vs|etc|e\.g|i\.e|cf|No|vol|pp|Fig|Inc|Ltd|Co|Gen|Col|Capt|Lt)|\b[A-Z])\.$')
LONGEST_ABBREVIATION = 8  # characters of a text before a full stop that tell, one before the abbreviation included
FEW_BAD, MOST_BAD = 20, 0.02  # characters, and their share of a text, that may be replaced without its being noise


@dataclasses.dataclass(frozen=True)
class Block:
    """Some whole documents of one file.

    Attributes:
      source: the file's name, for messages.
      line: the number of the block's first line (or record) in it, from 1.
      content: raw bytes of lines, or ready texts of one document each.
      kind: the CORPORA entry that reads it; `Reader.blocks` says it.
    """

    source: str
    line: int
    content: bytes | list[str]
    kind: str = ''

    @property
    def size(self) -> int:
        """Bytes of text."""
        if isinstance(self.content, bytes):
            return len(self.content)
        return sum(len(text.encode()) for text in self.content)


def expand(inputs: Sequence[str]) -> list[str]:
    """Globs to sorted file names; names with a scheme (`tfds:`, `stdlib:`) stay as they are."""
    names = []
    for pattern in inputs:
        if _scheme(pattern):
            names.append(pattern)
            continue
        found = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        if not found:
            raise UserError(f'{pattern}: no such file; nothing matches.')
        names += found
    return names


def _scheme(name: str) -> str:
    scheme = name.partition(':')[0]
    return scheme if ':' in name and scheme in CORPORA else ''


@dataclasses.dataclass(frozen=True)
class Reader:
    """How to read text: the choices of the command line.

    Attributes:
      text_format: 'sentences' (one a line, blank line between documents) or 'paragraphs' (a line is a
        paragraph, sentences found by punctuation, blank line between documents).
      text_column: where JSON lines, Parquet and TFDS keep the text; one record is one document.
      errors: 'strict' stops at invalid UTF-8, 'replace' puts U+FFFD there.
    """

    text_format: str = 'sentences'
    text_column: str = 'text'
    errors: str = 'strict'

    def blocks(self, name: str) -> Iterator[Block]:
        """The blocks of one input, in order; `text_format` decides for plain text.

        Raises:
          UserError: what is no text, or is a table; says what it is and what to do.
        """
        kind = _scheme(name) or text_files.recognise(name) or self.text_format
        return (dataclasses.replace(block, kind=kind) for block in choose('corpus', CORPORA, kind).blocks(name, self))

    def documents(self, block: Block) -> list[list[str]]:
        """The block's documents, each a non-empty list of non-empty sentences.

        Raises:
          UserError: invalid UTF-8, a line too long, a record without the text column (file and line).
        """
        documents = ([s for s in document if s] for document in CORPORA[block.kind].documents(block, self))
        return [document for document in documents if document]


def split_sentences(text: str) -> list[str]:
    """Sentences of a paragraph, by rule.

    A sentence ends at . ! ? … (or ؟ ۔ ।) before white space and a letter that is not a small one, or a digit,
    not after a known English abbreviation or a single capital letter, and after the CJK full stops 。！？.
    Line breaks are spaces.
    """
    text = ' '.join(text.split())
    sentences, start = [], 0
    for match in SENTENCE_END.finditer(text):
        begin, end = match.span()
        end -= text[begin:end].endswith(' ')
        last_word = text[max(start, end - LONGEST_ABBREVIATION):end]
        goes_on = (match['next'] or '').islower() or ABBREVIATION.search(last_word)
        if not goes_on and text[start:end].strip():
            sentences.append(text[start:end].strip())
            start = match.end()
    last = text[start:].strip()
    return [*sentences, last] if last else sentences


def _read_blocks(name: str, last_cut: Callable[[bytearray, int], int], too_long: str) -> Iterator[Block]:
    """Cuts a file where `last_cut` allows: (data, begin) -> the last document's end, if it is after begin, or -1."""
    line, rest = 1, bytearray()
    with text_files.open_unpacked(name) as file:
        while True:
            try:
                data = file.read(BLOCK_BYTES)
            except text_files.UNREADABLE as error:
                raise UserError(f'{name}: cannot be read ({error}).') from error
            if not data:
                break
            begin = len(rest)
            rest += data
            cut = last_cut(rest, begin)
            if cut > 0:
                yield Block(name, line, bytes(rest[:cut]))
                line += rest.count(b'\n', 0, cut)
                del rest[:cut]
            elif len(rest) > DOCUMENT_BYTES:
                raise UserError(f'{name}:{line}: {too_long}')
    if rest.strip():
        yield Block(name, line, bytes(rest))


BLANK_LINES = re.compile(rb'\n[ \t\r]*\n')


def _last_blank_line(data: bytearray, begin: int) -> int:
    """A gap between two lines may have begun before `begin`."""
    begin = max(0, data.rfind(b'\n', 0, begin))
    late = max(begin, len(data) - (64 << 10))
    ends = [m.end() for m in BLANK_LINES.finditer(data, late)]
    return ends[-1] if ends else max((m.end() for m in BLANK_LINES.finditer(data, begin)), default=-1)


def _text_blocks(name: str, reader: Reader) -> Iterator[Block]:
    return _read_blocks(name, _last_blank_line, (
        f'a document of more than {DOCUMENT_BYTES >> 20} MB; documents are separated by blank lines '
        '(for one document a line give JSON lines, or put blank lines between the documents).'))


def _line_blocks(name: str, reader: Reader) -> Iterator[Block]:
    return _read_blocks(name, lambda data, begin: data.rfind(b'\n', begin) + 1,
                        f'a line of more than {DOCUMENT_BYTES >> 20} MB.')


def _doc_blocks(name: str, reader: Reader) -> Iterator[Block]:
    end = b'</doc>'

    def last_cut(data: bytearray, begin: int) -> int:
        at = data.rfind(end, max(0, begin - len(end)))
        return at + len(end) if at >= 0 else -1

    return _read_blocks(name, last_cut, f'a <doc> of more than {DOCUMENT_BYTES >> 20} MB without </doc>.')


def _doc_documents(block: Block, reader: Reader) -> Iterator[list[str]]:
    """What stands between <doc ...> and </doc>, but its first line where that is the title."""
    for number, part in enumerate(re.split(r'</doc>', _decode(block, reader))):
        head, found, text = part.partition('>')
        if not found:
            if part.strip():
                raise UserError(f'{block.source}, document {number + 1} from line {block.line}: text outside of <doc> '
                                'and </doc>.')
            continue
        title = re.search(r'title="([^"]*)"', head)
        lines = text.strip().split('\n')
        if title and lines[0].strip() == html.unescape(title[1]).strip():
            lines = lines[1:]
        yield _text_sentences('\n'.join(lines))


def _decode(block: Block, reader: Reader) -> str:
    try:
        return block.content.decode('utf-8', reader.errors).removeprefix('\ufeff')
    except UnicodeDecodeError as error:
        line = block.line + block.content.count(b'\n', 0, error.start)
        text = block.content.decode('utf-8', 'replace')
        bad = text.count('\ufffd')
        advice = '--errors replace puts U+FFFD in its place'
        if bad >= FEW_BAD and bad > MOST_BAD * len(text):
            advice = f'{bad / len(text):.0%} of what follows is not: iconv -f ENCODING -t UTF-8 makes it UTF-8'
        raise UserError(f'{block.source}:{line}: not valid UTF-8 ({error.reason}); {advice}.') from error


def _blank_line_documents(block: Block, reader: Reader) -> Iterator[list[str]]:
    """Lines of each document, stripped."""
    document = []
    for number, line in enumerate(_decode(block, reader).split('\n'), block.line):
        line = line.strip()
        if len(line) > LINE_BYTES and reader.text_format == 'sentences':
            raise UserError(f'{block.source}:{number}: a line of {len(line):,} characters; one sentence a line '
                            'is expected (--format paragraphs splits paragraphs into sentences).')
        if line:
            document.append(line)
        elif document:
            yield document
            document = []
    if document:
        yield document


def _paragraph_documents(block: Block, reader: Reader) -> Iterator[list[str]]:
    for lines in _blank_line_documents(block, reader):
        yield [sentence for line in lines for sentence in split_sentences(line)]


def _json_documents(block: Block, reader: Reader) -> Iterator[list[str]]:
    for number, line in enumerate(_decode(block, reader).split('\n'), block.line):
        if not line.strip():
            continue
        where = f'{block.source}:{number}'
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f'{where}: not JSON ({error.msg}); one object a line is expected.') from error
        if not isinstance(record, dict) or reader.text_column not in record:
            names = ', '.join(record) if isinstance(record, dict) else type(record).__name__
            raise UserError(f'{where}: no column {reader.text_column!r}; there are: {names} (--text_column).')
        if not isinstance(record[reader.text_column], str):
            raise UserError(f'{where}: column {reader.text_column!r} is not a string.')
        try:
            text = record[reader.text_column].encode('utf-8', 'surrogatepass').decode('utf-8', reader.errors)
        except UnicodeDecodeError as error:  # half of a surrogate pair, as some dumps have
            raise UserError(f'{where}: not valid UTF-8 ({error.reason}); --errors replace accepts it.') from error
        yield _text_sentences(text)


def _text_sentences(text: str) -> list[str]:
    return [sentence for line in text.split('\n') for sentence in split_sentences(line)]


def _ready_documents(block: Block, reader: Reader) -> Iterator[list[str]]:
    return map(_text_sentences, block.content)


def _parquet_blocks(name: str, reader: Reader) -> Iterator[Block]:
    try:
        table = pyarrow.parquet.ParquetFile(_unpacked(name) if name.endswith(text_files.PACKED_ENDINGS) else name)
    except (*text_files.UNREADABLE, pyarrow.ArrowException) as error:
        raise UserError(f'{name}: not a Parquet file ({error}).') from error
    if reader.text_column not in table.schema_arrow.names:
        raise UserError(f'{name}: no column {reader.text_column!r}; there are: '
                        f'{", ".join(table.schema_arrow.names)} (--text_column).')
    if str(table.schema_arrow.field(reader.text_column).type) not in ('string', 'large_string', 'string_view'):
        raise UserError(f'{name}: column {reader.text_column!r} is not text but '
                        f'{table.schema_arrow.field(reader.text_column).type}.')
    return _group(name, _parquet_texts(name, table, reader.text_column))


def _unpacked(name: str) -> IO[bytes]:
    """A file's contents on disk for as long as they are read: Parquet is read from its end."""
    file = tempfile.TemporaryFile()  # noqa: SIM115 - the reader's, closed with it
    with text_files.open_unpacked(name) as packed:
        shutil.copyfileobj(packed, file)
    return file


def _parquet_texts(name: str, table: pyarrow.parquet.ParquetFile, column: str) -> Iterator[str]:
    try:
        for batch in table.iter_batches(256, columns=[column]):
            yield from (text or '' for text in batch.column(0).to_pylist())
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise UserError(f'{name}: cannot be read ({first_line(error)}).') from error


def tfds_records(name: str, split: str) -> Iterator[tuple[dict[str, Any], list[str]]]:
    """(record, names of its label's classes or []) of a labelled TFDS data set, in its own order."""
    import tensorflow_datasets as tfds  # heavy, and only wanted here

    try:
        source, info = tfds.load(name, split=split, shuffle_files=False, with_info=True)
    except Exception as error:  # tfds raises many kinds
        raise UserError(f'tfds:{name}, {split}: {first_line(error)}') from error
    if 'label' not in info.features:
        raise UserError(f'tfds:{name}: no feature label; there are: {", ".join(info.features)}.')
    names = getattr(info.features['label'], 'names', [])
    for record in tfds.as_numpy(source):
        yield record, names


def _tfds_blocks(name: str, reader: Reader) -> Iterator[Block]:
    """`tfds:NAME[/CONFIG][:VERSION][#SPLIT]`, read from $TFDS_DATA_DIR, downloaded if need be."""
    import tensorflow_datasets as tfds  # heavy, and only wanted here

    dataset, _, split = name.removeprefix('tfds:').partition('#')
    try:
        source = tfds.load(dataset, split=split or 'train', shuffle_files=False)
    except Exception as error:  # TFDS raises its own, urllib's and TensorFlow's errors
        raise UserError(f'{name}: TFDS cannot load it ({first_line(error)}).') from error
    if reader.text_column not in source.element_spec:
        raise UserError(f'{name}: no column {reader.text_column!r}; there are: '
                        f'{", ".join(source.element_spec)} (--text_column).')
    return _group(name, _tfds_texts(name, tfds.as_numpy(source), reader))


def _tfds_texts(name: str, records: Iterable[dict[str, Any]], reader: Reader) -> Iterator[str]:
    for number, record in enumerate(records, 1):
        text = record[reader.text_column]
        if not isinstance(text, bytes):
            raise UserError(f'{name}: column {reader.text_column!r} is not text.')
        try:
            yield text.decode('utf-8', reader.errors)
        except UnicodeDecodeError as error:
            raise UserError(f'{name}, record {number}: not valid UTF-8 ({error.reason}); --errors replace accepts it.'
                            ) from error


def _group(name: str, texts: Iterator[str]) -> Iterator[Block]:
    group, size, first = [], 0, 1
    for number, text in enumerate(texts, 1):
        group.append(text)
        size += len(text)
        if size >= BLOCK_BYTES:
            yield Block(name, first, group)
            group, size, first = [], 0, number + 1
    if group:
        yield Block(name, first, group)


def _stdlib_blocks(name: str, reader: Reader) -> Iterator[Block]:
    """The docstrings and help topics of the Python that runs this: text that is always at hand."""
    return _group(name, stdlib.documents())


@dataclasses.dataclass(frozen=True)
class Corpus:
    """One kind of source: `blocks` runs in the reader, `documents` in a worker."""

    blocks: Callable[[str, Reader], Iterator[Block]]
    documents: Callable[[Block, Reader], Iterator[list[str]]]


CORPORA = {
    'sentences': Corpus(_text_blocks, _blank_line_documents),
    'paragraphs': Corpus(_text_blocks, _paragraph_documents),
    'jsonl': Corpus(_line_blocks, _json_documents),
    'wikiextractor': Corpus(_doc_blocks, _doc_documents),
    'parquet': Corpus(_parquet_blocks, _ready_documents),
    'tfds': Corpus(_tfds_blocks, _ready_documents),
    'stdlib': Corpus(_stdlib_blocks, _ready_documents),
}
