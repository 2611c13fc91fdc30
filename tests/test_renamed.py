"""Config keys of older versions."""

import json
import shutil

import pytest
from conftest import ROOT, TINY, call_module

from bert_jax import cli, renamed, workdir
from bert_jax.formats import pretrained as sources

PRETRAIN = str(ROOT / 'configs/pretrain.py')


def test_old_names_on_the_command_line_are_the_new_ones():
    values = {'replacement': '(0.5,0.5)', 'pairing': 'single', 'masking': 'whole_word', 'model.dtype': 'bfloat16',
              'model.encoder.attention': 'xla', 'model.encoder.remat': 'full', 'model.encoder.unroll': '3'}
    for old, new in (renamed.PRETRAINING | renamed.RUN).items():
        given = [cli.load_config(PRETRAIN, [f'--config.{key}={values.get(old, "1")}']) for key in (old, new)]
        assert given[0] == given[1] != cli.load_config(PRETRAIN, [])
    assert not cli.load_config(str(ROOT / 'configs/finetune.py'), ['--config.packed=False']).packed  # another one's


def test_a_config_of_an_older_version_says_the_same_by_the_new_names():
    now = cli.load_config(PRETRAIN + ':tiny,packed', []).to_dict()
    old = {key: value for key, value in now.items() if key != 'examples'}
    old |= {name: now['examples'][new.removeprefix('examples.')] for name, new in renamed.PRETRAINING.items()}
    found = renamed.current(old)
    assert found | {'examples': found['examples'] | {'mixture': ()}} == now and renamed.current(now) is now


def test_the_config_that_commit_e8ccb58_wrote():
    """Its config.json, as it lay in a workdir, says what the same command says now."""
    old = json.loads((ROOT / 'tests/config_of_e8ccb58.json').read_text())
    given = [
        f'--config.{one}'
        for one in (
            'store=STORE',
            'phases=((6,64,8),(4,96,8))',
            'model.encoder.num_layers=2',
            'model.embeddings.hidden_size=32',
            'model.encoder.num_heads=2',
            'model.embeddings.max_length=128',
            'log_every=2',
            'save_every=2',
            'eval_every=4',
            'eval_examples=12',
            'eval_batch_size=8',
            'pipeline=thread',
            'model.encoder.remat=dots',
            'model.dtype=float32',
            'model.embeddings.vocab_size=30522',
        )
    ]
    now = cli.load_config(PRETRAIN + ':tiny', given)
    with now.unlocked():
        now.store_hash = 'HASH'
    assert 'attention' in old['model']['encoder'] and renamed.current(old) == workdir.describe(now)


def as_before(described):
    """A config.json as e8ccb58 would have written it."""
    model = {key: value for key, value in described['model'].items() if key != 'run'}
    run, encoder = described['model']['run'], {key: value for key, value in model['encoder'].items() if key != 'sees'}
    encoder |= {'attention': run['kernel'], 'unroll': run['unroll'], 'remat': run['remat'], 'layer_outputs': []}
    return described | {'model': model | {'dtype': run['dtype'], 'encoder': encoder}}


def test_a_workdir_begun_before_is_gone_on_with_and_read(store_path, pretrained, tmp_path):
    """Resumed at step 8 by the command of then it ends as it would have; prediction and fine-tuning take it."""
    work = tmp_path / 'work'
    shutil.copytree(pretrained, work)
    shutil.rmtree(work / 'checkpoints/00000010')
    described = json.loads((work / 'config.json').read_text())
    (work / 'config.json').write_text(json.dumps(as_before(described)))
    model = sources.load(str(work)).config
    assert (
        model.run.unroll == described['model']['run']['unroll']
        and 'dtype' not in model
        and model.encoder.sees == 'both'
    )
    done = call_module(
        'pretrain',
        '--config',
        'configs/pretrain.py:tiny',
        f'--config.store={store_path}',
        '--workdir',
        work,
        *TINY,
        '--config.model.encoder.unroll=1',
        '--config.model.encoder.remat=full',
        '--config.model.encoder.attention=xla',
    )
    assert done.returncode == 0 and 'resuming at step 8 of 10' in done.stdout, done.stderr
    logs = [
        [json.loads(line) for line in (folder / 'log.jsonl').read_text().splitlines()] for folder in (work, pretrained)
    ]
    assert [line['step'] for line in logs[0]] == [line['step'] for line in logs[1]]
    for found, expected in zip(*logs):
        assert found == pytest.approx(expected, rel=1e-4)
    assert json.loads((work / 'config.json').read_text())['model']['run'] == {
        'dtype': 'float32', 'kernel': 'xla', 'unroll': 1, 'remat': 'full'}
