"""What runs beside the frames and must outlive any disk: the status board, and where a stranger finds it."""

from edge.runtime.board import Board
from edge.runtime.bounded import bounded
from edge.runtime.latest import Latest
from edge.runtime.staleness import Staleness, judge, stamp

__all__ = ["Board", "Latest", "Staleness", "bounded", "judge", "stamp"]
