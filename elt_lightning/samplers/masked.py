"""Iterative parallel decoding: start from masks, keep the most confident tokens, guess the rest again.

Source: MaskGIT (google-research/maskgit, ``libml/parallel_decode.py``), with the paper's sampling temperature.
"""

import torch
from torch import Tensor

from elt_lightning.processes.base import check_process
from elt_lightning.processes.conditioning import Condition
from elt_lightning.processes.masking import MaskingProcess, num_still_masked, ranks
from elt_lightning.processes.noise import Stream, categorical, gumbel, over_steps, uniform
from elt_lightning.samplers.base import Loops, Predict, Sampler
from elt_lightning.samplers.guidance import Guidance
from elt_lightning.samplers.guided_steps import GuidedSteps
from elt_lightning.samplers.loop_schedule import LoopSchedule


class MaskGITSampler(Sampler):
    """Cosine unmasking in K steps.

    At step k every masked token is sampled from softmax(logits / STemp_k), STemp_k = bias + scale·(1 − (k + 1)/K)
    (paper, section 4.1). Its confidence is log p under the untempered, guided logits plus
    choice_temperature·(1 − (k + 1)/K)·Gumbel noise; the least confident are masked again, as many as the cosine
    schedule says.

    Letters: B batch, T tokens, V codes, K steps.

    Args:
        process: has the mask token.
        num_classes: the null class of guidance.
        steps: K; the paper uses 24 for images, 12 or 24 for videos.
        temperature_bias: sampling temperature at the last step.
        temperature_scale: what is added to it at the start.
        choice_temperature: noise on the confidence; MaskGIT and MAGVIT use 4.5.
        guidance: classifier-free guidance.
        carry_state: as in :class:`~elt_lightning.samplers.base.Sampler`.
        loop_schedule: as there.
    """

    def __init__(
        self,
        process: MaskingProcess,
        num_classes: int,
        steps: int = 24,
        temperature_bias: float = 0.5,
        temperature_scale: float = 0.8,
        choice_temperature: float = 4.5,
        guidance: Guidance | None = None,
        carry_state: bool | None = None,
        loop_schedule: LoopSchedule | None = None,
    ) -> None:
        check_process(self, process, MaskingProcess)
        super().__init__(process, num_classes, steps, guidance, carry_state, loop_schedule)
        if temperature_bias <= 0 or temperature_scale < 0 or choice_temperature < 0:
            raise ValueError("sampling needs temperature_bias > 0, temperature_scale >= 0 and choice_temperature >= 0")
        if self.guidance.channels is not None:
            raise ValueError(f"tokens have no channels to guide some of: leave out channels {self.guidance.channels}")
        self.masking = process
        self.temperature_bias, self.temperature_scale = temperature_bias, temperature_scale
        self.choice_temperature = choice_temperature

    def sample(
        self,
        predict: Predict,
        shape: tuple[int, ...],
        condition: Condition,
        loops: Loops,
        seeds: Tensor,
        known: Tensor | None = None,
        spent: list[Tensor] | None = None,
    ) -> Tensor:
        """Decode tokens (B, T) int64 in [0, V); ``known`` holds V where nothing is given. See the base class."""
        tokens = known if known is not None else seeds.new_full((len(seeds), *shape), self.masking.codebook_size)
        num_unknown = self.masking.is_hidden(tokens).sum(1)
        numbers = over_steps(uniform, seeds, self.steps, Stream.SAMPLED_TOKENS, shape)
        noise = over_steps(gumbel, seeds, self.steps, Stream.SAMPLED_CONFIDENCE, shape)
        guided = GuidedSteps(self, predict, loops, spent)
        for step in range(self.steps):
            masked = self.masking.is_hidden(tokens)
            logits = guided(step, tokens, condition).float()
            guess = torch.where(masked, categorical(logits / self.temperature(step), numbers[step]), tokens)
            log_probability = logits.log_softmax(-1).gather(-1, guess[..., None]).squeeze(-1)
            confidence = log_probability + self.choice_temperature * self._to_come(step) * noise[step]
            still_masked = num_still_masked(num_unknown, masked.sum(1), step, self.steps)
            remasked = ranks(confidence.masked_fill(~masked, torch.inf)) < still_masked[:, None]
            tokens = self.masking.hide(guess, remasked)
        return tokens

    def change(self, now: Tensor, before: Tensor, x: Tensor) -> Tensor:
        """Measure the mean of KL(now ‖ before) over the hidden positions of tokens x (b, T); 0 where none is hidden."""
        log_p, log_q = now.float().log_softmax(-1), before.float().log_softmax(-1)
        divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
        hidden = self.masking.is_hidden(x)
        return (divergence * hidden).sum(-1) / hidden.sum(-1).clamp(min=1)

    def temperature(self, step: int) -> float:
        """Return STemp of step k (0-based)."""
        return self.temperature_bias + self.temperature_scale * self._to_come(step)

    def _to_come(self, step: int) -> float:
        """Return the share of the steps that come after step k: 1 − (k + 1)/K."""
        return 1 - (step + 1) / self.steps
