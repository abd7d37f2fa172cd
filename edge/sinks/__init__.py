"""Where predictions go."""

from edge.sinks.json_lines import JsonLines

__all__ = ["JsonLines"]
