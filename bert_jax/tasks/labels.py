"""Labels as files have them: names, numbers, lists of names, lists as text, a 0 or 1 for each label."""

import ast
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from bert_jax.cli import UserError
from bert_jax.tasks import tables

QUOTED = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""", re.DOTALL)
NUMBER = re.compile(r'[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?')
WHOLE = re.compile(r'([+-]?[0-9]+)(?:\.0*)?')
ON = {'1': True, '0': False, 'true': True, 'false': False}  # of a list that has one of them for each label
LIKE_MISSING = ('nan', 'NaN', '<NA>', 'NaT', 'None', 'null', 'NULL')  # as programs write what is missing


def given(where: str, value: Any) -> Any:
    """A label as it is given: a text or number as text, true as 'True', a list as it is; None for none (null, NaN).

    Raises:
      UserError: an object, or a list that holds one, a list, or nothing.
    """
    if tables.is_null(value):
        return None
    parts = value if isinstance(value, list) else [value]
    if any(isinstance(part, (dict, list)) or tables.is_null(part) for part in parts):
        raise UserError(f'{where}: the label {json.dumps(value)[:40]} is neither a name, a number nor a list of names.')
    return value if isinstance(value, list) else named(value)


def named(value: Any) -> str:
    """The name of a label that may be a number: 1.0 is 1."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def in_order(names: Iterable[str]) -> tuple[str, ...]:
    """The different ones: whole numbers by size, others by their letters."""
    found = set(names) - {''}
    whole = all(re.fullmatch(r'-?[0-9]{1,18}', name) for name in found)
    return tuple(sorted(found, key=int if whole else str))


def check(names: Sequence[str], where: str) -> None:
    """Refuses label names that are fewer than two, or not different."""
    if len(names) < 2:
        raise UserError(f'{where.rpartition(":")[0]}: {len(names)} labels ({", ".join(names)}); two or more are '
                        'expected.')
    check_different(names)


def check_different(names: Sequence[str]) -> None:
    """Refuses a label name that stands twice."""
    (twice, count), *_ = Counter(names).most_common(1)
    if count > 1:
        raise UserError(f'--config.task.labels: {twice!r} stands twice.')


def listed(text: str) -> list[str] | None:
    """The parts of a list that Python, pandas, NumPy or JSON wrote as text; None where it is no list.

    Raises:
      ValueError: a list of which not every part is a label.
    """
    text = text.strip()
    if text == 'set()':
        return []
    if len(text) < 2 or text[0] + text[-1] not in ('[]', '()', '{}'):
        return None
    inside = text[1:-1].strip()
    quoted, rest = QUOTED.findall(inside), QUOTED.sub('', inside)
    if not rest.strip(', \t\r\n'):
        return [_unquoted(part) for part in quoted]
    if text[0] != '[' or (not quoted and inside[0] != '[' and re.search(r'[\[\]]', rest)):
        return None
    parts = re.split(r'[,\s]+', inside)
    if not all(NUMBER.fullmatch(part) or part.lower() in ON for part in parts):  # NumPy puts blanks between these
        parts = [part.strip() for part in inside.split(',')]
    if quoted or inside[0] == '[' or any(part in ('', *LIKE_MISSING) for part in parts):
        raise ValueError(f'the label {text[:40]!r} looks like a list, but is none of names')
    return [_whole(part) for part in parts]


def _unquoted(part: str) -> str:
    for read in (json.loads, ast.literal_eval):
        try:
            return read(part)
        except (ValueError, SyntaxError):
            continue
    raise ValueError(f'the label {part[:40]!r} cannot be read as text')


def _whole(part: str) -> str:
    found = WHOLE.fullmatch(part)
    return found[1] if found else part


def is_list(text: str) -> bool:
    """Whether a text is a list, be it one of no labels."""
    try:
        return listed(text) is not None
    except ValueError:
        return True


def one_for_each(rows: Sequence[Sequence[str]]) -> bool:
    """Whether lists say 0 or 1 of each label in turn, rather than name labels.

    They do if nothing else is in them, and all have one length of two or more, or one of them holds a value twice.
    """
    sizes = {len(row) for row in rows}
    return (bool(sizes) and all(part.lower() in ON for row in rows for part in row)
            and (any(len(set(row)) < len(row) for row in rows) or (len(sizes) == 1 and min(sizes) > 1)))


def are_no_names(parts: Sequence[str]) -> bool:
    """Whether the numbers of a list cannot be names: shares, or the same one twice."""
    return bool(parts) and all(NUMBER.fullmatch(part.strip()) for part in parts) and (
        len(set(parts)) < len(parts) or not all(WHOLE.fullmatch(part.strip()) for part in parts))
