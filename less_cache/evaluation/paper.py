"""The settings of the paper (arXiv 2402.09398) and of its code, and the figures it gives.

Shares are of the model's longest sequence. H2O spends half of a share on heavy hitters and half on
the latest tokens; Λ 0.1 % of the positions on the first tokens and the rest on the latest. The
current token's slot comes on top.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..config import CacheConfig
from ..integrations.introspection import model_shapes
from ..policies import H2O, Policy, SinkWindow

SHARES = (0.02, 0.05, 0.1)
POLICIES = ("h2o", "lambda")
SINKS = 0.001
"""The share of the positions that Λ keeps as first tokens."""
EXTRA_TOKENS = 4
"""What Baseline+ may keep on top: about what a head's low-rank state takes."""


@dataclass(frozen=True)
class Table:
    """One table: what is measured on which data.

    Parameters
    ----------
    name
        What ``--table`` calls it.
    kind
        ``"perplexity"``, ``"summary"`` or ``"harness"``.
    data
        A `datasets` name, its configuration, and its split; empty where lm_eval has the data.
    columns
        Of a row of data: the text; or the article and its summary.
    shots
        Examples before an article.
    sentences
        How many the summary is asked to have.
    """

    name: str
    kind: str
    data: tuple[str, str, str] = ("", "", "")
    columns: tuple[str, ...] = ()
    shots: int = 0
    sentences: int = 1


TABLES = {
    table.name: table
    for table in (
        Table(
            "wikitext",
            "perplexity",
            ("EleutherAI/wikitext_document_level", "wikitext-2-raw-v1", "test"),
            ("page",),
        ),
        Table("pg19", "perplexity", ("emozilla/pg19", "", "test"), ("text",)),
        Table("c4", "perplexity", ("allenai/c4", "en", "validation"), ("text",)),
        Table(
            "cnn",
            "summary",
            ("abisee/cnn_dailymail", "3.0.0", "test"),
            ("article", "highlights"),
            shots=5,
            sentences=3,
        ),
        Table(
            "xsum",
            "summary",
            ("EdinburghNLP/xsum", "", "test"),
            ("document", "summary"),
            shots=5,
        ),
        Table(
            "multinews",
            "summary",
            ("alexfabbri/multi_news", "", "test"),
            ("document", "summary"),
            shots=1,
            sentences=3,
        ),
        Table("lm-eval", "harness"),
    )
}

LLAMA, FALCON = "Llama 2 7B", "Falcon 7B"
FULL, POLICY, BASELINE_PLUS, LESS = "full cache", "policy alone", "Baseline+", "LESS"

PUBLISHED: dict[tuple[str, str, float | None, str], tuple[str, float]] = {
    # Table, policy, share, cache: the model, and the paper's figure of the table's first measure.
    ("wikitext", "", None, FULL): (LLAMA, 8.791),
    ("wikitext", "h2o", 0.02, POLICY): (LLAMA, 13.333),
    ("wikitext", "h2o", 0.02, LESS): (LLAMA, 10.745),
    ("pg19", "", None, FULL): (LLAMA, 23.787),
    ("pg19", "h2o", 0.02, POLICY): (LLAMA, 37.013),
    ("pg19", "h2o", 0.02, LESS): (LLAMA, 32.157),
    ("cnn", "h2o", 0.1, BASELINE_PLUS): (FALCON, 21.31),
    ("cnn", "h2o", 0.1, LESS): (FALCON, 23.22),
}
"""Those that we have at hand; the paper has more."""


def cache_for(
    model_config: Any,
    policy: str,
    share: float,
    *,
    extra: int = 0,
    rank: int = 0,
    dtype: Any = None,
) -> CacheConfig:
    """The cache that the paper's code would use.

    Parameters
    ----------
    model_config
        Of a transformers model.
    policy
        ``"h2o"`` or ``"lambda"``.
    share
        Of the model's longest sequence.
    extra
        Tokens on top; half of them heavy hitters, or all of them late ones.
    rank
        Of the low-rank state; 0: the policy alone.
    dtype
        As of `CacheConfig`.

    Raises
    ------
    ValueError
        If the policy is another, the share none or too small, or the model names no length.
    """
    if policy not in POLICIES:
        raise ValueError(f"policy: got {policy!r}, expected one of {', '.join(POLICIES)}")
    if not 0 < share <= 1:
        raise ValueError(f"share: got {share}, expected one above 0 and at most 1")
    positions = model_shapes(model_config).get("max_positions")
    if positions is None:
        raise ValueError("model: its configuration names no length that shares could be of")

    def tokens(part: float) -> int:
        # Cut as the paper's code does; 0.7 of 10 is 7, whatever its last binary digit says.
        return int(round(part * positions, 6))

    rule: Policy
    if policy == "h2o":
        heavy = tokens(share / 2) + extra // 2
        recent = tokens(share / 2) + extra - extra // 2
        rule = H2O(recent=recent)
    else:
        heavy = tokens(SINKS)
        recent = tokens(share - SINKS) + extra
        rule = SinkWindow(sinks=heavy)
    if recent < 1:
        raise ValueError(f"share: {share} of {positions} positions leaves no token, expected more")
    return CacheConfig.from_model(
        model_config,
        capacity=heavy + recent + 1,
        policy=rule,
        rank=rank,
        **({} if dtype is None else {"dtype": dtype}),
    )


def coded_cache(like: CacheConfig, quantization: Any) -> CacheConfig:
    """As many coded slots as a cache of equal slots has bytes for, its own counted in 16 bits.

    Parameters
    ----------
    like
        From `cache_for`, rank 0.
    quantization
        As of `CacheConfig`.

    Raises
    ------
    ValueError
        If the policy cannot be had with such codes.
    """
    rule = like.policies[0]
    shaped = like.replace(quantization=quantization, dtype="float16")
    slot = sum(layer.kv_heads * layer.slot_bytes for layer in shaped.layers)
    slots = like.bytes_per_sequence("float16") // slot
    if isinstance(rule, H2O):
        rule = H2O(recent=(slots - 1) // 2)
    return like.replace(capacity=slots, policy=rule, quantization=quantization)
