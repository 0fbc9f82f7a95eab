"""The rows of the zoo, in the order of the table in docs/models.md."""

from collections.abc import Iterator
from typing import Any

from zoo import Row

_OWN = "the loss has a denominator of its own: "
_UNUSED = "layers that are left out have no gradient: `DDPStrategy(find_unused_parameters=True)`"
_NODES = "nodes and edges handed on one by one: `pipeline` takes them whole (`chunks=1`)"


def _rows(package: str, module: str, **models: str | tuple[str, dict[str, Any]]) -> Iterator[Row]:
    """A row for each function of a module: the model's name, and outcomes other than "pass"."""
    for function, model in models.items():
        name, outcomes = (model, {}) if isinstance(model, str) else model
        yield Row(package, name, f"{module}.{function}", **outcomes)


def _but(name: str, **outcomes: str) -> tuple[str, dict[str, Any]]:
    return name, outcomes


ROWS = [
    *_rows(
        "transformers",
        "zoo_text",
        bert_loss_in_step="BERT, padding masks, loss in the step",
        bert_hidden_states="BERT, loss in the model, all hidden states",
        gpt2="GPT-2, caches in the output",
        gpt2_padded=_but(
            "GPT-2, padding as label -100",
            dp="needs advice",
            pipeline="refused",
            note=_OWN + "shards weigh by tokens, `Shard(size=...)`; in a pipeline, take the loss"
            " in the step, or `chunks=1`",
        ),
        t5="T5, caches of encoder and decoder in the output",
        vit="ViT",
        llama="Llama, tied weights, activation checkpointing",
        llama_generates="Llama, `generate` in evaluation",
        clip=_but(
            "CLIP, contrastive loss",
            dp="warned",
            pipeline="refused",
            note="samples are compared with those of their shard only; `chunks=1`",
        ),
    ),
    *_rows(
        "transformers",
        "zoo_families",
        roberta="RoBERTa, masked words, loss in the step",
        deberta="DeBERTa, masked words",
        albert="ALBERT, shared layers",
        distilbert="DistilBERT",
        modernbert="ModernBERT",
        mistral="Mistral, sliding window",
        qwen2="Qwen2",
        qwen3="Qwen3",
        gemma2="Gemma 2",
        phi3="Phi-3",
        gpt_neox="GPT-NeoX",
        opt="OPT",
        bloom="BLOOM",
        mixtral="Mixtral, experts",
        mamba="Mamba",
        bart="BART",
        llama_in_step="Llama, loss in the step",
        swin="Swin",
        convnext="ConvNeXt",
        segformer="SegFormer",
        whisper="Whisper",
    ),
    *_rows("peft", "zoo_text", lora="LoRA on a Llama"),
    *_rows(
        "x-transformers",
        "zoo_text",
        x_decoder="decoder with rotary positions, loss in the model",
        x_encoder="encoder with ALiBi and padding masks",
    ),
    *_rows(
        "torch",
        "zoo_torch",
        encoder="`nn.TransformerEncoder`, padding masks",
        time_first="`nn.TransformerEncoder`, time first",
        sequences="`nn.Transformer`, embeddings in the step",
        lstm="LSTM, both directions",
    ),
    *_rows(
        "timm",
        "zoo_images",
        timm_resnet="ResNet, frozen batch normalisation",
        timm_batch_norm=_but(
            "ResNet, batch normalisation in training",
            dp="differs",
            pipeline="differs",
            note="each shard is normalised by itself",
        ),
        timm_vit="ViT",
        timm_convnext="ConvNeXt",
        timm_features="EfficientNet as a backbone, a list of feature maps",
    ),
    *_rows(
        "torchvision",
        "zoo_images",
        resnet="ResNet",
        densenet="DenseNet, memory-efficient",
        fcn="FCN, two outputs in a dict",
        retinanet=_but(
            "RetinaNet, lists of images and targets",
            pipeline="refused",
            note="images are padded to the largest of their micro-batch; cut what comes after that"
            ' (`module="net.head"`)',
        ),
        fcos=_but(
            "FCOS, lists of images and targets",
            dp="warned",
            pipeline="refused",
            note="its losses are divided by the anchors that match in the batch; in a pipeline,"
            ' cut a part without them (`module="net.head"`)',
        ),
    ),
    *_rows(
        "segmentation_models_pytorch",
        "zoo_images",
        unet=_but("U-Net, cross entropy", ddp="needs advice", note=_UNUSED),
        unet_dice=_but(
            "U-Net, Dice loss over the batch",
            dp="warned",
            ddp="needs advice",
            note="the loss is no mean over samples; " + _UNUSED,
        ),
    ),
    *_rows(
        "monai",
        "zoo_medical",
        unet="U-Net, residual units, in 3D",
        attention_unet="Attention U-Net",
        dyn_unet="DynUNet",
        segresnet="SegResNet",
        unetr=_but("UNETR", ddp="needs advice", note=_UNUSED),
    ),
    *_rows(
        "torch_geometric",
        "zoo_graphs",
        gcn="GCN, a batch of graphs",
        gat="GAT, a batch of graphs as output",
        gin_with_labels="GIN, `(graphs, labels)`",
        hetero="GraphSAGE on heterogeneous graphs",
        nodes=_but(
            "GCN, loss over nodes",
            dp="needs advice",
            pipeline="refused",
            note=_OWN + "shards weigh by nodes, `Shard(size=...)`; " + _NODES,
        ),
    ),
]
