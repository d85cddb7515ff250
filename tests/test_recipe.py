"""`CacheRecipe`: everything of a model's cache in one file, and nothing that does not fit."""

import pytest
import torch

import less_cache as lc
from less_cache.recipe import CARD, FILE
from tests.helpers import random_maps, small_config
from tests.quantization.fitted import fitted, some_tokens

MODEL = {"name": "/home/someone/models/tiny", "model_type": "llama", "vocab_size": 97}


def recipe(kind="calibrated", rank=2, **changes):
    config = small_config(
        num_layers=2,
        capacity=[[7, 11], 5],
        rank=rank,
        policy=lc.DecayedH2O(),
        dtype="float32",
        quantization=None if kind is None else lc.Quantization(3, 4, kind),
    )
    maps = random_maps(config) if rank else None
    transforms = fitted(config) if kind == "calibrated" else None
    return lc.CacheRecipe(config, maps, transforms, model=MODEL, record={"budget": "5%"}, **changes)


@pytest.mark.parametrize("kind", [None, "hadamard", "calibrated"])
@pytest.mark.parametrize("rank", [0, 2])
def test_what_is_saved_is_what_is_read(tmp_path, kind, rank):
    made = recipe(kind, rank)
    made.save_pretrained(tmp_path / "r")
    found = lc.CacheRecipe.from_pretrained(tmp_path / "r")
    assert found.config == made.config
    assert found.record == made.record
    assert (found.maps is None) == (rank == 0)
    if rank:
        assert found.maps.digest == made.maps.digest
    if kind == "calibrated":
        assert found.transforms.digest == made.transforms.digest
    assert found.digest == made.digest
    assert found.model == {**MODEL, "name": "tiny"}
    assert sorted(path.name for path in (tmp_path / "r").iterdir()) == [CARD, FILE]


def test_layers_may_differ_in_rank_and_bits(tmp_path):
    config = small_config(
        num_layers=3,
        rank=[0, 2, 3],
        quantization=[lc.Quantization(3, 3), None, lc.Quantization(4, 2, "calibrated")],
    )
    made = lc.CacheRecipe(config, random_maps(config), fitted(config), model=MODEL)
    made.save_pretrained(tmp_path)
    found = lc.CacheRecipe.from_pretrained(tmp_path)
    assert found.config == config
    assert found.digest == made.digest
    assert [own is None for own in found.maps] == [True, False, False]
    assert [own is None for own in found.transforms] == [True, True, False]
    card = (tmp_path / CARD).read_text()
    assert "rank of the low-rank state: 0 in layer 0, 2 in layer 1, 3 in layer 2" in card
    assert "as they are in layer 1, in 4 and 2 bits (calibrated) in layer 2" in card


def test_a_manager_is_had_from_a_folder(tmp_path):
    made = recipe()
    made.save_pretrained(tmp_path)
    managers = [
        lc.CacheManager.from_pretrained(tmp_path, backend="torch"),
        lc.CacheManager(made.config, made.maps, backend="torch", transforms=made.transforms),
    ]
    outs = []
    for manager in managers:
        state = manager.init(2)
        for index in range(3):
            tokens = [x.float() for x in some_tokens(made.config, 2, 6, index)]
            outs.append(manager.attend(state, 0, *tokens))
    assert all(torch.equal(a, b) for a, b in zip(outs[:3], outs[3:], strict=True))


def test_every_flipped_bit_is_noticed(tmp_path):
    recipe().save_pretrained(tmp_path)
    path = tmp_path / FILE
    whole = path.read_bytes()
    for place in range(8, len(whole), len(whole) // 40):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=str(path)):
            lc.CacheRecipe.from_pretrained(tmp_path)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="truncated"):
        lc.CacheRecipe.from_pretrained(tmp_path)


def test_folders_of_something_else_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        lc.CacheRecipe.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=f"holds no {FILE}"):
        lc.CacheRecipe.from_pretrained(tmp_path)
    made = recipe()
    made.transforms.save(tmp_path / FILE)
    with pytest.raises(ValueError, match=r"format 'less_cache.transforms.1', expected"):
        lc.CacheRecipe.from_pretrained(tmp_path)
    made.maps.save_pretrained(tmp_path / "maps")
    with pytest.raises(FileNotFoundError, match=f"holds feature maps only, no {FILE}; use --maps"):
        lc.CacheRecipe.from_pretrained(tmp_path / "maps")


def test_parts_that_do_not_go_together_are_refused():
    made = recipe()
    with pytest.raises(ValueError, match="maps: got None, but rank = 2"):
        lc.CacheRecipe(made.config, None, made.transforms)
    with pytest.raises(ValueError, match="transforms: got None"):
        lc.CacheRecipe(made.config, made.maps)
    with pytest.raises(TypeError, match="config: got dict"):
        lc.CacheRecipe({})
    with pytest.raises(TypeError, match="record: got str"):
        lc.CacheRecipe(made.config, made.maps, made.transforms, record="5%")


def test_another_model_is_told_by_what_differs():
    made = recipe()
    made.check_model({**MODEL, "name": "moved/elsewhere"})
    with pytest.raises(
        ValueError, match=r"^recipe: made for a model of vocab_size = 97, but this model has 98$"
    ):
        made.check_model({**MODEL, "vocab_size": 98})


def test_the_card_is_for_the_hub_and_names_no_path(tmp_path):
    made = recipe()
    made.record["license"] = "apache-2.0"
    made.save_pretrained(tmp_path)
    card = (tmp_path / CARD).read_text()
    front = card.split("---\n")[1]
    assert 'library_name: "less_cache"' in front
    assert 'base_model: "tiny"' in front
    assert 'license: "apache-2.0"' in front
    assert "slots a head: 5 to 11" in card
    assert "/home" not in card
    assert b"/home" not in (tmp_path / FILE).read_bytes()
