"""Prints measured rows as Markdown tables: `python -m benchmarks.table rows.jsonl`.

The file is one that `pytest --rows` or `pytest --benchmark-json` wrote. A ratio is the row's time
divided by that of `ours` in the same group: above 1, ours is faster.
"""

import argparse
import sys
from collections import defaultdict
from pathlib import Path

from benchmarks.rows import newest, read
from benchmarks.terminal import lenient

MORE = {
    "operators": "ops",
    "waits": "waits",
    "bytes a pixel": "bytes_a_pixel",
    "stored bytes": "stored_bytes",
}  # further columns, for rows that have these values


def rows(measured: list[dict]) -> dict[str, list[dict]]:
    """Return the rows of each group, slowest first."""
    groups = defaultdict(list)
    for entry in newest(measured):
        if "us" in entry["extra_info"]:
            groups[entry["group"]].append({"name": entry["params"]["name"]} | entry["extra_info"])
    return {group: sorted(found, key=lambda row: -row["us"]) for group, found in groups.items()}


def times_of_ours(found: list[dict], row: dict) -> str:
    ours = next((other["us"] for other in found if other["name"] == "ours"), None)
    return f"{row['us'] / ours:.2f} ×" if ours else ""


def table_of_ops(group: str, found: list[dict]) -> list[str]:
    more = {name: key for name, key in MORE.items() if key in found[0]}
    copy = next((row["copy_gb_per_s"] for row in found if row.get("copy_gb_per_s")), None)
    lines = [
        f"**{group}**, {found[0]['bytes']:,} bytes"
        + (f"; a copy runs at {copy:.1f} GB/s" if copy else "")
        + (f" ({found[0]['how']})" if "how" in found[0] else ""),
        "",
        "| implementation | µs | against ours | GB/s | of a copy | extra memory "
        "| launches | CPU µs |" + "".join(f" {name} |" for name in more),
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |" + " ---: |" * len(more),
    ]
    for row in found:
        speed = row["bytes"] / row["us"] / 1e3
        extra, host = row.get("peak_extra_bytes"), row.get("host_us")
        cells = [
            row["name"],
            f"{row['us']:.1f}",
            times_of_ours(found, row),
            f"{speed:.1f}",
            f"{100 * speed / copy:.0f} %" if copy else "",
            "" if extra is None else f"{extra:,} B",
            "" if row.get("launches") is None else str(row["launches"]),
            "" if host is None else f"{host:.1f}",
            *(f"{row[key]:,.4g}" for key in more.values()),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def table_of_steps(group: str, found: list[dict]) -> list[str]:
    lines = [
        f"**{group}**; bare passes are fastest with {found[0]['bare_best']}",
        "",
        "| implementation | ms | views/s | against ours | against its bare passes | GFLOP "
        "| extra memory | launches |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in found:
        launches = "" if row["launches"] is None else row["launches"]
        lines.append(
            f"| {row['name']} | {row['us'] / 1e3:.1f} | {row['views_per_s']:,.0f} "
            f"| {times_of_ours(found, row)} | {row['against_bare']:.2f} × | {row['gflops']:.1f} "
            f"| {row['peak_extra_bytes'] / 1e6:.1f} MB | {launches} |"
        )
    return lines


def table(measured: list[dict]) -> str:
    lines = []
    for group, found in rows(measured).items():
        lines += (table_of_steps if "views_per_s" in found[0] else table_of_ops)(group, found)
        lines.append("")
    return "\n".join(lines)


@lenient
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, help="written by --rows or --benchmark-json")
    for path in parser.parse_args().files:
        if found := read(path):
            info = found[0]["extra_info"]
            print(
                f"{info.get('device')}, {info.get('threads')} threads, torch {info.get('torch')}\n"
            )
        print(table(found))


if __name__ == "__main__":
    sys.exit(main())
