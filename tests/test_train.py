"""The loop: what the host waits for, and what it writes when."""

import json

import jax
import jax.numpy as jnp

from bert_jax import metrics, train
from bert_jax.checkpoint import Checkpoints

SIZE, STEPS = 700, 9


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
    state = train.fit(state, step, iter([matrix] * STEPS), num_steps=STEPS, hyper=lambda _: {'learning_rate': 0.1}, log_every=5,
                      save_every=100, eval_every=100, evaluators={}, checkpoints=Checkpoints(tmp_path / 'checkpoints'),
                      writer=metrics.Writer(tmp_path, 0))
    assert float(state.params['w']) == STEPS
    assert busy == {number: number % 5 != 0 for number in range(STEPS)}  # after steps 5 and 9 the window was read
    log = [json.loads(line) for line in (tmp_path / 'log.jsonl').read_text().splitlines()]
    assert [(line['step'], line['loss']) for line in log] == [(5, SIZE), (9, SIZE)]
