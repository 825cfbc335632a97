# SPDX-License-Identifier: MIT
"""The figures of the study, and the curves of any runs, for light and dark pages."""

import json
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from runs import HARD, find, read_jsonl

import alphapo

COLOURS = ["#3f7fe0", "#2aa198", "#c98a00", "#e0592b", "#d33682", "#8a63d2"]
MARKERS = "osD^vP"
GREY = "#808080"  # text and axes: readable on a white and on a black page
PANELS = {
    "loss": ["loss"],
    "reward margin": ["rewards/margins"],
    "share of pairs ranked rightly": ["rewards/accuracies"],
    "log-probability per token (nats)": ["logps/chosen", "logps/rejected"],
    "change of the held-out log-probability (nats)": [],  # from the evaluations alone
    "gradient norm": ["grad_norm"],
}


def new_figure(rows, columns, width, height):
    """A figure for light and dark pages: no background, grey lines and text, and text as text."""
    keys = "text.color axes.labelcolor axes.edgecolor axes.titlecolor xtick.color ytick.color"
    matplotlib.rcParams.update(dict.fromkeys(keys.split(), GREY))
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "alphapo", "font.size": 9})
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False).ravel()


def save(figure, path):
    figure.savefig(path, transparent=True, metadata={"Date": None, "Creator": None})


def draw_reward(study, path):
    figure, (reward, slope) = new_figure(1, 2, 8, 3.2)
    p = torch.linspace(0.02, 1, 99, dtype=torch.float64)
    for alpha, colour in zip(study.alphas, COLOURS):
        reward.plot(p, alphapo.alphapo_reward(p.log(), alpha), color=colour, label=f"α = {alpha:g}")
        slope.plot(p, p.pow(-alpha), color=colour)
    reward.set(title="reward r", ylim=(-6, 0.2))
    slope.set(title="slope dr / d log p: how hard training pulls", ylim=(0, 6))
    for axis in (reward, slope):
        axis.set_xlabel("p, geometric mean of the probabilities of tokens")
    reward.legend(frameon=False)
    save(figure, path)


def draw_map(study, results, path):
    columns = 3
    figure, axes = new_figure(-(-len(study.cells()) // columns), columns, 8, 5)
    panels = {}
    for method, cells in study.cells().items():
        scores = [np.mean([r["score"] for r in find(results, kind="map", **c)]) for c in cells]
        panels[method] = np.reshape(scores, (-1, len(study.learning_rates)))
    low = min(panel.min() for panel in panels.values())
    high = max(panel.max() for panel in panels.values())
    for axis, (method, panel) in zip(axes, panels.items()):
        axis.pcolormesh(panel, vmin=low, vmax=high, cmap="viridis")
        for (row, column), score in np.ndenumerate(panel):
            colour = "black" if score > (low + high) / 2 else "white"
            axis.text(
                column + 0.5, row + 0.5, f"{score:.2f}", color=colour, ha="center", va="center"
            )
        ratios = study.dpo_betas if method == "DPO" else study.gamma_betas
        axis.set_xticks(np.arange(len(study.learning_rates)) + 0.5, study.learning_rates)
        axis.set_yticks(np.arange(len(ratios)) + 0.5, ratios)
        axis.set(title=method, xlabel="learning rate")
        axis.set_ylabel("β" if method == "DPO" else "γ/β")
    save(figure, path)


def draw_displacement(study, results, path):
    figure, (axis,) = new_figure(1, 1, 6, 4)
    for (method, cells), colour, marker in zip(study.cells().items(), COLOURS, MARKERS):
        runs = [run for cell in cells for run in find(results, kind="map", **cell)]
        change = [run["chosen_change"] for run in runs]
        score = [run["score"] for run in runs]
        axis.scatter(change, score, s=16, color=colour, marker=marker, alpha=0.8, label=method)
    start = np.mean([run["score"] for run in find(results, kind="start")])
    axis.axhline(start, color=GREY, linestyle=":", label="before training")
    axis.set_xlabel("change of the chosen log-probability per token (nats)")
    axis.set_ylabel("judged score")
    axis.legend(frameon=False)
    save(figure, path)


def draw_curves(study, results, path):
    figure, (chosen, margin) = new_figure(1, 2, 8, 3.2)
    for alpha, colour in zip(study.alphas, COLOURS):
        for run in find(results, **HARD, alpha=alpha):
            steps, chosen_logps, rejected_logps = np.array(run["curve"]).T
            chosen.plot(steps, chosen_logps, color=colour, label=f"α = {alpha:g}")
            margin.plot(steps, chosen_logps - rejected_logps, color=colour)
    chosen.set(title="chosen log-probability per token (nats)", xlabel="step")
    margin.set(title="margin of the log-probabilities (nats)", xlabel="step")
    chosen.legend(frameon=False)
    save(figure, path)


def draw_all(study, results, folder):
    folder.mkdir(parents=True, exist_ok=True)
    draw_reward(study, folder / "reward.svg")
    draw_map(study, results, folder / "map.svg")
    draw_displacement(study, results, folder / "displacement.svg")
    draw_curves(study, results, folder / "curves.svg")
    print(f"wrote four figures to {folder}")


# ------------------------------------------------------------------------------------ any runs


def running_mean(values):
    """Mean over a window of a twelfth of the run, narrower at both ends, so that nothing lags."""
    reach = max(1, len(values) // 24)
    means = [np.mean(values[max(0, i - reach) : i + reach + 1]) for i in range(len(values))]
    return np.array(means)


def draw_panel(axis, keys, steps, evaluations, colours, names):
    for key, colour, name in zip(keys, colours, names):
        at, values = [m["step"] for m in steps], [m[key] for m in steps]
        axis.plot(at, values, color=colour, alpha=0.2, linewidth=0.8)
        axis.plot(at, running_mean(values), color=colour, linewidth=1.8, label=name)
        held_out = [(m["step"], m[f"eval_{key}"]) for m in evaluations if f"eval_{key}" in m]
        axis.plot(*np.reshape(held_out, (-1, 2)).T, "o", color=colour, mec=GREY)


def draw_change(axis, evaluations, colours, names):
    for side, colour, name in zip(("chosen", "rejected"), colours, names):
        values = np.array([m[f"eval_logps/{side}"] for m in evaluations])
        at = [m["step"] for m in evaluations]
        axis.plot(at, values - values[:1], "o-", color=colour, mec=GREY, label=name)
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
    figure, axes = new_figure(2, 3, 12, 6.4)
    for number, run in enumerate(runs):
        log = read_jsonl(Path(run) / "metrics.jsonl")
        steps = [metrics for metrics in log if "loss" in metrics]
        evaluations = [metrics for metrics in log if "eval_loss" in metrics]
        colours, names = ["#2a86d8", "#e0702a"], ["chosen", "rejected"]
        if len(runs) > 1:
            colours, names = [f"C{number}"], [Path(run).name]
        for axis, keys in zip(axes, PANELS.values()):
            if keys:
                draw_panel(axis, keys, steps, evaluations, colours, names)
            else:
                draw_change(axis, evaluations, colours, names)
    for axis, title in zip(axes, PANELS):
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in figure.axes[3:5] if len(runs) == 1 else figure.axes[:1]:
        axis.legend(frameon=False)
    figure.suptitle(title_of(runs[0]) if len(runs) == 1 else f"{len(runs)} runs")
    figure.supxlabel("faint: single steps; line: running mean; dots: held-out pairs", fontsize=8)
    figure.savefig(path, transparent=True, dpi=110)
