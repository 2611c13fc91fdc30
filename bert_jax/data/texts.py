"""Sentences and pairs with a class, several classes, or a number: classification, multi-label, regression."""

import csv
import dataclasses
import io
import math
from collections import Counter
from collections.abc import Callable, Sequence
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
        value = tables.column(where, record, label) if labelled else None
        if labelled and value is None:
            raise UserError(f'{where}: no label.')
        other = tables.text(where, record, pair) if pair else None
        rows.append(Row(tables.text(where, record, text), other,
                        value if value is None or isinstance(value, list) else str(value), where))
    if not rows:
        raise UserError(f'{file}: no rows in it.')
    return rows


def with_classes(task: Task, named_by: Sequence[Row] = ()) -> Task:
    """A task whose label names, unless given, are those of `named_by`; checks every label.

    Raises:
      UserError: fewer than two labels, a row without one, or one that is not in the set (file and line).
    """
    labels = task.labels or tuple(sorted({str(row.label) for row in named_by} - {''}))
    _check_count(task, labels)

    def problem(row: Row) -> str:
        if row.label == '':
            return 'no label'
        known = isinstance(row.label, str) and row.label in labels
        return '' if known else f'label {row.label!r} is not in the label set: {", ".join(labels)}'

    return dataclasses.replace(_checked(task, problem), labels=labels)


def with_label_sets(task: Task, named_by: Sequence[Row] = ()) -> Task:
    """A multi-label task: each label is a list (JSON lines) or names with |, commas or spaces between them; or none.

    What stands between names is the first of these that any row has: with commas, names may have spaces.
    """
    texts = [row.label for rows in (named_by, *task.splits.values()) for row in rows if isinstance(row.label, str)]
    between = next((sign for sign in '|,' if any(sign in text for text in texts)), None)

    def names(row: Row) -> list[str]:
        found = row.label.split(between) if isinstance(row.label, str) else map(str, row.label)
        return sorted({name.strip() for name in found} - {''})

    labels = task.labels or tuple(sorted({name for row in named_by for name in names(row)}))
    _check_count(task, labels)

    def problem(row: Row) -> str:
        unknown = [name for name in names(row) if name not in labels]
        return f'label {unknown[0]!r} is not in the label set: {", ".join(labels)}' if unknown else ''

    task = _checked(task, problem)
    return _labels_as(task, lambda row: tuple(names(row)), labels)


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


def _check_count(task: Task, labels: Sequence[str]) -> None:
    if len(labels) < 2:
        file = task.splits['train'][0].where.rpartition(':')[0]
        raise UserError(f'{file}: {len(labels)} labels ({", ".join(labels)}); two or more are expected.')


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
    """One TSV: the row's number, what is predicted, the label given if any, each label's probability."""
    out = io.StringIO()
    writer = csv.writer(out, delimiter='\t', lineterminator='\n')
    writer.writerow(('index', 'prediction', 'label', *(f'p({label})' for label in task.labels)))
    for number, (row, found) in enumerate(zip(rows, predictions)):
        said = next(found[name] for name in ('label', 'labels', 'value') if name in found)
        writer.writerow((number, _written(said), _written(row.label),
                         *(f'{p:.6f}' for p in found.get('scores', {}).values())))
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
