"""Whether a change of code changed numbers: a few steps by another commit and by this checkout, on this machine.

    python benchmarks/same_numbers.py --before HEAD        # what is not committed yet
    python benchmarks/same_numbers.py --before main        # a branch

Each side runs its own tests/pin.py (this checkout's where the other has none), which trains and evaluates small models
from parameters that NumPy draws; the commit's in a temporary worktree. Prints the largest relative difference of each
run. Exit code 1 when one is above --tolerance.
"""

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

import numpy as np

ROOT = pathlib.Path(__file__).parent.parent


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--before', required=True, metavar='COMMIT', help='what git calls it')
    parser.add_argument('--tolerance', type=float, default=1e-6, help='relative to each number')
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkout = pathlib.Path(folder) / 'before'
        git('worktree', 'add', '--quiet', '--detach', str(checkout), args.before)
        try:
            if not (checkout / 'tests/pin.py').exists():
                shutil.copy(ROOT / 'tests/pin.py', checkout / 'tests/pin.py')
            before, after = numbers(checkout), numbers(ROOT)
        finally:
            git('worktree', 'remove', '--force', str(checkout))
    print(f'{"":24}{"numbers":>8}{"largest relative difference":>30}')
    largest = []
    for name in sorted(before.keys() | after.keys()):
        if name not in before or name not in after or before[name].shape != after[name].shape:
            print(f'{name:24}{"":8}{"not the same numbers on both sides":>38}')
            largest.append(np.inf)
            continue
        difference = abs(after[name] - before[name]) / np.maximum(abs(before[name]), 1e-30)
        largest.append(difference.max() if np.isfinite(difference).all() else np.inf)
        print(f'{name:24}{difference.size:8}{largest[-1]:30.1e}')
    if max(largest) > args.tolerance:
        sys.exit(f'Numbers changed: {max(largest):.1e} is more than {args.tolerance:.0e}.')


def git(*arguments):
    done = subprocess.run(['git', *arguments], cwd=ROOT, text=True, capture_output=True)
    if done.returncode:
        sys.exit(f'git {" ".join(arguments)}: {done.stderr.strip()}')


def numbers(checkout):
    """name -> what tests/pin.py finds in a checkout."""
    done = subprocess.run([sys.executable, 'tests/pin.py'], cwd=checkout, text=True, capture_output=True,
                          env=os.environ | {'PYTHONPATH': str(checkout), 'JAX_PLATFORMS': 'cpu'})
    if done.returncode:
        sys.exit(f'{checkout}: tests/pin.py failed.\n{done.stderr}')
    found = json.loads(done.stdout[done.stdout.index('{'):])
    return {name: np.array(values, np.float64) for name, values in found.items()}


if __name__ == '__main__':
    main()
