"""What each rank holds between steps, by formula: the table of docs/scaling.md. It knows no other library."""

from dataclasses import dataclass


MODES = ("ddp", "zero2", "zero3", "fsdp2")


@dataclass(frozen=True)
class Sizes:
    """
    A model in elements.

    Args:
        layers (`float`): Frozen weights of all the layers and the norms.
        embedding (`float`): Of the input embedding.
        head (`float`): Of the output embedding; 0 where that is the input embedding.
        adapter (`float`): Trained weights, all of them in the layers.
        depth (`int`): Number of layers.
    """

    layers: float
    embedding: float
    head: float
    adapter: float
    depth: int


@dataclass(frozen=True)
class Bytes:
    """Of one element: frozen layers, the embeddings, the student, its float32 copy, what is sent, the teacher."""

    layers: float
    outer: float
    student: int
    copy: int
    sent: int
    teacher: int


# NF4 with double quantization: 4 bits, an 8-bit scale for 64 weights, a float32 for 256 scales.
NF4 = (4 + 8 / 64 + 32 / (64 * 256)) / 8
# What the launch configs do with a bfloat16 model. Adapters are float32 in PEFT, bfloat16 over 4-bit weights in TRL; DeepSpeed
# makes everything bfloat16 and trains a float32 copy. A teacher in bfloat16 has its average in float32 beside it.
BFLOAT16 = {
    "ddp": Bytes(2, 2, student=4, copy=0, sent=4, teacher=4),
    "ddp, NF4": Bytes(NF4, 2, student=2, copy=0, sent=2, teacher=2 + 4),
    "zero2": Bytes(2, 2, student=2, copy=4, sent=2, teacher=2 + 4),
    "zero3": Bytes(2, 2, student=2, copy=4, sent=2, teacher=2 + 4),
    "fsdp2": Bytes(2, 2, student=4, copy=0, sent=2, teacher=4),
}
# At stage 3 a float32 model is DeepSpeed's float32 copy itself.
FLOAT32 = {mode: Bytes(4, 4, student=4, copy=4 if mode == "zero2" else 0, sent=4, teacher=4) for mode in MODES}


def memory(mode: str, teacher: str, n: Sizes, b: Bytes, ranks: int) -> dict[str, float]:
    """
    Bytes on each rank that stay between steps: with s = 1 where weights are whole and 1 / ranks where they are sharded,

        base       s · (layers + embeddings)
        student    s · adapter
        optimizer  s · (Adam's two moments and DeepSpeed's float32 copy), also 1 / ranks at stage 2
        teacher    s · adapter in float32 (and once more in the model's own precision) when it is an average, else nothing
    """
    weights = 1 / ranks if mode in ("zero3", "fsdp2") else 1.0
    states = 1.0 if mode.startswith("ddp") else 1 / ranks
    moments = 2 * (4 if mode.startswith("zero") else b.student)
    return {
        "base": weights * (b.layers * n.layers + b.outer * (n.embedding + n.head)),
        "student": weights * b.student * n.adapter,
        "optimizer": states * (moments + b.copy) * n.adapter,
        # A frozen teacher over a fresh adapter is the base: nothing is kept.
        "teacher": weights * b.teacher * n.adapter * (teacher == "ema"),
    }
