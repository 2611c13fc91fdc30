"""Scores against their definitions, seqeval's entities, torchmetrics, and the published rules of SQuAD 2.0."""

import collections
import re
import string

import numpy as np
import pytest
import torchmetrics
from seqeval.metrics.sequence_labeling import get_entities

from bert_jax.tasks import scores, tag_schemes

WORDS = ['the', 'a', 'An', 'cat', 'Cat.', 'sat', '"mat"', '12,5', '', 'é', 'B.C.', '--']


def f1(truth, said):
    """2 TP / (2 TP + FP + FN) of flags, 0 where there is nothing."""
    right, wrong = (truth & said).sum(), (truth != said).sum()
    return 2 * right / (2 * right + wrong) if right else 0.0


def correlation(a, b):
    """Pearson's, by its definition."""
    a, b = a - a.mean(), b - b.mean()
    return (a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum())


@pytest.mark.parametrize('truth', ['random', 'one class', 'in turn'])
@pytest.mark.parametrize('count', [2, 3])
def test_classification(truth, count):
    """By the definitions, from counts; the library that the code calls is not asked."""
    rng = np.random.default_rng(count)
    truth = {'random': rng.integers(0, count, 50), 'one class': np.zeros(50, int),
             'in turn': np.array([0, 1] * 25)}[truth]
    logits = rng.normal(size=(50, count))
    labels, guess = ('a', 'b', 'c')[:count], logits.argmax(1)
    each = {f'f1[{label}]': f1(truth == i, guess == i) for i, label in enumerate(labels)}
    both, t, g = (truth == guess).sum(), np.bincount(truth, minlength=count), np.bincount(guess, minlength=count)
    # Gorodkin's R_K, which for two classes is Matthews'
    spread = np.sqrt(float(50**2 - (t * t).sum()) * float(50**2 - (g * g).sum()))
    nll = [np.log(np.exp(row).sum()) - row[label] for row, label in zip(logits, truth)]
    expected = {'accuracy': both / 50, 'loss': np.mean(nll), 'f1_macro': np.mean(list(each.values())), **each,
                'matthews': (both * 50 - t @ g) / spread if spread else 0.0,
                **({'f1': each['f1[b]']} if count == 2 else {})}
    assert scores.classification(logits, truth, labels) == pytest.approx(expected, abs=1e-12)


def test_regression_and_its_constant_sides():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 40))
    b[::5] = b[0]  # ties share the mean of their ranks
    ranks = [np.array([(x < y).sum() + ((x == y).sum() + 1) / 2 for y in x]) for x in (a, b)]
    assert scores.regression(a, b) == pytest.approx({
        'pearson': correlation(a, b), 'spearman': correlation(*ranks), 'mse': ((a - b) ** 2).sum() / 40})
    assert scores.regression(np.zeros(40), b)['spearman'] == 0
    assert scores.regression(a[:1], b[:1])['pearson'] == 0  # a single row


def test_multilabel():
    rng = np.random.default_rng(0)
    logits, truth = rng.normal(size=(30, 4)), rng.integers(0, 2, (30, 4))
    guess = 1 / (1 + np.exp(-logits)) > 0.5
    each = {f'f1[{label}]': f1(truth[:, i] > 0, guess[:, i]) for i, label in enumerate('abcd')}
    assert scores.multilabel(logits, truth, 'abcd') == pytest.approx({
        **each, 'f1_macro': np.mean(list(each.values())), 'f1_micro': f1(truth.ravel() > 0, guess.ravel()),
        'accuracy': np.mean([(t == g).all() for t, g in zip(truth, guess)])})


@pytest.mark.parametrize('truth', [0, 1])
@pytest.mark.parametrize('said', [-1.0, 1.0, 0.0])
def test_multilabel_when_all_or_nothing_is_said(truth, said):
    """Where nothing is there and nothing is said, F1 is 0 by convention; 0 is no yes."""
    ours = scores.multilabel(np.full((6, 3), said), np.full((6, 3), truth), 'abc')
    right = float(truth == (said > 0))
    names = ('f1_micro', 'f1_macro', 'f1[a]', 'f1[b]', 'f1[c]')
    assert ours == dict.fromkeys(names, right * truth) | {'accuracy': right}


def test_ties_go_to_the_first_class():
    ours = scores.classification(np.zeros((4, 2)), np.array([0, 0, 1, 0]), ('a', 'b'))
    assert ours['accuracy'] == 0.75 and ours['loss'] == pytest.approx(np.log(2)) and ours['matthews'] == 0


def test_entities_are_those_that_seqeval_counts():
    """Any sequence of tags, also those that no scheme allows."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        found = list(rng.choice(['O', 'B-PER', 'I-PER', 'B-LOC', 'I-LOC'], rng.integers(1, 9)))
        ours = [
            (entity['type'], entity['begin'], entity['end'] - 1)
            for entity in tag_schemes.entities(['w'] * len(found), found)
        ]
        assert ours == get_entities(found), found


def entities(found):
    """conlleval's: a run of one type, begun by B- or by another type or O before it."""
    spans, start = set(), None
    for at, tag in enumerate([*found, 'O']):
        goes_on = start is not None and tag == f'I-{found[start][2:]}'
        if start is not None and not goes_on:
            spans.add((found[start][2:], start, at))
            start = None
        if tag != 'O' and not goes_on:
            start = at
    return spans


def test_tagging_and_a_split_without_entities():
    """Counted by hand: entities of either side, and those of both."""
    rng, every = np.random.default_rng(0), ['O', 'B-PER', 'I-PER', 'B-LOC', 'I-LOC']
    truth, guess = ([rng.choice(every, 12).tolist() for _ in range(30)] for _ in range(2))
    gold, said = ({(i, *span) for i, one in enumerate(tags) for span in entities(one)} for tags in (truth, guess))
    both = gold & said
    of = lambda spans, kind: sum(span[1] == kind for span in spans)  # noqa: E731
    expected = {'precision': len(both) / len(said), 'recall': len(both) / len(gold),
                'f1': 2 * len(both) / (len(gold) + len(said)),
                'accuracy': np.mean([t == g for one, other in zip(truth, guess) for t, g in zip(one, other)])}
    expected |= {f'f1[{kind}]': 2 * of(both, kind) / (of(gold, kind) + of(said, kind)) for kind in ('PER', 'LOC')}
    assert scores.tagging(truth, guess) == pytest.approx(expected)
    assert scores.tagging([['O', 'O']], [['O', 'O']])['f1'] == 0


def answers(count=200, seed=0):
    """Random gold answers and predictions, with articles, punctuation and empty ones."""
    rng = np.random.default_rng(seed)
    say = lambda: ' '.join(rng.choice(WORDS, rng.integers(1, 5)))  # noqa: E731
    gold = {str(i): [say() for _ in range(rng.integers(1, 4))] for i in range(count)}
    return gold, {key: rng.choice(texts) if rng.random() < 0.3 else say() for key, texts in gold.items()}


def test_squad_1_equals_torchmetrics():
    gold, said = answers()
    gold |= {'articles': ['The', 'cat'], 'dots': ['...', 'x'], 'empty': ['']}
    said |= {'articles': 'dog', 'dots': 'y', 'empty': 'cat'}
    for key in [key for key, text in said.items() if not scores.normalize_answer(text)]:
        del gold[key]  # 1 there where both sides are empty, as in 2.0's rules; the script has 0 (test_spans.py)
    ours = scores.squad(gold, said)
    theirs = torchmetrics.text.SQuAD()(
        [{'prediction_text': str(said[k]), 'id': k} for k in gold],
        [{'answers': {'text': texts, 'answer_start': [0] * len(texts)}, 'id': k} for k, texts in gold.items()])
    assert ours['exact'] == pytest.approx(float(theirs['exact_match'])) and ours['f1'] == pytest.approx(
        float(theirs['f1']), rel=1e-5
    )


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
        gold, said = answers(seed=trial)
        for k in list(gold)[::3]:
            gold[k] = []
        rng = np.random.default_rng(trial)
        odds = {k: float(rng.normal() + (2 if not gold[k] else 0)) for k in gold}
        expected = published(gold, said, odds, threshold=1e9)
        ours = scores.squad(gold, said, odds)
        for name, value in expected.items():
            assert ours[name] == pytest.approx(value), (trial, name)
        parts = [
            (f'{part}_exact', [k for k in gold if bool(gold[k]) == has])
            for part, has in (('has_answer', True), ('no_answer', False))
        ]
        assert ours['exact'] == pytest.approx(sum(ours[name] * len(keys) for name, keys in parts) / len(gold))


@pytest.mark.parametrize('truth, said, exact, f1', [
    ('The Cat!', 'cat', 1, 1), ('a cat', 'the dog', 0, 0), ('', '', 1, 1), ('cat', '', 0, 0), ('the', 'a', 1, 1),
    ('5', '5', 1, 1), ('big red cat', 'red cat sat', 0, 2 / 3)])
def test_answers_one_by_one(truth, said, exact, f1):
    assert scores.exact_match(truth, said) == exact and scores.token_f1(
        truth, said, unanswerable=True
    ) == pytest.approx(f1)
