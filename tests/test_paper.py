"""The main job: records, tables and files of a small but real run, and what the command refuses."""

import contextlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from kill import without_time

from benchmarks.paper import estimate as estimate_module
from benchmarks.paper import report
from benchmarks.paper.__main__ import main, make_parser, make_settings, parse_seeds
from benchmarks.paper.checkpoint import Checkpoint, CheckpointError
from benchmarks.paper.estimate import Estimator
from benchmarks.paper.experiment import batch_statistics, conditions, evaluate, run
from benchmarks.paper.job import devices_of, use_device
from benchmarks.paper.methods import METHODS, PRESETS, Settings, make_learner
from benchmarks.paper.networks import NETWORKS, Shrink, make_model
from benchmarks.paper.streams import Dataset, load_dataset, make_stream
from benchmarks.paper.work import describe
from bld_ext import SeededAugment, bank_bytes

ROOT = Path(__file__).parents[1]
SMALL = Settings("slim", 3e-3, 2, {"crop_padding": 1}, tasks=3, limit=40)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """One run of the command, as a user starts it."""
    out = tmp_path_factory.mktemp("job")
    options = "--tasks 3 --limit 40 --views 2 --seeds 0,1 --jobs 2".split()
    command = [sys.executable, "-m", "benchmarks.paper", *options, "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done, json.loads((out / "results.json").read_text()), out


def test_the_command_prints_a_table_and_a_progress_bar(job):
    done, result, _ = job
    assert "| finetune |" in done.stdout and "| bld      |" in done.stdout
    assert "bld - finetune, paired over 2 seeds: " in done.stdout
    batches = 4 * 3 * 2  # runs, tasks, batches of 20 in 40 images
    assert f"{batches}/{batches}" in done.stderr and "100%" in done.stderr
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr


def test_the_files_hold_configuration_versions_and_every_matrix(job):
    _, result, out = job
    assert result["settings"]["views"] == 2 and result["seeds"] == [0, 1]
    assert {"torch", "bld_ext", "python", "kernels"} <= set(result["versions"])
    assert [(r["method"], r["seed"]) for r in result["runs"]] == [
        ("finetune", 0), ("bld", 0), ("finetune", 1), ("bld", 1),
    ]  # fmt: skip
    for record in result["runs"]:
        assert [len(row) for row in record["accuracy"]] == [1, 2, 3]
        assert all(0 <= cell <= 100 for row in record["accuracy"] for cell in row)
    assert (out / "accuracy.png").read_bytes().startswith(b"\x89PNG")


def test_table_means_equal_the_means_of_the_values(job):
    _, result, _ = job
    for method, entry in result["summary"].items():
        last = [r["accuracy"][-1] for r in result["runs"] if r["method"] == method]
        for j, cell in enumerate(entry["tasks"]):
            column = [row[j] for row in last]
            assert cell == {
                "mean": pytest.approx(mean(column)),
                "std": pytest.approx(stdev(column)),
            }
        of_tasks = mean(cell["mean"] for cell in entry["tasks"])
        assert entry["average"]["mean"] == pytest.approx(of_tasks)
        assert f"{entry['average']['mean']:.1f} ± " in report.table(result["summary"])


def test_the_paired_difference_is_that_of_the_averages(job):
    _, result, _ = job
    by = {(r["method"], r["seed"]): mean(r["accuracy"][-1]) for r in result["runs"]}
    differences = [by["bld", s] - by["finetune", s] for s in (0, 1)]
    found = result["bld_minus"]["finetune"]
    assert found["mean"] == pytest.approx(mean(differences))
    assert found["standard_error"] == pytest.approx(stdev(differences) / 2**0.5)


def test_an_interval_is_that_of_a_paired_t_test():
    """For differences 1, 2 and 6: mean 3, standard error √7/√3, and 4.303 of a t with 2 degrees."""
    averages = {"bld": (51, 62, 76), "finetune": (50, 60, 70)}
    runs = [
        {"method": m, "seed": s, "accuracy": [[a]]}
        for m, of in averages.items()
        for s, a in enumerate(of)
    ]
    found = report.paired(runs, "bld", "finetune")
    half = 4.30265 * (7 / 3) ** 0.5
    assert found["interval"] == pytest.approx([3 - half, 3 + half], rel=1e-5)
    assert found["p"] == pytest.approx(0.188, abs=1e-3)
    line = report.difference_line(found, "bld", "finetune")
    assert line == (
        "bld - finetune, paired over 3 seeds: +3.0 points ± 1.5 (standard error), "
        "95 % interval -3.6 to +9.6, p = 0.19"
    )


@pytest.mark.parametrize("seeds", [1, 2])
def test_equal_differences_have_no_interval(seeds):
    runs = [
        {"method": m, "seed": s, "accuracy": [[a]]}
        for m, a in {"bld": 60, "finetune": 50}.items()
        for s in range(seeds)
    ]
    found = report.paired(runs, "bld", "finetune")
    assert found["mean"] == 10 and found["interval"] is None and found["p"] is None
    assert "interval" not in report.difference_line(found, "bld", "finetune")


def test_forgetting_is_best_minus_last():
    record = {"accuracy": [[90], [95, 80], [70, 85, 99]]}
    assert report.forgetting(record) == pytest.approx(mean([95 - 70, 80 - 85]))


def test_methods_start_from_the_same_split_order_and_weights():
    digits = load_dataset("digits")
    records = [run(digits, m, SMALL, seed=1) for m in ("finetune", "bld")]
    assert records[0]["classes"] == records[1]["classes"]
    # nothing to distil in the first task, so both end it alike
    assert records[0]["accuracy"][0] == records[1]["accuracy"][0]
    assert records[0]["accuracy"][-1] != records[1]["accuracy"][-1]
    assert [r["memory"]["bank"] for r in records] == [0, bank_bytes(20, 2, [4, 3])]


def test_a_run_depends_on_nothing_but_its_seed():
    digits = load_dataset("digits")
    torch.manual_seed(5)
    first = run(digits, "bld", SMALL, seed=2)
    torch.manual_seed(6)
    second = run(digits, "bld", SMALL, seed=2)
    assert first["accuracy"] == second["accuracy"]
    ticks = []
    run(digits, "finetune", SMALL, seed=2, progress=ticks.append)
    assert len(ticks) == 6


def test_batch_statistics_are_a_passing_diagnostic():
    task = make_stream(load_dataset("digits"), 5, seed=0)[0]
    model = make_model("slim")
    model.add_head(2)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    plain = evaluate(model, task, 0)
    with batch_statistics(model):
        evaluate(model, task, 0)
    assert evaluate(model, task, 0) == plain
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_test_images_are_mixed_where_their_batch_normalises_them():
    labels = torch.arange(1000) // 500  # sorted, as in some files
    images = labels.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)
    task = make_stream(Dataset("sorted", images, labels, images, labels), 1, seed=0)[0]
    mixed = task.with_mixed_tests()
    assert (
        torch.equal(task.x_test[:, 0, 0, 0], labels) and (task.y_test[:500] == task.y_test[0]).all()
    )
    for x, y in zip(mixed.x_test.split(500), mixed.y_test.split(500), strict=True):
        assert 200 < y.sum() < 300
        assert ((x[:, 0, 0, 0] == x[0, 0, 0, 0]) == (y == y[0])).all()
    assert torch.equal(mixed.x_test, task.with_mixed_tests().x_test)
    assert mixed.x_train is task.x_train


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("channels", [1, 3])
def test_networks_take_gray_and_colour(network, channels):
    model = make_model(network, momentum=0.05).eval()
    model.add_head(2)
    assert model(torch.rand(2, channels, 32, 32)).shape == (2, 2)
    momenta = {m.momentum for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)}
    assert momenta == {0.05}


SIDES = [(8, 200), (200, 8), (1, 40), (40, 1), (3, 5), (1, 1), (17, 33)]


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("sides", SIDES, ids=str)
def test_networks_take_images_of_any_sides(network, sides):
    model = make_model(network).eval()
    model.add_head(2)
    assert model(torch.rand(2, 1, *sides)).isfinite().all()


def test_images_shrink_side_by_side():
    square = torch.rand(2, 3, 64, 64)
    halved = F.avg_pool2d(F.avg_pool2d(square, 2), 2)
    assert torch.equal(Shrink(16)(square), halved)
    wide = torch.rand(2, 3, 8, 200)
    assert Shrink(16)(wide).shape == (2, 3, 8, 12)
    columns = wide[..., :192].unflatten(-1, (12, 16)).mean(-1)
    torch.testing.assert_close(Shrink(16)(wide), columns)
    torch.testing.assert_close(Shrink(16)(wide.mT), columns.mT)


@pytest.mark.parametrize("sides", [(8, 200), (200, 8)], ids=str)
def test_wide_and_tall_images_are_learned(sides):
    images = torch.randint(256, (16, 1, *sides), dtype=torch.uint8)
    labels = torch.arange(16) % 4
    settings = replace(SMALL, tasks=2, views=1)
    record = run(Dataset("wide", images, labels, images, labels), "bld", settings, seed=0)
    assert [len(row) for row in record["accuracy"]] == [1, 2]


@pytest.mark.parametrize("tests", [1, 3])
def test_a_test_batch_of_a_single_small_image_is_evaluated(tests):
    """Its feature map has one position, and BatchNorm has no statistics of a single value."""
    images = torch.randint(256, (16, 1, 4, 4), dtype=torch.uint8)
    labels = torch.arange(16) % 4
    task = make_stream(Dataset("few", images, labels, images, labels), 1, seed=0)[0]
    task = replace(task, x_test=task.x_test[:tests], y_test=task.y_test[:tests])
    model = make_model("slim")
    model.add_head(4)
    with batch_statistics(model):
        assert 0 <= evaluate(model, task, 0, batch=2) <= 100
    one, *_ = model.predict(SeededAugment()(task.x_test, seed=0, step=0, views=[0]), 0)
    share = evaluate(model, replace(task, x_test=task.x_test[:1], y_test=task.y_test[:1]), 0)
    assert share == 100 * (one == task.y_test[0])


def test_resnet18_is_the_paper_s():
    """44.8 MB in the tables, its heads included."""
    model = make_model("resnet18")
    for _ in range(5):
        model.add_head(2)
    held = [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]
    assert round(sum(t.numel() * 4 for t in held) / 1e6, 1) == 44.8


def test_presets_name_their_network_and_views():
    assert PRESETS["cifar10"].augment["flip"] == 0.5 and "flip" not in PRESETS["mnist"].augment
    for name in ("mnist", "cifar10", "svhn"):
        preset = PRESETS[name]
        assert (preset.network, preset.lr, preset.views) == ("resnet18", 1e-4, 50)


def test_a_user_s_own_npz_runs(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {"x": rng.integers(0, 256, (60, 8, 8, 3), dtype=np.uint8), "y": np.arange(60) % 4}
    path = tmp_path / "mine.npz"
    np.savez(path, x_train=arrays["x"], y_train=arrays["y"], x_test=arrays["x"], y_test=arrays["y"])
    options = "--tasks 2 --views 1 --seeds 3 --methods bld --jobs 1".split()
    assert main(["--dataset", str(path), *options, "--out", str(tmp_path / "out")]) == 0
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(result["runs"]) == 1 and result["bld_minus"] == {}


@pytest.fixture
def own_npz(tmp_path):
    """own_npz(shape): a file of the user's own with four classes, and options of a tiny run."""

    def make(*shape):
        rng = np.random.default_rng(0)
        x, y = rng.integers(0, 256, (24, *shape), dtype=np.uint8), np.arange(24) % 4
        np.savez(tmp_path / "mine.npz", x_train=x, y_train=y, x_test=x, y_test=y)
        options = "--tasks 2 --views 1 --seeds 3,4 --methods bld --jobs 1 --limit 4".split()
        return [*options, "--dataset", str(tmp_path / "mine.npz"), "--out", str(tmp_path / "out")]

    return make


def notes_in(capsys):
    return [x for x in capsys.readouterr().err.splitlines() if x.startswith("dataset ")]


def test_a_user_s_own_npz_has_the_paper_s_learning_rate_and_is_told_so(own_npz, tmp_path, capsys):
    options = own_npz(8, 8)
    assert main(options) == 0
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    assert result["settings"]["lr"] == 1e-4 != PRESETS["digits"].lr
    (note,) = notes_in(capsys)
    assert "mine.npz: the learning rate is 0.0001, that of the preset 'paper', " in note
    assert "tune it with --lr" in note


def test_a_learning_rate_that_was_given_is_not_spoken_of(own_npz, tmp_path, capsys):
    assert main([*own_npz(8, 8), "--lr", "0.002", "--dry-run"]) == 0
    assert notes_in(capsys) == []
    assert main(["--tasks", "2", *TINY, "--dry-run", "--out", str(tmp_path / "digits")]) == 0
    assert notes_in(capsys) == []


def test_every_preset_says_its_learning_rate_once(own_npz, capsys):
    options = [*own_npz(8, 8), "--preset", "cpu"]
    assert main(["ablation", "--vary", "temperature=1,2", *options, "--seeds", "3"]) == 0
    (note,) = notes_in(capsys)
    assert "the learning rate is 0.001, that of the preset 'cpu', " in note


def test_alpha_is_dropped_with_a_word(own_npz, tmp_path, capsys):
    assert main([*own_npz(8, 8, 4), "--lr", "0.001"]) == 0
    (note,) = notes_in(capsys)
    assert "mine.npz: the fourth channel of the images, alpha, is left out" in note
    assert len(json.loads((tmp_path / "out" / "results.json").read_text())["runs"]) == 2


@pytest.mark.parametrize("name", ["$a_$.npz", "\udcff.npz"], ids=["mathtext", "no-unicode"])
def test_the_name_of_a_dataset_is_drawn_as_it_is(name, job, tmp_path):
    title = describe(name, SMALL, [0])
    records = job[1]["runs"]
    report.figure(records, title, tmp_path / "accuracy.png")
    summary = report.summarise(records).items()
    rows = [(setting, 1, m, e) for setting in ("lr", "a", "b", "c", "d") for m, e in summary]
    report.ablation_figure(rows, title, tmp_path / "ablation.png")
    for picture in ("accuracy", "ablation"):
        assert (tmp_path / f"{picture}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "options, message",
    [
        (["--vary", "temperature=1"], "vary: only `ablation` varies settings, got it with `run`"),
        (["table2", "--vary", "views=1"], "only `ablation` varies settings, got it with `table2`"),
        (["table2", "--dataset", "a.npz"], "dataset: table2 has .* of its own, got 'a.npz'; leave"),
        (["table1", "--dataset", "digits"], "dataset: table1 has datasets"),
        (["table3", "--tasks", "3"], "tasks: table3 has .* of its own, got 3; leave --tasks out"),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else "",
)
def test_an_option_that_would_be_passed_over_is_refused(options, message, tmp_path, capsys):
    assert main([*options, "--out", str(tmp_path / "o")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(f"^error: .*{message}", line)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        (["--dataset", "imagenet"], "expected digits, mnist, cifar10, svhn"),
        (["--dataset", "nowhere.npz"], "no file nowhere.npz"),
        (["--tasks", "11"], "tasks: expected 1 to 10"),
        (["--lr", "-1"], "lr: expected"),
        (["--limit", "1"], "fewer than 2 training images"),
        (["--device", "meta"], "expected cpu or cuda"),
        (["--device", "nonsense"], "nonsense"),
    ],
    ids=lambda value: value[1] if isinstance(value, list) else "",
)
def test_bad_options_end_with_one_line(options, message, tmp_path, capsys):
    assert main([*options, "--out", str(tmp_path / "o")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    "options",
    [["--views", "0"], ["--methods", "ewc"], ["--seeds", "7-5,3"], ["--momentum", "5"]],
    ids=lambda o: o[0],
)
def test_bad_values_are_refused_by_the_parser(options, capsys):
    with pytest.raises(SystemExit) as stop:
        make_parser().parse_args(options)
    assert stop.value.code == 2 and "expected" in capsys.readouterr().err.replace(
        "choose", "expected"
    )


def test_seeds_are_ranges_and_lists():
    assert parse_seeds("5-7,9,9") == [5, 6, 7, 9]


def test_help_shows_examples(capsys):
    with pytest.raises(SystemExit):
        make_parser().parse_args(["--help"])
    assert "python -m benchmarks.paper --dataset mnist" in capsys.readouterr().out


def test_ctrl_c_ends_the_job_and_its_workers(tmp_path):
    command = [sys.executable, "-m", "benchmarks.paper", "--jobs", "2", "--out", str(tmp_path)]
    job = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        # a shell that starts the tests in the background has its jobs ignore Ctrl-C
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    os.set_blocking(job.stderr.fileno(), False)
    seen = b""
    deadline = time.monotonic() + 60
    while not re.search(rb" [1-9]\d*/\d+ ", seen):  # until a batch has been learned
        assert time.monotonic() < deadline, seen
        seen += job.stderr.read() or b""
        time.sleep(0.1)
    os.killpg(job.pid, signal.SIGINT)
    assert job.wait(timeout=15) == 130
    os.set_blocking(job.stderr.fileno(), True)
    seen += job.stderr.read()
    assert b"interrupted" in seen and b"Traceback" not in seen
    with pytest.raises(ProcessLookupError):
        for _ in range(100):  # the last of the group may need a moment
            os.killpg(job.pid, 0)
            time.sleep(0.1)


def test_an_unwritable_folder_is_found_before_training(tmp_path, capsys):
    (tmp_path / "results.json").mkdir()
    assert main(["--out", str(tmp_path)]) == 2
    assert "results.json" in capsys.readouterr().err


# ---- long work ----


class Killed(BaseException):
    pass


def run_until(batches, method, path, digits):
    """A run that ends abruptly after so many batches, with what it had on the disk."""
    left = batches

    def tick(_):
        nonlocal left
        left -= 1
        if left == 0:
            raise Killed

    with pytest.raises(Killed):
        run(digits, method, SMALL, 2, progress=tick, checkpoint=path, every=0)


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_was_killed_goes_on_to_the_same_bits(method, tmp_path):
    digits = load_dataset("digits")
    whole = run(digits, method, SMALL, 2)
    for batches in (1, 3, 5) if method == "bld" else (4,):
        path = tmp_path / f"{batches}.pt"
        run_until(batches, method, path, digits)
        ticks = []
        again = run(digits, method, SMALL, 2, progress=ticks.append, checkpoint=path, resume=True)
        assert without_time(again) == without_time(whole)
        assert sum(ticks) == whole["batches"]


def test_a_changed_configuration_is_refused_with_the_difference(tmp_path):
    digits, path = load_dataset("digits"), tmp_path / "run.pt"
    run_until(2, "bld", path, digits)
    other = Settings("slim", 1e-3, 2, {"crop_padding": 1}, tasks=3, limit=40)
    with pytest.raises(CheckpointError, match="changed: lr: 0.003 before, 0.001 now"):
        run(digits, "bld", other, 2, checkpoint=path, resume=True)
    with pytest.raises(CheckpointError, match="method: 'bld' before, 'l2' now"):
        run(digits, "l2", SMALL, 2, checkpoint=path, resume=True)


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "flipped", "foreign", "pickle"])
def test_a_file_that_is_no_checkpoint_is_refused_and_not_executed(damage, tmp_path):
    digits, path = load_dataset("digits"), tmp_path / "run.pt"
    run_until(2, "bld", path, digits)
    data = path.read_bytes()
    if damage == "pickle":

        class Harm:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "harm"),)

        torch.save({"mark": Harm()}, path)
    elif damage == "foreign":
        torch.save({"model": torch.ones(3)}, path)
    else:
        cut = {"empty": b"", "text": b"no file", "cut": data[: len(data) // 2]}
        flipped = data[:300] + bytes([data[300] ^ 255]) + data[301:]
        path.write_bytes(cut.get(damage, flipped))
    with pytest.raises(CheckpointError, match="not readable|not that of a run"):
        run(digits, "bld", SMALL, 2, checkpoint=path, resume=True)
    assert not (tmp_path / "harm").exists()


def test_a_full_disk_leaves_the_last_checkpoint_whole(tmp_path):
    """No file may grow beyond a part of a checkpoint: as on a full disk, a write fails midway."""
    digits, path = load_dataset("digits"), tmp_path / "run.pt"
    run_until(2, "bld", path, digits)
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    for part in (2, 10, 100):
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // part, limits[1]))
        try:
            with pytest.raises(CheckpointError, match="want of space.*before is whole.*--resume"):
                run(digits, "bld", SMALL, 2, checkpoint=path, every=0)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert [file.name for file in tmp_path.iterdir()] == ["run.pt"]
        assert path.read_bytes() == before
    whole = run(digits, "bld", SMALL, 2)
    again = run(digits, "bld", SMALL, 2, checkpoint=path, resume=True)
    assert without_time(again) == without_time(whole)


@pytest.mark.parametrize("state", ["nothing", "no-model", "other-shapes"])
def test_a_state_that_does_not_fit_is_refused(state, tmp_path):
    digits, path = load_dataset("digits"), tmp_path / "run.pt"
    run_until(2, "bld", path, digits)
    kept = Checkpoint(path, conditions(digits, "bld", SMALL, 2, "cpu"), every=0)
    found = kept.load("cpu")
    if state == "nothing":
        found = {}
    elif state == "no-model":
        del found["model"]
    else:
        found["model"] = {"weight": torch.ones(3)}
    kept.save(found)
    with pytest.raises(CheckpointError, match="its state does not fit"):
        run(digits, "bld", SMALL, 2, checkpoint=path, resume=True)


def test_other_images_of_the_same_name_are_another_run(tmp_path, tiny_mnist, capsys):
    options = ["--dataset", "mnist", "--methods", "bld", *TINY, *tiny_mnist]
    assert main(options) == 0 and main([*options, "--resume"]) == 0
    with np.load(tmp_path / "mnist.npz") as file:
        arrays = dict(file)
    np.savez(tmp_path / "mnist.npz", **arrays | {"x_train": 255 - arrays["x_train"]})
    capsys.readouterr()
    assert main([*options, "--resume"]) == 2
    assert "the configuration has changed: images: " in capsys.readouterr().err


@pytest.mark.parametrize("text", ["{}", "[1]", '{"record": {}, "what": {}}', "half"])
def test_a_foreign_record_is_refused_at_once(text, tmp_path, capsys):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "bld-0.json").write_text(text)
    options = ["--methods", "bld", "--tasks", "2", "--resume", *TINY, "--out", str(tmp_path)]
    assert main(options) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "bld-0.json: not the record of a run" in errors[0]


def test_workers_end_with_their_job(tmp_path):
    command = [sys.executable, "-m", "benchmarks.paper", "--jobs", "1", "--checkpoint-seconds", "0"]
    job = subprocess.Popen(
        [*command, "--out", str(tmp_path)], cwd=ROOT, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    wait_for(lambda: list((tmp_path / "runs").glob("*.pt")))
    job.kill()
    job.wait()
    wait_for(lambda: not alive(job.pid))


def alive(group):
    """Processes of a group that are more than zombies."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, pgrp = stat.read_text().rpartition(")")[2].split()[:3]
            if int(pgrp) == group and state != "Z":
                found.append(stat)
    return found


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_checkpoints_are_written_when_they_are_due(tmp_path):
    kept = Checkpoint(tmp_path / "a.pt", {}, every=1000)
    assert not kept.due() and not kept.exists()
    kept.every = 0
    assert kept.due()


def test_two_jobs_do_not_write_into_one_folder(tmp_path, capsys):
    from benchmarks.paper.job import locked

    with locked(tmp_path):
        assert main(["--limit", "40", "--out", str(tmp_path)]) == 2
    assert "another job is writing to" in capsys.readouterr().err


# ---- the commands ----

TINY = "--limit 40 --views 1 --views-per-pass 1 --network slim --seeds 0 --jobs 1".split()


@pytest.fixture
def tiny_mnist(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (400, 8, 8), dtype=np.uint8)
    y = np.arange(400) % 10
    np.savez(tmp_path / "mnist.npz", x_train=x, y_train=y, x_test=x[:50], y_test=y[:50])
    return ["--data", str(tmp_path), "--out", str(tmp_path / "out")]


def test_a_table_stands_beside_the_printed_one(tiny_mnist, tmp_path, capsys):
    assert main(["table2", "--preset", "cpu", *TINY, *tiny_mnist]) == 0
    written = (tmp_path / "out" / "table.md").read_text()
    assert (
        "(89.9)" in written
        and "bld - finetune, paired over" in written
        and "lwf-offline" in written
    )
    assert "(80.6)" in written and "backward transfer" in written
    for picture in ("accuracy", "matrix", "factors", "memory"):
        data = (tmp_path / "out" / "mnist-5" / f"{picture}.png").read_bytes()
        assert data.startswith(b"\x89PNG")
    assert len(list((tmp_path / "out" / "mnist-5" / "runs").glob("*.json"))) == 5
    before = capsys.readouterr().out
    assert main(["table2", "--preset", "cpu", *TINY, *tiny_mnist, "--resume"]) == 0
    after = capsys.readouterr().out
    assert before.splitlines()[1:8] == after.splitlines()[1:8]
    assert main(["table2", "--preset", "cpu", *TINY, *tiny_mnist, "--resume", "--lr", "1"]) == 2
    assert "lr: 0.001 before, 1.0 now" in capsys.readouterr().err


def test_tasks_of_one_class_are_told_of(tmp_path, capsys):
    options = ["--methods", "bld", *TINY, "--out", str(tmp_path)]
    assert main(["--tasks", "5", *options]) == 0
    assert "a single class" not in capsys.readouterr().err
    assert main(["--tasks", "6", *options]) == 0
    told = capsys.readouterr().err
    assert "tasks: 6 tasks of 10 classes leave some tasks a single class" in told
    assert f"replacing {tmp_path / 'results.json'}; --resume goes on with it" in told


def test_a_dry_run_measures_and_writes_nothing(tiny_mnist, tmp_path, capsys):
    assert main(["table2", "--preset", "cpu", *TINY, *tiny_mnist, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"\| bld +\|", shown) and "minutes with 1 at a time" in shown
    assert "4 of 4" not in shown and "1 of 1" in shown  # --views 1
    assert [p.name for p in (tmp_path / "out").iterdir()] == [".lock"]


@pytest.mark.parametrize(
    "method, seconds", [*((method, 0) for method in METHODS), ("bld", 60), ("lwf-offline", 60)]
)
def test_an_estimate_is_what_a_run_then_holds(method, seconds):
    digits, settings = load_dataset("digits"), replace(SMALL, views=3)
    stream = make_stream(digits, 3, seed=2, limit=40)
    measuring = Estimator("cpu", 1, seconds, [method], [settings])
    (found,) = measuring.estimate(stream, [method], settings, [2, 3])
    record = run(digits, method, settings, 2)
    assert found.batches == 2 * record["batches"]
    wanted = 1 if method == "lwf-offline" else 3
    assert found.views == f"{wanted if seconds else 1} of {wanted}"
    memory, columns = record["memory"], record["columns"]
    held = sum(memory.values()) - memory["bank"] + columns["intra"] + columns["data"]
    assert found.held_bytes == pytest.approx(held, rel=0.01)
    assert 0 < found.step_seconds * found.batches <= found.seconds


def test_methods_of_several_streams_are_timed_once(monkeypatch):
    tried = []
    real = estimate_module.try_out
    monkeypatch.setattr(
        estimate_module, "try_out", lambda s, m, *rest: tried.append(m) or real(s, m, *rest)
    )
    digits, several = load_dataset("digits"), [SMALL, replace(SMALL, tasks=2, limit=20)]
    measuring = Estimator("cpu", 1, 0, ["bld", "lwf"], several)
    counts = []
    for settings in several:
        stream = make_stream(digits, settings.tasks, 0, settings.limit)
        found = measuring.estimate(stream, ["bld", "lwf"], settings, [0])
        counts += [(e.method, e.batches) for e in found]
    assert tried == ["bld", "lwf"]
    assert counts == [("bld", 6), ("lwf", 6), ("bld", 2), ("lwf", 2)]


def test_the_paper_s_setting_is_fast_by_default():
    def settings(*options, dataset="mnist"):
        return make_settings(make_parser().parse_args(["table2", *options]), dataset)

    plain = settings()
    assert (plain.views_per_pass, plain.schedule, plain.capture) == (
        "auto",
        "shared_forward",
        False,
    )
    assert settings("--device", "cuda").capture and settings("--device", "cuda:1").capture
    assert not settings("--device", "cuda", "--no-capture").capture
    assert not settings("--device", "cuda", "--schedule", "in_backward").capture
    assert not settings("--device", "cuda", "--preset", "cpu").capture
    assert settings("--views-per-pass", "auto").views_per_pass == "auto"
    assert settings("--views-per-pass", "3", "--precision", "mixed").precision == "mixed"


def test_cuda_is_every_gpu_there_is(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert devices_of("cuda") == ["cuda:0", "cuda:1", "cuda:2"]
    assert devices_of("cuda:1") == ["cuda:1"] and devices_of("cpu") == ["cpu"]


def test_a_worker_makes_its_gpu_the_current_one(monkeypatch):
    """Counters are there once CUDA is initialised, and graphs are recorded on the current GPU."""
    calls = []
    monkeypatch.setattr(torch.cuda, "init", lambda: calls.append("init"))
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    for device in ("cpu", "cuda:1"):
        use_device(device)
    assert calls == ["init", "cuda:1"]


def test_each_stream_of_a_table_has_its_own_title(tiny_mnist, tmp_path):
    data = tmp_path / "mnist.npz"
    data.rename(tmp_path / "cifar10.npz")
    options = ["table5", "--preset", "cpu", "--methods", "finetune", *TINY, *tiny_mnist]
    assert main(options) == 0
    titles = re.findall(r"cifar10, \d tasks", (tmp_path / "out" / "table.md").read_text())
    assert titles == ["cifar10, 2 tasks", "cifar10, 5 tasks"]


def test_a_single_seed_has_no_spread():
    assert report.plus_minus(report.spread([50.0])) == "50.0"
    assert report.plus_minus(report.spread([50.0, 52.0])) == "51.0 ± 1.4"


def test_every_run_is_in_the_results_before_it_is_told(tiny_mnist, tmp_path, monkeypatch):
    told = []

    def interrupted(record, printed):
        told.append(record["method"])
        if len(told) == 2:
            raise KeyboardInterrupt
        return "told"

    monkeypatch.setattr(report, "run_line", interrupted)
    options = ["table2", "--preset", "cpu", *TINY, *tiny_mnist]
    assert main(options) == 130
    found = json.loads((tmp_path / "out" / "mnist-5" / "results.json").read_text())
    assert [r["method"] for r in found["runs"]] == told == ["finetune", "l2"]
    written = (tmp_path / "out" / "table.md").read_text()
    assert "l2 - finetune" in written and "bld" not in written


def test_a_run_tells_its_speed_beside_what_is_printed(job):
    done, result, _ = job
    record = result["runs"][1]
    assert record["step_ms"] > 0 and record["images_per_s"] > 0
    assert f"bld, seed 0: {mean(record['accuracy'][-1]):.1f} %, " in done.stdout
    line = report.run_line(record | {"allocated": 3_210_000_000}, [78.0, 89.9])
    assert "% (printed 89.9), " in line and "3.21 GB allocated at most" in line


def test_a_table_leaves_out_what_it_cannot_get(tiny_mnist, tmp_path, capsys, monkeypatch):
    from benchmarks.paper import streams

    monkeypatch.setitem(streams.LOADERS, "cifar10", lambda root, download: streams._torchvision(
        "cifar10", root, download, lambda train: 1 / 0))  # fmt: skip
    monkeypatch.setitem(streams.LOADERS, "svhn", lambda root, download: streams._torchvision(
        "svhn", root, download, lambda train: 1 / 0))  # fmt: skip
    options = ["table1", "--preset", "cpu", *TINY, "--methods", "bld", *tiny_mnist]
    assert main(options) == 0
    shown = capsys.readouterr()
    assert "(94.5)" in shown.out
    assert "left out: dataset cifar10" in shown.err and "cifar-10-python.tar.gz" in shown.err
    assert main(["table3", "--preset", "cpu", *TINY, *tiny_mnist]) == 2


def test_ablation_changes_one_setting_at_a_time(tmp_path, capsys):
    options = "ablation --tasks 2 --vary temperature=1,4 layer=tensor precision=bf16".split()
    assert main([*options, *TINY, "--out", str(tmp_path)]) == 0
    written = (tmp_path / "ablation.md").read_text().splitlines()
    assert [[cell.strip() for cell in line.split("|")[1:4]] for line in written[2:]] == [
        ["temperature", "1", "bld"], ["temperature", "4", "bld"], ["layer", "tensor", "bld"],
        ["precision", "bf16", "bld"],
    ]  # fmt: skip
    assert (tmp_path / "ablation.png").read_bytes().startswith(b"\x89PNG")


def test_an_ablation_shows_the_gain_over_finetuning(tmp_path, capsys):
    options = "ablation --tasks 2 --methods finetune,bld --vary balance=1".split()
    assert main([*options, *TINY, "--out", str(tmp_path)]) == 0
    *_, finetune, bld = (tmp_path / "ablation.md").read_text().splitlines()
    assert finetune.split("|")[6].strip() == ""
    assert float(bld.split("|")[6].split("(")[0]) is not None


@pytest.mark.parametrize("method", ["bld", "l2", "lwf"])
def test_rates_fall_from_task_to_task(method):
    settings = replace(SMALL, lr_decay=0.5, tasks=3)
    learner = make_learner(method, settings, 0)
    rates = []
    for task in make_stream(load_dataset("digits"), 3, 0, 40):
        learner.begin(task)
        learner.model.add_head(len(task.classes))
        rates.append((learner.optimizer.lr, learner.optimizer.warmup_lr))
    assert rates == [(3e-3 * f, pytest.approx(3e-5 * f)) for f in (1, 0.5, 0.25)]


def test_dropout_stands_behind_each_block():
    model = make_model("slim", dropout=0.5)
    assert sum(isinstance(m, torch.nn.Dropout) for m in model.modules()) == 3
    model = make_model("resnet18", dropout=0.5)
    assert sum(isinstance(m, torch.nn.Dropout) for m in model.modules()) == 8
    assert not any(isinstance(m, torch.nn.Dropout) for m in make_model("slim").modules())


def test_an_ablation_is_refused_before_it_begins(tmp_path, capsys):
    options = "ablation --tasks 2 --vary temperature=1 layer=word precision=fp8".split()
    assert main([*options, *TINY, "--out", str(tmp_path / "new")]) == 2
    assert "layer: expected one of module, tensor, network" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("text", ["depth=3", "temperature", "temperature=x"])
def test_an_ablation_of_what_is_not_there_is_refused(text, capsys):
    with pytest.raises(SystemExit):
        make_parser().parse_args(["ablation", "--vary", text])
    assert "expected" in capsys.readouterr().err


def test_tensorboard_is_an_option(tmp_path, capsys):
    pytest.importorskip("tensorboard")
    options = ["--tasks", "2", "--methods", "bld", "--tensorboard", *TINY]
    assert main([*options, "--out", str(tmp_path)]) == 0
    assert list((tmp_path / "tensorboard" / "bld-0").glob("events*"))
