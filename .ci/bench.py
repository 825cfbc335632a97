#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Time and memory of alphapo.py, or of TRL's CPOTrainer, on the same model and pairs: one JSON line.

    python .ci/bench.py                                     # the tiny model's shape, pairs as long as UltraFeedback's
    python .ci/bench.py --config mistral-7b --pairs 256     # random weights of that shape
    python .ci/bench.py --model DIR --data FILE --pairs 32 -- --dtype float32 --micro-tokens 512
    python .ci/bench.py --model DIR --data FILE --pairs 32 --peer trl [--dtype bfloat16] [--checkpointing]

What stands after -- is handed to alphapo.py. The peer needs: pip install trl datasets accelerate
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parent.parent
CONFIGS = {
    "tiny": None,
    "llama-3.2-1b": dict(
        model_type="llama", vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
        num_attention_heads=32, num_key_value_heads=8, head_dim=64, tie_word_embeddings=True, rope_theta=5e5,
        max_position_embeddings=131072, rms_norm_eps=1e-5),
    "mistral-7b": dict(
        model_type="mistral", vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, sliding_window=None, rope_theta=1e6,
        max_position_embeddings=32768, rms_norm_eps=1e-5),
}  # fmt: skip


def make_model(name, folder, vocabulary):
    """A checkpoint of random bfloat16 weights in that shape, with the tiny model's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data" / "tiny")
    settings = CONFIGS[name] or AutoConfig.from_pretrained(ROOT / "data" / "tiny").to_dict()
    settings |= dict(vocab_size=vocabulary) if vocabulary else {}
    settings |= {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    config = AutoConfig.for_model(**settings | dict(max_position_embeddings=32768))
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_pairs(path, count):
    """Pairs with lengths like UltraFeedback's: prompts about 180 tokens, responses about 350, tails to 2,048."""
    rng = np.random.default_rng(0)

    def text(median, spread, most):
        length = int(min(most, rng.lognormal(np.log(median), spread)))
        return " ".join(rng.choice(["fox", "owl", "bear", "sings", "river", "lamp"], max(4, length)))

    with open(path, "w") as file:
        for _ in range(count):
            row = dict(
                prompt=text(120, 0.9, 1700),
                chosen=" " + text(290, 0.6, 1700),
                rejected=" " + text(290, 0.6, 1700),
            )
            file.write(json.dumps(row) + "\n")


def run_ours(args, model, data, out):
    command = [sys.executable, ROOT / "alphapo.py", "--model", model, "--data", data, "--out", out]
    command += ["--eval-split", 0, "--batch-size", args.batch_size, "--max-length", args.max_length]
    command += [
        "--alpha",
        0.25,
        "--beta",
        2.5,
        "--gamma",
        0.25,
        "--learning-rate",
        1e-6,
        "--dtype",
        args.dtype,
    ]
    done = subprocess.run([*map(str, command), *args.flags], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    summary = json.loads((out / "summary.json").read_text())
    keys = "flops_per_second", "share_of_peak", "optimizer_share", "tokens_per_second"
    planned = sum(summary["plan"]["device_gib"].values())
    return dict(seconds_per_pair=1 / summary["pairs_per_second"], peak_gib=summary["peak_memory_gib"]) | dict(
        plan_gib=planned, peak_flops=summary["plan"]["peak_flops"], **{key: summary[key] for key in keys})  # fmt: skip


def run_trl(args, model, data, out):
    from datasets import Dataset
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    cuda, micro = torch.cuda.is_available(), min(4, args.batch_size)
    settings = CPOConfig(
        output_dir=str(out), loss_type="alphapo", alpha=0.25, beta=2.5, simpo_gamma=0.25, learning_rate=1e-6,
        per_device_train_batch_size=micro, gradient_accumulation_steps=args.batch_size // micro, num_train_epochs=1,
        seed=0, lr_scheduler_type="constant", max_length=args.max_length,
        bf16=args.dtype == "bfloat16", gradient_checkpointing=args.checkpointing,
        use_cpu=not cuda, save_strategy="no", report_to=[], remove_unused_columns=False, disable_tqdm=True,
    )  # fmt: skip
    trainer = CPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        args=settings,
        train_dataset=Dataset.from_list([json.loads(line) for line in open(data)]),
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return dict(
        seconds_per_pair=seconds / args.pairs,
        peak_gib=(torch.cuda.max_memory_allocated() if cuda else peak) / 2**30,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--config", choices=CONFIGS, default="tiny", help="shape of random weights, without --model"
    )
    parser.add_argument("--vocabulary", type=int, help="of that shape, in place of its own")
    parser.add_argument("--model", help="a model folder")
    parser.add_argument("--data", help="a .jsonl file of pairs")
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument(
        "--checkpointing", action="store_true", help="for the peer; ours is a flag of alphapo.py"
    )
    parser.add_argument("--peer", choices=["trl"])
    parser.add_argument("flags", nargs="*", help="for alphapo.py, after --")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        model, data = args.model or folder / "model", folder / "pairs.jsonl"
        if args.data:
            data.write_text("".join(open(args.data).readlines()[: args.pairs]))
        else:
            make_pairs(data, args.pairs)
        if not args.model:
            make_model(args.config, model, args.vocabulary)
        result = (run_trl if args.peer else run_ours)(args, model, data, folder / "out")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    setting = dict(
        who=args.peer or "alphapo", device=device, threads=torch.get_num_threads(), dtype=args.dtype
    )
    setting |= dict(model=str(args.model or args.config), pairs=args.pairs, flags=args.flags)
    print(json.dumps(setting | result))


if __name__ == "__main__":
    main()
