"""Many clients at once, half of them hanging up midway: ``python -m examples.serve.load``.

Starts the server on the shipped model, asks each prompt alone for its greedy answer, then sends all
of them at once, a few rounds. Each client compares what it gets with its own answer, so that one
that was meant for another shows. Afterwards every row has to be free, and memory where it was.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated

import httpx
import psutil
import typer
from openai import AsyncOpenAI
from rich.console import Console
from rich.table import Table

from less_cache import reference_model

from .model import SHIPPED

STARTUP_SECONDS = 120.0


@dataclass
class Round:
    """What the clients of one round saw.

    Attributes
    ----------
    complete, hung_up, wrong : int
        Clients that read all of their answer, that left midway, that got another text than theirs.
    tokens : int
        That were read.
    seconds : float
        From the first request to the last answer.
    first_token : list of float
        Seconds, one a client.
    """

    complete: int = 0
    hung_up: int = 0
    wrong: int = 0
    tokens: int = 0
    seconds: float = 0.0
    first_token: list[float] = field(default_factory=list)


def make_prompts(count: int) -> list[str]:
    """Beginnings of different lengths out of the held-out modules, all different."""
    texts = [document.text for document in reference_model.held_out_documents()]
    prompts = []
    for i in range(count):
        text = texts[i % len(texts)]
        start = 700 + 331 * (i // len(texts))
        prompts.append(text[start : start + 60 + 37 * (i % 11)])
    return prompts


async def alone(client: AsyncOpenAI, model: str, prompts: list[str], tokens: int) -> list[str]:
    """Each prompt's greedy answer, asked for one by one."""
    answers = []
    for prompt in prompts:
        answer = await client.completions.create(
            model=model, prompt=prompt, max_tokens=tokens, temperature=0
        )
        answers.append(answer.choices[0].text)
    return answers


async def together(
    client: AsyncOpenAI,
    model: str,
    prompts: list[str],
    expected: list[str],
    tokens: int,
    *,
    hang_up: bool = True,
) -> Round:
    """All prompts at once; with `hang_up`, every other client leaves amid its answer."""
    result = Round()
    started = time.perf_counter()

    async def one(index: int) -> None:
        leaves_after = len(expected[index]) // 2 if hang_up and index % 2 else None
        asked = time.perf_counter()
        stream = await client.completions.create(
            model=model,
            prompt=prompts[index],
            max_tokens=tokens,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
        text = ""
        async with stream:
            async for chunk in stream:
                if not text:
                    result.first_token.append(time.perf_counter() - asked)
                if chunk.choices:
                    text += chunk.choices[0].text
                if chunk.usage is not None:
                    result.tokens += chunk.usage.completion_tokens
                if leaves_after is not None and len(text) > leaves_after:
                    break
        right = expected[index].startswith(text) if leaves_after else text == expected[index]
        result.wrong += not right
        result.hung_up += leaves_after is not None
        result.complete += leaves_after is None

    await asyncio.gather(*(one(index) for index in range(len(prompts))))
    result.seconds = time.perf_counter() - started
    return result


async def settled(url: str, seconds: float = 10.0) -> dict[str, float]:
    """``/stats`` once nothing runs or waits any more, or when the time is over."""
    async with httpx.AsyncClient() as http:
        until = time.perf_counter() + seconds
        while True:
            stats: dict[str, float] = (await http.get(f"{url}/stats")).json()
            free = stats["rows_running"] == 0 and stats["queue"] == 0
            if free or time.perf_counter() > until:
                return stats
            await asyncio.sleep(0.05)


@contextlib.contextmanager
def server(*options: str) -> Iterator[tuple[str, psutil.Process]]:
    """A server in a process of its own: its address, and the process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "examples.serve", "--port", str(port), *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        until = time.perf_counter() + STARTUP_SECONDS
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{url}/healthz").status_code == 200:
                    break
            if process.poll() is not None or time.perf_counter() > until:
                raise RuntimeError(f"{' '.join(command)}: did not start")
            time.sleep(0.1)
        yield url, psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(60)


async def measure(url: str, process: psutil.Process, clients: int, rounds: int, tokens: int) -> int:
    """Run it and print the table; how many answers were wrong or rows not freed."""
    console = Console()
    prompts = make_prompts(clients)
    client = AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=600, max_retries=0)

    started = time.perf_counter()
    expected = await alone(client, SHIPPED, prompts, tokens)
    seconds = time.perf_counter() - started
    console.print(
        f"One client: {clients * tokens / seconds:,.0f} tokens/s, "
        f"{len(set(expected))} different answers to {clients} prompts."
    )
    everyone = await together(client, SHIPPED, prompts, expected, tokens, hang_up=False)
    console.print(
        f"{clients} clients, nobody leaves: {everyone.tokens / everyone.seconds:,.0f} tokens/s, "
        f"{everyone.wrong} wrong answers."
    )

    table = Table(title=f"{clients} clients at once, every other one hangs up midway")
    columns = (
        "round",
        "complete",
        "hung up",
        "wrong",
        "rows left",
        "seconds",
        "first token",
        "RSS",
    )
    for name in columns:
        table.add_column(name, justify="right")
    bad = everyone.wrong
    for number in range(1, rounds + 1):
        seen = await together(client, SHIPPED, prompts, expected, tokens)
        stats = await settled(url)
        median = sorted(seen.first_token)[len(seen.first_token) // 2]
        left = int(stats["rows_running"] + stats["queue"])
        bad += seen.wrong + left
        table.add_row(
            *map(str, (number, seen.complete, seen.hung_up, seen.wrong, left)),
            f"{seen.seconds:.2f}",
            f"{median:.2f} s",
            f"{process.memory_info().rss / 2**20:.1f} MiB",
        )
    console.print(table)
    await client.close()
    return bad


def main(
    clients: Annotated[int, typer.Option(help="At once.")] = 200,
    rounds: Annotated[int, typer.Option(help="One after the other.")] = 6,
    tokens: Annotated[int, typer.Option(help="Of each answer.")] = 64,
    max_batch: Annotated[int, typer.Option(help="Rows of the server.")] = 32,
) -> None:
    """Test the server under load."""
    with server("--max-batch", str(max_batch)) as (url, process):
        if asyncio.run(measure(url, process, clients, rounds, tokens)):
            sys.exit("An answer was wrong, or a row was not freed.")


if __name__ == "__main__":
    typer.run(main)
