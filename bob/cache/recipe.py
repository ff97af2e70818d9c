"""What is to be made, and who makes it: recipes and makers.

A *recipe* is the hash of everything that decides an item but the code: model, prompt, seed,
settings. A *maker* is that code and the libraries it stands on. A *family* is a recipe without what
differs from item to item: what two makers do alike for some of a family, they do for the others.
"""

import ast
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata, resources


def item_key(**decided_by: object) -> str:
    """SHA-256, in hex, of the canonical JSON of everything that decides an item's bytes.

    To be left out: the code and the versions of libraries, which are the maker's; the item's place
    in its batch and its neighbours, which decide nothing because every batch is padded to its full
    size; and the device and its number of threads, which decide the last bits alone, so that one
    machine can go on with what another has made.
    """
    text = json.dumps(decided_by, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Maker:
    """The code that makes items, in its parts, so that one can say later what changed."""

    code: Mapping[str, str]
    """Module of bob -> hash of what it does."""
    libraries: Mapping[str, str]
    """Library -> version."""

    @cached_property
    def id(self) -> str:
        """Hash of all parts."""
        return item_key(**self.parts)

    @property
    def parts(self) -> dict[str, dict[str, str]]:
        """What `Maker(**parts)` makes it from."""
        return {"code": dict(self.code), "libraries": dict(self.libraries)}

    def changes(self, later: "Maker") -> list[str]:
        """What is another in a later maker: `torch 2.14.0 -> 2.14.1`, `bob/models/sampling.py`."""
        modules = {f"bob/{name.replace('.', '/')}.py": code for name, code in self.code.items()}
        present = {f"bob/{name.replace('.', '/')}.py": code for name, code in later.code.items()}
        return [
            *parts_changed(self.libraries, later.libraries),
            *(name for name in present | modules if modules.get(name) != present.get(name)),
        ]


def parts_changed(then: Mapping[str, object], now: Mapping[str, object]) -> list[str]:
    """What differs, with both values; a hash, a list or the like only by its name."""
    changes = []
    for name in dict.fromkeys((*now, *then)):
        sides = [side.get(name, "none") for side in (then, now)]
        if sides[0] != sides[1]:
            short = all(isinstance(side, int | float) or len(str(side)) < 32 for side in sides)
            changes.append(f"{name} {' -> '.join(map(str, sides))}" if short else name)
    return changes


def maker_of(modules: Iterable[str], libraries: Iterable[str]) -> Maker:
    """The present maker: the modules of bob (`models.device`) and the installed libraries named."""
    return Maker(code_hashes(modules), versions(libraries))


def code_hashes(modules: Iterable[str]) -> dict[str, str]:
    """Module -> hash of what it does: comments, docstrings and layout do not count."""
    hashes = {}
    for module in sorted(modules):
        source = (
            resources.files("bob").joinpath(f"{module.replace('.', '/')}.py").read_text("utf-8")
        )
        hashes[module] = hashlib.sha256(bare(source).encode()).hexdigest()
    return hashes


class _NoDocstrings(ast.NodeTransformer):
    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        return None if isinstance(node.value, ast.Constant) else node


def bare(source: str) -> str:
    """Python source without comments, docstrings and layout."""
    # Source again and not a dump of the tree: a dump differs from one Python to the next.
    return ast.unparse(_NoDocstrings().visit(ast.parse(source)))


def versions(libraries: Iterable[str]) -> dict[str, str]:
    """Versions of the installed libraries, without the part that names the device they are for."""
    return {library: metadata.version(library).partition("+")[0] for library in libraries}
