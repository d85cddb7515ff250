"""A decoder of your own, in plain PyTorch, that keeps its keys and values in a LESS cache.

No transformers: a small Llama-shaped model (RMSNorm, rotary embedding, SwiGLU, grouped-query
attention) with random weights, and a decode loop. The model leaves attention to a function
``attend(layer, q, k, v)``; with LESS that function is one line, `CacheManager.attend`.

    python examples/custom_loop.py --prompt-tokens 1024 --new-tokens 128
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import typer
from torch import Tensor, nn
from torch.nn import functional as F

import less_cache as lc

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, q [B, Hq, S, D], k and v [B, Hkv, S, D]) -> [B, Hq, S, D]"""


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder."""

    vocabulary: int = 4096
    layers: int = 6
    hidden: int = 256
    intermediate: int = 704
    query_heads: int = 8
    kv_heads: int = 2
    head_dim: int = 32


class Block(nn.Module):
    """One layer: attention, then the SwiGLU network, each on a normalised input."""

    def __init__(self, shape: Shape, layer: int) -> None:
        super().__init__()
        self.layer, self.shape = layer, shape
        heads = shape.query_heads + 2 * shape.kv_heads
        self.attention_norm = nn.RMSNorm(shape.hidden, eps=1e-6)
        self.qkv = nn.Linear(shape.hidden, heads * shape.head_dim, bias=False)
        self.output = nn.Linear(shape.query_heads * shape.head_dim, shape.hidden, bias=False)
        self.network_norm = nn.RMSNorm(shape.hidden, eps=1e-6)
        self.gate_up = nn.Linear(shape.hidden, 2 * shape.intermediate, bias=False)
        self.down = nn.Linear(shape.intermediate, shape.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """[B, S, hidden] -> [B, S, hidden]."""
        query_heads, kv_heads = self.shape.query_heads, self.shape.kv_heads
        heads = self.qkv(self.attention_norm(x)).unflatten(2, (-1, self.shape.head_dim))
        qk, v = heads.transpose(1, 2).split([query_heads + kv_heads, kv_heads], 1)
        # The cache takes queries and keys after the rotary embedding.
        q, k = rotate(qk, cos, sin).split([query_heads, kv_heads], 1)
        x = x + self.output(attend(self.layer, q, k, v).transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.network_norm(x)).chunk(2, 2)
        return x + self.down(F.silu(gate) * up)


class Decoder(nn.Module):
    """A Llama-shaped decoder that knows nothing of caches."""

    frequencies: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(shape.vocabulary, shape.hidden)
        nn.init.normal_(self.embedding.weight, std=shape.hidden**-0.5)
        self.blocks = nn.ModuleList(Block(shape, layer) for layer in range(shape.layers))
        self.norm = nn.RMSNorm(shape.hidden, eps=1e-6)
        frequencies = 10_000.0 ** -(torch.arange(0, shape.head_dim, 2) / shape.head_dim)
        self.register_buffer("frequencies", frequencies.repeat(2), persistent=False)

    def forward(self, tokens: Tensor, start: int, attend: Attend) -> Tensor:
        """Logits after the last of `tokens`, the first of which stands at position `start`.

        Parameters
        ----------
        tokens
            [B, S].
        start
            How many tokens came before.
        attend
            Attention over those and these.

        Returns
        -------
        Tensor
            [B, vocabulary].
        """
        positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)
        angles = positions.unsqueeze(1) * self.frequencies
        cos, sin = angles.cos(), angles.sin()
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, cos, sin, attend)
        return F.linear(self.norm(x[:, -1]), self.embedding.weight)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotary embedding of [B, H, S, D]."""
    first, second = x.chunk(2, dim=3)
    return x * cos + torch.cat([-second, first], dim=3) * sin


def choose(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """The next tokens, [B, 1]: the likeliest at temperature 0, else a draw."""
    if temperature == 0:
        return logits.argmax(1, keepdim=True)
    return torch.multinomial((logits / temperature).softmax(1), 1, generator=generator)


@torch.inference_mode()
def generate(
    decoder: Decoder,
    attend: Attend,
    prompt: Tensor,
    new_tokens: int,
    *,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, float]:
    """The tokens that follow the prompt [B, S], and how long the decode steps took, in seconds."""
    generator = generator or torch.Generator().manual_seed(0)
    tokens = [choose(decoder(prompt, 0, attend), temperature, generator)]
    started = time.perf_counter()
    for step in range(new_tokens - 1):
        logits = decoder(tokens[-1], prompt.shape[1] + step, attend)
        tokens.append(choose(logits, temperature, generator))
    return torch.cat(tokens, 1), time.perf_counter() - started


def main(
    prompt_tokens: int = 1024,
    new_tokens: int = 128,
    batch: int = 4,
    capacity: int = 64,
    rank: int = 8,
    temperature: float = 1.0,
    seed: int = 0,
) -> None:
    """Decode with a LESS cache; the weights are random, so only speed and size mean anything."""
    torch.manual_seed(seed)
    shape = Shape()
    decoder = Decoder(shape).eval()
    prompt = torch.randint(shape.vocabulary, (batch, prompt_tokens))

    config = lc.CacheConfig(
        num_layers=shape.layers,
        query_heads=shape.query_heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        capacity=capacity,
        policy=lc.H2O(),
        rank=rank,
        hidden=128,
    )
    # Trained maps come from `lc.FeatureMaps.from_pretrained(folder)`.
    maps = lc.FeatureMaps.initialise(config) if rank else None
    manager = lc.CacheManager(config, maps)
    state = manager.init(batch)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return manager.attend(state, layer, q, k, v)

    generator = torch.Generator().manual_seed(seed)
    tokens, seconds = generate(
        decoder, attend, prompt, new_tokens, temperature=temperature, generator=generator
    )

    length = prompt_tokens + new_tokens
    full_bytes = 2 * batch * length * shape.layers * shape.kv_heads * shape.head_dim * 4
    print(f"first sequence goes on: {tokens[0, :8].tolist()} ...")
    if new_tokens > 1:
        print(f"decoding: {batch * (new_tokens - 1) / seconds:.0f} tokens/s")
    print(
        f"cache at {length} tokens: {state.nbytes / 1e6:.2f} MB, "
        f"a full one: {full_bytes / 1e6:.2f} MB ({full_bytes / state.nbytes:.1f} times as much)"
    )


if __name__ == "__main__":
    typer.run(main)
