"""The reference model's architecture and the settings that determine a training run."""

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

ATTENTION_BLOCK = 128


@dataclass(frozen=True)
class Settings:
    """What determines a run's result.

    Attributes
    ----------
    steps : int
        Optimiser steps; may be changed on resumption until the learning rate starts to fall.
    seed : int
        Seed of the initial weights and of the order of the text.
    context, batch, micro_batch : int
        Tokens a sequence, sequences a step, sequences a forward pass.
    hidden, intermediate, layers, heads : int
        The architecture.
    matrix_rate, other_rate : float
        Peak learning rates of Muon (matrices of the layers) and AdamW (embedding and norms).
    warmup : int
        Steps of rising learning rate.
    decay : float
        Share of the steps, at the end, in which the learning rate falls to zero.
    """

    steps: int = 1500
    seed: int = 0
    context: int = 1024
    batch: int = 8
    micro_batch: int = 4
    hidden: int = 256
    intermediate: int = 704
    layers: int = 6
    heads: int = 4
    matrix_rate: float = 0.02
    other_rate: float = 3e-3
    warmup: int = 60
    decay: float = 0.5

    @property
    def decay_start(self) -> int:
        """The step at which the learning rate starts to fall."""
        return round(self.steps * (1 - self.decay))

    def rate(self, step: int) -> float:
        """Return the learning rate of a step (from 0) as a share of the peak.

        Parameters
        ----------
        step : int
            Number of the step.
        """
        falling = (self.steps - step) / max(1, self.steps - self.decay_start)
        return min(1.0, (step + 1) / max(1, self.warmup), falling)


def generator(*key: int) -> torch.Generator:
    """Return a generator seeded by a key, so that no draw depends on the draws before it.

    Parameters
    ----------
    *key : int
        Seed, purpose and so on.
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def _blockwise_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attend causally, by blocks of rows.

    The CPU's fused kernel spends more on its backward pass than plain matrix products over the
    lower triangle, once those are compiled: the whole step is half as fast again this way.
    """
    length = query.shape[2]
    blocks = []
    for start in range(0, length, ATTENTION_BLOCK):
        end = min(start + ATTENTION_BLOCK, length)
        logits = query[:, :, start:end] @ key[:, :, :end].transpose(-1, -2) * scaling
        rows = torch.arange(start, end, device=query.device)[:, None]
        future = torch.arange(end, device=query.device) > rows
        weights = logits.float().masked_fill(future, float("-inf")).softmax(-1)
        blocks.append(weights.to(value.dtype) @ value[:, :, :end])
    return torch.cat(blocks, 2).transpose(1, 2), None


def build_model(settings: Settings, vocabulary: int) -> "LlamaForCausalLM":
    """Return the untrained model, its weights drawn from the seed.

    Parameters
    ----------
    settings : Settings
        Architecture and seed.
    vocabulary : int
        Number of tokens.
    """
    from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

    AttentionInterface.register("less_cache_blockwise", _blockwise_attention)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=settings.hidden,
        intermediate_size=settings.intermediate,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=settings.context,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config)
    model.set_attn_implementation("less_cache_blockwise")
    draws = generator(settings.seed, 0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                is_output = name.endswith(("o_proj.weight", "down_proj.weight"))
                scale = 0.02 / (2 * settings.layers) ** 0.5 if is_output else 0.02
                parameter.normal_(0.0, scale, generator=draws)
    return model
