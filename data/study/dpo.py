# SPDX-License-Identifier: MIT
"""DPO through the loss hook of alphapo.train: an example of a loss that needs a reference model."""

import functools

import torch

import alphapo

PAIRS_PER_BATCH = 8


def dpo_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta):
    """The DPO loss, -log sigmoid(beta * ((c - ref_c) - (r - ref_r))) (arXiv 2305.18290, eq. 7).

    Args:
        chosen_logps, rejected_logps: log-probability (nats) of whole responses, summed over their
            tokens, (pairs,) each.
        ref_chosen_logps, ref_rejected_logps: the same under the reference model, (pairs,) each.
        beta: scale of the implicit reward.

    Returns:
        (losses, chosen_rewards, rejected_rewards), (pairs,) each; rewards carry no gradient.
    """
    chosen_rewards = beta * (chosen_logps - ref_chosen_logps)
    rejected_rewards = beta * (rejected_logps - ref_rejected_logps)
    losses = -torch.nn.functional.logsigmoid(chosen_rewards - rejected_rewards)
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


@functools.cache  # all DPO runs of a process start from the same model and use the same pairs
@torch.no_grad()
def reference_logps(model_name, data, eval_data):
    """Mean log-probabilities of all pairs before training: {"file:line": [chosen, rejected]}."""
    config = alphapo.Config(model=model_name, data=data, eval_data=eval_data)
    _, train_pairs, eval_pairs, _, _ = alphapo.load_data(alphapo.resolve(config))
    model = alphapo.load_model(model_name)
    plain_rows = bool(alphapo.check_model(model, train_pairs)[0])  # where shared rows are wrong
    reference = {}
    for pairs in (train_pairs, eval_pairs):
        for first in range(0, len(pairs), PAIRS_PER_BATCH):
            batch = pairs[first : first + PAIRS_PER_BATCH]
            logps = alphapo.pair_logps(model, batch, plain_rows)
            for pair, both in zip(batch, torch.stack(logps, 1)):  # (pairs, 2)
                reference[pair.place] = both
    return reference


class ReferenceDPO:
    """DPO as a loss_fn. The hook gives means over tokens, and DPO takes sums: hence the lengths."""

    def __init__(self, config, beta):
        self.beta = beta
        self.reference = reference_logps(config.model, config.data, config.eval_data)

    def __call__(self, chosen_logps, rejected_logps, pairs, batch):
        device = chosen_logps.device
        lengths = [[len(pairs[i].chosen), len(pairs[i].rejected)] for i in batch]
        lengths = torch.tensor(lengths, device=device)  # (pairs, 2)
        reference = torch.stack([self.reference[pairs[i].place] for i in batch]).to(device)
        chosen, rejected = (torch.stack([chosen_logps, rejected_logps], 1) * lengths).unbind(1)
        ref_chosen, ref_rejected = (reference * lengths).unbind(1)
        return dpo_loss(chosen, rejected, ref_chosen, ref_rejected, self.beta)
