"""Fine-tuning tasks: what is read, and what is learned from it.

A task is a function of its settings that reads the splits (TASKS); its kind says how examples become batches,
outputs become predictions, and predictions are scored (KINDS).
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from bert_jax.cli import UserError, choose, unknown
from bert_jax.tasks import choices, glue, spans, tables, tags, texts
from bert_jax.tasks.task import Task

FEATURES = ('embeddings', 'second_to_last', 'last', 'sum_last4', 'concat_last4', 'sum_all')  # of a BiLSTM


class Kind(NamedTuple):
    """How one shape of answer is learned.

    Attributes:
      target: the head that learns it (model.heads.HEADS).
      options: task -> that head's options.
      module: what stands between rows and the head's arrays. `rows` are one split's, `data` is what `encode` made of
        them, `outputs` are the head's for each example of it:
          encode(task, rows, tokenizer, max_length, lengths) -> tokenized.Tokenized
          decode(task, rows, data, outputs) -> a dict a row: what is predicted
          score(task, rows, outputs, decoded) -> name -> number
          baseline(task, rows) -> what can be scored without reading, by the same names
          labelled(rows) -> whether they can be scored
          files(task, split, rows, decoded) -> file name -> content
          inputs(file, settings) -> the rows of a table that are to be predicted, settings being those of the run's task
          parse(value) -> a row of what `predict` is given; describe(row) -> what is printed with its prediction
          TOO_LONG: what rows that lost tokens are called
    """

    target: str
    options: Callable[[Task], dict[str, Any]]
    module: Any


def _classes(task: Task) -> dict[str, Any]:
    return {'num_classes': len(task.labels)}


def _bilstm(task: Task) -> dict[str, Any]:
    return {'num_classes': len(task.labels), 'features': task.settings['features'],
            'hidden_size': task.settings['lstm_size']}


KINDS = {
    'classification': Kind('classification', _classes, texts),
    'multilabel': Kind('multilabel', _classes, texts),
    'regression': Kind('regression', lambda task: {}, texts),
    'tagging': Kind('tagging', _classes, tags),
    'bilstm_tagging': Kind('bilstm_tagging', _bilstm, tags),
    'span': Kind('span', lambda task: {}, spans),
    'choice': Kind('multiple_choice', lambda task: {'num_choices': task.settings['num_choices']}, choices),
}


def own_texts(kind: str, *, train_file: str, dev_file: str, test_file: str, text_column: str, text_pair_column: str,
              label_column: str, labels: Sequence[str], dev_share: float) -> Task:
    """Sentences or pairs from CSV, TSV or JSON lines, with the user's own column names.

    Args:
      kind: 'classification', 'multilabel' or 'regression'.
      train_file, dev_file, test_file: paths; without dev_file a share of the training rows is cut off by
        a hash of their text; without test_file nothing is predicted but dev. A test file is scored if it has labels.
      text_column, text_pair_column, label_column: names; no pair column, no pairs.
      labels: the label names; empty: those of the whole training file, sorted.
      dev_share: how much becomes dev when there is no dev_file.

    Raises:
      UserError: a missing file or column, a row of another width, an unknown label (file and line).
    """
    read = functools.partial(texts.read, text=text_column, pair=text_pair_column, label=label_column)
    splits, named_by, notes = _splits(train_file, dev_file, test_file, read, dev_share,
                                      lambda row: f'{row.text}\0{row.pair}')
    task = Task(kind, splits, tuple(map(str, labels)), notes=notes)
    if kind == 'regression':
        return texts.with_numbers(dataclasses.replace(task, best='spearman'))
    if kind == 'multilabel':
        return texts.with_label_sets(dataclasses.replace(task, best='f1_micro'), named_by)
    return texts.with_classes(task, named_by)


def tagging(*, train_file: str, dev_file: str, test_file: str, word_column: str, tag_column: str, sentence_column: str,
            scheme: str, labels: Sequence[str], dev_share: float, **settings: Any) -> Task:
    """CoNLL column files and tables; see `tags.read`. A test file without tags is predicted, one with tags scored too.

    For the other settings see `conll2003`.
    """
    if settings['document_context'] and tags.is_table(train_file, word_column, tag_column):
        raise UserError('--config.task.document_context=True: tables say nothing of documents; column files do, with '
                        f'{tags.DOCUMENT} between them.')
    read = functools.partial(tags.read, word_column=word_column, tag_column=tag_column, scheme=scheme,
                             sentence_column=sentence_column)
    splits, named_by, notes = _splits(train_file, dev_file, test_file, read, dev_share, lambda row: ' '.join(row.words))
    task = _tagging(splits, tuple(map(str, labels)), named_by, **settings)
    return dataclasses.replace(task, notes=(*notes, *task.notes))


def conll2003(*, folder: str, **settings: Any) -> Task:
    """eng.train, eng.testa (dev) and eng.testb (test, scored too), IOB1 tags in the last column.

    Args:
      folder: where they are.
      settings: document_context, to fill windows up with the sentences around; features, FEATURES that a BiLSTM of
        lstm_size reads from the encoder, which then stays as it is (see heads.BiLstmTagging), or ''.
    """
    if not folder:
        raise UserError('--config.task.folder=FOLDER is missing: the folder with eng.train, eng.testa and eng.testb.')
    splits = {split: tags.read(f'{folder}/eng.{name}', '', '', 'iob1')
              for split, name in (('train', 'train'), ('dev', 'testa'), ('test', 'testb'))}
    return _tagging(splits, (), splits['train'], **settings)


def _tagging(splits: dict[str, list[Any]], labels: tuple[str, ...], named_by: Sequence[tags.Sentence], *,
             document_context: bool, features: str, lstm_size: int) -> Task:
    if features and features not in FEATURES:
        raise unknown('features', features, FEATURES)
    _check_positive(lstm_size=lstm_size)
    settings = {'document_context': document_context} | (
        {'features': features, 'lstm_size': lstm_size} if features else {})
    return tags.with_tags(Task('bilstm_tagging' if features else 'tagging', splits, labels, 'f1', settings), named_by)


def span(*, train_file: str, dev_file: str, test_file: str, null_answers: bool, stride: int, max_query_length: int,
         max_answer_length: int, n_best: int, dev_share: float, **columns: str) -> Task:
    """SQuAD 1.1 and 2.0 (.json), or tables; see `spans.read`, also for their columns."""
    read = functools.partial(spans.read, **columns)
    splits, _, notes = _splits(train_file, dev_file, test_file, read, dev_share, lambda row: row.passage)
    if any(row.labelled for row in splits.get('test', ())) and not any(row.answers for row in splits['test']):
        splits['test'] = [dataclasses.replace(row, labelled=False) for row in splits['test']]
        notes = (f'{test_file}: no answers in it, so test is predicted, not scored',)
    _check_positive(stride=stride, max_query_length=max_query_length, max_answer_length=max_answer_length,
                    n_best=n_best)
    if not null_answers:
        for rows in splits.values():
            for row in rows:
                if row.labelled and not row.answers:
                    raise UserError(f'{row.where}: a question without an answer; give --config.task.null_answers=True.')
    return Task('span', splits, best='f1', settings={
        'null_answers': null_answers, 'stride': stride, 'max_query_length': max_query_length,
        'max_answer_length': max_answer_length, 'n_best': n_best, 'null_threshold': None}, notes=notes)


def choice(*, train_file: str, dev_file: str, test_file: str, format: str, dev_share: float, **columns: Any) -> Task:
    """SWAG's CSV, CommonsenseQA's JSON lines, or tables; see `choices.read`, also for their columns."""
    read = functools.partial(choices.read, form=format, **(columns if format == 'plain' else {}))
    splits, _, notes = _splits(train_file, dev_file, test_file, read, dev_share, lambda row: row.context)
    return Task('choice', splits, settings={'num_choices': choices.most_choices(splits)}, notes=notes)


def _splits(train_file: str, dev_file: str, test_file: str, read: Callable, dev_share: float,
            key: Callable[[Any], str]) -> tuple[dict[str, list[Any]], list[Any], tuple[str, ...]]:
    """(split -> examples, all of the training file, notes); a test file whose labels cannot be read does without."""
    if not train_file:
        raise UserError('--config.task.train_file=FILE is missing.')
    if not 0 < dev_share < 1:
        raise UserError(f'--config.task.dev_share={dev_share}: a number between 0 and 1 is expected.')
    whole = read(train_file)
    train, dev = (whole, read(dev_file)) if dev_file else tables.cut_dev(whole, dev_share, key, train_file)
    splits, notes = {'train': train, 'dev': dev}, ()
    if test_file:
        try:
            splits['test'] = read(test_file)
        except UserError as error:
            splits['test'] = read(test_file, labelled=False)
            notes = (f'{str(error).removesuffix(".")}, so test is predicted, not scored',)
    return splits, whole, notes


def _check_positive(**settings: int) -> None:
    for name, value in settings.items():
        if value < 1:
            raise UserError(f'--config.task.{name}={value}: one or more is expected.')


def read(name: str, settings: dict[str, Any]) -> Task:
    """The task of that name, with the settings that configs/finetune.py has for it.

    Raises:
      UserError: no such task, settings of another one, or what the task's own reader finds.
    """
    reader = choose('task', TASKS, name)
    try:
        inspect.signature(reader).bind(**settings)
    except TypeError as error:
        raise UserError(f'--config.task.name={name}: {error}; --config configs/finetune.py:{name} has its settings.'
                        ) from error
    task = reader(**settings)
    counts = {split: sum(map(has_empty_text, rows)) for split, rows in task.splits.items()}
    said = ', '.join(f'{count:,} of {len(task.splits[split]):,} {split}' for split, count in counts.items() if count)
    return dataclasses.replace(task, notes=(*task.notes, f'{said} texts are empty')) if said else task


def has_empty_text(row: Any) -> bool:
    """Whether an example lacks a text, one of its pair, its question, passage, context or words."""
    if isinstance(row, tags.Sentence):
        return not ''.join(row.words).strip()
    parts = (getattr(row, name, None) for name in ('text', 'pair', 'passage', 'context'))
    return any(part is not None and not part.strip() for part in parts)


TASKS = {
    'classification': functools.partial(own_texts, 'classification'),
    'multilabel': functools.partial(own_texts, 'multilabel'),
    'regression': functools.partial(own_texts, 'regression'),
    'tagging': tagging, 'conll2003': conll2003, 'span': span, 'choice': choice,
    **{name: functools.partial(glue.read, name) for name in glue.LAYOUTS},
}
