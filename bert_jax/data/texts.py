"""Sentences and pairs with a class, several classes, or a number: classification, multi-label, regression."""

import ast
import csv
import dataclasses
import io
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from bert_jax import scores
from bert_jax.cli import UserError
from bert_jax.data import encoded, tables
from bert_jax.data.task import Task
from bert_jax.data.tokenizer import Tokenizer

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


def read(file: str, text: str, pair: str, label: str, labelled: bool = True) -> list[Row]:
    """Rows of a table; `pair` may be '', for none. Unless they are `labelled`, labels are not looked at."""
    rows = []
    for where, record in tables.read_table(file):
        value = _label(where, tables.column(where, record, label)) if labelled else None
        if labelled and value is None:
            raise UserError(f'{where}: no label.')
        other = tables.text(where, record, pair) if pair else None
        rows.append(Row(tables.text(where, record, text), other, value, where))
    if not rows:
        raise UserError(f'{file}: no rows in it.')
    return rows


def _label(where: str, value: Any) -> Any:
    """A label as it is given: a text or number as text, a list as it is; None for none (null, NaN)."""
    if value is None or value != value:
        return None
    if isinstance(value, dict) or (isinstance(value, list) and any(isinstance(one, (dict, list)) for one in value)):
        raise UserError(f'{where}: the label {json.dumps(value)[:40]} is neither a name, a number nor a list of names.')
    return value if isinstance(value, list) else _named(value)


def _named(value: Any) -> str:
    """The name of a label that may be a number: 1.0 is 1."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def with_classes(task: Task, named_by: Sequence[Row] = ()) -> Task:
    """A task whose label names, unless given, are those of `named_by`; checks every label.

    Blanks around a label are no part of it, and 1.0 is 1 where there is a 1 too. Whole numbers are sorted as numbers.

    Raises:
      UserError: fewer than two labels, one that is given twice, a row without one, or one that is not in the set (file
        and line).
    """
    task, tidied = _tidied(task)
    labels = task.labels or sort_labels(tidied(row.label) for row in named_by if isinstance(row.label, str))
    check_labels(task.labels or labels, task.splits['train'][0].where)

    def problem(row: Row) -> str:
        if row.label == '':
            return 'no label'
        if isinstance(row.label, list):
            return 'a list is the label of a multilabel task (--config configs/finetune.py:multilabel)'
        return '' if row.label in labels else f'label {row.label!r} is not in the label set: {", ".join(labels)}'

    return dataclasses.replace(_checked(task, problem), labels=labels)


def _tidied(task: Task) -> tuple[Task, Callable[[str], str]]:
    """The task with its labels tidied, with a note of how many were not; and what tidies one."""
    found = {row.label for rows in task.splits.values() for row in rows if isinstance(row.label, str)}
    names = {label.strip() for label in found}

    def tidied(label: str) -> str:
        label = label.strip()
        whole = re.fullmatch(r'(-?\d+)\.0+', label)
        return whole[1] if whole and whole[1] in names and label not in task.labels else label

    changed = [label for label in found if tidied(label) != label]
    if not changed:
        return task, tidied
    count = sum(row.label in changed for rows in task.splits.values() for row in rows if isinstance(row.label, str))
    note = (f'{count:,} labels are taken for others that differ in blanks or in .0 alone: '
            f'{", ".join(map(repr, sorted(changed)[:5]))}')
    task = _labels_as(task, lambda row: tidied(row.label) if isinstance(row.label, str) else row.label, task.labels)
    return dataclasses.replace(task, notes=(*task.notes, note)), tidied


def sort_labels(labels: Iterable[str]) -> tuple[str, ...]:
    """The different ones: whole numbers by size, others by their letters."""
    found = set(labels) - {''}
    whole = all(re.fullmatch(r'-?\d+', label) for label in found)
    return tuple(sorted(found, key=int if whole else str))


def check_labels(labels: Sequence[str], where: str) -> None:
    """Refuses label names that are fewer than two, or one that stands twice."""
    if len(labels) < 2:
        raise UserError(f'{where.rpartition(":")[0]}: {len(labels)} labels ({", ".join(labels)}); two or more are '
                        'expected.')
    twice = next((label for label in labels if list(labels).count(label) > 1), None)
    if twice is not None:
        raise UserError(f'--config.task.labels: {twice!r} stands twice.')


def with_label_sets(task: Task, named_by: Sequence[Row] = ()) -> Task:
    """A multi-label task: each label is a list (JSON lines) or names with |, commas or spaces between them; or none.

    What stands between names is the first of these that any row has: with commas, names may have spaces. A list that
    was written as text ("['a', 'b']") is a list. Lists of as many 0s and 1s as --config.task.labels has names say which
    of these a row has.

    Raises:
      UserError: as `with_classes`; lists of 0s and 1s whose names are not given.
    """
    task, named_by = _labels_as(task, _as_list, task.labels), [dataclasses.replace(
        row, label=_as_list(row)) for row in named_by]
    every = [row for rows in (named_by, *task.splits.values()) for row in rows if row.label is not None]
    texts = [row.label for row in every if isinstance(row.label, str)]
    between = next((sign for sign in '|,' if any(sign in text for text in texts)), None)
    hot = _multi_hot(task, every)

    def names(row: Row) -> list[str]:
        if hot:
            return [label for label, there in zip(task.labels, row.label) if there]
        found = row.label.split(between) if isinstance(row.label, str) else map(_named, row.label)
        return sorted({name.strip() for name in found} - {''})

    labels = task.labels or sort_labels(name for row in named_by for name in names(row))
    check_labels(labels, task.splits['train'][0].where)

    def problem(row: Row) -> str:
        unknown = [name for name in names(row) if name not in labels]
        return f'label {unknown[0]!r} is not in the label set: {", ".join(labels)}' if unknown else ''

    task = _checked(task, problem)
    return _labels_as(task, lambda row: tuple(names(row)), labels)


def _as_list(row: Row) -> Any:
    """The label, as a list where it is one that was written as text (by pandas, or by NumPy without commas)."""
    text = row.label
    if not isinstance(text, str) or not re.fullmatch(r'\s*\[.*\]\s*', text, re.DOTALL):
        return text
    try:
        found = ast.literal_eval(re.sub(r"""(['"])\s+(['"])""", r'\1, \2', text.strip()))
    except (ValueError, SyntaxError) as error:
        raise UserError(f'{row.where}: the label {text[:40]!r} looks like a list, but is none.') from error
    return _label(row.where, found)


def _multi_hot(task: Task, rows: Sequence[Row]) -> bool:
    """Whether every label is a list of 0s and 1s of one length, one for each name of the config."""
    lists = [row.label for row in rows if isinstance(row.label, list)]
    sizes = {len(one) for one in lists}
    hot = len(lists) == len(rows) and len(sizes) == 1 and max(sizes) > 1 and all(
        type(value) in (int, bool) and value in (0, 1) for one in lists for value in one)
    if hot and len(task.labels) != max(sizes):
        raise UserError(f'{rows[0].where}: the labels are lists of {max(sizes)} 0s and 1s, one for each name; '
                        f'--config.task.labels=(...) gives the {max(sizes)} names, or write the names themselves.')
    return hot


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


def empty_texts(task: Task) -> Task:
    """The task, with a note of how many of its texts are empty."""
    counts = {split: sum(not row.text.strip() for row in rows) for split, rows in task.splits.items()}
    said = ', '.join(f'{count:,} of {len(task.splits[split]):,} {split}' for split, count in counts.items() if count)
    return dataclasses.replace(task, notes=(*task.notes, f'{said} texts are empty')) if said else task


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
           ) -> encoded.Encoded:
    """One example a row; labels as label_ids [R] int32, multi-hot float32 [R, C], or float32 [R]."""
    made, truncated = [], 0
    for row in rows:
        pair = None if row.pair is None else tokenizer.encode(row.pair)
        one, cut = encoded.join(tokenizer, tokenizer.encode(row.text), pair, max_length)
        made.append(one)
        truncated += cut
    return encoded.collect(made, {'label_ids': label_ids(task, rows)}, pad_id=tokenizer.pad_id, lengths=lengths,
                           truncated=truncated)


def label_ids(task: Task, rows: Sequence[Row]) -> np.ndarray:
    """What a target reads; rows without a label get zeros."""
    if task.kind == 'regression':
        return np.array([row.label or 0.0 for row in rows], np.float32)
    if task.kind == 'multilabel':
        return np.array([[name in (row.label or ()) for name in task.labels] for row in rows], np.float32)
    return np.array([task.labels.index(row.label) if row.label is not None else 0 for row in rows], np.int32)


def decode(task: Task, rows: Sequence[Row], data: encoded.Encoded, outputs: dict[str, np.ndarray]
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
    of_length = {length: _most_common(labels) for length, labels in by_length.items()}
    guesses = [task.labels.index(of_length.get(_length(row), common)) for row in rows]
    lengths = scores.classification(np.eye(len(task.labels))[guesses], label_ids(task, rows), task.labels)
    most |= {f'length_{name}': lengths[name] for name in ('accuracy', 'matthews', 'f1', 'f1_macro') if name in lengths}
    if len(task.labels) == 2:
        share = float(np.mean([label == task.labels[1] for label in truth]))
        most['always_f1'] = 2 * share / (1 + share)  # of always the second label
    return most


def _length(row: Row) -> int:
    """Words of a text; of a pair, how many the first has more than the second."""
    return len(row.text.split()) - len((row.pair or '').split())


def _most_common(labels: Sequence[Any]) -> Any:
    return Counter(labels).most_common(1)[0][0]


def labelled(rows: Sequence[Row]) -> bool:
    """Whether the rows can be scored."""
    return all(row.label is not None for row in rows)


def files(task: Task, split: str, rows: Sequence[Row], predictions: list[dict[str, Any]]) -> dict[str, str]:
    """One TSV: a row's number and place, what is predicted, the label given if any, the text, each label's probability.
    """
    out = io.StringIO()
    writer = csv.writer(out, delimiter='\t', lineterminator='\n')
    pairs = any(row.pair is not None for row in rows)
    writer.writerow(('index', 'where', 'prediction', 'label', 'text', *(['text_pair'] if pairs else []),
                     *(f'p({label})' for label in task.labels)))
    for number, (row, found) in enumerate(zip(rows, predictions)):
        said = next(found[name] for name in ('label', 'labels', 'value') if name in found)
        writer.writerow((number, row.where, _written(said), _written(row.label), row.text,
                         *([row.pair] if pairs else []), *(f'{p:.6f}' for p in found.get('scores', {}).values())))
    return {f'predictions_{split}.tsv': out.getvalue()}


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
