"""The key of an item: a hash of everything that decides it, code and versions included."""

import ast
import hashlib
import json
from collections.abc import Iterable
from importlib import metadata, resources


def item_key(**decided_by: object) -> str:
    """SHA-256, in hex, of the canonical JSON of everything that decides an item's bytes.

    To be left out: the item's place in its batch and its neighbours, which decide nothing because
    every batch is padded to its full size; and the device and its number of threads, which decide
    the last bits alone, so that one machine can go on with what another has made.
    """
    text = json.dumps(decided_by, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def code_hash(modules: Iterable[str]) -> str:
    """Hash of what the named modules of bob, such as `models.device`, do.

    Comments, docstrings and layout do not count.
    """
    hashed = hashlib.sha256()
    for module in sorted(modules):
        source = (
            resources.files("bob").joinpath(f"{module.replace('.', '/')}.py").read_text("utf-8")
        )
        hashed.update(f"{module}\n{bare(source)}\n".encode())
    return hashed.hexdigest()


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
