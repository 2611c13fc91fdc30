"""Compiles every config of configs/pods.py for its slice and writes the tables of docs/pods.md and of the config's header.

    python benchmarks/pods.py --output runs/pods            # an hour on two cores; needs requirements-tpu.txt

Configs that are there already are not compiled again; the table says of which commit each is. A published step is estimated beside
them, to judge the estimator by. Ends with code 1 when a config does not compile, or its program is not what it should be.
"""

import argparse
import json
import os
import pathlib
import runpy
import subprocess
import sys
import textwrap

LONGEST_COMPILATION = 120  # seconds on two cores

ROOT = pathlib.Path(__file__).parent.parent
PUBLISHED = {  # MLPerf v1.0, BERT-large, 64 TPU v4, about 254 real tokens a sequence: sequences/s a chip
    'published': ('v4:4x4x4', ['--config', 'configs/pretrain.py:large,bf16', '--config.phases=((1,256,2048),)', '--config.optimizer.name=lamb',
                               '--config.model.run.unroll=1', '--config.model.run.remat=elementwise'], 195)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--output', required=True, type=pathlib.Path)
    parser.add_argument('--only', default='', help='names with commas between them')
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    found, failed = {}, []
    commit = subprocess.run(['git', 'describe', '--always', '--dirty'], cwd=ROOT, text=True, capture_output=True, check=True).stdout.strip()
    for name, arguments in commands().items():
        file = args.output / f'{name}.json'
        if not file.exists() and (not args.only or name in args.only.split(',')):
            print(name, flush=True)
            done = subprocess.run([sys.executable, '-m', 'bert_jax.compile_check', *arguments, '--output', file], cwd=ROOT, text=True,
                                  capture_output=True, env=os.environ | {'PYTHONPATH': str(ROOT)})
            print(done.stdout + '\n'.join(done.stderr.splitlines()[-2:]), flush=True)
            if done.returncode:
                failed.append(f'{name}: {done.stderr.splitlines()[-1]}')
            else:
                file.write_text(json.dumps([phase | {'commit': commit} for phase in json.loads(file.read_text())], indent=1) + '\n')
        if file.exists():
            found[name] = json.loads(file.read_text())
    write(ROOT / 'docs' / 'pods.md', table(found))
    write(ROOT / 'configs' / 'pods.py', header(found))
    if PUBLISHED.keys() & found.keys():
        write(ROOT / 'bert_jax' / 'compile_check.py', constant('JUDGED', judged(found)))
    failed += [f'{name}: {what}' for name, phases in found.items() for what in wrong(phases)]
    sys.exit('\n'.join(failed) or 0)


def commands():
    """name -> the arguments of compile_check."""
    slices = runpy.run_path(str(ROOT / 'configs' / 'pods.py'))['SLICES']
    return {name: ['--topology', topology, *arguments] for name, (topology, arguments, _) in PUBLISHED.items()} | {
        f'{size}_{one}': ['--config', f'configs/pods.py:{size}_{one}'] for size in ('base', 'large') for one in slices}


COLUMNS = {  # of both phases, with a slash between them
    'a device': lambda p: f'{p["batch_size"] / p["devices"]:g}',
    'memory, GiB': lambda p: f'{p["memory"]["total"] / 2**30:.1f}',
    'step, ms': lambda p: f'{p["estimate"]["seconds"] * 1e3:.0f}',
    'sequences/s': lambda p: f'{p["sequences_per_second"]:,.0f}',
    'MFU': lambda p: f'{p["mfu"]:.0%}',
    'limited by': lambda p: max(('products', 'memory', 'on chip', 'collectives'), key=lambda part: p['estimate'].get(part, 0)),
    'gradients sent, of the least': lambda p: f'{sent(p):.2f}',
    'compiled in, s': lambda p: f'{p["compile_seconds"]:.0f}',
    'libtpu, commit': lambda p: f'{p["libtpu"]}, {p["commit"]}',
}


def sent(phase):
    """Bytes of gradients reduced over what the least would be."""
    reduced = sum(row['bytes'] for row in phase['collectives'] if row['kind'] in ('all-reduce', 'reduce-scatter') and row['axes'] != 'tensor')
    return reduced / phase['least_bytes']['gradients']


def table(found):
    """Markdown: a row a config."""
    rows = [f'| config | devices | {" | ".join(COLUMNS)} | the whole training |', '|---' * (len(COLUMNS) + 3) + '|']
    for name, phases in found.items():
        if name not in PUBLISHED:
            count, chips = phases[0]['devices'], phases[0]['chips']
            hours = sum(phase['steps'] * phase['estimate']['seconds'] for phase in phases) / 3600
            cells = [' / '.join(dict.fromkeys(make(phase) for phase in phases)) for make in COLUMNS.values()]
            rows.append(f'| `{name}` | {count} x {phases[0]["device"]}, {phases[0]["memory"]["available"] / 2**30:.1f} GiB | {" | ".join(cells)} '
                        f'| {hours:,.1f} h, {hours * chips:,.0f} chip-hours |')
    faults = [f'`{name}`: {what}' for name, phases in found.items() for what in wrong(phases)]
    notes = ['Of no program: a state that is not updated in place, gradients of more than 1.05 times the least or reduced in the loop over micro-batches, a buffer '
             f'of all positions times the vocabulary, a float32 product in the trunk, more than {LONGEST_COMPILATION} s to compile'
             + (f', but: {"; ".join(faults)}.' if faults else '.'),
             *(['', f'The estimator where the truth is known: {judged(found)}.'] if PUBLISHED.keys() & found.keys() else [])]
    return '\n'.join([*rows, '', *notes])


def wrong(phases):
    """What a program should not be, in words."""
    for phase in phases:
        at = f'at length {phase["length"]} '
        if not phase['memory']['state_aliased']:
            yield at + 'the state is not updated in place'
        if sent(phase) > 1.05:
            yield at + f'gradients are {sent(phase):.2f} times the least'
        if phase['compile_seconds'] > LONGEST_COMPILATION:
            yield at + f'it compiles in {phase["compile_seconds"]:.0f} s'
        yield from (at + f'{name}: {", ".join(found)}' for name, found in phase['findings'].items() if found)


def judged(found):
    lines = []
    for name, (topology, _, measured) in PUBLISHED.items():
        if name in found:
            (phase,) = found[name]
            ours = phase['sequences_per_second'] / phase['devices']
            lines.append(f'BERT-large at 256 tokens on {topology}: {ours:.0f} sequences/s a chip estimated for this program, {measured} measured by '
                         f'Google for theirs (MLPerf v1.0), {ours / measured:.2f} of it')
    return '; '.join(lines)


def constant(name, text):
    """Python source of a string, in lines of a readable length."""
    return '\n'.join([f'{name} = (', *(f'    {line!r}' for line in textwrap.wrap(text, 100, drop_whitespace=False)), ')'])


def header(found):
    lines = []
    for name, phases in found.items():
        if name not in PUBLISHED:
            lines.append(f'    {name:<18}' + '; '.join(
                f'{phase["length"]}: {phase["memory"]["total"] / 2**30:5.1f} GiB, {phase["estimate"]["seconds"] * 1e3:6.0f} ms, MFU {phase["mfu"]:4.0%}'
                for phase in phases))
    if PUBLISHED.keys() & found.keys():
        lines += ['', *textwrap.wrap(f'How far such an estimate may be off: {judged(found)}.', 100)]
    return '\n'.join(lines)


def write(path, text):
    """Between the two marks of a file."""
    lines = path.read_text().splitlines()
    begin, end = ([mark in line for line in lines].index(True) for mark in ('written by benchmarks/pods.py', 'to here'))
    path.write_text('\n'.join([*lines[:begin + 1], text, *lines[end:]]) + '\n')


if __name__ == '__main__':
    main()
