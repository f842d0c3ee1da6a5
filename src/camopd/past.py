"""What `camopd gc` has removed is still known: its manifest stays as a record beside it.

``<round>/train/`` leaves ``<round>/collected/train.json``, byte for byte the manifest that it had. So a run of which only the
evidence is left is still a finished run with the same ids, metrics and books.
"""

from __future__ import annotations

from camopd.errors import MissingError, StoreError
from camopd.store import Manifest, Store, join, parent

COLLECTED = "collected"


def record_uri(uri: str) -> str:
    """``<run>/rounds/0001/train -> <run>/rounds/0001/collected/train.json``."""
    return join(parent(uri), COLLECTED, uri.rstrip("/").rpartition("/")[2] + ".json")


def known(uri: str, store: Store) -> Manifest | None:
    """The manifest of a finished prefix, also of one whose files were removed since; None where there never was one."""
    found = store.manifest(uri)
    if found is not None:
        return found
    try:
        return Manifest.from_json(store.read(record_uri(uri)))
    except MissingError:
        return None
    except (ValueError, TypeError) as error:
        raise StoreError(f"{record_uri(uri)} is broken ({error}); remove it") from error


def require_files(uri: str, store: Store) -> Manifest:
    """The manifest of a prefix whose files must be there. Raises StoreError that says so where they were removed."""
    found = store.manifest(uri)
    if found is None and known(uri, store) is not None:
        raise StoreError(
            f"{uri} was removed by `camopd gc`, and its files are needed; start the run with another output, or another seed"
        )
    return found or store.require(uri)
