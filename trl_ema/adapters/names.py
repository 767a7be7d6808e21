"""Names of adapters and of their parameters."""

from typing import Any

import torch
from accelerate.utils import is_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer


# The adapter that is trained, under the name by which PEFT saves it at the root of a folder, and the one that follows it.
STUDENT_NAME = "default"
TEACHER_NAME = "teacher"


def trained_names(model: torch.nn.Module) -> list[str]:
    """Names of the parameters that are trained."""
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def names_of(model: torch.nn.Module) -> dict[str, list[str]]:
    """By the first name of each parameter: all names it has."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {aliases[0]: aliases for aliases in names.values()}


def twin_name(name: str, student: str) -> str:
    """The teacher's parameter beside the `student`'s parameter `name`."""
    return ".".join(TEACHER_NAME if part == student else part for part in name.split("."))


def tuner_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The layers that an adapter has put into the model, in order."""
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def base_of(model: Any) -> Any:
    """The model that transformers made, in which an adapter is active or not; without the prompt of prompt learning."""
    return model.get_base_model() if is_peft_model(model) else model
