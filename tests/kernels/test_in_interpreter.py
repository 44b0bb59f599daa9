"""The tests of the GPU's kernels on the CPU: in Triton's interpreter, in one process of its own for all."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.interpreter import INTERPRETED

TESTS = Path(__file__).parents[1]
FILES = ["losses/test_dense_focal.py", *(f"kernels/test_{name}.py" for name in ("ignore_band_triton", "nms_triton"))]
FILES += ["kernels/test_targets.py"]


@pytest.mark.skipif(INTERPRETED or find_spec("triton") is None, reason="needs Triton, and its interpreter not yet on")
@pytest.mark.parametrize("tier", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_the_kernels_pass_their_tests(tier):
    command = [sys.executable, "-m", "pytest", "-q", "-rp", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += ["-m", f"{tier} and not gpu", *(str(TESTS / file) for file in FILES)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    if tier == "not slow":
        assert all(f"PASSED tests/{file}" in result.stdout for file in FILES), result.stdout[-5000:]
