"""Models that come in something: PEFT's wrappers, what torch.compile makes, and what is neither."""

import pytest
import torch
from torch import nn

import less_cache as lc
from less_cache.integrations.transformers.teacher_forcing import small_cache_logits
from tests.integrations.models import build, less, prompts

GREEDY = {"do_sample": False, "eos_token_id": None, "max_new_tokens": 6}


class LowRankLinear(nn.Module):
    """A linear layer as LoRA leaves it."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base_layer(x) + self.up(self.down(x))


class LikePeft(nn.Module):
    """A `PeftModel`: it calls the forward of the model it holds, not the model."""

    def __init__(self, model):
        super().__init__()
        for layer in model.model.layers:
            layer.self_attn.q_proj = LowRankLinear(layer.self_attn.q_proj)
        self.base_model = model

    def get_base_model(self):
        return self.base_model

    def forward(self, *args, **kwargs):
        return self.base_model.forward(*args, **kwargs)

    def generate(self, *args, **kwargs):
        return self.base_model.generate(*args, **kwargs)


@pytest.mark.parametrize("compiled", [False, True], ids=["peft", "compiled peft"])
def test_a_peft_model(compiled):
    model = build("llama")
    config, maps = less(model)
    ids, _ = prompts([17])
    peft = LikePeft(model)
    with torch.no_grad(), lc.attach(model, config, maps, scoring=True):
        expected = model(ids).logits, model.generate(ids, **GREEDY)
    given = torch.compile(peft, backend="eager") if compiled else peft
    with torch.no_grad(), lc.attach(given, config, maps, scoring=True) as handle:
        assert handle.model is model
        torch.testing.assert_close(peft(ids).logits, expected[0])
        assert torch.equal(peft.generate(ids, **GREEDY), expected[1])
        with pytest.raises(ValueError, match="already attached"):
            lc.attach(peft, config, maps)
    with lc.attach(peft, config, maps), pytest.warns(lc.FullAttentionWarning):
        peft(ids)
    found = small_cache_logits(peft, config, list(maps), ids)
    torch.testing.assert_close(found, expected[0], atol=1e-4, rtol=1e-4)
    with lc.attach(peft, config, maps, scoring=True):
        peft(ids, labels=ids).loss.backward()
    assert model.model.layers[0].self_attn.q_proj.up.weight.grad.abs().sum() > 0


def test_anything_else_is_named():
    model = build("llama")
    config, maps = less(model)
    for wrong, name in [
        (nn.DataParallel(model), "DataParallel"),
        (torch.compile(nn.Linear(2, 2), backend="eager"), "Linear"),
        ("meta-llama/Llama-3.2-1B", "str"),
        (LikePeft, "type"),
    ]:
        with pytest.raises(TypeError, match=rf"model: got {name}, expected a transformers model"):
            lc.attach(wrong, config, maps)
