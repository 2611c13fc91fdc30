"""One process at a time in a folder: on a disk of its own, on one that hosts share, and after a kill."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from bert_jax import lock
from bert_jax.cli import UserError

HOLD = (
    'import sys, time\nfrom bert_jax import lock\n'
    'with lock.hold(sys.argv[1]):\n    print("held", flush=True)\n    time.sleep(60)\n'
)


@pytest.fixture
def other(tmp_path):
    """Another process that holds tmp_path / 'w'."""
    process = subprocess.Popen([sys.executable, '-c', HOLD, tmp_path / 'w'], stdout=subprocess.PIPE, text=True,
                               env=os.environ | {'PYTHONPATH': str(ROOT)})
    assert process.stdout.readline() == 'held\n'
    yield process
    process.kill()
    process.wait()


def on_a_shared_disk(monkeypatch):
    monkeypatch.setattr(lock, 'LOCAL', set())
    monkeypatch.setattr(lock, 'SETTLE_SECONDS', 0.01)


def test_a_second_process_is_refused_and_told_whose_the_folder_is(tmp_path, other):
    with pytest.raises(UserError, match=f'w: in use by process {other.pid} on .*, since 20'), lock.hold(tmp_path / 'w'):
        pass
    other.send_signal(signal.SIGKILL)  # no word from it: the operating system's lock ends all the same
    other.wait()
    assert (tmp_path / 'w' / 'lock.json').exists()
    with lock.hold(tmp_path / 'w'):
        assert json.loads((tmp_path / 'w' / 'lock.json').read_text())['process'] == os.getpid()
    assert not list((tmp_path / 'w').iterdir())


def lease(folder, **facts):
    folder.mkdir(exist_ok=True)
    (folder / 'lock.json').write_text(json.dumps({
        'id': 'x', 'host': 'elsewhere', 'process': 1, 'run': '', 'command': 'c', 'since': time.time(),
        'renewed': time.time()} | facts))
    return folder


def test_a_lease_of_another_host_counts_on_a_shared_disk_until_it_is_stale(tmp_path, monkeypatch):
    with lock.hold(lease(tmp_path / 'local')):
        pass  # this disk is ours alone: whoever wrote that is gone
    on_a_shared_disk(monkeypatch)
    fresh = lease(tmp_path / 'fresh', renewed=time.time() - 70)
    with pytest.raises(UserError, match='1 on elsewhere.*the same command works in 4 minutes'), lock.hold(fresh):
        pass
    assert json.loads((tmp_path / 'fresh' / 'lock.json').read_text())['id'] == 'x'
    for facts in (
        {'renewed': time.time() - 301},
        {'run': 'my-slice'},
        {'host': lock.socket.gethostname(), 'process': 2**22 + 1},
    ):
        monkeypatch.setenv('BERT_JAX_RUN', facts.get('run', 'another'))
        with lock.hold(lease(tmp_path / 'over', **facts)):
            assert json.loads((tmp_path / 'over' / 'lock.json').read_text())['process'] == os.getpid()


def test_a_lease_is_renewed_and_who_lost_it_ends(tmp_path, monkeypatch):
    on_a_shared_disk(monkeypatch)
    monkeypatch.setattr(lock, 'RENEW_SECONDS', 0.05)
    ends = []
    monkeypatch.setattr(lock.os, '_exit', ends.append)
    with lock.hold(tmp_path):
        read = lambda: json.loads((tmp_path / 'lock.json').read_text() or '{}').get('renewed', 0)  # noqa: E731
        first, end = read(), time.monotonic() + 10
        while read() <= first and time.monotonic() < end:
            time.sleep(0.05)
        assert read() > first and not ends
        while not ends and time.monotonic() < end:
            lease(tmp_path)  # again and again: a renewal under way may write over it
            time.sleep(0.05)
    assert ends[0] == 2


def test_two_that_begin_at_once_in_a_bucket(tmp_path, monkeypatch):
    """No file system locks there: both write, and who reads the other's name gives way."""
    on_a_shared_disk(monkeypatch)
    monkeypatch.setattr(lock.paths, 'is_remote', lambda path: True)
    monkeypatch.setattr(lock.time, 'sleep', lambda seconds: lease(tmp_path))
    with pytest.raises(UserError, match='process 1 on elsewhere'), lock.hold(tmp_path):
        pass
    assert json.loads((tmp_path / 'lock.json').read_text())['id'] == 'x'
