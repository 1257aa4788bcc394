"""The commands that run in one process, each a function of the options; ``train`` and ``doctor`` are in ``cli``."""

import argparse
import json
import sys
from dataclasses import fields
from functools import partial
from pathlib import Path

from slora_dist import settings
from slora_dist.errors import ConfigError


def plan(options: argparse.Namespace) -> int:
    """Print what a run will cost in bytes, and in time where a machine was measured."""
    from slora_dist import show
    from slora_dist.data.federation import class_names
    from slora_dist.links import check_rates
    from slora_dist.model import shell
    from slora_dist.plan import plan
    from slora_dist.timing import predict, read_machine

    check_rates(options.mbit)
    machine = read_machine(options.machine) if options.machine else None
    config = settings.load(options.config, options.overrides)
    classifier = shell(config.model, class_names(config))
    result = plan(config, classifier, options.mbit) | ({"seconds": predict(config, classifier, machine)} if machine else {})
    print(json.dumps(result, indent=1)) if options.json else show.plan(result)
    return 0


def partition(options: argparse.Namespace) -> int:
    """Print how the documents fall to the clients, and draw it."""
    from slora_dist import show
    from slora_dist.data.overview import overview
    from slora_dist.report import heatmap
    from slora_dist.report.read import split

    if options.plot:
        heatmap.check(options.plot)
    config = settings.load(options.config, options.overrides)
    found = overview(config)
    if options.plot:
        heatmap.draw(found, f"{split(config)}, {len(found.counts_KC)} clients, seed {config.run.seed}", options.plot)
    print(json.dumps(found.figures() | found.table(), indent=1)) if options.json else show.partition(split(config), found.figures())
    return 0


def export(options: argparse.Namespace) -> int:
    """Write a run's adapter, or the merged model."""
    from slora_dist.export import export
    from slora_dist.runfolder import RunFolder

    folder = RunFolder(options.source)
    folder.config()
    export(folder.adapter, Path(options.destination), options.merge)
    print(options.destination)
    return 0


def fetch(options: argparse.Namespace) -> int:
    """Put models and data sets into the cache."""
    from slora_dist.data.fetch import fetch

    for name in options.names:
        print(f"{name}: {fetch(name)}")
    return 0


def slurm(options: argparse.Namespace) -> int:
    """Write the batch file of a run, and submit it."""
    from slora_dist import slurm
    from slora_dist.roundplan import check_world

    config = settings.load(options.config, options.overrides)
    check_world(config, options.nodes * options.ranks_per_node)  # better now than when the job's turn has come
    if options.launcher == "torchrun" and config.comm.backend == "mpi":
        raise ConfigError("comm.backend", "mpi with --launcher torchrun", "another backend; or --launcher srun")
    if config.clients.min_clients:
        raise ConfigError(
            "clients.min_clients", "all ranks of this batch file end with the first that dies", "unset, or slurm/healing.sbatch"
        )
    slurm.check_gpus(config, options.gpus_per_node)
    wanted = {field.name: getattr(options, field.name) for field in fields(slurm.Options) if field.name not in ("out", "python", "threads")}
    asked = slurm.Options(**wanted, out=out_folder(options), python=sys.executable, threads=config.run.threads)
    text = slurm.sbatch(options.config, options.overrides, asked)
    print(text if options.dry_run else slurm.submit(text), end="")
    return 0


def secret(options: argparse.Namespace) -> int:
    """Make a job's secret."""
    from slora_dist import secret

    secret.write(options.file)
    print(options.file)
    return 0


def study(options: argparse.Namespace) -> int:
    """Run the cells of a study that are left, or submit them, and write the tables."""
    from slora_dist import slurm
    from slora_dist.study import grid, play

    tell = partial(print, flush=True)
    study = grid.read(options.study)
    out = Path(options.out or Path("studies") / study.name)
    if options.cell is not None:
        play.make(out)
        return min(1, play.play(study, out, [grid.cell(study, options.cell)], 1, tell))
    if options.slurm:
        for cell in study.cells:
            slurm.check_gpus(cell.config, options.gpus_per_node)
        threads = max(cell.config.run.threads for cell in study.cells)
        place = {"partition": options.partition, "account": options.account, "time": options.time, "gpus_per_node": options.gpus_per_node}
        wanted = slurm.Options(1, str(out), **place, python=sys.executable, threads=threads)
        text = slurm.array(options.study, len(study.cells), study.ranks, options.jobs, wanted)
        print(text if options.dry_run else slurm.submit(text), end="")
        return 0
    if options.dry_run:
        print("\n".join(play.listing(study, out)))
        return 0
    play.make(out)
    failed = 0 if options.tables_only else play.play(study, out, study.cells, options.jobs, tell)
    from slora_dist.study import charts, tables  # after the runs: transformers and matplotlib would sit in memory all the while

    found = tables.rows(study, out)
    tables.write(study, out, found)
    charts.write(study, out / "figures", found)
    print(f"tables   {out / 'tables.md'}\nfigures  {out / 'figures'}")
    return min(1, failed)


def audit(options: argparse.Namespace) -> int:
    """Hold a run's files against each other; 1 when something does not agree."""
    from slora_dist.audit import checks
    from slora_dist.runfolder import RunFolder

    made = checks.audit(RunFolder(options.folder))
    print("\n".join(checks.report(made)))
    return int(any(check.faults for check in made))


def report(options: argparse.Namespace) -> int:
    """Write the report of runs and print where it is."""
    from slora_dist.report.page import Options, report

    out = options.out or (options.runs[0] / "report" if len(options.runs) == 1 else Path("report"))
    print(report(options.runs, out, Options(options.target, options.mbit, options.machine)))
    return 0


def scalars(options: argparse.Namespace) -> int:
    """Hand a run's figures to a tracker."""
    from slora_dist import scalars
    from slora_dist.runfolder import RunFolder

    folder = RunFolder(options.source)
    out = options.out or folder.path / options.to
    scalars.send(folder.lines("metrics"), options.to, folder.path.name, folder.config().model_dump(), out)
    return 0


def out_folder(options: argparse.Namespace) -> str:
    """Return the run folder that was asked for, or one named after the config."""
    out: str = options.out or str(Path("runs") / Path(options.config).stem)
    return out
