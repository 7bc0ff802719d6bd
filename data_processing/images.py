"""Small copies of images, for pages and tables."""

import io

from PIL import Image

THUMBNAIL = 96  # pixels, the longer side


def small_png(image: Image.Image) -> bytes:
    """Return an image as a PNG whose sides have at most THUMBNAIL pixels."""
    copy = image.convert("RGB")
    copy.thumbnail((THUMBNAIL, THUMBNAIL))
    content = io.BytesIO()
    copy.save(content, "PNG")
    return content.getvalue()
