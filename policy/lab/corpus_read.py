# SPDX-License-Identifier: MIT
"""Readers: one file of a package → its documents, as (name, text) or, for chat, (name, [(role, text), ...])."""
import gzip
import html.parser
import json
import re
import struct
import subprocess
import zlib
from xml.etree import ElementTree

_BLOCK = {"p", "div", "h1", "h2", "h3", "h4", "h5", "h6", "li", "dt", "dd", "tr", "table", "ul", "ol", "dl", "pre",
          "section", "article", "blockquote", "figure", "br"}
_SKIP = {"script", "style", "nav", "header", "footer", "head", "button", "svg", "form", "select", "noscript"}
_SKIP_CLASS = re.compile(r"\b(navheader|navfooter|docnav|sphinxsidebar|related|nav-|toc|headerlink|footer|tocframe|"
                         r"nav_table|menu|sidebar|revhistory|legalnotice)")
_VOID = {"br", "hr", "img", "meta", "link", "input", "col", "wbr", "source", "area", "base"}


class _Html(html.parser.HTMLParser):
    """Text of the body, blocks on lines of their own; <pre> keeps its layout, navigation is left out."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.out, self.skip, self.pre = [], [], 0

    def handle_starttag(self, tag, attrs):
        if tag in _VOID:
            if tag == "br" and not self.skip:
                self.out.append("\n")
            return
        if self.skip:
            self.skip.append(tag)
            return
        attrs = dict(attrs)
        cls = f"{attrs.get('class') or ''} {attrs.get('id') or ''} {attrs.get('role') or ''}"
        if tag in _SKIP or (tag not in ("html", "body", "main") and _SKIP_CLASS.search(cls)):
            self.skip.append(tag)
            return
        if tag in _BLOCK:
            self.out.append("\n" if tag in ("li", "tr", "dt", "dd") else "\n\n")
        if tag == "li":
            self.out.append("* ")
        self.pre += tag == "pre"

    def handle_endtag(self, tag):
        if tag in _VOID:
            return
        if self.skip:
            if tag in self.skip:
                while self.skip.pop() != tag:
                    pass
            return
        if tag == "pre":
            self.pre = max(0, self.pre - 1)
        if tag in _BLOCK:
            self.out.append("\n" if tag in ("li", "tr", "dt", "dd") else "\n\n")
        elif tag in ("td", "th"):
            self.out.append("\t")

    def handle_data(self, data):
        if not self.skip:
            self.out.append(data if self.pre else re.sub(r"\s+", " ", data))


def html_text(data):
    parser = _Html()
    parser.feed(data)
    return re.sub(r"(?m)^ (?=\S)", "", "".join(parser.out))


def _bytes(path):
    data = path.read_bytes()
    return gzip.decompress(data) if path.suffix in (".gz", ".dz") else data


def _text(path):
    return _bytes(path).decode("utf-8", "replace")


def read_plain(path):
    yield path.stem, _text(path)


def read_html(path):
    yield path.stem, html_text(_text(path))


def read_rst(path):
    """reStructuredText as written, less comments, directives without text and inline roles."""
    text = _text(path)
    text = re.sub(r"(?m)^\.\. (SPDX|include::|_[\w\- ]+:|\|).*\n", "", text)
    text = re.sub(r"(?m)^\.\. (\w+:: )", r"\1", text)
    text = re.sub(r":(?:\w+:)?\w+:`[~!]?([^`<]+?)(?: <[^`]*>)?`", r"\1", text)
    yield path.name.split(".")[0], text


def read_mallard(path):
    """GNOME's help pages: titles and paragraphs."""
    root, out = ElementTree.fromstring(_bytes(path)), []
    for el in root.iter():
        tag = el.tag.rsplit("}", 1)[-1]
        if tag in ("title", "p", "code", "screen"):
            out.append(re.sub(r"\s+", " ", "".join(el.itertext())).strip())
    yield path.stem, "\n\n".join(t for i, t in enumerate(out) if t and t not in out[:i])


def read_jargon(path):
    """The Jargon File, from the lexicon on, less its margin."""
    text = re.sub(r"(?m)^ {3}", "", _text(path))
    yield "jargon", text[len(text) // 12:]


def _entries(text):
    """(headword, definition) of a dictd text: headwords at the margin, definitions indented."""
    head, body = None, []
    for line in text.splitlines():
        if line and not line[0].isspace():
            if head and body:
                yield head, "\n".join(body).strip()
            head, body = line.strip(), []
        else:
            body.append(line.strip())
    if head and body:
        yield head, "\n".join(body).strip()


def read_dict(path):
    """A dictionary: alphabetical runs of 40 entries."""
    run = []
    for head, body in _entries(_text(path)):
        body = re.sub(r"[{}]", "", body)
        if head.startswith("00-database") or len(body) < 60:
            continue
        run.append(f"{head}\n{body}")
        if len(run) == 40:
            yield re.sub(r"\W+", "-", run[0].split("\n")[0])[:24], "\n\n".join(run)
            run = []


def read_endless_sky(path):
    """What is said and told in Endless Sky: the quoted lines of its conversations."""
    lines = re.findall(r"(?m)^\s*(?:description |conversation )?`\t?([^`]{40,})`", _text(path))
    yield path.stem.replace(" ", "-"), "\n\n".join(re.sub(r"<(\w+)>", r"the \1", x) for x in lines)


def read_percent(path):
    """Entries between %%%% lines: name, blank line, description."""
    parts = [p.strip() for p in _text(path).split("%%%%")]
    yield path.stem, "\n\n".join(p for p in parts if len(p) > 80 and "{{" not in p and not p.startswith("#"))


def read_code(path):
    """Source as it is, less the licence comment at its head."""
    text = _text(path)
    head = re.match(r"(?:#!.*\n)?((?:[ \t]*(?:#|//).*\n|[ \t]*\n)+)", text)
    if head and re.search(r"(?i)copyright|licen[cs]e", head.group(1)):
        text = text[head.end():]
    yield path.stem, text


def read_pod(path):
    out = subprocess.run(["pod2text", str(path)], capture_output=True, check=True).stdout
    yield path.stem, out.decode("utf-8", "replace")


def read_man(path):
    """A manual page as groff renders it; pages that only point to another are empty here."""
    src = _bytes(path)
    if src.startswith(b".so ") or len(src) < 800:
        return
    out = subprocess.run(["groff", "-t", "-mandoc", "-Tutf8", "-P-c", "-rLL=100n", "-rHY=0", "-dAD=l"], input=src,
                         capture_output=True, check=True).stdout.decode("utf-8", "replace")
    out = re.sub(r".\x08", "", out)
    yield path.name.removesuffix(".gz"), re.split(r"(?m)^(?:COLOPHON|AUTHORS?|COPYRIGHT)\n", out)[0]


def read_chitchat(path):
    """Conversations of two people; the one who opens is the user. A run of messages of one is one turn."""
    for name, talk in sorted(json.loads(path.read_text()).items()):
        turns, roles = [], {}
        for message in (m for run in talk["messages"] for m in run):
            text = re.sub(r"\s+", " ", message["text"]).strip()
            role = roles.setdefault(message["sender"], ("user", "assistant")[min(len(roles), 1)])
            if not text or len(roles) > 2:
                continue
            if turns and turns[-1][0] == role:
                turns[-1][1] += "\n" + text
            else:
                turns.append([role, text])
        if len(roles) == 2 and len(turns) >= 8:
            yield name[:8], turns


def read_austen(path):
    """The six novels of the R package janeaustenr: character vectors in compressed R serialisation."""
    data, off = path.read_bytes(), 0
    while off < len(data):
        size, = struct.unpack_from(">I", data, off)
        raw = zlib.decompressobj().decompress(data[off + 4:])  # a record: length unpacked, zlib
        off = _next_record(data, off)
        lines, i = [], raw.find(b"\x00\x00\x00\x10")  # STRSXP
        count, = struct.unpack_from(">I", raw, i + 4)
        i += 8
        for _ in range(count):
            n, = struct.unpack_from(">i", raw, i + 4)
            n = max(n, 0)
            lines.append(raw[i + 8:i + 8 + n].decode("utf-8"))
            i += 8 + n
        if sum(map(len, lines)) < 100000:
            continue
        assert len(raw) >= size - 16
        title = next(x for x in lines if x.strip()).title()
        yield re.sub(r"\W+", "-", title), "\n".join(lines)


def _next_record(data, off):
    z = zlib.decompressobj()
    z.decompress(data[off + 4:])
    return len(data) - len(z.unused_data)
