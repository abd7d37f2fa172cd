"""From an uploaded payload to pixels; the only decoder the service has, fed with hostile bytes."""

from __future__ import annotations

from refold.imaging import decode_payload as decode_picture

__all__ = ["decode_picture"]
