"""BERT-base and BERT-large on TPU slices, from one board to two slices of 256 chips.

    python -m bert_jax.compile_check --config configs/pods.py:base_v5e_16 --tokens 43e9
    bash launch/tpu.sh run my-slice --store gs://B/store --workdir gs://B/run -- --config configs/pods.py:base_v5e_16

The argument is SIZE_SLICE. All are trained on the paper's number of examples (Devlin et al. 2019, A.2), nine tenths of
them at length 128, in bfloat16, with LAMB and the square-root rule for large batches (You et al. 2020, table 4). What
each needs and takes by the TPU compiler (memory a device, estimated step, MFU at both lengths) stands here and, with
more, in docs/pods.md:

(written by benchmarks/pods.py)
    base_v3_32        128:   1.5 GiB,     91 ms, MFU  40%; 512:   2.1 GiB,    126 ms, MFU  31%
    base_v4_64        128:   2.7 GiB,     58 ms, MFU  28%; 512:   3.5 GiB,     91 ms, MFU  19%
    base_v5e_16       128:   2.7 GiB,     66 ms, MFU  34%; 512:   3.6 GiB,    116 ms, MFU  21%
    base_v5e_64       128:   2.7 GiB,     65 ms, MFU  35%; 512:   3.6 GiB,    115 ms, MFU  21%
    base_v5e_256      128:   1.3 GiB,     36 ms, MFU  31%; 512:   1.8 GiB,     49 ms, MFU  25%
    base_v5p_32       128:   5.3 GiB,     63 ms, MFU  31%; 512:   7.6 GiB,     94 ms, MFU  22%
    base_v6e_16       128:   5.3 GiB,     61 ms, MFU  16%; 512:   7.1 GiB,     85 ms, MFU  12%
    base_v6e_256      128:   2.7 GiB,     29 ms, MFU  17%; 512:   3.6 GiB,     43 ms, MFU  12%
    base_2x_v5e_256   128:   1.5 GiB,     39 ms, MFU  29%; 512:   2.0 GiB,     48 ms, MFU  25%
    large_v3_32       128:   1.9 GiB,    153 ms, MFU  41%; 512:   2.7 GiB,    201 ms, MFU  33%
    large_v4_64       128:   6.0 GiB,    162 ms, MFU  35%; 512:   8.7 GiB,    250 ms, MFU  24%
    large_v5e_16      128:   6.0 GiB,    193 ms, MFU  40%; 512:   8.7 GiB,    329 ms, MFU  25%
    large_v5e_64      128:   6.0 GiB,    191 ms, MFU  41%; 512:   8.8 GiB,    332 ms, MFU  25%
    large_v5e_256     128:   3.2 GiB,    106 ms, MFU  37%; 512:   4.5 GiB,    164 ms, MFU  25%
    large_v5p_32      128:   6.2 GiB,     93 ms, MFU  36%; 512:   9.0 GiB,    135 ms, MFU  26%
    large_v6e_16      128:   6.1 GiB,     83 ms, MFU  20%; 512:   8.5 GiB,    115 ms, MFU  15%
    large_v6e_256     128:   3.3 GiB,     48 ms, MFU  17%; 512:   4.5 GiB,     64 ms, MFU  14%
    large_2x_v5e_256  128:   3.4 GiB,    107 ms, MFU  37%; 512:   4.6 GiB,    153 ms, MFU  27%

How far such an estimate may be off: BERT-large at 256 tokens on v4:4x4x4: 163 sequences/s a chip
estimated for this program, 195 measured by Google for theirs (MLPerf v1.0), 0.84 of it.
(to here)
"""

import math
import pathlib

from bert_jax import cli

PRETRAIN = pathlib.Path(__file__).with_name('pretrain.py')

EXAMPLES = 256_000_000            # the paper's: a million steps of 256
LONG = 0.1                        # of them at length 512
# slice: topology, slices, examples a device at length 128 for base and large; a quarter of that at 512
SLICES = {
    'v3_32': ('v3:4x4', 1, 32, 16), 'v4_64': ('v4:2x4x4', 1, 64, 64), 'v5e_16': ('v5e:4x4', 1, 64, 64),
    'v5e_64': ('v5e:8x8', 1, 64, 64), 'v5e_256': ('v5e:16x16', 1, 32, 32), 'v5p_32': ('v5p:2x2x4', 1, 128, 64),
    'v6e_16': ('v6e:4x4', 1, 128, 64), 'v6e_256': ('v6e:16x16', 1, 64, 32), '2x_v5e_256': ('v5e:16x16', 2, 32, 32),
}


def get_config(arg='base_v5e_16'):
    size, _, name = arg.partition('_')
    if size not in ('base', 'large') or name not in SLICES:
        raise ValueError(f'unknown {arg!r}; base_ or large_ and one of {", ".join(SLICES)}')
    topology, slices, base, large = SLICES[name]
    batch_size = {'base': base, 'large': large}[size] * devices(topology) * slices

    c = cli.load_config(f'{PRETRAIN}:{size},bf16', [])
    c.phases = ((round(EXAMPLES * (1 - LONG) / batch_size), 128, batch_size),
                (round(EXAMPLES * LONG / (batch_size // 4)), 512, batch_size // 4))
    c.model.run.unroll = 1                  # a scan over the layers: compiles six times faster
    c.model.run.remat = 'elementwise'       # what is cheap is computed again instead of kept
    c.mesh = (-1, 16, 1)                    # 16 devices share the update, which is once a step whatever the batch
    c.optimizer.name = 'lamb'
    c.schedule.peak = 6.25e-4 * (batch_size / 512)**0.5
    c.schedule.warmup_share = min(0.2, batch_size / 512 / 320)
    c.log_every = 50
    c.eval_every = c.save_every = 1_000
    c.eval_batch_size = devices(topology) * slices * 8
    with c.unlocked():
        c.topology, c.slices = topology, slices  # what compile_check compiles for
    return c


def devices(topology):
    """Devices as JAX counts them: on v3 a core, elsewhere a chip."""
    generation, _, layout = topology.partition(':')
    return math.prod(map(int, layout.split('x'))) * (2 if generation == 'v3' else 1)
