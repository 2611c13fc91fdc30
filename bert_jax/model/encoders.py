"""[B, L, E] -> Encoded.

The contract of an encoder, a Linen module:

    reads, run                           given by `build`: what of which layers targets read, and how it is computed
    num_layers                           layers that can be read, counted from 1
    sees                                 'both', 'left' or 'prefix': what a position may have seen
    GIVES, RANGES                        what of a layer can be read; key -> (lowest, highest)
    check(input_size)                    refuses values that do not fit each other, or E
    width(input_size)                    -> D
    flops(input_size, contents)          -> of the forward pass for a row of so many tokens
    __call__(x, batch, *, train)         -> Encoded

What it mixes stays within equal non-zero numbers of input_mask: within one example of a row.
"""

from bert_jax.model.recurrent import LstmEncoder
from bert_jax.model.transformer import Transformer

ENCODERS = {'transformer': Transformer, 'lstm': LstmEncoder}
