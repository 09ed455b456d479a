"""Where runs are kept: a folder, or objects in a store that fsspec knows; and patience with both."""

from gendist.storage.objects import Storage, absolute, below, check_url, is_url, path_here, place_of

__all__ = ["Storage", "absolute", "below", "check_url", "is_url", "path_here", "place_of"]
