"""The same training on 1 device and on 8, cut by data, fsdp and tensor, with and without micro-batches."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import ROOT

from bert_jax import partition
from bert_jax.cli import UserError


@pytest.fixture(scope='module')
def results():
    env = os.environ | {'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu',
                        'XLA_FLAGS': '--xla_force_host_platform_device_count=8'}
    done = subprocess.run([sys.executable, 'tests/mesh_check.py'], cwd=ROOT, env=env, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


MESHES = ('8 data', '2 data x 4 fsdp', '2 data x 2 fsdp x 2 tensor', '1 device, accumulation 4',
          '8 data, accumulation 4', '2 data x 2 fsdp x 2 tensor, accumulation 4')


@pytest.mark.parametrize('mesh', MESHES)
def test_losses_and_updates_agree_over_ten_steps(results, mesh):
    np.testing.assert_allclose(results[mesh]['losses'], results['1 device']['losses'], rtol=1e-5)
    assert results[mesh]['norm_error'] < 1e-5


def test_parameters_shrink_as_the_axes_say(results):
    whole = results['1 device']['per_device']
    assert results['8 data']['per_device'] == whole
    for mesh, least, most in (('2 data x 4 fsdp', 0.25, 0.27), ('2 data x 2 fsdp x 2 tensor', 0.25, 0.33)):
        for part in ('params', 'opt_state'):
            assert least <= results[mesh]['per_device'][part] / whole[part] < most, (mesh, part)


def test_gradients_are_reduced_once_a_step_and_never_inside_the_loop(results):
    """In pure data-parallel training nothing but gradients is large: not one element crosses in the loop."""
    inside_outside = results['8 data, accumulation 4']['reductions']
    gradient_elements = results['count']
    assert not inside_outside['inside']
    assert gradient_elements <= sum(inside_outside['outside']) < gradient_elements + 100  # and a few counts


def test_dropout_differs_by_row_device_micro_batch_and_step(results):
    """32 equal rows on 8 devices, in one batch or in 4 micro-batches, over 2 steps: 64 different outcomes."""
    assert results['dropout_rows'] == {'1': [64, 64], '4': [64, 64]}


def test_make_mesh_says_what_does_not_fit():
    n = jax.device_count()
    assert partition.make_mesh((-1, 1, 1)).shape['data'] == n
    for shape, words in (((3 * n, 1, 1), 'devices'), ((1, 1), 'three sizes'), ((0, 1, 1), 'devices')):
        with pytest.raises(UserError, match=words):
            partition.make_mesh(shape)
