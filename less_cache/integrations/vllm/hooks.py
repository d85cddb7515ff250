"""The two methods of vLLM's platform that the plugin wraps, once a process.

vLLM asks its platform to check a configuration when it is complete, before anything is loaded:
there what cannot work is refused, and the scheduler is chosen that answers do not depend on. And a
CPU platform ignores the attention backend that was asked for, but for its own.
"""

from __future__ import annotations

from typing import Any

from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from .checks import check_vllm

MARK = "_less_cache_installed"


def install() -> None:
    """Wrap them; nothing happens the second time."""
    platform = type(current_platform)
    if vars(platform).get(MARK):
        return
    _wrap_check(platform)
    if current_platform.is_cpu():
        _wrap_choice(platform)
    setattr(platform, MARK, True)


def _wrap_check(platform: Any) -> None:
    original = platform.check_and_update_config

    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        original(vllm_config)
        check_vllm(vllm_config)

    platform.check_and_update_config = classmethod(check_and_update_config)


def _wrap_choice(platform: Any) -> None:
    original = platform.get_attn_backend_cls

    def get_attn_backend_cls(cls: Any, selected_backend: Any, *args: Any, **named: Any) -> str:
        if selected_backend is AttentionBackendEnum.CUSTOM:
            return AttentionBackendEnum.CUSTOM.get_path()
        return original(selected_backend, *args, **named)

    platform.get_attn_backend_cls = classmethod(get_attn_backend_cls)
