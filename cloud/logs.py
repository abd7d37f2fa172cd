"""The service's log: lines for people, or one JSON object per line for collectors."""

from __future__ import annotations

import json
import logging
import sys
import time

__all__ = ["JsonLines", "is_json", "set_up"]

EXTRA = ("code", "detail")


class JsonLines(logging.Formatter):
    """time (Unix seconds), level, logger, message, and an error's code, private detail and traceback where there are any."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {k: getattr(record, k) for k in EXTRA if getattr(record, k, "")}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def set_up(level: str, *, as_json: bool) -> None:
    """Replaces the root logger's handlers. `refold --debug` wins over `level`."""
    root = logging.getLogger()
    plain = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    plain.converter = time.gmtime
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if as_json else plain)
    if root.level > logging.DEBUG or not root.handlers:
        root.setLevel(level)
    root.handlers = [handler]
    logging.getLogger("alembic").setLevel(logging.WARNING)


def is_json() -> bool:
    """Whether the root logger writes JSON: workers write what the service writes."""
    return any(isinstance(h.formatter, JsonLines) for h in logging.getLogger().handlers)
