"""The files that a session leaves: at most eight, each complete whenever the session is cut.

state.json         the commit, the machine, and how each part ended
log.txt            what every command printed
rows.jsonl         every measured row
records.jsonl      every finished run of the tables
checkpoints.tar    the checkpoints of interrupted runs of the tables
trace.json.gz      one step, kernel by kernel, for ui.perfetto.dev
index.md           all figures beside the predictions
"""

import fcntl
import io
import json
import shutil
import sys
import tarfile
import time
from pathlib import Path

from benchmarks import rows
from benchmarks.gpu.parts import Place
from benchmarks.paper.checkpoint import CheckpointError, one_line, write_whole


class FolderError(Exception):
    """A session cannot work in this folder; the message says what to do."""


SAME = ("card", "torch", "cuda", "triton")  # must be the same for all figures in a folder
KEPT = ("state.json", "rows.jsonl", "records.jsonl")


class Folder:
    """The results in `place.out`, of one commit on one card, locked by one session at a time.

    The runs of the tables write many files to `place.scratch`; they are packed into two files here.
    The most valuable files of `out` are copied to the scratch folder, for machines that empty `out`
    between two calls.
    """

    def __init__(self, place: Place, commit: str, machine: dict):
        self.place, self.out, self.kept = place, place.out, place.scratch / "kept"
        fresh = {
            "commit": commit,
            "rehearsal": place.rehearsal,
            "machine": machine,
            "started": time.strftime("%Y-%m-%d %H:%M:%S"),
            "parts": {},
        }
        for name, folder in (("--scratch", place.scratch), ("OUT", self.out)):
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise self._unwritable(name, folder, error) from error
        self._require_own_files()
        try:
            self.log = (self.out / "log.txt").open("ab")
        except OSError as error:
            raise self._unwritable("OUT", self.out, error) from error
        try:
            fcntl.flock(self.log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FolderError(
                f"OUT: another session is writing to {self.out}; wait for it, or name another "
                "folder in OUT or --out"
            ) from None
        if not (self.out / "state.json").exists():
            self._begin()
        self.state = self._known(fresh)
        for name in KEPT[1:]:
            rows.mend(self.out / name)
        self._packed = {entry["file"] for entry in self._records()}
        self._unpack()

    @staticmethod
    def _unwritable(name: str, folder: Path, error: OSError) -> FolderError:
        return FolderError(
            f"{name}: {folder} cannot be written ({one_line(error)}); name another folder"
        )

    def _require_own_files(self) -> None:
        if (self.out / "state.json").exists():
            return
        foreign = [f.name for f in self.out.iterdir() if f.name != "log.txt" or f.stat().st_size]
        if foreign:
            raise FolderError(
                f"OUT: {self.out} holds files of something else ({', '.join(foreign[:3])}); "
                "name an empty folder in OUT or --out"
            )

    def _begin(self) -> None:
        """Fill an empty folder with what an earlier call kept; a rehearsal starts anew."""
        if self.place.rehearsal:
            for old in (*self.place.scratch.glob("table*"), self.kept):
                shutil.rmtree(old, ignore_errors=True)
        elif self.kept.exists():
            for name in KEPT:
                if (self.kept / name).exists():
                    write_whole(self.out / name, (self.kept / name).read_bytes())
            print(f"{self.out} is empty; going on from {self.kept}", flush=True)

    def _known(self, fresh: dict) -> dict:
        file = self.out / "state.json"
        if not file.exists():
            return fresh
        try:
            state = json.loads(file.read_text())
            before = {name: state[name] for name in fresh}
            cards = {name: (before["machine"].get(name), fresh["machine"].get(name))
                     for name in SAME}  # fmt: skip
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise FolderError(
                f"OUT: {file} is not a session's ({one_line(error)}); name another folder in OUT "
                "or --out"
            ) from error
        pairs = {name: (before[name], fresh[name]) for name in ("commit", "rehearsal")} | cards
        for what, (then, now) in pairs.items():
            if then != now:
                raise FolderError(
                    f"OUT: {self.out} holds results of {what} {then}, and this is {now}; name "
                    "another folder in OUT or --out. Nothing was overwritten"
                )
        return before

    def save(self) -> None:
        write_whole(self.out / "state.json", f"{json.dumps(self.state, indent=1)}\n".encode())

    def pack(self) -> None:
        """Pack what was written since the last call, if anything.

        A full disk is reported but raises no error, because the runs can go on.
        """
        try:
            self._pack_records()
            self._pack_checkpoints()
            self.kept.mkdir(exist_ok=True)
            for name in KEPT:
                file, copy = self.out / name, self.kept / name
                if file.exists() and not (
                    copy.exists() and copy.stat().st_mtime_ns > file.stat().st_mtime_ns
                ):
                    write_whole(copy, file.read_bytes())
        except (OSError, CheckpointError) as error:
            print(f"not packed: {one_line(error)}", file=sys.stderr, flush=True)

    def _pack_records(self) -> None:
        for file in sorted(self.place.scratch.glob("table*/*/runs/*.json")):
            name = str(file.relative_to(self.place.scratch))
            if name not in self._packed:
                found = {"file": name, "commit": self.state["commit"]}
                found["card"] = self.state["machine"]["card"]
                rows.append(self.out / "records.jsonl", found | json.loads(file.read_text()))
                self._packed.add(name)

    def _pack_checkpoints(self) -> None:
        tar = self.out / "checkpoints.tar"
        cut = sorted(self.place.scratch.glob("table*/*/runs/*.pt"))
        if not cut:
            tar.unlink(missing_ok=True)
            return
        try:
            newest = max(file.stat().st_mtime_ns for file in cut)
            if tar.exists() and tar.stat().st_mtime_ns > newest:
                return
            data = io.BytesIO()
            with tarfile.open(fileobj=data, mode="w") as archive:
                for file in cut:
                    archive.add(file, str(file.relative_to(self.place.scratch)))
        except FileNotFoundError:  # a run has ended in the meantime
            return
        write_whole(tar, data.getvalue())

    def _records(self) -> list[dict]:
        file = self.out / "records.jsonl"
        try:
            return rows.so_far(file)
        except ValueError as error:
            raise FolderError(
                f"OUT: {file} is damaged ({one_line(error)}); name another folder in OUT or --out"
            ) from error

    def _unpack(self) -> None:
        """Restore files that are missing in the scratch folder from what was packed."""
        for entry in self._records():
            file = self.place.scratch / entry["file"]
            if not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                own = ("file", "commit", "card")
                text = json.dumps({key: value for key, value in entry.items() if key not in own})
                write_whole(file, f"{text}\n".encode())
        tar = self.out / "checkpoints.tar"
        if not tar.exists():
            return
        try:
            with tarfile.open(tar) as archive:
                for member in archive.getmembers():
                    file = self.place.scratch / member.name
                    done = file.with_suffix(".json").exists()
                    if member.isfile() and not file.exists() and not done:
                        archive.extract(member, self.place.scratch, filter="data")
        except (tarfile.TarError, EOFError) as error:
            print(f"{tar} is damaged ({one_line(error)}): the runs in it begin anew", flush=True)


def tail(data: bytes) -> str:
    """Return the last line that is not blank or a rule."""
    lines = [line for line in data.decode(errors="replace").splitlines() if line.strip(" =")]
    return lines[-1].strip(" =") if lines else ""
