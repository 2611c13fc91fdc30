"""Pre-trains a model on a token store.

    python -m bert_jax.pretrain --config configs/pretrain.py:base --config.store=STORE --workdir W

Phases of different lengths run one after the other under one schedule. Started again with the same
command, it resumes exactly. The workdir alone is enough to fine-tune or predict.
"""

import collections
import functools
import importlib.util
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from bert_jax import (
    checkpoint,
    cli,
    distributed,
    evaluate,
    hardware,
    partition,
    paths,
    plots,
    run,
    startup,
    train,
    workdir,
)
from bert_jax.cli import UserError, choose
from bert_jax.data import batches, examples, masking, store
from bert_jax.data import tokenizer as tokenizers
from bert_jax.formats import pretrained
from bert_jax.model import model as models


def main() -> None:
    """Command line."""
    parser = cli.parser(__doc__)
    parser.add_argument('--workdir', required=True, metavar='W', help='where the run lives; may be gs://')
    distributed.add_arguments(parser)
    args, config = cli.parse_with_config(parser)
    distributed.join(args)
    with distributed.exit_when_others_are_gone():
        pretrain(config, args.workdir)


def pretrain(config: ConfigDict, path: str) -> dict[str, float]:
    """Runs or resumes the pre-training that `config` describes in the workdir `path`; returns its results.

    Raises:
      UserError: a config that cannot run; a workdir of another run; a loss that is not finite.
      Stopped: told to stop; a checkpoint is saved.
    """
    clock, stop = startup.Startup(), distributed.stop_notice()
    workdir.check(path)
    check(config)
    stores = load_stores(config, path)
    tokenizer = stores[0].tokenizer
    set_vocab_size(config.model, tokenizer.vocab_size)
    with config.unlocked():
        config.store_hash = ','.join(data.info['sha256'] for data in stores)  # their paths differ from host to host
    model = models.build(config.model)
    assembled = run.assemble(config, model, examples.empty(1, config.phases[0][1], **config.examples))
    check_batches(config, assembled.mesh)
    source = load_checkpoint(config, tokenizer) if config.init_from else None
    phases = make_phases(config.phases)
    streams = {phase.max_length: examples.mixed([data.train for data in stores], tokenizer, config.seed,
                                                phase.max_length, **config.examples) for phase in phases}
    evaluators = {name: make_evaluator(config, data, model, assembled.mesh, phases)
                  for name, data in zip(held_out_names(stores), stores)} if config.eval_examples else {}
    with workdir.opened(path, config, tokenizer) as folder:  # nothing is written before all is checked
        clock.done('data')
        state = assembled.init(config.seed)
        if source is not None:
            state = state.replace(params=run.warm_start(state.params, source))
            del source
        checkpoints = checkpoint.Checkpoints(folder / 'checkpoints', config.keep_checkpoints)
        state = checkpoints.resume(state)
        clock.done('restore')
        schedule = train.Schedule(phases[-1].stop, config.log_every, config.save_every, config.eval_every,
                                  phase_ends=tuple(phase.stop for phase in phases))
        run.fit(assembled, config, state,
                lambda start: phase_batches(config, phases, streams, start, assembled.sharding), schedule, folder,
                checkpoints, step=clock.first(assembled.step), evaluators=evaluators, stop=stop,
                rates=functools.partial(rates, model, phases))
        results = checkpoints.scores(schedule.num_steps)
        if jax.process_index() == 0:
            paths.write_json(folder / 'results.json', results)
            plots.curves(folder)
    print_results(path, results)
    return results


RANGES = {'save_every': (1, math.inf), 'eval_every': (1, math.inf), 'eval_examples': (0, math.inf),
          'eval_batch_size': (1, math.inf), 'examples.pack_lengths': (0, 16),
          'examples.mask_rate': (0.001, 1), 'examples.short_rate': (0, 1)}


LARGEST_BATCH = 1 << 20  # rows; a mistyped size would fill the memory before any message


class Phase(NamedTuple):
    """Steps [first, stop) at one length and batch size; earlier phases of this length have read `begin` rows."""

    first: int
    stop: int
    max_length: int
    batch_size: int
    begin: int


def make_phases(described: tuple[tuple[int, int, int], ...]) -> list[Phase]:
    """From (steps, max_length, batch_size), one after the other."""
    phases, step, read = [], 0, collections.Counter()
    for steps, max_length, batch_size in described:
        phases.append(Phase(step, step + steps, max_length, batch_size, read[max_length]))
        step += steps
        read[max_length] += steps * batch_size
    return phases


def phase_at(phases: list[Phase], step: int) -> Phase:
    """The phase of update `step` (from 0); the last one for the end of the run."""
    return next((phase for phase in phases if step < phase.stop), phases[-1])


def load_stores(config: ConfigDict, path: str) -> list[store.Store]:
    """The token stores, of one tokenizer; all processes must have the same, and the same config and code."""
    if not config.store:
        raise UserError('--config.store=STORE is missing: the token store made by python -m bert_jax.prepare.')
    try:
        stores, said = [store.load(name) for name in config.store.split(',')], ''
    except UserError as error:
        stores, said = [], str(error)
    facts = {f'config.{key}': repr(value) for key, value in workdir.flat(config.to_dict()).items() if key != 'store'}
    distributed.agree(facts | {'the workdir': path, 'the code': workdir.code_version(),
                               'the store': said or ','.join(data.info['sha256'][:12] for data in stores)})
    if said:
        raise UserError(said)
    for data in stores[1:]:
        if data.tokenizer.hash != stores[0].tokenizer.hash:
            made = [f'{one.path} with tokenizer {one.tokenizer.hash[:12]} ({one.tokenizer.vocab_size} entries)'
                    for one in (data, stores[0])]
            raise UserError(f'{made[0]} and {made[1]}: the stores of one run need one tokenizer.')
    return stores


def held_out_names(stores: list[store.Store]) -> list[str]:
    """What each store's held-out results are called: held_out, or held_out[FOLDER] where there are several."""
    if len(stores) == 1:
        return ['held_out']
    names = [data.path.name for data in stores]
    unique = len(set(names)) == len(names)
    return [f'held_out[{name if unique else number}]' for number, name in enumerate(names)]


def set_vocab_size(model: ConfigDict, vocab_size: int) -> None:
    """The vocabulary's size is the tokenizer's; a config that says another one is refused."""
    if model.embeddings.vocab_size not in (0, vocab_size):
        raise UserError(f'vocab_size {model.embeddings.vocab_size} in the config, {vocab_size} in the tokenizer.')
    model.embeddings.vocab_size = vocab_size


def load_checkpoint(config: ConfigDict, tokenizer: tokenizers.Tokenizer) -> Any:
    """The parameters that init_from names, which must fit the data's tokenizer and the config's architecture."""
    source = pretrained.load(config.init_from)
    if source.tokenizer.hash != tokenizer.hash:
        raise UserError(f'{config.init_from}: its tokenizer ({source.tokenizer.vocab_size} entries, '
                        f'{source.tokenizer.hash[:12]}) is not the one of the data ({tokenizer.vocab_size} entries, '
                        f'{tokenizer.hash[:12]}).')
    pretrained.check_fits(config.model, source, config.init_from)
    return source.params


def check(config: ConfigDict) -> None:
    """Refuses what would fail later, or run and mean nothing."""
    weights = {f'model.targets.{name}.weight': (0, math.inf) for name in config.model.targets}
    cli.check_ranges(config, cli.RANGES | RANGES | weights)
    if not any(models.target_weights(config.model).values()):
        raise UserError('model.targets: every weight is 0, so nothing would be learned.')
    positions = config.model.embeddings.max_length
    if not config.phases or any(len(phase) != 3 or min(phase) < 1 for phase in config.phases):
        raise UserError('phases: ((steps, max_length, batch_size), ...) is expected, each 1 or more.')
    settings = config.examples
    if min(settings.replacement) < 0 or sum(settings.replacement) > 1:
        raise UserError(f'replacement {tuple(settings.replacement)}: the shares of [MASK] and of random tokens are '
                        'expected, together 1 at most.')
    for _, length, batch_size in config.phases:
        if batch_size > LARGEST_BATCH:
            raise UserError(f'A batch of {batch_size:,} rows: at most {LARGEST_BATCH:,} are expected.')
        if length > positions:
            raise UserError(f'A phase of max_length {length} is longer than the position table '
                            f'(model.embeddings.max_length = {positions}).')
    choose('pipeline', batches.STREAMS, config.pipeline)
    if config.pipeline == 'tf' and importlib.util.find_spec('tensorflow') is None:
        raise UserError('tensorflow is not installed; --config.pipeline=thread does without it.')
    choose('masking', masking.MASKINGS, settings.masking)
    for key in ('save_every', 'eval_every'):
        if config[key] % config.log_every:
            raise UserError(f'{key} {config[key]} is not a multiple of log_every {config.log_every}.')
    if settings.pairing != 'single' and config.model.embeddings.num_segments < 2:
        raise UserError(f'pairing={settings.pairing} makes pairs, but model.embeddings.num_segments is '
                        f'{config.model.embeddings.num_segments}: 2 or more are needed.')
    targets = config.model.targets
    if 'nsp' in targets and settings.pairing == 'single':
        raise UserError('pairing=single makes no sentence pairs, but the target nsp needs them; '
                        'use configs/pretrain.py:SIZE,no_nsp.')
    if 'mlm' in targets and settings.masking == 'none':
        raise UserError('masking=none hides no token, but the target mlm predicts hidden ones; '
                        '--config.examples.masking=token fits.')
    if 'lm' in targets and settings.masking != 'none':
        raise UserError(f'masking={settings.masking} hides tokens, but the target lm predicts the text as it stands; '
                        '--config.examples.masking=none fits.')


def check_batches(config: ConfigDict, mesh: jax.sharding.Mesh) -> None:
    """Refuses batches that the mesh cannot cut evenly."""
    for _, _, size in config.phases:
        partition.check_batch_size(size, partition.data_devices(mesh), config.accumulation)


def phase_batches(config: ConfigDict, phases: list[Phase], streams: dict[int, examples.Stream], start: int,
                  sharding: jax.sharding.Sharding) -> Iterator[batches.Batch]:
    """This host's rows of every batch from step `start` to the end."""
    stream = choose('pipeline', batches.STREAMS, config.pipeline)
    for phase in phases:
        source = streams[phase.max_length]
        rows = batches.host_rows(sharding, phase.batch_size)
        make = functools.partial(_make_batch, source, phase, rows)
        yield from stream(make, max(start, phase.first) - phase.first, phase.stop - phase.first)


def _make_batch(source: examples.Stream, phase: Phase, rows: np.ndarray, step: int) -> batches.Batch:
    return source.batch(step, phase.batch_size, rows, phase.begin)


def make_evaluator(config: ConfigDict, data: store.Store, model: models.Model, mesh: jax.sharding.Mesh,
                   phases: list[Phase]) -> Callable[[int, Any], dict[str, float]]:
    """(step, params) -> held-out metrics at the length of that step's phase, and the unigram model's."""
    loss_step, devices = evaluate.make_loss_step(model, mesh), partition.data_devices(mesh)
    batch_size = -(-config.eval_batch_size // devices) * devices  # what fills up the last batch weighs nothing

    @functools.cache
    def held_out(length: int) -> tuple[list[batches.Batch], dict[str, float]]:
        settings = config.examples.to_dict() | {'pack_lengths': 0, 'mixture': ()}
        source = examples.mixed([data.held_out], data.tokenizer, examples.EVALUATION_SEED, length, **settings)
        count = min(config.eval_examples, source.epoch_size)
        made = [source.evaluation_batch(number, batch_size, count) for number in range(-(-count // batch_size))]
        return made, unigram_model(data, made, config.model.targets)

    def evaluator(step: int, params: Any) -> dict[str, float]:
        made, unigram = held_out(phase_at(phases, step - 1).max_length)
        return evaluate.evaluate(loss_step, params, made, mesh) | unigram

    for phase in phases:
        held_out(phase.max_length)  # what is wrong with the held-out side is reported now, not hours later
    return evaluator


def unigram_model(data: store.Store, made: list[batches.Batch], targets: Iterable[str]) -> dict[str, float]:
    """What knowing the training side's token frequencies alone (plus one) would score on the held-out answers."""
    found = {}
    for target in targets:
        if target not in ANSWERS:
            continue
        answers = np.concatenate([ANSWERS[target](batch) for batch in made])
        counts, ends = data.train.unigrams(data.tokenizer.vocab_size) + 1, answers == data.tokenizer.sep_id
        counts[data.tokenizer.sep_id] += round(counts.sum() * ends.mean() / (1 - ends.mean()))  # no store holds it
        losses = np.log(counts.sum()) - np.log(counts[answers])
        found |= {f'{target}/unigram_loss': float(losses.mean()),
                  f'{target}/unigram_accuracy': float((answers == counts.argmax()).mean())}
    return found


def _masked(batch: batches.Batch) -> np.ndarray:
    return batch['masked_lm_ids'][batch['masked_lm_weights'] > 0]


def _next(batch: batches.Batch) -> np.ndarray:
    real = (batch['input_mask'] > 0) & (batch['is_real_example'] > 0)[:, None]
    return batch['input_ids'][:, 1:][real[:, 1:]]


ANSWERS = {'mlm': _masked, 'lm': _next}  # the tokens that a target predicts


def rates(model: models.Model, phases: list[Phase], step: int, values: dict[str, float], per_second: float
          ) -> dict[str, float]:
    """Examples and real tokens/s, model TFLOP/s, MFU where the peak is known, minutes left."""
    phase = phase_at(phases, step - 1)
    rows = per_second * phase.batch_size
    work, peak = rows * model.flops(values), hardware.peak_flops()
    return {'sequences_per_second': rows * values['examples'], 'tokens_per_second': rows * values['tokens'],
            'model_tflops_per_second': work / 1e12, 'minutes_left_of_phase': (phase.stop - step) / per_second / 60,
            **({'mfu': work / peak} if peak else {})}


def print_results(path: str, results: dict[str, float]) -> None:
    """A short table for people."""
    if not results:
        print(f'{path}: done, without a held-out evaluation (--config.eval_examples=0).')
        return
    print(f'{path}: held-out results at the last step (curves.png, results.json, tensorboard/)')
    for name, value in results.items():
        print(f'  {name:<32}{value:10.4f}')


if __name__ == '__main__':
    cli.run(main)
