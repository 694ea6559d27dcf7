# SPDX-License-Identifier: MIT
"""Where the text comes from: packages of Debian 12 and PyPI, with the licence that each states.

A source is one package and one kind of file in it. `split` fixes the split of a whole book; None lets every file
fall into one by the hash of its path. `cap` bounds the characters taken (files in the order of their hash).
"""
import collections

Source = collections.namedtuple("Source", "package version domain reader files split cap licence")

_MB = 1 << 20


def _s(package, version, domain, reader, files, licence, split=None, cap=3 * _MB):
    return Source(package, version, domain, reader, files, split, cap, licence)


DOC = "usr/share/doc/"

SOURCES = (
    # prose and documentation
    _s("debian-handbook", "11.20220922", "prose", "html", DOC + "debian-handbook/html/en-US/*.html",
       "GPL-2.0+ or CC-BY-SA-3.0", "train"),
    _s("installation-guide-amd64", "20230508+deb12u1", "prose", "html",
       DOC + "installation-guide-amd64/en/*.html", "GPL-2", "train"),
    _s("debian-reference-en", "2.100", "prose", "plain",
       "usr/share/debian-reference/debian-reference.en.txt.gz", "GPL-2+", "test"),
    _s("harden-doc", "3.19+nmu1", "prose", "html", DOC + "harden-doc/html/en-US/*.html", "GPL-2.0", "test"),
    _s("developers-reference", "12.18", "prose", "html", "usr/share/developers-reference/*.html", "GPL-2+", "valid"),
    _s("debian-faq", "11.1", "prose", "html", DOC + "debian/FAQ/*.html", "GPL-2+", "calib"),
    _s("linux-doc-6.1", "6.1.192-2", "prose", "rst", DOC + "linux-doc-6.1/Documentation/**/*.rst.gz", "GPL-2",
       cap=5 * _MB),
    _s("python3.11-doc", "3.11.2-6+deb12u9", "prose", "rst", DOC + "python3.11/html/_sources/**/*.txt", "PSF-2.0",
       cap=5 * _MB),
    _s("postgresql-doc-15", "15.20-0+deb12u1", "prose", "html", DOC + "postgresql-doc-15/html/*.html", "PostgreSQL",
       "train", 4 * _MB),
    _s("rust-doc", "1.63.0+dfsg1-2", "prose", "html", DOC + "rust-doc/html/book/*.html", "MIT or Apache-2.0", "train"),
    _s("lilypond-doc-html", "2.24.1-2", "prose", "html",
       DOC + "lilypond/html/Documentation/notation/*.html", "GFDL-1.3+ (no invariant sections)", "test"),
    _s("gnome-user-docs", "43.0-2", "prose", "mallard", "usr/share/help/C/*/*.page", "CC-BY-SA-3.0"),
    _s("jargon-text", "4.4.7-4.1", "prose", "jargon", DOC + "jargon-text/jargon.txt.gz", "public domain", "train"),
    _s("dict-foldoc", "20230119-1", "prose", "dict", "usr/share/dictd/foldoc.dict.dz",
       "GFDL-1.1+ (no invariant sections)", None, 4 * _MB),
    # stories and dialogue of games
    _s("endless-sky-data", "0.9.8-1.2", "prose", "endless_sky", "usr/share/games/endless-sky/data/*.txt", "GPL-3+"),
    _s("crawl-common", "2:0.28.0-1.1", "prose", "percent", "usr/share/crawl/dat/descript/*.txt", "GPL-2+"),
    # code and manuals
    _s("libpython3.11-stdlib", "3.11.2-6+deb12u9", "code", "code", "usr/lib/python3.11/**/*.py", "PSF-2.0"),
    _s("python3-sympy", "1.11.1-1", "code", "code", "usr/lib/python3/dist-packages/sympy/**/*.py", "BSD-3-Clause"),
    _s("python3-django", "3:3.2.25-0+deb12u7", "code", "code", "usr/lib/python3/dist-packages/django/**/*.py",
       "BSD-3-Clause"),
    _s("golang-1.19-src", "1.19.8-2", "code", "code", "usr/share/go-1.19/src/**/*.go", "BSD-3-Clause"),
    _s("perl-modules-5.36", "5.36.0-7+deb12u4", "code", "code", "usr/share/perl/5.36.0/**/*.pm",
       "GPL-1+ or Artistic"),
    _s("perl-doc", "5.36.0-7+deb12u4", "code", "pod", "usr/share/perl/5.36.0/pod/*.pod", "GPL-1+ or Artistic"),
    _s("manpages", "6.03-2", "code", "man", "usr/share/man/man?/*.gz", "Linux-man-pages-copyleft and others, all free"),
    _s("manpages-dev", "6.03-2", "code", "man", "usr/share/man/man?/*.gz",
       "Linux-man-pages-copyleft and others, all free"),
    _s("git-doc", "1:2.39.5-0+deb12u3", "code", "plain", DOC + "git-doc/**/*.txt", "GPL-2"),
    # chat
    _s("pypi:chitchat-dataset", "0.9.0", "chat", "chitchat", "chitchat_dataset/dataset.json", "MIT", None, 6 * _MB),
    # the domain that nothing is trained, chosen or calibrated on
    _s("r-cran-janeaustenr", "1.0.0-1", "novel", "austen", "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb",
       "MIT (package), public domain (the six novels)", "test", 6 * _MB),
)
