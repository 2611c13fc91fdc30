"""What is to be predicted: files and single values -> examples."""

import dataclasses
import os
from typing import Any

from bert_jax.cli import UserError
from bert_jax.tasks import glue, tables, tags, texts
from bert_jax.tasks.tasks import KINDS


def read(file: str, kind: str, settings: dict[str, Any]) -> tuple[list[Any], int]:
    """(examples of a file to be predicted, how many of its lines were left out), by the code that reads training data.

    Tables and JSON lines are read by the columns that the run's task names, or else by the usual ones; other files hold
    an example a line, with tabs between its parts. Empty lines are empty texts, in their place; where an example needs
    more than a text they are left out.

    Args:
      file: its path, or - for standard input.
      kind: a KINDS name, or 'fill_mask'.
      settings: of the task that the model was fine-tuned on, `name` included; {} for none.

    Raises:
      UserError: as the kind's reader; a line that is no example of the kind.
    """
    module, settings = KINDS[kind].module if kind in KINDS else texts, glue.with_columns(settings)
    if tables.is_table(file) or (module is tags and os.path.splitext(file)[1].lower() not in ('', '.txt')):
        return module.inputs(file, settings), 0
    with tables.open_text(file) as lines:
        every = [line.rstrip('\r\n') for line in tables.decoded(file, lines)]
    while every and not every[-1].strip():
        every.pop()
    found = [(f'{tables.shown(file)}:{number}', line) for number, line in enumerate(every, 1)
             if line.strip() or module in (texts, tags)]
    rows = [parsed(module, kind, parts_of(line), where) for where, line in found]
    if module is texts:
        texts.note_tabs(rows, settings.get('text_pair_column'))
    return rows, len(every) - len(found)


def parts_of(line: str) -> str | tuple[str, ...]:
    """A line as an example: a text, or several with tabs between them."""
    parts = tuple(line.split('\t'))
    return parts if len(parts) > 1 else line


def parsed(module: Any, kind: str, value: Any, where: str) -> Any:
    """A kind's example made of one input, or an error that names it."""
    try:
        row = module.parse(value)
    except (KeyError, ValueError, TypeError) as error:
        at = f'{where}: ' if where else ''
        raise UserError(f'{at}{str(value)[:80]!r} is not what a model for {kind} takes; see '
                        'python -m bert_jax.predict --help.') from error
    return dataclasses.replace(row, where=where)
