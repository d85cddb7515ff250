"""`Settings`: every limit of the server, checked where it is made."""

from __future__ import annotations

import re
from dataclasses import dataclass

from less_cache._checks import check_int, check_real

HOST = re.compile(r"\*|(\*\.)?[^*:/\s\[\]]+|\[[0-9a-fA-F:.]+\]")
"""A name, a domain's names, any name, or an IPv6 address."""


@dataclass(frozen=True)
class Settings:
    """What the server allows.

    Parameters
    ----------
    max_batch
        Rows: sequences decoded together.
    max_queue
        Prompts that may wait for rows; one more request is answered with 429.
    max_tokens
        New tokens of one answer, at most.
    max_choices
        `n` of a request, at most. A prompt's choices start together, so no more than `max_batch`.
    prefill_chunk
        Prompt tokens taken in between two decode steps. A long prompt delays running streams by
        no more than a chunk of this length.
    max_body
        Bytes of a request's body.
    request_timeout
        Seconds from a request's arrival to its answer's end.
    shutdown_grace
        Seconds that accepted requests have to end once the server was told to stop.
    max_connections
        Open connections; each is a file to the system, which often allows a process 1,024.
    api_key
        What clients must send as their bearer token; ``None`` asks for nothing.
    allowed_hosts
        Names beside the loopback's that requests may call the server by, without a port;
        ``*.example.com`` stands for all in a domain, ``*`` for any.

    Raises
    ------
    TypeError, ValueError
        If a number is not of its kind or out of range.
    """

    max_batch: int = 32
    max_queue: int = 256
    max_tokens: int = 1024
    max_choices: int = 8
    prefill_chunk: int = 128
    max_body: int = 256 * 1024
    request_timeout: float = 120.0
    shutdown_grace: float = 20.0
    max_connections: int = 512
    api_key: str | None = None
    allowed_hosts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("max_batch", "max_queue", "max_tokens", "prefill_chunk", "max_connections"):
            check_int(name, getattr(self, name), minimum=1)
        check_int("max_choices", self.max_choices, minimum=1, maximum=self.max_batch)
        check_int("max_body", self.max_body, minimum=1024)
        check_real("request_timeout", self.request_timeout, above=0.0)
        check_real("shutdown_grace", self.shutdown_grace, above=0.0)
        if self.api_key is not None and not self.api_key.strip():
            raise ValueError("api_key: got nothing but blanks, expected a key or None")
        if self.api_key is not None and self.api_key != self.api_key.strip():
            raise ValueError("api_key: begins or ends with a blank, which no header can carry")
        for host in self.allowed_hosts:
            if not HOST.fullmatch(host):
                raise ValueError(
                    f"allowed_hosts: got {host!r}, expected a name, '*.' and a domain, or '*'"
                )
