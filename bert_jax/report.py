"""Prints what a quickstart run came to, and fills three [MASK]s in held-out text.

    python -m bert_jax.report --run runs/quickstart
"""

import pathlib

import numpy as np

from bert_jax import cli, paths, predict
from bert_jax.cli import UserError
from bert_jax.data import draws, store
from bert_jax.data.tokenizer import Tokenizer

SENTENCE_TOKENS = (8, 24)  # of the sentences shown


def main() -> None:
    """Command line."""
    parser = cli.parser(__doc__)
    parser.add_argument('--run', required=True, metavar='DIR', help='holds store/ and pretrain/, perhaps finetune*/')
    run = pathlib.Path(parser.parse_args().run)
    for line in table(run):
        print(line)
    print()
    fill_masks(run)
    print(f'\nLoss curves: {run}/pretrain/curves.png')
    print(f"Fill your own: python -m bert_jax.predict --workdir {run}/pretrain 'Return the [MASK] of the list.'")


def table(run: pathlib.Path) -> list[str]:
    """Each result next to what it has to beat."""
    found = _results(run / 'pretrain')
    held_out = {name.removeprefix('held_out/'): value for name, value in found.items()}
    rows = [('held-out masked-word loss (nats)', held_out['mlm/loss'], 'unigram model', held_out['mlm/unigram_loss']),
            ('held-out masked-word accuracy', held_out['mlm/accuracy'], 'unigram model',
             held_out['mlm/unigram_accuracy'])]
    if 'nsp/accuracy' in held_out:
        rows.append(('held-out next-sentence accuracy', held_out['nsp/accuracy'], 'a coin', 0.5))
    if (run / 'finetune').exists():
        tuned, scratch = _results(run / 'finetune'), _results(run / 'finetune_from_scratch')
        rows += [('task accuracy (dev)', tuned['dev/accuracy'], 'majority class', tuned['dev/majority_accuracy']),
                 ('', tuned['dev/accuracy'], 'without pre-training', scratch['dev/accuracy'])]
    return [f'{"":<36}{"model":>8}   compared with'] + [
        f'{name:<36}{ours:>8.3f}   {other:<22}{theirs:>8.3f}' for name, ours, other, theirs in rows]


def _results(path: pathlib.Path) -> dict[str, float]:
    if not (path / 'results.json').exists():
        raise UserError(f'{path}: no results.json; has the run finished?')
    return paths.read_json(path / 'results.json')


def fill_masks(run: pathlib.Path, count: int = 3) -> None:
    """Masks a word in `count` held-out sentences and prints what the model says stood there."""
    data, model = store.load(run / 'store'), predict.load(str(run / 'pretrain'))
    split = data.held_out
    low, high = SENTENCE_TOKENS
    fitting = np.flatnonzero((split.sentence_lengths >= low) & (split.sentence_lengths <= high))
    for sentence in fitting[draws.permutation(len(fitting), 0)][:count]:
        ids = split.tokens[split.sentence_starts[sentence]:split.sentence_starts[sentence + 1]]
        words = data.tokenizer.decode(ids).split()
        at = _word_to_mask(words, data.tokenizer)
        (guesses,) = model(' '.join([*words[:at], predict.MASK, *words[at + 1:]]))['masks']
        print(' '.join([*words[:at], predict.MASK, *words[at + 1:]]))
        print(f'    stood there: {words[at]}; the model says: '
              + ', '.join(f'{guess["token"]} {guess["score"]:.2f}' for guess in guesses))


def _word_to_mask(words: list[str], tokenizer: Tokenizer) -> int:
    """The word nearest the middle that is one piece and more than two letters, if there is one."""
    def merit(i: int) -> tuple[bool, int]:
        whole = words[i].isalpha() and len(words[i]) > 2 and len(tokenizer.encode(words[i])) == 1
        return whole, -abs(i - len(words) // 2)

    return max(range(len(words)), key=merit)


if __name__ == '__main__':
    cli.run(main)
