"""
All that is reached into beyond what other libraries document: that it exists, and takes what it is given.

A new release that moves one of these fails here, with its name. Then: mend the place that uses it (`git grep NAME trl_ema`), or end
the range in `trl_ema/versions.py` before that release. CONTRIBUTING.md says how to try one.
"""

import ast
import importlib
import inspect
import re
import sys
import textwrap
from functools import cache
from pathlib import Path

import pytest
from trl import SFTTrainer

import trl_ema
from trl_ema import EMARegularizedSFTTrainer


# Methods of `Trainer` and `SFTTrainer` that the trainer replaces: one that is renamed there would be called no more.
OVERRIDDEN = (
    "_finalize_training _get_output_dir _load_best_model _load_from_checkpoint _load_optimizer_and_scheduler "
    "_maybe_log_save_evaluate _prepare_for_training _push_from_checkpoint _run_epoch _save_checkpoint "
    "_save_optimizer_and_scheduler compute_loss create_model_card create_optimizer evaluate evaluation_loop get_batch_samples log "
    "save_model train"
)

# Functions, and the parameters that they are given: by position before the `|`, by name after it.
CALLED = {
    "accelerate.commands.launch._validate_launch_command": "args",
    "accelerate.utils.DeepSpeedPlugin.__init__": "| hf_ds_config",
    "accelerate.utils.broadcast_object_list": "object_list",
    "accelerate.utils.is_peft_model": "model",
    "bitsandbytes.nn.Linear4bit.state_dict": "",
    "deepspeed.utils.safe_get_full_fp32_param": "param",
    "deepspeed.utils.safe_get_full_optimizer_state": "param optim_state_key",
    "deepspeed.utils.safe_set_full_fp32_param": "param value",
    "deepspeed.utils.safe_set_full_optimizer_state": "param value optim_state_key",
    "deepspeed.utils.safe_set_local_fp32_param": "param value",
    "deepspeed.utils.safe_set_local_optimizer_state": "param value optim_state_key",
    "gguf.GGUFWriter.__init__": "path arch",
    "gguf.GGUFWriter.add_tensor": "name tensor",
    "gguf.TensorNameMap.get_name": "key | try_suffixes",
    "gguf.get_tensor_name_map": "arch n_blocks",
    "lm_eval.evaluator.get_git_commit_hash": "",
    "lm_eval.models.huggingface.HFLM.__init__": "| pretrained tokenizer batch_size mixed_precision_dtype",
    "lm_eval.simple_evaluate": (
        "model | tasks num_fewshot limit samples apply_chat_template gen_kwargs use_cache bootstrap_iters task_manager "
        "fewshot_random_seed"
    ),
    "lm_eval.tasks.TaskManager.__init__": "| include_path",
    "peft.PeftModel.add_adapter": "adapter_name peft_config",
    "peft.PeftModel.delete_adapter": "adapter_name",
    "peft.PeftModel.load_adapter": "model_id adapter_name | is_trainable",
    "peft.PeftModel.save_pretrained": "save_directory | selected_adapters",
    "peft.PeftModel.set_requires_grad": "adapter_names requires_grad",
    "peft.get_peft_model_state_dict": "model state_dict adapter_name | save_embedding_layers",
    "peft.helpers.rescale_adapter_scale": "model multiplier",
    "peft.tuners.lora.Linear.get_delta_weight": "adapter",
    "peft.tuners.tuners_utils.BaseTuner.merge_and_unload": "| safe_merge adapter_names",
    "peft.tuners.tuners_utils.BaseTuner.unload": "",
    "peft.tuners.tuners_utils.BaseTunerLayer._get_available_adapters": "",
    "peft.utils.load_peft_weights": "model_id device",
    "peft.utils.other.get_pattern_key": "pattern_keys key_to_match",
    "peft.utils.set_peft_model_state_dict": "model peft_model_state_dict adapter_name",
    "torch._foreach_copy_": None,
    "torch._foreach_lerp_": None,
    "torch._foreach_norm": None,
    "torch._foreach_sub": None,
    "torch.clear_autocast_cache": None,
    "torch.distributed.fsdp.FSDPModule.reshard": "",
    "torch.nn.Module.register_state_dict_post_hook": "hook",
    "trackio.init": "project | name group resume config space_id bucket_id private",
    "transformers.PreTrainedModel.get_input_embeddings": "",
    "transformers.PreTrainedModel.get_output_embeddings": "",
    "transformers.Trainer._load_scaler": "checkpoint",
    "transformers.Trainer._move_model_to_device": "model device",
    "transformers.Trainer._save": "output_dir state_dict",
    "transformers.Trainer.get_optimizer_cls_and_kwargs": "args model",
    "transformers.Trainer.log": "logs",
    "transformers.Trainer.pop_callback": "callback",
    "transformers.Trainer.push_to_hub": "| commit_message revision",
    "transformers.Trainer.set_initial_training_values": "args dataloader",
    "transformers.get_scheduler": "name optimizer num_warmup_steps num_training_steps scheduler_specific_kwargs",
    "transformers.generation.GenerationMixin.generate": "| generation_config logits_processor",
    "transformers.integrations.TensorBoardCallback.on_log": "args state control | logs",
    "transformers.integrations.TrackioCallback.on_log": "args state control | model logs",
    "transformers.integrations.TrackioCallback.setup": "args state model",
    "transformers.models.mixtral.modeling_mixtral.load_balancing_loss_func": (
        "gate_logits num_experts top_k attention_mask"
    ),
    "transformers.trainer_jit_checkpoint.JITCheckpointCallback.on_train_end": "args state control",
    "transformers.trainer_utils.align_special_tokens": "model processing_class",
    "transformers.trainer_utils.get_last_checkpoint": "folder",
    "transformers.trainer_utils.sort_checkpoints": "output_dir | use_mtime",
    "trl.SFTTrainer._prepare_dataset": "dataset processing_class args | packing formatting_func dataset_name",
    "trl.chat_template_utils.get_training_chat_template": "processing_class",
    "trl.chat_template_utils.has_generation_markers": "chat_template",
    "trl.data_utils.common_prefix_length": "ids other_ids",
    "trl.data_utils.maybe_convert_to_chatml": "example",
    "trl.models.utils._ForwardRedirection.__call__": "wrapper_module original_module method",
    "trl.trainer.sft_trainer.DataCollatorForLanguageModeling.__init__": "pad_token_id",
    "trl.trainer.utils.add_fused_lm_head": "model",
    "trl.trainer.utils.create_model_from_path": "model_id",
    "trl.trainer.utils.get_config_model_id": "config",
    "trl.trainer.utils.maybe_gather_lm_head_ctx": "*params",
}

# Attributes, fields and keys that are read or set, by the class or module that has them.
NAMED = {
    "accelerate.Accelerator": "gradient_state optimizer_step_was_skipped",
    "accelerate.DeepSpeedPlugin": "deepspeed_config zero_stage",
    "accelerate.FullyShardedDataParallelPlugin": "activation_checkpointing fsdp_version mixed_precision_policy state_dict_type",
    "accelerate.parallelism_config.ParallelismConfig": "cp_size sp_size tp_size",
    "accelerate.state.AcceleratorState": "deepspeed_plugin dynamo_plugin fsdp_plugin parallelism_config",
    "accelerate.state.GradientState": "end_of_dataloader",
    "bitsandbytes.backends.cpu.ops": "logger",
    "bitsandbytes.functional.QuantState": "absmax nested offset quant_type state2",
    "bitsandbytes.nn.Linear4bit": "compute_dtype support_avx512bf16_for_cpu",
    "bitsandbytes.nn.Params4bit": "quant_state",
    "datasets.Dataset": "info",
    "datasets.DatasetInfo": "dataset_name",
    "deepspeed.runtime.engine.DeepSpeedEngine": "module optimizer zero_optimization_stage",
    "deepspeed.runtime.zero.partition_parameters": "ds_id ds_numel ds_process_group ds_shape ds_tensor partition",
    "deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3": "fp32_partitioned_groups_flat optimizer",
    "deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer": (
        "_lazy_init_hp_params_optimizer_state optimizer single_partition_of_fp32_groups"
    ),
    "gguf.GGUFType": "ADAPTER",
    "gguf.MODEL_ARCH": "LLAMA QWEN2 QWEN3",
    "huggingface_hub.ModelCardData": "base_model eval_results model_name",
    "lm_eval.api.task.Task": "eval_docs",
    "lm_eval.evaluator": "LOCAL_RANK arguments doc_hash doc_id filter groups metrics prompt_hash results samples",
    "lm_eval.tasks.TaskManager": "all_tasks include_path load task_index",
    "lm_eval.tasks._index": "cfg tags yaml_path",
    "peft.LoraConfig": (
        "alora_invocation_tokens alpha_pattern bias ensure_weight_tying init_lora_weights kasa_config layer_replication lora_bias modules_to_save "
        "target_modules target_parameters trainable_token_indices use_dora use_rslora"
    ),
    "peft.PeftConfig": "inference_mode is_adaption_prompt is_prompt_learning peft_type",
    "peft.PeftModel": "active_adapters active_peft_config get_base_model missing_keys peft_config state_dict",
    "peft.PveraConfig": "sample_at_inference",
    "peft.PeftType": "ADALORA POLY SHADOW TINYLORA UNILORA VBLORA XLORA",
    "peft.auto": "MODEL_TYPE_TO_PEFT_MODEL_MAPPING",
    "peft.mapping": "PEFT_TYPE_TO_PREFIX_MAPPING",
    "peft.tuners.lora": "Linear Linear4bit",
    "peft.tuners.lora.LoraLayer": "lora_A lora_B lora_dropout lora_embedding_A lora_variant scaling",
    "peft.tuners.tuners_utils.BaseTuner": "targeted_module_names targeted_parameter_names",
    "peft.tuners.tuners_utils.BaseTunerLayer": "_active_adapter _disable_adapters base_layer merged",
    "peft.utils.other": "AuxiliaryTrainingWrapper EMBEDDING_LAYER_NAMES",
    "peft.utils.other.AuxiliaryTrainingWrapper": "_active_adapter _disable_adapters original_module",
    "peft.utils.other.ModulesToSaveWrapper": "modules_to_save",
    "peft.utils.other.TrainableTokensWrapper": "weight",
    "torch.nn.Linear": "bias weight",
    "torch.nn.Module": "_buffers _modules _non_persistent_buffers_set _parameters forward",
    "torch.nn.modules.module._IncompatibleKeys": "missing_keys unexpected_keys",
    "torch.distributed.fsdp.MixedPrecisionPolicy": "output_dtype",
    "torch.distributed.tensor.DTensor": "device_mesh from_local full_tensor placements to_local",
    "trackio.Run": "config group name",
    "trackio.context_vars": "current_run",
    "transformers.BitsAndBytesConfig": "bnb_4bit_quant_type",
    "transformers.CohereConfig": "logit_scale",
    "transformers.FalconH1Config": "lm_head_multiplier",
    "transformers.Gemma2Config": "final_logit_softcapping layer_types",
    "transformers.GraniteConfig": "logits_scaling",
    "transformers.GenerationConfig": "eos_token_id",
    "transformers.LlamaConfig": "bos_token_id max_position_embeddings num_hidden_layers",
    "transformers.MixtralConfig": "num_experts_per_tok num_local_experts",
    "transformers.PreTrainedModel": "config generation_config quantization_config tie_weights",
    "transformers.PretrainedConfig": "_attn_implementation _attn_implementation_internal _commit_hash _name_or_path get_text_config",
    "transformers.Trainer": (
        "_train_batch_size callback_handler current_gradient_accumulation_steps hub_model_id is_deepspeed_enabled is_fsdp_enabled lr_scheduler model_wrapped push_in_progress resume_from_checkpoint"
    ),
    "transformers.TrainerState": "best_global_step best_model_checkpoint load_from_json save_to_json stateful_callbacks",
    "transformers.TrainingArguments": (
        "_n_gpu activation_checkpointing activation_checkpointing_kwargs average_tokens_across_devices deepspeed "
        "enable_jit_checkpoint fsdp fsdp_plugin_args gradient_checkpointing gradient_checkpointing_kwargs hub_always_push hub_revision"
    ),
    "transformers.Qwen3MoeConfig": "num_experts",
    "transformers.modeling_outputs.BaseModelOutput": "last_hidden_state",
    "transformers.modeling_layers.GradientCheckpointingLayer": "gradient_checkpointing",
    "transformers.utils.hub.PushInProgress": "is_done",
    "trl.SFTTrainer": (
        "_metrics _name _paper _tag_names _tokenizer _total_train_tokens aux_loss chat_template completion_only_loss entropy "
        "fused_lm_head is_top1 label_mask log_probs"
    ),
    "yaml.error.MarkedYAMLError": "problem problem_mark",
}

# Names of files that are looked for or read.
VALUES = {
    "accelerate.utils.constants.FSDP_MODEL_NAME": "pytorch_model_fsdp",
    "deepspeed.checkpoint.constants.MODEL_FILE_SUFFIX": "_model_states.pt",
    "deepspeed.checkpoint.constants.OPTIM_FILE_SUFFIX": "_optim_states.pt",
    "deepspeed.checkpoint.constants.ZERO_FILE_PREFIX": "zero_pp_rank_",
    "peft.utils.CONFIG_NAME": "adapter_config.json",
    "peft.utils.SAFETENSORS_WEIGHTS_NAME": "adapter_model.safetensors",
    "transformers.trainer.OPTIMIZER_NAME": "optimizer.pt",
    "transformers.trainer.SCHEDULER_NAME": "scheduler.pt",
    "transformers.trainer.TRAINER_STATE_NAME": "trainer_state.json",
    "transformers.trainer_utils.PREFIX_CHECKPOINT_DIR": "checkpoint",
    "transformers.utils.CHAT_TEMPLATE_FILE": "chat_template.jinja",
}

# What stands in the source of others and nowhere else: parts of file names, a keyword that is looked up, the lines that are hidden.
WRITTEN = {
    "accelerate.utils.fsdp_utils": ['f"{FSDP_MODEL_NAME}.bin"', 'f"{FSDP_MODEL_NAME}_{model_index}"'],
    "bitsandbytes.backends.cpu.ops": ["getLogger(__name__)", "Failed to load CPU gemm_4bit_forward"],
    "deepspeed.runtime.engine": [
        "global_step{self.global_steps}",
        "zero_pp_rank_",
        "_model_states.pt",
        "_optim_states.pt",
    ],
    "peft.PeftModel.save_pretrained": ['kwargs.get("state_dict"'],
    "trackio.Run.__init__": ['self.config["_Group"] = self.group'],
    "transformers.Trainer._save_rng_state": ['"rng_state.pth"', 'f"rng_state_{self.args.process_index}.pth"'],
    "transformers.TrainingArguments._process_fsdp_args": ['{"fsdp_version": ', '["activation_checkpointing"] = '],
}

# Fields of what accelerate's launcher takes.
LAUNCHER = (
    "config_file cpu deepspeed_config_file dynamo_backend fsdp_activation_checkpointing fsdp_version gpu_ids module multi_gpu "
    "num_processes offload_param_device parallelism_config_cp_size parallelism_config_sp_size parallelism_config_tp_size quiet "
    "training_script training_script_args use_deepspeed use_fsdp use_parallelism_config zero_stage"
)


def find(path):
    """What a dotted name stands for: the longest part that is a module, then attributes."""
    parts = path.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for name in parts[end:]:
            found = getattr(found, name)
        return found
    raise ModuleNotFoundError(path)


def names_of(function):
    """Parameters in their order, without `self`."""
    parameters = [str(p) if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) else p.name for p in _parameters(function)]
    return [name.split(":")[0] for name in parameters if name != "self"]


def _parameters(function):
    return inspect.signature(function).parameters.values()


@cache
def words_of(source):
    """Attributes, assigned names, keywords and strings in it; of comments and docstrings nothing."""
    found = set()
    for node in ast.walk(ast.parse(textwrap.dedent(source))):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.keyword | ast.arg):
            found.add(node.arg)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
    return found


def has(owner, name):
    """Classes rarely declare what their methods set: then it stands in their source."""
    if hasattr(owner, name):
        return True
    try:
        source = inspect.getsource(owner)
    except OSError:  # a class that a decorator has made anew
        source = inspect.getsource(inspect.getmodule(owner))
    return name in words_of(source)


def overridden():
    own = [cls for cls in EMARegularizedSFTTrainer.__mro__ if cls.__module__.startswith("trl_ema.")]
    return {name for cls in own for name, x in vars(cls).items() if inspect.isfunction(x) and hasattr(SFTTrainer, name)}


def test_the_table_of_overridden_methods_is_complete():
    assert sorted(overridden() - {"__init__"}) == OVERRIDDEN.split()


@pytest.mark.parametrize("name", OVERRIDDEN.split())
def test_overridden_method_takes_and_hands_on_what_it_is_given(name):
    assert hasattr(SFTTrainer, name)
    ours, theirs = names_of(getattr(EMARegularizedSFTTrainer, name)), names_of(getattr(SFTTrainer, name))
    own = [parameter for parameter in ours if parameter[0] != "*"]
    if "*args" in ours:  # hands on the rest
        assert theirs[: ours.index("*args")] == ours[: ours.index("*args")]
        assert set(own) <= set(theirs)
    else:
        assert theirs == ours
    defaults = {p.name: p.default for p in _parameters(getattr(EMARegularizedSFTTrainer, name))}
    assert all(defaults.get(p.name, p.default) == p.default for p in _parameters(getattr(SFTTrainer, name)))


@pytest.mark.parametrize("path", CALLED)
def test_function_takes_what_it_is_given(path):
    function = find(path)
    if CALLED[path] is None:  # without a signature
        assert callable(function)
        return
    by_position, _, by_name = (part.split() for part in CALLED[path].partition("|"))
    parameters = names_of(function)
    assert parameters[: len(by_position)] == by_position
    assert set(by_name) <= set(parameters)
    needed = [
        p for p in _parameters(function) if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    assert {p.name for p in needed} <= {"self", *by_position, *by_name}


@pytest.mark.parametrize("path", NAMED)
def test_attribute_exists(path):
    owner = find(path)
    assert not [name for name in NAMED[path].split() if not has(owner, name)]


@pytest.mark.parametrize("path", VALUES)
def test_file_has_the_name_that_is_looked_for(path):
    assert find(path) == VALUES[path]


@pytest.mark.parametrize("path", WRITTEN)
def test_what_is_read_in_the_source_of_others_still_stands_there(path):
    source = inspect.getsource(find(path))
    assert not [part for part in WRITTEN[path] if part not in source]


def test_the_launcher_has_the_fields_that_are_set_and_read():
    from accelerate.commands.launch import launch_command_parser

    assert set(LAUNCHER.split()) <= set(vars(launch_command_parser().parse_args(["train.py"])))


def test_deepspeeds_optimizer_on_the_cpu_is_compiled_without_nvcc():
    """As the Dockerfile says."""
    from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator
    from deepspeed.ops.op_builder.builder import CUDAOpBuilder

    found = CUDA_Accelerator().get_op_builder("CPUAdamBuilder")()
    assert found.sources() and not isinstance(found, CUDAOpBuilder)
    assert all(source.endswith(".cpp") for source in found.sources())


def test_a_name_in_a_comment_or_docstring_is_not_had():
    def owner():
        """Once it had `one` and `self.two`."""
        return owner.three  # four

    assert [name for name in ("one", "two", "three", "four") if has(owner, name)] == ["three"]


# Imports need no table.
NODES = [
    node
    for path in Path(trl_ema.__file__).parent.rglob("*.py")
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
]
IMPORTED = sorted(
    {
        f"{node.module}.{alias.name}"
        for node in NODES
        if isinstance(node, ast.ImportFrom) and not node.level
        for alias in node.names
        if node.module.split(".")[0] not in {*sys.stdlib_module_names, "vllm"}  # which the suite has a stand-in for
    }
)


@pytest.mark.parametrize("path", IMPORTED)
def test_what_is_imported_exists(path):
    find(path)


CLASSES = {node.name: node for node in NODES if isinstance(node, ast.ClassDef)}
TABLES = {
    *OVERRIDDEN.split(), *(part for path in CALLED for part in path.split(".")), *" ".join(NAMED.values()).split(), *LAUNCHER.split()
}  # fmt: skip


def own_names(cls):
    """What a class of ours, or one of ours that it extends, defines or sets on itself."""
    found = {node.attr for node in ast.walk(cls) if is_of_self(node) and isinstance(node.ctx, ast.Store)}
    found |= {node.name for node in cls.body if isinstance(node, ast.FunctionDef)}
    found |= {node.id for statement in cls.body for node in ast.walk(statement) if isinstance(node, ast.Name)}
    bases = [CLASSES[base.id] for base in cls.bases if isinstance(base, ast.Name) and base.id in CLASSES]
    return found.union(*map(own_names, bases))


def is_of_self(node):
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"


def names_of_strings(node):
    """`getattr(x, "name")`, `vars(x)["name"]` and the like."""
    if (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ("getattr", "hasattr", "setattr")
    ):
        wanted = node.args[1:2]
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and is_vars(node.func.value):
        wanted = node.args[:1]
    elif isinstance(node, ast.Subscript) and is_vars(node.value):
        wanted = [node.slice]
    else:
        return set()
    return {x.value for x in wanted if isinstance(x, ast.Constant)}


def is_vars(node):
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "vars"


def test_no_underscored_name_of_others_is_missing_in_the_tables():
    ours = {
        node for cls in CLASSES.values() for node in ast.walk(cls) if is_of_self(node) and node.attr in own_names(cls)
    }
    # What a trainer of ours sets may be TRL's all the same.
    theirs = words_of("\n".join(inspect.getsource(cls) for cls in SFTTrainer.__mro__ if cls.__module__ != "builtins"))
    used = {node for node in NODES if isinstance(node, ast.Attribute) and re.match("_[a-z]", node.attr)}
    assert {node.attr for node in used if node not in ours or node.attr in theirs} <= TABLES


def test_no_name_of_others_that_is_asked_for_as_text_is_missing_in_the_tables():
    known_anywhere = {"__len__", "shape", "value"}  # of a sequence, an array, an enumeration
    # Of `StartingPoint`, of `Rehearsal` and `DriftCallback`, of a recipe's options.
    own = {"is_base", "watches_drift", "training_config"}
    assert set().union(*map(names_of_strings, NODES)) - known_anywhere - own <= TABLES


def words_in_use():
    """All names and words of the package, and patterns of those that it puts together, such as f"{name}_enabled"."""
    words, patterns = set(), []
    for node in NODES:
        words |= {getattr(node, field, None) for field in ("attr", "id", "arg", "name")}
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            words |= set(re.findall(r"\w+", node.value))
        elif isinstance(node, ast.JoinedStr):
            text = "".join(x.value if isinstance(x, ast.Constant) else "*" for x in node.values)
            if re.fullmatch(r"\w+\*|\*\w+", text):
                patterns.append(text.replace("*", r"\w+"))
    return words, patterns


def test_all_that_the_tables_name_is_still_used():
    words, patterns = words_in_use()
    named = {*OVERRIDDEN.split(), *" ".join(NAMED.values()).split(), *LAUNCHER.split()}
    for path, parameters in CALLED.items():
        *_, owner, function = path.split(".")
        named |= {owner if function.startswith("__") else function, *(parameters or "").partition("|")[2].split()}
    for path, value in VALUES.items():  # by its name, or written out
        name = path.rpartition(".")[2]
        named |= {name} if name in words else set(re.findall(r"\w{3,}", value))
    assert not {name for name in named - words if not any(re.fullmatch(pattern, name) for pattern in patterns)}
