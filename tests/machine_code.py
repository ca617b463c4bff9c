"""Reads what a kernel compiled for a GPU consists of, with the tools in Triton's wheel.

Counts are of instructions as they stand in the machine code, of one warp. What a loop costs an item
follows from them and from how many items a warp has in an iteration.
"""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}  # bytes; else 4
FLOAT64 = ("DADD", "DMUL", "DFMA", "DSETP", "DMNMX", "DFMNMX")
REGISTERS, THREADS, BLOCKS = 65536, 2048, 32  # of a multiprocessor of compute capability 9.0
SHARED = 233472  # bytes, of which a block takes 1,024 beside its own


@dataclass(frozen=True)
class Instruction:
    address: int
    op: str  # such as "LDG.E.128"
    target: int | None  # of a branch

    @property
    def name(self) -> str:
        return self.op.partition(".")[0]

    @property
    def width(self) -> int:
        """The bytes that a thread loads or stores."""
        return next((WIDTHS[part] for part in self.op.split(".") if part in WIDTHS), 4)


@dataclass(frozen=True)
class Code:
    """The instructions of a kernel, or of a part of it."""

    instructions: list[Instruction]
    registers: int
    spilled: int  # bytes of local memory

    @cached_property
    def names(self) -> Counter:
        return Counter(i.name for i in self.instructions)

    def count(self, *names: str) -> int:
        return sum(self.names[name] for name in names)

    @property
    def float64(self) -> int:
        return self.count(*FLOAT64)

    def narrowest(self, name: str) -> int | None:
        """The least bytes that a load "LDG" or a store "STG" moves; None without any."""
        return min((i.width for i in self.instructions if i.name == name), default=None)

    @property
    def loops(self) -> list["Code"]:
        """Each loop without those inside of it, the longest first."""
        ranges = [
            (i.target, i.address)
            for i in self.instructions
            if i.name == "BRA" and i.target is not None and i.target < i.address
        ]
        found = []
        for first, last in ranges:
            inner = [r for r in ranges if r != (first, last) and first <= r[0] and r[1] <= last]
            own = [
                i
                for i in self.instructions
                if first <= i.address <= last and not any(a <= i.address <= b for a, b in inner)
            ]
            found.append(Code(own, self.registers, self.spilled))
        return sorted(found, key=lambda code: -len(code.instructions))

    def occupancy(self, threads: int, shared: int) -> float:
        """The share of a multiprocessor's threads that can be resident at once."""
        a_warp = -(-self.registers * 32 // 256) * 256
        blocks = min(
            REGISTERS // (a_warp * (threads // 32)),
            THREADS // threads,
            BLOCKS,
            SHARED // (shared + 1024),
        )
        return blocks * threads / THREADS


def read(cubin: bytes, function: str = "") -> Code:
    """Read the kernel whose name, perhaps a mangled one, contains this; else the first."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = _cuobjdump("-sass", file.name)
        used = _cuobjdump("-res-usage", file.name)
    bodies = re.split(r"\n\s*Function : ", text)[1:]
    body = next(each for each in bodies if function in each.split()[0])
    resources = re.search(rf"Function {re.escape(body.split()[0])}:\s*\n(.*)", used)[1]
    numbers = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", resources))
    lines = re.findall(r"/\*([0-9a-f]{4,6})\*/\s+(.*?);", body)
    instructions = [_instruction(int(address, 16), line.strip()) for address, line in lines]
    return Code(instructions, int(numbers["REG"]), int(numbers["STACK"]) + int(numbers["LOCAL"]))


def _instruction(address: int, line: str) -> Instruction:
    op, _, operands = re.sub(r"^@!?U?P\w+\s+", "", line).partition(" ")
    targets = re.findall(r"0x([0-9a-f]+)", operands) if op.partition(".")[0] == "BRA" else []
    return Instruction(address, op, int(targets[-1], 16) if targets else None)


def _cuobjdump(*arguments: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    done = subprocess.run([tool, *arguments], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr
