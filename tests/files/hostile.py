"""Names that no server may follow, made from a few tricks."""

from __future__ import annotations

import itertools


def hostile_names() -> list[str]:
    """Paths that are refused whatever is on the disk; ``secret`` lies beside the root, ``good`` within it."""
    ups = [
        "..",
        "../..",
        "good/..",
        "good/../..",
        "./..",
        ".",
        "./good",
        "good/.",
        "good//file",
        "good/",
        "/good",
        "//",
    ]
    names = set(ups)
    dots = [
        "..",
        ".",
        "...",
        ". .",
        ".. ",
        " ..",
        "\u2024\u2024",
        "\u2025",
        "\uff0e\uff0e",
        ".\u200b.",
        ".\u2060.",
        "..\0",
    ]
    slashes = ["/", "\\", "\u2215", "\uff0f", "\u2044", "\uff3c", "\\/", "/\\", "\u29f8", "//"]
    for dot, slash, times in itertools.product(dots, slashes, (1, 2, 5)):
        names.add((dot + slash) * times + "secret")
        names.add("good" + slash + (dot + slash) * times + "secret")
    for control in [*map(chr, range(32)), *map(chr, range(127, 160)), *"\u200e\u202e\u2066\ufeff\ufffe\uffff\u2028"]:
        names |= {f"good{control}", f"{control}secret", f"good/{control}/file"}
    hidden = [".pf-files", ".PF-FILES", ".Pf-Files", ".pf-files.", ".pf-files ", ".pf\u200c-files", ".pf\u00ad-files"]
    hidden += [
        ".p\uff46-files",
        ".pf-\ufb01les",
        ".pf-f\u0131\u0307les".replace("\u0131", "i"),
        ".pf-files::$DATA",
        ".pf-f\u0130les",
    ]
    hidden += ["\uff0epf-files", ".pf-file\u017f", ".pf-files\u200d"]
    for name in hidden:
        names |= {name, f"{name}/x", f"good/{name}", f"good/{name}/x", f"{name}/../secret"}
    absolute = [
        "/etc/passwd",
        "//etc/passwd",
        "/",
        "/proc/self/root/etc/passwd",
        "/dev/null",
        "\\\\host\\share",
        "C:\\x",
    ]
    names |= {*absolute, "a" * 256, "/".join(["a"] * 300), "a/" * 3000, "\u20ac" * 100, "good/" + "b" * 300}
    return sorted(names)
