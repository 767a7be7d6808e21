"""The model card of a run: TRL's, with the method, its settings, its figures and citations of what it used."""

import os
import re
from dataclasses import dataclass, fields
from typing import Any

from huggingface_hub import ModelCard

from .adapters.names import TEACHER_NAME
from .data import DataPart
from .files import read_json
from .offline import DEMO_MODEL_HUB, is_demo_model
from .regularizers.rehearsal import Rehearsal


_MARK = "<!-- trl_ema -->"
_METHODS = {
    "ema": "Supervised fine-tuning with a mean teacher: the student is pulled towards an exponential moving average of its "
    "own adapter, so that it keeps general abilities while it learns the domain.",
    "frozen": "Supervised fine-tuning with a frozen teacher: the student is pulled towards the model it started from.",
    "none": "Supervised fine-tuning without a teacher. It is not plain: a penalty, rehearsal, weight decay, label "
    "smoothing, NEFTune's noise or a loss other than the cross-entropy shapes it too (see Settings).",
}
_PLAIN = "Plain supervised fine-tuning, no teacher."
_FORMULA = ("    loss = CE(y; p_student) + kl_weight * D(p_teacher, p_student)", "")
# Whom to cite, by what a run used: see `_cited_works`.
CITATIONS = {
    "mean teacher": r"""@inproceedings{tarvainen2017mean,
  title     = {Mean teachers are better role models: Weight-averaged consistency targets improve semi-supervised deep learning results},
  author    = {Tarvainen, Antti and Valpola, Harri},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2017}
}""",
    "EMA study": r"""@article{sviridenko_ema,
  title   = {Adapting Large Language Models for narrow domains using the exponential moving average method},
  author  = {Sviridenko, D. K. and Bobrova, E. V. and Zaytsev, K. S. and Dyuldin, E. V. and Shifman, B. M.},
  journal = {International Journal of Open Information Technologies (INJOIT)},
  url     = {https://www.injoit.ru/index.php/j1/article/view/2518}
}""",
    "frozen teacher": r"""@inproceedings{li2016learning,
  title     = {Learning without Forgetting},
  author    = {Li, Zhizhong and Hoiem, Derek},
  booktitle = {European Conference on Computer Vision},
  year      = {2016}
}""",
    "DFT": r"""@article{wu2025generalization,
  title   = {On the Generalization of {SFT}: A Reinforcement Learning Perspective with Reward Rectification},
  author  = {Wu, Yongliang and others},
  journal = {arXiv preprint arXiv:2508.05629},
  year    = {2025}
}""",
    "ASFT": r"""@article{zhu2025anchored,
  title   = {Anchored Supervised Fine-Tuning},
  author  = {Zhu, He and Su, Junyou and Lai, Peng and Ma, Ren and Zhang, Wenjia and Yang, Linyi and Chen, Guanhua},
  journal = {arXiv preprint arXiv:2509.23753},
  year    = {2025}
}""",
    "self-generated replay": r"""@article{marek2026forgetting,
  title   = {Forgetting in Language Models: Capacity, Optimization, and Self-Generated Replay},
  author  = {Marek, Martin and Cho, Dongkyu and Qiu, Shikai and Chunara, Rumi and Izmailov, Pavel and Wilson, Andrew Gordon},
  journal = {arXiv preprint arXiv:2605.26097},
  year    = {2026}
}""",
    "GeRe": r"""@article{zhang2025gere,
  title   = {{GeRe}: Towards Efficient Anti-Forgetting in Continual Learning of {LLM} via General Samples Replay},
  author  = {Zhang, Yunan and Jiang, Shuoran and Zhao, Mengchen and Li, Yuefeng and Fan, Yang and Wu, Xiangping and Chen, Qingcai},
  journal = {arXiv preprint arXiv:2508.04676},
  year    = {2025}
}""",
    "L2-SP": r"""@inproceedings{li2018explicit,
  title     = {Explicit Inductive Bias for Transfer Learning with Convolutional Networks},
  author    = {Li, Xuhong and Grandvalet, Yves and Davoine, Franck},
  booktitle = {International Conference on Machine Learning},
  year      = {2018}
}""",
    "EWC": r"""@article{kirkpatrick2017overcoming,
  title   = {Overcoming catastrophic forgetting in neural networks},
  author  = {Kirkpatrick, James and Pascanu, Razvan and Rabinowitz, Neil and Veness, Joel and others},
  journal = {Proceedings of the National Academy of Sciences},
  volume  = {114},
  number  = {13},
  pages   = {3521--3526},
  year    = {2017}
}""",
    "SelfAug": r"""@inproceedings{huang2025selfaug,
  title     = {{SelfAug}: Mitigating Catastrophic Forgetting in Retrieval-Augmented Generation via Distribution Self-Alignment},
  author    = {Huang, Yuqing and Zhang, Rongyang and Wang, Qimeng and Lu, Chengqiang and Gao, Yan and Wu, Yi and Hu, Yao and Zhi, Xuyang and Liu, Guiquan and Li, Xin and Wang, Hao and Chen, Enhong},
  booktitle = {Findings of the Association for Computational Linguistics: EMNLP},
  year      = {2025}
}""",
    "EAFT": r"""@article{diao2026entropy,
  title   = {Entropy-Adaptive Fine-Tuning: Resolving Confident Conflicts to Mitigate Forgetting},
  author  = {Diao, Muxi and Yang, Lele and Gong, Wuxuan and Zhang, Yutong and Yan, Zhonghao and Han, Yufei and Liang, Kongming and Xu, Weiran and Ma, Zhanyu},
  journal = {arXiv preprint arXiv:2601.02151},
  year    = {2026}
}""",
    "LoRA": r"""@inproceedings{hu2022lora,
  title     = {{LoRA}: Low-Rank Adaptation of Large Language Models},
  author    = {Hu, Edward J. and Shen, Yelong and Wallis, Phillip and Allen-Zhu, Zeyuan and Li, Yuanzhi and Wang, Shean and Wang, Lu and Chen, Weizhu},
  booktitle = {International Conference on Learning Representations},
  year      = {2022}
}""",
    "QLoRA": r"""@inproceedings{dettmers2023qlora,
  title     = {{QLoRA}: Efficient Finetuning of Quantized {LLMs}},
  author    = {Dettmers, Tim and Pagnoni, Artidoro and Holtzman, Ari and Zettlemoyer, Luke},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2023}
}""",
    "drift": r"""@article{shenfeld2025razor,
  title   = {{RL}'s Razor: Why Online Reinforcement Learning Forgets Less},
  author  = {Shenfeld, Idan and Pari, Jyothish and Agrawal, Pulkit},
  journal = {arXiv preprint arXiv:2509.04259},
  year    = {2025}
}""",
    "TRL": r"""@software{vonwerra2020trl,
  title   = {{TRL: Transformers Reinforcement Learning}},
  author  = {von Werra, Leandro and Belkada, Younes and Tunstall, Lewis and Beeching, Edward and Thrush, Tristan and Lambert, Nathan and Huang, Shengyi and Rasul, Kashif and Gallouédec, Quentin},
  license = {Apache-2.0},
  url     = {https://github.com/huggingface/trl},
  year    = {2020}
}""",
    "PEFT": r"""@misc{peft,
  title        = {{PEFT}: State-of-the-art Parameter-Efficient Fine-Tuning methods},
  author       = {Sourab Mangrulkar and Sylvain Gugger and Lysandre Debut and Younes Belkada and Sayak Paul and Benjamin Bossan and Marian Tietz},
  howpublished = {\url{https://github.com/huggingface/peft}},
  year         = {2022}
}""",
}
_REHEARSAL = "Beside it, rehearsal: {loss}, with {weight}, on {texts}."
_REHEARSAL_LOSSES = {
    "kl": "KL(model before training || student)",
    "ce": "the cross-entropy, as of training data",
}
_OWN_TEXTS = "texts that the model before training wrote itself (arXiv:2605.26097)"
_GIVEN_TEXTS = "general texts that were given (arXiv:2508.04676)"
_OF_REHEARSAL = (
    "In trl_ema's own comparison, of a model of 135M parameters over 120 steps, a weight of 4 kept over nine tenths of plain "
    "fine-tuning's gain at about a tenth of its drift on general text, and at more on questions like the domain's own. At the "
    "learning rates that are best for it over 300 steps no loss of accuracy shows, of plain fine-tuning neither; at a high one plain "
    "fine-tuning lost 7 points and it lost 3, with one seed. Measure each model's: `trl-ema evaluate`."
)
_OF_OTHERS = (
    "In trl_ema's own comparison, of a model of 135M parameters, mostly with one seed, no teacher alone kept much more at equal drift "
    "than plain fine-tuning whose adapter is scaled back, and of the penalties only EWC, with a weight of hundreds; rehearsal on the "
    "model's own words kept far more. Measure each model's: `trl-ema evaluate`."
)
_PENALTIES = {
    "l1_weight": "a penalty of {weight:g} times the sum of |weights - their start| (L1)",
    "l2_weight": "a penalty of {weight:g} / 2 times ||weights - their start||^2 (L2-SP, arXiv:1802.01483)",
    "ewc_weight": "elastic weight consolidation (arXiv:1612.00796) of weight {weight:g}, with the Fisher information of the model "
    "before training on texts that it wrote itself",
}
_WEIGHTED = (
    "Each token's cross-entropy is weighted by the entropy of the student's prediction, from 0 where it is sure to 1 "
    "(arXiv:2601.02151)."
)
_PROMPTS = "The divergence is on the tokens of prompts alone (arXiv:2509.03934)."
# Adapted modules that are named one by one, at most.
_SHOWN_MODULES = 12
_TRAINING = ("learning_rate", "lr_scheduler_type", "num_train_epochs", "max_steps", "per_device_train_batch_size",
             "gradient_accumulation_steps", "max_length", "packing", "loss_type", "weight_decay", "optim_args",
             "label_smoothing_factor", "neftune_noise_alpha", "bf16", "fp16", "seed")  # fmt: skip


def write_model_card(trainer: Any, folder: str) -> None:
    """
    Adds our part to the `README.md` in `folder` (TRL's or PEFT's), replacing an older one of ours, and mends theirs: of a
    model that was loaded from a path TRL says that its name is None, and PEFT the path.

    Args:
        trainer ([`EMARegularizedSFTTrainer`]): Trained or not; the tables in its `model_card_details` are added, and its
            `model_card_results` to the metadata, as the hub's `model-index`.
        folder (`str`): With the model, and the card to add to, if there is one.
    """
    path = os.path.join(folder, "README.md")
    text = ""
    if os.path.isfile(path):
        with open(path, encoding="utf-8") as file:
            text = file.read().split(_MARK)[0].rstrip()
    base = _base_of(trainer.model)
    theirs = _with_results(_mended(text, base), trainer, folder)
    with open(path, "w", encoding="utf-8") as file:
        file.write(f"{theirs}\n\n{_MARK}\n{_section(trainer, base, folder, cited=theirs)}")
    # Fails here, not at a push to the hub, if the metadata block is broken.
    ModelCard.load(path)


def mend_model_card(trainer: Any, folder: str) -> None:
    """Mends PEFT's `README.md` in `folder`, if there is one, as [`write_model_card`] does."""
    path = os.path.join(folder, "README.md")
    if os.path.isfile(path):
        with open(path, encoding="utf-8") as file:
            text = file.read()
        with open(path, "w", encoding="utf-8") as file:
            file.write(_mended(text, _base_of(trainer.model)) + "\n")


def method_of(args: Any, rehearsal_dataset: Any = None) -> tuple[str, dict[str, str]]:
    """
    What TRL's part of the card calls the method, and the paper it says introduced it: `title` and arXiv `id`, or nothing.

    Args:
        args ([`MeanTeacherConfig`]): Of the run.
        rehearsal_dataset (`Dataset` or `IterableDataset`, *optional*): Given to the trainer, instead of that of `args`.
    """
    given = rehearsal_dataset is not None or args.rehearsal_dataset is not None
    if args.teacher == "ema":
        return "EMA-regularized SFT", {"title": "Mean teachers are better role models", "id": "1703.01780"}
    if args.teacher == "frozen" and args.kl_tokens == "prompt":
        return "SelfAug", {"title": "SelfAug: Mitigating Catastrophic Forgetting", "id": "2509.03934"}
    if args.teacher == "frozen" and args.loss_type == "dft":
        return "ASFT", {"title": "Anchored Supervised Fine-Tuning", "id": "2509.23753"}
    if args.teacher == "frozen":
        return "SFT with a frozen teacher", {"title": "Learning without Forgetting", "id": "1606.09282"}
    if args.rehearsal_weight and not given:
        return "SFT with self-generated replay", {"title": "Forgetting in Language Models", "id": "2605.26097"}
    if args.rehearsal_weight:
        return "SFT with general replay", {"title": "GeRe: Towards Efficient Anti-Forgetting", "id": "2508.04676"}
    if args.entropy_weighting:
        return "EAFT", {"title": "Entropy-Adaptive Fine-Tuning", "id": "2601.02151"}
    if args.ewc_weight:
        return "SFT with EWC", {"title": "Overcoming catastrophic forgetting in neural networks", "id": "1612.00796"}
    if args.l2_weight:
        title = "Explicit Inductive Bias for Transfer Learning with Convolutional Networks"
        return "SFT with L2-SP", {"title": title, "id": "1802.01483"}
    if args.l1_weight:
        return "SFT with an L1 penalty", {}
    return "SFT", {}


def without_folder(name: str) -> str:
    """The name of a local file or folder; anything else, such as a hub name, as it is."""
    return os.path.basename(os.path.abspath(name)) if os.sep in name and os.path.exists(name) else name


@dataclass(frozen=True)
class _Base:
    """
    The model that was trained, or that the adapter lies over.

    Args:
        label (`str`): What a reader is told it is, in Markdown.
        hub (`str`, *optional*): The model on the hub that it is, or was made from.
        path (`str`, *optional*): Where it was loaded from, on this machine.
        code (`str`, *optional*): Expression that gives its name or path on any machine.
    """

    label: str
    hub: str | None = None
    path: str | None = None
    code: str | None = None


def _base_of(model: Any) -> _Base:
    name = str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
    if not name:
        return _Base("a model that was given in memory, without a name")
    # Of the hub, by its folder in the cache.
    cached = re.search(r"models--([^/\\]+)--([^/\\]+)[/\\]snapshots[/\\]", name)
    hub = f"{cached[1]}/{cached[2]}" if cached else name
    if is_demo_model(name):
        label = f"[{DEMO_MODEL_HUB}](https://huggingface.co/{DEMO_MODEL_HUB}), quantized to Q4_1 and back (the offline demo's)"
        return _Base(label, DEMO_MODEL_HUB, name, "demo_model()")
    if (os.path.isdir(name) or os.path.isabs(name)) and not cached:
        return _Base(f"the local model `{os.path.basename(os.path.abspath(name))}`", path=name)
    return _Base(f"[{hub}](https://huggingface.co/{hub})", hub, name if cached else None)


def _mended(text: str, base: _Base) -> str:
    """What TRL and PEFT wrote, with the base's name, and without the quick start of a model named None."""
    for name in ("None", base.path):
        text = text.replace(f"[{name}](https://huggingface.co/{name})", base.label)
    text = re.sub(r"^## Quick start\n.*?(?=^## |\Z)", "", text, flags=re.MULTILINE | re.DOTALL)
    if not text.startswith("---"):  # no metadata
        return text.rstrip()
    card: Any = ModelCard(text)
    named = getattr(card.data, "base_model", None)
    if named and named != base.hub:
        kept = [tag for tag in card.data.tags or [] if not tag.startswith("base_model:")]
        adapted = [f"base_model:adapter:{base.hub}"] if base.hub and len(kept) < len(card.data.tags or []) else []
        card.data.base_model, card.data.tags = base.hub, sorted([*kept, *adapted])
    return str(card).rstrip()


def _with_results(text: str, trainer: Any, folder: str) -> str:
    """The card with the trainer's figures in its metadata, by which the hub shows and finds them."""
    if not trainer.model_card_results:
        return text
    card: Any = ModelCard(text)
    hub = getattr(trainer, "hub_model_id", None) or trainer.args.hub_model_id
    card.data.model_name = getattr(card.data, "model_name", None) or hub or os.path.basename(os.path.abspath(folder))
    card.data.eval_results = trainer.model_card_results
    return str(card).rstrip()


def _quick_start(trainer: Any, base: _Base, folder: str) -> list[str]:
    """Code that runs as it stands: for the student, and for its teacher where it has a folder."""
    adapter = bool(getattr(trainer.model, "peft_config", None))
    if adapter and base == _Base(base.label):
        return [
            "The adapter does not know the name of its base: load that model, then `PeftModel.from_pretrained(base, folder)`."
        ]
    hub = getattr(trainer, "hub_model_id", None) or trainer.args.hub_model_id
    # A path would not be there for whoever gets a copy.
    where_it_is = repr(folder) if not os.path.isabs(folder) else '"."  # the folder of this file, in which to run this'
    tokens = _added_vocabulary(trainer.model, base)
    folders = {"": "folder"}
    if adapter and trainer.teacher is not None and not trainer.teacher.is_base:
        folders["Its teacher:"] = f'f"{{folder}}/{TEACHER_NAME}"'
    question = "What is hypertension?"
    chat = getattr(trainer.processing_class, "chat_template", None)
    lines = []
    for title, where in folders.items():
        lines += [title, ""] if title else []
        lines += ["```python", *_loading(base, adapter, where, hub, where_it_is, tokens)]
        lines += ["tokenizer = AutoTokenizer.from_pretrained(folder)"]
        if chat:
            lines += [f'messages = [{{"role": "user", "content": "{question}"}}]',
                      "text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)",
                      'inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")']  # fmt: skip
        else:
            lines += [f'inputs = tokenizer("{question}", return_tensors="pt")']
        lines += ['output = model.generate(input_ids=inputs["input_ids"], max_new_tokens=64)',
                  'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
                  "```", ""]  # fmt: skip
    if adapter and base.path and not base.code:
        elsewhere = f"`{base.hub}`" if base.hub else "the place of your copy"
        lines += ["`adapter_config.json` names the base by its path on the machine of the training. On another machine put "
                  f"{elsewhere} there, as `base_model_name_or_path`."]  # fmt: skip
    return lines


def _added_vocabulary(model: Any, base: _Base) -> int | None:
    """Tokens of a model whose embeddings were resized; `None` where its base has as many."""
    config = os.path.join(base.path or "", "config.json")
    tokens = model.get_input_embeddings().weight.shape[0]
    return tokens if os.path.isfile(config) and read_json(config).get("vocab_size", tokens) != tokens else None


def _loading(base: _Base, adapter: bool, where: str, hub: str | None, folder: str, tokens: int | None) -> list[str]:
    """Imports, and the lines that give `folder` and `model`."""
    source = f'folder = snapshot_download("{hub}")' if hub else f"folder = {folder}"
    imports = ["from huggingface_hub import snapshot_download"] if hub else []
    if not adapter:
        imports += ["from transformers import AutoModelForCausalLM, AutoTokenizer"]
        model = [f"model = AutoModelForCausalLM.from_pretrained({where})"]
    elif base.code:
        imports += ["from peft import PeftModel", "from transformers import AutoModelForCausalLM, AutoTokenizer",
                    "from trl_ema.offline import demo_model"]  # fmt: skip
        model = [f"base = AutoModelForCausalLM.from_pretrained({base.code})",
                 *([f"base.resize_token_embeddings({tokens})"] if tokens else []),
                 f"model = PeftModel.from_pretrained(base, {where})"]  # fmt: skip
    else:
        imports += ["from peft import AutoPeftModelForCausalLM", "from transformers import AutoTokenizer"]
        model = [f"model = AutoPeftModelForCausalLM.from_pretrained({where})"]
    return [*imports, "", source, *model]


def _section(trainer: Any, base: _Base, folder: str, cited: str) -> str:
    """Our part of the card. `cited`: the rest of it, whose citations are not repeated."""
    lines = [
        "## Quick start",
        "",
        f"This model is made from {base.label}.",
        "",
        *_quick_start(trainer, base, folder),
        "",
        *_method(trainer),
    ]
    tables = {
        "Settings": _settings(trainer, base),
        "Last logged metrics": _last_metrics(trainer.state.log_history),
    }
    for title, table in (tables | trainer.model_card_details).items():
        if table:
            rows = [f"| `{name}` | {_text(value)} |" for name, value in table.items()]
            lines += ["", f"## {title}", "", "| | |", "|---|---|", *rows]
    found = (CITATIONS[name] for name in _cited_works(trainer))
    # TRL's own card cites TRL.
    entries = [entry for entry in found if entry.partition(",")[0] not in cited]
    return "\n".join([*lines, "", "## Cite", "", "```bibtex", *entries, "```", ""])


def _method(trainer: Any) -> list[str]:
    from . import __version__

    args = trainer.args
    lines = ["## Method (trl_ema)", "", _PLAIN if args.is_plain_sft else _METHODS[args.teacher], ""]
    if args.entropy_weighting:
        lines += [_WEIGHTED, ""]
    if args.teacher != "none" and args.kl_tokens == "prompt":
        lines += [_PROMPTS, ""]
    if args.rehearsal_weight:
        lines += [_rehearsal(trainer), ""]
    for name, text in _PENALTIES.items():
        if getattr(args, name):
            lines += [f"Beside it, {text.format(weight=getattr(args, name))}.", ""]
    regularized = args.teacher != "none" or args.entropy_weighting or any(getattr(args, name) for name in _PENALTIES)
    if regularized and not args.rehearsal_weight:
        lines += [_OF_OTHERS, ""]
    if trainer.teacher is not None:
        lines += _FORMULA
    lines.append(
        f"Trained with trl_ema {__version__} for {trainer.state.global_step} optimizer steps on "
        f"{_describe(trainer.train_dataset)}."
    )
    if trainer.teacher is not None and not trainer.teacher.is_base:
        lines.append("The student is this folder; its teacher, also a PEFT adapter, is in `teacher/`.")
    return lines


def _rehearsal(trainer: Any) -> str:
    args, own = trainer.args, _rehearses_own(trainer)
    weight = f"a weight of {args.rehearsal_weight:g}"
    if args.drift_budget is not None:
        weight = (
            f"a weight that began at {args.rehearsal_weight:g} and was steered to {args.drift_budget:g} nats per token"
        )
    loss, texts = _REHEARSAL_LOSSES[args.rehearsal_loss], _OWN_TEXTS if own else _GIVEN_TEXTS
    told = _REHEARSAL.format(loss=loss, weight=weight, texts=texts)
    measured = own and args.rehearsal_loss == "kl" and args.drift_budget is None and args.teacher == "none"
    return f"{told} {_OF_REHEARSAL}" if measured else told


def _rehearses_own(trainer: Any) -> bool:
    """Whether the rehearsed texts are the model's own."""
    rehearsals = (regularizer for regularizer in trainer.regularizers if isinstance(regularizer, Rehearsal))
    return any(rehearsal.own is not None for rehearsal in rehearsals)


def _settings(trainer: Any, base: _Base) -> dict[str, str]:
    from .config import MeanTeacherConfig

    args = trainer.args
    own = [f.name for f in fields(MeanTeacherConfig) if f.name in MeanTeacherConfig.__annotations__]
    values = args.to_dict() | {"ema_half_life": args.half_life}  # with plain strings for enums
    if values["rehearsal_dataset"] is not None:
        values["rehearsal_dataset"] = DataPart.from_config(values["rehearsal_dataset"], "rehearsal_dataset").path
    settings = {name: str(values[name]) for name in (*own, *_TRAINING)} | _adapter(trainer.model)
    return settings | ({"base_model": base.label} if "base_model" in settings else {})


def _cited_works(trainer: Any) -> list[str]:
    """Keys of [`CITATIONS`]: what this run used, and nothing else."""
    args, adapter = trainer.args, _adapter(trainer.model)
    dft = args.loss_type == "dft"
    # A trainer that measures during training logs it; a script adds what it measured to the tables.
    figures = [*trainer.state.log_history, *trainer.model_card_details.values()]
    drift = any(name.startswith("drift_") or "kl_base_model" in name for table in figures for name in table)
    used = {
        "mean teacher": args.teacher == "ema",
        "EMA study": args.teacher == "ema" or args.l1_weight > 0,
        "frozen teacher": args.teacher == "frozen",
        "self-generated replay": args.rehearsal_weight > 0 and _rehearses_own(trainer),
        "GeRe": args.rehearsal_weight > 0 and not _rehearses_own(trainer),
        "L2-SP": args.l2_weight > 0,
        "EWC": args.ewc_weight > 0,
        "DFT": dft,
        "ASFT": dft and args.teacher == "frozen",
        "SelfAug": args.teacher != "none" and args.kl_tokens == "prompt",
        "EAFT": args.entropy_weighting,
        "LoRA": adapter.get("peft_type") == "LORA",
        "QLoRA": adapter.get("peft_type") == "LORA" and adapter.get("quantization") in ("nf4", "fp4"),
        "drift": drift,
        "TRL": True,
        "PEFT": bool(adapter),
    }
    return [name for name, is_used in used.items() if is_used]


def _describe(dataset: Any) -> str:
    info = getattr(dataset, "info", None)
    name = getattr(info, "dataset_name", None)
    rows = f"{len(dataset):,} rows" if hasattr(dataset, "__len__") else "a stream"
    return f"{rows} of `{name}`" if name else rows


def _adapter(model: Any) -> dict[str, Any]:
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
            found[name] = _in_short(sorted(value)) if isinstance(value, set) else value
    return found | ({} if quantization is None else {"quantization": kind or type(quantization).__name__})


def _in_short(modules: list[str]) -> list[str] | str:
    """Names of modules; of the many that "all-linear" becomes, the kinds."""
    kinds = sorted({name.rpartition(".")[2] for name in modules})
    if len(modules) <= _SHOWN_MODULES or len(kinds) == len(modules):
        return modules
    return f"{', '.join(kinds)}: {len(modules)} modules by name"


def _last_metrics(log_history: list[dict[str, Any]]) -> dict[str, float]:
    """The newest value of each logged number."""
    newest = {key: value for entry in log_history for key, value in entry.items() if isinstance(value, float)}
    hidden = ("epoch", "_runtime", "_per_second", "total_flos")
    return {key: value for key, value in sorted(newest.items()) if not key.endswith(hidden)}


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else without_folder(str(value))
