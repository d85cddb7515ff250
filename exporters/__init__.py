"""Models with their cache as files that other runtimes run."""
