"""The cases that judge the plugin on a GPU: kernels that do nothing fail them."""

import subprocess
import sys

import pytest

from tests.plugins.built import built

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cases")
    for only in ("TOVA-float16-64-8", "golden-h2o_mqa"):
        command = [sys.executable, "-m", "tests.plugins.dump_cases", "--only", only]
        subprocess.run([*command, "--out", folder / only], check=True, capture_output=True)
    return folder


def run(library, cases, driver):
    return subprocess.run(
        [built("gpu_cases"), library, cases],
        env={"LD_LIBRARY_PATH": str(driver)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_kernels_that_do_nothing_fail_every_case(cases):
    library = built("libless_cache_trt_synthetic.so")
    driver = built("fake_cuda_new/libcuda.so.1").parent
    result = run(library, cases / "TOVA-float16-64-8", driver)
    assert result.returncode == 1, result.stdout
    lines = [line for line in result.stdout.splitlines() if line.startswith("FAILED")]
    assert len(lines) == 3, result.stdout
    for line, way in zip(lines, ("in place", "between buffers", "captured"), strict=True):
        assert f"{way} out[" in line
        assert "was written to" not in line


def test_cases_without_kernels_are_skipped_with_what_there_is(cases):
    library = built("libless_cache_trt_synthetic.so")
    driver = built("fake_cuda_new/libcuda.so.1").parent
    result = run(library, cases / "golden-h2o_mqa", driver)
    assert result.returncode == 77, result.stdout
    assert "no kernels  golden-h2o_mqa-0" in result.stdout
    assert "not compiled for float32" in result.stdout


def test_without_a_driver_it_is_skipped_with_a_reason(cases, tmp_path):
    library = built("libless_cache_trt_synthetic.so")
    (tmp_path / "libcuda.so.1").write_text("no library\n")
    result = run(library, cases / "TOVA-float16-64-8", tmp_path)
    assert result.returncode == 77
    assert "skipped: needs a CUDA GPU" in result.stdout
