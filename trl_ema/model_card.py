"""The model card of a run: TRL's, with the method, its settings, its figures and whom to cite."""

import os
from dataclasses import fields

from huggingface_hub import ModelCard


_MARK = "<!-- trl_ema -->"
_METHODS = {
    "ema": "Supervised fine-tuning with a mean teacher: the student is pulled towards an exponential moving average of its "
    "own adapter, so that it keeps general abilities while it learns the domain.",
    "frozen": "Supervised fine-tuning with a frozen teacher: the student is pulled towards the model it started from.",
    "none": "Plain supervised fine-tuning, no teacher.",
}
_FORMULA = ("    loss = CE(y; p_student) + kl_weight * D(p_teacher, p_student)", "")
CITATIONS = r"""@inproceedings{tarvainen2017mean,
  title     = {Mean teachers are better role models: Weight-averaged consistency targets improve semi-supervised deep learning results},
  author    = {Tarvainen, Antti and Valpola, Harri},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2017}
}
@article{kirkpatrick2017overcoming,
  title   = {Overcoming catastrophic forgetting in neural networks},
  author  = {Kirkpatrick, James and others},
  journal = {Proceedings of the National Academy of Sciences},
  year    = {2017}
}
@article{luo2023empirical,
  title   = {An Empirical Study of Catastrophic Forgetting in Large Language Models During Continual Fine-tuning},
  author  = {Luo, Yun and others},
  journal = {arXiv preprint arXiv:2308.08747},
  year    = {2023}
}
@article{sviridenko_ema,
  title   = {Adapting Large Language Models for narrow domains using the exponential moving average method},
  author  = {Sviridenko and others},
  journal = {International Journal of Open Information Technologies (INJOIT)}
}"""
_TRAINING = ("learning_rate", "lr_scheduler_type", "num_train_epochs", "max_steps", "per_device_train_batch_size",
             "gradient_accumulation_steps", "max_length", "packing", "loss_type", "bf16", "fp16", "seed")  # fmt: skip


def write_model_card(trainer, folder: str) -> None:
    """Adds our part to the `README.md` in `folder` (TRL's or PEFT's), replacing an older one of ours."""
    path = os.path.join(folder, "README.md")
    text = ""
    if os.path.isfile(path):
        with open(path, encoding="utf-8") as file:
            text = file.read().split(_MARK)[0].rstrip()
    with open(path, "w", encoding="utf-8") as file:
        file.write(f"{text}\n\n{_MARK}\n{_section(trainer)}")
    # Fails here, not at a push to the hub, if the metadata block is broken.
    ModelCard.load(path)


def _section(trainer) -> str:
    from . import __version__
    from .config import MeanTeacherConfig

    args = trainer.args
    own = [f.name for f in fields(MeanTeacherConfig) if f.name in MeanTeacherConfig.__annotations__]
    values = args.to_dict() | {"ema_half_life": args.half_life}  # with plain strings for enums
    settings = {name: str(values[name]) for name in (*own, *_TRAINING)} | _adapter(trainer.model)
    lines = [
        "## Method (trl_ema)",
        "",
        _METHODS[args.teacher],
        "",
        *(_FORMULA if trainer.teacher is not None else ()),
        f"Trained with trl_ema {__version__} for {trainer.state.global_step} optimizer steps on "
        f"{_describe(trainer.train_dataset)}.",
    ]
    if trainer.teacher is not None and not trainer.teacher.is_base:
        lines.append("The student is this folder; its teacher, also a PEFT adapter, is in `teacher/`.")
    tables = {"Settings": settings, "Last logged metrics": _last_metrics(trainer.state.log_history)}
    for title, table in (tables | trainer.model_card_details).items():
        if table:
            rows = [f"| `{name}` | {_text(value)} |" for name, value in table.items()]
            lines += ["", f"## {title}", "", "| | |", "|---|---|", *rows]
    lines.append("")
    return "\n".join([*lines, "## Cite", "", "```bibtex", CITATIONS, "```", ""])


def _describe(dataset) -> str:
    info = getattr(dataset, "info", None)
    name = getattr(info, "dataset_name", None)
    rows = f"{len(dataset):,} rows" if hasattr(dataset, "__len__") else "a stream"
    return f"{rows} of `{name}`" if name else rows


def _adapter(model) -> dict:
    """Adapter and quantization, of a PEFT model."""
    config = getattr(model, "peft_config", {}).get("default")
    if config is None:
        return {}
    quantization = getattr(model.config, "quantization_config", None)
    kind = getattr(quantization, "bnb_4bit_quant_type", None) if quantization is not None else None
    found = {
        "peft_type": getattr(config.peft_type, "value", config.peft_type),
        "base_model": config.base_model_name_or_path,
    }
    for name in ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "target_modules", "modules_to_save"):
        value = getattr(config, name, None)
        if value is not None:
            found[name] = sorted(value) if isinstance(value, set) else value
    return found | ({} if quantization is None else {"quantization": kind or type(quantization).__name__})


def _last_metrics(log_history: list[dict]) -> dict[str, float]:
    """The newest value of each logged number."""
    newest = {key: value for entry in log_history for key, value in entry.items() if isinstance(value, float)}
    hidden = ("epoch", "_runtime", "_per_second", "total_flos")
    return {key: value for key, value in sorted(newest.items()) if not key.endswith(hidden)}


def _text(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
