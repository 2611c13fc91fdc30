"""Labelled files: CSV, TSV and JSON lines -> records with their file and line."""

import codecs
import csv
import functools
import hashlib
import io
import itertools
import json
import os
import re
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from bert_jax import cli
from bert_jax.cli import UserError

T = TypeVar('T')
csv.field_size_limit(sys.maxsize)  # a text may be long


def read_table(file: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file:line, record) of each row of a .csv, .tsv or .jsonl file; in a .tsv quotes are only quotes.

    Standard input (-), and files of other names, are read if they hold JSON lines.

    Raises:
      UserError: no such file, an unknown ending, not UTF-8, not JSON, a column that stands twice, a row of another
        width than the header (file and line).
    """
    reader = READERS.get(_ending(file)) or (_json_rows if is_json_lines(file) else None)
    if reader is None:
        raise UserError(f'{file}: a table ends with {", ".join(READERS)}.')
    with _open(file, newline='') if reader is _csv_rows else open_text(file) as lines:
        yield from decoded(file, reader(shown(file), lines))


def _ending(file: str) -> str:
    return os.path.splitext(file)[1].lower()


def is_table(file: str) -> bool:
    """Whether `read_table` reads it."""
    return _ending(file) in READERS or is_json_lines(file)


def is_json_lines(file: str) -> bool:
    """Whether a file's first line that is not empty is a JSON object.

    Raises:
      UserError: it begins as JSON does, but is none of one object a line.
    """
    if _ending(file) in READERS:
        return False
    with _bytes(file) as content:
        first = next((line for line in content if line.strip()), b'').removeprefix(codecs.BOM_UTF8).strip()
    if not LIKE_JSON.match(first):
        return False
    try:
        if isinstance(json.loads(first), dict):
            return True
    except (ValueError, RecursionError):
        pass
    raise UserError(f'{shown(file)}: begins as JSON does, but its first line is no JSON object; one a line is '
                    'expected.')


LIKE_JSON = re.compile(rb'\[?\s*\{\s*("|\}|$)|\[\s*$')


def columns(file: str) -> list[str]:
    """The columns of a table's first row."""
    return next((list(record) for _, record in read_table(file)), [])


def chosen(known: Iterable[str], named: str, *usual: str) -> str:
    """The column that a run names, if it is known; else a usual one that is."""
    return next((name for name in (named, *usual) if name and name in known), named or usual[0])


def is_null(value: Any) -> bool:
    """Whether a value of a record is null or NaN, which alone is not equal to itself."""
    return value is None or value != value


def read_rows(file: str) -> Iterator[tuple[str, list[str]]]:
    """(file:line, fields) of each line of a .tsv without a header."""
    with open_text(file) as lines:
        yield from decoded(file, ((f'{file}:{number}', line.rstrip('\r\n').split('\t'))
                                   for number, line in enumerate(lines, 1) if line.strip('\r\n')))


def open_text(file: str) -> Any:
    """A UTF-8 file, with or without a byte-order mark, or standard input (-); a lone carriage return ends no line.

    Raises:
      UserError: no such file, or one whose lines all end with carriage returns alone.
    """
    with _bytes(file) as content:
        head = content.peek(1)
    if b'\n' not in head and head.count(b'\r') > 1:
        raise UserError(f'{shown(file)}: its lines end with carriage returns alone, as on old Macs; put line feeds '
                        "there (tr '\\r' '\\n').")
    return _open(file)


def _open(file: str, newline: str = '\n') -> Any:
    return io.TextIOWrapper(_bytes(file), encoding='utf-8-sig', newline=newline)


def _bytes(file: str) -> io.BufferedReader:
    """A file from its beginning, also standard input or another pipe that was opened before."""
    try:
        piped = file == '-' or (os.path.exists(file) and not os.path.isfile(file))
        opened = io.BytesIO(_piped(sys.stdin if file == '-' else file)) if piped else io.FileIO(file)
    except OSError as error:
        raise UserError(f'{file}: {error.strerror}.') from error
    return io.BufferedReader(opened, 1 << 20)


@functools.cache
def _piped(source: Any) -> bytes:
    """All that comes through standard input, or a pipe of that path: it comes once."""
    if not isinstance(source, str):
        return source.buffer.read()
    with open(source, 'rb') as pipe:
        return pipe.read()


def shown(file: str) -> str:
    """A file's name for people."""
    return 'standard input' if file == '-' else file


def decoded(file: str, rows: Iterator[T]) -> Iterator[T]:
    """The same rows; bytes that are not UTF-8 are an error with file and line."""
    try:
        yield from rows
    except UnicodeDecodeError:
        with _bytes(file) as content:
            for number, line in enumerate(content, 1):
                try:
                    line.decode()
                except UnicodeDecodeError as error:
                    raise UserError(f'{shown(file)}:{number}: not valid UTF-8 ({error.reason}).') from error


def _json_rows(file: str, lines: Iterator[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f'{file}:{number}: not JSON ({getattr(error, "msg", error)}).') from error
            check_characters(f'{file}:{number}', line, record)
            if not isinstance(record, dict):
                raise UserError(f'{file}:{number}: a JSON object a line is expected.')
            yield f'{file}:{number}', record


def check_characters(where: str, text: str, record: Any) -> None:
    """Refuses JSON that holds half of a surrogate pair, which tokenizers do."""
    if '\\ud' in text.lower() and re.search('[\ud800-\udfff]', json.dumps(record, ensure_ascii=False)):
        raise UserError(f'{where}: half of a surrogate pair (\\ud8..), which is no character.')


def _csv_rows(file: str, lines: Iterator[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    first = next(lines, '')
    begins, given = 1, re.fullmatch(r'"?sep=(.)"?\s*', first)  # what Excel reads and writes
    if given:
        delimiter, first, begins = given[1], next(lines, ''), 2
    else:
        delimiter = _delimiter(first)
    if delimiter != ',':
        cli.note(f'{file}: its columns are separated by {NAMES.get(delimiter, repr(delimiter))}.')
    reader = csv.reader(itertools.chain([first], lines), delimiter=delimiter, strict=True)

    def rows() -> Iterator[tuple[int, list[str]]]:
        line = begins
        try:
            for row in reader:
                yield line, row
                line = begins + reader.line_num  # a row may have several lines
        except csv.Error as error:
            raise UserError(f'{file}:{begins + reader.line_num - 1}: not readable as CSV ({error}).') from error

    return _under_a_header(file, rows())


NAMES = {';': 'semicolons', '\t': 'tabs', '|': '|'}


def _delimiter(header: str) -> str:
    """What separates the columns of a header: the comma where there is one outside of quotes, else what is there."""
    bare = re.sub(r'"(?:[^"]|"")*"', '', header)
    return ',' if ',' in bare else max(NAMES, key=bare.count) if any(sign in bare for sign in NAMES) else ','


def _tsv_rows(file: str, lines: Iterator[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    return _under_a_header(file, ((number, line.rstrip('\r\n').split('\t') if line.strip('\r\n') else [])
                                  for number, line in enumerate(lines, 1)))


def _under_a_header(file: str, rows: Iterator[tuple[int, list[str]]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Records of (line, fields), the first of which are the names."""
    header = None
    for number, row in rows:
        where = f'{file}:{number}'
        if header is None:
            header = row
            twice = [name for name in header if header.count(name) > 1]
            if twice:
                raise UserError(f'{where}: the column {twice[0]!r} stands twice.')
        elif row or len(header) == 1:  # of one column, an empty line is an empty text
            row = row or ['']
            if len(row) != len(header):
                raise UserError(f'{where}: {len(row)} columns where the header has '
                                f'{len(header)} ({", ".join(header)}).')
            yield where, dict(zip(header, row))


def as_tsv(rows: Iterable[Sequence[Any]]) -> str:
    """Rows with tabs between fields, quoted as in CSV; csv quotes carriage returns only if it ends lines with them."""
    lines = []
    out = types.SimpleNamespace(write=lambda line: lines.append(line.removesuffix('\r\n') + '\n'))
    csv.writer(out, delimiter='\t', lineterminator='\r\n').writerows(rows)
    return ''.join(lines)


READERS = {'.csv': _csv_rows, '.tsv': _tsv_rows, '.jsonl': _json_rows, '.json': _json_rows}


def text(where: str, record: dict[str, Any], name: str) -> str:
    """A column that is a text, or a number.

    Raises:
      UserError: it is neither (null, a list), or there is none of that name.
    """
    return as_text(where, name, column(where, record, name))


def as_text(where: str, name: str, value: Any) -> str:
    """A value of a record as text; see `text`."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)) or is_null(value):
        raise UserError(f'{where}: {name} is {json.dumps(value)[:40]}, which is no text.')
    return str(value)


def column(where: str, record: dict[str, Any], name: str) -> Any:
    """One column of a record.

    Raises:
      UserError: there is none of that name; those that exist are listed.
    """
    if name not in record:
        raise no_column(where, name, record)
    return record[name]


def no_column(where: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a column that is not there."""
    return UserError(f'{where}: no column {name!r}; there are: {", ".join(known)}.')


def whole(where: str, name: str, value: Any) -> int:
    """A whole number, as JSON has it or as text; 2.0 is one, as pandas writes 2 where others are missing.

    Raises:
      UserError: it is none.
    """
    found = re.fullmatch(r'\s*([+-]?[0-9]{1,18})(\.0+)?\s*', str(value))
    if found is None:
        raise UserError(f'{where}: {name} {value!r} is not a whole number.')
    return int(found[1])


def cut_dev(rows: Sequence[T], share: float, key: Callable[[T], str], file: str) -> tuple[list[T], list[T]]:
    """(train, dev), by a hash of the content: equal examples fall on one side, whatever the order of the file."""
    def is_dev(row: T) -> bool:
        digest = hashlib.blake2b(key(row).encode(), digest_size=8).digest()
        return int.from_bytes(digest, 'little') < share * 2**64

    train, dev = [], []
    for row in rows:
        (dev if is_dev(row) else train).append(row)
    if not train or not dev:
        raise UserError(f'{file}: {len(rows)} rows are too few to cut a dev split of {share:g} from; '
                        'give --config.task.dev_file.')
    return train, dev
