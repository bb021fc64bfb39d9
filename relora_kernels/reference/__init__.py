"""One plain PyTorch implementation per op: the tests' oracle, the CPU backend, the specification."""
