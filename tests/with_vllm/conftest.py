"""Tests of the real engine: `make test-vllm` installs it in an environment of its own and runs them."""

from __future__ import annotations

import os

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
