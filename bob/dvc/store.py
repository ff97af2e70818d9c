"""DVC's local cache as a store of objects, each named by the MD5 of its bytes."""

import os
import stat
from collections.abc import Iterable, Mapping, Sequence
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

    def copy(self, copies: Mapping[Path, Path]) -> None:
        """Write files (the keys) to other places, whose folders are there, with few new bytes.

        A file that is a link to an object is linked once more. Any other is cloned or copied: it
        may be the user's own, which must not become read-only. Raises BobError where an object that
        a file is linked to was written to.
        """
        from dvc_objects.fs.generic import transfer

        objects = {source: self._object_of(source) for source in copies}
        for oid in self.damaged({oid: None for oid in objects.values() if oid}):
            source = next(source for source in objects if objects[source] == oid)
            raise BobError(
                f"{source} is not what DVC has recorded: it was written to through its link into "
                f"DVC's cache, object {oid}; `bob cache check` names all such files, and what to do"
            )
        linked = [(oid, copies[source]) for source, oid in objects.items() if oid]
        self.place([oid for oid, _ in linked], [target for _, target in linked])
        others = {source: target for source, target in copies.items() if not objects[source]}
        transfer(
            self._odb.fs,
            [str(source.absolute()) for source in others],
            self._odb.fs,
            [str(target.absolute()) for target in others.values()],
            links=["reflink", "copy"],
        )

    def _object_of(self, path: Path) -> str | None:
        """The object that a file is a link to, hard or symbolic; None where it is a file itself."""
        from dvc_data.hashfile.hash import hash_file

        found = path.lstat()
        if found.st_nlink == 1 and not stat.S_ISLNK(found.st_mode):
            return None
        _, content = hash_file(str(path.absolute()), self._odb.fs, "md5", self._odb.state)
        oid = str(content.value)
        same = self.exists(oid) and path.samefile(self.path(oid))
        return oid if same else None

    def stores_once(self, folder: Path | None = None) -> bool:
        """Whether what DVC takes in from `folder` then lies on the disk once, not twice.

        Which links can be made between it, or else the project's root, and the cache is tried out.
        """
        from dvc_objects.fs.generic import test_links

        odb = self._odb
        odb.makedirs(odb.path)
        beside = Path(folder or self.repository.root_dir).absolute() / "link"
        kinds = odb.cache_types
        possible = test_links(kinds, odb.fs, odb.path, odb.fs, str(beside))
        for kind in kinds:
            if kind in possible:
                return kind != "copy"
            if kind == "reflink":
                return False  # where it cannot clone, DVC leaves the file that it has copied
        return False

    def new_bytes(self, files: Iterable[Path]) -> int:
        """What copies of these files add on the disk, once DVC has taken them in."""
        from dvc_data.hashfile.hash import hash_file

        once, added = self.stores_once(), 0
        for file in files:
            _, content = hash_file(str(file.absolute()), self._odb.fs, "md5", self._odb.state)
            kept = self.exists(str(content.value))
            added += file.stat().st_size * ((not once) + (not kept))
        return added

    def damaged(self, oids: Iterable[str]) -> list[str]:
        """Those of these objects that hold other bytes than their name says.

        DVC takes a read-only object to be whole, but root can write to it. An object that did not
        change since DVC or this function read it is not read again; one that is not there is not
        damaged.
        """
        from dvc_data.hashfile.hash import hash_file

        found = []
        for oid in oids:
            try:
                _, present = hash_file(
                    self._odb.oid_to_path(oid), self._odb.fs, "md5", self._odb.state
                )
            except FileNotFoundError:
                continue
            if str(present.value).removesuffix(".dir") != oid.removesuffix(".dir"):
                found.append(oid)
        return found

    def tracked(self) -> dict[str, list[Path]]:
        """Object -> the files or the folder that have this content by dvc.lock and the .dvc files.

        Paths are relative to the current folder.
        """
        found: dict[str, list[Path]] = {}
        for out in self.repository.index.outs:
            if not (out.use_cache and out.is_in_repo and out.cache is self._odb):
                continue
            obj = out.get_obj()
            if obj is None:
                continue
            path = Path(os.path.relpath(out.fs_path))
            found.setdefault(obj.oid, []).append(path)
            if out.hash_info.isdir:
                for parts, _, hash_info in obj:
                    found.setdefault(hash_info.value, []).append(path.joinpath(*parts))
        return found

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
