"""The only loop: TrainState, train_step, fit."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from bert_jax import memory, optimizer, partition
from bert_jax.checkpoint import Checkpoints
from bert_jax.cli import Stopped, UserError, progress
from bert_jax.metrics import Mean, Writer, describe, flat, merge

Batch = dict[str, jax.Array]
Parts = dict[str, Batch]  # a batch of each source
Annotate = Mapping[str, Callable[[Any, Batch], Batch]]
SOURCE = 'text'
RUN_AHEAD = 2  # steps dispatched beyond the one being computed

memory.keep_freed()  # on import: once JAX's threads run, each has a pool of its own, which gives back what it frees


class Diverged(UserError):
    """The loss is no number any more."""


@flax.struct.dataclass
class TrainState:
    """All that training changes.

    Attributes:
      step: int32, updates made.
      params: the model's parameters.
      opt_state: the optimizer's.
    """

    step: jax.Array
    params: Any
    opt_state: Any


def make_init(model: nn.Module, tx: optax.GradientTransformation, batch: Batch, mesh: jax.sharding.Mesh,
              frozen: tuple[str, ...] = ()) -> Callable[[int], TrainState]:
    """seed -> a fresh state, every array made where it will live; compiled once for all seeds.

    `frozen` parts of the model ('embeddings', 'encoder', ...) have no optimizer state.
    """

    batch = {name: jnp.asarray(value) for name, value in batch.items()}
    shardings = partition.state_shardings(state_shapes(model, tx, batch, frozen), mesh)
    jitted = jax.jit(lambda seed: _fresh(model, tx, batch, jax.random.key(seed), frozen), out_shardings=shardings)
    return lambda seed: jitted(np.uint32(seed))


def state_shapes(model: nn.Module, tx: optax.GradientTransformation, batch: Batch, frozen: tuple[str, ...] = ()
                 ) -> TrainState:
    """The shapes of a state; `batch` may be shapes, too."""
    return _fresh.eval_shape(model, tx, batch, jax.random.key(0), frozen)


@functools.partial(jax.jit, static_argnames=('model', 'tx', 'frozen'), inline=True)
def _fresh(model: nn.Module, tx: optax.GradientTransformation, batch: Batch, rng: jax.Array, frozen: tuple[str, ...]
           ) -> TrainState:
    """A state; jitted so that asking for its shapes and making it is one trace."""
    params = model.init(rng, batch, train=False)['params']
    return TrainState(jnp.zeros([], jnp.int32), params, tx.init(_split(params, frozen)[0]))


def train_step(state: TrainState, parts: Parts, hyper: dict[str, Any], fixed: Mapping[str, Any] | None = None, *,
               model: nn.Module, tx: optax.GradientTransformation, mesh: jax.sharding.Mesh, accumulation: int,
               frozen: tuple[str, ...] = (), annotate: Annotate | None = None) -> tuple[TrainState, dict[str, Mean]]:
    """One update.

    Each target's loss is its sum over all of the batch by its count over all of it, so the number of devices,
    micro-batches and sources changes nothing but rounding.

    Args:
      state: is donated.
      parts: source -> its global batch [B, ...]; of several the losses are added.
      hyper: {'learning_rate': scalar, 'weights': {target: scalar}, 'seed': where dropout's randomness begins}.
      fixed: source -> arrays that are no part of the state, such as a teacher's parameters; never changed or saved.
      model, tx: what to train, and how.
      mesh: how the batch and the parameters lie.
      accumulation: micro-batches.
      frozen: parts of the model that stay as they are: no gradient is computed for them.
      annotate: source -> ((fixed, batch) -> batch), what is added to each micro-batch before the model sees it.

    Returns:
      The next state, and the step's metrics as sums and counts; of several sources each one's losses, too.
    """
    trained, held = _split(state.params, frozen)
    counts = [model.apply({}, batch, method='counts') for batch in parts.values()]
    counts = _total(counts)
    rng = jax.random.fold_in(jax.random.fold_in(jax.random.key(hyper['seed']), 1), state.step)

    def weighted(losses: dict[str, dict[str, Mean]]) -> jax.Array:
        return sum(hyper['weights'][name] * terms['loss'].total / jnp.maximum(counts[name], 1)
                   for name, terms in losses.items())

    def objective(params: Any, fixed: Any, batch: Batch, rng: jax.Array, source: str
                  ) -> tuple[jax.Array, dict[str, dict[str, Mean]]]:
        if annotate and source in annotate:
            batch = annotate[source](fixed, batch)
        losses = model.apply({'params': held | params}, batch, train=True, rngs={'dropout': rng}, method='losses')
        return weighted(losses), losses

    found = {}
    for number, (source, batch) in enumerate(parts.items()):
        gradient = jax.grad(functools.partial(objective, source=source), has_aux=True)
        args = trained, fixed[source] if fixed else None, batch, jax.random.fold_in(rng, number) if number else rng
        if accumulation == 1:
            with partition.logical_axes(mesh):
                found[source] = gradient(*args)
        else:
            found[source] = _accumulate(gradient, *args, mesh, accumulation)
    grads, losses = _total(found.values())
    updates, opt_state = tx.update(grads, state.opt_state, trained)
    params = held | jax.tree.map(lambda p, u: p - hyper['learning_rate'] * u, trained, updates)
    metrics = flat(losses)
    for source in found if len(found) > 1 else ():
        metrics |= {f'{source}/{name}': mean for name, mean in flat(found[source][1]).items()}
    one = jnp.ones(())
    metrics |= {'loss': Mean(weighted(losses), one), 'gradient_norm': Mean(optimizer.global_norm(grads), one)}
    metrics |= _total(map(_contents, parts.values()))
    return TrainState(state.step + 1, params, opt_state), metrics


def _split(params: dict[str, Any], frozen: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what is trained, what is not)."""
    return ({name: part for name, part in params.items() if name not in frozen},
            {name: part for name, part in params.items() if name in frozen})


def _total(trees: Iterable[Any]) -> Any:
    """The sum of equal trees, of one the tree itself."""
    return jax.tree.map(lambda *each: functools.reduce(jnp.add, each), *trees)


def _accumulate(gradient: Callable, params: Any, fixed: Any, batch: Batch, rng: jax.Array, mesh: jax.sharding.Mesh,
                accumulation: int) -> tuple[Any, Any]:
    """Sums gradients and losses over micro-batches, shard by shard, so that devices talk once, after the loop."""
    shards = partition.data_devices(mesh)
    constrain = jax.lax.with_sharding_constraint

    def cut(x: jax.Array) -> jax.Array:  # [B, ...] -> [micro-batch, shard, row, ...]: no row changes its device
        x = x.reshape(shards, accumulation, -1, *x.shape[1:]).swapaxes(0, 1)
        return constrain(x, partition.micro_batch_sharding(mesh))

    whole = constrain(params, partition.gathered(params, mesh))
    held = None if fixed is None else constrain(fixed, partition.gathered(fixed, mesh))
    each_shard = partition.per_shard(params, mesh)
    sharded = jax.vmap(gradient, in_axes=(None, None, 0, 0), spmd_axis_name=partition.BATCH)

    def body(sums: tuple[Any, Any], micro: tuple[Batch, jax.Array]) -> tuple[tuple[Any, Any], None]:
        with partition.logical_axes(mesh, split_batch=False):
            grads, losses = sharded(whole, held, *micro)
        grads, losses = jax.tree.map(jnp.add, sums, (grads, losses))
        return (constrain(grads, each_shard), losses), None

    micro = jax.tree.map(cut, batch), jax.random.split(rng, (accumulation, shards))
    shapes = jax.eval_shape(sharded, whole, held, *jax.tree.map(lambda x: x[0], micro))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    zeros = constrain(zeros[0], each_shard), zeros[1]
    sums, _ = jax.lax.scan(body, zeros, micro)
    return jax.tree.map(lambda x: x.sum(0), sums)


def _contents(batch: Batch) -> dict[str, Mean]:
    """A row's real tokens, the squares of its examples' sizes, ...: what a step's FLOPs follow from."""
    real = batch['input_mask'] > 0
    tokens = jnp.sum(real, axis=1, dtype=jnp.float32)
    squares = jnp.sum(real * (2 * batch['position_ids'] + 1), axis=1, dtype=jnp.float32)  # n squared = 1 + 3 + 5 + ...
    rows = jnp.ones_like(tokens)
    contents = {'tokens': Mean.of(tokens, rows), 'squared_tokens': Mean.of(squares, rows),
                'examples': Mean.of(jnp.max(batch['input_mask'], axis=1), rows),
                'padding': Mean.of(1 - tokens / batch['input_mask'].shape[1], rows)}
    if 'masked_lm_weights' in batch:
        contents['predictions'] = Mean.of(batch['masked_lm_weights'].sum(1), rows)
    return contents


def make_train_step(model: nn.Module, tx: optax.GradientTransformation, mesh: jax.sharding.Mesh, accumulation: int,
                    state: TrainState, frozen: tuple[str, ...] = (), fixed: Any = None, annotate: Annotate | None = None
                    ) -> Callable:
    """(state, parts, hyper[, fixed]) -> train_step, jitted with explicit shardings; compiled once a shape of batch.

    `state` and `fixed` may be shapes.
    """
    step = functools.partial(train_step, model=model, tx=tx, mesh=mesh, accumulation=accumulation,
                             frozen=frozen, annotate=annotate)
    shardings, everywhere = partition.state_shardings(state, mesh), partition.replicated(mesh)
    places = shardings, partition.batch_sharding(mesh), everywhere, partition.shardings(fixed, mesh)
    return jax.jit(step, donate_argnums=0, in_shardings=places if fixed else places[:3],
                   out_shardings=(shardings, everywhere), compiler_options=partition.compiler_options(mesh))


@dataclasses.dataclass(frozen=True)
class Schedule:
    """When what happens, in steps.

    Attributes:
      num_steps: updates in all.
      log_every, save_every, eval_every: every window also ends with a phase and with the run.
      phase_ends: steps after which the shape of batches changes.
    """

    num_steps: int
    log_every: int
    save_every: int
    eval_every: int
    phase_ends: tuple[int, ...] = ()

    def ends_window(self, done: int) -> bool:
        """Whether results are read after so many steps."""
        return done % self.log_every == 0 or done == self.num_steps or done in self.phase_ends

    def evaluates(self, done: int) -> bool:
        """Whether the model is evaluated."""
        return done % self.eval_every == 0 or done == self.num_steps

    def saves(self, done: int) -> bool:
        """Whether the state is saved."""
        return done % self.save_every == 0 or done == self.num_steps


def fit(state: TrainState, step: Callable, batches: Iterator[Parts], schedule: Schedule, *,
        hyper: Callable[[int], dict[str, Any]], checkpoints: Checkpoints, writer: Writer,
        evaluators: Mapping[str, Callable[[int, Any], dict[str, float]]],
        stop: Callable[[int], bool] = lambda step: False,
        rates: Callable[[int, dict[str, float], float], dict[str, float]] = lambda *_: {}) -> TrainState:
    """Trains from `state.step` to the schedule's end; the loop of pre-training and fine-tuning.

    The host reads results only when a window of steps ends, never to dispatch the next step.

    Args:
      state: where to begin; donated.
      step: (state, parts, hyper) -> (state, metrics).
      batches: the parts of each remaining step.
      schedule: when results are read, states saved and models evaluated.
      hyper: step -> learning rate and target weights.
      checkpoints: where states are saved, with the last evaluation's scores.
      writer: of logs.
      evaluators: name -> ((step, params) -> metrics), logged as 'name/metric'.
      stop: step -> whether to save and stop after it.
      rates: (step, window's metrics, steps/s) -> speeds to log.

    Raises:
      Diverged: the loss is not finite; names the step, its batch and the last good checkpoint.
      Stopped: `stop` said so; the state is saved.
    """
    start, num_steps = int(state.step), schedule.num_steps
    pending: list[dict[str, Mean]] = []
    scores: dict[str, float] = {}
    clock = time.monotonic()
    bar = progress(total=num_steps, initial=start, unit='step', desc='train', disable=jax.process_index() > 0)
    for number, batch in zip(range(start, num_steps), batches, strict=True):
        state, metrics = step(state, batch, hyper(number))
        pending.append(metrics)
        jax.block_until_ready(pending[-1 - RUN_AHEAD:-RUN_AHEAD])
        done = number + 1
        bar.update()
        stopping = stop(done) and done < num_steps
        if not schedule.ends_window(done) and not stopping:
            continue
        window = jax.device_get(pending)
        _must_be_finite(window, done, checkpoints)
        values = merge(window)
        per_second = len(window) / (time.monotonic() - clock)
        writer.write(done, values | {'learning_rate': float(hyper(number)['learning_rate'])})
        speeds = {'steps_per_second': per_second} | rates(done, values, per_second)
        writer.write_rates(done, speeds)
        bar.set_postfix_str(describe(values | speeds), refresh=False)
        pending = []
        if evaluators and schedule.evaluates(done):
            scores = {f'{name}/{metric}': value for name, evaluate in evaluators.items()
                      for metric, value in evaluate(done, state.params).items()}
            writer.write(done, scores)
            bar.write(f'step {done}: ' + describe(scores))
        if schedule.saves(done) or stopping:
            writer.flush()
            checkpoints.save(done, state, scores)
        if stopping:
            checkpoints.wait()
            raise Stopped(f'Told to stop: step {done} of {num_steps} is saved. Give the same command again to resume.')
        clock = time.monotonic()
    bar.close()
    checkpoints.wait()
    return state


def _must_be_finite(window: list[dict[str, Mean]], done: int, checkpoints: Checkpoints) -> None:
    for number, metrics in enumerate(window, done - len(window)):
        if not (math.isfinite(metrics['loss'].total) and math.isfinite(metrics['gradient_norm'].total)):
            checkpoints.wait()
            steps = checkpoints.steps()
            last = f'the last good checkpoint is step {steps[-1]}' if steps else 'no checkpoint was saved before it'
            raise Diverged(
                f'The loss or its gradient is not finite at step {number + 1} (batch number {number}): {last}. '
                'Lower --config.schedule.peak, or look at that batch.')


def as_hyper(learning_rate: float, weights: Mapping[str, float], seed: int) -> dict[str, Any]:
    """What a step takes besides state and batch, as arrays: runs that differ in these alone share one program."""
    return {'learning_rate': np.float32(learning_rate), 'seed': np.uint32(seed),
            'weights': {name: np.float32(weight) for name, weight in weights.items()}}
