"""Mesh and shardings: the only file that writes a PartitionSpec.

Mesh axes: `data` splits the batch; `fsdp` splits the batch too, and every parameter's largest dimension;
`tensor` splits heads, MLP and vocabulary.
"""

import contextlib
import math
import re
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bert_jax.cli import UserError

AXES = ('data', 'fsdp', 'tensor')
BATCH = ('data', 'fsdp')
LOGICAL_RULES = (  # activations: what the modules name -> mesh axes
    ('batch', BATCH), ('length', None), ('hidden', None), ('predictions', None), ('vocab', 'tensor'))
TENSOR_RULES = (  # parameters: path -> the dimension that `tensor` splits, from the end
    (r'attention/qkv/(kernel|bias)$', -3),  # [N, D, H, 3, K]: heads
    (r'attention/out/kernel$', -3),         # [N, H, K, D]: heads
    (r'mlp/up/(kernel|bias)$', -1),         # [N, D, F]
    (r'mlp/down/kernel$', -2),              # [N, F, D]
    (r'embeddings/token$', -2),             # [V, D]: vocabulary
)


def make_mesh(shape: tuple[int, ...]) -> Mesh:
    """A mesh over all devices; shape gives the sizes of `data`, `fsdp`, `tensor`, one of which may be -1."""
    devices = jax.device_count()
    shape = list(shape)
    if len(shape) != len(AXES):
        raise UserError(f'mesh {tuple(shape)}: three sizes are expected, for {", ".join(AXES)}.')
    if shape.count(-1) == 1:
        rest = -math.prod(shape)
        shape[shape.index(-1)] = devices // rest
    if math.prod(shape) != devices or min(shape) < 1:
        raise UserError(f'mesh {dict(zip(AXES, shape))} needs {math.prod(shape)} devices, there are {devices}; '
                        'one size may be -1 for all that is left.')
    return jax.make_mesh(tuple(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def data_devices(mesh: Mesh) -> int:
    """Into how many parts the batch is cut."""
    return mesh.shape['data'] * mesh.shape['fsdp']


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over `data` and `fsdp`."""
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
      UserError: `tensor` does not divide a dimension it splits.
    """
    return jax.tree_util.tree_map_with_path(lambda path, leaf: NamedSharding(mesh, _spec(path, leaf, mesh)), state)


def gathered(params: Any, mesh: Mesh) -> Any:
    """Shardings of parameters with `fsdp` gathered and `tensor` still split."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, _spec(path, leaf, mesh, fsdp=False)), params)


def per_shard(params: Any, mesh: Mesh) -> Any:
    """Shardings of [shard, *parameter]: a gradient for each device that splits the batch."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, P(BATCH, *_spec(path, leaf, mesh, fsdp=False))), params)


def _spec(path: tuple, leaf: Any, mesh: Mesh, fsdp: bool = True) -> P:
    name = '/'.join(str(getattr(key, 'key', getattr(key, 'name', getattr(key, 'idx', '')))) for key in path)
    spec: list[str | None] = [None] * np.ndim(leaf)
    tensor, split = mesh.shape['tensor'], mesh.shape['fsdp']
    for pattern, dimension in TENSOR_RULES:
        if tensor > 1 and re.search(pattern, name):
            if leaf.shape[dimension] % tensor:
                raise UserError(f'{name} {leaf.shape}: dimension {dimension} is not divisible by tensor = {tensor}.')
            spec[dimension] = 'tensor'
    first = 1 if '/layers/' in f'/{name}/' else 0  # the layer axis stays whole: scan walks along it
    free = [d for d in range(first, np.ndim(leaf)) if spec[d] is None and leaf.shape[d] % split == 0]
    if fsdp and split > 1 and free:
        spec[max(free, key=lambda d: leaf.shape[d])] = 'fsdp'
    return P(*spec)


@contextlib.contextmanager
def logical_axes(mesh: Mesh, split_batch: bool = True) -> Iterator[None]:
    """The context in which modules' logical axes become mesh axes.

    Inside a computation that is mapped over shards already, `split_batch` is False.
    """
    rules = tuple((name, axes) for name, axes in LOGICAL_RULES if split_batch or name != 'batch')
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), nn.logical_axis_rules(rules):
        yield
