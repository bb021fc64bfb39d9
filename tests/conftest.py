"""Where the tests run: on a GPU if there is one, else on the CPU with Triton's interpreter."""

import importlib.util
import os
import signal
import sys

# Background jobs of a shell script ignore SIGINT, and the processes that the tests interrupt would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# This repository has a folder named triton. Without the real package, `import triton` must fail rather
# than find that folder.
_spec = importlib.util.find_spec("triton")
if _spec is None or _spec.origin is None:
    sys.modules["triton"] = None

if "PYTEST_XDIST_WORKER" in os.environ:  # as many processes as there are cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported

import pytest  # noqa: E402

if os.environ.get("TRITON_INTERPRET") == "1" and sys.modules.get("triton", ()) is not None:
    import interpreter

    interpreter.install()


# These take minutes each. They run first, so that two pytest processes end at about the same time.
SLOW = (
    "test_triton_compile",
    "test_train_distributed",
    "test_train_resume",
    "test_sharded",
    "test_ablation",
)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.stem not in SLOW)


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
