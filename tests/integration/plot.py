#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""kvtierctl plot: pictures are read again and compared with what map says of the same sequence."""
import os
import pty
import re
import resource
import signal
import struct
import subprocess
import tempfile
import xml.etree.ElementTree as ET
import zlib
from pathlib import Path

from lib.rows import LANES, Rows
from lib.world import Tap, World, build_dir, equal, expect, matches

from kvtier import Client

CTL = str(build_dir() / "kvtierctl")
COLOURS = {"device": (230, 159, 0), "device+": (240, 228, 66), "dram": (86, 180, 233), "dram+": (0, 158, 115),
           "nvme": (0, 114, 178), "dropped": (215, 215, 215), "moving": (204, 121, 167)}
LETTERS = {"device": "D", "device+": "d", "dram": "M", "dram+": "m", "nvme": "n", "dropped": ".", "moving": "*"}


def kind(code):
    """What a code of map is called here."""
    if code & 8:
        return "moving"
    if code & 1:
        return "device+" if code & 6 else "device"
    if code & 2:
        return "dram+" if code & 4 else "dram"
    return "nvme" if code & 4 else "dropped"


def kinds(d, h):
    """[lane][row] of the sequence."""
    return [[kind(code) for n, code in zip(x["runs"][0::2], x["runs"][1::2]) for _ in range(n)]
            for x in d.ctl("map", h)["lane"]]


def plot(d, *argv, check=0, **kw):
    p = subprocess.run([CTL, *(["--socket", str(d.admin)] if d else []), "plot", *argv], capture_output=True, text=True,
                       timeout=30, check=False, **kw)
    equal((p.returncode, p.stderr if check == 0 else ""), (check, ""), f"plot {argv}: {p.stderr}")
    return p.stdout if check == 0 else p.stderr


class Picture:
    """A decoded PNG with a palette, as plot writes them."""

    def __init__(self, path):
        data = Path(path).read_bytes()
        equal(data[:8], b"\x89PNG\r\n\x1a\n", "signature")
        at, chunks = 8, {}
        while at < len(data):
            n, name = struct.unpack(">I4s", data[at:at + 8])
            body = data[at + 8:at + 8 + n]
            equal(zlib.crc32(name + body), struct.unpack(">I", data[at + 8 + n:at + 12 + n])[0], f"CRC of {name}")
            chunks[name] = chunks.get(name, b"") + body
            at += 12 + n
        expect(b"IEND" in chunks, "no end")
        self.w, self.h, depth, colour = struct.unpack(">IIBB", chunks[b"IHDR"][:10])
        equal((depth, colour), (8, 3), "depth, colour type")
        raw, pal = zlib.decompress(chunks[b"IDAT"]), chunks[b"PLTE"]
        self.palette = [tuple(pal[i:i + 3]) for i in range(0, len(pal), 3)]
        equal(len(raw), (self.w + 1) * self.h, "bytes of pixels")
        self.line = [raw[y * (self.w + 1) + 1:(y + 1) * (self.w + 1)] for y in range(self.h)]
        expect(not any(raw[y * (self.w + 1)] for y in range(self.h)), "filters, which a palette does not want")

    def __getitem__(self, xy):
        return self.palette[self.line[xy[1]][xy[0]]]

    def panels(self):
        """(x, y, w, h) inside each frame: the long black lines on the left of it."""
        scale = 1 if self.w < 1000 else 2
        x, found, y = 54 * scale - scale, [], 0
        while y < self.h:
            end = y
            while end < self.h and self[x, end] == (0, 0, 0):
                end += 1
            if end - y > 10 * scale:
                found.append((x + scale, y + scale, self.w - 84 * scale, end - y - 2 * scale))
            y = end + 1
        return found


def with_all_tiers(d, c, rows=300):
    """A sequence with rows wherever rows may be."""
    r = Rows(c, "plot")
    r.append(rows)
    r.plan(device=rows * 8 // 30, dram=rows * 12 // 30, nvme=rows * 7 // 30)
    r.plan(device=rows * 12 // 30, dram=rows * 8 // 30, nvme=rows * 7 // 30)
    r.append(2)
    return r, hex(r.seq.info()["handle"])


def png(d):
    with Client(d.socket) as c, tempfile.TemporaryDirectory(prefix="kvt.") as t:
        r, h = with_all_tiers(d, c)
        truth = kinds(d, h)
        expect({"device", "device+", "dram", "nvme", "dropped"} <= {k for lane in truth for k in lane}, "all tiers")
        for width in (1200, 700):
            plot(d, h, "--out", f"{t}/a.png", "--width", str(width))
            p = Picture(f"{t}/a.png")
            equal((p.w, len(p.panels())), (width, 2), "width, panels")
            x, y, w, high = p.panels()[0]
            for lane, row in enumerate(truth):
                for pos, k in enumerate(row):
                    at = x + int((pos + 0.5) * w / len(row)), y + (2 * lane + 1) * high // (2 * LANES)
                    equal(p[at], COLOURS[k], f"pixel of row {pos} of lane {lane}")
        scores = d.ctl("map", h, "1", str(len(truth[1])))["lane"][0]["scores"][3::4]
        x, y, w, high = p.panels()[1]
        shown = [p[x + int((i + 0.5) * w / len(scores)), y + 3 * high // 8] for i in range(len(scores))]
        blank = (250, 250, 250)
        equal([s == blank for s in shown], [s is None for s in scores], "rows without a score")
        order = sorted((s, sum(v)) for s, v in zip(scores, shown) if s is not None)
        expect(all(a[1] <= b[1] for a, b in zip(order, order[1:])), "a higher score is darker")
        equal((os.stat(f"{t}/a.png").st_mode & 0o777, os.listdir(t)), (0o644, ["a.png"]), "mode, files")
        one = plot(d, h, "--lane", "2", "--width", "310")
        equal(re.findall(r"^ +(\d\.\d) (\S+)$", one, re.M)[0], ("1.0", "".join(LETTERS[k] for k in truth[2])), "lane 2")
        r.close()


def cells(path):
    """{(x, y): colour} of every path of an SVG."""
    got = {}
    for e in ET.parse(path).iter("{http://www.w3.org/2000/svg}path"):
        colour = tuple(bytes.fromhex(e.get("fill")[1:]))
        runs = re.findall(r"M(\d+) (\d+)h(\d+)v1h-(\d+)z", e.get("d"))
        equal("".join("M%s %sh%sv1h-%sz" % x for x in runs), e.get("d"), "the path")
        for x, y, n, _ in runs:
            for i in range(int(n)):
                expect((int(x) + i, int(y)) not in got, "two colours in one place")
                got[int(x) + i, int(y)] = colour
    return got


def svg(d):
    with Client(d.socket) as c, tempfile.TemporaryDirectory(prefix="kvt.") as t:
        r, h = with_all_tiers(d, c)
        plot(d, h, "--out", f"{t}/a.png", "--width", "600")
        plot(d, h, "--out", f"{t}/a.svg", "--width", "600")
        p = Picture(f"{t}/a.png")
        want = {(x + i, y + j): p[x + i, y + j] for x, y, w, high in p.panels() for j in range(high) for i in range(w)}
        expect(cells(f"{t}/a.svg") == want, "the SVG's pixels are not the PNG's")
        root = ET.parse(f"{t}/a.svg").getroot()
        equal((root.get("width"), root.get("height")), ("600", str(p.h)), "size")
        text = [e.text for e in root.iter("{http://www.w3.org/2000/svg}text")]
        for word in ("device, copy below", "on its way", "position in the sequence, rows", "300", "1.1", "L.head"):
            expect(word in text, f"{word!r} is not in {text}")
        matches(text[1], r"last plan: of 300 rows, budgets a lane device 120, dram 80, nvme 70", "the plan")
        r.close()


def terminal(argv, **env):
    """What argv says to a terminal of 80 columns."""
    pid, fd = pty.fork()
    if not pid:
        for k in ("NO_COLOR", "COLUMNS", "COLORTERM"):
            os.environ.pop(k, None)
        os.environ.update(env)
        os.execv(argv[0], argv)
    got = b""
    while True:
        try:
            more = os.read(fd, 65536)
        except OSError:
            more = b""
        if not more:
            break
        got += more
    os.close(fd)
    equal(os.waitpid(pid, 0)[1], 0, "its end")
    return got.decode().replace("\r\n", "\n")


def pixels(line):
    """(upper, lower) colour of each half block of a line."""
    up = low = None
    got = []
    for what, r, g, b, block in re.findall(r"\033\[([34]8);2;(\d+);(\d+);(\d+)m|(\u2580)", line):
        if block:
            got.append((up, low))
        elif what == "38":
            up = int(r), int(g), int(b)
        else:
            low = int(r), int(g), int(b)
    return got


def text(d):
    with Client(d.socket) as c:
        r, h = with_all_tiers(d, c, rows=30)
        truth = kinds(d, h)
        lines = plot(d, h, "--width", "40").split("\n")
        at = next(i for i, x in enumerate(lines) if "L.head" in x) + 1
        want = [f"{i // 2:>5}.{i % 2} " + "".join(LETTERS[k] for k in lane) for i, lane in enumerate(truth)]
        equal(lines[at:at + LANES], want, "the picture")
        matches(lines[at + LANES], r"^ {8}\|0 {18}\|20 *$", "the axis")
        equal(lines[at + LANES + 1].strip(), "position in the sequence, rows", "its name")
        expect(all(len(x) <= 40 for x in lines[3:]), "wider than 40")
        argv = [CTL, "--socket", str(d.admin), "--width", "40", "plot", h]
        out = terminal(argv, TERM="xterm", COLORTERM="truecolor")
        got = [pixels(x) for x in out.split("\n") if "\u2580" in x]
        equal(len(got), 2 * LANES, "lines of the pictures")
        equal(got[:LANES], [[(COLOURS[k],) * 2 for k in lane] for lane in truth], "half blocks")
        expect("\033[0m" in out and "38;5" not in out, "colours of 24 bits alone, and reset")
        out = terminal(argv, TERM="xterm-256color")
        expect("\u2580" in out and "38;5;" in out and ";2;" not in out, "256 colours")
        for env in ({"TERM": "xterm", "NO_COLOR": "1"}, {"TERM": "dumb"}):
            out = terminal(argv, **env)
            expect(out.isascii() and "\033" not in out and want[0] in out, f"plain with {env}")
        r.close()


def policies(d):
    line = re.findall(r"^ +0\.0 (\S+)$", plot(None, "--policy", "streaming", "--width", "80"), re.M)
    ramp = ".:-=+*#%@"
    equal(line[0][0], "@", "the sinks of streaming")
    rising = [ramp.index(x) for x in line[0][1:]]
    equal((rising, rising[0], rising[-1]), (sorted(rising), 0, 8), "and then the later the better")
    near = [ramp.index(x) for x in line[1][:-1]]
    equal(near, sorted(near, reverse=True), "by distance the other way")
    file = next(Path(__file__).resolve().parents[2].glob("policy/models/*.kvp"))
    with tempfile.TemporaryDirectory(prefix="kvt.") as t:
        plot(None, "--policy", str(file), "--rows", "5000", "--out", f"{t}/p.png")
        p = Picture(f"{t}/p.png")
        equal(len(p.panels()), 2, "panels")
        for x, y, w, high in p.panels():
            expect(len({p[i, j] for i in range(x, x + w) for j in range(y, y + high)}) > 16, "levels of a network's picture")
    bad = Path(d.run) / "bad.kvp"
    bad.write_bytes(file.read_bytes()[:5000])
    for argv, status, said in ((("--policy", "knorm"), 2, "made of what rows hold"), (("--policy", "nope"), 2, '"nope"'),
                               (("--policy", str(bad)), 2, "bad.kvp"), (("--policy", "kvp"), 1, "name a file")):
        matches(plot(d, *argv, check=status), said, "the line")


def small_files():
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


def never_half(d):
    with Client(d.socket) as c, tempfile.TemporaryDirectory(prefix="kvt.") as t:
        r, h = with_all_tiers(d, c)
        for name in ("a.png", "a.svg"):
            (Path(t) / name).write_text("what was there")
            matches(plot(d, h, "--out", f"{t}/{name}", check=2, preexec_fn=small_files), "File too large", "the line")
            equal((Path(t) / name).read_text(), "what was there", "the file")
        equal(sorted(os.listdir(t)), ["a.png", "a.svg"], "files")
        matches(plot(d, h, "--out", f"{t}/none/a.png", check=2), "none/a.png: No such file", "the line")
        for argv, status, said in (((h, "--out", f"{t}/a.gif"), 2, "must end in .png or .svg"), ((), 2, "usage"),
                                   ((h, "--policy", "kvp"), 2, "usage"), ((h, "--width", "600"), 2, "from 40 to 500"),
                                   ((h, "--width", "5000"), 2, "--width"), ((h, "--lane", "4"), 1, "has 4 lanes"),
                                   ((h, "--lane", ""), 1, "LANE"), (("0x99",), 1, "no such"),
                                   ((h, "--out", f"{t}/b.png", "--width", "100"), 2, "from 320 to 4096")):
            lines = plot(d, *argv, check=status).splitlines()
            equal(len(lines), 1, f"lines of {argv}: {lines}")
            matches(lines[0], said, "the line")
        r.close()


t = Tap()
with World() as world:
    for what, fn in (("a PNG has the colour of every row's tier, and scores rise with lightness", png),
                     ("an SVG has the PNG's pixels, a legend and axes", svg),
                     ("in a terminal: letters, half blocks in 24 bits or 256 colours, or plain", text),
                     ("what a policy prefers, without a sequence", policies),
                     ("a picture that cannot be written leaves the old one, and errors are one line", never_half)):
        t.case(what, fn, world)
t.done()
