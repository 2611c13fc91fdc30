"""Pre-training as in the BERT paper (Devlin et al. 2019, 3.1 and appendix A.2).

    python -m bert_jax.pretrain --config configs/pretrain.py:base --config.store=STORE --workdir W

The argument is a size (tiny, mini, small, medium, base, large) and options after commas:
no_nsp (no sentence pairs), whole_word (whole-word masking), packed (rows hold several examples and no padding),
bf16 (compute in bfloat16).
Phases are (steps, max_length, batch_size); the schedule runs over all of them.
"""

from ml_collections import ConfigDict, FieldReference

SIZES = {'tiny': (2, 128, 2), 'mini': (4, 256, 4), 'small': (4, 512, 8), 'medium': (8, 512, 8),
         'base': (12, 768, 12), 'large': (24, 1024, 16)}
OPTIONS = ('no_nsp', 'whole_word', 'packed', 'bf16')


def get_config(arg='base'):
    size, *options = arg.split(',')
    if size not in SIZES or not set(options) <= set(OPTIONS):
        raise ValueError(f'unknown {arg!r}; sizes: {", ".join(SIZES)}; options: {", ".join(OPTIONS)}')
    layers, width, heads = SIZES[size]

    c = ConfigDict()
    c.store = ''                    # made by bert_jax.prepare; several with commas between them
    c.init_from = ''                # a workdir, Hugging Face or TF1 folder to go on from, for in-domain pre-training
    c.seed = 0

    c.phases = ((900_000, 128, 256), (100_000, 512, 256))
    c.examples = ConfigDict({
        'name': 'documents',
        'pairing': 'single' if 'no_nsp' in options else 'next_sentence',
        'masking': 'whole_word' if 'whole_word' in options else 'token',
        'mask_rate': 0.15,
        'replacement': (0.8, 0.1),  # [MASK], a random token; the rest keeps its own
        'short_rate': 0.1,          # documents cut to a random shorter length
        'pack_lengths': 1 if 'packed' in options else 0,  # rows of so many lengths hold several examples; 0: one a row
        'mixture': ()})             # of several stores, rows of each in turn, (3, 1) say; (): as many of each
    c.pipeline = 'tf'               # or 'thread', without tensorflow

    c.model = model(layers, width, heads, dropout_rate=0.1, max_length=512)
    c.model.run.dtype = 'bfloat16' if 'bf16' in options else 'float32'
    c.model.targets = targets = ConfigDict()
    targets.mlm = ConfigDict({'vocab_size': c.model.embeddings.get_ref('vocab_size'), 'weight': 1.0,
                              'activation': c.model.encoder.get_ref('activation')})
    if 'no_nsp' not in options:
        targets.nsp = ConfigDict({'weight': 1.0})

    c.optimizer = ConfigDict({'name': 'adamw', 'b1': 0.9, 'b2': 0.999, 'eps': 1e-6, 'weight_decay': 0.01,
                              'clip_norm': 1.0, 'bias_correction': False})
    c.schedule = ConfigDict({'peak': 1e-4, 'warmup_share': 0.01})  # of all steps
    c.accumulation = 1              # micro-batches an update
    c.mesh = ()                     # devices along data, fsdp, tensor in each slice; (): data, and fsdp if need be

    c.log_every = 100
    c.eval_every = 10_000
    c.eval_examples = 4096          # held-out, with the same masks in every run; 0: no evaluation
    c.eval_batch_size = 64          # rounded up to a multiple of the devices
    c.save_every = 5_000
    c.keep_checkpoints = 3
    return c


def model(layers, width, heads, dropout_rate, max_length):
    """The encoder's sizes, each number written once."""
    hidden_size, rate = FieldReference(width), FieldReference(dropout_rate)
    num_layers = FieldReference(layers)
    return ConfigDict({
        'run': {  # how it is computed, not what: another machine may take other values
            'dtype': 'float32',
            'kernel': 'auto',          # of attention: 'xla'; 'cudnn' on NVIDIA GPUs, in bf16 without attention dropout
            'unroll': num_layers * 1,  # on pods 1: compiles faster
            'remat': 'none'},          # 'elementwise', 'dots', 'full': less memory, more work
        'embeddings': {'name': 'bert', 'vocab_size': FieldReference(0),  # 0: the tokenizer's
                       'hidden_size': hidden_size, 'max_length': max_length, 'num_segments': 2,
                       'dropout_rate': rate},
        'encoder': {'name': 'transformer', 'num_layers': num_layers, 'num_heads': heads, 'mlp_size': hidden_size * 4,
                    'activation': FieldReference('gelu_new'),  # the original's; 'gelu' (erf) is Hugging Face's
                    'dropout_rate': rate * 1.0, 'attention_dropout_rate': rate * 1.0,  # follow, unless given
                    'sees': 'both'},       # 'left': no position what is after it; 'prefix': but of segment A all
    })
