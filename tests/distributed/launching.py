"""The real recipe, launched by accelerate with the configs that users have, on a machine without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file


ROOT = Path(__file__).parents[2]
CONFIGS = {"one": "cpu", "ddp": "ddp", "zero2": "deepspeed_zero2", "zero3": "deepspeed_zero3"}
OPTIONS = {
    "model_name_or_path": "model", "dataset_name": "data.jsonl", "eval_fraction": 0.2, "bf16": False, "max_steps": 6,
    "learning_rate": 2e-2, "report_to": "none", "eval_samples": 6, "generation_tokens": 3, "generations": 2, "max_length": 48,
    "logging_steps": 1, "save_steps": 3, "dtype": "float32", "gradient_checkpointing": False, "ema_half_life": 0.3,
    "warmup_steps": 0, "lora_r": 4, "lora_dropout": 0.0, "lr_scheduler_type": "linear",
}  # fmt: skip
GLOBAL_BATCH = 4


def accelerate_config(mode, folder):
    """The file that users launch with, for two processes on a machine without a GPU."""
    config = yaml.safe_load((ROOT / "accelerate_configs" / f"{CONFIGS[mode]}.yaml").read_text())
    if mode != "one":
        config |= {"num_processes": 2, "mixed_precision": "no"}
    if mode == "ddp":
        config["use_cpu"] = True
        config.pop("gpu_ids")
    path = folder / f"accelerate_{mode}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def command(mode, folder, output, **changes):
    """Command line and environment of one run of the recipe, in `folder`."""
    ranks = 1 if mode == "one" else 2
    options = OPTIONS | {"per_device_train_batch_size": GLOBAL_BATCH // ranks, "output_dir": output} | changes
    # DeepSpeed chooses its device itself; without a GPU accelerate must be told how the ranks talk.
    options |= {"ddp_backend": "gloo"} if "zero" in mode else {"use_cpu": True}
    (folder / f"{output}.yaml").write_text(yaml.safe_dump(options))
    line = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(accelerate_config(mode, folder))]
    line += ["--main_process_port", "0"] if ranks > 1 else []
    line += [str(ROOT / "recipes" / "medical_ema.py"), "--config", f"{output}.yaml"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"TRL_EMA_CACHE": str(folder / "cache"), "HF_HOME": str(folder / "hf")}
    return line, environment


def launch(mode, folder, output, **changes):
    """The folder of the finished run."""
    line, environment = command(mode, folder, output, **changes)
    done = subprocess.run(line, capture_output=True, text=True, cwd=folder, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    return folder / output


def logged(folder, key):
    log = json.loads((folder / "metrics.json").read_text())["log"]
    return torch.tensor([entry[key] for entry in log if key in entry], dtype=torch.float64)


def weights(folder, who):
    return load_file(
        folder / "teacher" / "adapter_model.safetensors" if who == "teacher" else folder / "adapter_model.safetensors"
    )
