"""From the command to the first step of BERT-tiny, with an empty compilation cache and with a warm one.

    python benchmarks/startup.py --store STORE

Times two steps of `python -m bert_jax.pretrain --config configs/pretrain.py:tiny` by the clock on the wall, the interpreter's own
start included, and what importing bert_jax.pretrain takes.
"""

import argparse
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parent.parent
PARTS = re.compile(r'first step after [\d.]+ s: (.*)')


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--store', required=True)
    parser.add_argument('--repeats', type=int, default=5)
    args = parser.parse_args()
    found = {'import': [], 'cold': [], 'warm': []}
    for _ in range(args.repeats):
        with tempfile.TemporaryDirectory() as folder:
            found['import'].append((run('-c', 'import bert_jax.pretrain', cache=folder)[0], ''))
            for kind in ('cold', 'warm'):
                found[kind].append(first_step(args.store, f'{folder}/{kind}', folder))
    for kind, runs in found.items():
        seconds = [one for one, _ in runs]
        print(f'{kind:<8}{statistics.median(seconds):6.2f} s ({min(seconds):.2f}-{max(seconds):.2f}, n = {len(runs)})  {runs[-1][1]}')


def first_step(store, workdir, cache):
    """(seconds until the line that the program prints after its first step, its own account of them)."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, '-m', 'bert_jax.pretrain', '--config', 'configs/pretrain.py:tiny', f'--config.store={store}', '--workdir', workdir,
         '--config.phases=((2,128,32),)', '--config.eval_examples=0', '--config.schedule.warmup_share=0.5'],
        cwd=ROOT, env=environment(cache), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=1)
    for line in process.stdout:
        parts = PARTS.search(line)
        if parts:
            seconds = time.perf_counter() - start
            process.communicate()
            return seconds, parts.group(1)
    sys.exit('error: the run ended before its first step')


def run(*arguments, cache):
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment(cache), check=True)
    return time.perf_counter() - start, ''


def environment(cache):
    return os.environ | {'JAX_COMPILATION_CACHE_DIR': f'{cache}/xla', 'PYTHONPATH': str(ROOT)}


if __name__ == '__main__':
    main()
