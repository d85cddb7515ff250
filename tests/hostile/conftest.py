"""How long attacks last: a fixed number of seeded examples, or so many minutes of random ones.

``pytest tests/hostile --hostile-minutes 10`` shares the minutes among the tests.
"""

import time

import pytest
from hypothesis import HealthCheck, settings

USUAL = 25
"""Examples of a test; a file may say otherwise in `EXAMPLES`."""


def pytest_addoption(parser):
    parser.addoption(
        "--hostile-minutes",
        type=float,
        default=0.0,
        help="attack for so many minutes, with other examples in every run",
    )


def pytest_collection_modifyitems(config, items):
    ours = [item for item in items if "hostile" in item.path.parts]
    minutes = config.getoption("--hostile-minutes", default=0.0)
    # The others are the same whenever they run.
    drawn = [item for item in ours if getattr(item.obj, "is_hypothesis_test", False)]
    for item in ours:
        item.seconds = 60 * minutes / len(drawn) if item in drawn else 0.0
        if minutes:
            item.add_marker(pytest.mark.timeout(item.seconds + 300))


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    seconds = getattr(pyfuncitem, "seconds", None)
    if seconds is None:
        return (yield)
    usual = settings.get_current_profile_name()
    settings.register_profile(
        "hostile",
        parent=settings.get_profile(usual),
        max_examples=getattr(pyfuncitem.module, "EXAMPLES", USUAL),
        derandomize=not seconds,
        database=None,
        print_blob=bool(seconds),
        suppress_health_check=list(HealthCheck),
    )
    settings.load_profile("hostile")
    until = time.monotonic() + seconds
    try:
        result = yield
        names = pyfuncitem._fixtureinfo.argnames
        arguments = {name: pyfuncitem.funcargs[name] for name in names}
        while time.monotonic() < until:
            pyfuncitem.obj(**arguments)
        return result
    finally:
        settings.load_profile(usual)
