"""Micro-batches of rows of similar length, so that training computes few columns that are padding."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from accelerate.utils import DistributedType
from numpy.lib.stride_tricks import sliding_window_view

from ..errors import RunError


PADDING = 0.1  # at most this part of a step's tokens, if the number of micro-batches allows
# Of the columns that a micro-batch of the longest rows would have: the first that the number of micro-batches allows
FULL = (0.45, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def cut(
    lengths: list[int], batch_size: int, most: int, least: int = 1, rows: Sequence[int] | None = None
) -> list[int]:
    """
    How many units, sorted from long to short, each micro-batch takes: as few micro-batches as keep padding below
    `PADDING`, and then those with the fewest columns. A unit is a row, or the rows of a group.

    Args:
        lengths: Tokens of each unit's longest row, descending.
        batch_size: A micro-batch of several units has at most `FULL` times the columns of this many rows of the
            longest length: as little as `most` micro-batches allow.
        most: The largest number of micro-batches. Padding may then be more.
        least: The smallest number of micro-batches, if there are as many units.
        rows: Of each unit, 1 by default.
    """
    if not lengths:
        return []
    number_of_units = len(lengths)
    before = np.cumsum([0, *(rows or [1] * number_of_units)])  # rows
    limits = [full * batch_size * lengths[0] for full in FULL]
    limit = next((limit for limit in limits if _fewest_within(limit, lengths, before) <= most), limits[-1])
    widest = min(number_of_units, max(1, int(limit // lengths[-1])))
    units = np.arange(widest, 0, -1)  # of a micro-batch that begins at `first` and ends before `end`
    end = np.arange(1, number_of_units + 1)
    first = end[:, None] - units
    columns = (before[end, None] - before[first.clip(min=0)]) * np.array(lengths, dtype=float)[first.clip(min=0)]
    columns[(first < 0) | ((columns > limit) & (units > 1))] = np.inf
    fewest = np.full(widest + number_of_units, np.inf)  # columns for the first n units, behind `widest - 1` of padding
    fewest[widest - 1] = 0
    begins = []
    for number in range(1, min(most, number_of_units) + 1):
        through = sliding_window_view(fewest[:-1], widest) + columns
        best = through.argmin(axis=1)
        begins.append(first[end - 1, best])
        fewest[widest - 1] = np.inf
        fewest[widest:] = through[end - 1, best]
        if number >= least and fewest[-1] <= (1 + PADDING) * np.dot(np.diff(before), lengths):
            break
    sizes, stop = [], number_of_units
    for begin in reversed(begins):
        sizes.append(stop - int(begin[stop - 1]))
        stop = int(begin[stop - 1])
    return sizes[::-1]


def _fewest_within(limit: float, lengths: list[int], before: np.ndarray) -> int:
    """Micro-batches of at most `limit` columns each, or of one unit."""
    number = start = 0
    while start < len(lengths):
        start = max(start + 1, int(before.searchsorted(before[start] + limit // lengths[start], side="right")) - 1)
        number += 1
    return number


def cut_by_length(
    slices: list[dict[str, Any]], per_step: int, batch_size: int, accelerator: Any, together: bool = False
) -> list[dict[str, Any]]:
    """
    The slices of a generation batch, `per_step` for each optimizer step, cut again: the rows of a step that are
    trained on, sorted by length, in as few micro-batches as [`cut`] needs. Slices without rows come first.

    If training is distributed, no slice is without rows: sharded models need the same number of forward passes on each
    process, and DeepSpeed adds the gradients of a step's first pass to nothing. A process with fewer rows repeats one
    that is not trained on. Each slice gets `num_kept`, the rows of all processes that the step trains on, and `share`,
    its part of this process's tokens of the step. Slices with images stay as they are: pixels have no rows to choose
    from.

    With `together`, the rows of a `group` are in one slice. Groups with rows that are trained on are dealt out to the
    optimizer steps in their order. The size of a group must divide `batch_size`.
    """
    number = len(slices) // per_step
    if "num_images" in slices[0]:
        if together:
            raise RunError(
                "keep_groups_together=True, which loss_type='inpo' needs, does not work with images: pixels have no "
                "rows that could be put into another order. Set it to False, and another loss_type."
            )
        steps = [slices[step * per_step : (step + 1) * per_step] for step in range(number)]
    else:
        batch = {
            name: torch.cat([each[name] for each in slices]) if _has_rows(value) else value
            for name, value in slices[0].items()
        }
        rows = torch.arange(len(batch["kept"]))
        unit, among = (batch["group"], batch["kept"]) if together else (rows, rows >= 0)
        units = unit[among].unique()  # dealt out to the steps, in their order
        step_of = torch.searchsorted(units, unit) * number // max(len(units), 1)
        chosen = [(batch["kept"] & (step_of == step)).nonzero().squeeze(1) for step in range(number)]
        fill = is_distributed(accelerator)
        steps = [_cut_step(batch, rows, unit[rows], per_step, batch_size, fill) for rows in chosen]
    kept = [int(sum(each["kept"].sum() for each in step)) for step in steps]
    counts = accelerator.gather(torch.tensor([kept], device=accelerator.device))
    num_kept = counts.sum(dim=0).clamp(min=1).cpu()
    return [
        {**each, "num_kept": count, "share": share}
        for step, count in zip(steps, num_kept, strict=True)
        for each, share in zip(step, _shares(step), strict=True)
    ]


def deal_anew(
    parts: list[list[dict[str, Any]]], number: int, per_step: int, batch_size: int, accelerator: Any
) -> list[dict[str, Any]]:
    """
    This process's slices of an iteration, without images, that other processes or other micro-batches have begun.

    Each of its optimizer steps trains on the same rows as before. These are dealt out to the processes by length, and
    cut as in [`cut_by_length`].

    Args:
        parts: The slices of each process before.
        number: Optimizer steps that the slices are for.
        per_step: Slices of an optimizer step from now on.
    """
    slices, steps = [], []
    for process, part in enumerate(parts):
        for i, each in enumerate(part):
            if "group" in each:  # numbered by process
                each = {**each, "group": each["group"] * len(parts) + process}
            slices.append(each)
            steps.append(torch.full((len(each["kept"]),), i * number // len(part)))
    batch, step_of, fill = _joined(slices), torch.cat(steps), is_distributed(accelerator)
    if fill and len(step_of) == 0:  # one process had nothing to train on
        for name, value in batch.items():
            batch[name] = value.new_ones(1, *value.shape[1:]) if _has_rows(value) else value
        batch["kept"], step_of = batch["kept"] & False, torch.zeros(1)
    tokens = batch["prompt_mask"].sum(dim=1) + batch["completion_mask"].sum(dim=1)
    units = batch.get("group", torch.arange(len(tokens)))
    mine = []
    for step in range(number):
        rows = (batch["kept"] & (step_of == step)).nonzero().squeeze(1)
        home = _dealt_out(units[rows], tokens[rows], accelerator.num_processes)
        own = rows[home == accelerator.process_index]
        cut_anew = _cut_step(batch, own, units[own], per_step, batch_size, fill)
        num_kept = torch.tensor(max(len(rows), 1))
        for each, share in zip(cut_anew, _shares(cut_anew), strict=True):
            mine.append({**each, "num_kept": num_kept, "share": share})
    return mine


def _dealt_out(unit: torch.Tensor, tokens: torch.Tensor, num_processes: int) -> torch.Tensor:
    """The process of each row: the longest units first, there and back, so that sums of lengths are alike."""
    names, unit = unit.unique(return_inverse=True)
    longest = torch.zeros(len(names), dtype=tokens.dtype).scatter_reduce(0, unit, tokens, "amax")
    turn = longest.argsort(descending=True, stable=True).argsort() % (2 * num_processes)
    return torch.minimum(turn, 2 * num_processes - 1 - turn)[unit]


def _joined(slices: list[dict[str, Any]]) -> dict[str, Any]:
    """Slices as one: prompts are padded on the left, completions on the right."""
    widths = [each["completion_ids"].size(1) for each in slices]
    joined = {}
    for name, value in slices[0].items():
        parts = [each[name] for each in slices]
        if not _has_rows(value):
            joined[name] = value
            continue
        is_prompt = name.startswith("prompt_")
        if is_prompt or (value.ndim == 2 and name != "preferences" and [each.size(1) for each in parts] == widths):
            widest = max(each.size(1) for each in parts)
            pads = [widest - each.size(1) for each in parts]
            parts = [
                torch.nn.functional.pad(each, (pad, 0) if is_prompt else (0, pad))
                for each, pad in zip(parts, pads, strict=True)
            ]
        joined[name] = torch.cat(parts)
    return joined


def _shares(step: list[dict[str, Any]]) -> torch.Tensor:
    """The part of each slice in the tokens that are trained on, prompts included."""
    tokens = torch.stack([
        sum((each[name] * each["kept"].unsqueeze(1)).sum() for name in ("prompt_mask", "completion_mask"))
        for each in step
    ])  # fmt: skip
    return tokens / tokens.sum().clamp(min=1)


def is_distributed(accelerator: Any) -> bool:
    """Over several processes, or by DeepSpeed or FSDP in one."""
    return accelerator.distributed_type != DistributedType.NO


def _cut_step(
    batch: dict[str, Any], rows: torch.Tensor, unit: torch.Tensor, number: int, batch_size: int, fill: bool
) -> list[dict[str, Any]]:
    """The given rows in `number` slices, each `unit` in one of them. With `fill`, each slice has a row at least."""
    lengths = (batch["prompt_mask"].sum(dim=1) + batch["completion_mask"].sum(dim=1))[rows]
    unit, count = unit.unique(return_inverse=True, return_counts=True)[1:]
    longest = torch.zeros_like(count).scatter_reduce(0, unit, lengths, "amax")
    longest, order = longest.sort(descending=True, stable=True)
    rows, count = rows[order.argsort()[unit].argsort(stable=True)], count[order]
    sizes = cut(longest.tolist(), batch_size, number, number if fill else 1, count.tolist())
    parts = list(rows.split([int(part.sum()) for part in count.split(sizes)])) if sizes else []
    missing = number - len(parts)
    if not fill:
        return [trim(take_rows(batch, part)) for part in (*[rows[:0]] * missing, *parts)]
    # The shortest row that is trained on in some step, since others have no log-probabilities
    tokens = batch["prompt_mask"].sum(dim=1) + batch["completion_mask"].sum(dim=1)
    spare = tokens.masked_fill(~batch["kept"], tokens.max() + 1).argmin().unsqueeze(0)
    repeated = trim(take_rows(batch, spare))
    repeated["kept"] = repeated["kept"] & False
    return [trim(take_rows(batch, part)) for part in parts] + [repeated] * missing


def _has_rows(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim > 0


def take_rows(batch: dict[str, Any], rows: torch.Tensor) -> dict[str, Any]:
    """The given rows of every tensor of a batch that has rows."""
    return {name: value[rows] if _has_rows(value) else value for name, value in batch.items()}


def trim(batch: dict[str, Any]) -> dict[str, Any]:
    """Cut the columns that no row needs: of prompts on the left, of completions on the right."""
    prompt, completion = (
        int(batch[name].sum(dim=1).max()) if len(batch[name]) else 0 for name in ("prompt_mask", "completion_mask")
    )
    width, trimmed = batch["completion_ids"].size(1), {}
    for name, value in batch.items():
        if name.startswith("prompt_") and _has_rows(value):
            value = value[:, value.size(1) - prompt :]
        elif _has_rows(value) and value.ndim == 2 and value.size(1) == width and name != "preferences":
            value = value[:, : max(completion, 1)]
        trimmed[name] = value
    return trimmed


def log_probs(
    model: Any,
    ids: torch.Tensor,
    mask: torch.Tensor,
    logits_to_keep: int,
    batch_size: int,
    multiple: int | None = None,
    compute_entropy: bool = False,
    compute_aux_loss: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """
    Log-probabilities of the last `logits_to_keep` columns and, if asked for, entropies, of shape `(B, logits_to_keep)`
    and 0 where there is no token, and the load-balancing loss of mixtures. Arguments and results are as in TRL's
    pass.

    Tokens of a row begin in the model's first column. So its positions do not depend on the padding of other rows, and
    no token attends to padding, which comes after it. More than `batch_size` rows take several forward passes, of
    rows of similar length, and the same number on every process.

    Args:
        model: With TRL's fused head.
        ids, mask: Prompts, padded on the left, and completions, padded on the right, of shape `(B, L)`.
        multiple: Of which the model's columns are.
    """
    lengths = mask.sum(dim=1)
    order, sizes = torch.arange(len(ids), device=ids.device), [len(ids)]
    if len(ids) > batch_size:
        order = lengths.argsort(descending=True, stable=True)
        number = -(-len(ids) // batch_size)
        sizes = cut(lengths[order].tolist(), batch_size, number, least=number)
    passes = [
        _one_pass(model, ids[rows], mask[rows], logits_to_keep, multiple, compute_aux_loss)
        for rows in order.split(sizes)
    ]
    logps, entropies, aux_losses = zip(*passes, strict=True)
    back = order.argsort()
    return (
        torch.cat(logps)[back],
        torch.cat(entropies)[back] if compute_entropy else None,
        torch.stack(aux_losses).mean() if compute_aux_loss else None,
    )


def _one_pass(model: Any, ids: torch.Tensor, mask: torch.Tensor, logits_to_keep: int, multiple: int | None, aux: bool):
    starts, lengths = mask.argmax(dim=1, keepdim=True), mask.sum(dim=1, keepdim=True)
    is_scored = mask[:, -logits_to_keep:].bool()
    before = lengths - is_scored.sum(dim=1, keepdim=True)  # tokens of the prompt
    width = max(int(lengths.max()), 2)
    if multiple is not None:
        width = -(-width // multiple) * multiple
    columns = torch.arange(width, device=ids.device)
    ids = ids.gather(1, (starts + columns).clamp(max=ids.size(1) - 1))
    labels = ids.masked_fill((columns < before) | (columns >= lengths), -100)
    # Only mixtures need a mask: their loss must not count padding
    inputs = {"attention_mask": (columns < lengths).long(), "output_router_logits": True} if aux else {}
    outputs = model(input_ids=ids, labels=labels, fused_lm_head=True, **inputs)
    # The column that predicts each token of the completion. Adapters that tune prompts put columns before the first
    places = (before - 1 + torch.arange(logits_to_keep, device=ids.device)).clamp(0, width - 2)
    logps, entropies = (
        None if values is None else values[:, 1 - width :].gather(1, places).where(is_scored, 0.0)
        for values in (outputs.log_probs, outputs.entropy)
    )
    return logps, entropies, outputs.aux_loss
