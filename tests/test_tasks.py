"""Every fine-tuning task, from files as users have them to predictions."""

import csv
import dataclasses
import itertools
import json
import zipfile

import jax
import numpy as np
import peers
import pytest
from conftest import LONG, RNG, call_module, expect_error
from hypothesis import given, settings
from hypothesis import strategies as st

import bert_jax
from bert_jax import checkpoint, cli, finetune, predict, sweep
from bert_jax.cli import UserError
from bert_jax.data import tokenizer
from bert_jax.tasks import choices, glue, scores, spans, tag_schemes, tags, tasks, texts, tokenized
from bert_jax.tasks.task import Task


def word(kind, i):
    """Words that give their label away: w1-w9, w11-w19, ..."""
    return f'w{10 * kind + 1 + i % 9}'


def text(kind, length=4):
    return ' '.join(word(kind, int(i)) for i in RNG.integers(0, 9, length))


def table(path, header, rows):
    with path.open('w', newline='') as file:
        writer = csv.writer(file, delimiter=',' if path.suffix == '.csv' else '\t')
        writer.writerows([header, *rows])
    return path


def json_lines(path, records):
    path.write_text(''.join(json.dumps(record) + '\n' for record in records))
    return path


def make(name, folder, count=16):
    """Generated data for any of TASKS, a train and a dev file of the same rows: the settings that read them."""
    both = lambda path: {'train_file': str(path), 'dev_file': str(path)}  # noqa: E731
    if name == 'classification':
        return both(table(folder / 'c.csv', ('text', 'label'), [(text(i % 3), 'abc'[i % 3]) for i in range(count)]))
    if name == 'multilabel':
        return both(
            table(
                folder / 'm.tsv',
                ('text', 'label'),
                [(f'{text(i % 2)} {text(2 + i // 2 % 2)}', f'{"ab"[i % 2]}|{"cd"[i // 2 % 2]}') for i in range(count)],
            )
        )
    if name == 'regression':
        return both(
            table(
                folder / 'r.csv',
                ('text', 'label'),
                [(f'{word(i % 4, 0)} {word(i % 4, 1)}', i % 4 / 2) for i in range(count)],
            )
        )
    if name in ('tagging', 'conll2003'):
        lines = ['-DOCSTART- -X- O O', '']
        for i in range(count):
            lines += [f'{word(0, i)} N O', f'{word(1, i)} N B-PER', f'{word(2, i)} N I-PER', f'{word(3, i)} V O', '']
        if name == 'tagging':
            (folder / 't.conll').write_text('\n'.join(lines))
            return both(folder / 't.conll')
        for part in ('train', 'testa', 'testb'):
            (folder / f'eng.{part}').write_text('\n'.join(lines).replace('B-PER', 'I-PER'))
        return {'folder': str(folder)}
    if name == 'span':
        records = [
            {
                'question': text(0, 2),
                'passage': f'{text(1)} {word(2, i)} {word(3, i)} {text(4)}',
                'answer': f'{word(2, i)} {word(3, i)}',
            }
            for i in range(count)
        ]
        return both(json_lines(folder / 's.jsonl', records))
    if name == 'choice':
        records = [
            {
                'context': text(0),
                'choices': [text(2) if j == i % 3 else text(1) for j in range(3 + i % 2)],
                'label': i % 3,
            }
            for i in range(count)
        ]
        return both(json_lines(folder / 'q.jsonl', records))
    layout = glue.LAYOUTS[name]
    label = lambda i: layout.labels[i % len(layout.labels)] if layout.labels else f'{i % 4}.000'  # noqa: E731
    for split, file in layout.files.items():
        test = split.startswith('test')
        names = [c for c in (layout.text, layout.pair, '' if test else layout.label) if c]
        cells = lambda i: {  # noqa: E731
            layout.text: text(i % (len(layout.labels) or 4)), layout.pair: text(4), layout.label: label(i)}
        if name == 'cola' and not test:
            rows = [f'gj04\t{cells(i)["1"]}\t\t{cells(i)["3"]}' for i in range(count)]
        else:
            if name == 'cola':
                names = ['sentence']
            rows = ['\t'.join(['index', *names])] + [
                '\t'.join([str(i), *(cells(i).get(c, text(0)) for c in names)]) for i in range(count)
            ]
        mark = '\ufeff' if name == 'mrpc' else ''
        (folder / file).write_text(mark + '\n'.join(rows) + '\n')
    return {'folder': str(folder)}


SCORE = {
    'classification': ('dev/accuracy', 1),
    'multilabel': ('dev/accuracy', 1),
    'regression': ('dev/spearman', 0.97),
    'tagging': ('dev/f1', 1),
    'span': ('dev/exact', 100),
    'choice': ('dev/accuracy', 1),
}


@pytest.fixture(scope='session')
def model(tmp_path_factory):
    """A small BERT with random weights that knows the words w0 to w61."""
    return peers.save(
        peers.model(hidden_size=64, num_attention_heads=2, intermediate_size=128, max_position_embeddings=64),
        tmp_path_factory.mktemp('model') / 'hf',
    )


def config(name, model, settings, *overrides):
    c = cli.load_config(
        f'configs/finetune.py:{name}',
        [
            f'--config.init_from={model}',
            '--config.max_length=32',
            '--config.num_lengths=1',
            '--config.batch_size=8',
            '--config.dropout_rate=0.0',
            '--config.schedule.peak=2e-3',
            '--config.log_every=20',
            *(f'--config.{o}' for o in overrides),
        ],
    )
    with c.unlocked():
        c.task.update(settings)
    return c


@pytest.fixture
def often(monkeypatch):
    """The training examples ten times an epoch: as many steps with fewer evaluations and checkpoints between."""
    def ten_times(read):
        def wrapped(**settings):
            task = read(**settings)
            return dataclasses.replace(task, splits=task.splits | {'train': task.splits['train'] * 10})
        return wrapped

    for name, read in tasks.TASKS.items():
        monkeypatch.setitem(tasks.TASKS, name, ten_times(read))


@pytest.mark.parametrize('name', sorted(set(tasks.TASKS) - set(glue.LAYOUTS) - {'conll2003'}))
def test_sixteen_examples_are_learned_by_heart_and_predicted_again(name, model, often, tmp_path):
    """One of each kind: training, scores, files, and predict give the same."""
    c = config(name, model, make(name, tmp_path), 'epochs=4.0')
    results = finetune.finetune(c, str(tmp_path / 'work'))
    score, value = SCORE[name]
    assert results[score] >= value, results
    answer = bert_jax.load(str(tmp_path / 'work'))
    task = tasks.TASKS[name](**{k: v for k, v in c.task.items() if k != 'name'})
    rows = task.splits['dev']
    given_to_predict = {'tagging': lambda r: {'words': list(r.words)}, 'span': lambda r: (r.text, r.passage),
                        'choice': lambda r: (r.context, *r.choices)}.get(name, lambda r: r.text)
    found = answer([given_to_predict(row) for row in rows])
    if name == 'classification':
        assert [f['label'] for f in found] == [r.label for r in rows]
        assert (tmp_path / 'work' / 'confusion.png').stat().st_size > 5000
    if name == 'multilabel':
        assert [tuple(f['labels']) for f in found] == [r.label for r in rows]
    if name == 'regression':
        assert (
            scores.regression(np.array([f['value'] for f in found]), np.array([r.label for r in rows]))['spearman']
            >= value
        )
    if name == 'tagging':
        assert [tuple(f['tags']) for f in found] == [r.tags for r in rows]
        entity = found[3]['entities'][0]
        assert (entity['type'], entity['begin'], entity['end']) == ('PER', 1, 3) and entity['text'] == ' '.join(
            rows[3].words[1:3]
        )
        assert (tmp_path / 'work' / 'predictions_dev.conll').read_text().splitlines()[1].split() == [
            rows[0].words[1],
            'B-PER',
            'B-PER',
        ]
    if name == 'span':
        assert [f['text'] for f in found] == [r.answers[0][0] for r in rows]
        assert all(r.passage[f['begin']:f['end']] == f['text'] for r, f in zip(rows, found))
        assert list(json.loads((tmp_path / 'work' / 'predictions.json').read_text()).values()) == [
            f['text'] for f in found
        ]
    if name == 'choice':
        assert [f['choice'] for f in found] == [r.label for r in rows] and {len(f['scores']) for f in found} == {3, 4}
        assert all(
            sum(f['scores']) == pytest.approx(1, abs=1e-4) for f in found
        )  # rows that fill a question take nothing


@pytest.mark.parametrize('name', [*glue.LAYOUTS, 'conll2003'])
def test_the_contract_of_every_task(name, tmp_path, model):
    settings = make(name, tmp_path, count=12)
    c = config(name, model, settings)
    task = tasks.TASKS[c.task.name](**{k: v for k, v in c.task.items() if k != 'name'})
    kind, tok = tasks.KINDS[task.kind], tokenizer.load(model)
    assert {'train', 'dev'} <= task.splits.keys() and len(task.splits['train']) == 12
    for split, rows in task.splits.items():
        data = kind.module.encode(task, rows, tok, 32, (16, 32))
        assert len(data) == len(rows)
        numbers = np.concatenate([n for n, _ in data.evaluation_batches(5)])
        assert sorted(numbers) == list(range(len(rows)))
        if task.kind == 'tagging':
            outputs = {'logits': [RNG.normal(size=(int(n), len(task.labels))) for n in data.longest]}
        else:
            outputs = {
                'logits': RNG.normal(size=len(rows))
                if task.kind == 'regression'
                else RNG.normal(size=(len(rows), len(task.labels)))
            }
        found = kind.module.decode(task, rows, data, outputs)
        assert len(found) == len(rows) and kind.module.files(task, split, rows, found)
        if kind.module.labelled(rows):
            assert task.best in kind.module.score(task, rows, outputs, found)
        if split in task.submission:
            file, content = glue.submission(task, split, found)
            lines = [line.split('\t') for line in content.splitlines()]
            assert lines[0] == ['index', 'prediction'] and [index for index, _ in lines[1:]] == [
                str(i) for i in range(len(rows))
            ]
            assert file == SUBMITTED[name][split] and {said for _, said in lines[1:]} <= (
                {*SAID.get(name, '01')} if name != 'stsb' else {f'{number / 1000:.3f}' for number in range(5001)}
            )


SUBMITTED = {
    name: {'test': f'{file}.tsv'}
    for name, file in {
        'cola': 'CoLA',
        'sst2': 'SST-2',
        'mrpc': 'MRPC',
        'stsb': 'STS-B',
        'qqp': 'QQP',
        'qnli': 'QNLI',
        'rte': 'RTE',
        'wnli': 'WNLI',
    }.items()
} | {
    'mnli': {'test': 'MNLI-m.tsv', 'test_mismatched': 'MNLI-mm.tsv', 'test_diagnostic': 'AX.tsv'}
}  # what GLUE's server takes
SAID = {
    'mnli': ('entailment', 'neutral', 'contradiction'),
    **dict.fromkeys(('qnli', 'rte'), ('entailment', 'not_entailment')),
}


def published(name, folder, count=16):
    """The same in the published format of a task that is read as span or choice."""
    if name == 'swag':
        rows = [
            (str(i), text(0), 'w1', *(text(2) if j == i % 4 else text(1) for j in range(4)), i % 4)
            for i in range(count)
        ]
        return table(folder / 'swag.csv', ('', 'sent1', 'sent2', *(f'ending{j}' for j in range(4)), 'label'), rows)
    if name == 'commonsenseqa':
        return json_lines(
            folder / 'qa.jsonl',
            [
                {
                    'answerKey': 'ABCDE'[i % 5],
                    'question': {
                        'stem': text(0),
                        'choices': [
                            {'label': letter, 'text': text(2) if 'ABCDE'[i % 5] == letter else text(1)}
                            for letter in 'ABCDE'
                        ],
                    },
                }
                for i in range(count)
            ],
        )
    passages = [f'{text(1)} {word(2, i)} {word(3, i)} {text(4)}' for i in range(count)]
    answers = [f'{word(2, i)} {word(3, i)}' for i in range(count)]
    without = [name == 'squad2' and i % 3 == 0 for i in range(count)]
    qas = [{'id': f'q{i}', 'question': text(5 if none else 0, 2), 'is_impossible': none,
            'answers': [] if none else [{'text': answer, 'answer_start': passage.index(answer)}]}
           for i, (passage, answer, none) in enumerate(zip(passages, answers, without))]
    (folder / 'squad.json').write_text(json.dumps({'data': [{'title': 't', 'paragraphs': [
        {'context': passage, 'qas': [qa]} for passage, qa in zip(passages, qas)]}]}))
    return folder / 'squad.json'


@pytest.mark.parametrize(
    'name, score, value',
    [
        pytest.param('squad1', 'dev/exact', 100, marks=LONG),
        ('squad2', 'dev/exact', 100),
        pytest.param('swag', 'dev/accuracy', 1, marks=LONG),
        pytest.param('commonsenseqa', 'dev/accuracy', 1, marks=LONG),
    ],
)
def test_published_formats_from_end_to_end(name, score, value, model, often, tmp_path):
    file = str(published(name, tmp_path))
    c = config(name, model, {'train_file': file, 'dev_file': file, 'test_file': file}, 'epochs=4.0')
    results = finetune.finetune(c, str(tmp_path / 'work'))
    assert results[score] == value == results[score.replace('dev', 'test')], results
    if name == 'squad2':
        odds, said = (
            json.loads((tmp_path / 'work' / f'{kind}.json').read_text()) for kind in ('null_odds', 'predictions')
        )
        none = {f'q{i}' for i in range(0, 16, 3)}
        assert (
            {key for key, answer in said.items() if not answer}
            == none
            == {key for key, odd in odds.items() if odd > results['dev/null_threshold']}
        )
        rows = spans.read(file)
        assert [
            found['text'] for found in bert_jax.load(str(tmp_path / 'work'))([(row.text, row.passage) for row in rows])
        ] == list(said.values())


def test_one_tasks_weights_under_anothers_head(model, tmp_path):
    """MNLI before RTE: the encoder is MNLI's best one, the head a fresh one of two classes."""
    (tmp_path / 'mnli').mkdir()
    (tmp_path / 'rte').mkdir()
    finetune.finetune(config('mnli', model, make('mnli', tmp_path / 'mnli'), 'epochs=2.0'), str(tmp_path / 'first'))
    c = config('rte', tmp_path / 'first', make('rte', tmp_path / 'rte'), 'epochs=1.0')
    job = finetune.Job(c, finetune.read_task(c))
    tuned, _, _ = checkpoint.load_params(tmp_path / 'first', best='dev/accuracy')
    start = finetune._initial(job, c).params
    for part in ('embeddings', 'encoder', 'pooler'):
        jax.tree.map(np.testing.assert_array_equal, start[part], tuned[part])
    heads = [params['targets_classification']['dense']['kernel'].shape[-1] for params in (tuned, start)]
    assert heads == [3, 2]
    assert 'dev/accuracy' in finetune.train_task(job, c, str(tmp_path / 'second'))


def test_every_task_has_a_config_and_mnli_two_dev_sets(tmp_path, model):
    for name in tasks.TASKS:
        cli.load_config(f'configs/finetune.py:{name}', [])
    task = tasks.TASKS['mnli'](**make('mnli', tmp_path))
    assert set(task.splits) == {'train', 'dev', 'dev_mismatched', 'test', 'test_mismatched', 'test_diagnostic'}


def test_glues_odd_files(tmp_path):
    """Quotes that are not quotes, a byte-order mark, CoLA without a header, QQP's broken rows."""
    make('mrpc', tmp_path)
    (tmp_path / 'train.tsv').write_text(
        '\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t1\t2\tHe said "a\tHe said\n0\t3\t4\tx\ty\n'
    )
    assert glue.read('mrpc', str(tmp_path)).splits['train'][0] == texts.Row(
        'He said "a', 'He said', '1', f'{tmp_path}/train.tsv:2'
    )
    (tmp_path / 'train.tsv').write_text('gj04\t1\t\tFine.\ngj04\t0\t*\tNot fine "this.\n')
    (tmp_path / 'dev.tsv').write_text('gj04\t1\t\tFine.\n')
    (tmp_path / 'test.tsv').write_text('index\tsentence\n0\tWho knows?\n')
    cola = glue.read('cola', str(tmp_path))
    assert [(r.text, r.label) for r in cola.splits['train']] == [('Fine.', '1'), ('Not fine "this.', '0')]
    assert cola.splits['test'][0].text == 'Who knows?' and cola.splits['test'][0].label is None
    header = 'id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n'
    (tmp_path / 'train.tsv').write_text(header + '0\t1\t2\ta\tb\t1\n1\t1\t2\tbroken\n2\t1\t2\tc\td\t0\n')
    (tmp_path / 'dev.tsv').write_text(header + '0\t1\t2\ta\tb\t1\n')
    (tmp_path / 'test.tsv').unlink()
    qqp = glue.read('qqp', str(tmp_path))
    assert (
        'test' not in qqp.splits
        and len(qqp.splits['train']) == 2
        and '1 rows' in qqp.notes[0]
        and 'train.tsv:3' in qqp.notes[0]
    )
    (tmp_path / 'dev.tsv').write_text(header)
    with pytest.raises(UserError, match='dev.tsv: no rows'):
        glue.read('qqp', str(tmp_path))


def test_glue_from_tfds_mock():
    import tensorflow_datasets as tfds

    with tfds.testing.mock_data(num_examples=4):
        for name, layout in glue.LAYOUTS.items():
            task = glue.read(name, f'tfds:glue/{name}')
            assert set(task.splits) == set(layout.files)
            for split, rows in task.splits.items():
                assert len(rows) == 4 and all((row.pair is None) == (layout.pair == '') and row.text for row in rows)
                assert {row.label for row in rows} == {None} if split.startswith('test') else all(
                    row.label in layout.labels if layout.labels else isinstance(row.label, float) for row in rows)
    with pytest.raises(UserError, match='no_such'):
        glue.read('sst2', 'tfds:glue/no_such')


def test_mnli_from_tfds_brings_the_diagnostic_set_if_it_can(monkeypatch):
    asked = []

    def records(name, split):
        asked.append((name, split))
        if name == 'glue/ax' and len(asked) < 7:
            raise UserError('tfds:glue/ax, test: no network')
        yield (
            {'premise': b'p', 'hypothesis': b'h', 'idx': np.int32(0), 'label': np.int64(0)},
            ['entailment', 'neutral', 'contradiction'],
        )

    monkeypatch.setattr(glue.corpora, 'tfds_records', records)
    task = glue.read('mnli', 'tfds:glue/mnli')
    assert 'test_diagnostic' not in task.splits and 'no network' in task.notes[0]
    task = glue.read('mnli', 'tfds:glue/mnli')
    assert task.splits['test_diagnostic'][0].label is None and not task.notes
    assert asked[6:] == [('glue/mnli', 'train'), *(('glue/mnli', f'{part}_{which}') for part in ('validation', 'test')
                                                   for which in ('matched', 'mismatched')), ('glue/ax', 'test')]


def test_glue_from_tfds_comes_in_glues_order_under_glues_names(monkeypatch):
    records = [
        {'premise': b'p%d' % i, 'hypothesis': b'h', 'idx': np.int32(i), 'label': np.int64(i % 3)} for i in (2, 0, 1)
    ]
    monkeypatch.setattr(
        glue.corpora,
        'tfds_records',
        lambda name, split: [(r, ['entailment', 'neutral', 'contradiction']) for r in records],
    )
    rows = glue.read('mnli', 'tfds:glue/mnli').splits['dev_mismatched']
    assert [(row.text, row.label) for row in rows] == [('p0', 'entailment'), ('p1', 'neutral'), ('p2', 'contradiction')]


@pytest.mark.parametrize(
    'scheme, given_tags',
    [
        ('iob1', 'O I-PER I-PER B-PER I-LOC O I-LOC'),
        ('iob2', 'O B-PER I-PER B-PER B-LOC O B-LOC'),
        ('iobes', 'O B-PER E-PER S-PER S-LOC O S-LOC'),
    ],
)
def test_every_scheme_becomes_iob2(scheme, given_tags, tmp_path):
    (tmp_path / 'a').write_text('\n'.join(f'w{i}\t{tag}' for i, tag in enumerate(given_tags.split())) + '\n\nx O\n')
    sentences = tags.read(str(tmp_path / 'a'), '', '', scheme, labelled=True)
    assert sentences[0].tags == ('O', 'B-PER', 'I-PER', 'B-PER', 'B-LOC', 'O', 'B-LOC') and len(sentences) == 2
    entities = tag_schemes.entities(sentences[0].words, sentences[0].tags)
    assert [(e['type'], e['begin'], e['end']) for e in entities] == [
        ('PER', 1, 3),
        ('PER', 3, 4),
        ('LOC', 4, 5),
        ('LOC', 6, 7),
    ]


def test_no_word_is_ever_dropped_or_tagged_twice(model):
    """Sentences longer than the window, words of many pieces, with and without the document around."""
    tok = tokenizer.load(model)
    rows = [
        tags.Sentence(
            tuple(f'{word(i % 4, j)}' if j % 5 else 'w1-w2-w3' for j in range(n)),
            tuple('O' if j % 3 else 'B-X' for j in range(n)),
            d,
            '',
        )
        for i, (n, d) in enumerate([(3, 0), (90, 0), (1, 1), (14, 1), (40, 1), (2, 2)])
    ]
    sizes = {}
    for context in (False, True):
        task = Task('tagging', {}, ('O', 'B-X', 'I-X'), settings={'document_context': context})
        data = tags.encode(task, rows, tok, 20, (20,))
        assert data.longest.max() <= 20
        which = data.token_labels['words']
        assert sorted(which[which >= 0]) == list(range(sum(len(r.words) for r in rows)))
        assert ((data.token_labels['label_ids'] >= 0) == (which >= 0)).all()
        truth = [
            np.eye(3)[np.maximum(data.token_labels['label_ids'][a:b], 0)] for a, b in zip(data.starts, data.starts[1:])
        ]
        found = tags.decode(task, rows, data, {'logits': truth})
        assert [tuple(f['tags']) for f in found] == [r.tags for r in rows]
        sizes[context] = np.diff(data.starts)[data.owners == 2]
    assert sizes[False] == 7 and sizes[True] > 14  # a sentence of one word, filled up by its document


@settings(max_examples=200, deadline=None)
@given(length=st.integers(1, 80), size=st.integers(1, 30), stride=st.integers(1, 30))
def test_windows_cover_and_each_token_is_best_once(length, size, stride):
    made = list(spans.windows(length, size, stride))
    assert made[-1][1] == length and all(e - b <= size for b, e in made)
    best = np.zeros(length, int)
    for begin, end in made:
        best[begin:end] += spans.best_context(made, begin, end)
    assert (best == 1).all()


def question(passage, *answers, id='q'):
    return spans.Question(id, 'w1 w2?', passage, answers, True, 'here')


SETTINGS = {
    'null_answers': False,
    'stride': 5,
    'max_query_length': 8,
    'max_answer_length': 6,
    'n_best': 20,
    'null_threshold': None,
}


@pytest.mark.parametrize(
    'passage, answer',
    [
        ('w1 w2 w3', 'w3'),
        ('a “w5”, w6', 'w5'),
        ('w1 w2  w3\nw4', 'w2  w3'),
        ('x y 5', '5'),
        ('é w1 한국 w2', '한국'),
        ('👩🏽‍🚀 w9.', 'w9'),
        ('cafe\u0301 w1', 'cafe\u0301'),
    ],
)
def test_an_answer_is_cut_from_the_passage_as_it_stands(model, passage, answer):
    tok = tokenizer.load(model)
    _, offsets = tok.encode_with_offsets(passage)
    row = question(passage, (answer, passage.index(answer)))
    first, last = spans.token_span(row, spans.Bounds(offsets))
    assert passage[offsets[first][0]:offsets[last][1]] == answer


def test_an_answer_that_cuts_a_word_moves_to_the_nearest_whole_one(model):
    tok = tokenizer.load(model)
    passage = 'w11 w22 w1 w3 w1'
    _, offsets = tok.encode_with_offsets(passage)
    first, last = spans.token_span(question(passage, ('w1', 0)), spans.Bounds(offsets))
    assert (first, last) == (2, 2)
    assert spans.token_span(question(passage, ('w', 0), ('w3', 11)), spans.Bounds(offsets)) == (
        3,
        3,
    )  # another of its answers is whole
    far = question('w11 w2 w3 w4 w5 w6 w1', ('w1', 0), ('w11', 0))
    assert spans.token_span(far, spans.Bounds(tok.encode_with_offsets(far.passage)[1])) == (
        0,
        0,
    )  # there, before the first's text far away
    assert spans.token_span(question(passage, ('11 w22', 1)), spans.Bounds(offsets)) == (
        0,
        1,
    )  # none is: what it touches


def test_the_best_span_over_windows_equals_brute_force(model):
    tok = tokenizer.load(model)
    task = Task('span', {}, settings=SETTINGS)
    rows = [
        question(' '.join(word(int(k), j) for j, k in enumerate(RNG.integers(0, 6, n))), id=str(n)) for n in (3, 17, 40)
    ]
    data = spans.encode(task, rows, tok, 20, (20,))
    outputs = {
        name: [RNG.normal(size=n).astype(np.float32) for n in data.longest] for name in ('start_logits', 'end_logits')
    }
    found = spans.decode(task, rows, data, outputs)
    for number, (row, answer) in enumerate(zip(rows, found)):
        best = (-np.inf, 0, 0)
        for w in np.flatnonzero(data.owners == number):
            part = slice(data.starts[w], data.starts[w + 1])
            begins, ends, widest = (
                data.token_labels[k][part] for k in ('offset_begins', 'offset_ends', 'best_context')
            )
            for s in range(len(begins)):
                for e in range(s, min(s + 6, len(begins))):
                    if begins[s] >= 0 and begins[e] >= 0 and widest[s]:
                        best = max(
                            best,
                            (
                                float(outputs['start_logits'][w][s] + outputs['end_logits'][w][e]),
                                int(begins[s]),
                                int(ends[e]),
                            ),
                        )
        assert (answer['begin'], answer['end']) == best[1:] and answer['text'] == row.passage[best[1]:best[2]]
        null = min(
            float(outputs['start_logits'][w][0] + outputs['end_logits'][w][0])
            for w in np.flatnonzero(data.owners == number)
        )
        assert answer['null_odds'] == pytest.approx(null - best[0], abs=1e-5)
        assert sum(one['probability'] for one in answer['nbest']) == pytest.approx(1, abs=1e-4)


def test_a_passage_without_tokens_has_no_answer_and_finite_odds(model):
    task = Task('span', {}, settings=SETTINGS | {'null_answers': True})
    rows = [question(' ', id='a')]
    data = spans.encode(task, rows, tokenizer.load(model), 20, (20,))
    (found,) = spans.decode(
        task,
        rows,
        data,
        {name: [np.ones(n, np.float32) for n in data.longest] for name in ('start_logits', 'end_logits')},
    )
    assert found['text'] == '' and np.isfinite(found['null_odds']) and found['nbest'] == []


def test_no_answer_is_said_above_the_threshold_that_is_best_on_dev():
    task = Task('span', {}, settings=SETTINGS | {'null_answers': True})
    rows = [
        question('w1', ('w1', 0), id='a'),
        question('w2', ('w2', 0), id='b'),
        question('w3', id='c'),
        question('w4', id='d'),
    ]
    found = [{'null_odds': odds, 'nbest': [{'text': row.passage}]} for row, odds in zip(rows, (-1.0, 0.5, 2.0, 3.0))]
    result = spans.score(task, rows, {}, found)
    assert (
        result['null_threshold'] == 1.25 and result['f1'] == 100 == result['best_f1']
    )  # between it and the next above
    assert result['best_f1_threshold'] == 0.5
    rows = [question('w3', id='c'), question('w4', id='d')]
    result = spans.score(task, rows, {}, found[:2])
    assert result['null_threshold'] < -1 and result['f1'] == 100


def test_a_labelled_test_file_is_scored_as_it_is_predicted():
    """At the threshold that the task has from dev, not at one chosen on the test file."""
    rows = [question('w1', ('w1', 0), id='a'), question('w3', id='c')]
    found = [{'null_odds': odds, 'text': '', 'nbest': [{'text': row.passage}]} for row, odds in zip(rows, (-1.0, 2.0))]
    settings = SETTINGS | {'null_answers': True}
    assert spans.score(Task('span', {}, settings=settings), rows, {}, found)['f1'] == 100
    result = spans.score(Task('span', {}, settings=settings | {'null_threshold': -99.0}), rows, {}, found)
    assert result['f1'] == 50 and result['best_f1'] == 100 == result['best_exact']  # over all thresholds


def test_what_is_not_a_list_of_words_or_choices():
    assert tags.parse({'words': 'Angela Merkel'}).words == ('Angela', 'Merkel')
    for value in ({'words': [1, 2]}, {'words': 3}):
        with pytest.raises((ValueError, TypeError)):
            tags.parse(value)
    with pytest.raises(ValueError, match='list'):
        choices.parse({'context': 'a', 'choices': 'bcd'})


def test_columns_end_at_spaces_and_tabs_alone(tmp_path):
    (tmp_path / 'a.conll').write_text('10\u00a0000\tB-NUM\n')
    (row,) = tags.read(str(tmp_path / 'a.conll'), '0', '-1', 'iob2', labelled=True)
    assert row.words == ('10\u00a0000',) and row.tags == ('B-NUM',)


def test_windows_that_do_not_overlap_are_said(model):
    row = question(' '.join(f'w{i}' for i in range(1, 41)), ('w3', 6))
    for stride, said in ((5, 0), (64, 1)):
        data = spans.encode(
            Task('span', {}, settings=SETTINGS | {'stride': stride}), [row], tokenizer.load(model), 24, (24,)
        )
        assert len([note for note in data.notes if 'do not overlap' in note]) == said


def test_documents_begin_at_docstart_and_context_stays_within_them(tmp_path, model):
    (tmp_path / 'a.conll').write_text('-DOCSTART- -X-\n\nw1 O\n\nw2 O\n\n-DOCSTART- -X-\n\nw3 O\n\nw4 O\nw5 O\n')
    rows = tags.read(str(tmp_path / 'a.conll'), '', '', 'iob2')
    assert [(row.words, row.document) for row in rows] == [(('w1',), 1), (('w2',), 1), (('w3',), 2), (('w4', 'w5'), 2)]
    tok, task = tokenizer.load(model), Task('tagging', {}, ('O', 'B-X'), settings={'document_context': True})
    data = tags.encode(task, rows, tok, 32, (32,))
    read = [tok.decode(data.ids[a + 1:b - 1].tolist()) for a, b in itertools.pairwise(data.starts)]
    assert read == ['w1 w2', 'w1 w2', 'w3 w4 w5', 'w3 w4 w5']


def test_long_texts_and_sets_of_labels(tmp_path):
    (tmp_path / 'a.csv').write_text(f'text,label\n{"w " * 100_000},"b ,a"\nw,"a,b"\nw,the c\n')
    task = tasks.TASKS['multilabel'](
        train_file=str(tmp_path / 'a.csv'),
        dev_file=str(tmp_path / 'a.csv'),
        test_file='',
        text_column='text',
        text_pair_column='',
        label_column='label',
        labels=(),
        dev_share=0.1,
    )
    assert [row.label for row in task.splits['train']] == [
        ('a', 'b'),
        ('a', 'b'),
        ('the c',),
    ]  # with commas, names may have spaces
    assert len(task.splits['train'][0].text) == 200_000


@settings(max_examples=100, deadline=None)
@given(sizes=st.lists(st.integers(1, 200), min_size=1, max_size=60), count=st.integers(1, 5))
def test_static_lengths_are_the_best_ones(sizes, count):
    chosen = tokenized.choose_lengths(np.array(sizes), 128, count)
    assert chosen[-1] == 128 and list(chosen) == sorted(set(chosen)) and len(chosen) <= count + 1
    assert all(length % 8 == 0 for length in chosen)
    cost = lambda lengths: sum(next(length for length in lengths if length >= min(size, 128)) for size in sizes)  # noqa: E731
    top = -(-min(max(sizes), 128) // 8) * 8  # the last length must hold the longest row; every choice of the others
    others = itertools.combinations(range(8, top, 8), min(count, 3) - 1)
    best = (
        min(cost((*lengths, top)) for lengths in others)
        if top > 8 * (min(count, 3) - 1)
        else cost((*range(8, top, 8), top))
    )
    assert cost(tokenized.choose_lengths(np.array(sizes), 128, min(count, 3))) == best >= cost(chosen)


def test_a_sweep_runs_every_run_once_and_chooses_by_dev(model, tmp_path, capfd):
    settings = make('classification', tmp_path)
    overrides = ('sweep=paper', 'seeds=2', "grid.batch_size=(4, 8)", 'grid.peak=(1e-5, 2e-3)', 'grid.epochs=(2,)')
    results = finetune.finetune(config('classification', model, settings, *overrides), str(tmp_path / 'work'))
    summary = json.loads((tmp_path / 'work' / 'sweep.json').read_text())
    runs = summary['runs']
    assert len(runs) == 8 and set(runs) == {
        f'batch{b}-lr{lr}-epochs2-seed{s}' for b in (4, 8) for lr in ('1e-05', '0.002') for s in (0, 1)
    }
    values = [run['dev/accuracy'] for run in runs.values()]
    for group, found in summary['groups'].items():  # what differs by the seed alone
        assert found['runs'] == [f'{group}-seed{s}' for s in (0, 1)]
        pair = [runs[run]['dev/accuracy'] for run in found['runs']]
        assert found['mean'] == pytest.approx(np.mean(pair)) and found['standard_deviation'] == pytest.approx(
            np.std(pair, ddof=1)
        )
        assert runs[found['best']]['dev/accuracy'] == max(pair)
    assert len(summary['groups']) == 4 and len({found['mean'] for found in summary['groups'].values()}) > 1
    assert results['dev/accuracy'] == max(values) == runs[summary['chosen']]['dev/accuracy']
    assert 'chosen by dev/accuracy' in capfd.readouterr().out
    with (tmp_path / 'work' / 'sweep.tsv').open() as file:
        lines = {line['run']: line for line in csv.DictReader(file, delimiter='\t')}
    assert [run for run, line in lines.items() if line['chosen by']] == [summary['chosen']]
    assert lines[summary['chosen']]['chosen by'] == 'dev/accuracy'
    for group, found in summary['groups'].items():
        for name in ('mean', 'median', 'standard_deviation'):
            assert float(lines[f'{group}: {name}']['dev/accuracy']) == pytest.approx(found[name], abs=1e-4)
    steps = list((tmp_path / 'work' / 'runs').glob('*/checkpoints/*'))
    assert len(steps) == 8 and not any((step / 'rest').exists() for step in steps)  # nobody goes on from here
    assert (tmp_path / 'work' / 'sweep.png').stat().st_size > 5000
    assert bert_jax.load(str(tmp_path / 'work'))(text(1))['label'] in 'abc'
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / 'work' / 'runs').rglob('run.json')}
    (tmp_path / 'work' / 'runs' / summary['chosen'] / 'run.json').unlink()
    finetune.finetune(config('classification', model, settings, *overrides), str(tmp_path / 'work'))
    after = {p: p.stat().st_mtime_ns for p in (tmp_path / 'work' / 'runs').rglob('run.json')}
    assert sum(before[p] != after[p] for p in before) == 1
    changed = table(tmp_path / 'changed.csv', ('text', 'label'), [('w1', 'a'), ('w11', 'b'), ('w21', 'c')])
    with pytest.raises(
        UserError, match='batch4-lr1e-05-epochs2-seed0 holds a run on other data; what differs: data.dev'
    ):
        finetune.finetune(
            config('classification', model, settings | {'dev_file': str(changed)}, *overrides), str(tmp_path / 'work')
        )
    assert json.loads((tmp_path / 'work' / 'sweep.json').read_text())['runs'] == runs
    with pytest.raises(UserError, match='dropout_rate'):
        finetune.finetune(
            config('classification', model, settings, *overrides, 'dropout_rate=0.2'), str(tmp_path / 'work')
        )


def test_a_sweep_compiles_each_shape_once_and_takes_several_checkpoints(model, tmp_path, monkeypatch):
    jobs = []

    class Watched(finetune.Job):
        def __init__(self, config, task):
            super().__init__(config, task)
            jobs.append(self)

    monkeypatch.setattr(finetune, 'Job', Watched)
    other = peers.save(
        peers.model(hidden_size=64, num_attention_heads=2, intermediate_size=128, max_position_embeddings=64, seed=1),
        tmp_path / 'other',
    )
    rows = [(text(i % 3, 3 + i % 25), 'abc'[i % 3]) for i in range(24)]
    file = str(table(tmp_path / 'c.csv', ('text', 'label'), rows))
    c = config(
        'classification',
        model,
        {'train_file': file, 'dev_file': file},
        'sweep=paper',
        'seeds=2',
        'grid.batch_size=(4, 8)',
        'grid.peak=(1e-5, 2e-3)',
        'grid.epochs=(1,)',
        'num_lengths=2',
        f'init_from={model},{other}',
    )
    finetune.finetune(c, str(tmp_path / 'work'))
    summary = json.loads((tmp_path / 'work' / 'sweep.json').read_text())
    assert len(summary['runs']) == 16 and len(jobs) == 2  # one a checkpoint, for eight runs each
    for job in jobs:
        shapes = {
            job.data(size)['train'].batch(step, size, seed)['input_ids'].shape
            for size in (4, 8)
            for seed in (0, 1)
            for step in range(job.data(size)['train'].steps(size))
        }
        assert job.run.step._cache_size() == len(shapes) >= 2
    assert {run[:2] for run in summary['runs']} == {'1-', '2-'}
    with (tmp_path / 'work' / 'sweep.tsv').open() as lines:
        marked = {line['run'] for line in csv.DictReader(lines, delimiter='\t') if line['chosen by']}
    assert marked == set(summary['chosen_of'].values()) and list(summary['chosen_of']) == [str(model), str(other)]
    for which, run in zip('12', summary['chosen_of'].values()):
        assert summary['runs'][run]['dev/accuracy'] == max(
            found['dev/accuracy'] for name, found in summary['runs'].items() if name[0] == which == run[0])
    best = {
        which: max(found['dev/accuracy'] for run, found in summary['runs'].items() if run.startswith(which))
        for which in ('1-', '2-')
    }
    assert summary['runs'][summary['chosen']]['dev/accuracy'] == max(best.values())


def test_a_grid_of_one_is_that_one(model, tmp_path):
    settings = make('classification', tmp_path)
    finetune.finetune(
        config(
            'classification',
            model,
            settings,
            'sweep=paper',
            'grid.batch_size=(4,)',
            'grid.peak=(3e-5,)',
            'grid.epochs=(1,)',
        ),
        str(tmp_path / 'work'),
    )
    found = json.loads((tmp_path / 'work' / 'config.json').read_text())
    assert (found['batch_size'], found['epochs'], found['schedule']['peak'], found['sweep']) == (4, 1.0, 3e-5, '')
    with pytest.raises(UserError, match='holds a single run'):
        finetune.finetune(config('classification', model, settings, 'seeds=2'), str(tmp_path / 'work'))


def test_a_sweep_goes_on_beyond_a_run_that_diverges(model, tmp_path, capfd):
    settings = make('classification', tmp_path)
    c = config(
        'classification',
        model,
        settings,
        'sweep=paper',
        'grid.batch_size=(8,)',
        'grid.peak=(1e38, 1e-3)',
        'grid.epochs=(1,)',
        'optimizer.clip_norm=0.0',
    )
    finetune.finetune(c, str(tmp_path / 'work'))
    summary = json.loads((tmp_path / 'work' / 'sweep.json').read_text())
    assert list(summary['runs']) == ['batch8-lr0.001-epochs1-seed0'] and list(summary['failed']) == [
        'batch8-lr1e+38-epochs1-seed0'
    ]
    assert 'batch8-lr1e+38-epochs1-seed0\tfailed' in (tmp_path / 'work' / 'sweep.tsv').read_text()
    assert 'not finite' in capfd.readouterr().out
    with pytest.raises(UserError, match='holds several runs'):
        finetune.finetune(config('classification', model, settings), str(tmp_path / 'work'))
    c.grid.peak = (1e38, 2e38)
    with pytest.raises(UserError, match='every run failed'):
        finetune.finetune(c, str(tmp_path / 'work'))


def test_a_run_of_a_sweep_has_its_own_shapes_whatever_was_run_before(model, tmp_path):
    """Rows of the length that suits its batch size, also when the runs of another batch size were finished earlier."""
    rows = [
        (text(i % 3, int(n)), 'abc'[i % 3])
        for i, n in enumerate(np.random.default_rng(0).geometric(0.2, 300).clip(1, 60))
    ]
    file = str(table(tmp_path / 'c.csv', ('text', 'label'), rows))
    c = config('classification', model, {'train_file': file, 'dev_file': file}, 'max_length=64', 'batch_size=64')
    lengths = [finetune.Job(c, finetune.read_task(c)).data(size)['train'].row_length for size in (4, 64)]
    c.batch_size = 4
    assert lengths == [finetune.Job(c, finetune.read_task(c)).data(size)['train'].row_length for size in (4, 64)]
    assert lengths[0] != lengths[1]


def test_what_is_frozen_stays_and_rows_may_be_apart(model, tmp_path):
    c = config(
        'classification',
        model,
        make('classification', tmp_path),
        "frozen=('embeddings','encoder')",
        'packed=False',
        'epochs=1.0',
    )
    finetune.finetune(c, str(tmp_path / 'work'))
    job = finetune.Job(c, finetune.read_task(c))
    assert not job.packed and job.data(8)['train'].shapes.startswith('lengths')
    found, _, _ = checkpoint.load_params(tmp_path / 'work')
    for part, same in (('embeddings', True), ('encoder', True), ('pooler', False)):
        pairs = zip(jax.tree.leaves(found[part]), jax.tree.leaves(job.source.params[part]))
        assert all(np.array_equal(a, b) for a, b in pairs) == same
    with pytest.raises(UserError, match="Unknown part for --config.frozen 'heads'"):
        c = config('classification', model, make('classification', tmp_path), "frozen=('heads',)")
        finetune.Job(c, finetune.read_task(c))


def test_names_of_runs_are_all_different(model, tmp_path):
    c = config('classification', model, {}, 'seed=1000000', 'seeds=3', 'sweep=paper', 'grid.peak=(1.00000001e-5, 1e-5)')
    names = [run.name for run in sweep.expand(c)]
    assert len(set(names)) == len(names) == 3 * 2 * 2 * 3 and 'batch16-lr1e-05-epochs2-seed1000002' in names


def bad(name, folder, content, suffix):
    (folder / f'bad{suffix}').write_text(content)
    return {'train_file': str(folder / f'bad{suffix}'), 'dev_file': str(folder / f'bad{suffix}')}


@pytest.mark.parametrize(
    'name, suffix, content, words',
    [
        ('regression', '.csv', 'text,label\na,1\nb,x\n', ('bad.csv:3', "'x' is not a number")),
        ('multilabel', '.csv', 'text,kind\na,b\n', ("no column 'label'", 'text, kind')),
        ('multilabel', '.csv', 'text,label\na,x\nb,x\n', ('bad.csv', '1 labels (x)')),
        ('multilabel', '.jsonl', '{"text": "a \\ud83d", "label": ["x", "y"]}\n', ('bad.jsonl:1', 'surrogate')),
        ('tagging', '.conll', 'a O\nb I-X\n', ('bad.conll:2', "'I-X' is not IOB2", 'iob1')),
        ('tagging', '.conll', 'a O\nb Q-X\n', ('bad.conll:2', 'not a tag')),
        ('tagging', '.conll', '\n\n', ('no sentences',)),
        ('tagging, iobes', '.conll', 'a B-X\nb O\n', ('bad.conll:2', "'O' is not IOBES after 'B-X'")),
        (
            'tagging, iobes',
            '.conll',
            'a S-X\nb B-X\n\nc O\n',
            ('bad.conll:2', "the sentence's end is not IOBES after 'B-X'"),
        ),
        ('tagging, iobes', '.conll', 'a B-X\nb E-Y\n', ('bad.conll:2', "'E-Y' is not IOBES after 'B-X'")),
        ('choice', '.jsonl', '{"context": "a", "choices": ["b"], "label": 0}\n', ('bad.jsonl:1', '1 choices')),
        ('choice', '.jsonl', '{"context": "a", "choices": ["b", "c"], "label": 2}\n', ('bad.jsonl:1', 'label 2')),
        ('choice', '.jsonl', '{"context": "a", "label": 2}\n', ('bad.jsonl:1', "no column 'choices'")),
        ('choice', '.jsonl', '', ('no questions',)),
        (
            'span',
            '.jsonl',
            '{"question": "a", "passage": "b c", "answer": "d"}\n',
            ('bad.jsonl:1', "'d' is not in the passage"),
        ),
        (
            'span',
            '.jsonl',
            '{"question": "a", "passage": "b c", "answer": null}\n',
            ('bad.jsonl:1', 'null_answers=True'),
        ),
        (
            'span',
            '.json',
            '{"data": [{"paragraphs": [{"context": "b c", "qas": [{"id": "7", "question": "a", "answers": '
            '[{"text": "c", "answer_start": 0}]}]}]}]}',
            ('question 7', "'c' is not in the passage at 0"),
        ),
        ('span', '.json', '{"data": 3}', ('not a SQuAD file',)),
        (
            'span',
            '.json',
            json.dumps(
                {
                    'data': [
                        {
                            'paragraphs': [
                                {
                                    'context': 'a b',
                                    'qas': [
                                        {'id': 'q', 'question': 'c', 'answers': [{'text': 'a', 'answer_start': None}]}
                                    ],
                                }
                            ]
                        }
                    ]
                }
            ),
            ('not a SQuAD file', 'NoneType'),
        ),
        (
            'span',
            '.json',
            json.dumps(
                {'data': [{'paragraphs': [{'context': 'a b', 'qas': [{'id': 'q', 'question': None, 'answers': []}]}]}]}
            ),
            ('not a SQuAD file', 'question q'),
        ),
    ],
)
def test_bad_files_name_file_and_line(name, suffix, content, words, model, tmp_path):
    with pytest.raises(UserError) as error:
        name, _, scheme = name.partition(', ')
        overrides = [f'task.scheme={scheme}'] if scheme else []
        finetune.finetune(config(name, model, bad(name, tmp_path, content, suffix), *overrides), str(tmp_path / 'work'))
    assert all(w in str(error.value) for w in words), error.value
    assert not (tmp_path / 'work').exists()


def test_swag_and_commonsenseqa_are_read(tmp_path):
    table(
        tmp_path / 'swag.csv',
        ('', 'video-id', 'sent1', 'sent2', 'ending0', 'ending1', 'ending2', 'ending3', 'label'),
        [('0', 'v', 'A man sits.', 'He', 'eats.', 'flies.', 'x.', 'y.', '1')],
    )
    (row,) = choices.read(str(tmp_path / 'swag.csv'), 'swag')
    assert row.context == 'A man sits.' and row.choices[1] == 'He flies.' and row.label == 1
    table(
        tmp_path / 'unequal.csv',
        ('sent1', 'sent2', 'ending_note', 'ending0', 'ending1', 'ending2', 'label'),
        [
            ('A man sits.', 'He', 'odd', 'eats.', 'flies.', 'runs.', '2'),
            ('A man sits.', 'He', '', 'eats.', 'flies.', '', '1'),
        ],
    )
    assert [row.choices for row in choices.read(str(tmp_path / 'unequal.csv'), 'swag')] == [
        ('He eats.', 'He flies.', 'He runs.'), ('He eats.', 'He flies.')]
    json_lines(tmp_path / 'half.jsonl', [{'context': 'a', 'choices': ['b', 'c'], 'label': 0.5}])
    with pytest.raises(UserError, match='label 0.5 is not a whole number'):
        choices.read(str(tmp_path / 'half.jsonl'), 'plain')
    json_lines(tmp_path / 'c.jsonl', [{'answerKey': 'B', 'id': '1', 'question': {'stem': 'Why?', 'choices': [
        {'label': 'A', 'text': 'so'}, {'label': 'B', 'text': 'because'}]}}])
    (row,) = choices.read(str(tmp_path / 'c.jsonl'), 'commonsenseqa')
    assert row.label == 1 and row.choices == ('so', 'because')


def test_a_test_file_without_labels_is_predicted_and_not_scored(model, tmp_path):
    settings = make('choice', tmp_path)
    records = [json.loads(line) for line in (tmp_path / 'q.jsonl').read_text().splitlines()]
    settings['test_file'] = str(
        json_lines(tmp_path / 'test.jsonl', [{k: r[k] for k in ('context', 'choices')} for r in records])
    )
    results = finetune.finetune(config('choice', model, settings, 'epochs=1.0'), str(tmp_path / 'work'))
    assert not any(name.startswith('test/') for name in results)
    assert len((tmp_path / 'work' / 'predictions_test.tsv').read_text().splitlines()) == 17


def test_predict_says_what_it_cuts_and_leaves_out(model, tmp_path, capsys, monkeypatch):
    finetune.finetune(
        config('span', model, make('span', tmp_path), 'epochs=1.0', 'task.max_query_length=5'), str(tmp_path / 'work')
    )
    (tmp_path / 'in.txt').write_text('\ufeff' + 'w1 ' * 9 + '\tw2 w3\n\nw1\tw2 w3\n')
    capsys.readouterr()
    for threshold, said in ((None, 'w'), ('-1e9', '(no answer)')):
        monkeypatch.setattr(
            'sys.argv',
            [
                'predict',
                '--workdir',
                str(tmp_path / 'work'),
                '--input',
                str(tmp_path / 'in.txt'),
                *([f'--null_threshold={threshold}'] if threshold else []),
            ],
        )
        predict.main()
        out, err = capsys.readouterr()
        assert [line.startswith(said) for line in out.splitlines()] == [True, True] and '\ufeff' not in out
        assert '1 empty lines of' in err and '1 questions are longer than max_query_length and were cut' in err


def test_predict_says_what_it_wants(model, tmp_path):
    peer = peers.save(peers.model('BertForQuestionAnswering'), tmp_path / 'qa')
    expect_error(call_module('predict', '--init_from', peer, 'w1 alone'), 'is not what a model for span takes')
    done = call_module('predict', '--init_from', peer, 'w1?\tw2 w3 w4', '--json')
    found = json.loads(done.stdout)
    assert found['text'] == 'w2 w3 w4'[found['begin']:found['end']]


def test_predictions_for_glues_server(model, tmp_path):
    """From a test split to one zip; what is missing is said."""
    for name in ('sst2', 'stsb'):
        (tmp_path / name).mkdir()
        c = config(name, model, make(name, tmp_path / name), 'epochs=1.0')
        finetune.finetune(c, str(tmp_path / f'run_{name}'))
    done = call_module(
        'data.glue', '--runs', tmp_path / 'run_sst2', tmp_path / 'run_stsb', '--output', tmp_path / 'all.zip'
    )
    assert done.returncode == 0 and 'missing: AX.tsv, CoLA.tsv' in done.stderr, done.stderr
    with zipfile.ZipFile(tmp_path / 'all.zip') as archive:
        assert archive.namelist() == ['SST-2.tsv', 'STS-B.tsv']
        lines = archive.read('STS-B.tsv').decode().splitlines()
    assert (
        lines[0] == 'index\tprediction'
        and len(lines) == 17
        and all(0 <= float(line.split('\t')[1]) <= 5 for line in lines[1:])
    )
    assert (
        call_module('data.glue', '--runs', tmp_path / 'run_stsb', '--output', tmp_path / 'new' / 'all.zip').returncode
        == 0
    )
    expect_error(call_module('data.glue', '--runs', model, '--output', tmp_path / 'x.zip'), 'no submission')
