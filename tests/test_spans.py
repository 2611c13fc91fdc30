"""Questions on long passages; SQuAD's two sets of rules."""

import collections
import json
import re
import string
import time

import numpy as np
import pytest
from conftest import ROOT

from bert_jax import cli
from bert_jax.cli import UserError
from bert_jax.tasks import inputs, scores, spans, tasks
from bert_jax.tasks.task import Task

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
    rows = [
        spans.Question(str(i), 'who is it ?', passage, ((f'w{i}', passage.index(f'w{i}')),), True, '') for i in range(4)
    ]
    start = time.process_time()
    data = spans.encode(Task('span', {}, settings=SETTINGS), rows, Words(), 384, (384,))
    assert len(data.token_labels['best_context']) == len(data.ids)
    return time.process_time() - start


def test_a_long_passage_takes_as_long_as_its_words():
    """Four times the words: sixteen times as long by a reader that compares each window with all."""
    assert min(seconds(32_000) for _ in range(2)) < 9 * min(seconds(8_000) for _ in range(3))


@pytest.mark.parametrize('blank, start', [('', 0), ('', -1), (' ', 3), (' \n', 0)])
def test_an_answer_of_white_space_is_none(blank, start, tmp_path, capsys):
    """Of a SQuAD file and of a table; tasks without unanswerable questions refuse it, as a question without answers."""
    passage = 'who she is'
    none, she = {'text': blank, 'answer_start': start}, {'text': 'she', 'answer_start': 4}
    file = str(tmp_path / 'a.json')
    (tmp_path / 'a.json').write_text(json.dumps({'data': [{'paragraphs': [{'context': passage, 'qas': [
        {'id': str(i), 'question': 'q', 'answers': answers} for i, answers in enumerate([[none], [none, she]])]}]}]}))
    assert [question.answers for question in spans.read(file)] == [(), (('she', 4),)]
    assert capsys.readouterr().err.count('2 answers are empty or white space alone, and count as none.') == 1
    (tmp_path / 'a.jsonl').write_text('\n'.join(
        json.dumps({'question': 'q', 'passage': passage, 'answer': answer}) for answer in (blank, 'she', None)))
    assert [question.answers for question in spans.read(str(tmp_path / 'a.jsonl'))] == [(), (('she', 4),), ()]
    settings = cli.load_config(f'{ROOT}/configs/finetune.py:squad1', [
        f'--config.task.{key}={file}' for key in ('train_file', 'dev_file')]).task.to_dict()
    with pytest.raises(UserError, match='question 0: a question without an answer; give --config.task.null_answers'):
        tasks.read(settings.pop('name'), settings)


def test_an_answer_is_not_counted_from_the_end_of_its_passage(tmp_path):
    (tmp_path / 'a.json').write_text(json.dumps({'data': [{'paragraphs': [{'context': 'a b c', 'qas': [
        {'id': '1', 'question': 'q', 'answers': [{'text': 'b', 'answer_start': -3}]}]}]}]}))
    with pytest.raises(UserError, match="question 1: the answer 'b' is not in the passage at -3"):
        spans.read(str(tmp_path / 'a.json'))


def normalized(text):
    text = ''.join(c for c in text.lower() if c not in set(string.punctuation))
    return ' '.join(re.sub(r'\b(a|an|the)\b', ' ', text).split())


@pytest.mark.parametrize('indent', [None, 1])
def test_a_squad_file_is_predicted_however_it_is_laid_out(tmp_path, indent):
    (tmp_path / 'a.json').write_text(json.dumps({'data': [{'paragraphs': [{'context': 'a b c', 'qas': [
        {'id': 'x', 'question': 'which?', 'answers': []}]}]}]}, indent=indent))
    (row,), left_out = inputs.read(str(tmp_path / 'a.json'), 'span', {'name': 'squad2'})
    assert (row.id, row.text, row.passage, left_out) == ('x', 'which?', 'a b c', 0)


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
    counted = (
        {id_: [answer for answer in answers if normalized(answer)] or [''] for id_, answers in gold.items()}
        if odds
        else gold
    )
    f1 = [max(rules(answer, said[id_]) for answer in counted[id_]) for id_ in gold]
    exact = [max(normalized(answer) == normalized(said[id_]) for answer in counted[id_]) for id_ in gold]
    found = scores.squad(gold, said, **odds)
    assert found['f1'] == pytest.approx(100 * np.mean(f1)) and found['exact'] == pytest.approx(100 * np.mean(exact))
