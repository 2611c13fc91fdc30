"""Exact evaluation: every example once, whatever the batch size and the devices."""

from collections.abc import Callable, Iterable
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from bert_jax import partition
from bert_jax.data.batches import Batch, place, share
from bert_jax.metrics import flat, merge
from bert_jax.tasks.tokenized import Tokenized


def make_eval_step(model: nn.Module, mesh: jax.sharding.Mesh) -> Callable:
    """Jitted (params, batch) -> (outputs, losses) of every target of fine-tuning, without dropout."""

    def eval_step(params: Any, batch: Batch) -> tuple[dict[str, Any], dict[str, Any]]:
        with partition.logical_axes(mesh):
            outputs = model.apply({'params': params}, batch, train=False)
            losses = {name: target.terms(outputs[name], batch) for name, target in model.targets.items()}
        return outputs, losses

    return jax.jit(eval_step)


def make_loss_step(model: nn.Module, mesh: jax.sharding.Mesh, annotate: Callable[[Any, Batch], Batch] | None = None
                   ) -> Callable:
    """Jitted (params, batch[, fixed]) -> losses; outputs are never kept; annotate and fixed as in train_step."""

    def loss_step(params: Any, batch: Batch, fixed: Any = None) -> dict[str, Any]:
        with partition.logical_axes(mesh):
            batch = annotate(fixed, batch) if annotate else batch
            return flat(model.apply({'params': params}, batch, train=False, method='losses'))

    return jax.jit(loss_step)


def evaluate(loss_step: Callable, params: Any, batches: Iterable[Batch], mesh: jax.sharding.Mesh
             ) -> dict[str, float]:
    """Means over batches, made whole on every host, whose padding rows weigh nothing; sums are merged in float64."""
    sharding = partition.batch_sharding(mesh)
    return merge(jax.device_get([loss_step(params, place(share(batch, sharding), sharding)) for batch in batches]))


def predict(apply: Callable[[Batch], tuple[dict[str, Any], dict[str, Any]]], data: Tokenized, batch_size: int,
            target: str) -> tuple[dict[str, Any], float]:
    """A target's outputs for every example once, in the order of the data, and the mean loss.

    Where the data has something to say of each token, outputs have an axis of tokens: they come as a list of arrays,
    each cut to its row's length. Others come as [N, ...].
    """
    per_token = bool(data.token_labels)
    parts: dict[str, list[Any]] = {}
    order, losses = [], []
    for numbers, batch in data.evaluation_batches(batch_size):
        outputs, terms = jax.device_get(apply(batch))
        losses.append({'loss': terms[target]['loss']} if terms else {})
        order.append(numbers[numbers >= 0])
        for name, values in outputs[target].items():
            values = [values[place] for place in np.flatnonzero(numbers >= 0)]
            if per_token:
                values = [row[:size] for row, size in zip(values, data.longest[numbers])]
            parts.setdefault(name, []).extend(values)
    back = np.argsort(np.concatenate(order))
    ordered = {name: [values[i] for i in back] for name, values in parts.items()}
    if not per_token:
        ordered = {name: np.stack(values) for name, values in ordered.items()}
    return ordered, merge(losses).get('loss', float('nan'))
