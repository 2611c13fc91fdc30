"""Encoders that read a text token by token."""

import math
from collections.abc import Mapping
from typing import ClassVar

import flax.linen as nn
import jax

from bert_jax.model import parts
from bert_jax.model.layers import Dropout, Lstm
from bert_jax.model.parts import Batch, Encoded, Read, Run


class LstmEncoder(nn.Module):
    """Layers of an LSTM from left to right (Hochreiter and Schmidhuber 1997), in each example of a row by itself.

    Attributes:
      num_layers: N.
      hidden_size: D, whatever the embeddings' width is.
      dropout_rate: on each layer's output.
      run: how it is computed; of it dtype counts here.
      reads: what of which layers is kept, as targets ask for it.
    """

    num_layers: int
    hidden_size: int
    dropout_rate: float
    run: Run
    reads: tuple[Read, ...] = ()

    GIVES: ClassVar = ('hidden',)
    RANGES: ClassVar = {'num_layers': (1, math.inf), 'hidden_size': (1, math.inf), 'dropout_rate': (0, 0.99)}
    sees = 'left'

    def check(self, input_size: int) -> None:
        """Every width of the embeddings will do."""

    def width(self, input_size: int) -> int:
        """D of what comes out."""
        return self.hidden_size

    def flops(self, input_size: int, contents: Mapping[str, float]) -> float:
        """Of the forward pass for a row: 2 (in + D) 4 D tokens a layer."""
        inputs = input_size + (self.num_layers - 1) * self.hidden_size
        return 8 * self.hidden_size * (inputs + self.num_layers * self.hidden_size) * contents['tokens']

    @nn.compact
    def __call__(self, x: jax.Array, batch: Batch, *, train: bool) -> Encoded:
        """x [B, L, E], input_mask [B, L] (0 = padding, k = the row's k-th example) -> Encoded."""
        outputs = [x]
        for layer in range(self.num_layers):
            x = Lstm(self.hidden_size, False, self.run.dtype, name=f'layer_{layer}')(x, batch['input_mask'])
            x = Dropout(self.dropout_rate)(x, train=train)
            outputs.append(x)
        return Encoded(x, parts.picked(self.reads, {'hidden': dict(enumerate(outputs))}, self.num_layers))
