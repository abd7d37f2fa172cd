"""`python -m bench NAME`: runs one benchmark, prints its table and claims, and writes its JSON and picture."""

from __future__ import annotations

import importlib
import os
import sys
import time
from pathlib import Path

import click

from bench.machine import commit, machine
from bench.result import Options, Result, console, show
from refold.atomic import check_output
from refold.errors import RefoldError

BENCHES = {
    "adaptation": "accuracy under shift: Refold's int8 device and cloud against published methods in fp32",
    "elastic": "one supernet at every bit-width against nets trained alone and ONNX Runtime's own quantisation",
    "field": "streams as a device in the field has them: adapted against frozen, stream by stream",
    "forge": "FORGE's two networks on its benchmark: the device alone and with the cloud",
    "corrections": "output corrections on ordered and shuffled streams, always and behind their switch; second looks; novelty",
    "corruptions": "the CIFAR-10-C generator against pictures made with its authors' code",
    "exactness": "any release against a fresh export, bit for bit; its size; the swap; int8 against fp32 time",
    "experts": "expert paging under real memory caps against llama.cpp, mmap, EdgeMoE's policy and accelerate",
    "lens": "what a release could carry beside norms: a filter in front of the network, or low-rank branches; go or no-go",
    "strategies": "every cloud strategy on the same uploads: which recipe is the default",
    "targets": "one bundle on ONNX Runtime and on LiteRT: agreement, accuracy, latency, size, swaps; MLPerf Tiny's own file",
    "fixedpoint": "AdaPT's fixed-point training against float32: accuracy, bits, size, modelled and real time",
    "expert-kernels": "one expert's matrix from its packed record: Refold's kernels against torch's, 1 to 256 tokens",
    "overhead": "the daemon's frame path against a bare ONNX Runtime session; swaps under load; memory",
}
RESULTS = Path(__file__).resolve().parent / "results"


def _epilogue() -> str:
    return "\n\n".join(["\b\nBenchmarks:\n" + "\n".join(f"  {name:14s} {what}" for name, what in BENCHES.items())])


@click.command(epilog=_epilogue(), context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("name", type=click.Choice(sorted(BENCHES)))
@click.option("--quick", is_flag=True, help="A smaller run that ends in minutes. Its claims are only indications.")
@click.option("--json", "target", type=click.Path(dir_okay=False, path_type=Path), help="Where the result goes; PNG beside it.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=RESULTS, help="Folder for results.")
@click.option("--only", multiple=True, metavar="ROW", help="Run only rows whose name contains this. May be repeated.")
@click.option("--resume", is_flag=True, help="Keep rows that an interrupted run of the same code and settings finished.")
@click.option("--processes", type=click.IntRange(1), default=os.cpu_count() or 1, help="How many rows run side by side.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--steps", type=click.IntRange(1), help="Training steps, where a benchmark trains (elastic).")
@click.option("--minutes", type=click.FloatRange(0), default=0.0, help="A long run of so many minutes (experts).")
@click.option("--work", type=click.Path(file_okay=False, path_type=Path), help="Folder for large files (experts: up to 15 GB).")
@click.option("--keep", is_flag=True, help="Keep those files.")
@click.option("--strict", is_flag=True, help="Exit 1 when a claim does not hold.")
def main(
    name: str,
    quick: bool,
    target: Path | None,
    out: Path,
    only: tuple[str, ...],
    resume: bool,
    processes: int,
    seed: int,
    steps: int | None,
    minutes: float,
    work: Path | None,
    keep: bool,
    strict: bool,
) -> None:
    """Runs one benchmark and writes NAME.json and NAME.png (NAME-quick.* with --quick)."""
    target = target or out / f"{name}{'-quick' if quick else ''}.json"
    options = Options(
        quick=quick, only=only, resume=resume, processes=processes, seed=seed, target=target, steps=steps,
        minutes=minutes, work=work, keep=keep,
    )  # fmt: skip
    started = time.monotonic()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        check_output(target)
        module = importlib.import_module(f"bench.{name.replace('-', '_')}")
        result: Result = module.run(options)
        result.machine, result.commit, result.seconds = machine(), commit(), round(time.monotonic() - started, 1)
        result.write(target)
        module.plot(result, target.with_suffix(".png"))
    except RefoldError as e:
        click.echo(f"bench {name}: {e.message}", err=True)
        sys.exit(e.exit_code)
    except OSError as e:
        click.echo(f"bench {name}: {e.strerror or e}: {e.filename or target}.", err=True)
        sys.exit(7)
    show(result)
    console.print(f"{target}\n{target.with_suffix('.png')}", style="dim", highlight=False)
    if strict and not all(c.holds for c in result.claims):
        sys.exit(1)


if __name__ == "__main__":
    main()
