"""Timing that waits for the GPU, and the device beside each figure."""

import time

import pytest
import torch

GPU = torch.cuda.is_available()


def synchronised() -> float:
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


def pytest_collection_modifyitems(items) -> None:
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=synchronised))


def pytest_benchmark_update_machine_info(config, machine_info) -> None:
    machine_info["torch"] = torch.__version__
    machine_info["device"] = torch.cuda.get_device_name() if GPU else "CPU"
