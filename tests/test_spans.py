"""Questions on long passages; SQuAD's two sets of rules."""

import collections
import re
import string
import time

import numpy as np
import pytest

from bert_jax import scores
from bert_jax.data import spans
from bert_jax.data.task import Task

SETTINGS = {'stride': 128, 'max_query_length': 64}


class Words:
    """A token a word."""
    cls_id, sep_id, pad_id = 0, 1, 2

    def encode(self, text):
        return [3] * len(text.split())

    def encode_with_offsets(self, text):
        return self.encode(text), [match.span() for match in re.finditer(r'\S+', text)]


def seconds(words):
    passage = ' '.join(f'w{i % 97}' for i in range(words))
    rows = [spans.Question(str(i), 'who is it ?', passage, ((f'w{i}', passage.index(f'w{i}')),), True, '') for i in range(4)]
    start = time.process_time()
    data = spans.encode(Task('span', {}, settings=SETTINGS), rows, Words(), 384, (384,))
    assert len(data.token_labels['best_context']) == len(data.ids)
    return time.process_time() - start


def test_a_long_passage_takes_as_long_as_its_words():
    """Four times the words: sixteen times as long by a reader that compares each window with all."""
    assert min(seconds(32_000) for _ in range(2)) < 9 * min(seconds(8_000) for _ in range(3))


def normalized(text):
    text = ''.join(c for c in text.lower() if c not in set(string.punctuation))
    return ' '.join(re.sub(r'\b(a|an|the)\b', ' ', text).split())


def squad_1(truth, said):
    """evaluate-v1.1.py's f1_score."""
    said, truth = normalized(said).split(), normalized(truth).split()
    same = sum((collections.Counter(said) & collections.Counter(truth)).values())
    if same == 0:
        return 0
    precision, recall = same / len(said), same / len(truth)
    return 2 * precision * recall / (precision + recall)


def squad_2(truth, said):
    """evaluate-v2.0.py's compute_f1."""
    truth_, said_ = normalized(truth).split(), normalized(said).split()
    if not truth_ or not said_:
        return int(truth_ == said_)
    return squad_1(truth, said)


@pytest.mark.parametrize('rules', [squad_1, squad_2])
def test_f1_by_the_rules_of_either_version(rules):
    """Also of answers that normalise to nothing: 'the' for 'a' is 0 in SQuAD 1.1, 1 in 2.0."""
    rng, odds = np.random.default_rng(0), {}
    say = lambda: ' '.join(rng.choice(['the', 'A', '...', 'cat', 'Dog!', 'an'], rng.integers(1, 4)))  # noqa: E731
    gold = {str(i): [say() for _ in range(rng.integers(1, 4))] for i in range(500)}
    said = {id_: say() for id_ in gold}
    if rules == squad_2:
        odds = {'null_odds': dict.fromkeys(gold, 0.0)}
    counted = {id_: [answer for answer in answers if normalized(answer)] or [''] for id_, answers in gold.items()} if odds else gold
    f1 = [max(rules(answer, said[id_]) for answer in counted[id_]) for id_ in gold]
    exact = [max(normalized(answer) == normalized(said[id_]) for answer in counted[id_]) for id_ in gold]
    found = scores.squad(gold, said, **odds)
    assert found['f1'] == pytest.approx(100 * np.mean(f1)) and found['exact'] == pytest.approx(100 * np.mean(exact))
