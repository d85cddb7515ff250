"""``less-cache calibrate``: bases for coded pairs, fitted to a model on some text."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import torch
import typer

from .loading import check_machine, load_model, tokens_for
from .options import (
    SHIPPED,
    DataOption,
    DeviceOption,
    DtypeOption,
    LengthOption,
    ModelOption,
    SequencesOption,
    check_out,
)
from .quantized import (
    BitsOption,
    KeyBitsOption,
    ValueBitsOption,
    parse_bits,
    transforms_file,
)
from .telling import say

SEQUENCES, LENGTH = 24, 2048
"""At most, where nothing is asked for: second moments of a head's channels need no more."""


def calibrate(
    data: DataOption,
    out: Annotated[Path, typer.Option(help="FILE.safetensors, or a folder for it.")],
    model: ModelOption = SHIPPED,
    bits: BitsOption = None,
    key_bits: KeyBitsOption = None,
    value_bits: ValueBitsOption = None,
    length: LengthOption = None,
    sequences: SequencesOption = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences a pass.")] = 4,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = "float32",
) -> None:
    """Fit the bases in which pairs are coded to text: one pass, for --transforms.

    3 bits where none are named; 24 sequences of at most 2048 tokens where there are as many.
    """
    from ..config import CacheConfig
    from ..policies import FullCache
    from ..quantization import Quantization
    from ..training import calibrate as run
    from ..training.data import read_documents

    chosen = parse_bits(bits, key_bits, value_bits) or (3, 3)
    quantization = Quantization(*chosen, "calibrated")
    file = transforms_file(out)
    check_out(file.parent)
    if file.is_dir():
        raise ValueError(f"out: {file} is a folder, expected a file or none")
    check_machine(device, dtype)
    documents = read_documents(data)
    loaded, tokenizer = load_model(model, device, dtype)
    # The slots are no matter: bases are the same for any number.
    config = CacheConfig.from_model(
        loaded.config,
        capacity=1,
        policy=FullCache(),
        rank=0,
        quantization=quantization,
        dtype=loaded.dtype,
    )
    if length is None and config.max_positions is not None:
        length = min(config.max_positions, LENGTH)
    tokens = tokens_for(loaded, tokenizer, documents, config, length, sequences)
    if sequences is None and len(tokens) > SEQUENCES:
        tokens = tokens[torch.linspace(0, len(tokens) - 1, SEQUENCES).round().long()]
    transforms = run(loaded, config, tokens, batch=batch)
    transforms.save(file)
    plain = config.replace(quantization=None, dtype="float16")
    slot, sixteen = config.layer(0).slot_bytes, plain.layer(0).slot_bytes
    say(f"A slot of a head takes {slot} bytes, where one of 16 bits a number takes {sixteen}.")
    say(f"Transforms: {file}. Next:")
    words = ["less-cache", "eval", "--model", model, "--transforms", str(file)]
    say(shlex.join([*words, "--capacity", "0.25"]))
