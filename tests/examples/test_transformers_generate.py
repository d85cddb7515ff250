"""The example with transformers: a whole cache from a folder, or its policy alone."""

import pytest
import typer

pytest.importorskip("transformers")

import less_cache as lc
from examples.transformers_generate import main, random_model
from less_cache.integrations.introspection import description
from tests.integrations.models import less

ASKED = {"model": "", "maps": "", "cache": "", "capacity": None, "new_tokens": 4, "snapshot": ""}


def test_a_whole_cache_is_taken_from_its_folder(tmp_path, capsys):
    model = random_model()
    config, maps = less(model, capacity=[9, 7, 8, [6, 12]])
    made = lc.CacheRecipe(config, maps, model=description(model.config))
    made.save_pretrained(tmp_path / "cache")
    main(**{**ASKED, "cache": str(tmp_path / "cache"), "snapshot": str(tmp_path / "past")})
    assert (
        f"{2 * config.bytes_per_sequence():,} bytes, whatever the length" in capsys.readouterr().out
    )
    for more in ({"maps": "x"}, {"capacity": 0.1}):
        with pytest.raises(typer.BadParameter, match="has maps and slots of its own"):
            main(**{**ASKED, "cache": str(tmp_path / "cache"), **more})


def test_without_one_the_policy_runs_alone(capsys):
    main(**ASKED)
    wanted = lc.CacheConfig.from_model(
        random_model().config, capacity=0.05, policy=lc.H2O(), rank=0
    )
    assert f"{2 * wanted.bytes_per_sequence():,} bytes, whatever" in capsys.readouterr().out
