"""A tuning of a tiny model on a little text."""

import torch

import less_cache as lc
from less_cache.tuning import Effort, tune
from tests.integrations.models import build

EFFORT = Effort(calibration=4, measuring=2, fitting=9, validation=2, steps=2, batch=2)
LENGTH = 40


def text(count=14):
    draw = torch.Generator().manual_seed(0)
    return torch.randint(3, 90, (count, LENGTH), generator=draw)


def run(out, budget="60%", **changes):
    given = {"effort": EFFORT, "policies": [lc.SinkWindow(1)], "ranks": [1], "progress": False}
    return tune(build("llama"), text(), budget, out, context=LENGTH, **(given | changes))
