"""Scores against scikit-learn, scipy, seqeval, torchmetrics, and the published rules of SQuAD 2.0."""

import collections
import re
import string

import numpy as np
import pytest
import scipy.special
import scipy.stats
import seqeval.metrics
import sklearn.metrics
import torchmetrics
from seqeval.metrics.sequence_labeling import get_entities

from bert_jax import scores
from bert_jax.data import tags

RNG = np.random.default_rng(0)
WORDS = ['the', 'a', 'An', 'cat', 'Cat.', 'sat', '"mat"', '12,5', '', 'é', 'B.C.', '--']


@pytest.mark.parametrize('truth', [RNG.integers(0, 3, 50), np.zeros(50, int), np.array([0, 1] * 25)])
@pytest.mark.parametrize('count', [2, 3])
def test_classification(truth, count):
    truth = np.minimum(truth, count - 1)
    logits = RNG.normal(size=(50, count))
    labels, guess = ('a', 'b', 'c')[:count], logits.argmax(1)
    ours = scores.classification(logits, truth, labels)
    assert ours['accuracy'] == sklearn.metrics.accuracy_score(truth, guess)
    assert ours['matthews'] == pytest.approx(sklearn.metrics.matthews_corrcoef(truth, guess))
    each = sklearn.metrics.f1_score(truth, guess, labels=range(count), average=None, zero_division=0)
    np.testing.assert_allclose([ours[f'f1[{label}]'] for label in labels], each)
    assert ours['f1_macro'] == pytest.approx(each.mean())
    assert ours['loss'] == pytest.approx((scipy.special.logsumexp(logits, axis=1) - logits[np.arange(50), truth]).mean())
    assert ('f1' in ours) == (count == 2) and ours.get('f1', each[1]) == pytest.approx(each[1])


def test_regression_and_its_constant_sides():
    a, b = RNG.normal(size=(2, 40))
    b[::5] = b[0]  # ties
    ours = scores.regression(a, b)
    assert ours['pearson'] == pytest.approx(scipy.stats.pearsonr(a, b).statistic)
    assert ours['spearman'] == pytest.approx(scipy.stats.spearmanr(a, b).statistic)
    assert ours['mse'] == pytest.approx(sklearn.metrics.mean_squared_error(a, b))
    assert scores.regression(np.zeros(40), b)['spearman'] == 0
    assert scores.regression(a[:1], b[:1])['pearson'] == 0  # a single row


def test_multilabel():
    logits, truth = RNG.normal(size=(30, 4)), RNG.integers(0, 2, (30, 4))
    ours = scores.multilabel(logits, truth, 'abcd')
    guess = scipy.special.expit(logits) > 0.5
    for average in ('micro', 'macro'):
        assert ours[f'f1_{average}'] == pytest.approx(sklearn.metrics.f1_score(truth, guess, average=average))
    assert ours['accuracy'] == sklearn.metrics.accuracy_score(truth, guess)


@pytest.mark.parametrize('truth', [np.zeros((6, 3), int), np.ones((6, 3), int)])
@pytest.mark.parametrize('said', [-1.0, 1.0, 0.0])
def test_multilabel_when_all_or_nothing_is_said(truth, said):
    ours = scores.multilabel(np.full((6, 3), said), truth, 'abc')
    guess = np.full((6, 3), said) > 0
    assert ours['f1_micro'] == sklearn.metrics.f1_score(truth, guess, average='micro', zero_division=0)
    assert ours['f1_macro'] == sklearn.metrics.f1_score(truth, guess, average='macro', zero_division=0)
    assert ours['accuracy'] == sklearn.metrics.accuracy_score(truth, guess)


def test_ties_go_to_the_first_class():
    ours = scores.classification(np.zeros((4, 2)), np.array([0, 0, 1, 0]), ('a', 'b'))
    assert ours['accuracy'] == 0.75 and ours['loss'] == pytest.approx(np.log(2)) and ours['matthews'] == 0


def test_entities_are_those_that_seqeval_counts():
    """Any sequence of tags, also those that no scheme allows."""
    for _ in range(300):
        found = list(RNG.choice(['O', 'B-PER', 'I-PER', 'B-LOC', 'I-LOC'], RNG.integers(1, 9)))
        ours = [(entity['type'], entity['begin'], entity['end'] - 1) for entity in tags.entities(['w'] * len(found), found)]
        assert ours == get_entities(found), found


def test_tagging_and_a_split_without_entities():
    tags = ['O', 'B-PER', 'I-PER', 'B-LOC', 'I-LOC']
    truth, guess = ([list(RNG.choice(tags, 12)) for _ in range(30)] for _ in range(2))
    ours = scores.tagging(truth, guess)
    assert ours['f1'] == pytest.approx(seqeval.metrics.f1_score(truth, guess))
    assert ours['precision'] == pytest.approx(seqeval.metrics.precision_score(truth, guess))
    assert ours['f1[PER]'] == pytest.approx(seqeval.metrics.classification_report(truth, guess, output_dict=True)['PER']['f1-score'])
    assert scores.tagging([['O', 'O']], [['O', 'O']])['f1'] == 0


def answers(count=200):
    """Random gold answers and predictions, with articles, punctuation and empty ones."""
    say = lambda: ' '.join(RNG.choice(WORDS, RNG.integers(1, 5)))  # noqa: E731
    gold = {str(i): [say() for _ in range(RNG.integers(1, 4))] for i in range(count)}
    return gold, {key: RNG.choice(texts) if RNG.random() < 0.3 else say() for key, texts in gold.items()}


def test_squad_1_equals_torchmetrics():
    gold, said = answers()
    gold |= {'articles': ['The', 'cat'], 'article': ['a'], 'dots': ['...', 'x'], 'empty': ['']}
    said |= {'articles': '', 'article': 'The', 'dots': '!', 'empty': 'cat'}
    ours = scores.squad(gold, said)
    theirs = torchmetrics.text.SQuAD()(
        [{'prediction_text': str(said[k]), 'id': k} for k in gold],
        [{'answers': {'text': texts, 'answer_start': [0] * len(texts)}, 'id': k} for k, texts in gold.items()])
    assert ours['exact'] == pytest.approx(float(theirs['exact_match'])) and ours['f1'] == pytest.approx(float(theirs['f1']), rel=1e-5)


def published(gold, said, odds, threshold):
    """evaluate-v2.0.py's rules, written down once more."""
    def normal(text):
        text = text.lower()
        text = ''.join(ch for ch in text if ch not in set(string.punctuation))
        return ' '.join(re.sub(re.compile(r'\b(a|an|the)\b', re.UNICODE), ' ', text).split())

    def f1(a, b):
        a, b = normal(a).split(), normal(b).split()
        same = sum((collections.Counter(a) & collections.Counter(b)).values())
        if len(a) == 0 or len(b) == 0:
            return int(a == b)
        if same == 0:
            return 0
        precision, recall = same / len(b), same / len(a)
        return 2 * precision * recall / (precision + recall)

    exact, over = {}, {}
    for k, texts in gold.items():
        texts = [t for t in texts if normal(t)] or ['']
        exact[k] = max(int(normal(t) == normal(said[k])) for t in texts)
        over[k] = max(f1(t, said[k]) for t in texts)
    apply = lambda raw: {k: (float(not gold[k]) if odds[k] > threshold else raw[k]) for k in raw}  # noqa: E731
    mean = lambda each, keys: 100 * sum(each[k] for k in keys) / len(keys)  # noqa: E731
    result = {'exact': mean(apply(exact), list(gold)), 'f1': mean(apply(over), list(gold))}
    for name, raw in (('exact', exact), ('f1', over)):
        current = best = sum(1 for k in gold if not gold[k])
        where = 0.0
        for k in sorted(odds, key=lambda k: odds[k]):
            current += raw[k] if gold[k] else (-1 if said[k] else 0)
            if current > best:
                best, where = current, odds[k]
        result[f'best_{name}'], result[f'best_{name}_threshold'] = 100 * best / len(gold), where
    return result


def test_squad_2_equals_the_published_rules():
    for trial in range(5):
        gold, said = answers()
        for k in list(gold)[::3]:
            gold[k] = []
        odds = {k: float(RNG.normal() + (2 if not gold[k] else 0)) for k in gold}
        expected = published(gold, said, odds, threshold=1e9)
        ours = scores.squad(gold, said, odds)
        for name, value in expected.items():
            assert ours[name] == pytest.approx(value), (trial, name)
        parts = [(f'{part}_exact', [k for k in gold if bool(gold[k]) == has]) for part, has in (('has_answer', True), ('no_answer', False))]
        assert ours['exact'] == pytest.approx(sum(ours[name] * len(keys) for name, keys in parts) / len(gold))


@pytest.mark.parametrize('truth, said, exact, f1', [
    ('The Cat!', 'cat', 1, 1), ('a cat', 'the dog', 0, 0), ('', '', 1, 1), ('cat', '', 0, 0), ('the', 'a', 1, 1),
    ('5', '5', 1, 1), ('big red cat', 'red cat sat', 0, 2 / 3)])
def test_answers_one_by_one(truth, said, exact, f1):
    assert scores.exact_match(truth, said) == exact and scores.token_f1(truth, said) == pytest.approx(f1)
