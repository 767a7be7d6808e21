"""`MeanTeacherConfig`: everything `SFTConfig` has, and the teacher."""

import warnings
from dataclasses import dataclass, field, fields

from trl import SFTConfig

from .data import DataPart
from .losses import KL_DIRECTIONS
from .options import plain_count, plain_number, take_booleans
from .schedules import EARLY


TEACHERS = ("ema", "frozen", "none")
REHEARSAL_LOSSES = ("kl", "ce")
KL_TOKENS = ("loss", "all", "prompt")
# The slowest of three that kept 90 % of SFT's gain: recipes/results/half_life.md.
DEFAULT_HALF_LIFE = 0.25
_NUMBERS = (
    "ema_half_life", "ema_decay", "teacher_anchor", "kl_weight", "kl_warmup_ratio", "kl_temperature", "jsd_mixture",
    "kl_fraction", "rehearsal_weight", "rehearsal_fraction", "drift_budget", "rehearsal_num_texts",
    "rehearsal_num_tokens", "max_drift", "l1_weight", "l2_weight", "ewc_weight", "ewc_num_texts",
)  # fmt: skip
_OPTIONAL = ("ema_half_life", "ema_decay", "drift_budget", "max_drift")
# Of rehearsal, and of the Fisher information too.
_OF_TEXTS = ("rehearsal_texts", "rehearsal_num_texts", "rehearsal_num_tokens", "rehearsal_start", "rehearsal_chat")
_PENALTIES = ("l1_weight", "l2_weight", "ewc_weight")
_EMA_FIELDS = ("ema_half_life", "ema_decay", "ema_warmup", "ema_update_steps")


@dataclass
class MeanTeacherConfig(SFTConfig):
    r"""
    Configuration of [`EMARegularizedSFTTrainer`]: [`~trl.SFTConfig`] plus a teacher that holds the student back.

    Per labelled token, with the student θ and the teacher φ on one shared frozen base:

        loss = CE(y; p_θ) + kl_weight · ramp(step) · D(p_φ, p_θ)
        after each optimizer step:   φ ← d·φ + (1 − d)·θ

    With `rehearsal_weight` the student is also held to the model before training, on texts that this has written itself:

        loss += rehearsal_weight · KL(p_before ‖ p_θ)          a mean over all tokens of the rehearsed texts

    Penalties hold the trained weights near their start θ₀, with or without the others, once per optimizer step:

        loss += l1_weight · Σ|θ − θ₀| + l2_weight / 2 · ‖θ − θ₀‖² + ewc_weight / 2 · Σ F·(θ − θ₀)²

    `teacher="ema"` is this method, `"frozen"` keeps φ where it started (d = 1), `"none"` is plain SFT: with it the
    losses equal [`~trl.SFTTrainer`]'s step for step. (Over a 4-bit base in a run that is neither `bf16` nor `fp16`, TRL
    trains the adapter in bfloat16; here it stays float32, with every teacher, and all else is equal.) With
    `loss_type="dft"` and a frozen teacher the method is ASFT, with `kl_tokens="prompt"` and a frozen teacher SelfAug, and
    with `entropy_weighting` and none EAFT.

    The options are described by their `help`, which is also what `--help` prints.

    Sources: Tarvainen & Valpola 2017, https://arxiv.org/abs/1703.01780 (mean teacher, ramp); Zhu et al. 2025,
    https://arxiv.org/abs/2509.23753 (ASFT); Huang et al. 2025, https://arxiv.org/abs/2509.03934 (SelfAug: in its text the
    reverse KL, in its code the forward, with weight 0.5); Diao et al. 2026, https://arxiv.org/abs/2601.02151 (EAFT); Li et al.
    2018, https://arxiv.org/abs/1802.01483 (L2-SP); Kirkpatrick et al. 2017, https://arxiv.org/abs/1612.00796 (EWC).
    """

    teacher: str = field(
        default="ema",
        metadata={
            "help": "Who holds the student back: `ema` (exponential moving average of the student's adapter), `frozen` "
            "(the model as it was before training) or `none` (plain SFT).",
            "choices": list(TEACHERS),
        },
    )
    ema_half_life: float | None = field(
        default=None,
        metadata={
            "help": "Optimizer steps, as a fraction of the run, after which half of the teacher is replaced. Larger is "
            f"slower; must be above 0. Default {DEFAULT_HALF_LIFE}, unless `ema_decay` is given."
        },
    )
    ema_decay: float | None = field(
        default=None,
        metadata={
            "help": "Share of the old teacher kept per update, in [0, 1]: 1 freezes the teacher, 0 copies the student. "
            "Excludes `ema_half_life`, which means the same at every run length."
        },
    )
    ema_warmup: bool = field(
        default=False,
        metadata={"help": "Let the teacher follow quickly at first: decay min(d, (1 + t) / (10 + t)) after t updates."},
    )
    ema_update_steps: int = field(
        default=1, metadata={"help": "Optimizer steps between two updates of the teacher; at least 1."}
    )
    teacher_anchor: float = field(
        default=0.0,
        metadata={
            "help": "Shrinks the teacher's adapter towards the base model: base + (1 - anchor) * update. In [0, 1]: 0 is "
            "the pure mean teacher, 1 the base model. Plain LoRA (and rsLoRA) only."
        },
    )
    kl_weight: float = field(
        default=1.0,
        metadata={"help": "Weight of the divergence to the teacher; 0 is plain SFT, larger keeps more. At least 0."},
    )
    kl_warmup_ratio: float = field(
        default=0.0,
        metadata={
            "help": "Fraction of the run over which `kl_weight` ramps up as exp(-5 (1 - x)^2). In [0, 1]; 0 is no ramp."
        },
    )
    kl_direction: str = field(
        default="forward",
        metadata={
            "help": "Divergence: `forward` KL(teacher || student), `reverse` KL(student || teacher), or `jsd`, the "
            "generalized Jensen-Shannon divergence. Forward covers the teacher, reverse seeks its modes.",
            "choices": list(KL_DIRECTIONS),
        },
    )
    jsd_mixture: float = field(
        default=0.5,
        metadata={"help": "Share of the teacher in the mixture of `kl_direction=jsd`, in (0, 1); 0.5 is symmetric."},
    )
    kl_temperature: float = field(
        default=1.0,
        metadata={
            "help": "Temperature of the divergence, above 0; larger weighs unlikely tokens more. There is no T^2 factor: "
            "multiply `kl_weight` by it to keep the gradient's size."
        },
    )
    kl_tokens: str = field(
        default="loss",
        metadata={
            "help": "Tokens of the divergence: `loss` (those that carry a label), `all` (prompts too, padding never) or "
            "`prompt` (those without a label alone). It is always a mean over its own tokens.",
            "choices": list(KL_TOKENS),
        },
    )
    kl_fraction: float = field(
        default=1.0,
        metadata={
            "help": "Share of the sequences of each micro-batch that the teacher sees, drawn at random, in (0, 1]. Their "
            "divergence is weighted by its inverse, so that its expectation is that of all; less is faster and noisier."
        },
    )
    entropy_weighting: bool = field(
        default=False,
        metadata={
            "help": "Weight each token's cross-entropy by the entropy of the student's prediction, from 0 where it is sure, "
            "right or wrong, to 1 (EAFT). Excludes `loss_type=dft`."
        },
    )
    eval_teacher: bool = field(
        default=False,
        metadata={"help": "Evaluate the teacher too, as `eval_teacher_loss`. Doubles the time of an evaluation."},
    )
    rehearsal_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the divergence from the model before training on texts that it has written itself, against the "
            "mean cross-entropy; at least 0, 0 is no rehearsal. Larger keeps more; try 4."
        },
    )
    rehearsal_fraction: float = field(
        default=0.33,
        metadata={
            "help": "Share of the rows of an optimizer step that are rehearsed, beside those of the data, and at least one text; of "
            "packed rows the share of their tokens. In (0, 1)."
        },
    )
    rehearsal_texts: str | None = field(
        default=None,
        metadata={
            "help": "File of texts that `trl-ema rehearse` wrote with this model; by default they are written when training "
            "begins, once for each model."
        },
    )
    rehearsal_dataset: dict | str | None = field(
        default=None,
        metadata={
            "help": "General texts to rehearse instead of self-written ones: hub name or JSONL, CSV or Parquet file, or an entry as of "
            "`datasets`, such as `{path: general.csv, columns: {text: Body}}`. Of each all tokens count. Excludes `rehearsal_texts`."
        },
    )
    rehearsal_loss: str = field(
        default="kl",
        metadata={
            "help": "What is done with rehearsed texts: `kl` holds the student to the model before training on them, `ce` trains "
            "on them as on data (replay).",
            "choices": list(REHEARSAL_LOSSES),
        },
    )
    rehearsal_num_texts: int = field(
        default=256,
        metadata={
            "help": "Texts to write, or rows of `rehearsal_dataset` to take at most, drawn at random; at least one micro-batch of "
            "them."
        },
    )
    rehearsal_num_tokens: int = field(default=96, metadata={"help": "Tokens of a text, at most; at least 8."})
    rehearsal_start: str | None = field(
        default=None,
        metadata={"help": "Token that a text begins with, where the tokenizer names none (`bos_token`)."},
    )
    rehearsal_chat: bool | None = field(
        default=None,
        metadata={
            "help": "Let the model write chats alone (True) or raw texts alone (False); by default half of each, and without a "
            "chat template raw ones."
        },
    )
    drift_budget: float | None = field(
        default=None,
        metadata={
            "help": "Nats per token that the student may be from the model before training on rehearsed texts at the end, and twice "
            "as many at the start: `rehearsal_weight` is then where its weight begins, and it rises above that and falls below. "
            "Above 0."
        },
    )
    max_drift: float | None = field(
        default=None,
        metadata={
            "help": "Save and stop when the drift from the model before training is above so many nats per token: the smoothed "
            "`rehearsal_kl`, or what is measured on general rows every `drift_steps`. Above 0."
        },
    )
    l1_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the sum of |w - w0| over the trained weights, w0 where they started; at least 0, 0 is none. Larger "
            "keeps more; try 1e-5."
        },
    )
    l2_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the sum of (w - w0)^2 / 2 over the trained weights, w0 where they started (L2-SP); at least 0, 0 is "
            "none. Larger keeps more; try 1e-2."
        },
    )
    ewc_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the sum of F (w - w0)^2 / 2 (elastic weight consolidation), F the Fisher information of the model "
            "before training on texts that it has written itself; at least 0, 0 is none. Larger keeps more; try 300."
        },
    )
    ewc_num_texts: int = field(
        default=128,
        metadata={"help": "Texts, of those written, that the Fisher information is measured on; at least 1."},
    )
    stop_on_nonfinite_loss: bool = field(
        default=True,
        metadata={
            "help": "Stop, before the optimizer step, when a loss is NaN or infinite. With False training goes on as in "
            "`Trainer`."
        },
    )

    reads_texts = False  # whether something that is none of its options does, as CorDA in a recipe

    def __post_init__(self):
        take_booleans(self)  # before TRL reads them
        # TRL's names and defaults, under the name that transformers has for them since 5.23 (it warns of the old ones).
        for name in ("checkpointing", "checkpointing_kwargs"):
            if getattr(self, f"activation_{name}", 0) is None:
                setattr(self, f"activation_{name}", getattr(self, f"gradient_{name}"))
        if self.greater_is_better is None and str(self.metric_for_best_model).endswith("drift"):
            self.greater_is_better = False  # as transformers knows of a loss
        super().__post_init__()
        self._take_plain_numbers()
        self._warn_about_ignored()
        _check(self)

    def _take_plain_numbers(self):
        """Numbers of any library become Python's, so that a checkpoint or a model card can hold them."""
        for name in _NUMBERS:
            value = getattr(self, name)
            if value is not None or name not in _OPTIONAL:
                setattr(self, name, plain_number(name, value))

    @property
    def half_life(self) -> float | None:
        """The half-life in force, `None` where `ema_decay` is given."""
        return DEFAULT_HALF_LIFE if self.ema_half_life is None and self.ema_decay is None else self.ema_half_life

    @property
    def needs_fused_forward(self) -> bool:
        """Whether the loss has terms that are computed from the outputs, in a forward that TRL's own does not have."""
        return self.teacher != "none" or self.rehearsal_weight > 0 or self.entropy_weighting

    @property
    def is_plain_sft(self) -> bool:
        """
        Whether the student is fitted to the labels alone: nothing holds it back, and the loss is the cross-entropy.

        The adapter's own `lora_dropout` does not count: it is part of LoRA's usual setting, and the same in all arms.
        """
        of_optimizer = dict(part.partition("=")[::2] for part in (self.optim_args or "").replace(" ", "").split(","))
        decay = self.weight_decay or float(of_optimizer.get("weight_decay", 0))
        others = [decay, self.label_smoothing_factor, self.neftune_noise_alpha]
        others += [getattr(self, name) for name in _PENALTIES]
        return not self.needs_fused_forward and self.loss_type == "nll" and not any(others)

    @property
    def ignored(self) -> list[str]:
        """Names of the options that are set and do nothing beside the others."""
        default = {f.name: f.default for f in fields(MeanTeacherConfig)}
        ignored = []
        if self.teacher != "ema":
            ignored += [n for n in _EMA_FIELDS if getattr(self, n) != default[n]]
        if self.teacher == "none":
            others = [n for n in default if n.startswith("kl_") or n in ("teacher_anchor", "eval_teacher")]
            ignored += [n for n in others if getattr(self, n) != default[n]]
        if not self.rehearsal_weight:
            used = _OF_TEXTS if self.ewc_weight or self.reads_texts else ()
            others = [n for n in default if n.startswith("rehearsal_") and n not in used]
            ignored += [n for n in others if getattr(self, n) != default[n]]
        elif self.rehearsal_dataset is not None and not self.ewc_weight:  # nothing is written
            ignored += [n for n in ("rehearsal_start", "rehearsal_chat") if getattr(self, n) != default[n]]
        if self.rehearsal_texts is not None and (
            self.rehearsal_weight or self.ewc_weight or self.reads_texts
        ):  # as they are
            others = [n for n in _OF_TEXTS if n != "rehearsal_texts"]
            ignored += [n for n in others if getattr(self, n) != default[n]]
        elif self.rehearsal_chat and self.rehearsal_start is not None and "rehearsal_start" not in ignored:
            ignored.append("rehearsal_start")  # of raw texts
        if not self.ewc_weight and self.ewc_num_texts != default["ewc_num_texts"]:
            ignored.append("ewc_num_texts")
        if self.kl_direction != "jsd" and self.jsd_mixture != default["jsd_mixture"]:
            ignored.append("jsd_mixture")
        return ignored

    def _warn_about_ignored(self):
        if ignored := self.ignored:
            warnings.warn(
                f"Ignored with `teacher={self.teacher!r}`, `kl_direction={self.kl_direction!r}`, "
                f"`rehearsal_weight={self.rehearsal_weight!r}`, `ewc_weight={self.ewc_weight!r}`: "
                + ", ".join(f"`{name}={getattr(self, name)!r}`" for name in ignored)
                + ".",
                stacklevel=4,
            )


def _check(config: MeanTeacherConfig) -> None:
    """Raises `ValueError` for what is out of its range, or excludes something else."""
    _check_rehearsal(config)
    _check_penalties(config)
    _check_choice("teacher", config.teacher, TEACHERS)
    _check_choice("kl_direction", config.kl_direction, KL_DIRECTIONS)
    _check_choice("kl_tokens", config.kl_tokens, KL_TOKENS)
    if config.entropy_weighting and config.loss_type == "dft":
        raise ValueError(
            "`entropy_weighting` and `loss_type='dft'` both weight the cross-entropy of each token. Use one of them; "
            "`loss_type='nll'` is the plain one."
        )
    if config.ema_half_life is not None and config.ema_decay is not None:
        raise ValueError(
            f"`ema_half_life` ({config.ema_half_life}) and `ema_decay` ({config.ema_decay}) both set the speed of the "
            "teacher. Give one of them."
        )
    if config.ema_half_life is not None and not 0 < config.ema_half_life < float("inf"):
        raise ValueError(
            f"`ema_half_life` must be above 0, got {config.ema_half_life}. It is a fraction of the run; try "
            f"{DEFAULT_HALF_LIFE}, or `teacher='frozen'` for a teacher that never moves."
        )
    if config.ema_decay is not None:
        _check_range("ema_decay", config.ema_decay, "It is the share of the old teacher kept per update; try 0.999.")
    _check_range("teacher_anchor", config.teacher_anchor, "0 is the pure mean teacher, 1 the base model; try 0.5.")
    _check_range("kl_warmup_ratio", config.kl_warmup_ratio, "It is a fraction of the run; try 0.1.")
    config.ema_update_steps = plain_count("ema_update_steps", config.ema_update_steps, 1, "It counts optimizer steps.")
    if not 0 <= config.kl_weight < float("inf"):
        raise ValueError(
            f"`kl_weight` must be at least 0 and finite, got {config.kl_weight}. Use 0 for no divergence; try 1.0."
        )
    if not 0 < config.kl_temperature < float("inf"):
        raise ValueError(f"`kl_temperature` must be above 0 and finite, got {config.kl_temperature}. Try 1.0.")
    if not 0 < config.kl_fraction <= 1:
        raise ValueError(
            f"`kl_fraction` must be in (0, 1], got {config.kl_fraction}. It is the share of the sequences that the teacher "
            "sees; try 0.25, or `teacher='none'` for no teacher."
        )
    if not 0 < config.jsd_mixture < 1:
        raise ValueError(
            f"`jsd_mixture` must be inside (0, 1), got {config.jsd_mixture}. At the ends the divergence is zero: use "
            "`kl_direction='forward'` or `'reverse'` for the two KLs, or try 0.5."
        )


def _check_rehearsal(config: MeanTeacherConfig) -> None:
    if not 0 <= config.rehearsal_weight < float("inf"):
        raise ValueError(
            f"`rehearsal_weight` must be at least 0 and finite, got {config.rehearsal_weight}. Use 0 for no rehearsal; try 4."
        )
    if not 0 < config.rehearsal_fraction < 1:
        raise ValueError(
            f"`rehearsal_fraction` must be inside (0, 1), got {config.rehearsal_fraction}. It is the share of rehearsed rows; try "
            "0.33, or `rehearsal_weight=0` for none."
        )
    config.rehearsal_num_texts = plain_count("rehearsal_num_texts", config.rehearsal_num_texts, 1, "Try 256.")
    config.rehearsal_num_tokens = plain_count("rehearsal_num_tokens", config.rehearsal_num_tokens, 8, "Try 96.")
    _check_choice("rehearsal_loss", config.rehearsal_loss, REHEARSAL_LOSSES)
    _check_rehearsed_texts(config)
    budget = config.drift_budget
    for name, value in (("drift_budget", budget), ("max_drift", config.max_drift)):
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"`{name}` must be above 0 and finite, got {value}. It is in nats per token; try 0.05.")
    if budget is not None and not config.rehearsal_weight:
        raise ValueError(
            f"`drift_budget={budget}` is kept by the weight of the rehearsal, which is 0. Give the weight to begin with, "
            "`rehearsal_weight=1`."
        )
    if budget is not None and config.rehearsal_loss != "kl":
        raise ValueError(
            f"`drift_budget={budget}` is of the KL from the model before training, which `rehearsal_loss={config.rehearsal_loss!r}` "
            "does not compute. Use `rehearsal_loss='kl'`, or leave the budget out."
        )
    if budget is not None and config.max_drift is not None and config.max_drift <= (1 + EARLY) * budget:
        raise ValueError(
            f"`max_drift={config.max_drift}` would stop a run that keeps `drift_budget={budget}`, which is allowed "
            f"{(1 + EARLY) * budget:g} nats per token when it begins. Raise the one above that, or leave it out."
        )


def _check_rehearsed_texts(config: MeanTeacherConfig) -> None:
    texts, dataset = config.rehearsal_texts, config.rehearsal_dataset
    if texts is not None and dataset is not None:
        raise ValueError(
            f"`rehearsal_texts={texts!r}` and `rehearsal_dataset={dataset!r}` both say what is rehearsed. Give one of them."
        )
    if dataset is not None:
        DataPart.from_config(dataset, "rehearsal_dataset")


def _check_penalties(config: MeanTeacherConfig) -> None:
    for name, hint in zip(_PENALTIES, ("1e-5", "1e-2", "300"), strict=True):
        if not 0 <= getattr(config, name) < float("inf"):
            raise ValueError(
                f"`{name}` must be at least 0 and finite, got {getattr(config, name)}. Use 0 for no penalty; try {hint}."
            )
    config.ewc_num_texts = plain_count("ewc_num_texts", config.ewc_num_texts, 1, "Try 128.")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}.")


def _check_range(name: str, value: float, hint: str) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"`{name}` must be in [0, 1], got {value}. {hint}")
