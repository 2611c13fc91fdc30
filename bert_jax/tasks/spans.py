"""Extractive question answering: passages -> overlapping windows -> answers cut from the passage.

Devlin et al. 2019, 4.2 and 4.3; windows and the best-context rule as in the original run_squad.py.
"""

import bisect
import dataclasses
import json
import operator
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from bert_jax import cli
from bert_jax.cli import UserError
from bert_jax.data.tokenizer import Tokenizer
from bert_jax.tasks import scores, tables, tokenized
from bert_jax.tasks.task import Task

TOO_LONG = 'questions are longer than max_query_length'
LOWEST = -1e9  # the score of an answer from a passage without tokens; JSON has no infinity


@dataclasses.dataclass(frozen=True)
class Question:
    """One question on a passage.

    Attributes:
      id: unique in its file.
      text, passage: what is asked, of what.
      answers: (text, where it begins in the passage, in characters); () where there is none, or none is known.
      labelled: whether answers are known.
      where: its file, and its line or id.
    """

    id: str
    text: str
    passage: str
    answers: tuple[tuple[str, int], ...]
    labelled: bool
    where: str


def read(file: str, labelled: bool = True, **columns: str) -> list[Question]:
    """Questions of a SQuAD 1.1 or 2.0 file (.json), or of a table (.csv, .tsv, .jsonl).

    Args:
      file: its path.
      labelled: whether answers are known; else none is looked for.
      columns: of a table, question_column, passage_column, answer_column (null or white space where there is none), and
        answer_start_column and id_column, which may be missing under their own names; without names they are called
        as they are here.

    Raises:
      UserError: not the format, a missing column, an answer that is not in its passage (file and id or line), no
        question.
    """
    questions = list(_squad(file, labelled) if file.endswith('.json') else _from_table(file, labelled, **columns))
    if not questions:
        raise UserError(f'{file}: no questions in it.')
    blank = sum(not text.strip() for question in questions for text, _ in question.answers)
    if blank:
        cli.note(f'{file}: {blank:,} answers are empty or white space alone, and count as none.')
        questions = [dataclasses.replace(question, answers=tuple(
            answer for answer in question.answers if answer[0].strip())) for question in questions]
    seen = set()
    for question in questions:
        if question.id in seen:
            raise UserError(f'{question.where}: the id {question.id} stands twice.')
        seen.add(question.id)
        for text, start in question.answers:
            if start < 0 or question.passage[start:start + len(text)] != text:
                raise UserError(f'{question.where}: the answer {text!r} is not in the passage at {start}.')
    return questions


COLUMNS = ('question', 'passage', 'answer', 'answer_start', 'id')


def inputs(file: str, settings: dict[str, Any]) -> list[Question]:
    """Questions of a file without answers; of a run with such columns, or the usual ones."""
    columns = {}
    if not file.endswith('.json'):
        known = tables.columns(file)
        columns = {f'{name}_column': tables.chosen(known, settings.get(f'{name}_column', ''), name) for name in COLUMNS}
    rows = read(file, labelled=False, **columns)
    return [dataclasses.replace(row, id='') if row.id == row.where else row for row in rows]


def _squad(file: str, labelled: bool) -> Iterator[Question]:
    with tables.open_text(file) as lines:
        try:
            content = lines.read()
            articles = json.loads(content)['data']
            tables.check_characters(file, content, articles)
            for article in articles:
                for paragraph in article['paragraphs']:
                    for qa in paragraph['qas']:
                        if labelled and 'answers' not in qa:
                            raise UserError(f'{file}, question {qa["id"]}: no answers.')
                        given = qa['answers'] if labelled and not qa.get('is_impossible') else ()
                        answers = tuple((answer['text'], operator.index(answer['answer_start'])) for answer in given)
                        for text in (qa['question'], paragraph['context'], *(text for text, _ in answers)):
                            if not isinstance(text, str):
                                raise ValueError(f'{text!r} where a text is expected, question {qa["id"]}')
                        yield Question(str(qa['id']), qa['question'], paragraph['context'], answers, labelled,
                                       f'{file}, question {qa["id"]}')
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f'{file}: not a SQuAD file ({type(error).__name__}: {error}).') from error


def _from_table(file: str, labelled: bool, *, question_column: str = 'question', passage_column: str = 'passage',
                answer_column: str = 'answer', answer_start_column: str = 'answer_start', id_column: str = 'id'
                ) -> Iterator[Question]:
    for where, record in tables.read_table(file):
        question, passage = (tables.text(where, record, name) for name in (question_column, passage_column))
        answer = tables.column(where, record, answer_column) if labelled else None
        start = _optional(where, record, answer_start_column, 'answer_start') if labelled else None
        id_ = _optional(where, record, id_column, 'id')
        if answer is not None and not isinstance(answer, str):
            raise UserError(f'{where}: the answer {answer!r} is not a text.')
        answers = ()
        if answer and answer.strip():
            start = passage.find(answer) if start in (None, '') else tables.whole(where, answer_start_column, start)
            if start < 0:
                raise UserError(f'{where}: the answer {answer!r} is not in the passage.')
            answers = ((answer, start),)
        yield Question(where if id_ is None else str(id_), question, passage, answers, labelled, where)


def _optional(where: str, record: dict[str, Any], name: str, usual: str) -> Any:
    """A column that may be missing, unless somebody gave it another name than the usual one."""
    return record.get(name) if name == usual else tables.column(where, record, name)


def encode(task: Task, rows: Sequence[Question], tokenizer: Tokenizer, max_length: int, lengths: tuple[int, ...]
           ) -> tokenized.Tokenized:
    """[CLS] question [SEP] window [SEP], a window each `stride` tokens; start and end at [CLS] without a whole answer.

    token_labels hold what `decode` needs: offsets into the passage, and where a token has its widest context.
    """
    made, owners, starts, ends, begins, finishes, widest, truncated, lost = [], [], [], [], [], [], [], 0, 0
    passage, ids, bounds, apart = None, [], None, 0
    for number, question in enumerate(rows):
        asked = tokenizer.encode(question.text)
        truncated += len(asked) > task.settings['max_query_length']
        asked = asked[:task.settings['max_query_length']]
        if question.passage != passage:  # often several questions on one
            passage = question.passage
            ids, offsets = tokenizer.encode_with_offsets(passage)
            bounds = Bounds(offsets)
        first, last = token_span(question, bounds)
        size = max_length - len(asked) - 3
        if size < 1:
            raise UserError(f'max_length {max_length} leaves no room for a passage beside questions of '
                            f'{task.settings["max_query_length"]} tokens.')
        spans = list(windows(len(ids), size, task.settings['stride']))
        before, apart = len(asked) + 2, apart + (len(spans) > 1 and task.settings['stride'] >= size)
        lost += bool(question.answers) and not any(
            first is not None and begin <= first and last < end for begin, end in spans)
        for begin, end in spans:
            made.append(([tokenizer.cls_id, *asked, tokenizer.sep_id, *ids[begin:end], tokenizer.sep_id], before))
            owners.append(number)
            inside = first is not None and begin <= first and last < end
            starts.append(before + first - begin if inside else 0)
            ends.append(before + last - begin if inside else 0)
            begins.append(np.pad(bounds.begins[begin:end], (before, 1), constant_values=-1))
            finishes.append(np.pad(bounds.ends[begin:end], (before, 1), constant_values=-1))
            widest.append(np.pad(best_context(spans, begin, end).astype(np.int32), (before, 1)))
    tokens = {name: np.concatenate(values).astype(np.int32) for name, values in
              (('offset_begins', begins), ('offset_ends', finishes), ('best_context', widest))}
    return tokenized.collect(
        made, {'start_positions': np.array(starts, np.int32), 'end_positions': np.array(ends, np.int32)},
        token_labels=tokens, owners=np.array(owners), pad_id=tokenizer.pad_id, lengths=lengths, truncated=truncated,
        notes=tuple(note for count, note in (
            (lost, f'{lost:,} answers fit in no window, and count as no answer in training'),
            (apart, f'the windows of {apart:,} questions do not overlap; with a smaller --config.task.stride they do')
        ) if count))


class Bounds:
    """Where the tokens of a passage begin and end in it, in characters; and the tokens by where they do."""

    def __init__(self, offsets: Sequence[tuple[int, int]]) -> None:
        self.begins, self.ends = np.array(offsets, np.int64).reshape(-1, 2).T
        self.first = {b: i for i, (b, e) in enumerate(offsets) if e > b}
        self.last = {e: i for i, (b, e) in enumerate(offsets) if e > b}


def token_span(question: Question, bounds: Bounds) -> tuple[int | None, int | None]:
    """First and last token of the first answer that is made of whole tokens where it stands; (None, None) without one.

    A place that cuts a token in two ('four' in 'fourth') is not where an answer stands: the nearest place where its
    text is made of whole tokens is taken instead. Where no answer has one, the tokens that touch the first are taken.
    """
    answers = [(text.strip(), question.passage.index(text.strip(), start))
               for text, start in question.answers if text.strip()]
    if not answers:
        return None, None
    begins, ends = bounds.first, bounds.last
    for text, given in answers:
        if given in begins and given + len(text) in ends:
            return begins[given], ends[given + len(text)]
    for text, given in answers:
        whole = [m.start() for m in re.finditer(f'(?={re.escape(text)})', question.passage)
                 if m.start() in begins and m.start() + len(text) in ends]
        if whole:
            begin = min(whole, key=lambda place: abs(place - given))
            return begins[begin], ends[begin + len(text)]
    text, given = answers[0]
    touched = np.flatnonzero((bounds.begins < given + len(text)) & (bounds.ends > given))
    return (int(touched[0]), int(touched[-1])) if len(touched) else (None, None)


def windows(length: int, size: int, stride: int) -> Iterator[tuple[int, int]]:
    """[begin, end) of windows of at most `size` tokens, one each `stride`, up to the one that reaches the end."""
    begin = 0
    while True:
        yield begin, min(begin + size, length)
        if begin + size >= length:
            return
        begin += min(stride, size)


def best_context(spans: list[tuple[int, int]], begin: int, end: int) -> np.ndarray:
    """bool [end - begin]: for which tokens of this window no other window has more context (the first of equals).

    A token's context is the smaller of what is left and right of it, plus a hundredth of the window's length.
    Of the windows (ascending) only those that overlap are looked at.
    """
    if begin == end:  # a passage without tokens
        return np.zeros(0, bool)
    at, before = np.arange(begin, end), bisect.bisect_right(spans, begin, key=lambda span: span[1])
    near = spans[before:bisect.bisect_left(spans, end, key=lambda span: span[0])]

    def context(b: int, e: int) -> np.ndarray:
        inside = (at >= b) & (at < e)
        return np.where(inside, np.minimum(at - b, e - 1 - at) + 0.01 * (e - b), -1.0)

    return np.stack([context(b, e) for b, e in near]).argmax(0) == near.index((begin, end))


def decode(task: Task, rows: Sequence[Question], data: tokenized.Tokenized, outputs: dict[str, Sequence[np.ndarray]]
           ) -> list[dict[str, Any]]:
    """An answer a question, cut from its passage.

    {'text', 'begin', 'end', 'null_odds', 'nbest': [{'text', 'begin', 'end', 'score', 'probability'}]}: characters;
    null_odds is the best score of no answer (both at [CLS]) less the best score of an answer. The text is '' where
    the task has unanswerable questions and the odds are above its threshold.
    """
    candidates: list[list[tuple[float, int, int]]] = [[] for _ in rows]
    nulls = np.full(len(rows), np.inf)
    for window, owner in enumerate(data.owners):
        part = slice(data.starts[window], data.starts[window + 1])
        tokens = {name: values[part] for name, values in data.token_labels.items()}
        start, end = outputs['start_logits'][window], outputs['end_logits'][window]
        nulls[owner] = min(nulls[owner], float(start[0] + end[0]))
        candidates[owner] += _best_spans(start, end, tokens, task.settings)
    found = []
    for row, spans, null in zip(rows, candidates, nulls):
        nbest = _nbest(row, spans, task.settings['n_best'])
        best = nbest[0] if nbest else {'text': '', 'begin': 0, 'end': 0, 'score': LOWEST}
        odds = float(null - best['score'])
        answer = best
        if task.settings['null_answers'] and odds > (task.settings['null_threshold'] or 0.0):
            answer = {'text': '', 'begin': 0, 'end': 0}
        found.append({'text': answer['text'], 'begin': answer['begin'], 'end': answer['end'], 'null_odds': odds,
                      'nbest': nbest})
    return found


def _best_spans(start: np.ndarray, end: np.ndarray, tokens: dict[str, np.ndarray], settings: dict[str, Any]
                ) -> list[tuple[float, int, int]]:
    """(score, begin, end) in characters of the best spans that begin where their context is widest."""
    count, longest = settings['n_best'], settings['max_answer_length']
    may_end = np.flatnonzero(tokens['offset_begins'] >= 0)
    may_start = may_end[tokens['best_context'][may_end] > 0]
    starts = may_start[np.argsort(-start[may_start], kind='stable')[:count]]
    ends = may_end[np.argsort(-end[may_end], kind='stable')[:count]]
    s, e = (x.ravel() for x in np.meshgrid(starts, ends, indexing='ij'))
    right = (e >= s) & (e - s < longest)
    s, e = s[right], e[right]
    values = start[s] + end[e]
    order = np.argsort(-values, kind='stable')[:count]
    return [(float(values[i]), int(tokens['offset_begins'][s[i]]), int(tokens['offset_ends'][e[i]])) for i in order]


def _nbest(row: Question, spans: list[tuple[float, int, int]], count: int) -> list[dict[str, Any]]:
    """The best answers with different texts, and their probabilities among themselves."""
    found, seen = [], set()
    for value, begin, end in sorted(spans, key=lambda span: -span[0]):
        text = row.passage[begin:end].strip()
        if text and text not in seen and len(found) < count:
            seen.add(text)
            begin = row.passage.index(text, begin)
            found.append({'text': text, 'begin': begin, 'end': begin + len(text), 'score': value})
    if found:
        for one, p in zip(found, scores.softmax(np.array([one['score'] for one in found]))):
            one['probability'] = round(float(p), 6)
    return found


def score(task: Task, rows: Sequence[Question], outputs: dict[str, Sequence[np.ndarray]],
          predictions: list[dict[str, Any]]) -> dict[str, float]:
    """SQuAD's scores in per cent.

    With unanswerable questions, and no threshold in the task yet, at the one that is best for F1 on these rows: half
    way to the next odds above the one that the published search finds, so that rounding decides nothing.
    """
    answers = {row.id: [text for text, _ in row.answers] for row in rows}
    best = {row.id: one['nbest'][0]['text'] if one['nbest'] else '' for row, one in zip(rows, predictions)}
    if not task.settings['null_answers']:
        return scores.squad(answers, best)
    odds = {row.id: one['null_odds'] for row, one in zip(rows, predictions)}
    if task.settings['null_threshold'] is not None:
        over_all = {key: value for key, value in scores.squad(answers, best, odds).items() if key.startswith('best_')}
        return scores.squad(answers, {row.id: one['text'] for row, one in zip(rows, predictions)}, odds) | over_all
    each = scores.of_each_question(answers, best, unanswerable=True)['f1']
    value, threshold = scores.best_threshold(answers, best, each, odds)
    if value == 100 * sum(not gold for gold in answers.values()) / len(answers):
        threshold = min(odds.values()) - 1.0  # never answering is best; the published search says 0 then
    threshold += (min((odd for odd in odds.values() if odd > threshold), default=threshold) - threshold) / 2
    chosen = {id_: best[id_] if odds[id_] <= threshold else '' for id_ in answers}
    return scores.squad(answers, chosen, odds) | {'null_threshold': threshold}


def baseline(task: Task, rows: Sequence[Question]) -> dict[str, float]:
    """The passage's first sentence for an answer; with unanswerable questions, never an answer."""
    answers = {row.id: [text for text, _ in row.answers] for row in rows}
    guesses = {'first_sentence': {row.id: row.passage.partition('. ')[0] for row in rows}}
    odds = None
    if task.settings['null_answers']:
        guesses['no_answer'] = dict.fromkeys(answers, '')
        odds = dict.fromkeys(answers, 0.0)
    found = {guess: scores.squad(answers, texts, odds) for guess, texts in guesses.items()}
    return {f'{guess}_{name}': values[name] for guess, values in found.items() for name in ('exact', 'f1')}


def labelled(rows: Sequence[Question]) -> bool:
    """Whether the questions can be scored."""
    return all(row.labelled for row in rows)


def files(task: Task, split: str, rows: Sequence[Question], predictions: list[dict[str, Any]]) -> dict[str, str]:
    """As the official evaluation takes them: id -> text, id -> odds of no answer; and the n best of each."""
    ending = '' if split == 'dev' else f'_{split}'
    contents = {'predictions': {row.id: found['text'] for row, found in zip(rows, predictions)},
                'nbest_predictions': {row.id: found['nbest'] for row, found in zip(rows, predictions)}}
    if task.settings['null_answers']:
        contents['null_odds'] = {row.id: found['null_odds'] for row, found in zip(rows, predictions)}
    return {f'{name}{ending}.json': json.dumps(content, ensure_ascii=False, indent=1) + '\n'
            for name, content in contents.items()}


def parse(value: Any) -> Question:
    """A question of what predict is given: (question, passage), or {'question', 'passage'}."""
    if isinstance(value, dict):
        value = value['question'], value['passage']
    text, passage = value
    if isinstance(value, str) or not (isinstance(text, str) and isinstance(passage, str)):
        raise ValueError('a question and a passage')
    return Question('', text, passage, (), False, '')


def describe(row: Question) -> dict[str, Any]:
    """What a prediction is printed with."""
    return {'id': row.id, 'question': row.text} if row.id else {'question': row.text}
