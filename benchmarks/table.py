"""The JSON of pytest-benchmark as Markdown: `python -m benchmarks.table results.json`.

`--save small.json` keeps what the table shows. A ratio is the row's time over that
of `ours` in the same group: above 1 ours is faster.
"""

import argparse
import json
from collections import defaultdict

MORE = {
    "operators": "ops",
    "waits": "waits",
    "bytes a pixel": "bytes_a_pixel",
    "stored bytes": "stored_bytes",
}  # columns of rows that have them


def rows(benchmarks: list[dict]) -> dict[str, list[dict]]:
    """{group: its rows, slowest first}, from the benchmarks of a run."""
    groups = defaultdict(list)
    for entry in benchmarks:
        if "us" in entry["extra_info"]:
            groups[entry["group"]].append({"name": entry["params"]["name"]} | entry["extra_info"])
    return {group: sorted(found, key=lambda row: -row["us"]) for group, found in groups.items()}


def times_of_ours(found: list[dict], row: dict) -> str:
    ours = next((other["us"] for other in found if other["name"] == "ours"), None)
    return f"{row['us'] / ours:.2f} ×" if ours else ""


def table_of_ops(group: str, found: list[dict]) -> list[str]:
    more = {name: key for name, key in MORE.items() if key in found[0]}
    lines = [
        f"**{group}**, {found[0]['bytes']:,} bytes; "
        f"a copy runs at {found[0]['copy_gb_per_s']:.1f} GB/s",
        "",
        "| implementation | µs | against ours | GB/s | of a copy | extra memory "
        "| launches | CPU µs |" + "".join(f" {name} |" for name in more),
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |" + " ---: |" * len(more),
    ]
    for row in found:
        share = f"{100 * row['gb_per_s'] / row['copy_gb_per_s']:.0f} %"
        launches = "" if row["launches"] is None else row["launches"]
        host = "" if row.get("host_us") is None else f"{row['host_us']:.1f}"
        lines.append(
            f"| {row['name']} | {row['us']:.1f} | {times_of_ours(found, row)} "
            f"| {row['gb_per_s']:.1f} | {share} "
            f"| {row['peak_extra_bytes']:,} B | {launches} | {host} |"
            + "".join(f" {row[key]:,.4g} |" for key in more.values())
        )
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


def table(benchmarks: list[dict]) -> str:
    lines = []
    for group, found in rows(benchmarks).items():
        lines += (table_of_steps if "views_per_s" in found[0] else table_of_ops)(group, found)
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("json", nargs="+", help="files written by --benchmark-json or --save")
    parser.add_argument("--save", help="write the rows of all files here, without the samples")
    arguments, kept = parser.parse_args(), []
    for path in arguments.json:
        with open(path) as file:
            found = json.load(file)["benchmarks"]
        kept += [{key: entry[key] for key in ("group", "params", "extra_info")} for entry in found]
        if found:
            info = found[0]["extra_info"]
            print(
                f"{info.get('device')}, {info.get('threads')} threads, torch {info.get('torch')}\n"
            )
        print(table(found))
    if arguments.save:
        with open(arguments.save, "w") as file:
            json.dump({"benchmarks": kept}, file, indent=1)


if __name__ == "__main__":
    main()
