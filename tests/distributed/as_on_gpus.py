"""
Runs a script on processes without a GPU as on GPUs: under FSDP2, in bfloat16 with DeepSpeed, and without DeepSpeed's own kernel for
CPUs.

    torchrun --nproc_per_node 2 as_on_gpus.py SCRIPT ARGUMENTS...

accelerate turns to FSDP only where it finds an accelerator. Here its first state says so of gloo processes; everything that
follows (sharding, gathering, checkpoints) is accelerate's own and real. DeepSpeed compiles a kernel for CPUs, for minutes, that sums over
ranks in inference alone.
"""

import importlib
import os
import runpy
import sys
from pathlib import Path

from accelerate.state import PartialState
from accelerate.utils import DistributedType
from transformers import training_args


_init = PartialState.__init__


def _as_on_accelerators(self, *args, **kwargs):
    _init(self, *args, **kwargs)
    if self.distributed_type == DistributedType.NO and self.num_processes > 1:
        self.distributed_type = DistributedType.MULTI_GPU


PartialState.__init__ = _as_on_accelerators
training_args.is_torch_bf16_gpu_available = lambda: True
if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
    # Not by `import deepspeed.comm.torch`: a package of that name is PyTorch's own, which `deepspeed.comm` imports under it.
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None

if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    runpy.run_path(sys.argv[0], run_name="__main__")
