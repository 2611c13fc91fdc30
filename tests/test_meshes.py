"""The same training on 1 device and on 8, cut by slice, data, fsdp and tensor, with and without micro-batches."""

import json
import os
import subprocess
import sys

import jax
import models
import numpy as np
import pytest
from conftest import ROOT, made_once
from mesh_check import SETTINGS

from bert_jax import optimizer, partition, train
from bert_jax.cli import UserError
from bert_jax.model import model as model_parts
from bert_jax.model.targets import TARGETS


@pytest.fixture(scope='module')
def results(tmp_path_factory):
    return json.loads(made_once(tmp_path_factory, 'meshes.json', run_on_all_meshes).read_text())


def run_on_all_meshes(path):
    path.write_text(printed_with_8_devices('tests/mesh_check.py'))


def printed_with_8_devices(script):
    # Threads for all collectives that may wait at once: of as few as cores, all could wait for one that has none.
    env = os.environ | {'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu', 'NPROC': '32',
                        'XLA_FLAGS': f'{os.environ["XLA_FLAGS"]} --xla_force_host_platform_device_count=8'}
    done = subprocess.run([sys.executable, script], cwd=ROOT, env=env, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


MESHES = ('8 data', '2 data x 4 fsdp', '2 data x 2 fsdp x 2 tensor', '1 device, accumulation 4',
          '8 data, accumulation 4', '2 slice x 2 fsdp x 2 tensor, accumulation 4')


@pytest.mark.parametrize('mesh', MESHES)
def test_losses_and_updates_agree_over_ten_steps(results, mesh):
    np.testing.assert_allclose(results[mesh]['losses'], results['1 device']['losses'], rtol=1e-5)
    assert results[mesh]['update_error'] < 1e-5


def test_parameters_shrink_as_the_axes_say(results):
    """`fsdp` splits matrices, `tensor` some vectors, too."""
    whole = results['1 device']['per_device']
    assert results['8 data']['per_device'] == whole
    one = jax.sharding.AbstractMesh((1, 1, 1, 1), partition.AXES)
    shapes = train.state_shapes(models.build(), optimizer.make_optimizer('adamw', **SETTINGS), models.batch())
    vectors = sum(
        size for name, _, _, size in partition.describe(shapes.params, one) if name.endswith(('bias', 'scale'))
    )
    for part, copies in (('params', 1), ('opt_state', 2)):
        expected = (whole[part] - copies * vectors) / 4 + copies * vectors
        assert results['2 data x 4 fsdp']['per_device'][part] == pytest.approx(expected, abs=4)
        assert 0.9 * expected < results['2 data x 2 fsdp x 2 tensor']['per_device'][part] < 1.1 * expected


def test_gathered_parameters_are_not_kept_for_the_backward_pass(results):
    used, kernels = results['temporaries']
    assert used < kernels  # 3.5 and 5.2 MB; kept, they would be in 8.6


def test_gradients_are_reduced_once_a_step_and_never_inside_the_loop(results):
    """In pure data-parallel training nothing but gradients is large: not one element crosses in the loop."""
    inside_outside = results['8 data, accumulation 4']['reductions']
    gradient_elements = results['count']
    assert not inside_outside['inside']
    assert gradient_elements <= sum(inside_outside['outside']) < gradient_elements + 100  # and a few counts
    whole = results['8 data']['reductions']  # whose only loop is the one over the two layers
    assert gradient_elements <= 2 * sum(whole['inside']) + sum(whole['outside']) < gradient_elements + 100


def test_no_device_gathers_the_logits(results):
    """[B, P, V]: 16 rows a device of 3 predictions over 128 entries, which `tensor` splits."""
    shapes = [tuple(map(int, dims.split(','))) for dims in results['2 data x 2 fsdp x 2 tensor']['gathers'] if dims]
    assert shapes and not any(np.prod(shape) >= 8 * 3 * 128 and shape[-1] == 128 for shape in shapes), shapes


def test_dropout_differs_by_row_device_micro_batch_and_step(results):
    """32 equal rows on 8 devices, in one batch or in 4 micro-batches, over 2 steps: 64 different outcomes."""
    assert results['dropout_rows'] == {'1': [64, 64], '4': [64, 64]}


def test_evaluation_is_exact_whatever_the_devices_the_batch_and_the_lengths(results):
    """29 examples, each once and in order, batches filled up with rows that weigh nothing; packed, and by tokens."""
    found = results['evaluations']
    first = found['classes'][0]
    assert len(first) == 29 * 3 + 1 and len(found['tags'][0]) > 2 * len(first)
    for expected, others in ((first, found['classes'] + found['packed']), (found['tags'][0], found['tags'])):
        for other in others:
            np.testing.assert_allclose(other, expected, rtol=1e-5, atol=1e-6)


def test_every_parameter_and_its_share_can_be_listed():
    model, example = models.build(), models.batch()
    state = train.state_shapes(model, optimizer.make_optimizer('adamw', **SETTINGS), example)
    mesh = jax.sharding.AbstractMesh((1, 2, 2, 2), partition.AXES)
    rows = {name: (shape, split, size) for name, shape, split, size in partition.describe(state.params, mesh)}
    assert rows['encoder/layers/attention/qkv/kernel'] == (
        (2, 32, 4, 3, 8),
        '-, fsdp, tensor, -, -',
        2 * 32 * 4 * 3 * 8 * 4 // 4,
    )
    assert rows['embeddings/token'] == ((128, 32), 'tensor, fsdp', 128 * 32)
    assert rows['encoder/layers/mlp/up/bias'][1] == '-, tensor'
    assert all(('fsdp' in split) != name.endswith(('bias', 'scale')) for name, (_, split, _) in rows.items())
    assert sum(size for *_, size in rows.values()) < 4 * sum(np.prod(shape) for shape, *_ in rows.values()) / 3


KERNEL, LSTM = ('fsdp -', 'fsdp -'), ('- fsdp', '- fsdp')
SPECS = {  # how each parameter lies on 2 data x 2 fsdp x 2 tensor, and on 2 data x 4 fsdp; what is not here lies whole
    'embeddings/token': ('tensor fsdp', 'fsdp -'),                                      # [V, D]
    'embeddings/position': ('- fsdp', '- fsdp'),                                        # [max_length, D]
    'embeddings/segment': ('- fsdp', '- fsdp'),                                         # [2, D]
    'encoder/layers/attention/qkv/kernel': ('- fsdp tensor - -', '- fsdp - - -'),       # [N, D, H, 3, K]
    'encoder/layers/attention/qkv/bias': ('- tensor - -', '- - - -'),                   # [N, H, 3, K]
    'encoder/layers/attention/out/kernel': ('- tensor - fsdp', '- - - fsdp'),           # [N, H, K, D]
    'encoder/layers/mlp/up/kernel': ('- fsdp tensor', '- - fsdp'),                      # [N, D, F]
    'encoder/layers/mlp/up/bias': ('- tensor', '- -'),                                  # [N, F]
    'encoder/layers/mlp/down/kernel': ('- tensor fsdp', '- fsdp -'),                    # [N, F, D]
    'pooler/dense/kernel': KERNEL, 'targets_mlm/dense/kernel': KERNEL,                  # [D, D]
    **{f'targets_{name}/dense/kernel': KERNEL for name in (                             # [D, C]
        'nsp', 'classification', 'multilabel', 'regression', 'tagging', 'span', 'multiple_choice')},
    **{f'targets_bilstm_tagging/{side}_{layer}/{name}': LSTM for side in ('forward', 'backward') for layer in (0, 1)
       for name in ('recurrent', 'inputs/kernel')},                                     # [H, 4 H], [D or 2 H, 4 H]
    'targets_bilstm_tagging/dense/kernel': KERNEL, 'targets_bilstm_tagging/mix': ('fsdp', 'fsdp'),     # [4]
}
WHOLE = {
    *(f'embeddings/norm/{part}' for part in ('scale', 'bias')), 'pooler/dense/bias', 'targets_mlm/bias',
    *(f'encoder/layers/{part}_norm/{name}' for part in ('attention', 'mlp') for name in ('scale', 'bias')),
    *(f'encoder/layers/{part}/bias' for part in ('attention/out', 'mlp/down')),
    *(f'targets_mlm/{part}' for part in ('dense/bias', 'norm/scale', 'norm/bias')),
    *(f'targets_{name}/dense/bias' for name in TARGETS if name not in ('mlm', 'lm', 'relations')),
    *(f'targets_bilstm_tagging/{side}_{layer}/inputs/bias' for side in ('forward', 'backward') for layer in (0, 1)),
    'targets_bilstm_tagging/scale',
}


def state_of_every_target():
    """Shapes of a state with all targets' parameters; layers are the largest axis, so that a split of them shows."""
    config = models.config('model.encoder.num_layers=192', 'model.run.unroll=1')
    heads = {'classification': {'num_classes': 3}, 'multilabel': {'num_classes': 3}, 'regression': {},
             'tagging': {'num_classes': 3}, 'multiple_choice': {'num_choices': 2},
             'bilstm_tagging': {'num_classes': 3, 'features': 'sum_last4', 'hidden_size': 12}}
    with config.unlocked():
        for name, kwargs in heads.items():
            config.targets[name] = {**kwargs, 'dropout_rate': 0.1, 'weight': 1.0}
        config.targets.span = {'weight': 1.0}
        config.targets.relations = {'num_heads': 4, 'layer': -1, 'weight': 1.0}
    assert set(config.targets) == set(TARGETS) - {'lm'}  # which needs an encoder that sees left
    return train.state_shapes(model_parts.build(config), optimizer.make_optimizer('adamw', **SETTINGS), models.batch())


def test_how_every_parameter_lies_on_a_mesh():
    """By the written-down table; the optimizer's moments lie as their parameters do."""
    state = state_of_every_target()
    rows = {'/'.join(key.key for key in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state.params)}
    assert rows.keys() == SPECS.keys() | WHOLE
    for column, sizes in enumerate(((1, 2, 2, 2), (1, 2, 4, 1))):
        mesh = jax.sharding.AbstractMesh(sizes, partition.AXES)
        expected = {name: tuple(None if axis == '-' else axis for axis in SPECS[name][column].split()) if name in SPECS
                    else (None,) * leaf.ndim for name, leaf in rows.items()}
        shardings = partition.state_shardings(state, mesh)
        moments = shardings.opt_state[1]
        for found in (shardings.params, moments.mu, moments.nu):
            assert dict(zip(rows, (tuple(one.spec) for one in jax.tree.leaves(found)))) == expected
        assert tuple(shardings.step.spec) == tuple(moments.count.spec) == ()
        whole = {name: tuple(None if axis == 'fsdp' else axis for axis in spec) for name, spec in expected.items()}
        gathered, shards = partition.gathered(state.params, mesh), partition.per_shard(state.params, mesh)
        assert dict(zip(rows, (tuple(one.spec) for one in jax.tree.leaves(gathered)))) == whole
        batch = ('slice', 'data', 'fsdp')
        assert dict(zip(rows, (tuple(one.spec) for one in jax.tree.leaves(shards)))) == {
            name: (batch, *spec) for name, spec in whole.items()}
        assert tuple(partition.batch_sharding(mesh).spec) == (batch,) and tuple(partition.replicated(mesh).spec) == ()
        assert tuple(partition.micro_batch_sharding(mesh).spec) == (None, batch)


def test_the_batch_is_cut_by_slice_data_and_fsdp():
    mesh = jax.sharding.AbstractMesh((2, 3, 5, 7), partition.AXES)
    assert partition.data_devices(mesh) == 2 * 3 * 5


def test_what_tensor_does_not_divide_is_named():
    mesh = jax.sharding.AbstractMesh((1, 1, 1, 5), partition.AXES)
    with pytest.raises(UserError, match=r'embeddings/token \(128, 32\): dimension -2 is not divisible by tensor = 5'):
        partition.state_shardings({'embeddings': {'token': np.zeros((128, 32))}, 'encoder': {'attention': {
            'qkv': {'kernel': np.zeros((2, 5, 5, 3, 5))}, 'out': {'kernel': np.zeros((2, 5, 5, 5))}}, 'mlp': {
            'up': {'kernel': np.zeros((2, 5, 5))}, 'down': {'kernel': np.zeros((2, 5, 5))}}}}, mesh)


def test_a_rule_that_matches_nothing_is_an_error(monkeypatch):
    mesh = jax.sharding.AbstractMesh((1, 1, 1, 2), partition.AXES)
    params = {'encoder': {'lstm': {'kernel': np.zeros((4, 4))}}}
    with pytest.raises(UserError, match='tensor = 2.*no rule.*matches a parameter'):
        partition.state_shardings(params, mesh)


def test_an_axis_without_a_rule_is_an_error():
    with pytest.raises(KeyError, match='lenght'):
        partition.constrain(np.zeros((2, 2)), 'batch', 'lenght')


class FakeDevice:
    """What a mesh asks of a device."""

    process_index = core_on_chip = 0

    def __init__(self, number, slice_index=0, kind='TPU v5 lite', layout=(4, 2, 1), platform='tpu'):
        self.id, self.slice_index, self.device_kind, self.platform = number, slice_index, kind, platform
        self.coords = tuple(map(int, np.unravel_index(number % np.prod(layout), layout, order='F')))


def test_slices_are_the_outermost_axis_and_fsdp_comes_when_the_state_does_not_fit():
    devices = [FakeDevice(i, i // 8) for i in (*range(8, 16), *range(8))]
    state = lambda size: train.TrainState(None, {'a': np.broadcast_to(np.float32(0), (size,))}, None)  # noqa: E731
    assert partition.automatic_shape(state(10**6), devices[:8]) == [-1, 1, 1]
    assert partition.automatic_shape(state(3 * 10**9), devices[:8]) == [-1, 4, 1]  # 24 GB of parameters and gradients
    assert partition.automatic_shape(state(10**12), devices[:8]) == [-1, 8, 1]
    assert partition.automatic_shape(state(10**9), devices[:8]) == [-1, 1, 1]  # 8 GB
    assert partition.automatic_shape(state(10**9), devices[:8], accumulation=2) == [
        -1,
        2,
        1,
    ]  # 8 GB whole, and 4 GB split
    mesh = partition.make_mesh((-1, 2, 2), devices=devices)
    assert dict(mesh.shape) == {'slice': 2, 'data': 2, 'fsdp': 2, 'tensor': 2}
    assert [{d.slice_index for d in part.ravel()} for part in mesh.devices] == [{0}, {1}]


@pytest.mark.parametrize(
    'kind, layout',
    [
        ('TPU v5 lite', (4, 4, 1)),
        ('TPU v5 lite', (8, 8, 1)),
        ('TPU v6 lite', (16, 16, 1)),
        ('TPU v4', (2, 4, 4)),
        ('TPU v4', (4, 4, 4)),
    ],
)
def test_every_division_of_a_slice_is_a_mesh(kind, layout):
    """Also those whose axes are no product of whole physical ones."""
    count = int(np.prod(layout))
    devices = [FakeDevice(number, kind=kind, layout=layout) for number in range(count)]
    for fsdp in (n for n in range(1, count + 1) if count % n == 0):
        mesh = partition.make_mesh((-1, fsdp, 1), devices=devices)
        assert dict(mesh.shape) == {'slice': 1, 'data': count // fsdp, 'fsdp': fsdp, 'tensor': 1}
        assert len({device.id for device in mesh.devices.ravel()}) == count


def test_hosts_of_gpus_are_no_slices():
    """XLA gives the devices of each host a slice_index of their own."""
    devices = [
        FakeDevice(number, slice_index=number // 8, kind='NVIDIA H100 80GB HBM3', platform='gpu')
        for number in range(32)
    ]
    assert dict(partition.make_mesh((8, 4, 1), devices=devices).shape) == {
        'slice': 1,
        'data': 8,
        'fsdp': 4,
        'tensor': 1,
    }


def test_make_mesh_says_what_does_not_fit():
    n = jax.device_count()
    assert partition.make_mesh((-1, 1, 1)).shape['data'] == n
    for shape, words in (((3 * n, 1, 1), 'devices'), ((1, 1), 'three sizes'), ((0, 1, 1), 'devices')):
        with pytest.raises(UserError, match=words):
            partition.make_mesh(shape)


def test_other_parts_on_eight_devices_are_those_of_one():
    """An LSTM language model on packed rows, and a student of two teachers: losses and parameters after three steps."""
    found = json.loads(printed_with_8_devices('tests/parts_check.py'))
    assert 'no rule' in found.pop('refused')  # of `tensor`, for an LSTM
    for meshes in found.values():
        reference = meshes.pop('one device')
        assert len(meshes) == 1
        for name, numbers in meshes.items():
            np.testing.assert_allclose(numbers, reference, rtol=3e-4, atol=1e-4, err_msg=name)
