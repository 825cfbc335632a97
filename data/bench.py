#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Time and memory of alphapo.py, one JSON line per measurement.

    python data/bench.py                                  # the tiny model, UltraFeedback's lengths
    python data/bench.py --shape mistral-7b --pairs 256   # random weights of that shape
    python data/bench.py --model DIR --data FILE --pairs 32 -- --micro-tokens 512
    python data/bench.py --model DIR --data FILE --pairs 32 --trl    # beside TRL
    python data/bench.py --gpu-day             # all that a GPU is wanted for, in nine minutes
    python data/bench.py --gpu-day --rehearse  # the same code on tiny shapes, on a CPU too

What stands after -- goes to alphapo.py. --trl alternates with TRL's CPOTrainer at micro-batches of
1, 2 and 4 pairs and compares with the best of them; it needs: pip install trl accelerate
Ours is the time of the steps, after a rehearsal; TRL's that of trainer.train(), all of it.
--gpu-day takes transformers from wheels in .whl/ where the installed one is older than 5.22.

TFLOP/s count the work that is needed: each prompt once, and nothing that is computed again.
"""

import argparse
import contextlib
import functools
import importlib.metadata
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
installed = importlib.metadata.version("transformers")
if "--gpu-day" in sys.argv and tuple(map(int, installed.split(".")[:2])) < (5, 22):
    wheels, site = sorted((ROOT / ".whl").glob("*.whl")), tempfile.mkdtemp()
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile"]
    if not wheels or subprocess.run([*pip, "--target", site, *wheels], stdout=2).returncode:
        error = f"transformers {installed} is older than 5.22: put a wheel of it into .whl/"
        print(json.dumps(dict(what="versions", error=error)), flush=True)
    sys.path.insert(0, site)
    os.environ["PYTHONPATH"] = site + os.pathsep + os.environ.get("PYTHONPATH", "")

import transformers  # noqa: E402

import alphapo  # noqa: E402

GIB, CUDA = 2**30, torch.cuda.is_available()
SHAPES = {
    "tiny": json.loads((alphapo.TINY / "config.json").read_text()),
    "llama-3.2-1b": dict(
        model_type="llama", vocab_size=128256, hidden_size=2048, intermediate_size=8192,
        num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8, head_dim=64,
        tie_word_embeddings=True),
    "mistral-7b": dict(
        model_type="mistral", vocab_size=32000, hidden_size=4096, intermediate_size=14336,
        num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, sliding_window=None),
}  # fmt: skip


# ------------------------------------------------------------------------------------ measuring
def report(what, **result):
    """Print a measurement and what it was made on, at once, because the next may be killed."""
    device = torch.cuda.get_device_name() if CUDA else "cpu"
    versions = dict(torch=torch.__version__, transformers=transformers.__version__)
    about = dict(what=what, device=device, threads=torch.get_num_threads()) | versions
    rounded = json.loads(json.dumps(result), parse_float=lambda text: float(f"{float(text):.6g}"))
    print(json.dumps(about | rounded), file=sys.__stdout__, flush=True)


class Clock(dict):
    """Seconds from lap to lap, by name."""

    def __init__(self):
        self.last = time.perf_counter()

    def lap(self, name):
        now = time.perf_counter()
        self[name], self.last = now - self.last, now


def make_inputs(folder, shape, count, scale=1.0, vocabulary=None):
    """Write a model folder without weights, with the tokenizer of the tiny model, and pairs of
    UltraFeedback's lengths: prompts of 180 tokens, responses of 350. Returns (model, data)."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(alphapo.TINY)
    settings = SHAPES[shape] | {"max_position_embeddings": 32768}
    settings["vocab_size"] = vocabulary or settings["vocab_size"]
    for kind in ("bos_token_id", "eos_token_id", "pad_token_id"):
        settings[kind] = getattr(tokenizer, kind)
    model, data, rng = Path(folder, "model"), Path(folder, "pairs.jsonl"), np.random.default_rng(0)
    transformers.AutoConfig.for_model(**settings).save_pretrained(model)
    tokenizer.save_pretrained(model)

    def text(median, spread):
        length = scale * min(1700, rng.lognormal(np.log(median), spread))
        words = rng.choice(["fox", "owl", "bear", "sings", "river", "lamp"], max(4, int(length)))
        return " " + " ".join(words)

    rows = (
        dict(prompt=text(120, 0.9), chosen=text(290, 0.6), rejected=text(290, 0.6))
        for _ in range(count)
    )
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(model), str(data)


def random_model(folder, dtype=torch.float32):
    """Random weights of the config in a folder, made where they are used."""
    config = transformers.AutoConfig.from_pretrained(folder)
    torch.manual_seed(0)
    with torch.device("cuda" if CUDA else "cpu"):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def inputs_of(config):
    """The model without weights and the pairs of a run, without what alphapo.py prints of them."""
    with contextlib.redirect_stdout(None):
        return alphapo.make_skeleton(config.model), alphapo.load_data(config)[1]


def needed_flops(model, pairs):
    """Floating-point operations to train on each pair, (pairs,): what is needed, without repeats.

    Six per weight and token, the projection for response tokens only, and twelve per layer, channel
    of attention and (query, key) that attends. Source: PaLM, arXiv 2204.02311, appendix B."""
    text, head = model.config.get_text_config(), model.get_output_embeddings().weight
    tied = head is model.get_input_embeddings().weight
    body = model.num_parameters() - head.numel() * (1 if tied else 2)
    heads = text.num_attention_heads
    channels = heads * (getattr(text, "head_dim", None) or text.hidden_size // heads)
    lengths = [[len(ids) for ids in pair[:3]] for pair in pairs]
    prompt, chosen, rejected = np.array(lengths, dtype=float).T
    responses = chosen + rejected
    attending = (prompt**2 + chosen**2 + rejected**2) / 2 + prompt * responses
    attention = 12 * text.num_hidden_layers * channels * attending
    return 6 * (body * (prompt + responses) + head.numel() * responses) + attention


def figures(config):
    """Speed and memory of a finished run, whose rehearsal warmed up."""
    summary = json.loads(Path(config.out, "summary.json").read_text())
    steps, keys = alphapo.read_log(config.out)[0], ("seconds", "optimizer_seconds", "pairs")
    seconds, optimizer, count = (sum(step[key] for step in steps) for key in keys)
    tflop = needed_flops(*inputs_of(config)).mean() * count / 1e12
    result = {key: summary["config"][key] for key in ("offload", "micro_tokens", "plain_rows")}
    result.update(planned_gib=summary["plan"]["memory"], peak_gib=summary["peak_memory_gib"])
    result.update(seconds_per_pair=seconds / count, seconds=[step["seconds"] for step in steps])
    result.update(tflops=tflop / seconds, tflops_without_optimizer=tflop / (seconds - optimizer))
    return result | dict(losses=[step["loss"] for step in steps])


# ------------------------------------------------------------------------------------ beside TRL
def run_ours(args, model, data, *flags):
    """Run alphapo.py in a process of its own; return its speed and memory."""
    flags = [*args.flags, *flags, "--dtype", args.dtype, "--max-length", str(args.max_length)]
    flags += ["--model", model, "--data", data, "--batch-size", str(args.batch_size)]
    flags += ["--gradient-checkpointing", "true"] if args.checkpointing else []
    with tempfile.TemporaryDirectory() as out:
        flags += ["--out", out, "--eval-split", "0"]
        command = [sys.executable, str(ROOT / "alphapo.py"), *flags]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"bench: alphapo.py failed: {done.stderr.strip()[-500:]}")
        return figures(alphapo.resolve(alphapo.parse_arguments(flags)))


def run_trl(args, model, data):
    """Train with TRL's CPOTrainer in this process; return its speed and memory."""
    from datasets import Dataset
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    micro, rows = args.trl_micro, [json.loads(line) for line in open(data)]
    settings = CPOConfig(
        output_dir=tempfile.mkdtemp(), loss_type="alphapo", alpha=0.25, beta=2.5, simpo_gamma=0.25,
        learning_rate=7e-7, lr_scheduler_type="constant", num_train_epochs=1, seed=0,
        per_device_train_batch_size=micro, gradient_accumulation_steps=args.batch_size // micro,
        max_length=args.max_length, bf16=args.dtype == "bfloat16", use_cpu=not CUDA,
        gradient_checkpointing=args.checkpointing, save_strategy="no", report_to=[],
        remove_unused_columns=False, disable_tqdm=True)  # fmt: skip
    policy = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    inputs = dict(train_dataset=Dataset.from_list(rows))
    inputs.update(processing_class=transformers.AutoTokenizer.from_pretrained(model))
    trainer, clock = CPOTrainer(model=policy, args=settings, **inputs), Clock()
    trainer.train()
    clock.lap("train")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peak = (torch.cuda.max_memory_allocated() if CUDA else peak) / GIB
    return dict(micro=micro, seconds_per_pair=clock["train"] / len(rows), peak_gib=peak)


def beside_trl(args, model, data):
    """Alternate with TRL, each run in a process of its own, and print the ratios to TRL's best. The
    runs with plain rows show how much of a gain is the shared prompt."""
    runs = {"alphapo": [], "alphapo, plain rows": [], "trl": []}
    for micro in [1, 2, 4] * args.rounds:
        runs["alphapo"].append(run_ours(args, model, data))
        runs["alphapo, plain rows"].append(run_ours(args, model, data, "--plain-rows"))
        command = [sys.executable, *sys.argv, "--trl-micro", str(micro)]
        command[2:2] = ["--model", model, "--data", data]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"bench: TRL failed: {done.stderr.strip()[-500:]}")
        runs["trl"].append(json.loads(done.stdout.splitlines()[-1]))
        for who, results in runs.items():
            report(**results[-1] | {"what": who})
    ours, plain, peer = (min(x, key=lambda run: run["seconds_per_pair"]) for x in runs.values())
    for run in ours, plain:
        what = f"beside TRL at its best, micro-batches of {peer['micro']}"
        speed = peer["seconds_per_pair"] / run["seconds_per_pair"]
        ratios = dict(times_the_speed=speed, share_of_the_memory=run["peak_gib"] / peer["peak_gib"])
        report(what, dtype=args.dtype, plain_rows=run["plain_rows"], **ratios)


# ------------------------------------------------------------------------------------ a GPU's day
def memory():
    """GiB: the peak on the GPU of what torch used and held, and what its host uses now."""
    lines = dict(line.split(":") for line in open("/proc/meminfo"))
    total, free = (int(lines[key].split()[0]) / 2**20 for key in ("MemTotal", "MemAvailable"))
    used, held = torch.cuda.max_memory_allocated() / GIB, torch.cuda.max_memory_reserved() / GIB
    return dict(gpu_peak=used, gpu_held=held, host_used=total - free, host_total=total)


class Day:
    """What the parts of a GPU's day share: a folder, whether shapes are tiny, when to end."""

    def __init__(self, folder, small, seconds):
        self.folder, self.small, self.end = folder, small, time.time() + seconds

    def part(self, what, function, *arguments):
        """Run a part and print what it returns. Where it fails, the next one runs all the same."""
        if time.time() > self.end:
            return report(what, skipped="the time is over")
        if CUDA:
            torch.cuda.init()
            torch.cuda.reset_peak_memory_stats()
        try:
            result = function(*arguments) or {}
            report(what, **result, gib=memory())
            return result
        except Exception as error:
            text, where = f"{type(error).__name__}: {error}"[:900], traceback.format_exc()[-900:]
            report(what, error=text, where=where, gib=memory())

    def config(self, shape, count, vocabulary=None, **settings):
        """Settings of a run on random weights of a shape and on random pairs."""
        folder = tempfile.mkdtemp(dir=self.folder)
        shape, scale = ("tiny", 0.05) if self.small else (shape, 1.0)
        model, data = make_inputs(folder, shape, count, scale, vocabulary)
        files = dict(model=model, data=data, out=folder + "/out", eval_split=0)
        return alphapo.resolve(alphapo.Config(**files, **settings))


class Run:
    """What alphapo.train does with all weights of a 7B shape, in pieces: one set-up, because that
    touches more than 100 GiB, and then every way to lay out a step, on the same pairs."""

    def __init__(self, day, on_exit):
        batch = 4 if day.small else 64
        cpu = dict(dtype="bfloat16", gradient_checkpointing=True, offload="keep")  # as on a GPU
        self.config = day.config("mistral-7b", batch, batch_size=batch, **{} if CUDA else cpu)
        alphapo.start_processes(self.config, on_exit)
        self.skeleton, self.pairs = inputs_of(self.config)
        self.flops, self.everything = needed_flops(self.skeleton, self.pairs), list(range(batch))

    def loss_fn(self, chosen, rejected, *_):
        return alphapo.alphapo_loss(chosen, rejected, 0.25, 2.5, 0.25)

    def find_settings(self, config):
        """Choose where weights live. make_plan would ask for room on the disk, too."""
        place = alphapo.find_settings(config, self.skeleton, self.pairs)
        self.config = replace(config, **place["settings"])
        return place

    def set_up(self):
        place, clock = self.find_settings(self.config), Clock()  # before weights take memory
        whole = random_model(self.config.model)
        clock.lap("weights")
        refused, *checked = alphapo.check_model(whole, self.pairs)
        clock.lap("check")
        self.model = alphapo.shard(whole, self.skeleton, self.config, place["pin_memory"])
        clock.lap("shard")
        self.optimizer, _ = alphapo.make_optimizer(self.model)
        self.optimizer.param_groups[0]["lr"] = self.config.learning_rate
        clock.lap("optimizer")
        run = self.model, self.optimizer, self.pairs, checked, self.loss_fn, self.config
        alphapo.rehearse(*run)
        clock.lap("rehearsal")
        return place | dict(seconds=clock, shared_rows_refused=refused)

    def gradients(self, indices, config):
        run = self.model, self.pairs, indices, self.loss_fn, config
        return alphapo.run_pairs(*run, training=True)

    def step(self, indices, config):
        """One step as in alphapo.train, and the seconds of its parts."""
        clock = Clock()
        loss = self.gradients(indices, config)["loss"]
        clock.lap("gradients")
        alphapo.clip_gradient(self.optimizer, config.max_grad_norm)
        clock.lap("clipping")
        self.optimizer.step()
        self.optimizer.zero_grad()
        clock.lap("updating")
        names, seconds = ("offload", "micro_tokens", "plain_rows"), sum(clock.values())
        about = {name: getattr(config, name) for name in names} | dict(pairs=len(indices))
        tflop = self.flops[indices].sum() / 1e12
        speed = dict(tflops=tflop / seconds, tflops_without_optimizer=tflop / clock["gradients"])
        return about | dict(seconds=seconds, **clock, **speed, loss=loss)

    def kernels(self, indices, config):
        """Shares of time of the twelve kernels that take most, in the gradient of some pairs."""
        kind, key = ("CUDA", "self_device_time_total") if CUDA else ("CPU", "self_cpu_time_total")
        clock, activity = Clock(), getattr(torch.profiler.ProfilerActivity, kind)
        with torch.profiler.profile(activities=[activity]) as profiler:
            self.gradients(indices, config)
        clock.lap("wall")
        self.optimizer.zero_grad()
        times = {}
        for event in profiler.key_averages():  # FSDP's marks would count what they hold once more
            if event.device_type.name == kind and not event.is_user_annotation:
                times[event.key[:60]] = times.get(event.key[:60], 0) + getattr(event, key) / 1e6
        most, total = sorted(times, key=times.get, reverse=True)[:12], sum(times.values())
        return clock | dict(kernels=total, shares={name: times[name] / total for name in most})

    def small_card(self):
        """From now on let the GPU be one of 24 GiB, to which weights come layer by layer."""
        config = replace(self.config, offload="layers", micro_tokens=None, batch_size=16)
        if CUDA:
            torch.cuda.empty_cache()
            usable, total = 23.5 * GIB, torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(usable / total)
            torch.cuda.mem_get_info = lambda *_: (usable, 24 * GIB)
            config.offload = "auto"
        place = self.find_settings(config)
        if self.config.offload != "layers":
            raise ValueError(f"the plan is {place}, and not layers")
        for layer in alphapo.layers_of(self.model):
            layer.set_reshard_after_forward(True)
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
        return place | self.step(self.everything[:16], self.config)


def seven_billion(day):
    """Shared and plain rows, two sizes of micro-batches with the faster of them, a smaller card."""
    with contextlib.ExitStack() as on_exit:
        run = Run(day, on_exit)
        day.part("7B, set-up", run.set_up)
        shared, plain = (replace(run.config, plain_rows=plain_rows) for plain_rows in (False, True))

        def steps(what, config):
            day.part(f"7B, {what}, first step", run.step, run.everything, config)
            second = day.part(f"7B, {what}, second step", run.step, run.everything, config)
            return (second or {}).get("tflops", 0.0)

        speed = steps("shared rows", shared)
        day.part("7B, shared rows, kernels", run.kernels, run.everything[:16], shared)
        faster = plain if steps("plain rows", plain) > speed else shared
        day.part("7B, plain rows, kernels", run.kernels, run.everything[:16], plain)
        for micro_tokens in (64, 512) if day.small else (2048, 3072):
            steps(f"{micro_tokens} tokens", replace(faster, micro_tokens=micro_tokens))
        day.part("7B on 24 GiB", run.small_card)


def llama(day, vocabulary):
    """A Llama of 1.2 B weights through alphapo.train, saving included."""
    batch, vocabulary = (4, vocabulary // 10) if day.small else (64, vocabulary)
    config = day.config("llama-3.2-1b", 3 * batch, vocabulary, batch_size=batch)

    def run():
        model, clock = random_model(config.model), Clock()
        alphapo.train(config, model=model)
        clock.lap("seconds_of_train")
        size = sum(path.stat().st_size for path in Path(config.out).glob("*.safetensors"))
        return figures(config) | clock | dict(saved_gib=size / GIB)

    day.part(f"1B, {vocabulary} tokens", run)


def tiny(day):
    """Losses of the tiny model in both dtypes on the GPU, beside those of the CPU in float32."""
    losses, gpu = [], "cuda" if CUDA else "cpu"

    def run(device, dtype):
        settings = dict(device=device, dtype=dtype, out=tempfile.mkdtemp(dir=day.folder))
        settings.update(batch_size=8, max_steps=2 if day.small else 50, save_every=25)
        settings.update(eval_data=None, eval_split=0, eval_every=None)
        alphapo.train(alphapo.Config(**alphapo.PRESETS["tiny"] | settings))
        steps = alphapo.read_log(settings["out"])[0]
        losses.append(np.array([step["loss"] for step in steps]))
        seconds, apart = sum(step["seconds"] for step in steps), abs(losses[-1] - losses[0]).max()
        result = dict(seconds_per_step=seconds / len(steps), most_apart=float(apart))
        return result | dict(losses=losses[-1].tolist())

    for device, dtype in ("cpu", "float32"), (gpu, "float32"), (gpu, "bfloat16"):
        day.part(f"the tiny model, {dtype} on {device}", run, device, dtype)


PARTS = {  # the most wanted first, with the seconds that each may take
    "7b": (300, seven_billion),
    "1b": (75, lambda day: llama(day, 128256)),
    "tiny": (60, tiny),
    "vocabularies": (75, lambda day: [llama(day, vocabulary) for vocabulary in (32000, 256000)]),
}


def gpu_day(small, seconds):
    """Run each part in a process of its own, because one that is killed takes no other with it."""
    slow = 10 if small else 1  # a rehearsal measures nothing, and its machine may be busy
    day, clock = Day(None, small, slow * seconds), Clock()

    def run(limit, command, *streams):
        """Exit status and lines of a process, which is killed with its own children at a limit."""
        limit = min(limit, day.end + 50 - time.time())  # what starts late ends early
        with tempfile.TemporaryFile("w+") as log:
            streams = dict.fromkeys(streams, log)
            process = subprocess.Popen(command, start_new_session=True, **streams)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(limit)
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            log.seek(0)
            return dict(status=process.wait(), lines=log.read().splitlines())

    def tests():
        command = [sys.executable, "-m", "pytest", "-q", "-k", "gpu", ROOT / "test_alphapo.py"]
        done = run(slow * 60, command, "stdout", "stderr")
        failed = [line[:200] for line in done["lines"] if line.startswith(("FAILED", "ERROR"))]
        return dict(status=done["status"], outcome=done["lines"][-1:], failed=failed[:12])

    def part(name, limit):
        command = [sys.executable, __file__, "--part", name, *["--rehearse"] * small]
        command += ["--seconds", str(min(limit, day.end + 50 - time.time()) - 15)]
        done = run(limit, command, "stderr")
        if done["status"]:
            raise ChildProcessError(f"{done['status']}: {' | '.join(done['lines'][-6:])[-800:]}")

    day.part("the machine", lambda: dict(cores=os.cpu_count()))
    day.part("tests for a GPU", tests)
    for name, (limit, _) in PARTS.items():
        day.part(f"end of {name}", part, name, slow * limit)
    clock.lap("seconds")
    report("end of the day", **clock)


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
    parser.add_argument("--gpu-day", action="store_true", help="all that a GPU is wanted for")
    parser.add_argument("--rehearse", action="store_true", help="the day on tiny shapes")
    parser.add_argument("--part", choices=PARTS, help="one part of the day")
    parser.add_argument("--seconds", type=float, default=480, help="start nothing after so long")
    parser.add_argument("flags", nargs="*", help="for alphapo.py, after --")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    if args.gpu_day:
        return gpu_day(args.rehearse, args.seconds)
    with tempfile.TemporaryDirectory() as folder:
        if args.part:
            with contextlib.redirect_stdout(sys.stderr):  # our lines alone go out
                return PARTS[args.part][1](Day(folder, args.rehearse, args.seconds))
        model, data = make_inputs(folder, args.shape, args.pairs)
        if args.data:
            lines = Path(args.data).read_text().splitlines(keepends=True)
            Path(data).write_text("".join(lines[: args.pairs]))
        if args.model is None:
            random_model(model, torch.bfloat16).save_pretrained(model)
        model = args.model or model
        if args.trl_micro:
            report("trl", **run_trl(args, model, data))
        elif args.trl:
            beside_trl(args, model, data)
        else:
            report(args.model or args.shape, **run_ours(args, model, data))


if __name__ == "__main__":
    main()
