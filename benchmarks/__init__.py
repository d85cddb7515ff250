"""One script a question; each writes JSON and a PNG into `results/`. See docs/benchmarks.md."""
