"""The documents: every Python block runs, every link leads somewhere, the README stays short.

The blocks of one file share a namespace and run in order; `NAMES` is what their reader brings
along. A block whose first line is `# needs a GPU` or `# needs`, a module, runs only where there is
one.
"""

import inspect
import re
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

from bld_ext import BLDOptimizer

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^()\s]+)\)")
NEEDS = re.compile(r"# needs (.*)\n")


def read(name: str) -> str:
    return (ROOT / name).read_text()


# ---- code ----


class Task(list):
    """Batches of images and labels of one task."""

    num_classes = 2


def some_batch(classes: int, side: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.randint(256, (4, 3, side, side), dtype=torch.uint8)
    return images, torch.randint(classes, (4,))


def names_of_readme(folder: Path) -> dict:
    convolution = nn.Conv2d(3, 8, 3, stride=2, bias=False)
    flat = nn.Sequential(convolution, nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten())
    stream = [Task([some_batch(2, side=8)]) for _ in range(2)]
    return {"backbone": nn.Sequential(flat, nn.Linear(8 * 3 * 3, 512)), "stream": stream}


def names_of_guide(folder: Path) -> dict:
    images, labels = some_batch(3)
    stream = [Task([some_batch(2)]) for _ in range(2)]
    checkpoint = folder / "checkpoint.pt"
    return {"images": images, "labels": labels, "stream": stream, "checkpoint": checkpoint}


def names_of_kernels(folder: Path) -> dict:
    shapes = ((4, 3), (4,), (2, 4))
    lists = {
        name: [torch.randn(shape) for shape in shapes]
        for name in ("params", "old_grads", "new_grads")
    }
    losses = {
        "head_sizes": [2, 3],
        "teacher_logits": torch.randn(6, 5),
        "logits": torch.randn(6, 5, requires_grad=True),
        "all_logits": torch.randn(6, 9, requires_grad=True),
        "labels": torch.randint(4, (6,)),
    }
    norm = {
        "x": torch.randn(24, 4, 3, 3),
        "weight": torch.ones(4),
        "bias": torch.zeros(4),
        "residual": torch.randn(24, 4, 3, 3),
    }
    images, _ = some_batch(2)
    return {"torch": torch, "layers": [0, 0, 1], "images": images, **lists, **losses, **norm}


FIGURES = ("benchmarks/README.md", "benchmarks/paper/README.md")
NAMES = {
    "README.md": names_of_readme,
    "python_api/README.md": names_of_guide,
    "csrc/README.md": names_of_kernels,
}


def blocks(text: str) -> list[tuple[str, str]]:
    """Each Python block of a document, and the heading above it."""
    found = []
    for fence in FENCE.finditer(text):
        headings = re.findall(r"^#+ (.*)$", FENCE.sub("", text[: fence.start()]), re.MULTILINE)
        if fence[1].strip() == "python":
            found.append((headings[-1] if headings else "start", fence[2]))
    return found


def missing(code: str) -> str | None:
    """What the first line of a block says it needs, if that is not here."""
    needs = NEEDS.match(code)
    if needs is None:
        return None
    if needs[1] == "a GPU":
        return None if torch.cuda.is_available() else needs[1]
    return None if find_spec(needs[1]) else needs[1]


class Reader:
    """Runs the blocks of a document in order, each once."""

    def __init__(self, codes: list[str], names: dict):
        self.codes, self.names, self.done = codes, names, 0

    def read_to(self, number: int) -> None:
        """Run the blocks up to this one that have not run yet."""
        while self.done <= number:
            code = self.codes[self.done]
            if not missing(code):
                exec(compile(code, f"<block {self.done}>", "exec"), self.names)
            self.done += 1


@pytest.fixture(scope="module")
def readers(tmp_path_factory):
    torch.manual_seed(0)
    return {
        name: Reader([code for _, code in blocks(read(name))], make(tmp_path_factory.mktemp("doc")))
        for name, make in NAMES.items()
    }


def every_block() -> list:
    cases = []
    for name in NAMES:
        for number, (heading, code) in enumerate(blocks(read(name))):
            needed = missing(code)
            skip = [pytest.mark.skip(f"needs {needed}")] if needed else []
            label = f"{name}-{number}-{re.sub('[^a-z0-9]+', '-', heading.lower()).strip('-')}"
            cases.append(pytest.param(name, number, marks=skip, id=label))
    return cases


@pytest.mark.filterwarnings("ignore:.*keeps state, which carries memory")  # of the guide's momentum
@pytest.mark.filterwarnings("ignore:.*moves parameters whose gradient is zero")  # of its groups
@pytest.mark.parametrize("name, number", every_block())
def test_a_block_runs(readers, name, number):
    readers[name].read_to(number)


def test_a_block_that_fails_is_seen():
    text = "# Title\n```python\na = 1\n```\n## Below\n```\nno python\n```\n```python\na = b\n```\n"
    (first, one), (second, two) = blocks(text)
    assert (first, second) == ("Title", "Below")
    reader = Reader([one, two], {})
    reader.read_to(0)
    assert reader.names["a"] == 1
    with pytest.raises(NameError):
        reader.read_to(1)


# ---- links ----


def anchors(text: str) -> set[str]:
    """Of the headings, as GitHub makes them."""
    made: Counter[str] = Counter()
    for heading in re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.MULTILINE):
        made[re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")] += 1
    return {f"{name}-{i}" if i else name for name, times in made.items() for i in range(times)}


def broken_links(text: str, folder: Path) -> list[str]:
    """Relative links of a document in this folder that lead nowhere; code is no link."""
    prose = re.sub(r"`[^`\n]*`", "", FENCE.sub("", text))
    broken = []
    for link in LINK.findall(prose):
        if link.startswith(("http:", "https:", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        target = folder / path
        if not target.exists():
            broken.append(link)
        elif anchor and anchor not in anchors(target.read_text() if path else text):
            broken.append(link)
    return broken


@pytest.mark.parametrize("name", [*NAMES, "CONTRIBUTING.md", *FIGURES])
def test_every_link_leads_somewhere(name):
    assert LINK.search(read(name))
    assert broken_links(read(name), (ROOT / name).parent) == []


def test_a_broken_link_is_seen(tmp_path):
    (tmp_path / "other.md").write_text("# One `thing`, twice\n```\n# no heading\n```\n")
    good = "[a](other.md) [b](other.md#one-thing-twice) [c](#here) `[d](code.md)` [e](https://x.y)"
    bad = "[f](missing.md) [g](other.md#no-heading) [h](#there) ![i](missing.png)"
    assert broken_links(f"# Here\n{good}\n", tmp_path) == []
    expected = ["missing.md", "other.md#no-heading", "#there", "missing.png"]
    assert broken_links(f"# Here\n{good}\n{bad}\n", tmp_path) == expected


# ---- names ----


def missing_files(text: str) -> set[str]:
    """Paths from the root that a document names and that are not there."""
    rooms = r"\b(?:bld_ext|python_api|csrc|benchmarks|tests)/[\w/.-]+\.\w+"
    return {path for path in re.findall(rooms, text) if not (ROOT / path).exists()}


@pytest.mark.parametrize("name", [*NAMES, "CONTRIBUTING.md"])
def test_every_file_that_is_named_is_there(name):
    assert missing_files(read(name)) == set()


def test_a_file_that_is_not_there_is_seen():
    text = "`bld_ext/ops.py`, │ python_api/nothing.py │ and tests/test_<op>.py"
    assert missing_files(text) == {"python_api/nothing.py"}


def test_the_map_has_five_to_seven_boxes():
    (_, picture), *_ = FENCE.findall(read("CONTRIBUTING.md"))
    assert 5 <= picture.count("┌") <= 7


def listed_options(text: str) -> list[str]:
    """The first column of the guide's table of options."""
    section = text.split("## Which options when")[1].split("\n## ")[0]
    return re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)


def test_the_guide_lists_every_option_once():
    parameters = inspect.signature(BLDOptimizer).parameters.values()
    options = [p.name for p in parameters if p.name != "model" and p.kind != p.VAR_KEYWORD]
    assert sorted(listed_options(read("python_api/README.md"))) == sorted(options)


# ---- length ----


def too_long(text: str, lines: int = 130, words: int = 1100) -> list[str]:
    found = {"lines": (len(text.splitlines()), lines), "words": (len(text.split()), words)}
    return [f"{n} {unit}, at most {most}" for unit, (n, most) in found.items() if n > most]


def test_the_readme_is_read_in_minutes():
    assert too_long(read("README.md")) == []


def test_a_long_readme_is_seen():
    assert too_long("word\n" * 130) == []
    assert too_long("word\n" * 131) == ["131 lines, at most 130"]
    assert too_long("word " * 1101) == ["1101 words, at most 1100"]


def test_the_readme_has_the_two_commands():
    assert "\npip install -e . && python -m benchmarks.paper\n" in read("README.md")
    assert '\npip install -e ".[test]" && pytest -n auto --dist loadfile\n' in read("README.md")
