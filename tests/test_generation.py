"""Sampling with transformers: each prompt is computed once for its group, whatever the model keeps of it."""

from contextlib import nullcontext

import peft
import pytest
import torch
import transformers
from helpers import TINY
from transformers import AutoModelForCausalLM

from trl_sppo.evaluation.policies import Sampling, sample_ids
from trl_sppo.models.generation import _can_share, shared_prompts


GROUP = 4
SMALL = {**TINY, "num_hidden_layers": 2}
FAMILIES = {
    "full attention": transformers.Qwen2Config(**SMALL),
    "sliding windows": transformers.Gemma2Config(**SMALL, head_dim=8, sliding_window=4),
    "absolute positions": transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2),
    "no positions": transformers.BloomConfig(vocab_size=32, hidden_size=16, n_layer=2, n_head=2),
    "a mixture": transformers.MixtralConfig(**SMALL, num_local_experts=4),
    "convolutions": transformers.Lfm2Config(**SMALL, layer_types=["conv", "full_attention"]),
    "linear attention": transformers.Qwen3NextConfig(
        **SMALL,
        head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        layer_types=["linear_attention", "full_attention"],
    ),
    "a state space": transformers.Mamba2Config(
        vocab_size=32, hidden_size=16, num_heads=4, head_dim=8, state_size=4, num_hidden_layers=2, n_groups=2
    ),
}


def make(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def prompts(lengths=(2, 7, 5), group=GROUP):
    """Of the given lengths, padded on the left, each `group` times."""
    generator, width = torch.Generator().manual_seed(1), max(lengths)
    ids, mask = torch.zeros(len(lengths), width, dtype=torch.long), torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, width - length :] = torch.randint(3, 32, (length,), generator=generator)
        mask[row, width - length :] = 1
    return {"input_ids": ids.repeat_interleave(group, 0), "attention_mask": mask.repeat_interleave(group, 0)}


def sample(model, inputs, share=True, **options):
    """Sampled tokens, logits of each step, and how many rows the first pass computed."""
    rows: list[int] = []
    embedding = model.get_input_embeddings().register_forward_hook(lambda *args: rows.append(len(args[-1])))
    torch.manual_seed(3)
    with shared_prompts(model) if share else nullcontext():
        output = model.generate(
            **inputs, max_new_tokens=6, do_sample=True, pad_token_id=0, eos_token_id=1, output_logits=True,
            return_dict_in_generate=True, **options,
        )  # fmt: skip
    embedding.remove()
    return output.sequences, torch.stack(output.logits), rows[0]


def assert_shared(model, inputs, rows, **options):
    """The first pass computes so many rows, and tokens and logits stay the same. Returns the tokens."""
    tokens, logits, _ = sample(model, inputs, share=False, **options)
    shared_tokens, shared_logits, shared_rows = sample(model, inputs, **options)
    assert shared_rows == rows
    torch.testing.assert_close(shared_logits, logits, rtol=0, atol=2e-6)
    assert shared_tokens.tolist() == tokens.tolist()
    return tokens.tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_are_computed_once_and_completions_stay_the_same(family):
    model, inputs = make(FAMILIES[family]), prompts()
    tokens = assert_shared(model, inputs, rows=3)
    assert len({tuple(row) for row in tokens}) > 3  # the completions of a prompt differ


def test_prompts_without_padding():
    """`generate` drops their mask."""
    model, inputs = make(FAMILIES["full attention"]), prompts(lengths=(5, 5))
    assert_shared(model, inputs, rows=2)


def test_groups_of_different_sizes():
    """A process, or the last batch of an evaluation, may have a part of a group."""
    model, inputs = make(FAMILIES["full attention"]), prompts()
    inputs = {name: value[2:11] for name, value in inputs.items()}
    assert_shared(model, inputs, rows=3)


def test_prompts_that_are_read_in_parts():
    model, inputs = make(FAMILIES["full attention"]), prompts()
    assert_shared(model, inputs, rows=3, prefill_chunk_size=3)


def test_padding_is_not_a_token_of_a_prompt():
    """Of two prompts with the same ids, one may have a padding token that it attends to."""
    model, inputs = make(FAMILIES["full attention"]), prompts(lengths=(5,), group=2)
    inputs["input_ids"][:, 0] = 0
    inputs["attention_mask"][1, 0] = 0
    _, logits, _ = sample(model, inputs, share=False)
    _, shared_logits, rows = sample(model, inputs)
    assert rows == 2
    assert torch.equal(shared_logits, logits)


def test_adapters():
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model, inputs = peft.get_peft_model(make(FAMILIES["full attention"]), config), prompts()
    assert_shared(model, inputs, rows=3)


ALORA = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], alora_invocation_tokens=[3])


@pytest.mark.parametrize("lengths", [(2, 7, 5), (5, 5, 5)], ids=["padded", "of one length"])
@pytest.mark.parametrize(
    ("adapter", "options"),
    [
        (None, {"cache_implementation": "static"}),
        (None, {"use_cache": False}),
        (peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), {}),
        (peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), {}),
        (ALORA, {}),
    ],
)
def test_other_forms_are_computed_as_they_are(adapter, options, lengths):
    model, inputs = make(FAMILIES["full attention"]), prompts(lengths)
    if adapter is not None:
        model = peft.get_peft_model(model, adapter)
    _, logits, rows = sample(model, inputs, share=False, **options)
    _, shared_logits, shared_rows = sample(model, inputs, **options)
    assert rows == shared_rows == 12
    assert torch.equal(shared_logits, logits)


def test_caches_on_the_way_to_the_cpu_are_not_copied():
    """`cache_implementation="offloaded"` needs a GPU, and moves the first layers while the last are computed."""
    model, cache = make(FAMILIES["full attention"]), transformers.DynamicCache()
    inputs = {**prompts(), "past_key_values": cache}
    assert _can_share(model, inputs)
    cache.offloading = True
    assert not _can_share(model, inputs)


KEEPS_ROWS = {
    "state outside of the cache": (
        transformers.RecurrentGemmaForCausalLM,
        transformers.RecurrentGemmaConfig(**SMALL, lru_width=16, block_types=["recurrent", "attention"]),
    ),
    "images": (
        transformers.Gemma3ForConditionalGeneration,
        transformers.Gemma3Config(
            text_config={**SMALL, "head_dim": 8},
            vision_config={
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
            },
        ),
    ),
}


@pytest.mark.parametrize("kind", KEEPS_ROWS)
def test_models_that_keep_something_of_each_row(kind):
    cls, config = KEEPS_ROWS[kind]
    torch.manual_seed(0)
    model = cls(config).eval()
    _, logits, rows = sample(model, prompts(), share=False)
    _, shared_logits, shared_rows = sample(model, prompts())
    assert rows == shared_rows == 12
    assert torch.equal(shared_logits, logits)


def test_own_code_is_computed_as_it_is(monkeypatch):
    model = make(FAMILIES["full attention"])
    monkeypatch.setattr(type(model), "_auto_class", "AutoModelForCausalLM")
    assert sample(model, prompts())[2] == 12


def test_nothing_is_left_on_the_model():
    model = make(FAMILIES["full attention"])
    with pytest.raises(KeyError), shared_prompts(model):
        raise KeyError
    sample(model, prompts())
    assert not model._forward_hooks and not model._forward_pre_hooks
    _, _, rows = sample(model, prompts(), share=False)
    assert rows == 12


def first_passes(model):
    """Rows of each pass that begins with several columns."""
    rows: list[int] = []
    embedding = model.get_input_embeddings()
    embedding.register_forward_hook(lambda *args: rows.append(len(args[-1])) if args[-1].size(1) > 1 else None)
    return rows


@pytest.mark.parametrize("chunk", [None, 2])
def test_the_trainer_computes_each_prompt_once(make_trainer, chunk):
    """For its four completions. Of a prompt that is read in parts, only the first part is computed once."""
    kwargs = None if chunk is None else {"prefill_chunk_size": chunk}
    trainer = make_trainer(generation_kwargs=kwargs)
    ids, images, fields = trainer._tokenize_prompts([prompt for prompt in ["abc", "fghi", "cd"] for _ in range(4)])
    rows = first_passes(trainer.model)
    completions, _ = trainer._generate_single_turn(ids, images, fields, 4)
    assert rows == ([3] if chunk is None else [3, 12]) and len(completions) == 12


def test_policies_compute_each_prompt_once(tiny_model, tiny_tokenizer):
    rows = first_passes(tiny_model)
    sampling = Sampling(num_generations=3, max_completion_length=4)
    found = sample_ids(tiny_model, tiny_tokenizer, [[3, 4, 5], [6, 7]], sampling)
    assert rows == [2] and [len(group) for group in found] == [3, 3]
