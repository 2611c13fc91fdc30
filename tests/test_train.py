"""A step against a plain transcription with dropout on; the loop: what the host waits for, and what it does when."""

import json
import math

import jax
import jax.numpy as jnp
import models
import numpy as np
import optax
import plain
import pytest
import watch
from ml_collections import ConfigDict

from bert_jax import metrics, partition, train
from bert_jax.checkpoint import Checkpoints
from bert_jax.cli import Stopped
from bert_jax.model import model as model_parts

SIZE, STEPS = 700, 9
RATE, WEIGHTS = 0.1, {'mlm': 1.5, 'nsp': 0.25}
KEEPS_GRADIENTS = optax.GradientTransformation(lambda params: jax.tree.map(jnp.zeros_like, params),
                                               lambda grads, _, params=None: (grads, grads))


def one_step(model, params, example, *, accumulation=1, weights=WEIGHTS, frozen=(), hyper=((3, 7),)):
    """For each (step, seed): the state after it, whose opt_state is the gradient; metrics; what each dropout did."""
    trained = {name: part for name, part in params.items() if name not in frozen}
    made = []
    with watch.dropout() as sites:
        for step, seed in hyper:
            state = train.TrainState(jnp.int32(step), jax.tree.map(jnp.array, params), KEEPS_GRADIENTS.init(trained))
            if not made:
                mesh = partition.make_mesh((1, 1, 1))
                update = train.make_train_step(model, KEEPS_GRADIENTS, mesh, accumulation, state, frozen)
            after, found = update(state, {'text': example}, train.as_hyper(RATE, weights, seed))
            jax.effects_barrier()
            made.append((after, found, dict(sites)))
            sites.clear()
    return made


def value(mean):
    return float(mean.total) / float(mean.count)


def assert_gradients(found, expected):
    whole = math.sqrt(sum((g**2).sum() for g in jax.tree.leaves(expected)))

    def close(ours, theirs):
        assert np.linalg.norm(ours - theirs) <= 2e-5 * max(np.linalg.norm(theirs), 1e-2 * whole)

    jax.tree.map(close, found, expected)


@pytest.mark.parametrize('packed, accumulation', [(False, 1), (True, 2)])
def test_what_a_step_computes_with_dropout_on(packed, accumulation):
    """Loss, metrics, the gradient of every parameter and the update, with the masks that the step itself drew."""
    model = models.build('model.embeddings.dropout_rate=0.2', 'model.encoder.attention_dropout_rate=0.4',
                         'model.run.unroll=1')
    example = models.packed_batch() if packed else models.batch()
    example['input_ids'][0, 1] = example['masked_lm_ids'][0, 0] = models.V - 1  # the vocabulary's last
    example['next_sentence_weights'] *= (np.arange(8) % 3 > 0)[:, None]
    params = models.random_params(model, example, scale=0.1)
    ((state, found, sites),) = one_step(model, params, example, accumulation=accumulation)
    assert [len(sites[path]) for path in watch.SITES] == [accumulation, *[2 * accumulation] * 3]
    assert [sites[path][0][2] for path in watch.SITES] == [0.2, 0.4, 0.2, 0.2]

    tree, masks, size = plain.tensors(params), watch.factors(sites), 8 // accumulation
    assert accumulation == 1 or not np.array_equal(*masks['embeddings'])  # micro-batches have their own
    sums = {name: dict.fromkeys(('loss', 'right', 'count'), 0) for name in WEIGHTS}
    for part in range(accumulation):  # micro-batches one after the other, each with its own masks
        rows = {name: array[part * size:(part + 1) * size] for name, array in example.items()}
        calls = {site: each[part * len(each) // accumulation:] for site, each in masks.items()}
        for name, terms in plain.pretraining(tree, rows, calls, vocab_size=models.V).items():
            sums[name] = {term: sums[name][term] + terms[term] for term in terms}
    loss = sum(WEIGHTS[name] * terms['loss'] / terms['count'] for name, terms in sums.items())
    gradient = plain.gradients(loss, tree)

    assert_gradients(state.opt_state, gradient)
    after = jax.tree.map(lambda old, g: old - RATE * g, params, gradient)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), state.params, after)
    expected = {'loss': loss.item(), 'gradient_norm': math.sqrt(sum((g**2).sum() for g in jax.tree.leaves(gradient)))}
    for name, terms in sums.items():
        expected |= {f'{name}/loss': (terms['loss'] / terms['count']).item(),
                     f'{name}/accuracy': (terms['right'] / terms['count']).item()}
    tokens = (example['input_mask'] > 0).sum(1)
    sizes = [np.bincount(row, minlength=2)[1:] for row in example['input_mask']]
    expected |= {'tokens': tokens.mean(), 'padding': 1 - tokens.mean() / models.L, 'examples': 2 if packed else 1,
                 'squared_tokens': np.mean([(one**2).sum() for one in sizes]),
                 'predictions': example['masked_lm_weights'].sum() / 8}
    assert {name: value(mean) for name, mean in found.items()} == pytest.approx(expected, rel=1e-5)
    assert float(found['mlm/loss'].count) == example['masked_lm_weights'].sum() and int(state.step) == 4


def test_a_step_of_fine_tuning_with_frozen_embeddings():
    """The head drops its pooled vector; a row that is no example counts nothing; what is frozen stays as it was."""
    config = models.config('model.embeddings.dropout_rate=0.3', 'model.run.unroll=1')
    config.targets = ConfigDict({'classification': {'num_classes': 3, 'dropout_rate': 0.5, 'weight': 2.0}})
    model, example = model_parts.build(config), models.packed_batch()
    example |= {'label_ids': (np.arange(16) % 3).astype(np.int32),
                'is_real_example': (np.arange(16) % 4 < 3).astype(np.int32)}
    params = models.random_params(model, example, scale=0.1)
    weights = model_parts.target_weights(config)
    ((state, found, sites),) = one_step(model, params, example, weights=weights, frozen=('embeddings',))
    tree = plain.tensors(params)
    (head,) = watch.factors(sites, {'targets_classification/Dropout_0': 'head'})['head']
    assert abs((head == 0).mean() - 0.5) < 0.15
    terms = plain.classification(tree, example, watch.factors(sites), head)['classification']
    assert int(terms['count']) == 12
    gradient = plain.gradients(2.0 * terms['loss'] / terms['count'], tree)
    del gradient['embeddings']
    assert_gradients(state.opt_state, gradient)
    jax.tree.map(np.testing.assert_array_equal, state.params['embeddings'], params['embeddings'])
    assert value(found['classification/loss']) == pytest.approx((terms['loss'] / terms['count']).item(), rel=1e-5)
    assert value(found['classification/accuracy']) == pytest.approx((terms['right'] / terms['count']).item(), rel=1e-5)


def test_dropout_is_a_function_of_seed_and_step():
    """The step folds its own number in: the same batch and parameters are dropped otherwise at each step and seed."""
    model = models.build('model.embeddings.dropout_rate=0.5', 'model.run.unroll=1')
    example = models.batch(padded=False)
    params = models.random_params(model, example, scale=0.1)

    which = ((3, 7), (3, 7), (4, 7), (3, 8), (7, 3))
    losses, drawn = [], []
    for _, found, sites in one_step(model, params, example, hyper=which):
        losses.append(value(found['loss']))
        drawn.append({path: np.stack([out != 0 for _, out, _ in calls]) for path, calls in sites.items()})
    assert losses[0] == losses[1] and all(np.array_equal(drawn[0][path], drawn[1][path]) for path in watch.SITES)
    for loss, other in zip(losses[2:], drawn[2:]):
        assert abs(loss - losses[0]) > 1e-4
        assert all(abs((drawn[0][path] == other[path]).mean() - 0.5) < 0.06 for path in watch.SITES)


@jax.jit
def slow(state, matrix):
    """A step of some tenths of a second."""
    product = jax.lax.fori_loop(0, 12, lambda _, m: m @ matrix, matrix)
    loss = metrics.Mean(jnp.sum(product), jnp.float32(1))
    found = {'loss': loss, 'gradient_norm': loss}
    return state.replace(step=state.step + 1, params={'w': state.params['w'] + product[0, 0]}), found


def test_the_host_dispatches_ahead_and_reads_only_when_a_window_ends(tmp_path):
    """Within a window, each step is given to the device while the one before it is still being computed."""
    before, busy = [None], {}

    def step(state, batch, hyper):
        number = len(busy)
        busy[number] = before[0] is not None and not before[0].is_ready()
        state, found = slow(state, batch)
        before[0] = found['loss'].total
        return state, found

    matrix = jnp.eye(SIZE)
    state = train.TrainState(jnp.int32(0), {'w': jnp.float32(0)}, {})
    jax.block_until_ready(slow(state, matrix))
    state = train.fit(
        state,
        step,
        iter([matrix] * STEPS),
        train.Schedule(STEPS, 5, 100, 100),
        hyper=lambda _: {'learning_rate': 0.1},
        evaluators={},
        checkpoints=Checkpoints(tmp_path / 'checkpoints'),
        writer=metrics.Writer(tmp_path, 0),
    )
    assert float(state.params['w']) == STEPS
    assert busy == {number: number % 5 != 0 for number in range(STEPS)}  # after steps 5 and 9 the window was read
    log = [json.loads(line) for line in (tmp_path / 'log.jsonl').read_text().splitlines()]
    assert [(line['step'], line['loss']) for line in log] == [(5, SIZE), (9, SIZE)]


class Record:
    """Stands for checkpoints and a writer: what they were told, in order."""

    def __init__(self):
        self.told = []

    def save(self, step, state, scores):
        assert int(state.step) == step
        self.told.append(('save', step, scores))

    def write(self, step, values):
        self.told.append(('write', step, values))

    def write_rates(self, step, values):
        assert values['steps_per_second'] > 0
        self.told.append(('rates', step, values['share']))

    def flush(self):
        self.told.append(('flush',))

    def wait(self):
        self.told.append(('wait',))

    def steps(self):
        return [told[1] for told in self.told if told[0] == 'save']


def run(record, num_steps=11, start=0, **kwargs):
    """Steps whose loss is their batch's number, under a rate of a hundredth of theirs."""
    def step(state, batch, hyper):
        assert hyper['learning_rate'] == int(state.step) / 100
        mean = metrics.Mean(np.float64(batch), np.float64(1))
        return state.replace(step=state.step + 1), {'loss': mean, 'gradient_norm': mean}

    settings = {'hyper': lambda number: {'learning_rate': number / 100}, 'rates': lambda *found: {'share': found[:2]},
                'evaluators': {'dev': lambda step, params: {'accuracy': step / 10}}}
    state, batches = train.TrainState(np.int32(start), {}, {}), iter(range(start, num_steps))
    schedule = train.Schedule(num_steps, log_every=2, save_every=4, eval_every=6, phase_ends=(5,))
    return train.fit(state, step, batches, schedule, checkpoints=record, writer=record, **settings | kwargs)


def test_the_loop_logs_evaluates_and_saves_when_it_should():
    """Windows of two steps, the phase's end and the run's; evaluations at 6 and at the end, saved with what follows."""
    record = Record()
    assert int(run(record).step) == 11
    expected = []
    for at, window in ((2, (0, 1)), (4, (2, 3)), (5, (4,)), (6, (5,)), (8, (6, 7)), (10, (8, 9)), (11, (10,))):
        loss = sum(window) / len(window)
        expected += [('write', at, {'loss': loss, 'gradient_norm': loss, 'learning_rate': (at - 1) / 100}),
                     ('rates', at, (at, {'loss': loss, 'gradient_norm': loss}))]
        if at in (6, 11):
            expected += [('write', at, {'dev/accuracy': at / 10})]
        if at in (4, 8, 11):
            expected += [('flush',), ('save', at, {'dev/accuracy': {4: None, 8: 0.6, 11: 1.1}[at]} if at > 4 else {})]
    assert record.told == [*expected, ('wait',)]


def test_the_loop_begins_where_the_state_stands_and_stops_when_told():
    record = Record()
    with pytest.raises(Stopped, match='step 9 of 11 is saved'):
        run(record, start=7, stop=lambda step: step == 9)
    assert [told[:2] for told in record.told] == [('write', 8), ('rates', 8), ('flush',), ('save', 8),
                                                  ('write', 9), ('rates', 9), ('flush',), ('save', 9), ('wait',)]


@pytest.mark.parametrize('bad', [math.nan, math.inf])
@pytest.mark.parametrize('term', ['loss', 'gradient_norm'])
def test_a_number_that_is_not_finite_names_its_own_step(bad, term):
    record = Record()

    def step(state, batch, hyper):
        means = {name: metrics.Mean(np.float64(1), np.float64(1)) for name in ('loss', 'gradient_norm')}
        if batch == 6:
            means[term] = metrics.Mean(np.float64(bad), np.float64(1))
        return state.replace(step=state.step + 1), means

    with pytest.raises(train.Diverged, match=r'step 7 \(batch number 6\): the last good checkpoint is step 4'):
        train.fit(
            train.TrainState(np.int32(0), {}, {}),
            step,
            iter(range(12)),
            train.Schedule(12, 4, 4, 4),
            evaluators={},
            checkpoints=record,
            writer=Record(),
            hyper=lambda _: {'learning_rate': 0},
            rates=lambda *_: {'share': 0},
        )
