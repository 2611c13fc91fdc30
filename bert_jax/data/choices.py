"""Multiple choice: a context, its possible continuations, and which is right."""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from bert_jax import scores
from bert_jax.cli import UserError, choose
from bert_jax.data import encoded, tables
from bert_jax.data.task import Task
from bert_jax.data.tokenizer import Tokenizer


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


def read(file: str, form: str) -> list[Question]:
    """Questions of a file.

    Args:
      file: its path.
      form: 'swag' (its CSV: sent1, sent2, ending0.., label), 'commonsenseqa' (its JSON lines), or 'plain': JSON lines
        {"context": text, "choices": [text, ...], "label": number from 0}.

    Raises:
      UserError: a missing column, fewer than two choices, a label that is none of them (file and line), no question.
    """
    questions = list(choose('format', FORMATS, form)(file))
    for question in questions:
        if len(question.choices) < 2:
            raise UserError(f'{question.where}: {len(question.choices)} choices; two or more are expected.')
        if question.label is not None and not 0 <= question.label < len(question.choices):
            raise UserError(f'{question.where}: label {question.label} is none of the {len(question.choices)} choices.')
    if not questions:
        raise UserError(f'{file}: no questions in it.')
    return questions


ENDING = re.compile(r'ending\d+')


def _swag(file: str) -> Iterator[Question]:
    for where, record in tables.read_table(file):
        names = sorted((name for name in record if ENDING.fullmatch(name)), key=lambda name: int(name[len('ending'):]))
        endings = [record[name] for name in names]
        while endings and not endings[-1].strip():  # a question with fewer than others
            endings.pop()
        start = tables.column(where, record, 'sent2')
        label = record.get('label', '')
        yield Question(tables.column(where, record, 'sent1'), tuple(f'{start} {ending}'.strip() for ending in endings),
                       _whole(where, label) if label != '' else None, where)


def _whole(where: str, value: Any) -> int:
    try:
        number = int(value)
        if isinstance(value, float) and number != value:
            raise ValueError
        return number
    except (TypeError, ValueError) as error:
        raise UserError(f'{where}: label {value!r} is not a whole number.') from error


def _commonsenseqa(file: str) -> Iterator[Question]:
    for where, record in tables.read_table(file):
        try:
            choices = record['question']['choices']
            names, texts = [choice['label'] for choice in choices], tuple(choice['text'] for choice in choices)
            stem, key = record['question']['stem'], record.get('answerKey')
        except (KeyError, TypeError) as error:
            raise UserError(f'{where}: question.stem and question.choices [label, text] are expected.') from error
        if key and key not in names:
            raise UserError(f'{where}: answerKey {key!r} is none of the choices: {", ".join(names)}.')
        yield Question(stem, texts, names.index(key) if key else None, where)


def _plain(file: str) -> Iterator[Question]:
    for where, record in tables.read_table(file):
        choices = tables.column(where, record, 'choices')
        if not isinstance(choices, list):
            raise UserError(f'{where}: choices is not a list.')
        label = record.get('label')
        yield Question(str(tables.column(where, record, 'context')), tuple(map(str, choices)),
                       None if label is None else _whole(where, label), where)


FORMATS = {'swag': _swag, 'commonsenseqa': _commonsenseqa, 'plain': _plain}


def most_choices(task: Task) -> int:
    """C, of any question of any split."""
    return max(len(question.choices) for rows in task.splits.values() for question in rows)


def encode(task: Task, rows: Sequence[Question], tokenizer: Tokenizer, max_length: int, lengths: tuple[int, ...]
           ) -> encoded.Encoded:
    """C rows a question, [CLS] context [SEP] choice [SEP]; missing choices are empty rows that are not real."""
    group, made, truncated = task.settings['num_choices'], [], 0
    right, real = np.zeros((2, len(rows) * group), np.int32)
    for number, question in enumerate(rows):
        context = tokenizer.encode(question.context)
        for choice in range(group):
            exists = choice < len(question.choices)
            text = tokenizer.encode(question.choices[choice]) if exists else []
            one, cut = encoded.join(tokenizer, context if exists else [], text, max_length)
            made.append(one)
            truncated += cut
            real[number * group + choice] = exists
        if question.label is not None:
            right[number * group + question.label] = 1
    return encoded.collect(made, {'label_ids': right, 'is_real_example': real}, pad_id=tokenizer.pad_id,
                           lengths=lengths, group=group, truncated=truncated)


def decode(task: Task, rows: Sequence[Question], data: encoded.Encoded, outputs: dict[str, np.ndarray]
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
    """One TSV: the question's number, the choice predicted, the right one if known, each choice's probability."""
    lines = ['index\tprediction\tlabel\tprobabilities']
    for number, (row, found) in enumerate(zip(rows, predictions)):
        label = '' if row.label is None else row.label
        p = ' '.join(f'{p:.6f}' for p in found['scores'])
        lines.append(f'{number}\t{found["choice"]}\t{label}\t{p}')
    return {f'predictions_{split}.tsv': '\n'.join(lines) + '\n'}


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
