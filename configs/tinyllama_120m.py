"""A Llama of 124.7 M parameters with TinyLlama's tokenizer and data: a run of hours on one GPU.

    python main.py prepare --config=configs/tinyllama_120m.py --workdir=runs/120m \
        --config.data.sources.slimpajama.path=DIR --config.data.sources.starcoder.path=DIR \
        --config.data.tokenizer=tokenizer.model
    python main.py train   --config=configs/tinyllama_120m.py --workdir=runs/120m

12 layers of width 768, 12 query and 4 key-value heads; 2.6 B tokens, about twenty per parameter. It has not been
trained yet. Expect a loss between 3.0 and 3.4 at the end: Chinchilla's law (Hoffmann et al., 2022) gives 3.4 for
text, and code is easier. `bench/gpu.sh learn` trains its first steps in bfloat16 and in float32.
"""

from tinyllama_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, SourceConfig, TrainConfig


def get_config(arg: str = '') -> Config:
    """Returns the small run; it has no variants."""
    if arg:
        raise ValueError(f'configs/tinyllama_120m.py has no variant, got {arg!r}')
    return Config(
        model=ModelConfig(
            num_layers=12,
            embed_dim=768,
            num_heads=12,
            num_kv_heads=4,
            head_dim=64,
            hidden_dim=2_048,
            scan_layers=False,  # faster on one GPU
        ),
        data=DataConfig(
            sources={
                'slimpajama': SourceConfig(weight=0.693584, format='jsonl'),
                'starcoder': SourceConfig(weight=0.306416, format='parquet'),
            },
            max_bad_share=0.001,
        ),
        optimizer=OptimizerConfig(peak_learning_rate=1e-3, final_learning_rate=1e-4, warmup_steps=200),
        # 256 sequences of 2,048 tokens: half a million tokens a step.
        train=TrainConfig(
            num_steps=5_000,
            global_batch_size=256,
            micro_batch_size=16,
            eval_every_steps=500,
            checkpoint_every_steps=250,
        ),
    )
