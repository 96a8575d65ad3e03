"""Micro-batches of similar length: which rows, in how many, and that the optimizer step stays what it was."""

import copy
import itertools
import random
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from helpers import COMPLETIONS, TINY
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from trl import GRPOTrainer
from trl.trainer.utils import add_fused_lm_head

from trl_sppo.rollouts.micro_batches import cut, cut_by_length, deal_anew, log_probs, trim


# ---- Where to cut


def ways(lengths, number, limit):
    """Columns of each way to cut into `number` micro-batches, by trying all."""
    for inner in itertools.combinations(range(1, len(lengths)), number - 1):
        parts = [lengths[a:b] for a, b in itertools.pairwise([0, *inner, len(lengths)])]
        if all(len(part) == 1 or len(part) * part[0] <= limit for part in parts):
            yield sum(len(part) * part[0] for part in parts)


@pytest.mark.parametrize("seed", range(40))
def test_as_few_micro_batches_as_keep_padding_low(seed):
    rng = random.Random(seed)
    lengths = sorted((rng.randint(1, 40) for _ in range(rng.randint(1, 9))), reverse=True)
    most, batch_size = rng.randint(3, 6), rng.randint(3, 6)
    found = None
    for full in (0.45, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0):
        for number in range(1, min(most, len(lengths)) + 1):
            columns = min(ways(lengths, number, full * batch_size * lengths[0]), default=None)
            found = (number, columns) if columns else found
            if columns and columns <= 1.1 * sum(lengths):
                break
        if found:
            break
    sizes = cut(lengths, batch_size, most)
    assert sum(sizes) == len(lengths) and min(sizes) > 0
    starts = itertools.accumulate([0, *sizes[:-1]])
    columns = sum(size * lengths[start] for start, size in zip(starts, sizes, strict=True))
    assert (len(sizes), columns) == found


def test_equal_lengths_take_full_micro_batches():
    """Where less than half of `per_device_train_batch_size` rows do not suffice: as many as it says, and no more."""
    assert cut([10] * 32, batch_size=8, most=4) == [8] * 4
    assert cut([10] * 32, batch_size=8, most=11) == [2, *[3] * 10]
    assert sorted(cut([10] * 32, batch_size=8, most=8)) == [4] * 8
    assert cut([10] * 3, batch_size=8, most=8) == [3]
    assert cut([10] * 3, batch_size=8, most=8, least=2) in ([1, 2], [2, 1])
    assert cut([10] * 3, batch_size=8, most=8, least=5) == [1] * 3
    assert cut([10] * 3, batch_size=1, most=8) == [1] * 3
    assert cut([], batch_size=1, most=8) == []


# ---- Slices


def slices_of(lengths, kept, per_slice):
    """Slices as TRL makes them: prompts padded on the left and completions on the right, to the longest of all."""
    widths = [max(each) for each in zip(*lengths, strict=True)]
    columns = [torch.arange(width) for width in widths]
    prompts, completions = (torch.tensor(each).unsqueeze(1) for each in zip(*lengths, strict=True))
    number = torch.arange(len(lengths)).unsqueeze(1)
    batch = {
        "prompt_mask": (columns[0] >= widths[0] - prompts).long(),
        "completion_mask": (columns[1] < completions).long(),
        "kept": torch.tensor(kept), "win_rates": number[:, 0].float(),
    }  # fmt: skip
    batch |= {f"{part}_ids": (100 + number) * batch[f"{part}_mask"] for part in ("prompt", "completion")}
    batch |= {"old_per_token_logps": -number * batch["completion_mask"].float(), "ratio": number.float()}
    return [
        {**{name: value[i : i + per_slice] for name, value in batch.items()}, "num_items_in_batch": torch.tensor(7)}
        for i in range(0, len(lengths), per_slice)
    ]


def processes(*answers, kind="NO"):
    """An accelerator of the first of several processes, of which the others answer with these numbers."""
    return SimpleNamespace(
        distributed_type=DistributedType[kind], device=torch.device("cpu"),
        gather=lambda own: torch.cat([own, *(torch.tensor([answer]) for answer in answers)]),
    )  # fmt: skip


LENGTHS = [(3, 9), (5, 1), (2, 2), (3, 8), (1, 1), (4, 8), (2, 1), (6, 2)]


def test_each_kept_row_is_used_once_and_whole():
    kept = [True, True, False, True, True, True, False, True]
    old = slices_of(LENGTHS, kept, per_slice=2)
    new = cut_by_length(old, per_step=4, batch_size=2, accelerator=processes())
    assert len(new) == 4 and [int(each["num_kept"]) for each in new] == [6] * 4
    assert [round(51 * each["share"].item()) for each in new] == [24, 11, 14, 2]
    # Of 12, 12, 11, 8, 6 and 2 tokens. With one row of 12 in each, four micro-batches would not suffice
    assert [each["win_rates"].tolist() for each in new] == [[0, 5], [3], [7, 1], [4]]
    for each in new:
        for i, row in enumerate(int(rate) for rate in each["win_rates"]):
            prompt, completion = LENGTHS[row]
            assert each["prompt_ids"][i].tolist()[-prompt:] == [100 + row] * prompt
            assert each["completion_ids"][i].tolist()[:completion] == [100 + row] * completion
            assert each["prompt_mask"][i].sum() == prompt and each["completion_mask"][i].sum() == completion
            assert each["old_per_token_logps"][i].sum() == -row * completion and each["ratio"][i] == row
        if len(each["kept"]):
            assert each["prompt_ids"].size(1) == each["prompt_mask"].sum(dim=1).max()
            assert each["completion_ids"].size(1) == each["completion_mask"].sum(dim=1).max()
        assert each["num_items_in_batch"] == 7


def test_rows_stay_in_their_optimizer_step():
    new = cut_by_length(slices_of(LENGTHS, [True] * 8, 2), per_step=2, batch_size=2, accelerator=processes())
    rows = [sorted(row for each in new[i : i + 2] for row in each["win_rates"].tolist()) for i in (0, 2)]
    assert rows == [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.parametrize("seed", range(20))
def test_groups_stay_together(seed):
    """Each kept row once, with all of its group, as many groups in each step, and no more columns than allowed."""
    rng = random.Random(seed)
    size, per_step, steps = rng.choice([2, 4]), rng.randint(1, 4), rng.randint(1, 3)
    batch_size = size * rng.randint(1, 2)
    number = per_step * steps * batch_size
    lengths = [(rng.randint(1, 9), rng.randint(1, 30)) for _ in range(number)]
    groups = [i // size for i in range(number)]
    order = rng.sample(range(number), number)  # TRL's
    kept = [rng.random() < 0.6 for _ in range(number)]
    slices = slices_of([lengths[i] for i in order], [kept[i] for i in order], batch_size)
    for start, each in zip(range(0, number, batch_size), slices, strict=True):
        rows = order[start : start + batch_size]
        each |= {"group": torch.tensor([groups[i] for i in rows]), "win_rates": torch.tensor(rows).float()}
    new = cut_by_length(slices, per_step, batch_size, processes(), together=True)
    found = [sorted(int(row) for row in each["win_rates"]) for each in new]
    assert sorted(itertools.chain(*found)) == [row for row in range(number) if kept[row]]
    homes = [{groups[row] for row in rows} for rows in found]
    assert sum(map(len, homes)) == len(set.union(*homes))
    dealt = [set.union(*homes[step * per_step : (step + 1) * per_step]) for step in range(steps)]
    assert [group for of_step in dealt for group in sorted(of_step)] == sorted(set.union(*homes))
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1
    for step in range(steps):
        rows = [row for part in found[step * per_step : (step + 1) * per_step] for row in part]
        longest = max((sum(lengths[row]) for row in rows), default=0)
        for part in found[step * per_step : (step + 1) * per_step]:
            assert len(part) * max((sum(lengths[row]) for row in part), default=0) <= batch_size * longest


def test_groups_if_training_is_distributed():
    """Two kept groups in four micro-batches of two steps: two repeat the shortest of their rows."""
    slices = slices_of(
        [(3, 9), (5, 1), (2, 2), (3, 8), (1, 1), (4, 8), (2, 1), (6, 2)], [True] * 2 + [False] * 4 + [True] * 2, 2
    )
    for start, each in zip(range(0, 8, 2), slices, strict=True):
        each["group"] = torch.arange(start, start + 2) // 2
    new = cut_by_length(slices, 2, 2, processes([3, 2], kind="FSDP"), together=True)
    assert [each["win_rates"].tolist() for each in new] == [[0, 1], [6], [6, 7], [6]]
    assert [each["kept"].tolist() for each in new] == [[True] * 2, [False], [True] * 2, [False]]
    assert [int(each["num_kept"]) for each in new] == [5, 5, 4, 4]


@pytest.mark.parametrize("kind", ["MULTI_CPU", "FSDP", "DEEPSPEED"])
def test_every_slice_has_a_row_if_training_is_distributed(kind):
    """In the first step this process keeps one row, in the second none."""
    kept = [False, False, True, False] + [False] * 4
    old = slices_of(LENGTHS, kept, 1)
    new = cut_by_length(old, per_step=4, batch_size=1, accelerator=processes([3, 2], kind=kind))
    assert [each["kept"].tolist() for each in new] == [[True], [False], [False], [False]] + [[False]] * 4
    assert [each["win_rates"].tolist() for each in new] == [[2]] * 8
    assert [int(each["num_kept"]) for each in new] == [4] * 4 + [2] * 4
    assert [each["share"].item() for each in new] == [1, 0, 0, 0] + [0] * 4
    assert all(each["completion_mask"].any() for each in new)
    # As many micro-batches as a step has, though fewer would do
    (whole,) = slices_of(LENGTHS, [True] * 8, 8)
    one = cut_by_length([whole], per_step=1, batch_size=8, accelerator=processes(kind=kind))
    assert len(one[0]["kept"]) == 8
    four = cut_by_length(slices_of([(3, 3)] * 8, [True] * 8, 2), 4, 2, processes(kind=kind))
    assert [len(each["kept"]) for each in four] == [2] * 4


def of_processes(count, index, kind="MULTI_CPU"):
    kind = DistributedType[kind if count > 1 else "NO"]
    return SimpleNamespace(distributed_type=kind, num_processes=count, process_index=index)


@pytest.mark.parametrize("groups", [False, True])
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 3), (2, 2)])
def test_an_iteration_that_goes_on_in_other_processes(before, after, groups):
    """Each optimizer step has the rows that it had, each once and whole, and processes have tokens alike."""
    rng = random.Random(before + 10 * after)
    lengths = [(rng.randint(1, 9), rng.randint(1, 30)) for _ in range(48)]
    parts = []
    for process in range(before):  # two steps, of two slices each
        rows = range(process * 48 // before, (process + 1) * 48 // before)
        old = slices_of([lengths[i] for i in rows], [i % 5 > 0 for i in rows], len(rows) // 4)
        for i, each in enumerate(old):
            each["win_rates"] = torch.tensor(rows[i * len(rows) // 4 : (i + 1) * len(rows) // 4]).float()
            each["completion_ids"] = (100 + each["win_rates"].long().unsqueeze(1)) * each["completion_mask"]
            if groups:
                each["group"] = (each["win_rates"].long() - rows[0]) // 4
        parts.append(cut_by_length(old, 2, 8, processes([9, 9], kind="MULTI_CPU") if before > 1 else processes()))
    new = [deal_anew(parts, 2, 3, 8, of_processes(after, index)) for index in range(after)]
    for step in range(2):
        was = [each for part in parts for each in part[2 * step : 2 * step + 2]]
        now = [part[3 * step : 3 * step + 3] for part in new]
        expected, actual = (
            sorted(int(row) for each in slices for row in each["win_rates"][each["kept"]])
            for slices in (was, [each for part in now for each in part])
        )
        assert actual == expected and {int(each["num_kept"]) for part in now for each in part} == {len(expected)}
        tokens = [sum(int((each["completion_mask"] * each["kept"][:, None]).sum()) for each in part) for part in now]
        assert max(tokens) - min(tokens) <= (70 if groups else 40), tokens
        for each in itertools.chain(*now):
            assert after == 1 or len(each["kept"])
            for i, row in enumerate(each["win_rates"].int().tolist()):
                prompt, completion = lengths[row]
                assert each["prompt_mask"][i].sum() == prompt and each["prompt_mask"][i, -prompt:].all()
                assert each["completion_ids"][i].tolist()[:completion] == [100 + row] * completion
                assert each["completion_mask"][i].sum() == completion
        for part in now:
            assert sum(each["share"].item() for each in part) == pytest.approx(1)
        if groups:
            homes = [{int(row) // 4 for row in each["win_rates"][each["kept"]]} for part in now for each in part]
            assert sum(map(len, homes)) == len(set.union(*homes))


def test_nothing_to_train_on_in_other_processes():
    """Slices of one process may have no row, those of several must."""
    parts = [cut_by_length(slices_of(LENGTHS, [False] * 8, 4), 1, 4, processes())]
    assert [len(each["kept"]) for each in parts[0]] == [0, 0]
    for index in range(2):
        new = deal_anew(parts, 2, 2, 2, of_processes(2, index))
        assert [each["kept"].tolist() for each in new] == [[False]] * 4
        assert all(each["completion_mask"].any() and each["num_kept"] == 1 for each in new)


def test_with_images_slices_stay_as_they_are():
    old = [{**each, "num_images": [1]} for each in slices_of(LENGTHS, [True, False] * 4, 2)]
    new = cut_by_length(old, per_step=2, batch_size=2, accelerator=processes([1, 1], kind="MULTI_CPU"))
    for before, after in zip(old, new, strict=True):
        assert after == {**before, "num_kept": 3, "share": after["share"]}
    assert [each["share"].item() for each in new] == pytest.approx([0.75, 0.25, 0.4, 0.6])


def test_trim_of_columns_with_the_same_width():
    (batch,) = slices_of([(3, 3), (1, 2)], [True, True], 2)
    short = trim({name: value[1:] if value.ndim else value for name, value in batch.items()})
    assert short["prompt_ids"].tolist() == [[101]] and short["completion_ids"].tolist() == [[101, 101]]
    assert short["old_per_token_logps"].tolist() == [[-1, -1]] and short["ratio"].tolist() == [[1]]


# ---- The same log-probabilities

ARCHITECTURES = {
    "qwen2": {},
    "llama": {"attn_implementation": "eager"},
    "gemma2": {"attn_implementation": "eager", "sliding_window": 4, "head_dim": 8, "query_pre_attn_scalar": 8},
    "gpt2": {"n_positions": 64},
    "bloom": {"n_head": 2, "n_layer": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8},
    "mamba": {"state_size": 4},
    "qwen3_next": {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8,
        "shared_expert_intermediate_size": 16, "linear_num_value_heads": 2, "linear_num_key_heads": 2,
        "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
    },
}  # fmt: skip


def model_of(architecture):
    torch.manual_seed(0)
    options = {**TINY, **ARCHITECTURES[architecture]}
    attention = options.pop("attn_implementation", "sdpa" if architecture not in ("bloom", "mamba") else None)
    config = CONFIG_MAPPING[architecture](**options)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    for parameter in model.parameters():  # so that probabilities differ
        parameter.data += 0.2 * torch.randn_like(parameter)
    add_fused_lm_head(model, temperature=0.7, outputs=("log_probs", "entropy"))
    return model


def padded(rows):
    """Ids and mask in TRL's form, and the width of the completions."""
    before, after = (max(len(row[i]) for row in rows) for i in (0, 1))
    ids = [[0] * (before - len(p)) + p + c + [0] * (after - len(c)) for p, c in rows]
    mask = [[0] * (before - len(p)) + [1] * len(p + c) + [0] * (after - len(c)) for p, c in rows]
    return torch.tensor(ids), torch.tensor(mask), after


def some_rows(seed=0):
    rng = random.Random(seed)
    lengths = [(1, 1), (9, 2), (3, 12), (5, 5), (2, 1)]
    return [tuple([rng.randrange(2, 31) for _ in range(n)] for n in pair) for pair in lengths]


@pytest.mark.parametrize("batch_size", [5, 2])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_log_probabilities_are_those_of_each_row_alone(architecture, batch_size):
    model, rows = model_of(architecture), some_rows()
    ids, mask, keep = padded(rows)
    logps, entropies, aux_loss = log_probs(model, ids, mask, keep, batch_size, compute_entropy=True)
    assert aux_loss is None and logps.shape == entropies.shape == (5, keep)
    for i, (prompt, completion) in enumerate(rows):
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1] / 0.7
        expected = logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]
        entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(dim=-1)
        n = len(completion)
        torch.testing.assert_close(logps[i, :n], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(entropies[i, :n], entropy, rtol=1e-4, atol=1e-5)
        assert not logps[i, n:].any() and not entropies[i, n:].any()


@pytest.mark.parametrize("architecture", ["qwen2", "gemma2", "qwen3_moe"])
def test_gradients_are_those_of_trls_padded_pass(architecture):
    """Positions of these are relative, so that TRL's padding on the left changes nothing."""
    model, (ids, mask, keep) = model_of(architecture), padded(some_rows())
    weights = torch.randn(5, keep)
    trl = SimpleNamespace(accelerator=SimpleNamespace(autocast=torch.enable_grad))
    found = []
    for logps in (
        GRPOTrainer._get_per_token_logps_and_entropies.__wrapped__(trl, model, ids, mask, keep)[0],
        log_probs(model, ids, mask, keep, batch_size=2)[0],
    ):
        model.zero_grad()
        (logps * weights).sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert (found[1] - found[0]).norm() < 1e-6 * found[0].norm()


def test_the_load_balancing_loss_counts_no_padding():
    model, rows = model_of("qwen3_moe"), some_rows()
    losses = [
        log_probs(model, *padded(rows), len(rows), multiple, compute_aux_loss=True)[2].item()
        for multiple in (None, 64)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    alone = [log_probs(model, *padded([row]), 1, compute_aux_loss=True)[2].item() for row in rows[1:2]]
    assert alone[0] != pytest.approx(losses[0], rel=1e-3)


def test_prompt_tuning():
    """PEFT puts columns of its own before the first."""
    torch.manual_seed(0)
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    policy = get_peft_model(model_of("qwen2"), config)
    ids, mask, keep = padded(some_rows())
    logps, *_ = log_probs(policy, ids, mask, keep, 5)
    for i, (prompt, completion) in enumerate(some_rows()):
        logits = policy(torch.tensor([prompt + completion])).logits[0, len(prompt) + 2 : -1] / 0.7
        expected = logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]
        torch.testing.assert_close(logps[i, : len(completion)], expected, rtol=1e-4, atol=1e-5)


def test_a_text_of_one_token():
    """Of a completion that is masked, in a row that only takes part."""
    logps, *_ = log_probs(model_of("qwen2"), torch.tensor([[0, 5, 7]]), torch.tensor([[0, 1, 0]]), 1, 1)
    assert logps.tolist() == [[0]]


def test_columns_are_a_multiple_and_none_is_empty():
    model, widths = model_of("qwen2"), []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    given = padded(some_rows())
    assert given[0].shape[1] == 21
    a = log_probs(model, *given, 5)
    b = log_probs(model, *given, 5, multiple=8)
    assert widths == [15, 16]
    torch.testing.assert_close(a[0], b[0])


# ---- The same optimizer step


@pytest.mark.parametrize("options", [
    {}, {"win_rate_threshold": 0.6}, {"train_on": "best_and_worst"}, {"loss_type": "sppo_hard"},
    {"train_on": "best_and_worst", "loss_type": "sppo_single"}, {"baseline": "log_mean_exp"},
    {"num_iterations": 2, "max_steps": 2}, {"lora": True}, {"lora": True, "beta": 0.1},
], ids=str)  # fmt: skip
def test_however_many_micro_batches_the_step_is_the_same(fixed, tiny_model, options):
    """Prompts and completions of the table differ in length. With 1, 4 and 16 micro-batches."""
    found = []
    for number in (1, 4, 16):
        given = {"max_steps": 1, **options}
        if given.pop("lora", False):
            adapter = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
            given["trainer_kwargs"] = {"peft_config": adapter}
        torch.manual_seed(0)
        trainer = fixed(
            model=copy.deepcopy(tiny_model), per_device_train_batch_size=16 // number, max_grad_norm=0.0,
            gradient_accumulation_steps=number, optim="sgd", learning_rate=0.01, **given,
        )  # fmt: skip
        trainer.train()
        found.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    start = torch.cat([p.detach().flatten() for p in tiny_model.parameters()])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=1e-6 * (1 + start.abs().max().item()))
    assert len({len(ids) for group in COMPLETIONS.values() for ids in group}) > 1


@pytest.mark.parametrize("number", [1, 2, 4])
def test_whole_groups_make_the_same_step(fixed, tiny_model, number):
    """Of four groups of four, at least one in each micro-batch."""
    found = []
    for together in (False, True):
        trainer = fixed(
            model=copy.deepcopy(tiny_model), per_device_train_batch_size=16 // number, max_grad_norm=0.0, max_steps=1,
            gradient_accumulation_steps=number, optim="sgd", learning_rate=0.01, keep_groups_together=together,
        )  # fmt: skip
        trainer.train()
        found.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    torch.testing.assert_close(*found, rtol=0, atol=1e-6)
