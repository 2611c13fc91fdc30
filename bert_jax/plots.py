"""Pictures of a run."""

import io

from etils import epath

from bert_jax.metrics import read_log


def curves(workdir: epath.Path) -> None:
    """Draws the losses and accuracies of log.jsonl over steps, training and evaluation, into curves.png."""
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    records = read_log(workdir / 'log.jsonl')
    figure, panels = plt.subplots(1, 2, figsize=(11, 4), layout='constrained')
    for panel, ending in zip(panels, ('loss', 'accuracy')):
        names = sorted({name for record in records for name in record if name.endswith(ending)})
        for name in names:
            points = [(record['step'], record[name]) for record in records if name in record]
            is_evaluation = name.count('/') > 1
            panel.plot(*zip(*points), label=name, marker='o' if is_evaluation else '',
                       linestyle='--' if 'unigram' in name else '-', linewidth=1.5 if is_evaluation else 0.9)
        panel.set_xlabel('step')
        panel.set_ylabel(ending + (' (nats)' if ending == 'loss' else ''))
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format='png', dpi=120)
    plt.close(figure)
    (workdir / 'curves.png').write_bytes(buffer.getvalue())
