"""What is refused before anything is loaded, and the scheduler that takes its place."""

from __future__ import annotations

import re
from typing import Any

from ...backends import best_backend
from ...call import most_tokens, no_room
from .settings import BACKEND, NAME, Settings

TESTED = ("0.32",)
"""Minor versions of vLLM that the plugin was run with: it stands on internal interfaces."""

SCHEDULERS = "less_cache.integrations.vllm.scheduler"

FULL, SLIDING = "full_attention", "sliding_window"


def check_vllm(vllm_config: Any) -> None:
    """Refuse what cannot work, and choose the scheduler; nothing where LESS is not asked for.

    Raises
    ------
    ValueError, TypeError, FileNotFoundError
        That says what is wrong, and what would do.
    """
    if vllm_config.model_config is None:
        return
    given = _given(vllm_config)
    if given is None:
        return
    _check_version()
    settings = Settings.from_dict(given)
    _check_engine(vllm_config)
    _check_model(vllm_config.model_config)
    _check_cache(vllm_config, settings)
    _check_room(vllm_config, settings)
    _keep_sliding_layers(vllm_config)
    # Beside sliding layers, whose blocks it may find, it would skip tokens that pages never saw.
    vllm_config.cache_config.enable_prefix_caching = False
    kind = "AsyncChunks" if vllm_config.scheduler_config.async_scheduling else "Chunks"
    vllm_config.scheduler_config.scheduler_cls = f"{SCHEDULERS}.{kind}"


def _given(vllm_config: Any) -> Any:
    """The options; ``None`` where neither they nor the backend is asked for."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    custom = AttentionBackendEnum.CUSTOM
    attention = vllm_config.attention_config
    chosen = attention.backend is custom or attention.backend_per_kind.get(FULL) is custom
    additional = vllm_config.additional_config
    given = additional.get(NAME) if isinstance(additional, dict) else None
    if given is None:
        if chosen and custom.get_path() == BACKEND:
            raise ValueError(
                f"additional_config: has no {NAME}, which attention backend CUSTOM is: add "
                f'--additional-config \'{{"{NAME}": {{"capacity": ...}}}}\''
            )
        return None
    if not chosen:
        raise ValueError(
            f"{NAME}: given, but the attention backend is {attention.backend}: add "
            "--attention-backend CUSTOM"
        )
    if custom.get_path() != BACKEND:
        raise ValueError(
            f"{NAME}: attention backend CUSTOM is {custom.get_path()}, of another plugin; name "
            "less_cache alone in VLLM_PLUGINS"
        )
    return given


def _check_version() -> None:
    from vllm.version import __version__

    minor = ".".join(re.findall(r"\d+", __version__)[:2])
    if minor not in TESTED:
        raise ValueError(
            f"{NAME}: vLLM {__version__} is installed, but this plugin was tested with "
            f"{', '.join(TESTED)} alone: the interfaces it stands on may have changed"
        )


def _check_engine(vllm_config: Any) -> None:
    """Refuse features of the engine that need pages of tokens, or tokens twice."""
    cache, parallel = vllm_config.cache_config, vllm_config.parallel_config
    scheduler = vllm_config.scheduler_config.scheduler_cls
    reasons = {
        "speculative decoding": (
            vllm_config.speculative_config is not None,
            "a token that was taken in cannot be taken back",
        ),
        f"kv_cache_dtype {cache.cache_dtype}": (
            cache.cache_dtype not in ("auto", "float16", "bfloat16", "float32"),
            "pages hold the model's dtype; for fewer bits give bits or key_bits and value_bits",
        ),
        "a KV connector": (
            vllm_config.kv_transfer_config is not None,
            "a page belongs to one request and has no blocks of tokens to send",
        ),
        "KV cache events": (
            vllm_config.kv_events_config is not None
            and vllm_config.kv_events_config.enable_kv_cache_events,
            "there are no blocks of tokens to tell of",
        ),
        "decode context parallelism": (
            parallel.decode_context_parallel_size > 1,
            "a page is not split along its tokens",
        ),
        "prefill context parallelism": (
            parallel.prefill_context_parallel_size > 1,
            "a prompt's chunks are taken in one after another",
        ),
        "pipeline parallelism": (
            parallel.pipeline_parallel_size > 1,
            "it was not tested; take tensor parallelism",
        ),
        f"scheduler class {scheduler}": (
            scheduler is not None and not str(scheduler).startswith(SCHEDULERS),
            "less_cache brings its own, without which answers would depend on the load",
        ),
        "micro-batches (DBO)": (parallel.enable_dbo, "they were not tested"),
    }
    for name, (found, reason) in reasons.items():
        if found:
            raise ValueError(f"{NAME}: {name} cannot be had with it: {reason}")


def _check_model(model_config: Any) -> None:
    reasons = {
        "has latent attention": model_config.use_mla,
        "has layers with a state": model_config.is_hybrid or model_config.is_attention_free,
        "is an encoder-decoder": model_config.is_encoder_decoder,
        "takes images or sound": model_config.is_multimodal_model,
        "is no model that generates text": model_config.runner_type != "generate",
    }
    for what, found in reasons.items():
        if found:
            raise ValueError(
                f"{NAME}: {model_config.architecture} {what}, but only decoders of text whose "
                "layers have full or sliding-window attention are supported"
            )


def _check_cache(vllm_config: Any, settings: Settings) -> None:
    """Read the cache, and refuse one that is not for this model, its length or its processes."""
    from vllm.platforms import current_platform

    model_config = vllm_config.model_config
    config = settings.parts(model_config.hf_text_config, _dtype_name(model_config.dtype)).config
    world = vllm_config.parallel_config.tensor_parallel_size
    try:
        config.shard(0, world)
    except ValueError:
        raise ValueError(
            f"{NAME}: tensor_parallel_size: got {world}, expected a divisor of the model's "
            f"{config.query_heads} query heads that divides its {config.kv_heads} KV heads or is a "
            "multiple of them"
        ) from None
    if settings.backend == "auto":
        best_backend(config, current_platform.device_type)
    longest = model_config.max_model_len
    for layer in config.layers:
        if longest > most_tokens(layer):
            raise ValueError(f"{NAME}: max_model_len: got {longest}, but {no_room(layer)}")


def _check_room(vllm_config: Any, settings: Settings) -> None:
    """A step must have room for a whole chunk beside a token of every other request."""
    scheduler, model = vllm_config.scheduler_config, vllm_config.model_config
    chunk = min(settings.prompt_chunk, model.max_model_len)
    needed = chunk + scheduler.max_num_seqs - 1
    room = scheduler.max_num_batched_tokens
    if scheduler.max_num_scheduled_tokens is not None:
        room = min(room, scheduler.max_num_scheduled_tokens)
    if room < needed:
        raise ValueError(
            f"{NAME}: max_num_batched_tokens: got {room}, expected at "
            f"least {needed}: prompt_chunk = {settings.prompt_chunk} tokens of a prompt, whole, "
            f"beside one of each of max_num_seqs = {scheduler.max_num_seqs} requests; give more, "
            "or a smaller prompt_chunk"
        )
    threshold = scheduler.long_prefill_token_threshold
    if 0 < threshold < chunk:
        raise ValueError(
            f"{NAME}: long_prefill_token_threshold: got {threshold}, expected 0, or at least "
            f"prompt_chunk = {chunk}: a chunk is taken in whole"
        )


def _keep_sliding_layers(vllm_config: Any) -> None:
    """Layers with a window of their own go on with vLLM's own attention."""
    attention = vllm_config.attention_config
    if attention.backend is not None:
        attention.backend_per_kind = {FULL: attention.backend, **attention.backend_per_kind}
        attention.backend = None


def _dtype_name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
