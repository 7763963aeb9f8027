"""`MetaTrainer`: transformers' Trainer, which learns lambda beside the model.

The Trainer's own loop makes the base steps; a callback makes the meta step between `optimizer.step()` and
`zero_grad()`, where D needs it: with the gradients (clipped, unscaled) and the learning rate of the step.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import sama_kernels as sk
from sama_kernels.integrations.endless import EndlessBatches
from sama_kernels.integrations.trainer_checks import check_arguments, check_parallelism, check_sama

Loss = Callable[[nn.Module, Any], Tensor]
_STATE = "meta.pt"


class MetaTrainer(transformers.Trainer):
    """A Trainer that makes a meta step after every `meta_every`-th optimizer step.

    Arguments beside those of transformers.Trainer (run with transformers 5.23), all by name:
        base_loss: (model, inputs) -> 0-dim tensor: the training loss of a (micro)batch, which reads lambda; the mean
            over its samples, say. Write `sk.stop_gradient(x)` for `x.detach()`. Evaluation uses the model's own loss.
        meta_model: lambda, a module. It is moved to the Trainer's device, and made the same on all processes.
        meta_optimizer: steps meta_model's parameters; no other optimizer may.
        meta_dataset: the clean samples, with a length; batches go through the Trainer's data_collator.
        meta_loss: (model, inputs) -> 0-dim tensor, of a batch of meta_dataset. None: the model's own loss.
        meta_every: optimizer steps from one meta step to the next (the paper: 10 in section 4.1).
        meta_batch_size: of meta_dataset, per process. None: per_device_train_batch_size.
        sama: arguments for `sk.meta_backward`, such as {"alpha": 0.1, "update_base": True}. `clip_coef` (from
            max_grad_norm) and `grad_scaler` are set here.
    The logs have "meta_loss", its mean over the meta steps since the last log, and "meta_degenerate", the share of them
    that gave no gradient. Checkpoints hold meta.pt, with which `train(resume_from_checkpoint=...)` gives the same bits
    as a run that was not stopped; `save_model` saves the model alone.
    Raises:
        TypeError, ValueError: naming the argument and the cure; NotImplementedError: nn.DataParallel (start one process
            per GPU with torchrun), DeepSpeed, context or sequence parallelism.
    """

    def __init__(
        self,
        *args: Any,
        base_loss: Loss,
        meta_model: nn.Module,
        meta_optimizer: torch.optim.Optimizer,
        meta_dataset: Dataset[Any],
        meta_loss: Loss | None = None,
        meta_every: int = 10,
        meta_batch_size: int | None = None,
        sama: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        sizes = {"meta_every": meta_every, "meta_batch_size": 1 if meta_batch_size is None else meta_batch_size}
        check_arguments(base_loss, meta_model, meta_optimizer, meta_dataset, meta_loss, sizes)
        check_sama(sama or {})
        super().__init__(*args, **kwargs)
        if self.compute_loss_func is not None:
            raise ValueError("compute_loss_func: the loss of training is base_loss; leave this one out")
        check_parallelism(self)
        self.meta_model = meta_model.to(self.args.device)
        self.meta_optimizer = meta_optimizer
        self.meta_dataset = meta_dataset
        self._base_loss, self._meta_loss = base_loss, meta_loss or self._own_loss
        self._sama = dict(sama or {})
        self._batches = EndlessBatches(
            len(meta_dataset),  # type: ignore[arg-type]
            meta_batch_size or self.args.per_device_train_batch_size,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
            rank=self.args.process_index,
            ranks=self.args.world_size,
        )
        self._loader: Iterator[Any] | None = None
        self._drawn = 0  # batches of meta_dataset; those that workers have ready beyond it do not count
        self._closures: list[Callable[[], Tensor]] = []  # of the step's microbatches
        self._norm: Tensor | None = None  # before clipping
        self._since_log: tuple[int, Tensor | float, Tensor | float] = 0, 0.0, 0.0  # meta steps, loss, degenerate
        # base_loss is a mean over a microbatch: the Trainer is to divide it by the number of them.
        self.model_accepts_loss_kwargs = False
        self._initial: dict[str, Any] | None = None  # lambda and its optimizer as a search began
        self.add_callback(_MetaSteps(self, meta_every))

    def get_meta_dataloader(self, start: int = 0) -> DataLoader[Any]:
        """Batches of meta_dataset for ever, from batch `start` on: the same whatever was drawn before.

        Like the training loader: the Trainer's collator, workers, and columns that the model does not take left out.
        """
        self._batches.start = start
        return DataLoader(
            self.meta_dataset,
            batch_sampler=self._batches,
            collate_fn=self._get_collator_with_removed_columns(self.data_collator, "meta"),
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            generator=torch.Generator(),  # its seeds of workers are not to come from the model's generator
        )

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """base_loss in a training step, noted for the meta step; with `return_outputs` (evaluation) the model's own."""
        if return_outputs or not (self.is_in_train and torch.is_grad_enabled()):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        closure = sk.recorded(_bound(self._base_loss, model, inputs))
        self._closures.append(closure)
        return closure()

    def meta_step(self) -> sk.MetaGradient:
        """One meta step, after an optimizer step and before zero_grad: lambda moves by meta_optimizer."""
        inputs = self._next_batch()
        parts = len(self._closures)
        arguments: dict[str, Any] = {"base_params": self.model_wrapped, "optimizer": self.optimizer, **self._sama}
        if self._norm is not None:
            arguments.setdefault("clip_coef", sk.clip_coef(self._norm, self.args.max_grad_norm))
        elif self.args.max_grad_norm and "clip_coef" not in arguments:
            raise RuntimeError(
                "args: max_grad_norm: the gradients were not clipped by accelerate's clip_grad_norm_, so the factor"
                ' is not known; pass sama={"clip_coef": ...}, or max_grad_norm=0'
            )
        self.meta_optimizer.zero_grad()  # backward() of the base loss reached lambda too
        with self.compute_loss_context_manager():
            out = sk.meta_backward(
                [_divided(closure, parts) for closure in self._closures],
                _bound(self._meta_loss, self.model_wrapped, inputs),
                meta_params=self.meta_model,
                **arguments,
            )
        self.meta_optimizer.step()
        steps, loss, degenerate = self._since_log
        self._since_log = steps + 1, loss + out.meta_loss.float(), degenerate + out.degenerate.float()
        return out

    def create_accelerator_and_postprocess(self) -> None:
        """Also notes the norm of the gradients; a search makes an accelerator for every trial."""
        super().create_accelerator_and_postprocess()
        self.accelerator.clip_grad_norm_ = self._noting_norm(self.accelerator.clip_grad_norm_)

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's; every trial begins with lambda, its optimizer and the order of the clean samples anew."""
        self._initial = copy.deepcopy(self._lambda_state())
        try:
            return super().hyperparameter_search(*args, **kwargs)
        finally:
            self._initial = None

    def _hp_search_setup(self, trial: Any) -> None:
        super()._hp_search_setup(trial)
        if self._initial is not None:
            self._load_lambda(copy.deepcopy(self._initial))

    def _lambda_state(self) -> dict[str, Any]:
        return {
            "meta_model": self.meta_model.state_dict(),
            "meta_optimizer": self.meta_optimizer.state_dict(),
            "drawn": self._drawn,
        }

    def _load_lambda(self, state: Mapping[str, Any]) -> None:
        self.meta_model.load_state_dict(state["meta_model"])
        self.meta_optimizer.load_state_dict(state["meta_optimizer"])
        self._drawn, self._loader = state["drawn"], None

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds "meta_loss" and "meta_degenerate" to the logs of training."""
        steps, loss, degenerate = self._since_log
        if "loss" in logs and steps:
            logs["meta_loss"], logs["meta_degenerate"] = float(loss) / steps, float(degenerate) / steps
            self._since_log = 0, 0.0, 0.0
        super().log(logs, *args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            state = {**self._lambda_state(), "sama": sk.state_dict(cast(torch.optim.Optimizer, self.optimizer))}
            torch.save(state, Path(output_dir, _STATE))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        path = Path(checkpoint, _STATE)
        if not path.exists():
            raise ValueError(f"resume_from_checkpoint: {path} is missing: not a checkpoint of a MetaTrainer")
        state = torch.load(path, map_location="cpu", weights_only=True)  # what is loaded goes to where its owner is
        self._load_lambda(state)
        sk.load_state_dict(cast(torch.optim.Optimizer, self.optimizer), state["sama"])

    def _next_batch(self) -> Any:
        if self._loader is None:
            self._loader = iter(self.get_meta_dataloader(self._drawn))
        batch = self._prepare_inputs(next(self._loader))
        self._drawn += 1
        return batch

    def _own_loss(self, model: nn.Module, inputs: Any) -> Tensor:
        return cast(Tensor, super().compute_loss(model, inputs))

    def _noting_norm(self, clip: Callable[..., Any]) -> Callable[..., Any]:
        """accelerate's clip_grad_norm_; the norm that it finds is all that D needs to know of the clipping."""

        def clip_grad_norm_(parameters: Any, max_norm: float, *args: Any, **kwargs: Any) -> Any:
            norm = clip(parameters, max_norm, *args, **kwargs)
            if max_norm < float("inf"):  # infinity: the Trainer only wants to know the norm
                self._norm = norm
            return norm

        return clip_grad_norm_


class _MetaSteps(transformers.TrainerCallback):
    """When the Trainer makes meta steps."""

    def __init__(self, trainer: MetaTrainer, every: int) -> None:
        self._trainer, self._every = trainer, every

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.world_size > 1:
            for tensor in (*self._trainer.meta_model.parameters(), *self._trainer.meta_model.buffers()):
                torch.distributed.broadcast(tensor.detach(), 0)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer._closures.clear()
        self._trainer._norm = None

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if (state.global_step + 1) % self._every == 0:
            self._trainer.meta_step()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer._closures.clear()  # they hold the last batch


def _bound(loss: Loss, model: nn.Module, inputs: Any) -> Callable[[], Tensor]:
    """`loss` of a batch as a closure, with the code of `loss` (`functools.wraps`), which is looked at for detaches.

    It gets a copy of the batch, as losses like to pop their labels, and later calls are to find them too.
    """

    @functools.wraps(loss)
    def closure() -> Tensor:
        return loss(model, copy.copy(inputs) if isinstance(inputs, Mapping) else inputs)

    return closure


def _divided(closure: Callable[[], Tensor], parts: int) -> Callable[[], Tensor]:
    """The loss of one of `parts` microbatches, as the Trainer weighs it; still a recorded closure."""

    @functools.wraps(closure)  # with its recording
    def divided() -> Tensor:
        return closure() / parts

    return closure if parts == 1 else divided
