"""The sections of a run's configuration: typed, frozen, each field explained where it stands.

Names are megatron-core's wherever it has one. Sources: ``P`` is the phi-1 paper (Gunasekar et al.,
"Textbooks Are All You Need", arXiv 2306.11644), ``HF`` is transformers' ``models/phi``, ``CFG`` the
training configurations of a later Microsoft SDK as seen in a third-party copy.

This module imports neither torch nor megatron, so that ``--dry-run`` and ``plan`` start at once.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from phi1_megatron.errors import RecipeError


class Section(BaseModel):
    """Base of every section: frozen, strict about types, and closed to unknown keys."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


class ModelConfig(Section):
    """The architecture. The defaults are phi-1's (P section 2.3, HF ``PhiConfig``)."""

    num_layers: int = Field(24, ge=1)
    """Transformer blocks."""
    hidden_size: int = Field(2048, ge=1)
    """Width of the residual stream."""
    num_attention_heads: int = Field(32, ge=1)
    """Attention heads; the head dimension is ``hidden_size / num_attention_heads``."""
    ffn_hidden_size: int = Field(8192, ge=1)
    """Inner width of the MLP."""
    vocab_size: int = Field(50295, ge=1)
    """Tokens the tokenizer knows (CodeGen's: 50,257 of GPT-2 and 38 whitespace runs)."""
    make_vocab_size_divisible_by: int = Field(1024, ge=1)
    """The embedding is padded to a multiple of this (1024 makes 50,295 into 51,200, as in HF)."""
    max_position_embeddings: int = Field(2048, ge=1)
    """The longest sequence the model is made for, in tokens."""
    rotary_percent: float = Field(0.5, gt=0.0, le=1.0)
    """Share of each head's dimensions that is rotated (HF ``partial_rotary_factor``)."""
    rotary_base: int = Field(10000, ge=1)
    """Base of the rotary frequencies (HF ``rope_theta``)."""
    layernorm_epsilon: float = Field(1e-5, gt=0.0)
    """Added to the variance in every LayerNorm (HF)."""
    attention_dropout: float = Field(0.1, ge=0.0, lt=1.0)
    """Dropout on attention probabilities while training (P: 0.1)."""
    hidden_dropout: float = Field(0.1, ge=0.0, lt=1.0)
    """Dropout on each branch before it joins the residual, while training (P: 0.1)."""
    embedding_dropout: float = Field(0.0, ge=0.0, lt=1.0)
    """Dropout on the embedded tokens while training (CFG: 0.0)."""
    init_method_std: float = Field(0.02, gt=0.0)
    """Standard deviation of every weight matrix at the start; no depth scaling (CFG)."""

    @property
    def head_dim(self) -> int:
        """Dimensions of one attention head (megatron-core's ``kv_channels``)."""
        return self.hidden_size // self.num_attention_heads

    @property
    def rotary_dim(self) -> int:
        """Dimensions of one head that are rotated."""
        return int(self.head_dim * self.rotary_percent)

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and of the output layer; the same in every layout."""
        multiple = self.make_vocab_size_divisible_by
        return -(-self.vocab_size // multiple) * multiple

    @model_validator(mode="after")
    def _heads_divide_the_width(self) -> ModelConfig:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} does not divide into {self.num_attention_heads} "
                f"attention heads ({self.hidden_size} / {self.num_attention_heads} = "
                f"{self.hidden_size / self.num_attention_heads:g})"
            )
        if self.rotary_dim % 2 or self.rotary_dim == 0:
            raise ValueError(
                f"rotary_percent {self.rotary_percent:g} of a {self.head_dim}-dimensional head is "
                f"{self.head_dim * self.rotary_percent:g} dimensions; rotation needs an even number"
            )
        return self


class ParallelConfig(Section):
    """The layout. Data-parallel size is derived: ranks / (tensor x pipeline x context)."""

    tensor_model_parallel_size: int = Field(1, ge=1)
    """Ranks that share every matrix."""
    pipeline_model_parallel_size: int = Field(1, ge=1)
    """Stages that share the layers."""
    virtual_pipeline_model_parallel_size: int | None = Field(None, ge=2)
    """Model chunks on each stage (interleaved schedule); needs a pipeline of at least 2."""
    context_parallel_size: int = Field(1, ge=1)
    """Ranks that share every sequence; needs TransformerEngine's attention on a GPU."""
    sequence_parallel: bool = False
    """Also split LayerNorm and dropout along the sequence; needs tensor parallelism."""
    use_distributed_optimizer: bool = True
    """Split optimizer state over the data-parallel ranks (ZeRO stage 1, as CFG)."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass still runs (GPU)."""
    overlap_param_gather: bool = False
    """Gather updated parameters while the next forward pass runs (GPU, distributed optimizer)."""

    @model_validator(mode="after")
    def _parts_that_need_each_other(self) -> ParallelConfig:
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise ValueError(
                "sequence_parallel splits over the tensor-parallel ranks, and "
                "tensor_model_parallel_size is 1; set it to 2 or more, or sequence_parallel = false"
            )
        if (
            self.virtual_pipeline_model_parallel_size is not None
            and self.pipeline_model_parallel_size == 1
        ):
            raise ValueError(
                f"virtual_pipeline_model_parallel_size = "
                f"{self.virtual_pipeline_model_parallel_size} needs pipeline stages to interleave, "
                "and pipeline_model_parallel_size is 1"
            )
        if self.overlap_param_gather and not (
            self.use_distributed_optimizer and self.overlap_grad_reduce
        ):
            raise ValueError(
                "overlap_param_gather needs use_distributed_optimizer = true and "
                "overlap_grad_reduce = true"
            )
        return self


class BlendPart(Section):
    """One data set of the blend."""

    prefix: str = Field(min_length=1)
    """Path of the ``.bin`` and ``.idx`` files without their endings."""
    weight: float = Field(1.0, gt=0.0)
    """Share of the blend, relative to the other parts' weights."""


def _parts_from_prefixes(value: Any) -> Any:
    """Let ``["a", "b"]`` stand for ``[{prefix = "a"}, {prefix = "b"}]``."""
    if isinstance(value, list | tuple):
        return [{"prefix": part} if isinstance(part, str) else part for part in value]
    return value


class DataConfig(Section):
    """What is read. Documents are joined with the end-of-document token and cut at ``seq_length``
    (P section 2.3); attention crosses document borders, as in the original run."""

    blend: list[BlendPart] = Field(min_length=1)
    """Training data: a list of prefixes, or of ``{prefix, weight}``."""
    validation_blend: list[BlendPart] | None = None
    """Validation data of its own; without it, ``split`` cuts it from ``blend``."""
    split: list[float] = Field([99.0, 1.0, 0.0], min_length=3, max_length=3)
    """Shares of each data set for training, validation and test, in document order."""
    seq_length: int = Field(2048, ge=2)
    """Tokens a sample (P: 2048)."""
    tokenizer: str | None = None
    """Folder of the tokenizer the data was made with; exported with the model."""
    num_workers: int = Field(0, ge=0)
    """Loader processes on each rank; 0 reads in the training process."""
    index_cache: str | None = None
    """Folder for the sample indices; by default ``index-cache/`` in the run folder."""

    _blend = field_validator("blend", "validation_blend", mode="before")(_parts_from_prefixes)

    @field_validator("split")
    @classmethod
    def _split_has_training_data(cls, value: list[float]) -> list[float]:
        if min(value) < 0 or value[0] <= 0:
            raise ValueError(
                f"split {value} must hold three shares of at least 0, the first (training) above 0"
            )
        return value


class OptimizerConfig(Section):
    """AdamW (P section 2.3; betas, eps and clip from CFG)."""

    lr: float = Field(1e-3, gt=0.0)
    """Highest learning rate (P: 1e-3 to pretrain, 1e-4 to finetune)."""
    weight_decay: float = Field(0.1, ge=0.0)
    """Decoupled weight decay (P: 0.1 to pretrain, 0.01 to finetune)."""
    decay_norm_and_bias: bool = True
    """Decay LayerNorm weights and biases too (CFG: one parameter group holds them all)."""
    adam_beta1: float = Field(0.9, ge=0.0, lt=1.0)
    """Decay of the first moment (CFG)."""
    adam_beta2: float = Field(0.95, ge=0.0, lt=1.0)
    """Decay of the second moment (CFG)."""
    adam_eps: float = Field(1e-7, gt=0.0)
    """Added to the root of the second moment (CFG)."""
    clip_grad: float = Field(1.0, ge=0.0)
    """Largest norm of the whole gradient; 0 does not clip (CFG)."""


class SchedulerConfig(Section):
    """Learning rate over steps: linear warm-up, then decay (P: linear)."""

    warmup_steps: int = Field(750, ge=0)
    """Steps from ``init_lr`` up to ``optimizer.lr`` (P: 750 to pretrain, 50 to finetune)."""
    decay_steps: int | None = Field(None, ge=1)
    """Step at which the decay ends; by default ``training.train_steps``."""
    decay_style: Literal["linear", "cosine", "constant"] = "linear"
    """Shape of the decay (P: linear)."""
    init_lr: float = Field(0.0, ge=0.0)
    """Learning rate before the first step."""
    min_lr: float = Field(0.0, ge=0.0)
    """Learning rate at and after ``decay_steps``."""


class TrainingConfig(Section):
    """Batches, steps, precision and the machine they run on."""

    train_steps: int = Field(ge=1)
    """Optimizer steps of the whole run."""
    global_batch_size: int = Field(ge=1)
    """Samples a step, over all ranks (P: 1024 to pretrain, 256 to finetune)."""
    micro_batch_size: int = Field(ge=1)
    """Samples in one forward pass on one data-parallel rank; the rest is accumulated."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp16"
    """Type of weights and activations; the optimizer's copy is fp32 (P: fp16)."""
    initial_loss_scale: float = Field(4096.0, gt=0.0)
    """First loss scale under fp16 (CFG: 2**12)."""
    min_loss_scale: float = Field(1.0, gt=0.0)
    """The loss scale never falls below this."""
    loss_scale_window: int = Field(1000, ge=1)
    """Steps without overflow after which the loss scale doubles."""
    hysteresis: int = Field(2, ge=1)
    """Overflows within a window after which the loss scale halves."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; ``auto`` takes CUDA where there is one."""
    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"
    """Modules of the layer; ``auto`` takes TransformerEngine's where it and a GPU are there."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations recomputed in the backward pass: none, core attention, or whole layers."""
    seed: int = Field(1234, ge=0)
    """One seed for weights, data order and dropout; the weights do not depend on the layout."""
    eval_interval: int = Field(1000, ge=0)
    """Steps between validations; 0 never validates."""
    eval_steps: int = Field(10, ge=1)
    """Global batches in one validation."""
    cpu_threads: int = Field(1, ge=1)
    """Threads of each rank on the CPU; ranks x threads should not pass the cores."""


class CheckpointConfig(Section):
    """What is kept of a run (P: a save every 1,000 steps while finetuning)."""

    save_interval: int = Field(1000, ge=0)
    """Steps between checkpoints; 0 saves at the end alone."""
    keep_last: int = Field(3, ge=1)
    """Newest checkpoints kept in the run folder; older ones are removed after a save."""
    initialize_from: str | None = None
    """Checkpoint or run folder whose weights a new run starts from (finetuning)."""


class LoggingConfig(Section):
    """What a run says of itself besides ``metrics.jsonl``, which is always written."""

    log_interval: int = Field(10, ge=1)
    """Steps between lines on the terminal; ``metrics.jsonl`` has every step."""
    tensorboard: bool = True
    """Write ``tensorboard/`` in the run folder."""


class RunConfig(Section):
    """A whole run. ``phi1_megatron.config.load`` makes one from a recipe and overrides."""

    model: ModelConfig = ModelConfig()
    """The architecture."""
    parallel: ParallelConfig = ParallelConfig()
    """The layout."""
    data: DataConfig
    """What is read."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """AdamW."""
    scheduler: SchedulerConfig = SchedulerConfig()
    """The learning rate over steps."""
    training: TrainingConfig
    """Batches, steps, precision."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """What is kept."""
    logging: LoggingConfig = LoggingConfig()
    """What is shown."""

    @model_validator(mode="after")
    def _sections_fit(self) -> RunConfig:
        for check in (
            _sequence_fits_positions,
            _warmup_ends_in_time,
            _rates_are_ordered,
            _validation_has_data,
        ):
            check(self)
        return self


def _sequence_fits_positions(config: RunConfig) -> None:
    if config.data.seq_length > config.model.max_position_embeddings:
        raise RecipeError(
            f"data.seq_length {config.data.seq_length} is longer than "
            f"model.max_position_embeddings {config.model.max_position_embeddings}; "
            "shorten the one or raise the other"
        )


def _warmup_ends_in_time(config: RunConfig) -> None:
    decay_steps = config.scheduler.decay_steps or config.training.train_steps
    if config.scheduler.warmup_steps >= decay_steps:
        raise RecipeError(
            f"scheduler.warmup_steps {config.scheduler.warmup_steps} must be below the "
            f"{decay_steps} steps of the decay (scheduler.decay_steps, else training.train_steps)"
        )


def _rates_are_ordered(config: RunConfig) -> None:
    for name in ("init_lr", "min_lr"):
        rate = getattr(config.scheduler, name)
        if rate > config.optimizer.lr:
            raise RecipeError(
                f"scheduler.{name} {rate:g} is above optimizer.lr {config.optimizer.lr:g}"
            )


def _validation_has_data(config: RunConfig) -> None:
    data = config.data
    if config.training.eval_interval and data.validation_blend is None and data.split[1] == 0:
        raise RecipeError(
            f"training.eval_interval {config.training.eval_interval} asks for validation, but "
            f"data.split {data.split} keeps nothing for it; give it a share, name a "
            "data.validation_blend, or set training.eval_interval = 0"
        )
