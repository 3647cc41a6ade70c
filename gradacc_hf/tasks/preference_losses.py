"""Losses of preferences: DPO, IPO, ORPO, SimPO, Bradley-Terry and KTO.

| `data.loss` | an example | loss |
|---|---|---|
| `dpo` | a pair | −log σ(β(r_w − r_l)) |
| `dpo`, `label_smoothing` ε | a pair | −(1−ε) log σ(β(r_w − r_l)) − ε log σ(−β(r_w − r_l)) |
| `dpo`, `variant: hinge` | a pair | max(0, 1 − β(r_w − r_l)) |
| `dpo`, `variant: ipo` | a pair | (r_w/n_w − r_l/n_l − 1/(2β))² |
| `orpo` | a pair | −p_w/n_w − β log σ(log odds(y_w) − log odds(y_l)) |
| `simpo` | a pair | −log σ(β p_w/n_w − β p_l/n_l − γ) |
| `reward` | a pair | −log σ(s_w − s_l) |
| `kto` | an answer | λ_D (1 − σ(β(r − z))) or λ_U (1 − σ(β(z − r))) |

w is the chosen answer and l the rejected one. p is the log-probability of an answer: a sum over tokens. n is
the number of tokens of the answer. r is p minus the reference log-probability, s a score. odds(y) is
P/(1−P) of P = exp(p/n). z is the mean of r over answers to other prompts, at least 0.

Sources: DPO: Rafailov et al. 2023, arXiv 2305.18290, equation 7. Label smoothing: Mitchell 2023, "A note on
DPO with noisy preferences". Hinge: Zhao et al. 2023, arXiv 2305.10425. IPO: Azar et al. 2023, arXiv
2310.12036, equation 17. ORPO: Hong et al. 2024, arXiv 2403.07691. SimPO: Meng et al. 2024, arXiv 2405.14734,
equation 6. Reward: Bradley & Terry 1952; Ouyang et al. 2022, arXiv 2203.02155. KTO: Ethayarajh et al. 2024,
arXiv 2402.01306, equation 7.

IPO divides by n, as TRL does. All losses are means over the examples of a window.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from accelerate.utils import DistributedType
from torch.nn import functional

from gradacc_hf.accumulation.window import Window
from gradacc_hf.errors import InputError
from gradacc_hf.tasks.answer_scores import KL_ROWS, REFERENCE, TOKENS, rows_of, scores_of

Tensor = torch.Tensor


@dataclass(frozen=True)
class PairLoss:
    """The loss of pairs, a mean over the pairs of a batch: (outputs, batch) → loss.

    Attributes:
        name: The value of `data.loss`.
        variant: "sigmoid", "hinge" or "ipo", for `dpo`.
        beta: Factor of the rewards; of the odds ratio for `orpo`; the regularisation for `ipo`.
        gamma: Margin of `simpo`.
        label_smoothing: Share of pairs assumed to be the wrong way round, for `dpo` and `simpo`.
    """

    name: str
    variant: str = "sigmoid"
    beta: float = 0.1
    gamma: float = 1.0
    label_smoothing: float = 0.0
    weighs_labels: ClassVar[bool] = False  # read by the preflight check: token ids have no class weights

    def __call__(self, outputs: Any, batch: Mapping[str, Any]) -> Tensor:
        scores = scores_of(outputs)
        if TOKENS not in batch:  # rows without their pairs, on which padding is checked
            return scores.mean()
        return self.mean(scores.view(-1, 2), batch[REFERENCE], batch[TOKENS])

    def mean(self, scores: Tensor, reference: Tensor, tokens: Tensor) -> Tensor:
        """Return the mean loss of pairs.

        Args:
            scores: Log-probabilities, or scores of a reward model, of the chosen and the rejected answer
                (pairs, 2).
            reference: Reference log-probabilities (pairs, 2).
            tokens: Numbers of tokens (pairs, 2).
        """
        reward = self.reward(scores, reference, tokens)
        margin = reward[:, 0] - reward[:, 1]
        if self.name == "dpo" and self.variant == "hinge":
            return torch.relu(1 - margin).mean()
        if self.name == "dpo" and self.variant == "ipo":
            ratio = (scores - reference) / tokens
            return functional.mse_loss(
                ratio[:, 0] - ratio[:, 1], torch.full_like(margin, 1 / (2 * self.beta))
            )
        if self.name == "orpo":
            mean = scores / tokens
            log_odds = mean - log_one_minus_exp(mean)
            odds_ratio = log_odds[:, 0] - log_odds[:, 1]
            return (self.beta * functional.softplus(-odds_ratio) - mean[:, 0]).mean()
        margin = margin - self.gamma if self.name == "simpo" else margin
        target = torch.full_like(margin, 1 - self.label_smoothing)
        return functional.binary_cross_entropy_with_logits(margin, target)

    def reward(self, scores: Tensor, reference: Tensor, tokens: Tensor) -> Tensor:
        """Return the reward of each answer, in the shape of the scores."""
        if self.name == "dpo":
            return self.beta * (scores - reference)
        return self.beta * scores / tokens if self.name in ("orpo", "simpo") else scores


def log_one_minus_exp(value: Tensor) -> Tensor:
    """Return log(1 − exp(value)) of values below 0, without cancellation (Mächler 2012).

    Values are at most −1e-6: the logarithm of 0 has no gradient.
    """
    value = value.clamp(max=-1e-6)
    near = value > -0.693147
    log_expm1 = torch.log(-torch.expm1(torch.where(near, value, -1.0)))
    return torch.where(near, log_expm1, torch.log1p(-torch.exp(torch.where(near, -1.0, value))))


class KtoLoss:
    """The loss of desirable and undesirable answers, a `WindowLoss`.

    The reference point z is a mean over all examples of the window. Each example has an answer to another
    prompt (`KL_ROWS`) for it. `look_ahead` computes these answers without gradients, over all processes.
    The loss of each micro-batch is then a mean over its examples. Without `look_ahead`, z is a mean over the
    batch, whose forward computes the answers to other prompts, too.

    Args:
        beta: Factor of the rewards.
        desirable_weight, undesirable_weight: Weights of both kinds of answers.
    """

    def __init__(self, beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0):
        self.beta, self.weights = beta, (desirable_weight, undesirable_weight)
        self.point: Tensor | None = None
        """z of the current window, until the last micro-batch."""
        self._window: Window | None = None

    @property
    def knows_point(self) -> bool:
        """Whether z of the current window is known. A window may be left before the last micro-batch."""
        return self._window is not None and self._window.position is not None

    @torch.no_grad()
    def look_ahead(self, model: torch.nn.Module, window: Window) -> None:
        """Compute z of a window over all processes."""
        accelerator = window.accelerator
        if window.measures_noise:
            raise InputError(
                "noise_every: KTO's reference point is a mean over the whole window, so the gradient noise "
                "scale cannot be measured; give the loader noise_every=0"
            )
        if accelerator.distributed_type != DistributedType.FSDP:
            # DDP's forward is collective, and processes have unequal numbers of micro-batches.
            model = accelerator.unwrap_model(model)
        sums, self.point, self._window = torch.zeros(2, device=accelerator.device), None, None
        for batch in window.forward_pass():
            scores = scores_of(model(**rows_of(batch, KL_ROWS)))
            if window.micro_batch.num_items:  # an idle micro-batch adds nothing
                ratios = scores.float() - batch[REFERENCE][:, 1]
                sums += torch.stack([ratios.sum(), ratios.new_tensor(len(ratios))])
        total, number = accelerator.reduce(sums, reduction="sum")
        self.point, self._window = (total / number).clamp(min=0), window

    def __call__(self, outputs: Any, batch: Mapping[str, Any]) -> Tensor:
        scores, number = scores_of(outputs), len(batch[TOKENS])
        point: Any = self.point
        if not self.knows_point:
            point = self.reference_point(scores[number:].detach(), batch[REFERENCE][:, 1])
        elif self._window is not None and self._window.position == len(self._window) - 1:
            self.point = self._window = None
        return self.mean(scores[:number] - batch[REFERENCE][:, 0], batch["desirable"], point)

    def reference_point(self, scores: Tensor, reference: Tensor) -> Tensor:
        """Return z: the mean log-ratio of answers to other prompts (answers,), at least 0."""
        return (scores - reference).mean().clamp(min=0)

    def mean(self, ratios: Tensor, desirable: Tensor, point: Tensor) -> Tensor:
        """Return the mean loss of answers.

        Args:
            ratios: Log-probabilities minus reference log-probabilities (answers,).
            desirable: 1 for desirable answers, else 0 (answers,).
            point: z.
        """
        sign, (of_good, of_bad) = 2 * desirable - 1, self.weights
        weights = of_good * desirable + of_bad * (1 - desirable)
        return (weights * torch.sigmoid(-self.beta * sign * (ratios - point))).mean()
