"""Lists all figures of a card beside predictions: `python -m benchmarks.gpu.index FOLDER`.

It writes FOLDER/index.md from what a session left there. `--add` instead adds the session to
benchmarks/results/gpu/CARD and writes the index there again.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from statistics import median

from benchmarks import rows, table
from benchmarks.paper import report, tables
from benchmarks.paper.checkpoint import write_whole
from benchmarks.provenance import ROOT
from benchmarks.terminal import lenient

RESULTS = ROOT / "benchmarks" / "results" / "gpu"


def sessions(folder: Path) -> list[dict]:
    """Return the sessions that were added to a folder of results, or a session's own."""
    state = folder / "state.json"
    found = rows.so_far(folder / "sessions.jsonl")
    return found + ([json.loads(state.read_text())] if state.exists() else [])


def streams(records: list[dict]) -> dict[tuple[str, str], list[dict]]:
    """Return the records of each (name, commit): the last one of each method and seed.

    The name of "table2/mnist-5/runs/bld-0.json" is "mnist-5". The name of a run without CUDA graphs
    says so.
    """
    found: dict[tuple[str, str], dict] = {}
    for entry in records:
        table_, stream, *_ = Path(entry["file"]).parts
        name = f"{stream} without graphs" if table_.endswith("without-graphs") else stream
        record = entry["record"]
        own = found.setdefault((name, entry["commit"]), {})
        own[record["method"], record["seed"]] = record
    return {key: list(own.values()) for key, own in found.items()}


def figures(measured: list[dict], records: list[dict]) -> dict[str, tuple[float, str]]:
    """Return value and commit by name: "step, resnet18 / ours, ms", "mnist-5 / bld, s a run"."""
    found = {}
    for row in measured:
        if us := row["extra_info"].get("us"):
            unit, scale = ("ms", 1e-3) if "views_per_s" in row["extra_info"] else ("µs", 1)
            found[f"{row['group']} / {row['params']['name']}, {unit}"] = us * scale, row["commit"]
    for (stream, commit), own in streams(records).items():
        for method in dict.fromkeys(r["method"] for r in own):
            for name, unit in (("seconds", "s a run"), ("step_ms", "ms a step")):
                values = [r[name] for r in own if r["method"] == method]
                found[f"{stream} / {method}, {unit}"] = median(values), commit
    return found


def predictions(found: dict[str, tuple[float, str]]) -> list[list[str]]:
    known = json.loads((RESULTS / "predicted.json").read_text())
    body = []
    for p in known:
        low, high = p["low"], p["high"]
        cells = [p["figure"], f"{low:g} to {high:g}", "not measured", "", "", p["from"]]
        if p["figure"] in found:
            value, commit = found[p["figure"]]
            cells[2:5] = [f"{value:.3g}", f"{value / (low * high) ** 0.5:.2f}", commit]
        body.append(cells)
    heads = ["figure", "predicted", "measured", "measured / middle", "commit", "predicted from"]
    return [heads, ["---", "---:", "---:", "---:", "---", "---"], *body]


def commands(found: list[dict]) -> list[list[str]]:
    """Return a table of the commands that were run, at which commit, and how they ended."""
    body = []
    for session in found:
        for name, part in session["parts"].items():
            for command, entry in part["commands"].items():
                called = name if name == command else f"{name}: {command}"
                seconds = f"{entry['seconds']:.0f} s" if "seconds" in entry else ""
                cells = [called, session["commit"], entry["status"], seconds]
                body.append([*cells, entry.get("says", "").replace("|", "\\|")[:160]])
            if not part["commands"]:
                body.append([name, session["commit"], part["status"], "", ""])
    return [["part", "commit", "status", "time", "it says"], ["---"] * 5, *body]


def machines(found: list[dict]) -> list[str]:
    names = ("card", "driver", "torch", "cuda", "triton", "python")
    seen = []
    for session in found:
        m = session["machine"]
        parts = [m.get("card") or "no card, a rehearsal on a processor"]
        parts += [f"{name} {m[name]}" for name in names[1:] if m.get(name)]
        seen.append(f"- commit {session['commit']}: {', '.join(parts)}")
    return list(dict.fromkeys(seen))


def index(folder: Path) -> str:
    found, measured = sessions(folder), rows.so_far(folder / "rows.jsonl")
    records = rows.so_far(folder / "records.jsonl")
    real = [s for s in found if not s["rehearsal"]]
    title = next((s["machine"].get("card") for s in real if s["machine"].get("card")), None)
    text = [
        f"# {title or 'A rehearsal: no figure here is one of a GPU'}",
        "",
        "Written by `python -m benchmarks.gpu.index` from the rows, runs and sessions beside it. A "
        "ratio against ours above 1 means that ours is faster.",
        "",
        *machines(found),
        "",
        "## Predicted and measured",
        "",
        report.markdown(predictions(figures(measured, records))),
    ]
    for (stream, commit), own in streams(records).items():
        dataset, tasks = stream.split()[0].rsplit("-", 1)
        text += ["", f"## {stream}, commit {commit}; in brackets the paper's", ""]
        text += [tables.table(own, dataset, int(tasks)), "", tables.differences(own), ""]
        beside = {r["method"]: tables.printed(dataset, int(tasks), r["method"]) for r in own}
        text += [f"- {report.run_line(r, beside[r['method']])}" for r in own]
    if measured:
        text += ["", "## Measured rows", ""]
        by_commit = dict.fromkeys(row["commit"] for row in measured)
        for commit in by_commit:
            own = [row for row in measured if row["commit"] == commit]
            clock = {row["extra_info"].get("mhz") for row in own} - {None}
            at = f", clock {', '.join(map(str, sorted(clock)))} MHz" if clock else ""
            ops = " ".join(dict.fromkeys(row["params"]["op"] for row in own))
            text += [f"`bash benchmarks/gpu.sh {ops}`, commit {commit}{at}:", "", table.table(own)]
    text += ["", "## What was run", "", report.markdown(commands(found)), ""]
    return "\n".join(text)


def card_name(machine: dict) -> str:
    """Return "h100" for "NVIDIA H100 80GB HBM3", "rtx-4090" for "NVIDIA GeForce RTX 4090"."""
    words = re.findall(r"(?:RTX |GTX )?\b[A-Z]*\d+\w*|PCIe|NVL", machine["card"] or "")
    words = [w for w in words if not w.endswith("GB") and not w.startswith(("SXM", "HBM"))]
    return "-".join(" ".join(words).lower().split()) or "gpu"


def add(folder: Path) -> Path:
    """Add a session to the results of its card; rows and runs already there are not repeated."""
    if not (folder / "state.json").exists():
        raise ValueError(f"{folder} holds no session: there is no state.json")
    state = json.loads((folder / "state.json").read_text())
    if state["rehearsal"]:
        raise ValueError(f"{folder} is a rehearsal, none of whose figures is one of a GPU")
    into = RESULTS / card_name(state["machine"])
    into.mkdir(parents=True, exist_ok=True)
    for name in ("rows.jsonl", "records.jsonl"):
        known = rows.so_far(into / name)
        for entry in rows.so_far(folder / name):
            if entry not in known:
                rows.append(into / name, entry)
    others = [s for s in sessions(into) if s.get("started") != state["started"]]
    text = "".join(f"{json.dumps(session)}\n" for session in [*others, state])
    write_whole(into / "sessions.jsonl", text.encode())
    return into


@lenient
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="of a session, or of a card's results")
    parser.add_argument("--add", action="store_true", help="take the session into the results")
    args = parser.parse_args()
    try:
        folder = add(args.folder) if args.add else args.folder
        if not sessions(folder):
            raise ValueError(f"{folder} holds no session: no state.json and no sessions.jsonl")
        write_whole(folder / "index.md", index(folder).encode())
    except (OSError, ValueError) as error:
        print(f"index: {error}", file=sys.stderr)
        return 2
    print(f"wrote {folder / 'index.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
