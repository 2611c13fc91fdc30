"""Scores of predictions, through scikit-learn, scipy and seqeval; SQuAD's by its published rules."""

import collections
import re
import string
import warnings
from collections.abc import Mapping, Sequence

import numpy as np
import scipy.special
import scipy.stats
import sklearn.metrics

ARTICLES = re.compile(r'\b(a|an|the)\b', re.UNICODE)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities [..., C] of logits, in float64."""
    return scipy.special.softmax(np.asarray(logits, np.float64), axis=-1)


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Probabilities of logits, each on its own, in float64."""
    return scipy.special.expit(np.asarray(logits, np.float64))


def classification(logits: np.ndarray, label_ids: np.ndarray, labels: Sequence[str]) -> dict[str, float]:
    """Loss, accuracy, Matthews correlation, macro F1 and each label's F1; of two labels the second one's as 'f1'.

    Args:
      logits: [N, C].
      label_ids: [N].
      labels: the C names.
    """
    predictions, every = np.argmax(logits, -1), np.arange(len(labels))
    f1 = sklearn.metrics.f1_score(label_ids, predictions, labels=every, average=None, zero_division=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # one class alone: the coefficient is 0
        matthews = float(sklearn.metrics.matthews_corrcoef(label_ids, predictions))
    return {'loss': float(sklearn.metrics.log_loss(label_ids, softmax(logits), labels=every)),
            'accuracy': float(sklearn.metrics.accuracy_score(label_ids, predictions)), 'matthews': matthews,
            **({'f1': float(f1[1])} if len(labels) == 2 else {}), 'f1_macro': float(f1.mean()),
            **{f'f1[{label}]': float(value) for label, value in zip(labels, f1)}}


def multilabel(logits: np.ndarray, label_ids: np.ndarray, labels: Sequence[str]) -> dict[str, float]:
    """Exact matches, micro and macro F1, each label's F1; logits and label_ids [N, C]."""
    predictions = np.asarray(logits) > 0
    f1 = sklearn.metrics.f1_score(label_ids, predictions, average=None, zero_division=0.0)
    return {'accuracy': float(sklearn.metrics.accuracy_score(label_ids, predictions)),
            'f1_micro': float(sklearn.metrics.f1_score(label_ids, predictions, average='micro', zero_division=0.0)),
            'f1_macro': float(f1.mean()), **{f'f1[{label}]': float(value) for label, value in zip(labels, f1)}}


def regression(values: np.ndarray, truth: np.ndarray, labels: Sequence[str] = ()) -> dict[str, float]:
    """Pearson's and Spearman's correlation (0 where one side is constant) and the mean squared error; [N]."""
    pearson = spearman = 0.0  # what a single row has
    if len(truth) > 1:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            pearson, spearman = scipy.stats.pearsonr(values, truth)[0], scipy.stats.spearmanr(values, truth)[0]
    return {'pearson': float(np.nan_to_num(pearson)), 'spearman': float(np.nan_to_num(spearman)),
            'mse': float(np.mean((np.asarray(values, np.float64) - truth) ** 2))}


def tagging(truth: Sequence[Sequence[str]], predictions: Sequence[Sequence[str]]) -> dict[str, float]:
    """Entity precision, recall and F1 as conlleval counts them (seqeval's default), each type's F1, token accuracy."""
    import seqeval.metrics

    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # no entity at all: the mean over types is of nothing
        report = seqeval.metrics.classification_report(truth, predictions, output_dict=True, zero_division=0)
    whole = report['micro avg']
    types = {name: values for name, values in report.items() if not name.endswith(' avg')}
    return {'f1': float(whole['f1-score']), 'precision': float(whole['precision']), 'recall': float(whole['recall']),
            'accuracy': float(seqeval.metrics.accuracy_score(truth, predictions)),
            **{f'f1[{name}]': float(values['f1-score']) for name, values in types.items()}}


def normalize_answer(text: str) -> str:
    """Lower case, without punctuation, articles and extra spaces (SQuAD's evaluation)."""
    text = ''.join(c for c in text.lower() if c not in set(string.punctuation))
    return ' '.join(ARTICLES.sub(' ', text).split())


def exact_match(truth: str, prediction: str) -> float:
    """1 when both are equal once normalised."""
    return float(normalize_answer(truth) == normalize_answer(prediction))


def token_f1(truth: str, prediction: str, unanswerable: bool) -> float:
    """F1 over the words of both once normalised.

    Where both are empty (an answer 'the') it is 1 by SQuAD 2.0's rules (`unanswerable`), and 0 by those of 1.1.
    """
    a, b = normalize_answer(truth).split(), normalize_answer(prediction).split()
    common = (collections.Counter(a) & collections.Counter(b)).total()
    if not common:
        return float(unanswerable and a == b)
    return 2 * common / (len(a) + len(b))


def of_each_question(answers: Mapping[str, Sequence[str]], predictions: Mapping[str, str], unanswerable: bool
                     ) -> dict[str, dict[str, float]]:
    """{'exact', 'f1'}: id -> the best over its answers.

    By SQuAD 2.0's rules (`unanswerable`) answers that normalise to nothing are none, and no answer is ''.
    """
    each = {'exact': {}, 'f1': {}}
    for id_, gold in answers.items():
        gold = [answer for answer in gold if normalize_answer(answer)] if unanswerable else gold
        gold = gold or ['']
        each['exact'][id_] = max(exact_match(answer, predictions[id_]) for answer in gold)
        each['f1'][id_] = max(token_f1(answer, predictions[id_], unanswerable) for answer in gold)
    return each


def squad(answers: Mapping[str, Sequence[str]], predictions: Mapping[str, str],
          null_odds: Mapping[str, float] | None = None) -> dict[str, float]:
    """Exact match and F1 in per cent, the best over each question's answers; with null odds, SQuAD 2.0's scores too.

    Args:
      answers: id -> gold answers; none for a question without an answer.
      predictions: id -> text; '' says that there is no answer.
      null_odds: id -> how much more the model believes that there is none.

    Returns:
      exact, f1; with null_odds also has_answer_* and no_answer_* and, over all thresholds of the odds, best_exact,
      best_exact_threshold, best_f1, best_f1_threshold (evaluate-v2.0.py).
    """
    each = of_each_question(answers, predictions, unanswerable=null_odds is not None)
    result = {name: 100 * float(np.mean(list(values.values()))) for name, values in each.items()}
    if null_odds is None:
        return result
    for part, wanted in (('has_answer', True), ('no_answer', False)):
        ids = [id_ for id_, gold in answers.items() if bool(gold) == wanted]
        if ids:
            result |= {f'{part}_{name}': 100 * float(np.mean([values[id_] for id_ in ids]))
                       for name, values in each.items()}
    for name, values in each.items():
        best = best_threshold(answers, predictions, values, null_odds)
        result[f'best_{name}'], result[f'best_{name}_threshold'] = best
    return result


def best_threshold(answers: Mapping[str, Sequence[str]], predictions: Mapping[str, str], values: Mapping[str, float],
                   null_odds: Mapping[str, float]) -> tuple[float, float]:
    """(score in per cent, threshold): answering only where the odds are at most the threshold (find_best_thresh)."""
    score = best = sum(not gold for gold in answers.values())
    threshold = 0.0
    for id_ in sorted(answers, key=lambda id_: null_odds[id_]):
        if answers[id_]:
            score += values[id_]
        elif predictions[id_]:
            score -= 1
        if score > best:
            best, threshold = score, null_odds[id_]
    return 100 * best / len(answers), threshold
