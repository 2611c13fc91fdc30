"""Packed rows: the same examples, the same losses and gradients, no padding."""

import jax
import models
import numpy as np
import pytest
import scipy.stats
from conftest import AS_IN_THE_PAPER
from hypothesis import given, settings
from hypothesis import strategies as st

from bert_jax import train
from bert_jax.data import examples, masking, packing, plan


def make(store, packed, length=128, **kwargs):
    return examples.Examples(store.train, store.tokenizer, 5, length,
                             **AS_IN_THE_PAPER | {'pack_lengths': packed, 'short_rate': 0.7} | kwargs)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 48), min_size=1, max_size=300), st.integers(1, 3), st.integers(0, 9))
def test_every_example_once_and_no_row_too_full(lengths, times, key):
    lengths, row = np.array(lengths), 48 * times
    predictions = masking.num_predictions(np.arange(49), 48, 0.15)
    most = masking.max_predictions(row, 0.15)
    packed = packing.pack(lengths, predictions, row, most, key)
    numbers, owners = packed.examples(np.arange(len(packed)))
    assert sorted(numbers) == list(range(len(lengths)))
    assert np.bincount(owners, lengths[numbers]).max() <= row
    assert np.bincount(owners, predictions[lengths[numbers]]).max() <= most
    assert np.bincount(owners).min() >= 1 and np.bincount(owners).max() <= packing.slots(row)
    if key:
        again = packing.pack(lengths, predictions, row, most, key)
        assert np.array_equal(again.numbers, packed.numbers) and np.array_equal(again.starts, packed.starts)


@pytest.mark.parametrize('sizes, row', [((3, 4, 5, 6, 7), 96), ((4, 10, 17, 24), 384), (tuple(range(1, 97)), 192)])
def test_rows_reach_each_of_their_limits_and_pass_none(sizes, row):
    """Short examples fill the places for examples; those whose masks were rounded up fill the places for masks."""
    predictions, most = masking.num_predictions(np.arange(97), 96, 0.15), masking.max_predictions(row, 0.15)
    reached = np.zeros((3, 20), np.int64)
    for key in range(20):
        lengths = np.random.default_rng(key).choice(sizes, 400)
        packed = packing.pack(lengths, predictions, row, most, key)
        numbers, owners = packed.examples(np.arange(len(packed)))
        assert sorted(numbers) == list(range(400))
        for i, each in enumerate((np.ones(400), predictions[lengths], lengths)):
            reached[i, key] = np.bincount(owners, each[numbers]).max()
    limits = packing.slots(row), most, row
    assert all((one <= limit).all() for one, limit in zip(reached, limits))
    expected = {3: 0, 4: 1, 1: 2}[sizes[0]]
    assert (reached[expected] == limits[expected]).any()


def test_rows_come_in_no_order_of_length_and_in_another_one_with_another_key():
    lengths = np.random.default_rng(0).integers(5, 97, 5000)
    predictions = masking.num_predictions(np.arange(97), 96, 0.15)
    longest, places = [], []
    for key in (1, 2):
        packed = packing.pack(lengths, predictions, 96, 15, key)
        longest.append([lengths[packed.numbers[a:b]].max() for a, b in zip(packed.starts[:-1], packed.starts[1:])])
        places.append(np.argsort(packed.numbers))
    bound = 5 / np.sqrt(len(longest[0]))
    assert len(set(longest[0])) > 50
    for one in longest:
        assert abs(scipy.stats.spearmanr(np.arange(len(one)), one).statistic) < bound
        assert abs(scipy.stats.spearmanr(one[:-1], one[1:]).statistic) < bound
    assert abs(scipy.stats.spearmanr(*places).statistic) < bound


@pytest.mark.parametrize('pairing', ['next_sentence', 'single'])
def test_rows_hold_the_examples_of_the_plan_masks_included(store, pairing):
    packed, plain = make(store, 1, pairing=pairing), make(store, 0, pairing=pairing)
    assert np.array_equal(packed.plan(2), plain.plan(2))
    rows = packed.rows(2)
    seen = []
    for first in range(0, len(rows), 16):
        wanted = np.arange(first, min(first + 16, len(rows)))
        batch = packed.make(2, wanted)
        for row, number in enumerate(wanted):
            members, _ = rows.examples(np.array([number]))
            ones = plain.make(2, members)
            for place in range(len(members)):
                assert np.array_equal(*take(batch, row, place + 1, ones, place))
            filled = batch['input_mask'][row] > 0
            assert filled.sum() == (ones['input_mask'] > 0).sum() and filled[:filled.sum()].all()
            assert batch['masked_lm_weights'][row].sum() == ones['masked_lm_weights'].sum()
            assert batch['next_sentence_weights'][row].sum() == ones['next_sentence_weights'].sum()
            seen += list(members)
    assert sorted(seen) == list(range(len(plain.plan(2))))


def take(batch, row, example, ones, place):
    """All there is to know of an example: in its packed row, and alone."""
    def known(batch, row, example, cls):
        mine = batch['input_mask'][row] == example
        first = np.argmax(mine)
        of_mine = (batch['masked_lm_weights'][row] > 0) & mine[batch['masked_lm_positions'][row]]
        return np.concatenate(
            [batch[name][row][mine] for name in ('input_ids', 'segment_ids', 'position_ids')]
            + [
                batch['masked_lm_positions'][row][of_mine] - first,
                batch['masked_lm_ids'][row][of_mine],
                [
                    batch['cls_positions'][row, cls] - first,
                    batch['next_sentence_labels'][row, cls],
                    batch['next_sentence_weights'][row, cls],
                ],
            ]
        )

    return known(batch, row, example, example - 1), known(ones, place, 1, 0)


@pytest.mark.parametrize(('length', 'packed'), [(128, 1), (64, 2)])
def test_losses_and_gradients_are_those_of_the_unpacked_examples(store, length, packed):
    packed, plain = make(store, packed, length), make(store, 0, length)
    rows = np.arange(24)
    together, alone = packed.make(0, rows), plain.make(0, packed.rows(0).examples(rows)[0])
    assert len(alone['input_ids']) > len(rows) and together['input_mask'].max() > 1
    model = models.build(f'model.embeddings.vocab_size={store.tokenizer.vocab_size}',
                         f'model.embeddings.max_length={length}')  # positions begin anew in each example
    params = models.random_params(model, {name: value[:1] for name, value in alone.items()}, scale=0.1)

    def loss(params, batch):
        losses = model.apply({'params': params}, batch, train=False, method='losses')
        return sum(terms['loss'].total / terms['loss'].count for terms in losses.values())

    ours, theirs = (jax.jit(jax.value_and_grad(loss))(params, batch) for batch in (together, alone))
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-5)
    for mine, other in zip(jax.tree.leaves(ours[1]), jax.tree.leaves(theirs[1])):
        assert np.linalg.norm(mine - other) <= 1e-5 * max(np.linalg.norm(other), 1e-3)


def test_an_example_does_not_see_its_neighbours(store):
    batch = make(store, 1).make(0, np.arange(24))
    (row,) = np.nonzero(batch['input_mask'].max(1) > 1)[0][:1]
    batch = {name: value[row:row + 1] for name, value in batch.items()}
    model = models.build(f'model.embeddings.vocab_size={store.tokenizer.vocab_size}', 'model.embeddings.max_length=128')
    params = models.random_params(model, batch)
    encode = lambda batch: np.asarray(model.apply({'params': params}, batch, train=False, method='encode').hidden[0])  # noqa: E731
    first = batch['input_mask'][0] == 1
    changed = batch | {'input_ids': np.where(first, batch['input_ids'], 9)}
    assert np.array_equal(encode(batch)[first], encode(changed)[first])
    assert not np.allclose(
        encode(batch)[~first & (batch['input_mask'][0] > 0)], encode(changed)[~first & (batch['input_mask'][0] > 0)]
    )


def test_flops_count_real_tokens_of_each_example(store):
    batch = make(store, 1).make(0, np.arange(24))
    sizes = [np.bincount(row, minlength=2)[1:] for row in batch['input_mask']]
    contents = train._contents(batch)
    assert contents['squared_tokens'].total == sum((size**2).sum() for size in sizes)
    assert contents['tokens'].total == sum(size.sum() for size in sizes)
    assert contents['examples'].total == sum((size > 0).sum() for size in sizes)


def test_rows_are_full_where_documents_are_many(store):
    lengths = np.random.default_rng(0).integers(5, 129, 20_000)  # half of each row would be padding
    predictions = masking.num_predictions(np.arange(129), 128, 0.15)
    packed = packing.pack(lengths, predictions, 128, 20, 0)
    assert lengths.sum() / (128 * len(packed)) > 0.98
    source = make(store, 2, 128)
    real = plan.lengths(source.plan(0), 'next_sentence')
    assert real.sum() / (256 * len(source.rows(0))) > 0.95


def test_empty_is_a_batch_without_text(store):
    real, none = make(store, 2).batch(0, 8), examples.empty(8, 128, 0.15, pack_lengths=2)
    assert {name: (x.shape, x.dtype) for name, x in real.items()} == {
        name: (x.shape, x.dtype) for name, x in none.items()
    }
