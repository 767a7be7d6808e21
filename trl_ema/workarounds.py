"""Faults of other libraries, kept out of the way."""


def keep_4bit_layers_trainable(model) -> None:
    """
    bitsandbytes repacks 4-bit weights in an eval-mode forward on CPUs with AVX512-BF16, for a product that has no
    backward. Gradients after an evaluation would silently be wrong, and so would whatever reads the weight itself, such as
    DoRA for its norm. Harmless on other machines and for other models.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.state_dict()  # unpacks, in place
            module.support_avx512bf16_for_cpu = False
