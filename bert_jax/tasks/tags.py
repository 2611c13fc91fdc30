"""Token tagging: CoNLL column files and tables -> windows of sentences -> tags of words."""

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from bert_jax import cli
from bert_jax.cli import UserError, choose
from bert_jax.data.tokenizer import Tokenizer
from bert_jax.tasks import scores, tables, tag_schemes, tokenized
from bert_jax.tasks.labels import check_different
from bert_jax.tasks.task import Task

DOCUMENT = '-DOCSTART-'
TOO_LONG = 'sentences have a word longer than max_length'


@dataclasses.dataclass(frozen=True)
class Sentence:
    """One sentence.

    Attributes:
      words: its words.
      tags: IOB2, one a word; None in a split without labels.
      document: number of its document; context never comes from another one.
      where: file and line of its first word, or of its row.
      word_a_line: whether each word has a line of its own.
    """

    words: tuple[str, ...]
    tags: tuple[str, ...] | None
    document: int
    where: str
    word_a_line: bool = False

    def where_is(self, word: int) -> str:
        """File and line of a word."""
        file, _, line = self.where.rpartition(':')
        return f'{file}:{int(line) + word * self.word_a_line}'


def read(file: str, word_column: str, tag_column: str, scheme: str, labelled: bool = True, sentence_column: str = ''
         ) -> list[Sentence]:
    """Sentences of a column file or of a table.

    A column file has a word a line, blank lines between sentences, -DOCSTART- between documents, and columns with
    spaces or tabs between them. A table (.csv or .jsonl, or columns that are given by name) has a sentence a row, its
    words and tags as lists or with spaces between them; or a word a row, and a column that says of which sentence.

    Args:
      file: its path.
      word_column, tag_column: of a column file numbers, from 0, negative ones from the end ('': the first and the
        last); of a table names ('': 'words' and 'tags').
      scheme: of its tags: 'iob1', 'iob2' or 'iobes'; IOB2 comes out.
      labelled: whether tags are there.
      sentence_column: of a table with a word a row, whose value changes with the sentence and may be empty after its
        first word; '': the one that is called 'Sentence #', 'sentence_id' or the like.

    Raises:
      UserError: a line with too few columns, a table with a word a row and no such column, a sentence with more words
        than tags, a tag that is none of the scheme (file and line), no sentence.
    """
    convert = choose('tag scheme', tag_schemes.SCHEMES, scheme)
    if is_table(file, word_column, tag_column):
        sentences = _from_table(file, word_column or 'words', tag_column or 'tags', sentence_column, convert, labelled)
    else:
        sentences = list(_from_columns(file, int(word_column or 0), int(tag_column or -1), convert, labelled))
    if not sentences:
        raise UserError(f'{file}: no sentences in it.')
    return sentences


def inputs(file: str, settings: dict[str, Any]) -> list[Sentence]:
    """Sentences of a table or a column file without tags; of a run with such columns, or the usual ones."""
    if tables.is_table(file):
        known = tables.columns(file)
        words = tables.chosen(known, settings.get('word_column', ''), 'words', 'tokens')
        if words in known or not file.lower().endswith('.tsv'):
            sentence = settings.get('sentence_column', '')
            return read(file, words, '', 'iob2', labelled=False, sentence_column=sentence if sentence in known else '')
    numbers = [settings.get(name, '') for name in ('word_column', 'tag_column')]
    return read(file, *(('', '') if is_table('', *numbers) else numbers), 'iob2', labelled=False)


def is_table(file: str, word_column: str, tag_column: str) -> bool:
    """Whether a sentence is a row of it: by its ending, or by columns that are names."""
    named = [name for name in (word_column, tag_column) if name and not re.fullmatch(r'-?\d+', name)]
    return bool(named) or file.lower().endswith(('.csv', '.jsonl', '.json'))


def _from_table(file: str, word_column: str, tag_column: str, sentence_column: str, convert: Callable, labelled: bool
                ) -> list[Sentence]:
    rows = []
    for where, record in tables.read_table(file):
        words, tags = (_parts_of(where, record, name) if name else None
                       for name in (word_column, tag_column if labelled else ''))
        if not words:
            raise UserError(f'{where}: no words.')
        if tags is not None and len(words) != len(tags):
            raise UserError(f'{where}: {len(words)} words and {len(tags)} tags.')
        rows.append((where, record, words, tags))
    column = _sentence_column(file, rows, word_column, sentence_column)
    groups = _by_sentence(rows, column) if column else [[row] for row in rows]
    return [_sentence(group, convert, word_a_line=bool(column)) for group in groups]


SENTENCE_COLUMNS = {'sentence', 'sentenceid', 'sentencenumber', 'sentenceno', 'sentenceindex', 'sentid', 'sent'}
Rows = list[tuple[str, dict[str, Any], list[str], list[str] | None]]  # where, record, words, tags


def _sentence_column(file: str, rows: Rows, word_column: str, given: str) -> str:
    """The column that says of which sentence a row's word is; '' where a row is a sentence."""
    if given:
        tables.column(rows[0][0] if rows else file, rows[0][1] if rows else {}, given)
        return given
    if len(rows) < 2 or any(len(words) > 1 or isinstance(record[word_column], list) for _, record, words, _ in rows):
        return ''
    names = [name for name in rows[0][1] if name != word_column]
    found = next((name for name in names if re.sub('[^a-z]', '', name.lower()) in SENTENCE_COLUMNS), '')
    if not found:
        raise UserError(f'{file}: a word a row, and no column says of which sentence; --config.task.sentence_column '
                        f'names it (there are: {", ".join(names)}). Sentences of one word are read as lists (.jsonl).')
    cli.note(f'{file}: a word a row; the column {found!r} says of which sentence.')
    return found


def _by_sentence(rows: Rows, column: str) -> list[Rows]:
    """Runs of rows: another value of the column begins a sentence, an empty one continues it."""
    groups, last = [], None
    for row in rows:
        value = tables.column(row[0], row[1], column)
        value = '' if tables.is_null(value) else str(value).strip()
        if not groups or (value and value != last):
            groups.append([])
        last = value or last
        groups[-1].append(row)
    return groups


def _sentence(group: Rows, convert: Callable, word_a_line: bool) -> Sentence:
    """The sentence of a row, or of the rows of its words."""
    words = [word for _, _, parts, _ in group for word in parts]
    tags, wheres = None, [where for where, _, parts, _ in group for _ in parts]
    if group[0][3] is not None:
        given = (tag for *_, parts in group for tag in parts)
        found = [tag_schemes.checked(where, tag) for where, tag in zip(wheres, given)]
        tags = tuple(convert(found, wheres.__getitem__))
    return Sentence(tuple(words), tags, 0, group[0][0], word_a_line)


def _parts_of(where: str, record: dict[str, Any], name: str) -> list[str]:
    value = tables.column(where, record, name)
    if not isinstance(value, (str, list)) or not all(isinstance(part, str) for part in value):
        raise UserError(f'{where}: {name} is neither a text nor a list of texts.')
    return value.split() if isinstance(value, str) else value


def _from_columns(file: str, word_column: int, tag_column: int, convert: Callable, labelled: bool
                  ) -> Iterator[Sentence]:
    words, tags, document, first, columns = [], [], 0, 0, 0
    with tables.open_text(file) as lines:
        for number, line in enumerate((*tables.decoded(file, lines), ''), 1):
            fields = re.split(r'[ \t]+', line.strip(' \t\r\n')) if line.strip() else []
            if fields and fields[0] != DOCUMENT:
                columns = columns or len(fields)
                if len(fields) != columns:
                    raise UserError(f'{file}:{number}: {len(fields)} columns where the first line has {columns}; '
                                    'spaces and tabs part columns.')
                if not words:
                    first = number
                try:
                    words.append(fields[word_column])
                    tags.append(tag_schemes.checked(f'{file}:{number}', fields[tag_column]) if labelled else 'O')
                except IndexError as error:
                    raise UserError(f'{file}:{number}: {len(fields)} columns; word_column is {word_column}, '
                                    f'tag_column {tag_column}.') from error
                continue
            if words:
                found = tuple(convert(tags, lambda at, first=first: f'{file}:{first + at}')) if labelled else None
                yield Sentence(tuple(words), found, document, f'{file}:{first}', word_a_line=True)
                words, tags = [], []
            document += bool(fields)


def with_tags(task: Task, named_by: Sequence[Sentence]) -> Task:
    """A task whose tags are those of `named_by`, B- and I- of each type, O first; checks every tag.

    Raises:
      UserError: no tag but O, or one that is not in the label set (file and line).
    """
    types = sorted({tag[2:] for sentence in named_by for tag in sentence.tags} - {''})
    labels = task.labels or ('O', *(f'{prefix}-{kind}' for kind in types for prefix in 'BI'))
    check_different(labels)
    if len(labels) < 2:
        raise UserError(f'{named_by[0].where.rpartition(":")[0]}: no tag but O in it; is tag_column the right one?')
    splits, notes = dict(task.splits), task.notes
    for split, sentences in task.splits.items():
        unknown = next(((sentence, at) for sentence in sentences for at, tag in enumerate(sentence.tags or ())
                        if tag not in labels), None)
        if unknown is None:
            continue
        sentence, at = unknown
        said = (f'{sentence.where_is(at)}: tag {sentence.tags[at]!r} of {sentence.words[at]!r} is not in the label '
                f'set: {", ".join(labels)}')
        if not split.startswith('test'):
            raise UserError(f'{said}.')
        notes += (f'{said}, so {split} is predicted, not scored',)
        splits[split] = [dataclasses.replace(sentence, tags=None) for sentence in sentences]
    return dataclasses.replace(task, labels=labels, splits=splits, notes=notes)


def encode(task: Task, rows: Sequence[Sentence], tokenizer: Tokenizer, max_length: int, lengths: tuple[int, ...]
           ) -> tokenized.Tokenized:
    """Windows: each word is tagged once, by its first piece, in a window where it has context on both sides.

    A sentence that is too long is cut into cores of half a window, each with the words around it. With
    `document_context` every window is filled up with the sentences around (Devlin et al. 2019, 5.3).
    """
    budget = max_length - 2
    whole = [[tokenizer.encode(word) or [tokenizer.unk_id] for word in row.words] for row in rows]
    truncated = sum(any(len(word) > budget for word in words) for words in whole)
    pieces = [[word[:budget] for word in words] for words in whole]
    made, label_ids, words, owners = [], [], [], []
    first_word = np.cumsum([0, *(len(row.words) for row in rows)])
    for number, row in enumerate(rows):
        low = high = number
        if task.settings.get('document_context'):
            low, high = _document(rows, number, pieces, budget)
        around = [piece for sentence in pieces[low:high + 1] for piece in sentence]
        sizes = [len(piece) for piece in around]
        offset = sum(map(len, pieces[low:number]))                                    # words before this sentence
        for begin, end in _cores([len(piece) for piece in pieces[number]], budget):
            left, right = _widen(sizes, offset + begin, offset + end, budget)
            ids, labels, which = [tokenizer.cls_id], [-1], [-1]
            for at in range(left, right):
                word, inside = at - offset, offset + begin <= at < offset + end
                ids += around[at]
                rest = [-1] * (len(around[at]) - 1)
                labels += [task.labels.index(row.tags[word]) if inside and row.tags else -1, *rest]
                which += [int(first_word[number]) + word if inside else -1, *rest]
            made.append(([*ids, tokenizer.sep_id], len(ids) + 1))
            label_ids += [*labels, -1]
            words += [*which, -1]
            owners.append(number)
    flat = {'label_ids': np.array(label_ids, np.int32), 'words': np.array(words, np.int32)}
    return tokenized.collect(made, {}, pad_id=tokenizer.pad_id, lengths=lengths, owners=np.array(owners),
                           token_labels=flat, truncated=truncated)


def _cores(sizes: list[int], budget: int) -> Iterator[tuple[int, int]]:
    """[begin, end) of words: the whole sentence where it fits, else runs of at most half a window."""
    if sum(sizes) <= budget:
        yield 0, len(sizes)
        return
    begin, used = 0, 0
    for at, size in enumerate(sizes):
        if at > begin and used + size > max(budget // 2, 1):
            yield begin, at
            begin, used = at, 0
        used += size
    yield begin, len(sizes)


def _widen(sizes: list[int], begin: int, end: int, budget: int) -> tuple[int, int]:
    """Grows [begin, end) by words on both sides in turn, as far as the budget of pieces goes."""
    left = budget - sum(sizes[begin:end])
    grown = True
    while grown:
        grown = False
        if begin > 0 and sizes[begin - 1] <= left:
            begin, left, grown = begin - 1, left - sizes[begin - 1], True
        if end < len(sizes) and sizes[end] <= left:
            end, left, grown = end + 1, left - sizes[end], True
    return begin, end


def _document(rows: Sequence[Sentence], number: int, pieces: list[list[list[int]]], budget: int) -> tuple[int, int]:
    """The sentences of the same document that a window around this one could reach."""
    low = high = number
    for step in (-1, 1):
        at, used = number + step, 0
        while 0 <= at < len(rows) and rows[at].document == rows[number].document and used < budget:
            used += sum(map(len, pieces[at]))
            low, high = min(low, at), max(high, at)
            at += step
    return low, high


def decode(task: Task, rows: Sequence[Sentence], data: tokenized.Tokenized, outputs: dict[str, np.ndarray]
           ) -> list[dict[str, Any]]:
    """{'tags', 'scores', 'entities': [{'type', 'begin', 'end', 'text', 'score'}]} a sentence; positions are words.

    A word's score is its tag's probability, an entity's the mean of its words'.
    """
    places = data.token_labels['words'] >= 0
    p = scores.softmax(np.concatenate(outputs['logits'])[places])                      # windows unpadded: [words, C]
    p = p[np.argsort(data.token_labels['words'][places])]
    found, at = [], 0
    for row in rows:
        here = p[at:at + len(row.words)]
        at += len(row.words)
        names, values = [task.labels[i] for i in here.argmax(-1)], here.max(-1)
        found.append({'tags': names, 'scores': values.round(6).tolist(), 'entities': [
            entity | {'score': round(float(values[entity['begin']:entity['end']].mean()), 6)}
            for entity in tag_schemes.entities(row.words, names, task.labels)]})
    return found


def score(task: Task, rows: Sequence[Sentence], outputs: dict[str, np.ndarray], predictions: list[dict[str, Any]]
          ) -> dict[str, float]:
    """Entity F1 and its parts (IOB2, counted as conlleval does)."""
    return scores.tagging([list(row.tags) for row in rows], [prediction['tags'] for prediction in predictions])


def baseline(task: Task, rows: Sequence[Sentence]) -> dict[str, float]:
    """Each word its most frequent tag in training, O for new ones."""
    seen: dict[str, Counter] = {}
    for sentence in task.splits['train']:
        for word, tag in zip(sentence.words, sentence.tags):
            seen.setdefault(word, Counter())[tag] += 1
    best = {word: counts.most_common(1)[0][0] for word, counts in seen.items()}
    guesses = [[best.get(word, 'O') for word in row.words] for row in rows]
    return {'majority_f1': scores.tagging([list(row.tags) for row in rows], guesses)['f1']}


def labelled(rows: Sequence[Sentence]) -> bool:
    """Whether the sentences can be scored."""
    return all(row.tags is not None for row in rows)


def files(task: Task, split: str, rows: Sequence[Sentence], predictions: list[dict[str, Any]]) -> dict[str, str]:
    """Columns as conlleval reads them: word (with _ for spaces in it), tag given (where known), tag predicted."""
    def lines(row: Sentence, found: dict[str, Any]) -> str:
        words = ['_'.join(word.split()) or '_' for word in row.words]
        return '\n'.join(map(' '.join, zip(words, *([row.tags] if row.tags else []), found['tags'])))

    return {f'predictions_{split}.conll': '\n\n'.join(map(lines, rows, predictions)) + '\n'}


def parse(value: Any) -> Sentence:
    """A sentence of what predict is given: words with spaces between them, or {'words': [...]}."""
    words = value['words'] if isinstance(value, dict) else value
    words = words.split() if isinstance(words, str) else words
    if not all(isinstance(word, str) for word in words):
        raise ValueError('words')
    return Sentence(tuple(words) or ('',), None, 0, '')


def describe(row: Sentence) -> dict[str, Any]:
    """What a prediction is printed with."""
    return {'words': list(row.words)}
