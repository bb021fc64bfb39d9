"""The ops: each file declares one schema, its checks, fake and implementations, and the public function."""

import torch

# Raw ops are private (underscore names, no autograd): the public functions wrap them.
LIBRARY = torch.library.Library("relora_kernels", "DEF")
