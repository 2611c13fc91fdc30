"""Fine-tunes a pre-trained model on a labelled task.

    python -m bert_jax.finetune --config configs/finetune.py:classification --config.init_from=W0 \\
        --config.task.train_file=mine.csv --workdir W

Tasks: GLUE's (cola sst2 mrpc stsb qqp mnli qnli rte wnli), squad1 squad2 swag commonsenseqa conll2003, and your own
data as classification, multilabel, regression, tagging, span or choice (docs/finetuning.md has the formats). W0 is a
workdir, a Hugging Face folder or name, or a TF1 folder; another task's workdir too.

Keeps the checkpoint that is best on the dev split, and writes scores to results.json, predictions of every dev and
test split, curves.png. --config.seeds=5 and --config.sweep=paper run restarts and the paper's grid in one process
and choose by the dev split. Started again with the same command, it resumes.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from bert_jax import checkpoint, cli, evaluate, partition, paths, plots, run, sweep, train, workdir
from bert_jax.cli import UserError, unknown
from bert_jax.data import batches
from bert_jax.formats import pretrained
from bert_jax.formats.weights import Pretrained
from bert_jax.model import model as models
from bert_jax.tasks import glue, packed, tasks, tokenized
from bert_jax.tasks.task import Task, identity


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
    cli.check_ranges(config, {'seeds': (1, math.inf)})
    if str(config.keep_head) not in KEEP_HEAD:
        raise unknown('value for --config.keep_head', config.keep_head, KEEP_HEAD)
    if config.best.endswith(LOWER_IS_BETTER):
        raise UserError(f'--config.best={config.best}: the highest is kept, so name a score that grows '
                        'with quality.')
    runs = sweep.expand(config)
    for one in runs:
        cli.check_ranges(one.config, cli.RANGES | RANGES)
    other, what = ('runs', 'several runs') if len(runs) == 1 else ('config.json', 'a single run')
    if path and (epath.Path(path) / other).exists():
        raise UserError(f'{path}: holds {what}; give another --workdir.')
    if len(runs) == 1:
        workdir.check(path)
        return train_task(Job(runs[0].config, read_task(config)), runs[0].config, path)
    with workdir.opened_sweep(path):
        task = read_task(config)
        for one in runs:  # also of those that are finished, and read no data any more
            with one.config.unlocked():
                one.config.data = ConfigDict(identity(task))
        check_sources(runs, task)
        return sweep.run_all(config, path, runs, functools.partial(Job, task=task), train_task)


LOWER_IS_BETTER = ('loss', 'mse')
LARGE_BATCH = 1024  # smaller ones may have more places than there are examples
KEEP_HEAD = ('auto', 'True', 'False')
RANGES = {'num_lengths': (1, math.inf), 'evals_per_epoch': (1, math.inf), 'epochs': (0.001, math.inf),
          'batch_size': (1, math.inf), 'dropout_rate': (0, 0.99)}


def read_task(config: ConfigDict) -> Task:
    """The task that a config names, read with its settings."""
    return tasks.read(config.task.name, {key: value for key, value in config.task.items() if key != 'name'})


def check_sources(runs: Sequence[sweep.Run], task: Task) -> None:
    """Refuses a sweep one of whose checkpoints is not there, or does not fit: before the first run, not after it."""
    sources = {one.config.init_from: one.config for one in runs}
    for config in sources.values() if len(sources) > 1 else ():
        describe_model(config, pretrained.load(config.init_from), task)


class Job:
    """What runs of one sweep share: data, model, and programs that are compiled once for each shape.

    Attributes:
      task, kind: what is learned.
      source: the pre-trained model.
      frozen: parts of the model that stay as they are.
      tokenized: split -> its examples as ids, a row each.
      packed: whether several of them share a row.
      model_config: the checkpoint's embeddings and encoder, this task's target.
      run: the model in training.
      eval_step: jitted.
    """

    def __init__(self, config: ConfigDict, task: Task) -> None:
        self.task, self.kind = task, tasks.KINDS[task.kind]
        self.source: Pretrained = pretrained.load(config.init_from)
        self.frozen = frozen_parts(config, task)
        self.model_config = describe_model(config, self.source, task)
        self.model = models.build(self.model_config)
        self.packed = config.packed and 'pooled' in self.model.targets[self.kind.target].reads
        self.tokenized = self._encode(config)
        pretrained.check_segments(self.source.config, self.tokenized.values())
        self._data: dict[int, dict[str, tokenized.Tokenized]] = {}
        most = max(len(self.tokenized['train']), LARGE_BATCH)
        if config.batch_size > most:
            raise UserError(f'--config.batch_size={config.batch_size}: at most {most:,} are expected for '
                            f'{len(self.tokenized["train"]):,} training examples.')
        self.run = run.assemble(config, self.model, self.tokenized['train'].make(np.arange(1), 1), self.frozen)
        self._multiple = partition.data_devices(self.run.mesh) * config.accumulation
        data = self.data(config.batch_size)
        _print_task(config, self.task, self.kind.module.TOO_LONG, data)
        seen = pretrained.longest_seen(self.source)
        if 0 < seen < self.tokenized['train'].longest.max():
            cli.note(f'{config.init_from} was trained on up to {seen} tokens; the positions after that are random. '
                     f'--config.max_length={seen} stays within them.')
        self.eval_step = evaluate.make_eval_step(self.model, self.run.mesh)
        if config.best:
            self._check_best(config)

    def data(self, batch_size: int) -> dict[str, tokenized.Tokenized]:
        """Split -> its examples, packed in rows of the length that suits this batch size."""
        if not self.packed:
            return self.tokenized
        if batch_size not in self._data:
            self._data[batch_size] = {split: packed.pack(rows, batch_size, self._multiple)
                                      for split, rows in self.tokenized.items()}
        return self._data[batch_size]

    def _check_best(self, config: ConfigDict) -> None:
        """Scores the fresh model: a name that is no score is better found now than after an epoch."""
        split, _, score = config.best.partition('/')
        splits = [split for split in self.tokenized if split.startswith('dev')]
        if split not in splits:
            raise UserError(f'--config.best={config.best}: SPLIT/SCORE is expected, SPLIT one of {", ".join(splits)}.')
        values = _score(self, split, config.batch_size, 0, self.run.init(config.seed).params)
        if score not in values:
            raise unknown('score for --config.best', config.best, (f'{split}/{name}' for name in values))

    def _encode(self, config: ConfigDict) -> dict[str, tokenized.Tokenized]:
        def encode(split: str, lengths: tuple[int, ...]) -> tokenized.Tokenized:
            return self.kind.module.encode(self.task, self.task.splits[split], self.source.tokenizer, config.max_length,
                                           lengths)

        splits = [split for split, found in self.task.splits.items() if found]
        if self.packed:
            return {split: encode(split, (config.max_length,)) for split in splits}
        rows = encode('train', (config.max_length,))
        lengths = tokenized.choose_lengths(rows.longest, config.max_length, config.num_lengths)
        return {'train': dataclasses.replace(rows, lengths=lengths)} | {
            split: encode(split, lengths) for split in splits if split != 'train'}


def frozen_parts(config: ConfigDict, task: Task) -> tuple[str, ...]:
    """The parts of the model that stay as they are: those of the config; of a task that reads features, the encoder."""
    for part in set(config.frozen) - {'embeddings', 'encoder', 'pooler'}:
        raise unknown('part for --config.frozen', part, ('embeddings', 'encoder', 'pooler'))
    reads_features = 'features' in tasks.KINDS[task.kind].options(task)
    return tuple(sorted({*config.frozen, *(('embeddings', 'encoder') if reads_features else ())}))


def describe_model(config: ConfigDict, pretrained_model: Pretrained, task: Task) -> ConfigDict:
    """The checkpoint's embeddings and encoder, this run's dropout (none where the encoder is frozen), the target."""
    source, target = pretrained_model.config, tasks.KINDS[task.kind].target
    options, frozen = tasks.KINDS[task.kind].options(task), frozen_parts(config, task)
    if config.max_length < tokenized.SHORTEST:
        raise UserError(f'--config.max_length={config.max_length}: {tokenized.SHORTEST} or more is expected.')
    if config.max_length > source.embeddings.max_length:
        raise UserError(f'max_length {config.max_length} is longer than the position table of {config.init_from} '
                        f'({source.embeddings.max_length}).')
    options = options | ({'dropout_rate': config.dropout_rate} if target != 'span' else {})
    targets = {target: {'weight': 1.0, **options}}
    run = {'dtype': config.dtype, 'kernel': source.run.kernel, 'remat': config.remat,
           'unroll': 1}  # a loop over the layers: as fast, and compiled in a quarter of the time
    model = ConfigDict({'embeddings': source.embeddings, 'encoder': source.encoder, 'run': run,
                        'targets': targets}).copy_and_resolve_references()
    for part in ('embeddings', 'encoder'):
        for key in model[part]:
            if key.endswith('dropout_rate'):
                model[part][key] = 0.0 if part in frozen else config.dropout_rate
    return model


def train_task(job: Job, config: ConfigDict, path: str) -> dict[str, float]:
    """One run in its own workdir; returns the scores of its best checkpoint."""
    if not job.packed:
        partition.check_batch_size(config.batch_size, partition.data_devices(job.run.mesh), config.accumulation)
    with config.unlocked():
        config.model, config.data = job.model_config, ConfigDict(identity(job.task))
    with workdir.opened(path, config, job.source.tokenizer) as folder:
        _keep_labels(folder, job.task.labels)
        score = config.best or f'dev/{job.task.best}'
        paths.write_json(folder / 'best.json', {'score': score})
        checkpoints = checkpoint.Checkpoints(folder / 'checkpoints', config.keep_checkpoints, score)
        state = _train(job, config, checkpoints.resume(_initial(job, config)), checkpoints, folder)
        best, params = _best_params(checkpoints, state, path)
        results = checkpoints.scores(best) | {'best_step': best}
        for split in job.tokenized.keys() - {'train'}:
            results |= _finish(job, split, params, results, config.batch_size, folder)
        results = dict(sorted(results.items()))
        paths.write_json(folder / 'results.json', results)
        plots.curves(folder)
    _print_results(path, results)
    return results


def _keep_labels(folder: epath.Path, labels: tuple[str, ...]) -> None:
    """Writes labels.json; refuses other names than those that the weights there were trained with."""
    file = folder / 'labels.json'
    found = paths.read_json(file) if file.exists() else list(labels)
    if found != list(labels) and checkpoint.Checkpoints(folder / 'checkpoints').steps():
        raise UserError(f'{folder}: was begun with the labels {", ".join(found)}, now they are {", ".join(labels)}; '
                        f'--config.task.labels="({", ".join(map(repr, found))})" gives them in that order.')
    paths.write_json(file, list(labels))


def _initial(job: Job, config: ConfigDict) -> train.TrainState:
    """The pre-trained weights, under their own head or a fresh one; with from_scratch, nothing but fresh ones."""
    state = job.run.init(config.seed)
    if config.from_scratch:
        return state
    fresh = () if _keeps_head(job, config) else ('targets_',)
    return state.replace(params=run.warm_start(state.params, job.source.params, fresh))


def _keeps_head(job: Job, config: ConfigDict) -> bool:
    """Whether the checkpoint's head is one for this task: of its kind, sizes and label names.

    Raises:
      UserError: keep_head is True, and it is not.
    """
    wanted = str(config.keep_head)
    if wanted == 'False':
        return False
    name, labels = job.kind.target, (job.source.labels, job.task.labels)
    there, here = ({key: value for key, value in dict(model.targets.get(name, {})).items() if key not in HEAD_SETTINGS}
                   for model in (job.source.config, job.model_config))
    if name not in job.source.config.targets:
        why = f'it has no head for {name}'
    elif labels[0] != labels[1]:
        why = f'its labels are {", ".join(labels[0])}; those of the task are {", ".join(labels[1])}'
    else:
        why = '' if there == here else f'its head has {there}, the one of the task {here}'
    if wanted == 'True' and why:
        raise UserError(f'--config.keep_head=True: {config.init_from} cannot keep its head: {why}.')
    if not why:
        cli.note(f'the head of {config.init_from} ({name}) is kept; --config.keep_head=False begins with a fresh one.')
    return not why


HEAD_SETTINGS = ('weight', 'dropout_rate', 'num_choices')  # not of what it has learned


def _train(job: Job, config: ConfigDict, state: train.TrainState, checkpoints: checkpoint.Checkpoints,
           folder: epath.Path) -> train.TrainState:
    data = job.data(config.batch_size)['train']
    every = max(1, data.steps(config.batch_size) // config.evals_per_epoch)
    num_steps = max(1, round(data.steps(config.batch_size) * config.epochs))
    schedule = train.Schedule(num_steps, config.log_every, every, every, tuple(range(every, num_steps, every)))
    scored = {split: functools.partial(_score, job, split, config.batch_size) for split in job.tokenized
              if split.startswith('dev')}
    return run.fit(
        job.run, config, state, lambda start: _batches(config, data, start, num_steps), schedule, folder, checkpoints,
        evaluators=scored,
        rates=lambda done, values, per_second: {'examples_per_second': per_second * config.batch_size})


def _batches(config: ConfigDict, data: tokenized.Tokenized, start: int, stop: int) -> Iterator[batches.Batch]:
    """Batches of several lengths, so a stream of its own: tf.data wants one shape a stream."""
    return batches.thread_stream(lambda step: data.batch(step, config.batch_size, config.seed), start, stop)


def _best_params(checkpoints: checkpoint.Checkpoints, state: train.TrainState, path: str) -> tuple[int, Any]:
    best = checkpoints.best_whole()
    if best is None:
        raise UserError(f'{path}: no whole checkpoint is left there; delete it and start again.')
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state.params)
    return best, checkpoints.restore(best, 'params', shapes)


def _score(job: Job, split: str, batch_size: int, step: int, params: Any) -> dict[str, float]:
    """The scores of a dev split."""
    outputs, loss = _outputs(job, split, params, batch_size)
    if not math.isfinite(loss):
        raise train.Diverged(f'The loss on {split} is not finite at step {step}.')
    rows, module = job.task.splits[split], job.kind.module
    found = module.decode(job.task, rows, job.tokenized[split], outputs)
    return {'loss': loss} | module.score(job.task, rows, outputs, found)


def _outputs(job: Job, split: str, params: Any, batch_size: int) -> tuple[dict[str, Any], float]:
    """The target's outputs for every example of a split, and the mean loss."""
    return evaluate.predict(lambda batch: job.eval_step(params, batches.place(batch, job.run.sharding)),
                            job.data(batch_size)[split], batch_size, job.kind.target)


def _finish(job: Job, split: str, params: Any, results: dict[str, float], batch_size: int, folder: epath.Path
            ) -> dict[str, float]:
    """Writes the predictions of one split; returns their scores by its labels, added to the best checkpoint's."""
    task, rows, module, data = job.task, job.task.splits[split], job.kind.module, job.tokenized[split]
    if 'dev/null_threshold' in results:
        task = dataclasses.replace(task, settings=task.settings | {'null_threshold': results['dev/null_threshold']})
    outputs, _ = _outputs(job, split, params, batch_size)
    found = module.decode(task, rows, data, outputs)
    for name, content in module.files(task, split, rows, found).items():
        paths.write_whole(folder / name, content)
    submission = glue.submission(task, split, found)
    if submission:
        (folder / 'submission').mkdir(exist_ok=True)
        paths.write_whole(folder / 'submission' / submission[0], submission[1])
    if not module.labelled(rows):
        return {}
    if task.kind == 'classification' and split == 'dev':
        plots.confusion(folder, task.labels, [row.label for row in rows], [one['label'] for one in found])
    scores = {} if split.startswith('dev') else module.score(task, rows, outputs, found)
    return {f'{split}/{name}': value for name, value in (scores | module.baseline(task, rows)).items()}


def _print_task(config: ConfigDict, task: Task, too_long: str, data: dict[str, tokenized.Tokenized]) -> None:
    sizes = ', '.join(f'{len(rows):,} {split}' for split, rows in task.splits.items() if rows)
    labels = f'; labels: {", ".join(task.labels)}' if task.labels else ''
    print(f'{config.task.name}: {sizes}{labels}; {data["train"].shapes}')
    for note in task.notes:
        cli.note(f'{note}.')
    for split, rows in data.items():
        if rows.truncated:
            cli.note(f'{rows.truncated:,} {split} {too_long} and were cut.')
        for note in rows.notes if split == 'train' else ():
            cli.note(f'{note}.')


def _print_results(path: str, results: dict[str, float]) -> None:
    print(f'{path}: best on dev (results.json, predictions_*, curves.png)')
    for name, value in results.items():
        print(f'  {name:<32}{value:10.4f}')


if __name__ == '__main__':
    cli.run(main)
