"""The paper's tables, measured anew: full cache, policy alone, Baseline+ and LESS at its shares."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from .._files import json_digest, json_text, write_text
from ..feature_maps import FeatureMaps
from ..provenance import codes_text, slots_text
from ..quantization.transforms import Transforms, check_transforms
from ..recipe import CacheRecipe
from ..training.runs import model_digest, transforms_record
from .comparison import coded_name
from .kept import KeptResults
from .paper import (
    BASELINE_PLUS,
    EXTRA_TOKENS,
    FULL,
    LESS,
    POLICIES,
    POLICY,
    PUBLISHED,
    SHARES,
    Table,
    cache_for,
    coded_cache,
)
from .paper_data import Article, Text
from .perplexity import Contestant
from .summaries import NEW_TOKENS, TEMPERATURE, rouge, write_summaries
from .surroundings import surroundings
from .word_perplexity import score_words

TASKS = ("copa", "mathqa", "openbookqa", "piqa", "rte", "winogrande")
"""Those that H2O was judged by."""

PlacedContestant: TypeAlias = "tuple[str, float | None, Contestant]"
"""A cache with its policy and share: "" and ``None`` where it has none of the paper's."""


@dataclass(frozen=True)
class Line:
    """One line of a table.

    Parameters
    ----------
    policy
        ``"h2o"``, ``"lambda"``, or "" for the full cache.
    share
        Of the positions; ``None`` for the full cache.
    cache
        Full, policy alone, Baseline+ or LESS; or the name of one that was given whole.
    slots
        Of a head; ``None`` for the full cache.
    values
        What was measured, by name.
    published
        The paper's model, and its figure of the first measure; ``None`` where we have none at hand.
    """

    policy: str
    share: float | None
    cache: str
    slots: Any
    values: dict[str, float]
    published: tuple[str, float] | None


@dataclass(frozen=True)
class Protocol:
    """How the paper's tables are measured; the defaults are its own.

    Parameters
    ----------
    shares, policies
        Of the caches.
    length
        Tokens that the model reads at once; ``None``: its longest sequence.
    batch
        Stretches, prompts or requests at a time.
    new_tokens, temperature, seed
        Of summaries.
    tasks, include_path, limit
        Of lm_eval: its tasks, a folder of more, how many examples of each.
    """

    shares: tuple[float, ...] = SHARES
    policies: tuple[str, ...] = POLICIES
    length: int | None = None
    batch: int = 1
    new_tokens: int = NEW_TOKENS
    temperature: float = TEMPERATURE
    seed: int = 42
    tasks: tuple[str, ...] = TASKS
    include_path: str | None = None
    limit: int | None = None


def contestants_of(
    model: Any,
    protocol: Protocol,
    maps: Mapping[tuple[str, float | None], FeatureMaps],
    quantization: Any = None,
    transforms: Transforms | None = None,
) -> list[PlacedContestant]:
    """The caches of a table with their policies and shares.

    Parameters
    ----------
    model
        A transformers model.
    protocol
        Which shares and policies.
    maps
        By policy and share; a share of ``None`` stands for all that have no maps of their own.
        Without maps there is no line for LESS.
    quantization
        As of `CacheConfig`: adds lines for as many coded slots as Baseline+ has bytes for.
    transforms
        The bases of such codes, where they are calibrated.

    Raises
    ------
    ValueError
        If a share or a policy is none, or maps or transforms do not fit the model.
    """
    found: list[PlacedContestant] = [("", None, Contestant(FULL))]
    for policy in protocol.policies:
        for share in protocol.shares:
            own = maps.get((policy, share), maps.get((policy, None)))
            dtype = model.dtype
            plain = cache_for(model.config, policy, share, dtype=dtype)
            plus = cache_for(model.config, policy, share, extra=EXTRA_TOKENS, dtype=dtype)
            found.append((policy, share, Contestant(POLICY, plain)))
            found.append((policy, share, Contestant(BASELINE_PLUS, plus)))
            if quantization is not None:
                coded = coded_cache(plus, quantization)
                check_transforms(coded, transforms)
                name = coded_name(quantization)
                found.append((policy, share, Contestant(name, coded, transforms=transforms)))
            if own is not None:
                config = plain.replace(rank=own.rank)
                own.check_against(config)
                found.append((policy, share, Contestant(LESS, config, own)))
    return found


def whole_caches(given: Mapping[str, CacheRecipe], dtype: Any) -> list[PlacedContestant]:
    """The full cache, and caches that were given whole: they follow none of the paper's policies.

    Parameters
    ----------
    given
        By the name that the table uses.
    dtype
        Of the model.
    """
    found: list[PlacedContestant] = [("", None, Contestant(FULL))]
    for name, recipe in given.items():
        config = recipe.config.with_dtype(dtype)
        found.append(("", None, Contestant(name, config, recipe.maps, recipe.transforms)))
    return found


def reproduce(
    model: Any,
    tokenizer: Any,
    table: Table,
    data: Sequence[Text] | Sequence[Article] | None,
    protocol: Protocol,
    maps: Mapping[tuple[str, float | None], FeatureMaps],
    folder: Path,
    *,
    named: str,
    whole: Mapping[str, CacheRecipe] | None = None,
    quantization: Any = None,
    transforms: Transforms | None = None,
    progress: bool = True,
) -> list[Line]:
    """Measure a table, and write ``table.json`` and ``table.md`` into a folder.

    A stopped run goes on from the last cache that was finished.

    Parameters
    ----------
    model, tokenizer
        A transformers model that `attach` takes.
    table
        Of `paper.TABLES`.
    data
        What `paper_data` read; ``None`` for lm_eval's tasks.
    protocol
        How.
    maps
        As of `contestants_of`.
    folder
        Made if need be.
    named
        What the table calls the model.
    whole
        Caches made for the model, by the name that the table uses: they are measured beside the
        full one, in place of the protocol's shares and policies.
    quantization, transforms
        As of `contestants_of`.
    progress
        Show bars.

    Raises
    ------
    ValueError
        If the folder holds another run, or nothing could be measured with such data.
    """
    if whole is None:
        contestants = contestants_of(model, protocol, maps, quantization, transforms)
    else:
        contestants = whole_caches(whole, model.dtype)
    measure, facts = _measure(model, tokenizer, table, data, protocol, progress)
    settings = {
        "table": table.name,
        "model": named,
        "model_digest": model_digest(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        **dataclasses.asdict(protocol),
        "maps": {f"{policy} {share}": own.digest for (policy, share), own in maps.items()},
        **facts,
    }
    if quantization is not None:
        settings["codes"] = codes_text(quantization)
        settings |= transforms_record(transforms)
    if whole is not None:
        settings["caches"] = {name: recipe.digest for name, recipe in whole.items()}
    kept = KeptResults(folder, settings)
    lines = []
    for policy, share, contestant in contestants:
        name = f"{policy} {share} {contestant.name}" if policy else contestant.name
        told = dataclasses.replace(contestant, name=name)
        values = kept.get(name, functools.partial(measure, told))
        config = contestant.config
        lines.append(
            Line(
                policy,
                share,
                contestant.name,
                None if config is None else config.capacity,
                values,
                PUBLISHED.get((table.name, policy, share, contestant.name)),
            )
        )
    result = {**settings, "lines": [dataclasses.asdict(line) for line in lines], **surroundings()}
    write_text(folder / "table.json", json_text(result, indent=2) + "\n")
    write_text(folder / "table.md", as_markdown(lines, table.name, named))
    return lines


def _measure(
    model: Any,
    tokenizer: Any,
    table: Table,
    data: Sequence[Any] | None,
    protocol: Protocol,
    progress: bool,
) -> tuple[Callable[[Contestant], dict[str, float]], dict[str, Any]]:
    """What measures one cache, and the facts on its data."""
    if table.kind == "harness":
        return (lambda told: _harness(model, tokenizer, told, protocol)), {}
    if tokenizer is None:
        raise ValueError("data: is text, which needs the model's tokenizer, and the model has none")
    if data is None:
        raise ValueError(f"data: got None, expected what the table {table.name} reads")
    length = protocol.length or model.config.get_text_config().max_position_embeddings
    told_data = json_digest([vars(entry) for entry in data])
    if table.kind == "perplexity":
        documents = [(_ids(tokenizer, entry.text), entry.words) for entry in data]
        prefix = tokenizer.eos_token_id
        prefix = tokenizer.bos_token_id if prefix is None else prefix
        if prefix is None:
            raise ValueError("model: its tokenizer has no end of text, which begins each document")

        def words(told: Contestant) -> dict[str, float]:
            found = score_words(
                model,
                documents,
                told,
                prefix=prefix,
                length=length,
                batch=protocol.batch,
                progress=progress,
            )
            return {
                "word perplexity": found.word_perplexity,
                "token perplexity": found.token_perplexity,
            }

        counted = {
            "documents": len(data),
            "words": sum(n for _, n in documents),
            "tokens": sum(len(ids) for ids, _ in documents),
        }
        return words, {"data_digest": told_data, **counted}
    prompts = [(_ids(tokenizer, entry.prompt), entry.summary) for entry in data]
    # As the paper's code does: what would not fit is left out, for all caches alike.
    fitting = [(ids, wanted) for ids, wanted in prompts if len(ids) + protocol.new_tokens <= length]
    if not fitting:
        raise ValueError(
            f"data: no prompt has room for {protocol.new_tokens} more of {length} tokens; the "
            f"shortest has {min(len(ids) for ids, _ in prompts)}"
        )

    def summaries(told: Contestant) -> dict[str, float]:
        written = write_summaries(
            model,
            tokenizer,
            [ids for ids, _ in fitting],
            told,
            new_tokens=protocol.new_tokens,
            temperature=protocol.temperature,
            seed=protocol.seed,
            batch=protocol.batch,
            progress=progress,
        )
        return rouge(written, [wanted for _, wanted in fitting])

    counted = {"articles": len(fitting), "left_out": len(prompts) - len(fitting)}
    return summaries, {"data_digest": told_data, **counted}


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _harness(
    model: Any, tokenizer: Any, contestant: Contestant, protocol: Protocol
) -> dict[str, float]:
    from ..integrations.lm_eval import judge_tasks

    return judge_tasks(
        model,
        tokenizer,
        contestant.config,
        contestant.maps,
        transforms=contestant.transforms,
        tasks=protocol.tasks,
        include_path=protocol.include_path,
        limit=protocol.limit,
        batch=protocol.batch,
        max_length=protocol.length,
    )


def as_markdown(lines: Sequence[Line], title: str, named: str) -> str:
    """The table, with the paper's figures beside ours."""
    names = [*lines[0].values]
    cells = [["cache", "slots", *(f"{name}, {named}" for name in names), "the paper's"]]
    cells += [
        [
            line_name(line),
            slots_told(line),
            *(figure(line.values[name]) for name in names),
            published_text(line),
        ]
        for line in lines
    ]
    head = "| " + " | ".join(cells[0]) + " |\n|" + "---|" * len(cells[0])
    body = "\n".join("| " + " | ".join(row) + " |" for row in cells[1:])
    note = (
        f"The paper's figures are of {names[0]} and of the model beside them; an empty cell says "
        "that we have none at hand."
    )
    return f"# {title}\n\n{head}\n{body}\n\n{note}\n"


def line_name(line: Line) -> str:
    """A line's policy, share and cache in words."""
    if line.share is None:
        return line.cache
    policy = {"h2o": "H2O", "lambda": "Λ"}[line.policy]
    return f"{policy} {100 * line.share:g} %, {line.cache}"


def slots_told(line: Line) -> str:
    """A line's slots a head in words."""
    return "all" if line.slots is None else slots_text(line.slots)


def published_text(line: Line) -> str:
    """The paper's figure with its model; "" where we have none at hand."""
    if line.published is None:
        return ""
    model, value = line.published
    return f"{value} ({model})"


def figure(value: float | None) -> str:
    """A figure as tables show it."""
    return "" if value is None else f"{value:,.3f}"
