"""DVC's local cache as a store of objects, each named by the MD5 of its bytes."""

import os
from collections.abc import Sequence
from pathlib import Path

from bob.dvc.repository import OnRepository, translated
from bob.errors import BobError
from bob.formats.files import naming


class ObjectStore(OnRepository):
    """The cache of the repository, which all its experiments share."""

    def __init__(self) -> None:
        super().__init__()
        self._odb = self.repository.cache.local

    @property
    def shared(self) -> bool:
        """Whether users of one group share the cache."""
        return self.repository.config["cache"].get("shared") == "group"

    def folder(self, name: str) -> Path:
        """A folder beside the objects, for what is none; it is made where it is missing."""
        path = Path(self.repository.cache.local_cache_dir, name)
        self._odb.makedirs(str(path))  # the cache's own, so that a shared one stays shared
        return path

    @property
    def root(self) -> Path:
        """The folder of the objects."""
        return Path(self._odb.path)

    def copies(self, folder: Path) -> bool:
        """Whether `dvc add` leaves what is in `folder` there twice: on the disk no link works."""
        from dvc_objects.fs.generic import test_links
        from dvc_objects.fs.local import localfs

        odb = self._odb
        odb.makedirs(odb.path)
        links = test_links(odb.cache_types, odb.fs, odb.path, localfs, str(folder.absolute()))
        return links[:1] == ["copy"]

    def path(self, oid: str) -> Path:
        """Where an object lies, or would."""
        return Path(self._odb.oid_to_path(oid))

    def stat(self, oid: str) -> os.stat_result:
        """Of an object's file; raises OSError where there is none."""
        return os.stat(self._odb.oid_to_path(oid))  # noqa: PTH116 - a Path costs more than the call

    def exists(self, oid: str) -> bool:
        """Whether there is an object of this name; whether it is whole is not looked at."""
        return self._odb.exists(oid)

    def add(self, oid: str, content: bytes) -> None:
        """Write an object, whose name is the MD5 of `content`, also over one that is there."""
        with naming(self.path(oid)):
            self._odb.add_bytes(oid, content)
        self._odb.protect(self._odb.oid_to_path(oid))

    def place(self, oids: Sequence[str], paths: Sequence[Path]) -> None:
        """Put objects into the workspace, linked as DVC's `cache.type` says or else copied.

        Raises BobError where an object is gone.
        """
        from dvc_objects.fs.generic import transfer

        for folder in {path.parent for path in paths}:
            folder.mkdir(parents=True, exist_ok=True)
        try:
            transfer(
                self._odb.fs,
                [self._odb.oid_to_path(oid) for oid in oids],
                self._odb.fs,
                [str(path.absolute()) for path in paths],
                links=list(dict.fromkeys([*self._odb.cache_types, "copy"])),
            )
        except FileNotFoundError as error:
            raise BobError(
                f"{error.filename} went from the DVC cache while the stage ran; run it again"
            ) from None

    def hashes(self, folder: Path) -> dict[str, str]:
        """File -> MD5 for all files in a folder that .dvcignore does not leave out.

        Files that did not change since DVC or this function read them are not read again.
        """
        from dvc_data.hashfile.build import build

        with translated():
            _, _, tree = build(
                self._odb,
                str(folder.absolute()),
                self._odb.fs,
                "md5",
                dry_run=True,
                ignore=self.repository.dvcignore,
            )
        return {"/".join(parts): hash_info.value for parts, _, hash_info in tree}


def copy_file(source: str, target: str) -> None:
    """Copy a file, for free where the file system can clone it; never a link to the source."""
    from dvc_objects.fs.generic import transfer
    from dvc_objects.fs.local import localfs

    transfer(localfs, source, localfs, target, links=["reflink", "copy"])
