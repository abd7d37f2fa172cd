"""From an image file to the pixels a model sees: one way for calibration, device and service.

The rules and their reasons: docs/adr/020-images-settings-addresses.md.

read_image(path, preprocess)        a file of any common kind, uint8 (height, width, 3) of the model's size
fit(array, preprocess)              the same for pixels in memory
decode_payload(codec, payload, …)   what a device uploaded

files.py      only regular files are opened: nothing here waits for a named pipe
convert.py    orientation, then every mode to 8-bit RGB by fixed rules
resize.py     to the model's size
"""

from refold.imaging.convert import BACKGROUND, to_rgb, upright
from refold.imaging.files import SUFFIXES, is_image_name, open_regular
from refold.imaging.payload import decode_payload
from refold.imaging.read import FORMATS, read_image
from refold.imaging.resize import fit

__all__ = [
    "BACKGROUND",
    "FORMATS",
    "SUFFIXES",
    "decode_payload",
    "fit",
    "is_image_name",
    "open_regular",
    "read_image",
    "to_rgb",
    "upright",
]
