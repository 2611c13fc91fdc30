"""Texts and labels as files really have them: each of these was read as something else, without a word."""

import ast
import csv
import io
import json
import os
import shutil
import threading

import numpy as np
import pandas
import peers
import pytest
from test_tables import classes, records, sets, write

from bert_jax import features, predict
from bert_jax.cli import UserError
from bert_jax.formats import pretrained
from bert_jax.tasks import choices, glue, inputs, labels, tables, tasks, texts
from bert_jax.tasks.task import Task

ZEROS = [[0, 0, 1], [1, 0, 0], [0, 1, 1]]


@pytest.mark.parametrize(
    'labels',
    [
        ZEROS,
        [[float(x) for x in row] for row in ZEROS],
        [[bool(x) for x in row] for row in ZEROS],
        [str(row) for row in ZEROS],
        [str(np.array(row)) for row in ZEROS],
        [str(np.array(row, float)) for row in ZEROS],
        [str(np.array(row, bool)) for row in ZEROS],
        [','.join(map(str, row)) for row in ZEROS],
        ['|'.join(map(str, row)) for row in ZEROS],
        [' '.join(map(str, row)) for row in ZEROS],
        [json.dumps([bool(x) for x in row]) for row in ZEROS],
    ],
)
def test_a_0_or_1_for_each_label_has_names_however_it_is_written(labels):
    want = [tuple(name for name, on in zip('xyz', row) if on) for row in ZEROS]
    assert sets(labels, ('x', 'y', 'z')) == (want, ('x', 'y', 'z'))
    for given in ((), ('x', 'y')):
        with pytest.raises(UserError, match='f:0: .* 0s and 1s, one for each name; --config.task.labels'):
            sets(labels, given)


def test_a_0_or_1_for_each_label_stands_in_every_row():
    for odd in ([0, 1], [0, 0, 2], [], [0, 0, 1, 1]):
        for given in ((), ('x', 'y', 'z')):
            with pytest.raises(UserError):
                sets([*ZEROS, odd], given)
    with pytest.raises(UserError, match='f:3: .*3 0s and 1s'):
        sets([*ZEROS, [0, 1]], ('x', 'y', 'z'))
    assert sets([[0], [1], [0, 1]]) == ([('0',), ('1',), ('0', '1')], ('0', '1'))  # names that are numbers


@pytest.mark.parametrize(
    'label',
    [
        [0.1, 0.9],
        '[0.1, 0.9]',
        '[0.1 0.9]',
        [3, 3, 0],
        ['a', None],
        ['a', float('nan')],
        "['a', nan]",
        "['a', None]",
        '[[1, 2]]',
        ['a', ['b']],
        ['a', {'b': 1}],
        '[a, ]',
    ],
)
def test_lists_that_name_no_labels_are_refused(label):
    with pytest.raises(UserError, match='f:1: '):
        rows = [texts.Row('t', None, labels.given(f'f:{i}', one), f'f:{i}')
                for i, one in enumerate((['a', 'b'], label))]
        texts.with_label_sets(Task('multilabel', {'train': rows}), rows)


def test_lists_that_pandas_wrote_as_text_come_back():
    """Lists, tuples, sets and arrays, quotes and commas within names."""
    names = ["it's", 'say "so"', 'a, b', 'c\\d', 'é']
    for made in (list, tuple, set, np.array):
        column = [made([name, 'x']) for name in names]
        written = [row['label'] for row in csv.DictReader(io.StringIO(pandas.DataFrame({'label': column}).to_csv()))]
        assert [set(found) for found in sets(written)[0]] == [{name, 'x'} for name in names], made
        if made is not np.array:
            assert all(set(ast.literal_eval(text)) == {name, 'x'} for text, name in zip(written, names))
    assert sets(['()', 'set()', '[]', '["a", "\\u00e9\\ud83d\\ude00"]', "('b',)", '[a, c d]'])[0] == [
        (),
        (),
        (),
        ('a', 'é\U0001f600'),
        ('b',),
        ('a', 'c d'),
    ]
    for label in (['a'], "['a', 'b']", "('a',)", "{'a'}", '["a"]'):
        with pytest.raises(UserError, match='f.csv:1: .*list'):
            classes(['a', label, 'b'])
    assert classes(['(a)', '[b]'])[1] == ('(a)', '[b]')  # names of classes


def test_a_name_like_a_missing_label_is_said():
    (note,) = classes(['a', 'nan', 'b'])[2]
    assert "'nan' is taken for the name of a label" in note and not classes(['a', 'nan'], ('a', 'nan'))[2]


def test_labels_of_many_rows_take_linear_time():
    """Each label is looked at a few times, whatever their number: compared 30 million times they would take minutes."""
    class Counted(str):
        compared = 0

        def __eq__(self, other):
            Counted.compared += 1
            return str.__eq__(self, other)

        __hash__ = str.__hash__

    rows = [texts.Row('t', None, Counted(f'label {i % 2000} '), f'f:{i}') for i in range(20_000)]
    task = texts.with_classes(Task('classification', {'train': rows, 'dev': rows}), rows)
    rows = [texts.Row('t', None, Counted(row.label), row.where) for row in task.splits['train']]
    assert texts.label_ids(task, rows).max() == 1999
    assert Counted.compared < 20 * len(rows)


@pytest.mark.parametrize('value', ['true', 'Infinity', '-Infinity', '0.5', '"1_0"', '"one"'])
def test_what_is_no_number_of_a_choice(value, tmp_path):
    file = write(tmp_path / 'a.jsonl', f'{{"context": "a", "choices": ["b", "c"], "label": {value}}}\n')
    with pytest.raises(UserError, match='a.jsonl:1: label .* is not a whole number'):
        choices.read(file, 'plain')


def test_nan_is_no_text(tmp_path):
    file = write(tmp_path / 'a.jsonl', '{"text": "a", "label": "x"}\n{"text": NaN, "label": "y"}\n')
    with pytest.raises(UserError, match='a.jsonl:2: text is NaN, which is no text'):
        texts.read(file, 'text', '', 'label')


def test_a_tagger_reads_the_columns_that_it_was_trained_on(tmp_path):
    """CoNLL-U has numbers in its first column."""
    file = write(tmp_path / 'a.conllu', '1\tAnna\tB-PER\n2\truns\tO\n')
    rows, _ = inputs.read(file, 'tagging', {'name': 'tagging', 'word_column': '1', 'tag_column': '2', 'scheme': 'iob2'})
    assert [row.words for row in rows] == [('Anna', 'runs')]
    shutil.copy(file, tmp_path / 'a.tsv')
    rows, _ = inputs.read(
        str(tmp_path / 'a.tsv'), 'tagging', {'name': 'tagging', 'word_column': '-2', 'tag_column': '2'}
    )
    assert [row.words for row in rows] == [('Anna', 'runs')]


def pairs_of(file, settings):
    rows, _ = inputs.read(file, 'classification', settings)
    return [(row.text, row.pair) for row in rows]


def test_pairs_are_read_where_the_model_was_trained_on_pairs(tmp_path, capsys):
    own = {'name': 'classification', 'text_column': 'text', 'text_pair_column': ''}
    file = write(tmp_path / 'a.csv', 'text,text_pair\na,b\n')
    assert pairs_of(file, own) == [('a', None)] and 'text_pair is not read' in capsys.readouterr().err
    for other in (own | {'text_column': 'body'}, {'name': 'cola'}):  # the file has predict's own columns, not the run's
        assert pairs_of(file, other) == [('a', 'b')] and 'text_pair is read too' in capsys.readouterr().err
    assert (
        pairs_of(file, own | {'text_pair_column': 'text_pair'})
        == pairs_of(file, {'name': 'rte'})
        == pairs_of(file, {})
        == [('a', 'b')]
    )
    mixed = write(
        tmp_path / 'a.jsonl', '{"text": "a"}\n{"text": "b", "text_pair": "c"}\n{"text": "d", "text_pair": null}\n'
    )
    assert pairs_of(mixed, {}) == [('a', None), ('b', 'c'), ('d', None)]  # no task says
    with pytest.raises(UserError, match="a.csv.*no column 'sentence2'"):
        pairs_of(write(tmp_path / 'a.csv', 'sentence1\na\n'), {'name': 'rte'})


def test_lines_of_another_number_of_parts_are_said(tmp_path, capsys):
    file = write(tmp_path / 'a.txt', '17\tan id before it\nfine\n')
    for settings, said in (
        ({'name': 'sst2'}, '1 lines have a tab, the first at'),
        ({'name': 'rte'}, '1 lines have no tab, the first at'),
        ({}, ''),
    ):
        pairs_of(file, settings)
        err = capsys.readouterr().err
        assert said in err and bool(err) == bool(said)


@pytest.fixture
def piped(monkeypatch):
    def as_stdin(content):
        monkeypatch.setattr(
            'sys.stdin', io.TextIOWrapper(io.BytesIO(content), encoding='ascii', errors='surrogateescape')
        )

    return as_stdin


def test_standard_input_is_read_as_files_are(piped, tmp_path):
    """UTF-8 whatever the locale says, a byte-order mark, a lone carriage return; the line of what is not UTF-8."""
    content = '\ufeffé one\rstill one\r\ntwo\n'.encode()
    piped(content)
    want = [('é one\rstill one', None), ('two', None)]
    assert pairs_of('-', {}) == want == pairs_of(write(tmp_path / 'a.txt', content), {})
    piped(b'{"text":\r "a"}\n{"text": "b"}\n')
    assert pairs_of('-', {}) == [('a', None), ('b', None)]
    piped(b'fine\nb\xff\n')
    with pytest.raises(UserError, match='standard input:2: not valid UTF-8'):
        pairs_of('-', {})


def test_a_pipe_is_read_whole(tmp_path):
    """--input <(command), which can be read once."""
    want = [(f'text {i}', None) for i in range(5000)]
    for name, content in (
        ('a', ''.join(f'{text}\n' for text, _ in want)),
        ('b', ''.join(json.dumps({'text': text}) + '\n' for text, _ in want)),
    ):
        pipe = tmp_path / name
        os.mkfifo(pipe)
        writer = threading.Thread(target=pipe.write_text, args=(content,), daemon=True)
        writer.start()
        found = []
        reader = threading.Thread(target=lambda: found.extend(pairs_of(str(pipe), {})), daemon=True)  # noqa: B023
        reader.start()
        reader.join(10)
        assert found == want


@pytest.mark.parametrize(
    'content',
    [
        '[{"text": "a"}]\n',
        '[\n  {"text": "a"},\n  {"text": "b"}\n]\n',
        '{\n  "text": "a"\n}\n',
        '{"text": "a\n',
        '{"a":' * 100_000 + '\n',
    ],
)
def test_json_that_is_no_json_lines_is_refused(content, piped, tmp_path):
    piped(content.encode())
    for file in ('-', write(tmp_path / 'a.txt', content), write(tmp_path / 'a.json', content)):
        with pytest.raises(UserError):
            pairs_of(file, {})
    assert pairs_of(write(tmp_path / 'a.txt', '[MASK] is {this}\n{that}\n'), {}) == [
        ('[MASK] is {this}', None),
        ('{that}', None),
    ]


@pytest.mark.parametrize('line', ['{"a":' * 100_000, '{"text": "a", "n": ' + '1' * 5000 + '}'])
def test_json_that_python_does_not_read_is_an_error_with_its_line(line, tmp_path):
    with pytest.raises(UserError, match='a.jsonl:2: not JSON'):
        records(write(tmp_path / 'a.jsonl', f'{{"text": "a"}}\n{line}\n'))


@pytest.mark.parametrize(
    'name, content',
    [('a.txt', b'one\rtwo\rthree\r'), ('a.tsv', b'a\tb\rc\td\re\tf\r'), ('a.conll', b'a O\rb B-X\rc O\r')],
)
def test_lines_that_end_as_on_old_macs_are_refused(name, content, tmp_path):
    with pytest.raises(UserError, match='carriage returns'):
        inputs.read(write(tmp_path / name, content), 'tagging' if name == 'a.conll' else 'classification', {})
    file = write(tmp_path / 'a.csv', b'text,label\ra,x\r"b\nc",y\r')
    assert records(file) == pandas.read_csv(file).to_dict('records')


def test_a_row_of_empty_fields_is_a_row(tmp_path):
    (tmp_path / 'a.tsv').write_text('sentence1\tsentence2\na\tb\n\t\nc\td\n')
    rows = list(glue._from_file(str(tmp_path / 'a.tsv'), glue.LAYOUTS['rte'], 'test', []))
    assert [(row.text, row.pair) for row in rows] == [('a', 'b'), ('', ''), ('c', 'd')]
    assert [where.rpartition(':')[2] for where, _ in tables.read_rows(str(tmp_path / 'a.tsv'))] == ['1', '2', '3', '4']


ODD = ['a\tb', 'a\rb', 'a\nb', 'a "b"', '"', ' a ', 'é']


def test_files_of_predictions_are_read_back_by_pandas():
    """Tabs, quotes and line ends of any kind within texts; newline='' as Python's csv wants it."""
    rows = [texts.Row(text, text, 'x', f'f:{i}') for i, text in enumerate(ODD)]
    found = [{'label': 'x', 'scores': {'x': 1.0, 'y': 0.0}}] * len(rows)
    (content,) = texts.files(Task('classification', {}, ('x', 'y')), 'dev', rows, found).values()
    frame = pandas.read_csv(io.BytesIO(content.encode()), sep='\t')
    assert list(frame['text']) == list(frame['text_pair']) == ODD and list(frame['where']) == [
        row.where for row in rows
    ]
    questions = [choices.Question(text, (text, 'b'), 0, f'f:{i}') for i, text in enumerate(ODD)]
    found = [{'choice': 0, 'text': row.choices[0], 'scores': [0.5, 0.5]} for row in questions]
    (content,) = choices.files(Task('choice', {}), 'dev', questions, found).values()
    frame = pandas.read_csv(io.BytesIO(content.encode()), sep='\t')
    assert list(frame['context']) == list(frame['text']) == ODD


@pytest.mark.parametrize(
    'found',
    [
        {'text': 'two\nlines\r\nand\ta tab', 'label': 'a', 'scores': {'a': 1.0}},
        {'text': 'a\nb', 'text_pair': 'c\nd', 'labels': []},
        {'text': 'a\nb', 'value': 1.0},
        {'context': 'a\nb', 'choices': ['c\nd'], 'choice': 0, 'text': 'c\nd', 'scores': [1.0]},
        {'question': 'a\nb', 'text': 'c\nd', 'begin': 0, 'end': 3},
        {'words': ['a\nb'], 'tags': ['O']},
    ],
)
def test_a_prediction_is_printed_in_one_line(found):
    assert len(predict._plain(found).splitlines()) == 1


@pytest.mark.parametrize('name', ['span', 'choice', 'tagging', 'sst2'])
def test_empty_texts_are_counted_for_every_task(name, tmp_path):
    if name == 'span':
        file = write(tmp_path / 'a.csv', 'question,passage,answer\n,b c,c\nq,b c,c\n')
        read = (
            tasks.TASKS[name],
            {'null_answers': False, 'stride': 8, 'max_query_length': 8, 'max_answer_length': 8, 'n_best': 1},
        )
    elif name == 'choice':
        file = write(
            tmp_path / 'a.jsonl',
            '{"context": " ", "choices": ["a", "b"], "label": 0}\n'
            '{"context": "a", "choices": ["a", "b"], "label": 1}\n',
        )
        read = tasks.TASKS[name], {'format': 'plain'}
    elif name == 'tagging':
        file = write(
            tmp_path / 'a.jsonl',
            '{"words": ["", ""], "tags": ["O", "O"]}\n{"words": ["a", "b"], "tags": ["B-X", "O"]}\n',
        )
        read = (
            tasks.TASKS[name],
            {
                'word_column': '',
                'tag_column': '',
                'sentence_column': '',
                'scheme': 'iob2',
                'labels': (),
                'document_context': False,
                'features': '',
                'lstm_size': 1,
            },
        )
    else:
        for split in ('train', 'dev'):
            write(tmp_path / f'{split}.tsv', 'sentence\tlabel\n\t1\nb\t0\n')
        assert tasks.read(name, {'folder': str(tmp_path)}).notes == ('1 of 2 train, 1 of 2 dev texts are empty',)
        return
    settings = read[1] | {'train_file': file, 'dev_file': file, 'test_file': '', 'dev_share': 0.1}
    assert '1 of 2 train, 1 of 2 dev texts are empty' in tasks.read(name, settings).notes


def test_features_belong_to_one_tokenizer(tmp_path):
    """The same words with other numbers, under the same name."""
    folder = peers.save(peers.model(), tmp_path / 'hf')
    before = features._identity(pretrained.load(folder))
    assert before == features._identity(pretrained.load(folder))
    pieces = (folder / 'vocab.txt').read_text().split()
    (folder / 'vocab.txt').write_text('\n'.join([*pieces[:5], *reversed(pieces[5:])]) + '\n')
    assert before != features._identity(pretrained.load(folder))
