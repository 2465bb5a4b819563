"""The shapes of the models that Microsoft published."""

from phi1_megatron.config.schema import ModelConfig

PHI_1 = ModelConfig()
PHI_1_SMALL = ModelConfig(
    num_layers=20, hidden_size=1024, num_attention_heads=16, ffn_hidden_size=4096
)
PHI_2 = ModelConfig(
    num_layers=32,
    hidden_size=2560,
    num_attention_heads=32,
    ffn_hidden_size=10240,
    rotary_percent=0.4,
)
