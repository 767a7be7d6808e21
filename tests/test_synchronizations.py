"""
Where the host waits for the device in a micro-batch. A GPU that is waited for has nothing to do until the host has caught up, and
small batches are limited by the host.
"""

import traceback
import warnings
from pathlib import Path

import pytest
import torch
from conftest import USE_CPU
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from trl import SFTTrainer


class Waits(TorchDispatchMode):
    """
    The operations that would wait on a GPU, seen on a CPU: those whose result, or its shape, the host must know, and copies of
    numbers from the host. Other copies from one device to another cannot be seen here.
    """

    VALUES = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_consecutive", "bincount")

    def __init__(self):
        super().__init__()
        self.found: list[str] = []
        self._of_the_host: list[torch.Tensor] = []
        self._calls = _Calls(self.found)

    def __enter__(self):
        self._calls.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._calls.__exit__(*error)

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name, kwargs = operation.overloadpacket.__name__, kwargs or {}
        if name == "copy_":
            waits = any(args[1] is tensor for tensor in self._of_the_host)
        elif name == "repeat_interleave":
            waits = kwargs.get("output_size") is None
        elif name in ("index", "index_put", "index_put_"):
            by_mask = any(index is not None and index.dtype == torch.bool for index in args[1])
            waits = by_mask and (name == "index" or args[2].dim() > 0)  # a single number is filled in by the mask
        else:
            waits = name in self.VALUES
        if waits:
            self.found.append(_caller())
        result = operation(*args, **kwargs)
        if name == "lift_fresh":  # `torch.tensor(…)`
            self._of_the_host.append(result)
        return result


class _Calls(TorchFunctionMode):
    """What does nothing on a CPU that a dispatcher would see."""

    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") in ("tolist", "numpy", "cpu"):
            self.found.append(_caller())
        return function(*args, **(kwargs or {}))


def _caller() -> str:
    """The innermost line that is neither PyTorch's nor ours here."""
    frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename and f.filename != __file__]
    return f"{Path(frames[-1].filename).name}: {frames[-1].line}"


def waits_of(step) -> list[str]:
    """In the second of two steps: the first may have something to set up."""
    step()
    if USE_CPU:
        with Waits() as waits:
            step()
        return waits.found
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return [f"{Path(w.filename).name}: line {w.lineno}" for w in caught if "synchroniz" in str(w.message)]


REHEARSAL = dict(rehearsal_weight=1.0, rehearsal_num_texts=8, rehearsal_num_tokens=12)


@pytest.fixture
def waits(make_trainer, monkeypatch, tmp_path):
    monkeypatch.setenv("TRL_EMA_CACHE", str(tmp_path))
    monkeypatch.setattr("trl.trainer.utils._use_triton", lambda _: True)  # TRL's head does what it does on a GPU

    def count(**options):
        trainer = make_trainer(bf16=True, **options)
        for regularizer in getattr(trainer, "regularizers", []):
            if regularizer.name == "rehearsal":
                regularizer.begin(trainer)  # writes its texts
        trainer.create_optimizer()
        model, _ = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
        (inputs,), items = trainer.get_batch_samples(
            iter(trainer.get_train_dataloader()), 1, trainer.accelerator.device
        )
        trainer.current_gradient_accumulation_steps = 1

        def step():
            for regularizer in getattr(trainer, "regularizers", []):
                if regularizer.name == "rehearsal":
                    regularizer._micro_batch = 0  # the same one again
            trainer.training_step(model.train(), dict(inputs), items)

        return waits_of(step)

    return count


@pytest.mark.parametrize("documents", [False, True], ids=["rows", "documents"])
@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(kl_tokens="all"),
        dict(kl_tokens="prompt"),
        dict(teacher="frozen"),
        dict(kl_fraction=0.5),
        dict(teacher="none", entropy_weighting=True),
        dict(teacher="none", **REHEARSAL),
        dict(teacher="frozen", **REHEARSAL),
    ],
    ids=[
        "ema",
        "all tokens",
        "prompt tokens",
        "frozen",
        "half of the sequences",
        "entropy weighting",
        "rehearsal",
        "rehearsal and frozen",
    ],
)
def test_a_micro_batch_waits_for_the_device_no_more_often_than_plain_sft(waits, documents, options):
    data = dict(padding_free=True, max_length=None) if documents else {}
    sft, ours = waits(trainer_class=SFTTrainer, **data), waits(**data, **options)
    # Of all tokens the host must know the number, just before it waits in any case; a second term comes just after it has.
    more = int("kl_tokens" in options or options == dict(teacher="frozen", **REHEARSAL))
    assert len(ours) <= len(sft) + more, f"Ours: {ours}, SFT's: {sft}"
    here = [
        line
        for line in ours
        if line.startswith(
            ("forward.py", "trainer.py", "losses.py", "teacher.py", "divergence.py", "checks.py", "rehearsal.py")
        )
    ]
    assert len(here) == 1 + more, here


@pytest.mark.parametrize(
    "operation",
    [
        lambda x, mask: x[1].item(),
        lambda x, mask: x[mask],
        lambda x, mask: x.__setitem__(mask, torch.ones(2)),
        lambda x, mask: x.__setitem__(0, 1.0),
        lambda x, mask: mask.nonzero(),
        lambda x, mask: bool(mask.any()),
        lambda x, mask: x.tolist(),
        lambda x, mask: x.cpu(),
        lambda x, mask: x.masked_select(mask),
    ],
)
def test_what_waits_is_found(operation):
    with Waits() as waits:
        operation(torch.zeros(4), torch.tensor([True, False, True, False]))
    assert len(waits.found) == 1


def test_what_does_not_wait_is_not_found():
    x, mask = torch.zeros(4), torch.tensor([True, False, True, False])
    with Waits() as waits:
        x[mask] = 0.0
        x.index_select(0, torch.tensor([1, 2]))
        x[1:2].fill_(1.0)
    assert not waits.found
