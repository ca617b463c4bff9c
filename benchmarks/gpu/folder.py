"""What a session leaves: at most eight files, each whole whenever the session is cut.

state.json         the commit, the machine, and how each part ended
log.txt            what every command printed
rows.jsonl         every measured row
records.jsonl      every finished run of the tables
checkpoints.tar    the runs of the tables that were cut
trace.json.gz      one step, kernel by kernel, for ui.perfetto.dev
index.md           all figures beside what was predicted
"""

import fcntl
import io
import json
import tarfile

from benchmarks import rows
from benchmarks.gpu.parts import Place
from benchmarks.paper.checkpoint import one_line, write_whole


class FolderError(Exception):
    """A folder that a session cannot work in; the message says what to do."""


class Folder:
    """`place.out` of one commit, held by one session at a time."""

    def __init__(self, place: Place, commit: str, machine: dict):
        self.place, self.out = place, place.out
        self.state_file = self.out / "state.json"
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            place.scratch.mkdir(parents=True, exist_ok=True)
            self.log = (self.out / "log.txt").open("ab")
        except OSError as error:
            raise FolderError(
                f"OUT: {self.out} cannot be written ({one_line(error)}); name another folder in "
                "OUT or --out"
            ) from error
        try:
            fcntl.flock(self.log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FolderError(
                f"OUT: another session is writing to {self.out}; wait for it, or name another "
                "folder in OUT or --out"
            ) from None
        self.state = self._known(commit, machine)
        rows.mend(self.out / "rows.jsonl")
        rows.mend(self.out / "records.jsonl")
        self._packed = {entry["file"] for entry in self._records()}
        self._unpack()

    def _known(self, commit: str, machine: dict) -> dict:
        fresh = {
            "commit": commit,
            "rehearsal": self.place.rehearsal,
            "machine": machine,
            "parts": {},
        }
        if not self.state_file.exists():
            foreign = [f.name for f in self.out.iterdir() if f.name != "log.txt"]
            if foreign or (self.out / "log.txt").stat().st_size:
                raise FolderError(
                    f"OUT: {self.out} holds files of something else ({', '.join(foreign[:3])}); "
                    "name an empty folder in OUT or --out"
                )
            return fresh
        try:
            state = json.loads(self.state_file.read_text())
            before = {name: state[name] for name in fresh}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise FolderError(
                f"OUT: {self.state_file} is not a session's ({one_line(error)}); name another "
                "folder in OUT or --out"
            ) from error
        for what in ("commit", "rehearsal"):
            if before[what] != fresh[what]:
                raise FolderError(
                    f"OUT: {self.out} holds results of {what} {before[what]}, and this is "
                    f"{fresh[what]}; name another folder in OUT or --out. Nothing was overwritten"
                )
        return before

    def save(self) -> None:
        write_whole(self.state_file, f"{json.dumps(self.state, indent=1)}\n".encode())

    # ---- runs of the tables: a folder of many files there, two files here ----

    def pack(self) -> None:
        """Take in what the tables' runs have written since; costs nothing where that is nothing."""
        for file in sorted(self.place.scratch.glob("table*/*/runs/*.json")):
            name = str(file.relative_to(self.place.scratch))
            if name not in self._packed:
                found = json.loads(file.read_text())
                rows.append(self.out / "records.jsonl", {"file": name, **found})
                self._packed.add(name)
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
        except FileNotFoundError:  # a run has ended meanwhile
            return
        write_whole(tar, data.getvalue())

    def _records(self) -> list[dict]:
        file = self.out / "records.jsonl"
        return rows.read(file) if file.exists() else []

    def _unpack(self) -> None:
        """Where the scratch folder is gone, go on from what was packed."""
        for entry in self._records():
            file = self.place.scratch / entry["file"]
            if not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                text = json.dumps({key: value for key, value in entry.items() if key != "file"})
                write_whole(file, f"{text}\n".encode())
        tar = self.out / "checkpoints.tar"
        if not tar.exists():
            return
        with tarfile.open(tar) as archive:
            for member in archive.getmembers():
                file = self.place.scratch / member.name
                done = file.with_suffix(".json").exists()
                if member.isfile() and not file.exists() and not done:
                    archive.extract(member, self.place.scratch, filter="data")


def tail(data: bytes) -> str:
    """The last line that says something."""
    lines = [line for line in data.decode(errors="replace").splitlines() if line.strip(" =")]
    return lines[-1].strip(" =") if lines else ""
