"""Sentences and pairs with a class, several classes, or a number: classification, multi-label, regression."""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from bert_jax import cli
from bert_jax.cli import UserError
from bert_jax.data.tokenizer import Tokenizer
from bert_jax.tasks import labels, scores, tables, tokenized
from bert_jax.tasks.task import Task

TOO_LONG = 'rows are longer than max_length'


@dataclasses.dataclass(frozen=True)
class Row:
    """One example as text.

    Attributes:
      text, pair: the texts; pair is None for single sentences.
      label: a class name, a tuple of them, or a number; None in a test split.
      where: its file and line.
    """

    text: str
    pair: str | None
    label: Any
    where: str


def read(file: str, text: str, pair: str | None, label: str, labelled: bool = True) -> list[Row]:
    """Rows of a table. Unless they are `labelled`, labels are not looked at.

    `pair` may be '', for none, and None, for pairs in the rows that have something in 'text_pair'.
    """
    rows = []
    for where, record in tables.read_table(file):
        value = labels.given(where, tables.column(where, record, label)) if labelled else None
        if labelled and value is None:
            raise UserError(f'{where}: no label.')
        name = pair if pair is not None else 'text_pair' if record.get('text_pair') else ''
        other = tables.text(where, record, name) if name else None
        rows.append(Row(tables.text(where, record, text), other, value, where))
    if not rows:
        raise UserError(f'{file}: no rows in it.')
    return rows


def inputs(file: str, settings: dict[str, Any]) -> list[Row]:
    """Rows of a table without labels; of a run with such columns, or the usual ones.

    Second texts are read where the run has pairs. Of a run on single texts a table that is laid out as the run's has
    none; in another one `text_pair` is read too. Which of them is noted.
    """
    known, text, pair = tables.columns(file), settings.get('text_column', ''), settings.get('text_pair_column')
    single = pair == '' and 'text_pair' in known
    if pair:
        pair = tables.chosen(known, pair, 'text_pair')
    elif single and text not in known:
        pair = None
    if single:
        cli.note(f'{tables.shown(file)}: text_pair is {"read too" if pair is None else "not read"}; the model was '
                 'fine-tuned on single texts.')
    return read(file, tables.chosen(known, text, 'text'), pair, '', labelled=False)


def note_tabs(rows: Sequence[Row], pair_column: str | None) -> None:
    """Notes lines with a second text where the run had none (''), or without where it had one; None: no such run."""
    if pair_column is None:
        return
    paired = bool(pair_column)
    odd = [row.where for row in rows if row.text.strip() and (row.pair is not None) != paired]
    if odd:
        cli.note(f'{len(odd):,} lines have {"no tab" if paired else "a tab"}, the first at {odd[0]}; the model was '
                 f'fine-tuned on {"pairs, with a tab between them" if paired else "single texts"}.')


def with_classes(task: Task, named_by: Sequence[Row] = ()) -> Task:
    """A task whose label names, unless given, are those of `named_by`; checks every label.

    Blanks around a label are no part of it, and 1.0 is 1 where there is a 1 too. Whole numbers are sorted as numbers.

    Raises:
      UserError: fewer than two labels, one that is given twice, a row without one, or one that is not in the set (file
        and line).
    """
    task, tidied = _tidied(task)
    names = task.labels or labels.in_order({tidied(label) for label in {
        row.label for row in named_by if isinstance(row.label, str)}})
    labels.check(names, task.splits['train'][0].where)
    known = set(names)

    def problem(row: Row) -> str:
        if isinstance(row.label, list) or (labels.QUOTED.search(row.label) and labels.is_list(row.label)):
            return 'a list is the label of a multilabel task (--config configs/finetune.py:multilabel)'
        if row.label == '':
            return 'no label'
        return '' if row.label in known else f'label {row.label!r} is not in the label set: {", ".join(names)}'

    task = _checked(task, problem)
    odd = set() if task.labels else known.intersection(labels.LIKE_MISSING)
    notes = tuple(f'{name!r} is taken for the name of a label; a missing one is an empty field, or null'
                  for name in sorted(odd))
    return dataclasses.replace(task, labels=names, notes=(*task.notes, *notes))


def _tidied(task: Task) -> tuple[Task, Callable[[str], str]]:
    """The task with its labels tidied, with a note of how many were not; and what tidies one."""
    counts = Counter(row.label for rows in task.splits.values() for row in rows if isinstance(row.label, str))
    names = {label.strip() for label in counts}

    def tidied(label: str) -> str:
        label = label.strip()
        whole = re.fullmatch(r'(-?[0-9]+)\.0+', label)
        return whole[1] if whole and whole[1] in names and label not in task.labels else label

    changed = {label: tidied(label) for label in counts if tidied(label) != label}
    if not changed:
        return task, tidied
    note = (f'{sum(map(counts.get, changed)):,} labels are taken for others that differ in blanks or in .0 alone: '
            f'{", ".join(map(repr, sorted(changed)[:5]))}')
    task = _labels_as(task, lambda row: changed.get(row.label, row.label) if isinstance(row.label, str) else row.label,
                      task.labels)
    return dataclasses.replace(task, notes=(*task.notes, note)), tidied


def with_label_sets(task: Task, named_by: Sequence[Row] = ()) -> Task:
    """A multi-label task: each label is a list (JSON lines) or names with |, commas or spaces between them; or none.

    What stands between names is the first of these that any row has: with commas, names may have spaces. A list that
    was written as text ("['a', 'b']") is a list. As many 0s and 1s as --config.task.labels has names, in a list or with
    the same between them, say which of these a row has.

    Raises:
      UserError: as `with_classes`; a list of what are no names; 0s and 1s whose names are not given.
    """
    texts = {row.label for rows in (named_by, *task.splits.values()) for row in rows if isinstance(row.label, str)}
    plain = [text for text in texts if not labels.is_list(text)]
    between = next((sign for sign in '|,' if any(sign in text for text in plain)), None)

    def parts(label: str | list[Any]) -> tuple[list[str], bool]:
        """What is in a label, and whether that is a list."""
        found = list(map(labels.named, label)) if isinstance(label, list) else labels.listed(label)
        if found is not None:
            return found, True
        return [part.strip() for part in label.split(between) if part.strip()], False

    rows = [_or_error(lambda row: parts(row.label)[0], row) for row in named_by]
    hot = labels.one_for_each(rows)
    if hot and len(task.labels) != len(rows[0]):
        raise UserError(f'{named_by[0].where}: the labels are lists of {len(rows[0])} 0s and 1s, one for each name; '
                        f'--config.task.labels=(...) gives the {len(rows[0])} names, or write the names themselves.')
    names = task.labels or labels.in_order(part.strip() for row in rows for part in row)
    known = set(names)

    def problem(row: Row) -> str:
        try:
            found, is_list = parts(row.label)
        except ValueError as error:
            return str(error)
        if hot and (len(found) != len(names) or not all(part.lower() in labels.ON for part in found)):
            return f'the label {str(row.label)[:40]} is not {len(names)} 0s and 1s'
        if not hot and is_list and labels.are_no_names(found):
            return f'the label {str(row.label)[:40]} is a list of numbers that name no labels'
        unknown = [] if hot else [part for part in found if part.strip() and part.strip() not in known]
        return f'label {unknown[0]!r} is not in the label set: {", ".join(names)}' if unknown else ''

    def made(row: Row) -> tuple[str, ...]:
        found, _ = parts(row.label)
        if hot:
            return tuple(name for name, part in zip(names, found) if labels.ON[part.lower()])
        return tuple(sorted({part.strip() for part in found} - {''}))

    task = _checked(task, problem)
    labels.check(names, task.splits['train'][0].where)
    return _labels_as(task, made, names)


def _or_error(read: Callable[[Row], Any], row: Row) -> Any:
    try:
        return read(row)
    except ValueError as error:
        raise UserError(f'{row.where}: {error}.') from error


def _checked(task: Task, problem: Callable[[Row], str]) -> Task:
    """The task, if no label has a problem; a test split that has one is not scored, and a note says why."""
    splits, notes = dict(task.splits), task.notes
    for split, rows in task.splits.items():
        found = next((f'{row.where}: {said}' for row in rows if row.label is not None and (said := problem(row))), '')
        if found and not split.startswith('test'):
            raise UserError(f'{found}.')
        if found:
            notes += (f'{found}, so {split} is predicted, not scored',)
            splits[split] = [dataclasses.replace(row, label=None) for row in rows]
    return dataclasses.replace(task, splits=splits, notes=notes)


def _labels_as(task: Task, made: Callable[[Row], Any], labels: tuple[str, ...] = ()) -> Task:
    return dataclasses.replace(task, labels=labels, splits={
        split: [row if row.label is None else dataclasses.replace(row, label=made(row)) for row in rows]
        for split, rows in task.splits.items()})


def with_numbers(task: Task) -> Task:
    """A regression task: every label is a number."""
    def problem(row: Row) -> str:
        try:
            fine = math.isfinite(float(row.label))
        except (ValueError, TypeError):
            fine = False
        return '' if fine else f'label {row.label!r} is not a number'

    return _labels_as(_checked(task, problem), lambda row: float(row.label))


def encode(task: Task, rows: Sequence[Row], tokenizer: Tokenizer, max_length: int, lengths: tuple[int, ...]
           ) -> tokenized.Tokenized:
    """One example a row; labels as label_ids [R] int32, multi-hot float32 [R, C], or float32 [R]."""
    made, truncated = [], 0
    for row in rows:
        pair = None if row.pair is None else tokenizer.encode(row.pair)
        one, cut = tokenized.join(tokenizer, tokenizer.encode(row.text), pair, max_length)
        made.append(one)
        truncated += cut
    return tokenized.collect(made, {'label_ids': label_ids(task, rows)}, pad_id=tokenizer.pad_id, lengths=lengths,
                           truncated=truncated)


def label_ids(task: Task, rows: Sequence[Row]) -> np.ndarray:
    """What a target reads; rows without a label get zeros."""
    if task.kind == 'regression':
        return np.array([row.label or 0.0 for row in rows], np.float32)
    if task.kind == 'multilabel':
        return np.array([[name in (row.label or ()) for name in task.labels] for row in rows], np.float32)
    number = {name: number for number, name in enumerate(task.labels)} | {None: 0}
    return np.array([number[row.label] for row in rows], np.int32)


def decode(task: Task, rows: Sequence[Row], data: tokenized.Tokenized, outputs: dict[str, np.ndarray]
           ) -> list[dict[str, Any]]:
    """A prediction a row: {'label', 'scores'}, {'labels', 'scores'} or {'value'}."""
    logits = outputs['logits']
    if task.kind == 'regression':
        return [{'value': float(value)} for value in logits]
    if task.kind == 'multilabel':
        return [{'labels': [name for name, p in zip(task.labels, row) if p > 0.5],
                 'scores': dict(zip(task.labels, row.round(6).tolist()))} for row in scores.sigmoid(logits)]
    return [{'label': task.labels[int(row.argmax())], 'scores': dict(zip(task.labels, row.round(6).tolist()))}
            for row in scores.softmax(logits)]


def score(task: Task, rows: Sequence[Row], outputs: dict[str, np.ndarray], predictions: list[dict[str, Any]]
          ) -> dict[str, float]:
    """Against the rows' labels."""
    found = {'regression': scores.regression, 'multilabel': scores.multilabel, 'classification': scores.classification}
    return found[task.kind](outputs['logits'], label_ids(task, rows), task.labels)


def baseline(task: Task, rows: Sequence[Row]) -> dict[str, float]:
    """What can be scored without reading: always the training split's most frequent label, its mean, one of two labels;
    and of lengths alone, the most frequent label (the mean) of the training rows with as many words as this one.
    """
    train, truth = task.splits['train'], [row.label for row in rows]
    by_length: dict[int, list[Any]] = {}
    for row in train:
        by_length.setdefault(_length(row), []).append(row.label)
    every = [row.label for row in train]
    if task.kind == 'regression':
        guesses = [np.mean(by_length.get(_length(row), every)) for row in rows]
        return {'mean_mse': float(np.mean((np.array(truth) - np.mean(every)) ** 2)),
                **{f'length_{name}': value for name, value in scores.regression(guesses, truth).items()}}
    common = _most_common(every)
    most = {'majority_accuracy': float(np.mean([label == common for label in truth]))}
    if task.kind == 'multilabel':
        return most
    of_length = {length: task.labels.index(_most_common(found)) for length, found in by_length.items()}
    guesses = [of_length.get(_length(row), task.labels.index(common)) for row in rows]
    lengths = scores.classification(np.eye(len(task.labels))[guesses], label_ids(task, rows), task.labels)
    most |= {f'length_{name}': lengths[name] for name in ('accuracy', 'matthews', 'f1', 'f1_macro') if name in lengths}
    if len(task.labels) == 2:
        share = float(np.mean([label == task.labels[1] for label in truth]))
        most['always_f1'] = 2 * share / (1 + share)  # of always the second label
    return most


def _length(row: Row) -> int:
    """Words of a text; of a pair, how many the first has more than the second."""
    return len(row.text.split()) - len((row.pair or '').split())


def _most_common(found: Sequence[Any]) -> Any:
    return Counter(found).most_common(1)[0][0]


def labelled(rows: Sequence[Row]) -> bool:
    """Whether the rows can be scored."""
    return all(row.label is not None for row in rows)


def files(task: Task, split: str, rows: Sequence[Row], predictions: list[dict[str, Any]]) -> dict[str, str]:
    """One TSV: a row's number and place, the prediction, the label given if any, the text, each label's probability."""
    pairs = any(row.pair is not None for row in rows)
    lines = [('index', 'where', 'prediction', 'label', 'text', *(['text_pair'] if pairs else []),
              *(f'p({label})' for label in task.labels))]
    for number, (row, found) in enumerate(zip(rows, predictions)):
        said = next(found[name] for name in ('label', 'labels', 'value') if name in found)
        lines.append((number, row.where, _written(said), _written(row.label), row.text,
                      *([row.pair] if pairs else []), *(f'{p:.6f}' for p in found.get('scores', {}).values())))
    return {f'predictions_{split}.tsv': tables.as_tsv(lines)}


def _written(label: Any) -> str:
    if isinstance(label, float):
        return f'{label:.6f}'
    return '' if label is None else label if isinstance(label, str) else '|'.join(label)


def parse(value: Any) -> Row:
    """A row of what predict is given: a text, (text, pair), or {'text', 'text_pair'}."""
    if isinstance(value, dict):
        value = (value['text'], *filter(None, [value.get('text_pair')]))
    text, *pair = (value,) if isinstance(value, str) else value
    if len(pair) > 1 or not all(isinstance(part, str) for part in (text, *pair)):
        raise ValueError('a text or two')
    return Row(text, pair[0] if pair else None, None, '')


def describe(row: Row) -> dict[str, Any]:
    """What a prediction is printed with."""
    return {'text': row.text} | ({} if row.pair is None else {'text_pair': row.pair})
