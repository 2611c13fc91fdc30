"""The one FLOP formula, and the share of the peak that it makes."""

import jax

from bert_jax import hardware


def sequence_flops(*, num_layers: int, hidden_size: int, mlp_size: int, vocab_size: int, tokens: float,
                   squared_tokens: float, predictions: float) -> float:
    """Model FLOPs of a training step for one sequence, forward and backward.

    3 * [2 L (4 D^2 + 2 D F) S + 4 L D S^2 + 2 P (D V + D^2)]; padding, look-ups, norms and softmax
    are not counted.

    Args:
      num_layers, hidden_size, mlp_size, vocab_size: L, D, F, V.
      tokens: S, real tokens (may be a mean).
      squared_tokens: the mean of S squared.
      predictions: P, predicted places.
    """
    width = hidden_size
    trunk = 2 * num_layers * (4 * width**2 + 2 * width * mlp_size) * tokens
    attention = 4 * num_layers * width * squared_tokens
    head = 2 * predictions * (width * vocab_size + width**2)
    return 3 * (trunk + attention + head)


def peak_flops() -> float | None:
    """The devices' bf16 peak in FLOP/s, all together; None where it is not known."""
    known = hardware.of(jax.devices()[0])
    return known.peak_tflops * 1e12 * jax.device_count() if known else None
