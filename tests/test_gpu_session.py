"""`bash benchmarks/gpu.sh`: its order, what survives a kill, what it refuses, and its index."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import rows
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import index, parts, process
from benchmarks.gpu.folder import Folder, FolderError
from benchmarks.gpu.parts import PARTS, Place, environment

ROOT = Path(__file__).parents[1]
MACHINE = {"card": "NVIDIA H100 80GB HBM3", "torch": "2.11.0", "capability": "9.0"}
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without a GPU")


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path / "out", tmp_path / "scratch", tmp_path / "data", rehearsal=False)


def start(folder: Path, *arguments: str, **options) -> subprocess.Popen:
    argv = ["bash", "benchmarks/gpu.sh", *arguments]
    argv += ["--out", str(folder / "out"), "--scratch", str(folder / "scratch")]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.Popen(
        argv, cwd=ROOT, env=os.environ | {"PATH": path}, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, start_new_session=True, **options,
    )  # fmt: skip


def call(folder: Path, *arguments: str) -> tuple[int, str]:
    session = start(folder, *arguments)
    shown, _ = session.communicate(timeout=900)
    return session.returncode, shown


def weights(folder: Path) -> dict[str, str]:
    """Of every run of the tables, the digest of the network at its end."""
    found = rows.read(folder / "out" / "records.jsonl")
    return {entry["file"]: entry["record"]["weights"] for entry in found}


# ---- the rehearsal ----


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    """Every part on this processor, as `bash benchmarks/gpu.sh --rehearse` runs it."""
    folder = tmp_path_factory.mktemp("rehearsal")
    start = time.monotonic()
    code, shown = call(folder, "--rehearse")
    assert code == 0, shown
    return folder, shown, time.monotonic() - start


def test_the_rehearsal_runs_every_part_in_order(rehearsal):
    folder, shown, seconds = rehearsal
    state = json.loads((folder / "out" / "state.json").read_text())
    assert list(state["parts"]) == list(PARTS)
    assert {part["status"] for part in state["parts"].values()} == {"done"}
    assert shown.rstrip().endswith("all done") and seconds < 600


def test_all_that_is_left_are_at_most_eight_files(rehearsal):
    folder, _, _ = rehearsal
    left = {file.name for file in (folder / "out").iterdir()}
    assert left == {"state.json", "log.txt", "rows.jsonl", "records.jsonl", "trace.json.gz",
                    "index.md"}  # fmt: skip


def test_rows_of_every_op_and_of_the_step_were_measured(rehearsal):
    folder, _, _ = rehearsal
    measured = rows.read(folder / "out" / "rows.jsonl")
    ops = ["step", "head_softmax", "distillation", "warm_up", "joint", "balance", "update",
           "augment", "norm", "processes"]  # fmt: skip
    assert list(dict.fromkeys(row["params"]["op"] for row in measured)) == ops
    steps = [row["params"]["name"] for row in measured if row["params"]["op"] == "step"]
    assert steps[:4] == ["straight line, torchvision-batch", "defaults", "shared_forward",
                         "bare passes"]  # fmt: skip
    assert all(row["extra_info"]["us"] > 0 and row["commit"] for row in measured)


def test_the_index_shows_tables_rows_and_what_was_predicted(rehearsal):
    folder, _, _ = rehearsal
    written = (folder / "out" / "index.md").read_text()
    assert written.startswith("# A rehearsal: no figure here is one of a GPU")
    for text in ("(80.6)", "(86.2)", "not measured", "shared_forward", "racecheck", "25 to 45"):
        assert text in written, text


def test_a_second_call_has_nothing_to_do(rehearsal):
    folder, _, _ = rehearsal
    code, shown = call(folder, "--rehearse")
    assert code == 0 and shown.count("done before") == len(PARTS) - 1


def test_tables_that_are_killed_go_on_to_the_same_bits(rehearsal, tmp_path):
    """First where the scratch folder is still there, then from what was packed alone."""
    whole, _, _ = rehearsal
    for lost in (False, True):
        folder = tmp_path / str(lost)
        session = start(folder, "--rehearse", "table2")
        packed = folder / "out" / "checkpoints.tar"
        # runs last about as long as the time between two packings, so wait in the middle of one
        wait_for(lambda folder=folder, session=session: holds_a_checkpoint(folder, session))
        wait_for(packed.exists)
        os.kill(session.pid, signal.SIGKILL)
        session.communicate()
        wait_for(lambda folder=folder: not processes_of(folder))
        state = json.loads((folder / "out" / "state.json").read_text())
        assert state["parts"]["table2"]["commands"]["table2"]["status"] == "cut"
        if lost:
            # a worker, whose command line does not name the folder, may still be writing there
            wait_for(lambda folder=folder: is_removed(folder / "scratch"))
        code, shown = call(folder, "--rehearse", "table2")
        assert code == 0, shown
        expected = {name: w for name, w in weights(whole).items() if name.startswith("table2")}
        assert weights(folder) == expected and len(expected) == 4
        assert not packed.exists()


def wait_for(condition, seconds=90):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def holds_a_checkpoint(folder: Path, session: subprocess.Popen) -> bool:
    """Whether a run had a checkpoint when it was stopped; if not, it goes on."""
    try:
        groups = {os.getpgid(int(number)) for number in processes_of(folder)} - {session.pid}
        for group in groups:
            os.killpg(group, signal.SIGSTOP)
        found = any(folder.glob("scratch/table*/*/runs/*.pt"))
        if not found:
            for group in groups:
                os.killpg(group, signal.SIGCONT)
    except ProcessLookupError:  # a command has ended in the meantime
        return False
    return found


def is_removed(folder: Path) -> bool:
    shutil.rmtree(folder, ignore_errors=True)
    return not folder.exists()


def processes_of(folder: Path) -> list[str]:
    """Those that name the folder in their command line."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(folder) in file.read_text():
                found.append(file.parent.name)
        except OSError:
            pass
    return found


# ---- rows ----


def test_a_row_is_kept_when_it_is_measured_and_not_measured_again(place, tmp_path):
    file = tmp_path / "rows.jsonl"
    argv = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--smallest",
            "benchmarks/test_distillation.py", "--benchmark-enable", "--rows", str(file),
            "--benchmark-min-rounds", "1", "--benchmark-max-time", "0.01", "-k"]  # fmt: skip

    def measure(chosen):
        env = environment(place, command.Command("rows", ()))
        done = subprocess.run([*argv, chosen], cwd=ROOT, env=env, capture_output=True, text=True)
        return done.stdout.splitlines()[-1]

    assert measure("head_softmax-loop").startswith("1 passed")
    with file.open("ab") as cut:
        cut.write(b'{"test": "half a li')  # as a kill amid a write leaves it
    assert measure("head_softmax and not compile").startswith("3 passed, 24 deselected")
    names = [row["params"]["name"] for row in rows.read(file)]
    assert names == ["loop", "split", "reshape", "ours"]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--rows", "{tmp}/rows.jsonl"], "nothing is measured without --benchmark-enable"),
        (["--benchmark-enable", "--rows", "{tmp}"], "cannot be written"),
    ],
    ids=["disabled", "folder"],
)
def test_rows_that_cannot_be_kept_are_refused(options, message, tmp_path):
    options = [option.format(tmp=tmp_path) for option in options]
    argv = [sys.executable, "-m", "pytest", "-q", "benchmarks/test_batch_norm.py", *options]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 4 and message in done.stderr


# ---- the command ----


def test_the_plan_names_parts_limits_and_data(capsys):
    assert command.main(["--plan", "--data", "/nowhere"]) == 0
    shown = capsys.readouterr().out
    order = [line.split()[0] for line in shown.splitlines()[1:] if line[:1].isalpha()]
    assert order[: len(PARTS)] == [
        "build", "step", "table2", "table3", "tests", "memcheck", "racecheck", "head_softmax",
        "distillation", "warm_up", "joint", "balance", "update", "augment", "norm", "profile",
        "precision", "processes", "index",
    ]  # fmt: skip
    assert "MNIST/raw" in shown and "cifar10.npz" in shown and "/nowhere" in shown


@pytest.mark.parametrize(
    "options, message",
    [
        (["taable2"], "no part is named 'taable2'; there are build, step"),
        (["--minutes", "0.7"], "--minutes: expected a number above 0.75, which .*, got 0.7"),
        (["--minutes", "nan"], "--minutes: expected a number above 0.75, which .*, got nan"),
        pytest.param([], "no GPU: .*--rehearse", marks=needs_no_gpu),
    ],
    ids=["part", "no-time", "nan", "no-gpu"],
)
def test_bad_arguments_end_with_one_line(options, message, tmp_path, capsys):
    assert command.main([*options, "--out", str(tmp_path / "out")]) == 2
    line = capsys.readouterr().err
    assert re.search(message, line) and line.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_part_that_is_named_needs_its_data(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "machine", lambda place: MACHINE)
    options = ["table3", "--out", str(tmp_path / "out"), "--data", str(tmp_path)]
    assert command.main(options) == 2
    assert "table3 needs CIFAR-10: put cifar10.npz, " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_data_is_found_in_any_of_its_forms(place):
    assert "MNIST" in PARTS["table2"].missing(place)
    (place.data / "MNIST" / "raw").mkdir(parents=True)
    for name in parts.MNIST:
        assert PARTS["table2"].missing(place)
        (place.data / "MNIST" / "raw" / f"{name}.gz").touch()
    assert PARTS["table2"].missing(place) is None
    sheets = place.data / "cifar10"
    sheets.mkdir()
    for name in parts.SHEETS:
        assert PARTS["table3"].missing(place)  # not all has come yet
        (sheets / name).touch()
    assert PARTS["table3"].missing(place) is None and len(parts.SHEETS) == 54
    (sheets / "unpack.py").write_text("import sys; open(sys.argv[1], 'w').write('images')")
    data, table3 = PARTS["table3"].commands(place)
    assert data.needed and table3.instead.argv[-1] == "--no-capture"
    subprocess.run(data.argv, cwd=ROOT, check=True)
    assert (place.data / "cifar10.npz").read_text() == "images"
    assert len(PARTS["table3"].commands(place)) == 1


# ---- the folder ----


def test_results_of_another_commit_are_not_overwritten(place):
    folder = Folder(place, "aaa", MACHINE)
    folder.save()
    folder.log.close()
    before = {file.name: file.read_bytes() for file in place.out.iterdir()}
    with pytest.raises(FolderError, match="holds results of commit aaa, and this is bbb"):
        Folder(place, "bbb", MACHINE)
    with pytest.raises(FolderError, match="holds results of rehearsal False"):
        Folder(Place(place.out, place.scratch, place.data, True), "aaa", MACHINE)
    with pytest.raises(FolderError, match="holds results of card NVIDIA H100.*is NVIDIA H200"):
        Folder(place, "aaa", MACHINE | {"card": "NVIDIA H200"})
    assert {file.name: file.read_bytes() for file in place.out.iterdir()} == before
    Folder(place, "aaa", MACHINE)


def test_an_empty_folder_goes_on_from_what_was_kept(place, capsys):
    """On a machine whose folder of results is emptied between two calls."""
    folder = Folder(place, "aaa", MACHINE)
    folder.state["parts"]["step"] = {"status": "done", "seconds": 1, "commands": {}}
    folder.save()
    rows.append(place.out / "rows.jsonl", {"test": "a"})
    folder.pack()
    folder.log.close()
    shutil.rmtree(place.out)
    again = Folder(place, "aaa", MACHINE)
    assert again.state == folder.state and "going on from" in capsys.readouterr().out
    assert rows.read(place.out / "rows.jsonl") == [{"test": "a"}]


def test_a_damaged_record_is_told_and_a_damaged_checkpoint_left_out(place, capsys):
    folder = Folder(place, "aaa", MACHINE)
    folder.save()
    folder.log.close()
    (place.out / "checkpoints.tar").write_bytes(b"half a tar")
    Folder(place, "aaa", MACHINE).log.close()
    assert "is damaged" in capsys.readouterr().out
    (place.out / "records.jsonl").write_text("{\n{}\n")
    with pytest.raises(FolderError, match="records.jsonl is damaged"):
        Folder(place, "aaa", MACHINE)


def test_a_full_disk_ends_no_session(place, monkeypatch, capsys):
    folder = Folder(place, "aaa", MACHINE)

    def full(*_):
        raise OSError(28, "No space left on device")

    run = place.scratch / "table2" / "mnist-5" / "runs" / "bld-0.json"
    run.parent.mkdir(parents=True)
    run.write_text('{"record": {}}')
    with monkeypatch.context() as patch:
        patch.setattr(rows, "append", full)
        folder.pack()
    assert "not packed: [Errno 28]" in capsys.readouterr().err
    folder.pack()
    (found,) = rows.read(place.out / "records.jsonl")
    assert (found["commit"], found["card"]) == ("aaa", MACHINE["card"])


@pytest.mark.parametrize("what", ["a file", "foreign files", "no session", "in use"])
def test_a_folder_that_cannot_be_worked_in_is_refused(what, place):
    message = {
        "a file": "cannot be written",
        "foreign files": "holds files of something else",
        "no session": "state.json is not a session's",
        "in use": "another session is writing to",
    }[what]
    held = None
    if what == "a file":
        place.out.touch()
    elif what == "in use":
        held = Folder(place, "aaa", MACHINE)
    else:
        place.out.mkdir()
        (place.out / ("state.json" if what == "no session" else "mine.txt")).write_text("[]")
    with pytest.raises(FolderError, match=message):
        Folder(place, "aaa", MACHINE)
    del held


# ---- commands with a limit ----


def python(code: str) -> tuple[str, ...]:
    return sys.executable, "-c", code


def test_a_command_that_outlasts_its_limit_is_cut_and_what_it_printed_is_kept():
    log, looks = io.BytesIO(), []
    code = "print('measured', flush=True); import time; time.sleep(60)"
    ended = process.run(python(code), os.environ, 1.5, log, lambda: looks.append(1))
    assert ended.status == "cut" and 1 < ended.seconds < 10 and looks
    assert log.getvalue() == b"measured\n" == ended.output


def test_a_command_deaf_to_being_asked_is_ended(monkeypatch):
    monkeypatch.setattr(process, "GRACE", 0.5)
    code = "import signal, time; signal.signal(signal.SIGTERM, lambda *_: None)\n"
    code += "while True: time.sleep(1)"
    ended = process.run(python(code), os.environ, 1, io.BytesIO())
    assert ended.status == "cut" and ended.code == -signal.SIGKILL and ended.seconds < 10


def test_how_commands_end():
    log = io.BytesIO()
    assert process.run(python("print(1)"), os.environ, 60, log).status == "done"
    failed = process.run(python("raise SystemExit(3)"), os.environ, 60, log)
    assert (failed.status, failed.code) == ("failed", 3)
    bar = "import sys; sys.stderr.write('1/2\\r2/2\\n')"
    assert process.run(python(bar), os.environ, 60, log).output == b"2/2\n"


def test_a_failed_part_is_tried_another_way_and_told(place, monkeypatch, capsys):
    monkeypatch.setattr(command, "environment", lambda *_: dict(os.environ))
    other = command.Command("eager", python("print('went')"))
    first = command.Command("graph", python("raise SystemExit(1)"), instead=other)
    few = {
        "both": command.Part("both", "", 1, lambda _: [first]),
        "bad": command.Part("bad", "", 1, lambda _: [command.Command("bad", python("1/0"))]),
        "slow": command.Part("slow", "", 0.01, lambda _: [
            command.Command("slow", python("import time; time.sleep(9)"))]),
        "later": command.Part("later", "", 1, lambda _: [], lambda _: "a tool"),
        "index": command.Part("index", "", 1, lambda _: [
            command.Command("index", python("print('wrote')"))]),
    }  # fmt: skip
    monkeypatch.setattr(command, "PARTS", few)
    folder = Folder(place, "aaa", MACHINE)
    assert not command.Session(place, folder, [], None).run()
    shown = capsys.readouterr().out
    left = shown.split("\n\n")[-1].splitlines()
    assert left == ["bad: failed", "slow: cut", "later: left out, a tool"]
    assert "ZeroDivisionError" in shown and "went" in shown
    # what is done is not run again, what failed is, and what was cut goes on
    assert not command.Session(place, folder, [], None).run()
    shown = capsys.readouterr().out
    assert "both: done before" in shown and "ZeroDivisionError" in shown
    assert "slow: slow" in shown  # and goes on, behind what no call has begun
    assert shown.index("bad: bad") < shown.index("slow: slow")


def test_without_a_build_nothing_is_measured(place, monkeypatch, capsys):
    monkeypatch.setattr(command, "environment", lambda *_: dict(os.environ))
    bad = command.Command("build", python("1/0"))
    few = {"build": command.Part("build", "", 1, lambda _: [bad], vital=True),
             "step": command.Part("step", "", 1, lambda _: [bad]),
             "index": command.Part("index", "", 1, lambda _: [])}  # fmt: skip
    monkeypatch.setattr(command, "PARTS", few)
    assert not command.Session(place, Folder(place, "aaa", MACHINE), [], None).run()
    shown = capsys.readouterr().out
    assert shown.endswith("build: failed\nstep: not begun\n") and "without build" in shown


def test_a_call_ends_in_its_minutes(place, monkeypatch, capsys):
    monkeypatch.setattr(command, "environment", lambda *_: dict(os.environ))
    monkeypatch.setattr(command, "RESERVE", 1)
    sleep = command.Command("sleep", python("import time; time.sleep(60)"))
    few = {"first": command.Part("first", "", 1, lambda _: [sleep]),
             "then": command.Part("then", "", 1, lambda _: [sleep]),
             "index": command.Part("index", "", 1, lambda _: [])}  # fmt: skip
    monkeypatch.setattr(command, "PARTS", few)
    began = time.monotonic()
    assert not command.Session(place, Folder(place, "aaa", MACHINE), [], 8 / 60).run()
    assert time.monotonic() - began < 15
    assert "first: cut\nthen: not begun" in capsys.readouterr().out


# ---- the index ----


def test_a_session_becomes_part_of_the_results(rehearsal, tmp_path, monkeypatch):
    folder, _, _ = rehearsal
    results = tmp_path / "gpu"
    results.mkdir()
    known = (index.RESULTS / "predicted.json").read_text()
    (results / "predicted.json").write_text(known)
    monkeypatch.setattr(index, "RESULTS", results)
    with pytest.raises(ValueError, match="is a rehearsal"):
        index.add(folder / "out")
    session = tmp_path / "session"
    session.mkdir()
    for name in ("rows.jsonl", "records.jsonl"):
        (session / name).write_text((folder / "out" / name).read_text())
    state = json.loads((folder / "out" / "state.json").read_text())
    state |= {"rehearsal": False, "machine": MACHINE}
    (session / "state.json").write_text(json.dumps(state))
    card = index.add(session)
    assert card == results / "h100"
    before = {file.name: file.read_text() for file in card.iterdir()}
    assert index.add(session) == card  # taken once
    assert {file.name: file.read_text() for file in card.iterdir()} == before
    assert sorted(before) == ["records.jsonl", "rows.jsonl", "sessions.jsonl"]
    written = index.index(card)
    assert written.startswith("# NVIDIA H100 80GB HBM3")
    assert "| mnist-5 / bld, ms a step" in written


def test_runs_of_other_ways_and_commits_are_not_mixed():
    def entry(folder, commit, seconds, seed=0):
        record = {"method": "bld", "seed": seed, "seconds": seconds, "step_ms": seconds}
        return {"file": f"{folder}/mnist-5/runs/bld-0.json", "commit": commit, "record": record}

    found = index.figures([], [
        entry("table2", "a", 90), entry("table2-without-graphs", "a", 300),
        entry("table2", "b", 80), entry("table2", "b", 70), entry("table2", "b", 72, seed=1),
    ])  # fmt: skip
    assert found == {
        "mnist-5 / bld, s a run": (71, "b"),
        "mnist-5 / bld, ms a step": (71, "b"),
        "mnist-5 without graphs / bld, s a run": (300, "a"),
        "mnist-5 without graphs / bld, ms a step": (300, "a"),
    }


@pytest.mark.parametrize(
    "card, name",
    [("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA A100-SXM4-80GB", "a100"), ("Tesla T4", "t4"),
     ("NVIDIA H100 PCIe", "h100-pcie"), ("NVIDIA GeForce RTX 4090", "rtx-4090")],
)  # fmt: skip
def test_cards_have_folders_of_their_own(card, name):
    assert index.card_name({"card": card}) == name


def test_the_index_of_every_card_is_that_of_its_rows():
    cards = [folder for folder in index.RESULTS.iterdir() if folder.is_dir()]
    assert cards
    for card in cards:
        assert (card / "index.md").read_text() == index.index(card), card
