"""Labelled data -> batches -> scores."""
