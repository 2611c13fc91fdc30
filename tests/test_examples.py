"""Examples and masks: purity, statistics over a million tokens, whole words, the two pipelines."""

import dataclasses

import numpy as np
import pytest
from conftest import AS_IN_THE_PAPER

from bert_jax import pretrain
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
    assert not np.isin(masked['masked_lm_ids'][real], [store.tokenizer.cls_id, store.tokenizer.sep_id, store.tokenizer.pad_id]).any()
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
    for ids, mask, segments, label in zip(*(batch[k] for k in ('input_ids', 'input_mask', 'segment_ids', 'next_sentence_labels'))):
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
        monkeypatch.setattr(batches, 'import_tensorflow', lambda: type('Thread', (), {'is_alive': lambda self: next(alive), 'join': lambda self: None})())
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
        examples.check_batch_size(30, 4, 2)


def test_unknown_masking_lists_the_known(store):
    source = dataclasses.replace(make(store), masking='wholeword')
    with pytest.raises(UserError, match="Unknown masking 'wholeword'; known: whole_word, token"):
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
        examples.mixed([store.train, store.held_out], store.tokenizer, 0, 64, name='documents', mixture=mixture, **AS_IN_THE_PAPER)
