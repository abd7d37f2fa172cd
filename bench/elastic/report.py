"""What the elastic benchmark claims of its rows, and its picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from bench.result import Cell, Claim, Result, number

__all__ = ["claims", "plot"]


def claims(rows: list[dict[str, Cell]], settings: Mapping[str, object]) -> list[Claim]:
    """A shared net is close to one alone from 4 bits up and no worse than ONNX Runtime's; a searched one beats the uniform."""
    by_name = {str(r["configuration"]): r for r in rows}
    out = []
    for key, bar in (("spearman", 0.9), ("pearson", 0.9)):
        if key in settings:
            text = f"predictor, {key} correlation on pairs it never saw"
            out.append(Claim(f"elastic.{key}", text, number(settings[key]), "≥", bar))  # type: ignore[arg-type]
    for row in rows:
        name = str(row["configuration"])
        if row.get("equal to") in by_name:
            gain = number(row["accuracy %"]) - number(by_name[str(row["equal to"])]["accuracy %"])
            out.append(
                Claim(
                    f"elastic.{name}",
                    f"{name} over the uniform one of as many bytes and bit operations",
                    gain,
                    "≥",
                    0.0,
                    0.5,
                    " points",
                )
            )
        if row.get("alone %") is not None and int(name[1]) >= 4 and int(name[3]) >= 4:
            gain = number(row["accuracy %"]) - number(row["alone %"])
            text = f"{name}: elastic over trained alone for the same steps"
            out.append(Claim(f"elastic.{name}.alone", text, gain, "≥", -0.5, -0.3, " points"))
        if row.get("ORT static %") is not None and name != "float":
            gain = number(row["accuracy %"]) - number(row["ORT static %"])
            text = f"{name}: elastic over ONNX Runtime's static quantisation"
            out.append(Claim(f"elastic.{name}.ort", text, gain, "≥", 0.0, None, " points"))
    return out


def plot(result: Result, path: Path) -> None:
    """Accuracy over size: elastic, alone, searched, float."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    uniform = [r for r in result.rows if r.get("kB") and not r.get("equal to")]
    searched = [r for r in result.rows if r.get("equal to")]
    for rows, key, label, mark in (
        (uniform, "accuracy %", "elastic, uniform", "o-"),
        (uniform, "alone %", "trained alone", "s--"),
        (searched, "accuracy %", "elastic, searched", "*"),
        (uniform, "ORT static %", "ONNX Runtime static, 8 bits", "x"),
    ):
        points = sorted((number(r["kB"]), number(r[key]), str(r["configuration"])) for r in rows if r.get(key) is not None)
        if points:
            axes.plot([p[0] for p in points], [p[1] for p in points], mark, label=label)
        if label == "elastic, uniform":
            for x, y, name in points:
                axes.annotate(name, (x, y), textcoords="offset points", xytext=(4, -10), fontsize=8)
    floats = [number(r["accuracy %"]) for r in result.rows if r["configuration"] == "float"]
    if floats:
        axes.axhline(floats[0], color="grey", linewidth=0.8, label="float")
    steps = result.settings.get("steps")
    axes.set(xlabel="kB", ylabel="accuracy, %", title=f"ResNet-20, CIFAR-10, {steps} steps{' (quick)' if result.quick else ''}")
    axes.legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
