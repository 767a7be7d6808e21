"""
Adapt a language model to medicine under a mean teacher, and see what it learned and what it kept.

With no arguments, the offline demo: SmolLM2-135M-Instruct in 4-bit NF4 learns medical definitions, in about ten minutes
on 2 CPU cores.

    accelerate launch recipes/medical_ema.py

With a model and data from the hub (or local paths), on a GPU:

    accelerate launch --config_file accelerate_configs/single_gpu_qlora.yaml recipes/medical_ema.py \\
        --config recipes/configs/qwen2_1.5b_qlora.yaml

Every option of `MeanTeacherConfig`, TRL's `ModelConfig` and the job's own can be given on the command line or in the YAML
of `--config`; the command line wins. `trl-ema train` is the same job.
"""

from trl_ema.training import main


if __name__ == "__main__":
    main()
