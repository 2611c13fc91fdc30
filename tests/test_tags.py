"""Tags of other people's models and files."""

import itertools
import time

import numpy as np
import pytest
from conftest import ROOT
from seqeval.metrics.sequence_labeling import get_entities
from transformers import TokenClassificationPipeline

from bert_jax import cli
from bert_jax.cli import UserError
from bert_jax.tasks import inputs, tag_schemes, tags, tasks
from bert_jax.tasks.task import Task


def spans(found):
    return [(entity['type'], entity['begin'], entity['end'] - 1) for entity in found]


def test_entities_of_every_scheme_are_seqevals():
    """All sequences of four tags, also those that no scheme allows: S-PER S-PER S-PER are three."""
    every = ['O', *(f'{prefix}-{kind}' for prefix in 'BIES' for kind in ('PER', 'LOC'))]
    for sequence in itertools.product(every, repeat=4):
        assert spans(tag_schemes.entities('wwww', sequence, every)) == get_entities(list(sequence)), sequence
    assert len(tag_schemes.entities('www', ['S-PER'] * 3)) == 3


@pytest.mark.parametrize(
    'given, meant',
    [
        (['U-PER', 'B-LOC', 'L-LOC', 'O'], ['S-PER', 'B-LOC', 'E-LOC', 'O']),
        (['B_PER', 'I_PER', 'O', 'B_X-Y'], ['B-PER', 'I-PER', 'O', 'B-X-Y']),
        (['B-PER', 'M-PER', 'E-PER', 'S-PER'], ['B-PER', 'I-PER', 'E-PER', 'S-PER']),
        (['PER', 'PER', 'LOC', 'O'], ['B-PER', 'I-PER', 'B-LOC', 'O']),
    ],
)
def test_other_ways_to_write_tags(given, meant):
    assert spans(tag_schemes.entities('abcd', given)) == get_entities(meant)


def test_random_sequences_of_every_scheme_are_seqevals():
    """Longer ones, of BILOU, BMES and prefixes with _ too, which are seqeval's S- and E- under other letters."""
    rng = np.random.default_rng(0)
    for prefixes in ('I', 'BI', 'BIES', 'BILU', 'BMES'):
        for join in '-_':
            every = ['O', *(f'{prefix}{join}{kind}' for prefix in prefixes for kind in ('PER', 'X-Y', 'a_b'))]
            for _ in range(300):
                found = rng.choice(every, rng.integers(0, 13)).tolist()
                letters = str.maketrans('LUM', 'ESI')
                meant = [tag if tag == 'O' else f'{tag[0].translate(letters)}-{tag[2:]}' for tag in found]
                assert spans(tag_schemes.entities(['w'] * len(found), found, every)) == get_entities(meant), found


def test_labels_without_a_prefix_beside_those_with_one():
    """X and [CLS] beside B- and I- are types of their own: each label as transformers' pipeline reads it."""
    labels = ('O', 'B-PER', 'I-PER', 'X', '[CLS]')
    for sequence in itertools.product(labels, repeat=4):
        meant = ['-'.join(TokenClassificationPipeline.get_tag(None, tag)) if tag != 'O' else 'O' for tag in sequence]
        assert spans(tag_schemes.entities('wwww', sequence, labels)) == get_entities(meant), sequence
    kinds = [
        entity['type'] for entity in tag_schemes.entities('abc', ['E_MAIL', 'PHONE', 'O'], ('O', 'E_MAIL', 'PHONE'))
    ]
    assert kinds == ['E_MAIL', 'PHONE']  # no scheme: a type that only looks like one
    assert spans(tag_schemes.entities('abc', ['B-PER', 'I-PER', 'X'], ('B-PER', 'I-PER', 'X'))) == [('PER', 0, 1)]


@pytest.mark.parametrize(
    'labels', [('NN', 'VB', 'S'), ('LABEL_0', 'LABEL_1', 'LABEL_2'), ('O', 'PER', 'B'), ('O',), ('B_PER', 'O', 'I_PER')]
)
def test_any_label_set_is_decoded(labels):
    """Parts of speech, types without B- and I-, transformers' LABEL_0: tags and scores always."""
    rows = [tags.Sentence(tuple('abcd'), None, 0, ''), tags.Sentence(('e',), None, 0, '')]
    data = type('Data', (), {'token_labels': {'words': np.arange(5)}})
    logits = np.eye(len(labels))[np.arange(5) % len(labels)]
    found = tags.decode(Task('tagging', {}, labels), rows, data, {'logits': [logits]})
    assert [name for one in found for name in one['tags']] == [labels[i % len(labels)] for i in range(5)]
    assert all(len(one['scores']) == len(one['tags']) for one in found)
    assert bool(found[0]['entities']) == (labels in (('O', 'PER', 'B'), ('B_PER', 'O', 'I_PER')))


WORDS = [
    ('1', 'Anna', 'B-PER'),
    ('', 'sings', 'O'),
    ('', 'in', 'O'),
    ('', 'Rome', 'B-LOC'),
    ('2', 'Yes', 'O'),
    ('2', 'Anna', 'B-PER'),
    ('2', 'Po', 'I-PER'),
    ('1', 'No', 'O'),
]


def word_a_row(path, column):
    path.write_text(f'{column},Word,Tag\n' + ''.join(','.join(row) + '\n' for row in WORDS))
    return str(path)


@pytest.mark.parametrize('column, given', [('Sentence #', ''), ('sentence_id', ''), ('which', 'which')])
def test_a_word_a_row_is_read_by_the_column_of_its_sentence(column, given, tmp_path, capsys):
    """Another value begins a sentence, an empty one goes on: as pandas' ffill and groupby of runs have it."""
    found = tags.read(word_a_row(tmp_path / 'w.csv', column), 'Word', 'Tag', 'iob2', sentence_column=given)
    assert [s.words for s in found] == [('Anna', 'sings', 'in', 'Rome'), ('Yes', 'Anna', 'Po'), ('No',)]
    assert [s.tags for s in found] == [('B-PER', 'O', 'O', 'B-LOC'), ('O', 'B-PER', 'I-PER'), ('O',)]
    assert found[1].where_is(2) == f'{tmp_path}/w.csv:8'
    assert (f'the column {column!r} says' in capsys.readouterr().err) == (not given)
    plain = tags.read(str(tmp_path / 'w.csv'), 'Word', 'none', 'iob2', labelled=False, sentence_column=given)
    assert [s.words for s in plain] == [s.words for s in found] and plain[0].tags is None


def test_a_word_a_row_without_such_a_column_is_refused(tmp_path):
    file = word_a_row(tmp_path / 'w.csv', 'n')
    with pytest.raises(
        UserError, match=r'w.csv: a word a row.*--config.task.sentence_column names it \(there are: n, Tag\)'
    ):
        tags.read(file, 'Word', 'Tag', 'iob2')
    with pytest.raises(UserError, match="no column 'm'; there are: n, Word, Tag"):
        tags.read(file, 'Word', 'Tag', 'iob2', sentence_column='m')
    bad = tmp_path / 'bad.csv'
    bad.write_text('sentence,Word,Tag\n1,a,O\n1,b,I-X\n')
    with pytest.raises(UserError, match="bad.csv:3: 'I-X' is not IOB2 after 'O'"):
        tags.read(str(bad), 'Word', 'Tag', 'iob2')
    settings = cli.load_config(
        str(ROOT / 'configs/finetune.py') + ':tagging',
        [
            f'--config.task.{key}={value}'
            for key, value in (
                ('train_file', file),
                ('word_column', 'Word'),
                ('tag_column', 'Tag'),
                ('sentence_column', 'n'),
                ('dev_file', file),
            )
        ],
    ).task.to_dict()
    assert len(tasks.read(settings.pop('name'), settings).splits['train']) == 3


def test_lists_of_one_word_are_sentences_of_one_word(tmp_path):
    (tmp_path / 'a.jsonl').write_text('{"words": ["Rome"], "tags": ["B-LOC"]}\n{"words": ["Yes"], "tags": ["O"]}\n')
    found = tags.read(str(tmp_path / 'a.jsonl'), '', '', 'iob2')
    assert [(s.words, s.tags) for s in found] == [(('Rome',), ('B-LOC',)), (('Yes',), ('O',))]
    assert inputs.read(str(tmp_path / 'a.jsonl'), 'tagging', {})[0][1].words == ('Yes',)


def test_predict_reads_a_sentence_a_row_after_training_on_a_word_a_row(tmp_path):
    """The new table has no column of the sentence: it needs none."""
    (tmp_path / 'new.csv').write_text('Word\nAnna sings in Rome\nYes\n')
    settings = {'name': 'tagging', 'word_column': 'Word', 'tag_column': 'Tag', 'sentence_column': 'which'}
    found, _ = inputs.read(str(tmp_path / 'new.csv'), 'tagging', settings)
    assert [s.words for s in found] == [('Anna', 'sings', 'in', 'Rome'), ('Yes',)]
    both, _ = inputs.read(word_a_row(tmp_path / 'w.csv', 'which'), 'tagging', settings)
    assert [len(s.words) for s in both] == [4, 3, 1]


def seconds(sentences, words):
    tokenizer = type(
        'Words', (), {'cls_id': 0, 'sep_id': 1, 'unk_id': 2, 'pad_id': 0, 'encode': lambda self, word: [3]}
    )()
    rows = [tags.Sentence(('w',) * words, ('O',) * words, 0, 'f:1')] * sentences
    task = Task('tagging', {}, ('O', 'B-X'), settings={'document_context': sentences > 1})
    start = time.process_time()
    tags.encode(task, rows, tokenizer, 32, (32,))
    return time.process_time() - start


@pytest.mark.parametrize('small, large', [((1, 4_000), (1, 16_000)), ((800, 5), (3_200, 5))])
def test_long_sentences_and_documents_take_as_long_as_their_words(small, large):
    """Four times the words: sixteen times as long by a reader that goes over all of them for each window."""
    assert min(seconds(*large) for _ in range(3)) < 9 * min(seconds(*small) for _ in range(3))
