"""Many real processes, each with its own folder, HOME and copy of the store; only the workdir is common.

BERT_JAX_LONG_TESTS=1 adds 4 processes, every combination of who saves and who resumes, and a process that hangs.
"""

import contextlib
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT, TINY, expect_error

from bert_jax import distributed

DEVICES = 2  # of each process
LONG = bool(os.environ.get('BERT_JAX_LONG_TESTS'))
SETTINGS = [
    *(one for one in TINY if not one.startswith(('--config.phases', '--config.log_every', '--config.save_every'))),
    '--config.log_every=1',
    '--config.save_every=40',
    '--config.model.embeddings.dropout_rate=0.0',
]


class Hosts:
    """Starts `count` processes on one run; `wait` gives what became of each."""

    def __init__(self, folder, store, work, count, *args, steps=40, **each):
        with contextlib.closing(socket.socket()) as free:
            free.bind(('127.0.0.1', 0))
            port = free.getsockname()[1]
        self.processes = []
        for i in range(count):
            home = folder / f'host{count}{i}'
            if not home.exists():
                shutil.copytree(store, home / 'store')
            command = [
                sys.executable,
                '-m',
                'bert_jax.pretrain',
                '--config',
                ROOT / 'configs/pretrain.py:tiny',
                *SETTINGS,
                f'--config.store={home / "store"}',
                f'--config.phases=(({steps},64,8),)',
                '--workdir',
                work,
                '--heartbeat_seconds',
                '10',
                '--join_seconds',
                '60',
                *args,
                *each.get(f'on_{i}', ()),
            ]
            if count > 1:
                command += ['--coordinator', f'127.0.0.1:{port}', '--num_processes', str(count), '--process_id', str(i)]
            env = os.environ | {
                'PYTHONPATH': str(ROOT),
                'HOME': str(home),
                'XLA_FLAGS': f'{os.environ["XLA_FLAGS"]} --xla_force_host_platform_device_count={DEVICES}',
            }
            self.processes.append(subprocess.Popen(list(map(str, command)), cwd=home, env=env, text=True,
                                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE))

    def wait(self):
        return [subprocess.CompletedProcess((), p.wait(300), *p.communicate()) for p in self.processes]


def log(work):
    return [json.loads(line) for line in (work / 'log.jsonl').read_text().splitlines()]


def wait_for_step(hosts, work, step):
    end = time.monotonic() + 200
    while not (work / 'log.jsonl').exists() or len(log(work)) < step:
        assert time.monotonic() < end and any(p.poll() is None for p in hosts.processes), [
            p.stderr.read() for p in hosts.processes
        ]
        time.sleep(0.05)


def assert_same_course(work, reference):
    """The same examples at every step (what is counted in them is equal to the bit), and losses to 1e-5."""
    ours, theirs = log(work), log(reference)
    assert [one['step'] for one in ours] == [one['step'] for one in theirs]
    for name in ('tokens', 'squared_tokens', 'predictions', 'examples'):
        assert [one[name] for one in ours if name in one] == [one[name] for one in theirs if name in one], name
    for one, other in zip(ours, theirs):
        for name in other.keys() & one.keys():
            np.testing.assert_allclose(one[name], other[name], rtol=1e-5, err_msg=f'{name} at {other["step"]}')


@pytest.fixture(scope='module')
def reference(store_path, tmp_path_factory):
    """One process, from beginning to end."""
    folder = tmp_path_factory.mktemp('reference')
    (done,) = Hosts(folder, store_path, folder / 'work', 1).wait()
    assert done.returncode == 0, done.stderr
    return folder / 'work'


def test_two_processes_stop_at_one_step_and_one_goes_on(store_path, reference, tmp_path):
    """SIGTERM to one of them; both save step n and say 75; the courses joined are the course of one process.

    The two split parameters between them, and heads and vocabulary within; the one that goes on is data-parallel.
    """
    hosts = Hosts(tmp_path, store_path, tmp_path / 'work', 2, '--config.mesh=(1,2,2)')
    wait_for_step(hosts, tmp_path / 'work', 3)
    hosts.processes[1].send_signal(signal.SIGTERM)
    done = hosts.wait()
    assert [one.returncode for one in done] == [75, 75], [one.stderr for one in done]
    steps = sorted(p.name for p in (tmp_path / 'work' / 'checkpoints').iterdir())
    assert len(steps) == 1 and 3 <= int(steps[0]) < 40
    assert all(f'step {int(steps[0])} of 40 is saved' in one.stderr for one in done)
    (done,) = Hosts(tmp_path, store_path, tmp_path / 'work', 1).wait()
    assert done.returncode == 0 and f'resuming at step {int(steps[0])} of 40' in done.stdout, done.stderr
    assert_same_course(tmp_path / 'work', reference)


@pytest.mark.skipif(not LONG, reason='takes minutes; BERT_JAX_LONG_TESTS=1 runs it')
@pytest.mark.parametrize('how', [signal.SIGKILL, signal.SIGSTOP])
def test_the_others_end_when_one_dies_or_hangs_and_all_go_on(store_path, reference, tmp_path, how):
    often = '--config.save_every=4'
    hosts = Hosts(tmp_path, store_path, tmp_path / 'work', 2, often)
    wait_for_step(hosts, tmp_path / 'work', 9)  # step 4 is saved: the save of step 8 has waited for it
    start = time.monotonic()
    hosts.processes[1].send_signal(how)
    hosts.processes[0].wait(60)
    took = time.monotonic() - start
    hosts.processes[1].kill()
    stderr = hosts.processes[0].stderr.read()
    code = hosts.processes[0].returncode  # 75, or JAX's own end by a signal: launch/worker.sh starts again on both
    assert (code == 75 or code < 0) and took < 45, (code, took, stderr)
    assert any(words in stderr for words in ('another process is gone', 'detected fatal errors', 'gloo::')), stderr
    done = Hosts(tmp_path, store_path, tmp_path / 'work', 2, often).wait()
    assert [one.returncode for one in done] == [0, 0] and 'resuming at step' in done[0].stdout, [
        one.stderr for one in done
    ]
    assert_same_course(tmp_path / 'work', reference)


HANGS = """
import threading, time, jax
from bert_jax import distributed
from bert_jax.cli import UserError
jax.process_count = lambda: 2
watch = lambda: threading.Thread(target=distributed._watch, args=(0.5,), daemon=True).start()
"""


@pytest.mark.parametrize(
    'code, exit_code, words',
    [
        ('watch()\nfor _ in distributed.watched(iter([1, 2])): time.sleep(60)', 75, 'no progress for 0.5 s'),
        (
            'watch()\nfor _ in distributed.watched(time.sleep(60) for _ in [1]): pass',
            75,
            'no progress for 0.5 s',
        ),
        ('watch()\ntime.sleep(60)', 75, 'no progress for 0.5 s'),
        ('with distributed.exit_when_others_are_gone(): {}["what"]', 1, "KeyError: 'what'"),
        (
            'with distributed.exit_when_others_are_gone(): raise UserError("the disk\\nis full")',
            2,
            'error: the disk is full',
        ),
        (
            'with distributed.exit_when_others_are_gone(): raise RuntimeError("NCCL: remote process exited")',
            75,
            'another process is gone',
        ),
        ('watch()\nfor _ in distributed.watched(iter(range(30))): time.sleep(0.05)', 0, ''),
    ],
)
def test_a_process_that_cannot_go_on_does_not_keep_the_others(code, exit_code, words):
    start = time.monotonic()
    done = subprocess.run([sys.executable, '-c', HANGS + code], cwd=ROOT, text=True, capture_output=True, timeout=60)
    assert done.returncode == exit_code and words in done.stderr and time.monotonic() - start < 30, done.stderr


JOINED = """
import argparse, sys
from bert_jax import distributed
parser = argparse.ArgumentParser()
distributed.add_arguments(parser)
distributed.join(parser.parse_args())
with distributed.exit_when_others_are_gone():
    distributed.meet('once')
    if '--process_id=1' in sys.argv:
        open('/no/such/file')
    distributed.meet('never')
"""


def test_a_fault_of_one_process_ends_both_at_once():
    """JAX's own way out waits five minutes for the others."""
    with contextlib.closing(socket.socket()) as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                '-c',
                JOINED,
                f'--coordinator=127.0.0.1:{port}',
                '--num_processes=2',
                f'--process_id={i}',
                '--heartbeat_seconds=10',
            ],
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for i in (0, 1)
    ]
    start = time.monotonic()
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert processes[1].returncode == 1 and 'No such file' in errors[1] and 'FileNotFoundError (above)' in errors[1], (
        errors[1]
    )
    assert (processes[0].returncode == 75 or processes[0].returncode < 0) and time.monotonic() - start < 60, errors[0]


@pytest.mark.parametrize('text, gone', [
    ('FAILED_PRECONDITION: Gloo all-reduce failed: Connection closed by peer [127.0.0.1]:4', True),
    ('UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats)', True),
    ('ABORTED: /job:jax_worker/replica:0/task:1 unexpectedly tried to connect with a different incarnation.', True),
    ('INTERNAL: NCCL operation ncclGroupEnd() failed: remote process exited or there was a network error', True),
    ('DEADLINE_EXCEEDED: Barrier timed out.', True),
    ('RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1234 bytes.', False),
    ('INVALID_ARGUMENT: shapes do not match', False)])
def test_which_errors_say_that_another_process_is_gone(text, gone, monkeypatch):
    monkeypatch.setattr(distributed.jax, 'process_count', lambda: 2)
    assert distributed.others_are_gone(RuntimeError(text)) == gone


def test_processes_that_disagree_are_told_what_about(store_path, tmp_path):
    done = Hosts(
        tmp_path,
        store_path,
        tmp_path / 'work',
        2,
        on_1=('--config.seed=7', '--config.model.encoder.num_layers=3', '--workdir', tmp_path / 'b'),
    ).wait()
    for one in done:
        expect_error(one, 'do not agree', 'config.seed is 0 on process 0, 7 on process 1',
                     'config.model.encoder.num_layers is 2 on process 0, 3 on process 1', "the workdir is ")
    shutil.rmtree(tmp_path / 'host21' / 'store')
    for one in Hosts(tmp_path, store_path, tmp_path / 'work', 2).wait():
        expect_error(one, 'the store is', 'on process 1', 'no finished store there')
    assert not (tmp_path / 'work').exists()


def test_nobody_at_the_address(store_path, tmp_path):
    done = Hosts(
        tmp_path,
        store_path,
        tmp_path / 'work',
        1,
        '--coordinator',
        '127.0.0.1:1',
        '--num_processes',
        2,
        '--process_id',
        1,
        '--join_seconds',
        1,
    ).wait()[0]
    expect_error(done, '127.0.0.1:1', 'No coordinator answers', 'tried for 1 s')
    done = Hosts(
        tmp_path,
        store_path,
        tmp_path / 'work',
        1,
        '--coordinator',
        f'127.0.0.1:{free_port()}',
        '--num_processes',
        2,
        '--process_id',
        0,
        '--join_seconds',
        2,
    ).wait()[0]
    expect_error(done, 'came together within 2 s', '--process_id of its own')
    for args, words in (
        (('--coordinator', 'here'), 'HOST:PORT is expected'),
        (('--process_id', 3), 'need --coordinator'),
        (('--coordinator', 'a:1', '--num_processes', 2, '--process_id', 2), '0 to 1 are expected'),
    ):
        expect_error(Hosts(tmp_path, store_path, tmp_path / 'work', 1, *args).wait()[0], words)


def free_port():
    with contextlib.closing(socket.socket()) as free:
        free.bind(('127.0.0.1', 0))
        return free.getsockname()[1]


def test_a_workdir_that_is_not_common(store_path, tmp_path):
    """A relative path: the same words, another folder on each host."""
    for one in Hosts(tmp_path, store_path, 'work', 2).wait():
        expect_error(one, 'one folder for all', 'there on process 0, empty on process 1')


@pytest.mark.skipif(not LONG, reason='takes minutes; BERT_JAX_LONG_TESTS=1 runs it')
@pytest.mark.parametrize('first, second', [*itertools.product((1, 2, 4), repeat=2)])
def test_any_number_goes_on_from_any_other(store_path, reference, tmp_path, first, second):
    hosts = Hosts(tmp_path, store_path, tmp_path / 'work', first)
    wait_for_step(hosts, tmp_path / 'work', 10)
    for process in hosts.processes:
        process.send_signal(signal.SIGTERM)
    done = hosts.wait()
    assert [one.returncode for one in done] == [75] * first, [one.stderr for one in done]
    done = Hosts(tmp_path, store_path, tmp_path / 'work', second).wait()
    assert [one.returncode for one in done] == [0] * second, [one.stderr for one in done]
    assert_same_course(tmp_path / 'work', reference)


@pytest.mark.skipif(not LONG, reason='two processes told to stop do the same; BERT_JAX_LONG_TESTS=1 runs it')
def test_one_process_told_to_stop_saves_and_goes_on(store_path, reference, tmp_path):
    hosts = Hosts(tmp_path, store_path, tmp_path / 'work', 1)
    wait_for_step(hosts, tmp_path / 'work', 3)
    hosts.processes[0].send_signal(signal.SIGTERM)
    (done,) = hosts.wait()
    assert done.returncode == 75 and 'Give the same command again to resume' in done.stderr
    (done,) = Hosts(tmp_path, store_path, tmp_path / 'work', 1).wait()
    assert done.returncode == 0, done.stderr
    assert_same_course(tmp_path / 'work', reference)
