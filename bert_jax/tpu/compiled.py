"""A training step compiled for devices that need not be there, and what can be read from it."""

import collections
import dataclasses
import math
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from bert_jax import hardware, optimizer, partition, train
from bert_jax.data import examples
from bert_jax.model import model as models
from bert_jax.model.embeddings import padded_vocab_size
from bert_jax.tpu import hlo

CHANNEL = r'channel_id=(\d+)'


@dataclasses.dataclass
class Step:
    """A compiled training step, what it was made of, and bytes that a micro-batch keeps for its backward pass.

    `fixed` are arrays that are no part of the state, as in train.train_step.
    """

    compiled: Any
    program: hlo.Program
    state: train.TrainState
    mesh: jax.sharding.Mesh
    seconds: float
    kept: int
    fixed: Any = None


def compile_step(config: ConfigDict, devices: list[jax.Device], length: int, batch_size: int, fixed: Any = None,
                 annotate: Callable | None = None) -> Step:
    """The step that pre-training would run.

    Args:
      config: of pre-training.
      devices: what to compile for.
      length, batch_size: of the batch.
      fixed, annotate: shapes of arrays outside the state, and what they add to a batch, as in train.train_step.

    Raises:
      UserError: a mesh or batch that does not fit the devices.
      jax.errors.JaxRuntimeError: more memory than there is.
    """
    model, tx = models.build(config.model), optimizer.make_optimizer(**config.optimizer)
    batch = _shapes(config, batch_size, length)
    state = train.state_shapes(model, tx, examples.empty(1, length, **config.examples))
    mesh = partition.make_mesh(config.mesh, state, devices, config.accumulation, fixed)
    partition.check_batch_size(batch_size, partition.data_devices(mesh), config.accumulation)
    beside = {'fixed': {train.SOURCE: fixed}, 'annotate': {train.SOURCE: annotate}} if fixed else {}
    step = train.make_train_step(model, tx, mesh, config.accumulation, state, **beside)
    hyper = train.as_hyper(0.0, models.target_weights(config.model), 0)
    start = time.perf_counter()
    args = (beside['fixed'],) if fixed else ()
    compiled = step.lower(state, {train.SOURCE: batch}, hyper, *args).compile()
    seconds = time.perf_counter() - start
    kept = _kept(model, state.params, fixed, annotate, _shapes(config, batch_size // config.accumulation, length))
    return Step(compiled, hlo.Program(compiled.as_text()), state, mesh, seconds, kept, fixed)


def _shapes(config: ConfigDict, rows: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Of a batch."""
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in examples.empty(
        rows, length, **config.examples).items()}


def _kept(model: models.Model, params: Any, fixed: Any, annotate: Callable | None, batch: Any) -> int:
    """Bytes of activations that the forward pass leaves for the backward one, as JAX writes it down."""
    def losses(params: Any, fixed: Any, batch: Any) -> Any:
        batch = annotate(fixed, batch) if annotate else batch
        rngs = {'dropout': jax.random.key(0)}
        return {name: terms['loss'].total for name, terms in model.apply(
            {'params': params}, batch, train=True, rngs=rngs, method='losses').items()}

    def backward(params: Any, fixed: Any, batch: Any) -> Any:
        return jax.vjp(lambda p: losses(p, fixed, batch), params)[1]

    given = params, fixed, batch
    known = collections.Counter((x.shape, x.dtype) for x in jax.tree.leaves(given))
    size = 0
    for x in jax.tree.leaves(jax.eval_shape(backward, *given)):  # weights and inputs are there anyway
        if known[x.shape, x.dtype]:
            known[x.shape, x.dtype] -= 1
        elif not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            size += math.prod(x.shape) * x.dtype.itemsize
    return size


def memory(step: Step, device: jax.Device) -> dict[str, float]:
    """Bytes a device."""
    stats = step.compiled.memory_analysis()

    def held(tree: Any) -> int:
        shardings = jax.tree.leaves(partition.shardings(tree, step.mesh))
        return sum(math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize
                   for x, s in zip(jax.tree.leaves(tree), shardings))

    params, opt_state = held({'params': step.state.params}), held({'opt_state': step.state.opt_state})
    beside = {'fixed': held(step.fixed)} if step.fixed else {}
    total = (stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
             + stats.temp_size_in_bytes + stats.generated_code_size_in_bytes)
    return {'parameters': params, 'optimizer': opt_state, **beside,
            'batch': stats.argument_size_in_bytes - params - opt_state - sum(beside.values()),
            'activations': step.kept // partition.data_devices(step.mesh),
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
    """Of a computation, by what limits; what is started and awaited later costs what was not there by then.

    What goes between slices waits for what was sent there before.
    """
    spent: collections.Counter = collections.Counter()
    started: dict[str, tuple[str, float]] = {}  # -> what it is, when it will be there
    now = network = 0.0  # when the way to the other slices is free
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
            if instruction.between_slices:
                network = max(now, network) + took
                started[instruction.name], took = (what, network), 0.0
            elif instruction.opcode.endswith('-start'):
                started[instruction.name], took = (what, now + took), 0.0
            carried, ends = program.carried(instruction)
            for one in carried:
                there = now + _collective_seconds(one, one.opcode, known, mesh)
                _, there = started.setdefault(one.attribute(CHANNEL), ('collectives', there))
                if ends:
                    what, took = 'collectives', max(0.0, there - now)
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
    """(mesh axes, devices) that a collective joins: along which its first group runs."""
    if instruction.between_slices:
        return 'slice', mesh.shape['slice']
    members = _members(instruction.attributes, mesh.size)
    places = np.unravel_index(members, tuple(mesh.shape.values()))
    axes = [axis for axis, place in zip(mesh.shape, places) if len(set(place.tolist())) > 1]
    return ' x '.join(axes) or 'one device', len(members)


def _share_of_links(instruction: hlo.Instruction, known: hardware.Device, mesh: jax.sharding.Mesh) -> float:
    """How many of a chip's links a group uses: those along the dimensions of the torus in which its devices differ."""
    members = mesh.devices.ravel()[_members(instruction.attributes, mesh.size)]
    places = np.array([getattr(device, 'coords', (0,)) for device in members])
    return max(1, sum(len(set(along.tolist())) > 1 for along in places.T)) / known.torus


def _members(attributes: str, count: int) -> np.ndarray:
    """The first group of devices, as numbers in the mesh's order; all `count` where none are named."""
    named = re.search(r'replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((\S+)\))? \{([^}]*)\}', attributes)
    if named:
        sizes = [int(size) for size in re.findall(r'=(\d+)', named.group(1))]
        chosen = [int(axis) for axis in re.findall(r'axis_(\d+)', named.group(3))]
        ids = _transposed(named.group(2) or f'[{math.prod(sizes)}]').reshape(sizes)
        return ids[tuple(slice(None) if axis in chosen else 0 for axis in range(len(sizes)))].ravel()
    grid = re.search(r'replica_groups=\[(\d+),(\d+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)', attributes)
    if grid:
        return _transposed(grid.group(3))[:int(grid.group(2))]
    listed = re.search(r'(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}', attributes)
    if not listed and re.search(r'replica_groups=(?!\{\})', attributes):
        raise ValueError(f'replica groups in a form that is not known: {attributes}')
    return np.array([int(one) for one in listed.group(1).split(',')]) if listed else np.arange(count)


def _transposed(text: str) -> np.ndarray:
    """'[4,2]T(1,0)' -> 0 to 7 as a grid of 4 x 2, transposed and flattened."""
    sizes, order = ([int(n) for n in part.split(',')] if part else None
                    for part in re.fullmatch(r'\[([\d,]+)\](?:T\(([\d,]+)\))?', text).groups())
    return np.arange(math.prod(sizes)).reshape(sizes).transpose(order).ravel()


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
    rounds = 1.0 if kind == 'collective-permute' else (2.0 if kind == 'all-reduce' else 1.0) * (size - 1) / size
    payload = _payload(instruction) * (size if kind == 'reduce-scatter' else 1)
    if 'slice' in axes:
        return rounds * payload / (known.network_gb_s * 1e9)
    return rounds * payload / (known.link_gb_s * _share_of_links(instruction, known, mesh) * 1e9)


def collectives(step: Step) -> list[dict[str, Any]]:
    """Bytes a step of each kind of collective over each mesh axis, largest first."""
    found: dict[tuple[str, str, bool], list[int]] = collections.defaultdict(lambda: [0, 0])
    loops, seen = _loops(step.program), set()
    for computation, instruction, times in step.program.walk():
        carried, _ = step.program.carried(instruction)
        for one in (instruction, *carried):
            kind, channel = _collective(one), one.attribute(CHANNEL)
            if not kind or (one in carried and channel in seen):
                continue
            seen.add(channel)
            axes, size = _group(one, step.mesh)
            entry = found[kind, axes, computation in loops]
            entry[0] += times * _payload(one) * (size if kind == 'reduce-scatter' else 1)
            entry[1] += times
    rows = [{'kind': kind, 'axes': axes, 'in_loop': looped, 'bytes': size, 'times': times}
            for (kind, axes, looped), (size, times) in found.items()]
    return sorted(rows, key=lambda row: -row['bytes'])


def _loops(program: hlo.Program) -> set[str]:
    return {i.attribute(r'body=%?([\w.\-]+)') for body in program.computations.values() for i in body.values()
            if i.opcode == 'while'}


def least_bytes(step: Step, config: ConfigDict, length: int, batch_size: int) -> dict[str, int]:
    """The least that a step must send of what, in bf16.

    Gradients: each once over `fsdp`, of the parameters that a device holds of `tensor`'s share; what that leaves a
    device of them over `data`, and what that leaves between slices. Parameters over `fsdp`: each gathered for the
    forward and for the backward pass. Activations over `tensor`: four sums of [B, L, D] a layer.
    """
    shardings = jax.tree.leaves(partition.gathered(step.state.params, step.mesh))
    params = sum(2 * math.prod(s.shard_shape(x.shape)) for x, s in zip(jax.tree.leaves(step.state.params), shardings))
    rows = batch_size // partition.data_devices(step.mesh)
    activations = 4 * config.model.encoder.num_layers * rows * length * config.model.embeddings.hidden_size * 2
    gradients, held = 0, params
    for axis in reversed(partition.BATCH):
        gradients += held * (step.mesh.shape[axis] > 1)
        held //= step.mesh.shape[axis]
    return {'gradients': gradients, 'parameters over fsdp': 2 * params * (step.mesh.shape['fsdp'] > 1),
            'activations over tensor': activations if step.mesh.shape['tensor'] > 1 else 0}


def findings(step: Step, config: ConfigDict, length: int, batch_size: int) -> dict[str, list[str]]:
    """What should not be there: a [B, L, V] buffer, float32 products in the trunk, gradients reduced too often."""
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
                if config.model.run.dtype == 'bfloat16' and all(array.dtype == 'f32' for array in inputs):
                    float32.add(instruction.path)
    often = [f'{row["kind"]} over {row["axes"]}, {row["bytes"] / 1e6:,.1f} MB' for row in collectives(step)
             if config.accumulation > 1 and row['in_loop'] and row['axes'] != 'tensor'
             and row['kind'] in ('all-reduce', 'reduce-scatter')]
    return {'buffers of all positions times the vocabulary': sorted(whole),
            'float32 products in the trunk': sorted(float32), 'reductions in the loop over micro-batches': often}
