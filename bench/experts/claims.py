"""Each bar of the experts benchmark as a claim."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bench.experts.lines import CAPS, LLAMA, LLAMA_RESIDENT, OURS, RESIDENT
from bench.result import Cell, Claim, number

__all__ = ["ablation", "claims", "find", "of_long_run"]

Row = Mapping[str, Cell]
KEPT = 1.02  # heaps grow in steps: what "own" was measured from is another run


def find(rows: Sequence[Row], name: str, share: float | None, bits: int = 4) -> Row:
    """The row of an engine at a cap; an empty one where there is none, whose numbers hold nothing."""
    cap = None if share is None else 100 * share
    return next((r for r in rows if (r["engine"], r["cap %"], r["bits"]) == (name, cap, bits)), {})


def claims(rows: Sequence[Row]) -> list[Claim]:
    out = []
    for share in CAPS:
        ours, theirs = find(rows, OURS, share), find(rows, LLAMA, share)
        if not ours:
            continue
        key, at = f"experts.{100 * share:g}", f"{100 * share:g} % of experts in memory"
        if theirs:
            bar, goal = (1.5, 2.5) if share == 0.25 else (1.0, 1.5)
            out.append(Claim(f"{key}.speed", f"{at}: tokens/s ÷ llama.cpp's", _ratio(ours, theirs), "≥", bar, goal))
        same = find(rows, "llama.cpp, refold's total", share)
        if same:
            text = f"{at}: tokens/s ÷ llama.cpp's, given all the memory that we take with Python and torch"
            out.append(Claim(f"{key}.speed.total", text, _ratio(ours, same), "≥", 1.0, 1.5))
        out += [
            Claim(f"{key}.hit", f"{at}: strict hit rate ÷ Belady's", number(ours.get("hit / belady")), "≥", 0.85, 0.9),
            Claim(
                f"{key}.compute", f"{at}: time a token ÷ with all in memory", number(ours.get("time / compute")), "≤", 1.5, 1.25
            ),
            Claim(
                f"{key}.promise",
                f"{at}: memory that experts took ÷ --memory, worst run",
                number(ours.get("promise")),
                "≤",
                KEPT,
            ),
            Claim(f"{key}.oom", f"{at}: killed for memory", number(ours.get("OOM")), "≤", 0),
        ]
    resident = find(rows, RESIDENT, None), find(rows, f"{RESIDENT}, two threads", None)
    peers = [r for name in (LLAMA_RESIDENT, f"{LLAMA_RESIDENT}, repacked") if (r := find(rows, name, None))]
    if peers and any(resident):
        ours = max((r for r in resident if r), key=_rate)
        text = "all in memory: tokens/s ÷ llama.cpp's best, mapped or repacked"
        out.append(Claim("experts.memory.speed", text, _ratio(ours, max(peers, key=_rate)), "≥", 1.0))
    eight, theirs = find(rows, OURS, 0.25, 8), find(rows, LLAMA, 0.25, 8)
    if eight and theirs:
        out.append(
            Claim("experts.25.speed.8bit", "8 bits at 25 %: tokens/s ÷ llama.cpp's", _ratio(eight, theirs), "≥", 1.5, 2.5)
        )
    return out


def _rate(row: Row) -> float:
    return number(row.get("tokens/s"))


def _ratio(ours: Row, theirs: Row) -> float:
    below = number(theirs.get("tokens/s"))
    return round(number(ours.get("tokens/s")) / below, 3) if below else float("nan")


def ablation(rows: Sequence[Row]) -> list[dict[str, Cell]]:
    """EdgeMoE's order, each step on top of the one before, at 25 %: seconds a token. They begin with float32 experts, which no
    record holds: ours begins with 8 bits."""
    steps = (
        ("8 bits, on demand", find(rows, "on demand, no cache", 0.25, 8)),
        ("+ bits: 4", find(rows, "on demand, no cache", 0.25)),
        ("+ predictor: look-ahead", find(rows, "on demand + look-ahead", 0.25)),
        ("cache alone, 4 bits", find(rows, "cache, no look-ahead", 0.25)),
        ("+ cache: all", find(rows, OURS, 0.25)),
    )
    out: list[dict[str, Cell]] = []
    for name, row in steps:
        if row.get("tokens/s"):
            seconds = round(1 / number(row["tokens/s"]), 4)
            out.append(
                {
                    "engine": f"ablation: {name}",
                    "cap %": 25.0,
                    "bits": row["bits"],
                    "s/token": seconds,
                    "MB/token": row["MB/token"],
                }
            )
    return out


def of_long_run(seen: Sequence[Sequence[float]]) -> tuple[float, float, int]:
    """Of (seconds, kB anonymous, kB resident, descriptors), the first fifth left out: (kB a minute of anonymous and of resident
    memory by least squares, growth of file descriptors)."""
    import numpy as np

    rest = np.array(seen[len(seen) // 5 :], np.float64)
    if len(rest) < 2:
        return float("nan"), float("nan"), 0
    anonymous, resident = (round(float(np.polyfit(rest[:, 0] / 60, rest[:, i], 1)[0]), 1) for i in (1, 2))
    return anonymous, resident, int(rest[:, 3].max() - rest[0, 3])
