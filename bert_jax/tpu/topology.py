"""TPU slices that need not exist: their names, and devices to compile for."""

import importlib.util
import math
import os
from typing import Any

import jax

from bert_jax import cli
from bert_jax.cli import UserError, unknown

FLAT = ('1x1', '2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16')
CUBIC = ('2x2x1', '2x2x2', '2x2x4', '2x4x4', '4x4x4', '4x4x8', '4x8x8', '8x8x8', '8x8x16', '8x16x16', '16x16x16')
SQUARE = ('2x2', '4x4', '4x8', '8x8', '8x16', '16x16')
LAYOUTS = {'v2': SQUARE, 'v3': (*SQUARE, '16x32', '32x32'), 'v4': CUBIC, 'v5e': FLAT, 'v5p': CUBIC, 'v6e': FLAT}
BY_CHIP = ('v5e', 'v6e')  # slices named by chips; the others by cores, two a chip


def names() -> dict[str, str]:
    """Every known slice: its name in the cloud -> generation:layout."""
    found = {}
    for generation, layouts in LAYOUTS.items():
        for layout in layouts:
            chips = math.prod(map(int, layout.split('x')))
            found[f'{generation}-{chips * (1 if generation in BY_CHIP else 2)}'] = f'{generation}:{layout}'
    return found


def devices(name: str, slices: int = 1) -> list[jax.Device]:
    """The devices of a slice that need not exist.

    Raises:
      UserError: an unknown name, fewer than one slice; libtpu is missing, or in use by another process.
    """
    if slices < 1:
        raise UserError(f'--slices {slices}: one or more is expected.')
    known = names()
    layout = known.get(name.lower().replace('litepod', 'e').replace('v5lite', 'v5e'), name)
    if layout not in known.values():
        raise unknown('topology', name, [*known, *known.values()])
    if importlib.util.find_spec('libtpu') is None:
        raise UserError('The TPU compiler is missing: pip install -r requirements-tpu.txt.')
    os.environ |= {'TPU_SKIP_MDS_QUERY': '1', 'TPU_ACCELERATOR_TYPE': 'v5litepod-16',
                   'TPU_WORKER_HOSTNAMES': 'localhost', 'TF_CPP_MIN_LOG_LEVEL': '3',
                   'ALLOW_MULTIPLE_LIBTPU_LOAD': '1'}  # or libtpu looks for a TPU
    jax.config.update('jax_platforms', 'cpu')
    jax.config.update('jax_enable_compilation_cache', False)  # programs for what is not there cannot be read back
    from jax.experimental import topologies as of_jax

    extra: dict[str, Any] = {'chip_config_name': 'megacore'} if layout.startswith(('v4', 'v5p')) else {}
    if slices > 1:
        extra['num_slices'] = slices
    try:
        return list(of_jax.get_topology_desc(platform='tpu', topology_name=layout, **extra).devices)
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f'{layout}: {cli.first_line(error)}') from error
