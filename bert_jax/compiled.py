"""A training step compiled for devices that need not be there, and what can be read from it."""

import collections
import dataclasses
import itertools
import math
import re
import time
from typing import Any

import jax
from ml_collections import ConfigDict

from bert_jax import hardware, hlo, optimizer, partition, train
from bert_jax.data import examples
from bert_jax.model import model as models
from bert_jax.model.embeddings import padded_vocab_size


@dataclasses.dataclass
class Step:
    """A compiled training step, and what it was made of."""

    compiled: Any
    program: hlo.Program
    state: train.TrainState
    mesh: jax.sharding.Mesh
    seconds: float


def compile_step(config: ConfigDict, devices: list[jax.Device], length: int, batch_size: int) -> Step:
    """The step that pre-training would run.

    Raises:
      UserError: a mesh or batch that does not fit the devices.
      jax.errors.JaxRuntimeError: more memory than there is.
    """
    model, tx = models.build(config.model), optimizer.make_optimizer(**config.optimizer)
    whole = examples.empty(batch_size, length, config.mask_rate, config.packed)
    batch = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in whole.items()}
    state = train.state_shapes(model, tx, examples.empty(1, length, config.mask_rate, config.packed))
    mesh = partition.make_mesh(config.mesh, state, devices)
    examples.check_batch_size(batch_size, partition.data_devices(mesh), config.accumulation)
    step = train.make_train_step(model, tx, mesh, config.accumulation, state)
    hyper = train.as_hyper(0.0, models.target_weights(config.model), 0)
    start = time.perf_counter()
    compiled = step.lower(state, batch, hyper).compile()
    seconds = time.perf_counter() - start
    return Step(compiled, hlo.Program(compiled.as_text()), state, mesh, seconds)


def memory(step: Step, device: jax.Device) -> dict[str, float]:
    """Bytes a device."""
    stats = step.compiled.memory_analysis()

    def held(tree: Any) -> int:
        shardings = jax.tree.leaves(partition.state_shardings(tree, step.mesh))
        return sum(math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize
                   for x, s in zip(jax.tree.leaves(tree), shardings))

    params, opt_state = held({'params': step.state.params}), held({'opt_state': step.state.opt_state})
    total = (stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
             + stats.temp_size_in_bytes + stats.generated_code_size_in_bytes)
    return {'parameters': params, 'optimizer': opt_state, 'batch': stats.argument_size_in_bytes - params - opt_state,
            'temporaries': stats.temp_size_in_bytes, 'code': stats.generated_code_size_in_bytes, 'total': total,
            'available': hardware.memory_bytes(device), 'aliased': stats.alias_size_in_bytes,
            'state_aliased': step.program.aliased >= len(jax.tree.leaves(step.state))}


def estimate_step(program: hlo.Program, known: hardware.Device, mesh: jax.sharding.Mesh) -> dict[str, float]:
    """Seconds of a step: products, memory, vector unit, collectives; of what overlaps, what is waited for."""
    seconds = _seconds(program, program.entry, known, mesh)
    return {'seconds': sum(seconds.values()) - seconds['random bits'], **seconds,
            'flops': sum(times * program.flops(computation, i.name) for computation, i, times in program.walk()
                         if not i.free)}


def _seconds(program: hlo.Program, computation: str, known: hardware.Device, mesh: jax.sharding.Mesh
             ) -> collections.Counter:
    """Of a computation, by what limits; what is started and awaited later costs what was not there by then."""
    spent: collections.Counter = collections.Counter()
    started: dict[str, tuple[str, float]] = {}  # -> what it is, when it will be there
    now = 0.0
    for instruction in program.computations[computation].values():
        what, took = '', 0.0
        if instruction.opcode.endswith('-done'):
            what, there = started.get(instruction.operands[0], ('', 0.0))
            took = max(0.0, there - now)
        elif program.called(instruction):
            inner: collections.Counter = collections.Counter()
            for called, times in program.called(instruction):
                inner.update({k: times * v for k, v in _seconds(program, called, known, mesh).items()})
            spent.update(inner)
            now += sum(inner.values()) - inner['random bits']
        elif not instruction.free:
            what, took = _limit(program, computation, instruction, known, mesh)
            if instruction.opcode.endswith('-start'):
                started[instruction.name], took = (what, now + took), 0.0
            if re.search(r'random_bits|dropout', instruction.path, re.IGNORECASE):
                spent['random bits'] += took
        if took:
            spent[what] += took
            now += took
    return spent


def _limit(program: hlo.Program, computation: str, instruction: hlo.Instruction, known: hardware.Device,
           mesh: jax.sharding.Mesh) -> tuple[str, float]:
    """(what limits an instruction, its seconds)."""
    kind = _collective(instruction)
    if kind:
        return 'collectives', _collective_seconds(instruction, kind, known, mesh)
    parts = {'products': program.flops(computation, instruction.name) / (known.peak_tflops * 1e12),
             'memory': program.memory_bytes(computation, instruction) / (known.memory_tb_s * 1e12)}
    cycles = instruction.attribute(r'"estimated_cycles":"(\d+)"')
    if cycles and known.clock_ghz:
        parts['on chip'] = int(cycles) / (known.clock_ghz * 1e9)
    return max(parts.items(), key=lambda part: part[1])


def _collective(instruction: hlo.Instruction) -> str:
    return next((kind for kind in hlo.COLLECTIVES if instruction.opcode in (kind, f'{kind}-start')), '')


def _group(instruction: hlo.Instruction, mesh: jax.sharding.Mesh) -> tuple[str, int]:
    """(mesh axes, devices) that a collective joins."""
    named = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", instruction.attributes)
    if named:
        sizes = [int(size) for size in re.findall(r'=(\d+)', named.group(1))]
        chosen = [int(axis) for axis in re.findall(r'axis_(\d+)', named.group(2))]
        return _axes(mesh, math.prod(sizes[axis] for axis in chosen)), math.prod(sizes[axis] for axis in chosen)
    grid = re.search(r'replica_groups=\[(\d+),(\d+)\]', instruction.attributes)
    listed = re.search(r'replica_groups=\{\{([\d,]*)\}', instruction.attributes)
    size = int(grid.group(2)) if grid else len(listed.group(1).split(',')) if listed else mesh.size
    return _axes(mesh, size), size


def _axes(mesh: jax.sharding.Mesh, size: int) -> str:
    """The mesh axes whose sizes multiply up to `size`, fewest first."""
    axes = [axis for axis, extent in mesh.shape.items() if extent > 1]
    for count in range(1, len(axes) + 1):
        for some in itertools.combinations(axes, count):
            if math.prod(mesh.shape[axis] for axis in some) == size:
                return ' x '.join(some)
    return f'{size} devices'


def _payload(instruction: hlo.Instruction) -> int:
    """Bytes of the reduced, or the gathered, array."""
    arrays = instruction.arrays
    if instruction.opcode.endswith('-start') and len(arrays) > 1:
        arrays = arrays[len(arrays) // 2:]
    return sum(array.bytes for array in arrays)


def _collective_seconds(instruction: hlo.Instruction, kind: str, known: hardware.Device, mesh: jax.sharding.Mesh
                        ) -> float:
    axes, size = _group(instruction, mesh)
    if size < 2:
        return 0.0
    rounds = {'all-reduce': 2.0, 'collective-permute': 1.0}.get(kind, 1.0) * (size - 1) / size
    payload = _payload(instruction) * (size if kind == 'reduce-scatter' else 1)
    rate = hardware.DATA_CENTRE_GB_S if 'slice' in axes else known.link_gb_s
    return rounds * payload / (rate * 1e9)


def collectives(step: Step) -> list[dict[str, Any]]:
    """Bytes a step of each kind of collective over each mesh axis, largest first."""
    found: dict[tuple[str, str, bool], list[int]] = collections.defaultdict(lambda: [0, 0])
    loops = _loops(step.program)
    for computation, instruction, times in step.program.walk():
        kind = _collective(instruction)
        if kind:
            axes, size = _group(instruction, step.mesh)
            entry = found[kind, axes, computation in loops]
            entry[0] += times * _payload(instruction) * (size if kind == 'reduce-scatter' else 1)
            entry[1] += times
    rows = [{'kind': kind, 'axes': axes, 'in_loop': looped, 'bytes': size, 'times': times}
            for (kind, axes, looped), (size, times) in found.items()]
    return sorted(rows, key=lambda row: -row['bytes'])


def _loops(program: hlo.Program) -> set[str]:
    return {i.attribute(r'body=%?([\w.\-]+)') for body in program.computations.values() for i in body.values()
            if i.opcode == 'while'}


def least_gradient_bytes(step: Step) -> int:
    """Of reducing every gradient once: two bytes (bf16) for each parameter that a device holds of `tensor`'s share."""
    shardings = jax.tree.leaves(partition.gathered(step.state.params, step.mesh))
    return sum(2 * math.prod(s.shard_shape(x.shape)) for x, s in zip(jax.tree.leaves(step.state.params), shardings))


def findings(step: Step, config: ConfigDict, length: int, batch_size: int) -> dict[str, list[str]]:
    """What should not be there: a [B, L, V] buffer, float32 products in the trunk."""
    rows = batch_size // partition.data_devices(step.mesh) // config.accumulation
    vocab = padded_vocab_size(config.model.embeddings.vocab_size) // step.mesh.shape['tensor']
    whole, float32 = set(), set()
    for computation, body in step.program.computations.items():
        for instruction in body.values():
            for array in instruction.arrays:
                if vocab in array.dims and math.prod(array.dims) >= rows * length * vocab:
                    whole.add(f'{array.dtype}{list(array.dims)} {instruction.path}')
            if instruction.opcode in ('dot', 'convolution') and '/encoder/' in instruction.path:
                inputs = step.program.inputs(computation, instruction)
                if config.model.dtype == 'bfloat16' and all(array.dtype == 'f32' for array in inputs):
                    float32.add(instruction.path)
    return {'buffers of all positions times the vocabulary': sorted(whole),
            'float32 products in the trunk': sorted(float32)}
