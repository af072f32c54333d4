"""``--metadata``: the content of the metadata service from a file, before the first request."""

from __future__ import annotations

from base.lean_typing import TYPE_CHECKING
from vmm.errors import VmmError
from vmm.files import FileOpenError, read_text
from vmm.json.decoder import JsonError, decode
from vmm.mmds.store import MmdsError

if TYPE_CHECKING:
    from vmm.mmds.store import DataStore
    from vmm.observe.logger import Logger

#: A file may not be larger than this; the limit of the service itself counts after white space was dropped.
MAX_SIZE = 16 << 20


class MetadataFileError(VmmError):
    """The file cannot be read or cannot be the content of the service."""

    code = "vmm.metadata_file"


def load(path: str | None, store: DataStore, logger: Logger) -> None:
    """Put the content of a file into the service, if there is one. Raises MetadataFileError."""
    if path is None:
        return
    try:
        store.put(decode(read_text(path, MAX_SIZE)))
    except FileOpenError as error:
        raise MetadataFileError(f"Unable to open or read from the mmds content file: {error}") from error
    except JsonError as error:
        raise MetadataFileError(f"MMDS error: metadata provided not valid json: {error}") from error
    except MmdsError as error:
        raise MetadataFileError(f"Populating MMDS from file failed: {error}") from error
    logger.info("Successfully added metadata to mmds from file")
