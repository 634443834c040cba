"""What the rollout subprocesses of test_lmdeploy.py have in common, done once: tests/zygote.py forks them.

plumbing.lmdeploy_child itself is not imported: every fork runs it from its first line, as __main__.
"""

import os

import lmdeploy_on_cpu

os.environ["LMDEPLOY_ENABLE_CHECK_ENV"] = "0"  # as the parent sets it; read when lmdeploy is imported
lmdeploy_on_cpu.install()

import lmdeploy.pytorch.engine  # noqa: E402, F401
import lmdeploy.pytorch.models.sdar  # noqa: E402, F401

import rollout  # noqa: E402, F401
