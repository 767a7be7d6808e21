"""Every causal language model of the installed transformers: trained rightly, or refused with the reason."""

import pytest
import torch
from conftest import TINY, lora
from peft import get_peft_model
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from trl.trainer.utils import add_fused_lm_head

from trl_ema.forward import Divergence, add_regularized_forward, check_head
from trl_ema.regularizers.teacher import MeanTeacher


# By `model_type`. A name that a new release of transformers adds belongs into one of the three.
TRAINED = """
    afmoe apertus apertus1p5_text arcee aria_text axk1 axk2 bailing_hybrid bamba bart beam bert-generation
    bigbird_pegasus biogpt bitnet blenderbot blenderbot-small bloom blt codegen cohere cohere2 cohere2_moe
    cohere_compass_text cpmant ctrl cwm dbrx deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4 diffllama doge dory dots1
    dots3_note dots3_note_text emu3 ernie4_5 ernie4_5_moe exaone exaone4 exaone_moe falcon falcon_h1 falcon_mamba
    flex_olmo flint fuyu gemma gemma2 gemma3 gemma3_text gemma3n_text gemma4 gemma4_text gemma4_unified
    gemma4_unified_text git glm glm4 glm4_moe glm4_moe_lite glm_moe_dsa got_ocr2 gpt-sw3 gpt2 gpt_bigcode gpt_neo
    gpt_neox gpt_neox_japanese gpt_oss gptj granite granite_swa granitemoe granitemoe_swa granitemoehybrid
    granitemoeshared helium hrm_text hunyuan_v1_dense hunyuan_v1_moe hy_v3 hy_v4 hyperclovax inkling2_loop_text
    inkling2_text internlm3 iquestcoder jais2 jamba jetmoe kimi_linear kolibri1 laguna lara_mini lfm2 lfm2_moe lfm3
    llama longcat_flash mamba mamba2 marian mbart mellum mimo_v2_flash minicpm3 minimax minimax_m2 minimax_m3_vl_text
    ministral ministral3 mistral mixtral moshi moss_transcribe_diarize mpt mvp nanochat nemotron nemotron_h olmo olmo2
    olmo3 olmo_hybrid olmoe openai-gpt opt pegasus persimmon phi phi3 phi4_multimodal phimoe plbart qwen2 qwen2_moe
    qwen3 qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next qwen4_exp qwen4_exp_text reformer rwkv
    sarvam_mla sarvam_moe seed_oss smollm3 solar_open stablelm starcoder2 trocr vaultgemma whisper xglm xlm xlnet youtu
    zamba zamba2 zaya
"""
MASKED = """
    bert big_bird camembert data2vec-text ernie megatron-bert modernbert-decoder rembert roberta roberta-prelayernorm
    roc_bert roformer xlm-roberta xlm-roberta-xl xmod
"""

_EXTRA_LAYER = "relative error .*an extra layer. `SFTTrainer`, and so `teacher='none'`,"
_OTHER_SIZE = "returns 32 numbers per token, its LM head takes 128: there is an extra layer in between"
_NO_BACKBONE = (
    "returns no hidden states: its `base_model_prefix` is 'language_model'.* set `model.base_model_prefix = 'model'`"
)
REFUSED = {
    # A dense layer and a normalization before the head, as for masked language models.
    **dict.fromkeys(MASKED.split(), _EXTRA_LAYER),
    "electra": _OTHER_SIZE,
    "prophetnet": _EXTRA_LAYER,  # the head reads another stream than the decoder returns
    "inkling_text": _EXTRA_LAYER,  # a scale of its own
    "recurrent_gemma": _EXTRA_LAYER,  # `logits_soft_cap`
    "xlstm": _EXTRA_LAYER,  # `output_logit_soft_cap`
    **dict.fromkeys(["llama4", "llama4_text", "mllama"], _NO_BACKBONE),
}
NOT_BUILT = {
    "gemma3n": "needs the timm package; its text model is `gemma3n_text`",
    "gemma4_assistant": "drafts tokens from the keys and values of another model",
    "gemma4_unified_assistant": "drafts tokens from the keys and values of another model",
    "musicgen": "no text; transformers does not build its decoder from this config",
    "musicgen_melody": "no text; transformers does not build its decoder from this config",
}

# Whatever a config knows of these is made small, in its parts too.
SIZES = TINY | dict(
    num_key_value_heads=4, n_embd=32, d_model=32, dff=48, ffn_dim=48, num_layers=2, rotary_dim=8, n_groups=1,
    encoder_layers=1, encoder_attention_heads=4, encoder_ffn_dim=48, decoder_layers=2, decoder_attention_heads=4,
    decoder_ffn_dim=48, input_embedding_size=32, output_embedding_size=32, vocab_size_per_layer_input=64,
    hidden_size_per_layer_input=0, num_kv_shared_layers=0, hidden_size_global=32, encoder_hash_byte_group_vocab=64,
    # Experts
    n_routed_experts=4, num_experts=4, num_local_experts=4, moe_num_experts=4, num_experts_per_tok=2, moe_topk=2, moe_k=2,
    n_group=1, topk_group=1, n_shared_experts=1, moe_intermediate_size=16, shared_expert_intermediate_size=16,
    moe_shared_expert_intermediate_size=16, expert_ffn_hidden_size=16,
    # Latent and linear attention, state spaces
    q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, linear_key_head_dim=8,
    linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4, linear_head_dim=8, linear_num_heads=4,
    mamba_n_heads=4, mamba_d_head=16, mamba_num_heads=4, mamba_head_dim=16, mamba_expand=2,
    # Pictures
    depth=2, embed_dim=32, num_heads=4, image_size=28, patch_size=14, out_hidden_size=32, mlp_dim=48,
)  # fmt: skip
_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
SPECIAL = {
    "cohere_compass_text": dict(rope_parameters={"full_attention": _ROPE}),
    "dbrx": dict(attn_config=dict(rope_theta=10_000.0, kv_n_heads=4, clip_qkv=8)),
    "dots3_note": dict(
        vision_config=dict(pyramid_num_routed=[-1, -1], adapter_in_dim=32, adapter_out_dim=32),
        audio_config=dict(adapter_input_size=32, adapter_out_dim=32),
    ),
    "falcon_h1": dict(mamba_d_ssm=32, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1),
    "gemma3n_text": dict(hidden_size_per_layer_input=8),
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]]),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"], num_dense_layers=1),
    "mamba2": dict(num_heads=4, head_dim=16, state_size=8),
    "mimo_v2_flash": dict(num_key_value_heads=2),
    "prophetnet": dict(num_encoder_layers=1, num_decoder_layers=2, num_hidden_layers=None, num_attention_heads=None),
    "reformer": dict(
        is_decoder=True, axial_pos_embds_dim=(16, 16), axial_pos_shape=(2, 4), attn_layers=["local", "local"],
        attention_head_size=8, feed_forward_size=48, local_attn_chunk_length=4,
        hidden_dropout_prob=0.0, local_attention_probs_dropout_prob=0.0,
    ),
    "xlnet": dict(n_head=4, d_head=8, n_layer=2, d_inner=48, num_hidden_layers=None, max_position_embeddings=None),
    "xlstm": dict(v_head_dim=None),
    "xmod": dict(languages=["en_XX"], default_language="en_XX"),
    "zamba": dict(num_hidden_layers=4, layers_block_type=["mamba", "hybrid"] * 2),
    "zamba2": dict(layers_block_type=["mamba", "hybrid"]),
    "zaya": dict(num_experts_per_tok=1),
}  # fmt: skip
# Two rows of eight, of which the second is padded.
IDS = torch.tensor([[1, 5, 6, 7, 8, 9, 10, 2], [1, 15, 16, 17, 18, 2, 0, 0]])
LABELS = IDS.masked_fill(IDS == 0, -100).index_fill(1, torch.arange(3), -100)
BATCH = dict(input_ids=IDS, attention_mask=(IDS != 0).long(), use_cache=False)


def _installed(model_types) -> list[str]:
    return [name for name in model_types if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]


def small(config_class) -> dict:
    known = config_class()
    sizes = {name: size for name, size in SIZES.items() if _has(known, name)}
    for name, part in known.sub_configs.items():
        if part is AutoConfig:
            part = type(getattr(known, name, None))
        if part is not type(None):
            sizes[name] = small(part)
    return sizes


def _has(config, name) -> bool:
    attribute = getattr(type(config), name, None)
    try:
        return not (isinstance(attribute, property) and attribute.fset is None) and hasattr(config, name)
    except Exception:  # it differs from layer to layer, says transformers
        return True


def tiny_model_of(model_type):
    special = SPECIAL.get(model_type, {})
    sizes = small(CONFIG_MAPPING[model_type])
    for name, value in special.items():
        sizes[name] = sizes[name] | value if isinstance(sizes.get(name), dict) else value
    config = AutoConfig.for_model(model_type, **{name: value for name, value in sizes.items() if value is not None})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    return model


def linear_layers(model):
    """Those that PEFT gives an adapter in every family: of Mamba's own it refuses some."""
    head = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D", "FalconLinear")
        and module is not head
        and name.split(".")[-1] not in ("out_proj", "conv1d")
    ]


def gradients_of(loss, parameters):
    for parameter in parameters:
        parameter.grad = None
    loss.backward()
    return [parameter.grad for parameter in parameters]


def test_every_model_type_of_the_installed_transformers_is_listed():
    listed = [*TRAINED.split(), *REFUSED, *NOT_BUILT]
    assert len(set(listed)) == len(listed)
    assert not set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(listed)  # an older release has fewer


@pytest.mark.parametrize("model_type", _installed(TRAINED.split()))
def test_loss_and_gradient_are_those_of_the_models_own_logits(model_type):
    base = tiny_model_of(model_type)
    check_head(base)
    mask = LABELS[:, 1:] != -100
    with torch.no_grad():
        log_pt = base(**BATCH).logits[:, :-1][mask].float().log_softmax(-1)
    add_fused_lm_head(base, outputs=("log_probs", "entropy", "is_top1"))
    model = get_peft_model(base, lora(target_modules=linear_layers(base), init_lora_weights="gaussian")).eval()
    if model_type == "reformer":  # its reversible layers have no gradient otherwise
        base.enable_input_require_grads()
        model.train()
    teacher = MeanTeacher(model, frozen=True)
    options = dict(direction="forward", mixture=0.5, temperature=1.0)
    add_regularized_forward(base)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(0.1 * torch.randn_like(parameter))

    output = model(**BATCH, labels=LABELS, fused_lm_head=True, divergences=[Divergence(teacher, 0.5, options=options)])
    gradients = gradients_of(-output.log_probs, trained)
    log_ps = model(**BATCH).logits[:, :-1][mask].float().log_softmax(-1)
    dense = -log_ps.gather(1, LABELS[:, 1:][mask][:, None]).sum() + 0.5 * (log_pt.exp() * (log_pt - log_ps)).sum()
    expected = gradients_of(dense, trained)
    assert (log_ps - log_pt).abs().max() > 1e-3
    torch.testing.assert_close(-output.log_probs, dense, rtol=2e-5, atol=1e-5)
    scale = max(gradient.abs().max() for gradient in expected if gradient is not None)
    assert scale > 0
    for ours, theirs in zip(gradients, expected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * scale.item())


@pytest.mark.parametrize("model_type", _installed(REFUSED))
def test_a_head_that_the_loss_would_not_fit_is_refused_with_the_reason(model_type):
    with pytest.raises(ValueError, match=REFUSED[model_type]):
        check_head(tiny_model_of(model_type))


@pytest.mark.parametrize("model_type", _installed(name for name, match in REFUSED.items() if match is _NO_BACKBONE))
def test_the_advice_for_a_backbone_under_another_name_works(model_type):
    model = tiny_model_of(model_type)
    model.base_model_prefix = "model"
    check_head(model)


@pytest.mark.parametrize("model_type", ["bert", "recurrent_gemma", "xlstm", "prophetnet"])
def test_plain_sft_would_train_a_refused_model_with_a_wrong_loss(model_type):
    """What the refusal says of `teacher="none"`."""
    model = tiny_model_of(model_type)
    mask = LABELS[:, 1:] != -100
    with torch.no_grad():
        dense = torch.nn.functional.cross_entropy(model(**BATCH).logits[:, :-1][mask], LABELS[:, 1:][mask])
        add_fused_lm_head(model)
        loss = model(**BATCH, labels=LABELS, fused_lm_head=True).loss
    assert abs(loss - dense) > 1e-3 * dense
