"""An HTTP server for an exported decoder, speaking the OpenAI API: ``python -m examples.serve``."""
