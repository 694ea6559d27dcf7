# SPDX-License-Identifier: MIT
"""What the head of a torture test says of it.

    torture 1: the daemon dies at random times under four busy clients
    pass: 0 wrong bytes; restart to serving p99 < 2 s
    quick: 50 kills
    full: 1,000 kills
    io: both
    plants: some-bug other-bug
    points: nvme.head.written nvme.page.submitted

`io: both` runs it with io_uring and with the thread pool. A plant NAME is a bug of the trial build
(shm/trial.h), KEY=VALUE one that the test itself plants when its environment says so. A head ends with the first
line that is no comment.
"""
import re
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
LINE = re.compile(r"^[\s#*/\"]*(torture (\d+)|pass|quick|full|io|plants|points): *(.*?)\s*(\*/)?$")


@dataclass
class Test:
    path: Path
    n: int = 0
    name: str = ""
    want: str = ""
    quick: str = ""
    full: str = ""
    io: str = ""
    plants: list = field(default_factory=list)
    points: list = field(default_factory=list)


def read(path):
    t = Test(path)
    for line in path.read_text(errors="replace").splitlines()[:60]:
        m = LINE.match(line)
        if not m:
            continue
        key, n, text = m.group(1), m.group(2), m.group(3)
        if n:
            t.n, t.name = int(n), text
        elif key == "pass":
            t.want = text
        elif key in ("plants", "points"):
            getattr(t, key).extend(text.split())
        else:
            setattr(t, key, text)
    return t


def tests():
    """Every test of this folder, in order of its number."""
    found = [read(p) for p in HERE.glob("t[0-9][0-9]_*") if p.suffix in (".c", ".py", ".bats")]
    return sorted((t for t in found if t.n), key=lambda t: (t.n, t.path.name))


def runs(build):
    """(test, io, command) of every run that the tests ask for."""
    for t in tests():
        path = str(Path(build) / "tests" / "torture" / t.path.stem) if t.path.suffix == ".c" else \
            str(t.path.relative_to(HERE.parents[1]))
        for io in ("uring", "threads") if t.io == "both" else ("uring",):
            yield t, io, path
