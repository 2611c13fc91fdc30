"""Tables as people have them: what is read for training is read the same way for prediction."""

import csv
import errno
import io
import json
import os
import pathlib

import h5py
import numpy as np
import pandas
import peers
import pytest
from conftest import call_module, expect_error
from test_tasks import config, make, model  # noqa: F401 - model is a fixture

from bert_jax import finetune, predict
from bert_jax.cli import UserError
from bert_jax.tasks import choices, inputs, tables, tags, tasks, texts
from bert_jax.tasks import labels as labels_
from bert_jax.tasks.task import Task


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def records(file):
    return [record for _, record in tables.read_table(file)]


@pytest.mark.parametrize('sign, name', [(',', ''), (';', 'semicolons'), ('\t', 'tabs'), ('|', r'\|')])
def test_the_separator_of_columns_is_found_and_said(sign, name, tmp_path, capsys):
    """As pandas reads it when it is told; a byte-order mark, separators within quotes, Excel's sep= line."""
    rows = [('a, b; c\td | e', 'x'), ('plain', 'y "z"'), ('two\nlines', 'w')]
    out = io.StringIO()
    csv.writer(out, delimiter=sign).writerows([('Review text', 'Sentiment'), *rows])
    for head in ('\ufeff', '', f'sep={sign}\r\n'):
        file = write(tmp_path / 'a.csv', head + out.getvalue())
        theirs = pandas.read_csv(file, sep=sign, skiprows=1 if 'sep' in head else 0, encoding='utf-8-sig')
        assert records(file) == theirs.to_dict('records')
        said = capsys.readouterr().err
        assert (f'its columns are separated by {name.strip(chr(92))}' in said) if name else not said
    one = write(tmp_path / 'one.csv', 'text\na;b\n"c,d"\n')
    assert records(one) == [{'text': 'a;b'}, {'text': 'c,d'}] and not capsys.readouterr().err
    both = write(tmp_path / 'both.csv', 'a;b,c\n1,2\n')
    assert records(both) == [{'a;b': '1', 'c': '2'}]


def test_a_lone_carriage_return_ends_no_line(tmp_path):
    assert records(write(tmp_path / 'a.jsonl', '{"t": 1}\r\n{"t":\r 2}\n')) == [{'t': 1}, {'t': 2}]
    assert records(write(tmp_path / 'a.tsv', 'a\tb\r\nx\ry\tz\r\n')) == [{'a': 'x\ry', 'b': 'z'}]
    assert records(write(tmp_path / 'a.csv', 'a,b\r\n"x\ry",z\r\n')) == [{'a': 'x\ry', 'b': 'z'}]
    (sentence,) = tags.read(write(tmp_path / 'a.conll', 'x\ry O\n'), '', '', 'iob2', labelled=False)
    assert sentence.words == ('x\ry',)
    rows, _ = inputs.read(write(tmp_path / 'a.txt', 'one\rstill one\r\ntwo\n'), 'classification', {})
    assert [row.text for row in rows] == ['one\rstill one', 'two']


def classes(labels, given=(), dev=('a', 'b')):
    rows = [texts.Row('t', None, labels_.given(f'f.csv:{i}', label), f'f.csv:{i}') for i, label in enumerate(labels)]
    task = texts.with_classes(Task('classification', {'train': rows}, given), rows)
    return [row.label for row in task.splits['train']], task.labels, task.notes


def test_labels_are_meant_not_spelled():
    assert classes(['pos', 'pos ', ' neg', 'neg'])[:2] == (['pos', 'pos', 'neg', 'neg'], ('neg', 'pos'))
    assert (
        "2 labels are taken for others that differ in blanks or in .0 alone: ' neg', 'pos '"
        in classes(['pos', 'pos ', ' neg', 'neg'])[2][0]
    )
    assert classes(['1', '1.0', '2', 2.0, 1])[:2] == (['1', '1', '2', '2', '1'], ('1', '2'))
    assert classes(['1.0', '2.0'])[:2] == (['1.0', '2.0'], ('1.0', '2.0'))  # as they always were
    assert classes(['1', '1.0'], ('1', '1.0'))[0] == ['1', '1.0']             # who names both means both
    assert classes([*map(str, range(12)), '-3'])[1] == ('-3', *map(str, range(12)))
    assert classes(['10', '9', 'b'])[1] == ('10', '9', 'b') and not classes(['10', '9'])[2]


@pytest.mark.parametrize(
    'labels, given, words',
    [
        (['a', {'x': 1}], (), r'f.csv:1: the label \{"x": 1\} is neither a name'),
        (['a', [['b']]], (), 'f.csv:1: the label'),
        (['a', 'b', ['b']], (), 'f.csv:2: a list is the label of a multilabel task'),
        (['a', 'b'], ('a', 'b', 'a'), "task.labels: 'a' stands twice"),
        (['a', 'c'], ('a', 'b'), "f.csv:1: label 'c' is not in the label set"),
        (['a', 'b', ' '], (), 'f.csv:2: no label'),
        (['a', 'a'], (), '1 labels'),
    ],
)
def test_labels_that_mean_nothing_are_refused(labels, given, words):
    with pytest.raises(UserError, match=words):
        classes(labels, given)


@pytest.mark.parametrize('value', ['null', 'NaN'])
def test_a_missing_label_is_no_class(value, tmp_path):
    file = write(tmp_path / 'a.jsonl', f'{{"text": "a", "label": "x"}}\n{{"text": "b", "label": {value}}}\n')
    with pytest.raises(UserError, match='a.jsonl:2: no label'):
        texts.read(file, 'text', '', 'label')
    file = write(
        tmp_path / 'a.jsonl',
        ''.join(f'{{"context": "a", "choices": ["b", "c"], "label": {one}}}\n' for one in ('1.0', value)),
    )
    with pytest.raises(UserError, match='a.jsonl:2: no label'):
        choices.read(file, 'plain')


def sets(labels, given=()):
    rows = [texts.Row('t', None, label, f'f:{i}') for i, label in enumerate(labels)]
    task = texts.with_label_sets(Task('multilabel', {'train': rows}, given), rows)
    return [row.label for row in task.splits['train']], task.labels


def test_label_sets_are_meant_not_spelled():
    frame = pandas.DataFrame({'label': [['a', 'b c'], [], ['b c']]})
    written = list(csv.DictReader(io.StringIO(frame.to_csv())))  # pandas writes lists as text
    assert sets([row['label'] for row in written]) == ([('a', 'b c'), (), ('b c',)], ('a', 'b c'))
    assert sets([str(np.array(['a', 'b'])), str(np.array(['b']))]) == (
        [('a', 'b'), ('b',)],
        ('a', 'b'),
    )  # NumPy without commas
    assert sets([[0, 0, 1], [1, 0, 0], [0, 1, 1]], ('x', 'y', 'z')) == ([('z',), ('x',), ('y', 'z')], ('x', 'y', 'z'))
    assert sets([[2, 10], [2]]) == ([('10', '2'), ('2',)], ('2', '10'))
    for given in ((), ('x', 'y')):
        with pytest.raises(
            UserError, match=r'f:0: the labels are lists of 3 0s and 1s, one for each name; --config.task.labels'
        ):
            sets([[0, 0, 1], [1, 0, 0]], given)
    with pytest.raises(UserError, match='f:1: the label .* looks like a list, but is none'):
        sets(['a', "['a', ]]"])


def test_empty_texts_are_counted(tmp_path):
    file = write(tmp_path / 'a.csv', 'text,label\na,x\n,y\n" ",x\nb,y\n')
    task = tasks.read(
        'classification',
        {
            'train_file': file,
            'dev_file': file,
            'test_file': '',
            'text_column': 'text',
            'text_pair_column': '',
            'label_column': 'label',
            'labels': (),
            'dev_share': 0.1,
        },
    )
    assert task.notes == ('2 of 4 train, 2 of 4 dev texts are empty',)


TABLE = 'id,review\nn1,"a lovely film, with nice music"\nn2,"awful plot, ""dull"" scene\nand poor actor"\n'


def test_what_is_predicted_is_read_as_what_was_trained_on(tmp_path):
    """The header, ids and halves of quoted texts are no texts; columns are the run's, or else the usual ones."""
    settings = {'name': 'classification', 'text_column': 'review', 'text_pair_column': ''}
    want = ['a lovely film, with nice music', 'awful plot, "dull" scene\nand poor actor']
    for name, content in (('a.csv', TABLE), ('a.jsonl', ''.join(json.dumps({'review': text}) + '\n' for text in want)),
                          ('a.json', ''.join(json.dumps({'text': text}) + '\n' for text in want)),
                          ('a.txt', ''.join(json.dumps({'review': text, 'id': 1}) + '\n' for text in want))):
        rows, left_out = inputs.read(write(tmp_path / name, content), 'classification', settings)
        assert [row.text for row in rows] == want and not left_out and rows[0].where.startswith(str(tmp_path / name)), (
            name
        )
    with pytest.raises(UserError, match="no column 'review'; there are: id, body"):
        inputs.read(write(tmp_path / 'b.csv', 'id,body\n1,x\n'), 'classification', settings)


@pytest.mark.parametrize(
    'kind, settings, name, content, get, want',
    [
        (
            'classification',
            {'name': 'mrpc'},
            'a.tsv',
            'Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t1\t2\ta b\tc\n',
            lambda r: (r.text, r.pair),
            [('a b', 'c')],
        ),
        (
            'classification',
            {'name': 'cola'},
            'a.tsv',
            'index\tsentence\n0\ta b\n',
            lambda r: (r.text, r.pair),
            [('a b', None)],
        ),
        ('regression', {}, 'a.jsonl', '{"text": "a", "text_pair": "b"}\n', lambda r: (r.text, r.pair), [('a', 'b')]),
        (
            'tagging',
            {'word_column': 'Word'},
            'a.csv',
            'Sentence #,Word\n1,a\n,b\n2,c\n',
            lambda r: r.words,
            [('a', 'b'), ('c',)],
        ),
        ('tagging', {'word_column': ''}, 'a.tsv', 'a\tO\nb\tO\n\nc\tO\n', lambda r: r.words, [('a', 'b'), ('c',)]),
        ('tagging', {}, 'a.conll', 'a x\nb y\n', lambda r: r.words, [('a', 'b')]),
        ('tagging', {}, 'a.txt', 'a b\n\nc\n', lambda r: r.words, [('a', 'b'), ('',), ('c',)]),
        (
            'span',
            {'question_column': 'q'},
            'a.csv',
            'q,passage\nwho?,"he, she"\n',
            lambda r: (r.text, r.passage, r.id),
            [('who?', 'he, she', '')],
        ),
        (
            'span',
            {},
            'a.json',
            json.dumps({'data': [{'paragraphs': [{'context': 'c', 'qas': [{'id': 'i', 'question': 'q'}]}]}]}),
            lambda r: (r.text, r.passage, r.id),
            [('q', 'c', 'i')],
        ),
        (
            'choice',
            {'choice_columns': ('a', 'b'), 'format': 'plain'},
            'a.csv',
            'context,a,b\nx,y,z\n',
            lambda r: (r.context, r.choices),
            [('x', ('y', 'z'))],
        ),
        (
            'choice',
            {},
            'a.jsonl',
            '{"context": "x", "choices": ["y", "z"]}\n',
            lambda r: (r.context, r.choices),
            [('x', ('y', 'z'))],
        ),
        ('fill_mask', {}, 'a.txt', 'a [MASK]\n\nb\n\n\n', lambda r: r.text, ['a [MASK]', '', 'b']),
    ],
)
def test_every_kind_reads_its_own_files(kind, settings, name, content, get, want, tmp_path):
    rows, _ = inputs.read(write(tmp_path / name, content), kind, settings)
    assert [get(row) for row in rows] == want


def test_predictions_stay_in_their_rows(model, tmp_path, capsys, monkeypatch):  # noqa: F811
    """From the command line, standard input too: one line a row, in its order; a test file's texts beside them."""
    settings = make('classification', tmp_path)
    finetune.finetune(config('classification', model, settings, 'epochs=0.01'), str(tmp_path / 'w'))
    found = csv.DictReader((tmp_path / 'w/predictions_dev.tsv').read_text().splitlines(), delimiter='\t')
    assert [(row['where'], row['text']) for row in found] == [
        (f'{settings["dev_file"]}:{2 + i}', record['text']) for i, record in enumerate(records(settings['dev_file']))]

    def lines(*arguments):
        monkeypatch.setattr('sys.argv', ['predict', '--workdir', str(tmp_path / 'w'), '--json', *arguments])
        capsys.readouterr()
        predict.main()
        out, err = capsys.readouterr()
        return [json.loads(line)['text'] for line in out.splitlines()], err

    monkeypatch.setattr('sys.stdin', io.TextIOWrapper(io.BytesIO(b'{"text": "w1"}\n{"text": ""}\n{"text": "w2"}\n')))
    said, err = lines('--input', '-')
    assert said == ['w1', '', 'w2'] and '1 texts of standard input are empty' in err
    assert lines('--input', write(tmp_path / 'a.txt', 'w1\n\nw2 w3\n'))[0] == ['w1', '', 'w2 w3']
    assert lines('--input', write(tmp_path / 'a.csv', 'n,text\n1,"w1, w2"\n2,w3\n'))[0] == ['w1, w2', 'w3']
    done = call_module(
        'predict', '--workdir', tmp_path / 'w', '--input', write(tmp_path / 'b.csv', 'text\n"w1\nw2"\nw3\n')
    )
    assert [line.split('\t')[-1] for line in done.stdout.splitlines()] == ['w1 w2', 'w3']


@pytest.mark.parametrize('command', ['predict', 'features'])
def test_sizes_below_one_are_refused_before_a_model_is_loaded(command, tmp_path):
    arguments = ['--batch_size', '-1', *(['--init_from', 'no such', 'text'] if command == 'predict' else
                                         ['--from', 'no such', '--input', 'x', '--output', str(tmp_path / 'o')])]
    expect_error(call_module(command, *arguments), 'one or more is expected')


def test_features_are_of_one_model(tmp_path, monkeypatch):
    """Another model under the same name is refused; a full disk is an error like any other, also for HDF5."""
    for seed in (0, 1):
        peers.save(peers.model(seed=seed), tmp_path / f'hf{seed}')
    text = write(tmp_path / 'in.txt', 'w1 w2\nw3\n')
    arguments = ['--from', tmp_path / 'hf0', '--input', text, '--format', 'hdf5', '--output']
    assert call_module('features', *arguments, tmp_path / 'out').returncode == 0
    with h5py.File(tmp_path / 'out/part-00000.h5') as found:
        assert set(found) == {'0', '1'} and found['0/-1'].shape == (4, 48)
    (tmp_path / 'hf0').rename(tmp_path / 'old')
    (tmp_path / 'hf1').rename(tmp_path / 'hf0')
    expect_error(call_module('features', *arguments, tmp_path / 'out'), 'holds features of other settings (model)')

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(pathlib.Path, 'write_bytes', full)  # what the library writes itself would not come by here
    expect_error(call_module('features', *arguments, tmp_path / 'full'), 'no space left on the disk')
