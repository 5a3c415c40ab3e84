"""The run that needs no hub, no GPU and no patience."""

from __future__ import annotations

from hyperpelt_ds.config import (
    Config,
    DataConfig,
    EvalConfig,
    HypernetConfig,
    ModelConfig,
    ModulesConfig,
    TrainConfig,
    VisionConfig,
)


def demo() -> Config:
    """Several real text and vision tasks on a frozen Marian model, from `data_prep/demo.py`; what `make demo` trains.

    deepspeed --num_accelerators 2 launch/train.py --recipe demo --ds_config ds_configs/zero2_cpu.json
        --run_dir runs/demo

    Seven minutes on two CPU cores; 1,285,168 trainable of 18,677,040 parameters. Expected on the test splits: easy-VQA
    0.93, caption 0.98, topic 0.85, sentiment 0.75, rating 0.39, description F1 0.36. Generated adapters alone: prefixes
    beside them cost a point in docs/results.md, `modules.kinds=prefix,adapter` brings them back.
    """
    return Config(
        recipe="demo",
        model=ModelConfig(backbone="data/demo/backbone", dropout=0.0),
        modules=ModulesConfig(kinds=("adapter",), prefix_length=8, bottleneck=64),
        hypernet=HypernetConfig(embedding_size=64, hidden_size=128, hyper_size=16, hyper_scale=0.25),
        vision=VisionConfig(
            encoder="efficientnet_lite0",
            weights="data/demo/vision/efficientnet_lite0.pth",
            image_size=128,
            stage="head",
            cells=16,
            channels=1280,
        ),
        data=DataConfig(
            manifest="data/demo/manifest.json", temperature=2.0, max_source_length=48, max_target_length=32
        ),
        train=TrainConfig(
            steps=900,
            global_batch=32,
            micro_batch=4,
            learning_rate=2e-3,
            warmup_steps=60,
            log_every=20,
            save_every=300,
            eval_every=300,
        ),
        eval=EvalConfig(batch_size=64, samples_per_task=100),
    )
