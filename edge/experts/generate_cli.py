"""`refold edge generate`: a text on standard output as it comes; what it cost on standard error, or all of it as JSON."""

from __future__ import annotations

import io
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge.experts.interrupt import Interrupt
from refold.errors import InputError, UsageError
from refold.sizes import parse_size

if TYPE_CHECKING:  # torch loads only when something runs
    from edge.experts.decode.sampling import Sampling
    from edge.experts.model import Running, Settings, Writing

__all__ = ["generate", "loaded", "running_options", "sampling_of", "sampling_options", "settings_of", "trust_options"]


def running_options(command: Any) -> Any:
    """Options of `model.Settings`."""
    for option in (
        click.option("--memory", default="auto", show_default=True, help="For experts, as 512MB; auto: what is free."),
        click.option("--policy", default="value", show_default=True, help="Which experts leave memory first."),
        click.option("--readers", type=int, default=2, show_default=True, help="Threads that read the disk."),
        click.option(
            "--threads", type=int, default=1, show_default=True, help="Threads that compute; leave the readers a core."
        ),
        click.option("--no-lookahead", is_flag=True, help="Read experts only when a layer asks for them."),
        click.option("--buffered", is_flag=True, help="Read through the page cache."),
        click.option(
            "--verify",
            type=click.Choice(["first", "always", "never"]),
            default="first",
            show_default=True,
            help="When an expert's digest is checked: the first time it is read, every time, never.",
        ),
        click.option(
            "--resident",
            type=click.Choice(["stored", "float32"]),
            default="stored",
            show_default=True,
            help="Matrices that are no experts: in the checkpoint's 16 bits, or widened once.",
        ),
    ):
        command = option(command)
    return command


def sampling_options(command: Any) -> Any:
    """Options of `Sampling`; those that are not given are the bundle's generation_config.json's to say."""
    for option in (
        click.option(
            "--max-tokens", type=int, help="Of a text. Default: as the model says, else 128 (serve-llm: 16, chat 256)."
        ),
        click.option("--temperature", type=float, help="0: the most probable token. Default: as the model says, else 0."),
        click.option("--top-p", type=float, help="Draw among the most probable that reach this share."),
        click.option("--top-k", type=int, help="Draw among so many; 0: all."),
        click.option("--min-p", type=float, help="Draw among those with this share of the most probable one's probability."),
        click.option("--repetition-penalty", type=float, help="Of tokens in prompt and text; 1: none."),
        click.option("--presence-penalty", type=float, help="Of tokens that the text has already, -2 to 2."),
        click.option("--frequency-penalty", type=float, help="The same for every time it has them."),
        click.option("--stop", multiple=True, help="End before this text; repeat for several."),
        click.option("--seed", type=int, help="Of drawing; default: a fresh one."),
    ):
        command = option(command)
    return command


def trust_options(command: Any) -> Any:
    """Options of `release.trust`."""
    for option in (
        click.option("--release", type=click.Path(path_type=Path), help="A signed release to put into service."),
        click.option("--data", type=click.Path(path_type=Path), default="refold-data", help="Directory of the identity."),
        click.option("--key", "keys", multiple=True, help="Trust this release key (64 hex digits) instead of an identity's."),
        click.option("--cohort", default="", help="With --key: the cohort that releases are for."),
    ):
        command = option(command)
    return command


def settings_of(flags: dict[str, Any]) -> Settings:
    """Raises UsageError."""
    from edge.experts.model import Settings

    return Settings(
        memory="auto" if flags["memory"] == "auto" else parse_size(flags["memory"]),
        policy=flags["policy"],
        readers=flags["readers"],
        threads=flags["threads"],
        lookahead=not flags["no_lookahead"],
        direct=not flags["buffered"],
        verify=flags["verify"],
        resident=flags["resident"],
    )


def sampling_of(flags: dict[str, Any]) -> Sampling:
    """Raises UsageError."""
    from edge.experts.decode.sampling import Sampling

    return Sampling(
        max_tokens=flags["max_tokens"],
        temperature=flags["temperature"],
        top_p=flags["top_p"],
        seed=flags["seed"],
        top_k=flags["top_k"],
        min_p=flags["min_p"],
        repetition_penalty=flags["repetition_penalty"],
        presence_penalty=flags["presence_penalty"],
        frequency_penalty=flags["frequency_penalty"],
        stop=flags["stop"] or None,
    )


@contextmanager
def loaded(bundle: Path, settings: Settings) -> Iterator[Running]:
    """The model, with a bar while its resident part is read; Ctrl-C ends that between two tensors."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    from edge.experts.model import Running
    from refold.experts import PagedModel

    paged = PagedModel.open(bundle)
    columns = (TextColumn("Reading the resident part"), BarColumn(), DownloadColumn())
    console = Console(stderr=True)
    hidden = not console.is_terminal
    with Interrupt() as interrupt, Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task("", total=paged.bundle.manifest.experts.resident_bytes)

        def came(n: int) -> None:
            interrupt.check()
            bar.advance(task, n)

        running = Running(paged, settings, came)
    for note in running.defaults.notes:
        click.echo(note, err=True)
    with running:
        interrupt.check()
        yield running


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("prompt")
@running_options
@sampling_options
@trust_options
@click.option("--chat", is_flag=True, help="The prompt is a user's message to a chat model.")
@click.option("--trace", type=click.Path(path_type=Path), help="Write the routing to this .npz or .jsonl file.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object at the end instead of text as it comes.")
def generate(bundle: Path, prompt: str, **flags: Any) -> None:
    """Continue PROMPT (- reads it from standard input) with the language model in BUNDLE, in the memory there is."""
    sampling, settings = sampling_of(flags), settings_of(flags)
    if flags["release"] is None and (flags["keys"] or flags["cohort"]):
        raise UsageError("--key and --cohort say which releases are trusted: give the release too, with --release.")
    text = _stdin() if prompt == "-" else prompt
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a letter is no reason to end
    with loaded(bundle, settings) as running, Interrupt() as interrupt, _traced(running, flags["trace"]):
        if flags["release"] is not None:
            from edge.experts.release import gains_of, given, trust

            who = trust(flags["data"], flags["keys"], flags["cohort"])
            running.put_gains(gains_of(running.paged.bundle, given(flags["release"], running.paged.bundle, who)))
        ids = running.codec.chat([{"role": "user", "content": text}]) if flags["chat"] else running.codec.encode(text)
        writing = running.generate(ids, sampling, interrupt.is_set)
        show: Callable[[str], None] = (lambda text: None) if flags["as_json"] else _show
        try:
            for piece in writing:
                show(piece.text)
        finally:
            if not flags["as_json"]:
                show("\n")
                _tell(writing, running)
        if flags["as_json"]:
            click.echo(json.dumps(_numbers(writing, running) | {"text": writing.text, "reason": writing.reason}))


def _stdin() -> str:
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as e:
        raise InputError("Standard input is not UTF-8 text.", code="text") from e


@contextmanager
def _traced(running: Running, path: Path | None) -> Iterator[None]:
    if path is None:
        yield
        return
    from edge.experts.trace import TraceWriter

    with TraceWriter.of(path, running.paged.index.geometry) as writer:
        running.pager.trace_to(writer)
        try:
            yield
        finally:
            running.pager.trace_to(None)


def _show(text: str) -> None:
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise click.exceptions.Exit(141) from None


def _numbers(writing: Writing, running: Running) -> dict[str, Any]:
    """JSON has no nan."""
    n = writing.numbers()
    told = {k: (None if isinstance(v, float) and math.isnan(v) else v) for k, v in vars(n).items()}
    return told | {"memory": running.pager.budget, "token_ids": writing.tokens}


def _tell(writing: Writing, running: Running) -> None:
    n = writing.numbers()
    if not n.tokens:
        return
    rows = [
        ("tokens per second", f"{n.tokens_per_second:.2f}"),
        ("time to first token", f"{n.first_token:.2f} s for {n.prompt_tokens} tokens, {n.prompt_bytes / 1e6:,.1f} MB read"),
        ("hit rate", f"{n.hit_rate:.1%} in memory before, {n.coverage:.1%} read ahead in time or begun"),
        ("read per token", f"{n.bytes_per_token / 1e6:,.2f} MB"),
        ("waiting for the disk", f"{n.stall:.2f} s of {n.seconds:.2f} s"),
        ("memory for experts", f"{running.pager.budget / 1e6:,.1f} MB of {running.paged.index.total / 1e6:,.1f} MB"),
    ]
    click.echo("\n" + "\n".join(f"{name:<22}{value}" for name, value in rows), err=True)
