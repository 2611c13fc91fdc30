"""Examples and masks: purity, statistics over a million tokens, whole words, the two pipelines."""

import dataclasses

import numpy as np
import pytest
from conftest import AS_IN_THE_PAPER, TINY

from bert_jax import cli, evaluate, metrics, partition, pretrain
from bert_jax.cli import UserError
from bert_jax.data import batches, draws, examples, masking, tokenizer
from bert_jax.data.store import Split


def make(store, length=64, seed=0, split=None, **kwargs):
    return examples.Examples(split or store.train, store.tokenizer, seed, length, **AS_IN_THE_PAPER | kwargs)


def equal(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


@pytest.fixture(scope='module')
def million(store):
    """A million tokens of distinct examples, before and after masking."""
    rng = np.random.default_rng(0)
    tokens = rng.choice(store.tokenizer.regular_ids, 400_000).astype(np.uint16)
    split = Split(tokens, np.full(20_000, 20, np.uint16), np.full(400, 50, np.uint32))
    source = make(store, 128, split=split)
    masked, plain = [], []
    for epoch in range(3):
        rows = np.arange(len(source.plan(epoch)))
        masked.append(source.make(epoch, rows))
        plain.append(examples.unmasked(split.tokens, source.plan(epoch), 128, store.tokenizer)[0])
    join = lambda parts: {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}  # noqa: E731
    masked, plain = join(masked), join(plain)
    assert masked['input_mask'].sum() > 1_000_000
    return masked, plain


def test_fifteen_percent_of_each_example(million):
    masked, _ = million
    lengths, counts = masked['input_mask'].sum(1), masked['masked_lm_weights'].sum(1)
    assert (counts == np.minimum(20, np.maximum(1, np.rint(0.15 * lengths)))).all()
    assert abs(counts.sum() / lengths.sum() - 0.15) < 0.004  # rounding: 19 of 128 is 14.8 %


def test_eighty_ten_ten(million, store):
    masked, plain = million
    rows, columns = np.nonzero(plain['input_ids'] != masked['input_ids'])
    chosen = np.zeros(plain['input_ids'].shape, bool)
    real = masked['masked_lm_weights'] > 0
    chosen[np.nonzero(real)[0], masked['masked_lm_positions'][real]] = True
    assert chosen[rows, columns].all()                       # nothing else changed
    before, after = plain['input_ids'][chosen], masked['input_ids'][chosen]
    to_mask, kept = (after == store.tokenizer.mask_id).mean(), (after == before).mean()
    assert abs(to_mask - 0.8) < 0.003 and abs(kept - 0.1) < 0.003
    random = after[(after != store.tokenizer.mask_id) & (after != before)]
    counts = np.bincount(random, minlength=store.tokenizer.vocab_size)
    assert not counts[list(store.tokenizer.special_ids)].any()
    assert (counts[store.tokenizer.regular_ids] > 0).mean() > 0.99  # every ordinary id comes up
    expected = len(random) / len(store.tokenizer.regular_ids)
    chi2 = ((counts[store.tokenizer.regular_ids] - expected) ** 2 / expected).sum() / len(store.tokenizer.regular_ids)
    assert 0.8 < chi2 < 1.2


def test_no_special_token_is_ever_masked_and_answers_are_the_text(million, store):
    masked, plain = million
    real = masked['masked_lm_weights'] > 0
    answers = np.take_along_axis(plain['input_ids'], masked['masked_lm_positions'], 1)
    assert (answers == masked['masked_lm_ids'])[real].all()
    assert not np.isin(
        masked['masked_lm_ids'][real], [store.tokenizer.cls_id, store.tokenizer.sep_id, store.tokenizer.pad_id]
    ).any()
    assert not masked['masked_lm_ids'][~real].any() and not masked['masked_lm_positions'][~real].any()
    ordered = np.diff(np.where(real, masked['masked_lm_positions'], 1000), axis=1)
    assert (ordered >= 0).all()


def test_every_place_is_as_likely(million, store):
    masked, plain = million
    full = masked['input_mask'].all(1)
    places = masked['masked_lm_positions'][full][masked['masked_lm_weights'][full] > 0]
    possible = ~np.isin(plain['input_ids'][full], store.tokenizer.special_ids)
    shares = np.bincount(places, minlength=128)[1:-1] / possible.sum(0)[1:-1]
    assert abs(shares / shares.mean() - 1).max() < 0.12


def test_layout(store):
    batch = make(store).make(0, np.arange(200))
    tok = store.tokenizer
    for ids, mask, segments, label in zip(
        *(batch[k] for k in ('input_ids', 'input_mask', 'segment_ids', 'next_sentence_labels'))
    ):
        n = mask.sum()
        assert mask[:n].all() and not ids[n:].any() and not segments[n:].any()
        assert ids[0] == tok.cls_id and ids[n - 1] == tok.sep_id and segments[n - 1] == 1
        first_sep = np.flatnonzero(ids[:n] == tok.sep_id)[0]
        assert not segments[:first_sep + 1].any() and segments[first_sep + 1:n].all() and label[0] in (0, 1)
    single = make(store, pairing='single').make(0, np.arange(50))
    assert not single['segment_ids'].any() and not single['next_sentence_weights'].any()


@pytest.mark.parametrize('length, most', [(128, 20), (512, 77), (64, 10)])
def test_the_number_of_predictions(length, most):
    assert masking.max_predictions(length, 0.15) == most


@pytest.mark.parametrize('length, rate, counts', [
    (128, 0.15, {3: 1, 5: 1, 9: 1, 11: 2, 23: 3, 24: 4, 127: 19, 128: 19}), (512, 0.15, {512: 77}),
    (20, 0.4, {3: 1, 9: 4, 20: 8}), (40, 0.01, {3: 1, 40: 1})])
def test_how_many_places_are_predicted(length, rate, counts):
    """The nearest whole number to the share of an example's tokens, 1 at least, written down."""
    assert masking.num_predictions(np.array(list(counts)), length, rate).tolist() == list(counts.values())


def test_plans_of_old_epochs_are_forgotten(store):
    """The first, the one before and the present one are kept, whatever the number of epochs."""
    source = make(store, pack_lengths=1)
    for epoch in range(6):
        source.make(epoch, np.arange(4))
    assert sorted(source._cache) == [(what, epoch) for what in ('plan', 'rows') for epoch in (0, 4, 5)]


def test_a_batch_is_a_pure_function_of_the_step(store):
    a, b = make(store), make(store)
    b.batch(900, 8)                                           # history does not matter
    assert equal(a.batch(5, 8), b.batch(5, 8))
    assert not equal(a.batch(5, 8), a.batch(6, 8))
    assert not equal(a.batch(5, 8), make(store, seed=1).batch(5, 8))
    whole = a.batch(7, 8)
    for rows in (slice(0, 4), slice(4, 8)):                   # two hosts
        assert equal(a.batch(7, 8, rows), {k: v[rows] for k, v in whole.items()})


def test_a_second_phase_of_a_length_goes_on_in_the_stream(store):
    """3 steps of 8 rows, some of another length, 2 steps of 16: rows 0 to 55 of one stream, none twice."""
    stream = examples.Examples(store.train, store.tokenizer, 0, 64, **AS_IN_THE_PAPER)
    phases = pretrain.make_phases(((3, 64, 8), (1, 96, 8), (2, 64, 16)))
    assert [(phase.first, phase.stop, phase.begin) for phase in phases] == [(0, 3, 0), (3, 4, 0), (4, 6, 24)]
    made = [pretrain._make_batch(stream, phase, np.arange(phase.batch_size), step)['input_ids']
            for phase in (phases[0], phases[2]) for step in range(phase.stop - phase.first)]
    np.testing.assert_array_equal(np.concatenate(made), stream.batch(0, 56)['input_ids'])


@pytest.mark.parametrize('length', [64, 200])
def test_an_empty_batch_has_the_names_shapes_and_types_of_a_real_one(store, length):
    real, none = make(store, length).batch(0, 8), examples.empty(8, length, 0.15, 0)
    assert {k: (v.shape, v.dtype) for k, v in real.items()} == {k: (v.shape, v.dtype) for k, v in none.items()}


def test_epochs_are_whole_and_drawn_afresh(store):
    source = make(store)
    size = source.epoch_size
    across = source.batch(0, size + 8)                        # into the second epoch
    first, second = source.make(0, np.arange(size)), source.make(1, np.arange(8))
    assert equal(across, {k: np.concatenate([first[k], second[k]]) for k in first})
    assert abs(len(source.plan(1)) - size) < 0.05 * size
    rows = {row.tobytes() for row in first['input_ids']}
    assert len(rows) > 0.99 * size                            # distinct
    assert not {row.tobytes() for row in second['input_ids']} & rows


@pytest.mark.parametrize('stream, there', [('tf', True), ('tf', False), ('tf', 'after two'), ('thread', True)])
def test_the_pipelines_give_exactly_the_batches(store, monkeypatch, stream, there):
    source = make(store)
    if there is True:
        batches.import_tensorflow().join()
    else:
        alive = iter([True, True, not there] + [not there] * 9)
        monkeypatch.setattr(
            batches,
            'import_tensorflow',
            lambda: type('Thread', (), {'is_alive': lambda self: next(alive), 'join': lambda self: None})(),
        )
    given = list(batches.STREAMS[stream](lambda step: source.batch(step, 8), 3, 12))
    assert len(given) == 9
    for step, batch in zip(range(3, 12), given):
        assert equal(batch, source.batch(step, 8))
    assert list(batches.STREAMS[stream](lambda step: source.batch(step, 8), 3, 3)) == []


def test_an_error_in_the_pipeline_reaches_the_loop(store):
    def broken(step):
        raise UserError('broken')

    with pytest.raises(UserError, match='broken'):
        list(batches.thread_stream(broken, 0, 2))


@pytest.mark.parametrize('kind', ['wordpiece', 'sentencepiece'])
def test_whole_words_are_whole(kind, vocab, sentencepiece_vocab, corpus):
    tok = tokenizer.load(vocab if kind == 'wordpiece' else sentencepiece_vocab)
    sentences = [line for line in corpus.read_text().split('\n') if line][:1500]
    tokens, lengths = tok.encode_batch(sentences)
    kept = lengths[lengths > 0]
    split = Split(tokens, kept.astype(np.uint16), np.array([len(kept) // 2, len(kept) - len(kept) // 2], np.uint32))
    source = examples.Examples(split, tok, 0, 64, **AS_IN_THE_PAPER | {'masking': 'whole_word'})
    rows = np.arange(source.epoch_size)
    masked = source.make(0, rows)
    plain, candidates = examples.unmasked(split.tokens, source.plan(0), 64, tok)
    chosen_total = wanted_total = 0
    for r in rows:
        words = []                                            # the plain way to group pieces
        for i in np.flatnonzero(candidates[r]):
            if tok.word_starts[plain['input_ids'][r, i]] or not candidates[r, i - 1]:
                words.append([])
            words[-1].append(i)
        chosen = set(masked['masked_lm_positions'][r][masked['masked_lm_weights'][r] > 0].tolist())
        left = [w for w in words if not set(w) & chosen]
        assert all(set(w) <= chosen for w in words if set(w) & chosen)
        wanted = min(10, max(1, round(0.15 * int(plain['input_mask'][r].sum()))))
        assert len(chosen) <= wanted
        assert all(len(w) > wanted - len(chosen) for w in left) or len(chosen) == wanted  # no word that fits is left
        chosen_total, wanted_total = chosen_total + len(chosen), wanted_total + wanted
    assert chosen_total > 0.95 * wanted_total
    assert any(len(w) > 1 for w in words)


def test_other_replacement_shares(store):
    source = make(store, replacement=(0.0, 1.0))
    batch = source.make(0, np.arange(300))
    assert not (batch['input_ids'] == store.tokenizer.mask_id).any()
    source = make(store, replacement=(1.0, 0.0))
    batch = source.make(0, np.arange(300))
    assert (batch['input_ids'] == store.tokenizer.mask_id).sum() == batch['masked_lm_weights'].sum()


def test_held_out_documents_never_train(store):
    """No sentence of eight tokens or more that only held-out documents have is seen in five training epochs."""
    def sentences(split):
        starts = split.sentence_starts
        return {split.tokens[a:b].tobytes() for a, b in zip(starts[:-1], starts[1:]) if b - a >= 8}

    train_text = store.train.tokens.tobytes()
    only_held_out = [s for s in sentences(store.held_out) if s not in train_text]
    assert len(only_held_out) > 20
    source = make(store, 96)
    for epoch in range(5):
        table = source.plan(epoch)
        plain, _ = examples.unmasked(store.train.tokens, table, 96, store.tokenizer)
        seen = plain['input_ids'].astype(np.uint16).tobytes()
        assert not any(sentence in seen for sentence in only_held_out)


def test_held_out_batches_are_exact_and_fixed(store):
    source = make(store, split=store.held_out, seed=examples.EVALUATION_SEED)
    count = source.epoch_size
    for size in (8, 13):
        made = [source.evaluation_batch(n, size, 10**9) for n in range(-(-count // size))]
        assert sum(b['is_real_example'].sum() for b in made) == count
        rows = np.concatenate([b['input_ids'][b['is_real_example'] > 0] for b in made])
        assert np.array_equal(rows, source.make(0, np.arange(count))['input_ids'])
        last = made[-1]
        assert not last['masked_lm_weights'][last['is_real_example'] == 0].any()
        assert not last['next_sentence_weights'][last['is_real_example'] == 0].any()


def test_draws_are_the_published_mixers():
    """SplitMix64's published outputs for seed 1234567; both mixers in Python's integers; no draw may ever change."""
    state, first = 1234567, []
    for _ in range(3):
        first.append(int(draws.bits64(state)[0]))
        state = (state + 0x9E3779B97F4A7C15) % 2**64
    assert first == [6457827717110365317, 3203168211198807973, 9817491932198370423]

    def mix64(x):
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            x = (x ^ x >> shift) * factor % 2**64
        return x ^ x >> 31

    def mix32(x):
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            x = (x ^ x >> shift) * factor % 2**32
        return x ^ x >> 16

    def bits64(*keys):
        state = 0
        for key in keys:
            state = mix64((state + 0x9E3779B97F4A7C15 + key) % 2**64)
        return state

    def bits32(row, column, stream):
        row ^= bits64(stream)
        return mix32(mix32((row // 2**32 + column * 0x9E3779B1) % 2**32) ^ row % 2**32)

    rng = np.random.default_rng(0)
    keys, columns = rng.integers(0, 2**64, (3, 20), np.uint64), np.arange(0, 60, 3)
    assert draws.bits64(*keys).tolist() == [bits64(*map(int, one)) for one in keys.T]
    for stream in (0, 2):
        expected = [bits32(int(key), int(column), stream) for key, column in zip(keys[0], columns)]
        assert draws.bits32(keys[0], columns, stream).tolist() == expected
    assert draws.permutation(9, 4, 2).tolist() == sorted(range(9), key=lambda i: bits64(4, 2, i))
    assert draws.below(keys[0], 1000).tolist() == [int(key) // 2**32 * 1000 // 2**32 for key in keys[0]]
    ends = np.array([0, 2**64 - 1], np.uint64)
    assert draws.below(ends, 7).tolist() == [0, 6] and draws.below(ends, np.array([1, 1])).tolist() == [0, 0]
    half = np.array([2**63 - 1, 2**63], np.uint64)
    assert draws.chance(half, 0.5).tolist() == [True, False]
    assert draws.chance((half >> np.uint64(32)).astype(np.uint32), 0.5).tolist() == [True, False]


def test_examples_against_a_plain_loop(store):
    """[CLS] A [SEP] B [SEP] and what may be masked, token by token."""
    tok = store.tokenizer
    for pairing in ('next_sentence', 'single'):
        table = make(store, 48, pairing=pairing).plan(0)[:60]
        batch, candidates = examples.unmasked(store.train.tokens, table, 48, tok)
        for i, row in enumerate(table):
            a, b = (store.train.tokens[row[f'{side}_start']:][:row[f'{side}_length']].tolist() for side in 'ab')
            first, second = [tok.cls_id, *a, tok.sep_id], [*b, tok.sep_id] if b else []
            n, rest = len(first + second), [0] * (48 - len(first + second))
            assert batch['input_ids'][i].tolist() == first + second + [tok.pad_id] * len(rest)
            assert batch['input_mask'][i].tolist() == [1] * n + rest
            assert batch['segment_ids'][i].tolist() == [0] * len(first) + [1] * len(second) + rest
            assert batch['position_ids'][i].tolist() == list(range(48))
            may_be = [False, *[True] * len(a), False, *[True] * len(b), *[False] * bool(b)]
            assert candidates[i].tolist() == may_be + [False] * len(rest)
            assert batch['cls_positions'][i] == 0 and batch['next_sentence_labels'][i] == row['label']
            assert batch['next_sentence_weights'][i] == bool(b)
        assert {name: array.dtype.name for name, array in batch.items()} == {
            name: 'float32' if name == 'next_sentence_weights' else 'int32' for name in batch}


def test_masks_depend_on_seed_epoch_length_and_row(store):
    """Of equal tokens: two rows, epochs, seeds or lengths choose their places, and what stands there, apart."""
    tokens = np.full(24_000, store.tokenizer.regular_ids[0], np.uint16)
    split = Split(tokens, np.full(400, 60, np.uint16), np.full(2, 200, np.uint32))

    def drawn(length, seed, epoch, first):
        """(bool [rows, 62] places, ids there) of full rows."""
        source = make(store, length, seed=seed, split=split, pairing='single', short_rate=0.0, replacement=(0.0, 0.5))
        masked = source.make(epoch, np.arange(first, first + 150))
        real, places = masked['masked_lm_weights'] > 0, np.zeros((150, length), bool)
        places[np.nonzero(real)[0], masked['masked_lm_positions'][real]] = True
        return places[:, 1:61], masked['input_ids'][:, 1:61]

    places, ids = drawn(62, 0, 0, 0)
    assert abs(places.mean() - 9 / 60) < 1e-6
    assert all(np.array_equal(*pair) for pair in zip((places, ids), drawn(62, 0, 0, 0)))
    changed = (ids != store.tokenizer.regular_ids[0])
    assert abs(changed.sum() / places.sum() - 0.5) < 0.05
    for other in ((62, 1, 0, 0), (62, 0, 1, 0), (62, 0, 0, 150), (63, 0, 0, 0)):
        there, ids_there = drawn(*other)
        assert abs(places[there].mean() - places.mean()) < 0.04, other  # no more often together than by chance
        both = changed & (ids_there != store.tokenizer.regular_ids[0])
        assert both.sum() > 20 and (ids == ids_there)[both].mean() < 0.05, other


def test_the_held_out_evaluation_is_of_every_example_once(store, monkeypatch):
    """Thirteen of batches of eight, at the length of the step's phase; the unigram model's scores beside them."""
    config = cli.load_config('configs/pretrain.py:tiny', [*TINY, '--config.eval_examples=13'])
    phases, seen = pretrain.make_phases(config.phases), []

    def loss_step(params, batch):
        batch = {name: np.asarray(array) for name, array in batch.items()}
        seen.append(batch)
        return {'mlm/loss': metrics.Mean.of(batch['masked_lm_ids'], batch['masked_lm_weights'])}

    monkeypatch.setattr(evaluate, 'make_loss_step', lambda *_: loss_step)
    mesh = partition.make_mesh((-1, 1, 1))
    evaluator = pretrain.make_evaluator(config, store, None, mesh, phases)
    counts = np.bincount(store.train.tokens, minlength=store.tokenizer.vocab_size) + 1.0
    for step, length in ((6, 64), (7, 96), (10, 96)):
        seen.clear()
        found = evaluator(step, None)
        expected = make(store, length, seed=examples.EVALUATION_SEED, split=store.held_out).make(0, np.arange(13))
        rows = {name: np.concatenate([batch[name] for batch in seen]) for name in seen[0]}
        real = rows.pop('is_real_example') > 0
        assert real.sum() == 13 and len(real) % 8 == 0
        assert equal({name: array[real] for name, array in rows.items()}, expected)
        answers = expected['masked_lm_ids'][expected['masked_lm_weights'] > 0]
        assert found == pytest.approx({
            'mlm/loss': answers.mean(), 'mlm/unigram_loss': -np.log(counts / counts.sum())[answers].mean(),
            'mlm/unigram_accuracy': (answers == counts.argmax()).mean()})


def test_draws_are_uniform_and_independent():
    bits = draws.bits64(1, np.arange(100_000))
    ones = np.unpackbits(bits.view(np.uint8)).reshape(-1, 64).mean(0)
    assert abs(ones - 0.5).max() < 0.01
    table = draws.bits32(draws.bits64(np.arange(500))[:, None], np.arange(200), 0) / 2**32
    assert abs(table.mean() - 0.5) < 0.003 and abs(np.corrcoef(table)[0, 1:]).mean() < 0.08
    assert sorted(draws.permutation(1000, 3)) == list(range(1000))
    assert abs(draws.chance(bits, 0.3).mean() - 0.3) < 0.005
    assert draws.chance(bits, 1.0).all() and not draws.chance(bits, 0.0).any()


def test_a_batch_that_cannot_be_cut_names_one_that_can():
    with pytest.raises(UserError, match='batch of 30 is not divisible by 4 devices x 2 micro-batches; .* 32'):
        partition.check_batch_size(30, 4, 2)


def test_unknown_masking_lists_the_known(store):
    source = dataclasses.replace(make(store), masking='wholeword')
    with pytest.raises(UserError, match="Unknown masking 'wholeword'; known: whole_word, none, token"):
        source.make(0, np.arange(1))


def test_a_mixture_has_every_row_of_each_stream_once_in_its_share(store):
    one, other = make(store, 64), make(store, 64, split=store.held_out)
    mixed = examples.Mixture((one, other), (3, 1), seed=5)
    source, number = mixed.origin(np.arange(4000))
    for start in range(0, 4000, 4):
        assert np.bincount(source[start:start + 4]).tolist() == [3, 1]
    for k in (0, 1):
        assert np.array_equal(number[source == k], np.arange((3000, 1000)[k]))  # in order, none twice, none left out
    assert len(set(np.flatnonzero(source) % 4)) == 4                             # not always at the same place
    numbers = np.array([7, 2, 4001, 900])
    batch, (source, number) = mixed.at(numbers), mixed.origin(numbers)
    for row in range(4):  # each row is the stream's own
        alone = (one, other)[source[row]].at(number[row:row + 1])
        assert all(np.array_equal(alone[name][0], batch[name][row]) for name in batch)
    whole = mixed.batch(3, 8, begin=16)
    halves = [mixed.batch(3, 8, rows, begin=16) for rows in (np.arange(4), np.arange(4, 8))]  # of two hosts
    assert all(np.array_equal(np.concatenate([half[name] for half in halves]), whole[name]) for name in whole)


@pytest.mark.parametrize('mixture', [(1,), (0, 1), (1, 1, 1)])
def test_a_mixture_that_does_not_fit_its_stores_is_refused(store, mixture):
    with pytest.raises(UserError, match='for each of the 2 stores'):
        examples.mixed(
            [store.train, store.held_out], store.tokenizer, 0, 64, name='documents', mixture=mixture, **AS_IN_THE_PAPER
        )
