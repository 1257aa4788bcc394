"""The tables of the report. Each says which files and fields its numbers are from."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from slora_dist.report import curves, traffic
from slora_dist.report.blocks import NONE, Table, duration, nbytes, percent, spread
from slora_dist.report.read import Group, Run, differences, split

AXES = {"round": "rounds", "client": "bytes of one client", "payload": "bytes of all clients", "seconds": "time", "network": "network time"}


def amount(axis: str, value: float | None) -> str:
    """Return a figure of one of ``AXES`` with its unit."""
    if axis == "round":
        return NONE if value is None else f"{value:g}"
    return nbytes(value) if axis in ("client", "payload") else duration(value)


def share_of_full(run: Run) -> float | None:
    """Return the run's payload as a share of full fine-tuning's over the same rounds; known once the run is finished."""
    if run.summary is None:
        return None
    payload, full = run.summary["payload_bytes"], run.summary["full_finetuning_payload_bytes"]
    return float((payload["up"] + payload["down"]) / (full["up"] + full["down"]))


def accuracy(run: Run) -> float | None:
    """Return the last accuracy that was measured."""
    found = curves.evaluated(run)
    return found[-1].accuracy if found else None


def perplexity(run: Run) -> str:
    """Return the last perplexity that was measured, or a dash: only causal language models have one."""
    found = [line["perplexity"] for line in run.rounds if line.get("perplexity") is not None]
    return f"{found[-1]:.2f}" if found else NONE


def runs(groups: Sequence[Group]) -> Table:
    """One line for each run."""
    columns = [
        "run", "split", "seed", "perplexity", "accuracy", "one client", "all clients", "of full fine-tuning", "time", "network time",
        "rounds", "clients", "ranks", "transport", "folder",
    ]  # fmt: skip
    rows = [_run_row(group, run) for group in groups for run in group.runs]
    for column in ("network time", "perplexity"):
        at = columns.index(column)
        if all(row[at] == NONE for row in rows):
            for row in (columns, *rows):
                del row[at]
    source = (
        "config.json: settings, world; metrics.jsonl: perplexity and accuracy (the last measured), payload_bytes "
        "(all clients, up and down), seconds.total - seconds.evaluate (time); ledger.jsonl: payload_bytes / clients (one client that takes "
        "part in every round; the plan's where clients of a round get different messages); summary.json: full_finetuning_payload_bytes."
    )
    return Table("Runs", columns, rows, source, left=2)


def _run_row(group: Group, run: Run) -> list[str]:
    end = curves.points(run)[-1] if run.rounds else None
    clients, config = run.config.clients, run.config
    done = str(len(run.rounds)) if run.summary else f"{len(run.rounds)} of {run.planned}"
    costs = [amount(axis, getattr(end, axis) if end else None) for axis in ("client", "payload")]
    times = [duration(getattr(end, axis) if end else None) for axis in ("seconds", "network")]
    return [
        group.name, group.panel or split(config), str(config.run.seed), perplexity(run), percent(accuracy(run)), *costs,
        percent(share_of_full(run), 2), *times, done,
        f"{config.sampled} of {clients.count}", str(run.world["size"]), str(run.world["transport"]), folder(run.path),
    ]  # fmt: skip


def folder(path: Path) -> str:
    """Return the end of a path, enough to find the run."""
    return "/".join(path.parts[-3:])


def settings(groups: Sequence[Group]) -> Table:
    """Every setting in which the groups differ."""
    rows = [(label, "; ".join(f"{key} {value}" for key, value in found.items())) for label, found in differences(groups).items()]
    return Table("Settings that differ", ("run", "settings"), rows, "config.json: settings, world.", left=2)


def equal(groups: Sequence[Group], title: str) -> Table:
    """Accuracy (and of causal language models perplexity) of each group at the smallest budget that all runs have spent."""
    budgets = {axis: curves.common_budget(groups, axis) for axis in ("round", "client", "seconds", "network")}
    given = {axis: budget for axis, budget in budgets.items() if budget is not None}
    columns = ["run", *(f"equal {AXES[axis]}: {amount(axis, budget)}" for axis, budget in given.items())]
    rows = [[group.name, *(_at_budget(group, axis, budget) for axis, budget in given.items())] for group in groups]
    source = (
        "metrics.jsonl: accuracy, perplexity, round, seconds.total - seconds.evaluate, network.seconds; "
        "ledger.jsonl: payload_bytes / clients. "
        "The budget is the least that a finished run here has spent in all. Each accuracy is the last one measured within the budget, "
        "nothing is interpolated; a dash: none was. Mean over seeds (lowest-highest), with the mean round of that measurement."
    )
    return Table(title, columns, rows, source)


def _at_budget(group: Group, axis: str, budget: float) -> str:
    found = [curves.within(run, axis, budget) for run in group.runs]
    if None in found:
        return NONE
    points = [point for point in found if point]
    wavering = [point.perplexity for point in points if point.perplexity is not None]
    told = f"perplexity {fmean(wavering):.2f}, " if wavering else ""
    return f"{told}{spread([point.accuracy for point in points])}, round {fmean(point.round for point in points):g}"


def targets(groups: Sequence[Group], wanted: Sequence[float], mbit: Sequence[float], title: str) -> Table:
    """Rounds, bytes and minutes to each accuracy."""
    columns = ["run", "accuracy", "rounds", "one client", *(f"at {rate:g} Mbit/s" for rate in mbit), "of it training", "time"]
    rows = [[group.name, f"≥ {percent(target)}", *_to_target(group, target, mbit)] for target in wanted for group in groups]
    source = (
        "metrics.jsonl: accuracy, seconds.train / clients, seconds.total - seconds.evaluate; ledger.jsonl: payload_bytes / clients; "
        "timeline.jsonl: switch. Mean over the seeds that reach the accuracy. "
        "At a rate: minutes = (8 x bytes of one client, up and down / (rate x 10^6) + seconds of training + switch) / 60."
    )
    return Table(title, columns, rows, source)


def _to_target(group: Group, target: float, mbit: Sequence[float]) -> list[str]:
    found = [point for run in group.runs if (point := curves.reaches(run, target))]
    if not found:
        return [NONE] * (4 + len(mbit))
    some = f" ({len(found)} of {len(group.runs)})" if len(found) < len(group.runs) else ""
    links = [f"{fmean(curves.minutes(point, rate) for point in found):.2f} min" for rate in mbit]
    training, seconds = (duration(fmean(getattr(point, axis) for point in found)) for axis in ("training", "seconds"))
    return [f"{fmean(point.round for point in found):g}{some}", nbytes(fmean(point.client for point in found)), *links, training, seconds]


def bills(groups: Sequence[Group]) -> dict[str, Run]:
    """Return a run for every different bill, by its group's name (its label where a name has several); the first seed stands for all."""
    begun = [(group, (group.name, *_phase_sums(group.runs[0]))) for group in groups if group.runs[0].rounds]
    first: dict[tuple[Any, ...], Group] = {}
    for group, bill in begun:
        first.setdefault(bill, group)
    names = [group.name for group in first.values()]
    return {group.name if names.count(group.name) == 1 else group.label: group.runs[0] for group in first.values()}


def _phase_sums(run: Run) -> list[tuple[str, int, int, int, int]]:
    """Return (phase, one client's bytes up, down, all clients' up, down) for each phase."""
    sums = []
    for phase in run.phases:
        lines = [line for line in run.ledger if line["phase"] == phase]
        one = [run.client.get(line["round"], {"up": 0, "down": 0}) for line in run.rounds if line["phase"] == phase]
        whole = {way: sum(line["payload_bytes"] for line in lines if line["direction"] == way) for way in ("up", "down")}
        sums.append((phase, sum(ways["up"] for ways in one), sum(ways["down"] for ways in one), whole["up"], whole["down"]))
    return sums


def client_by_phase(run: Run) -> list[tuple[str, int]]:
    """Return (phase, bytes that one client sends and receives in it)."""
    return [(phase, up + down) for phase, up, down, _, _ in _phase_sums(run)]


def payload(found: Mapping[str, Run]) -> Table:
    """Bytes of the clients by phase and direction, for each of ``bills``."""
    rows = [[name, phase, *map(nbytes, sums)] for name, run in found.items() for phase, *sums in _phase_sums(run)]
    source = (
        "ledger.jsonl: payload_bytes (all clients), payload_bytes / clients (one client that takes part in every round). "
        "First seed; runs with the same name and bill stand once."
    )
    columns = ("run", "phase", "one client, up", "one client, down", "all clients, up", "all clients, down")
    return Table("Payload by phase and direction", columns, rows, source, left=2)


def kinds(run: Run) -> Table:
    """One run's bytes by phase, direction and kind."""
    rows = [[*key, f"{count:,}", nbytes(count)] for key, count in sorted(traffic.by_kind(run.ledger).items(), key=_phase_order(run))]
    source = "ledger.jsonl: bytes_by_kind by phase and direction, all ranks; control is what is not a model: headers, agreement, accounts."
    return Table("Bytes by phase, direction and kind", ("phase", "direction", "kind", "bytes", "size"), rows, source, left=3)


def _phase_order(run: Run) -> Any:
    order = {name: at for at, name in enumerate(["start", *run.phases])}
    ways = {"down": 0, "up": 1, "control": 2}
    return lambda item: (order.get(item[0][0], -1), ways[item[0][1]], item[0][2])


def layers(groups: Sequence[Group]) -> Table:
    """Payload, transport and kernel side by side, one line for each group."""
    columns = ("run", "payload", "control", "transport", "TCP sent", "TCP received", "TCP over transport", "interfaces", "InfiniBand")
    rows = [[group.label, *_layer_row(group.runs[0])] for group in groups]
    source = (
        "ledger.jsonl: payload_bytes by direction (up and down; control), transport_bytes (each byte once: of ranks other than 0); "
        "counters.jsonl: tcp of all ranks' sockets, interfaces and infiniband by host (tx_bytes, whoever caused them). First seed."
    )
    return Table("Payload, transport, kernel", columns, rows, source)


def _layer_row(run: Run) -> list[str]:
    seen = traffic.layers(run)
    if not seen.transport:  # whatever the kernel counted, it was not this run's
        return [nbytes(seen.payload), nbytes(seen.control), nbytes(0), *[NONE] * 5]
    ports = ["; ".join(f"{name} {nbytes(count)}" for name, count in found.items()) or NONE for found in (seen.interfaces, seen.infiniband)]
    sums = [nbytes(count) for count in (seen.payload, seen.control, seen.transport, seen.tcp_sent, seen.tcp_received)]
    return [*sums, NONE if seen.overhead is None else f"{100 * seen.overhead:+.1f} %", *ports]


def bandwidth(run: Run) -> Table:
    """One run's collectives: bytes, waiting, moving, and the speed of moving."""
    rows = []
    for (op, side), moved in sorted(traffic.by_op(run.ledger).items()):
        times = [duration(moved.wait_seconds), duration(moved.seconds - moved.wait_seconds)]
        rate = moved.bandwidth
        rows.append([op, side, nbytes(moved.transport_bytes), *times, f"{rate * 8 / 1e6:,.1f} Mbit/s" if rate else NONE])
    source = "ledger.jsonl: transport_bytes, wait_seconds, seconds, all rounds; speed = transport_bytes / (seconds - wait_seconds)."
    return Table("Collectives", ("operation", "side", "transport", "waited", "moved data for", "speed"), rows, source, left=2)


def switches(groups: Sequence[Group]) -> Table:
    """Accuracy and loss before and after the switch, and what the factors keep."""
    columns = ("run", "seed", "accuracy before", "after", "loss before", "after", "kept energy")
    rows = [[group.label, str(run.config.run.seed), *_switch_row(run.switch)] for group in groups for run in group.runs if run.switch]
    return Table("The switch", columns, rows, "summary.json: switch; kept_energy_total is the share of the update's squared norm.")


def _switch_row(switch: dict[str, Any]) -> list[str]:
    losses = [f"{switch[key]:.3f}" for key in ("loss_before", "loss_after")]
    before, after = (percent(switch[key]) for key in ("accuracy_before", "accuracy_after"))
    return [before, after, *losses, percent(switch["kept_energy_total"])]


def personal(groups: Sequence[Group]) -> Table:
    """How the model does on the clients' own held-out documents."""
    columns = ("run", "seed", "clients", "accuracy, mean", "10th percentile", "least", "perplexity, mean", "90th percentile", "most")
    rows = [
        [group.label, str(run.config.run.seed), *_personal_row(figures)]
        for group in groups
        for run in group.runs
        if (figures := run.personal)
    ]
    source = "metrics.jsonl: personal, the last one. Every client counts alike, with the coordinates that it keeps to itself, if any."
    return Table("On the clients' own documents", columns, rows, source)


def _personal_row(figures: dict[str, Any]) -> list[str]:
    accuracies = [percent(figures["accuracy"][name]) for name in ("mean", "p10", "min")]
    wavering = figures.get("perplexity")
    return [str(figures["count"]), *accuracies, *(f"{wavering[name]:.2f}" if wavering else NONE for name in ("mean", "p90", "max"))]


def privacy(groups: Sequence[Group]) -> Table:
    """Epsilon of the runs that add noise."""
    columns = ("run", "seed", "noise multiplier", "clip", "delta", "epsilon", "without sampling")
    rows = []
    for label, run, spent in ((group.label, run, spent) for group in groups for run in group.runs if (spent := run.privacy)):
        settings = run.config.privacy
        figures = [settings.noise_multiplier, settings.clip, spent["delta"], spent["epsilon"], spent["epsilon_unsampled"]]
        rows.append([label, str(run.config.run.seed), *(f"{figure:.4g}" for figure in figures)])
    source = "metrics.jsonl: privacy, the last round's. Without sampling: against those who know the clients of every round."
    return Table("Differential privacy", columns, rows, source, left=2)


def prediction(predicted: Mapping[str, Mapping[str, float]], measured: Mapping[str, Mapping[str, float]]) -> Table:
    """Mean seconds of a round, foretold and measured, by phase and part."""
    rows = [
        [phase, part, duration(foretold), duration(measured[phase][part]), _ratio(foretold, measured[phase][part])]
        for phase, parts in predicted.items()
        if phase in measured
        for part, foretold in parts.items()
    ]
    source = (
        "--machine FILE; metrics.jsonl: network where links are emulated, else seconds; timeline.jsonl: train, the slowest rank's; "
        "ledger.jsonl: seconds of rank 0, broadcast and control without wait_seconds, upload without the training that it waits for."
    )
    return Table("A round, predicted and measured", ("phase", "part", "predicted", "measured", "ratio"), rows, source, left=2)


def _ratio(one: float, other: float) -> str:
    return f"{one / other:.2f}" if other else NONE
