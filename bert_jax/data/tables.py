"""Labelled files: CSV, TSV and JSON lines -> records with their file and line."""

import csv
import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from bert_jax.cli import UserError

T = TypeVar('T')
csv.field_size_limit(sys.maxsize)  # a text may be long


def read_table(file: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file:line, record) of each row of a .csv, .tsv or .jsonl file; in a .tsv quotes are only quotes.

    Raises:
      UserError: no such file, not UTF-8, not JSON, a row of another width than the header (file and line).
    """
    reader = _json_rows if file.endswith(('.jsonl', '.json')) else _rows_under_a_header
    with open_text(file) as lines:
        yield from decoded(file, reader(file, lines))


def read_rows(file: str) -> Iterator[tuple[str, list[str]]]:
    """(file:line, fields) of each line of a .tsv without a header."""
    with open_text(file) as lines:
        yield from decoded(file, ((f'{file}:{number}', line.rstrip('\r\n').split('\t'))
                                   for number, line in enumerate(lines, 1) if line.strip()))


def open_text(file: str) -> Any:
    """A UTF-8 file, with or without a byte-order mark."""
    try:
        return open(file, newline='', encoding='utf-8-sig')
    except OSError as error:
        raise UserError(f'{file}: {error.strerror}.') from error


def decoded(file: str, rows: Iterator[T]) -> Iterator[T]:
    """The same rows; bytes that are not UTF-8 are an error with file and line."""
    try:
        yield from rows
    except UnicodeDecodeError:
        with open(file, 'rb') as content:
            for number, line in enumerate(content, 1):
                try:
                    line.decode()
                except UnicodeDecodeError as error:
                    raise UserError(f'{file}:{number}: not valid UTF-8 ({error.reason}).') from error


def _json_rows(file: str, lines: Iterator[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f'{file}:{number}: not JSON ({error.msg}).') from error
            if '\\ud' in line.lower() and re.search('[\ud800-\udfff]', json.dumps(record, ensure_ascii=False)):
                raise UserError(f'{file}:{number}: half of a surrogate pair (\\ud8..), which is no character.')
            if not isinstance(record, dict):
                raise UserError(f'{file}:{number}: a JSON object a line is expected.')
            yield f'{file}:{number}', record


def _rows_under_a_header(file: str, lines: Iterator[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    if file.endswith('.csv'):
        reader = csv.reader(lines, strict=True)
    else:
        reader = csv.reader(lines, delimiter='\t', quoting=csv.QUOTE_NONE)
    header = None
    try:
        for row in reader:
            if header is None:
                header = row
            elif row:
                if len(row) != len(header):
                    raise UserError(f'{file}:{reader.line_num}: {len(row)} columns where the header has '
                                    f'{len(header)} ({", ".join(header)}).')
                yield f'{file}:{reader.line_num}', dict(zip(header, row))
    except csv.Error as error:
        raise UserError(f'{file}:{reader.line_num}: not readable as CSV ({error}).') from error


def column(where: str, record: dict[str, Any], name: str) -> Any:
    """One column of a record.

    Raises:
      UserError: there is none of that name; those that exist are listed.
    """
    if name not in record:
        raise UserError(f'{where}: no column {name!r}; there are: {", ".join(record)}.')
    return record[name]


def whole(where: str, name: str, value: Any) -> int:
    """A whole number, as JSON has it or as text.

    Raises:
      UserError: it is none.
    """
    try:
        number = int(value)
        if isinstance(value, float) and number != value:
            raise ValueError
        return number
    except (TypeError, ValueError) as error:
        raise UserError(f'{where}: {name} {value!r} is not a whole number.') from error


def cut_dev(rows: Sequence[T], share: float, key: Callable[[T], str], file: str) -> tuple[list[T], list[T]]:
    """(train, dev), by a hash of the content: equal examples fall on one side, whatever the order of the file."""
    def is_dev(row: T) -> bool:
        digest = hashlib.blake2b(key(row).encode(), digest_size=8).digest()
        return int.from_bytes(digest, 'little') < share * 2**64

    train, dev = [row for row in rows if not is_dev(row)], [row for row in rows if is_dev(row)]
    if not train or not dev:
        raise UserError(f'{file}: {len(rows)} rows are too few to cut a dev split of {share:g} from; '
                        'give --config.task.dev_file.')
    return train, dev
