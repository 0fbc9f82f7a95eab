"""The rows of the zoo, in the order of the table in docs/models.md."""

from zoo import Row

_OWN = "the loss has a denominator of its own: "
_UNUSED = "layers that are left out have no gradient: `DDPStrategy(find_unused_parameters=True)`"

ROWS = [
    Row("transformers", "BERT, padding masks, loss in the step", "zoo_text.bert_loss_in_step"),
    Row(
        "transformers", "BERT, loss in the model, all hidden states", "zoo_text.bert_hidden_states"
    ),
    Row("transformers", "GPT-2, caches in the output", "zoo_text.gpt2"),
    Row(
        "transformers",
        "GPT-2, padding as label -100",
        "zoo_text.gpt2_padded",
        dp="needs advice",
        note=_OWN + "shards weigh by tokens, `Shard(size=...)`",
    ),
    Row("transformers", "T5, caches of encoder and decoder in the output", "zoo_text.t5"),
    Row("transformers", "ViT", "zoo_text.vit"),
    Row("transformers", "Llama, tied weights, activation checkpointing", "zoo_text.llama"),
    Row("transformers", "Llama, `generate` in evaluation", "zoo_text.llama_generates"),
    Row(
        "transformers",
        "CLIP, contrastive loss",
        "zoo_text.clip",
        dp="warned",
        note="samples are compared with those of their shard only",
    ),
    Row("peft", "LoRA on a Llama", "zoo_text.lora"),
    Row("x-transformers", "decoder with rotary positions, loss in the model", "zoo_text.x_decoder"),
    Row("x-transformers", "encoder with ALiBi and padding masks", "zoo_text.x_encoder"),
    Row("timm", "ResNet, frozen batch normalisation", "zoo_images.timm_resnet"),
    Row(
        "timm",
        "ResNet, batch normalisation in training",
        "zoo_images.timm_batch_norm",
        dp="differs",
        note="each shard is normalised by itself",
    ),
    Row("timm", "ViT", "zoo_images.timm_vit"),
    Row("timm", "ConvNeXt", "zoo_images.timm_convnext"),
    Row("timm", "EfficientNet as a backbone, a list of feature maps", "zoo_images.timm_features"),
    Row("torchvision", "ResNet", "zoo_images.resnet"),
    Row("torchvision", "DenseNet, memory-efficient", "zoo_images.densenet"),
    Row("torchvision", "FCN, two outputs in a dict", "zoo_images.fcn"),
    Row("torchvision", "RetinaNet, lists of images and targets", "zoo_images.retinanet"),
    Row(
        "torchvision",
        "FCOS, lists of images and targets",
        "zoo_images.fcos",
        dp="warned",
        note="its losses are divided by the anchors that match in the batch",
    ),
    Row(
        "segmentation_models_pytorch",
        "U-Net, cross entropy",
        "zoo_images.unet",
        ddp="needs advice",
        note=_UNUSED,
    ),
    Row(
        "segmentation_models_pytorch",
        "U-Net, Dice loss over the batch",
        "zoo_images.unet_dice",
        dp="warned",
        ddp="needs advice",
        note="the loss is no mean over samples; " + _UNUSED,
    ),
    Row("torch_geometric", "GCN, a batch of graphs", "zoo_graphs.gcn"),
    Row("torch_geometric", "GAT, a batch of graphs as output", "zoo_graphs.gat"),
    Row("torch_geometric", "GIN, `(graphs, labels)`", "zoo_graphs.gin_with_labels"),
    Row("torch_geometric", "GraphSAGE on heterogeneous graphs", "zoo_graphs.hetero"),
    Row(
        "torch_geometric",
        "GCN, loss over nodes",
        "zoo_graphs.nodes",
        dp="needs advice",
        note=_OWN + "shards weigh by nodes, `Shard(size=...)`",
    ),
]
