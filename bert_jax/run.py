"""A run, assembled once: what pre-training, fine-tuning and distillation share."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from bert_jax import checkpoint, distributed, metrics, optimizer, partition, train
from bert_jax.cli import UserError
from bert_jax.data import batches
from bert_jax.model import model as models

OPTIONAL = ('pooler/', 'targets_')  # what a checkpoint may lack, or have in addition


@dataclasses.dataclass(frozen=True)
class Run:
    """What is trained, where it lies, and the program that trains it.

    Attributes:
      model: what is trained.
      mesh: how arrays lie on the devices.
      init: seed -> a fresh state.
      step: (state, parts, hyper[, fixed]) -> (state, metrics), jitted.
    """

    model: models.Model
    mesh: jax.sharding.Mesh
    init: Callable[[int], train.TrainState]
    step: Callable

    @property
    def sharding(self) -> jax.sharding.Sharding:
        """Of batches."""
        return partition.batch_sharding(self.mesh)


def assemble(config: ConfigDict, model: models.Model, example: batches.Batch, frozen: tuple[str, ...] = (),
             fixed: Any = None, annotate: train.Annotate | None = None) -> Run:
    """A config's optimizer and mesh for a model; nothing is computed yet.

    Args:
      config: optimizer, mesh, accumulation.
      model: what to train.
      example: a batch of one row or more, by whose shapes parameters are made.
      frozen: parts of the model that stay as they are.
      fixed, annotate: as in train.train_step.

    Raises:
      UserError: an unknown optimizer, a mesh that does not fit the devices.
    """
    tx = optimizer.make_optimizer(**config.optimizer)
    shapes = train.state_shapes(model, tx, example, frozen)
    mesh = partition.make_mesh(config.mesh, shapes, accumulation=config.accumulation, fixed=fixed)
    step = train.make_train_step(model, tx, mesh, config.accumulation, shapes, frozen, fixed, annotate)
    return Run(model, mesh, train.make_init(model, tx, example, mesh, frozen), step)


def fit(run: Run, config: ConfigDict, state: train.TrainState, made: Callable[[int], Iterator[batches.Batch]],
        schedule: train.Schedule, folder: epath.Path, checkpoints: checkpoint.Checkpoints, *,
        step: Callable | None = None, **kwargs: Any) -> train.TrainState:
    """Trains a run in its workdir from where `state` stands to its end, with the config's rates, weights and seed.

    Args:
      run, config: what is trained, and how.
      state: fresh or resumed; donated.
      made: first step -> the batches from there on, on the host.
      schedule: when what happens.
      folder, checkpoints: where logs and states go.
      step: instead of the run's.
      kwargs: evaluators and more, as in train.fit.
    """
    start = int(state.step)
    if start:
        print(f'{folder}: resuming at step {start} of {schedule.num_steps}.')
    rate = functools.partial(optimizer.learning_rate, num_steps=schedule.num_steps, **config.schedule)
    weights, writer = models.target_weights(config.model), metrics.Writer(folder, start)
    with contextlib.closing(made(start)) as on_host:
        placed = distributed.watched(batches.placed_ahead(on_host, run.sharding))
        state = train.fit(state, step or run.step, ({train.SOURCE: batch} for batch in placed), schedule,
                          hyper=lambda step: train.as_hyper(rate(step), weights, config.seed),
                          checkpoints=checkpoints, writer=writer, **kwargs)
    writer.close()
    return state


def warm_start(params: Any, source: Any, fresh: tuple[str, ...] = ()) -> Any:
    """`params` with all that `source` has of them; says what stays fresh and what is left behind.

    Embeddings and encoder must agree name by name and shape by shape. The pooler and the targets are
    taken where both sides have them, except those whose names begin with one of `fresh`.

    Raises:
      UserError: an array of the core missing, left over, or of another shape; each is named.
    """
    wanted, given = _flat(params), _flat(source)
    taken = {name for name in wanted.keys() & given.keys() if not name.startswith(fresh)}
    problems = [f'{name} is missing from the checkpoint' for name in sorted(wanted.keys() - given.keys())
                if not name.startswith(OPTIONAL)]
    problems += [f'{name} is in the checkpoint only' for name in sorted(given.keys() - wanted.keys())
                 if not name.startswith(OPTIONAL)]
    problems += [f'{name} is {given[name].shape} in the checkpoint, {wanted[name].shape} here'
                 for name in sorted(taken) if given[name].shape != wanted[name].shape]
    if problems:
        raise UserError('The checkpoint does not fit the model: ' + '; '.join(problems) + '.')
    for what, names in (('fresh', wanted.keys() - taken), ('left behind', given.keys() - taken)):
        if names:
            print(f'warm start, {what}: ' + ', '.join(sorted({name.partition("/")[0] for name in names})))
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: (jax.device_put(given[_name(path)], leaf.sharding, may_alias=False)  # a step eats its state
                            if _name(path) in taken else leaf), params)


def _flat(tree: Any) -> dict[str, Any]:
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _name(path: tuple) -> str:
    return '/'.join(key.key for key in path)
