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
RECIPE = ROOT / "recipes" / "medical_ema.py"
AS_ON_GPUS, IN_TURN = (Path(__file__).with_name(name) for name in ("as_on_gpus.py", "in_turn.py"))
CONFIGS = {"one": "cpu", "ddp": "multi_gpu", "zero2": "zero2", "zero3": "zero3", "fsdp2": "fsdp2"}
CONFIGS["zero1"] = "zero1"
CONFIGS["zero3_offload"] = "zero3_offload"
CONFIGS["zero3_alone"] = CONFIGS["zero3"]  # on one process
CONFIGS["fsdp2_sharded"] = CONFIGS["fsdp2"]  # with checkpoints by shards
CONFIGS["fsdp2_wrapped"] = CONFIGS["fsdp2"]  # with a wrapper of its own around each layer
RANKS = {mode: 1 if mode in ("one", "zero3_alone") else 2 for mode in CONFIGS}
OPTIONS = {
    "model_name_or_path": "model", "dataset_name": "data.jsonl", "eval_fraction": 0.2, "bf16": False, "max_steps": 6,
    "learning_rate": 2e-2, "report_to": "none", "eval_samples": 6, "generation_tokens": 3, "generations": 2, "max_length": 48,
    "logging_steps": 1, "save_steps": 3, "dtype": "float32", "ema_half_life": 0.3, "warmup_steps": 0, "lora_r": 4,
    "lora_dropout": 0.0, "lr_scheduler_type": "linear",
    # Whatever is harder with several ranks
    "gradient_accumulation_steps": 2, "gradient_checkpointing": True, "lora_modules_to_save": ["lm_head"],
    "eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True, "save_total_limit": 2,
    "greater_is_better": True,  # so the best checkpoint is not the last
}  # fmt: skip
GLOBAL_BATCH = 4
ON_CPU = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
STAGING = "_checkpoint.part"


def accelerate_config(mode, folder, on_gpu=False):
    """The file that users launch with, for two processes on a machine without a GPU."""
    config = yaml.safe_load((ROOT / "accelerate_configs" / f"{CONFIGS[mode]}.yaml").read_text())
    if mode != "one":
        config |= {"num_processes": RANKS[mode], "mixed_precision": "no"}
    if on_gpu:
        config["num_processes"] = torch.cuda.device_count()
    elif mode == "ddp":
        config["use_cpu"] = True
        config.pop("gpu_ids")
    if mode == "fsdp2_sharded":
        config["fsdp_config"]["fsdp_state_dict_type"] = "SHARDED_STATE_DICT"
    if mode == "fsdp2_wrapped":
        config["fsdp_config"]["fsdp_activation_checkpointing"] = True
    path = folder / f"accelerate_{mode}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def command(mode, folder, output, on_gpu=False, **changes):
    """Command line and environment of one run of the recipe, in `folder`; `on_gpu` on all the GPUs there are."""
    ranks = torch.cuda.device_count() if on_gpu else RANKS[mode]
    options = OPTIONS | {"per_device_train_batch_size": GLOBAL_BATCH // 2 // ranks, "output_dir": output} | changes
    if not on_gpu:
        # DeepSpeed and FSDP choose their device themselves; without a GPU accelerate must be told how the ranks talk.
        options |= {"use_cpu": True} if mode in ("one", "ddp") else {"ddp_backend": "gloo"}
    (folder / f"{output}.yaml").write_text(yaml.safe_dump(options))
    config = str(accelerate_config(mode, folder, on_gpu))
    line = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config]
    line += ["--main_process_port", "0"] if mode != "one" else []
    line += [str(AS_ON_GPUS)] if ("fsdp2" in mode or "zero" in mode) and not on_gpu else []
    line += [str(RECIPE), "--config", f"{output}.yaml"]
    environment = os.environ | ({} if on_gpu else ON_CPU)
    environment |= {"TRL_EMA_CACHE": str(folder / "cache"), "HF_HOME": str(folder / "hf")}
    return line, environment


def command_in_turn(folder, runs):
    """Of one launch, in the mode of the first, that trains all `runs` one after another: mode and options by output folder."""
    commands = [command(mode, folder, output, **options) for output, (mode, options) in runs.items()]
    (line, environment), (first, _) = commands[0], next(iter(runs.values()))
    words = [
        f"{output}.yaml" if mode == first else f"{output}.yaml,accelerate_{mode}.yaml"
        for output, (mode, _) in runs.items()
    ]
    return [*line[: line.index(str(RECIPE))], str(IN_TURN), str(RECIPE), *words], environment


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


def torchrun(script, *arguments, **environment):
    """What two gloo processes of `script`, in this folder, print."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    command += [str(Path(__file__).with_name(script)), *arguments]
    environment = os.environ | ON_CPU | environment
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stdout
