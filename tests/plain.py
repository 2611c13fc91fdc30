"""BERT written down once more, in PyTorch and float64: what tests compare with. Nothing of bert_jax is in it."""

import math

import numpy as np
import torch

ACTIVATIONS = {'gelu': torch.nn.functional.gelu, 'relu': torch.relu,
               'gelu_new': lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))}


def tensors(tree):
    """A tree of arrays as float64 tensors that want a gradient."""
    if isinstance(tree, dict):
        return {name: tensors(value) for name, value in tree.items()}
    return torch.tensor(np.asarray(tree, np.float64), requires_grad=True)


def gradients(loss, tree):
    """The gradient of a loss, as a tree of arrays; zeros where nothing depends on a tensor."""
    if isinstance(tree, dict):
        return {name: gradients(loss, value) for name, value in tree.items()}
    (found,) = torch.autograd.grad(loss, [tree], retain_graph=True, allow_unused=True)
    return np.zeros(tree.shape) if found is None else found.numpy()


def encode(params, batch, masks=None, activation='gelu_new'):
    """Post-norm Transformer (Vaswani et al. 2017; Devlin et al. 2019); a token sees those of its own example.

    Args:
      params: the tree of `tensors`.
      batch: input_ids, input_mask (0 = padding, k = the row's k-th example), segment_ids, position_ids [B, L].
      masks: site -> a factor for each entry and call: 0, or 1 / (1 - rate). Sites are 'embeddings', 'probabilities',
        'attention' and 'mlp'; without them there is no dropout.
      activation: an ACTIVATIONS name.

    Returns:
      Every layer's hidden [B, L, D], the embeddings first, and each layer's (query, key, value) [B, H, L, K].
    """
    def drop(site, x, call=0):
        return x if masks is None else x * torch.tensor(masks[site][call])

    batch = {name: torch.tensor(np.asarray(value)).long() for name, value in batch.items()}
    tables, layers = params['embeddings'], params['encoder']['layers']
    x = sum(tables[name][batch[ids]] for name, ids in (
        ('token', 'input_ids'), ('position', 'position_ids'), ('segment', 'segment_ids')))
    x = drop('embeddings', norm(x, tables['norm']))
    example = batch['input_mask']
    apart = (example[:, :, None] != example[:, None, :]) | (example == 0)[:, None, :]  # [B, L, L]
    hidden, heads = [x], []
    for i in range(len(layers['mlp']['up']['bias'])):
        layer = at(layers, i)
        qkv = torch.einsum('BLD,DHcK->BcHLK', x, layer['attention']['qkv']['kernel'])
        query, key, value = (qkv + layer['attention']['qkv']['bias'].permute(1, 0, 2)[None, :, :, None]).unbind(1)
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        scores = scores.masked_fill(apart[:, None], -1e9)
        mixed = drop('probabilities', scores.softmax(-1), i) @ value
        out = torch.einsum('BHLK,HKD->BLD', mixed, layer['attention']['out']['kernel'])
        x = norm(x + drop('attention', out + layer['attention']['out']['bias'], i), layer['attention_norm'])
        out = dense(ACTIVATIONS[activation](dense(x, layer['mlp']['up'])), layer['mlp']['down'])
        x = norm(x + drop('mlp', out, i), layer['mlp_norm'])
        hidden.append(x)
        heads.append((query, key, value))
    return hidden, heads


def pool(params, hidden, batch):
    """tanh(dense) at each example's [CLS]: [B, E, D]."""
    at_cls = torch.tensor(np.asarray(batch['cls_positions'])).long()
    return torch.tanh(dense(torch.take_along_dim(hidden, at_cls[..., None], 1), params['pooler']['dense']))


def pretraining(params, batch, masks=None, activation='gelu_new', vocab_size=None):
    """{'mlm': ..., 'nsp': ...}, as from `summed`, over the masked places and the pairs."""
    hidden = encode(params, batch, masks, activation)[0][-1]
    head = params['targets_mlm']
    places = torch.tensor(np.asarray(batch['masked_lm_positions'])).long()
    x = torch.take_along_dim(hidden, places[..., None], 1)
    x = norm(ACTIVATIONS[activation](dense(x, head['dense'])), head['norm'])
    logits = (x @ params['embeddings']['token'].T + head['bias'])[..., :vocab_size]
    pairs = dense(pool(params, hidden, batch), params['targets_nsp']['dense'])
    return {'mlm': summed(logits, batch['masked_lm_ids'], batch['masked_lm_weights']),
            'nsp': summed(pairs, batch['next_sentence_labels'], batch['next_sentence_weights'])}


def classification(params, batch, masks=None, head_mask=1.0, activation='gelu_new'):
    """The same for one label an example, from the pooled [CLS]; `head_mask` [B E, D] is the head's dropout."""
    pooled = pool(params, encode(params, batch, masks, activation)[0][-1], batch).flatten(0, 1)
    logits = dense(pooled * torch.as_tensor(head_mask), params['targets_classification']['dense'])
    return {'classification': summed(logits, batch['label_ids'], batch['is_real_example'])}


def summed(logits, labels, weights):
    """{'loss', 'right', 'count'}: weighted sums of the cross-entropy in nats and of what is right; weights' sum."""
    labels, weights = torch.tensor(np.asarray(labels)).long(), torch.tensor(np.asarray(weights, np.float64))
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction='none')
    right = (logits.argmax(-1) == labels).double()
    return {'loss': (nll * weights.flatten()).sum(), 'right': (right * weights).sum(), 'count': weights.sum()}


def norm(x, params):
    """LayerNorm (Ba et al. 2016)."""
    return torch.nn.functional.layer_norm(x, x.shape[-1:], params['scale'], params['bias'], 1e-12)


def dense(x, params):
    """x @ kernel + bias."""
    return x @ params['kernel'] + params['bias']


def at(tree, i):
    """Layer i of stacked parameters."""
    return {name: at(value, i) for name, value in tree.items()} if isinstance(tree, dict) else tree[i]
