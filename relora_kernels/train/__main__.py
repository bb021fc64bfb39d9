import sys

import torch.distributed

from .cli import main

code = main()
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
sys.exit(code)
