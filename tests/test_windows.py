"""Where windows of long passages and sentences begin, what they hold, and where an answer is read from.

Passages against run_squad.py of google-research/bert, transcribed; sentences against the rule of docs/finetuning.md.
"""

import collections
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bert_jax.tasks import spans, tags
from bert_jax.tasks.task import Task


class Pieces:
    """A tokenizer whose pieces are up to three characters of a word; no two have the same id."""

    pad_id, cls_id, sep_id, unk_id = 0, 1, 2, 3

    def encode(self, text):
        return self.encode_with_offsets(text)[0]

    def encode_with_offsets(self, text):
        offsets = [(at, min(at + 3, word.end())) for word in re.finditer(r'\S+', text)
                   for at in range(word.start(), word.end(), 3)]
        return [10 + int.from_bytes(text[begin:end].encode()) for begin, end in offsets], offsets


SETTINGS = {'null_answers': False, 'stride': 5, 'max_query_length': 4, 'max_answer_length': 6, 'n_best': 20,
            'null_threshold': None}


def original_spans(length, size, stride):
    """(start, length) of each window, as convert_examples_to_features makes doc_spans."""
    found, start = [], 0
    while start < length:
        taken = min(length - start, size)
        found.append((start, taken))
        if start + taken == length:
            break
        start += min(taken, stride)
    return found


def original_is_max_context(doc_spans, which, position):
    """_check_is_max_context: whether this window is the one where the token has most on its poorer side."""
    best_score = best = None
    for index, (start, length) in enumerate(doc_spans):
        end = start + length - 1
        if position < start or position > end:
            continue
        score = min(position - start, end - position) + 0.01 * length
        if best_score is None or score > best_score:
            best_score, best = score, index
    return which == best


@settings(max_examples=300, deadline=None)
@given(length=st.integers(1, 90), size=st.integers(1, 30), stride=st.integers(1, 40))
def test_windows_and_contexts_are_the_originals(length, size, stride):
    expected = original_spans(length, size, stride)
    made = list(spans.windows(length, size, stride))
    assert made == [(start, start + taken) for start, taken in expected]
    for which, (begin, end) in enumerate(made):
        assert spans.best_context(made, begin, end).tolist() == [
            original_is_max_context(expected, which, position) for position in range(begin, end)]


def random_question(rng, number):
    """A passage of words of one to four pieces, a question, and an answer of whole tokens, or none."""
    def say(count):
        return ' '.join('x' * rng.integers(0, 10) + f'{rng.integers(100, 1000)}' for _ in range(count))

    passage = say(rng.integers(1, 30))
    _, offsets = Pieces().encode_with_offsets(passage)
    first, last = np.sort(rng.integers(0, len(offsets), 2))
    begin, end = offsets[first][0], offsets[min(last, first + 4)][1]
    answers = ((passage[begin:end], begin),) if number % 4 else ()
    return spans.Question(str(number), say(rng.integers(1, 4)), passage, answers, True, 'here')


def original_features(row, number, max_length):
    """convert_examples_to_features and what its predictions read: a dict a window."""
    tokenizer, features = Pieces(), []
    query = tokenizer.encode(row.text)[:SETTINGS['max_query_length']]
    ids, offsets = tokenizer.encode_with_offsets(row.passage)
    start = end = -1
    for text, at in row.answers:
        start = next(i for i, (begin, _) in enumerate(offsets) if begin == at)
        end = next(i for i, (_, stop) in enumerate(offsets) if stop == at + len(text))
    doc_spans = original_spans(len(ids), max_length - len(query) - 3, SETTINGS['stride'])
    for which, (doc_start, length) in enumerate(doc_spans):
        tokens, segments = [tokenizer.cls_id], [0]
        tokens += [*query, tokenizer.sep_id]
        segments += [0] * (len(query) + 1)
        places = {}
        for i in range(length):
            places[len(tokens)] = (offsets[doc_start + i], original_is_max_context(doc_spans, which, doc_start + i))
            tokens.append(ids[doc_start + i])
            segments.append(1)
        tokens.append(tokenizer.sep_id)
        segments.append(1)
        start_position = end_position = 0
        if row.answers and start >= doc_start and end <= doc_start + length - 1:
            start_position, end_position = (at - doc_start + len(query) + 2 for at in (start, end))
        features.append({'owner': number, 'tokens': tokens, 'segments': segments, 'places': places,
                         'start': start_position, 'end': end_position})
    return features


@pytest.fixture(scope='module')
def questions():
    rng = np.random.default_rng(0)
    rows = [random_question(rng, number) for number in range(60)]
    features = [feature for number, row in enumerate(rows) for feature in original_features(row, number, 24)]
    data = spans.encode(Task('span', {}, settings=SETTINGS), rows, Pieces(), 24, (24,))
    return rows, features, data


def test_windows_of_questions_hold_what_the_originals_do(questions):
    rows, features, data = questions
    assert len(features) > 2 * len(rows) and sum(feature['start'] > 0 for feature in features) > 30
    assert data.owners.tolist() == [feature['owner'] for feature in features]
    for side in ('start', 'end'):
        assert data.labels[f'{side}_positions'].tolist() == [feature[side] for feature in features]
    for i, feature in enumerate(features):
        part = slice(data.starts[i], data.starts[i + 1])
        assert data.ids[part].tolist() == feature['tokens']
        assert [int(at >= data.a_lengths[i]) for at in range(len(feature['tokens']))] == feature['segments']
        expected = [feature['places'].get(at, ((-1, -1), False)) for at in range(len(feature['tokens']))]
        names = ('offset_begins', 'offset_ends', 'best_context')
        found = zip(*(data.token_labels[name][part].tolist() for name in names))
        assert [((begin, end), bool(best)) for begin, end, best in found] == expected


def test_the_best_answer_is_the_originals(questions):
    """Of all starts and ends in order within a window, as long as allowed, that begin where their context is widest."""
    rows, features, data = questions
    rng = np.random.default_rng(1)
    logits = {f'{side}_logits': [rng.normal(size=n).astype(np.float32) for n in np.diff(data.starts)]
              for side in ('start', 'end')}
    found = spans.decode(Task('span', {}, settings=SETTINGS), rows, data, logits)
    best = collections.defaultdict(lambda: (-np.inf,))
    for feature, start, end in zip(features, logits['start_logits'], logits['end_logits']):
        for s, ((begin, _), widest) in feature['places'].items():
            for e, ((_, stop), _) in feature['places'].items():
                if widest and s <= e < s + SETTINGS['max_answer_length']:
                    best[feature['owner']] = max(best[feature['owner']], (float(start[s] + end[e]), begin, stop))
    assert [(one['begin'], one['end']) for one in found] == [best[number][1:] for number in range(len(rows))]
    assert [one['text'] for one in found] == [row.passage[one['begin']:one['end']] for row, one in zip(rows, found)]


def sentence_windows(sizes, document, budget):
    """The rule, word by word: [(words of the window, words that are tagged in it)].

    A sentence that fits is tagged in one window. A longer one is tagged in runs of at most half a window (a longer word
    alone). A window then takes a word on its left and one on its right in turn, as long as they fit.

    Args:
      sizes: pieces of each word of the sentence.
      document: (pieces of the words before the sentence, of those after it).
      budget: pieces of a window.
    """
    words = list(range(len(sizes)))
    cores = [words]
    if sum(sizes) > budget:
        cores = [[]]
        for word in words:
            if cores[-1] and sum(sizes[i] for i in cores[-1]) + sizes[word] > max(budget // 2, 1):
                cores.append([])
            cores[-1].append(word)
    before, after = document
    every = [*before, *sizes, *after]
    for core in cores:
        window = collections.deque(len(before) + word for word in core)
        used, open_sides = sum(sizes[word] for word in core), ['left', 'right']
        while open_sides:
            for side in tuple(open_sides):
                word = window[0] - 1 if side == 'left' else window[-1] + 1
                if not 0 <= word < len(every) or used + every[word] > budget:
                    open_sides.remove(side)
                    continue
                used += every[word]
                (window.appendleft if side == 'left' else window.append)(word)
        yield list(window), [len(before) + word for word in core]


@pytest.mark.parametrize('context', [False, True])
def test_windows_of_sentences_begin_where_the_rule_says(context):
    """Words of 1 to 12 characters, some too long for any window, in sentences of 1 to 14 words, of a few documents."""
    for seed in range(150):
        rng = np.random.default_rng(seed)
        lengths = [rng.integers(1, 13, rng.choice([1, 2, 3, 14])) for _ in range(rng.integers(1, 9))]
        check_windows(lengths, np.cumsum(rng.random(len(lengths)) < 0.3), int(rng.integers(4, 23)), context)


def check_windows(lengths, documents, max_length, context):
    numbers = iter(range(100, 1000))
    sentences = [tuple((f'{next(numbers)}' * 4)[:length] for length in one) for one in lengths]
    labels = ('O', 'B-X', 'I-X')
    rows = [tags.Sentence(words, tuple(labels[(i + len(words)) % 3] for i in range(len(words))), int(document), 'here')
            for words, document in zip(sentences, documents)]
    task = Task('tagging', {}, labels, settings={'document_context': context})
    data = tags.encode(task, rows, Pieces(), max_length, (max_length,))
    budget, expected = max_length - 2, []
    pieces = [[Pieces().encode(word)[:budget] for word in words] for words in sentences]
    first_word = 0
    for number, row in enumerate(rows):
        same = [i for i in range(len(rows)) if context and documents[i] == documents[number]]
        before = [piece for i in same if i < number for piece in pieces[i]]
        after = [piece for i in same if i > number for piece in pieces[i]]
        every = [*before, *pieces[number], *after]
        here, *document = ([*map(len, part)] for part in (pieces[number], before, after))
        for window, tagged in sentence_windows(here, document, budget):
            ids, label_ids, words = [Pieces.cls_id], [-1], [-1]
            for word in window:
                at, rest = word - len(before), [-1] * (len(every[word]) - 1)
                ids += every[word]
                label_ids += [labels.index(row.tags[at]) if word in tagged else -1, *rest]
                words += [first_word + at if word in tagged else -1, *rest]
            expected.append((number, [*ids, Pieces.sep_id], [*label_ids, -1], [*words, -1]))
        first_word += len(row.words)
    parts = [slice(a, b) for a, b in zip(data.starts, data.starts[1:])]
    every = data.ids, data.token_labels['label_ids'], data.token_labels['words']
    found = [(owner, *(values[part].tolist() for values in every)) for owner, part in zip(data.owners.tolist(), parts)]
    assert found == expected
    assert data.truncated == sum(any(len(Pieces().encode(word)) > budget for word in words) for words in sentences)
