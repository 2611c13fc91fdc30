"""Converts a model between bert_jax workdirs, Hugging Face folders and TF1 folders, exactly.

    python -m bert_jax.convert --from runs/base --to exported --format hf
    python -m bert_jax.convert --from google-bert/bert-base-cased --to runs/cased --format workdir
    python -m bert_jax.convert --from uncased_L-12_H-768_A-12 --to exported --format hf

The source's kind is recognised: a workdir; a Hugging Face folder, or a name on its hub; a folder of
google-research/bert (bert_model.ckpt.*, bert_config.json, vocab.txt). Heads travel where both sides have them,
and what has no counterpart is named. Written are

  hf        config.json, model.safetensors, tokenizer files and a model card: AutoModelFor*.from_pretrained(folder)
            and AutoTokenizer.from_pretrained(folder) take it as it is
  tf1       the original code's files and variable names
  workdir   for --config.init_from, predict and export
"""

import pathlib
import resource
import sys
import time

from bert_jax import cli, paths
from bert_jax.formats import huggingface, pretrained, tf1
from bert_jax.formats.weights import Pretrained

FORMATS = ('hf', 'tf1', 'workdir')


def main() -> None:
    """Command line."""
    parser = cli.parser(__doc__)
    parser.add_argument('--from', required=True, dest='source', metavar='PATH', help='a folder, or a name on the hub')
    parser.add_argument('--to', required=True, metavar='PATH', help='the folder to write; must be new or empty')
    parser.add_argument('--format', required=True, choices=FORMATS)
    parser.add_argument('--name', default='', 
                        help='the name in the model card, such as you/my-bert (default: the folder)')
    parser.add_argument('--license', default='unknown', metavar='ID',
                        help="the model card's licence field, such as apache-2.0 (default: unknown)")
    args = parser.parse_args()
    convert(args.source, args.to, args.format, args.name, args.license)


def convert(source: str, target: str, form: str, name: str = '', licence: str = 'unknown') -> None:
    """Writes the model in `source` to the folder `target`, which appears whole or not at all.

    Raises:
      UserError: a source that cannot be read, a target that is not empty, no space left.
    """
    folder = paths.check_new(target, '--to').resolve()
    start = time.perf_counter()
    model = pretrained.load(source)
    size = pretrained.size_in_bytes(model)
    targets = ', '.join(model.config.targets) or 'none'
    print(f'{source}: {model.about["source"]}; targets: {targets}; {size / 1e6:,.0f} MB.')
    write_whole(model, folder, form, name or folder.name, licence)
    unit = 1 if sys.platform == 'darwin' else 1024  # bytes, KiB
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    print(f'{target}: written in {time.perf_counter() - start:.1f} s, with at most {memory / 1e9:.1f} GB of memory.')
    if form == 'hf':
        print(f'To publish it:  hf upload {name or "YOUR_NAME/" + folder.name} {target}')


def write_whole(model: Pretrained, folder: pathlib.Path, form: str, name: str, licence: str) -> None:
    """Writes next to `folder` and renames at the end."""
    with paths.whole_folder(folder) as partial:
        if form == 'hf':
            huggingface.write(model, partial, name, licence)
        else:
            {'tf1': tf1.write, 'workdir': pretrained.write_workdir}[form](model, partial)


if __name__ == '__main__':
    cli.run(main)
