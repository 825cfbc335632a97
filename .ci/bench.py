#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Time and memory of alphapo.py, one JSON line per measurement.

    python .ci/bench.py                                    # the tiny model, UltraFeedback's lengths
    python .ci/bench.py --shape mistral-7b --pairs 256     # random weights of that shape
    python .ci/bench.py --model DIR --data FILE --pairs 32 -- --micro-tokens 512
    python .ci/bench.py --model DIR --data FILE --pairs 32 --trl    # beside TRL
    python .ci/bench.py --cuda-day                         # everything for a GPU, in nine minutes

What stands after -- goes to alphapo.py. --trl alternates with TRL's CPOTrainer at micro-batches of
1, 2 and 4 pairs and compares with the best of them; it needs: pip install trl accelerate
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
SHAPES = {
    "tiny": None,
    "llama-3.2-1b": dict(
        model_type="llama", vocab_size=128256, hidden_size=2048, intermediate_size=8192,
        num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8, head_dim=64,
        tie_word_embeddings=True),
    "mistral-7b": dict(
        model_type="mistral", vocab_size=32000, hidden_size=4096, intermediate_size=14336,
        num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, sliding_window=None),
}  # fmt: skip
# runs alphapo.py on a part of the GPU, as if the card were that small
SMALL_CARD = """
import sys, torch, alphapo
gib = float(sys.argv.pop(1))
whole = torch.cuda.get_device_properties(0).total_memory / 2**30
torch.cuda.set_per_process_memory_fraction(gib / whole)
torch.cuda.mem_get_info = lambda: (gib * 2**30, gib * 2**30)
alphapo.main()
"""


def make_model(shape, folder, vocabulary=None):
    """Write random bfloat16 weights of a shape, with the tokenizer of the tiny model."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data" / "tiny")
    settings = SHAPES[shape] or AutoConfig.from_pretrained(ROOT / "data" / "tiny").to_dict()
    settings = settings | {"max_position_embeddings": 32768}
    if vocabulary:
        settings["vocab_size"] = vocabulary
    for kind in ("bos", "eos", "pad"):
        settings[f"{kind}_token_id"] = getattr(tokenizer, f"{kind}_token_id")
    config = AutoConfig.for_model(**settings)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_pairs(path, count):
    """Write pairs with UltraFeedback's lengths: prompts of 180 tokens, responses of 350."""
    rng = np.random.default_rng(0)
    words = ["fox", "owl", "bear", "sings", "river", "lamp"]

    def text(median, spread):
        length = min(1700, rng.lognormal(np.log(median), spread))
        return " " + " ".join(rng.choice(words, max(4, int(length))))

    with open(path, "w") as file:
        for _ in range(count):
            row = dict(prompt=text(120, 0.9), chosen=text(290, 0.6), rejected=text(290, 0.6))
            file.write(json.dumps(row) + "\n")


def run_ours(model, data, batch_size, flags, card_gib=None):
    """Run alphapo.py in a process of its own; return its speed and memory, or what went wrong."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        command = [sys.executable, ROOT / "alphapo.py"]
        if card_gib:
            command = [sys.executable, "-c", SMALL_CARD, card_gib]
        command += ["--model", model, "--data", data, "--out", out, "--eval-split", 0]
        command += ["--alpha", 0.25, "--beta", 2.5, "--gamma", 0.25, "--learning-rate", 1e-6]
        command += ["--batch-size", batch_size, *flags]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        command = list(map(str, command))
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            return dict(who="alphapo", error=done.stderr.strip()[-500:])
        summary = json.loads((out / "summary.json").read_text())
        steps = [json.loads(line) for line in (out / "metrics.jsonl").open()]
    steps = [metrics for metrics in steps if "loss" in metrics]
    later = steps[1:] or steps  # the first step warms up
    seconds = sum(metrics["seconds"] for metrics in later)
    total = {key: sum(metrics[key] for metrics in steps) for key in ("seconds", "pairs")}
    result = dict(plain_rows=summary["config"]["plain_rows"])
    result["seconds_per_pair"] = total["seconds"] / total["pairs"]
    optimizer_seconds = sum(metrics["optimizer_seconds"] for metrics in later)
    result["optimizer_share"] = optimizer_seconds / seconds
    plan, tokens = summary["plan"], sum(metrics["tokens"] for metrics in later)
    tflops = 1e3 * plan["pflop"] * tokens / plan["tokens"] / seconds
    result["tflops_without_first_step"] = tflops
    result["share_of_peak"] = plan["peak_flops"] and 1e12 * tflops / plan["peak_flops"]
    result["peak_gib"] = summary["peak_memory_gib"]
    result["plan_gib"] = summary["plan"]["memory_gib"]
    result["losses"] = [metrics["loss"] for metrics in steps]
    return dict(who="alphapo", places=summary["plan"]["places"], **result)


def run_trl(model, data, pairs, batch_size, micro, dtype, max_length, checkpointing):
    """Train with TRL's CPOTrainer in this process; return its speed and memory."""
    from datasets import Dataset
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    cuda = torch.cuda.is_available()
    settings = CPOConfig(
        output_dir=tempfile.mkdtemp(), loss_type="alphapo", alpha=0.25, beta=2.5, simpo_gamma=0.25,
        learning_rate=1e-6, lr_scheduler_type="constant", num_train_epochs=1, seed=0,
        per_device_train_batch_size=micro, gradient_accumulation_steps=batch_size // micro,
        max_length=max_length, bf16=dtype == "bfloat16", gradient_checkpointing=checkpointing,
        use_cpu=not cuda, save_strategy="no", report_to=[], remove_unused_columns=False,
        disable_tqdm=True,
    )  # fmt: skip
    rows = [json.loads(line) for line in open(data)]
    trainer = CPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        args=settings,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peak = torch.cuda.max_memory_allocated() if cuda else peak
    return dict(who="trl", micro=micro, seconds_per_pair=seconds / pairs, peak_gib=peak / 2**30)


def report(**result):
    """Print a measurement with the device that it was made on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    print(json.dumps(dict(device=device, threads=torch.get_num_threads()) | result), flush=True)


def beside_trl(args, model, data, flags):
    """Alternate with TRL, each run in a process of its own, and print the ratios of the best."""
    ours, peers = [], []
    command = [sys.executable, __file__, "--model", model, "--data", data, "--dtype", args.dtype]
    command += ["--pairs", args.pairs, "--batch-size", args.batch_size]
    command += ["--max-length", args.max_length, *["--checkpointing"] * args.checkpointing]
    for _ in range(args.rounds):
        for micro in (1, 2, 4):
            ours.append(run_ours(model, data, args.batch_size, flags))
            report(**ours[-1])
            one = [*command, "--trl-micro", micro]
            done = subprocess.run(list(map(str, one)), capture_output=True, text=True)
            lines = done.stdout.strip().splitlines()
            if done.returncode or not lines:
                sys.exit(f"bench: the peer failed: {done.stderr.strip()[-500:]}")
            peers.append(json.loads(lines[-1]))
            report(**peers[-1])
    mine = min(ours, key=lambda run: run["seconds_per_pair"])
    best = min(peers, key=lambda run: run["seconds_per_pair"])
    report(
        what=f"beside TRL at its best, micro-batches of {best['micro']}",
        dtype=args.dtype,
        times_the_pairs_per_second=best["seconds_per_pair"] / mine["seconds_per_pair"],
        share_of_the_memory=mine["peak_gib"] / best["peak_gib"],
    )


def cuda_day(folder, shape, seconds):
    """All that a GPU is wanted for, the most wanted first, until the time is over."""
    start = time.perf_counter()

    def measure(what, shape, pairs, batch_size, flags, card_gib=None, vocabulary=None):
        if time.perf_counter() - start > seconds:
            return report(what=what, skipped="the time is over")
        model = folder / f"{shape}-{vocabulary}"
        if not model.exists():
            make_model(shape, model, vocabulary)
        data = folder / "pairs.jsonl"
        make_pairs(data, pairs)
        began = time.perf_counter()
        result = run_ours(model, data, batch_size, flags, card_gib)
        result.update(shape=shape, flags=flags, wall_seconds=time.perf_counter() - began)
        report(what=what, **result)

    tests = [sys.executable, "-m", "pytest", "-q", "-k", "cuda", str(ROOT / "test_alphapo.py")]
    done = subprocess.run(tests, capture_output=True, text=True)
    report(what="tests that need a GPU", result=done.stdout.strip().splitlines()[-1:])
    measure("7B, all weights, one step of 128 pairs after one", shape, 256, 128, [])
    measure("7B on 24 GiB", shape, 32, 32, [], card_gib=24)
    measure("7B, compiled", shape, 256, 128, ["--compile"])
    for vocabulary in (32000, 256000):
        small = "llama-3.2-1b" if shape != "tiny" else "tiny"
        measure(f"{vocabulary} tokens", small, 64, 64, [], vocabulary=vocabulary)
    for flags in (["--dtype", "bfloat16"], ["--dtype", "float32", "--device", "cpu"]):
        measure("50 steps of the tiny model", "tiny", 400, 8, ["--max-steps", 50, *flags])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="tiny", help="of random weights")
    parser.add_argument("--model", help="a model folder, in place of random weights")
    parser.add_argument("--data", help="a .jsonl file of pairs")
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--checkpointing", action="store_true", help="on both sides")
    parser.add_argument("--trl", action="store_true", help="alternate with TRL at its best")
    parser.add_argument("--rounds", type=int, default=1, help="of the alternation")
    parser.add_argument("--trl-micro", type=int, help="run TRL alone, at this micro-batch")
    parser.add_argument("--cuda-day", action="store_true")
    parser.add_argument("--seconds", type=float, default=400, help="start nothing after so long")
    parser.add_argument("flags", nargs="*", help="for alphapo.py, after --")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        if args.cuda_day:
            shape = "mistral-7b" if torch.cuda.is_available() else "tiny"
            return cuda_day(folder, shape, args.seconds)
        model, data = args.model or folder / "model", folder / "pairs.jsonl"
        if args.data:
            data.write_text("".join(open(args.data).readlines()[: args.pairs]))
        else:
            make_pairs(data, args.pairs)
        if not args.model:
            make_model(args.shape, model)
        flags = ["--dtype", args.dtype, "--max-length", args.max_length, *args.flags]
        flags += ["--gradient-checkpointing", "true"] if args.checkpointing else []
        if args.trl_micro:
            settings = args.pairs, args.batch_size, args.trl_micro, args.dtype
            report(**run_trl(model, data, *settings, args.max_length, args.checkpointing))
        elif args.trl:
            beside_trl(args, model, data, flags)
        else:
            report(
                flags=args.flags, dtype=args.dtype, **run_ours(model, data, args.batch_size, flags)
            )


if __name__ == "__main__":
    main()
