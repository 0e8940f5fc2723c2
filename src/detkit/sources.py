"""What a model can be given to look at: files, folders, globs, videos, URLs, data sets, arrays, and any mix of them."""

from __future__ import annotations

import glob
import os
from collections.abc import Generator, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypeGuard

import numpy as np
from PIL import Image as PillowImage

from detkit import fetching, images, remote, videos
from detkit.data import Dataset
from detkit.errors import ImageError, UsageError
from detkit.images import Image
from detkit.videos import Frame

OneImage: TypeAlias = str | Path | Image | PillowImage.Image
Source: TypeAlias = "OneImage | Dataset | Iterable[OneImage | Dataset]"
Named: TypeAlias = OneImage | ImageError
"""An image or a video, or the error of a folder that cannot be listed."""
Item: TypeAlias = OneImage | Frame | Exception


class Listed(list[Named]):
    """What `list_sources` returned of a source that is no stream; it is taken as it is."""


def list_sources(source: Source, *, fetch: bool = False) -> Iterable[Named]:
    """Return the images and videos that a source names: at once, or one by one where it is a stream itself.

    In a list or a stream each entry may be a folder, a glob or a `Dataset`, too. The error of a folder that cannot be
    listed is in its place. Raises `UsageError` where one names no image, and for a URL unless ``fetch``.
    """
    if isinstance(source, Listed):
        return source
    if isinstance(source, (Dataset, np.ndarray, PillowImage.Image, str, Path)) or not isinstance(source, Iterable):
        return Listed(_named(source, fetch))
    if isinstance(source, (list, tuple)):
        return Listed(item for one in source for item in _named(one, fetch))
    return (item for one in source for item in _named(one, fetch))


def count(items: Iterable[Named], every: int = 1) -> int | None:
    """Return how many images `unfold` will make of what `list_sources` returned; None where that is not known."""
    if not isinstance(items, Listed):
        return None
    total = 0
    for item in items:
        known = videos.num_frames(item) if is_video(item) else every
        if known is None:
            return None
        total += -(-known // every)
    return total


def unfold(items: Iterable[Named], every: int = 1) -> Generator[Item, None, None]:
    """Yield the items, and of each video its frames in its place; the error of one that ends too early comes last.

    That of the items themselves ends them, so that what came before can be used before it is raised.
    """
    try:
        for item in items:
            if not is_video(item):
                yield item
                continue
            try:
                yield from videos.frames(item, every)
            except ImageError as error:
                yield error
    except Exception as error:
        yield error


def decode(item: Item) -> tuple[Image, str]:
    """Return an item's pixels and its path, which is empty where it never was a file. Raises `ImageError`.

    An item that is an error is raised.
    """
    if isinstance(item, np.ndarray):
        if item.ndim != 3 or item.shape[2] != 3 or item.dtype != np.uint8:
            raise UsageError(f"an image array of {item.dtype} {item.shape}; expected uint8 (height, width, 3), RGB")
        return item, ""
    if isinstance(item, PillowImage.Image):
        return images.to_array(item), ""
    if isinstance(item, Frame):
        return item.image(), item.path
    if isinstance(item, Exception):
        raise item
    name = str(item)
    if _is_web(name):
        return images.read_image(fetching.fetch(name), name), name
    return images.read_image(item), name


def refuse_url(path: str | Path, fetch: bool) -> None:
    """Raise `UsageError` for a URL unless somebody has said that it may be fetched."""
    if not fetch and remote.is_remote(path):
        raise UsageError(f"{path} is a URL, and nothing is fetched unless you say so: fetch=True (--fetch)")


def _named(source: Any, fetch: bool) -> Sequence[Named]:
    """Return what a single entry names."""
    if isinstance(source, (np.ndarray, PillowImage.Image)):
        return [source]
    if isinstance(source, Dataset):
        return source.paths
    if not isinstance(source, (str, Path)):
        raise UsageError(
            f"an image is given as {type(source)}; expected a path, a uint8 (height, width, 3) array, a Pillow image "
            "or a Dataset"
        )
    name = str(source)
    if remote.is_remote(name):
        return _at_url(name, fetch)
    if os.path.isdir(name):  # noqa: PTH112 - many paths
        found: list[str | ImageError] = list(images.walk_images(name))
    elif glob.has_magic(name) and not os.path.exists(name):  # noqa: PTH110
        found = [path for path in sorted(glob.glob(name, recursive=True)) if not os.path.isdir(path)]  # noqa: PTH112
    else:
        return [source]
    return found or _refuse(name)


def _at_url(url: str, fetch: bool) -> list[str]:
    refuse_url(url, fetch)
    if videos.is_video(url.partition("?")[0]):
        raise UsageError(f"{url} is a video; download it and name the file")
    if _is_web(url):
        return [url]
    found = remote.find(url)
    if found == [url]:
        return found
    return [one for one in found if os.path.splitext(one)[1].lower() in images.EXTENSIONS] or _refuse(url)  # noqa: PTH122


def _refuse(place: str) -> Any:
    raise UsageError(
        f"no image in {place}; looked for {', '.join(sorted(images.EXTENSIONS))}. videos are named one by one, or by a "
        "glob such as 'folder/*.mp4'"
    )


def is_video(item: Named) -> TypeGuard[str | Path]:
    """Return whether an item is the path of a video."""
    return isinstance(item, (str, Path)) and videos.is_video(item)


def _is_web(name: str) -> bool:
    return name[:8].lower().startswith(("http://", "https://"))
