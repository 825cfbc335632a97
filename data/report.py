# SPDX-License-Identifier: MIT
"""Draw the curves of one or more runs: python data/report.py RUN... --out curves.png

alphapo.py calls report at the end of a run: it writes README.md, the model card, and curves.png
into the run's folder, and returns the table that is printed.
"""

import argparse
import contextlib
import json
from pathlib import Path

import numpy as np

PANELS = {
    "loss": ["loss"],
    "reward margin": ["rewards/margins"],
    "share of pairs ranked rightly": ["rewards/accuracies"],
    "log-probability per token (nats)": ["logps/chosen", "logps/rejected"],
    "change of the held-out log-probability (nats)": [],  # from the evaluations alone
    "gradient norm": ["grad_norm"],
}
GREY = "#808080"  # text and axes: readable on a white and on a black page


def read_log(run):
    """The steps and the evaluations of a run, each as {key: values}."""
    log = []
    for line in (Path(run) / "metrics.jsonl").read_bytes().splitlines():
        with contextlib.suppress(ValueError):  # a damaged line is no reason to show nothing
            log.append(json.loads(line))
    parts = []
    for name in ("loss", "eval_loss"):
        rows = [metrics for metrics in log if name in metrics]
        keys = rows[0] if rows else ["step"]
        parts.append({key: np.array([metrics[key] for metrics in rows]) for key in keys})
    return parts


def running_mean(values):
    """Mean over a window of a twelfth of the run, narrower at both ends, so that nothing lags."""
    reach = max(1, len(values) // 24)
    means = [values[max(0, i - reach) : i + reach + 1].mean() for i in range(len(values))]
    return np.array(means)


def draw_panel(axis, keys, steps, evaluations, colors, names):
    for key, color, name in zip(keys, colors, names):
        values = steps.get(key, np.zeros(0))  # none while the first step goes on
        axis.plot(steps["step"], values, color=color, alpha=0.2, linewidth=0.8)
        axis.plot(steps["step"], running_mean(values), color=color, linewidth=1.8, label=name)
        if f"eval_{key}" in evaluations:
            axis.plot(evaluations["step"], evaluations[f"eval_{key}"], "o", color=color, mec=GREY)


def draw_change(axis, evaluations, colors, names):
    for side, color, name in zip(("chosen", "rejected"), colors, names):
        values = evaluations.get(f"eval_logps/{side}", np.zeros(0))
        axis.plot(evaluations["step"], values - values[:1], "o-", color=color, mec=GREY, label=name)
    axis.axhline(0, color=GREY, linewidth=0.8, linestyle=":")


def title_of(run):
    """Model and settings of a run, if its summary is written."""
    summary = Path(run) / "summary.json"
    if not summary.is_file():
        return Path(run).name
    config = json.loads(summary.read_text())["config"]
    settings = ", ".join(f"{key} {config[key]:g}" for key in ("alpha", "beta", "gamma"))
    return f"{Path(config['model']).name}: {settings}, learning rate {config['learning_rate']:g}"


def plot_curves(runs, path):
    """Draw the curves of runs (folders with a metrics.jsonl) into one picture of six panels.

    Single steps are faint, a running mean is drawn over them, and held-out evaluations are dots.
    One run has a colour for each kind of response; of several runs each has its own colour, and
    their rejected responses are left out.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    keys = "text.color axes.labelcolor axes.edgecolor xtick.color ytick.color axes.titlecolor"
    style = {key: GREY for key in keys.split()} | {"font.size": 9, "svg.fonttype": "none"}
    with rc_context(style):
        figure = Figure(figsize=(12, 6.4), layout="constrained")
        figure.subplots(2, 3)
        for number, run in enumerate(runs):
            steps, evaluations = read_log(run)
            colors, names = ["#2a86d8", "#e0702a"], ["chosen", "rejected"]
            if len(runs) > 1:
                colors, names = [f"C{number}"], [Path(run).name]
            for axis, keys in zip(figure.axes, PANELS.values()):
                if keys:
                    draw_panel(axis, keys, steps, evaluations, colors, names)
                else:
                    draw_change(axis, evaluations, colors, names)
        for axis, title in zip(figure.axes, PANELS):
            axis.set(title=title, xlabel="step")
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
        for axis in figure.axes[3:5] if len(runs) == 1 else figure.axes[:1]:
            axis.legend(frameon=False)
        figure.suptitle(title_of(runs[0]) if len(runs) == 1 else f"{len(runs)} runs", color=GREY)
        note = "faint: single steps; line: running mean; dots: held-out pairs"
        figure.supxlabel(note, color=GREY, fontsize=8)
        figure.savefig(path, transparent=True, dpi=110)


def table(run):
    """What a run did to the held-out pairs, and how fast it was, in words."""
    summary = json.loads((Path(run) / "summary.json").read_text())
    lines, plan, (steps, _) = [], summary["plan"], read_log(run)
    if summary["eval_pairs"]:
        heading = f"{summary['eval_pairs']:5} held-out pairs"
        lines.append(f"{heading:24}{'before':>10}{'after':>10}{'change':>10}")
    for key, before in summary["before"].items():
        name, after = key.removeprefix("eval_"), summary["after"][key]
        lines.append(f"{name:24}{before:10.4f}{after:10.4f}{after - before:+10.4f}")
    if not steps["step"].size:  # a log that was lost, or a run without a step
        return "\n".join(lines)
    total = {key: values.sum() for key, values in steps.items()}
    seconds = total["seconds"]
    pairs, tokens = total["pairs"] / seconds, total["tokens"] / seconds
    lines.append(f"{pairs:.2f} pairs/s, {tokens:.0f} tokens/s")
    if plan:
        flops = 1e15 * plan["pflop"] * total["tokens"] / plan["tokens"] / seconds
        lines[-1] += f", {flops / 1e12:.3g} TFLOP/s"
        if plan["peak_flops"]:
            share = flops / plan["peak_flops"] / summary["processes"]
            lines[-1] += f" ({share:.0%} of the data sheet)"
    share = total["optimizer_seconds"] / seconds
    memory = summary["peak_memory_gib"]
    lines.append(f"optimizer {share:.0%} of the time, peak memory {memory:.2f} GiB")
    return "\n".join(lines)


def card(run):
    """The model card of a run: where the model comes from, its figures and all settings."""
    summary = json.loads((Path(run) / "summary.json").read_text())
    config = summary["config"]
    lines = ["---", "library_name: transformers", "tags: [alphapo]", "---"]
    lines += [f"# {Path(config['model']).name}, AlphaPO", ""]
    lines += [f"{config['model']}, aligned with AlphaPO (arXiv 2501.03884)"]
    lines += [f"on {summary['pairs']} preference pairs of {config['data']}.", ""]
    lines += ["```", table(run), "```", "", "| setting | value |", "| --- | --- |"]
    lines += [f"| {key} | {value} |" for key, value in config.items()]
    lines += [f"\nChanged on resuming: {change}" for change in summary["changes"]]
    return "\n".join(lines) + "\n"


def report(run):
    """Write the card and the curves of a run into its folder, and return its table."""
    (Path(run) / "README.md").write_text(card(run))
    try:
        plot_curves([run], Path(run) / "curves.png")
    except Exception as error:  # no picture is worth losing a run over
        print(f"note: no curves.png: {error}")
    return table(run)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", help="output folders of alphapo.py")
    parser.add_argument("--out", default="curves.png")
    args = parser.parse_args()
    for run in args.runs:
        if not (Path(run) / "metrics.jsonl").is_file():
            parser.error(f"{run}: holds no metrics.jsonl; give the --out folder of a run")
    try:
        plot_curves(args.runs, args.out)
    except (OSError, ValueError) as error:
        parser.error(f"{args.out} cannot be drawn: {error}")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
