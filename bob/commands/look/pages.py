"""What of the project's files is served, and nothing else."""

from collections.abc import Iterable
from pathlib import Path

from bob.formats import layout

INDEX = layout.REPORT / "index.html"

IMAGES = {
    ".bmp": "image/bmp",
    ".gif": "image/gif",
    ".jpeg": "image/jpeg",
    ".jpg": "image/jpeg",
    ".png": "image/png",
    ".tif": "image/tiff",
    ".tiff": "image/tiff",
    ".webp": "image/webp",
}
PAGE = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
}
SERVED = {layout.REPORT: IMAGES | PAGE, layout.GENERATE: IMAGES, layout.SPLIT: IMAGES}
"""Folder -> media types of what is served of it, by suffix."""


def read_served(path: str, objects: Iterable[Path]) -> tuple[bytes, str] | None:
    """Content and media type of a file, its path being relative to the project; None: not served.

    It lies in one of the folders that are SERVED; or it is a link there to one of the `objects` of
    DVC's cache, as DVC makes them where `cache.type` says so.
    """
    for folder, types in SERVED.items():
        inside = path.removeprefix(f"{folder}/")
        if inside == path or "\0" in path or ".." in Path(path).parts:
            continue
        media_type = types.get(Path(path).suffix.lower())
        try:
            file = Path(path).resolve()
            if media_type and any(
                file.is_relative_to(root.resolve()) for root in (folder, *objects)
            ):
                return file.read_bytes(), media_type
        except OSError:  # gone, a folder, no permission, a name too long
            return None
    return None
