"""`EMARegularizedSFTTrainer`: TRL's `SFTTrainer` with a mean teacher, or whatever else regularizes, wired in."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate.utils import is_peft_model
from huggingface_hub import EvalResult
from peft import PeftConfig, PeftModel
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput, SaveStrategy, TrainOutput

from .adapters.fitness import base_changed_by, refuse_leftovers
from .adapters.names import base_of
from .adapters.starting_point import StartingPoint
from .checkpointing.state import RegularizerCallback
from .checkpointing.trainer import CheckpointingTrainer
from .checks import (
    as_mean_teacher_config,
    check_before_loading,
    check_datasets,
    check_finite,
    check_free_space,
    check_fused_forward,
    check_labels,
    check_prompts,
)
from .config import MeanTeacherConfig
from .files import check_output_dir
from .forward import add_regularized_forward, check_head
from .model_card import method_of
from .options import changed
from .ownership import claim, claim_before, undo_earlier_run
from .processes import Launch, refuse_parallelism, refuse_sharding, refuse_wrapping
from .regularizers import make_regularizers
from .regularizers.divergence import TeacherDivergence
from .regularizers.micro_batch import RegularizedForward, TokenMean
from .regularizers.teacher import MeanTeacher
from .workarounds import (
    keep_4bit_layers_trainable,
    keep_float32_adapter,
    keep_float32_outputs,
    let_tokens_of_head_train,
)


class EMARegularizedSFTTrainer(CheckpointingTrainer):
    """
    [`~trl.SFTTrainer`] whose student is held back by a mean teacher.

        loss = CE(y; p_θ) + kl_weight · ramp(step) · D(p_φ, p_θ)          per token, mean over the accumulated batch
        after each optimizer step:   φ ← d·φ + (1 − d)·θ

    Takes the arguments of [`~trl.SFTTrainer`], with [`MeanTeacherConfig`] for `args` (an [`~trl.SFTConfig`] is read as one
    with the default teacher). The model needs a PEFT adapter, unless `teacher="none"`, which trains as [`~trl.SFTTrainer`]
    does, step for step; but in a float32 run over a 4-bit base the adapter is float32 here, where TRL casts it to bfloat16.
    `rehearsal_dataset` has general texts to rehearse, in any of TRL's formats, instead of those that the model writes. A model object can be given again, as when a cell of a notebook runs twice.

    Logs, beside its metrics, `ce_loss`, `kl_loss` (nats per token), `kl_weight`, `ema_decay` and `teacher_distance`
    (relative L2). `teacher` is the [`MeanTeacher`], or `None`; `regularizers` lists all that holds the student back.

    Example:

    ```python
    >>> trainer = EMARegularizedSFTTrainer(
    ...     "Qwen/Qwen2-1.5B", args=MeanTeacherConfig("out", learning_rate=1e-4),
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

    def __init__(
        self, model: str | PreTrainedModel | PeftModel, args: MeanTeacherConfig | TrainingArguments | None = None,
        data_collator: Any = None, train_dataset: Any = None, eval_dataset: Any = None, processing_class: Any = None,
        compute_loss_func: Any = None, compute_metrics: Any = None, callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None), optimizer_cls_and_kwargs: Any = None,
        preprocess_logits_for_metrics: Any = None, quantization_config: Any = None,
        peft_config: PeftConfig | None = None, formatting_func: Any = None, rehearsal_dataset: Any = None,
    ):  # fmt: skip
        args = as_mean_teacher_config(args, model)
        check_output_dir(str(args.output_dir))
        check_before_loading(model, args, peft_config, train_dataset, compute_loss_func, rehearsal_dataset)
        check_datasets(train_dataset, eval_dataset, args, formatting_func, data_collator)
        undo_earlier_run(model)  # last: what is refused leaves an earlier trainer and what it has trained alone
        before = claim_before(model)
        super().__init__(
            model=model, args=args, data_collator=data_collator, train_dataset=train_dataset, eval_dataset=eval_dataset,
            processing_class=processing_class, compute_loss_func=compute_loss_func, compute_metrics=compute_metrics,
            callbacks=callbacks, optimizers=optimizers, optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics, quantization_config=quantization_config,
            peft_config=peft_config, formatting_func=formatting_func,
        )  # fmt: skip
        self._mixed_precision = self.accelerator.mixed_precision
        refuse_leftovers(self.model)
        self._claim = claim(self.model, before)
        check_labels(self.train_dataset, self.eval_dataset, compute_metrics)
        if args.teacher != "none" and args.kl_tokens == "prompt" and data_collator is None:
            check_prompts(self.train_dataset)
        keep_4bit_layers_trainable(self.model)
        let_tokens_of_head_train(self.model)
        keep_float32_adapter(self.model, args)
        self.starting_point = None  # of drift; of a full fine-tune it would be a copy of the whole model
        if is_peft_model(self.model):
            is_base = None if peft_config is None else base_changed_by(peft_config) is None
            self.starting_point = StartingPoint(self.model, is_base)
        self.measure_at_evaluation: Callable[[str], dict[str, float]] | None = None  # by the metrics' prefix
        self._evaluates_own_sets = True
        self.model_card_details: dict[str, dict] = {}  # more tables for the model card, by title
        self.model_card_results: list[EvalResult] = []  # figures for its metadata
        self.ce_mean, self._penalty_is_due = TokenMean(), False
        self.regularizers = self._claim.regularizers
        self.attach_regularizers(rehearsal_dataset)
        if args.save_strategy != SaveStrategy.NO or args.enable_jit_checkpoint or args.max_drift is not None:
            check_free_space(self, checkpoint=True)
        self._init_checkpoints()
        keep_float32_outputs(self.accelerator)
        # First, so that whatever saves or measures at the end of a step finds the teacher moved.
        self.callback_handler.callbacks.insert(0, RegularizerCallback(self))

    def attach_regularizers(self, rehearsal_dataset: Any) -> None:
        """The last of the constructor: whatever holds the student back, on its model."""
        self._name, self._paper = method_of(self.args, rehearsal_dataset)  # for TRL's part of the model card
        launch = Launch.of_state(self.accelerator.state)
        self.shards_weights = launch.shards_weights  # which all ranks then gather together for each pass over them
        if is_peft_model(self.model):
            refuse_wrapping(launch)
        if self.args.needs_fused_forward:
            refuse_parallelism(launch)
            refuse_sharding(launch)
            base = base_of(self.model)
            if not any(p.is_meta or hasattr(p, "ds_id") for p in base.parameters()):
                # As in training: FlashAttention takes no float32, which the weights may be.
                with self.precision():
                    check_head(base)
            add_regularized_forward(base, dft=self.args.loss_type == "dft", eaft=self.args.entropy_weighting)
        given = self.processing_class, self.starting_point, rehearsal_dataset
        for regularizer in make_regularizers(self.model, self.args, *given):
            self.regularizers.append(regularizer)  # one by one: an error leaves to the claim what is there by then

    def check_is_owner(self) -> None:
        if self._claim.given_on:
            raise RuntimeError(
                "The model of this trainer was given to another trainer, which has taken this one's teacher off it, and may have put an "
                "adapter of its own there. Save before that (`trainer.save_model()`), or load the model again and give that."
            )

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        # Accelerate has one for the whole process: this run would be in that of another trainer, or in float16 unscaled.
        try:
            found = self.accelerator.mixed_precision
        except AttributeError:  # a configuration that was made since has reset accelerate's state
            found = None
        if found != self._mixed_precision:
            raise RuntimeError(
                f"This trainer was made with mixed precision {self._mixed_precision!r}; since then another trainer or configuration "
                f"was made, with {found!r}, and accelerate has the last one for all of a process. Make this trainer again, and "
                "train each before the next is made, or give both trainers the same `bf16` and `fp16`."
            )
        return super().train(resume_from_checkpoint, *args, **kwargs)

    @property
    def teacher(self) -> MeanTeacher | None:
        found = next((r.teacher for r in self.regularizers if isinstance(r, TeacherDivergence)), None)
        if found is not None:
            self.check_is_owner()
        return found

    def precision(self) -> AbstractContextManager:
        """
        The autocast that the run trains in: a context for passes outside it. Not `accelerator.autocast`, which leaves it to
        DeepSpeed, that is to later.
        """
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self._mixed_precision)
        return torch.autocast(self.accelerator.device.type, dtype, enabled=dtype is not None)

    @property
    def wrapper(self) -> torch.nn.Module | None:
        """What DDP, DeepSpeed or FSDP put around the model; `None` where nothing did."""
        wrapped = self.model_wrapped
        return wrapped if wrapped is not self.model or self.is_fsdp_enabled else None

    # The loss

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[dict], torch.Tensor | int | None]:
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        gather = self.accelerator.gather if self.args.average_tokens_across_devices else None
        for regularizer in self.regularizers:
            regularizer.before_step(batches, self.state.global_step, device, gather)
        self._penalty_is_due = True
        return batches, num_items

    def compute_loss(
        self, model: Any, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        # An evaluation is the student's, as SFT would report it.
        if not self.model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self.check_is_owner()
        step, loss_type, fused = self.state.global_step, self.args.loss_type, self.args.needs_fused_forward
        forward = RegularizedForward(
            model, self.regularizers, inputs, step, num_items_in_batch, self.ce_mean.add, fused,
            sharded=self.shards_weights,
        )  # fmt: skip
        if forward.divergences:
            check_fused_forward(self.args)
        if fused:
            loss_type = "nll"  # the fused loss has weighted each token already (DFT): TRL has to sum and normalize
        with changed(self.args, loss_type=loss_type):
            called = forward if forward.changes or fused else model
            loss = super().compute_loss(called, inputs, num_items_in_batch=num_items_in_batch)
        due, self._penalty_is_due = self._penalty_is_due, False  # once per optimizer step
        penalties = [p for p in (r.penalty(step) for r in self.regularizers if due) if p is not None]
        if penalties:
            # Without a number of tokens `Trainer` divides each loss by the number of micro-batches.
            parts = self.current_gradient_accumulation_steps if num_items_in_batch is None else 1
            loss = loss + parts * sum(penalties)
        if self.args.stop_on_nonfinite_loss:
            check_finite(self, loss, from_entropy=fused and not penalties)
        return loss

    def after_step(self) -> None:
        """After an optimizer step, if it was really taken: the teacher moves."""
        if not self.accelerator.optimizer_step_was_skipped:
            for regularizer in self.regularizers:
                regularizer.after_step(self.state.global_step, self.accelerator.gather)

    # Logs and evaluation

    def add_metrics(self, **values: float) -> None:
        """Let the next log of the training show the mean of what is given until then, beside TRL's own metrics."""
        for name, value in values.items():
            self._metrics["train"][name].append(value)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training and "loss" in logs:
            if self.args.needs_fused_forward:
                self.add_metrics(ce_loss=self.ce_mean.take(self.accelerator.gather, self.args.device))
            for regularizer in self.regularizers:
                self.add_metrics(**regularizer.metrics(self.accelerator.gather))
        super().log(logs, start_time)

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        # A set of the trainer's by its name, or all of them; of any other the figures of those would be none.
        own = eval_dataset is None or isinstance(eval_dataset, str)
        with changed(self, _evaluates_own_sets=own):
            return super().evaluate(eval_dataset, *args, **kwargs)

    def evaluation_loop(
        self, dataloader: DataLoader, description: str, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        self.check_is_owner()
        kwargs["metric_key_prefix"] = metric_key_prefix
        output = super().evaluation_loop(dataloader, description, *args, **kwargs)
        if self.measure_at_evaluation is not None and self._evaluates_own_sets:
            (output.metrics or {}).update(self.measure_at_evaluation(metric_key_prefix))
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
        found = teachers.metrics or {}
        if output.metrics is not None and "eval_loss" in found:  # of no row there is none, as for the student
            output.metrics[f"{metric_key_prefix}_teacher_loss"] = found["eval_loss"]
        return output
