"""Chat with a folder of engines: a prompt, and another turn that goes on from the same state.

python examples/tensorrt/run.py ENGINES --tokenizer EXPORTED --prompt "Once upon a time"
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer

from exporters.tensorrt import Sampler, TensorRTDecoder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("engines", type=Path, help="what less-cache export tensorrt wrote")
    parser.add_argument("--tokenizer", type=Path, required=True, help="the exported ONNX folder")
    parser.add_argument("--prompt", action="append", required=True, help="one for each turn")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0)
    given = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(given.tokenizer)
    decoder = TensorRTDecoder(given.engines)
    state = decoder.new_state(1)
    print(f"{state.nbytes:,} bytes of cache, at any length")
    left: list[int] = []
    for prompt in given.prompt:
        # The token that a turn ended with is not in the state yet: the next turn begins with it.
        ids = np.array([[*left, *tokenizer(prompt)["input_ids"]]])
        steps = decoder.stream(
            ids,
            max_new_tokens=given.max_new_tokens,
            state=state,
            sampler=Sampler(temperature=given.temperature, seed=0),
        )
        tokens = [int(step.tokens[0]) for step in steps]
        print(prompt + tokenizer.decode(tokens))
        left = tokens[-1:]


if __name__ == "__main__":
    main()
