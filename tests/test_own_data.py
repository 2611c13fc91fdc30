"""The user's own files under the user's own names: what is read, what is refused, what is said of it."""

import csv
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import sklearn.metrics
from conftest import ROOT
from test_tasks import config, json_lines, make, model, table  # noqa: F401 - model is a fixture

from bert_jax import cli, finetune, plots
from bert_jax.cli import UserError
from bert_jax.tasks import choices, glue, spans, tags, tasks
from bert_jax.tasks.task import Task

WORDS, TAGS = (
    (['EU', 'rejects', 'German', 'call'], ['Peter', 'Blackburn']),
    (['B-ORG', 'O', 'B-MISC', 'O'], ['B-PER', 'I-PER']),
)


def write(path, records):
    """One table as .csv, .tsv or .jsonl."""
    if path.suffix == '.jsonl':
        return json_lines(path, records)
    return table(
        path, list(records[0]), [['' if value is None else value for value in record.values()] for record in records]
    )


@pytest.mark.parametrize('suffix', ['.csv', '.tsv', '.jsonl'])
def test_sentences_with_tags_in_any_table(suffix, tmp_path):
    join = list if suffix == '.jsonl' else ' '.join
    file = write(tmp_path / f't{suffix}', [{'tokens': join(w), 'id': 7, 'ner': join(t)} for w, t in zip(WORDS, TAGS)])
    found = tags.read(str(file), 'tokens', 'ner', 'iob2', labelled=True)
    assert [list(s.words) for s in found] == list(WORDS) and [list(s.tags) for s in found] == list(TAGS)
    (tmp_path / 'c.conll').write_text(
        '\n\n'.join('\n'.join(map(' '.join, zip(w, t))) for w, t in zip(WORDS, TAGS)) + '\n'
    )
    columns = tags.read(str(tmp_path / 'c.conll'), '', '', 'iob2', labelled=True)
    assert [(s.words, s.tags) for s in columns] == [(s.words, s.tags) for s in found]
    assert tags.read(str(file), 'tokens', 'no such', 'iob2', labelled=False)[1].tags is None


@pytest.mark.parametrize('suffix', ['.csv', '.tsv', '.jsonl'])
def test_questions_on_passages_in_any_table(suffix, tmp_path):
    records = [
        {'q': 'who?', 'text': 'he or she', 'said': 'she', 'at': 6, 'number': 'a'},
        {'q': 'why?', 'text': 'no', 'said': None, 'at': None, 'number': 'b'},
        {'q': 'what?', 'text': 'on on', 'said': 'on', 'at': None, 'number': 'c'},
    ]
    names = {
        'question_column': 'q',
        'passage_column': 'text',
        'answer_column': 'said',
        'answer_start_column': 'at',
        'id_column': 'number',
    }
    found = spans.read(str(write(tmp_path / f's{suffix}', records)), **names)
    assert [(q.id, q.text, q.passage, q.answers, q.labelled) for q in found] == [
        ('a', 'who?', 'he or she', (('she', 6),), True),
        ('b', 'why?', 'no', (), True),
        ('c', 'what?', 'on on', (('on', 0),), True),
    ]
    file = str(write(tmp_path / f'u{suffix}', [{'question': 'q', 'passage': 'p'}]))
    (unlabelled,) = spans.read(file, labelled=False)
    assert not unlabelled.labelled and unlabelled.id.endswith(f'u{suffix}:{1 if suffix == ".jsonl" else 2}')
    with pytest.raises(UserError, match="no column 'answer'; there are: question, passage"):
        spans.read(file)
    for name in ('answer_start_column', 'id_column'):  # misspelled is not missing
        with pytest.raises(UserError, match="no column 'nubmer'; there are: q, text, said, at, number"):
            spans.read(str(tmp_path / f's{suffix}'), **(names | {name: 'nubmer'}))


@pytest.mark.parametrize('suffix', ['.csv', '.tsv', '.jsonl'])
def test_choices_in_any_table(suffix, tmp_path):
    file = write(
        tmp_path / f'c{suffix}',
        [
            {'stem': 'x', 'A': 'a', 'B': 'b', 'C': 'c', 'right': 2},
            {'stem': 'y', 'A': 'd', 'B': 'e', 'C': None, 'right': 1},
        ],
    )
    found = choices.read(
        str(file), 'plain', context_column='stem', choice_columns=('A', 'B', 'C'), label_column='right'
    )
    assert [(q.context, q.choices, q.label) for q in found] == [('x', ('a', 'b', 'c'), 2), ('y', ('d', 'e'), 1)]
    assert [
        q.label
        for q in choices.read(str(file), 'plain', labelled=False, context_column='stem', choice_columns=('A', 'B', 'C'))
    ] == [None, None]
    with pytest.raises(UserError, match="no column 'label'"):
        choices.read(str(file), 'plain', context_column='stem', choice_columns=('A', 'B', 'C'))
    with pytest.raises(UserError, match="no column 'choices'; there are: stem, A, B, C, right"):
        choices.read(str(file), 'plain')


def test_columns_by_name_from_the_command_line(model, tmp_path):  # noqa: F811
    """As docs/finetuning.md has them; the label names are those given."""
    records = [{'tokens': 'w1 w11', 'ner': 'O B-PER'}, {'tokens': 'w2 w12', 'ner': 'O B-PER'}]
    with (tmp_path / 't.csv').open('w', newline='') as file:
        csv.DictWriter(file, records[0]).writerows([dict(zip(records[0], records[0])), *records])
    files = {name: str(tmp_path / 't.csv') for name in ('train_file', 'dev_file')}
    c = config(
        'tagging',
        model,
        files,
        'task.word_column=tokens',
        'task.tag_column=ner',
        "task.labels=('O','B-PER','I-PER','B-LOC','I-LOC')",
        'epochs=1.0',
    )
    finetune.finetune(c, str(tmp_path / 'work'))
    assert json.loads((tmp_path / 'work' / 'labels.json').read_text()) == ['O', 'B-PER', 'I-PER', 'B-LOC', 'I-LOC']


SQUAD = {'data': [{'paragraphs': [{'context': 'b c', 'qas': []}]}]}


@pytest.mark.parametrize(
    'name, suffix, content, overrides, words',
    [
        ('tagging', '.csv', 'words,tags\na b,O\n', (), ('bad.csv:2', '2 words and 1 tags')),
        ('tagging', '.csv', 'words,tags\na b,O I-X\n', (), ('bad.csv:2', "'I-X' is not IOB2")),
        ('tagging', '.csv', 'words,tags\na b,O X\n', (), ('bad.csv:2', "'X' is not a tag")),
        ('tagging', '.csv', 'words,tags\n ,\n', (), ('bad.csv:2', 'no words')),
        (
            'tagging',
            '.jsonl',
            '{"words": ["a"], "tags": [1]}\n',
            (),
            ('bad.jsonl:1', 'tags is neither a text nor a list'),
        ),
        (
            'tagging',
            '.tsv',
            'text\ttags\na\tO\n',
            ('task.word_column=tokens',),
            ('bad.tsv:2', "no column 'tokens'", 'text, tags'),
        ),
        (
            'tagging',
            '.conll',
            'a O\nb B-X\n',
            ("task.labels=('O','B-Y')",),
            ('bad.conll:2', "tag 'B-X' of 'b'", 'O, B-Y'),
        ),
        ('tagging', '.conll', 'a N\nb N\n', ('task.tag_column=1',), ('bad.conll:1', "'N' is not a tag")),
        ('tagging', '.conll', 'a O\nb O\n', (), ('bad.conll: no tag but O',)),
        ('tagging', '.conll', 'a B-X\nb E-X\n', (), ('bad.conll:2', 'IOBES (scheme=iobes)')),
        (
            'tagging',
            '.csv',
            'words,tags\na,B-X\n',
            ('task.document_context=True',),
            ('tables say nothing of documents',),
        ),
        (
            'classification',
            '.csv',
            'text,label\n"a\nb",x\nc,y,z\n',
            (),
            ('bad.csv:4', '3 columns where the header has 2'),
        ),
        ('classification', '.csv', 'text,label,label\na,x,y\n', (), ('bad.csv:1', "the column 'label' stands twice")),
        ('classification', '.xls', 'text,label\na,x\n', (), ('bad.xls', '.csv, .tsv, .jsonl')),
        (
            'classification',
            '.jsonl',
            '{"text": null, "label": "x"}\n',
            (),
            ('bad.jsonl:1', 'text is null, which is no text'),
        ),
        ('classification', '.jsonl', '{"text": ["a", "b"], "label": "x"}\n', (), ('bad.jsonl:1', 'text is ["a", "b"]')),
        (
            'classification',
            '.jsonl',
            '{"text": "a", "b": null, "label": "x"}\n',
            ('task.text_pair_column=b',),
            ('bad.jsonl:1', 'b is null'),
        ),
        (
            'classification',
            '.csv',
            'text,label\na,x\nb,y\n',
            ('task.dev_share=2.0',),
            ('dev_share=2.0', 'between 0 and 1'),
        ),
        (
            'span',
            '.jsonl',
            '{"question": null, "passage": "a", "answer": "a"}\n',
            (),
            ('bad.jsonl:1', 'question is null'),
        ),
        ('span', '.csv', 'question,passage,answer\na,b c,c\n', ('task.n_best=0',), ('n_best=0', 'one or more')),
        (
            'span',
            '.json',
            json.dumps({'data': [{'paragraphs': [{'context': 'b \ud83d', 'qas': []}]}]}),
            (),
            ('bad.json', 'surrogate'),
        ),
        (
            'choice',
            '.jsonl',
            '{"context": "a", "choices": ["b", null, "c"], "label": 0}\n',
            (),
            ('bad.jsonl:1', 'choice 1 is empty'),
        ),
        (
            'commonsenseqa',
            '.jsonl',
            '{"question": {"stem": null, "choices": [{"label": "A", "text": "a"}]}}\n',
            (),
            ('bad.jsonl:1', 'stem is null'),
        ),
        ('multilabel', '.csv', 'text,label\na,x y\nb,z\n', ("task.labels=('x','y')",), ('bad.csv:3', "'z'", 'x, y')),
        (
            'span',
            '.csv',
            'question,passage,answer,answer_start\na,b c,c,two\n',
            (),
            ('bad.csv:2', "answer_start 'two' is not a whole number"),
        ),
        ('span', '.csv', 'question,passage,answer\na,b c,d\n', (), ('bad.csv:2', "'d' is not in the passage")),
        ('span', '.csv', 'question,passage,answer\n', (), ('no questions',)),
        ('span', '.json', json.dumps(SQUAD), (), ('no questions',)),
        (
            'choice',
            '.csv',
            'context,a,b,label\nx,y,z,2\n',
            ("task.choice_columns=('a','b')",),
            ('bad.csv:2', 'label 2 is none of the 2'),
        ),
        (
            'choice',
            '.csv',
            'context,a,b,label\nx,y,z,2\n',
            ("task.choice_columns=('a',)",),
            ('bad.csv:2', 'several columns'),
        ),
        (
            'commonsenseqa',
            '.jsonl',
            json.dumps(
                {
                    'answerKey': 'C',
                    'question': {'stem': 's', 'choices': [{'label': 'A', 'text': 'a'}, {'label': 'B', 'text': 'b'}]},
                }
            )
            + '\n',
            (),
            ('bad.jsonl:1', "answerKey 'C'", 'A, B'),
        ),
        (
            'commonsenseqa',
            '.jsonl',
            json.dumps(
                {
                    'answerKey': 'C',
                    'question': {'stem': 's', 'choices': [{'label': 1, 'text': 'a'}, {'label': 2, 'text': 'b'}]},
                }
            )
            + '\n',
            (),
            ('bad.jsonl:1', "answerKey 'C'", '1, 2'),
        ),
        (
            'choice',
            '.csv',
            'context,a,b,label\nx,y,z,\n',
            ("task.choice_columns=('a','b')",),
            ('bad.csv:2', 'no label'),
        ),
        (
            'classification',
            '.csv',
            'text,label\na,x\n',
            ('task.name=cola',),
            ('--config.task.name=cola', 'configs/finetune.py:cola'),
        ),
        ('tagging', '.conll', 'a O\nNew York\tB-X\n', (), ('bad.conll:2', '3 columns where the first line has 2')),
        ('commonsenseqa', '.jsonl', '{"question": "why"}\n', (), ('bad.jsonl:1', 'question.stem')),
        ('swag', '.csv', 'sent1,ending0,ending1,label\na,b,c,0\n', (), ('bad.csv:2', "no column 'sent2'")),
        (
            'choice',
            '.csv',
            'sent1,ending0,ending1,label\na,b,c,0\n',
            ('task.format=swag',),
            ('bad.csv:2', "no column 'sent2'"),
        ),
        (
            'squad1',
            '.json',
            json.dumps({'data': [{'paragraphs': [{'context': 'b c', 'qas': [{'id': '7', 'question': 'a'}]}]}]}),
            (),
            ('question 7: no answers',),
        ),
        (
            'swag',
            '.csv',
            'sent1,sent2,ending0,ending1,label\na,b,c,d,one\n',
            (),
            ('bad.csv:2', "label 'one' is not a whole number"),
        ),
    ],
)
def test_what_is_wrong_is_named_with_file_and_line(name, suffix, content, overrides, words, model, tmp_path):  # noqa: F811
    (tmp_path / f'bad{suffix}').write_text(content)
    files = {key: str(tmp_path / f'bad{suffix}') for key in ('train_file', 'dev_file')}
    with pytest.raises(UserError) as error:
        finetune.finetune(config(name, model, files, *overrides), str(tmp_path / 'work'))
    assert all(word in str(error.value) for word in words), error.value
    assert not (tmp_path / 'work').exists()


def test_a_label_that_glue_does_not_have(tmp_path):
    make('sst2', tmp_path)
    (tmp_path / 'dev.tsv').write_text('sentence\tlabel\nfine\t2\n')
    with pytest.raises(UserError, match=r"dev.tsv:2: label '2' is not in the label set: 0, 1"):
        glue.read('sst2', str(tmp_path))


@pytest.mark.parametrize('name, test', [
    ('tagging', 'w1\nw11\n\nw2\n'), ('regression', 'text\nw1\nw2\n'), ('multilabel', 'text\nw1\nw2\n'),
    ('span', '{"question": "w1", "passage": "w2 w3"}\n{"question": "w1", "passage": "w4"}\n')])
def test_a_test_file_without_labels_is_predicted_and_not_scored(name, test, model, tmp_path):  # noqa: F811
    settings = make(name, tmp_path)
    suffix = {'tagging': '.conll', 'span': '.jsonl'}.get(name, '.csv')
    (tmp_path / f'test{suffix}').write_text(test)
    results = finetune.finetune(
        config(name, model, settings | {'test_file': str(tmp_path / f'test{suffix}')}, 'epochs=1.0'),
        str(tmp_path / 'work'),
    )
    assert any(key.startswith('dev/') for key in results) and not any(key.startswith('test') for key in results)
    (file,) = (tmp_path / 'work').glob('predictions_test.*')
    found = json.loads(file.read_text()) if name == 'span' else [line for line in file.read_text().splitlines() if line]
    assert len(found) == {'tagging': 3, 'span': 2}.get(name, 3)


@pytest.mark.parametrize(
    'name, test, note',
    [
        ('tagging', 'w1 N O\nw11 N B-PER\n', ''),
        ('regression', 'text,label\nw1,1\nw2,2\n', ''),
        ('multilabel', 'text,label\nw1,a\nw2,\n', ''),
        ('classification', 'text,label\nw1,a\nw2,b\n', ''),
        ('tagging', 'w1 N O\nw11 N B-NEW\n', "test.conll:2: tag 'B-NEW' of 'w11' is not in the label set"),
        ('tagging', 'w1\nw11\n', "test.conll:1: 'w1' is not a tag"),
        ('regression', 'text,label\nw1,?\n', "test.csv:2: label '?' is not a number"),
        ('classification', 'text,label\nw1,a\nw2,-1\n', "test.csv:3: label '-1' is not in the label set: a, b, c"),
        ('classification', 'text,label\nw1,a\nw2,\n', 'test.csv:3: no label'),
        ('classification', 'text,label\nw1,\nw2,\n', 'test.csv:2: no label'),
        ('classification', 'text,lable\nw1,a\n', "test.csv:2: no column 'label'; there are: text, lable"),
        ('classification', '{"text": "w1", "label": "a"}\n{"text": "w2", "label": null}\n', 'test.jsonl:2: no label'),
        ('choice', '{"context": "w1", "choices": ["w2", "w3"], "label": 1}\n', ''),
        (
            'choice',
            '{"context": "w1", "choices": ["w2", "w3"], "label": -1}\n',
            'test.jsonl:1: label -1 is none of the 2 choices',
        ),
        ('span', '{"question": "w1", "passage": "w2 w3", "answer": "w3"}\n', ''),
        ('span', '{"question": "w1", "passage": "w2 w3", "answer": null}\n', 'test.jsonl: no answers in it'),
    ],
)
def test_a_test_file_with_labels_is_scored_and_what_is_none_is_said(name, test, note, tmp_path):
    file = tmp_path / f'test{".conll" if name == "tagging" else ".jsonl" if test[0] == "{" else ".csv"}'
    file.write_text(test)
    settings = (
        cli.load_config(f'configs/finetune.py:{name}', []).task.to_dict()
        | make(name, tmp_path)
        | {'test_file': str(file)}
    )
    task = tasks.TASKS[settings.pop('name')](**settings)
    assert tasks.KINDS[task.kind].module.labelled(task.splits['test']) == (note == '')
    assert len(task.notes) == bool(note) and all(
        note in said and said.endswith('so test is predicted, not scored') for said in task.notes
    )


def test_labels_are_those_of_the_whole_training_file(model, tmp_path):  # noqa: F811
    """Also those that only rows have which are cut off for dev."""
    rows = [(f'w{i}', 'abc'[min(i % 50, 2)] if i % 50 < 2 else 'c') for i in range(50)]
    file = str(table(tmp_path / 'a.csv', ('text', 'label'), rows))
    found = []
    for share in (0.1, 0.5, 0.9):
        task = tasks.TASKS['classification'](
            train_file=file,
            dev_file='',
            test_file='',
            text_column='text',
            text_pair_column='',
            label_column='label',
            labels=(),
            dev_share=share,
        )
        assert task.labels == ('a', 'b', 'c')
        found.append({row.label for row in task.splits['train']})
    assert {'a', 'b', 'c'} not in found[-1:]  # some label is in dev alone


def test_words_with_spaces_stay_one_column():
    row = tags.Sentence(('New York', 'is', ''), ('B-L', 'O', 'O'), 0, '')
    (content,) = tags.files(Task('tagging', {}), 'dev', [row], [{'tags': ['B-L', 'O', 'O']}]).values()
    assert content == 'New_York B-L B-L\nis O O\n_ O O\n'


@pytest.mark.parametrize(
    'name, content, said',
    [
        (
            'span',
            'question,passage,answer\nw1,' + 'w2 ' * 40 + ',' + ' '.join(['w2'] * 38) + '\nw1,w2,w2\n',
            '1 answers fit in no window',
        ),
        ('classification', 'text,label\n' + 'w1 ' * 40 + ',a\nw2,b\n', '1 train rows are longer than max_length'),
        (
            'span',
            'question,passage,answer\n' + 'w1 ' * 40 + ',w2,w2\nw1,w2,w2\n',
            '1 dev questions are longer than max_query_length',
        ),
        (
            'choice',
            'context,a,b,label\nw1,w2,w3,0\n' + 'w1 ' * 40 + ',w2,w3,1\n',
            '2 train choices with their contexts are longer',
        ),
        (
            'tagging',
            'words,tags\nw1 ' + '-'.join(['w2'] * 40) + ',O O\nw1,B-X\n',
            '1 train sentences have a word longer than max_length',
        ),
    ],
)
def test_what_was_cut_is_counted_and_said(name, content, said, model, tmp_path, capfd):  # noqa: F811
    (tmp_path / 'a.csv').write_text(content)
    overrides = {'span': ['task.max_query_length=5'], 'choice': ["task.choice_columns=('a','b')"]}.get(name, [])
    c = config(
        name, model, {key: str(tmp_path / 'a.csv') for key in ('train_file', 'dev_file')}, 'epochs=1.0', *overrides
    )
    finetune.Job(c, finetune.read_task(c))
    assert f'note: {said}' in capfd.readouterr().err


def test_without_reading(tmp_path):
    """Baselines: the most frequent label, lengths alone, always the second label."""
    rows = [('a b c', 1), ('d e f', 1), ('g h i', 0), ('j', 0), ('k', 0), ('l', 0)]
    settings = {
        'train_file': str(table(tmp_path / 'a.csv', ('text', 'label'), rows)),
        'dev_file': str(tmp_path / 'a.csv'),
        'test_file': '',
        'text_column': 'text',
        'text_pair_column': '',
        'label_column': 'label',
        'dev_share': 0.1,
    }
    task = tasks.TASKS['classification'](labels=(), **settings)
    found = tasks.KINDS['classification'].module.baseline(task, task.splits['dev'])
    guessed = [0, 0, 0, 1, 0, 0] if task.labels[0] == '1' else [1, 1, 1, 0, 0, 0]
    assert found == {
        'majority_accuracy': pytest.approx(4 / 6),
        'length_accuracy': pytest.approx(5 / 6),
        'always_f1': pytest.approx(0.5),
        'length_matthews': pytest.approx(sklearn.metrics.matthews_corrcoef([1, 1, 0, 0, 0, 0], guessed)),
        'length_f1': pytest.approx(0.8),
        'length_f1_macro': pytest.approx((0.8 + 6 / 7) / 2),
    }
    task = tasks.TASKS['regression'](**settings | {'labels': ()})
    found = tasks.KINDS['regression'].module.baseline(task, task.splits['dev'])
    assert found['mean_mse'] == pytest.approx(np.var([1, 1, 0, 0, 0, 0])) and 0.7 < found['length_pearson'] < 0.71


def test_gold_answers_come_back_from_their_tokens(model, tmp_path):  # noqa: F811
    """benchmarks/gold_spans.py, on an answer that can come back and on one that stands in no whole word."""
    records = [
        {'question': 'w1', 'passage': 'w2 w3-w4.', 'answer': 'w4'},
        {'question': 'w1', 'passage': 'w21 w3', 'answer': '1 w'},
    ]
    json_lines(tmp_path / 's.jsonl', records)
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / 'benchmarks' / 'gold_spans.py'),
            '--tokenizer',
            str(model),
            str(tmp_path / 's.jsonl'),
        ],
        text=True,
        capture_output=True,
        env=os.environ | {'PYTHONPATH': str(ROOT)},
        check=True,
    )
    assert (
        "s.jsonl:2: 'w21 w3' for '1 w'" in done.stdout
        and '2 questions with an answer, 1 recovered (50.00 %)' in done.stdout
    )


def test_the_confusion_picture_shows_how_often_each_label_was_taken_for_each(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, '_save', lambda figure, file: drawn.append((figure, file.name)))
    plots.confusion(tmp_path, ('a', 'b', 'c'), ['a', 'a', 'b', 'b', 'b'], ['a', 'b', 'b', 'b', 'a'])
    ((figure, name),) = drawn
    (panel,) = figure.axes
    assert name == 'confusion.png' and panel.get_ylabel() == 'True label'
    assert [text.get_text() for text in panel.texts] == ['1', '1', '0', '1', '2', '0', '0', '0', '0']
    assert [label.get_text() for label in panel.get_xticklabels()] == ['a', 'b', 'c']
