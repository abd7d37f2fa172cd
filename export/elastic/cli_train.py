"""`refold export train`: one elastic supernet from a float model and labelled pictures."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from export.capture import capture, load_model, program_of
from export.elastic.data import Labelled, Split, load_labelled
from export.elastic.folder import RunFolder, Settings, Training, graph_digest
from export.elastic.judge import Judge
from export.elastic.plots import loss_curve
from export.elastic.space import Space, bit_operations, byte_count
from export.elastic.supernet import Supernet
from export.elastic.train import Trainer, calibration_index
from export.elastic.train import train as train_all
from export.pictures import class_names
from export.preprocessing import parse_preprocess
from export.progress import counted
from refold.atomic import write_atomically
from refold.errors import InputError, UsageError

__all__ = ["train"]


@click.command()
@click.argument("model")
@click.option("--weights", type=click.Path(path_type=Path), help="As for `refold export`: where the training starts.")
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    required=True,
    help="Labelled pictures: a folder with a sub-folder for each class, or npz with images uint8 (N, H, W, 3) and labels.",
)
@click.option("--preprocess", required=True, help="As for `refold export`.")
@click.option("--input-size", metavar="WxH", help="Overrides the size in --preprocess.")
@click.option(
    "--elastic", default="w2-8,a2-8", show_default=True,
    help="Bits, then per-channel, per-tensor, w-symmetric, w-asymmetric, a-symmetric, a-asymmetric; the rest is elastic.",
)  # fmt: skip
@click.option("--steps", type=click.IntRange(1), required=True, help="Optimiser steps; each trains --subnets subnets.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The run's folder; goes on where it was.")
@click.option("--batch", type=click.IntRange(2), default=128, show_default=True)
@click.option("--lr", type=float, default=1e-3, show_default=True, help="Of Adam, falling to 0 along a cosine.")
@click.option("--subnets", type=click.IntRange(2), default=3, show_default=True, help="High, low, and random ones between.")
@click.option("--teacher/--no-teacher", default=True, show_default=True, help="The float model teaches the widest subnet.")
@click.option("--augment/--no-augment", default=True, show_default=True, help="Random crops and mirror images.")
@click.option("--classes", help="Class names in label order: a,b,c or a file with one a line (folders only; default: sorted).")
@click.option("--checkpoint-every", type=click.IntRange(1), default=100, show_default=True, help="Steps.")
@click.option("--measure", type=click.IntRange(1), default=500, show_default=True, help="Held-out pictures for the table.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="Of torch; part of what is reproducible.")
@click.option("--json", "as_json", is_flag=True, help="For machines.")
def train(
    model: str, weights: Path | None, data: Path, preprocess: str, input_size: str | None, elastic: str, steps: int,
    output: Path, batch: int, lr: float, subnets: int, teacher: bool, augment: bool, classes: str | None, checkpoint_every: int,
    measure: int, seed: int, threads: int, as_json: bool,
) -> None:  # fmt: skip
    """Train one supernet of MODEL from which every bit-width, granularity and symmetry can be taken (EQ-Net).

    A tenth of the pictures, 2,000 at most, is held out to measure on. A run that was stopped, however hard, is continued by the
    same command, to exactly the result it would have had.
    """
    torch.set_num_threads(threads)
    started, console = time.monotonic(), Console(stderr=True)

    def say(what: str) -> None:
        if not as_json:
            console.print(what, highlight=False)

    space, plan = Space.parse(elastic), parse_preprocess(preprocess, input_size)
    names = tuple(class_names(classes))
    training = Training(
        steps, batch, lr, subnets=subnets, teacher=teacher, augment=augment, seed=seed, checkpoint_every=checkpoint_every
    )
    say("reading the pictures")
    labelled = load_labelled(data, plan, names)
    split = Split.of(labelled.labels, seed)
    say("capturing the model")
    program = program_of(load_model(model, weights), plan.height, plan.width)
    graph, parameters = capture(program, plan.height, plan.width), list(program.graph_signature.parameters)
    _check_labels(labelled, graph.shapes[graph.output][-1])
    settings = Settings(
        model, str(data.resolve()), plan, space, training, names, graph_digest(graph), labelled.digest
    )  # fmt: skip
    run = RunFolder(output)
    click.get_current_context().with_resource(run.held())
    if run.started:
        trainer = _resumed(run, settings)
        say(f"going on at step {trainer.step} of {steps}")
    else:
        x = plan.apply(labelled.read(calibration_index(split, training)))
        with _bar(console, as_json) as bar:
            task = bar.add_task("first steps", total=None)
            net = Supernet.build(graph, space, parameters, x, lambda what: bar.update(task, description=what))
        trainer = Trainer(net, training)
        run.create(settings, program)
        run.save(trainer.checkpoint())
    with _bar(console, as_json) as bar:
        task = bar.add_task("training", total=steps, completed=trainer.step)
        every = max(1, steps // 20)

        def on_step(step: int, losses: list[float]) -> None:
            told = " ".join(f"{v:.3f}" for v in losses)
            bar.update(task, completed=step, description=f"losses {told}")
            if not console.is_terminal and step % every == 0:
                say(f"step {step} of {steps}: losses {told}")

        train_all(trainer, labelled, split, plan, run, on_step)
    loss_curve(output / "loss.png", trainer.losses)
    judge = Judge(trainer.supernet, labelled, split, plan, training, measure)
    rows = _measured(judge, space, console, as_json)
    result = {
        "run": str(output), "steps": steps, "held_out": len(judge.held), "rows": rows, "losses": trainer.losses[-1],
        "seconds": round(time.monotonic() - started, 1),
    }  # fmt: skip
    write_atomically(output / "result.json", [json.dumps(result, indent=1).encode() + b"\n"])
    if as_json:
        click.echo(json.dumps(result, indent=1))
        return
    table = Table(title=f"{output}: accuracy on {len(judge.held)} held-out pictures", title_justify="left")
    for column in ("configuration", "accuracy", "bytes", "bit operations"):
        table.add_column(column, justify="left" if column == "configuration" else "right")
    for row in rows:
        table.add_row(row["configuration"], f"{row['accuracy']:.1%}", *(f"{row[k]:,}" for k in ("bytes", "bit_operations")))
    Console().print(table)


def _check_labels(data: Labelled, outputs: int) -> None:
    if int(data.labels.max()) >= outputs:
        raise InputError(
            f"The labels go up to {int(data.labels.max())}; the model has {outputs} outputs, so the last is {outputs - 1}.",
            code="no-labels",
        )


def _resumed(run: RunFolder, settings: Settings) -> Trainer:
    differing = run.settings().differing(settings)
    if differing:
        raise UsageError(
            f"{run.path} holds a training with other settings ({', '.join(differing)}). Give those again to go on with it, or "
            "another folder."
        )
    checkpoint = run.checkpoint()
    trainer = Trainer(run.supernet(), settings.training)
    trainer.resume(checkpoint)
    return trainer


def _measured(judge: Judge, space: Space, console: Console, as_json: bool) -> list[dict[str, Any]]:
    layout = judge.supernet.layout
    both = sorted(set(space.weight_bits) & set(space.activation_bits), reverse=True)
    pairs = [(b, b) for b in both] or [(space.weight_bits[-1], space.activation_bits[-1])]
    rows: list[dict[str, Any]] = [{"configuration": "float, before", "accuracy": judge.float_accuracy()}]
    rows[0] |= {"bytes": layout.other_bytes + sum(4 * p.elements for p in layout.layers)}
    rows[0] |= {"bit_operations": sum(p.multiplications for p in layout.layers) * 32 * 32}
    with _bar(console, as_json) as bar:
        task = bar.add_task("measuring", total=len(pairs))
        for w, a in pairs:
            c = space.uniform(layout, w, a)
            costs = {"bytes": byte_count(layout, c), "bit_operations": bit_operations(layout, c)}
            rows.append({"configuration": f"w{w}a{a}", "accuracy": judge.accuracy(c), **costs})
            bar.advance(task)
    return rows


def _bar(console: Console, as_json: bool) -> Progress:
    return Progress(*counted(), console=console, transient=True, disable=as_json or not console.is_terminal)
