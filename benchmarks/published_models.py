"""Configurations of the models that recipes name, from the config.json of each. They need no hub and no weights."""

from transformers import (
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)


SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")


def _config(kind: type, sizes: tuple[int, ...], vocab_size: int, **more) -> PreTrainedConfig:
    architecture = kind.__name__.removesuffix("Config") + "ForCausalLM"
    if more.get("num_labels") == 1:
        architecture = kind.__name__.removesuffix("Config") + "ForSequenceClassification"
    values = dict(zip(SIZES, sizes, strict=True)) | more
    return kind(**values, vocab_size=vocab_size, architectures=[architecture])


POLICIES = {
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": _config(
        LlamaConfig, (2048, 8192, 24, 32, 32), 49152, tie_word_embeddings=True
    ),
    "HuggingFaceTB/SmolLM3-3B": _config(SmolLM3Config, (2048, 11008, 36, 16, 4), 128256, tie_word_embeddings=True),
    "Qwen/Qwen2.5-0.5B-Instruct": _config(Qwen2Config, (896, 4864, 24, 14, 2), 151936, tie_word_embeddings=True),
    "Qwen/Qwen2.5-1.5B-Instruct": _config(Qwen2Config, (1536, 8960, 28, 12, 2), 151936, tie_word_embeddings=True),
    "Qwen/Qwen2.5-7B-Instruct": _config(Qwen2Config, (3584, 18944, 28, 28, 4), 152064),
    "Qwen/Qwen3-4B-Instruct-2507": _config(
        Qwen3Config, (2560, 9728, 36, 32, 8), 151936, head_dim=128, tie_word_embeddings=True
    ),
    "Qwen/Qwen3-4B-Thinking-2507": _config(
        Qwen3Config, (2560, 9728, 36, 32, 8), 151936, head_dim=128, tie_word_embeddings=True
    ),
    "Qwen/Qwen3-8B": _config(Qwen3Config, (4096, 12288, 36, 32, 8), 151936, head_dim=128),
    "google/gemma-2-9b-it": _config(
        Gemma2Config, (3584, 14336, 42, 16, 8), 256000, head_dim=256, query_pre_attn_scalar=256,
        tie_word_embeddings=True,
    ),
    "meta-llama/Llama-3.1-8B-Instruct": _config(LlamaConfig, (4096, 14336, 32, 32, 8), 128256),
    "meta-llama/Meta-Llama-3-8B-Instruct": _config(LlamaConfig, (4096, 14336, 32, 32, 8), 128256),
    "mistralai/Mistral-7B-Instruct-v0.2": _config(MistralConfig, (4096, 14336, 32, 32, 8), 32000),
}  # fmt: skip

# Of the Skywork models: those of Qwen3 and Llama-3.1, on which they were trained
REWARD_MODELS = {
    "Skywork/Skywork-Reward-V2-Qwen3-0.6B": _config(
        Qwen3Config, (1024, 3072, 28, 16, 8), 151936, head_dim=128, num_labels=1
    ),
    "Skywork/Skywork-Reward-V2-Qwen3-1.7B": _config(
        Qwen3Config, (2048, 6144, 28, 16, 8), 151936, head_dim=128, num_labels=1
    ),
    "Skywork/Skywork-Reward-V2-Qwen3-4B": _config(
        Qwen3Config, (2560, 9728, 36, 32, 8), 151936, head_dim=128, num_labels=1
    ),
    "Skywork/Skywork-Reward-V2-Llama-3.1-8B": _config(LlamaConfig, (4096, 14336, 32, 32, 8), 128256, num_labels=1),
}  # fmt: skip
