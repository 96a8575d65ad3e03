"""The verdict on a rollout: which rows each process carries on with. And where they live until they are used."""

import torch
from accelerate.utils import send_to_device

from trl_sppo import SPPOConfig, preferences_from_scores
from trl_sppo.rollouts.batch import pin
from trl_sppo.rollouts.targets import RolloutTargets


# Three groups of three, of which the last ties
SCORES = torch.tensor([[1.0], [2.0], [3.0], [5.0], [5.0], [9.0], [4.0], [4.0], [4.0]])


def verdicts(tmp_path, num_slices=1, num_processes=3, scores=SCORES, usable=None, **options):
    args = SPPOConfig(str(tmp_path), use_cpu=True, bf16=False, num_generations=3, generation_batch_size=24, **options)
    usable = torch.ones(len(scores), dtype=torch.bool) if usable is None else usable
    panel = [preferences_from_scores(scores.view(-1, 3))]
    usable = usable.view(-1, 3)
    return [RolloutTargets.of(panel, [1.0], usable, args, num_slices, num_processes, i) for i in range(num_processes)]


def test_every_process_carries_as_many_rows(tmp_path):
    # win rates: 0, 1/2, 1 | 1/4, 1/4, 1 | ties: 3, 3 and 0 of 3 are kept; the last carries copies of row 0
    all_kept = verdicts(tmp_path)
    assert [v.rows.tolist() for v in all_kept] == [[0, 1, 2], [0, 1, 2], [0, 0, 0]]
    assert [v.num_kept for v in all_kept] == [3, 3, 0] and {v.num_logps for v in all_kept} == {3}
    torch.testing.assert_close(all_kept[0].win_rates[:2], torch.tensor([[0, 0.5, 1], [0.25, 0.25, 1]]))
    # best and worst: rows 0 and 2 of the first, 0 (the first of the two that tie) and 2 of the second
    extremes = verdicts(tmp_path, train_on="best_and_worst")
    assert [v.rows.tolist() for v in extremes] == [[0, 2], [0, 2], [0, 0]]


def test_rows_fill_the_slices_and_padding_needs_no_log_probabilities(tmp_path):
    (one,) = verdicts(tmp_path, num_slices=4, num_processes=1)
    assert one.rows.tolist() == [0, 1, 2, 3, 4, 5, 0, 0] and one.num_kept == one.num_logps == 6


def test_groups_may_straddle_processes(tmp_path):
    # One row per process: every group is spread over three
    ninths = verdicts(tmp_path, num_processes=9)
    assert [v.num_kept for v in ninths] == [1, 1, 1, 1, 1, 1, 0, 0, 0]
    assert all(v.rows.tolist() == [0] for v in ninths)


def test_unusable_completions_are_compared_and_not_kept(tmp_path):
    usable = torch.tensor([True, True, False] + [True] * 6)
    (one,) = verdicts(tmp_path, num_processes=1, usable=usable)
    assert one.kept[0].tolist() == [True, True, False]
    torch.testing.assert_close(one.win_rates[0], torch.tensor([0, 0.5, 1.0]))


# ---- Where rollouts live


def test_rollouts_come_to_the_device_slice_by_slice(fixed, monkeypatch):
    """16 completions in 4 slices of which half is trained on: in CPU memory at once, on the device slice by slice."""
    moves = []

    def record(batch, device, **kwargs):
        if isinstance(batch, dict):  # which calls itself for each of its tensors
            moves.append((len(batch["completion_ids"]), str(device)))
        return send_to_device(batch, device, **kwargs)

    for module in ("trainer", "rollouts.batch"):
        monkeypatch.setattr(f"trl_sppo.{module}.send_to_device", record)
    trainer = fixed(
        per_device_train_batch_size=4, steps_per_generation=4, train_on="best_and_worst", max_steps=4, num_iterations=1
    )
    trainer.train()
    assert moves[0] == (8, "cpu")
    assert [rows for rows, _ in moves[1:]] == [2, 2, 2, 2]
    assert all(piece["completion_ids"].device.type == "cpu" for piece in trainer._buffered_inputs)


def test_each_new_rollout_is_pinned_once(fixed, monkeypatch):
    """On a GPU; elsewhere pinning changes nothing."""
    pinned = []
    monkeypatch.setattr(
        "trl_sppo.trainer.pin", lambda piece, device: pinned.append(device) or {**piece, "pinned": True}
    )
    trainer = fixed(per_device_train_batch_size=8, steps_per_generation=2, num_iterations=2, max_steps=6)
    used = []
    compute = trainer._compute_loss
    monkeypatch.setattr(
        trainer, "_compute_loss", lambda model, inputs: used.append(inputs["pinned"]) or compute(model, inputs)
    )
    trainer.train()
    assert used == [True] * 6  # two iterations, of which the second is used for half
    assert pinned == [torch.device("cpu")] * 4
    batch = {"kept": torch.ones(2)}
    assert pin(batch, torch.device("cpu")) is batch
