"""launch/tpu.sh against a stand-in gcloud with the real one's flags; workers are folders with a stand-in python."""

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import time

import pytest
from conftest import ROOT

PYTHON = '''#!/bin/bash
echo "$@" >> .venv/python_calls
[ "$1" = -m ] || exit 0
echo "${JAX_COMPILATION_CACHE_DIR-}" > .venv/cache
trap 'exit 75' TERM
codes=$(cat .venv/codes); code=${codes%% *}; echo "${codes#* }" > .venv/codes
[ "$code" != wait2 ] || { trap 'exit 2' TERM; code=wait; }
[ "$code" != wait ] || { while true; do sleep 0.1; done; }
exit $code
'''


class Cloud:
    """Two workers, a bucket with a store, and what gcloud was asked."""

    def __init__(self, root):
        self.root = root
        (root / 'bin').mkdir()
        (root / 'bin' / 'gcloud').symlink_to(ROOT / 'tests' / 'gcloud')
        (root / 'bucket' / 'b' / 'store').mkdir(parents=True)
        (root / 'bucket' / 'b' / 'store' / 'store.json').write_text('{}')
        requirements = b''.join(path.read_bytes() for path in sorted(ROOT.glob('requirements*.txt')))
        for number in (0, 1):
            home = root / f'worker{number}' / 'bert_jax'
            (home / '.venv' / 'bin').mkdir(parents=True)
            (home / '.venv' / f'installed-{hashlib.sha256(requirements).hexdigest()[:16]}-requirements-tpu.txt').touch()
            (home / '.venv' / 'bin' / 'python').write_text(PYTHON)
            (home / '.venv' / 'bin' / 'python').chmod(0o755)
        self.states('ACTIVE')
        self.codes('0 0')

    def states(self, *names):
        (self.root / 'states').write_text('\n'.join(names))

    def codes(self, codes):
        for home in self.root.glob('worker*'):
            (home / 'bert_jax' / '.venv' / 'codes').write_text(codes + '\n')

    def __call__(self, *args, **kwargs):
        process = self.start(*args, **kwargs)
        stdout, stderr = process.communicate(timeout=120)
        return subprocess.CompletedProcess(args, process.returncode, stdout, stderr)

    def start(self, *args, polls='40'):
        env = os.environ | {
            'GCLOUD_ROOT': str(self.root),
            'PATH': f'{self.root}/bin:{os.environ["PATH"]}',
            'TPU_POLL_SECONDS': '0.2',
            'WORKER_PAUSE_SECONDS': '0.1',
            'TPU_POLLS': polls,
            'ZONE': 'us-west4-a',
            'PROJECT': 'mine',
        }
        return subprocess.Popen(
            ['bash', 'launch/tpu.sh', *args],
            cwd=ROOT,
            env=env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def calls(self, command=''):
        file = self.root / 'calls.jsonl'
        made = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        return [call for call in made if not command or command in call]

    def python(self, number):
        return (self.root / f'worker{number}' / 'bert_jax' / '.venv' / 'python_calls').read_text()


def wait_for(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.fixture
def cloud(tmp_path):
    yield Cloud(tmp_path)
    for home in tmp_path.glob('worker*'):  # whatever still waits
        subprocess.run(['bash', 'launch/worker.sh', 'stop'], cwd=home / 'bert_jax', capture_output=True)


RUN = (
    'run',
    'pod',
    '--store',
    'gs://b/store',
    '--workdir',
    'gs://b/run',
    '--',
    '--config',
    'configs/pretrain.py:base',
    '--config.phases=((1, 2, 3),)',
)


def test_shellcheck_has_nothing_to_say():
    done = subprocess.run(['shellcheck', *map(str, sorted(ROOT.glob('*/*.sh')))], text=True, capture_output=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    'args, flags',
    [
        (
            ('--type', 'v5litepod-16', '--spot'),
            {'--accelerator-type=v5litepod-16', '--runtime-version=v2-alpha-tpuv5-lite', '--node-id=pod', '--spot'},
        ),
        (
            ('--type', 'v4-64', '--version', 'mine'),
            {'--accelerator-type=v4-64', '--runtime-version=mine', '--node-id=pod'},
        ),
        (
            ('--type', 'v5litepod-256', '--slices', '2'),
            {
                '--accelerator-type=v5litepod-256',
                '--runtime-version=v2-alpha-tpuv5-lite',
                '--node-count=2',
                '--node-prefix=pod',
            },
        ),
    ],
)
def test_create(cloud, args, flags):
    done = cloud('create', 'pod', *args)
    assert done.returncode == 0, done.stderr
    (call,) = cloud.calls()
    assert call[:5] == ['compute', 'tpus', 'queued-resources', 'create', 'pod']
    assert set(call[5:]) == flags | {'--zone=us-west4-a', '--project=mine'}


def test_a_run_from_the_queue_to_the_end(cloud):
    """Waits for the slice; code 75 and a signal start all again; 0 ends it."""
    cloud.states('WAITING_FOR_RESOURCES', 'PROVISIONING', 'ACTIVE')
    cloud.codes('75 137 0')
    done = cloud(*RUN)
    assert done.returncode == 0, done.stderr
    assert 'pod is PROVISIONING' in done.stderr and 'the run has finished: gs://b/run' in done.stderr
    for number in (0, 1):
        home = cloud.root / f'worker{number}' / 'bert_jax'
        started = [line for line in cloud.python(number).splitlines() if 'bert_jax.pretrain' in line]
        assert (
            started
            == [
                f'-m bert_jax.pretrain --coordinator auto --join_seconds 1800 --workdir gs://b/run '
                f'--config.store={home}/run/store --config '
                'configs/pretrain.py:base --config.phases=((1, 2, 3),)'
            ]
            * 3
        )
        assert (home / 'run' / 'store' / 'store.json').exists() and (home / 'bert_jax' / 'pretrain.py').exists()
        assert not list((home).glob('.git/*'))
        assert (
            home / '.venv' / 'cache'
        ).read_text() == 'gs://b/run_xla\n'  # one for all: only the first of them writes


def test_a_slice_that_is_taken_away_is_asked_for_again(cloud):
    cloud.states('ACTIVE', 'ACTIVE', 'SUSPENDED', 'WAITING_FOR_RESOURCES', 'ACTIVE')
    cloud.codes('wait 0')
    done = cloud(*RUN)
    assert done.returncode == 0 and 'was taken away' in done.stderr, done.stderr
    order = [call[3] for call in cloud.calls() if call[3] in ('create', 'delete')]
    assert order == ['delete', 'create']
    (create,) = cloud.calls('create')
    assert {
        '--spot',
        '--accelerator-type=v5litepod-16',
        '--runtime-version=v2-alpha-tpuv5-lite',
        '--node-id=pod',
    } <= set(create)


def test_several_slices_come_back_as_several_and_a_failing_call_does_not_end_the_waiting(cloud):
    """The delete fails, so the name is still taken; then there is no capacity twice."""
    (cloud.root / 'slices').write_text('2')
    (cloud.root / 'fail').write_text('delete UNAVAILABLE: try later\ncreate@2 RESOURCE_EXHAUSTED: no capacity\n')
    (cloud.root / 'exists').touch()
    cloud.states('SUSPENDED', 'WAITING_FOR_RESOURCES', 'FAILED', 'WAITING_FOR_RESOURCES', 'ACTIVE')
    done = cloud(*RUN)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count('did not take the request; trying again') == 2 and 'still no capacity' in done.stderr
    assert 'Insufficient capacity.' in done.stderr
    assert [call[3] for call in cloud.calls() if call[3] in ('create', 'delete')] == ['delete', 'create'] * 4
    assert {'--node-count=2', '--node-prefix=pod', '--spot'} <= set(cloud.calls('create')[-1])


def test_a_slice_on_demand_comes_back_on_demand(cloud):
    (cloud.root / 'on_demand').touch()
    cloud.states('FAILED', 'ACTIVE')
    assert cloud(*RUN).returncode == 0
    (create,) = cloud.calls('create')
    assert '--spot' not in create and '--accelerator-type=v5litepod-16' in create


def test_a_slice_that_was_given_back_is_left_alone(cloud):
    cloud.codes('wait 0')
    (cloud.root / 'initiator').write_text('USER')
    for states, words in ((('ACTIVE', 'SUSPENDING'), 'was given back'), (('ACTIVE', 'DELETING'), 'is being deleted')):
        cloud.states(*states)
        done = cloud(*RUN)
        assert done.returncode == 0 and words in done.stderr and not cloud.calls('create'), done.stderr
    cloud.states('ACTIVE')
    (cloud.root / 'fail').write_text(
        '\n'.join(f'describe@{number} NOT_FOUND' for number in range(len(cloud.calls('describe')) + 2, 99))
    )
    done = cloud(*RUN, polls='3')
    assert done.returncode == 2 and 'does not say what pod is, 3 times in a row' in done.stderr, done.stderr


def test_a_run_keeps_its_code_and_gets_over_a_refused_connection(cloud):
    """After the slice was taken away: ssh is not there at once, and the checkout has changed meanwhile."""
    (cloud.root / 'fail').write_text('scp@2 Connection refused\nssh@4 Connection refused\n')
    cloud.states('ACTIVE', 'SUSPENDED', 'ACTIVE')
    cloud.codes('wait 0')
    watching, new = cloud.start(*RUN), ROOT / 'bert_jax' / 'made_meanwhile.txt'
    try:
        wait_for(lambda: cloud.calls('scp'))
        new.touch()
        _, stderr = watching.communicate(timeout=120)
    finally:
        new.unlink(missing_ok=True)
    assert watching.returncode == 0 and stderr.count('trying again') == 2 and 'the run has finished' in stderr, stderr
    assert not list(cloud.root.glob('worker*/bert_jax/bert_jax/made_meanwhile.txt'))


def test_five_short_lives_are_the_end(cloud):
    cloud.codes('137 139 134 75 137 0')
    done = cloud(*RUN)
    assert (
        done.returncode == 2 and 'the run failed on a worker' in done.stderr and 'tpu.sh delete pod' in done.stderr
    ), done.stderr
    assert cloud.python(0).count('bert_jax.pretrain') == 5


def test_a_stop_that_saved_nothing_is_no_success(cloud):
    cloud.codes('wait2 0')
    assert cloud(*RUN[:2], '--detach', *RUN[2:]).returncode == 0
    done = cloud('stop', 'pod')
    assert done.returncode == 2 and 'stopped with code 2' in done.stderr and 'had not saved' in done.stderr, done.stderr


def test_a_loop_that_is_gone_is_started_again(cloud):
    """As after a reboot: no exit code, nothing running."""
    cloud.codes('wait 0')
    watching = cloud.start(*RUN)
    loops = [home / 'bert_jax' / 'run' for home in sorted(cloud.root.glob('worker*'))]
    wait_for(
        lambda: all((run / 'pid').exists() and (run.parent / '.venv' / 'codes').read_text() == '0\n' for run in loops)
    )
    for name in ('loop', 'pid'):
        subprocess.run(['kill', '-KILL', (loops[0] / name).read_text().strip()], check=True)
    loops[1].joinpath('stopped').unlink(missing_ok=True)
    subprocess.run(
        ['kill', '-TERM', (loops[1] / 'pid').read_text().strip()], check=True
    )  # it notices, and asks to be started again
    _, stderr = watching.communicate(timeout=60)
    assert watching.returncode == 0 and 'gone from a worker' in stderr and 'the run has finished' in stderr, stderr
    assert cloud.python(0).count('bert_jax.pretrain') == 2 <= cloud.python(1).count('bert_jax.pretrain')


def test_a_worker_that_does_not_answer_is_asked_again_but_not_for_ever(cloud):
    cloud.codes('wait 0')
    (cloud.root / 'fail').write_text('ssh@3 lost\nssh@4 lost\ndescribe@3 UNAVAILABLE\n')
    watching = cloud.start(*RUN)
    wait_for(lambda: len(cloud.calls('ssh')) > 5)
    assert cloud('stop', 'pod').returncode == 0
    _, stderr = watching.communicate(timeout=60)
    assert (
        watching.returncode == 0
        and stderr.count('does not answer; trying again') == 2
        and 'the run was stopped' in stderr
    ), stderr
    (cloud.root / 'fail').write_text(
        '\n'.join(f'ssh@{number} lost' for number in range(len(cloud.calls('ssh')) + 3, 100))
    )
    cloud.codes('wait 0')
    done = cloud(*RUN, polls='3')
    assert (
        done.returncode == 2 and 'no answer 3 times in a row' in done.stderr and 'tpu.sh delete pod' in done.stderr
    ), done.stderr


def test_without_a_key_in_the_agent_nobody_is_reached_and_it_is_said(cloud):
    (cloud.root / 'no_key').touch()
    done = cloud(*RUN)
    assert done.returncode == 2 and 'ssh-add' in done.stderr, done.stderr


def test_run_given_twice_joins_the_run_that_goes_on(cloud):
    cloud.codes('wait 0')
    assert cloud(*RUN[:2], '--detach', *RUN[2:]).returncode == 0
    again = cloud(*RUN[:2], '--detach', *RUN[2:])
    assert again.returncode == 0 and again.stdout.count('already running') == 2, again.stderr
    for number in (0, 1):
        assert cloud.python(number).count('bert_jax.pretrain') == 1
    cloud('stop', 'pod')


def test_a_worker_with_an_old_python_gets_a_new_one(tmp_path):
    """Ubuntu 22.04 has 3.10, too old for jax: uv brings another."""
    home, bin_ = tmp_path / 'bert_jax', tmp_path / 'bin'
    shutil.copytree(ROOT / 'launch', home / 'launch')
    bin_.mkdir()
    (home / 'requirements-tpu.txt').write_text('')
    old = '#!/bin/bash\necho "$@" >> "$HOME/calls"\n[ "$1" != -c ]\n'
    new = '#!/bin/bash\necho "$@" >> "$HOME/calls"\n[ "$1" != -c ] || echo 0.0.42.1\n'
    uv = (
        '#!/bin/bash\necho uv "$@" >> "$HOME/calls"\nmkdir -p .venv/bin\nfor one in python pip; do '
        f'printf %s {shlex.quote(new)} > .venv/bin/$one; chmod +x .venv/bin/$one; done\n'
    )
    for name, script in {'python3': old, 'python3.11': old, 'python3.12': old, 'python3.13': old, 'uv': uv}.items():
        (bin_ / name).write_text(script)
        (bin_ / name).chmod(0o755)
    (bin_ / 'curl').write_text('#!/bin/bash\necho v6e-16\n')
    (bin_ / 'curl').chmod(0o755)
    done = subprocess.run(['bash', 'launch/worker.sh', 'setup'], cwd=home, text=True, capture_output=True,
                          env={'HOME': str(tmp_path), 'PATH': f'{bin_}:/usr/bin:/bin'})
    calls = (tmp_path / 'calls').read_text()
    assert '-m pip install --quiet --no-deps libtpu==0.0.43.*' in calls  # what 0.0.42 has is not for v6e
    assert done.returncode == 0 and '-m pip install --quiet --user uv' in calls and 'uv venv' in calls, (
        done.stderr + calls
    )


def test_a_run_that_fails_says_so_with_its_last_lines(cloud):
    cloud.codes('2 0')
    done = cloud(*RUN)
    assert done.returncode == 2 and 'the run failed on a worker' in done.stderr
    assert 'pretrain ended with code 2' in done.stdout


def test_stop_lets_the_run_save_and_does_not_start_it_again(cloud):
    cloud.codes('wait 0')
    assert cloud(*RUN[:2], '--detach', *RUN[2:]).returncode == 0
    done = cloud('stop', 'pod')
    assert done.returncode == 0 and 'a checkpoint is saved' in done.stderr, done.stderr
    said = subprocess.run(
        ['bash', 'launch/worker.sh', 'status'], cwd=cloud.root / 'worker0' / 'bert_jax', text=True, capture_output=True
    )
    assert said.stdout == 'stopped\n'
    assert cloud.python(0).count('bert_jax.pretrain') == 1


@pytest.mark.parametrize('fail, words', [
    ('create RESOURCE_EXHAUSTED: Quota limit', ('did not take the request', 'Quota limit')),
    ('scp Connection timed out', ('did not reach every worker', 'Connection timed out')),
    ('ssh worker 1: lost', ('the installation failed', 'worker 1: lost')),
    ('describe NOT_FOUND', ('cannot describe', 'NOT_FOUND'))])
def test_what_gcloud_refuses_ends_with_a_reason(cloud, fail, words):
    (cloud.root / 'fail').write_text(fail)
    done = cloud('create', 'pod', '--type', 'v4-64') if fail.startswith('create') else cloud(*RUN)
    assert done.returncode == 2 and all(word in done.stderr for word in words), done.stderr


def test_dry_run_prints_every_call_and_makes_none(cloud):
    done = cloud(*RUN[:2], '--dry_run', *RUN[2:])
    assert done.returncode == 0 and not cloud.calls(), done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[4] for line in lines] == ['describe', 'scp', 'ssh', 'ssh']
    assert '--node=all --worker=all' in lines[-1] and 'worker.sh' in lines[-1] and '--zone=us-west4-a' in lines[-1]
    for action, command in (
        ('create', 'create'),
        ('logs', 'ssh'),
        ('stop', 'ssh'),
        ('delete', 'delete'),
        ('ssh', 'ssh'),
    ):
        done = cloud(action, 'pod', '--dry_run', *(('--type', 'v4-64') if action == 'create' else ()))
        assert f' {command} pod ' in done.stdout and not cloud.calls(), done.stderr


@pytest.mark.parametrize(
    'args, words',
    [
        (('create', 'pod'), 'create needs --type'),
        (('create',), "needs the slice's NAME"),
        (('make', 'pod'), 'unknown action make'),
        (('run', 'pod', '--store', 'gs://b/s'), 'run needs --store'),
        (('run', 'pod', '--spots'), 'unknown option --spots'),
        (('run', 'pod', '--store', 'a', '--workdir', 'b'), 'arguments after --'),
        (('create', 'pod', '--slices', 'x'), 'a number is expected'),
        (('create', 'pod', '--type'), '--type needs a value'),
    ],
)
def test_bad_arguments(cloud, args, words):
    done = cloud(*args)
    assert done.returncode == 2 and words in done.stderr and not cloud.calls()
    assert len(done.stderr.splitlines()) == 1


def test_the_stand_in_rejects_what_gcloud_would(cloud):
    env = os.environ | {'GCLOUD_ROOT': str(cloud.root)}
    for args in (
        ('create', 'a', '--accelerator-type=v4-8', '--runtime-version=x', '--node-id=a', '--preemptible'),
        ('create', 'a'),
        ('destroy', 'a'),
    ):
        done = subprocess.run(
            [shutil.which('python3'), ROOT / 'tests' / 'gcloud', 'compute', 'tpus', 'queued-resources', *args],
            env=env,
            text=True,
            capture_output=True,
        )
        assert done.returncode == 1 and 'ERROR' in done.stderr
