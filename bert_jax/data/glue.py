"""The old place of tasks/glue.py, for commands that name it: python -m bert_jax.data.glue."""

from bert_jax import cli
from bert_jax.tasks.glue import main

if __name__ == '__main__':
    cli.run(main)
