"""The method and its baselines on vision-and-language tasks, trained together."""

from __future__ import annotations

from dataclasses import replace

from hyperpelt_ds.config import Config, DataConfig, EvalConfig, VisionConfig
from hyperpelt_ds.recipes.glue import glue_t5_base


def vl_t5_base() -> Config:
    """HyperPELT on VQA v2, GQA and COCO captions: the vision-and-language multi-task table's main row.

    deepspeed launch/train.py --recipe vl_t5_base --ds_config ds_configs/zero2.json --run_dir runs/vl_t5_base

    7,920,080 trainable parameters: 3.432 % of all that the model then has, which is how such tables count. The image
    enters by its generated weights alone. Baselines would be blind that way: vision.tokens=true gives them, and in
    full fine-tuning the model, 49 tokens after the text, made from the image's cells by a trained linear map and norm.

        full fine-tuning   model.train_backbone=true modules.kinds= hypernet.conditions= vision.tokens=true
        adapters           hypernet.conditions= hypernet.parameters=shared vision.tokens=true modules.kinds=adapter
                           modules.adapter_placement=sequential modules.adapter_scale=fixed modules.bottleneck=192
                           modules.adapter_blocks=encoder_self,encoder_ffn,decoder_self,decoder_cross,decoder_ffn
        prefix-tuning      hypernet.conditions= hypernet.parameters=shared vision.tokens=true modules.kinds=prefix
                           hypernet.prefix_mlp=512
        MAM adapter        hypernet.conditions= hypernet.parameters=shared vision.tokens=true hypernet.prefix_mlp=800
                           modules.prefix_length=16 modules.adapter_scale=fixed modules.adapter_scale_value=2.0
        LoRA               hypernet.conditions= hypernet.parameters=shared vision.tokens=true modules.kinds=lora
        TaskEmbed          hypernet.conditions=task vision.tokens=true
        VisualEmbed        hypernet.conditions=image

    (the last two as we read their names). hypernet.parameters=task gives each task a set of its own. HyperPELT with
    both ways in is vision.tokens=true alone.

    The paper's encoder is most likely CLIP's RN101 at 7 x 7 cells; transformers has only CLIP's ViTs, of which B/32 has
    as many cells. vision.encoder=resnet101 vision.weights=default vision.channels=2048 is RN101's shape with ImageNet's
    weights. Features must have been stored by the same encoder. Steps, batch and rate are our choice; beams, warm-up
    and no smoothing are VL-Adapter's.

    Expected: the paper's table could not be read; of its transfer table, 35.86 on OK-VQA's validation and 65.67 on
    SNLI-VE's test-P are known. Not reproduced here.
    """
    text = glue_t5_base()
    return replace(
        text,
        recipe="vl_t5_base",
        hypernet=replace(text.hypernet, visual_embeddings="shared"),
        vision=VisionConfig(
            encoder="clip", weights="openai/clip-vit-base-patch32", image_size=224, cells=49, channels=768
        ),
        data=DataConfig(
            manifest="data/vl/manifest.json",
            tasks=("vqa_v2", "gqa", "coco_caption"),
            max_source_length=32,
            max_target_length=100,
        ),
        train=replace(text.train, steps=131_072, global_batch=256, warmup_steps=13_107, label_smoothing=0.0),
        eval=EvalConfig(batch_size=128, samples_per_task=2000, num_beams=5),
    )
