"""From text to predictions with this folder alone. Needs jax, and tokenizers or sentencepiece.

    python example.py 'A text.'
    python example.py 'A text.' 'The other text of its pair.'

From Python: `model = Exported(folder)`, then `model([('A text.', None)])`.
"""

import json
import os
import pathlib
import sys

os.environ['XLA_FLAGS'] = os.environ.get('XLA_FLAGS', '')
from importlib import metadata

sys.path.append(str(pathlib.Path(__file__).parent))  # flatbuffers, which jax.export reads programs with
if tuple(map(int, metadata.version('jaxlib').split('.')[:3])) >= (0, 10, 2):  # wrong numbers on CPU without it
    os.environ['XLA_FLAGS'] += ' --xla_cpu_experimental_ynn_fusion_type='

import numpy as np
from jax import export

MASK = '[MASK]'


class Exported:
    """The programs, weights and tokenizer of a folder."""

    def __init__(self, folder='.'):
        folder = pathlib.Path(folder)
        self.about = json.loads((folder / 'export.json').read_text())
        self.weights = dict(np.load(folder / 'weights.npz'))
        self.programs = {length: export.deserialize(bytearray((folder / f'program_{length}.bin').read_bytes()))
                         for length in self.about['lengths']}
        if (folder / 'tokenizer.model').exists():
            import sentencepiece

            self.ids = sentencepiece.SentencePieceProcessor(model_file=str(folder / 'tokenizer.model')).encode
        else:
            import tokenizers

            backend = tokenizers.Tokenizer.from_file(str(folder / 'tokenizer.json'))
            backend.encode_special_tokens = True  # written out in a text, they are text
            backend.no_truncation()
            self.ids = lambda text: backend.encode(text, add_special_tokens=False).ids

    def __call__(self, pairs, top_k=5):
        """[(text, other text or None)] -> for each the label and its scores, or the best tokens for each [MASK]."""
        rows = [self.encode(*pair) for pair in pairs]
        longest = max(len(ids) for ids, _ in rows)
        length = min(size for size in self.about['lengths'] if size >= longest)
        batch = {name: np.zeros((len(rows), length), np.int32) for name in ('input_mask', 'segment_ids')}
        batch['input_ids'] = np.full((len(rows), length), self.about['pad_id'], np.int32)
        for row, (ids, first) in enumerate(rows):
            batch['input_ids'][row, :len(ids)] = ids
            batch['input_mask'][row, :len(ids)] = 1
            batch['segment_ids'][row, first:len(ids)] = 1
        if self.about['kind'] == 'classification':
            scores = softmax(self.programs[length].call(self.weights, batch))
            return [dict(zip(self.about['labels'], row.tolist())) for row in scores]
        masks = [np.flatnonzero(row == self.about['mask_id']) for row in batch['input_ids']]
        batch['masked_lm_positions'] = np.zeros((len(rows), max(1, *map(len, masks))), np.int32)
        for row, places in enumerate(masks):
            batch['masked_lm_positions'][row, :len(places)] = places
        scores = softmax(self.programs[length].call(self.weights, batch))
        return [[{self.about['pieces'][i]: float(one[i]) for i in np.argsort(-one, kind='stable')[:top_k]}
                 for one in row[:len(places)]] for row, places in zip(scores, masks)]

    def encode(self, text, other=None):
        """[CLS] A [SEP] (B [SEP]) and the length of its first segment; the longer text gives way where too long."""
        if other is not None and self.about['segments'] < 2:
            raise ValueError('This model has one segment, and takes single texts.')
        a, b = self.text_ids(text), [] if other is None else self.text_ids(other)
        budget = max(self.about['lengths']) - (2 if other is None else 3)
        while len(a) + len(b) > budget:
            (a if len(a) > len(b) else b).pop()
        first = [self.about['cls_id'], *a, self.about['sep_id']]
        return first + ([] if other is None else [*b, self.about['sep_id']]), len(first)

    def text_ids(self, text):
        """Ids of one text; in a masked language model [MASK] is the mask."""
        if self.about['kind'] == 'classification':
            return list(self.ids(text))
        parts = [self.ids(part.strip()) for part in text.split(MASK)]
        return [i for part in parts for i in (*part, self.about['mask_id'])][:-1]


def softmax(logits):
    """Over the last axis."""
    powers = np.exp(logits - np.max(logits, -1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


if __name__ == '__main__':
    if not 2 <= len(sys.argv) <= 3:
        sys.exit(__doc__)
    texts = (sys.argv[1], sys.argv[2] if len(sys.argv) == 3 else None)
    print(json.dumps(Exported(pathlib.Path(__file__).parent)([texts])[0], ensure_ascii=False, indent=1))
