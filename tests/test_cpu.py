"""What the package sets for CPUs: right numbers where jaxlib 0.10.2 has wrong ones (jax-ml/jax#39103), and memory."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT


def squares(rows):
    """A matrix-vector product for each row, reduced: |row|^2, since the matrix is the identity."""
    matrix = jnp.eye(3, dtype=rows.dtype)
    return jax.vmap(lambda row: jnp.sum((matrix @ row) ** 2))(rows)


@pytest.mark.parametrize('count', [1_025, 16_385, 32_769])
def test_mapped_products_reduce_to_the_right_numbers(count):
    first = jnp.arange(count, dtype=jnp.float32)
    rows = jnp.stack([first, jnp.zeros_like(first), jnp.zeros_like(first)], axis=1)
    np.testing.assert_array_equal(jax.jit(squares)(rows), squares(rows))
    assert float(jax.jit(squares)(rows)[-1]) == (count - 1) ** 2


def test_the_flag_is_set_before_the_backend_opens_and_keeps_the_users_flags():
    code = 'import bert_jax, os, jax; print(jax.device_count(), os.environ["XLA_FLAGS"])'
    flags = '--xla_force_host_platform_device_count=3'
    result = subprocess.run([sys.executable, '-c', code], cwd=ROOT, text=True, capture_output=True, check=True,
                            env=os.environ | {'XLA_FLAGS': flags, 'PYTHONPATH': str(ROOT)})
    assert result.stdout.startswith('3 ' + flags)


def test_a_step_takes_no_new_memory_from_the_kernel():
    """What one step frees serves the next: after some steps, no page faults."""
    code = '''
import resource, jax, jax.numpy as jnp
from bert_jax import train
step = jax.jit(jnp.tanh)
x, faults = jax.random.normal(jax.random.key(0), (3000, 3000)), []
for _ in range(60):
    jax.block_until_ready(step(x))
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(faults[-1] - faults[-21])
'''
    result = subprocess.run([sys.executable, '-c', code], cwd=ROOT, text=True, capture_output=True, check=True,
                            env=os.environ | {'PYTHONPATH': str(ROOT)})
    assert int(result.stdout) < 2000  # 180,000 where memory goes back to the kernel and comes again
