"""What the compiler leaves of the order of reads and writes: seen in PTX, without a GPU."""

import re

from tests.backends.triton.compiling import run

PTX = """
import less_cache as lc
from less_cache.backends.triton.aot.compiling import compile_kernel, signature
from less_cache.backends.triton.aot.variants import Variant, launches_of
from less_cache.backends.triton.launch import recording

with recording() as launches:
    launches_of(Variant(policy=lc.{policy}(), rank={rank}, head_dim=64))
wanted = next(w for w in launches if w.kernel.__name__ == "attend")
print(compile_kernel(wanted, signature(wanted), 90).asm["ptx"])
"""


def ptx_of(folder, policy, rank):
    result = run(["-c", PTX.format(policy=policy, rank=rank)], folder)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def between(ptx, read, write):
    """The instructions from the last such read before each such write, up to that write."""
    lines = [line.strip() for line in ptx.splitlines()]
    found = []
    for end, line in enumerate(lines):
        if re.search(write, line):
            reads = [i for i, earlier in enumerate(lines[:end]) if re.search(read, earlier)]
            if reads:
                found.append(lines[reads[-1] : end])
    return found


def test_every_thread_has_read_the_history_before_one_writes_it(tmp_path):
    # Bits of history are the only numbers of 64 bits that are read or written.
    ptx = ptx_of(tmp_path, "Scissorhands", 0)
    spans = between(ptx, r"ld\.global\S*\.(v\d\.)?b64", r"st\.global\S*\.(v\d\.)?b64")
    assert spans
    for span in spans:
        assert any("bar.sync" in line for line in span), span[:3]
