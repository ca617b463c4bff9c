"""Run every measurement that needs a GPU, part by part; go on where an earlier call was cut."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from benchmarks import provenance
from benchmarks.gpu.folder import Folder, FolderError, tail
from benchmarks.gpu.parts import PARTS, PYTHON, Command, Part, Place, environment
from benchmarks.gpu.process import run
from benchmarks.paper.checkpoint import CheckpointError, one_line
from benchmarks.provenance import ROOT
from benchmarks.terminal import lenient

EXAMPLES = """\
examples:
  bash benchmarks/gpu.sh --plan
      what is run, what each part answers, and for how long
  bash benchmarks/gpu.sh --rehearse
      all of it on this processor, at the smallest size
  OUT=folder bash benchmarks/gpu.sh --minutes 28
      everything, within 28 minutes
  OUT=folder bash benchmarks/gpu.sh
      what that call left undone
  OUT=folder bash benchmarks/gpu.sh distillation joint
      these parts alone; rows that are there are kept
"""
RESERVE = 45  # seconds of --minutes reserved for the start, the end of a part, and the index
NO_CARD = "no GPU: torch.cuda.is_available() is False"
MACHINE = """
import json, platform, torch, triton
card = torch.cuda.is_available() and torch.cuda.get_device_properties(0)
print(json.dumps({
    "card": card.name if card else None,
    "cards": torch.cuda.device_count() if card else 0,
    "memory": card.total_memory if card else None,
    "capability": f"{card.major}.{card.minor}" if card else None,
    "cuda": torch.version.cuda, "torch": torch.__version__, "triton": triton.__version__,
    "python": platform.python_version(), "processor": platform.machine(),
}))
"""
DRIVER = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "bash benchmarks/gpu.sh",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("parts", nargs="*", metavar="part", help=f"default: all of {', '.join(PARTS)}")
    add("--plan", action="store_true", help="print the parts and end")
    add("--rehearse", action="store_true", help="on the CPU, everything at its smallest size")
    add("--minutes", type=float, help="for the whole call; a part that is cut is gone on with")
    add("--out", type=Path, help="folder for what is measured (default: $OUT, or runs/gpu)")
    add("--data", type=Path, help="folder of the datasets (default: data)")
    add("--scratch", type=Path, help="folder of the tables' runs (default: runs/gpu-scratch/...)")
    return parser


def plan(place: Place) -> str:
    lines = ["part          minutes  answers"]
    lines += [f"{p.name:<13} {p.minutes:>7g}  {p.answers}" for p in PARTS.values()]
    total = sum(part.minutes for part in PARTS.values())
    lines += [
        f"{'':<13} {total:>7g}  in all, at most; what is cut or not begun is left to the next call",
        "",
        "Needed beside the sources, without network:",
        f"  table2  in {place.data}: the four files of MNIST in MNIST/raw (11.6 MB), or mnist.npz",
        f"  table3  in {place.data}: cifar10.npz (185 MB), or cifar-10-python.tar.gz (170 MB), or",
        "          cifar10/ with 50 sheets of training images, the test images, labels and their",
        "          unpack.py (87 MB; in two calls where that is too much for one, since the part",
        "          is left out until all 54 files are there)",
        "",
        f"Left in {place.out}: state.json, log.txt, rows.jsonl, records.jsonl, trace.json.gz,",
        "index.md, and checkpoints.tar, which has 43 MB for each run of a table that was cut.",
        f"  scratch {place.scratch}: 50 MB",
    ]
    for part in PARTS.values():
        if missing := part.missing(place):
            lines.append(f"Not there: {part.name}: {missing}")
    return "\n".join(lines)


def machine(place: Place) -> dict:
    env = environment(place, Command("machine", ()))
    done = subprocess.run([PYTHON, "-c", MACHINE], capture_output=True, text=True, env=env)
    if done.returncode:
        said = tail(done.stderr.encode())
        raise FolderError(f"this Python cannot import torch and triton: {said}")
    found = json.loads(done.stdout)
    if found["card"]:
        with suppress(OSError):
            said = subprocess.run(DRIVER, capture_output=True, text=True).stdout.split()
            found["driver"] = said[0] if said else None
    return found


class Session:
    """One call of the command: runs the parts that are left, within its minutes."""

    def __init__(self, place: Place, folder: Folder, named: list[str], minutes: float | None):
        self.place, self.folder, self.named = place, folder, named
        self.end = time.monotonic() + 60 * minutes if minutes else float("inf")

    def run(self) -> bool:
        """Run all parts, or those that were named; return whether all of them are done.

        Parts that an earlier call has cut come after those that have not begun.
        """
        chosen = [part for part in PARTS.values() if not self.named or part.name in self.named]
        was_cut = {p.name: self.state(p)["status"] == "cut" and not p.vital for p in chosen}
        for part in sorted(chosen, key=lambda part: was_cut[part.name]):
            if part.name == "index":
                continue
            self.run_part(part)
            if part.vital and self.state(part)["status"] != "done":
                print(f"without {part.name} nothing that follows is worth measuring", flush=True)
                break
        self.run_part(PARTS["index"])
        left = [f"{p.name}: {self.state(p)['status']}" for p in chosen]
        left = [line for line in left if not line.endswith(": done")]
        print("\n".join(["", *left]) if left else "\nall done", flush=True)
        return not left

    def state(self, part: Part) -> dict:
        fresh = {"status": "not begun", "seconds": 0.0, "commands": {}}
        return self.folder.state["parts"].setdefault(part.name, fresh)

    def run_part(self, part: Part) -> None:
        state, last = self.state(part), part.name == "index"
        named = part.name in self.named
        if state["status"] == "done" and not last and not named:
            print(f"== {part.name}: done before", flush=True)
            return
        if missing := part.missing(self.place):
            state["status"] = f"left out, {missing}"
            return self.close(part)
        if not last and self.end - time.monotonic() < RESERVE:
            return self.close(part)
        if last or named and state["status"] == "done":
            state["commands"] = {}
        state.update(status="cut", seconds=0.0)  # each call has all minutes of a part
        outcomes = []
        for command in part.commands(self.place):
            outcomes.append(self.outcome(part, command))
            if outcomes[-1] == "cut" or command.needed and outcomes[-1] != "done":
                break
        state["status"] = next((o for o in ("failed", "cut") if o in outcomes), "done")
        self.close(part)

    def outcome(self, part: Part, command: Command) -> str:
        """Run a command, or `instead` if it fails, unless either is done; return the outcome."""
        known = self.state(part)["commands"]
        ways = [way for way in (command, command.instead) if way]
        done = any(known.get(way.name, {}).get("status") == "done" for way in ways)
        if done and not command.needed:  # what a needed command prepared may be gone
            return "done"
        for way in ways:
            if (status := self.run_command(part, way)) != "failed":
                return status
        return "failed"

    def run_command(self, part: Part, command: Command) -> str:
        state = self.state(part)
        limit = 60 * part.minutes - state["seconds"]
        if part.name != "index":
            limit = min(limit, self.end - time.monotonic() - RESERVE)
        if limit <= 0:
            return "cut"
        print(f"== {part.name}: {command.name}", flush=True)
        with suppress(OSError):
            self.folder.log.write(f"== {part.name}: {' '.join(command.argv)}\n".encode())
            self.folder.log.flush()
        env = environment(self.place, command)
        if part.name == "build" and not self.place.rehearsal:
            env["TORCH_CUDA_ARCH_LIST"] = self.folder.state["machine"]["capability"]
        entry = {"status": "cut", "argv": list(command.argv)}
        state["commands"][command.name] = entry
        self.folder.save()  # if this process is killed now, the command is "cut"
        try:
            ended = run(command.argv, env, limit, self.folder.log, self.folder.pack)
        except FileNotFoundError as error:
            entry.update(status="failed", says=str(error))
            return "failed"
        entry.update(
            status=ended.status,
            code=ended.code,
            seconds=round(ended.seconds, 1),
            says=tail(ended.output),
            date=time.strftime("%Y-%m-%d %H:%M:%S"),
        )
        state["seconds"] += ended.seconds
        self.folder.save()
        if ended.status == "failed" or part.name == "index":
            print(ended.output.decode(errors="replace")[-2000:], end="")
        print(f"   {ended.status} after {ended.seconds:.0f} s: {entry['says']}", flush=True)
        return ended.status

    def close(self, part: Part) -> None:
        self.folder.save()
        if (status := self.state(part)["status"]) != "done":
            print(f"== {part.name}: {status}", flush=True)


def make_place(args: argparse.Namespace, commit: str) -> Place:
    """Return the session's folders: given paths are relative to the caller's folder.

    The default folders are in the repository.
    """
    here = Path(os.environ.get("BLD_CALLED_FROM", os.curdir)).absolute()
    kind = "-rehearsal" if args.rehearse else ""
    given = args.out or os.environ.get("OUT")
    out = here / given if given else ROOT / f"runs/gpu{kind}"
    scratch = here / args.scratch if args.scratch else ROOT / f"runs/gpu-scratch/{commit}{kind}"
    data = here / args.data if args.data else ROOT / "data"
    return Place(out, scratch, data, args.rehearse)


@lenient
def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    commit = provenance.commit()
    place = make_place(args, commit)
    try:
        if unknown := [name for name in args.parts if name not in PARTS]:
            known = ", ".join(PARTS)
            raise FolderError(f"part: no part is named {unknown[0]!r}; there are {known}")
        if args.minutes is not None and not 60 * args.minutes > RESERVE:
            least = f"above {RESERVE / 60:g}, which the start and the index take"
            raise FolderError(f"--minutes: expected a number {least}, got {args.minutes:g}")
        if args.plan:
            print(plan(place))
            return 0
        found = machine(place)
        if not args.rehearse and not found["card"]:
            raise FolderError(f"{NO_CARD}. On a machine without one, --rehearse runs every part")
        for name in args.parts:
            if missing := PARTS[name].missing(place):
                raise FolderError(f"{name} needs {missing}")
        folder = Folder(place, commit, found)
        card = found["card"] or "rehearsal"
        print(f"{card}, torch {found['torch']}, commit {commit}: {place.out}", flush=True)
        return 0 if Session(place, folder, args.parts, args.minutes).run() else 1
    except (FolderError, CheckpointError, OSError) as error:
        print(f"gpu.sh: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    sys.exit(main())
