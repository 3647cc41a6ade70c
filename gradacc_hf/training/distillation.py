"""Distillation: a student learns from the outputs of a teacher on the same micro-batches.

Loss: (1 − w) · task loss + w · T² · KL(teacher ‖ student), with both distributions at temperature T.

The router loss of a mixture of experts is added with the factor of the model, without 1 − w.

The divergence is a mean over the items of the task loss. So every split gives the gradient of the whole
window. The teacher runs without gradients, before the student's forward, in the student's autocast. In
evaluation mode, the loss is the task loss alone.

A language model may compute few logits at a time (`padding/logits.py`). The divergence is then a part of the
loss of each chunk, and the teacher computes the logits of that chunk only.

Source: Hinton et al. 2015, arXiv 1503.02531, section 2.
"""

import inspect
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from functools import cache, wraps
from types import MethodType
from typing import Any

import torch
from torch.nn import functional

from gradacc_hf.accumulation.loss_items import Loss
from gradacc_hf.errors import InputError
from gradacc_hf.padding.logits import (
    TOKENS_PER_CHUNK,
    DeferredLogits,
    RowLoss,
    add_row_loss,
    deferred,
    skips_logits,
)
from gradacc_hf.training.experts import router_loss_factor
from gradacc_hf.utils.precision import weights_held_in

Items = Callable[[torch.Tensor, Mapping[str, Any]], tuple[torch.Tensor, torch.Tensor | None]]
"""(logits, batch) → the logits of each item (items, classes), and the weight of each item, or None."""
_TAUGHT = "_gradacc_taught"


def divergence(
    student: torch.Tensor, teacher: torch.Tensor, temperature: float, several: bool = False
) -> torch.Tensor:
    """Return T² · KL(teacher ‖ student) of each item (items,), in float32 at least.

    Vocabularies may be padded to different sizes. The outputs that only one model has are left out.

    Args:
        student, teacher: Logits (items, classes).
        temperature: T, the divisor of both logits.
        several: Whether any number of the classes holds. The result is then a mean over the classes, of the
            divergence of the distribution between yes and no.
    """
    shared = min(student.shape[-1], teacher.shape[-1])
    student, teacher = student[..., :shared], teacher[..., :shared]
    dtype = torch.promote_types(student.dtype, torch.float32)
    student, teacher = student.to(dtype) / temperature, teacher.to(dtype) / temperature
    if several:
        targets = teacher.sigmoid()
        cross, own = (
            functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
            for logits in (student, teacher)
        )
        return temperature**2 * (cross - own).mean(-1)
    logs = functional.log_softmax(student, -1), functional.log_softmax(teacher, -1)
    return temperature**2 * functional.kl_div(*logs, reduction="none", log_target=True).sum(-1)


class Distillation:
    """The loss of a student: (outputs, batch) → loss, a mean over items.

    Args:
        teacher: A transformers model with the student's tokens and classes, in the same order.
        task_loss: The loss of the task: (outputs, batch) → mean over items.
        items: Selects the logits of the items.
        temperature: T, above 0.
        weight: w, from 0 to 1.
        several: As in `divergence`.
    """

    def __init__(
        self,
        teacher: Any,
        task_loss: Callable[[Any, Mapping[str, Any]], Loss],
        items: Items,
        temperature: float,
        weight: float,
        several: bool = False,
    ):
        self.teacher = teacher.eval().requires_grad_(False)
        self.task_loss, self.items = task_loss, items
        self.temperature, self.weight, self.several = temperature, weight, several
        self._logits: Any = None  # the teacher's logits of the current micro-batch
        self._router_factor = 0.0  # of the router loss in the student's loss
        self._dtype: torch.dtype | None = None  # of the student's weights; None: autocast chooses
        self._inputs = inspect.signature(teacher.forward).parameters

    def __deepcopy__(self, memo: dict) -> "Distillation":
        return self  # copies of a student share the teacher

    def attach(self, student: Any) -> None:
        """Make the teacher run before each training forward of a student, in place.

        Call it after `skip_unlabelled_logits`.
        """
        vars(student)[_TAUGHT] = (self, student.forward)  # bound to a deep copy, too
        student.forward = MethodType(_forward_of(type(student)), student)
        add_row_loss(student, self.row_loss)

    def run_teacher(self, student: Any, inputs: Mapping[str, Any]) -> None:
        """Compute the teacher's logits for the inputs of a student."""
        self._logits, self._router_factor = None, router_loss_factor(student)
        if not student.training or inputs.get("labels") is None:
            return
        weight = next(student.parameters())
        if next(self.teacher.parameters()).device != weight.device:
            self.teacher.to(weight.device)
        given = {name: value for name, value in inputs.items() if name in self._inputs and name != "labels"}
        if "use_cache" in self._inputs:  # with a cache, no padding is removed
            given["use_cache"] = False
        if "output_router_logits" in self._inputs:  # the router loss is of the student's experts alone
            given["output_router_logits"] = False
        head = self.teacher.get_output_embeddings()
        self._dtype = None if torch.is_autocast_enabled(weight.device.type) else weight.dtype
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            if self._dtype is not None:
                stack.enter_context(weights_held_in(self.teacher, self._dtype))
            if skips_logits(student) and hasattr(head, "out_features"):
                stack.enter_context(deferred(head, TOKENS_PER_CHUNK))
            self._logits = self.teacher(**given).logits

    def __call__(self, outputs: Any, batch: Mapping[str, Any]) -> Loss:
        loss, taught = self.task_loss(outputs, batch), self._logits
        self._logits = None
        if taught is None:  # in evaluation mode, or `row_loss` has added the divergence
            return loss
        assert isinstance(loss, torch.Tensor)
        (student, weights), (teacher, _) = (self.items(logits, batch) for logits in (outputs.logits, taught))
        parts = divergence(student, teacher, self.temperature, self.several)
        weights = torch.ones_like(parts) if weights is None else weights.to(parts)
        mean = (parts * weights).sum() / weights.sum().clamp(min=torch.finfo(parts.dtype).tiny)
        router_loss = getattr(outputs, "aux_loss", None)
        beside = 0.0 if router_loss is None else self._router_factor * router_loss.to(loss.device)
        return (1 - self.weight) * (loss - beside) + self.weight * mean + beside

    def row_loss(self) -> RowLoss | None:
        """Return the loss of rows of the current micro-batch, for `add_row_loss`; None without a teacher."""
        taught, dtype, self._logits = self._logits, self._dtype, None
        if taught is None:
            return None
        head = self.teacher.get_output_embeddings()

        @torch.no_grad()
        def of_teacher(positions: torch.Tensor) -> torch.Tensor:
            if not isinstance(taught, DeferredLogits):
                return taught.flatten(0, -2)[positions]
            with nullcontext() if dtype is None else weights_held_in(head, dtype):
                return taught.at(positions)

        def loss(losses: torch.Tensor, logits: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            parts = divergence(logits, of_teacher(positions), self.temperature)
            return (1 - self.weight) * losses + self.weight * parts

        return loss


def distillation_of(model: torch.nn.Module) -> Distillation | None:
    """Return the distillation that is attached to a model, or None."""
    found = next((vars(module)[_TAUGHT] for module in model.modules() if _TAUGHT in vars(module)), None)
    return None if found is None else found[0]


@cache
def _forward_of(model_class: type) -> Any:
    """Return a forward that runs the teacher first. The signature stays, as Trainer and generate read it."""

    @wraps(model_class.forward)  # type: ignore[attr-defined]
    def forward(self: Any, *args: Any, **inputs: Any) -> Any:
        distillation, own = vars(self)[_TAUGHT]
        if args and self.training:
            raise InputError("model.teacher: the student takes keyword arguments only, as in model(**batch)")
        distillation.run_teacher(self, inputs)
        return own(*args, **inputs)

    return forward
