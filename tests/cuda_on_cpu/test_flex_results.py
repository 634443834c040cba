"""Results of the FlexAttention kernels for CUDA without a GPU: flex_results.py says how.

15 s on one thread of a 2-core machine.
"""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
pytestmark = [
    pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs triton"),
    pytest.mark.skipif(not shutil.which("g++"), reason="needs g++, for one_gpu.cpp"),
]


def test_flex_kernels_equal_dense_attention():
    command = [sys.executable, "-W", "ignore", HERE / "flex_results.py"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=1500)
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = json.loads(ran.stdout.splitlines()[-1])
    for kind, rows in found.items():
        for row in rows:
            assert (row["tokens"] % 128 == 0) == (kind == "whole tiles")
            assert len(row["launched"]) == 3, (
                "forward; then the sums for the softmax's derivative, and backward"
            )
            for name in ("out", "dq", "dk", "dv"):
                assert row[name] < 1e-5, (kind, row)
    seen = {tile for rows in found.values() for row in rows for tile, count in row["tiles"].items() if count}
    assert seen == {"partial", "full", "empty"}
