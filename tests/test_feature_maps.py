"""Feature maps: how they are made, their files, the hub, and the official code's checkpoints."""

import argparse
import io
import json
import math
import os
import pickle
import types

import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import less_cache as lc
from less_cache import _tensor_files
from less_cache._tensor_files import read_tensors
from less_cache.layer_maps import tensor_shapes
from less_cache.maps_io import CARD, WEIGHTS
from tests.helpers import random_maps, small_config, tensors_of


def without(name):
    tensors = tensors_of()
    del tensors[name]
    return tensors


def with_value(name, value):
    return {**tensors_of(), name: value}


def spoilt(value):
    tensor = tensors_of()["psi_w2"].clone()
    tensor[0, 0, 0] = value
    return tensor


BAD = {
    "no-layers": (ValueError, "layers", []),
    "not-a-dict": (TypeError, r"layers\[0\]", [[1, 2]]),
    "missing": (ValueError, r"layers\[0\].*psi_s2", [without("psi_s2")]),
    "unknown": (ValueError, r"layers\[0\].*phi_w3", [with_value("phi_w3", torch.zeros(1))]),
    "empty": (ValueError, r"layers\[0\]", [{}]),
    "second-layer": (ValueError, r"layers\[1\]", [tensors_of(), {}]),
    "mixed-kinds": (ValueError, r"layers\[1\]", [tensors_of(), tensors_of("exp")]),
    "integers": (TypeError, "phi_w1", [with_value("phi_w1", torch.zeros(4, 4, 6).long())]),
    "two-dims": (ValueError, "phi_w1", [with_value("phi_w1", torch.zeros(4, 6))]),
    "other-hidden": (ValueError, "phi_w2", [with_value("phi_w2", torch.zeros(4, 5, 2))]),
    "other-heads": (ValueError, "psi_w2", [with_value("psi_w2", torch.zeros(4, 6, 2))]),
    "other-rank": (ValueError, "psi_w3", [with_value("psi_w3", torch.zeros(2, 3, 3))]),
    "other-scales": (ValueError, "psi_s1", [with_value("psi_s1", torch.zeros(2, 1, 2))]),
    "nan": (ValueError, "psi_w2", [with_value("psi_w2", spoilt(float("nan")))]),
    "infinite": (ValueError, "psi_w2", [with_value("psi_w2", spoilt(float("inf")))]),
}


@pytest.mark.parametrize(("error", "message", "layers"), BAD.values(), ids=BAD)
def test_bad_tensors_are_refused_by_name(error, message, layers):
    with pytest.raises(error, match=message):
        lc.FeatureMaps.from_tensors(layers)


def test_a_kind_must_be_known_and_fit_the_tensors():
    with pytest.raises(ValueError, match=r"^kind: "):
        lc.FeatureMaps.from_tensors([tensors_of()], kind="relu")
    with pytest.raises(ValueError, match="kind 'exp'"):
        lc.FeatureMaps.from_tensors([tensors_of("paper")], kind="exp")
    assert lc.FeatureMaps.from_tensors([tensors_of("exp")]).kind == "exp"
    assert lc.FeatureMaps.from_tensors([tensors_of("paper")]).kind == "paper"


def test_arrays_of_numpy_will_do():
    tensors = tensors_of()
    given = {name: tensor.numpy() for name, tensor in tensors.items()}
    maps = lc.FeatureMaps.from_tensors([given])
    assert maps.digest == lc.FeatureMaps.from_tensors([tensors]).digest


@pytest.mark.parametrize("kind", ["paper", "exp"])
def test_untrained_maps_have_the_shapes_and_start_close_to_nothing(kind):
    config = small_config()
    maps = lc.FeatureMaps.initialise(config, kind=kind, hidden=16)
    maps.check_against(config)
    assert maps.kind == kind
    assert maps[0].hidden == 16
    assert maps[0].psi(torch.randn(2, 2, 50, 4)).mean() < 0.1
    again = lc.FeatureMaps.initialise(config, kind=kind, hidden=16)
    assert again.digest == maps.digest
    generator = torch.Generator().manual_seed(1)
    other = lc.FeatureMaps.initialise(config, kind=kind, hidden=16, generator=generator)
    assert other.digest != maps.digest
    assert lc.FeatureMaps.initialise(small_config(hidden=9))[0].hidden == 9
    assert lc.FeatureMaps.initialise(config)[0].hidden == 512


@pytest.mark.parametrize("hidden", [0, -1, True, 2.5, [], "8"])
def test_a_hidden_size_is_a_positive_integer(hidden):
    with pytest.raises((ValueError, TypeError), match="hidden"):
        lc.FeatureMaps.initialise(small_config(), hidden=hidden)


def test_maps_without_a_rank_are_not_made():
    with pytest.raises(ValueError, match=r"^config: rank is 0"):
        lc.FeatureMaps.initialise(small_config(rank=0))
    with pytest.raises(ValueError, match=r"^kind: "):
        lc.FeatureMaps.initialise(small_config(), kind="tanh")


def test_a_layer_of_rank_0_has_no_maps(tmp_path):
    config = small_config(num_layers=3, rank=[0, 2, 0])
    maps = lc.FeatureMaps.initialise(config, kind="paper", hidden=6)
    assert [own is None for own in maps] == [True, False, True]
    assert (maps.kind, maps.rank, len(maps)) == ("paper", (0, 2, 0), 3)
    assert "rank=(0, 2, 0)" in repr(maps)
    maps.check_against(config)
    maps.save_pretrained(tmp_path / "saved")
    read = lc.FeatureMaps.from_pretrained(tmp_path / "saved")
    parts = lc.FeatureMaps.from_parts("here", *maps.to_parts())
    given = lc.FeatureMaps.from_tensors([own and own.tensors for own in maps])
    for other in (read, parts, given, maps.to("cpu")):
        assert other.digest == maps.digest
        assert other.rank == maps.rank
    # The same maps, of another layer, or of one layer alone, are others.
    for layers in ((None, None, maps[1]), (None, maps[1]), (maps[1],)):
        assert lc.FeatureMaps(layers).digest != maps.digest
    shard = maps.shard(1, 2)
    assert shard.rank == (0, 2, 0)
    shard.check_against(config.shard(1, 2))


def test_ranks_may_differ(tmp_path):
    config = small_config(rank=[3, 2])
    maps = random_maps(config)
    maps.check_against(config)
    assert maps.rank == (3, 2)
    maps.save_pretrained(tmp_path)
    assert lc.FeatureMaps.from_pretrained(tmp_path).digest == maps.digest
    with pytest.raises(ValueError, match="maps: layer 0 has rank = 3, expected 2"):
        maps.check_against(config.replace(rank=2))


def test_maps_that_a_layer_lacks_or_cannot_use_are_refused():
    whole, first = random_maps(small_config()), small_config(rank=[2, 0])
    with pytest.raises(ValueError, match="maps: layer 1 has some, but its rank is 0"):
        whole.check_against(first)
    with pytest.raises(ValueError, match="maps: layer 1 has none, but its rank is 2"):
        lc.CacheManager(small_config(), random_maps(first))
    with pytest.raises(ValueError, match=r"maps: got None, but rank = \(2, 0\)"):
        lc.CacheManager(first)
    with pytest.raises(ValueError, match="layers: got none"):
        lc.FeatureMaps.from_tensors([None, None])


def test_digests_are_those_of_earlier_versions():
    shapes = tensor_shapes("exp", query_heads=2, kv_heads=1, head_dim=2, hidden=3, rank=2)
    layer = {n: torch.arange(math.prod(s)).view(s) / 4 for n, s in shapes.items()}
    maps = lc.FeatureMaps.from_tensors([layer, layer])
    assert maps.digest == "87f4069ff5fe97b94eeff2b1fa8aea0d207ea5a6efe23af66dc57e40b69d0ba4"


def test_a_digest_tells_maps_apart():
    one = lc.FeatureMaps.from_tensors([tensors_of()])
    changed = tensors_of()
    changed["psi_s2"] = changed["psi_s2"] + 1e-6
    assert one.digest == lc.FeatureMaps.from_tensors([tensors_of()]).digest
    assert one.digest != lc.FeatureMaps.from_tensors([changed]).digest
    assert one.digest != lc.FeatureMaps.from_tensors([tensors_of(), tensors_of()]).digest


# Files.


@pytest.mark.parametrize("kind", ["paper", "exp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_saved_maps_come_back_bit_for_bit(tmp_path, kind, dtype):
    tensors = {name: tensor.to(dtype) for name, tensor in tensors_of(kind).items()}
    maps = lc.FeatureMaps.from_tensors(
        [tensors, tensors], model_id="someone/model", record={"steps": 3, "loss": [0.5, 0.25]}
    )
    maps.save_pretrained(tmp_path / "maps")
    loaded = lc.FeatureMaps.from_pretrained(tmp_path / "maps")
    assert loaded.kind == kind
    assert loaded.model_id == "someone/model"
    assert loaded.record == {"steps": 3, "loss": [0.5, 0.25]}
    assert loaded.digest == maps.digest
    for old, new in zip(maps, loaded, strict=True):
        for name, tensor in old.tensors.items():
            assert torch.equal(new.tensors[name], tensor)
            assert new.tensors[name].dtype == dtype
    assert [path.name for path in (tmp_path / "maps").iterdir()] == [WEIGHTS]


def saved(folder):
    random_maps(small_config(), "paper").save_pretrained(folder)
    return folder


def saved_as_format_1(folder):
    """As the first version wrote maps: a card of its own, no digest."""
    maps = random_maps(small_config(), "paper")
    folder.mkdir(parents=True)
    card = {"format": 1, "kind": "paper", "num_layers": 2, **maps[0].shapes}
    (folder / CARD).write_text(json.dumps({**card, "model_id": "a/b", "training": {"steps": 3}}))
    tensors = {
        f"layers.{i}.{n}": t for i, layer in enumerate(maps) for n, t in layer.tensors.items()
    }
    save_file(tensors, str(folder / WEIGHTS), metadata={"format": "pt"})
    return folder


def test_maps_of_format_1_are_read_and_saved_anew(tmp_path):
    folder = saved_as_format_1(tmp_path / "maps")
    maps = lc.FeatureMaps.from_pretrained(folder)
    assert (maps.model_id, maps.record) == ("a/b", {"steps": 3})
    assert maps.digest == random_maps(small_config(), "paper").digest
    maps.save_pretrained(folder)
    assert [path.name for path in folder.iterdir()] == [WEIGHTS]
    assert lc.FeatureMaps.from_pretrained(folder).digest == maps.digest


def test_every_flipped_bit_is_noticed(tmp_path):
    path = saved(tmp_path / "maps") / WEIGHTS
    whole = path.read_bytes()
    draws = np.random.default_rng(0)
    for place in draws.integers(8, len(whole), 200):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << int(draws.integers(8))
        path.write_bytes(flipped)
        with pytest.raises((ValueError, FileNotFoundError), match="maps"):
            lc.FeatureMaps.from_pretrained(path.parent)
    path.write_bytes(whole)
    lc.FeatureMaps.from_pretrained(path.parent)


def test_format_2_needs_its_digest(tmp_path):
    path = saved(tmp_path / "maps") / WEIGHTS
    header, tensors = read_tensors(path)
    del header["sha256"]
    save_file(tensors, str(path), metadata=header)
    with pytest.raises(ValueError, match="lacks the digest"):
        lc.FeatureMaps.from_pretrained(path.parent)


@pytest.mark.parametrize(
    ("model_id", "kept"),
    [
        ("/home/me/models/my-llama", "my-llama"),
        ("C:\\Users\\me\\my-llama", "my-llama"),
        ("meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-7b-hf"),
        (None, None),
    ],
)
def test_no_path_of_this_machine_is_kept(tmp_path, model_id, kept):
    maps = random_maps(small_config())
    lc.FeatureMaps(maps.layers, model_id=model_id).save_pretrained(tmp_path)
    assert lc.FeatureMaps.from_pretrained(tmp_path).model_id == kept
    assert b"/home/me" not in (tmp_path / WEIGHTS).read_bytes()


def test_a_subfolder_is_looked_into(tmp_path):
    saved(tmp_path / "layers" / "h2o")
    assert len(lc.FeatureMaps.from_pretrained(tmp_path / "layers", subfolder="h2o")) == 2


def change_card(**changes):
    def damage(folder):
        card = json.loads((folder / CARD).read_text())
        card.update(changes)
        (folder / CARD).write_text(json.dumps(card))

    return damage


def drop_from_card(name):
    def damage(folder):
        card = json.loads((folder / CARD).read_text())
        del card[name]
        (folder / CARD).write_text(json.dumps(card))

    return damage


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def cut(name, share):
    def damage(folder):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: int(len(whole) * share)])

    return damage


def change_weights(change):
    def damage(folder):
        tensors = load_file(str(folder / WEIGHTS))
        change(tensors)
        save_file(tensors, str(folder / WEIGHTS))

    return damage


def put_nan(tensors):
    tensors["layers.1.psi_w1"][0, 0, 0] = float("nan")


DAMAGES = {
    "card-empty": write(CARD, b""),
    "card-cut": cut(CARD, 0.5),
    "card-no-json": write(CARD, b"\x00\x01"),
    "card-a-list": write(CARD, b"[1]"),
    "card-too-deep": write(CARD, b"[" * 200_000),
    "card-of-a-listed-kind": change_card(kind=["paper"]),
    "card-of-a-numbered-model": change_card(model_id=7),
    "card-with-text-for-training": change_card(training="long"),
    "card-of-true-layers": change_card(num_layers=True),
    "card-of-another-format": change_card(format=2),
    "card-without-a-format": drop_from_card("format"),
    "card-without-a-kind": drop_from_card("kind"),
    "card-without-layers": drop_from_card("num_layers"),
    "card-without-a-rank": drop_from_card("rank"),
    "card-of-another-kind": change_card(kind="exp"),
    "card-of-an-unknown-kind": change_card(kind="tanh"),
    "card-of-more-layers": change_card(num_layers=3),
    "card-of-fewer-layers": change_card(num_layers=1),
    "card-of-a-billion-layers": change_card(num_layers=10**12),
    "card-of-no-layers": change_card(num_layers=0),
    "card-of-text-layers": change_card(num_layers="2"),
    "card-of-another-rank": change_card(rank=7),
    "card-of-ranks-by-layer": change_card(rank=[2, 0]),
    "card-of-more-ranks": change_card(rank=[2, 2, 2]),
    "card-of-ranks-and-a-billion-layers": change_card(rank=[2, 2], num_layers=10**12),
    "weights-without-a-layer": change_weights(
        lambda tensors: [tensors.pop(name) for name in [*tensors] if "layers.1" in name]
    ),
    "card-of-another-head-dim": change_card(head_dim=64),
    "weights-empty": write(WEIGHTS, b""),
    "weights-cut-in-the-header": cut(WEIGHTS, 0.05),
    "weights-cut": cut(WEIGHTS, 0.9),
    "weights-no-safetensors": write(WEIGHTS, pickle.dumps([1, 2, 3]) * 50),
    "weights-missing-one": change_weights(lambda tensors: tensors.pop("layers.1.psi_w3")),
    "weights-with-another": change_weights(
        lambda tensors: tensors.update({"layers.0.bias": torch.zeros(2)})
    ),
    "weights-of-another-layer": change_weights(
        lambda tensors: tensors.update({"layers.2.psi_s1": torch.zeros(2, 2)})
    ),
    "weights-of-another-name": change_weights(
        lambda tensors: tensors.update({"lm_head": torch.zeros(2)})
    ),
    "weights-of-another-shape": change_weights(
        lambda tensors: tensors.update({"layers.1.psi_s1": torch.zeros(2, 3)})
    ),
    "weights-with-nan": change_weights(put_nan),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_folders_are_refused(tmp_path, damage):
    folder = saved_as_format_1(tmp_path / "maps")
    damage(folder)
    with pytest.raises(ValueError, match=r"maps|layers|kind"):
        lc.FeatureMaps.from_pretrained(folder)


@pytest.mark.parametrize("name", [CARD, WEIGHTS])
def test_a_missing_file_is_named(tmp_path, name):
    folder = saved_as_format_1(tmp_path / "maps")
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        lc.FeatureMaps.from_pretrained(folder)


def test_an_interrupted_save_leaves_the_old_maps(tmp_path, monkeypatch):
    folder = saved(tmp_path / "maps")
    old = {path.name: path.read_bytes() for path in folder.iterdir()}

    def interrupted(tensors, name, metadata):
        with open(name, "wb") as file:  # noqa: PTH123
            file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(_tensor_files, "save_file", interrupted)
    with pytest.raises(OSError, match="disk full"):
        random_maps(small_config(), seed=5).save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == old


# The hub.


def test_a_hub_id_is_fetched(tmp_path, monkeypatch):
    saved(tmp_path / "snapshot")
    calls = []

    def snapshot_download(repo_id, *, revision, allow_patterns):
        calls.append((repo_id, revision, allow_patterns))
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    maps = lc.FeatureMaps.from_pretrained("someone/llama-less", revision="v2")
    assert len(maps) == 2
    assert calls == [("someone/llama-less", "v2", [WEIGHTS, CARD])]


def test_a_subfolder_of_the_hub_alone_is_fetched(tmp_path, monkeypatch):
    saved(tmp_path / "snapshot" / "h2o")
    asked = []

    def snapshot_download(repo_id, *, revision, allow_patterns):
        asked.extend(allow_patterns)
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    assert len(lc.FeatureMaps.from_pretrained("someone/llama-less", subfolder="h2o")) == 2
    assert asked == [f"h2o/{WEIGHTS}", f"h2o/{CARD}"]


def test_a_hub_that_gives_nothing_is_told(tmp_path, monkeypatch):
    def snapshot_download(*given, **named):
        raise ConnectionError("no network\nand much more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"^someone/maps: no such folder.*: no network$"):
        lc.FeatureMaps.from_pretrained("someone/maps")


@pytest.mark.parametrize("name", ["nowhere", "a/b/c", "/nowhere/at/all", "../x y/z", ""])
def test_what_is_neither_folder_nor_id_is_not_asked_of_the_hub(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)

    def snapshot_download(*given, **named):
        pytest.fail("the hub was asked")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(FileNotFoundError):
        lc.FeatureMaps.from_pretrained(name)


def test_maps_are_pushed_as_one_commit(monkeypatch):
    maps, log = random_maps(small_config()), []

    class FakeApi:
        def __init__(self, token=None):
            log.append(("token", token))

        def create_repo(self, repo_id, *, private, exist_ok):
            log.append(("create", repo_id, private, exist_ok))

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            loaded = lc.FeatureMaps.from_pretrained(folder_path)
            log.append(("upload", repo_id, loaded.digest == maps.digest, bool(commit_message)))
            return types.SimpleNamespace(commit_url="https://example.org/commit/1")

    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    url = maps.push_to_hub("someone/maps", private=True, token="secret")
    assert url == "https://example.org/commit/1"
    assert log == [
        ("token", "secret"),
        ("create", "someone/maps", True, True),
        ("upload", "someone/maps", True, True),
    ]


# The official code's checkpoints.


class OfficialKernels(torch.nn.Module):
    """Parameters named and shaped as the official training code has them."""

    def __init__(self, head_dim, hidden, rank, heads, multi_query):
        super().__init__()

        def parameter(*shape):
            return torch.nn.Parameter(torch.randn(shape))

        self.kernel_q_mat1 = parameter(heads, head_dim, hidden)
        self.kernel_q_mat2 = parameter(heads, hidden, rank)
        if multi_query:
            self.kernel_k_mat1 = torch.nn.Linear(head_dim, hidden, bias=False)
            self.kernel_k_mat2 = torch.nn.Linear(hidden, rank, bias=False)
            self.interaction_k = torch.nn.Linear(rank, rank, bias=False)
            heads = 1
        else:
            self.kernel_k_mat1 = parameter(heads, head_dim, hidden)
            self.kernel_k_mat2 = parameter(heads, hidden, rank)
            self.interaction_k = parameter(heads, rank, rank)
        self.scalingD = parameter(1, heads, 1, rank)
        self.scalingD2 = parameter(1, heads, 1, rank)
        self.multi_query = multi_query

    def features(self, q, k):
        """The forward pass of the official module, up to |φ| and |ψ|."""
        gelu = torch.nn.functional.gelu
        q = gelu(torch.einsum("bhsd,hde->bhse", q, self.kernel_q_mat1))
        q = gelu(torch.einsum("bhsd,hde->bhse", q, self.kernel_q_mat2))
        if self.multi_query:
            k = gelu(self.kernel_k_mat1(k))
            k = self.scalingD.abs() * gelu(self.kernel_k_mat2(k))
            k = k + self.interaction_k(k) * self.scalingD2
        else:
            k = gelu(torch.einsum("bhsd,hde->bhse", k, self.kernel_k_mat1))
            k = self.scalingD.abs() * gelu(torch.einsum("bhsd,hde->bhse", k, self.kernel_k_mat2))
            k = k + torch.einsum("bhsd,hde->bhse", k, self.interaction_k) * self.scalingD2
        return q.abs(), k.abs()


def official_folder(folder, multi_query, layers=2):
    """Checkpoints as the official code saves them, loss curves and arguments included."""
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    nets = [OfficialKernels(8, 12, 3, 4, multi_query) for _ in range(layers)]
    for i, net in enumerate(nets):
        checkpoint = {
            "model_state_dict": net.state_dict(),
            "train_mses": torch.rand(40),
            "val_mses": torch.rand(40),
            "config": vars(argparse.Namespace(ker_dim=3, dropout=0.3, device="cuda:0", x=None)),
        }
        torch.save(checkpoint, folder / f"layer_{i}.pth")
    return nets


@pytest.mark.parametrize("multi_query", [False, True], ids=["llama", "falcon"])
def test_official_checkpoints_give_the_official_features(tmp_path, multi_query):
    nets = official_folder(tmp_path, multi_query)
    (tmp_path / "notes.txt").write_text("other files do not matter")
    maps = lc.FeatureMaps.from_official(tmp_path)
    assert maps.kind == "paper"
    kv_heads = 1 if multi_query else 4
    sizes = {"query_heads": 4, "kv_heads": kv_heads, "head_dim": 8, "hidden": 12, "rank": 3}
    assert maps[1].shapes == sizes
    q, k = torch.randn(2, 4, 5, 8), torch.randn(2, kv_heads, 5, 8)
    for layer, net in zip(maps, nets, strict=True):
        with torch.no_grad():
            phi, psi = net.features(q, k)
        torch.testing.assert_close(layer.phi(q), phi, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(layer.psi(k), psi, rtol=1e-5, atol=1e-6)
    maps.save_pretrained(tmp_path / "ours")
    assert lc.FeatureMaps.from_pretrained(tmp_path / "ours").digest == maps.digest


@pytest.mark.parametrize("make", [np.asarray, list, float, np.float64], ids=str)
def test_loss_curves_of_any_plain_kind_are_read_over(tmp_path, make):
    official_folder(tmp_path, False, layers=1)
    path = tmp_path / "layer_0.pth"
    checkpoint = torch.load(path, weights_only=True)
    curve = np.linspace(1, 0, 5)
    checkpoint["train_mses"] = make(curve[0] if make in (float, np.float64) else curve)
    torch.save(checkpoint, path)
    assert len(lc.FeatureMaps.from_official(tmp_path)) == 1


class Code:
    """Unpickled, this would run a command."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return (os.system, (self.command,))


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("where", ["model_state_dict", "config", "train_mses"])
def test_code_in_a_checkpoint_does_not_run(tmp_path, legacy, where):
    official_folder(tmp_path, False, layers=1)
    path, trace = tmp_path / "layer_0.pth", tmp_path / "ran"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint[where] = {"kernel_q_mat1": Code(f"touch {trace}")}
    torch.save(checkpoint, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match="damaged, or holds more than tensors"):
        lc.FeatureMaps.from_official(tmp_path)
    assert not trace.exists()


def test_a_bare_pickle_with_code_does_not_run(tmp_path):
    trace = tmp_path / "ran"
    (tmp_path / "layer_0.pth").write_bytes(pickle.dumps(Code(f"touch {trace}"), protocol=2))
    with pytest.raises(ValueError, match="damaged, or holds more than tensors"):
        lc.FeatureMaps.from_official(tmp_path)
    assert not trace.exists()


def state_dict_with(**changes):
    def content():
        net = OfficialKernels(8, 12, 3, 4, False)
        state = {**net.state_dict(), **changes}
        return {"model_state_dict": {k: v for k, v in state.items() if v is not None}}

    return content


CONTENTS = {
    "a-list": lambda: [1, 2],
    "a-tensor": lambda: torch.zeros(3),
    "no-state-dict": lambda: {"weights": {}},
    "state-dict-a-list": lambda: {"model_state_dict": [1]},
    "state-dict-empty": lambda: {"model_state_dict": {}},
    "lacks-psi": state_dict_with(kernel_k_mat2=None),
    "lacks-a-scale": state_dict_with(scalingD2=None),
    "scale-of-two-dims": state_dict_with(scalingD=torch.zeros(4, 3)),
    "number-for-a-tensor": state_dict_with(kernel_q_mat1=3.0),
    "number-for-a-scale": state_dict_with(scalingD=3.0),
    "other-hidden": state_dict_with(kernel_q_mat2=torch.zeros(4, 11, 3)),
    "nan": state_dict_with(interaction_k=torch.full((4, 3, 3), float("nan"))),
}


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
def test_checkpoints_of_something_else_are_refused(tmp_path, content):
    torch.save(content(), tmp_path / "layer_0.pth")
    with pytest.raises((ValueError, TypeError), match=r"layer_0|layers\[0\]"):
        lc.FeatureMaps.from_official(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.99])
def test_truncated_checkpoints_are_refused(tmp_path, share):
    official_folder(tmp_path, False, layers=1)
    path = tmp_path / "layer_0.pth"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ValueError, match="damaged"):
        lc.FeatureMaps.from_official(tmp_path)


@pytest.mark.parametrize("names", [[], ["layer_1.pth"], ["layer_0.pth", "layer_2.pth"]])
def test_gaps_in_the_numbering_are_refused(tmp_path, names):
    buffer = io.BytesIO()
    torch.save({}, buffer)
    for name in names:
        (tmp_path / name).write_bytes(buffer.getvalue())
    with pytest.raises(FileNotFoundError, match=r"expected layer_0\.pth"):
        lc.FeatureMaps.from_official(tmp_path)


def test_more_than_ten_layers_are_in_the_order_of_their_numbers(tmp_path):
    nets = official_folder(tmp_path, True, layers=12)
    maps = lc.FeatureMaps.from_official(tmp_path)
    for layer, net in zip(maps, nets, strict=True):
        assert torch.equal(layer.tensors["phi_w1"], net.kernel_q_mat1.data)
