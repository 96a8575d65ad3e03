"""A tiny policy that calls tools: a bigram model with Qwen3's chat template, whose every choice is sampled."""

import math
import re
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from trl.chat_template_utils import qwen3_chat_template


LETTERS, DIGITS = "abcd", "0123456789"
END, PAD = "<|im_end|>", "<|endoftext|>"
OPEN, CLOSE = '<tool_call>\n{"name": "double", "arguments": {"x": ', "}}\n</tool_call>"  # one token each
PIECES = "|".join([re.escape(OPEN), re.escape(CLOSE), "[A-Za-z_]+", "[0-9]", r"[^A-Za-z_0-9]"])
PROMPTS = [[{"role": "user", "content": text}] for text in ("ab", "cd", "ba", "dc")]


def double(x: int) -> str:
    """
    Double a number.

    Args:
        x: The number.

    Returns:
        Its double.
    """
    return DIGITS[2 * x % 10]


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = [*LETTERS, *DIGITS, OPEN, CLOSE, "user", "assistant", "system", "tool_response", *'\n<>/{}":, ']
    tokens = ["<unk>", PAD, END, "<|im_start|>", *words]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(PIECES), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token=PAD, eos_token=END,
        additional_special_tokens=["<|im_start|>"], chat_template=qwen3_chat_template,
    )  # fmt: skip


def make_policy(tokenizer: Any) -> Qwen2ForCausalLM:
    """A turn is a call of `double` with any digit, or any letter; each kind has probability 1/2."""
    size = len(tokenizer)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=size, hidden_size=size, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, head_dim=16, tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    ids = tokenizer.convert_tokens_to_ids
    logits = torch.full((size, size), -30.0)  # of the next token (row) after this one (column)
    logits[ids(list(LETTERS)), ids("\n")] = 0.0
    logits[ids(OPEN), ids("\n")] = math.log(len(LETTERS))
    logits[ids(list(DIGITS)), ids(OPEN)] = 0.0
    logits[ids(CLOSE), ids(list(DIGITS))] = 0.0
    logits[ids(END), ids([CLOSE, *LETTERS])] = 0.0
    with torch.no_grad():
        layer = model.model.layers[0]
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        model.lm_head.weight.copy_(logits / size**0.5)  # the norm before it makes sqrt(size) of a 1 among zeros
    return model
