# SPDX-License-Identifier: MIT
"""The tests of what stands in data/: the plan, the tiny data, the study and the hub."""

import json
import math
import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig
from transformers import AutoModelForCausalLM as AutoModel

DATA = Path(__file__).resolve().parent
sys.path[:0] = [str(DATA), str(DATA / "study"), str(DATA.parent)]  # nothing of this is installed

import dpo  # noqa: E402
import judge  # noqa: E402
import plan  # noqa: E402
import study  # noqa: E402

import alphapo  # noqa: E402
import test_alphapo as shared  # noqa: E402
from test_alphapo import (  # noqa: E402
    SHORT,
    SLOW,
    TINY,
    assert_close,
    cases,
    ends_in_one_line,
    resolved,
    run_small,
    small_model,
)

cpu_without_a_network = shared.cpu_without_a_network  # a fixture for every test here, too


def test_flops_are_those_that_torch_counts():
    """Forward and backward passes of one pair against the formula."""
    model, rng = small_model("llama"), np.random.default_rng(0)
    model.set_attn_implementation("eager")  # of the others torch does not count the attention
    pairs = [
        alphapo.Pair(*(rng.integers(3, 97, n).astype(np.int32) for n in (60, 40, 44)), "a pair")
    ]
    with FlopCounterMode(display=False) as counter:
        run_small(model, pairs, 1000, train=True)
    # torch counts every query with every key of the row
    unseen = 144**2 - (60**2 + 40**2 + 44**2) / 2 - 60 * 84
    counted = 12 * 3 * 32 * unseen + plan.pair_flops(model, pairs)[0]
    assert counter.get_total_flops() == pytest.approx(counted, rel=0.01)


class Tracker(TorchDispatchMode):
    """Bytes of the storages that live, and their peak; those on the meta device take none."""

    live = peak = 0
    known = frozenset()

    def note(self, tensor):
        if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided:
            storage = tensor.untyped_storage()
            if storage._cdata not in self.known and tensor.device.type != "meta":
                self.count({storage._cdata}, storage.nbytes())
                weakref.finalize(storage, self.count, {storage._cdata}, -storage.nbytes())

    def count(self, key, size):
        self.known = self.known ^ key
        self.live += size
        self.peak = max(self.peak, self.live)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(results):
            self.note(tensor)
        return results


SHAPES_7B = {
    "mistral": dict(sliding_window=None),  # 7B by default
    "llama": dict(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    ),
    "gemma2": dict(
        vocab_size=256000,
        hidden_size=3584,
        intermediate_size=14336,
        num_hidden_layers=42,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=256,
    ),
}


WIDTHS = [
    ("mistral", 900),
    ("llama", 900),
    ("gemma2", 900),
    ("mistral", 3900),
    ("llama", 3900),
    ("gemma2", 3900),
]


@cases("name, width", WIDTHS if SLOW else WIDTHS[:3])
def test_the_plan_of_a_gpu_is_what_the_tensors_of_a_step_take(name, width, monkeypatch):
    """Two micro-batches of real shapes on fake tensors, with gradient sums and checkpointing."""
    monkeypatch.setitem(alphapo.ProjectedLogps.chunk, "cpu", alphapo.ProjectedLogps.chunk["cuda"])
    tracker, sums, ids = Tracker(), {}, np.arange(3, 3 + width // 3, dtype=np.int32)

    def take_gradient(param):
        sums[param] = sums[param].add_(param.grad) if param in sums else param.grad.float()
        param.grad = None

    with FakeTensorMode(allow_non_fake_inputs=True):
        config = AutoConfig.for_model(name, **SHAPES_7B[name])
        model = AutoModel.from_config(config, dtype=torch.bfloat16).train()
        old = model.gradient_checkpointing_enable  # renamed in transformers 5.18
        getattr(model, "activation_checkpointing_enable", old)({"use_reentrant": False})
        for param in model.parameters():
            tracker.note(param)
            param.register_post_accumulate_grad_hook(take_gradient)
        with tracker:
            for _ in range(2):
                rows = alphapo.make_rows([(ids, ids, ids)] * (16384 // width))
                sum(alphapo.pair_logps(model, rows)).sum().backward()
    config = alphapo.Config(device="cuda", dtype="bfloat16", micro_tokens=16384)
    config.gradient_checkpointing = True
    needed = plan.memory_needed(model, config, width, "cpu", "cuda")["cuda"]
    tracked, planned = tracker.peak / 2**30, sum(needed.values())
    assert 30 < tracked <= planned <= 1.2 * tracked, (tracked, needed)


def plan_of(config):
    return plan.make_plan(config, *alphapo.load_data(config)[1:3])


def test_the_plan_counts_what_the_run_does():
    config = resolved(max_steps=2, batch_size=8, dtype="bfloat16")
    made, pairs = plan_of(config), alphapo.load_data(config)[1]
    count = sum(param.numel() for param in alphapo.load_model(str(TINY)).parameters())
    assert (made["parameters"], made["steps"], plan_of(resolved())["steps"]) == (count, 2, 2 * 10)
    assert made["tokens"] == pytest.approx(16 * alphapo.token_counts(pairs).sum() / 294, abs=1)
    bytes_each = {k: size * 2**30 / count for k, size in made["memory_gib"]["cpu"].items()}
    want = {"weights": 2, "gradient sums": 4, "masters and moments": 12}
    assert bytes_each | want == bytes_each


@cases("card, title", [(80, "masters on the host"), (24, "masters and gradient sums on the host")])
def test_a_7b_model_puts_on_the_host_what_the_gpu_cannot_hold(card, title, monkeypatch):
    """The arithmetic of the plan alone: no GPU, no weights."""
    both = alphapo.load_data(resolved())[1:3]
    AutoConfig.for_model("mistral", sliding_window=None).save_pretrained("model")
    monkeypatch.setattr(plan, "free_memory", dict(cuda=0.95 * (card - 0.8), cpu=200).get)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    config = resolved(model="model", dtype="bfloat16", micro_tokens=16384, resume=True)
    config.gradient_checkpointing, config.device = True, "cuda"
    made = plan.make_plan(config, *both)  # which would raise if it did not fit
    assert made["places"] == plan.PLACEMENTS[title]
    assert made["parameters"] == 7_241_732_096 and made["peak_flops"] == 989e12


def test_what_memory_or_disk_cannot_hold_is_refused(monkeypatch, capsys):
    settings = alphapo.resolve(alphapo.parse_arguments(SHORT))
    made, usage = plan_of(settings), shutil.disk_usage(".")
    need = sum(made["memory_gib"]["cpu"].values())
    assert made["disk_gib"] * 2**30 > 3 * 13e6  # a checkpoint takes 13 MB, and three exist at once
    pages = {"SC_PAGE_SIZE": 2**12, "SC_PHYS_PAGES": 2**18 * need * 1.001}
    monkeypatch.setattr(os, "sysconf", pages.get)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=5 * 10**6))
    ends_in_one_line(SHORT, "the disk has no room", capsys)
    pages["SC_PHYS_PAGES"] = 2**18 * need * 0.999
    ends_in_one_line(SHORT, "lower --micro-tokens", capsys)
    alphapo.main([*SHORT, "--plan"])  # but --plan answers, and says what one GPU would need
    answer = capsys.readouterr().out
    assert all(title in answer for title in plan.PLACEMENTS) and not Path("out").exists()


def test_to_write_the_model_takes_less_memory_than_masters_and_moments_did(monkeypatch):
    """Where the masters are on the host, that is what the host held; here all is on the CPU."""
    tracker, save_model = Tracker(), alphapo.save_model

    def watched(*args):
        tracker.peak = tracker.live
        return save_model(*args)

    monkeypatch.setattr(alphapo, "save_model", watched)
    with tracker:
        summary = alphapo.train(resolved(max_steps=1, batch_size=4))
    assert 2 < tracker.peak / summary["plan"]["parameters"] < 12


def test_the_tiny_data_are_what_their_judge_says():
    for name, count in (("train.jsonl", 2000), ("eval.jsonl", 300)):
        rows = [json.loads(line) for line in (TINY / name).read_text().splitlines()]
        assert len(rows) == count
        for row in rows:
            answers = (row[key][0]["content"] for key in ("chosen", "rejected"))
            best, worst = (judge.judge(row["kind"], row["reference"], answer) for answer in answers)
            assert [round(best, 3), round(worst, 3)] == row["scores"] and best > worst


def test_dpo_is_its_closed_form_and_starts_at_log_2():
    logps = -9 * torch.rand(4, 8, dtype=torch.float64)
    logps.requires_grad_()
    losses, chosen_rewards, rejected_rewards = dpo.dpo_loss(*logps, 0.1)
    margin = 0.1 * ((logps[0] - logps[2]) - (logps[1] - logps[3])).detach()
    assert_close(losses, (1 + (-margin).exp()).log())
    assert_close(chosen_rewards - rejected_rewards, margin)
    push = 0.1 / (1 + margin.exp())
    assert_close(torch.autograd.grad(losses.sum(), logps)[0][:2], torch.stack([-push, push]))
    config = resolved(max_steps=4, batch_size=16)
    summary = alphapo.train(config, dpo.ReferenceDPO(config, 0.1))
    assert summary["before"]["eval_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert summary["after"]["eval_loss"] < summary["before"]["eval_loss"]


def test_the_tables_of_the_study_are_computed_from_its_results():
    text = (DATA / "study" / "README.md").read_text()
    results, grid = study.read_jsonl(DATA / "study" / "results.jsonl"), study.Study()
    assert not study.missing(study.map_jobs(grid) + study.tuned_jobs(grid, results), results)
    tables = dict(map=study.map_table(grid, results), tuned=study.tuned_table(grid, results))
    for name, table in (tables | dict(real=study.real_table(results))).items():
        assert f"<!-- table:{name} -->\n{table}\n<!-- end -->" in text


@pytest.mark.skipif(not SLOW, reason="takes minutes; CI=1 runs it")
def test_the_quick_study_runs_whole():
    command = [sys.executable, DATA / "study" / "study.py", "--quick", "--out", "quick"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "score − SimPO's" in done.stdout and len(list(Path("quick/figures").glob("*.svg"))) == 4


UNREACHABLE = {"--model llama-3-8b-instruct": "hf auth login", "--data a/pairs": "a/pairs: not"}


def test_without_a_network_a_preset_runs_from_the_cache_or_gets_one_line():
    """The tiny model in the place of Mistral-7B, and a module in the place of datasets."""
    repository = Path("cache/hub/models--mistralai--Mistral-7B-Instruct-v0.2")
    for name in ("snapshots", "refs"):
        (repository / name).mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots" / ("0" * 40)).symlink_to(TINY)
    lines = "import json", "def load_dataset(name, split):", f"    rows = open({shared.EVAL!r})"
    lines += ('    assert name == "princeton-nlp/mistral-instruct-ultrafeedback"',)
    Path("datasets.py").write_text("\n".join([*lines, "    return map(json.loads, rows)"]))
    away = dict(HF_HUB_OFFLINE="0", HF_ENDPOINT="http://127.0.0.1:9", HF_HOME="cache")
    args = "--model mistral-7b-instruct --alpha 0.3 --max-steps 1".split()
    shared.run(args, PYTHONPATH=".", **away)
    settings = json.loads(Path("out/summary.json").read_text())["config"]
    want = dict(alpha=0.3, beta=2.5, gamma=0.25, learning_rate=7e-7, max_prompt_length=1800)
    assert settings | want == settings
    for command, line in UNREACHABLE.items():
        error = shared.run([*command.split(), "--out", "new"], 2, **away).stderr
        assert len(error.splitlines()) == 1 and line in error, error
        assert ("licence" in error) == ("llama" in command) and not Path("new").exists()
