"""Programs for TPU slices that are not there."""
