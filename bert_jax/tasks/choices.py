"""Multiple choice: a context, its possible continuations, and which is right."""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from bert_jax.cli import UserError, choose
from bert_jax.data.tokenizer import Tokenizer
from bert_jax.tasks import scores, tables, tokenized
from bert_jax.tasks.task import Task

TOO_LONG = 'choices with their contexts are longer than max_length'


@dataclasses.dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
      context: what comes before, or the question.
      choices: two or more.
      label: the right one's number, None where it is not known.
      where: file and line.
    """

    context: str
    choices: tuple[str, ...]
    label: int | None
    where: str


def read(file: str, form: str, labelled: bool = True, **columns: Any) -> list[Question]:
    """Questions of a file.

    Args:
      file: its path.
      form: 'swag' (its CSV: sent1, sent2, ending0.., label), 'commonsenseqa' (its JSON lines), or 'plain': a table
        (.csv, .tsv, .jsonl).
      labelled: whether each question must say which choice is right; else none is looked for.
      columns: of the plain format: context_column; choice_columns, one that holds a list or one for each choice,
        empty where a question has fewer; label_column, the right choice's number from 0. Without names they are
        called 'context', 'choices' and 'label'.

    Raises:
      UserError: a missing column, fewer than two choices, an empty one, no label, a label that is none of them (file
        and line), no question.
    """
    questions = list(choose('format', FORMATS, form)(file, labelled, **columns))
    for question in questions:
        if len(question.choices) < 2:
            raise UserError(f'{question.where}: {len(question.choices)} choices; two or more are expected.')
        if labelled and question.label is None:
            raise UserError(f'{question.where}: no label.')
        if question.label is not None and not 0 <= question.label < len(question.choices):
            raise UserError(f'{question.where}: label {question.label} is none of the {len(question.choices)} choices.')
    if not questions:
        raise UserError(f'{file}: no questions in it.')
    return questions


def inputs(file: str, settings: dict[str, Any]) -> list[Question]:
    """Questions of a table without answers; of a run with such columns, or the usual ones."""
    form = settings.get('format', 'plain')
    if form != 'plain':
        return read(file, form, labelled=False)
    known, several = tables.columns(file), settings.get('choice_columns', ())
    return read(file, form, labelled=False,
                context_column=tables.chosen(known, settings.get('context_column', ''), 'context'),
                choice_columns=several if several and set(several) <= set(known) else ('choices',))


ENDING = re.compile(r'ending\d+')


def _swag(file: str, labelled: bool) -> Iterator[Question]:
    for where, record in tables.read_table(file):
        names = sorted((name for name in record if ENDING.fullmatch(name)), key=lambda name: int(name[len('ending'):]))
        start, endings = tables.text(where, record, 'sent2'), _fewer(where, [record[name] for name in names])
        yield Question(tables.text(where, record, 'sent1'), tuple(f'{start} {ending}'.strip() for ending in endings),
                       _label(where, record, 'label') if labelled else None, where)


def _fewer(where: str, choices: list[Any]) -> list[Any]:
    """Without the empty ones at the end, of a question that has fewer than others."""
    empty = [choice is None or not str(choice).strip() for choice in choices]
    while empty and empty[-1]:
        empty.pop()
    if any(empty):
        raise UserError(f'{where}: choice {empty.index(True)} is empty, but not those after it.')
    return choices[:len(empty)]


def _label(where: str, record: dict[str, Any], name: str) -> int | None:
    value = tables.column(where, record, name)
    return None if value == '' or tables.is_null(value) else tables.whole(where, name, value)


def _commonsenseqa(file: str, labelled: bool) -> Iterator[Question]:
    for where, record in tables.read_table(file):
        try:
            choices = record['question']['choices']
            names = [choice['label'] for choice in choices]
            texts = tuple(tables.text(where, choice, 'text') for choice in choices)
            stem, key = tables.text(where, record['question'], 'stem'), record.get('answerKey') if labelled else None
        except (KeyError, TypeError) as error:
            raise UserError(f'{where}: question.stem and question.choices [label, text] are expected.') from error
        if key and key not in names:
            raise UserError(f'{where}: answerKey {key!r} is none of the choices: {", ".join(map(str, names))}.')
        yield Question(stem, texts, names.index(key) if key else None, where)


def _plain(file: str, labelled: bool, *, context_column: str = 'context', choice_columns: Sequence[str] = ('choices',),
           label_column: str = 'label') -> Iterator[Question]:
    for where, record in tables.read_table(file):
        found = [tables.column(where, record, name) for name in choice_columns]
        if len(found) == 1:
            (found,) = found
            if not isinstance(found, list):
                raise UserError(f'{where}: {choice_columns[0]} is not a list; --config.task.choice_columns takes the '
                                'names of several columns too, one for each choice.')
        texts = tuple(tables.as_text(where, 'a choice', choice) for choice in _fewer(where, list(found)))
        label = _label(where, record, label_column) if labelled else None
        yield Question(tables.text(where, record, context_column), texts, label, where)


FORMATS = {'swag': _swag, 'commonsenseqa': _commonsenseqa, 'plain': _plain}


def most_choices(splits: dict[str, list[Question]]) -> int:
    """C, of any question of any split."""
    return max(len(question.choices) for rows in splits.values() for question in rows)


def encode(task: Task, rows: Sequence[Question], tokenizer: Tokenizer, max_length: int, lengths: tuple[int, ...]
           ) -> tokenized.Tokenized:
    """C rows a question, [CLS] context [SEP] choice [SEP]; missing choices are empty rows that are not real."""
    group, made, truncated = task.settings['num_choices'], [], 0
    right, real = np.zeros((2, len(rows) * group), np.int32)
    for number, question in enumerate(rows):
        context = tokenizer.encode(question.context)
        for choice in range(group):
            exists = choice < len(question.choices)
            text = tokenizer.encode(question.choices[choice]) if exists else []
            one, cut = tokenized.join(tokenizer, context if exists else [], text, max_length)
            made.append(one)
            truncated += cut
            real[number * group + choice] = exists
        if question.label is not None:
            right[number * group + question.label] = 1
    return tokenized.collect(made, {'label_ids': right, 'is_real_example': real}, pad_id=tokenizer.pad_id,
                           lengths=lengths, group=group, truncated=truncated)


def decode(task: Task, rows: Sequence[Question], data: tokenized.Tokenized, outputs: dict[str, np.ndarray]
           ) -> list[dict[str, Any]]:
    """{'choice': number, 'text', 'scores': [probability of each]} a question."""
    found = []
    for row, p in zip(rows, scores.softmax(outputs['logits'])):
        best = int(p.argmax())
        found.append({'choice': best, 'text': row.choices[best], 'scores': p[:len(row.choices)].round(6).tolist()})
    return found


def score(task: Task, rows: Sequence[Question], outputs: dict[str, np.ndarray], predictions: list[dict[str, Any]]
          ) -> dict[str, float]:
    """Accuracy."""
    return {'accuracy': float(np.mean([row.label == found['choice'] for row, found in zip(rows, predictions)]))}


def baseline(task: Task, rows: Sequence[Question]) -> dict[str, float]:
    """Always the position that is most often right in training; the longest choice."""
    ((common, _),) = Counter(row.label for row in task.splits['train']).most_common(1)
    longest = [max(range(len(row.choices)), key=lambda i, row=row: len(row.choices[i])) for row in rows]
    return {'majority_accuracy': float(np.mean([row.label == common for row in rows])),
            'longest_accuracy': float(np.mean([row.label == guess for row, guess in zip(rows, longest)]))}


def labelled(rows: Sequence[Question]) -> bool:
    """Whether the questions can be scored."""
    return all(row.label is not None for row in rows)


def files(task: Task, split: str, rows: Sequence[Question], predictions: list[dict[str, Any]]) -> dict[str, str]:
    """One TSV: a question's number and place, the choice predicted, the right one if known, texts, probabilities."""
    lines = [('index', 'where', 'prediction', 'label', 'context', 'text', 'probabilities')]
    for number, (row, found) in enumerate(zip(rows, predictions)):
        lines.append((number, row.where, found['choice'], '' if row.label is None else row.label, row.context,
                      found['text'], ' '.join(f'{p:.6f}' for p in found['scores'])))
    return {f'predictions_{split}.tsv': tables.as_tsv(lines)}


def parse(value: Any) -> Question:
    """A question of what predict is given: (context, choice, choice, ...), or {'context', 'choices'}."""
    if isinstance(value, dict):
        if not isinstance(value['choices'], list):
            raise ValueError('a list of choices')
        value = value['context'], *value['choices']
    context, *options = value
    if isinstance(value, str) or len(options) < 2 or not all(isinstance(part, str) for part in value):
        raise ValueError('a context and two choices or more')
    return Question(context, tuple(options), None, '')


def describe(row: Question) -> dict[str, Any]:
    """What a prediction is printed with."""
    return {'context': row.context, 'choices': list(row.choices)}
