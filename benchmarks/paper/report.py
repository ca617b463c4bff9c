"""Makes tables and figures from the records of runs."""

import io
from math import sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING

from scipy.stats import ttest_rel

from benchmarks.paper.checkpoint import unwritten, write_whole

if TYPE_CHECKING:
    from benchmarks.paper.estimate import Estimate


def averages(record: dict) -> float:
    """Return the mean over tasks of the accuracy after the last task, in percent."""
    return mean(record["accuracy"][-1])


def forgetting(record: dict) -> float:
    """Return the mean over older tasks of a task's best accuracy minus its last one, in points.

    Chaudhry et al., "Riemannian Walk for Incremental Learning", ECCV 2018.
    """
    *_, last = matrix = record["accuracy"]
    drops = [max(row[j] for row in matrix[j:-1]) - last[j] for j in range(len(last) - 1)]
    return mean(drops) if drops else 0.0


def spread(values: list[float]) -> dict[str, float | None]:
    """Return mean and sample standard deviation, which is None for a single value."""
    return {"mean": mean(values), "std": stdev(values) if len(values) > 1 else None}


def plus_minus(cell: dict[str, float | None]) -> str:
    """Format what `spread` returned."""
    return f"{cell['mean']:.1f}" + ("" if cell["std"] is None else f" ± {cell['std']:.1f}")


def paired(records: list[dict], method: str, baseline: str) -> dict | None:
    """Return the mean difference method - baseline over the seeds that both have, in points.

    With two seeds and more it has its standard error, and the 95 % interval and the p-value of a
    paired t-test, which are None for differences that are all the same.
    """
    by = {(r["method"], r["seed"]): averages(r) for r in records}
    seeds = [s for m, s in by if m == method and (baseline, s) in by]
    if not seeds:
        return None
    differences = [by[method, s] - by[baseline, s] for s in seeds]
    s = spread(differences)
    found = {"mean": s["mean"], "standard_error": None, "interval": None, "p": None}
    if len(seeds) > 1:
        found["standard_error"] = s["std"] / sqrt(len(seeds))
    if s["std"]:
        test = ttest_rel([by[method, s] for s in seeds], [by[baseline, s] for s in seeds])
        found["interval"] = [float(end) for end in test.confidence_interval(0.95)]
        found["p"] = float(test.pvalue)
    return found | {"seeds": seeds, "differences": differences}


def summarise(records: list[dict]) -> dict:
    """Return for each method: last accuracy of each task, average, forgetting, bytes, seconds."""
    summary = {}
    for method in dict.fromkeys(r["method"] for r in records):
        own = [r for r in records if r["method"] == method]
        diagnostic = [mean(r["accuracy_with_batch_statistics"]) for r in own]
        tasks = zip(*(r["accuracy"][-1] for r in own), strict=True)
        summary[method] = {
            "tasks": [spread(list(column)) for column in tasks],
            "average": spread([averages(r) for r in own]),
            "forgetting": spread([forgetting(r) for r in own]),
            "average_with_batch_statistics": spread(diagnostic),
            "memory": own[0]["memory"],
            "seconds": mean(r["seconds"] for r in own),
        }  # fmt: skip
    return summary


def table(summary: dict) -> str:
    """Format the summary as a Markdown table; accuracies in percent, mean ± std over seeds."""
    count = max(len(entry["tasks"]) for entry in summary.values())
    heads = [f"T{j}" for j in range(count)]
    heads = ["method", *heads, "average", "forgetting", "bank", "norms + seed", "gradients"]
    rows = [heads, ["---", *["---:"] * (len(heads) - 1)]]
    for method, entry in summary.items():
        cells = [*entry["tasks"], entry["average"], entry["forgetting"]]
        memory = entry["memory"]
        gradients = memory["gradients"] + memory.get("second_gradients", 0)
        small = memory["layer_norms"] + memory["seed"]
        sizes = [f"{size:,} B" for size in (memory["bank"], small, gradients)]
        rows.append([method, *map(plus_minus, cells), *sizes])
    return markdown(rows)


def markdown(rows: list[list[str]]) -> str:
    """Format rows as a Markdown table; the first row is the head, the second its rule."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (" | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(f"| {line} |" for line in lines)


def difference_line(difference: dict, method: str, baseline: str) -> str:
    """Format a paired difference with its standard error, 95 % interval and p-value."""
    d, plus = difference, ""
    if d["standard_error"] is not None:
        plus = f" ± {d['standard_error']:.1f} (standard error)"
    if d["interval"] is not None:
        low, high = d["interval"]
        plus += f", 95 % interval {low:+.1f} to {high:+.1f}, p = {d['p']:.2g}"
    seeds = f"paired over {len(d['seeds'])} seeds"
    return f"{method} - {baseline}, {seeds}: {d['mean']:+.1f} points{plus}"


def figure(records: list[dict], title: str, path: Path) -> None:
    """Draw each task's accuracy along the stream, a panel a method, mean and std over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    methods = list(dict.fromkeys(r["method"] for r in records))
    fig, axes = plt.subplots(
        1, len(methods), figsize=(4.5 * len(methods), 3.6), sharey=True, squeeze=False
    )
    for ax, method in zip(axes[0], methods, strict=True):
        matrices = [r["accuracy"] for r in records if r["method"] == method]
        tasks = len(matrices[0])
        for j in range(tasks):
            after = range(j, tasks)
            cells = [spread([m[i][j] for m in matrices]) for i in after]
            middle = [c["mean"] for c in cells]
            ax.plot([i + 1 for i in after], middle, marker="o", label=f"T{j}")
            low, high = ([c["mean"] + sign * (c["std"] or 0) for c in cells] for sign in (-1, 1))
            ax.fill_between([i + 1 for i in after], low, [min(h, 100) for h in high], alpha=0.12)
        average = spread([averages(r) for r in records if r["method"] == method])
        ax.set_title(f"{method}: {plus_minus(average)} at the end")
        ax.set_xlabel("tasks learned")
        ax.set_xticks(range(1, tasks + 1))
        ax.grid(alpha=0.3)
    axes[0][0].set_ylabel("test accuracy, %")
    axes[0][-1].legend(title="task", fontsize=8)
    fig.suptitle(title, fontsize=10, parse_math=False)
    fig.tight_layout()
    save(fig, path, 130)


def save(fig, path: Path, dpi: int) -> None:
    import matplotlib.pyplot as plt

    drawn = io.BytesIO()
    fig.savefig(drawn, dpi=dpi)
    plt.close(fig)
    write_whole(path, drawn.getvalue())


def estimate_table(found: list["Estimate"], jobs: int) -> str:
    """Format what a dry run measured as a Markdown table, with the total time."""
    heads = ["method", "batches", "a batch", "all, one after the other",
             "held beside θ and activations", "views timed"]  # fmt: skip
    on_gpu = any(e.allocated for e in found)
    heads += ["allocator's peak"] * on_gpu
    rows = [heads, ["---", *["---:"] * (len(heads) - 1)]]
    for e in found:
        cells = [f"{e.batches:,}", f"{1e3 * e.step_seconds:.0f} ms", f"{e.seconds / 3600:.2f} h"]
        cells += [f"{e.held_bytes / 1e6:.1f} MB", e.views]
        rows.append([e.method, *cells, *[f"{(e.allocated or 0) / 1e9:.2f} GB"] * on_gpu])
    minutes = sum(e.seconds for e in found) / jobs / 60
    ending = f"about {minutes:,.1f} minutes with {jobs} at a time, without evaluations"
    return f"{markdown(rows)}\n\n{ending}"


def run_line(record: dict, printed: list[float] | None) -> str:
    """Format the result of one run as a line; `printed` are the paper's accuracies."""
    beside = f" (printed {printed[-1]:.1f})" if printed else ""
    parts = [f"{record['method']}, seed {record['seed']}: {averages(record):.1f} %{beside}"]
    if "step_ms" in record:
        parts.append(f"{record['step_ms']:.1f} ms a step, {record['images_per_s']:,.0f} images/s")
    if "allocated" in record:
        parts.append(f"{record['allocated'] / 1e9:.2f} GB allocated at most")
    return ", ".join([*parts, f"{record['seconds']:.0f} s"])


def figures(records: list[dict], out: Path) -> None:
    """Draw matrix.png, factors.png and memory.png."""
    import matplotlib

    matplotlib.use("Agg")
    methods = list(dict.fromkeys(r["method"] for r in records))
    own = {m: [r for r in records if r["method"] == m] for m in methods}
    _draw_accuracies(own, out / "matrix.png")
    _draw_factors(own, out / "factors.png")
    _draw_memory(own, out / "memory.png")


def _draw_accuracies(own: dict[str, list[dict]], file: Path) -> None:
    """Draw for each method the mean accuracy of every task after every task."""
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, len(own), figsize=(3 * len(own), 3.2), squeeze=False)
    for ax, (method, records) in zip(axes[0], own.items(), strict=True):
        tasks = len(records[0]["accuracy"])
        means = [
            [mean(r["accuracy"][i][j] for r in records) if j <= i else float("nan")
             for j in range(tasks)]
            for i in range(tasks)
        ]  # fmt: skip
        ax.imshow(means, vmin=0, vmax=100, cmap="viridis")
        for i in range(tasks):
            for j in range(i + 1):
                ax.text(j, i, f"{means[i][j]:.0f}", ha="center", va="center", color="w", fontsize=8)
        ax.set(title=method, xlabel="accuracy of task", ylabel="after task")
        ax.set(xticks=range(tasks), yticks=range(tasks))
    fig.tight_layout()
    save(fig, file, 110)


def _draw_factors(own: dict[str, list[dict]], file: Path) -> None:
    """Draw for each method that balances the mean factor of every layer in every task."""
    import matplotlib.pyplot as plt

    shown = {m: r for m, r in own.items() if any(any(x.values()) for x in r[0]["factors"])}
    if not shown:
        return
    fig, axes = plt.subplots(1, len(shown), figsize=(5.5 * len(shown), 3.6), squeeze=False)
    for ax, (method, records) in zip(axes[0], shown.items(), strict=True):
        for j, layers in enumerate(records[0]["factors"]):
            if layers:
                values = [
                    mean(r["factors"][j].get(name, float("nan")) for r in records)
                    for name in layers
                ]
                ax.plot(range(len(values)), values, marker=".", label=f"task {j}")
        ax.set(title=method, xlabel="layer, from the input", ylabel="log10 of the factor")
        ax.legend(fontsize=8)
        ax.grid(alpha=0.3)
    fig.tight_layout()
    save(fig, file, 110)


def _draw_memory(own: dict[str, list[dict]], file: Path) -> None:
    """Draw each method's accuracy against the bytes it holds beside the network."""
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(5, 3.6))
    for method, records in own.items():
        # "inter" is left out: what LwF holds from batch to batch also counts in "intra"
        held = max(r["columns"]["intra"] + r["columns"]["data"] for r in records)
        accuracy = spread([averages(r) for r in records])
        point = [max(held, 1)], [accuracy["mean"]], [accuracy["std"] or 0]
        ax.errorbar(*point, marker="o", capsize=3, label=method)
    ax.legend(fontsize=8)
    ax.set(xscale="log", xlabel="bytes beside the network (1: none)", ylabel="average accuracy, %")
    ax.grid(alpha=0.3)
    fig.tight_layout()
    save(fig, file, 110)


def ablation_table(rows: list[tuple]) -> str:
    """Format rows of setting, value, method and summary, with the gain over finetuning if known."""
    heads = ["setting", "value", "method", "average", "forgetting", "minus finetune", "bank"]
    lines = [heads, ["---", "---:", "---", *["---:"] * 4]]
    for name, value, method, entry in rows:
        cells = [plus_minus(entry[k]) for k in ("average", "forgetting")]
        gain = ""
        if entry["gain"]:
            gain = f"{entry['gain']['mean']:+.1f}"
            if entry["gain"]["interval"]:
                gain += " ({:+.1f} to {:+.1f})".format(*entry["gain"]["interval"])
        lines.append([name, value, method, *cells, gain, f"{entry['memory']['bank']:,} B"])
    return markdown(lines)


def ablation_figure(rows: list[tuple], title: str, path: Path) -> None:
    """Draw a panel for each setting, four in a row: mean and std of the average accuracy."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(name for name, *_ in rows))
    columns = min(4, len(names))
    lines = -(-len(names) // columns)
    fig, axes = plt.subplots(
        lines, columns, figsize=(2.6 * columns, 0.4 + 2.8 * lines), sharey=True, squeeze=False
    )
    for ax in axes.flat[len(names) :]:
        ax.set_axis_off()
    for ax, name in zip(axes.flat[: len(names)], names, strict=True):
        for method in dict.fromkeys(m for _, _, m, _ in rows):
            own = [(str(v), e["average"]) for n, v, m, e in rows if (n, m) == (name, method)]
            ax.errorbar(
                [v for v, _ in own], [e["mean"] for _, e in own], [e["std"] or 0 for _, e in own],
                marker="o", capsize=3, label=method,
            )  # fmt: skip
        ax.set_title(name, fontsize=9)
        ax.grid(alpha=0.3)
    for first in axes[:, 0]:
        first.set_ylabel("average accuracy, %")
    axes[0][0].legend(fontsize=8)
    fig.suptitle(title, fontsize=9, parse_math=False)
    fig.tight_layout()
    save(fig, path, 110)


def summary_writer():
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError("tensorboard: it is not installed; pip install tensorboard") from error
    return SummaryWriter


def tensorboard(records: list[dict], folder: Path) -> None:
    """Write accuracies along the stream as TensorBoard events, a folder for each run."""
    for record in records:
        own = folder / f"{record['method']}-{record['seed']}"
        try:
            with summary_writer()(str(own)) as writer:
                for i, row in enumerate(record["accuracy"]):
                    writer.add_scalar("accuracy/average", mean(row), i)
                    for j, value in enumerate(row):
                        writer.add_scalar(f"accuracy/T{j}", value, i)
        except OSError as error:
            raise unwritten(own, error) from error
