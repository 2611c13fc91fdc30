"""Runs really killed, started again, end bit-identical to one that was never stopped. Dropout is on."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from conftest import LONG, ROOT, TINY, call_module, expect_error, run_module

from bert_jax import checkpoint, cli, optimizer, partition, prepare, pretrain, train, workdir
from bert_jax.data import corpora, examples, store
from bert_jax.model import model as models

ENV = os.environ | {'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'}


PHASE_1 = 6  # steps, of TINY


def command(store_path, work, *overrides):
    return [
        '--config',
        'configs/pretrain.py:tiny',
        f'--config.store={store_path}',
        '--workdir',
        str(work),
        *TINY,
        *overrides,
    ]


def kill_when(args, condition):
    """Starts the run and sends SIGKILL as soon as `condition` holds."""
    process = subprocess.Popen([sys.executable, '-m', 'bert_jax.pretrain', *args], cwd=ROOT, env=ENV,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not condition():
        assert process.poll() is None, 'the run ended before it could be killed'
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()


def final(work):
    params, step, _ = checkpoint.load_params(work)
    return params, step, (work / 'log.jsonl').read_bytes()


def assert_same(work, reference):
    (a, step_a, log_a), (b, step_b, log_b) = final(work), final(reference)
    assert step_a == step_b == 10 and log_a == log_b

    def walk(x, y, path=''):
        if isinstance(x, dict):
            assert x.keys() == y.keys()
            for key in x:
                walk(x[key], y[key], f'{path}/{key}')
        else:
            np.testing.assert_array_equal(x, y, err_msg=path)

    walk(a, b)
    rest_a, rest_b = (checkpoint.Checkpoints(w / 'checkpoints').restore(10, 'rest') for w in (work, reference))
    walk(rest_a['opt_state'][1], rest_b['opt_state'][1])


def log_steps(work):
    file = work / 'log.jsonl'
    return (
        [json.loads(line)['step'] for line in file.read_text().splitlines() if line.endswith('}')]
        if file.exists()
        else []
    )


def manifest(work, step):
    return (work / 'checkpoints' / f'{step:08d}' / 'manifest.json').exists()


def test_killed_in_each_phase_and_during_a_save(store_path, pretrained, tmp_path):
    work = tmp_path / 'killed'
    args = command(store_path, work)
    kill_when(args, lambda: manifest(work, 2) and 4 in log_steps(work))        # phase 1
    assert max(log_steps(work)) <= PHASE_1
    for _ in range(5):  # a kill can come late where much else runs
        kill_when(
            args, lambda: any((work / 'checkpoints').glob('*6*')) and not manifest(work, 6)
        )  # while saving step 6
        if not manifest(work, 6):
            break
        shutil.rmtree(work / 'checkpoints' / '00000006')
    assert not manifest(work, 6)
    kill_when(args, lambda: manifest(work, 8))                                 # phase 2
    assert not manifest(work, 10)
    result = run_module('pretrain', *args, '--config.pipeline=tf')             # the same batches from either pipeline
    assert result.returncode == 0, result.stderr
    assert 'resuming at step 8' in result.stdout
    assert_same(work, pretrained)
    again = call_module('pretrain', *args)                                     # a finished run is left as it is
    assert again.returncode == 0 and 'resuming at step 10 of 10' in again.stdout
    assert_same(work, pretrained)


def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_it_used(store_path, pretrained, tmp_path):
    work = tmp_path / 'damaged'
    subprocess.run(['cp', '-r', pretrained, work], check=True)
    victim = max(
        (work / 'checkpoints' / '00000010' / 'params').rglob('*'), key=lambda p: p.stat().st_size * p.is_file()
    )
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 16
    victim.write_bytes(content)
    result = run_module('pretrain', *command(store_path, work))
    assert result.returncode == 0, result.stderr
    assert 'checkpoint 10' in result.stderr and 'is damaged' in result.stderr and 'resuming at step 8' in result.stdout
    assert_same(work, pretrained)


def test_dropout_is_on_in_the_run_that_all_others_must_equal(store_path, pretrained):
    """Its last two steps, made again, have the loss that it wrote; with other masks they have another."""
    config, data = workdir.read_config(str(pretrained)), store.load(store_path)
    model, tx = models.build(config.model), optimizer.make_optimizer(**config.optimizer)
    *_, phase = pretrain.make_phases(config.phases)
    stream = examples.mixed([data.train], data.tokenizer, config.seed, phase.max_length, **config.examples)
    mesh = partition.make_mesh(())
    state = train.make_init(model, tx, examples.empty(1, 64, **config.examples), mesh)(0)
    step = train.make_train_step(model, tx, mesh, 1, state)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    saved, losses = checkpoint.Checkpoints(pretrained / 'checkpoints'), {}
    for seed in (config.seed, config.seed + 1):
        rest = saved.restore(8, 'rest', {'step': abstract.step, 'opt_state': abstract.opt_state})
        state = train.TrainState(params=saved.restore(8, 'params', abstract.params), **rest)
        metrics = []
        for number in (8, 9):
            rate = optimizer.learning_rate(number, num_steps=10, **config.schedule)
            batch = pretrain._make_batch(stream, phase, np.arange(phase.batch_size), number - phase.first)
            state, found = step(state, {'text': batch}, train.as_hyper(rate, models.target_weights(config.model), seed))
            metrics.append(float(found['loss'].total))
        losses[seed] = np.mean(metrics)
    written = [record['loss'] for record in map(json.loads, (pretrained / 'log.jsonl').read_text().splitlines())
               if record['step'] == 10 and 'loss' in record]
    assert written == [pytest.approx(losses[config.seed], rel=1e-6)]
    assert abs(losses[config.seed + 1] - losses[config.seed]) > 1e-4


def test_the_workdir_tells_the_whole_story(pretrained):
    names = {p.name for p in pretrained.iterdir()}
    assert names >= {'config.json', 'environment.json', 'tokenizer', 'checkpoints', 'log.jsonl', 'rates.jsonl',
                     'tensorboard', 'results.json', 'curves.png'}
    environment = json.loads((pretrained / 'environment.json').read_text())
    assert environment['packages']['jax'] and '--workdir' in environment['command']
    records = [json.loads(line) for line in (pretrained / 'log.jsonl').read_text().splitlines()]
    assert [r['step'] for r in records if 'loss' in r] == [2, 4, 6, 8, 10]
    results = json.loads((pretrained / 'results.json').read_text())
    assert results.keys() >= {'held_out/mlm/loss', 'held_out/mlm/unigram_loss', 'held_out/nsp/accuracy'}
    assert workdir.read_config(str(pretrained)).model.embeddings.vocab_size == 1003
    assert (pretrained / 'curves.png').read_bytes().startswith(b'\x89PNG')
    assert sorted(p.name for p in (pretrained / 'checkpoints').iterdir()) == ['00000006', '00000008', '00000010']


def test_another_config_in_the_same_workdir_is_refused_and_the_keys_named(store_path, pretrained):
    result = call_module(
        'pretrain', *command(store_path, pretrained, '--config.seed=7', '--config.schedule.warmup_share=0.3')
    )
    expect_error(result, 'seed (0 there, 7 now)', 'schedule.warmup_share (0.2 there, 0.3 now)')


def test_evaluation_does_not_depend_on_the_seed(store_path, pretrained, tmp_path):
    """Held-out masks are the same in every run: so is the unigram model's score on them."""
    work = tmp_path / 'other'
    result = call_module(
        'pretrain', *command(store_path, work, '--config.seed=1', '--config.phases=((2,64,8),(2,96,8))')
    )
    assert result.returncode == 0, result.stderr
    one, other = (json.loads((w / 'results.json').read_text()) for w in (work, pretrained))
    assert one['held_out/mlm/unigram_loss'] == other['held_out/mlm/unigram_loss']
    assert one['held_out/mlm/loss'] != other['held_out/mlm/loss']


@pytest.mark.parametrize('option', [pytest.param('tiny', marks=LONG), 'tiny,no_nsp'])
def test_continued_pretraining_on_other_text_with_or_without_nsp(vocab, store_path, pretrained, tmp_path, option):
    work, other = tmp_path / 'continued', tmp_path / 'other'
    text = (ROOT / 'README.md').read_text().replace('## ', '\n\n')
    (tmp_path / 'other.txt').write_text(text)
    prepare.prepare([str(tmp_path / 'other.txt')], str(vocab), str(other), corpora.Reader('paragraphs'), 0.3)
    args = command(other, work, f'--config.init_from={pretrained}', '--config.phases=((2,64,8),)', '--config.seed=3')
    args[1] = f'configs/pretrain.py:{option}'
    result = run_module('pretrain', *args)
    assert result.returncode == 0, result.stderr
    left = 'warm start, left behind: pooler, targets_nsp'
    assert (left in result.stdout) == ('no_nsp' in option) and 'fresh' not in result.stdout
    before, after = (workdir.read_config(str(w)).store_hash for w in (pretrained, work))
    assert before == store.load(store_path).info['sha256'] != after == store.load(other).info['sha256']


def test_a_loss_that_is_not_finite_stops_with_step_batch_and_last_checkpoint(store_path, tmp_path):
    work = tmp_path / 'nan'
    args = command(store_path, work, '--config.schedule.peak=1e30', '--config.optimizer.clip_norm=0.0')
    result = call_module('pretrain', *args)
    expect_error(result, 'not finite at step 3 (batch number 2)', 'the last good checkpoint is step 2')
    steps = checkpoint.Checkpoints(work / 'checkpoints').steps()
    assert steps == [2]
    assert all(
        np.isfinite(x).all()
        for s in steps
        for x in np.array(
            [
                np.abs(v).max()
                for v in checkpoint.Checkpoints(work / 'checkpoints')
                .restore(s, 'params')['encoder']['layers']['mlp']['up']
                .values()
            ]
        )
    )


@pytest.mark.parametrize('override, words', [
    ('phases=((6,600,8),)', ('max_length 600', 'position table', '128')),
    ('phases=((6,64,7),)', ('A batch of 7', 'nearest is 8')),
    ('eval_batch_size=0', ('eval_batch_size',)),
    ('optimizer.name=adam', ("Unknown optimizer 'adam'", 'adamw')),
    ('masking=words', ("Unknown masking 'words'", 'whole_word')),
    ('pipeline=tfds', ("Unknown pipeline 'tfds'", 'thread')),
    ('pairing=single', ('nsp', 'no_nsp')),
    ('pairing=next', ("Unknown pairing 'next'", 'next_sentence')),
    ('phases=((6,7,8),)', ('7',)),
    ('save_every=3', ('save_every 3', 'log_every 2')),
    ('mesh=(3,1,1)', ('needs 3 devices',)),
    ('store=nowhere', ('nowhere', 'no finished store')),
    ('init_from=nowhere', ('nowhere', 'no such folder')),
    ('model.embeddings.vocab_size=999', ('vocab_size 999', '1003 in the tokenizer')),
    ('schedule.peek=1', ("Unknown config key 'schedule.peek'", 'schedule.peak')),
    ('accumulation=x', ('accumulation',)),
    ('save_every=0', ('save_every=0', '1 or more')),
    ('mask_rate=15.0', ('mask_rate=15.0', '0.001 to 1')),
    ('replacement=(80,10)', ('replacement (80, 10)', 'together 1')),
    ('phases=((0,64,8),)', ('each 1 or more',)),
    ('seed=-1', ('seed=-1',)),
    ('mesh=(0,-1,1)', ('mesh', 'devices')),
    ('model.run.dtype=bf16', ("Unknown dtype 'bf16'", 'bfloat16')),
])
def test_what_cannot_run_is_refused(store_path, tmp_path, override, words):
    extra = ['--config.accumulation=2'] if '((6,64,7)' in override else []
    with pytest.raises(cli.UserError) as error:
        config = cli.load_config('configs/pretrain.py:tiny',
                                 [f'--config.store={store_path}', *TINY, *extra, f'--config.{override}'])
        pretrain.pretrain(config, str(tmp_path / 'work'))
    assert all(word in str(error.value) for word in words), error.value
    assert not (tmp_path / 'work').exists()


def test_a_refusal_is_one_line_and_exit_code_2(store_path, tmp_path):
    expect_error(call_module('pretrain', *command(store_path, tmp_path / 'work', '--config.sed=1')),
                 "Unknown config key 'sed'", 'seed')
    expect_error(
        call_module('pretrain', '--config', 'configs/pretrain.py:huge', '--workdir', tmp_path / 'work'), 'huge', 'large'
    )
    expect_error(
        call_module('pretrain', '--config', 'configs/none.py', '--workdir', tmp_path / 'work'), 'configs/none.py'
    )


def test_two_stores_in_one_run_resume_exactly_and_are_scored_apart(store_path, vocab, tmp_path):
    (tmp_path / 'other.txt').write_text((ROOT / 'README.md').read_text().replace('## ', '\n\n'))
    other = tmp_path / 'other'
    prepare.prepare([str(tmp_path / 'other.txt')], str(vocab), str(other), corpora.Reader('paragraphs'), 0.3)
    mixed = [
        f'--config.store={store_path},{other}',
        '--config.examples.mixture=(3,1)',
        '--config.phases=((6,64,8),)',
        '--config.eval_every=6',
    ]
    whole, halves = tmp_path / 'whole', tmp_path / 'halves'
    for work, overrides in ((whole, ()), (halves, ())):
        assert call_module('pretrain', *command(store_path, work, *mixed, *overrides)).returncode == 0
        if work == halves:
            shutil.rmtree(work / 'checkpoints' / '00000006')
            assert call_module('pretrain', *command(store_path, work, *mixed)).returncode == 0
    assert (whole / 'log.jsonl').read_text() == (halves / 'log.jsonl').read_text()
    results = json.loads((whole / 'results.json').read_text())
    assert {'held_out[other]/mlm/loss', f'held_out[{store_path.name}]/mlm/loss'} <= results.keys()
    assert results['held_out[other]/mlm/loss'] != results[f'held_out[{store_path.name}]/mlm/loss']


def test_stores_of_different_tokenizers_are_refused(store_path, sentencepiece_vocab, corpus, tmp_path):
    prepare.prepare([str(corpus)], str(sentencepiece_vocab), str(tmp_path / 'other'), corpora.Reader(), 0.15)
    result = call_module(
        'pretrain', *command(store_path, tmp_path / 'w', f'--config.store={store_path},{tmp_path}/other')
    )
    expect_error(result, 'other with tokenizer', 'the stores of one run need one tokenizer')
