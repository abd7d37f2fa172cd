"""`report.html` from a report: one file with its pictures inside (SVG drawn here), nothing fetched from anywhere."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

__all__ = ["accuracy_plot", "render", "traffic_plot"]

WIDTH, LEFT, RIGHT = 960, 56, 16
SHADES = {"clean": "#e8f1e4", "fog": "#dfe4ea", "noise": "#efe6da"}
ADAPTED, FROZEN, RELEASE, UP, DOWN = "#1f6feb", "#9a6700", "#b0306a", "#1a7f6b", "#b0306a"

STYLE = """
body{font:15px/1.5 system-ui,-apple-system,"Segoe UI",Helvetica,Arial,sans-serif;color:#1f2328;background:#fff;
 max-width:1000px;margin:2rem auto;padding:0 1rem}
h1{font-size:1.6rem;margin:0 0 .2rem}h2{font-size:1.15rem;margin:2rem 0 .4rem}
p.lead{margin:.2rem 0 1rem;color:#59636e}
svg{width:100%;height:auto;display:block}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:.3rem .6rem;border-bottom:1px solid #d8dee4}th{font-weight:600;color:#59636e}
td.n,th.n{text-align:right}.yes{color:#1a7f37;font-weight:600}.no{color:#cf222e;font-weight:600}
code{font:13px ui-monospace,Menlo,Consolas,monospace}
"""


def render(report: dict[str, Any]) -> str:
    """The whole page, from the value `demo.report.build` made (or that was read back from report.json)."""
    verdict = "every claim holds" if report["holds"] else "not every claim holds"
    shifted, traffic = report["shifted"], report["traffic"]
    lead = (
        f"{report['frames']:,} frames of {report['images']} through one int8 engine on this machine: "
        f"{shifted['frozen']:.1f} % frozen, <b>{shifted['adapted']:.1f} %</b> adapted in fog and noise; "
        f"{traffic['samples']:,} pictures sent ({100 * traffic['share']:.1f} %); {verdict}."
    )
    back = report["fog_return"]
    recall = (
        f"The device met the fog's return after <b>{back['frames']}</b> frames with the state it had kept as "
        f"<code>{html.escape(str(back['domain']))}</code>; releases it needed for that: <b>{back['releases']}</b>. "
        f"First frames of the fog: {back['first_time']:.1f} % the first time, {back['returned']:.1f} % when it came back."
        if back["frames"] >= 0
        else "The device did not recall a known state when the fog came back."
    )
    parts = [
        f"<p class=lead>{lead}</p>",
        f"<h2>Accuracy of the last {report['window']} frames</h2>",
        accuracy_plot(report),
        "<h2>Pictures and bytes on the wire</h2>",
        traffic_plot(report),
        "<h2>Claims</h2>",
        _table(
            ("claim", "value", "bar", ""),
            [(c["text"], f"{c['value']:g}", c["bar"], "holds" if c["holds"] else "does not hold") for c in report["claims"]],
        ),
        "<h2>Phases</h2>",
        _table(
            ("phase", "frames", "frozen %", "adapted %", "gain"),
            [
                (p["name"], f"{p['frames']:,}", f"{p['frozen']:.1f}", f"{p['adapted']:.1f}", f"{p['gain']:+.1f}")
                for p in report["phases"]
            ],
        ),
        f"<p>{recall}</p>",
        "<h2>Releases</h2>",
        _table(
            ("version", "domain", "installed at", "served from", "bytes", "digest"),
            [
                (str(r["version"]), r["domain"], f"{r['installed']:,}", f"{r['frame']:,}", f"{r['bytes']:,}", r["digest"][:16])
                for r in report["releases"]
            ],
        ),
        f"<p>{traffic['bytes_up']:,} bytes went up and {traffic['bytes_down']:,} came down.</p>",
        "<h2>Processes</h2>",
        _table(
            ("process", "pid", "seconds", "exit"),
            [
                (p["name"], str(p["pid"]), f"{p['seconds']:.1f}", "" if p["exit"] is None else str(p["exit"]))
                for p in report["processes"]
            ],
        ),
        f"<p>{' · '.join(f'{html.escape(k)} {v:.1f} s' for k, v in report['durations'].items())}</p>",
        *(f"<p>{html.escape(note)}</p>" for note in report["notes"]),
        f"<p class=lead>Refold {html.escape(report['refold'])}, {html.escape(report['created'])}, "
        f"{html.escape(report['machine']['system'])}, {report['machine']['cpus']} processors, seed {report['seed']}. "
        f"Bundle <code>{html.escape(str(report['bundle'].get('digest', ''))[:16])}</code>.</p>",
    ]
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>Refold demo: {verdict}</title><style>{STYLE}</style></head><body>"
        "<h1>Frozen integers, living norms</h1>" + "\n".join(parts) + "</body></html>\n"
    )


def accuracy_plot(report: dict[str, Any]) -> str:
    """Adapted against frozen over the frames; phases shaded, releases marked."""
    top, height = 40, 340
    bottom = height - 34
    frames, series, x = report["frames"], report["series"], _Axis(report["frames"])
    values = [*series["adapted"], *series["frozen"]]
    low: float = max(0.0, 10 * (min(values, default=0) // 10))

    def y(percent: float) -> float:
        return bottom - (bottom - top) * (percent - low) / (100 - low)

    out = [_open(height, "accuracy of the adapted and the frozen engine over the frames")]
    for p in report["phases"]:
        left, right = x(p["first"]), x(p["first"] + p["frames"])
        shade = SHADES.get(p["weather"], "#eee")
        out.append(f'<rect x="{left:.1f}" y="{top}" width="{right - left:.1f}" height="{bottom - top}" fill="{shade}"/>')
        out.append(_text((left + right) / 2, top - 8, f"{p['name']} ({p['gain']:+.1f})", "middle"))
    if report["outage"]:
        left, right = (x(frame) for frame in report["outage"])
        out.append(f'<rect x="{left:.1f}" y="{top}" width="{right - left:.1f}" height="10" fill="#57606a" opacity=".55"/>')
        out.append(_text((left + right) / 2, top + 24, "cloud held still", "middle"))
    for percent in range(int(low), 101, 10):
        out.append(f'<path d="M{LEFT} {y(percent):.1f}H{WIDTH - RIGHT}" stroke="#fff" stroke-width="1"/>')
        out.append(_text(LEFT - 8, y(percent) + 4, f"{percent} %", "end"))
    out += _frame_axis(frames, x, bottom)
    for r in report["releases"]:
        at = x(r["frame"])
        title = html.escape(f"release {r['version']} for {r['domain']} at frame {r['frame']}, {r['bytes']} bytes")
        out.append(
            f'<g><title>{title}</title><path d="M{at:.1f} {top}V{bottom}" stroke="{RELEASE}" stroke-dasharray="3 3"/>'
            f'<path d="M{at - 5:.1f} {bottom + 1}h10l-5 -9z" fill="{RELEASE}"/></g>'
            + _text(at + 4, bottom - 12, f"v{r['version']}")
        )
    for name, colour in (("frozen", FROZEN), ("adapted", ADAPTED)):
        points = " ".join(f"{x(f):.1f},{y(v):.1f}" for f, v in zip(series["frame"], series[name], strict=True) if f >= 50)
        out.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2.2" stroke-linejoin="round"/>')
    out += _legend(bottom - 26, (("adapted", ADAPTED), ("frozen", FROZEN), ("release applied", RELEASE)))
    return "".join(out) + "</svg>"


def traffic_plot(report: dict[str, Any]) -> str:
    """Bytes up and down so far, and the number of pictures sent, over the frames."""
    top, height = 12, 210
    bottom = height - 34
    frames, series, x = report["frames"], report["traffic_series"], _Axis(report["frames"])
    most: int = max([*series["up"], *series["down"], 1])

    def y(value: float) -> float:
        return bottom - (bottom - top) * value / most

    out = [_open(height, "bytes sent and received, and pictures sent, over the frames")]
    for p in report["phases"]:
        left, right = x(p["first"]), x(p["first"] + p["frames"])
        shade = SHADES.get(p["weather"], "#eee")
        out.append(f'<rect x="{left:.1f}" y="{top}" width="{right - left:.1f}" height="{bottom - top}" fill="{shade}"/>')
    for i in range(5):
        out.append(f'<path d="M{LEFT} {y(most * i / 4):.1f}H{WIDTH - RIGHT}" stroke="#fff"/>')
        out.append(_text(LEFT - 8, y(most * i / 4) + 4, _bytes(most * i / 4), "end"))
    out += _frame_axis(frames, x, bottom)
    most_uploads = max([*series["uploads"], 1])
    lines: tuple[tuple[str, str, Sequence[float], str], ...] = (
        ("uploads", "#59636e", [v * most / most_uploads for v in series["uploads"]], ' stroke-dasharray="2 3"'),
        ("down", DOWN, series["down"], ""),
        ("up", UP, series["up"], ""),
    )
    for _, colour, values, dash in lines:
        points = " ".join(f"{x(f):.1f},{y(v):.1f}" for f, v in zip(series["frame"], values, strict=True))
        out.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>')
    legend = (("bytes up", UP), ("bytes down", DOWN), (f"pictures sent (to {most_uploads:,})", "#59636e"))
    out += _legend(top + 14, legend)
    return "".join(out) + "</svg>"


class _Axis:
    """Frame to horizontal position."""

    def __init__(self, frames: int) -> None:
        self.frames = frames

    def __call__(self, frame: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * frame / self.frames


def _open(height: int, label: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{html.escape(label)}">'
    )


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-family="system-ui,Helvetica,Arial,sans-serif" '
        f'font-size="12" fill="#3b434b">{html.escape(text)}</text>'
    )


def _frame_axis(frames: int, x: _Axis, bottom: float) -> list[str]:
    step = next(s for s in (50, 100, 200, 500, 1000, 2000, 5000, 10**9) if frames / s <= 10)
    ticks = [_text(x(f), bottom + 18, f"{f:,}", "middle") for f in range(0, frames + 1, step)]
    return [*ticks, _text(WIDTH - RIGHT, bottom + 31, "frames", "end")]


def _legend(y: float, entries: Sequence[tuple[str, str]]) -> list[str]:
    out, x = [], LEFT + 10.0
    width = sum(36 + 6.6 * len(name) for name, _ in entries)
    out.append(f'<rect x="{x - 5:.0f}" y="{y - 13:.0f}" width="{width:.0f}" height="20" rx="4" fill="#fff" opacity=".8"/>')
    for name, colour in entries:
        out.append(f'<path d="M{x:.1f} {y - 4:.1f}h18" stroke="{colour}" stroke-width="3"/>')
        out.append(_text(x + 23, y, name))
        x += 36 + 6.6 * len(name)
    return out


def _bytes(value: float) -> str:
    return f"{value / 1e6:.1f} MB" if value >= 1e6 else f"{value / 1e3:.0f} kB"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    numeric = [bool(rows) and all(_is_number(row[i]) for row in rows) for i in range(len(head))]
    kind = [" class=n" if n else "" for n in numeric]
    lines = ["<tr>" + "".join(f"<th{k}>{html.escape(h)}</th>" for k, h in zip(kind, head, strict=True)) + "</tr>"]
    for row in rows:
        cells = []
        for k, cell in zip(kind, row, strict=True):
            verdict = {"holds": " class=yes", "does not hold": " class=no"}.get(cell, k)
            cells.append(f"<td{verdict}>{html.escape(cell)}</td>")
        lines.append("<tr>" + "".join(cells) + "</tr>")
    return "<table>" + "".join(lines) + "</table>"


def _is_number(text: str) -> bool:
    try:
        float(text.replace(",", "") or "0")
    except ValueError:
        return False
    return True
