"""The seams of GRPOTrainer that SPPOTrainer stands on. When TRL changes one, the message says what to look at."""

import inspect

import pytest
from trl import GRPOTrainer
from trl.generation.vllm_generation import VLLMGeneration

from trl_sppo import SPPOTrainer
from trl_sppo.batch import IMAGE_FIELDS
from trl_sppo.resumable import ResumableTrainer


SIGNATURES = {
    "_generate_and_score_completions": ["self", "inputs"],
    "_generate": ["self", "prompts"],
    "_calculate_rewards": ["self", "inputs", "prompts", "completions", "completion_ids_list"],
    "_compute_loss": ["self", "model", "inputs"],
    "_prepare_inputs": ["self", "generation_batch"],
    "_log_completion_extra": ["self", "column", "values"],
    "_generate_single_turn": [
        "self",
        "prompt_ids",
        "images",
        "multimodal_fields",
        "num_generations",
        "has_tool_images",
    ],
    "get_batch_samples": ["self", "epoch_iterator", "num_batches", "device"],
    "_get_train_sampler": ["self", "dataset"],
    "_save_checkpoint": ["self", "model", "trial"],
    "_load_rng_state": ["self", "checkpoint"],
    "_load_optimizer_and_scheduler": ["self", "checkpoint"],
    "_load_from_checkpoint": ["self", "resume_from_checkpoint", "model"],
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name):
    actual = list(inspect.signature(getattr(GRPOTrainer, name)).parameters)
    assert actual == SIGNATURES[name], f"TRL changed GRPOTrainer.{name}: compare it with SPPOTrainer.{name}"


def test_signature_of_the_log_probability_pass():
    actual = list(inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters)
    expected = ["self", "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size", "compute_entropy"]
    assert actual[:7] == expected, (
        "TRL changed GRPOTrainer._get_per_token_logps_and_entropies: SPPOTrainer passes the first four by position"
    )
    assert set(actual[7:]) == {*IMAGE_FIELDS, "compute_aux_loss"}, (
        "TRL changed what a model with images needs: SPPOTrainer passes on trl_sppo.batch.IMAGE_FIELDS"
    )


def test_signatures_of_the_vllm_backend():
    for name in ("sync_weights", "_iter_named_params"):
        actual = list(inspect.signature(getattr(VLLMGeneration, name)).parameters)
        assert actual == ["self"], f"TRL changed VLLMGeneration.{name}: trl_sppo/weight_sync.py replaces it"


def test_what_is_overridden_and_nothing_else():
    overridden = {
        kind: {name for name, value in vars(kind).items() if name in dir(GRPOTrainer) and callable(value)}
        for kind in (SPPOTrainer, ResumableTrainer)
    }
    assert overridden[SPPOTrainer] - {"__init__"} == {
        "_generate_and_score_completions", "_generate", "_generate_single_turn", "_calculate_rewards",
        "_get_per_token_logps_and_entropies", "_compute_loss", "create_model_card", "_prepare_inputs",
        "evaluation_loop",
    }  # fmt: skip
    assert overridden[ResumableTrainer] - {"__init__"} == {
        "train", "evaluate", "_evaluate", "_get_grad_norm", "get_batch_samples", "_get_train_sampler",
        "_finalize_training", "_save_checkpoint", "_load_from_checkpoint", "_load_rng_state",
        "_load_optimizer_and_scheduler",
    }  # fmt: skip


def test_order_of_calls_and_shapes(make_trainer, monkeypatch):
    """TRL: generate, then log-probabilities, then scores, then the batch is shuffled and split into slices."""
    calls = []

    def spy(name):
        original = getattr(GRPOTrainer, name)

        def record(self, *args, **kwargs):
            result = original(self, *args, **kwargs)
            calls.append((name, args, result))
            return result

        monkeypatch.setattr(GRPOTrainer, name, record)

    for name in ("_generate", "_get_per_token_logps_and_entropies"):
        spy(name)
    scored = SPPOTrainer._calculate_rewards

    def score(self, *args):
        calls.append(("_calculate_rewards", args, scored(self, *args)))
        return calls[-1][2]

    monkeypatch.setattr(SPPOTrainer, "_calculate_rewards", score)
    # 16 completions (4 groups of 4), 2 optimizer steps per generation batch: pi_t needs a log-probability pass
    trainer = make_trainer(steps_per_generation=2, max_steps=1)
    trainer.train()
    names = [name for name, _, _ in calls]
    assert names == [
        "_generate",  # SPPOTrainer's asks for the scores too
        "_get_per_token_logps_and_entropies",  # pi_t
        "_calculate_rewards",  # gets these scores
        "_get_per_token_logps_and_entropies",  # pi_theta
    ], "TRL changed the order of a rollout: see the seams in trl_sppo/trainer.py"

    generated = calls[0][2]
    assert len(generated) == 8, "TRL changed what GRPOTrainer._generate returns: SPPOTrainer._generate unpacks it"
    _, completion_ids, tool_mask, completions, _, extra_fields, *_ = generated
    assert len(completion_ids) == len(completions) == 16 and isinstance(completion_ids[0], list)
    assert tool_mask is None and extra_fields == {}
    scores = calls[2][2]
    assert scores.shape == (16, 1), "SPPOTrainer takes (completions of all processes, reward sources) for the scores"
    logps, entropies, _ = calls[3][2]
    assert logps.shape == entropies.shape

    assert len(trainer._buffered_inputs) == 2, "SPPOTrainer counts kept completions in TRL's _buffered_inputs"
    for piece in trainer._buffered_inputs:
        assert {
            "prompt_ids",
            "prompt_mask",
            "completion_ids",
            "completion_mask",
            "old_per_token_logps",
        } <= piece.keys()
        assert len(piece["win_rates"]) == len(piece["kept"]) == len(piece["completion_ids"])
        assert "advantages" not in piece


def test_groups_are_consecutive(make_trainer, monkeypatch):
    seen = []
    original = GRPOTrainer._generate
    monkeypatch.setattr(
        GRPOTrainer, "_generate", lambda self, prompts: seen.append(prompts) or original(self, prompts)
    )
    make_trainer(max_steps=1).train()
    assert len(seen[0]) == 8 and all(len(set(seen[0][i : i + 4])) == 1 for i in (0, 4)), (
        "TRL changed the order of a generation batch: win rates reshape it to (groups, num_generations)"
    )


def test_trl_leaves_the_loss_unscaled_for_accumulation():
    assert GRPOTrainer.loss_is_scaled_for_ga is True, (
        "SPPOTrainer divides its loss by the completions of the whole optimizer step; nobody may divide it again"
    )
