# SPDX-License-Identifier: MIT
"""What alpha does: AlphaPO over alpha, SimPO and DPO on the tiny model, judged on held-out prompts.

    python data/study.py                                # the study: under an hour on two cores, resumable
    python data/study.py figures                        # the figures and the table again, from data/study.json
    python data/study.py plot RUN... --out curves.png   # curves of several runs side by side
    python data/study.py real MODEL PAIRS.jsonl         # alpha on a model and pairs of yours, without a judge

For every method a learning rate is chosen from one grid, by the judged score on 200 validation prompts split from
the training pairs; then three seeds train at that rate and are judged on the 300 held-out prompts, which took no
part in the choice.
"""

import argparse
import contextlib
import io
import json
import math
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

DATA = Path(__file__).resolve().parent
sys.path[:0] = [str(DATA.parent), str(DATA)]
from make_tiny import judge_answers  # noqa: E402

import alphapo  # noqa: E402

ALPHAS = [-1.0, -0.5, -0.25, 0.0, 0.1, 0.25, 0.5, 1.0, 2.0]
METHODS = [*(f"alpha {alpha:g}" for alpha in ALPHAS), "DPO"]
RATES, SEEDS = [1e-4, 3e-4, 1e-3], [1, 2, 3]
VALIDATION, BETA, GAMMA, DPO_BETA = 200, 2.5, 0.1, 0.1
T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}  # Student's t, two-sided 95 %, by number of seeds

# ---------------------------------------------------------------- DPO


def dpo_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta):
    """The DPO loss, -log sigmoid(beta * ((c - ref_c) - (r - ref_r))) (arXiv 2305.18290, equation 7).

    Args:
        chosen_logps, rejected_logps: log-probability (nats) of the whole response, summed over tokens, (pairs,).
        ref_chosen_logps, ref_rejected_logps: the same of the reference model, (pairs,).
        beta: scale of the implicit reward.

    Returns:
        (losses, chosen_rewards, rejected_rewards), one value a pair; rewards carry no gradient.
    """
    chosen_rewards, rejected_rewards = (
        beta * (chosen_logps - ref_chosen_logps),
        beta * (rejected_logps - ref_rejected_logps),
    )
    losses = -torch.nn.functional.logsigmoid(chosen_rewards - rejected_rewards)
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


class ReferenceDPO:
    """DPO for the loss hook of alphapo.train: mean log-probabilities in, the reference's values looked up by pair."""

    def __init__(self, config, beta):
        """Compute the reference's log-probabilities of all pairs of a run, by the function that training uses."""
        self.beta, self.reference = beta, {}
        config = alphapo.resolve(config)
        data, model = alphapo.load_data(config), alphapo.load_model(config.model, config.device, False)
        plain = bool(alphapo.why_plain(model, data.pairs[0]))
        for pairs in (data.pairs, data.eval_pairs):
            for batch in alphapo.micro_batches(pairs, range(len(pairs)), config.micro_tokens, plain):
                with torch.no_grad():
                    rows = alphapo.make_rows([pairs[i] for i in batch], plain, model.device)
                    means = torch.stack(alphapo.pair_logps(model, rows), 1).cpu()
                self.reference |= {pairs.places[i]: mean for i, mean in zip(batch, means)}

    def __call__(self, chosen_logps, rejected_logps, pairs, batch):
        lengths = torch.tensor(
            [[len(part) for part in pairs[i][1:]] for i in batch], device=chosen_logps.device
        )
        sums = torch.stack([chosen_logps, rejected_logps], 1) * lengths
        reference = torch.stack([self.reference[pairs.places[i]] for i in batch]).to(sums.device) * lengths
        return dpo_loss(*sums.unbind(1), *reference.unbind(1), self.beta)


# ---------------------------------------------------------------- runs


def run(method, rate, seed, train, held_out, folder, **settings):
    """Train one model into folder; return the summary."""
    tiny = alphapo.PRESETS["tiny"] | dict(epochs=1, data=str(train), eval_data=held_out and str(held_out))
    config = dict(beta=BETA, gamma=GAMMA, learning_rate=rate, seed=seed, out=str(folder), eval_split=0.0)
    alpha = 0.0 if method == "DPO" else float(method.split()[1])
    config = alphapo.Config(**tiny | config | dict(alpha=alpha) | settings)
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.redirect_stdout(io.StringIO()):
        return alphapo.train(config, ReferenceDPO(config, DPO_BETA) if method == "DPO" else None)


def judged(folder, rows):
    """The judge's mean score for each prompt, their mean, and the mean length of the responses in tokens."""
    scores, length = judge_answers(folder, rows, seed=0)
    return dict(scores=np.round(scores, 4).tolist(), score=float(np.mean(scores)), length=length)


def curve(folder):
    """The evaluations of a run: steps, chosen log-probability a token, and its distance from the rejected one."""
    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    points = [m for m in log if "eval_loss" in m]
    chosen, rejected = (
        [round(m[f"eval_logps/{side}"], 5) for m in points] for side in ("chosen", "rejected")
    )
    return dict(steps=[m["step"] for m in points], chosen=chosen, rejected=rejected)


def study(path):
    """Run what is not in the file yet, and write it after each run."""
    results = json.loads(path.read_text()) if path.exists() else {"validation": [], "test": []}

    def record(part, result):
        results[part].append(result)
        path.with_suffix(".tmp").write_text(json.dumps(results, indent=None).replace("}, {", "},\n{") + "\n")
        path.with_suffix(".tmp").replace(path)

    lines = (DATA / "train.jsonl").read_text().splitlines(keepends=True)
    held_out = [json.loads(line) for line in (DATA / "eval.jsonl").read_text().splitlines()]
    validation = [json.loads(line) for line in lines[:VALIDATION]]
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        train, out = folder / "train.jsonl", folder / "out"
        train.write_text("".join(lines[VALIDATION:]))
        if "start" not in results:
            results["start"] = judged(DATA / "tiny", held_out)
        done = {(r["method"], r["rate"]) for r in results["validation"]}
        for method in METHODS:
            for rate in RATES:
                if (method, rate) not in done:
                    run(method, rate, 0, train, None, out)
                    score = judged(out, validation)["score"]
                    record("validation", dict(method=method, rate=rate, score=score))
                    print(f"validation: {method}, learning rate {rate:g}: score {score:.3f}", flush=True)
        done = {(r["method"], r["seed"]) for r in results["test"]}
        for seed in SEEDS:
            for method in METHODS:
                if (method, seed) in done:
                    continue
                tried = [r for r in results["validation"] if r["method"] == method]
                rate = max(tried, key=lambda r: r["score"])["rate"]
                summary = run(
                    method,
                    rate,
                    seed,
                    train,
                    DATA / "eval.jsonl",
                    out,
                    eval_every=8 if seed == SEEDS[0] else None,
                )
                before, after = summary["before"], summary["after"]
                moved = {
                    side: after[f"eval_logps/{side}"] - before[f"eval_logps/{side}"]
                    for side in ("chosen", "rejected")
                }
                result = dict(
                    method=method,
                    seed=seed,
                    rate=rate,
                    accuracy=after["eval_rewards/accuracies"],
                    moved=moved,
                )
                result |= judged(out, held_out)
                if seed == SEEDS[0]:
                    result["curve"] = curve(out)
                record("test", result)
                print(f"test: {method}, seed {seed}: score {result['score']:.3f}", flush=True)
    return results


# ---------------------------------------------------------------- table and figures


def interval(values):
    """Mean and half width of its 95 % interval over seeds."""
    values = np.asarray(values, float)
    return values.mean(), T95[len(values)] * values.std(ddof=1) / math.sqrt(len(values))


def wins(ours, theirs):
    """Share of prompts where ours has the better mean score, ties counting half."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    return float(((ours > theirs) + 0.5 * (ours == theirs)).mean())


def table(results):
    """The study as rows of (method, learning rate, {column: (mean, half width)})."""
    simpo, rows = {r["seed"]: r for r in results["test"] if r["method"] == "alpha 0"}, []
    for method in METHODS:
        runs = [r for r in results["test"] if r["method"] == method]
        columns = {
            "score": [r["score"] for r in runs],
            "wins over start": [wins(r["scores"], results["start"]["scores"]) for r in runs],
            "wins over SimPO": [wins(r["scores"], simpo[r["seed"]]["scores"]) for r in runs],
            "tokens": [r["length"] for r in runs],
            "accuracy": [r["accuracy"] for r in runs],
            "chosen": [r["moved"]["chosen"] for r in runs],
            "rejected": [r["moved"]["rejected"] for r in runs],
        }
        rows.append((method, runs[0]["rate"], {key: interval(values) for key, values in columns.items()}))
    return rows


def table_text(results):
    rows = table(results)
    names = list(rows[0][2])
    start = results["start"]
    lines = ["| method | learning rate | " + " | ".join(names) + " |", "| --- " * (len(names) + 2) + "|"]
    lines.append(f"| start | | {start['score']:.3f} | | | {start['length']:.1f} | | | |")
    for method, rate, cells in rows:
        label = {"alpha 0": "α 0 (SimPO)"}.get(method, method.replace("alpha", "α"))
        texts = (
            f"{m:.1f} ± {h:.1f}" if key == "tokens" else f"{m:.3f} ± {h:.3f}" for key, (m, h) in cells.items()
        )
        lines.append(f"| {label} | {rate:g} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def new_figure(columns, width, height=3.4):
    """A figure that can be read on a light and on a dark page: no background, mid-grey lines and letters."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise SystemExit("study: figures need: pip install matplotlib") from None
    grey = "#808080"
    keys = "text.color axes.labelcolor axes.edgecolor xtick.color ytick.color axes.titlecolor"
    matplotlib.rcParams.update(
        {key: grey for key in keys.split()} | {"svg.hashsalt": "alphapo", "font.size": 9}
    )
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, np.atleast_1d(figure.subplots(1, columns))


def write_figure(figure, axes, path):
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, transparent=True, metadata={"Date": None})


def colours(count):
    from matplotlib import colormaps

    return [colormaps["turbo"](x) for x in np.linspace(0.08, 0.92, count)]


def figures(results, folder):
    folder.mkdir(exist_ok=True)
    figure, (left, right) = new_figure(2, 8)
    p = torch.linspace(0.02, 1, 200, dtype=torch.float64)
    shown = [alpha for alpha in ALPHAS if alpha in (-1.0, -0.5, 0.0, 0.25, 0.5, 1.0)]
    for alpha, colour in zip(shown, colours(len(shown))):
        left.plot(p, alphapo.alphapo_reward(p.log(), alpha), color=colour, label=f"α = {alpha:g}")
        right.plot(p, p.pow(-alpha), color=colour)
    left.set(
        xlabel="p, geometric mean probability of a token",
        ylabel="reward r(p)",
        ylim=(-6, 0.2),
        title="the reward",
    )
    right.set(
        xlabel="p, geometric mean probability of a token",
        ylabel="dr / d log p",
        ylim=(0, 6),
        title="how hard it pulls",
    )
    left.legend(frameon=False)
    write_figure(figure, (left, right), folder / "reward.svg")

    figure, (axis,) = new_figure(1, 6, 4)
    runs = [r for method in METHODS for r in results["test"] if r["method"] == method and "curve" in r]
    for r, colour in zip(runs, [*colours(len(ALPHAS)), "#808080"]):
        chosen, rejected = (np.array(r["curve"][side]) for side in ("chosen", "rejected"))
        axis.plot(chosen - rejected, chosen, ".-", color=colour, label=r["method"].replace("alpha", "α ="))
    axis.set(
        xlabel="margin of the log-probabilities (nats a token)",
        ylabel="chosen log-probability (nats a token)",
    )
    axis.set_title("displacement against margin, held-out pairs, seed 1")
    axis.legend(frameon=False, fontsize=7)
    write_figure(figure, (axis,), folder / "displacement.svg")

    rows, keys = table(results), ["score", "accuracy", "tokens", "chosen"]
    figure, axes = new_figure(len(keys), 11)
    titles = "judged score (0 to 1)", "held-out accuracy", "response (tokens)", "change of chosen logp (nats)"
    for axis, key, title in zip(axes, keys, titles):
        means, halves = zip(*(cells[key] for *_, cells in rows))
        axis.errorbar(range(len(rows)), means, halves, fmt="o", color="#2a7fd4", capsize=3)
        axis.set_xticks(range(len(rows)), [method.replace("alpha ", "") for method, *_ in rows], rotation=60)
        axis.set(title=title, xlabel="α, or DPO")
    for axis, key in ((axes[0], "score"), (axes[2], "length")):
        axis.axhline(results["start"][key], color="#808080", linestyle=":")
    write_figure(figure, axes, folder / "study.svg")


def real(args):
    """Alpha on a model and pairs of the user's: a table, and a run's folder for each alpha."""
    print(
        "| α | accuracy | margin of logps | chosen logp | rejected logp | change of chosen |\n"
        + "| --- " * 6
        + "|"
    )
    for alpha in args.alphas:
        lines = Path(args.pairs).read_text().splitlines(keepends=True)
        folder = Path(args.out)
        folder.mkdir(parents=True, exist_ok=True)
        for name, part in (("eval", lines[: args.held_out]), ("train", lines[args.held_out :][: args.train])):
            (folder / f"{name}.jsonl").write_text("".join(part))
        settings = dict(
            model=args.model, learning_rate=args.learning_rate, batch_size=args.batch_size, dtype=args.dtype
        )
        settings |= {
            key: str(folder / f"{name}.jsonl") for key, name in (("data", "train"), ("eval_data", "eval"))
        }
        settings |= dict(
            alpha=alpha, beta=BETA, gamma=0.25, max_length=1024, out=str(folder / f"alpha{alpha:g}")
        )
        config = alphapo.Config(**settings)
        with contextlib.redirect_stdout(io.StringIO()):
            summary = alphapo.train(config)
        before, after = summary["before"], summary["after"]
        for when in (before, after) if alpha == args.alphas[0] else (after,):
            chosen, rejected = when["eval_logps/chosen"], when["eval_logps/rejected"]
            row = [
                when["eval_rewards/accuracies"],
                chosen - rejected,
                chosen,
                rejected,
                chosen - before["eval_logps/chosen"],
            ]
            name = "start" if when is before else f"{alpha:g}"
            print(f"| {name} | " + " | ".join(f"{value:.3f}" for value in row) + " |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--results", type=Path, default=DATA / "study.json", help="where the study's runs are kept"
    )
    actions = parser.add_subparsers(dest="action")
    actions.add_parser("figures", help="draw the figures and print the table from the kept runs")
    plot = actions.add_parser("plot", help="curves of several runs side by side")
    plot.add_argument("runs", nargs="+", type=Path, help="output folders of alphapo.py")
    plot.add_argument("--out", type=Path, default=Path("curves.png"))
    own = actions.add_parser("real", help="alpha on a model and pairs of yours")
    own.add_argument("model")
    own.add_argument("pairs")
    own.add_argument("--alphas", type=float, nargs="+", default=[-0.5, 0.0, 0.25, 1.0])
    own.add_argument("--train", type=int, default=256, help="pairs to train on, behind the held-out ones")
    own.add_argument("--held-out", type=int, default=128, help="pairs to hold out, the file's first")
    own.add_argument("--learning-rate", type=float, default=2e-5)
    own.add_argument("--batch-size", type=int, default=16)
    own.add_argument("--dtype", default="auto")
    own.add_argument("--out", default="out-real")
    args = parser.parse_args()
    if args.action == "real":
        return real(args)
    if args.action == "plot":
        for run_folder in args.runs:
            if not (run_folder / "metrics.jsonl").is_file():
                parser.error(f"{run_folder}: holds no metrics.jsonl; give the --out folder of a run")
        return alphapo.plot_curves(args.runs, args.out)
    if args.action == "figures" and not args.results.exists():
        parser.error(f"{args.results}: not there; run the study first: python data/study.py")
    results = json.loads(args.results.read_text()) if args.action == "figures" else study(args.results)
    print(table_text(results))
    figures(results, DATA / "figures")


if __name__ == "__main__":
    main()
