"""What a reader meets on the way of one pre-training step, from the config to the update: files and lines.

    python benchmarks/readers_path.py                   # the step; --data adds how its batch is made
    python benchmarks/readers_path.py --functions       # and which functions

Builds BERT-tiny from configs/pretrain.py, assembles a run as `pretrain` does, and makes one step of it while Python
reports every call. A file's lines are those of the functions (and of the classes whose methods) that were called, with
their docstrings; what they call in kernels.py is left out, as its head allows.
"""

import argparse
import ast
import collections
import pathlib
import sys
import types

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import bert_jax  # noqa: E402, F401 - first: it sets the flags that JAX's backend opens with

# isort: split
import numpy as np  # noqa: E402

from bert_jax import cli, run, train  # noqa: E402
from bert_jax.data import examples, store  # noqa: E402
from bert_jax.model import model as models  # noqa: E402

PACKAGE, LEFT_OUT, VOCAB = ROOT / 'bert_jax', ('kernels.py',), 97


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', action='store_true', help='also how the batch is made of a token store')
    parser.add_argument('--functions', action='store_true', help='also list the functions')
    args = parser.parse_args()
    config = cli.load_config(f'{ROOT}/configs/pretrain.py:tiny', [f'--config.model.embeddings.vocab_size={VOCAB}'])
    config.mesh = (-1, 1, 1)
    batch = text(config).batch(0, 8)
    called = collections.defaultdict(set)
    with watched(called):
        if args.data:
            batch = text(config).batch(0, 8)
        one_step(config, batch)
    found = {path: met_lines(PACKAGE / path, firsts) for path, firsts in called.items()}
    found = {path: lines_and_names for path, lines_and_names in found.items() if lines_and_names[0]}
    print(f'{"file":<32}{"lines":>8}')
    for path, (lines, names) in found.items():
        print(f'{path:<32}{lines:8}' + (f'  {", ".join(names)}' if args.functions else ''))
    print(f'{f"{len(found)} files":<32}{sum(lines for lines, _ in found.values()):8,}')


def text(config):
    """A stream of random documents."""
    rng = np.random.default_rng(0)
    sentences = rng.integers(2, 12, 40)
    lengths = rng.integers(1, 14, sentences.sum())
    split = store.Split(rng.integers(5, VOCAB, lengths.sum()).astype(np.uint16), lengths.astype(np.uint16),
                        sentences.astype(np.uint32))
    tokenizer = types.SimpleNamespace(pad_id=0, cls_id=1, sep_id=2, mask_id=3, vocab_size=VOCAB,
                                      word_starts=np.arange(VOCAB) % 3 > 0, regular_ids=np.arange(5, VOCAB))
    return examples.mixed([split], tokenizer, 0, 32, **config.examples)


def one_step(config, batch):
    """As in bert_jax/pretrain.py, without what is beside the step."""
    assembled = run.assemble(config, models.build(config.model), batch)
    state = assembled.init(config.seed)
    hyper = train.as_hyper(1e-4, models.target_weights(config.model), config.seed)
    assembled.step(state, {train.SOURCE: batch}, hyper)


class watched:
    """Within it, the first line of every function of the package that is called goes to `called`, by file."""

    def __init__(self, called):
        self.called = called

    def __enter__(self):
        sys.setprofile(self.see)

    def __exit__(self, *_):
        sys.setprofile(None)

    def see(self, frame, event, _):
        path = pathlib.Path(frame.f_code.co_filename)
        if event == 'call' and path.is_relative_to(PACKAGE) and path.name not in LEFT_OUT:
            self.called[str(path.relative_to(PACKAGE))].add(frame.f_code.co_firstlineno)


def met_lines(path, firsts):
    """(how many lines, names) of the outermost functions, and the classes, in which calls began."""
    lines, names = 0, []
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            begin = min([node.lineno, *(one.lineno for one in node.decorator_list)])
            if any(begin <= first <= node.end_lineno for first in firsts):
                lines += node.end_lineno - begin + 1
                names.append(node.name)
    return lines, names


if __name__ == '__main__':
    main()
