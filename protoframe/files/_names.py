"""Which names may come from the other end, and which never do.

Knows texts alone, and no file system: what a name may be must not depend on what is there.  A path is components with
``/`` between, relative to the root; the empty text is the root itself.
"""

from __future__ import annotations

import re
import unicodedata

__all__ = ["HIDDEN", "is_hidden", "is_name", "split_path"]

#: The directory of unfinished copies.  No name from outside reaches it, in whatever spelling.
HIDDEN = ".pf-files"

LONGEST_NAME = 255
LONGEST_PATH = 4095
DEEPEST = 255

#: Nothing in these can be a trick: the usual case, in one look.
_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_ .@+,=~#%-]*", re.ASCII)
#: Controls, surrogates, what is no character, marks that turn the direction of writing, and what has no width.
_UNSEEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\ud800-\udfff\u200b\u200e\u200f\u2028\u2029\u202a-\u202e\u2060-\u2069"
    "\ufdd0-\ufdef\ufeff\ufff0-\ufffb\ufffe\uffff\U000e0000-\U000e007f]"
)
#: What looks like the end of a component, is one elsewhere, or becomes one when it is normalised.
_SEPARATORS = frozenset("/\\\u2044\u2215\u29f8\u29f5\uff0f\uff3c\ufe68")


def split_path(path: str) -> list[str] | None:
    """The components of a path; ``None`` where it is none that may come from outside."""
    if not path:
        return []
    if len(path) > LONGEST_PATH:
        return None
    parts = path.split("/")
    if len(parts) > DEEPEST:
        return None
    for part in parts:
        if not is_name(part):
            return None
    return parts


def is_name(name: str) -> bool:
    """Whether this may be the name of a file or a directory."""
    if len(name) <= LONGEST_NAME and _PLAIN.fullmatch(name) and name[-1] not in " .":
        return True
    if not name or name in {".", ".."} or _UNSEEN.search(name) or not _SEPARATORS.isdisjoint(name):
        return False
    if len(name.encode()) > LONGEST_NAME:
        return False
    flat = unicodedata.normalize("NFKC", name)
    if not _SEPARATORS.isdisjoint(flat):
        return False
    # Where trailing dots and spaces do not count, these are other names.
    return bool(flat.strip(" .")) and not is_hidden(name)


def is_hidden(name: str) -> bool:
    """Whether some file system could take this name for that of the hidden directory."""
    seen = "".join(letter for letter in name if unicodedata.category(letter) not in {"Cf", "Mn"})
    flat = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", seen).casefold())
    flat = "".join(letter for letter in flat if unicodedata.category(letter) not in {"Cf", "Mn"})
    # What ends the name of a stream (NTFS) ends that of the file before it.
    return flat.partition(":")[0].rstrip(" .") == HIDDEN
