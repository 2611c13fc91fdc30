"""Exports a model as StableHLO programs that run where bert_jax is not installed.

    python -m bert_jax.export --from runs/stars --lengths 32,64,128 --output exported
    python exported/example.py 'What a film!'

The folder holds a serialised jax.export program for each length, each for cpu, cuda and tpu and for any batch
size; the weights; the tokenizer's files; the label names; and example.py, which needs jax and the tokenizer's
library only (flatbuffers, with which jax.export reads programs, is copied with them). A text longer than the longest
length is cut to it.
"""

import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import flatbuffers
import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export

from bert_jax import cli, export_example, paths
from bert_jax.cli import UserError
from bert_jax.formats import huggingface, pretrained, weights
from bert_jax.formats.weights import Pretrained
from bert_jax.model import model as models
from bert_jax.model.embeddings import padded_vocab_size

PLATFORMS = ('cpu', 'cuda', 'tpu')
EXPORTED = {'classification': 'classification', 'mlm': 'fill_mask'}  # target -> what the example does
PADDED = ('embeddings/token', 'targets_mlm/bias')


def main() -> None:
    """Command line."""
    parser = cli.parser(__doc__)
    parser.add_argument('--from', required=True, dest='source', metavar='PATH',
                        help='a workdir, a Hugging Face folder or name, or a TF1 folder')
    parser.add_argument('--lengths', default='32,64,128', metavar='N,N', help='one program each (default: 32,64,128)')
    parser.add_argument('--output', required=True, metavar='DIR', help='the folder to write; must be new or empty')
    args = parser.parse_args()
    try:
        lengths = sorted({int(length) for length in args.lengths.split(',')})
    except ValueError as error:
        raise UserError(f'--lengths {args.lengths}: whole numbers with commas between them are expected.') from error
    export(args.source, lengths, args.output)


def export(source: str, lengths: list[int], output: str) -> None:
    """Writes the folder, which appears whole or not at all.

    Raises:
      UserError: a model without a head to run, a length beyond its positions, a folder that is not empty.
    """
    folder = paths.check_new(output, '--output')
    model = pretrained.load(source)
    target = next((target for target in EXPORTED if target in model.config.targets), None)
    if target is None:
        raise UserError(f'{source}: its heads ({", ".join(model.config.targets) or "none"}) are not exported; '
                        f'known: {", ".join(EXPORTED)}.')
    positions = model.config.embeddings.max_length
    if lengths[0] < 3 or lengths[-1] > positions:
        raise UserError(f'--lengths {lengths}: from 3 to {positions}, the positions of {source}.')
    most = weights.max_length(model)
    if lengths[-1] > most:
        cli.note(f'{source} was fine-tuned with max_length {most}, which predict reads: longer programs are left out.')
        lengths = sorted({min(length, most) for length in lengths})
    with paths.whole_folder(folder) as partial:
        _write(model, target, lengths, partial)
    print(f'{output}: {len(lengths)} programs ({", ".join(map(str, lengths))}) for {", ".join(PLATFORMS)}.')
    print(f"Try it:  python {folder / 'example.py'} 'A text.'")


def _write(model: Pretrained, target: str, lengths: list[int], folder: pathlib.Path) -> None:
    flat = {'/'.join(key.key for key in path): np.asarray(leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path(model.params)}
    flat |= {name: flat[name][:model.tokenizer.vocab_size] for name in PADDED if name in flat}
    np.savez(folder / 'weights.npz', **flat)
    run = program(model, target)
    for length in lengths:
        exported = jax_export.export(jax.jit(run), platforms=PLATFORMS)(
            jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), flat), _inputs(target, length))
        (folder / f'program_{length}.bin').write_bytes(exported.serialize())
    about: dict[str, Any] = {'kind': EXPORTED[target], 'lengths': lengths, 'labels': list(model.labels),
                             'segments': model.config.embeddings.num_segments}
    about |= {f'{role}_id': getattr(model.tokenizer, f'{role}_id') for role in ('pad', 'cls', 'sep', 'mask')}
    if EXPORTED[target] == 'fill_mask':
        about['pieces'] = model.tokenizer.pieces
    (folder / 'export.json').write_text(json.dumps(about, ensure_ascii=False, indent=1) + '\n')
    huggingface.write_tokenizer(model.tokenizer, folder, lengths[-1])
    shutil.copy(export_example.__file__, folder / 'example.py')
    shutil.copytree(pathlib.Path(flatbuffers.__file__).parent, folder / 'flatbuffers',
                    ignore=shutil.ignore_patterns('__pycache__'))


def program(model: Pretrained, target: str) -> Callable[[dict[str, jax.Array], dict[str, jax.Array]], jax.Array]:
    """(weights, batch) -> logits float32, of one target, the vocabulary's padding added and cut inside."""
    described, vocab_size = model.config.copy_and_resolve_references(), model.tokenizer.vocab_size
    described.run.kernel = 'xla'  # one program for every platform
    module = models.build(described)

    def run(weights: dict[str, jax.Array], batch: dict[str, jax.Array]) -> jax.Array:
        params: dict[str, Any] = {}
        for name, array in weights.items():
            if name in PADDED:
                missing = padded_vocab_size(vocab_size) - vocab_size
                array = jnp.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1))
            *path, last = name.split('/')
            node = params
            for key in path:
                node = node.setdefault(key, {})
            node[last] = array
        ids = batch['input_ids']
        batch = batch | {'position_ids': jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape),
                         'cls_positions': jnp.zeros((ids.shape[0], 1), jnp.int32),
                         'masked_lm_positions': batch.get('masked_lm_positions', ids[:, :1] * 0)}
        logits = module.apply({'params': params}, batch, train=False)[target]['logits']
        return logits[..., :vocab_size] if target == 'mlm' else logits

    return run


def _inputs(target: str, length: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of any batch size, and of any number of [MASK]s."""
    batch, masks = jax_export.symbolic_shape('batch, masks')
    shapes = dict.fromkeys(('input_ids', 'input_mask', 'segment_ids'), (batch, length))
    if target == 'mlm':
        shapes['masked_lm_positions'] = (batch, masks)
    return {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name, shape in shapes.items()}


if __name__ == '__main__':
    cli.run(main)
