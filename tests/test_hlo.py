"""What is read from a compiled program, against what is known of it; TPU programs where libtpu is installed."""

import importlib.util
import json
import math
import re

import jax
import jax.numpy as jnp
import models
import pytest
from conftest import expect_error, run_module

from bert_jax import flops, hardware, hlo, topology
from bert_jax.cli import UserError

LIBTPU = importlib.util.find_spec('libtpu') is not None


def compiled(function, *arguments):
    return hlo.Program(jax.jit(function).lower(*arguments).compile().as_text())


def total_flops(program):
    return sum(times * program.flops(computation, i.name) for computation, i, times in program.walk())


def test_the_flops_of_products_in_and_out_of_loops():
    x, w = jnp.ones((6, 5)), jnp.ones((7, 5, 5))
    assert total_flops(compiled(lambda x, w: x @ w[0], x, w)) == 2 * 6 * 5 * 5
    looped = compiled(lambda x, w: jax.lax.scan(lambda c, k: (jnp.tanh(c @ k), None), x, w)[0], x, w)
    assert total_flops(looped) == 7 * 2 * 6 * 5 * 5


def test_the_programs_flops_are_those_of_the_formula():
    """Forward pass of all but look-ups: a third of the formula's training step."""
    example = models.batch(padded=False)
    model = models.build('model.encoder.unroll=1', 'model.encoder.num_layers=3')
    params = model.init(jax.random.key(0), example, train=False)['params']
    program = compiled(lambda p: model.apply({'params': p}, example, train=False)['mlm']['logits'], params)
    formula = flops.sequence_flops(num_layers=3, hidden_size=models.D, mlp_size=48, vocab_size=128, tokens=models.L,
                                   squared_tokens=models.L**2, predictions=models.P) / 3 * 8
    assert total_flops(program) == pytest.approx(formula, rel=0.01)


TPU_TEXT = '''HloModule m, is_scheduled=true, input_output_alias={ {0}: (0, {}, may-alias), {1}: (1, {}, must-alias) }

%fused (p0: bf16[32,12,128,64], p1: bf16[32,12,128,64]) -> f32[32,12,128,128] {
  %p0 = bf16[32,12,128,64]{3,2,1,0:T(8,128)(2,1)} parameter(0)
  %p1 = bf16[32,12,128,64]{3,2,1,0:T(8,128)(2,1)S(1)} parameter(1)
  ROOT %c = f32[32,12,128,128]{2,3,1,0:T(8,128)} convolution(%p0, %p1), window={size=32x12 stride=31x11 lhs_dilate=32x12}, dim_labels=01bf_01oi->01bf, metadata={op_name="jit(f)/encoder/dot"}
}

%weights (p0: bf16[32,128,768], p1: bf16[32,128,12,3,64]) -> bf16[768,12,3,64] {
  %p0 = bf16[4096,768,1,1]{1,0,3,2} parameter(0)
  %p1 = bf16[12,3,4096,64]{3,2,1,0} parameter(1)
  ROOT %g = bf16[768,12,3,64]{0,3,2,1:T(8,128)(2,1)} convolution(%p0, %p1), window={size=12x3 pad=11_11x2_2 rhs_reversal=1x1}, dim_labels=fb01_01io->b01f
}

ENTRY %main (a: bf16[32,12,128,64], b: bf16[32,12,128,64]) -> f32[32,12,128,128] {
  %a = bf16[32,12,128,64]{3,2,1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[32,12,128,64]{3,2,1,0:T(8,128)(2,1)S(1)} parameter(1)
  %room = bf16[24,64,128,4096]{3,2,1,0:T(8,128)(2,1)} custom-call(), custom_call_target="AllocateBuffer"
  %kernel = bf16[24,64]{1,0:T(8,128)(2,1)} custom-call(%a), custom_call_target="tpu_custom_call"
  ROOT %f = f32[32,12,128,128]{2,3,1,0:T(8,128)} fusion(%a, %b), kind=kOutput, calls=%fused, backend_config={"estimated_cycles":"1832"}
}
'''


def test_what_the_tpu_compiler_writes():
    """A batched product as a convolution with gaps; arrays on the chip cost no memory traffic."""
    program = hlo.Program(TPU_TEXT)
    assert program.aliased == 2 and program.entry == 'main'
    assert program.flops('main', 'f') == 2 * 32 * 12 * 128 * 128 * 64
    assert program.flops('weights', 'g') == 2 * 768 * 12 * 3 * 64 * 4096
    (fusion,) = (i for _, i, _ in program.walk() if i.opcode == 'fusion')
    assert program.memory_bytes('main', fusion) == 32 * 12 * 128 * 64 * 2 + 32 * 12 * 128 * 128 * 4
    assert fusion.attribute(r'"estimated_cycles":"(\d+)"') == '1832'
    assert [i.free for _, i, _ in program.walk() if i.opcode == 'custom-call'] == [True, False]


def test_names_of_slices():
    names = topology.names()
    assert names['v4-64'] == 'v4:2x4x4' and names['v5e-256'] == 'v5e:16x16' and names['v3-32'] == 'v3:4x4'
    assert names['v5p-32'] == 'v5p:2x2x4' and names['v6e-16'] == 'v6e:4x4'
    with pytest.raises(UserError, match=r"Unknown topology 'v5e:3x5'; known: .*v5e:4x4.*v4-64"):
        topology.devices('v5e:3x5')


def test_every_device_has_its_figures():
    assert {hardware.of(type('D', (), {'device_kind': kind})).peak_tflops for kind in ('TPU v5', 'TPU v5p')} == {459}
    assert hardware.of(type('D', (), {'device_kind': 'TPU v5 lite'})).peak_tflops == 197
    assert hardware.of(jax.devices('cpu')[0]) is None


def test_help_without_libtpu_says_what_to_install(monkeypatch):
    monkeypatch.setattr(topology.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(UserError, match=r'pip install -r requirements-tpu\.txt'):
        topology.devices('v5e-16')


TINY_BF16 = ('--config', 'configs/pretrain.py:tiny,bf16', '--config.model.encoder.unroll=1', '--config.phases=((10,64,64),)')


@pytest.mark.skipif(not LIBTPU, reason='needs the TPU compiler: pip install -r requirements-tpu.txt')
def test_a_step_compiled_for_a_slice(tmp_path):
    done = run_module('compile_check', *TINY_BF16, '--topology', 'v5e-4', '--tokens', '1e9', '--parameters', '--output', tmp_path / 'out.json')
    assert done.returncode == 0, done.stderr
    (found,) = json.loads((tmp_path / 'out.json').read_text())
    assert found['devices'] == 4 and found['mesh']['data'] == 4 and found['memory']['state_aliased']
    assert found['program_flops'] == pytest.approx(found['model_flops'], rel=0.1)
    assert 0 < found['mfu'] < 1 and not any(found['findings'].values())
    assert re.search(r'1,000,000,000 tokens: [\d.,]+ hours', done.stdout) and 'embeddings/token' in done.stdout
    shapes = {name: math.prod(shape) for name, shape, *_ in found['parameters']}
    assert found['memory']['parameters'] == 4 * sum(shapes.values())


@pytest.mark.skipif(not LIBTPU, reason='needs the TPU compiler: pip install -r requirements-tpu.txt')
def test_what_does_not_fit_is_refused_with_what_does():
    done = run_module('compile_check', *TINY_BF16[:3], '--config.phases=((10,512,16384),)', '--topology', 'v5e:2x2')
    expect_error(done, 'It needs', 'of memory', 'This fits: --config.model.encoder.remat')


@pytest.mark.skipif(not LIBTPU, reason='needs the TPU compiler: pip install -r requirements-tpu.txt')
def test_a_search_says_what_it_does_not_take():
    for words, said in ((['batch=x'], "'x' is not a number"), (['batch=8', '--tokens', '1e9'], 'leave them out')):
        expect_error(run_module('compile_check', *TINY_BF16, '--topology', 'v5e-16', '--search', *words), said)


def test_unknown_names_are_one_line():
    expect_error(run_module('compile_check', *TINY_BF16, '--topology', 'v9-8'), "Unknown topology 'v9-8'", 'v6e-256')
