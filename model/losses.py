"""The losses of the paper, token by token; sums and denominators are the caller's.

Shapes: N tokens in one dimension, V vocabulary.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from model.kernels.vocabulary import Predictions, Sampling, sample

_AT_ONCE = 512  # positions


def copy_mixture_nll(logits_NV: Tensor, gate_N: Tensor, input_N: Tensor, original_N: Tensor) -> tuple[Tensor, Tensor]:
    """All-tokens MLM: the output distribution copies the input token with probability D = sigmoid(gate).

    p(x) = D 1[x = input] + (1 - D) softmax(logits)(x) (Clark et al., 2020, section 3.4).

    Returns:
        Negative log-likelihood of the original and whether the most likely token is the original, both ``(N,)``.
    """
    log_copy_N, log_predict_N = F.logsigmoid(gate_N), F.logsigmoid(-gate_N)
    log_original_N = log_predict_N - F.cross_entropy(logits_NV, original_N, reduction="none")
    log_likelihood_N = torch.where(input_N == original_N, torch.logaddexp(log_copy_N, log_original_N), log_original_N)
    with torch.no_grad():
        log_best_N, best_N = logits_NV.log_softmax(-1).max(-1)
        log_input_N = log_predict_N - F.cross_entropy(logits_NV, input_N, reduction="none")
        copies_N = torch.logaddexp(log_copy_N, log_input_N) >= log_predict_N + log_best_N
        is_correct_N = torch.where(copies_N, input_N, best_N) == original_N
    return -log_likelihood_N, is_correct_N


def predict_by_control(
    log_probabilities_V: Tensor, original_N: Tensor, weights_N: Tensor, sampling: Sampling
) -> Predictions:
    """What a generator says and draws that gives every position the same distribution.

    A position that does not count may hold a special token, of probability 0: its loss counts as 0, not as infinity.
    """
    nll_N = (-log_probabilities_V.log_softmax(0)[original_N]).masked_fill(weights_N == 0, 0.0)
    is_correct_N = log_probabilities_V.argmax() == original_N
    drawn = [
        sample(log_probabilities_V.expand(len(part_N), -1), part_N, replace(sampling, uniform_N=uniform_N))
        for part_N, uniform_N in zip(original_N.split(_AT_ONCE), sampling.uniform_N.split(_AT_ONCE), strict=True)
    ]
    return Predictions((nll_N * weights_N).sum(), nll_N, is_correct_N, torch.cat(drawn))


def policy_gradient(log_probability_N: Tensor, reward_N: Tensor, baseline_logit_N: Tensor) -> tuple[Tensor, Tensor]:
    """REINFORCE with a learned baseline: the generator seeks samples on which the discriminator errs.

    The reward of a sample is the discriminator's loss on it, the baseline -log sigmoid(logit), trained
    by cross-entropy towards the reward (Clark et al., 2020, appendix F; Williams, 1992).

    Args:
        log_probability_N: Of each sample under the generator.
        reward_N: The discriminator's loss at each sample, without gradient.
        baseline_logit_N: From the generator's hidden states.

    Returns:
        What is minimised for the policy and for the baseline, both ``(N,)``.
    """
    advantage_N = reward_N + F.logsigmoid(baseline_logit_N.detach())
    baseline_N = F.binary_cross_entropy_with_logits(baseline_logit_N, (-reward_N).exp(), reduction="none")
    return -advantage_N * log_probability_N, baseline_N
