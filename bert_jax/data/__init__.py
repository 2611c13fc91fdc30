"""Text to batches: tokenizer, corpora, token store, plans, examples, masks, tasks, pipelines."""
