"""Images of a data set: checked once at start-up, kept compressed, decoded when used."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from PIL import Image, UnidentifiedImageError


@dataclass(frozen=True)
class ImageRef:
    """One image: a file, or the bytes of one in any format that Pillow reads."""

    source: Path | bytes

    def open(self) -> Image.Image:
        """Decode to RGB; transparent pixels become white."""
        with Image.open(self._stream()) as image:
            return to_rgb(image)

    def check(self) -> None:
        """Read the whole image, so that a truncated file shows before training starts.

        JPEG files are decoded at the smallest scale their format offers, which still reads every
        byte.

        Raises:
            ValueError: one clause that says what is wrong.
        """
        try:
            with Image.open(self._stream()) as image:
                image.verify()  # check sums, where the format has them
            with Image.open(self._stream()) as image:
                image.draft("L", (1, 1))
                image.load()
        except FileNotFoundError:
            raise ValueError(f"{self._name()} does not exist") from None
        except UnidentifiedImageError:
            raise ValueError(f"{self._name()} is in no image format that Pillow reads") from None
        except Exception as error:  # noqa: BLE001 - decoders raise whatever broken bytes lead to
            raise ValueError(f"{self._name()} is damaged: {error}") from None

    def _stream(self) -> Path | io.BytesIO:
        return io.BytesIO(self.source) if isinstance(self.source, bytes) else self.source

    def _name(self) -> str:
        if isinstance(self.source, bytes):
            return f"an image of {len(self.source)} bytes"
        return f"image file '{self.source}'"


@dataclass(frozen=True)
class LazyImages(Sequence[Image.Image]):
    """A sequence of PIL images that decodes each one when it is indexed and keeps none."""

    refs: tuple[ImageRef, ...]

    def __len__(self) -> int:
        return len(self.refs)

    @overload
    def __getitem__(self, index: int) -> Image.Image: ...
    @overload
    def __getitem__(self, index: slice) -> LazyImages: ...
    def __getitem__(self, index: int | slice) -> Image.Image | LazyImages:
        if isinstance(index, slice):
            return LazyImages(self.refs[index])
        return self.refs[index].open()

    def __iter__(self) -> Iterator[Image.Image]:
        return (ref.open() for ref in self.refs)


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an RGB copy; transparent pixels are put on white."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def image_refs(value: Any, folder: Path) -> tuple[ImageRef, ...]:
    """Turn the value of an image column into references.

    Args:
        value: None, one image or a list of images; an image is a path (relative ones start at
            ``folder``), bytes, ``{"bytes": ...}`` or ``{"path": ...}``, or a PIL image.
        folder: the folder of the data file.

    Raises:
        ValueError: one clause that says what was found and what was expected.
    """
    if value is None:
        return ()
    values = value if isinstance(value, list | tuple) else [value]
    return tuple(_image_ref(item, folder) for item in values)


def _image_ref(value: Any, folder: Path) -> ImageRef:
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, Image.Image):
        stream = io.BytesIO()
        value.save(stream, format="PNG")
        value = stream.getvalue()
    if isinstance(value, bytes | bytearray):
        return ImageRef(bytes(value))
    if isinstance(value, str | Path) and str(value):
        if str(value).startswith(("http://", "https://")):
            raise ValueError(f"image '{value}' is an address; images are read from local files")
        return ImageRef(folder / Path(value).expanduser())
    raise ValueError(
        f"an image must be a path, bytes, a mapping with 'bytes' or 'path', or a PIL image; "
        f"got {type(value).__name__}"
    )
