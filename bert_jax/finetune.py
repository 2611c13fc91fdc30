"""Fine-tunes a pre-trained model on a labelled task.

    python -m bert_jax.finetune --config configs/finetune.py:classification --config.init_from=W0 \\
        --config.task.train_file=mine.csv --workdir W

Takes sentences or pairs from CSV, TSV or JSON lines with your own column names, or a GLUE folder
(:sst2, :mrpc). W0 is a workdir, a Hugging Face folder or name, or a TF1 folder. Keeps the checkpoint that is best
on the dev split, writes its scores to results.json and its predictions to predictions_dev.tsv and
predictions_test.tsv. Started again with the same command, it resumes.
"""

import csv
import functools
import io
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from bert_jax import checkpoint, cli, evaluate, metrics, optimizer, partition, plots, pretrained, train, workdir
from bert_jax.cli import UserError, choose, unknown
from bert_jax.data import batches, examples, tasks
from bert_jax.model import model as models


def main() -> None:
    """Command line."""
    parser = cli.parser(__doc__)
    parser.add_argument('--workdir', required=True, metavar='W', help='where the run lives; may be gs://')
    args, config = cli.parse_with_config(parser)
    finetune(config, args.workdir)


def finetune(config: ConfigDict, path: str) -> dict[str, float]:
    """Runs or resumes the fine-tuning that `config` describes in the workdir `path`; returns the best scores.

    Raises:
      UserError: bad data, a checkpoint that does not fit, a workdir of another run.
    """
    if not config.init_from:
        raise UserError('--config.init_from=W0 is missing: a workdir, a Hugging Face folder or name, or a TF1 folder.')
    source = pretrained.load(config.init_from)
    tokenizer = source.tokenizer
    task = choose('task', tasks.TASKS, config.task.name)(**{k: v for k, v in config.task.items() if k != 'name'})
    describe_model(config, source.model, len(task.labels))
    mesh = partition.make_mesh(config.mesh)
    examples.check_batch_size(config.batch_size, partition.data_devices(mesh), config.accumulation)
    encoded = {split: tasks.encode(rows, task.labels, tokenizer, config.max_length)
               for split, rows in task.splits.items() if rows}
    _print_task(config, task, encoded)
    folder = workdir.start(path, config, tokenizer)
    workdir.write_json(folder / 'labels.json', list(task.labels))

    model, tx = models.build(config.model), optimizer.make_optimizer(**config.optimizer)
    state = train.init_state(model, tx, encoded['train'].make(np.arange(1), 1), config.seed, mesh)
    if not config.from_scratch:
        state = state.replace(params=checkpoint.warm_start(state.params, source.params, fresh=('targets_',)))
    del source
    checkpoints = checkpoint.Checkpoints(folder / 'checkpoints', config.keep_checkpoints, config.best)
    eval_step = evaluate.make_eval_step(model, mesh)
    score = functools.partial(_score, eval_step, mesh, encoded['dev'], task.labels, config.batch_size)
    state = _train(config, checkpoints.resume(state), model, tx, mesh, encoded['train'], score, checkpoints, folder)

    if config.best not in checkpoints.scores(checkpoints.steps()[-1]):
        raise unknown('score for --config.best', config.best, checkpoints.scores(checkpoints.steps()[-1]))
    best, params = _best_params(checkpoints, state)
    for split in encoded.keys() - {'train'}:
        logits = _logits(eval_step, params, encoded[split], config.batch_size, mesh)
        _write_predictions(folder / f'predictions_{split}.tsv', task.splits[split], logits, task.labels)
    results = checkpoints.scores(best) | {'best_step': best, 'dev/majority_accuracy': _majority(task)}
    workdir.write_json(folder / 'results.json', results)
    plots.curves(folder)
    _print_results(path, results)
    return results


def describe_model(config: ConfigDict, source: ConfigDict, num_classes: int) -> None:
    """Fills in config.model: the checkpoint's embeddings and encoder, this run's dropout, a classifier."""
    with config.unlocked():
        config.model = ConfigDict({
            'embeddings': source.embeddings, 'encoder': source.encoder, 'dtype': config.dtype,
            'targets': {'classification': {'weight': 1.0, 'num_classes': num_classes,
                                           'dropout_rate': config.dropout_rate}}})
    config.model.embeddings.dropout_rate = config.dropout_rate
    config.model.encoder.dropout_rate = config.model.encoder.attention_dropout_rate = config.dropout_rate
    if config.max_length > source.embeddings.max_length:
        raise UserError(f'max_length {config.max_length} is longer than the position table of {config.init_from} '
                        f'({source.embeddings.max_length}).')


def _train(config: ConfigDict, state: train.TrainState, model: models.Model, tx: Any, mesh: jax.sharding.Mesh,
           data: tasks.EncodedRows, score: Callable, checkpoints: checkpoint.Checkpoints, folder: epath.Path
           ) -> train.TrainState:
    every = max(1, data.steps(config.batch_size) // config.evals_per_epoch)
    num_steps = max(1, round(data.steps(config.batch_size) * config.epochs))
    start = int(state.step)
    if start:
        print(f'{folder}: resuming at step {start} of {num_steps}.')
    step = train.make_train_step(model, tx, config.seed, mesh, config.accumulation, state)
    rate = functools.partial(optimizer.learning_rate, peak=config.schedule.peak, num_steps=num_steps,
                             warmup_steps=round(config.schedule.warmup_share * num_steps))
    weights = models.target_weights(config.model)
    writer = metrics.Writer(folder, start)
    state = train.fit(
        state, step, batches.placed_ahead(_batches(config, data, start, num_steps), partition.batch_sharding(mesh)),
        num_steps=num_steps, hyper=lambda s: train.as_hyper(rate(s), weights), log_every=config.log_every,
        save_every=every, eval_every=every, evaluators={'dev': score}, checkpoints=checkpoints, writer=writer,
        phase_ends=tuple(range(every, num_steps, every)),
        rates=lambda done, values, per_second: {'examples_per_second': per_second * config.batch_size})
    writer.close()
    return state


def _batches(config: ConfigDict, data: tasks.EncodedRows, start: int, stop: int) -> Iterator[batches.Batch]:
    """Batches of several lengths, so a stream of its own: tf.data wants one shape a stream."""
    return batches.thread_stream(lambda step: data.batch(step, config.batch_size, config.seed), start, stop)


def _best_params(checkpoints: checkpoint.Checkpoints, state: train.TrainState) -> tuple[int, Any]:
    best = checkpoints.best_step()
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state.params)
    return best, checkpoints.restore(best, 'params', shapes)


def _logits(eval_step: Callable, params: Any, data: tasks.EncodedRows, batch_size: int, mesh: jax.sharding.Mesh
            ) -> np.ndarray:
    """float32 [N, C], in the order of the rows."""
    parts, order = [], []
    for rows, batch in data.evaluation_batches(batch_size):
        outputs, _ = eval_step(params, batches.place(batch, partition.batch_sharding(mesh)))
        parts.append(np.asarray(outputs['classification']['logits'])[:len(rows)])
        order.append(rows)
    return np.concatenate(parts)[np.argsort(np.concatenate(order))]


def _score(eval_step: Callable, mesh: jax.sharding.Mesh, data: tasks.EncodedRows, labels: tuple[str, ...],
           batch_size: int, step: int, params: Any) -> dict[str, float]:
    return metrics.classification(_logits(eval_step, params, data, batch_size, mesh), data.label_ids, labels)


def _majority(task: tasks.TaskData) -> float:
    """Accuracy on dev of always saying the training split's most frequent label."""
    (label, _), = Counter(row.label for row in task.splits['train']).most_common(1)
    return float(np.mean([row.label == label for row in task.splits['dev']]))


def _write_predictions(file: epath.Path, rows: list[tasks.Row], logits: np.ndarray, labels: tuple[str, ...]) -> None:
    """One line a row: its number, the predicted label, the label given if any, each label's probability."""
    out = io.StringIO()
    writer = csv.writer(out, delimiter='\t', lineterminator='\n')
    writer.writerow(('index', 'prediction', 'label', *(f'p({label})' for label in labels)))
    for number, (row, scores) in enumerate(zip(rows, metrics.softmax(logits))):
        writer.writerow((number, labels[int(scores.argmax())], row.label or '', *(f'{s:.6f}' for s in scores)))
    file.write_text(out.getvalue())


def _print_task(config: ConfigDict, task: tasks.TaskData, encoded: dict[str, tasks.EncodedRows]) -> None:
    sizes = ', '.join(f'{len(rows):,} {split}' for split, rows in task.splits.items() if rows)
    print(f'{config.task.name}: {sizes} rows; labels: {", ".join(task.labels)}')
    for split, data in encoded.items():
        if data.truncated:
            print(f'note: {data.truncated:,} of {len(data):,} {split} rows are longer than '
                  f'max_length {config.max_length} and were cut.')


def _print_results(path: str, results: dict[str, float]) -> None:
    print(f'{path}: best on dev (results.json, predictions_dev.tsv, curves.png)')
    for name, value in results.items():
        print(f'  {name:<32}{value:10.4f}')


if __name__ == '__main__':
    cli.run(main)
