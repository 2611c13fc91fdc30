"""Compiles a training step for a TPU slice, without a TPU, and says what it would take: memory, traffic, time.

    python -m bert_jax.compile_check --config configs/pods.py:base_v5e_16 --tokens 100e9
    python -m bert_jax.compile_check --config configs/pretrain.py:base,bf16 --topology v4-64 --search batch=32,64

The real step with the real shardings goes through the real TPU compiler, once for each phase of the config. Memory
and collectives are read from the compiled program. The time is an estimate: each fusion takes the longest of its
products at the peak, its bytes at the memory's bandwidth, and the compiler's own count of cycles; loops count as often
as they run; copies and collectives that overlap others cost what is waited for. JUDGED says how far it is off where
the truth is known.

Needs `pip install -r requirements-tpu.txt`; runs on any machine.
"""

import argparse
import itertools
import json
import pathlib
import re
from importlib import metadata
from typing import Any

import jax
from ml_collections import ConfigDict

from bert_jax import cli, hardware, partition, pretrain, workdir
from bert_jax.cli import UserError
from bert_jax.data import masking
from bert_jax.model import model as models
from bert_jax.model import transformer
from bert_jax.tpu import compiled, topology

VOCAB_SIZE = 30522  # where the config leaves it to the tokenizer
# (written by benchmarks/pods.py)
JUDGED = (
    'BERT-large at 256 tokens on v4:4x4x4: 163 sequences/s a chip estimated for this program, 195 '
    'measured by Google for theirs (MLPerf v1.0), 0.84 of it'
)
# (to here)
REMATS = tuple(transformer.REMAT)  # from what keeps most to what keeps least
SEARCHED = ('batch', 'fsdp', 'tensor', 'remat', 'unroll', 'accumulation')


class TooMuch(UserError):
    """The program needs more memory than the device has."""


def main() -> None:
    """Command line."""
    parser = cli.parser(__doc__)
    parser.add_argument('--topology', metavar='NAME', help='v5e:4x4, or its name in the cloud, v5e-16 '
                                                           "(default: the config's, in configs/pods.py)")
    parser.add_argument('--slices', type=int, metavar='N', help='slices joined by the data-centre network (default: 1)')
    parser.add_argument('--tokens', type=float, metavar='N', default=0, help='also: hours and chip-hours for N tokens')
    parser.add_argument('--search', nargs='+', metavar='KEY=V,V', default=(),
                        help=f'compile every combination of {", ".join(SEARCHED)}, for the first phase; batch is '
                             'that of a device')
    parser.add_argument('--parameters', action='store_true', help="also: every parameter's sharding and bytes")
    parser.add_argument('--output', metavar='FILE.json', help='also write the figures there')
    parser.add_argument('--text', metavar='DIR', help='also write the compiled programs there')
    args, config = cli.parse_with_config(parser)
    found = check(config, args)
    if args.output:
        pathlib.Path(args.output).write_text(json.dumps(found, indent=1) + '\n')


def check(config: ConfigDict, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Compiles and prints; returns the figures of each phase or combination.

    Raises:
      UserError: no libtpu, an unknown topology, a mesh that does not fit it, a program that does not fit its memory
        (with a setting that does).
    """
    name = args.topology or ('topology' in config and config.topology)
    if not name:
        raise UserError('--topology NAME is missing, for example v5e-16.')
    slices = args.slices if args.slices is not None else config.get('slices', 1)
    devices = topology.devices(name, slices)
    if not config.model.embeddings.vocab_size:
        config.model.embeddings.vocab_size = VOCAB_SIZE
    if args.output and not pathlib.Path(args.output).parent.is_dir():
        raise UserError(f'--output {args.output}: there is no folder {pathlib.Path(args.output).parent}.')
    if args.search:
        if args.tokens or args.parameters or args.text:
            raise UserError('--tokens, --parameters and --text are for one setting; with --search leave them out.')
        return search(config, devices, args.search)
    pretrain.check(config)
    results = []
    for steps, length, batch_size in config.phases:
        try:
            result = measure(config, devices, length, batch_size, args.text)
        except TooMuch as error:
            raise UserError(f'{error} {_what_fits(config, devices, length, batch_size)}') from error
        show(result, args.parameters)
        if args.tokens:
            show_cost(result, args.tokens)
        results.append(result | {'steps': steps})
    if args.tokens and len(results) > 1:
        show_whole(results, args.tokens)
    return results


def measure(config: ConfigDict, devices: list[jax.Device], length: int, batch_size: int, text: str | None = None
            ) -> dict[str, Any]:
    """All figures of one phase.

    Raises:
      UserError: a compiler that is known to crash on it.
      TooMuch: it does not fit the memory; names the bytes.
    """
    version = metadata.version('libtpu')
    if version.startswith('0.0.42') and devices[0].device_kind == 'TPU v6 lite' and length >= 384:
        raise UserError(f'libtpu {version} crashes on v6e at lengths of 384 and more: '
                        "pip install --no-deps 'libtpu==0.0.43.*'.")
    try:
        step = compiled.compile_step(config, devices, length, batch_size)
    except jax.errors.JaxRuntimeError as error:
        if 'RESOURCE_EXHAUSTED' not in str(error):
            raise
        raise TooMuch(_too_much(error)) from error
    if text:
        pathlib.Path(text).mkdir(parents=True, exist_ok=True)
        (pathlib.Path(text) / f'{length}.txt').write_text(step.compiled.as_text())
    known, count = hardware.of(devices[0]), len(devices)
    estimate = compiled.estimate_step(step.program, known, step.mesh)
    row = length * max(1, config.examples.pack_lengths)  # full, of full examples: what the program is made for
    work = batch_size * models.build(config.model).flops(
        {'tokens': row, 'squared_tokens': row * length, 'examples': row / length,
         'predictions': masking.max_predictions(row, config.examples.mask_rate)})
    seconds = estimate['seconds']
    return {
        'device': devices[0].device_kind, 'devices': count, 'chips': count // known.per_chip,
        'mesh': dict(step.mesh.shape), 'length': row,
        'batch_size': batch_size, 'compile_seconds': step.seconds, 'memory': compiled.memory(step, devices[0]),
        'model_flops': work, 'program_flops': estimate.pop('flops') * count, 'estimate': estimate,
        'estimate_judged': JUDGED,
        'sequences_per_second': batch_size / seconds, 'mfu': work / seconds / (known.peak_tflops * 1e12 * count),
        'collectives': compiled.collectives(step),
        'least_bytes': compiled.least_bytes(step, config, row, batch_size),
        'code': workdir.code_version(), 'libtpu': version,
        'findings': compiled.findings(step, config, row, batch_size),
        'parameters': [list(row) for row in partition.describe(step.state.params, step.mesh)]}


def _too_much(error: Exception) -> str:
    text = str(error)
    used = (re.search(r'Used ([\d.]+\w+) of ([\d.]+\w+)', text)
            or re.search(r'required for HLO temporaries \(([\d.]+\w*)\) exceeds available \w+ \(([\d.]+\w*)\)', text))
    if not used:
        return cli.first_line(error)
    return f'It needs {used.group(1)} of memory a device, there are {used.group(2)}.'


def _what_fits(config: ConfigDict, devices: list[jax.Device], length: int, batch_size: int) -> str:
    """The nearest setting that fits, found by compiling, from what costs least to what costs most."""
    remats = REMATS[REMATS.index(config.model.run.remat) + 1:]
    last = {'remat': REMATS[-1]}
    fsdp, tensor = _split(config)
    most = len(devices) // len({getattr(device, 'slice_index', 0) for device in devices}) // tensor
    tried: list[dict[str, Any]] = [{'remat': remat} for remat in remats]
    tried += [last | {'accumulation': n * config.accumulation} for n in (2, 4, 8)]
    tried += [last | {'fsdp': n} for n in (2, 4, 8, 16, 32) if n > fsdp and most % n == 0]
    tried += [last | {'fsdp': most, 'batch': batch_size // n} for n in (2, 4, 8)
              if batch_size // n >= len(devices)]
    for setting in tried:
        print(f'it does not fit; trying {_words(setting)} ...', flush=True)
        try:
            compiled.compile_step(_changed(config, setting), devices, length, setting.get('batch', batch_size))
        except (jax.errors.JaxRuntimeError, UserError):
            continue
        keys = {'remat': '--config.model.run.remat={}', 'accumulation': '--config.accumulation={}',
                'fsdp': f"'--config.mesh=(-1,{{}},{tensor})'",
                'batch': f'and a batch of {{}} instead of {batch_size:,}'}
        return 'This fits: ' + ' '.join(keys[key].format(value) for key, value in setting.items()) + '.'
    return 'Nothing that was tried makes it fit: take more or larger chips.'


def _split(config: ConfigDict) -> tuple[int, int]:
    """`fsdp` and `tensor` of the config's mesh, 1 where it leaves them open."""
    _, fsdp, tensor = config.mesh or (-1, 1, 1)
    return max(fsdp, 1), max(tensor, 1)


def _changed(config: ConfigDict, setting: dict[str, Any]) -> ConfigDict:
    changed = config.copy_and_resolve_references()
    for key, value in setting.items():
        if key in ('remat', 'unroll'):
            changed.model.run[key] = value
        elif key == 'accumulation':
            changed.accumulation = value
    if 'fsdp' in setting or 'tensor' in setting:
        fsdp, tensor = _split(config)
        with changed.unlocked():
            changed.mesh = (-1, setting.get('fsdp', fsdp), setting.get('tensor', tensor))
    return changed


def search(config: ConfigDict, devices: list[jax.Device], wanted: list[str]) -> list[dict[str, Any]]:
    """Compiles every combination and prints them, fastest first."""
    axes: dict[str, list[Any]] = {}
    for one in wanted:
        key, separator, values = one.partition('=')
        if key not in SEARCHED or not separator:
            raise UserError(f'--search {one}: KEY=V,V is expected, KEY one of {", ".join(SEARCHED)}.')
        axes[key] = [value if key == 'remat' else _number(one, value) for value in values.split(',')]
    _, length, default = config.phases[0]
    rows = []
    for values in itertools.product(*axes.values()):
        setting = dict(zip(axes, values))
        size = setting['batch'] * len(devices) if 'batch' in setting else default
        try:
            found = measure(_changed(config, setting), devices, length, size)
        except UserError as error:
            print(f'{_words(setting)}: {error}', flush=True)
            continue
        rows.append(found | {'setting': setting})
        print(f'{_words(setting)}: {found["sequences_per_second"]:,.0f} sequences/s, MFU {found["mfu"]:.1%}, '
              f'{found["memory"]["total"] / 2**30:.1f} GiB, compiled in {found["compile_seconds"]:.0f} s', flush=True)
    if not rows:
        raise UserError('Not one of these settings compiles.')
    rows.sort(key=lambda row: -row['sequences_per_second'])
    print('\nfastest first:')
    for row in rows:
        print(f'  {_words(row["setting"]):<44}{row["sequences_per_second"]:>10,.0f} sequences/s  '
              f'MFU {row["mfu"]:6.1%}  {row["memory"]["total"] / 2**30:6.1f} GiB')
    return rows


def _number(search: str, value: str) -> int:
    if not value.isdigit():
        raise UserError(f'--search {search}: {value!r} is not a number.')
    return int(value)


def _words(setting: dict[str, Any]) -> str:
    return ' '.join(f'{key}={value}' for key, value in setting.items())


def show(result: dict[str, Any], parameters: bool) -> None:
    """One phase for people."""
    mesh = ' x '.join(f'{axis} {size}' for axis, size in result['mesh'].items() if size > 1) or 'one device'
    used, parts = result['memory'], result['estimate']
    print(f'{result["devices"]} x {result["device"]}, {mesh}; length {result["length"]}, batch '
          f'{result["batch_size"]:,} ({result["batch_size"] / result["devices"]:g} a device); compiled in '
          f'{result["compile_seconds"]:.0f} s by libtpu {result["libtpu"]}')
    sizes = ', '.join(f'{name} {used[name] / 2**30:.2f}'
                      for name in ('parameters', 'optimizer', 'fixed', 'batch', 'temporaries', 'code') if name in used)
    print(f'  memory a device, GiB: {sizes}; together {used["total"] / 2**30:.2f} of {used["available"] / 2**30:.2f}; '
          f'{used["activations"] / 2**30:.2f} of activations are kept for the backward pass; the state is '
          f'{"" if used["state_aliased"] else "NOT wholly "}updated in place')
    print(f'  work a step: {result["model_flops"] / 1e12:,.1f} TFLOP by the formula, '
          f'{result["program_flops"] / 1e12:,.1f} in the program')
    times = ', '.join(f'{name} {parts[name] * 1e3:.1f}'
                      for name in ('products', 'memory', 'on chip', 'collectives') if name in parts)
    print(f'  estimated step: {parts["seconds"] * 1e3:.1f} ms ({times}; {parts["random bits"] * 1e3:.1f} of it random '
          f'bits): {result["sequences_per_second"]:,.0f} sequences/s, MFU {result["mfu"]:.1%}')
    print(f'  the estimate where the truth is known: {JUDGED}')
    for row in result['collectives']:
        print(f'  {row["kind"]} over {row["axes"]}: {row["bytes"] / 1e6:,.1f} MB in {row["times"]} calls'
              + (' inside loops' if row['in_loop'] else ''))
    least = ', '.join(f'{what} {size / 1e6:,.1f} MB' for what, size in result['least_bytes'].items() if size)
    print(f'  the least that must be sent: {least or "nothing"}')
    for name, found in result['findings'].items():
        print(f'  {name}: {"; ".join(found) if found else "none"}')
    if parameters:
        for name, shape, split, size in result['parameters']:
            print(f'  {name:<44}{"x".join(map(str, shape)):<22}{split:<28}{size / 1e6:>9.2f} MB a device')


def show_cost(result: dict[str, Any], tokens: float) -> None:
    """Hours and chip-hours for so many tokens, padding counted as tokens."""
    hours = tokens / (result['sequences_per_second'] * result['length']) / 3600
    print(f'  {tokens:,.0f} tokens: {hours:,.1f} hours, {hours * result["chips"]:,.0f} chip-hours at this rate')


def show_whole(results: list[dict[str, Any]], tokens: float) -> None:
    """The same for all phases, each with its share of the tokens."""
    seen = sum(phase['steps'] * phase['batch_size'] * phase['length'] for phase in results)
    hours = sum(phase['steps'] * phase['estimate']['seconds'] for phase in results) / 3600 * tokens / seen
    shares = ', '.join(f'{phase["steps"] * phase["batch_size"] * phase["length"] / seen:.0%} of them at length '
                       f'{phase["length"]}' for phase in results)
    print(f'{tokens:,.0f} tokens, {shares}: {hours:,.1f} hours, {hours * results[0]["chips"]:,.0f} chip-hours')


if __name__ == '__main__':
    cli.run(main)
