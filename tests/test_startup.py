"""What a start spends its time with, and the cache that makes the next one shorter."""

import os
import pathlib
import time

import jax
import psutil
from conftest import LONG, TINY, run_module

from bert_jax import startup


@LONG
def test_the_second_start_compiles_nothing_again(store_path, tmp_path):
    cache, programs = tmp_path / 'cache', []
    for work in ('first', 'second'):
        env = {'JAX_COMPILATION_CACHE_DIR': str(cache), 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'}
        done = run_module(
            'pretrain',
            '--config',
            'configs/pretrain.py:tiny',
            f'--config.store={store_path}',
            '--workdir',
            tmp_path / work,
            *TINY,
            '--config.phases=((2,48,8),)',
            '--config.log_every=1',
            '--config.eval_examples=0',
            '--config.save_every=2',
            env=env,
        )
        assert done.returncode == 0, done.stderr
        (line,) = [one for one in done.stdout.splitlines() if one.startswith('first step after')]
        parts = dict(part.rsplit(' ', 1) for part in line.partition(': ')[2].split(', '))
        assert list(parts) == ['import', 'data', 'compile', 'restore', 'first step']
        programs.append({file.name for file in cache.glob('*-cache')})
    assert any('train_step' in name for name in programs[0]), programs
    assert programs[1] == programs[0]


def test_programs_are_kept_beside_the_users_other_caches():
    code = 'import os, bert_jax; print(os.environ["JAX_COMPILATION_CACHE_DIR"])'
    import subprocess
    import sys

    env = {key: value for key, value in os.environ.items() if key != 'JAX_COMPILATION_CACHE_DIR'} | {
        'XDG_CACHE_HOME': '/cache'
    }
    done = subprocess.run(
        [sys.executable, '-c', code], env=env, text=True, capture_output=True, cwd=pathlib.Path(__file__).parent.parent
    )
    assert done.stdout.startswith('/cache/bert_jax/xla-'), done.stderr


def test_the_clock_began_with_the_process():
    """By psutil's word; each part is what passed since the one before it, compiling apart."""
    age = time.time() - psutil.Process().create_time()
    clock = startup.Startup()
    assert abs(clock.parts['import'] - age) < 0.5
    time.sleep(0.3)
    clock.done('data')
    jax.monitoring.record_event_duration_secs(startup.COMPILING + 'some_of_it', 0.2)
    time.sleep(0.3)
    clock.done('restore')
    clock.first(lambda: time.sleep(0.2))()
    assert {name: round(seconds, 1) for name, seconds in clock.parts.items() if name != 'import'} == {
        'data': 0.3, 'compile': 0.2, 'restore': 0.1, 'first step': 0.2}
