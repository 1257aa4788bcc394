"""What a person sees: progress on a terminal (nothing on a pipe), and tables at the end."""

from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

from slora_dist.evaluate import perplexity
from slora_dist.runfolder import RunFolder


class Progress:
    """A line that follows the rounds: phase, loss, accuracy or perplexity, bytes so far, time left."""

    def __init__(self, rounds: int, done: int) -> None:
        console = Console()
        columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[figures]}")]
        self._bar = Bar(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal, transient=True)
        self._task = self._bar.add_task("start", total=rounds, completed=done, figures="")
        self._score, self._bytes = "", 0

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()

    def advance(self, record: dict[str, Any]) -> None:
        """Show the figures of a finished round."""
        self._bytes += sum(record["payload_bytes"].values())
        if record["accuracy"] is not None:
            self._score = f"perplexity {record['perplexity']:.2f}  " if "perplexity" in record else f"accuracy {record['accuracy']:.1%}  "
        figures = f"loss {record['train_loss']:.3f}  {self._score}{size(self._bytes)}"
        self._bar.update(self._task, advance=1, description=record["phase"], figures=figures)


def _console() -> Console:
    """Return a console of the terminal's width; a pipe has none, so it gets one that fits the tables."""
    console = Console()
    return console if console.is_terminal else Console(width=110)


def size(nbytes: float) -> str:
    """Return a number of bytes for reading: ``12.3 MB`` (decimal units)."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"


def _score(summary: Mapping[str, Any]) -> str:
    if "perplexity" in summary:
        return f"test perplexity  {summary['perplexity']:.2f}; {summary['accuracy']:.2%} of the answers' tokens foretold"
    return f"test accuracy  {summary['accuracy']:.2%}"


def _personal(figures: Mapping[str, Any]) -> str:
    if not figures["count"]:
        return "no client holds any out"
    perplexity = f"perplexity {figures['perplexity']['mean']:.2f}, " if "perplexity" in figures else ""
    mean, least, tenth = (figures["accuracy"][name] for name in ("mean", "min", "p10"))
    return f"{perplexity}accuracy {mean:.2%}; 10th percentile {tenth:.2%}, least {least:.2%} of {figures['count']} clients"


def _at_switch(summary: Mapping[str, Any], when: str) -> str:
    switch = summary["switch"]
    return f"perplexity {perplexity(switch[f'loss_{when}']):.2f}" if "perplexity" in summary else f"{switch[f'accuracy_{when}']:.2%}"


def finished(folder: RunFolder, summary: dict[str, Any]) -> None:
    """Print the result of a run and where its files are."""
    table = Table(title=f"{summary['rounds']} rounds on {summary['world_size']} rank(s)", title_justify="left")
    for column in ("", "up", "down", "of full fine-tuning"):
        table.add_column(column, justify="left" if not column else "right")
    payload, full = summary["payload_bytes"], summary["full_finetuning_payload_bytes"]
    total = sum(full.values())
    for name, sums in [*payload["by_phase"].items(), ("all phases", payload), ("full fine-tuning", full)]:
        table.add_row(name, size(sums["up"]), size(sums["down"]), f"{(sums['up'] + sums['down']) / total:.2%}")
    console = _console()
    console.print(table)
    console.print(_score(summary), highlight=False)
    if summary["switch"]:
        switch = summary["switch"]
        text = f"at the switch  {_at_switch(summary, 'before')} before, {_at_switch(summary, 'after')} after"
        kept = switch["kept_energy_total"]
        console.print(text + (f"; the factors keep {kept:.1%} of the update's energy" if kept is not None else ""), highlight=False)
    if summary["personal"]:
        print(f"on the clients' own documents  {_personal(summary['personal'])}")
    for lost in summary["lost"]:
        print(f"lost     rank {lost['rank']} with clients {lost['clients']} in round {lost['round']}: {lost['reason']}")
    if summary["left_out"]:
        print("left out of a round: " + ", ".join(f"{count} {reason}" for reason, count in summary["left_out"].items()))
    print(f"adapter  {folder.adapter}" + (", on the weights in its base/" if (folder.adapter / "base").exists() else ""))
    print(f"report   {folder.path / 'summary.json'}")


def stopped(folder: RunFolder) -> None:
    """Say how to go on with a run that was asked to leave early."""
    print(f"stopped after a checkpoint; go on with: slora-dist train --resume {folder.path}")


def plan(plan: dict[str, Any]) -> None:
    """Print a plan as tables."""
    clients = plan["clients"]
    table = Table(title=f"{plan['rounds']} rounds, {clients['per_round']} of {clients['count']} clients each", title_justify="left")
    for column in ("phase", "rounds", "trainable", "density", "a client's message", "all up", "all down"):
        table.add_column(column, justify="left" if column == "phase" else "right")
    for phase in plan["phases"]:
        message = list(dict.fromkeys(size(phase["message_bytes"][way]) for way in ("up", "down")))
        message[0] = "about " * phase["message_bytes"]["estimated"] + message[0]
        counts = (f"{phase['trainable']:,}", f"{phase['density']:.2%}", " / ".join(message))
        sums = (size(phase["payload_bytes"][way]) for way in ("up", "down"))
        table.add_row(phase["phase"], str(phase["rounds"]), *counts, *sums)
    payload, full = plan["payload_bytes"], plan["full_finetuning_payload_bytes"]
    table.add_row("all", str(plan["rounds"]), "", "", "", size(payload["up"]), size(payload["down"]))
    table.add_row("full fine-tuning", str(plan["rounds"]), f"{plan['parameters']:,}", "100.00%", "", size(full["up"]), size(full["down"]))
    console = _console()
    console.print(table)
    for rate, minutes in plan["minutes"].items():
        print(f"at {rate} Mbit/s  {minutes:.1f} min on a client's link (full fine-tuning {plan['full_finetuning_minutes'][rate]:.1f} min)")
    for name, parts in plan.get("seconds", {}).items():
        print(f"a round of {name}  " + ", ".join(f"{part} {seconds:.3g} s" for part, seconds in parts.items()))


def partition(words: str, figures: dict[str, Any]) -> None:
    """Print how the documents fall to the clients."""
    documents, labels = figures["documents"], figures["labels_per_client"]
    print(f"partition   {words}, {figures['clients']} clients")
    print(f"documents   {documents['min']:,} to {documents['max']:,} of {documents['total']:,} a client, median {documents['median']:g}")
    print(f"labels      {labels['min']} to {labels['max']} of {figures['labels']} a client, median {labels['median']:g}")
    print(f"label skew  {figures['label_skew']:.3f}  (0: every client has all labels as they are in the whole; 1: none of them)")
    print(f"size skew   {figures['size_skew']:.3f}  (standard deviation of the clients' documents over their mean)")


def doctor(found: dict[str, Any]) -> None:
    """Print what the doctor found: software, places, timings, advice."""
    console = _console()
    world, backends = found["world"], found["backends"]
    print("versions    " + ", ".join(f"{name} {text or 'missing'}" for name, text in found["versions"].items()))
    print(f"world       {world['size']} rank(s) by {world['launcher']}, transport {world['transport']}")
    mpi = f"{backends['mpi'] or 'missing'}{' (goes on without a dead rank)' * backends['mpi_heals']}"
    print(f"backends    gloo {backends['gloo']} (TLS {backends['gloo_tls']}), nccl {backends['nccl']}, MPI {mpi}")
    print(f"SLURM       {found['slurm'] or 'not here'}")
    print(f"GPUs        {', '.join(found['gpus']) or 'none'}")
    for row in found["interfaces"]:
        print(f"interface   {row['name']} {'up' if row['up'] else 'down'} {row['mbit'] or '?'} Mbit/s {' '.join(row['addresses'])}")
    for row in found["ranks"]:
        print(f"rank {row['rank']:<6} {row['host']} {row['address']}, {row['device']}, {row['cores']} cores")
    table = Table(title="median from barrier to barrier", title_justify="left")
    for column in ("verb", "message", "milliseconds", "MB/s"):
        table.add_column(column, justify="left" if column == "verb" else "right")
    for row in found["verbs"]:
        table.add_row(row["verb"], size(row["bytes"]), f"{row['seconds'] * 1e3:.2f}", f"{row['mbyte_per_second']:.1f}")
    console.print(table)
    for line in found["advice"]:
        print(f"advice      {line}")
    if not found["advice"]:
        print("advice      nothing to mend")
