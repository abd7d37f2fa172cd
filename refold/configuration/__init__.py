"""How the programs are told what to do: settings with their sources, network addresses, TLS files.

schema.py     what settings a program has, and how a text becomes a setting's type
gather.py     file, environment and flags into one tree that remembers who gave each value; unknown names are refused
build.py      the tree into the typed settings, or one sentence: setting, source, value, what is allowed
"""

from refold.configuration.build import build_settings
from refold.configuration.gather import Gathered, Sources, read_toml
from refold.configuration.schema import leaves

__all__ = ["Gathered", "Sources", "build_settings", "leaves", "read_toml"]
