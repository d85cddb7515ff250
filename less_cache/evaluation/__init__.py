"""Judging a small cache on held-out text: perplexity, generation, reports."""
