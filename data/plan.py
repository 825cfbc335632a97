# SPDX-License-Identifier: MIT
"""What a run needs, from the model's config and the pairs alone: memory, disk and work.

alphapo.py asks make_plan before it loads a weight, and prints the plan alone with --plan.
"""

import math
import os
import resource
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import torch
import transformers

import alphapo
from alphapo import WORLD_SIZE, UserError, row_tokens, token_counts

GIB = 2**30

# bfloat16 operations per second from data sheets, without sparsity; the first name that fits
PEAKS = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "A100": 312e12}
PEAKS |= {"L40S": 362e12, "RTX 4090": 165e12}
PLACEMENTS = {  # where masters and gradient sums live beside a GPU, the fastest first
    "all on the GPU": ("cuda", "cuda"),
    "masters on the host": ("cpu", "cuda"),
    "masters and gradient sums on the host": ("cpu", "cpu"),
}


def empty_model(name):
    """The model on the meta device, without weights, or UserError."""
    config = alphapo.load_pretrained(transformers.AutoConfig, name)
    with alphapo.user_error(f"--model {name}", "choose a causal language model"):
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        if model.get_output_embeddings() is None:
            raise ValueError("it has no projection onto a vocabulary")
        return model


def pair_flops(model, pairs):
    """Floating-point operations to train on each pair, (pairs,): what is needed, without repeats.

    Six per weight and token, the projection for response tokens only, and twelve per layer, channel
    of attention and (query, key) that attends. Source: PaLM, arXiv 2204.02311, appendix B.
    """
    config, head = model.config.get_text_config(), model.get_output_embeddings().weight
    tied = head is model.get_input_embeddings().weight
    body = model.num_parameters() - head.numel() * (1 if tied else 2)
    heads = getattr(config, "num_attention_heads", 0)  # Mamba has none
    channels = heads * (getattr(config, "head_dim", None) or config.hidden_size // max(heads, 1))
    prompt, chosen, rejected = token_counts(pairs).T.astype(float)
    responses = chosen + rejected
    attending = (prompt**2 + chosen**2 + rejected**2) / 2 + prompt * responses
    attention = 12 * config.num_hidden_layers * channels * attending
    return 6 * (body * (prompt + responses) + head.numel() * responses) + attention


def memory_needed(model, config, longest, master_device, sum_device):
    """GiB by kind at the peak of a step, on the device and on the host: {device: {kind: GiB}}.

    Weights, gradients, masters and moments are exact; activations are an estimate, fitted to what
    Llama, Mistral and Gemma-2 layers keep for the backward pass. longest: tokens of a row.
    """
    text, count = model.config.get_text_config(), model.num_parameters() / GIB
    item = 2 if config.dtype == "bfloat16" else 4
    tokens = min(max(config.micro_tokens, longest), config.batch_size * longest) / GIB
    width, layers, vocabulary = text.hidden_size, text.num_hidden_layers, text.vocab_size
    hidden = getattr(text, "intermediate_size", None) or 4 * width
    layer = tokens * item * (16 * width + 4 * hidden)
    if model.config._attn_implementation == "eager":  # it keeps the scores of every head
        layer += 15 * tokens * getattr(text, "num_attention_heads", 0) * longest
    chunk = min(tokens * vocabulary, alphapo.ProjectedLogps.chunk[config.device] / GIB)
    logits = 12 * chunk + 15 * vocabulary * width / GIB
    needs = {"cpu": {"python": 0.5}}
    device = needs.setdefault(config.device, {})
    device["weights"] = item * count
    device["activations"] = layer * layers + logits
    if config.gradient_checkpointing:
        device["activations"] = tokens * item * width * layers + max(layer, logits)
    device["masks"] = 3 * tokens * longest * item
    needs[sum_device]["gradient sums"] = 4 * count
    copied = item == 2 or master_device != config.device
    needs[master_device]["masters and moments"] = (12 if copied else 8) * count / WORLD_SIZE
    return needs


def totals(needs):
    return {device: sum(sizes.values()) for device, sizes in needs.items()}


def free_memory(device):
    """GiB that a run may take: a GPU loses 5 % to fragmentation, and a container has a limit."""
    if device == "cuda":
        return 0.95 * torch.cuda.mem_get_info()[0] / GIB
    limit = Path("/sys/fs/cgroup/memory.max")
    limit = limit.read_text().strip() if limit.exists() else "max"
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return (min(total, int(limit)) if limit.isdigit() else total) / GIB


def peak_memory(device):
    """GiB that the process took at most, on the GPU or on a machine without one."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / GIB
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


def print_peak(device):
    print(f"the largest micro-batches took {peak_memory(device):.2f} GiB, forward and backward")


def check_pairs(config, model, pairs):
    """UserError where the pairs do not suit the model."""
    text, longest = model.config.get_text_config(), int(row_tokens(pairs, plain=True).max()) // 2
    positions = getattr(text, "max_position_embeddings", None) or longest + 7
    positions = positions // 8 * 8  # make_rows rounds widths up to 8
    if longest > positions:
        what = f"a pair takes {longest} positions, and it has {positions}"
        raise UserError(f"--model {config.model}: {what}; pass --max-length {positions}")
    if max(ids.max() for pair in pairs for ids in pair[:3]) >= text.vocab_size:
        raise UserError(f"--model {config.model}: the tokenizer has ids beyond the embedding")


def choose_places(config, model, longest):
    """(devices of masters and of gradient sums, memory needed, whether it fits): the first that
    fits, or else the last."""
    on_gpu = config.device == "cuda" and WORLD_SIZE == 1
    choices = list(PLACEMENTS.values()) if on_gpu else [(config.device, config.device)]
    choices = [places for places in choices if config.master_device in ("auto", places[0])]
    if not choices:
        raise UserError(f"--master-device {config.master_device}: not in this run; leave it out")
    for places in choices:
        needs = memory_needed(model, config, longest, *places)
        fits = all(gib <= free_memory(device) for device, gib in totals(needs).items())
        if fits:
            break
    return places, needs, fits


def print_plan(config, plan):
    """With --plan also what is needed for what, and what one GPU would need, on any machine."""
    ratio = f"(gamma/beta {config.gamma / config.beta:g})"
    print(f"alpha {config.alpha:g}, beta {config.beta:g}, gamma {config.gamma:g} {ratio}")
    print(f"{plan['parameters'] / 1e6:,.1f} M parameters in {config.dtype} on {config.device}")
    print(f"{plan['tokens']:,} tokens in {plan['steps']} steps of {config.batch_size} pairs")
    for device, gib in totals(plan["memory_gib"]).items():
        print(f"memory on {device}: {gib:.1f} GiB, of {free_memory(device):.0f}")
        for kind, part in plan["memory_gib"][device].items() if config.plan else ():
            print(f"  {kind:20}{part:8.2f}")
    print(f"disk: {plan['disk_gib']:.2f} GiB; work: {plan['pflop']:.3g} PFLOP")
    for title, needs in plan["one_gpu_gib"].items() if config.plan else ():
        print(f"one GPU, {title}: {needs['cuda']:.1f} GiB, host {needs['cpu']:.1f}")


def make_plan(config, pairs, eval_pairs):
    """Print and return what a run needs and where its masters go.

    Raises UserError where the pairs do not suit the model, or, but for --plan, where memory or disk
    cannot hold the run.
    """
    model, everything = empty_model(config.model), [*pairs, *eval_pairs]
    config = replace(config, batch_size=min(config.batch_size, len(pairs)))
    check_pairs(config, model, everything)
    count, longest = model.num_parameters(), int(row_tokens(everything, config.plain_rows).max())
    longest = longest // 2 if config.plain_rows else longest
    steps = math.ceil(len(pairs) / config.batch_size) * config.epochs
    steps = min(config.max_steps or steps, steps)
    epochs = min(steps * config.batch_size / len(pairs), config.epochs)
    card = torch.cuda.get_device_name() if config.device == "cuda" else ""
    places, needs, fits = choose_places(config, model, longest)
    gpu = replace(config, device="cuda", dtype="bfloat16", gradient_checkpointing=True)
    gpu.micro_tokens = config.micro_tokens if card else 16384
    plan = dict(
        parameters=count,
        steps=steps,
        tokens=int(token_counts(pairs).sum() * epochs),
        pflop=float(pair_flops(model, pairs).sum() * epochs) / 1e15,
        peak_flops=next((peak for name, peak in PEAKS.items() if name in card), None),
        # a checkpoint has 12 bytes per parameter, and three exist for a moment; the model has 2
        disk_gib=(2 + 12 * (3 if config.save_every else 1)) * count / GIB,
        places=places,
        memory_gib=needs,
        one_gpu_gib={
            title: totals(memory_needed(model, gpu, longest, *other))
            for title, other in PLACEMENTS.items()
        },
    )
    print_plan(config, plan)
    if not config.plan and not fits:
        remedy = "see --plan; lower --micro-tokens, use more GPUs or a smaller model"
        raise UserError(f"--model {config.model}: does not fit in this machine's memory; {remedy}")
    out = Path(config.out).absolute()
    room = shutil.disk_usage(next(path for path in [out, *out.parents] if path.exists())).free / GIB
    if room < plan["disk_gib"] and not config.plan and not config.resume:
        raise UserError(f"--out {out}: the disk has no room for {plan['disk_gib']:.1f} GiB")
    return plan
