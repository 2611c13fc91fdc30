"""Mesh and shardings: the only file that writes a PartitionSpec.

Mesh axes: `slice` splits the batch between TPU slices, which the data-centre's network joins; `data` splits it within a
slice; `fsdp` splits the batch too, and every parameter's largest dimension; `tensor` splits heads, MLP and vocabulary.
"""

import contextlib
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bert_jax import cli, hardware
from bert_jax.cli import UserError

AXES = ('slice', 'data', 'fsdp', 'tensor')
BATCH = ('slice', 'data', 'fsdp')
STATE_SHARE = 0.6  # of a device's memory, that parameters, gradients and optimizer state may take unsplit
LOGICAL_RULES = (  # activations: what the modules name -> mesh axes
    ('batch', BATCH), ('length', None), ('hidden', None), ('predictions', None), ('vocab', 'tensor'))
TENSOR_RULES = (  # parameters: path -> the dimension that `tensor` splits, from the end
    (r'attention/qkv/(kernel|bias)$', -3),  # [N, D, H, 3, K]: heads
    (r'attention/out/kernel$', -3),         # [N, H, K, D]: heads
    (r'mlp/up/(kernel|bias)$', -1),         # [N, D, F]
    (r'mlp/down/kernel$', -2),              # [N, F, D]
    (r'embeddings/token$', -2),             # [V, D]: vocabulary
)
SMALL = ('bias', 'scale')  # what `fsdp` leaves whole


def make_mesh(shape: tuple[int, ...], state: Any = None, devices: Sequence[jax.Device] = (), accumulation: int = 1,
              fixed: Any = None) -> Mesh:
    """The mesh over all devices.

    Args:
      shape: sizes of `data`, `fsdp` and `tensor` in each slice, one of which may be -1; () for the smallest `fsdp` with
        which the state fits, 1 if possible, and the rest `data`.
      state: a TrainState, or its shapes; for ().
      devices: default: JAX's own.
      accumulation: micro-batches, while which each device has parameters and gradients whole; for ().
      fixed: arrays that are no part of the state, such as a teacher's parameters; for ().

    Raises:
      UserError: sizes that do not multiply up to the devices.
    """
    devices, slices = devices or jax.devices(), {}
    for device in devices:
        number = getattr(device, 'slice_index', None) if device.platform == 'tpu' else 0  # elsewhere a host is a slice
        slices.setdefault(number or 0, []).append(device)
    count, found = len(slices[0]), list(shape) or automatic_shape(state, slices[0], accumulation, fixed)
    if len(found) != len(AXES) - 1:
        raise UserError(f'mesh {tuple(shape)}: three sizes are expected, for {", ".join(AXES[1:])}.')
    if found.count(-1) == 1 and 0 not in found:
        found[found.index(-1)] = count // -math.prod(found)
    if math.prod(found) != count or min(found) < 1:
        raise UserError(f'mesh {dict(zip(AXES[1:], found))} needs {math.prod(found)} devices, there are {count}'
                        f'{" in each slice" * (len(slices) > 1)}; one size may be -1 for all that is left.')
    try:
        grids = [mesh_utils.create_device_mesh(found, members, allow_split_physical_axes=True)
                 for _, members in sorted(slices.items())]
    except (NotImplementedError, ValueError, AssertionError) as error:
        raise UserError(f'mesh {dict(zip(AXES[1:], found))} does not fit the wiring of {devices[0].device_kind}: '
                        f'{cli.first_line(error)}') from error
    return Mesh(np.stack(grids), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def automatic_shape(state: Any, devices: Sequence[jax.Device], accumulation: int = 1, fixed: Any = None) -> list[int]:
    """Data-parallel, or with the smallest `fsdp` that leaves most of the memory to the rest of the step."""
    memory = hardware.memory_bytes(devices[0])
    if state is None or memory is None:
        return [-1, 1, 1]
    held, params, beside = (sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))
                            for tree in (state, state.params, fixed))
    split, whole = (held + params, 0) if accumulation == 1 else (held, 2 * params + beside)  # gradients are as large
    split += beside
    enough = [n for n in range(1, len(devices) + 1)
              if len(devices) % n == 0 and split / n + whole <= STATE_SHARE * memory]
    return [-1, enough[0] if enough else len(devices), 1]


def data_devices(mesh: Mesh) -> int:
    """Into how many parts the batch is cut."""
    return math.prod(mesh.shape[axis] for axis in BATCH)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over `slice`, `data` and `fsdp`."""
    return NamedSharding(mesh, P(BATCH))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, P())


def micro_batch_sharding(mesh: Mesh) -> NamedSharding:
    """[micro-batch, shard, row, ...]: shards over the devices that split the batch."""
    return NamedSharding(mesh, P(None, BATCH))


def state_shardings(state: Any, mesh: Mesh) -> Any:
    """The sharding of every array of a state (parameters, optimizer state, step), by its path.

    Raises:
      UserError: `tensor` does not divide a dimension it splits, or splits nothing of the encoder.
    """
    names = [_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)]
    encoder = [name for name in names if 'encoder/' in name]
    if mesh.shape['tensor'] > 1 and not any(re.search(rule, name) for rule, _ in TENSOR_RULES for name in encoder):
        raise UserError(f'mesh with tensor = {mesh.shape["tensor"]}: no rule of partition.TENSOR_RULES matches a '
                        'parameter of this encoder, which would lie whole on every device; take tensor = 1.')
    return shardings(state, mesh)


def shardings(tree: Any, mesh: Mesh) -> Any:
    """The sharding of every array of a tree of parameters, by its path: a teacher's, say."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: NamedSharding(mesh, _spec(path, leaf, mesh)), tree)


def gathered(params: Any, mesh: Mesh) -> Any:
    """Shardings of parameters with `fsdp` gathered and `tensor` still split."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, _spec(path, leaf, mesh, fsdp=False)), params)


def per_shard(params: Any, mesh: Mesh) -> Any:
    """Shardings of [shard, *parameter]: a gradient for each device that splits the batch."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, P(BATCH, *_spec(path, leaf, mesh, fsdp=False))), params)


def describe(params: Any, mesh: Mesh) -> list[tuple[str, tuple[int, ...], str, int]]:
    """(name, shape, how it is split, bytes a device) of every parameter."""
    rows = []
    for (path, leaf), sharding in zip(jax.tree_util.tree_leaves_with_path(params),
                                      jax.tree.leaves(state_shardings(params, mesh))):
        split = ', '.join(str(axis or '-') for axis in (*sharding.spec, *[None] * (leaf.ndim - len(sharding.spec))))
        size = math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        rows.append((_name(path), leaf.shape, split, size))
    return rows


def _name(path: tuple) -> str:
    return '/'.join(str(getattr(key, 'key', getattr(key, 'name', getattr(key, 'idx', '')))) for key in path)


def _spec(path: tuple, leaf: Any, mesh: Mesh, fsdp: bool = True) -> P:
    name = _name(path)
    return _spec_of(name, leaf, mesh, fsdp, '/layers/' in f'/{name}/')


def _spec_of(name: str, leaf: Any, mesh: Any, fsdp: bool, stacked: bool) -> P:
    spec: list[str | None] = [None] * np.ndim(leaf)
    tensor, split = mesh.shape['tensor'], mesh.shape['fsdp']
    for pattern, dimension in TENSOR_RULES:
        if tensor > 1 and re.search(pattern, name):
            if leaf.shape[dimension] % tensor:
                raise UserError(f'{name} {leaf.shape}: dimension {dimension} is not divisible by tensor = {tensor}.')
            spec[dimension] = 'tensor'
    free = [d for d in range(int(stacked), np.ndim(leaf))  # the layer axis stays whole: scan walks along it
            if spec[d] is None and leaf.shape[d] % split == 0]
    if fsdp and split > 1 and free and not name.endswith(SMALL):
        spec[max(free, key=lambda d: leaf.shape[d])] = 'fsdp'
    return P(*spec)


def copies(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """[parts, *x.shape]: x once for each part into which devices cut the batch (1 outside `logical_axes`).

    Each device holds one, so nothing is copied; the gradients of all uses are added there before devices talk.

    Args:
      x: parameters.
      axes: the logical names of its axes.
    """
    split = dict(nn.get_logical_axis_rules()).get('batch') or ()
    parts = math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in split)
    return constrain(jnp.broadcast_to(x, (parts, *x.shape)), 'batch', *axes)


def gathers() -> bool:
    """Whether layers find their parameters split over `fsdp` (inside `logical_axes`)."""
    return jax.sharding.get_abstract_mesh().shape.get('fsdp', 1) > 1 and 'batch' in dict(nn.get_logical_axis_rules())


def whole(x: jax.Array, name: str) -> jax.Array:
    """A layer's parameter, gathered over `fsdp` where it is used; its gradient is reduced to the parts.

    Args:
      x: the parameter of one layer, in the type it is used in: that is what is sent.
      name: its path.
    """
    if not gathers():
        return x
    together, parts = (_spec_of(name, x, jax.sharding.get_abstract_mesh(), fsdp, stacked=False)
                       for fsdp in (False, True))
    place = jax.lax.with_sharding_constraint
    gather = jax.custom_vjp(lambda x: place(x, together))
    gather.defvjp(lambda x: (place(x, together), None), lambda _, grad: (place(grad, parts),))
    return gather(x)


def keep_parts(primitive: Any, *_: Any, **__: Any) -> bool:
    """A policy of `jax.checkpoint`: the backward pass gathers parameters again, and finds everything else."""
    return primitive.name != 'sharding_constraint'


def compiler_options(mesh: Mesh) -> dict[str, str]:
    """For XLA: a product with a gathered parameter stays one product.

    On TPUs it would be cut into a loop over the parts as they come, whose small products are slower together than
    gathering ahead: 458 ms a step of BERT-large instead of 300 (`compile_check`, v5e:4x4, fsdp 16, 96 x 128 a device).
    """
    cut = mesh.shape['fsdp'] > 1 and mesh.devices.flat[0].platform == 'tpu'
    return {'xla_jf_spmd_threshold_for_windowed_einsum_mib': '100000'} if cut else {}


def constrain(x: jax.Array, *axes: str) -> jax.Array:
    """x, split as the logical names of its axes say (inside `logical_axes`).

    Raises:
      KeyError: a name that LOGICAL_RULES does not know; Flax would leave that axis whole without a word.
    """
    known = dict(LOGICAL_RULES)
    for axis in axes:
        known[axis]
    return nn.with_logical_constraint(x, axes)


@contextlib.contextmanager
def logical_axes(mesh: Mesh, split_batch: bool = True) -> Iterator[None]:
    """The context in which modules' logical axes become mesh axes.

    Inside a computation that is mapped over shards already, `split_batch` is False.
    """
    rules = tuple((name, axes) for name, axes in LOGICAL_RULES if split_batch or name != 'batch')
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), nn.logical_axis_rules(rules):
        yield


def check_batch_size(batch_size: int, devices: int, accumulation: int) -> None:
    """Raises UserError when a batch cannot be cut evenly."""
    if batch_size < 1 or accumulation < 1 or batch_size % (devices * accumulation):
        unit = max(1, devices * accumulation)
        raise UserError(f'A batch of {batch_size} is not divisible by {devices} devices '
                        f'x {accumulation} micro-batches; the nearest is {max(1, round(batch_size / unit)) * unit}.')
