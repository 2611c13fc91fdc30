"""Writes a model's vectors of texts: the feature-based approach (Devlin et al. 2019, 5.3).

    python -m bert_jax.features --from W --input texts.txt --output vectors --layers -1
    python -m bert_jax.features --from W --input texts.jsonl --output vectors --layers -2 --pool mean

Texts are one a line (a pair with a tab between), JSON lines {"text", "text_pair"} or tables, read as predict reads
them. The output is a folder of parts of --part_size texts each; a part appears whole, and a run that was interrupted
continues after the last one.

Layers: embeddings; 1 to N, or -1 (the last), -2, ...; sum_last4 (a plain sum); concat_last4. A list that begins with
a minus needs an equals sign: --layers=-2,-1. In each part, text number i has

  safetensors   tensors i/LAYER [tokens, D] (or [D] when pooled) and i/ids
  hdf5          a group i with datasets LAYER and ids
  jsonl         a line {"index", "text", "tokens", LAYER: [[...]]}
"""

import argparse
import hashlib
import io
import json
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bert_jax import cli, lock, paths, predict
from bert_jax.cli import UserError
from bert_jax.data.tokenizer import Tokenizer
from bert_jax.formats import pretrained, tensor_files
from bert_jax.formats.weights import Pretrained
from bert_jax.model import model as models
from bert_jax.model.parts import Read
from bert_jax.tasks import inputs, texts, tokenized
from bert_jax.tasks.task import Task

ENDINGS = {'safetensors': 'safetensors', 'hdf5': 'h5', 'jsonl': 'jsonl'}
POOLS = ('none', 'cls', 'mean')
OLD_NAMES = {'sum4': 'sum_last4', 'concat4': 'concat_last4'}


def main() -> None:
    """Command line."""
    parser = cli.parser(__doc__)
    parser.add_argument('--from', required=True, dest='source', metavar='PATH',
                        help='a workdir, a Hugging Face folder or name, or a TF1 folder')
    parser.add_argument('--input', required=True, metavar='FILE', help='texts; - for standard input')
    parser.add_argument('--output', required=True, metavar='DIR')
    parser.add_argument('--layers', default='-1', metavar='L,L', help='(default: -1, the last)')
    parser.add_argument('--pool', choices=POOLS, default='none',
                        help='a vector a token, that of the first token, or the mean over all (default: none)')
    parser.add_argument('--format', choices=ENDINGS, default='safetensors')
    parser.add_argument('--max_length', type=int, default=0, metavar='N',
                        help='tokens of a text (default: as many as the model has positions)')
    parser.add_argument('--batch_size', type=int, default=32, metavar='B')
    parser.add_argument('--part_size', type=int, default=1024, metavar='N', help='texts a file (default: 1024)')
    write(parser.parse_args())


def write(args: argparse.Namespace) -> None:
    """Writes every part that is not there yet.

    Raises:
      UserError: no texts, an unknown layer, a length beyond the positions, a folder of another run or model.
    """
    if args.batch_size < 1 or args.part_size < 1:
        raise UserError('--batch_size and --part_size: one or more is expected.')
    extract = Extractor(args.source, args.layers.split(','), args.pool, args.max_length)
    rows, _ = inputs.read(args.input, 'classification', extract.task)
    if not rows:
        raise UserError(f'{args.input}: no texts in it.')
    predict.say_empty(args.input, rows, 0)
    folder = paths.check_local(args.output, '--output')
    texts_hash = hashlib.sha256(json.dumps([(row.text, row.pair) for row in rows]).encode()).hexdigest()
    settings = {key: value for key, value in vars(args).items() if key not in ('input', 'output', 'batch_size')}
    if not (folder / 'features.json').exists():
        paths.check_new(args.output, '--output')
    about = {'step': extract.step, 'texts': len(rows), 'sha256': texts_hash, 'model': extract.model}
    try:
        with lock.hold(folder):
            _check_run(folder, settings | about)
            _write_parts(args, extract, rows, folder)
    except OSError as error:
        raise paths.disk_error(folder, error) from error
    print(f'{args.output}: {", ".join(extract.layers)} of {len(rows):,} texts.')
    if extract.truncated:
        cli.note(f'{extract.truncated:,} of the texts written now were cut to {extract.max_length} tokens.')


def _write_parts(args: argparse.Namespace, extract: 'Extractor', rows: list[texts.Row], folder: pathlib.Path) -> None:
    with cli.progress(total=len(rows), unit='text', desc='features') as bar:
        for number, start in enumerate(range(0, len(rows), args.part_size)):
            some = rows[start:start + args.part_size]
            file = folder / f'part-{number:05d}.{ENDINGS[args.format]}'
            if not file.exists():
                partial = file.with_name(file.name + '.partial')
                WRITERS[args.format](partial, start, some, extract(some, args.batch_size), extract.tokenizer)
                partial.replace(file)
            bar.update(len(some))


def _check_run(folder: pathlib.Path, settings: dict[str, Any]) -> None:
    file = folder / 'features.json'
    if file.exists():
        found = paths.read_json(file)
        found.setdefault('model', settings['model'])  # older versions did not say
        different = [key for key in settings if found.get(key) != settings[key]]
        if different:
            raise UserError(f'{folder}: holds features of other settings ({", ".join(different)}); '
                            'give another --output.')
    else:
        paths.write_json(file, settings)


class Extractor:
    """Texts -> vectors of the chosen layers.

    Attributes:
      layers: their names.
      step: of a workdir, the step whose parameters these are.
      model: a hash of its architecture, parameters and tokenizer.
      task: the settings of its fine-tuning, {} for none.
      tokenizer: the model's.
      max_length: tokens of a text.
      truncated: texts so far that were longer.
    """

    def __init__(self, source: str, layers: list[str], pool: str, max_length: int) -> None:
        model = pretrained.load(source)
        positions, count = model.config.embeddings.max_length, model.config.encoder.num_layers
        if max_length and not tokenized.SHORTEST <= max_length <= positions:
            raise UserError(f'--max_length {max_length}: {tokenized.SHORTEST} to {positions}, the positions of '
                            f'{source}.')
        self.layers, self.tokenizer, self.max_length = layers, model.tokenizer, max_length or positions
        self.step, self.task = model.about.get('step'), model.about.get('config', {}).get('task', {})
        self.model = _identity(model)
        self.truncated = 0
        combine = {name: _layer(name, count) for name in layers}  # name -> (what it reads, what it makes of that)
        self._config = config = model.config.copy_and_resolve_references()
        config.targets = {}
        reads = tuple({read for wanted, _ in combine.values() for read in wanted})
        module, params = models.build(config, reads), {part: model.params[part] for part in ('embeddings', 'encoder')}

        def run(params: Any, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
            found = module.apply({'params': params}, batch, train=False, method='encode').layers
            made = {name: make([found[read] for read in reads]).astype(jnp.float32)                 # [B, L, W]
                    for name, (reads, make) in combine.items()}
            mask = batch['input_mask'][..., None]
            if pool == 'cls':
                return {name: x[:, 0] for name, x in made.items()}
            return {name: (x * mask).sum(1) / mask.sum(1) for name, x in made.items()} if pool == 'mean' else made

        self._pooled, self._params, self._run = pool != 'none', params, jax.jit(run)

    def __call__(self, rows: list[texts.Row], batch_size: int) -> list[dict[str, np.ndarray]]:
        """{'ids': [tokens], layer: [tokens, W] or [W]} of each text."""
        data = texts.encode(Task('classification', {}), rows, self.tokenizer, self.max_length,
                            predict.lengths(self.max_length))
        self.truncated += data.truncated
        pretrained.check_segments(self._config, [data])
        found: list[Any] = [None] * len(rows)
        for numbers, batch in data.evaluation_batches(min(batch_size, len(rows))):
            made = jax.device_get(self._run(self._params, batch))
            for row, number in enumerate(numbers):
                size = data.longest[number]
                found[number] = {'ids': batch['input_ids'][row, :size]} | {
                    name: x[row] if self._pooled else x[row, :size] for name, x in made.items()}
        return found


def _identity(model: Pretrained) -> str:
    """A hash of what vectors depend on."""
    parts = ('embeddings', 'encoder')
    about = json.dumps([model.config[part].to_dict() for part in parts], default=str, sort_keys=True)
    digest = hashlib.sha256(about.encode() + model.tokenizer.hash.encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path({part: model.params[part] for part in parts}):
        digest.update(jax.tree_util.keystr(path).encode() + np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()[:16]


def _layer(name: str, count: int) -> tuple[tuple[Read, ...], Callable[[list[jax.Array]], jax.Array]]:
    """What is read of the encoder, and what [B, L, W] is made of those arrays [B, L, D]."""
    last4 = tuple(('hidden', layer) for layer in (-4, -3, -2, -1))
    if name == 'embeddings':
        return (('hidden', 0),), lambda found: found[0]
    name = OLD_NAMES.get(name, name)
    if name in ('sum_last4', 'concat_last4') and count < 4:
        raise UserError(f'--layers {name}: the model has {count} layers.')
    if name == 'sum_last4':
        return last4, lambda found: jnp.stack(found).sum(0)
    if name == 'concat_last4':
        return last4, lambda found: jnp.concatenate(found, -1)
    if re.fullmatch('-?[0-9]+', name) and 1 <= abs(int(name)) <= count:
        return (('hidden', int(name)),), lambda found: found[0]
    raise UserError(f'--layers {name}: embeddings, 1 to {count}, -1 to -{count}, sum_last4 and concat_last4 are known.')


def _write_safetensors(file: pathlib.Path, start: int, rows: list[texts.Row], found: list[dict[str, np.ndarray]],
                       tokenizer: Tokenizer) -> None:
    tensor_files.save({f'{start + i}/{name}': np.ascontiguousarray(x) for i, one in enumerate(found)
                       for name, x in one.items()}, file)


def _write_hdf5(file: pathlib.Path, start: int, rows: list[texts.Row], found: list[dict[str, np.ndarray]],
                tokenizer: Tokenizer) -> None:
    import h5py

    content = io.BytesIO()  # on a full disk the library itself would end the process
    with h5py.File(content, 'w') as out:
        for i, one in enumerate(found):
            for name, x in one.items():
                out[f'{start + i}/{name}'] = x
    file.write_bytes(content.getbuffer())


def _write_jsonl(file: pathlib.Path, start: int, rows: list[texts.Row], found: list[dict[str, np.ndarray]],
                 tokenizer: Tokenizer) -> None:
    def lines() -> Iterator[str]:
        for i, (row, one) in enumerate(zip(rows, found)):
            vectors = {name: np.round(x.astype(float), 6).tolist() for name, x in one.items() if name != 'ids'}
            tokens = [tokenizer.pieces[id_] for id_ in one['ids']]
            record = {'index': start + i, **texts.describe(row), 'tokens': tokens, **vectors}
            yield json.dumps(record, ensure_ascii=False)

    file.write_text('\n'.join(lines()) + '\n')


WRITERS = {'safetensors': _write_safetensors, 'hdf5': _write_hdf5, 'jsonl': _write_jsonl}


if __name__ == '__main__':
    cli.run(main)
