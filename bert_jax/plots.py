"""Pictures of a run."""

import io
from collections.abc import Sequence
from typing import Any

from etils import epath

from bert_jax import paths
from bert_jax.metrics import read_log

SCORES = ('/accuracy', '/matthews', '/spearman', '/f1', '/f1_micro', '/exact')


def curves(workdir: epath.Path) -> None:
    """Draws the losses and scores of log.jsonl over steps, training and evaluation, into curves.png."""
    plt = _pyplot()
    records = read_log(workdir / 'log.jsonl')
    figure, panels = plt.subplots(1, 2, figsize=(11, 4), layout='constrained')
    for panel, endings in zip(panels, (('loss',), SCORES)):
        names = sorted({name for record in records for name in record if name.endswith(endings)})
        for name in names:
            points = [(record['step'], record[name]) for record in records if name in record]
            is_evaluation = name.startswith(('held_out/', 'dev'))
            panel.plot(*zip(*points), label=name, marker='o' if is_evaluation else '',
                       linestyle='--' if 'unigram' in name else '-', linewidth=1.5 if is_evaluation else 0.9)
        panel.set_xlabel('step')
        panel.set_ylabel('loss (nats)' if endings == ('loss',) else 'score')
        panel.grid(alpha=0.3)
        if names:
            panel.legend(fontsize=8)
    _save(plt, figure, workdir / 'curves.png')


def confusion(workdir: epath.Path, labels: Sequence[str], truth: Sequence[str], predictions: Sequence[str]) -> None:
    """Draws how often each label was taken for each other one into confusion.png."""
    import sklearn.metrics

    plt = _pyplot()
    matrix = sklearn.metrics.confusion_matrix(truth, predictions, labels=labels)
    size = min(4 + 0.5 * len(labels), 20)
    figure, panel = plt.subplots(figsize=(size, size), layout='constrained')
    display = sklearn.metrics.ConfusionMatrixDisplay(matrix, display_labels=labels)
    display.plot(ax=panel, cmap='Blues', colorbar=False, xticks_rotation='vertical', include_values=len(labels) <= 20)
    _save(plt, figure, workdir / 'confusion.png')


def sweep(workdir: epath.Path, runs: Sequence[tuple[str, epath.Path]], score: str) -> None:
    """Draws the score of every run over its steps into sweep.png."""
    plt = _pyplot()
    figure, panel = plt.subplots(figsize=(8, 5), layout='constrained')
    for name, folder in runs:
        points = [(record['step'], record[score]) for record in read_log(folder / 'log.jsonl') if score in record]
        panel.plot(*zip(*points), label=name, marker='o', linewidth=0.9)
    panel.set_xlabel('step')
    panel.set_ylabel(score)
    panel.grid(alpha=0.3)
    if len(runs) <= 20:
        panel.legend(fontsize=7)
    _save(plt, figure, workdir / 'sweep.png')


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    return plt


def _save(plt: Any, figure: Any, file: epath.Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format='png', dpi=120)
    plt.close(figure)
    paths.write_whole(file, buffer.getvalue())
