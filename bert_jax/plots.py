"""Pictures of a run; one that cannot be drawn is left out with a note, and ends no run."""

import contextlib
import io
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath

from bert_jax import cli, paths
from bert_jax.metrics import read_log

SCORES = ('/accuracy', '/matthews', '/spearman', '/f1', '/f1_micro', '/exact')


def curves(workdir: epath.Path) -> None:
    """Draws the losses and scores of log.jsonl over steps, training and evaluation, into curves.png."""
    with _picture(workdir / 'curves.png') as plt:
        records = read_log(workdir / 'log.jsonl')
        _, panels = plt.subplots(1, 2, figsize=(11, 4), layout='constrained')
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


def confusion(workdir: epath.Path, labels: Sequence[str], truth: Sequence[str], predictions: Sequence[str]) -> None:
    """Draws how often each label was taken for each other one into confusion.png."""
    import sklearn.metrics

    with _picture(workdir / 'confusion.png') as plt:
        matrix = sklearn.metrics.confusion_matrix(truth, predictions, labels=labels)
        size = min(4 + 0.5 * len(labels), 20)
        _, panel = plt.subplots(figsize=(size, size), layout='constrained')
        display = sklearn.metrics.ConfusionMatrixDisplay(matrix, display_labels=labels)
        display.plot(ax=panel, cmap='Blues', colorbar=False, xticks_rotation='vertical',
                     include_values=len(labels) <= 20)


def sweep(workdir: epath.Path, runs: Sequence[tuple[str, epath.Path]], score: str) -> None:
    """Draws the score of every run over its steps into sweep.png."""
    with _picture(workdir / 'sweep.png') as plt:
        _, panel = plt.subplots(figsize=(8, 5), layout='constrained')
        for name, folder in runs:
            points = [(record['step'], record[score]) for record in read_log(folder / 'log.jsonl') if score in record]
            panel.plot(*zip(*points), label=name, marker='o', linewidth=0.9)
        panel.set_xlabel('step')
        panel.set_ylabel(score)
        panel.grid(alpha=0.3)
        if len(runs) <= 20:
            panel.legend(fontsize=7)


@contextlib.contextmanager
def _picture(file: epath.Path) -> Iterator[Any]:
    """pyplot, to draw one figure with; it is written to `file` at the end of the block."""
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    try:
        with matplotlib.rc_context({'text.parse_math': False}):  # a label may be $
            yield plt
            _save(plt.gcf(), file)
    except Exception as error:  # matplotlib's, of a font say; a disk's
        cli.note(f'{file}: not drawn ({cli.first_line(error)[:200]}).')
    finally:
        plt.close()


def _save(figure: Any, file: epath.Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format='png', dpi=120)
    paths.write_whole(file, buffer.getvalue())
