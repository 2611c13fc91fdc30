"""A run is about the data that it says; a folder is its run's alone; what is wrong is said before the work."""

import json
import math
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import peers
import pytest
from conftest import ROOT
from test_tasks import config, make, model, table, text  # noqa: F401 - model is a fixture

from bert_jax import checkpoint, cli, finetune, metrics, plots, pretrain, workdir
from bert_jax.cli import UserError
from bert_jax.tasks import task as tasks_of
from bert_jax.tasks import texts
from bert_jax.tasks.task import Task

NOTHING = ('epochs=0.01', 'schedule.peak=0.0')  # a single step that changes no weight


def rows(labels, count=16):
    return [(text(i % 2), labels[i % 2]) for i in range(count)]


def files_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob('*')) if path.is_file()}


@pytest.fixture
def run(model, tmp_path):  # noqa: F811
    """(start the run, its settings, its folder): classes from train.csv and dev.csv, in one step."""
    settings = {f'{split}_file': str(table(tmp_path / f'{split}.csv', ('text', 'label'), rows(('pos', 'neg'))))
                for split in ('train', 'dev')}

    def start(*overrides, **more):
        return finetune.finetune(
            config('classification', model, settings | more, *NOTHING, *overrides), str(tmp_path / 'w')
        )

    return start, settings, tmp_path / 'w'


def test_other_data_under_the_same_name_is_another_run(run):
    """Never a label's new name on old weights, nor old scores beside new data."""
    start, settings, work = run
    start()
    before = files_of(work)
    train, dev = (pathlib.Path(settings[f'{split}_file']) for split in ('train', 'dev'))
    for file, change, said in (
        (
            train,
            lambda text: text.replace('pos', 'x').replace('neg', 'y'),
            r"data.labels \(\['neg', 'pos'\] there, \['x', 'y'\] now\)",
        ),
        (train, lambda text: text + 'w1,pos\n', "what differs: data.train \\('.{16}' there, '.{16}' now"),
        (
            dev,
            lambda text: '\n'.join([*text.splitlines()[:-2], *text.splitlines()[:-3:-1]]) + '\n',
            'what differs: data.dev',
        ),
    ):
        content = {one: one.read_text() for one in (train, dev)}
        file.write_text(change(content[file]))
        if 'labels' in said:
            dev.write_text(change(content[dev]))
        with pytest.raises(UserError, match=said):
            start()
        for one, text_ in content.items():
            one.write_text(text_)
    with pytest.raises(UserError, match='data.labels'):  # nor by the config
        start("task.labels=('pos','neg')")
    assert files_of(work) == before


def test_data_that_moved_is_the_same_run_and_a_test_file_only_predicts(run, tmp_path):
    start, settings, work = run
    start()
    step = {path: content for path, content in files_of(work).items() if 'checkpoints' in path.parts}
    moved = {name: shutil.copy(file, tmp_path / f'moved_{name}.csv') for name, file in settings.items()}
    test = table(tmp_path / 'test.csv', ('text', 'label'), rows(('pos', 'neg'), 5))
    results = start(**{name: str(file) for name, file in moved.items()}, test_file=str(test))
    assert 'test/accuracy' in results and len((work / 'predictions_test.tsv').read_text().splitlines()) == 6
    test.write_text('text,label\nw1 w2,pos\n')
    start(test_file=str(test))
    assert len((work / 'predictions_test.tsv').read_text().splitlines()) == 2
    assert {path: content for path, content in files_of(work).items() if 'checkpoints' in path.parts} == step


def test_identity_is_of_what_examples_say_in_their_order():
    one, other = texts.Row('a', None, 'x', 'f:1'), texts.Row('b', None, 'y', 'f:2')
    of = lambda rows, **more: tasks_of.identity(Task('classification', {'train': rows, **more}, ('x', 'y')))  # noqa: E731
    assert of([one, other]) == of([texts.Row('a', None, 'x', 'g:7'), other], test=[one]) == of([one, other])
    different = [
        [other, one],
        [one],
        [one, other, other],
        [texts.Row('a', '', 'x', 'f:1'), other],
        [texts.Row('a', None, 'y', 'f:1'), other],
    ]
    assert len({json.dumps(of(rows)) for rows in [[one, other], *different]}) == 6
    assert of([one], dev=[one]).keys() == {'train', 'dev', 'labels'}


def test_a_workdir_of_an_older_version_goes_on(run, capfd):
    start, _, work = run
    first = start()
    described = json.loads((work / 'config.json').read_text())
    for key in ('data', 'keep_head'):
        del described[key]
    (work / 'config.json').write_text(json.dumps(described))
    assert start() == first
    assert 'begun by an older version, which says nothing of its data' in capfd.readouterr().err
    assert 'data' in json.loads((work / 'config.json').read_text())


def test_a_head_is_kept_for_the_same_kind_and_labels(tmp_path, capfd):
    """BioASQ after SQuAD: the second fine-tuning begins with the head of the first."""
    labels = {'id2label': dict(enumerate('abc')), 'label2id': {name: i for i, name in enumerate('abc')}}
    for name, architecture, more, attribute in (
        ('span', 'BertForQuestionAnswering', {}, 'qa_outputs'),
        ('classification', 'BertForSequenceClassification', labels, 'classifier'),
    ):
        peer = peers.model(architecture, max_position_embeddings=64, **more)
        source = peers.save(peer, tmp_path / name)
        theirs = getattr(peer, attribute).weight.detach().numpy().T

        def head(*overrides, name=name, source=source):
            c = config(name, source, make(name, tmp_path), *overrides)
            job = finetune.Job(c, finetune.read_task(c))
            return np.asarray(finetune._initial(job, c).params[f'targets_{name}']['dense']['kernel'])

        assert np.array_equal(head(), theirs) and np.array_equal(head('keep_head=True'), theirs)
        assert f'({name}) is kept; --config.keep_head=False begins with a fresh one' in capfd.readouterr().err
        assert not np.allclose(head('keep_head=False'), theirs) and 'is kept' not in capfd.readouterr().err
    renamed = "task.labels=('c','b','a')"
    assert not np.allclose(head(renamed), theirs)  # as many labels, but others
    with pytest.raises(UserError, match='its labels are a, b, c; those of the task are c, b, a'):
        head(renamed, 'keep_head=True')
    with pytest.raises(UserError, match='has no head for tagging'):
        head('keep_head=True', name='tagging')
    with pytest.raises(UserError, match="'maybe'; known: False, True, auto"):
        finetune.finetune(config('span', source, {}, 'keep_head=maybe'), '')


def test_a_strangers_folder_is_left_alone(model, store_path, tmp_path, monkeypatch):  # noqa: F811
    """A token store, a Hugging Face folder, notes, the current folder: refused before anything is read or written."""
    (tmp_path / 'notes').mkdir()
    (tmp_path / 'notes' / 'thesis.txt').write_text('mine')
    for folder in (store_path, model, tmp_path / 'notes'):
        before = files_of(folder)
        settings = make('classification', tmp_path)
        for start in (
            lambda path: pretrain.pretrain(
                cli.load_config('configs/pretrain.py:tiny', [f'--config.store={store_path}']), path
            ),
            lambda path: finetune.finetune(config('classification', model, settings), path),  # noqa: B023
            lambda path: finetune.finetune(config('classification', model, settings, 'seeds=2'), path),  # noqa: B023
        ):
            with pytest.raises(UserError, match='not an empty folder, and not a (workdir|sweep)|holds a single run'):
                start(str(folder))
        assert files_of(folder) == before
    monkeypatch.chdir(tmp_path)
    for seeds in (1, 2):
        with pytest.raises(UserError, match='--workdir'):
            finetune.finetune(config_at(model, seeds), '')
    assert not (tmp_path / 'config.json').exists() and not (tmp_path / 'runs').exists()


def config_at(model, seeds):  # noqa: F811
    """From another current folder."""
    c = cli.load_config(
        str(ROOT / 'configs/finetune.py') + ':classification',
        [f'--config.init_from={model}', f'--config.seeds={seeds}'],
    )
    c.task.train_file = str(ROOT / 'no such file')
    return c


def test_where_nothing_was_trained_a_setting_can_be_put_right(store, tmp_path):
    path = str(tmp_path / 'w')
    first, other = (cli.load_config('configs/pretrain.py:tiny', [f'--config.seed={seed}']) for seed in (1, 2))
    for c in (first, other):
        with workdir.opened(path, c, store.tokenizer):
            pass
    assert workdir.read_config(path).seed == 2
    checkpoint.write_params(tmp_path / 'w' / 'checkpoints', {'x': np.zeros(2)}, {})
    with pytest.raises(UserError, match=r'seed \(2 there, 1 now\)'), workdir.opened(path, first, store.tokenizer):
        pass


def test_a_workdir_in_use_is_refused(store, tmp_path):
    c = cli.load_config('configs/pretrain.py:tiny', [])
    with workdir.opened(str(tmp_path / 'w'), c, store.tokenizer):
        with (
            pytest.raises(UserError, match='in use by process'),
            workdir.opened(str(tmp_path / 'w'), c, store.tokenizer),
        ):
            pass
        with pytest.raises(UserError, match='in use by process'), workdir.opened_sweep(str(tmp_path / 'sweep')), \
                workdir.opened_sweep(str(tmp_path / 'sweep')):
            pass


def test_a_sweep_without_one_of_its_checkpoints_does_not_begin(model, tmp_path):  # noqa: F811
    c = config('classification', f'{model},{tmp_path}/none', make('classification', tmp_path))
    with pytest.raises(UserError, match='none: no such folder'):
        finetune.finetune(c, str(tmp_path / 'w'))
    assert not (tmp_path / 'w').exists()


@pytest.mark.parametrize(
    'key, value, expected',
    [
        ('optimizer.b1', 2.0, 'less than 1'),
        ('optimizer.b2', 1.0, 'less than 1'),
        ('optimizer.eps', -1.0, 'or more'),
        ('optimizer.eps', 0.0, 'or more'),
        ('optimizer.clip_norm', -1.0, '0 or more'),
        ('optimizer.weight_decay', -0.1, '0 or more'),
        ('schedule.peak', math.nan, '0 or more'),
        ('schedule.peak', math.inf, '0 or more'),
        ('model.targets.mlm.weight', -1.0, '0 or more'),
    ],
)
def test_settings_that_mean_nothing_are_refused(key, value, expected):
    c = cli.load_config('configs/pretrain.py:tiny', [f'--config.{key}={value}'])
    with pytest.raises(UserError, match=f'--config.{key}={value}: .*{expected}'):
        pretrain.check(c)


def test_what_would_learn_nothing_or_fill_the_memory_is_refused(model, tmp_path):  # noqa: F811
    for override, words in (
        ('model.targets.mlm.weight=0.0', 'every weight is 0'),
        ('phases=((9,64,100000000),)', 'at most 1,048,576'),
    ):
        with pytest.raises(UserError, match=words):
            pretrain.check(cli.load_config('configs/pretrain.py:tiny,no_nsp', [f'--config.{override}']))
    for name in ('classification', 'tagging'):  # packed and not
        with pytest.raises(
            UserError, match='batch_size=100000000: at most 1,024 are expected for 16 training examples'
        ):
            finetune.finetune(config(name, model, make(name, tmp_path), 'batch_size=100000000'), str(tmp_path / 'w'))


def test_no_label_and_no_font_ends_a_run_at_its_picture(tmp_path, monkeypatch, capfd):
    plots.confusion(tmp_path, ('$', '$$', '$x_{'), ['$', '$$', '$x_{'], ['$', '$$', '$'])
    assert (tmp_path / 'confusion.png').stat().st_size > 1000
    monkeypatch.setattr('matplotlib.figure.Figure.savefig', lambda *_, **__: 1 / 0)
    plots.curves(tmp_path)
    assert 'curves.png: not drawn (division by zero)' in capfd.readouterr().err


def test_tensorboard_files_are_read_back_by_tensorflow(tmp_path):
    import tensorflow as tf

    for begun, steps in ((0, (1, 2, 3)), (2, (3, 4))):  # the second goes on after step 2
        writer = metrics.Writer(tmp_path, begun)
        for step in steps:
            writer.write(step, {'loss': 1.5 * step + begun, 'name': 'no number'})
        writer.close()
        if not begun:
            (first,) = (tmp_path / 'tensorboard').iterdir()
            first.rename(first.with_name('events.out.tfevents.1.first'))
    found = [
        [
            (e.step, e.session_log.status, [(v.tag, v.simple_value) for v in e.summary.value])
            for e in tf.compat.v1.train.summary_iterator(str(file))
        ][1:]
        for file in sorted((tmp_path / 'tensorboard').iterdir())
    ]
    start = tf.compat.v1.SessionLog.START
    assert found == [[(1, start, []), *((s, 0, [('loss', 1.5 * s)]) for s in (1, 2, 3))],
                     [(3, start, []), *((s, 0, [('loss', 1.5 * s + 2)]) for s in (3, 4))]]


def test_a_board_that_cannot_be_written_is_dropped_and_the_log_goes_on(tmp_path, capfd, monkeypatch):
    (tmp_path / 'tensorboard').write_text('a file where a folder is to be')
    monkeypatch.setattr(metrics.time, 'time', lambda: 0.0)  # and a clock that was set back
    writer = metrics.Writer(tmp_path, 0)
    for step in range(200):
        writer.write(step, {'loss': 1.0})
    writer.close()
    assert len((tmp_path / 'log.jsonl').read_text().splitlines()) == 200
    assert capfd.readouterr().err.count('TensorBoard files are not written any more') == 1


def test_a_run_that_ends_within_the_import_of_tensorflow_ends_in_peace():
    """As every pre-training of ten steps does, and one that is stopped."""
    program = (
        'import contextlib, sys, numpy as np\nfrom bert_jax.data import batches\n'
        'batches.place = lambda batch, _: batch\n'
        'with contextlib.closing(batches.tf_stream(lambda i: {"x": np.zeros(1)}, 0, 100_000)) as made:\n'
        '    placed = batches.placed_ahead(made, None)\n    [next(placed) for _ in range(6)]\n    sys.exit(75)\n'
    )
    done = subprocess.run(
        [sys.executable, '-c', program], text=True, capture_output=True, env=os.environ | {'PYTHONPATH': str(ROOT)}
    )
    assert (done.returncode, done.stderr) == (75, '')
