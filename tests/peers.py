"""Hugging Face models whose tensors are all random and of realistic size, so that no swap can hide; their batches."""

import json

import numpy as np
import torch
import transformers

SPECIALS = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]']


def model(
    architecture='BertForPreTraining',
    *,
    vocab_size=67,
    hidden_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=80,
    hidden_act='gelu',
    type_vocab_size=2,
    max_position_embeddings=40,
    seed=0,
    **kwargs,
):
    config = transformers.BertConfig(
        vocab_size=vocab_size, hidden_size=hidden_size, num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads, intermediate_size=intermediate_size, hidden_act=hidden_act,
        type_vocab_size=type_vocab_size, max_position_embeddings=max_position_embeddings, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, **kwargs)
    peer = getattr(transformers, architecture)(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            scale = 0.2 if parameter.ndim == 1 else 1 / hidden_size**0.5
            parameter.copy_(('LayerNorm.weight' in name) + scale * torch.randn(parameter.shape, generator=generator))
    return peer


def save(peer, folder, **kwargs):
    """A folder with weights and a vocabulary."""
    peer.save_pretrained(folder, **kwargs)
    pieces = SPECIALS + [f'w{i}' for i in range(peer.config.vocab_size - 5)]
    (folder / 'vocab.txt').write_text('\n'.join(pieces) + '\n')
    (folder / 'tokenizer_config.json').write_text(json.dumps({'do_lower_case': True}))
    return folder


def batch(config, rows=6, length=29, seed=0):
    """What our model takes, rows of different lengths; Hugging Face takes three of its arrays (`inputs`)."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(8, length + 1, rows)
    lengths[0] = length
    place = np.arange(length)
    mask = (place < lengths[:, None]).astype(np.int32)
    return {
        'input_ids': (rng.integers(5, config.vocab_size, (rows, length)) * mask).astype(np.int32), 'input_mask': mask,
        'segment_ids': (rng.integers(0, config.type_vocab_size, (rows, length)) * mask).astype(np.int32),
        'position_ids': np.tile(place, (rows, 1)).astype(np.int32), 'cls_positions': np.zeros((rows, 1), np.int32),
        'masked_lm_positions': np.sort(rng.integers(1, 8, (rows, 4)), 1).astype(np.int32),
        'masked_lm_ids': rng.integers(5, config.vocab_size, (rows, 4)).astype(np.int32),
        'masked_lm_weights': (rng.random((rows, 4)) < 0.8).astype(np.float32),
        'next_sentence_labels': rng.integers(0, 2, (rows, 1)).astype(np.int32),
        'next_sentence_weights': np.ones((rows, 1), np.float32), 'is_real_example': np.ones(rows, np.int32)}


def inputs(batch):
    return {
        'input_ids': torch.tensor(batch['input_ids']).long(),
        'attention_mask': torch.tensor(batch['input_mask']).long(),
        'token_type_ids': torch.tensor(batch['segment_ids']).long(),
    }


def loss(peer, batch):
    """BERT's pre-training loss as the paper states it: the mean over masked places plus the mean over pairs."""
    out = peer(**inputs(batch))
    positions = torch.tensor(batch['masked_lm_positions']).long()
    logits = torch.take_along_dim(out.prediction_logits, positions[..., None], 1)
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.tensor(batch['masked_lm_ids']).long().flatten(),
                                            reduction='none')
    weights = torch.tensor(batch['masked_lm_weights']).to(nll.dtype).flatten()
    nsp = torch.nn.functional.cross_entropy(out.seq_relationship_logits,
                                            torch.tensor(batch['next_sentence_labels']).long()[:, 0])
    return (nll * weights).sum() / weights.sum() + nsp
