"""More families of Hugging Face transformers, each in a small random configuration."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers as hf
import zoo_text as text
from torch import Tensor
from torch.nn import functional as F
from zoo import BATCH, STEPS, Case, Model

_SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_TEXT = {
    "vocab_size": text.VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_FLOAT32 = 2e-6


class LogitsInStep(text.LossInModel):
    """The loss of language models in the step; evaluation without labels, too."""

    def outputs(self, batch: Any) -> Any:
        return self.net(**{name: value for name, value in batch.items() if name != "labels"})

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.outputs(batch).logits.flatten(0, 1), batch["labels"].flatten())


def _case(
    net: str,
    config: str,
    samples: Callable[[], list[Any]] = text.texts,
    kind: type[Model] = text.LossInModel,
    **options: Any,
) -> Case:
    def build() -> Model:
        return kind(getattr(hf, net)(getattr(hf, config)(**options)))

    return Case(build, samples(), tolerance=_FLOAT32)


_encoder = partial(_case, **_TEXT, **_SPECIAL)
_decoder = partial(_encoder, num_key_value_heads=1)
roberta = partial(_encoder, "RobertaForMaskedLM", "RobertaConfig", kind=LogitsInStep, **_NO_DROPOUT)
deberta = partial(
    *(_encoder, "DebertaV2ForMaskedLM", "DebertaV2Config"),
    relative_attention=True,
    pos_att_type=["c2p", "p2c"],
    position_buckets=4,
    **_NO_DROPOUT,
)
albert = partial(_encoder, "AlbertForMaskedLM", "AlbertConfig", embedding_size=8, **_NO_DROPOUT)
modernbert = partial(
    *(_encoder, "ModernBertForMaskedLM", "ModernBertConfig"),
    global_attn_every_n_layers=2,
    local_attention=4,
    cls_token_id=1,
    sep_token_id=2,
)
distilbert = partial(
    *(_case, "DistilBertForSequenceClassification", "DistilBertConfig", text.sentences),
    vocab_size=text.VOCABULARY,
    dim=16,
    n_layers=3,
    n_heads=2,
    hidden_dim=32,
    num_labels=3,
    dropout=0.0,
    attention_dropout=0.0,
    seq_classif_dropout=0.0,
)
mistral = partial(_decoder, "MistralForCausalLM", "MistralConfig", sliding_window=4)
qwen2 = partial(_decoder, "Qwen2ForCausalLM", "Qwen2Config")
qwen3 = partial(_decoder, "Qwen3ForCausalLM", "Qwen3Config", head_dim=8)
gemma2 = partial(_decoder, "Gemma2ForCausalLM", "Gemma2Config", head_dim=8, sliding_window=4)
phi3 = partial(_decoder, "Phi3ForCausalLM", "Phi3Config")
mixtral = partial(
    _decoder,
    "MixtralForCausalLM",
    "MixtralConfig",
    num_local_experts=4,
    experts_implementation="eager",
)
llama_in_step = partial(_decoder, "LlamaForCausalLM", "LlamaConfig", kind=LogitsInStep)
gpt_neox = partial(_encoder, "GPTNeoXForCausalLM", "GPTNeoXConfig")
opt = partial(
    *(_case, "OPTForCausalLM", "OPTConfig"),
    **_SPECIAL,
    vocab_size=text.VOCABULARY,
    hidden_size=16,
    num_hidden_layers=3,
    num_attention_heads=2,
    ffn_dim=32,
    max_position_embeddings=32,
    word_embed_proj_dim=16,
    dropout=0.0,
)
bloom = partial(
    *(_case, "BloomForCausalLM", "BloomConfig"),
    **_SPECIAL,
    vocab_size=text.VOCABULARY,
    hidden_size=16,
    n_layer=3,
    n_head=2,
)
mamba = partial(
    *(_case, "MambaForCausalLM", "MambaConfig"),
    **_SPECIAL,
    vocab_size=text.VOCABULARY,
    hidden_size=16,
    state_size=4,
    num_hidden_layers=3,
)
_PAIR = {
    **_SPECIAL,
    "vocab_size": text.VOCABULARY,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "decoder_start_token_id": 2,
    "dropout": 0.0,
}
bart = partial(_case, "BartForConditionalGeneration", "BartConfig", **_PAIR)


def _inputs(name: str, *shape: int) -> list[dict[str, Tensor]]:
    """Random inputs with a label each."""
    generator = torch.Generator().manual_seed(9)
    values = torch.randn(BATCH * STEPS, *shape, generator=generator, dtype=torch.float64)
    return [{name: value, "labels": torch.tensor(i % 3)} for i, value in enumerate(values)]


_images = partial(_inputs, "pixel_values", 3, 32, 32)
swin = partial(
    *(_case, "SwinForImageClassification", "SwinConfig", _images),
    image_size=32,
    patch_size=2,
    embed_dim=8,
    depths=[2, 2],
    num_heads=[2, 2],
    window_size=4,
    drop_path_rate=0.0,
    num_labels=3,
)
convnext = partial(
    *(_case, "ConvNextForImageClassification", "ConvNextConfig", _images),
    hidden_sizes=[8, 16, 16, 32],
    depths=[1, 1, 2, 1],
    num_labels=3,
)
segformer = partial(
    *(_case, "SegformerForImageClassification", "SegformerConfig", _images),
    hidden_sizes=[8, 8, 16, 16],
    depths=[1, 1, 1, 1],
    num_attention_heads=[1, 1, 2, 2],
    drop_path_rate=0.0,
    num_labels=3,
    **_NO_DROPOUT,
)


def whisper() -> Case:
    heard = _inputs("input_features", 8, 32)
    samples = [
        {"input_features": sound["input_features"], "labels": said["labels"]}
        for sound, said in zip(heard, text.texts(), strict=True)
    ]
    return _case(
        *("WhisperForConditionalGeneration", "WhisperConfig", lambda: samples),
        **_PAIR,
        num_mel_bins=8,
        max_source_positions=16,
        max_target_positions=16,
    )
