"""Which folder is served: a model exported with a whole cache, once for each pair of them."""

import pytest
import torch

import less_cache as lc
from examples.serve import __main__ as command
from examples.serve import model as serving
from exporters.common.manifest import MANIFEST
from less_cache import reference_model
from less_cache.integrations.introspection import description
from tests.integrations.models import build, less


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A model and caches for it and for another; exports are noted, and leave a manifest."""
    made = []

    def export(decoder, config, maps, folder, *, tokenizer, transforms, force):
        made.append((config, maps, transforms))
        folder.mkdir(parents=True)
        (folder / MANIFEST).write_text("{}")

    monkeypatch.setattr(serving, "export_decoder", export)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    model = build("llama")
    model.save_pretrained(tmp_path / "tiny")
    reference_model.load()[1].save_pretrained(tmp_path / "tiny")
    for name, family, capacity in (("a", "llama", 6), ("b", "llama", 7), ("other", "qwen2", 6)):
        config, maps = less(model, capacity=capacity)
        told = description(build(family).config)
        lc.CacheRecipe(config, maps, model=told).save_pretrained(tmp_path / name)
    return tmp_path, made


def test_a_model_is_exported_once_with_each_cache(place):
    folder, made = place
    first = serving.folder_with(str(folder / "a"), folder / "tiny")
    assert first.parent == folder / "home" / "less_cache"
    assert first.name.startswith(f"tiny-{lc.__version__}-")
    assert serving.folder_with(str(folder / "a"), folder / "tiny") == first
    assert serving.folder_with(str(folder / "b"), folder / "tiny") != first
    assert [config.capacity for config, _, _ in made] == [6, 7]
    wanted = lc.CacheRecipe.from_pretrained(folder / "a")
    assert made[0][1].digest == wanted.maps.digest
    assert made[0][0] == wanted.config
    # Other weights of the same shapes.
    changed = build("llama", seed=1)
    changed.save_pretrained(folder / "tiny")
    assert serving.folder_with(str(folder / "a"), folder / "tiny") != first


def test_what_cannot_be_served_with_a_cache_is_refused(place):
    folder, made = place
    with pytest.raises(ValueError, match=r"made for a model of .*model_type = 'qwen2'"):
        serving.folder_with(str(folder / "other"), folder / "tiny")
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        serving.folder_with(str(folder / "nowhere"), folder / "tiny")
    exported = serving.folder_with(str(folder / "a"), folder / "tiny")
    with pytest.raises(ValueError, match=r"^cache: got .* was exported with its own"):
        serving.folder_with(str(folder / "a"), exported)
    assert len(made) == 1


def test_the_command_serves_the_shipped_model_with_a_cache_that_ships(place, monkeypatch):
    folder, made = place
    config = lc.CacheConfig(
        6, 4, 4, 64, capacity=20, policy=lc.SinkWindow(), rank=0,
        quantization=lc.Quantization(3, 3),
    )  # fmt: skip
    monkeypatch.setattr(reference_model, "TUNED", folder / "tuned")
    lc.CacheRecipe(config).save_pretrained(folder / "tuned" / "5-percent")

    def served(folder, **named):
        raise KeyboardInterrupt(folder, named["name"])

    monkeypatch.setattr(command, "ServedModel", served)
    with pytest.raises(KeyboardInterrupt) as seen:
        command.main(cache="reference:5%")
    where, name = seen.value.args
    assert name == serving.SHIPPED
    assert where.name.startswith(serving.SHIPPED)
    assert made[0][0] == config.with_dtype(torch.float32)
