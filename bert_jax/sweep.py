"""Several fine-tuning runs in one process: the paper's grid, restarts, several checkpoints.

    workdir/runs/NAME/     each run, a workdir of its own, with its best parameters; its settings and scores in run.json
    workdir/sweep.json     every run's scores, the chosen one, the best from each checkpoint, and the score that chose
                           them; mean and spread of each group
    workdir/sweep.tsv      the same as a table; sweep.png: the dev score over steps

A group is what differs by the seed alone; with one seed, the runs from one checkpoint. A run whose loss diverges
is left out, and says so.
"""

import itertools
import statistics
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from etils import epath
from ml_collections import ConfigDict

from bert_jax import checkpoint, paths, plots, train, workdir
from bert_jax.cli import UserError

SUMMARY = {'mean': statistics.mean, 'standard_deviation': lambda x: statistics.stdev(x) if len(x) > 1 else 0.0,
           'median': statistics.median, 'lowest': min, 'highest': max}
SHORT = {'batch_size': 'batch', 'peak': 'lr', 'epochs': 'epochs', 'seed': 'seed'}


class Run(NamedTuple):
    """One run: its folder's name, the group over which its score is averaged, and its own config."""

    name: str
    group: str
    config: ConfigDict


def expand(config: ConfigDict) -> list[Run]:
    """Every run: checkpoints x grid x seeds.

    Raises:
      UserError: a sweep that is not known.
    """
    if config.sweep not in ('', 'paper'):
        raise UserError(f"--config.sweep={config.sweep}: '' (none) and 'paper' are known; config.grid has its values.")
    axes: dict[str, Any] = {'init_from': config.init_from.split(',')}
    if config.sweep:
        axes |= {key: tuple(values) for key, values in config.grid.items()}
    axes['seed'] = range(config.seed, config.seed + config.seeds)
    runs = []
    for values in itertools.product(*axes.values()):
        setting = dict(zip(axes, values))
        one = config.copy_and_resolve_references()
        one.init_from, one.seed, one.sweep, one.seeds = setting['init_from'], setting['seed'], '', 1
        one.grid = ConfigDict()  # a run is the same in a larger grid
        one.schedule.peak = setting.get('peak', one.schedule.peak)
        for key in ('batch_size', 'epochs'):
            one[key] = type(one[key])(setting.get(key, one[key]))
        sources = axes['init_from']
        source = f'{sources.index(setting["init_from"]) + 1}-{epath.Path(setting["init_from"]).name}'
        parts = [source] if len(sources) > 1 else []
        settings = [_named(setting, key) for key in SHORT if key in axes]
        group = parts + settings[:-1] if config.seeds > 1 else parts
        runs.append(Run('-'.join(parts + settings), '-'.join(group) or 'all runs', one))
    return runs


def _named(setting: dict[str, Any], key: str) -> str:
    return f'{SHORT[key]}{setting[key] if isinstance(setting[key], int) else format(setting[key], ".12g")}'


def run_all(config: ConfigDict, path: str, runs: list[Run], make_job: Callable, run: Callable) -> dict[str, float]:
    """Runs those that are not finished, writes the table, and returns the chosen run's scores.

    Args:
      config, path: of the sweep.
      runs: from `expand`.
      make_job: config -> what runs from one checkpoint share.
      run: (job, config, path) -> scores.

    Raises:
      UserError: every run diverged.
    """
    folder, jobs, results, failed = epath.Path(path), {}, {}, {}
    for number, (name, _, one) in enumerate(runs, 1):
        work, source = folder / 'runs' / name, one.init_from
        done = paths.read_json(work / 'run.json') if (work / 'run.json').exists() else None
        settings = workdir.describe(one)
        if done:
            workdir.must_agree(work, done['settings'], settings)
        else:
            print(f'== run {number} of {len(runs)}: {name}')
            if source not in jobs:
                jobs.clear()  # one checkpoint in memory at a time
                jobs[source] = make_job(one)
            done = {'settings': settings, 'score': config.best or f'dev/{jobs[source].task.best}'}
            try:
                done['results'] = run(jobs[source], one, str(work))
            except train.Diverged as error:
                done['failed'] = str(error)
            paths.write_json(work / 'run.json', done)
        checkpoint.Checkpoints(work / 'checkpoints', best=done['score']).keep_best_params()
        score = done['score']
        if 'failed' in done:
            failed[name] = done['failed']
        else:
            results[name] = done['results']
    if not results:
        raise UserError(f'{path}: every run failed. {next(iter(failed.values()))}')

    def best(names: Iterable[str]) -> str:
        return max(names, key=lambda name: results[name][score])

    finished = [one for one in runs if one.name in results]
    groups = {one.group: [other.name for other in finished if other.group == one.group] for one in finished}
    sources = {source: best(one.name for one in finished if one.config.init_from == source)
               for source in dict.fromkeys(one.config.init_from for one in finished)}
    chosen = best(results)
    summary = {'score': score, 'chosen': chosen, 'chosen_of': sources, 'failed': failed, 'runs': results, 'groups': {
        group: {'runs': names, 'best': best(names)} | {
            word: of([results[name][score] for name in names]) for word, of in SUMMARY.items()}
        for group, names in groups.items()}}
    paths.write_json(folder / 'sweep.json', summary)
    paths.write_whole(folder / 'sweep.tsv', _table(summary))
    plots.sweep(folder, [(name, folder / 'runs' / name) for name in results], score)
    _print_table(path, summary)
    return results[chosen]


def _table(summary: dict[str, Any]) -> str:
    """A line a run, the best from each checkpoint marked with the score that chose it; then each group's spreads."""
    results, chosen = summary['runs'], summary['chosen']
    names = [name for name, value in results[chosen].items()
             if isinstance(value, float) and all(name in found for found in results.values())]
    lines = [['run', 'chosen by', *names]]
    for run, found in results.items():
        by = summary['score'] if run in summary['chosen_of'].values() else ''
        lines.append([run, by, *(f'{found[name]:.4f}' for name in names)])
    lines += [[run, 'failed', *[''] * len(names)] for run in summary['failed']]
    for group, one in summary['groups'].items():
        for word, of in SUMMARY.items():
            values = (of([results[run][name] for run in one['runs']]) for name in names)
            lines.append([f'{group}: {word}', '', *(f'{value:.4f}' for value in values)])
    return '\n'.join(map('\t'.join, lines)) + '\n'


def _print_table(path: str, summary: dict[str, Any]) -> None:
    score, results, failed = summary['score'], summary['runs'], summary['failed']
    marks = {run: f'  <- the best from {source}' for source, run in summary['chosen_of'].items()}
    marks[summary['chosen']] = '  <- chosen'
    width = max(map(len, (*results, *failed)))
    print(f'\n{path}: {len(results) + len(failed)} runs (sweep.tsv, sweep.png)')
    for name, found in sorted(results.items(), key=lambda item: -item[1][score]):
        print(f'  {name:<{width}}  {found[score]:.4f}{marks.get(name, "")}')
    for name, why in failed.items():
        print(f'  {name:<{width}}  failed: {why} (its folder deleted, it is tried again.)')
    for group, one in summary['groups'].items():
        if len(one['runs']) > 1:
            print(f'  {group}, {score}: mean {one["mean"]:.4f}, standard deviation {one["standard_deviation"]:.4f}, '
                  f'median {one["median"]:.4f}, {one["lowest"]:.4f} to {one["highest"]:.4f}')
    print(f'  chosen by {score}, of the best checkpoint of each run.')
