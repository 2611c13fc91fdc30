"""What is read from a compiled program, against what is known of it; TPU programs where libtpu is installed."""

import importlib.util
import json
import math
import re
import types

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
from conftest import expect_error, run_module
from ml_collections import ConfigDict

from bert_jax import cli, compile_check, hardware, partition, train
from bert_jax.cli import UserError
from bert_jax.tpu import compiled as check
from bert_jax.tpu import hlo, topology

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
    model = models.build('model.run.unroll=1', 'model.encoder.num_layers=3', 'model.embeddings.vocab_size=128')
    params = model.init(jax.random.key(0), example, train=False)['params']
    program = compiled(lambda p: model.apply({'params': p}, example, train=False)['mlm']['logits'], params)
    formula = 8 / 3 * model.flops({'tokens': models.L, 'squared_tokens': models.L**2, 'predictions': models.P})
    assert total_flops(program) == pytest.approx(formula, rel=0.01)


TPU_TEXT = """HloModule m, is_scheduled=true, input_output_alias={ {0}: (0, {}, may-alias), {1}: (1, {}, must-alias) }

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
"""


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


CARRIED_TEXT = """HloModule m, is_scheduled=true

%all-reduce-scatter.1 (a: bf16[6400,3200]) -> bf16[1600,3200] {
  %a = bf16[6400,3200] parameter(0)
  %r = bf16[6400,3200] all-reduce(%a), channel_id=1, replica_groups={{0,2,4,6},{1,3,5,7}}, to_apply=%add
  ROOT %s = bf16[1600,3200] dynamic-slice(%r), dynamic_slice_sizes={1600,3200}
}

%begin (a: bf16[1600,3200]) -> (bf16[1600,3200], bf16[6400,3200]) {
  %a = bf16[1600,3200] parameter(0)
  %g = bf16[6400,3200] all-gather(%a), channel_id=2, replica_groups={{0,2,4,6},{1,3,5,7}}, dimensions={0}
  ROOT %c = (bf16[1600,3200], bf16[6400,3200]) custom-call(%g), custom_call_target="AsyncCollectiveStart"
}

%beside (a: bf16[1600,3200], x: f32[8,128]) -> f32[8,128] {
  %a = bf16[1600,3200] parameter(0)
  %x = f32[8,128] parameter(1)
  %g = bf16[6400,3200] all-gather(%a), channel_id=2, replica_groups={{0,2,4,6},{1,3,5,7}}, dimensions={0}
  ROOT %y = f32[8,128] tanh(%x)
}

%end (a: bf16[1600,3200]) -> bf16[6400,3200] {
  %a = bf16[1600,3200] parameter(0)
  %g = bf16[6400,3200] all-gather(%a), channel_id=2, replica_groups={{0,2,4,6},{1,3,5,7}}, dimensions={0}
  ROOT %c = bf16[6400,3200] custom-call(%a, %g), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (a: bf16[1600,3200], x: f32[8,128]) -> bf16[1600,3200] {
  %a = bf16[1600,3200] parameter(0)
  %x = f32[8,128] parameter(1)
  %f = (bf16[1600,3200], bf16[6400,3200]) fusion(%a), kind=kCustom, calls=%begin
  %y = f32[8,128] fusion(%a, %x), kind=kLoop, calls=%beside, backend_config={"estimated_cycles":"CYCLES"}
  %w = bf16[6400,3200] fusion(%a), kind=kCustom, calls=%end
  ROOT %s = bf16[1600,3200] fusion(%w), kind=kCustom, calls=%all-reduce-scatter.1
}
"""


def test_collectives_that_fusions_carry_on():
    """One all-gather through three fusions, waited for as far as the work beside it is shorter; one reduce-scatter."""
    known = hardware.DEVICES['TPU v5e']
    size = 6400 * 3200 * 2
    one = 0.75 * size / (known.link_gb_s / 2 * 1e9)  # along one of the two sides
    for cycles, least, most in ((10**6, 1, 1), (0, 1.2, 1.8)):
        program = hlo.Program(CARRIED_TEXT.replace('CYCLES', str(cycles)))
        step = check.Step(None, program, None, MESH, 0.0, 0)
        assert check.collectives(step) == [
            {'kind': kind, 'axes': 'data', 'in_loop': False, 'bytes': size, 'times': 1}
            for kind in ('all-gather', 'reduce-scatter')
        ]
        spent = check.estimate_step(program, known, MESH)['collectives']
        assert least * one <= spent <= most * one * (1 + 1e-9)


SLICES_TEXT = """HloModule m, is_scheduled=true

%body (p: (s32[], f32[])) -> (s32[], f32[]) {
  %p = (s32[], f32[]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = bf16[1000,1000] custom-call(), custom_call_target="AllocateBuffer"
  %token = token[] after-all()
  %send.1 = (bf16[1000,1000], u32[], token[]) send(%x, %token), channel_id=1, is_host_transfer=true, frontend_attributes={NAMED="a",_xla_megascale_transfer_type="ALL_REDUCE"}
  %send.2 = (bf16[1000,1000], u32[], token[]) send(%x, %token), channel_id=3, is_host_transfer=true, frontend_attributes={NAMED="b",_xla_megascale_transfer_type="ALL_REDUCE"}
  %y = f32[] fusion(), kind=kLoop, calls=%none, backend_config={"estimated_cycles":"CYCLES"}
  %recv.2 = (bf16[1000,1000], u32[], token[]) recv(%token), channel_id=4, is_host_transfer=true, frontend_attributes={NAMED="b"}
  %recv.1 = (bf16[1000,1000], u32[], token[]) recv(%token), channel_id=2, is_host_transfer=true, frontend_attributes={NAMED="a"}
  %send-done.1 = token[] send-done(%send.1), channel_id=1, is_host_transfer=true
  %recv-done.1 = (bf16[1000,1000], token[]) recv-done(%recv.1), channel_id=2, is_host_transfer=true
  %recv-done.2 = (bf16[1000,1000], token[]) recv-done(%recv.2), channel_id=4, is_host_transfer=true
  ROOT %t = (s32[], f32[]) tuple(%i, %y)
}

%condition (p: (s32[], f32[])) -> pred[] {
  %p = (s32[], f32[]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] constant(12)
  ROOT %l = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (x: f32[]) -> (s32[], f32[]) {
  %x = f32[] parameter(0)
  %one = s32[] constant(1)
  %first = s32[] copy(%one)
  %start = (s32[], f32[]) tuple(%first, %x)
  ROOT %loop = (s32[], f32[]) while(%start), condition=%condition, body=%body
}
""".replace('NAMED', '_xla_host_transfer_rendezvous')


def test_what_goes_between_slices():
    """Two sums, one after the other over one network, beside other work; in a loop whose first round was taken out."""
    known, mesh = hardware.DEVICES['TPU v5e'], Wired(2, 4, 1, 1)
    both = 2 * 1000 * 1000 * 2 / (known.network_gb_s * 1e9)
    for cycles, waited in ((10**9, 0), (0, both), (1_500_000, both - 1e-3)):
        program = hlo.Program(SLICES_TEXT.replace('CYCLES', str(cycles)))
        step = check.Step(None, program, None, mesh, 0.0, 0)
        assert check.collectives(step) == [
            {'kind': 'all-reduce', 'axes': 'slice', 'in_loop': True, 'bytes': 11 * 2 * 2_000_000, 'times': 22}
        ]
        assert check.estimate_step(program, known, mesh).get('collectives', 0) == pytest.approx(11 * waited)


@pytest.mark.parametrize(
    'sizes, expected',
    [
        ((1, 1, 1, 1), 0),
        ((1, 4, 1, 1), 1),
        ((1, 1, 4, 1), 1),
        ((1, 2, 4, 1), 1 + 1 / 4),
        ((2, 1, 1, 1), 1),
        ((2, 2, 4, 1), 1 + 1 / 4 + 1 / 8),
    ],
)
def test_the_least_bytes_of_gradients(sizes, expected):
    """Once over fsdp, then what that leaves over data, then what that leaves between slices."""
    mesh = jax.sharding.AbstractMesh(sizes, partition.AXES)
    params = {'x': jax.ShapeDtypeStruct((1024, 1024), jnp.float32)}
    step = check.Step(None, None, train.TrainState(0, params, {}), mesh, 0.0, 0)
    config = ConfigDict({'model': models.config()})
    assert check.least_bytes(step, config, 16, 64)['gradients'] == expected * 2 * 1024 * 1024


BAD_TEXT = """HloModule m, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %s = f32[] add(%a, %b)
}

%body (p: (s32[], f32[10,10])) -> (s32[], f32[10,10]) {
  %p = (s32[], f32[10,10]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %g = f32[10,10] get-tuple-element(%p), index=1
  %r = f32[10,10] all-reduce(%g), replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%add
  ROOT %t = (s32[], f32[10,10]) tuple(%i, %r)
}

%condition (p: (s32[], f32[10,10])) -> pred[] {
  %p = (s32[], f32[10,10]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] constant(3)
  ROOT %l = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (x: f32[8,16], w: f32[16,16]) -> f32[8,16] {
  %x = f32[8,16] parameter(0)
  %w = f32[16,16] parameter(1)
  %d = f32[8,16] dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}, metadata={op_name="jit(f)/encoder/mlp/dot_general"}
  %logits = bf16[4,16,64] custom-call(%d), custom_call_target="x", metadata={op_name="jit(f)/mlm"}
  %start = (s32[], f32[10,10]) custom-call(%d), custom_call_target="y"
  %loop = (s32[], f32[10,10]) while(%start), condition=%condition, body=%body
  ROOT %q = f32[8,16] all-gather(%x), replica_groups={{0,1},{2,3},{4,5},{6,7}}, dimensions={0}
}
"""
class Wired:
    """A mesh of devices that lie in a grid as wide as the last axis."""

    def __init__(self, *sizes):
        self.shape, self.size = dict(zip(partition.AXES, sizes)), math.prod(sizes)
        self.devices = np.empty(self.size, object)
        self.devices[:] = [types.SimpleNamespace(coords=(*divmod(number, sizes[-1]), 0)) for number in range(self.size)]
        self.devices = self.devices.reshape(sizes)


MESH = Wired(1, 4, 1, 2)


@pytest.mark.parametrize('accumulation, expected', [(1, 2), (2, 3)])
def test_what_should_not_be_in_a_program_is_found(accumulation, expected):
    config = ConfigDict(
        {
            'model': models.config('model.run.dtype=bfloat16', 'model.embeddings.vocab_size=128'),
            'accumulation': accumulation,
        }
    )
    step = check.Step(None, hlo.Program(BAD_TEXT), None, MESH, 0.0, 0)
    found = check.findings(step, config, 16, 16 * accumulation)
    assert [len(what) for what in found.values()] == [1, 1, expected - 2], found
    assert (
        'mlm' in found['buffers of all positions times the vocabulary'][0]
        and 'encoder/mlp' in found['float32 products in the trunk'][0]
    )
    assert check.collectives(step) == [
        {'kind': 'all-reduce', 'axes': 'data', 'in_loop': True, 'bytes': 3 * 400, 'times': 3},
        {'kind': 'all-gather', 'axes': 'tensor', 'in_loop': False, 'bytes': 512, 'times': 1},
    ]


@pytest.mark.parametrize(
    'text, axes, size',
    [
        ('replica_groups={{0,1},{2,3},{4,5}}', 'tensor', 2),
        ('replica_groups=[4,4]<=[2,4,2]T(0,2,1)', 'data', 4),
        ('replica_groups=[2,8]<=[8,2]T(1,0)', 'slice x data', 8),
        ("replica_groups=mesh['axis_0'=8,'axis_1'=2] {'axis_1'}", 'tensor', 2),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4,'axis_2'=2] {'axis_0'}", 'slice', 2),
        ('source_target_pairs={{0,8},{8,0}}', 'slice', 2),
        ("replica_groups=mesh['axis_0'=1,'axis_1'=2,'axis_2'=8], device_ids=([8,2]T(1,0)) {'axis_1'}", 'tensor', 2),
        (
            "replica_groups=mesh['axis_0'=2,'axis_1'=8], device_ids=([8,2]T(1,0)) {'axis_1'}, dimensions={1}",
            'slice x data',
            8,
        ),
        ('replica_groups={{0,8},{1,9}}', 'slice', 2),
        ('replica_groups={}, x', 'slice x data x tensor', 16),
        ('channel_id=3', 'slice x data x tensor', 16),
    ],
)
def test_along_which_axes_a_collective_runs(text, axes, size):
    """Two slices and tensor = 2: what the group's size alone cannot tell apart."""
    mesh = jax.sharding.AbstractMesh((2, 4, 1, 2), partition.AXES)
    instruction = hlo.Instruction('a', (), 'all-reduce', (), f', {text}')
    assert check._group(instruction, mesh) == (axes, size)


@pytest.mark.parametrize(
    'groups, links', [('{{0,2,4,6},{1,3,5,7}}', 1), ('{{0,1},{2,3}}', 1), ('{{0,1,2,3,4,5,6,7}}', 2)]
)
def test_the_links_along_the_sides_that_a_group_spans(groups, links):
    instruction = hlo.Instruction(
        'a', (hlo.Array('f32', (10**9,), False),), 'all-gather', (), f', replica_groups={groups}'
    )
    known, size = hardware.DEVICES['TPU v5e'], groups.partition('}')[0].count(',') + 1
    seconds = check._collective_seconds(instruction, 'all-gather', known, MESH)
    assert seconds == pytest.approx(4e9 * (size - 1) / size / (known.link_gb_s * 1e9 * links / 2))


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


TINY_BF16 = (
    '--config',
    'configs/pretrain.py:tiny,bf16',
    '--config.model.run.unroll=1',
    '--config.phases=((10,64,64),)',
)


@pytest.mark.skipif(not LIBTPU, reason='needs the TPU compiler: pip install -r requirements-tpu.txt')
def test_a_step_compiled_for_a_slice(tmp_path):
    done = run_module(
        'compile_check',
        *TINY_BF16,
        '--topology',
        'v5e-4',
        '--tokens',
        '1e9',
        '--parameters',
        '--output',
        tmp_path / 'out.json',
    )
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
    expect_error(done, 'It needs', 'of memory', 'This fits: --config.model.run.remat')


@pytest.mark.skipif(not LIBTPU, reason='needs the TPU compiler: pip install -r requirements-tpu.txt')
def test_a_search_says_what_it_does_not_take():
    for words, said in ((['batch=x'], "'x' is not a number"), (['batch=8', '--tokens', '1e9'], 'leave them out')):
        expect_error(run_module('compile_check', *TINY_BF16, '--topology', 'v5e-16', '--search', *words), said)


@pytest.mark.skipif(not LIBTPU, reason='needs the TPU compiler: pip install -r requirements-tpu.txt')
def test_a_compiler_that_crashes_is_not_called(monkeypatch):
    config = cli.load_config('configs/pods.py:base_v6e_16', ['--config.model.embeddings.vocab_size=128'])
    monkeypatch.setattr(compile_check.metadata, 'version', lambda name: '0.0.42.1')
    with pytest.raises(UserError, match=r"pip install --no-deps 'libtpu==0\.0\.43\.\*'"):
        compile_check.measure(config, topology.devices('v6e-16'), 512, 64)


def test_unknown_names_are_one_line():
    expect_error(run_module('compile_check', *TINY_BF16, '--topology', 'v9-8'), "Unknown topology 'v9-8'", 'v6e-256')
