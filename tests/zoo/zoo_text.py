"""Language models: Hugging Face transformers, peft and x-transformers."""

from functools import partial
from typing import Any

import peft
import torch
import transformers as hf
import x_transformers as xt
from torch import Tensor
from torch.nn import functional as F
from zoo import BATCH, STEPS, Case, Model

from lightning_mgpu import Shard, scatter

VOCABULARY = 40
LENGTH = 8
_SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
_TEXT = {**_SMALL, "vocab_size": VOCABULARY}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
# The loss of their language models is computed in float32 whatever the model's dtype.
_FLOAT32 = 2e-6


class LossInModel(Model):
    def loss(self, batch: Any) -> Tensor:
        return self.net(**batch).loss

    def outputs(self, batch: Any) -> Any:
        return self.net(**batch)


class LossInStep(LossInModel):
    def loss(self, batch: Any) -> Tensor:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        return F.cross_entropy(self.net(**inputs).logits, batch["labels"])


class CountsTokens(LossInModel):
    def weight(self, batch: Any) -> int:
        return tokens(batch)


class Contrastive(LossInModel):
    def loss(self, batch: Any) -> Tensor:
        return self.net(**batch, return_loss=True).loss

    def outputs(self, batch: Any) -> Any:
        return self.net(**batch).image_embeds


def token_ids(length: int = LENGTH) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, VOCABULARY, (BATCH * STEPS, length), generator=generator)


def sentences() -> list[dict[str, Tensor]]:
    """With padding masks, and a label each."""
    masks = [(torch.arange(LENGTH) < 4 + i % 5).long() for i in range(BATCH * STEPS)]
    return [
        {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor(i % 3)}
        for i, (ids, mask) in enumerate(zip(token_ids(), masks, strict=True))
    ]


def texts() -> list[dict[str, Tensor]]:
    return [{"input_ids": ids, "labels": ids} for ids in token_ids()]


def padded_texts() -> list[dict[str, Tensor]]:
    """Of different lengths; padding is no label."""
    masks = [(torch.arange(LENGTH) < 3 + i % 6).long() for i in range(BATCH * STEPS)]
    return [
        {"input_ids": ids, "attention_mask": mask, "labels": torch.where(mask == 1, ids, -100)}
        for ids, mask in zip(token_ids(), masks, strict=True)
    ]


def _images() -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(BATCH * STEPS, 3, 8, 8, generator=generator, dtype=torch.float64)


def tokens(batch: Any) -> int:
    """How many labels count: the first token of a text is predicted from nothing."""
    return int((batch["labels"][:, 1:] != -100).sum())


def by_tokens(batch: Any, count: int) -> list[Shard]:
    return [Shard(shard.batch, tokens(shard.batch)) for shard in scatter(batch, count)]


def _bert(**options: Any) -> Any:
    config = hf.BertConfig(
        **_TEXT, **_NO_DROPOUT, max_position_embeddings=16, num_labels=3, **options
    )
    return hf.BertForSequenceClassification(config)


def _gpt2() -> Any:
    config = hf.GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=16,
        n_embd=16,
        n_layer=2,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return hf.GPT2LMHeadModel(config)


def _llama(**options: Any) -> Any:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**_TEXT, num_key_value_heads=1, **options))


def bert_loss_in_step() -> Case:
    return Case(lambda: LossInStep(_bert()), sentences())


def bert_hidden_states() -> Case:
    return Case(lambda: LossInModel(_bert(output_hidden_states=True)), sentences())


def gpt2() -> Case:
    return Case(lambda: LossInModel(_gpt2()), texts(), tolerance=_FLOAT32)


def gpt2_padded() -> Case:
    advice = {"scatter_fn": by_tokens}
    return Case(lambda: CountsTokens(_gpt2()), padded_texts(), advice=advice, tolerance=_FLOAT32)


def t5() -> Case:
    config = hf.T5Config(
        vocab_size=VOCABULARY,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    return Case(lambda: LossInModel(hf.T5ForConditionalGeneration(config)), texts())


def vit() -> Case:
    config = hf.ViTConfig(**_SMALL, **_NO_DROPOUT, image_size=8, patch_size=4, num_labels=3)
    samples = [
        {"pixel_values": image, "labels": torch.tensor(i % 3)} for i, image in enumerate(_images())
    ]
    return Case(lambda: LossInModel(hf.ViTForImageClassification(config)), samples)


def llama() -> Case:
    def build() -> Model:
        net = _llama(tie_word_embeddings=True)
        net.gradient_checkpointing_enable()
        return LossInModel(net)

    return Case(build, texts(), tolerance=_FLOAT32)


class Generates(LossInModel):
    def outputs(self, batch: Any) -> Any:
        return self.net.generate(batch["input_ids"], max_new_tokens=4, pad_token_id=0)


def llama_generates() -> Case:
    return Case(lambda: Generates(_llama()), texts(), tolerance=_FLOAT32)


def clip() -> Case:
    config = hf.CLIPConfig(
        text_config={**_TEXT, "max_position_embeddings": 16, "eos_token_id": 2},
        vision_config={**_SMALL, "image_size": 8, "patch_size": 4},
        projection_dim=8,
    )
    samples = [
        {"input_ids": ids, "pixel_values": image}
        for ids, image in zip(token_ids(), _images(), strict=True)
    ]
    return Case(lambda: Contrastive(hf.CLIPModel(config)), samples)


def lora() -> Case:
    config = peft.LoraConfig(
        r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False
    )
    build = partial(_adapted, config)
    return Case(lambda: LossInModel(build()), texts(), tolerance=_FLOAT32)


def _adapted(config: peft.LoraConfig) -> Any:
    return peft.get_peft_model(_llama(), config)


class LossFromForward(Model):
    """x-transformers' wrapper returns the loss."""

    def loss(self, batch: Any) -> Tensor:
        return self.net(batch)

    def outputs(self, batch: Any) -> Any:
        return self.net.net(batch)


def x_decoder() -> Case:
    def build() -> Model:
        layers = xt.Decoder(dim=16, depth=2, heads=2, attn_dim_head=8, rotary_pos_emb=True)
        net = xt.TransformerWrapper(num_tokens=VOCABULARY, max_seq_len=16, attn_layers=layers)
        return LossFromForward(xt.AutoregressiveWrapper(net))

    return Case(build, list(token_ids()))


class Pooled(Model):
    """Classifies the mean of what the encoder makes of the entries that are no padding."""

    def outputs(self, batch: Any) -> Tensor:
        features, mask, _ = batch
        encoded = self.net(features, mask=mask)
        weights = mask.unsqueeze(-1).to(encoded)
        return (encoded * weights).sum(1) / weights.sum(1)

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.outputs(batch), batch[2])


def x_encoder() -> Case:
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(BATCH * STEPS, LENGTH, 4, generator=generator, dtype=torch.float64)
    samples = [
        (entry, torch.arange(LENGTH) < 3 + i % 6, torch.tensor(i % 3))
        for i, entry in enumerate(features)
    ]

    def build() -> Model:
        layers = xt.Encoder(dim=16, depth=2, heads=2, attn_dim_head=8, alibi_pos_bias=True)
        return Pooled(
            xt.ContinuousTransformerWrapper(dim_in=4, dim_out=3, max_seq_len=16, attn_layers=layers)
        )

    return Case(build, samples)
