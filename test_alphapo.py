# SPDX-License-Identifier: MIT
"""The tests of alphapo.py: pytest test_alphapo.py (offline, on a CPU).

The mathematics is checked against closed forms in 60 decimal digits, finite differences and the models' own forward
pass; the behaviour by running the script.
"""

import fcntl
import importlib.util
import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from decimal import Decimal, localcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, processors
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

import alphapo

ROOT = Path(__file__).parent
TINY = ROOT / "data" / "tiny"

# ------------------------------------------------------------------------------------------------ the loss

ALPHAS = [-4.0, -1.0, -0.25, -1e-4, -1e-8, 0.0, 1e-8, 1e-6, 1e-4, 1e-2, 0.1, 0.25, 1.0, 2.0, 4.0]
LOGPS = [-1e-6, -0.01, -0.9, -1.1, -1.30, -1.31, -5.0, -30.0, -75.0, -110.0, -200.0]


def exact(chosen, rejected, alpha, beta, gamma):
    """Margin, then loss, rewards and gradients from the closed form, in 60 digits and exponents without bound."""
    with localcontext() as context:
        context.prec, context.Emax, context.Emin = 60, 10**15, -(10**15)
        c, r, a, b, g = (Decimal(float(x)) for x in (chosen, rejected, alpha, beta, gamma))
        reward = (lambda x: x) if a == 0 else (lambda x: (1 - (-a * x).exp()) / a)
        margin = b * (reward(c) - reward(r)) - g
        if abs(margin) > 10**6:  # exp(-10^6) is 0 in any float
            loss, push = (Decimal(0), Decimal(0)) if margin > 0 else (-margin, Decimal(1))
        else:
            x, push = (-margin).exp(), 1 / (1 + margin.exp())
            loss = x - x * x / 2 if margin > 100 else (1 + x).ln()
        results = loss, b * reward(c), b * reward(r), -push * b * (-a * c).exp(), push * b * (-a * r).exp()
        return margin, results


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_loss_rewards_and_gradients_equal_the_closed_form(alpha, dtype):
    grid = torch.tensor([(c, r) for c in LOGPS for r in LOGPS], dtype=dtype)
    chosen, rejected = (column.clone().requires_grad_() for column in grid.unbind(1))
    results = alphapo.alphapo_loss(chosen, rejected, alpha, 2.5, 0.1)
    assert all(x.dtype == dtype and x.shape == (len(grid),) for x in results)
    assert not results[1].requires_grad and not results[2].requires_grad
    results += torch.autograd.grad(results[0].sum(), (chosen, rejected))
    limits, compared = torch.finfo(dtype), 0
    for i, (c, r) in enumerate(grid.tolist()):
        margin, true = exact(c, r, alpha, 2.5, 0.1)
        if min(-alpha * c, -alpha * r) > 709:
            continue  # both rewards are beyond float64, and so is their difference
        # the rounding of the result, and of float64 exponents on the way: alpha * logps, and the difference of the
        # rewards where the loss is its exponential
        rewards = float(min(abs(true[1]) + abs(true[2]), 10**4)) if margin > 0 else 0.0
        rounding = 2 * limits.eps + 5e-16 * (4 + abs(alpha * c) + abs(alpha * r) + rewards)
        for value, x in zip(results, true, strict=True):
            if abs(x) < Decimal(limits.max) and (abs(x) > Decimal(limits.tiny) or x == 0):
                assert abs(Decimal(value[i].item()) - x) <= abs(x) * Decimal(rounding), (
                    c,
                    r,
                    value[i].item(),
                    x,
                )
                compared += 1
    assert compared > 300


@pytest.mark.parametrize("sign", [-1, 1])
def test_alpha_to_zero_is_simpo(sign):
    chosen, rejected = (
        torch.tensor(x, requires_grad=True) for x in ([-1.3, -0.2, -9.0], [-1.31, -3.0, -0.5])
    )
    simpo = -torch.nn.functional.logsigmoid(2.5 * (chosen - rejected) - 0.25)
    want = (simpo, *torch.autograd.grad(simpo.sum(), (chosen, rejected)))
    for alpha in (0.0, sign * 1e-300, sign * 1e-12, sign * 1e-8):
        losses, *_ = alphapo.alphapo_loss(chosen, rejected, alpha, 2.5, 0.25)
        got = (losses, *torch.autograd.grad(losses.sum(), (chosen, rejected)))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


def gradients(chosen, rejected, alpha, gamma=0.1):
    logps = [torch.tensor([x], dtype=torch.float64, requires_grad=True) for x in (chosen, rejected)]
    return [
        abs(g.item())
        for g in torch.autograd.grad(alphapo.alphapo_loss(*logps, alpha, 2.5, gamma)[0].sum(), logps)
    ]


def test_limits_of_large_alpha():
    for chosen, rejected in ((-1.0, -2.0), (-2.0, -1.0), (-1.0, -1.0)):
        assert max(gradients(chosen, rejected, -50.0)) < 1e-20  # alpha -> -inf: nothing is learnt
    assert max(gradients(-1.0, -2.0, 50.0)) == 0.0  # alpha -> inf, chosen likelier: done
    for alpha in (5.0, 10.0, 50.0):  # else without bound, as exp(alpha * |logps|)
        np.testing.assert_allclose(gradients(-2.0, -1.0, alpha), 2.5 * np.exp([2 * alpha, alpha]), rtol=1e-12)
        tie = 2.5 * math.exp(alpha) / (1 + math.exp(-0.1))
        np.testing.assert_allclose(gradients(-1.0, -1.0, alpha), [tie, tie], rtol=1e-12)


def test_a_rejected_response_beyond_float64_is_done_and_a_chosen_one_is_not_silent():
    assert gradients(-1.0, -4000.0, 0.25) == [0.0, 0.0]
    loss, *_ = alphapo.alphapo_loss(torch.tensor([-4000.0]), torch.tensor([-1.0]), 0.25, 2.5, 0.1)
    assert torch.isinf(loss).all()


@pytest.mark.parametrize("alpha", [-1.0, 0.0, 1e-6, 0.25, 2.0])
def test_gradcheck(alpha):
    torch.manual_seed(0)
    logps = [(-3 * torch.rand(6, dtype=torch.float64)).requires_grad_() for _ in range(2)]
    assert torch.autograd.gradcheck(lambda c, r: alphapo.alphapo_loss(c, r, alpha, 2.5, 0.1)[0], logps)


def test_shapes_that_would_broadcast_are_refused():
    with pytest.raises(ValueError, match="differ"):
        alphapo.alphapo_loss(torch.zeros(3), torch.zeros(3, 1), 0.25, 2.5, 0.1)


def test_the_loss_runs_when_cut_out_of_the_file():
    section = (ROOT / "alphapo.py").read_text().split("# ----")
    block = next(part for part in section if part.partition("\n")[0].endswith(" the loss")).partition("\n")[2]
    alone = {}
    exec("import torch\n" + block, alone)
    logps = torch.tensor([-0.9, -1.2]), torch.tensor([-1.1, -1.0])
    for a, b in zip(
        alone["alphapo_loss"](*logps, 0.25, 2.5, 0.1), alphapo.alphapo_loss(*logps, 0.25, 2.5, 0.1)
    ):
        assert torch.equal(a, b)


# ------------------------------------------------------------------------------------------------ log-probabilities

SMALL = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
SMALL |= dict(
    num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2
)
MODELS = {
    "llama": dict(model_type="llama"),
    "mistral": dict(model_type="mistral", sliding_window=None),
    "mistral, window of 5": dict(model_type="mistral", sliding_window=5),
    "qwen2": dict(model_type="qwen2"),
    "qwen2, windows of 5": dict(
        model_type="qwen2", use_sliding_window=True, sliding_window=5, max_window_layers=1
    ),
    "qwen3": dict(model_type="qwen3", head_dim=8),
    "gemma2": dict(model_type="gemma2", head_dim=8, sliding_window=5, final_logit_softcapping=2.0),
    "gemma3": dict(model_type="gemma3_text", head_dim=8, sliding_window=5, sliding_window_pattern=2),
    "phi3": dict(model_type="phi3", attention_dropout=0.1, resid_pdrop=0.1, embd_pdrop=0.1),
    "gpt2": dict(model_type="gpt2", n_embd=32, n_layer=2, n_head=4, n_positions=256, vocab_size=97),
}
PLAIN_MODELS = {
    "granite": dict(model_type="granite", logits_scaling=3.0),  # scales the logits after the projection
    "phi": dict(model_type="phi"),  # adds a bias
    "falcon_h1": dict(  # attention and state space in one layer
        model_type="falcon_h1",
        mamba_d_ssm=32,
        mamba_n_heads=4,
        mamba_d_head=8,
        mamba_d_state=8,
        mamba_n_groups=1,
    ),
    "mamba": dict(model_type="mamba", state_size=4),
}


def small_model(name, seed=0):
    """A random model, its weights large enough that soft caps, windows and biases show."""
    torch.manual_seed(seed)
    settings = SMALL | (MODELS | PLAIN_MODELS)[name]
    config = AutoConfig.for_model(**settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for param in model.parameters():
        param.data += 0.1 * torch.randn_like(param)
    return model


def random_pairs(count=5, seed=0, vocabulary=97):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 25, (count, 3))
    return [tuple(rng.integers(3, vocabulary, size).astype(np.int32) for size in row) for row in sizes]


def own_logps(model, prompt, response):
    """Mean log-probability of a response from the model's own forward pass over the one sequence, unpadded."""
    ids = torch.tensor(np.concatenate([prompt, response]), dtype=torch.long)[None]
    logps = model(input_ids=ids, use_cache=False).logits[0].double().log_softmax(1)
    return torch.stack([logps[i - 1, ids[0, i]] for i in range(len(prompt), ids.shape[1])]).mean()


def check_logps(model, plain):
    pairs = random_pairs()
    chosen, rejected = alphapo.pair_logps(model, alphapo.make_rows(pairs, plain))
    want = torch.stack([torch.stack([own_logps(model, p, c), own_logps(model, p, r)]) for p, c, r in pairs])
    torch.testing.assert_close(torch.stack([chosen, rejected], 1).double(), want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_shared_rows_give_the_models_own_logps(name):
    model = small_model(name)
    check_logps(model, plain=False)
    check_logps(model, plain=True)
    assert alphapo.why_plain(model, random_pairs()[0]) is None


@pytest.mark.parametrize("name", PLAIN_MODELS)
@torch.no_grad()
def test_the_fall_back_is_taken_where_shared_rows_are_wrong_and_is_right(name):
    model = small_model(name)
    assert alphapo.why_plain(model, random_pairs()[0])
    check_logps(model, plain=True)


@torch.no_grad()
def test_the_comparison_notices_a_state_that_runs_along_the_row(monkeypatch):
    """Without the list of kinds of layers too: the figures alone tell."""
    model = small_model("llama")
    own_mask = alphapo.attention_masks
    monkeypatch.setattr(
        alphapo, "attention_masks", lambda *args: own_mask(*args).triu(1)
    )  # the rejected sees all
    assert "off by" in alphapo.why_plain(model, random_pairs()[0])


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("chunk", [1, 97 * 7, 2**24])
def test_projection_in_chunks_has_the_plain_values_and_gradients(monkeypatch, chunk, softcap):
    monkeypatch.setattr(alphapo.ProjectedLogps, "chunk", chunk)
    torch.manual_seed(0)
    hidden, weight = torch.randn(40, 16, requires_grad=True), torch.randn(97, 16, requires_grad=True)
    targets, push = torch.randint(97, (40,)), torch.randn(40)
    logits = (hidden @ weight.T).double()
    logits = logits if softcap is None else softcap * (logits / softcap).tanh()
    plain = logits.log_softmax(1).gather(1, targets[:, None])[:, 0]
    logps = alphapo.ProjectedLogps.apply(hidden, weight, targets, softcap)
    torch.testing.assert_close(logps.double(), plain, rtol=1e-5, atol=1e-5)
    ours = torch.autograd.grad((logps * push).sum(), (hidden, weight))
    for a, b in zip(ours, torch.autograd.grad((plain * push).sum(), (hidden, weight)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def as_pairs(triples):
    lengths = np.cumsum([len(part) for triple in triples for part in triple]).reshape(-1, 3)
    bounds = np.c_[np.r_[0, lengths[:-1, 2]], lengths]
    tokens = np.concatenate([part for triple in triples for part in triple])
    return alphapo.Pairs(tokens, bounds, [f"pairs:{i + 1}" for i in range(len(triples))], Counter())


def LOSS(chosen_logps, rejected_logps, *_):
    return alphapo.alphapo_loss(chosen_logps, rejected_logps, 0.25, 2.5, 0.1)


def metrics_and_gradients(model, micro_tokens, plain=False):
    pairs = as_pairs(random_pairs(9))
    model.zero_grad()
    metrics = alphapo.run_pairs(
        alphapo.Policy(model), pairs, list(range(9)), LOSS, micro_tokens, plain, train=True
    )
    return metrics, [param.grad.clone() for param in model.parameters()]


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_split_plain_rows_and_checkpointing_change_neither_metrics_nor_gradients(name):
    model = small_model(name)
    metrics, grads = metrics_and_gradients(model, 10**6)
    checkpointed = small_model(name).train()
    checkpointed.gradient_checkpointing_enable({"use_reentrant": False})
    for other in (
        metrics_and_gradients(model, 1),
        metrics_and_gradients(model, 90),
        metrics_and_gradients(model, 90, plain=True),
        metrics_and_gradients(checkpointed, 90),
    ):
        assert other[0] == pytest.approx(metrics, rel=1e-4, abs=1e-5)
        for a, b in zip(other[1], grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch compiles for a CPU with a C++ compiler")
def test_compiled_layers_change_neither_metrics_nor_gradients():
    model = small_model("llama")
    model.model.layers = model.model.layers[:1]
    metrics, grads = metrics_and_gradients(model, 10**6)
    (layer,) = alphapo.decoder_layers(model)
    layer.compile(dynamic=True)
    other = metrics_and_gradients(model, 10**6)
    assert other[0] == pytest.approx(metrics, rel=1e-4, abs=1e-5)
    for a, b in zip(other[1], grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_metrics_are_means_over_pairs():
    model, triples = small_model("llama"), random_pairs(6)
    metrics = alphapo.run_pairs(
        alphapo.Policy(model), as_pairs(triples), list(range(6)), LOSS, 60, plain=False
    )
    with torch.no_grad():
        chosen, rejected = (torch.stack([own_logps(model, t[0], t[i]) for t in triples]) for i in (1, 2))
    losses, chosen_rewards, rejected_rewards = LOSS(chosen, rejected)
    margins = chosen_rewards - rejected_rewards
    values = (losses, chosen_rewards, rejected_rewards, margins, margins > 0, chosen, rejected)
    assert metrics == pytest.approx(
        {key: value.double().mean().item() for key, value in zip(alphapo.METRICS, values)}, rel=1e-4
    )


def test_micro_batches_hold_every_index_once_and_keep_to_the_budget():
    pairs = as_pairs(random_pairs(40))
    for plain in (False, True):
        batches = list(alphapo.micro_batches(pairs, range(40), 150, plain))
        assert sorted(sum(batches, [])) == list(range(40)) and len(batches) > 3
        for batch in batches:
            rows = alphapo.make_rows([pairs[i] for i in batch], plain)
            assert rows.input_ids.numel() <= 150 or len(batch) == 1


# ------------------------------------------------------------------------------------------------ optimizer


def train_weights(dtype, learning_rate, steps=20, device=None):
    """Twenty steps of a constant gradient, in two micro-batches each: the weights before and after, and masters."""
    torch.manual_seed(0)
    model = torch.nn.Linear(64, 64)
    before, push = model.weight.detach().clone(), torch.randn(64, 64)
    optimizer = alphapo.MasterAdamW(model, dtype, 0.0, device)
    for _ in range(steps):
        for _ in range(2):
            (model.weight * push.to(dtype)).sum().backward()
        optimizer.step(learning_rate, 1.0)
    return before, model.weight.detach(), optimizer.masters[0].detach()


@pytest.mark.parametrize("part", [1, 2**28])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masters_are_plain_adamw_to_the_bit(dtype, part, monkeypatch):
    """In float32 the weights, and in bf16 the masters, given the same gradients; a part at a time or all at once."""
    monkeypatch.setattr(alphapo.MasterAdamW, "part", part)
    torch.manual_seed(0)
    weight = torch.nn.Linear(64, 64).weight
    push = torch.randn(64, 64).to(dtype).float()
    adamw = torch.optim.AdamW([weight], lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, fused=True)
    for _ in range(20):
        weight.grad = 2 * push
        torch.nn.utils.clip_grad_norm_([weight], 1.0)
        adamw.step()
    _, ours, master = train_weights(dtype, 1e-3)
    assert torch.equal(master, weight) and torch.equal(ours, weight.to(dtype))


def test_a_whole_model_in_bf16_follows_float32():
    """Ten steps of the loss: masters of the bf16 run within the rounding of its gradients, 2 % of the way gone."""
    weights = {}
    for dtype in (torch.float32, torch.bfloat16):
        model, pairs = small_model("llama"), as_pairs(random_pairs(8))
        start = torch.cat([param.detach().flatten() for param in model.parameters()])
        optimizer = alphapo.MasterAdamW(model, dtype, 0.0)
        for _ in range(10):
            alphapo.run_pairs(alphapo.Policy(model), pairs, range(8), LOSS, 200, plain=False, train=True)
            optimizer.step(1e-3, 1.0)
        weights[dtype] = torch.cat([master.detach().flatten() for master in optimizer.masters]) - start
    exact, rounded = weights.values()
    assert torch.nn.functional.cosine_similarity(exact, rounded, dim=0) > 0.98 and exact.norm() > 0.5


def test_masters_move_where_bf16_weights_would_not():
    before, weight, master = train_weights(torch.bfloat16, 7e-7)
    assert ((master - before).abs() > 5e-6).float().mean() > 0.9  # 20 steps of up to 7e-7 each
    assert torch.equal(weight, master.bfloat16())
    pure = before.bfloat16()
    for _ in range(20):
        pure -= 7e-7  # the largest step AdamW takes, on the bf16 weight itself
    assert (pure == before.bfloat16()).float().mean() > 0.9
    assert weight.dtype == torch.bfloat16


def test_gradients_of_micro_batches_are_summed_in_float32():
    model = torch.nn.Linear(1, 1, bias=False)
    optimizer = alphapo.MasterAdamW(model, torch.bfloat16, weight_decay=0.0)
    for _ in range(1000):  # in bf16 the sum would stop at 256
        model.weight.sum().backward()
    assert optimizer.step(0.0, 1.0) == 1000.0


def test_a_gradient_that_is_not_finite_changes_nothing():
    model = torch.nn.Linear(4, 4)
    optimizer, before = alphapo.MasterAdamW(model, torch.float32, 0.0), model.weight.detach().clone()
    (model.weight * math.inf).sum().backward()
    with pytest.raises(FloatingPointError):
        optimizer.step(1e-3, 1.0)
    assert torch.equal(model.weight, before)


def test_learning_rate_rises_and_falls_and_no_step_is_lost():
    config = alphapo.Config(learning_rate=1.0, warmup_ratio=0.1)
    rates = [alphapo.learning_rate_at(step, 100, config) for step in range(100)]
    assert rates.index(max(rates)) == 10 and max(rates) == 1.0 and 0 < rates[-1] < 1e-3 and 0 < rates[0] < 0.1
    assert alphapo.learning_rate_at(0, 1, config) > 0


# ------------------------------------------------------------------------------------------------ plan


def test_flops_are_those_that_torch_counts():
    """Forward and backward passes of one pair against the formula."""
    from torch.utils.flop_counter import FlopCounterMode

    model, rng = small_model("llama"), np.random.default_rng(0)
    model.set_attn_implementation("eager")  # of the others torch does not count the attention
    pairs = as_pairs([tuple(rng.integers(3, 97, size).astype(np.int32) for size in (60, 40, 40))])
    with FlopCounterMode(display=False) as counter:
        alphapo.run_pairs(alphapo.Policy(model), pairs, [0], LOSS, 1000, plain=False, train=True)
    # torch counts every query with every key of the row, the logits of the backward pass, and no embedding
    row, said, counts = 140, 80, alphapo.pair_flops(model, pairs)[0]
    attended = (60**2 + 40**2 + 40**2) / 2 + 60 * said
    counts += 12 * 3 * 32 * (row**2 - attended) + 2 * 97 * 32 * said
    assert counter.get_total_flops() == pytest.approx(counts, rel=0.01)


def plan_of(tmp_path, monkeypatch=None, **settings):
    config = alphapo.resolve(
        alphapo.Config(**(alphapo.PRESETS["tiny"] | settings | dict(out=str(tmp_path / "out"))))
    )
    return alphapo.make_plan(config, alphapo.load_data(config))


def test_the_plan_counts_what_the_run_does(tmp_path):
    _, plan = plan_of(tmp_path, max_steps=2, batch_size=8)
    model = alphapo.load_model(str(TINY), "cpu", False)
    assert plan["parameters"] == sum(param.numel() for param in model.parameters()) and plan["steps"] == 2
    count = plan["parameters"] / 2**30
    gib = plan["device_gib"]
    assert (gib["weights"], gib["gradients"], gib["masters and moments"]) == (4 * count, 4 * count, 8 * count)
    gib = plan_of(tmp_path, dtype="bfloat16")[1]["device_gib"]
    assert (gib["weights"], gib["gradients"], gib["masters and moments"]) == (
        2 * count,
        4 * count,
        12 * count,
    )


def test_what_cannot_fit_is_refused_and_told_what_would(tmp_path, monkeypatch):
    monkeypatch.setattr(alphapo, "memory_there", lambda device: 10**6)
    need = sum(plan_of(tmp_path)[1]["device_gib"].values())
    monkeypatch.setattr(alphapo, "memory_there", lambda device: need)
    with pytest.raises(alphapo.UserError, match="does not fit.*what would: --gradient-checkpointing"):
        plan_of(tmp_path, micro_tokens=10**4)
    monkeypatch.setattr(alphapo, "memory_there", lambda device: 0.1)
    with pytest.raises(alphapo.UserError, match="what would: more memory"):
        plan_of(tmp_path)


def test_a_7b_model_on_an_80_gb_gpu_keeps_its_masters_on_the_host(monkeypatch):
    """The arithmetic of the plan alone: no GPU, no weights."""
    config = AutoConfig.for_model(
        "mistral", sliding_window=None
    )  # Mistral-7B is what its config class defaults to
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    settings = alphapo.Config(
        device="cuda", dtype="bfloat16", micro_tokens=16384, gradient_checkpointing=True
    )
    device, host = alphapo.memory_needed(alphapo.replace(settings, master_device="cpu"), model, 3000, False)
    assert 45 < sum(device.values()) < 60 and 80 < sum(host.values()) < 90
    device, host = alphapo.memory_needed(alphapo.replace(settings, master_device="cuda"), model, 3000, False)
    assert sum(device.values()) > 120


# ------------------------------------------------------------------------------------------------ data


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY)


def load(rows, tokenizer, tmp_path, max_length=256, max_prompt_length=128, name="pairs.jsonl"):
    text = json.dumps(rows) if name.endswith(".json") else "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / name).write_text(text)
    return alphapo.load_pairs(str(tmp_path / name), tokenizer, max_length, max_prompt_length)


def texts(pairs, tokenizer):
    return [tuple(tokenizer.decode(part) for part in pairs[i]) for i in range(len(pairs))]


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


CHAT = ("<|im_start|>user\nSay fox.<|im_end|>\n<|im_start|>assistant\n", "fox<|im_end|>", "an owl<|im_end|>")
LONG = [user("Hi."), assistant("Hello."), user("Say fox.")]
LONG_CHAT = (
    "<|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n" + CHAT[0],
    *CHAT[1:],
)
SHAPES = {
    "standard": (
        {"prompt": "Say fox:", "chosen": " a fox", "rejected": " owl"},
        ("Say fox:", " a fox<|im_end|>", " owl<|im_end|>"),
    ),
    "standard, implicit, cut between tokens": (
        {"chosen": "The sky is blue.", "rejected": "The sky is red."},
        None,
    ),
    "conversational": (
        {"prompt": [user("Say fox.")], "chosen": [assistant("fox")], "rejected": [assistant("an owl")]},
        CHAT,
    ),
    "conversational, several turns": (
        {"prompt": LONG, "chosen": [assistant("fox")], "rejected": [assistant("an owl")]},
        LONG_CHAT,
    ),
    "conversational, implicit": (
        {"chosen": [*LONG, assistant("fox")], "rejected": [*LONG, assistant("an owl")]},
        LONG_CHAT,
    ),
    "prompt repeated by the conversations": (
        {"prompt": LONG, "chosen": [*LONG, assistant("fox")], "rejected": [*LONG, assistant("an owl")]},
        LONG_CHAT,
    ),
    "UltraFeedback": (
        {
            "prompt": "Say",
            "chosen": [user("Say fox."), assistant("fox")],
            "rejected": [user("Say fox."), assistant("an owl")],
        },
        CHAT,
    ),
    "UltraFeedback, the assistant's turn alone": (
        {"prompt": "Say fox.", "chosen": [assistant("fox")], "rejected": [assistant("an owl")]},
        CHAT,
    ),
}


@pytest.mark.parametrize(
    "extra", [{}, {"messages": [user("Say fox.")], "score_chosen": 3.5, "prompt_id": None}]
)
@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.json"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_of_row(shape, name, extra, tokenizer, tmp_path):
    row, want = SHAPES[shape]
    ((prompt, chosen, rejected),) = texts(load([row | extra], tokenizer, tmp_path, name=name), tokenizer)
    if want:
        assert (prompt, chosen, rejected) == want
    else:  # where the tokens part, not the letters
        assert (
            prompt + chosen == row["chosen"] + "<|im_end|>"
            and prompt + rejected == row["rejected"] + "<|im_end|>"
        )
        words = tokenizer(row["chosen"])["input_ids"], tokenizer(row["rejected"])["input_ids"]
        same = next(i for i, (a, b) in enumerate(zip(*words)) if a != b)
        assert prompt == tokenizer.decode(words[0][:same])


def test_implicit_text_where_one_is_the_beginning_of_the_other(tokenizer, tmp_path):
    pairs = load([{"chosen": "Q? Yes", "rejected": "Q? Yes, because"}], tokenizer, tmp_path)
    prompt, chosen, rejected = pairs[0]
    assert len(prompt) and len(chosen) >= 2 and len(rejected) > len(chosen)


def test_flat_storage_holds_every_pair(tokenizer, tmp_path):
    rows = [{"prompt": f"Say {i}:", "chosen": " fox" * (i + 1), "rejected": " owl"} for i in range(7)]
    pairs = load(rows, tokenizer, tmp_path)
    assert pairs.tokens.dtype == np.int32 and len(pairs) == 7
    for i, (prompt, chosen, rejected) in enumerate(texts(pairs, tokenizer)):
        assert (prompt, chosen, rejected) == (f"Say {i}:", " fox" * (i + 1) + "<|im_end|>", " owl<|im_end|>")
        parts = [len(part) for part in pairs[i]]
        assert pairs.size(i, False) == sum(parts) and pairs.size(i, True) == 2 * (parts[0] + max(parts[1:]))
        assert pairs.places[i].endswith(f"pairs.jsonl:{i + 1}")


def merging_tokenizer(**options):
    """Letters, and one merge: "a" before "b" becomes one token, across any boundary."""
    letters = ["<s>", "</s>", *"abcdefgh :"]
    vocabulary = {token: i for i, token in enumerate([*letters, "ab"])}
    inner = Tokenizer(models.BPE(vocabulary, [("a", "b")]))
    if options.pop("adds_bos", False):
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", **options)


def test_a_tokenizer_that_merges_across_the_boundary(tmp_path):
    tokenizer = merging_tokenizer()
    prompt, chosen, rejected = load(
        [{"prompt": "cda", "chosen": "bc", "rejected": "dc"}], tokenizer, tmp_path
    )[0]
    assert tokenizer.convert_ids_to_tokens(prompt) == ["c", "d"]
    assert tokenizer.convert_ids_to_tokens(chosen) == ["ab", "c", "</s>"]
    assert tokenizer.convert_ids_to_tokens(rejected) == ["a", "d", "c", "</s>"]


@pytest.mark.parametrize("written", ["", "<s>"])
def test_one_bos_whoever_writes_it(written, tmp_path):
    row = {"prompt": written + "cd", "chosen": "e", "rejected": "f"}
    prompt, *_ = load([row], merging_tokenizer(adds_bos=True), tmp_path)[0]
    assert prompt.tolist() == [0, 4, 5]
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    tokenizer = merging_tokenizer(adds_bos=True, chat_template=written + template)
    row = {"prompt": [user("cd")], "chosen": [assistant("e")], "rejected": [assistant("f")]}
    prompt, chosen, rejected = load([row], tokenizer, tmp_path)[0]
    assert (prompt.tolist(), chosen.tolist(), rejected.tolist()) == ([0, 4, 5, 1], [6, 1], [7, 1])


@pytest.mark.parametrize("tail", ["", "\n", "\n<|endoftext|>", "<|im_end|>"])
def test_one_end_of_turn_and_nothing_after_it(tail, tokenizer, tmp_path):
    other = AutoTokenizer.from_pretrained(TINY)
    other.chat_template = tokenizer.chat_template.replace(
        "<|im_end|>\\n", "<|im_end|>" + tail.replace("\n", "\\n")
    )
    row = {"prompt": [user("Say fox.")], "chosen": [assistant("fox ")], "rejected": [assistant("an owl.\n")]}
    _, chosen, rejected = load([row], other, tmp_path)[0]
    assert (other.decode(chosen), other.decode(rejected)) == ("fox <|im_end|>", "an owl.\n<|im_end|>")


def test_truncation_keeps_the_end_of_the_prompt_and_the_beginning_of_responses(tmp_path):
    tokenizer = merging_tokenizer(adds_bos=True)
    rows = [
        {"prompt": "cdefgh", "chosen": "c" * 3, "rejected": "d" * 3},  # 7 + 4 tokens fit
        {"prompt": "cdefgh", "chosen": "c" * 8, "rejected": "d" * 3},  # prompt 5, chosen cut to 7
        {"prompt": "cde", "chosen": "c" * 9, "rejected": "d" * 9},  # prompt whole, both cut to 8
    ]
    pairs = load(rows, tokenizer, tmp_path, max_length=12, max_prompt_length=5)
    short, cut, both = (tuple(tokenizer.decode(part).replace(" ", "") for part in pairs[i]) for i in range(3))
    assert short == ("<s>cdefgh", "ccc</s>", "ddd</s>")
    assert cut == ("<s>efgh", "ccccccc", "ddd</s>")  # a response that was cut does not learn to stop there
    assert both == ("<s>cde", "c" * 8, "d" * 8)
    assert dict(pairs.notes) == {"prompts truncated": 1, "pairs with a response truncated": 2}


def test_pairs_that_cannot_teach_are_dropped_and_counted(tokenizer, tmp_path):
    good = {"prompt": "Say fox: ", "chosen": "fox", "rejected": "owl"}
    rows = [
        good,
        good | {"chosen": ""},
        good | {"rejected": " \n"},
        good | {"rejected": "fox"},
        good | {"rejected": "fox" * 99, "chosen": "fox" * 90},
    ]
    rows.append({"prompt": [user("Hi.")], "chosen": [assistant("")], "rejected": [assistant("Hello.")]})
    pairs = load(rows, tokenizer, tmp_path, max_length=24, max_prompt_length=12)
    assert len(pairs) == 1
    assert pairs.notes["pairs dropped for an empty response"] == 3
    assert pairs.notes["pairs dropped for equal responses"] == 2
    with pytest.raises(alphapo.UserError, match="no usable pair"):
        load(rows[1:], tokenizer, tmp_path, max_length=24, max_prompt_length=12)


BAD_LINES = {
    "not JSON": '{"chosen": "a", "rejected"',
    "not UTF-8": b'{"chosen": "\xff", "rejected": "b"}',
    "not an object": "[1, 2]",
    "a missing key": '{"prompt": "a", "chosen": "b"}',
    "a wrong type": '{"prompt": "a", "chosen": "b", "rejected": 3}',
    "a text and a conversation": json.dumps({"prompt": "a", "chosen": "b", "rejected": [assistant("c")]}),
    "no content": json.dumps(
        {"prompt": "a", "chosen": [{"role": "assistant"}], "rejected": [assistant("c")]}
    ),
    "no assistant": json.dumps({"chosen": [user("a")], "rejected": [user("b")]}),
    "an empty prompt": json.dumps({"prompt": [], "chosen": [assistant("a")], "rejected": [assistant("b")]}),
    "two turns": json.dumps(
        {"prompt": "a", "chosen": [assistant("b"), user("c")], "rejected": [assistant("b")]}
    ),
}


@pytest.mark.parametrize("kind", BAD_LINES)
def test_a_bad_line_is_named(kind, tokenizer, tmp_path):
    bad, good = BAD_LINES[kind], b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n'
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(good * 2 + (bad if isinstance(bad, bytes) else bad.encode()) + b"\n\n" + good)
    with pytest.raises(alphapo.UserError) as error:
        alphapo.load_pairs(str(path), tokenizer, 64, 32)
    assert str(error.value).startswith(f"{path}:3: ") and "\n" not in str(error.value)


def test_the_first_ten_bad_lines_are_named_and_the_rest_counted(tokenizer, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("nonsense\n" * 25)
    with pytest.raises(alphapo.UserError) as error:
        alphapo.load_pairs(str(path), tokenizer, 64, 32)
    lines = str(error.value).split("\n")
    assert len(lines) == 11 and lines[9].startswith(f"{path}:10: ") and "15 more" in lines[10]


def test_other_names_go_through_the_datasets_library(tokenizer, tmp_path, monkeypatch):
    calls, rows = [], [{"prompt": "Say fox: ", "chosen": "fox", "rejected": "owl"}]
    stand_in = type(sys)("datasets")
    stand_in.load_dataset = lambda *args, **kwargs: calls.append((args, kwargs)) or rows
    monkeypatch.setitem(sys.modules, "datasets", stand_in)
    table = tmp_path / "pairs.parquet"
    table.touch()
    for name in (str(table), "someone/pairs", "someone/pairs:test"):
        assert alphapo.load_pairs(name, tokenizer, 64, 32).places == [f"{name}: row 1"]
    assert calls == [
        (("parquet",), {"data_files": str(table), "split": "train"}),
        (("someone/pairs",), {"split": "train"}),
        (("someone/pairs",), {"split": "test"}),
    ]
    monkeypatch.setitem(sys.modules, "datasets", None)  # makes the import fail
    with pytest.raises(alphapo.UserError, match="pip install datasets"):
        alphapo.load_pairs("someone/pairs", tokenizer, 64, 32)


# ------------------------------------------------------------------------------------------------ model


def test_dropout_is_off_in_modules_and_numbers(tmp_path):
    config = AutoConfig.for_model(**(SMALL | MODELS["phi3"]))
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = alphapo.load_model(str(tmp_path), "cpu", checkpointing=True)
    assert model.training and model.is_gradient_checkpointing
    assert model.config.attention_dropout == model.config.resid_pdrop == model.config.embd_pdrop == 0
    assert {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)} <= {0.0}


def test_weights_in_pickles_are_refused(tmp_path):
    small_model("llama").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(alphapo.UserError, match="safetensors"):
        alphapo.load_model(str(tmp_path), "cpu", False)


# ------------------------------------------------------------------------------------------------ the script


def run(*args, cwd, code=0, **environment):
    """Run alphapo.py in a folder of its own, without a network."""
    command = [sys.executable, str(ROOT / "alphapo.py"), *map(str, args)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""} | environment
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


def metrics_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_script_trains_improves_and_writes_what_it_says(tmp_path):
    done = run("--max-steps", 12, "--dtype", "float32", "--eval-every", 6, cwd=tmp_path)
    out = tmp_path / "out"
    log, summary = metrics_of(out), json.loads((out / "summary.json").read_text())
    evaluations, steps = ([m for m in log if ("eval_loss" in m) == held_out] for held_out in (True, False))
    assert [m["step"] for m in evaluations] == [0, 6, 12] and [m["step"] for m in steps] == list(range(1, 13))
    assert set(alphapo.METRICS) | {"grad_norm", "learning_rate", "epoch"} <= set(steps[0])
    assert evaluations[-1]["eval_loss"] < evaluations[0]["eval_loss"]
    assert evaluations[-1]["eval_rewards/accuracies"] > evaluations[0]["eval_rewards/accuracies"]
    assert "<|im_start|>assistant" in done.stdout and "chosen log-probability" in done.stdout
    assert summary["config"]["alpha"] == 0.25 and len(summary["data_sha256"]) == 64 and summary["steps"] == 12
    assert "AlphaPO" in (out / "README.md").read_text()

    # the result loads, in bf16, and has the figures of the last evaluation
    model = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert model.dtype == torch.bfloat16 and tokenizer.chat_template
    pairs = alphapo.load_pairs(str(ROOT / "data" / "eval.jsonl"), tokenizer, 2048, 1800)
    again = alphapo.run_pairs(alphapo.Policy(model.float()), pairs, range(len(pairs)), LOSS, 4096, plain=True)
    assert again == pytest.approx({k.removeprefix("eval_"): v for k, v in summary["after"].items()}, rel=1e-4)

    # a second run into the same folder is refused, and leaves the first alone
    refused = run("--max-steps", 1, cwd=tmp_path, code=2)
    assert "out" in refused.stderr and len(refused.stderr.splitlines()) == 1
    assert metrics_of(out) == log


def test_two_runs_are_the_same_and_rows_do_not_matter(tmp_path):
    """Same seed, same figures; and plain rows, another micro-batch or bf16 give the same run but for rounding."""
    config = alphapo.Config(
        **(alphapo.PRESETS["tiny"] | dict(eval_data=None, eval_split=0.0, max_steps=3, batch_size=8))
    )
    runs = {}
    for name, settings in {
        "first": dict(dtype="float32"),
        "second": dict(dtype="float32"),
        "plain": dict(dtype="float32", plain_rows=True),
        "split": dict(dtype="float32", micro_tokens=64),
        "bf16": dict(dtype="bfloat16"),
    }.items():
        alphapo.train(alphapo.replace(config, out=str(tmp_path / name), **settings))
        runs[name] = [
            {k: v for k, v in m.items() if k != "tokens_per_second"} for m in metrics_of(tmp_path / name)
        ]
    assert runs["first"] == runs["second"]
    for name, tolerance in (("plain", 1e-4), ("split", 1e-4), ("bf16", 5e-2)):
        for a, b in zip(runs[name], runs["first"], strict=True):
            assert a == pytest.approx(b, rel=tolerance, abs=tolerance), name


def test_another_loss_goes_into_the_same_harness(tmp_path):
    def hinge(chosen_logps, rejected_logps, pairs, batch):
        assert len(batch) == len(chosen_logps) and max(batch) < len(pairs)
        return torch.relu(1 - (chosen_logps - rejected_logps)), chosen_logps.detach(), rejected_logps.detach()

    config = alphapo.Config(
        **(alphapo.PRESETS["tiny"] | dict(out=str(tmp_path / "out"), max_steps=1, batch_size=4))
    )
    summary = alphapo.train(config, loss_fn=hinge)
    assert summary["before"]["eval_rewards/chosen"] == summary["before"]["eval_logps/chosen"]


GOOD = {"prompt": "Say fox: ", "chosen": "fox", "rejected": "owl"}
TURNS = {"prompt": [user("Hi.")], "chosen": [assistant("fox")], "rejected": [assistant("owl")]}
SWAPPED = {"chosen": [assistant("Hi."), user("fox")], "rejected": [assistant("Hi."), user("owl")]}
# what is wrong: (what pairs.jsonl holds, what the line says)
BAD_FILES = {
    "empty": (b"", "empty"),
    "blank lines alone": (b"\n\n", "empty"),
    "not UTF-8": (b'{"chosen": "\xff", "rejected": "b"}\n', "pairs.jsonl:1: not valid JSON"),
    "UTF-16": (json.dumps(GOOD).encode("utf-16"), "pairs.jsonl:1: not "),
    "NUL bytes": (b"\0" * 50, "pairs.jsonl:1: not valid JSON"),
    "cut in the middle": (json.dumps(GOOD).encode()[:-9], "pairs.jsonl:1: not valid JSON"),
    "an array that is cut": (b'[{"chosen": "a"', "pairs.jsonl: not loaded"),
    "an array of numbers": (b"[1]", "pairs.jsonl: item 1: not an object"),
    "an array in a line": (b'[1]\n{"chosen": "a"}\n', "pairs.jsonl: not loaded"),
    "a huge line of no JSON": (b"x" * 10**7, "pairs.jsonl:1: not valid JSON"),
    "nested without end": (b'{"chosen":' * 10**5, "pairs.jsonl:1: not valid JSON"),
    "one bad row among good ones": ([GOOD, {"chosen": "a"}], "pairs.jsonl:2: not an object with"),
    "rows that name nothing": ([{"question": "a", "answer": "b"}], "pairs.jsonl:1: not an object with"),
    "a number for a text": ([GOOD | {"rejected": 3}], "pairs.jsonl:1: "),
    "null for a text": ([GOOD | {"chosen": None}], "pairs.jsonl:1: "),
    "a number for a prompt": ([GOOD | {"prompt": 3}], "pairs.jsonl:1: "),
    "a text and a conversation": ([GOOD | {"rejected": [assistant("a")]}], "pairs.jsonl:1: "),
    "an empty prompt": ([GOOD | {"prompt": ""}], "dropped for an empty prompt"),
    "an empty conversation": ([TURNS | {"chosen": []}], "pairs.jsonl:1: "),
    "empty responses": ([GOOD | {"chosen": "", "rejected": ""}], "dropped for an empty response"),
    "equal responses": ([GOOD | {"rejected": "fox"}], "dropped for equal responses"),
    "responses of blanks": ([GOOD | {"chosen": "  \n"}], "dropped for an empty response"),
    "a message without content": ([TURNS | {"chosen": [{"role": "assistant"}]}], "pairs.jsonl:1: "),
    "a content of parts": ([TURNS | {"chosen": [assistant([{"text": "a"}])]}], "pairs.jsonl:1: "),
    "roles out of order": ([SWAPPED], "pairs.jsonl:1: a conversation must be"),
    "no assistant": ([TURNS | {"chosen": [user("fox")]}], "pairs.jsonl:1: a conversation must be"),
    "two answers": (
        [TURNS | {"chosen": [assistant("a"), assistant("b")]}],
        "pairs.jsonl:1: a conversation must",
    ),
    "a prompt that ends with the assistant": (
        [TURNS | {"prompt": [assistant("a")]}],
        "pairs.jsonl:1: a conv",
    ),
    "a lone surrogate": (b'{"prompt": "a", "chosen": "\\ud800", "rejected": "b"}', "pairs.jsonl:1: "),
}
BAD_COMMANDS = {
    "a missing data file": (["--data", "nowhere.jsonl"], "nowhere.jsonl: not loaded: No such file"),
    "a folder for data": (["--data", "folder.jsonl"], "folder.jsonl: not loaded: Is a directory"),
    "an unknown flag": (["--gama", "1"], "unrecognized arguments: --gama"),
    "a word for a number": (["--beta", "much"], "argument --beta: invalid float value: 'much'"),
    "no data": (["--model", str(TINY)], "--data is needed"),
    "a negative beta": (["--beta", "-1"], "--beta -1.0: must be above 0"),
    "a beta of zero": (["--beta", "0"], "--beta 0.0: must be above 0"),
    "an alpha that is no number": (["--alpha", "nan"], "--alpha nan: must be a finite number"),
    "an infinite learning rate": (["--learning-rate", "inf"], "--learning-rate inf: must be a finite number"),
    "a negative gamma": (["--gamma", "-0.1"], "--gamma -0.1: must be 0 or more"),
    "no pairs a step": (["--batch-size", "0"], "--batch-size 0: must be above 0"),
    "no steps": (["--max-steps", "0"], "--max-steps 0: must be above 0"),
    "no checkpoint kept": (["--keep", "0"], "--keep 0: must be above 0"),
    "all held out": (["--eval-split", "1"], "--eval-split 1.0: must be below 1"),
    "no room for a response": (["--max-length", "64", "--max-prompt-length", "64"], "--max-prompt-length 64"),
    "an unknown device": (["--device", "abacus"], "--device abacus"),
    "masters on no device": (["--master-device", "cuda"], "--master-device cuda"),
    "an unknown dtype": (["--dtype", "float8"], "--dtype float8"),
    "a model that is nowhere": (
        ["--model", "./nowhere", "--data", "good.jsonl"],
        "--model ./nowhere: not loaded",
    ),
}


def ends_in_one_line(args, line, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as exit:
        alphapo.main(args)
    error = capsys.readouterr().err
    assert exit.value.code == 2 and line in error and len(error.strip().splitlines()) == 1, error[-500:]
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_bad_file_gets_one_line_and_status_2(kind, tmp_path, monkeypatch, capsys):
    content, line = BAD_FILES[kind]
    monkeypatch.chdir(tmp_path)
    if isinstance(content, list):
        content = "".join(json.dumps(row) + "\n" for row in content).encode()
    Path("pairs.jsonl").write_bytes(content)
    ends_in_one_line(["--data", "pairs.jsonl"], line, tmp_path, capsys)


@pytest.mark.parametrize("kind", BAD_COMMANDS)
def test_a_bad_command_gets_one_line_and_status_2(kind, tmp_path, monkeypatch, capsys):
    args, line = BAD_COMMANDS[kind]
    monkeypatch.chdir(tmp_path)
    Path("folder.jsonl").mkdir()
    Path("good.jsonl").write_text(json.dumps(GOOD) + "\n")
    ends_in_one_line(args, line, tmp_path, capsys)


def without_safetensors(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def with_config(**changes):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return change


BAD_MODELS = {
    "weights in a pickle": (without_safetensors, "safetensors"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "--model model: not loaded"),
    "a config that is no JSON": (
        lambda folder: (folder / "config.json").write_text("{"),
        "--model model: not loaded",
    ),
    "no tokenizer": (
        lambda folder: [path.unlink() for path in folder.glob("tokenizer*")],
        "--model model: not loaded",
    ),
    "no chat template": (lambda folder: (folder / "chat_template.jinja").unlink(), "chat template"),
    "a template that refuses": (
        lambda folder: (folder / "chat_template.jinja").write_text("{{ raise_exception('no system role') }}"),
        "pairs.jsonl:1: the chat template refuses it: no system role",
    ),
    "an encoder-decoder": (with_config(model_type="t5", is_encoder_decoder=True), "encoder-decoder"),
    "an unknown architecture": (with_config(model_type="abacus", architectures=["Abacus"]), "not loaded"),
    "code of its own": (
        with_config(
            model_type="own", auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
        ),
        "--model model: not loaded",
    ),
    "weights that are cut": (
        lambda folder: (folder / "model.safetensors").write_bytes(b"\0" * 100),
        "--model model: not loaded",
    ),
    "an embedding smaller than the vocabulary": (None, "more tokens than the embedding rows"),
}


@pytest.mark.parametrize("kind", BAD_MODELS)
def test_a_bad_model_gets_one_line_and_status_2(kind, tmp_path, monkeypatch, capsys):
    change, line = BAD_MODELS[kind]
    monkeypatch.chdir(tmp_path)
    shutil.copytree(TINY, "model")
    Path("pairs.jsonl").write_text(json.dumps(TURNS) + "\n")
    if change:
        change(tmp_path / "model")
    else:
        settings = SMALL | dict(model_type="llama", vocab_size=50)
        AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings)).save_pretrained("model")
    ends_in_one_line(
        ["--model", "model", "--data", "pairs.jsonl", "--eval-split", "0"], line, tmp_path, capsys
    )


# ------------------------------------------------------------------------------------------------ nothing is lost

SHORT = [
    "--max-steps",
    6,
    "--batch-size",
    4,
    "--save-every",
    1,
    "--data",
    ROOT / "data" / "eval.jsonl",
    "--dtype",
]
SHORT += ["float32", "--eval-split", 0.02]


def weights_of(folder):
    return (folder / "model.safetensors").read_bytes()


# imports once, then runs the script in a fork for every line of arguments, and says when it has ended and how
FORKS = """
import json, os, sys
import alphapo
for line in sys.stdin:
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        try:
            alphapo.main(json.loads(line))
        except SystemExit as exit:
            os._exit(exit.code or 0)
        except BaseException:
            os._exit(70)
        os._exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def test_twenty_kills_and_the_weights_are_those_of_an_uninterrupted_run(tmp_path):
    """SIGKILL at random moments, every second one while a checkpoint is being written."""
    args = ["--max-steps", "24", *map(str, SHORT[2:]), "--keep", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    with subprocess.Popen(
        [sys.executable, "-c", FORKS],
        stdin=-1,
        stdout=-1,
        stderr=-3,
        env=environment,
        text=True,
        cwd=tmp_path,
    ) as server:

        def begin(*more):
            server.stdin.write(json.dumps([*args, *more]) + "\n")
            server.stdin.flush()
            return int(server.stdout.readline())

        begin("--out", "whole")
        assert server.stdout.readline().strip() == "0"
        rng, out, kills, inside = np.random.default_rng(0), tmp_path / "killed", 0, 0
        while kills < 20:
            child = begin("--out", "killed", "--resume")
            deadline = time.monotonic() + (60 if kills % 2 else rng.uniform(0.2, 1.5))
            while time.monotonic() < deadline:
                if kills % 2 and list(out.glob(".partial-*")):
                    break
                time.sleep(0.0005)
            inside += bool(list(out.glob(".partial-*")))
            os.kill(child, signal.SIGKILL)
            code = int(server.stdout.readline())
            assert code in (-signal.SIGKILL, 0), code
            if code == 0:  # it ended before the blow: from the start again
                assert weights_of(out) == weights_of(tmp_path / "whole")
                shutil.rmtree(out)
                continue
            kills += 1
        begin("--out", "killed", "--resume")
        assert server.stdout.readline().strip() == "0"
        server.stdin.close()
    assert inside >= 5
    assert weights_of(out) == weights_of(tmp_path / "whole")

    def figures(name):
        return [{k: v for k, v in m.items() if k != "tokens_per_second"} for m in metrics_of(tmp_path / name)]

    assert figures("killed") == figures("whole")
    assert not list(out.glob(".partial-*")) and len(list(out.glob("checkpoint-*"))) <= 2


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(number, code, tmp_path):
    command = [
        sys.executable,
        ROOT / "alphapo.py",
        *SHORT[2:],
        "--max-steps",
        2000,
        "--epochs",
        99,
        "--save-every",
        999,
    ]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    with subprocess.Popen(
        [*map(str, command)], cwd=tmp_path, env=environment, stderr=-1, stdout=-3, text=True
    ) as run:
        log = tmp_path / "out" / "metrics.jsonl"
        while run.poll() is None and not (log.exists() and log.read_text().count("\n") > 3):
            time.sleep(0.05)
        run.send_signal(number)
        error = run.communicate(timeout=120)[1].splitlines()[-1]
    assert run.returncode == code and "--resume" in error and "stopped after step" in error
    (folder,) = (tmp_path / "out").glob("checkpoint-*")
    assert int(folder.name[-6:]) == metrics_of(tmp_path / "out")[-1]["step"]


def checkpoints(folder):
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def unfinish(folder):
    """Back to the moment before the last write."""
    for name in ("summary.json", "model.safetensors"):
        (folder / name).unlink()


def test_what_can_happen_to_a_run_that_is_resumed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    args, out = [*map(str, SHORT)], tmp_path / "out"
    alphapo.main(args)
    final, newest = weights_of(out), max(out.glob("checkpoint-*"))
    assert checkpoints(out) == ["checkpoint-000005", "checkpoint-000006"]

    def refused(line, *more):
        with pytest.raises(SystemExit) as exit:
            alphapo.main([*args, *more])
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert exit.value.code == 2 and line in error, error

    refused("finished", "--resume")
    unfinish(out)
    refused("is not empty")
    refused("the run to resume has 4", "--resume", "--batch-size", "8")
    refused("the run to resume has", "--resume", "--data", str(ROOT / "data" / "train.jsonl"))

    # another run is at work there
    held = os.open(out, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    refused("another run is writing there", "--resume")
    os.close(held)

    # a byte of the newest checkpoint has turned, then it is cut: back to the one before, to the same end
    for damage in (lambda b: b[:-9] + bytes([b[-9] ^ 1]) + b[-8:], lambda b: b[: len(b) // 2]):
        path = next(newest.glob("*.safetensors"))
        path.write_bytes(damage(path.read_bytes()))
        alphapo.main([*args, "--resume"])
        assert "checkpoint-000006 is damaged" in capsys.readouterr().out and weights_of(out) == final
        unfinish(out)
    for folder in out.glob("checkpoint-*"):
        (folder / "state.json").write_text("{")
    refused("no checkpoint in out is whole", "--resume")


def test_a_full_disk_is_one_line_and_leaves_the_last_checkpoint(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write, calls = alphapo.save_file, []

    def full(values, path):
        calls.append(path)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        write(values, path)

    monkeypatch.setattr(alphapo, "save_file", full)
    with pytest.raises(SystemExit) as exit:
        alphapo.main([*map(str, SHORT)])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert exit.value.code == 1 and "No space left on device" in error and "--resume" in error
    assert checkpoints(tmp_path / "out") == ["checkpoint-000001", "checkpoint-000002"]
    assert not list((tmp_path / "out").glob(".partial-*"))
    alphapo.main([*map(str, SHORT), "--resume"])  # space was made
    alphapo.main([*map(str, SHORT), "--out", "whole"])
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "whole")


def test_a_loss_that_is_not_finite_names_step_and_pairs_and_keeps_the_last_state(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Path("pairs.jsonl").write_text(
        "".join(
            json.dumps(GOOD | {"prompt": f"Say {i}: ", "rejected": "owl" * (i % 5 + 1)}) + "\n"
            for i in range(8)
        )
    )
    with pytest.raises(SystemExit) as exit:  # alpha * |logp| is beyond double precision at once
        alphapo.main(["--data", "pairs.jsonl", "--eval-split", "0", "--alpha", "1e4", "--batch-size", "4"])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert exit.value.code == 1 and "step 1" in error and "pairs.jsonl:" in error and "--alpha" in error
    assert checkpoints(tmp_path / "out") == ["checkpoint-000000"]


def torchrun(*args, cwd, code=0):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command += [str(ROOT / "alphapo.py"), *map(str, args)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=250)
    assert (done.returncode == 0) == (code == 0), done.stderr
    return done


def test_two_processes_are_one_and_resume_their_shards(tmp_path):
    """Ten steps over gloo, of a batch that does not divide evenly; then the end again from a checkpoint."""
    args = [
        "--max-steps",
        10,
        "--batch-size",
        13,
        "--data",
        ROOT / "data" / "eval.jsonl",
        "--dtype",
        "float32",
    ]
    torchrun(*args, "--out", "two", "--save-every", 5, cwd=tmp_path)
    run(*args, "--out", "one", cwd=tmp_path)
    one, two = metrics_of(tmp_path / "one"), metrics_of(tmp_path / "two")
    for a, b in zip(one, two, strict=True):
        a["tokens_per_second"] = b["tokens_per_second"] = 0
        assert a == pytest.approx(b, abs=1e-5, rel=1e-5)
    final = weights_of(tmp_path / "two")
    unfinish(tmp_path / "two")
    shutil.rmtree(tmp_path / "two" / "checkpoint-000010")
    refused = run(*args, "--out", "two", "--resume", cwd=tmp_path, code=2)
    assert "of 2 processes, not 1" in refused.stderr
    torchrun(*args, "--out", "two", "--resume", cwd=tmp_path)
    assert weights_of(tmp_path / "two") == final


def test_a_rank_that_fails_ends_the_others_with_its_message(tmp_path):
    done = torchrun("--data", "nowhere.jsonl", cwd=tmp_path, code=1)
    assert "alphapo: nowhere.jsonl: not loaded" in done.stderr and not (tmp_path / "out").exists()


def test_nothing_is_pickled(tmp_path, monkeypatch):
    """Neither by the source nor, with every way to pickle barred, by a run that saves and one that resumes it."""
    source = (ROOT / "alphapo.py").read_text()
    assert "torch.load" not in source and "torch.save(" not in source and "import pickle" not in source

    def barred(*args, **kwargs):
        raise AssertionError("something was pickled")

    for module, names in ((torch, ["load", "save"]), (pickle, ["load", "loads", "dump", "dumps"])):
        for name in names:
            monkeypatch.setattr(module, name, barred)
    monkeypatch.chdir(tmp_path)
    args = ["--max-steps", "2", "--batch-size", "4", "--save-every", "1", "--eval-split", "0"]
    alphapo.main(args)
    unfinish(tmp_path / "out")
    alphapo.main([*args, "--resume"])
    for path in (tmp_path / "out").rglob("*"):
        assert path.is_dir() or path.suffix in {".safetensors", ".json", ".jsonl", ".jinja", ".md", ".png"}, (
            path
        )


def test_bad_rows_end_the_script_before_the_model_is_loaded(tmp_path):
    (tmp_path / "pairs.jsonl").write_text('{"chosen": "a", "rejected": "b"}\n{"chosen": 1}\n')
    done = run("--data", "pairs.jsonl", cwd=tmp_path, code=2)
    assert done.stderr.startswith("alphapo: pairs.jsonl:2: ") and not (tmp_path / "out").exists()


def test_a_hub_that_cannot_be_reached_is_one_line(tmp_path):
    done = run(
        "--model",
        "mistral-7b-instruct",
        "--alpha",
        0.25,
        cwd=tmp_path,
        code=2,
        HF_HOME=str(tmp_path / "cache"),
    )
    assert len(done.stderr.splitlines()) == 1 and "mistralai/Mistral-7B-Instruct-v0.2" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_preset_runs_from_a_filled_hub_cache(tmp_path):
    """The tiny model stands in for Mistral-7B in the cache, and a module for the datasets library."""
    repository = tmp_path / "cache" / "hub" / "models--mistralai--Mistral-7B-Instruct-v0.2"
    (repository / "snapshots").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots" / ("0" * 40)).symlink_to(TINY)
    module = "import json\ndef load_dataset(name, split):\n    assert (name, split) == "
    module += '("princeton-nlp/mistral-instruct-ultrafeedback", "train")\n'
    module += f"    return [json.loads(line) for line in open({str(ROOT / 'data' / 'train.jsonl')!r})][:40]\n"
    (tmp_path / "datasets.py").write_text(module)
    environment = dict(HF_HOME=str(tmp_path / "cache"), PYTHONPATH=str(tmp_path))
    run("--model", "mistral-7b-instruct", "--alpha", 0.3, "--max-steps", 1, cwd=tmp_path, **environment)
    config = json.loads((tmp_path / "out" / "summary.json").read_text())["config"]
    want = dict(alpha=0.3, beta=2.5, gamma=0.1, learning_rate=7e-7, batch_size=128, max_prompt_length=1800)
    assert config | want == config


def module_of(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "data" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tiny_data_is_what_its_judge_says():
    make_tiny = module_of("make_tiny")
    for name, count in (("train.jsonl", 2000), ("eval.jsonl", 300)):
        rows = [json.loads(line) for line in (ROOT / "data" / name).read_text().splitlines()]
        assert len(rows) == count
        for row in rows:
            best, worst = (
                make_tiny.judge(row["kind"], row["reference"], row[key][0]["content"])
                for key in ("chosen", "rejected")
            )
            assert [round(best, 3), round(worst, 3)] == row["scores"] and best > worst


def test_dpo_is_its_closed_form_on_summed_logps():
    study, rng = module_of("study"), np.random.default_rng(0)
    c, r, ref_c, ref_r = (torch.tensor(-9 * rng.random(8), requires_grad=i < 2) for i in range(4))
    losses, chosen_rewards, rejected_rewards = study.dpo_loss(c, r, ref_c, ref_r, 0.1)
    margin = 0.1 * ((c - ref_c) - (r - ref_r)).detach()
    torch.testing.assert_close(losses.detach(), (1 + (-margin).exp()).log())
    torch.testing.assert_close(chosen_rewards - rejected_rewards, margin)
    for logps, sign in ((c, -1), (r, 1)):
        (grad,) = torch.autograd.grad(losses.sum(), logps, retain_graph=True)
        torch.testing.assert_close(grad, sign * 0.1 / (1 + margin.exp()))


def test_dpo_trains_from_its_reference_and_two_runs_are_drawn(tmp_path):
    """At the reference itself every log-ratio is 0 and the loss is log 2; the sums are means times lengths."""
    study = module_of("study")
    settings = dict(max_steps=4, batch_size=16, data=str(ROOT / "data" / "eval.jsonl"), eval_data=None)
    config = alphapo.Config(**alphapo.PRESETS["tiny"] | settings | dict(out=str(tmp_path / "dpo")))
    dpo = study.ReferenceDPO(config, beta=0.1)
    summary = alphapo.train(config, dpo)
    assert summary["before"]["eval_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert metrics_of(tmp_path / "dpo")[-2]["loss"] < math.log(2)
    pairs = alphapo.load_data(alphapo.resolve(config)).pairs
    model, (prompt, chosen, rejected) = alphapo.load_model(str(TINY), "cpu", False), pairs[3]
    with torch.no_grad():
        reference = torch.stack([own_logps(model, prompt, side) for side in (chosen, rejected)])
    torch.testing.assert_close(dpo.reference[pairs.places[3]].double(), reference, rtol=1e-4, atol=1e-5)
    alphapo.train(alphapo.replace(config, out=str(tmp_path / "alphapo")))
    if importlib.util.find_spec("matplotlib"):
        command = [sys.executable, ROOT / "data" / "study.py", "plot", tmp_path / "dpo", tmp_path / "alphapo"]
        subprocess.run([*command, "--out", tmp_path / "two.png"], check=True, timeout=120)
        for picture in (tmp_path / "two.png", tmp_path / "dpo" / "curves.png"):
            assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 20_000
    else:
        with pytest.raises(alphapo.UserError, match="pip install matplotlib"):
            alphapo.plot_curves([tmp_path / "dpo"], tmp_path / "two.png")


def test_the_table_in_the_readme_is_that_of_the_kept_runs():
    results = json.loads((ROOT / "data" / "study.json").read_text())
    assert module_of("study").table_text(results) in (ROOT / "README.md").read_text()


def test_every_flag_is_in_the_readme():
    text = (ROOT / "README.md").read_text()
    assert not [name for name in vars(alphapo.Config()) if f"| `--{name.replace('_', '-')}` |" not in text]
