"""Where frames come from. A source is iterated once and yields pictures of the model's size, or None for nothing now.

open_source("photos/", preprocess)       a folder of images            edge/sources/folder.py
open_source("frames.npz", preprocess)    uint8 (N, H, W, 3)            edge/sources/arrays.py
open_source("street.mp4", preprocess)    video, through OpenCV         edge/sources/video.py
open_source("camera:0", preprocess)      live: late frames are dropped and counted
open_source("none", preprocess)          only requests over the network
"""

from edge.sources.pictures import Skipped, fit, load_picture
from edge.sources.source import NoSource, Picture, Source, open_source
from edge.sources.stream import Prefetch, Stream

__all__ = ["NoSource", "Picture", "Prefetch", "Skipped", "Source", "Stream", "fit", "load_picture", "open_source"]
