"""[`ResumableTrainer`]: GRPO's trainer with runs that may end at any point and continue."""

import copy
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import count, islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from peft import load_peft_weights, set_peft_model_state_dict
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Sampler
from transformers.trainer_utils import rotate_checkpoints, set_seed
from transformers.utils import logging
from trl import GRPOTrainer

from ..checks.models import quantized_bits
from ..checks.sources import named_datasets
from ..config import SPPOConfig
from ..evaluation.opponents import Opponents
from ..files import mark_beginning
from ..models.adapters import MovingReference
from ..rollouts.batch import pin
from ..rollouts.files import installed_versions
from ..rollouts.micro_batches import deal_anew
from ..rollouts.recorder import RolloutRecorder
from ..rows import IMAGES
from .alone import alone_in
from .checkpoints import (
    REPLACED,
    check_fits,
    digest,
    find_checkpoint,
    form_of,
    how_to_go_on,
    layout_of,
    read_manifest,
    sizes,
    write_manifest,
)
from .interruption import Interruption
from .nonfinite import NonFiniteSteps


logger = logging.get_logger(__name__)

REFERENCE = "reference.pt"  # in checkpoints of runs that change the reference model

# Several processes on a CPU compute on "cpu:0". torch before 2.13 cannot load a checkpoint's optimizer to that device
torch.serialization.register_package(
    100, lambda storage: None, lambda storage, location: storage if location == "cpu:0" else None
)


class ResumableTrainer(GRPOTrainer):
    """GRPO's trainer with checkpoints of the whole state of a run, including its rollouts."""

    args: SPPOConfig
    model: torch.nn.Module

    # Attributes of TRL's and transformers' trainers that a resumed run needs, besides what transformers saves
    _saved = ["_step", "_tr_loss", "_globalstep_last_logged"]

    def __init__(
        self, *, args: SPPOConfig, adapter: str | None, moves_adapter: bool, given_rollouts: Dataset | None, **kwargs
    ):
        if moves_adapter:  # as `sync_ref_model` asks, which TRL refuses for adapters
            args = copy.copy(args)
            args.sync_ref_model = False
        super().__init__(args=args, **kwargs)
        if moves_adapter:
            self.args.sync_ref_model = True
            self.add_callback(MovingReference())
        self.adapter = adapter
        self.policy_name: str = adapter or cast(Any, self.model).config._name_or_path  # where it came from
        self._micro_steps_per_iteration = cast(int, self.args.steps_per_generation) * self.num_iterations
        bits = quantized_bits(self.model, self.args)
        self._form = form_of(self.args, self.model, None, self.optimizer, bits, adapter)
        template = getattr(self.processing_class, "chat_template", None)
        self._form["tokenizer"] = digest(template, self.eos_token_ids, len(self._tokenizer))
        self._last_saved_step: int | None = None
        self._resumed = False
        self._recorder = RolloutRecorder(self, given_rollouts)
        self._opponents = Opponents(self)
        self._nonfinite = NonFiniteSteps()
        # By name: what has a state of its own, which a resumed run needs
        self._parts: dict[str, Any] = {"opponents": self._opponents, "nonfinite": self._nonfinite}
        self.add_callback(self._opponents)
        self._interruption = Interruption(self, self.args.time_budget)
        self.add_callback(self._interruption)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """
        Train, with the arguments and the result of [`~transformers.Trainer.train`].

        `resume_from_checkpoint` is the checkpoint to continue from, or `True` for the last whole one in
        `args.output_dir`, if there is any.

        Raises `SystemExit` or `KeyboardInterrupt` after a checkpoint, on SIGTERM, SIGINT or the end of
        `args.time_budget`; `ValueError` if the checkpoint does not fit, or another run uses `args.output_dir`.
        """
        with self.alone():
            return self._train(resume_from_checkpoint, *args, **kwargs)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """A context in which no other run may write to the output directory."""
        with ExitStack() as stack:
            problem = None
            try:
                if self.accelerator.is_main_process:
                    stack.enter_context(alone_in(str(self.args.output_dir)))
            except ValueError as error:
                problem = str(error)
            (problem,) = broadcast_object_list([problem])
            if problem is not None:
                raise ValueError(problem)
            yield

    def _train(self, resume_from_checkpoint: str | bool | None, *args, **kwargs):
        output_dir = str(self.args.output_dir)
        self._resumed = bool(resume_from_checkpoint) and str(resume_from_checkpoint).lower() != "false"
        checkpoint: Any = None
        if self._resumed:
            if self.accelerator.is_main_process:
                checkpoint = find_checkpoint(resume_from_checkpoint, output_dir)
            (checkpoint,) = broadcast_object_list([checkpoint])
        if checkpoint is not None:
            check_fits(checkpoint, self.args, self._form)
        # An earlier training of this trainer may have left these
        self._step, self._buffered_inputs, self._last_saved_step = 0, None, None
        self._metrics["train"].clear()
        self._nonfinite.forget()
        self._opponents.forget(checkpoint)
        if not self._resumed and self.args.should_save:
            mark_beginning(output_dir, **self.describe())
            if not self._recorder.given:
                self._recorder.files.set_aside()
            self._opponents.files.set_aside()
        with self._interruption.listening():
            output = super().train(checkpoint, *args, **kwargs)
        if self._interruption.exit_code is not None:
            if self.is_world_process_zero():
                if self.is_over_budget:
                    print(f"trl-sppo: judge_token_budget={self.args.judge_token_budget} is used up. Raise it first.")
                print(f"trl-sppo: ended at step {self.state.global_step}. {how_to_go_on(output_dir)}")
            self._interruption.end()
        return output

    @property
    def is_over_budget(self) -> bool:
        """Whether the judges' token budget is used up."""
        return False

    def describe(self) -> dict[str, Any]:
        """Facts about the run, for its record."""
        datasets = named_datasets(self.train_dataset, self.eval_dataset).values()
        features = [getattr(dataset, "features", None) or {} for dataset in datasets]
        has_images = any(set(IMAGES) & set(each) or "Image(" in str(each) for each in features)
        tools = [getattr(tool, "__name__", type(tool).__name__) for tool in self.tools]
        return {
            "policy": self.policy_name,
            **({"tools": tools} if tools else {}),
            **({"images": True} if has_images else {}),
            "versions": installed_versions(self.args.use_vllm),
            "config": {name: value for name, value in self.args.to_dict().items() if value is not None},
        }

    def agree(self, code: int) -> int:
        """The largest of the numbers that the processes have."""
        if self.accelerator.num_processes == 1:
            return code
        return int(self.accelerator.gather(torch.tensor([code], device=self.accelerator.device)).max())

    # ---- The state between two optimizer steps

    @property
    def _is_sharded(self) -> bool:
        return self.is_deepspeed_enabled or self.is_fsdp_enabled

    @property
    def is_saved(self) -> bool:
        """Whether there is a checkpoint of the optimizer steps taken so far."""
        return self._last_saved_step == self.state.global_step

    def generation_batches(self, batches: Any) -> Iterator[list[dict[str, Any]]]:
        """Each generation batch once, of the first epoch, or of as many as `max_steps` needs. TRL repeats each."""
        for epoch in count():
            self.state.epoch = epoch
            batch = None
            for batch in islice(batches, 0, None, self._micro_steps_per_iteration):
                yield batch
            if batch is None or self.args.max_steps <= 0:
                break

    def needs_rollout(self) -> bool:
        """Whether the next micro-step begins an iteration."""
        return self._buffered_inputs is None or self._step % self._micro_steps_per_iteration == 0

    def get_state(self) -> dict[str, Any]:
        """The state that a resumed run needs, besides weights and optimizer."""
        return {
            **{name: copy.deepcopy(getattr(self, name)) for name in self._saved},
            "parts": {name: part.state_dict() for name, part in self._parts.items()},
            "metrics": {name: list(values) for name, values in self._metrics["train"].items()},
            "num_input_tokens_seen": self.state.num_input_tokens_seen,
            "slices": None if self.needs_rollout() else self._buffered_inputs,
            "random": _random_state(),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        for name in self._saved:
            setattr(self, name, copy.deepcopy(state[name]))
        for name, part in self._parts.items():
            part.load_state_dict(state["parts"][name])
        self._tr_loss = self._tr_loss.to(self.args.device)
        self._metrics["train"].clear()
        self._metrics["train"].update(state["metrics"])
        self.state.num_input_tokens_seen = state["num_input_tokens_seen"]
        self._buffered_inputs = state["slices"]
        if "random" in state:
            _set_random_state(state["random"])

    def evaluate(self, *args, **kwargs):
        # Evaluations sample, and may come at other places in a resumed run. They leave no trace in the training
        random_state = _random_state()
        num_dataloaders = len(self.accelerator._dataloaders)
        try:
            return super().evaluate(*args, **kwargs)
        finally:
            _set_random_state(random_state)
            del self.accelerator._dataloaders[num_dataloaders:]  # accelerate keeps the loader of each evaluation

    def _get_train_sampler(self, dataset=None):
        sampler = super()._get_train_sampler(dataset)
        return _EpochSampler(sampler, lambda: int(self.state.epoch or 0))

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        done = self.state.global_step >= self.state.max_steps  # before it was resumed: it would take one more
        if done:
            logger.warning(f"this run has taken all of its {self.state.max_steps} steps. Raise max_steps to continue.")
        if done or self._interruption.is_over():
            self.control.should_training_stop = True
            self.model.train()  # the last lines of the log belong to training
            num_batches = 0
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def _evaluate(self, trial, ignore_keys_for_eval, skip_scheduler=False):
        if skip_scheduler and self._opponents.is_resumed:
            return {}  # eval_on_start: the run was evaluated when it began
        return super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)

    def _finalize_training(self, *args, **kwargs):
        best = self.state.best_model_checkpoint
        if self._interruption.exit_code is not None:
            # The run is not over: the best model is not loaded yet, and the last checkpoint not deleted for it
            self.state.best_model_checkpoint = None
        output = super()._finalize_training(*args, **kwargs)
        self.state.best_model_checkpoint = best
        return output

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm)
        # DeepSpeed holds the gradients itself, and a scaler of float16 gradients looks at them itself
        looks = not self.is_deepspeed_enabled and self.accelerator.scaler is None
        if looks and not self._nonfinite.passes(norm, self):
            self._metrics["train"]["skipped_steps"] = [self._nonfinite.num_skipped]
        return norm

    # ---- Checkpoints

    def _save_checkpoint(self, model, trial):
        step = self.state.global_step
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{step}"
        if self._interruption.beginning is not None and self.is_saved:
            return  # interrupted inside the next step, at whose beginning it was saved
        main = self.args.should_save  # one process, or one of each machine
        aside = folder.with_name(folder.name + REPLACED)
        if main and folder.exists():
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
        self.accelerator.wait_for_everyone()
        # transformers would delete older checkpoints before this one is whole: it gets options without a limit
        args, self.args = self.args, copy.copy(self.args)
        self.args.save_total_limit = None
        try:
            super()._save_checkpoint(model, trial)
            can_be_divided = True
            if not self.args.save_only_model:
                state = self.get_state()
                can_be_divided = not any("num_images" in each for each in state["slices"] or ())
                del state["random"]  # transformers has saved it
                torch.save(state, folder / f"rollouts_{self.args.process_index}.pt")
            if main and self.args.sync_ref_model and self.ref_model is not None and not self._is_sharded:
                # The reference is then no longer a model that can be loaded from where the policy came from
                torch.save(self.accelerator.unwrap_model(self.ref_model).state_dict(), folder / REFERENCE)
            self.accelerator.wait_for_everyone()
            if main:
                write_manifest(folder, step, self.args, self._form, can_be_divided)
        except BaseException:
            if main:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        finally:
            self.args = args
        self._last_saved_step = step
        if main:
            shutil.rmtree(aside, ignore_errors=True)
            iteration = -(-self._step // self._micro_steps_per_iteration)  # the next to be sampled
            self._recorder.files.rotate(iteration, self.args.rollouts_total_limit)
            self._opponents.files.rotate(step, self.args.rollouts_total_limit)
            rotate_checkpoints(
                str(folder.parent), args.save_total_limit, self.state.best_model_checkpoint, use_mtime=True
            )

    def load_random_state(self, folder: Path) -> None:
        """Load the random state of this process that a folder has, or begin a new one if other processes wrote it."""
        size, place = self.accelerator.num_processes, self.args.process_index
        names = {f"rng_state_{process}.pth" for process in range(size)} if size > 1 else {"rng_state.pth"}
        if {path.name for path in folder.glob("rng_state*.pth")} == names:
            super()._load_rng_state(str(folder))
            return
        if self.args.use_vllm and self.args.vllm_mode == "colocate":  # processes that share a vLLM sample alike
            place //= self.args.vllm_tensor_parallel_size
        set_seed(int(digest(folder.name, self.args.seed, place), 16) % 2**32)

    def _read_state(self, checkpoint: Path) -> dict[str, Any]:
        """The state of this process, also if processes of another number, or with other batches, wrote it."""
        then, now = read_manifest(checkpoint)["layout"], layout_of(self.args)
        is_same = sizes(then) == sizes(now)
        own = [self.args.process_index] if is_same else range(then["num_processes"])
        states = [
            torch.load(checkpoint / f"rollouts_{number}.pt", map_location="cpu", weights_only=True) for number in own
        ]
        if is_same:
            return states[0]
        state = states[0]  # of its numbers, only the sum of losses differs between processes. The log has the mean
        state["_tr_loss"] = torch.stack([each["_tr_loss"] for each in states]).mean(dim=0)
        name = "gradient_accumulation_steps"
        state["_step"] = state["_step"] // then[name] * now[name]
        if state["slices"] is not None:
            number = then["steps_per_generation"] // then[name]
            parts = [each["slices"] for each in states]
            state["slices"] = [
                pin(each, self.accelerator.device)
                for each in deal_anew(parts, number, now[name], now["per_device_train_batch_size"], self.accelerator)
            ]
        logger.warning(f"{checkpoint} was written with {sizes(then)}; this run continues with {sizes(now)}.")
        return state

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        # PEFT loads adapters in float32, even if TRL trains them in bfloat16 (on a policy in 4 or 8 bit)
        policy = cast(torch.nn.Module, self.model)
        dtypes = {name: parameter.dtype for name, parameter in policy.named_parameters()}
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if "ref" in getattr(policy, "peft_config", {}) and not self._is_sharded:
            # Beside the folder of a second adapter, transformers 5.17 passes over the first, which is not in a folder
            adapter = load_peft_weights(resume_from_checkpoint, device="cpu")
            set_peft_model_state_dict(policy, adapter, adapter_name="default")
        for name, parameter in policy.named_parameters():
            parameter.data = parameter.data.to(dtypes[name])

    def _load_optimizer_and_scheduler(self, checkpoint):
        # A checkpoint's state restores the options of its optimizer. This run's options replace them
        _, options = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(
            self.args, cast(Any, self.model)
        )
        names = [*(name for name in options if name != "lr"), "weight_decay", "initial_lr"]
        groups, scheduler = cast(Any, self.optimizer).param_groups, cast(Any, self.lr_scheduler)
        asked = [{name: group[name] for name in names if name in group} for group in groups]
        base_lrs = list(getattr(scheduler, "base_lrs", []))
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or self.is_deepspeed_enabled:
            return
        groups = cast(Any, self.optimizer).param_groups  # loading has replaced them
        for i, (group, values) in enumerate(zip(groups, asked, strict=True)):
            group.update(values)
            if isinstance(scheduler, LambdaLR):
                group["lr"] = base_lrs[i] * scheduler.lr_lambdas[i](scheduler.last_epoch)
        if base_lrs:
            scheduler.base_lrs = base_lrs
            scheduler._last_lr = [group["lr"] for group in groups]

    def _load_rng_state(self, checkpoint):
        # The last thing that transformers loads, right before the first optimizer step
        self.load_random_state(Path(checkpoint))
        self.set_state(self._read_state(Path(checkpoint)))
        if self.args.sync_ref_model and self.ref_model is not None:  # else it is an adapter, and saved as such
            reference = torch.load(Path(checkpoint) / REFERENCE, map_location="cpu", weights_only=True)
            self.accelerator.unwrap_model(self.ref_model).load_state_dict(reference)
        if Path(checkpoint).resolve().parent == Path(str(self.args.output_dir)).resolve():
            self._last_saved_step = self.state.global_step


class _EpochSampler(Sampler):
    """TRL's sampler, with an order that depends on the epoch: a resumed run need not begin with the first."""

    def __init__(self, sampler: Any, epoch: Callable[[], int]):
        self.sampler = sampler
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        if self.sampler.shuffle:
            self.sampler.generator.manual_seed(self.sampler.seed)
            for _ in range(self.epoch()):
                torch.randperm(self.sampler.num_samples, generator=self.sampler.generator)
        return iter(self.sampler)


def _random_state() -> tuple:
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda


def _set_random_state(state: tuple) -> None:
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(state[2])
    if state[3] is not None:
        torch.cuda.set_rng_state(state[3])
