"""A plugin for vLLM: its requests hold a less_cache, a page of constant size each.

``vllm serve MODEL --attention-backend CUSTOM --additional-config '{"less_cache": {...}}'``;
docs/engines.md says what goes into the braces. vLLM finds `register` by the entry point group
``vllm.general_plugins``, and calls it in every process: server, engine and workers.
"""

from __future__ import annotations

__all__ = ["register"]


def register() -> None:
    """Make the attention backend known as CUSTOM, and have every configuration checked."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from .hooks import install
    from .settings import BACKEND

    register_backend(AttentionBackendEnum.CUSTOM, BACKEND)
    install()
