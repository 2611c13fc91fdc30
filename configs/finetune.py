"""Fine-tuning as in the BERT paper (Devlin et al. 2019, 4 and A.3: batch 16 or 32, 2-4 epochs, warm-up 10 %).

    python -m bert_jax.finetune --config configs/finetune.py:sst2 --config.init_from=W0 \
        --config.task.folder=GLUE/SST-2 --workdir W
    python -m bert_jax.finetune --config configs/finetune.py:classification --config.init_from=W0 \
        --config.task.train_file=mine.csv --config.task.text_column=review --config.task.label_column=stars --workdir W

The argument is a task: GLUE's (cola sst2 mrpc stsb qqp mnli qnli rte wnli), squad1, squad2, swag, commonsenseqa,
conll2003, or your own data as classification, multilabel, regression, tagging, span, choice.
"""

from ml_collections import ConfigDict

FILES = {'train_file': '', 'dev_file': '', 'test_file': '', 'dev_share': 0.1}
TEXTS = {**FILES, 'text_column': 'text', 'text_pair_column': '', 'label_column': 'label', 'labels': ()}
SPANS = {**FILES, 'null_answers': False, 'stride': 128, 'max_query_length': 64, 'max_answer_length': 30, 'n_best': 20}
FEATURES = {'features': '', 'lstm_size': 768}
GLUE = ('cola', 'sst2', 'mrpc', 'stsb', 'qqp', 'mnli', 'qnli', 'rte', 'wnli')
TASKS = {
    'classification': TEXTS, 'multilabel': TEXTS, 'regression': TEXTS,
    'tagging': {**FILES, 'word_column': '', 'tag_column': '', 'sentence_column': '', 'scheme': 'iob2',
                'document_context': False, 'labels': (), **FEATURES},
    'span': {**SPANS, 'question_column': 'question', 'passage_column': 'passage', 'answer_column': 'answer',
             'answer_start_column': 'answer_start', 'id_column': 'id'},
    'squad1': SPANS, 'squad2': {**SPANS, 'null_answers': True},
    'choice': {**FILES, 'format': 'plain', 'context_column': 'context', 'choice_columns': ('choices',),
               'label_column': 'label'},
    'swag': {**FILES, 'format': 'swag'},
    'commonsenseqa': {**FILES, 'format': 'commonsenseqa'},
    'conll2003': {'folder': '', 'document_context': True, **FEATURES},
    **{name: {'folder': ''} for name in GLUE}}
READERS = {'squad1': 'span', 'squad2': 'span', 'swag': 'choice', 'commonsenseqa': 'choice'}
CHOICE = {'batch_size': 16, 'peak': 2e-5}
PAPER = {  # what the paper uses where it is not batch 32, 3 epochs
    'span': {'max_length': 384}, 'squad1': {'max_length': 384},
    'squad2': {'max_length': 384, 'epochs': 2.0, 'batch_size': 48},
    'choice': CHOICE, 'swag': CHOICE, 'commonsenseqa': CHOICE}


def get_config(task='classification'):
    if task not in TASKS:
        raise ValueError(f'unknown task {task!r}; known: {", ".join(TASKS)}')
    paper = {'max_length': 128, 'batch_size': 32, 'epochs': 3.0, 'peak': 5e-5} | PAPER.get(task, {})
    c = ConfigDict()
    c.init_from = ''                # a workdir, Hugging Face folder or name, or TF1 folder; several with commas
    c.from_scratch = False          # True: its architecture and tokenizer, but random weights
    c.seed = 0
    c.seeds = 1                     # restarts: seed, seed + 1, ...
    c.sweep = ''                    # 'paper': the grid below
    peaks = (5e-5, 4e-5, 3e-5, 2e-5) if task in GLUE else (5e-5, 3e-5, 2e-5)
    c.grid = ConfigDict({'batch_size': (16, 32), 'peak': peaks, 'epochs': (2, 3, 4)})
    c.task = ConfigDict({'name': READERS.get(task, task), **TASKS[task]})
    c.max_length = paper['max_length']
    c.packed = True                 # classes, numbers, choices: several short texts share a row
    c.num_lengths = 4               # else: static lengths that batches are cut to, chosen from the data
    c.batch_size = paper['batch_size']
    c.epochs = paper['epochs']
    c.keep_head = 'auto'            # a head of the same kind and labels is kept; True: it must be; False: a fresh one
    c.dropout_rate = 0.1
    c.dtype = 'float32'
    c.model = ConfigDict()          # filled in from init_from
    c.frozen = ()                   # ('embeddings', 'encoder'): these stay as they are
    c.optimizer = ConfigDict({'name': 'adamw', 'b1': 0.9, 'b2': 0.999, 'eps': 1e-6, 'weight_decay': 0.01,
                              'clip_norm': 1.0, 'bias_correction': True})
    c.schedule = ConfigDict({'peak': paper['peak'], 'warmup_share': 0.1})
    c.accumulation = 1
    c.remat = 'none'                # or elementwise, dots, full: less memory, more work (docs/pods.md)
    c.mesh = (-1, 1, 1)
    c.best = ''                     # the score whose best checkpoint is kept; '': the task's own, on dev
    c.evals_per_epoch = 1
    c.log_every = 50
    c.keep_checkpoints = 1
    return c
