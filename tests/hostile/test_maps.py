"""Feature maps from spoilt tensors, and folders of them that are damaged or tell lies."""

import functools
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import less_cache as lc
from less_cache.maps_io import CARD, WEIGHTS
from tests.helpers import random_maps, small_config, tensors_of, torch_inputs

from .arrays import ODDITIES, REFUSED, TAKEN
from .files import DAMAGES, TENSOR_WAYS, VALUES, changed_at, contents, places, sign
from .rule import Refusal, files_below, outcome, refused

EXAMPLES = 40
CONFIG = small_config()
KINDS = ("paper", "exp")


@functools.cache
def saved(kind):
    maps = random_maps(CONFIG, kind)
    with tempfile.TemporaryDirectory() as folder:
        maps.save_pretrained(folder)
        return maps, (Path(folder) / WEIGHTS).read_bytes()


def check_load(folder):
    """Load by the rule; maps that were loaded have to serve as well as the reference."""
    found = outcome(
        lambda: lc.FeatureMaps.from_pretrained(folder),
        *(str(folder), "layers"),
        unchanged=lambda: files_below(folder),
    )
    if isinstance(found, Refusal):
        return found
    outs = []
    for backend in ("torch", "reference"):
        manager = lc.CacheManager(small_config(dtype="float64"), found, backend=backend)
        state = manager.init(1)
        call = [x.double() for x in torch_inputs(CONFIG, 1, 12)]
        manager.attend(state, 0, *call)
        outs.append(manager.attend(state, 0, *call))
    torch.testing.assert_close(*outs, rtol=1e-6, atol=1e-6)
    return found


@given(kind=st.sampled_from(KINDS), damage=DAMAGES)
def test_damaged_bytes(kind, damage):
    maps, whole = saved(kind)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / WEIGHTS).write_bytes(damage(whole))
        found = check_load(folder)
        if (folder / WEIGHTS).read_bytes() == whole:
            assert found.digest == maps.digest
        else:
            assert isinstance(found, Refusal), "taken, though a byte differs"


@pytest.mark.parametrize("way", TENSOR_WAYS)
@given(kind=st.sampled_from(KINDS), seed=st.integers(0, 2**31), data=st.data())
def test_tensors_that_were_signed_anew(way, kind, seed, data):
    _, whole = saved(kind)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / WEIGHTS).write_bytes(whole)
        header, tensors = contents(folder / WEIGHTS)
        name = data.draw(st.sampled_from(sorted(tensors)))
        spoilt = TENSOR_WAYS[way](tensors[name], np.random.default_rng(seed))
        sign(folder / WEIGHTS, header, {**tensors, name: spoilt})
        # A number that is large but finite gives large features.
        if way == "poked" and bool((spoilt.abs() > 1e3).any()) and bool(spoilt.isfinite().all()):
            return
        found = check_load(folder)
        if spoilt.shape != tensors[name].shape or not bool(spoilt.isfinite().all()):
            assert isinstance(found, Refusal)


@given(kind=st.sampled_from(KINDS), value=VALUES, data=st.data())
def test_cards_that_were_signed_anew(kind, value, data):
    maps, whole = saved(kind)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / WEIGHTS).write_bytes(whole)
        header, tensors = contents(folder / WEIGHTS)
        card = json.loads(header["card"])
        place = data.draw(st.sampled_from([*places(card), ("training",)]))
        how = data.draw(st.sampled_from(["value", "remove", "text", "deep"]))
        if how in ("value", "remove"):
            changed = changed_at(card, place, value, remove=how == "remove")
            header["card"] = json.dumps(changed)
        else:
            header["card"] = "[" * 100_000 if how == "deep" else str(value)
        if data.draw(st.booleans()):
            # As format 1 had it: a card in a file of its own.
            (folder / CARD).write_text(header.pop("card"))
        sign(folder / WEIGHTS, header, tensors)
        found = check_load(folder)
        if not isinstance(found, Refusal):
            assert found.digest == maps.digest


@pytest.mark.parametrize("way", [way for way in REFUSED if way not in ("half", "float8")])
@given(kind=st.sampled_from(KINDS), data=st.data())
def test_spoilt_tensors(way, kind, data):
    good = tensors_of(kind)
    name = data.draw(st.sampled_from(sorted(good)))
    if way in ("list", "numpy"):
        return
    spoilt = REFUSED[way](good[name])
    refused(lambda: lc.FeatureMaps.from_tensors([{**good, name: spoilt}]), "layers")


@pytest.mark.parametrize("way", TAKEN)
def test_tensors_in_other_forms_are_the_same_maps(way):
    for kind in KINDS:
        good = tensors_of(kind)
        same = {name: TAKEN[way](tensor) for name, tensor in good.items()}
        wanted = lc.FeatureMaps.from_tensors([good]).digest
        assert lc.FeatureMaps.from_tensors([same]).digest == wanted


@given(odd=st.sampled_from(ODDITIES))
def test_oddities(odd):
    maps, good = random_maps(CONFIG), tensors_of()
    for names, call in {
        ("layers",): lambda: lc.FeatureMaps.from_tensors(odd),
        # None is a layer without maps, but not all of them.
        ("layers[0]", "layers: got none"): lambda: lc.FeatureMaps.from_tensors([odd]),
        ("layers[0].phi_w1",): lambda: lc.FeatureMaps.from_tensors([{**good, "phi_w1": odd}]),
        ("layers[0]", ""): lambda: lc.FeatureMaps.from_tensors([{**good, "x": odd}]),
        ("config",): lambda: lc.FeatureMaps.initialise(odd),
        ("config", "maps"): lambda: maps.check_against(odd),
        ("generator",): lambda: lc.FeatureMaps.initialise(
            CONFIG, generator=3 if odd is None else odd
        ),
    }.items():
        refused(call, *names)
    for names, call in {
        ("kind",): lambda: lc.FeatureMaps.from_tensors([good], kind=odd),
        ("hidden",): lambda: lc.FeatureMaps.initialise(CONFIG, hidden=odd),
        ("dtype",): lambda: maps.to(dtype=odd),
        ("rank", "world"): lambda: maps.shard(odd, 2),
        ("world",): lambda: maps.shard(0, odd),
        (str(odd), "name", "folder", "."): lambda: lc.FeatureMaps.from_pretrained(odd),
        (str(odd), "folder", "."): lambda: lc.FeatureMaps.from_official(odd),
    }.items():
        found = outcome(call, *names)
        assert isinstance(found, Refusal) or odd is None or odd in (0, 1, 3, torch.float32)


def test_official_checkpoints_of_anything(tmp_path):
    for content in (b"", b"x" * 99, b"\x80\x04N.", b"PK\x03\x04" + b"\0" * 99):
        (tmp_path / "layer_0.pth").write_bytes(content)
        refused(lambda: lc.FeatureMaps.from_official(tmp_path), str(tmp_path))
    for data in ODDITIES:
        if isinstance(data, torch.Tensor) or data is None:
            for inner in (data, {"model_state_dict": data}, {"model_state_dict": {"x": data}}):
                torch.save(inner, tmp_path / "layer_0.pth")
                refused(lambda: lc.FeatureMaps.from_official(tmp_path), str(tmp_path))
