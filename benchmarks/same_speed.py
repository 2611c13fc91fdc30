"""Whether a change of code changed speed: training steps of another commit and of this checkout, in turn, on this machine.

    python benchmarks/same_speed.py --before HEAD -- --config configs/pretrain.py:base
    python benchmarks/same_speed.py --before main -- --config configs/pretrain.py:mini --store STORE --sides packed

What follows -- goes to each checkout's own benchmarks/train_step.py, the commit's in a temporary worktree; its first
side is timed. Prints seconds a step of both, the ratios of neighbouring turns, and what the first turn took, which
compiles. Nothing else should run.
"""

import argparse
import itertools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

from same_numbers import git

ROOT = pathlib.Path(__file__).parent.parent


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--before', required=True, metavar='COMMIT', help='what git calls it')
    parser.add_argument('--repeats', type=int, default=7, help='timed turns of each side, after two that are not')
    parser.add_argument('arguments', nargs='+', help='of benchmarks/train_step.py')
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkout = pathlib.Path(folder) / 'before'
        git('worktree', 'add', '--quiet', '--detach', str(checkout), args.before)
        try:
            report(*turns({'before': checkout, 'now': ROOT}, args.arguments, args.repeats))
        finally:
            git('worktree', 'remove', '--force', str(checkout))


def turns(checkouts, arguments, repeats):
    """({side: seconds of each timed turn}, {side: seconds of the first}), the sides one after the other in each turn."""
    side = next((value for key, value in itertools.pairwise(arguments) if key == '--sides'), 'ours').split(',')[0]
    processes, seconds, first = {}, {name: [] for name in checkouts}, {}
    for name, checkout in checkouts.items():  # one after the other, so that each compiles alone
        start = time.perf_counter()
        env = os.environ | {'PYTHONPATH': str(checkout), 'JAX_ENABLE_COMPILATION_CACHE': 'false'}
        processes[name] = subprocess.Popen(
            [sys.executable, 'benchmarks/train_step.py', *arguments, '--side', side], cwd=checkout, text=True, env=env,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        ask(name, processes[name])
        first[name] = time.perf_counter() - start
    for turn in range(repeats + 1):
        order = list(processes.items())
        for name, process in order if turn % 2 else order[::-1]:
            took = ask(name, process)
            seconds[name] += [took] if turn else []
    for process in processes.values():
        process.communicate()
    return seconds, first


def ask(name, process):
    """Seconds of one turn."""
    process.stdin.write('turn\n')
    process.stdin.flush()
    answer = process.stdout.readline()
    if not answer:
        sys.exit(f'error: {name} ended early; what it said stands above.')
    return json.loads(answer)['seconds']


def report(seconds, first):
    for name, found in seconds.items():
        print(f'{name:<8} {statistics.median(found):.4f} s a turn ({min(found):.4f}-{max(found):.4f}, n = {len(found)}); '
              f'first turn after {first[name]:.1f} s')
    ratios = sorted(now / before for before, now in zip(seconds['before'], seconds['now']))
    print(f'now / before: {statistics.median(ratios):.3f} ({ratios[0]:.3f}-{ratios[-1]:.3f})')


if __name__ == '__main__':
    main()
