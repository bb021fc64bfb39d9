"""The shim that runs the CUDA sources on the CPU shows races and bad indices. Small kernels run sound and with one
fault. A fault shows as different results in different orders, or through the race detector, for which one run
stands for all orders (simt/races.h)."""

import subprocess
import sys

import pytest
from simt_build import races_library, simt_library

BLOCKS, THREADS, ORDERS = 4, 64, 300  # ascending, descending, shuffled ones
PROGRAM = f"""
import ctypes, sys
path, name, fault = sys.argv[1:]
run = ctypes.CDLL(path).simt_fault
for order in ORDERS:
    out = (ctypes.c_int * {BLOCKS * THREADS + 1 + BLOCKS})()
    print(run(name.encode(), fault == "faulty", {BLOCKS}, order, out), list(out), flush=True)
"""
# The message that ends the program; None: it does not end, but has another result.
FAULTS = {
    "read too early": None,
    "overwritten too early": None,
    "read too early in a warp": None,
    "overwritten during a copy": None,
    "never written": None,
    "outside its array": "out of bounds",
    "misaligned": "misaligned address",
    "behind dynamic memory": "write behind the dynamic shared memory",
    "barriers of two lines": "threads wait at different barriers",
    "vote of lanes that left": "a lane in the mask has left",
    "announced too early": None,
    "read too early in a cluster": None,
    "left too early in a cluster": "looks into the shared memory of a block that has ended",
    "behind another block's dynamic memory": "write behind the dynamic shared memory",
}


# Races that hardly any order of a run shows as another result: every write is visible at once, lanes wait for each
# other at shuffles, and launches run one after the other.
HARDLY_SEEN = (
    "shuffled instead of a barrier", "multiplied instead of a barrier",
    "announced without a fence", "summed up without a fence", "announced by another without a fence",
    "counted in another's place", "after many rounds", "written before a cluster begins",
    "begun before another launch ended", "ended before another launch ended",
)  # fmt: skip
RACES = [
    *(name for name, ends in FAULTS.items() if ends is None and name != "never written"),
    "left too early in a cluster", *HARDLY_SEEN,
]  # fmt: skip


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return simt_library(tmp_path_factory, "faults.cpp")._name


@pytest.fixture(scope="module")
def with_races(tmp_path_factory):
    return races_library(tmp_path_factory, "faults.cpp")._name


def run(library, name, orders=f"range({ORDERS})"):
    """Runs the kernel `name` without and with its fault, in each of the orders."""
    program = PROGRAM.replace("ORDERS", orders)
    return [
        subprocess.run(
            [sys.executable, "-S", "-c", program, library, name, kind],
            capture_output=True, text=True, timeout=60,
        )
        for kind in ("sound", "faulty")
    ]  # fmt: skip


@pytest.mark.parametrize("name", RACES)
def test_a_race_shows_in_any_order(with_races, name):
    for order in (0, 1, 7):
        sound, faulty = run(with_races, name, f"[{order}]")
        assert sound.returncode == 0, sound.stderr
        assert (
            faulty.returncode and "simt: race: " in faulty.stderr and "faults.cpp" in faulty.stderr
        )


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_shows_and_without_it_no_order_matters(library, name):
    sound, faulty = run(library, name)
    results = sound.stdout.splitlines()
    assert sound.returncode == 0 and len(results) == ORDERS, sound.stderr
    assert len(set(results)) == 1 and results[0].startswith("0 [")
    if FAULTS[name]:
        assert faulty.returncode and FAULTS[name] in faulty.stderr
    else:  # in many orders, because the other tests try few
        wrong = sum(line != results[0] for line in faulty.stdout.splitlines())
        assert faulty.returncode == 0 and wrong >= ORDERS / 10
