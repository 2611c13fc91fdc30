"""Fine-tuning as in the BERT paper (Devlin et al. 2019, 4.1: batch 32, 3 epochs, warm-up 10 %).

    python -m bert_jax.finetune --config configs/finetune.py:sst2 --config.init_from=W0 \
        --config.task.folder=GLUE/SST-2 --workdir W
    python -m bert_jax.finetune --config configs/finetune.py:classification --config.init_from=W0 \
        --config.task.train_file=mine.csv --config.task.text_column=review --config.task.label_column=stars --workdir W

The argument is a task: classification (your own CSV, TSV or JSON lines), sst2, mrpc.
"""

from ml_collections import ConfigDict

OWN_DATA = {'name': 'classification', 'train_file': '', 'dev_file': '', 'test_file': '', 'text_column': 'text',
            'text_pair_column': '', 'label_column': 'label', 'labels': (), 'dev_share': 0.1}
TASKS = {'classification': OWN_DATA, 'sst2': {'name': 'sst2', 'folder': ''}, 'mrpc': {'name': 'mrpc', 'folder': ''}}


def get_config(task='classification'):
    if task not in TASKS:
        raise ValueError(f'unknown task {task!r}; known: {", ".join(TASKS)}')
    c = ConfigDict()
    c.init_from = ''                # a workdir, Hugging Face folder or name, or TF1 folder
    c.from_scratch = False          # True: its architecture and tokenizer, but random weights
    c.seed = 0
    c.task = ConfigDict(TASKS[task])
    c.max_length = 128
    c.batch_size = 32
    c.epochs = 3.0
    c.dropout_rate = 0.1
    c.dtype = 'float32'
    c.model = ConfigDict()          # filled in from init_from
    c.optimizer = ConfigDict({'name': 'adamw', 'b1': 0.9, 'b2': 0.999, 'eps': 1e-6, 'weight_decay': 0.01,
                              'clip_norm': 1.0, 'bias_correction': True})
    c.schedule = ConfigDict({'peak': 5e-5, 'warmup_share': 0.1})
    c.accumulation = 1
    c.mesh = (-1, 1, 1)
    c.best = 'dev/accuracy'         # the score whose best checkpoint is kept and used
    c.evals_per_epoch = 1
    c.log_every = 50
    c.keep_checkpoints = 1
    return c
