"""Where runs are kept: a folder, or objects in a store that fsspec knows; and patience with both."""

from gendist.storage.objects import Storage, absolute, check_url, is_url, place_of

__all__ = ["Storage", "absolute", "check_url", "is_url", "place_of"]
