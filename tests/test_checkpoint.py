"""Checkpoints: flipped and cut bytes, unfinished saves, full disks, retention, warm starts."""

import json
import os
import shutil
import subprocess
import sys

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT

from bert_jax import checkpoint, run
from bert_jax.cli import UserError


@flax.struct.dataclass
class State:
    step: jax.Array
    params: dict
    opt_state: dict


def state(step=0, scale=1.0):
    return State(jnp.int32(step), {'a': {'kernel': jnp.arange(2000.0).reshape(40, 50) * scale}, 'b': jnp.ones(7)},
                 {'mu': jnp.full(30, scale)})


@pytest.fixture
def saved(tmp_path):
    checkpoints = checkpoint.Checkpoints(tmp_path / 'checkpoints', keep=2)
    for step in (10, 20, 30):
        checkpoints.save(step, state(step, step), {'dev/accuracy': step / 100})
    checkpoints.wait()
    return tmp_path / 'checkpoints'


def resumed(folder):
    return checkpoint.Checkpoints(folder).resume(state())


def same(a, b):
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, a, b)))


def test_saved_states_come_back_exactly_and_only_the_last_are_kept(saved):
    assert same(resumed(saved), state(30, 30.0))
    assert sorted(os.listdir(saved)) == ['00000020', '00000030']


def test_nothing_saved_is_a_fresh_start(tmp_path):
    assert same(resumed(tmp_path / 'none'), state())


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob('*') if p.is_file())


@pytest.mark.parametrize('damage', ['flip', 'cut', 'delete'])
def test_damage_in_every_file_is_noticed(saved, tmp_path, damage, capsys):
    names = files(saved / '00000030')
    assert len(names) > 5 and 'manifest.json' in names
    for name in names:
        copy = tmp_path / 'copy'
        shutil.copytree(saved, copy)
        path = copy / '00000030' / name
        content = bytearray(path.read_bytes())
        if damage == 'delete':
            path.unlink()
        elif damage == 'cut':
            path.write_bytes(content[:-1])
        elif content:
            content[len(content) // 2] ^= 1
            path.write_bytes(content)
        if damage == 'delete' or content:
            assert same(resumed(copy), state(20, 20.0)), name  # the one before it is used,
            assert 'checkpoint 30' in capsys.readouterr().err  # and that is said
        shutil.rmtree(copy)


def test_a_flip_anywhere_in_a_large_file_is_noticed(tmp_path):
    """Five megabytes that no compression makes smaller: first and last byte, and one of each half megabyte."""
    noise = np.random.default_rng(0).integers(0, 2**32, 1_300_000, np.uint32).view(np.float32)
    checkpoints = checkpoint.Checkpoints(tmp_path)
    checkpoints.save(1, State(jnp.int32(1), {'a': jnp.asarray(noise)}, {}))
    checkpoints.wait()
    path = max((tmp_path / '00000001').rglob('*'), key=lambda path: path.stat().st_size * path.is_file())
    size = path.stat().st_size
    assert size > 5_000_000 and not checkpoints.problem(1)
    with path.open('r+b') as file:
        for at in (0, *range(300_000, size, 500_000), size - 1):
            file.seek(at)
            byte = file.read(1)
            for content in (bytes([byte[0] ^ 1]), byte):
                file.seek(at)
                file.write(content)
                file.flush()
                assert checkpoints.problem(1).endswith('is damaged') == (content != byte), at


def test_a_flip_anywhere_in_a_manifest_is_noticed(saved):
    path = saved / '00000030' / 'manifest.json'
    content = path.read_bytes()
    for at in range(0, len(content), 3):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1:])
        assert checkpoint.Checkpoints(saved).problem(30) or json.loads(path.read_bytes()) == json.loads(content), at


def test_a_damaged_best_step_is_passed_over_and_said(tmp_path, capsys):
    checkpoints = checkpoint.Checkpoints(tmp_path / 'checkpoints', keep=3, best='dev/accuracy')
    for step, accuracy in ((1, 0.8), (2, 0.9), (3, 0.7)):
        checkpoints.save(step, state(step, step), {'dev/accuracy': accuracy})
    checkpoints.wait()
    assert checkpoint.load_params(tmp_path, 'dev/accuracy')[1] == 2
    damaged = next(path for path in (tmp_path / 'checkpoints' / '00000002' / 'params').rglob('*') if path.is_file())
    damaged.write_bytes(damaged.read_bytes()[:-1])
    params, step, scores = checkpoint.load_params(tmp_path, 'dev/accuracy')
    assert step == 1 and scores == {'dev/accuracy': 0.8} and same(params, state(1, 1.0).params)
    assert 'checkpoint 2' in capsys.readouterr().err
    (tmp_path / 'checkpoints' / '00000001' / 'manifest.json').write_text('{')
    assert checkpoint.load_params(tmp_path, 'dev/accuracy')[1] == 3


def test_an_unfinished_checkpoint_is_passed_over_and_made_again(saved, capsys):
    (saved / '00000030' / 'manifest.json').unlink()
    assert same(resumed(saved), state(20, 20.0))
    assert 'never finished' in capsys.readouterr().err
    checkpoints = checkpoint.Checkpoints(saved)
    checkpoints.save(30, state(30, 31.0))
    checkpoints.wait()
    assert same(resumed(saved), state(30, 31.0))


def test_what_was_never_finished_goes_with_the_next_save(saved):
    for name in ('00000035', '00000036.orbax-checkpoint-tmp', '00000037.orbax-checkpoint-tmp-3'):
        (saved / name / 'params').mkdir(parents=True)
    checkpoints = checkpoint.Checkpoints(saved, keep=2)
    checkpoints.save(40, state(40, 40.0))
    checkpoints.wait()
    assert sorted(os.listdir(saved)) == ['00000030', '00000040']


def test_a_finished_run_keeps_its_best_parameters_alone(saved):
    checkpoint.Checkpoints(saved, best='dev/accuracy').keep_best_params()
    assert os.listdir(saved) == ['00000030'] and not (saved / '00000030' / 'rest').exists()
    params, step, scores = checkpoint.load_params(saved.parent, best='dev/accuracy')
    assert step == 30 and scores == {'dev/accuracy': 0.3} and same(params, state(30, 30.0).params)
    assert same(resumed(saved), state())  # without optimizer state nothing goes on


def test_a_damaged_newer_step_does_not_push_out_good_ones(saved, capsys):
    """With one to keep: step 30 is damaged, 20 goes on; saving 25 must not leave the damaged one alone."""
    damaged = next(path for path in (saved / '00000030' / 'params').rglob('*') if path.is_file())
    damaged.write_bytes(damaged.read_bytes()[:-1])
    checkpoints = checkpoint.Checkpoints(saved, keep=1)
    assert same(checkpoints.resume(state()), state(20, 20.0)) and 'is damaged' in capsys.readouterr().err
    assert checkpoints.steps() == [20]
    checkpoints.save(25, state(25, 25.0))
    checkpoints.wait()
    assert checkpoints.steps() == [25] and same(resumed(saved), state(25, 25.0))


def test_the_best_is_kept_beside_the_last(tmp_path):
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=1, best='dev/accuracy')
    for step, accuracy in ((1, 0.5), (2, 0.9), (3, 0.9), (4, 0.7)):
        checkpoints.save(step, state(step), {'dev/accuracy': accuracy})
    checkpoints.wait()
    assert checkpoints.steps() == [2, 4] and checkpoints.best_step() == 2
    assert checkpoints.scores(2) == {'dev/accuracy': 0.9}


FULL_DISK = """
import resource, signal, sys
sys.path.insert(0, 'tests')
from test_checkpoint import checkpoint, state, same, resumed
import jax.numpy as jnp
from bert_jax import cli

folder = sys.argv[1]
checkpoints = checkpoint.Checkpoints(folder)
checkpoints.save(1, state(1))
checkpoints.wait()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # no file may grow beyond this, as on a full disk
kernel = __import__('numpy').random.default_rng(0).normal(size=(500, 500))
big = state(2).replace(params={'a': {'kernel': kernel}, 'b': jnp.ones(7)})

def save():
    checkpoints.save(2, big)
    checkpoints.wait()

cli.run(save)
"""


def test_a_full_disk_is_one_line_and_the_last_good_checkpoint_stays(tmp_path):
    done = subprocess.run(
        [sys.executable, '-c', FULL_DISK, str(tmp_path / 'c')],
        cwd=ROOT,
        text=True,
        capture_output=True,
        env=os.environ | {'PYTHONPATH': str(ROOT)},
    )
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith('error: ')]
    assert len(errors) == 1 and 'the last good checkpoint is step 1' in errors[0]
    assert 'Traceback' not in done.stderr
    assert same(resumed(tmp_path / 'c'), state(1))


def params(**changes):
    tree = {'embeddings': {'token': jnp.ones((4, 2))}, 'encoder': {'w': jnp.full((3, 3), 2.0)},
            'pooler': {'w': jnp.full(2, 3.0)}, 'targets_mlm': {'bias': jnp.full(4, 4.0)}}
    return tree | changes


def zeros(tree):
    return jax.tree.map(jnp.zeros_like, tree)


def test_a_warm_start_takes_all_both_have_and_says_the_rest(capsys):
    wanted = zeros(params(targets_new={'w': jnp.zeros(5)}))
    del wanted['targets_mlm']
    got = run.warm_start(wanted, params())
    assert same(
        {k: got[k] for k in ('embeddings', 'encoder', 'pooler')},
        {k: params()[k] for k in ('embeddings', 'encoder', 'pooler')},
    )
    assert not got['targets_new']['w'].any()
    assert capsys.readouterr().out.splitlines() == [
        'warm start, fresh: targets_new',
        'warm start, left behind: targets_mlm',
    ]
    fresh = run.warm_start(zeros(params()), params(), fresh=('targets_',))
    assert not fresh['targets_mlm']['bias'].any()


def test_anything_else_missing_left_over_or_misshapen_is_named():
    source = params(encoder={'v': jnp.ones(1)}, embeddings={'token': jnp.ones((5, 2))})
    with pytest.raises(UserError) as error:
        run.warm_start(params(), source)
    for words in ('encoder/w is missing from the checkpoint', 'encoder/v is in the checkpoint only',
                  'embeddings/token is (5, 2) in the checkpoint, (4, 2) here'):
        assert words in str(error.value)


def test_a_workdir_without_checkpoints(tmp_path):
    with pytest.raises(UserError, match='no finished checkpoint'):
        checkpoint.load_params(tmp_path)


def test_manifests_are_plain_json(saved):
    manifest = json.loads((saved / '00000030' / 'manifest.json').read_text())
    assert manifest['step'] == 30 and set(manifest['files']) == set(files(saved / '00000030')) - {'manifest.json'}
