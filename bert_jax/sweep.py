"""Several fine-tuning runs in one process: the paper's grid, restarts, several checkpoints.

    workdir/runs/NAME/     each run, a workdir of its own; its settings and scores in run.json
    workdir/sweep.json     every run's scores, their mean and spread, the chosen one and the score that chose it
    workdir/sweep.tsv      the same as a table; sweep.png: the dev score over steps
"""

import itertools
import statistics
from collections.abc import Callable
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from bert_jax import paths, plots, workdir
from bert_jax.cli import UserError

SUMMARY = {'mean': statistics.mean, 'standard_deviation': statistics.stdev, 'median': statistics.median, 'lowest': min,
           'highest': max}
SHORT = {'batch_size': 'batch', 'peak': 'lr', 'epochs': 'epochs', 'seed': 'seed'}


def expand(config: ConfigDict) -> list[tuple[str, ConfigDict]]:
    """(name, config) of every run: checkpoints x grid x seeds; one run has no name.

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
        one.schedule.peak = setting.get('peak', one.schedule.peak)
        for key in ('batch_size', 'epochs'):
            one[key] = type(one[key])(setting.get(key, one[key]))
        sources = axes['init_from']
        source = f'{sources.index(setting["init_from"]) + 1}-{epath.Path(setting["init_from"]).name}'
        parts = [source] if len(sources) > 1 else []
        parts += [f'{short}{setting[key]:g}' for key, short in SHORT.items() if key in axes]
        runs.append(('-'.join(parts), one))
    return runs if len(runs) > 1 else [('', runs[0][1])]


def run_all(config: ConfigDict, path: str, runs: list[tuple[str, ConfigDict]], make_job: Callable, run: Callable
            ) -> dict[str, float]:
    """Runs those that are not finished, writes the table, and returns the chosen run's scores.

    Args:
      config, path: of the sweep.
      runs: from `expand`.
      make_job: config -> what runs from one checkpoint share.
      run: (job, config, path) -> scores.
    """
    folder, jobs, results = epath.Path(path), {}, {}
    for number, (name, one) in enumerate(runs, 1):
        work, source = folder / 'runs' / name, one.init_from
        done = paths.read_json(work / 'run.json') if (work / 'run.json').exists() else None
        settings = workdir.describe(one)
        if done:
            workdir.must_agree(work, done['settings'], settings)
            results[name] = done['results'] | {'chosen_by': done['score']}
            continue
        print(f'== run {number} of {len(runs)}: {name}')
        if source not in jobs:
            jobs = {source: make_job(one)}  # one checkpoint in memory at a time
        score = config.best or f'dev/{jobs[source].task.best}'
        found = run(jobs[source], one, str(work))
        paths.write_json(work / 'run.json', {'settings': settings, 'score': score, 'results': found})
        results[name] = found | {'chosen_by': score}
    score = next(iter(results.values()))['chosen_by']
    chosen = max(results, key=lambda name: results[name][score])
    values = [found[score] for found in results.values()]
    summary = {'score': score, 'chosen': chosen} | {name: of(values) for name, of in SUMMARY.items()}
    paths.write_json(folder / 'sweep.json', summary | {'runs': results})
    paths.write_whole(folder / 'sweep.tsv', _table(results, chosen, score))
    plots.sweep(folder, [(name, folder / 'runs' / name) for name, _ in runs], score)
    _print_table(path, summary, results)
    return results[chosen]


def _table(results: dict[str, dict[str, Any]], chosen: str, score: str) -> str:
    """A line a run, the chosen one marked with the score that chose it; then each score's mean, spread and median."""
    names = [name for name, value in results[chosen].items()
             if isinstance(value, float) and all(name in found for found in results.values())]
    lines = [['run', 'chosen by', *names]]
    for run, found in results.items():
        lines.append([run, score if run == chosen else '', *(f'{found[name]:.4f}' for name in names)])
    for word, of in SUMMARY.items():
        lines.append([word, '', *(f'{of([found[name] for found in results.values()]):.4f}' for name in names)])
    return '\n'.join(map('\t'.join, lines)) + '\n'


def _print_table(path: str, summary: dict[str, Any], results: dict[str, dict[str, float]]) -> None:
    score, width = summary['score'], max(map(len, results))
    print(f'\n{path}: {len(results)} runs (sweep.tsv, sweep.png)')
    for name, found in sorted(results.items(), key=lambda item: -item[1][score]):
        print(f'  {name:<{width}}  {found[score]:.4f}' + ('  <- chosen' if name == summary['chosen'] else ''))
    print(f'  {score}: mean {summary["mean"]:.4f}, standard deviation {summary["standard_deviation"]:.4f}, median '
          f'{summary["median"]:.4f}, {summary["lowest"]:.4f} to {summary["highest"]:.4f}; chosen by the dev split.')
