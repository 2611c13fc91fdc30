"""The Flax Linen model: embeddings, encoder, targets, each a free building block."""
