"""Fine-tuning and prediction, from files to files; metrics against scikit-learn."""

import json
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import sklearn.metrics
from conftest import call_module, expect_error, run_module

import bert_jax
from bert_jax import cli, convert, finetune, train
from bert_jax.cli import UserError
from bert_jax.data import tokenizer
from bert_jax.formats import pretrained
from bert_jax.tasks import tables, tasks, texts
from bert_jax.tasks.task import Task

WORDS = {
    'spam': 'raise exception error traceback',
    'ham': 'import module package name',
    'eggs': 'sequence list tuple item',
}


def rows(count, seed=0):
    """Texts whose words give their label away."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(list(WORDS), count)
    return [(' '.join(rng.choice(WORDS[label].split(), rng.integers(3, 30))), str(label)) for label in labels]


def write(path, data, header=('body', 'kind'), pair=False):
    records = [(text, *([text[::-1]] if pair else []), label) for text, label in data]
    header = (header[0], 'other', header[1]) if pair else header
    if path.suffix == '.jsonl':
        path.write_text(''.join(json.dumps(dict(zip(header, r))) + '\n' for r in records))
    else:
        mark = {'.csv': ',', '.tsv': '\t'}[path.suffix]
        path.write_text('\n'.join(mark.join(r) for r in [header, *records]) + '\n')
    return path


def settings(pretrained, train, *overrides):
    return [
        '--config',
        'configs/finetune.py:classification',
        f'--config.init_from={pretrained}',
        f'--config.task.train_file={train}',
        '--config.task.text_column=body',
        '--config.task.label_column=kind',
        '--config.batch_size=8',
        '--config.log_every=5',
        '--config.schedule.peak=2e-3',
        '--config.max_length=32',
        *overrides,
    ]


def load_config(pretrained, train, *overrides):
    arguments = settings(pretrained, train, *overrides)
    return cli.load_config(arguments[1], arguments[2:])


@pytest.fixture(scope='module')
def tuned(pretrained, tmp_path_factory):
    folder = tmp_path_factory.mktemp('tuned')
    train, dev, test = (
        write(folder / f'{n}.csv', rows(c, s)) for s, (n, c) in enumerate((('train', 600), ('dev', 41), ('test', 7)))
    )
    args = settings(
        pretrained,
        train,
        f'--config.task.dev_file={dev}',
        f'--config.task.test_file={test}',
        '--config.batch_size=16',
        '--config.epochs=10',
        '--config.schedule.peak=5e-4',
        '--config.dropout_rate=0.0',
    )  # none of eight seeds fails
    result = run_module('finetune', *args, '--workdir', folder / 'work')
    assert result.returncode == 0, result.stderr
    return folder / 'work', args


def test_learns_what_there_is_to_learn_and_writes_it_down(tuned):
    work, _ = tuned
    results = json.loads((work / 'results.json').read_text())
    assert results['dev/accuracy'] > 0.9 > results['dev/majority_accuracy']
    lines = (work / 'predictions_dev.tsv').read_text().splitlines()
    assert lines[0].split('\t') == ['index', 'where', 'prediction', 'label', 'text', 'p(eggs)', 'p(ham)', 'p(spam)']
    table = [line.split('\t') for line in lines[1:]]
    assert [int(r[0]) for r in table] == list(range(41)) and [(r[4], r[3]) for r in table] == rows(41, 1)
    assert [r[1].rpartition(':')[2] for r in table] == [str(2 + i) for i in range(41)] and 'dev.csv:' in table[0][1]
    table = [r[1:] for r in table]  # prediction and label at 1 and 2
    accuracy = np.mean([r[1] == r[2] for r in table])
    assert accuracy == pytest.approx(results['dev/accuracy'])
    f1 = sklearn.metrics.f1_score(
        [r[2] for r in table], [r[1] for r in table], labels=['eggs', 'ham', 'spam'], average=None
    )
    np.testing.assert_allclose([results[f'dev/f1[{n}]'] for n in ('eggs', 'ham', 'spam')], f1)
    assert len((work / 'predictions_test.tsv').read_text().splitlines()) == 8


def test_a_finished_run_is_not_repeated(tuned):
    work, args = tuned
    before = {p: p.stat().st_mtime for p in work.rglob('checkpoints/**/*')}
    result = call_module('finetune', *args, '--workdir', work)
    assert result.returncode == 0 and 'resuming at step 380 of 380' in result.stdout, result.stdout + result.stderr
    assert before == {p: p.stat().st_mtime for p in work.rglob('checkpoints/**/*')}


def test_restarts_from_a_workdir_begin_with_the_same_weights(pretrained, tmp_path):
    """A run's state is given away step by step; the next run's start is not."""
    train = write(tmp_path / 'train.csv', rows(60))
    finetune.finetune(load_config(pretrained, train, '--config.epochs=1', '--config.seeds=2'), str(tmp_path / 'both'))
    finetune.finetune(load_config(pretrained, train, '--config.epochs=1', '--config.seed=1'), str(tmp_path / 'second'))
    both = json.loads((tmp_path / 'both' / 'sweep.json').read_text())
    assert (
        both['runs']['seed1']['dev/loss'] == json.loads((tmp_path / 'second' / 'results.json').read_text())['dev/loss']
    )


def test_positions_that_pretraining_never_saw_are_said_and_remat_is_this_runs_own(pretrained, tmp_path, capfd):
    train = write(
        tmp_path / 'train.csv', [(f'{text} ' * (25 if i else 1), label) for i, (text, label) in enumerate(rows(30))]
    )
    for length, said in ((96, False), (128, True)):
        c = load_config(pretrained, train, f'--config.max_length={length}', '--config.remat=full')
        job = finetune.Job(c, finetune.read_task(c))
        assert ('was trained on up to 96 tokens' in capfd.readouterr().err) == said
    assert job.model_config.run.remat == 'full' and job.source.config.run.remat == 'none'


def test_a_dev_loss_that_is_not_finite_ends_the_run_as_one_in_training_does(pretrained, tmp_path):
    c = load_config(pretrained, write(tmp_path / 'train.csv', rows(30)))
    job = finetune.Job(c, finetune.read_task(c))
    params = jax.tree.map(lambda x: x * np.nan, job.run.init(0).params)
    with pytest.raises(train.Diverged, match='The loss on dev is not finite at step 7'):
        finetune._score(job, 'dev', 8, 7, params)


def test_predicting_classes_from_arguments_files_and_python(tuned, tmp_path):
    work, _ = tuned
    texts = [text for text, _ in rows(20, 2)]
    model = bert_jax.load(str(work))
    results = model(texts)
    assert np.mean([r['label'] == label for r, (_, label) in zip(results, rows(20, 2))]) > 0.8
    assert all(abs(sum(r['scores'].values()) - 1) < 1e-4 for r in results)
    assert model(texts[3])['scores'] == pytest.approx(results[3]['scores'], abs=2e-5)
    (tmp_path / 'in.txt').write_text('\n'.join(texts) + '\n')
    by_file = run_module('predict', '--workdir', work, '--input', tmp_path / 'in.txt', '--json')
    assert [json.loads(line)['label'] for line in by_file.stdout.splitlines()] == [r['label'] for r in results]
    by_pipe = run_module('predict', '--workdir', work, '--input', '-', input=texts[0] + '\n')
    assert by_pipe.stdout.split('\t')[0] == results[0]['label']
    (tmp_path / 'in.jsonl').write_text(json.dumps({'text': texts[1], 'text_pair': texts[2]}) + '\n')
    by_json = call_module('predict', '--workdir', work, '--input', tmp_path / 'in.jsonl', '--json')
    assert json.loads(by_json.stdout)['text_pair'] == texts[2]
    assert model([]) == []


def test_prediction_reads_as_much_as_fine_tuning_did(tuned, tmp_path):
    """A text longer than max_length is cut where it was cut then, also in a converted workdir."""
    convert.convert(str(tuned[0]), str(tmp_path / 'copy'), 'workdir')
    for work in (tuned[0], tmp_path / 'copy'):
        model = bert_jax.load(str(work))
        text = ' '.join(WORDS['spam'].split() * 30)
        assert model(text)['scores'] == model(text + ' import module package name' * 5)['scores']
        source = pretrained.load(str(work))
        assert source.about['config']['max_length'] == 32 and source.about['scores']['dev/accuracy'] > 0.9


def test_filling_masks(pretrained, tmp_path):
    model = bert_jax.load(str(pretrained))
    one = model('the [MASK] statement and the [MASK]', top_k=3)
    assert len(one['masks']) == 2 and all(len(mask) == 3 for mask in one['masks'])
    scores = [guess['score'] for guess in one['masks'][0]]
    assert scores == sorted(scores, reverse=True)
    many = model(['the [MASK] statement and the [MASK]', 'a much longer text ' * 9 + '[MASK].'], top_k=3)
    assert [g['token'] for g in many[0]['masks'][0]] == [g['token'] for g in one['masks'][0]]
    result = call_module('predict', '--workdir', pretrained, 'the [MASK] statement', '--top_k', '2')
    assert result.returncode == 0 and len(result.stdout.splitlines()) == 2
    expect_error(call_module('predict', '--workdir', pretrained, 'no mask'), 'no [MASK]')
    (tmp_path / 'in.txt').write_text('a [MASK]\n\nno mask\n')
    expect_error(call_module('predict', '--workdir', pretrained, '--input', tmp_path / 'in.txt'), 'in.txt:3: no [MASK]')
    expect_error(
        call_module('predict', '--workdir', pretrained, 'word ' * 200 + '[MASK]'), 'lies beyond the 128 tokens'
    )
    expect_error(call_module('predict', '--workdir', pretrained), 'No text')
    expect_error(call_module('predict', '--workdir', tmp_path, 'x'), 'no model there', 'expected a workdir')
    expect_error(call_module('predict', '--workdir', pretrained, '--input', tmp_path / 'none.txt'), 'none.txt')


@pytest.mark.parametrize('suffix', ['.csv', '.tsv', '.jsonl'])
@pytest.mark.parametrize('pair', [False, True])
def test_every_format_gives_the_same_rows(tmp_path, suffix, pair):
    path = write(tmp_path / f'a{suffix}', rows(60), pair=pair)
    data = tasks.TASKS['classification'](
        train_file=str(path),
        dev_file='',
        test_file='',
        text_column='body',
        text_pair_column='other' * pair,
        label_column='kind',
        labels=(),
        dev_share=0.3,
    )
    found = sorted((r.text, r.label) for split in ('train', 'dev') for r in data.splits[split])
    assert found == sorted(rows(60)) and data.labels == ('eggs', 'ham', 'spam')
    assert all(r.pair == (r.text[::-1] if pair else None) for r in data.splits['dev'])
    assert not {r.text for r in data.splits['dev']} & {r.text for r in data.splits['train']}
    assert 8 <= len(data.splits['dev']) <= 30


def encoded(vocab, lines, max_length=32, pair=None):
    data = [texts.Row(t, pair, 'a', '') for t in lines]
    return texts.encode(
        Task('classification', {}, ('a', 'b')), data, tokenizer.load(vocab), max_length, (16, max_length)
    )


def test_rows_become_cls_a_sep_b_sep(vocab):
    tok = tokenizer.load(vocab)
    batch = encoded(vocab, ['the import'], pair='the list').make(np.array([0]), 2)
    a, b = tok.encode('the import'), tok.encode('the list')
    ids = [tok.cls_id, *a, tok.sep_id, *b, tok.sep_id]
    n = len(ids)
    assert batch['input_ids'].shape == (2, 16) and batch['input_ids'][0, :n].tolist() == ids
    assert batch['segment_ids'][0].tolist() == [0] * (len(a) + 2) + [1] * (len(b) + 1) + [0] * (16 - n)
    assert batch['input_mask'].sum(1).tolist() == [n, 0] and batch['is_real_example'].tolist() == [1, 0]


def test_long_rows_lose_the_end_of_the_longer_text(vocab):
    tok = tokenizer.load(vocab)
    long = encoded(vocab, ['the ' * 50], pair='a a', max_length=20)
    ids = long.make(np.array([0]), 1)['input_ids'][0].tolist()
    assert long.truncated == 1 and len(ids) == 20
    assert ids == [tok.cls_id, *tok.encode('the ' * 15), tok.sep_id, *tok.encode('a a'), tok.sep_id]


def test_every_row_once_an_epoch_and_once_in_evaluation(vocab):
    data = encoded(vocab, [f'{"the " * (i % 23)} {i}' for i in range(101)])
    unique = {data.ids[a:b].tobytes() for a, b in zip(data.starts, data.starts[1:])}
    for epoch in (0, 1):
        seen = []
        for step in range(data.steps(8)):
            batch = data.batch(epoch * data.steps(8) + step, 8, seed=3)
            real = batch['is_real_example'] > 0
            seen += [ids[:n].tobytes() for ids, n in zip(batch['input_ids'][real], batch['input_mask'][real].sum(1))]
        assert len(seen) == 101 and set(seen) == unique
    assert not np.array_equal(data.batch(0, 8, 3)['input_ids'], data.batch(13, 8, 3)['input_ids'])
    again = data.batch(5, 8, 3)
    assert all(np.array_equal(again[k], data.batch(5, 8, 3)[k]) for k in again)
    numbers = np.concatenate([r for r, _ in data.evaluation_batches(8)])
    assert sorted(numbers) == list(range(101))


def bad(tmp_path, content, name='train.csv'):
    (tmp_path / name).write_text(content)
    return tmp_path / name


@pytest.mark.parametrize('content, words', [
    ('body,kind\na,x\nb\n', ('train.csv:3', '1 columns where the header has 2')),
    ('body,sort\na,x\n', ("no column 'kind'", 'body, sort')),
    ('body,kind\n', ('no rows',)),
    ('body,kind\na,x\nb,x\n', ('1 labels (x)',)),
    ('body,kind\na,x\nb,\nc,y\n', ('train.csv:3', 'no label')),
    ('body,kind\n"a,x\n', ('train.csv', 'CSV')),
    ('body,kind\na,x\nb,y\n', ('too few',)),
])
def test_bad_tables_name_file_and_line(pretrained, tmp_path, content, words):
    overrides = (
        ['--config.task.dev_share=0.0001']
        if 'too few' in words[0]
        else [f'--config.task.dev_file={bad(tmp_path, content, "dev.csv")}']
    )
    config = load_config(pretrained, bad(tmp_path, content), *overrides)
    with pytest.raises(UserError) as error:
        finetune.finetune(config, str(tmp_path / 'work'))
    assert all(word in str(error.value) for word in words), error.value
    assert not (tmp_path / 'work').exists()


def test_a_label_outside_the_label_set(pretrained, tmp_path):
    train, dev = bad(tmp_path, 'body,kind\na,x\nb,y\n'), bad(tmp_path, 'body,kind\na,x\nb,z\n', 'dev.csv')
    config = load_config(pretrained, train, f'--config.task.dev_file={dev}')
    with pytest.raises(UserError, match=r"dev\.csv:3: label 'z' is not in the label set: x, y"):
        finetune.finetune(config, str(tmp_path / 'work'))


@pytest.mark.parametrize('override, words', [
    ('task.train_file=missing.csv', ('missing.csv', 'No such file')),
    ('max_length=4000', ('max_length 4000', 'position table')),
    ('max_length=2', ('max_length=2', '8 or more')),
    ('num_lengths=0', ('num_lengths=0', '1 or more')),
    ('log_every=0', ('log_every=0', '1 or more')),
    ('dropout_rate=1.0', ('dropout_rate=1.0', '0 to 0.99')),
    ('dtype=bf16', ("Unknown dtype 'bf16'", 'bfloat16')),
    ('best=dev/loss', ('best=dev/loss', 'grows with quality')),
    ('best=accuracy', ('SPLIT/SCORE', 'dev')),
    ('best=dev/acuracy', ("'dev/acuracy'", 'dev/accuracy')),
    ('init_from=nowhere', ('nowhere',)),
    ('task.name=sentiment', ("Unknown task 'sentiment'", 'sst2')),
])
def test_what_cannot_run_is_refused(pretrained, tmp_path, override, words):
    config = load_config(pretrained, write(tmp_path / 'train.csv', rows(60)), f'--config.{override}')
    with pytest.raises(UserError) as error:
        finetune.finetune(config, str(tmp_path / 'work'))
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize('what', ['of another size', 'of the same size'])
def test_a_checkpoint_of_another_tokenizer(pretrained, tuned, tmp_path, what):
    """Its ids would mean other pieces: refused, whether the table shows it or only the run's own copy."""
    folder = tmp_path / 'model'
    shutil.copytree(pretrained if what == 'of another size' else tuned[0], folder)
    pieces = (folder / 'tokenizer' / 'vocab.txt').read_text().splitlines()
    if what == 'of another size':
        (folder / 'tokenizer' / 'vocab.txt').write_text('\n'.join(pieces[:-7]) + '\n')
        config = load_config(folder, write(tmp_path / 'train.csv', rows(60)))
        with pytest.raises(UserError, match='its tokenizer has 996 entries, but its embedding table 1003'):
            finetune.finetune(config, str(tmp_path / 'work'))
        assert not (tmp_path / 'work').exists()
    else:
        (folder / 'tokenizer' / 'vocab.txt').write_text('\n'.join([*pieces[:-2], pieces[-1], pieces[-2]]) + '\n')
        with pytest.raises(UserError, match='its tokenizer is not the one of the data'):
            finetune.finetune(cli.load_config(tuned[1][1], list(map(str, tuned[1][2:]))), str(folder))


def test_one_line_and_exit_code_2(pretrained, tmp_path):
    train = bad(tmp_path, 'body,kind\na,x\nb\n')
    expect_error(run_module('finetune', *settings(pretrained, train), '--workdir', tmp_path / 'work'), 'train.csv:3')


def test_invalid_utf8_in_a_table(tmp_path):
    (tmp_path / 'a.tsv').write_bytes(b'text\tlabel\nfine\t1\nb\xff\t0\n')
    with pytest.raises(UserError, match=r'a\.tsv:3: not valid UTF-8'):
        list(tables.read_table(str(tmp_path / 'a.tsv')))


def test_killing_is_not_losing(pretrained, tuned, tmp_path):
    """A process killed in the middle, started again, ends where the one that was left alone ended."""
    work, args = tuned
    other = tmp_path / 'other'
    command = [sys.executable, '-m', 'bert_jax.finetune', *map(str, args), '--workdir', str(other)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and (
        not (other / 'log.jsonl').exists() or (other / 'log.jsonl').read_text().count('dev/loss') < 3
    ):
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    result = run_module('finetune', *args, '--workdir', other)
    assert result.returncode == 0 and 'resuming at step' in result.stdout, result.stdout + result.stderr
    assert (other / 'log.jsonl').read_bytes() == (work / 'log.jsonl').read_bytes()
    assert (other / 'predictions_dev.tsv').read_bytes() == (work / 'predictions_dev.tsv').read_bytes()
