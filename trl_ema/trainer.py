"""`EMARegularizedSFTTrainer`: TRL's `SFTTrainer` with a mean teacher wired in."""

import itertools
import logging
import math
import os
import shutil
from collections import defaultdict
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch
from accelerate.utils import DynamoBackend, is_peft_model
from bitsandbytes.nn import Linear4bit
from datasets import Dataset, IterableDataset
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy
from trl import SFTTrainer
from trl.trainer.utils import get_config_model_id

from .checkpoints import STATE_KEY, CheckpointMixin, changed
from .config import MeanTeacherConfig
from .data import check_columns, check_dataset, check_rows, trained_columns
from .files import OutputError, check_output_dir
from .forward import add_mean_teacher_forward, check_head, divergence_mask, num_sequences
from .losses import IGNORE_INDEX
from .schedules import half_life_to_decay, sigmoid_ramp, warmed_up_decay
from .sharding import is_sharded, local_shard, whole_shape
from .starting_point import StartingPoint
from .teacher import NO_ADAPTER, MeanTeacher, base_changed_by, check_adapter, check_repeatable, student_name
from .workarounds import keep_4bit_layers_trainable, let_tokens_of_head_train


# Rows of a stream that are read, at most, in search of a label.
_STREAM_ROWS = 1000


logger = logging.getLogger(__name__)


class EMARegularizedSFTTrainer(CheckpointMixin, SFTTrainer):
    """
    [`~trl.SFTTrainer`] whose student is held back by a mean teacher.

        loss = CE(y; p_θ) + kl_weight · ramp(step) · D(p_φ, p_θ)          per token, mean over the accumulated batch
        after each optimizer step:   φ ← d·φ + (1 − d)·θ

    Takes the same arguments as [`~trl.SFTTrainer`], with [`MeanTeacherConfig`] for `args` (an [`~trl.SFTConfig`] is
    read as one with the default teacher). The model needs a PEFT adapter, unless `teacher="none"`, with which it trains as
    [`~trl.SFTTrainer`] does, step for step; but in a float32 run over a 4-bit base the adapter is float32 here, with every
    teacher, where TRL casts it to bfloat16. A model object can be given again, as when a cell of a notebook runs twice.

    Logs what `SFTTrainer` logs, and `ce_loss`, `kl_loss` (nats per token), `kl_weight`, `ema_decay` and
    `teacher_distance` (relative L2 distance between the two adapters). `teacher` is the [`MeanTeacher`], or `None`.

    Example:

    ```python
    >>> trainer = EMARegularizedSFTTrainer(
    ...     "Qwen/Qwen2-1.5B",
    ...     args=MeanTeacherConfig("out", teacher="ema", kl_weight=1.0),
    ...     train_dataset=load_dataset("medalpaca/medical_meadow_medical_flashcards", split="train"),
    ...     peft_config=LoraConfig(target_modules="all-linear"),
    ... )
    >>> trainer.train()
    ```

    Sources: Tarvainen & Valpola 2017, https://arxiv.org/abs/1703.01780.
    """

    args: MeanTeacherConfig
    model: Any  # a PeftModel, unless `teacher="none"`

    _tag_names = ["trl", "sft", "trl_ema"]
    _name = "EMA-regularized SFT"
    _paper = {
        "title": "Mean teachers are better role models",
        "id": "1703.01780",
    }

    def __init__(
        self, model, args=None, data_collator=None, train_dataset=None, eval_dataset=None, processing_class=None,
        compute_loss_func=None, compute_metrics=None, callbacks=None, optimizers=(None, None),
        optimizer_cls_and_kwargs=None, preprocess_logits_for_metrics=None, quantization_config=None, peft_config=None,
        formatting_func=None,
    ):  # fmt: skip
        args = _as_mean_teacher_config(args, model)
        check_output_dir(args.output_dir)
        _check_peft_config(peft_config)
        _refuse_leftovers(model)
        if args.teacher != "none":
            _refuse_what_cannot_work(args, compute_loss_func, train_dataset)
            _refuse_parallelism(args.parallelism_config)
            _check_peft(model, peft_config, args.teacher_anchor)
        elif peft_config is not None:
            _warn_of_what_cannot_be_loaded(peft_config)
        _check_datasets(train_dataset, eval_dataset, args, formatting_func, data_collator)
        _undo_earlier_run(model)  # last: what is refused leaves an earlier trainer and what it has trained alone
        before = _untouched(model)
        super().__init__(
            model, args, data_collator, train_dataset, eval_dataset, processing_class, compute_loss_func, compute_metrics,
            callbacks, optimizers, optimizer_cls_and_kwargs, preprocess_logits_for_metrics, quantization_config,
            peft_config, formatting_func,
        )  # fmt: skip
        _refuse_leftovers(self.model)
        self._claim = _remember(self.model, before)
        _check_labels(self.train_dataset)
        if compute_metrics is None:  # which may have a use for rows without a label
            evals = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"eval": self.eval_dataset}
            for name, dataset in evals.items():
                _check_labels(dataset, f"evaluation data set {name!r}")
        keep_4bit_layers_trainable(self.model)
        let_tokens_of_head_train(self.model)
        _keep_float32_adapter(self.model, args)
        # What drift is measured from; of a full fine-tune it would be a copy of the whole model.
        self.starting_point = None
        if is_peft_model(self.model):
            is_base = None if peft_config is None else base_changed_by(peft_config) is None
            self.starting_point = StartingPoint(self.model, is_base)
        self._teacher = None
        if args.teacher == "none":  # for the model card
            self._name, self._paper = SFTTrainer._name, SFTTrainer._paper
        self._kl_tokens_in_batch = None
        self._micro_batch = (0, -1)  # step, and which of its micro-batches
        self._ema_decay = self._kl_weight = None
        self.model_card_details: dict[str, dict] = {}  # more tables for the model card, by title
        self._loss_sums = torch.zeros(4, dtype=torch.float64)  # Σ CE, Σ D and their tokens since the last log
        if args.teacher != "none":
            _refuse_parallelism(self.accelerator.parallelism_config)
            _refuse_sharding(self.accelerator.state)
            self._attach_teacher()
        if args.save_strategy != SaveStrategy.NO or args.enable_jit_checkpoint:
            check_free_space(self, checkpoint=True)
        self._init_checkpoints()
        _keep_float32_outputs(self.accelerator)
        # First, so that whatever saves or measures at the end of a step finds the teacher moved.
        self.callback_handler.callbacks.insert(0, _MeanTeacherCallback(self))

    def check_is_owner(self):
        """Raises `RuntimeError` if another trainer has the model now, with an adapter and teacher of its own."""
        if self._claim["given_on"]:
            raise RuntimeError(
                "The model of this trainer was given to another trainer, which has taken this one's teacher off it, and may have put an "
                "adapter of its own there. Save before that (`trainer.save_model()`), or load the model again and give that."
            )

    @property
    def teacher(self) -> MeanTeacher | None:
        if self._teacher is not None:
            self.check_is_owner()
        return self._teacher

    def _attach_teacher(self):
        args = self.args
        base = self.model.get_base_model()
        if not any(p.is_meta or hasattr(p, "ds_id") for p in base.parameters()):
            # As in training: FlashAttention takes no float32, which the weights may be.
            with self.precision():
                check_head(base)
        self._teacher = MeanTeacher(self.model, frozen=args.teacher == "frozen", anchor=args.teacher_anchor)
        self._claim["teacher"] = self._teacher
        add_mean_teacher_forward(
            base,
            self.teacher,
            kl_tokens=args.kl_tokens,
            direction=args.kl_direction,
            mixture=args.jsd_mixture,
            temperature=args.kl_temperature,
            dft=args.loss_type == "dft",
        )

    def precision(self):
        """
        The autocast that the run trains in: a context for passes outside it. Not `accelerator.autocast`, which leaves it to
        DeepSpeed, that is to later.
        """
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.accelerator.mixed_precision)
        return torch.autocast(self.accelerator.device.type, dtype, enabled=dtype is not None)

    # The loss

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.teacher is not None and self.args.kl_tokens == "all":
            count = sum(divergence_mask("all", **batch).sum() for batch in batches)
            count = torch.as_tensor(count, device=device)
            if self.args.average_tokens_across_devices:
                count = self.accelerator.gather(count).sum()
            self._kl_tokens_in_batch = count
        return batches, num_items

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        # An evaluation is the student's, as SFT would report it.
        if not self.model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.teacher is None:
            loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        else:
            loss = self._loss_with_teacher(model, inputs, num_items_in_batch)
        self._check_finite(loss)
        return loss

    def _loss_with_teacher(self, model, inputs, num_items_in_batch):
        kl_weight = self._kl_weight = self.current_kl_weight()
        if self.args.kl_tokens == "all":
            # TRL divides by the labelled tokens, the divergence is a mean over its own.
            num_labels, num_kl = num_items_in_batch, self._kl_tokens_in_batch
            if num_labels is None:  # then TRL divides by those of this batch alone
                num_labels = divergence_mask("loss", **inputs).sum()
                num_kl = divergence_mask("all", **inputs).sum()
            # A number: FSDP2 casts tensors to its own precision on the way in.
            kl_weight = float(kl_weight * torch.as_tensor(num_labels).clamp(min=1) / num_kl.clamp(min=1))
        chosen, factor = self._choose_sequences(inputs)
        outputs = None

        def student_and_teacher(**inputs):
            nonlocal outputs
            outputs = model(**inputs, kl_weight=kl_weight * factor, kl_sequences=chosen)
            parts = [part.detach() for part in (outputs.log_probs, outputs.aux_loss) if part is not None]
            outputs.entropy = outputs.entropy + 0.0 * sum(parts)  # see `_check_finite`
            return outputs

        # The fused loss has weighted each token already (DFT): TRL only has to sum and normalize.
        with changed(self.args, loss_type="nll"):
            loss = super().compute_loss(student_and_teacher, inputs, num_items_in_batch=num_items_in_batch)
        sums = torch.stack([outputs.ce_loss, outputs.kl_loss, outputs.label_mask, outputs.kl_mask])
        self._loss_sums = self._loss_sums.to(sums.device) + sums.double()
        return loss

    def _choose_sequences(self, inputs):
        """
        `kl_fraction` f of the sequences of this micro-batch, and what their divergence is multiplied by. Of S sequences
        ⌊f·S + u⌋ are drawn, u uniform in [0, 1): each with probability f, so that with the factor 1 / f the expectation of
        the loss is that of all. The draw depends on seed, step, micro-batch and rank alone, as a resumed run needs it.
        """
        fraction, step = self.args.kl_fraction, self.state.global_step
        if fraction == 1:
            return None, 1.0
        self._micro_batch = (step, self._micro_batch[1] + 1 if self._micro_batch[0] == step else 0)
        seed = [self.args.seed, *self._micro_batch]
        number = num_sequences(**inputs)
        count = int(fraction * number + np.random.default_rng(seed).random())
        if not count and is_sharded(next(self.model.parameters())):
            count, fraction = 1, float("inf")  # the ranks gather weights together, so each takes the teacher's pass
        order = np.random.default_rng([*seed, 1 + self.args.process_index]).permutation(number)
        return order[:count].tolist(), 1 / fraction

    def current_kl_weight(self) -> float:
        """λ at the current step, after its ramp."""
        return self.args.kl_weight * sigmoid_ramp(self.state.global_step, self._kl_warmup_steps)

    @property
    def _kl_warmup_steps(self) -> float:
        return self.args.kl_warmup_ratio * self.state.max_steps

    def _check_finite(self, loss):
        """Before the backward pass, in which DeepSpeed takes its step. The ranks stop together."""
        if not self.args.stop_on_nonfinite_loss:
            return
        if self.teacher is not None and not self.accelerator.gradient_state.end_of_dataloader:
            # TRL has gathered the entropy, and waited for it. It is not finite where any rank's loss is not; at the end of an epoch
            # TRL may leave ranks out, and without labelled tokens it puts 0.
            entropy = self._metrics["train"]["entropy"][-1]
            if math.isfinite(entropy) and entropy != 0:
                return
        losses = self.accelerator.gather(loss.detach())
        if losses.isfinite().all():
            return
        bad = losses[~losses.isfinite()][0].item()  # on whichever rank
        last = self.last_good_checkpoint
        resume = f"The last good checkpoint is {last}" if last else "There is no good checkpoint of this run yet"
        raise FloatingPointError(
            f"The loss of step {self.state.global_step + 1} is {bad}; the model was not updated with it. "
            f"{resume}. Lower `learning_rate` or `kl_weight`, or look at the data of this step; "
            "`stop_on_nonfinite_loss=False` goes on regardless."
        )

    @property
    def schedule(self) -> dict[str, float | bool]:
        """What average and divergence follow over this run, whichever options and length it was given by."""
        args = self.args
        decay = args.ema_decay
        if decay is None:
            if not self.state.max_steps:
                raise ValueError(
                    "`update_teacher()` or `schedule` before `train()`: the half-life is a fraction of the run, whose number of steps "
                    "is not known yet. Set `ema_decay`, or leave the updates to `train()`."
                )
            decay = half_life_to_decay(args.half_life, self.state.max_steps, args.ema_update_steps)
        return {
            "ema_decay": decay,
            "ema_warmup": args.ema_warmup,
            "ema_update_steps": args.ema_update_steps,
            "kl_weight": args.kl_weight,
            "kl_warmup_steps": self._kl_warmup_steps,
        }

    # The average

    def update_teacher(self):
        """One step of the average, if it is due and the optimizer step was really taken."""
        args = self.args
        if args.teacher != "ema" or self.accelerator.optimizer_step_was_skipped:
            return
        if self.state.global_step % args.ema_update_steps:
            return
        decay = self.schedule["ema_decay"]
        if args.ema_warmup:
            decay = warmed_up_decay(decay, self.teacher.num_updates)
        self.teacher.update(decay)
        self._ema_decay = decay

    # Logs and evaluation

    def add_metrics(self, **values: float) -> None:
        """Let the next log of the training show the mean of what is given until then, beside TRL's own metrics."""
        for name, value in values.items():
            self._metrics["train"][name].append(value)

    def log(self, logs, start_time=None):
        if self.teacher is not None and self.model.training and "loss" in logs:
            metrics = self._metrics["train"]
            sums = self.accelerator.gather(self._loss_sums.to(self.args.device)).view(-1, 4).sum(0)
            ce, kl, num_labels, num_kl = sums.tolist()
            metrics["ce_loss"], metrics["kl_loss"] = [ce / max(num_labels, 1)], [kl / max(num_kl, 1)]
            self._loss_sums.zero_()
            metrics["kl_weight"] = [self._kl_weight]
            if self._ema_decay is not None:
                metrics["ema_decay"] = [self._ema_decay]
            if not self.teacher.is_base:
                metrics["teacher_distance"] = [self.teacher.distance()]
        super().log(logs, start_time)

    def evaluation_loop(self, dataloader, description, *args, metric_key_prefix="eval", **kwargs):
        self.check_is_owner()
        output = super().evaluation_loop(dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self.teacher is None or not self.args.eval_teacher:
            return output
        student_metrics = self._metrics["eval"]
        self._metrics["eval"] = defaultdict(list)
        try:
            with self.teacher.activate():
                teachers = super().evaluation_loop(
                    dataloader, f"{description} (teacher)", prediction_loss_only=True, metric_key_prefix="eval"
                )
        finally:
            self._metrics["eval"] = student_metrics
        if "eval_loss" in teachers.metrics:  # of no row there is none, as for the student
            output.metrics[f"{metric_key_prefix}_teacher_loss"] = teachers.metrics["eval_loss"]
        return output

    @property
    def wrapper(self):
        """What DDP, DeepSpeed or FSDP put around the model; `None` where nothing did."""
        wrapped = self.model_wrapped
        return wrapped if wrapped is not self.model or self.is_fsdp_enabled else None


class _MeanTeacherCallback(TrainerCallback):
    """Moves the teacher after each step, and carries what a resumed run must know through `trainer_state.json`."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        trainer = self.trainer
        trainer._loss_sums.zero_()
        if trainer.resumed_from is not None:
            # Here in every mode: DeepSpeed and FSDP load a checkpoint after they have wrapped the model.
            trainer.last_good_checkpoint = trainer.resumed_from
            if trainer.teacher is not None:
                trainer.teacher.load(trainer.resumed_from)
        saved = state.stateful_callbacks.get(STATE_KEY)
        if saved is not None:
            # TRL starts counting anew at each resume.
            trainer._total_train_tokens = saved["num_tokens"]
            trainer.run_id = saved["run_id"]
            if trainer.teacher is not None and saved["schedule"] not in (None, trainer.schedule):
                logger.warning(
                    "The checkpoint was made with %s, this run goes on with %s. Resume with the options and the number of "
                    "steps it was started with to end as it would have ended.", saved["schedule"], trainer.schedule,
                )  # fmt: skip

    def on_save(self, args, state, control, model=None, **kwargs):
        # A finite loss can still have had gradients that were not. Each rank looks at its own shards.
        finite = all(local_shard(p).isfinite().all() for p in model.parameters() if p.requires_grad)
        if self.trainer.accelerator.gather(torch.tensor(finite, device=args.device)).all():
            folder = f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            self.trainer.last_good_checkpoint = os.path.join(args.output_dir, folder)

    def on_step_end(self, args, state, control, **kwargs):
        teacher = self.trainer.teacher
        if teacher is not None:
            self.trainer.update_teacher()
        state.stateful_callbacks[STATE_KEY] = {
            "run_id": self.trainer.run_id,
            "num_tokens": self.trainer._total_train_tokens,
            "schedule": self.trainer.schedule if teacher is not None else None,
        }


def _keep_float32_adapter(model, args) -> None:
    """
    TRL casts the adapter of a quantized model to bfloat16, the precision QLoRA computes in. A run in float32 keeps it in
    float32: nothing is rounded, and a CPU without bfloat16 instructions multiplies in bfloat16 tens of times slower. Without a
    teacher too, though `SFTTrainer` then differs: arms that are compared must differ in their teacher alone.
    """
    if args.bf16 or args.fp16:
        return
    if {m.compute_dtype for m in model.modules() if isinstance(m, Linear4bit)} == {torch.float32}:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()


def _keep_float32_outputs(accelerator) -> None:
    """
    Accelerate has FSDP2 cast all that a forward returns to bfloat16 or float16: here sums of losses, which do not bear it.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and isinstance(plugin.mixed_precision_policy, MixedPrecisionPolicy):
        plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, output_dtype=None)


# On a model object: what it was before a trainer had it.
_BEFORE = "_trl_ema_before"


def _base_of(model):
    return model.get_base_model() if is_peft_model(model) else model


def _untouched(model) -> dict[str, Any] | None:
    """What a trainer will change on a model object; `None` for the name of a model."""
    if not isinstance(model, torch.nn.Module):
        return None
    base = _base_of(model)
    return {"forward": vars(base).get("forward"), "trained": [p for p in base.parameters() if p.requires_grad]}


def _remember(model, before: dict[str, Any] | None) -> dict[str, Any]:
    """The claim of a new trainer on its model: what an undoing needs, and whether it was `given_on` to another trainer."""
    base = _base_of(model)
    # A model that the trainer has loaded keeps TRL's forward: nobody has another reference to it.
    before = _untouched(base) if before is None else before
    claim = vars(base)[_BEFORE] = before | {"model": model, "teacher": None, "given_on": False}
    return claim


def _earlier_teacher(model) -> bool:
    """Whether an adapter of the teacher's name is that of an earlier trainer, which goes when the new one begins."""
    before = vars(_base_of(model)).get(_BEFORE)
    return before is not None and before["teacher"] is not None and not before["teacher"].is_base


def _undo_earlier_run(model) -> None:
    """
    Takes off a model object what an earlier trainer has put on it, as when a cell of a notebook runs again: the forward, the
    teacher and, unless the model is given together with it, the adapter. PEFT would put the new adapter among the old one's
    layers, where it is trained and saved with those that another `target_modules` leaves out.
    """
    if not isinstance(model, torch.nn.Module):
        return
    base = _base_of(model)
    before = vars(base).get(_BEFORE)
    if before is None:
        return
    earlier = before["model"]
    takes_off = not is_peft_model(model) and is_peft_model(earlier) and isinstance(earlier.base_model, BaseTuner)
    if takes_off:
        config: Any = earlier.peft_config.get("default")
        changed_by = base_changed_by(config)
        if changed_by:
            raise ValueError(
                f"An earlier run with {changed_by} has changed the weights of this very model. Load the model again, and give that."
            )
    vars(base).pop(_BEFORE)["given_on"] = True
    if before["forward"] is None:
        vars(base).pop("forward", None)
    else:
        base.forward = before["forward"]
    if is_peft_model(model) and before["teacher"] is not None:
        before["teacher"].remove()
    if takes_off:
        for module in earlier.modules():
            if isinstance(module, ModulesToSaveWrapper):
                module._active_adapter = []  # of which `unload` would leave the trained copy
        earlier.unload()
        vars(base).pop("peft_config", None)
        for parameter in before["trained"]:
            parameter.requires_grad_(True)


def _as_mean_teacher_config(args, model) -> MeanTeacherConfig:
    if args is None:
        name = model if isinstance(model, str) else get_config_model_id(model.config)
        return MeanTeacherConfig(f"{name.split('/')[-1]}-EMA-SFT")
    if isinstance(args, MeanTeacherConfig):
        return args
    if isinstance(args, TrainingArguments):  # as `SFTTrainer` takes them, with its own defaults for what they lack
        known = {f.name for f in fields(MeanTeacherConfig) if f.init}
        return MeanTeacherConfig(**{f.name: getattr(args, f.name) for f in fields(args) if f.name in known})
    raise TypeError(
        f"`args` must be a `MeanTeacherConfig`, got `{type(args).__name__}`. Pass `MeanTeacherConfig(output_dir, ...)`; an "
        "`SFTConfig` or `TrainingArguments` is read as one with the default teacher."
    )


def _refuse_what_cannot_work(args, compute_loss_func, train_dataset) -> None:
    if compute_loss_func is not None:
        raise ValueError(
            "`compute_loss_func` replaces the loss that the teacher is part of. Drop it, or use `teacher='none'`."
        )
    if args.label_smoothing_factor > 0:
        raise ValueError(
            f"`label_smoothing_factor={args.label_smoothing_factor}` is not supported with a teacher, whose "
            "probabilities are soft targets already. Set it to 0, or use `teacher='none'`."
        )
    columns = _columns(train_dataset)
    if {"image", "images"} & columns:
        raise ValueError(
            f"The data set has images (columns {sorted(columns)}); the teacher supports text alone. Remove the images, "
            "or use `teacher='none'`."
        )


def _check_peft_config(peft_config) -> None:
    if peft_config is not None and not isinstance(peft_config, PeftConfig):
        hint = "Pass `LoraConfig(**peft_config)`." if isinstance(peft_config, dict) else "Pass `LoraConfig(...)`."
        raise TypeError(f"`peft_config` must be a config of PEFT, got `{type(peft_config).__name__}`. {hint}")


def _refuse_leftovers(model) -> None:
    """
    PEFT puts an adapter among the layers of an earlier one that it finds on a base. Those that are not its own targets would
    be trained and saved with it.
    """
    tuner = model.base_model if isinstance(model, torch.nn.Module) and is_peft_model(model) else None
    if not isinstance(tuner, BaseTuner) or not tuner.targeted_module_names:
        return
    own = {*tuner.targeted_module_names, *(name.rpartition(".")[0] for name in tuner.targeted_parameter_names)}
    layers = {}
    for name, module in tuner.model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            own.add(name)
        elif isinstance(module, BaseTunerLayer) and set(model.active_adapters) & set(module._get_available_adapters()):
            layers[name] = {*itertools.accumulate(name.split("."), "{}.{}".format)}  # with those it lies in
    left = [name for name, path in layers.items() if own.isdisjoint(path)]
    if left:
        raise ValueError(
            f"The model still carries an earlier adapter: {len(left)} of its layers, such as {left[0]!r}, are no targets of the new "
            "one, and would be trained and saved with it. Load the base model again, or take the earlier adapter off before the "
            "new one is made: `base = earlier_model.unload()`."
        )


def _check_peft(model, peft_config, anchor: float) -> None:
    if peft_config is None and (not isinstance(model, torch.nn.Module) or not is_peft_model(model)):
        raise ValueError(NO_ADAPTER)
    if peft_config is None:
        student_name(model, earlier_teacher=_earlier_teacher(model))
    config = peft_config if peft_config is not None else model.active_peft_config
    targets = getattr(config, "target_modules", None)
    if isinstance(targets, (list, set, tuple)) and any(name.split(".")[-1] == "lm_head" for name in targets):
        raise ValueError(
            f"`target_modules={sorted(targets)}` has an adapter on `lm_head`, whose weight the loss multiplies by directly. "
            "Leave it out, or train the whole head with `modules_to_save=['lm_head']`."
        )
    check_adapter(config, anchor)


def _warn_of_what_cannot_be_loaded(peft_config) -> None:
    try:
        check_repeatable(
            peft_config,
            "Save the adapter before the training too, and the trained one as a LoRA by PEFT's `save_pretrained(..., "
            "path_initial_model_for_weight_conversion=FOLDER_OF_THE_FIRST)`; or use `'pissa'` or `'olora'`.",
        )
    except ValueError as error:
        logger.warning("%s", error)


def _refuse_parallelism(config) -> None:
    """The divergence needs whole sequences and whole logits on each rank."""
    for name, what in (("sp", "sequence (Ulysses)"), ("cp", "context"), ("tp", "tensor")):
        if config is not None and getattr(config, f"{name}_enabled", False):
            raise ValueError(
                f"{what.capitalize()} parallelism (`{name}_size={getattr(config, f'{name}_size')}`) is not supported with "
                f"a teacher. Set `{name}_size=1` and shard with DDP, FSDP2 or DeepSpeed, or use `teacher='none'`."
            )


def _refuse_sharding(state) -> None:
    """What shards in a way that an adapter is not whole in any checkpoint, or no pass goes through after one."""
    fsdp, deepspeed = getattr(state, "fsdp_plugin", None), getattr(state, "deepspeed_plugin", None)
    if fsdp is not None and fsdp.fsdp_version != 2:
        raise ValueError(
            f"The launch asks for FSDP version {fsdp.fsdp_version}, which flattens an adapter with its base. Set "
            "`fsdp_version: 2` under `fsdp_config`, as in accelerate_configs/fsdp2.yaml."
        )
    if fsdp is not None and state.dynamo_plugin.backend != DynamoBackend.NO:
        raise ValueError(
            "`torch_compile` under FSDP2 is not supported with a teacher: weights stay sharded in the pass after a checkpoint. "
            "Leave it out, or launch with DDP as in accelerate_configs/ddp.yaml."
        )
    if deepspeed is None:
        return
    if deepspeed.zero_stage == 0:
        raise ValueError(
            "The launch asks for DeepSpeed with `zero_stage: 0`, which shards nothing. Set a stage of 1, 2 or 3, or use DDP as "
            "in accelerate_configs/ddp.yaml."
        )
    offload = deepspeed.deepspeed_config.get("zero_optimization", {}).get("offload_param")
    if offload and offload.get("device") == "nvme":
        raise ValueError(
            "DeepSpeed's `offload_param` is set to `nvme`, where no rank has its shard of the teacher at hand. Offload to the "
            "CPU (`offload_param_device: cpu`), or use `teacher='none'`."
        )


def _columns(dataset) -> set[str]:
    return set(next(iter(dataset), {})) if isinstance(dataset, (Dataset, IterableDataset)) else set()


def _check_datasets(train_dataset, eval_dataset, args, formatting_func, data_collator) -> None:
    """Before anything is loaded or tokenized: data sets, in a format that TRL knows, with a text in every row."""
    if train_dataset is not None:  # TRL says that it is required
        check_dataset(train_dataset, "train_dataset")
    if (args.dataset_kwargs or {}).get("skip_prepare_dataset", False):
        return
    several = isinstance(eval_dataset, dict)
    evals = eval_dataset if several else {"eval": eval_dataset}
    evals = {name: dataset for name, dataset in evals.items() if dataset is not None}
    for name, dataset in evals.items():
        check_dataset(dataset, f"eval_dataset[{name!r}]" if several else "eval_dataset")
    if train_dataset is None or formatting_func is not None or data_collator is not None:
        return
    for name, dataset in {"train": train_dataset, **evals}.items():
        columns = _columns(dataset)
        check_columns(columns, name, args.dataset_text_field)
        check_rows(dataset, trained_columns(columns, args.dataset_text_field), f"the {name} data set")


def _check_labels(dataset, what: str = "training data") -> None:
    """TRL drops rows without a labelled token; it does not say when none is left. Of a stream the first rows are read."""
    if isinstance(dataset, Dataset):
        rows = dataset.select_columns("labels") if "labels" in dataset.column_names else ()
        missing = len(rows) > 0 or len(dataset) == 0
    elif isinstance(dataset, IterableDataset):
        rows, missing = itertools.islice(dataset, _STREAM_ROWS), True
    else:
        return
    for row in rows:
        if "labels" not in row or any(label != IGNORE_INDEX for label in row["labels"]):
            return
    if missing:
        raise ValueError(
            f"No token of the {what} carries a label: every one is masked, or every prompt alone fills "
            "`max_length`. Raise `max_length`, shorten the prompts, or look at `completion_only_loss` and "
            "`assistant_only_loss`."
        )


def check_free_space(trainer, *, checkpoint: bool) -> None:
    """
    Raises [`OutputError`] unless there is room for one checkpoint, or for what `save_model` writes.

    Those are the student, or without an adapter the whole model; the teacher's average in float32; and in a checkpoint,
    unless `save_only_model`, the optimizer's two moments. What DeepSpeed and FSDP write for themselves is as much again.
    """
    args, parameters = trainer.args, list(trainer.model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    needed = sum(map(_bytes, trained if is_peft_model(trainer.model) else parameters))
    if trainer.teacher is not None and not trainer.teacher.is_base:
        needed += sum(4 * whole_shape(p).numel() for p in trained)
    if checkpoint and not args.save_only_model:
        needed += 2 * sum(map(_bytes, trained))
    if checkpoint and (trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled):
        needed *= 2
    free = shutil.disk_usage(args.output_dir).free
    if free < needed:
        what = "one checkpoint" if checkpoint else "the trained model"
        raise OutputError(
            f"`output_dir={args.output_dir!r}` has {free / 2**20:.0f} MiB free; {what} needs {needed / 2**20:.0f} MiB. "
            "Free some space, or choose another `--output_dir`."
        )


def _bytes(parameter) -> int:
    return whole_shape(parameter).numel() * parameter.element_size()
