"""Timing that waits for the GPU; results are stored with the device, its rates and the commit."""

import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # pytest runs in importlib mode

import common  # noqa: E402

from relora_kernels import measure  # noqa: E402


def synchronised() -> float:
    measure.synchronise(common.DEVICE)
    return time.perf_counter()


def pytest_collection_modifyitems(items) -> None:
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=synchronised))


@pytest.fixture(scope="session", autouse=True)
def rates() -> dict[str, float]:
    """The rates behind the floors, measured before anything else in the run."""
    return measure.rates(common.DEVICE)


def pytest_benchmark_update_machine_info(config, machine_info) -> None:
    machine_info.update(common.machine())
    if not torch.cuda.is_available():
        processor = machine_info["cpu"].get("brand_raw") or machine_info["machine"]
        machine_info["device"] = f"CPU ({processor})"
