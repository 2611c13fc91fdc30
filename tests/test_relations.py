"""Learning from a frozen teacher: the loss against a plain loop, the step with several sources, what is refused."""

import math
import types

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
import scipy.special
from conftest import LONG

from bert_jax import cli, evaluate, optimizer, partition, train
from bert_jax import run as run_parts
from bert_jax.cli import UserError
from bert_jax.data import examples
from bert_jax.formats import pretrained as sources
from bert_jax.model import model as model_parts
from bert_jax.model import relations
from bert_jax.tpu import compiled

R, LAYER = 8, 1
WEIGHTS = {'relations': 1.0}


def student(**changes):
    c = models.config('model.embeddings.dropout_rate=0.0', 'model.run.unroll=1')
    c.targets = {'relations': {'num_heads': R, 'layer': LAYER, 'weight': 1.0}} | changes
    return model_parts.build(c)


def teacher():
    """Wider, deeper, of other heads and half of the vocabulary; with its parameters and a mapping of ids to its own."""
    c = models.config('model.embeddings.hidden_size=48', 'model.encoder.num_heads=2', 'model.encoder.num_layers=3',
                      'model.embeddings.vocab_size=40')
    c.targets = {}
    model = model_parts.build(c, relations.reads(2))
    ids = jnp.asarray(np.random.default_rng(7).integers(0, 40, models.V), jnp.int32)
    return model, {'params': models.random_params(model, models.batch(), seed=3), 'ids': ids}


def by_hand(taught, learned, mask):
    """{kind: the mean over examples of the KL}, one example, relation head and token at a time, in float64."""
    found = {}
    for kind in relations.KINDS:
        total, examples = 0.0, 0
        for row in range(len(mask)):
            for number in range(1, mask[row].max() + 1):
                here = np.flatnonzero(mask[row] == number)
                examples += 1
                logs = []
                for x in (taught[kind], learned[kind]):
                    x = (
                        np.asarray(x, np.float64)[row].transpose(1, 0, 2).reshape(mask.shape[1], R, -1)[here]
                    )  # [n, R, d]
                    logs.append(
                        [scipy.special.log_softmax(x[:, r] @ x[:, r].T / np.sqrt(x.shape[-1]), -1) for r in range(R)]
                    )
                right, ours = np.array(logs)
                total += (np.exp(right) * (right - ours)).sum() / (R * len(here))
        found[kind] = total / examples
    return found


@pytest.mark.parametrize('example', [models.batch(), models.packed_batch()], ids=['padded', 'packed'])
def test_the_loss_is_that_of_a_plain_loop(example):
    (teaching, fixed), model = teacher(), student()
    annotated = relations.teaching(teaching, 2)(fixed, example)
    params = models.random_params(model, example)
    losses = model.apply({'params': params}, annotated, train=False, method='losses')['relations']
    layers = model.apply({'params': params}, example, train=False, method='encode').layers
    expected = by_hand({kind: annotated[f'teacher_{kind}'] for kind in relations.KINDS},
                       {kind: layers[kind, LAYER] for kind in relations.KINDS}, example['input_mask'])
    for kind, value in expected.items():
        np.testing.assert_allclose(losses[kind].total / losses[kind].count, value, rtol=1e-4)
    np.testing.assert_allclose(losses['loss'].total / losses['loss'].count, sum(expected.values()), rtol=1e-4)
    assert float(model.apply({}, example, method='counts')['relations']) == float(losses['loss'].count)
    sees = example | {'input_ids': np.asarray(fixed['ids'])[example['input_ids']]}
    own = teaching.apply({'params': fixed['params']}, sees, train=False, method='encode').layers
    np.testing.assert_allclose(annotated['teacher_key'], own['key', 2], atol=1e-6)


def run(parts, accumulation=1, shape=(1, 1, 1), steps=3):
    """(losses of each step, the state after them) of a student under one teacher a source."""
    teaching, fixed = teacher()
    model = student(mlm={'vocab_size': models.V, 'activation': 'gelu', 'weight': 0.5})
    other = fixed | {'ids': jnp.flip(fixed['ids'])}
    fixed = {source: {'one': fixed, 'two': other}[source] for source in parts}
    annotate = dict.fromkeys(parts, relations.teaching(teaching, 2))
    tx = optimizer.make_optimizer(
        'adamw', b1=0.9, b2=0.999, eps=1e-6, weight_decay=0.01, clip_norm=1.0, bias_correction=True
    )
    example = next(iter(parts.values()))
    params = jax.tree.map(jnp.array, models.random_params(model, example, scale=0.1))
    mesh = partition.make_mesh(shape, devices=jax.devices()[:math.prod(shape)])
    state = train.TrainState(jnp.int32(0), params, tx.init(params))
    state = jax.device_put(state, partition.state_shardings(state, mesh))
    step = train.make_train_step(model, tx, mesh, accumulation, state, fixed=fixed, annotate=annotate)
    found = []
    for _ in range(steps):
        state, metrics = step(state, parts, train.as_hyper(3e-3, WEIGHTS | {'mlm': 0.5}, 0), fixed)
        found.append({name: float(mean.total / mean.count) for name, mean in metrics.items()})
    return found, state, fixed


def test_a_teacher_in_the_step_teaches_and_stays_what_it_is():
    """The loss falls; the teacher's arrays are neither changed nor part of the state; evaluation has them, too."""
    found, state, fixed = run({'one': models.batch()}, steps=30)
    assert found[-1]['relations/loss'] < 0.7 * found[0]['relations/loss']
    jax.tree.map(np.testing.assert_array_equal, fixed['one'], teacher()[1])
    model = student(mlm={'vocab_size': models.V, 'activation': 'gelu', 'weight': 0.5})
    assert jax.tree.structure(state.params) == jax.tree.structure(
        models.random_params(model, models.batch()))
    mesh = partition.make_mesh((1, 1, 1), devices=jax.devices()[:1])
    step = evaluate.make_loss_step(model, mesh, relations.teaching(teacher()[0], 2))
    scores = evaluate.evaluate(
        lambda params, batch: step(params, batch, fixed['one']), state.params, [models.batch()], mesh
    )
    assert scores['relations/loss'] < found[0]['relations/loss']


def test_two_sources_are_one_loss_over_all_their_examples():
    """Counts are summed: a source of more masks weighs more, and each source's loss is told apart."""
    parts = {'one': models.batch(), 'two': {name: x[:4] for name, x in models.batch(np.random.default_rng(5)).items()}}
    both, _, _ = run(parts, steps=1)
    alone = [run({source: batch}, steps=1)[0][0] for source, batch in parts.items()]
    masks = [batch['masked_lm_weights'].sum() for batch in parts.values()]
    for name, weights in (('mlm/loss', masks), ('relations/loss', [8, 4])):
        assert both[0][name] == pytest.approx(np.average([one[name] for one in alone], weights=weights), rel=1e-5)
        assert [both[0][f'{source}/{name}'] for source in parts] == pytest.approx(
            [one[name] for one in alone], rel=1e-5
        )


@LONG  # test_meshes has micro-batches on all axes
def test_micro_batches_change_nothing_under_a_teacher():
    parts = {'one': models.batch(), 'two': models.batch(np.random.default_rng(5))}
    (whole, state, _), (cut, other, _) = run(parts), run(parts, accumulation=4)
    for one, two in zip(whole, cut):
        assert one['loss'] == pytest.approx(two['loss'], rel=1e-4) and one['relations/loss'] == pytest.approx(
            two['relations/loss'], rel=1e-4
        )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), state.params, other.params)


def test_one_layer_read_costs_one_layers_memory():
    """Of the compiled step's temporaries; twelve layers all read cost twelve."""
    example = {name: np.tile(x, (4, 1)) for name, x in models.batch(padded=False).items() if x.ndim == 2}

    def temporaries(reads):
        c = models.config('model.encoder.num_layers=12', 'model.run.unroll=1', 'model.run.remat=full')
        model = model_parts.build(c, reads)

        def loss(params):
            layers = model.apply({'params': params}, example, train=False, method='encode').layers
            return (
                sum(jnp.sum(x**2) for x in layers.values())
                if layers
                else sum(
                    terms['loss'].total
                    for terms in model.apply({'params': params}, example, train=False, method='losses').values()
                )
            )

        return (
            jax.jit(jax.grad(loss))
            .lower(models.random_params(model, example))
            .compile()
            .memory_analysis()
            .temp_size_in_bytes
        )

    one_layer = 32 * models.L * models.D * 4
    single, every = temporaries((('query', 12), ('key', 12))), temporaries((('query', 'all'), ('key', 'all')))
    assert single < temporaries((('hidden', 12),)) + 6 * one_layer  # forward and backward, each of query and key
    assert every > single + 2 * 11 * one_layer


@pytest.mark.parametrize('change, words', [
    ({'num_heads': 5, 'layer': 1}, 'num_heads 5 does not divide the width 32'),
    ({'num_heads': 8, 'layer': 3}, 'reads layer 3, but the encoder transformer has 2 layers'),
    ({'num_heads': 8, 'layer': 0}, 'reads layer 0'),
    ({'num_heads': 0, 'layer': 1}, 'model.targets.relations.num_heads=0'),
])
def test_relations_that_cannot_be(change, words):
    with pytest.raises(UserError, match=words):
        model = student(relations={**change, 'weight': 1.0})
        example = models.batch() | {
            f'teacher_{kind}': np.ones((8, 2, models.L, 24), np.float32) for kind in relations.KINDS
        }
        params = models.random_params(model, example)
        model.apply({'params': params}, example, train=False, method='losses')


def test_a_teacher_of_another_vocabulary_needs_a_mapping():
    assert relations.map_ids(['a', 'b'], ['b', 'x', 'a'], 'T') == [2, 0]
    with pytest.raises(
        UserError, match=r"T: 1 of the student's 2 pieces are none of this teacher's 1, 'c' among them.*mapping"
    ):
        relations.map_ids(['a', 'c'], ['a'], 'T')


def test_a_teacher_is_part_of_a_compiled_steps_memory_and_lies_as_parameters_do():
    """compile_check's step: a teacher's bytes are told apart, and `fsdp` splits its matrices as the student's."""
    given = ['--config.model.embeddings.vocab_size=67', '--config.mesh=(1,1,1)']
    c = cli.load_config('configs/pretrain.py:tiny', given)
    c.model.targets = {'relations': {'num_heads': R, 'layer': LAYER, 'weight': 1.0}}
    teaching, fixed = teacher()
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), fixed)
    step = compiled.compile_step(c, jax.devices()[:1], 16, 8, shapes, relations.teaching(teaching, 2))
    alone = compiled.compile_step(c, jax.devices()[:1], 16, 8, shapes, lambda fixed, batch: batch | {
        f'teacher_{kind}': jnp.ones((8, 2, 16, 24)) for kind in relations.KINDS})
    used = compiled.memory(step, jax.devices()[0])
    assert used['fixed'] == sum(x.nbytes for x in jax.tree.leaves(fixed)) > 0 and used['batch'] > 0
    assert step.program.aliased >= len(jax.tree.leaves(step.state))
    assert used['total'] > compiled.memory(alone, jax.devices()[0])['total']
    rows = {name: size for name, _, _, size in partition.describe(
        fixed['params'], jax.sharding.AbstractMesh((1, 1, 8, 1), partition.AXES))}
    kernel = fixed['params']['encoder']['layers']['mlp']['up']['kernel']
    assert rows['encoder/layers/mlp/up/kernel'] == kernel.nbytes / 8
    many = types.SimpleNamespace(device_kind='TPU v5e', memory_stats=lambda: {'bytes_limit': 3e6})
    state = train.TrainState(jnp.int32(0), {'w': np.zeros(200_000, np.float32)}, {'m': np.zeros(100_000, np.float32)})
    assert partition.automatic_shape(state, [many] * 4) == [-1, 2, 1]
    assert partition.automatic_shape(state, [many] * 4, fixed={'w': np.zeros(500_000, np.float32)}) == [-1, 4, 1]


def test_a_student_learns_the_relations_of_a_trained_teacher_on_real_text(store, pretrained):
    """Held-out relation loss, from a store's own stream; the mapping of ids is made from the pieces of both."""
    source = sources.load(str(pretrained))
    with source.config.unlocked():
        source.config.targets = {}
    teaching = model_parts.build(source.config, relations.reads(2))
    ids = relations.map_ids(store.tokenizer.pieces, source.tokenizer.pieces, str(pretrained))
    fixed = {'params': jax.tree.map(jnp.asarray, {part: source.params[part] for part in ('embeddings', 'encoder')}),
             'ids': jnp.asarray(ids, jnp.int32)}
    c = cli.load_config('configs/pretrain.py:tiny,no_nsp', ['--config.model.encoder.num_layers=1'])
    c.model.embeddings.vocab_size = store.tokenizer.vocab_size
    c.model.targets = {'relations': {'num_heads': 4, 'layer': -1, 'weight': 1.0}}
    model, annotate = model_parts.build(c.model), relations.teaching(teaching, 2)
    train_on, score_on = (examples.mixed([split], store.tokenizer, 0, 64, **c.examples)
                          for split in (store.train, store.held_out))
    beside = {'fixed': {train.SOURCE: fixed}, 'annotate': {train.SOURCE: annotate}}
    assembled = run_parts.assemble(c, model, train_on.batch(0, 8), **beside)
    step = evaluate.make_loss_step(model, assembled.mesh, annotate)
    made = [score_on.evaluation_batch(0, 16, 16)]

    def held_out(params):
        return evaluate.evaluate(lambda p, b: step(p, b, fixed), params, made, assembled.mesh)['relations/loss']

    state = assembled.init(0)
    before = held_out(state.params)
    for number in range(40):
        parts = {train.SOURCE: train_on.batch(number, 8)}
        state, _ = assembled.step(state, parts, train.as_hyper(2e-3, WEIGHTS, 0), beside['fixed'])
    assert held_out(state.params) < 0.7 * before
