"""An old transformers is named at import, with the one that is needed."""

import subprocess
import sys

import pytest

CODE = """
import sys, types
old = types.ModuleType("transformers")
old.__version__ = "{version}"
old.__path__ = []
sys.modules["transformers"] = old
import less_cache
try:
    less_cache.attach
except ImportError as error:
    print(error)
"""


@pytest.mark.parametrize("version", ["4.57.1", "5.16.2", "5.9.0.dev0"])
def test_an_old_transformers(version):
    code = CODE.format(version=version)
    found = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout
    assert "needs transformers 5.17 or later" in found
    assert f"{version} is installed" in found


@pytest.mark.parametrize("version", ["5.17.0", "5.100.0", "6.0.0.dev0"])
def test_a_later_one(version):
    found = subprocess.run(
        [sys.executable, "-c", CODE.format(version=version)],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    # The stand-in has nothing in it; that is what is missed.
    assert "needs transformers" not in found
    assert "cannot import name" in found
