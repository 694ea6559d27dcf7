#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Completion of kvtierctl: what it offers is what --help says, and bash, zsh and fish put it on the line."""
import contextlib
import fcntl
import json
import os
import pty
import re
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from pathlib import Path

from lib.raw import ADMIN, HDR, REPLY, STATUS, header
from lib.rows import Rows
from lib.world import Skip, Tap, World, build_dir, equal, expect, until

from kvtier import Client

CTL = build_dir() / "kvtierctl"
SCRIPTS = Path(__file__).resolve().parents[2] / "systemd" / "completion"
NOBODY = "/nonexistent/admin.sock"


def offered(*words, sock=NOBODY):
    """{candidate: what it is}, as a shell is told."""
    p = subprocess.run([CTL, "--complete", *words], capture_output=True, text=True, timeout=10, check=False,
                       env={**os.environ, "KVTIER_ADMIN_SOCKET": str(sock)})
    equal((p.returncode, p.stderr), (0, ""), f"completing {words}")
    return dict(line.partition("\t")[::2] for line in p.stdout.splitlines())


def help_text():
    text = subprocess.run([CTL, "--help"], capture_output=True, text=True, timeout=10, check=True).stdout
    options, verbs = text.split("Verbs:\n")
    return (re.findall(r"^ +(?:-h, )?--(\w+)(?: ([A-Z]\S*))? +(\S.*)", options, re.M),
            dict(re.findall(r"^  (\w+)(?: (.*?))?(?:  .*)?$", verbs.split("\nSEQ is")[0], re.M)))


# ---- what is offered --------------------------------------------------------------------------


def verbs_of_help():
    _, verbs = help_text()
    expect(len(verbs) > 20, f"verbs that --help names: {verbs}")
    equal(sorted(offered("")), sorted(verbs), "verbs")
    equal(sorted(offered("p")), sorted(v for v in verbs if v.startswith("p")), "verbs with p")
    equal(offered("nothing"), {}, "what begins with nothing")
    for verb, args in verbs.items():
        first = re.match(r"\[?([a-z][a-z|]*)", args)
        words = {form.split()[0].strip("[]") for form in args.split(" | ")} if first else set()
        words = {w for form in words for w in form.split("|") if w.islower()}
        equal({w for w in offered(verb, "") if w.islower()} - {":files"}, words, f"words after {verb}")


def options_of_help():
    options, verbs = help_text()
    expect(len(options) > 12, f"options that --help names: {options}")
    own = {n: doc.split(":")[0] for n, _, doc in options if doc.split(":")[0] in verbs}
    expect("out" in own and "json" not in own, f"options of one verb: {own}")
    for verb in verbs:
        want = {f"--{n}" for n, _, _ in options if own.get(n, verb) == verb and n != "complete"}
        equal(set(offered(verb, "--")), want, f"options of {verb}")
    equal(set(offered("--")), {f"--{n}" for n, _, _ in options if n != "complete"}, "options before any verb")
    for n, arg, _ in options:
        if arg in ("FILE", "PATH"):
            equal(offered(f"--{n}", ""), {":files": ""}, f"after --{n}")
        elif arg == "DIR":
            equal(offered(f"--{n}", ""), {":dirs": ""}, f"after --{n}")
    equal(offered("--timeout", "3", "fre"), {"freeze": verbs and offered("fre")["freeze"]}, "a verb after an option")


def arguments():
    equal(set(offered("budget", "0x1", "")), {"device=", "dram=", "nvme="}, "budget's tiers")
    equal(set(offered("budget", "0x1", "dram=5", "")), {"device=", "nvme="}, "those that are not named yet")
    equal(set(offered("budget", "0x1", "nvme=")), {"nvme=all"}, "the word of a tier")
    equal(offered("policy", "load", ""), {":files": ""}, "a policy's file")
    equal(offered("policy", "list", ""), {}, "after policy list")
    equal(offered("freeze", "on", ""), {}, "after freeze on")
    equal(set(offered("freeze", "")), {"on", "off"}, "freeze")
    equal(set(offered("verify", "")), {"start", "status"}, "verify")
    equal(offered("show", ""), {}, "sequences of no daemon")
    equal(offered("nonsense", ""), {}, "after a verb that does not exist")


def sequences_and_policies():
    with World() as d, Client(d.socket) as c:
        rows = [Rows(c, f"s{i}") for i in range(3)]
        for i, r in enumerate(rows):
            r.append(10 + i)
        seqs = {s["handle"]: s for s in d.seqs()}
        got = offered("show", "", sock=d.admin)
        equal(set(got), set(seqs), "handles")
        for h, s in seqs.items():
            expect(f"{s['rows']} rows" in got[h] and s["key"][:8] in got[h], f"what {h} is: {got[h]}")
            equal(set(offered("show", s["key"][:6], sock=d.admin)), {s["key"]}, "a key by its first digits")
            equal(set(offered("policy", "set", "kvp", h, sock=d.admin)), {h}, "policy set NAME SEQ")
        policies = {p["name"] for p in d.ctl("policy", "list")["policies"]}
        expect("kvp" in policies, f"policies: {policies}")
        equal(set(offered("policy", "set", "", sock=d.admin)), policies, "policies")
        equal(set(offered("--socket", str(d.admin), "show", "")), set(seqs), "handles, by --socket")
        equal(set(offered(f"--socket={d.admin}", "show", "")), set(seqs), "handles, by --socket=")


@contextlib.contextmanager
def liar(answer):
    """A socket behind which answer() says what a request gets: JSON, or None for nothing at all."""
    with tempfile.TemporaryDirectory() as run, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as s:
        path = f"{run}/admin.sock"
        s.bind(path)
        s.listen(8)

        def serve():
            with contextlib.suppress(OSError):
                while True:
                    conn = s.accept()[0]
                    threading.Thread(target=talk, args=(conn,), daemon=True).start()

        def talk(conn):
            with conn, contextlib.suppress(OSError):
                while request := conn.recv(65536):
                    said = answer()
                    if said is None:
                        continue
                    text = json.dumps(said).encode()
                    fd = os.memfd_create("reply", os.MFD_ALLOW_SEALING)
                    os.write(fd, text)
                    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
                    body = STATUS.pack(0, 0, b"") + len(text).to_bytes(8, "little")
                    cookie = HDR.unpack_from(request)[4]
                    socket.send_fds(conn, [header(ADMIN | REPLY, HDR.size + len(body), cookie=cookie) + body], [fd])
                    os.close(fd)

        threading.Thread(target=serve, daemon=True).start()
        yield path
        s.shutdown(socket.SHUT_RDWR)


def silent_daemon():
    with liar(lambda: None) as path:
        begun = time.monotonic()
        equal(offered("show", "", sock=path), {}, "sequences of a daemon that does not answer")
        expect(0.2 < time.monotonic() - begun < 5, f"waited {time.monotonic() - begun:.1f} s for it")
    with liar(lambda: {"seqs": [], "next": 1}) as path:
        begun = time.monotonic()
        equal(offered("show", "", sock=path), {}, "sequences of a listing without end")
        expect(0.4 < time.monotonic() - begun < 5, f"listed for {time.monotonic() - begun:.1f} s")


def hostile_words():
    bad = ["0x1; rm -rf ~", "$(id)", "`id`", "0x1\nstatus", "0x2\x1b[2J", "", "ü", "a b", "-rf\t"]
    seqs = [{"handle": h, "key": "0" * 32, "tenant": "\x1b[31m\t\r", "client": "x\ny", "rows": 1} for h in bad]
    seqs.append({"handle": "0xfeed", "key": "f" * 32, "tenant": "\x1b]0;gotcha\x07", "client": "a\nb", "rows": 7})
    with liar(lambda: {"seqs": seqs, "next": None}) as path:
        got = offered("show", "", sock=path)
        equal(set(got), {"0xfeed"}, "handles that are one word")
        expect(not re.search(r"[\x00-\x1f\x7f]", got["0xfeed"]), f"control characters: {got!r}")
    for junk in ([], {"seqs": 5}, {"seqs": [3, None, {"handle": 9}]}, {"policies": {"name": []}}):
        with liar(lambda j=junk: j) as path:
            equal(offered("show", "", sock=path), {}, f"sequences in {junk}")
            equal(offered("policy", "set", "", sock=path), {}, f"policies in {junk}")


# ---- shells -----------------------------------------------------------------------------------


def bash(line, sock, point=None):
    """What bash would put in place of the last word."""
    words = "; ".join([f"source {SCRIPTS}/kvtierctl.bash", f"COMP_LINE={shlex.quote(line)}",
                       f"COMP_POINT={len(line) if point is None else point}", f"_kvtierctl {CTL}",
                       'printf "%s\\n" "${COMPREPLY[@]}"'])
    p = subprocess.run(["bash", "--norc", "-uc", words], capture_output=True, text=True, timeout=20, check=False,
                       env={**os.environ, "KVTIER_ADMIN_SOCKET": str(sock)})
    equal((p.returncode, p.stderr), (0, ""), f"bash: {line}")
    return [x for x in p.stdout.split("\n") if x]


def fish(line, sock):
    with tempfile.TemporaryDirectory() as home:
        p = subprocess.run(["fish", "--no-config", "-c",
                            f"source {SCRIPTS}/kvtierctl.fish; complete -C {shlex.quote(line)}"],
                           capture_output=True, text=True, timeout=20, check=False,
                           env={**os.environ, "KVTIER_ADMIN_SOCKET": str(sock), "HOME": home,
                                "PATH": f"{build_dir()}:{os.environ['PATH']}"})
    equal((p.returncode, p.stderr), (0, ""), f"fish: {line}")
    return [x.split("\t")[0] for x in p.stdout.splitlines()]


class Zsh:
    """An interactive zsh: type a line, press Tab, see what became of it."""

    def __init__(self, sock):
        self.dir = tempfile.TemporaryDirectory()
        self.out = Path(self.dir.name) / "line"
        shutil.copy(SCRIPTS / "_kvtierctl", self.dir.name)
        rc = (f"fpath=({self.dir.name} $fpath); autoload -Uz compinit; compinit -u -D; unsetopt beep; PS1='ready> '\n"
              "bindkey '^I' complete-word\n"
              f"told() {{ print -r -- \"<$BUFFER>\" > {self.out}.new; mv {self.out}.new {self.out}; BUFFER= }}\n"
              "zle -N told; bindkey '^X' told\n")
        (Path(self.dir.name) / ".zshrc").write_text(rc)
        self.pid, self.fd = pty.fork()
        if not self.pid:
            os.environ.update(ZDOTDIR=self.dir.name, HOME=self.dir.name, TERM="dumb", KVTIER_ADMIN_SOCKET=str(sock),
                              PATH=f"{build_dir()}:{os.environ['PATH']}")
            os.execvp("zsh", ["zsh", "-d", "-i"])
        self.seen = b""
        threading.Thread(target=self.read, daemon=True).start()
        until("zsh prompts", lambda: b"ready> " in self.seen, 20)

    def read(self):
        with contextlib.suppress(OSError):
            while data := os.read(self.fd, 4096):
                self.seen += data

    def tab(self, line):
        self.out.unlink(missing_ok=True)
        os.write(self.fd, line.encode() + b"\t\x18")
        until(f"zsh completes {line}", self.out.exists, 20)
        return self.out.read_text().strip()[1:-1]

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self.fd)
        self.dir.cleanup()


def need(shell):
    if not shutil.which(shell):
        raise Skip(f"{shell} is not installed")


@contextlib.contextmanager
def one_sequence():
    with World() as d, Client(d.socket) as c:
        r = Rows(c, "shells")
        r.append(5)
        yield d, d.seqs()[0]


def in_bash():
    need("bash")
    with one_sequence() as (d, s), tempfile.TemporaryDirectory() as tmp:
        (Path(tmp) / "two words.kvpw").touch()
        (Path(tmp) / "below").mkdir()
        equal(sorted(bash("kvtierctl ", d.admin)), sorted(help_text()[1]), "bash: verbs")
        equal(bash("kvtierctl stat", d.admin), ["status"], "bash: a verb")
        equal(bash("kvtierctl show ", d.admin), [s["handle"]], "bash: a sequence")
        equal(bash(f"kvtierctl show {s['key'][:5]}", d.admin), [s["key"]], "bash: a key")
        equal(bash("kvtierctl budget 0x1 dr", d.admin), ["dram="], "bash: a tier")
        equal(bash("kvtierctl budget 0x1 dram=", d.admin), ["all"], "bash: a tier's word")
        equal(bash(f"kvtierctl policy load {tmp}/two", d.admin), [f"{tmp}/two words.kvpw"], "bash: a file")
        equal(bash(f"kvtierctl --root {tmp}/", d.admin), [f"{tmp}/below"], "bash: a directory")
        equal(bash("kvtierctl fre on", d.admin, point=13), ["freeze"], "bash: in the middle of a line")


def in_fish():
    need("fish")
    with one_sequence() as (d, s), tempfile.TemporaryDirectory() as tmp:
        (Path(tmp) / "weights.kvpw").touch()
        equal(sorted(fish("kvtierctl ", d.admin)), sorted(help_text()[1]), "fish: verbs")
        equal(fish("kvtierctl stat", d.admin), ["status"], "fish: a verb")
        equal(fish("kvtierctl show ", d.admin), [s["handle"]], "fish: a sequence")
        equal(fish("kvtierctl budget 0x1 dr", d.admin), ["dram="], "fish: a tier")
        equal(fish(f"kvtierctl policy load {tmp}/we", d.admin), [f"{tmp}/weights.kvpw"], "fish: a file")


def in_zsh():
    need("zsh")
    with one_sequence() as (d, s), tempfile.TemporaryDirectory() as tmp, Zsh(d.admin) as z:
        (Path(tmp) / "weights.kvpw").touch()
        equal(z.tab("kvtierctl stat"), "kvtierctl status ", "zsh: a verb")
        equal(z.tab("kvtierctl show "), f"kvtierctl show {s['handle']} ", "zsh: a sequence")
        equal(z.tab("kvtierctl budget 0x1 dr"), "kvtierctl budget 0x1 dram=", "zsh: a tier")
        equal(z.tab("kvtierctl policy se"), "kvtierctl policy set ", "zsh: a word")
        equal(z.tab("kvtierctl doctor --conf"), "kvtierctl doctor --config ", "zsh: an option")
        equal(z.tab(f"kvtierctl policy load {tmp}/we").rstrip(), f"kvtierctl policy load {tmp}/weights.kvpw",
              "zsh: a file")
        equal(z.tab("kvtierctl qq"), "kvtierctl qq", "zsh: nothing")


def main():
    tap = Tap()
    tap.case("all verbs of --help are offered, and their words, and no others", verbs_of_help)
    tap.case("all options of --help are offered, where they are of use", options_of_help)
    tap.case("arguments by their kind", arguments)
    tap.case("sequences and policies come from the daemon", sequences_and_policies)
    tap.case("a daemon that is silent or talks without end keeps nobody waiting", silent_daemon)
    tap.case("what is not a plain word never reaches a shell", hostile_words)
    tap.case("bash", in_bash)
    tap.case("zsh", in_zsh)
    tap.case("fish", in_fish)
    tap.done()


if __name__ == "__main__":
    main()
