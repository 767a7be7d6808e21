"""Faults of other libraries, kept out of the way."""

from peft.utils.other import TrainableTokensWrapper


class _TokensOfHead(TrainableTokensWrapper):
    bias = None


def let_tokens_of_head_train(model) -> None:
    """
    Where PEFT trains single tokens of the head (`trainable_token_indices`; those of the embeddings are, if both are tied) it
    wraps the head and hands on its weight alone. TRL's loss reads the bias too, if only to find that there is none.

    Raises:
        ValueError: The head has a bias, which PEFT would leave out.
    """
    head = model.get_output_embeddings()
    if type(head) is not TrainableTokensWrapper:
        return
    if head.original_module.bias is not None:
        raise ValueError(
            "`trainable_token_indices` has tokens of the LM head, whose bias PEFT would leave out of every logit. Name the input "
            "embeddings alone, or train the whole head with `modules_to_save`."
        )
    head.__class__ = _TokensOfHead


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
