"""The command line, and the only place that catches exceptions: it says what happened, where, and ends all ranks.

Exit codes: 0 done, 1 something broke while running, 2 a setting, a file or a world that cannot be used, 3 done, but without
ranks that have died, 4 rank 0 does not answer, as this rank has found.
"""

import argparse
import gc
import json
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from slora_dist import commands, memory, settings
from slora_dist.arguments import read
from slora_dist.commands import out_folder
from slora_dist.config import Config
from slora_dist.disk import check_place, write
from slora_dist.ending import Where, Witness, last_words, speak_when_ended
from slora_dist.errors import ConfigError, RootGone, RunError
from slora_dist.log import say
from slora_dist.world import World, detect, launch

BROKEN, INCOMPLETE, DESERTED = 1, 3, 4
DOCTOR_SECONDS = 120.0  # a rank that is silent for so long in the self-test is lost

if TYPE_CHECKING:
    from slora_dist.comm.base import Communicator
    from slora_dist.comm.lifeline import Healing


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code."""
    options = read(arguments)
    memory.keep()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # about its own inside, nothing a user can mend
    rank, first = 0, True
    try:
        if options.command not in ON_RANKS:  # these serve in a batch script's shell, too
            code: int = getattr(commands, options.command)(options)
            return code
        world = detect(os.environ)
        rank, first = world.rank, world.local_rank == 0
        return ON_RANKS[options.command](options, world)
    except ConfigError as error:
        alone = getattr(options, "join", False) or error.setting == "--join"
        # what concerns all ranks rank 0 says, and what may be a machine's own its first rank, since others may wait for it elsewhere; who
        # joins, or comes back without saying so, is on its own
        if rank == 0 or alone or (first and not error.agreed):
            say(rank, f"error: {error}")
        return 2
    except RunError as error:  # ranks that do not come together, or do not leave together
        say(rank, f"failed: {error}")
        return _code(error)
    except KeyboardInterrupt:
        return 130


def _train(options: argparse.Namespace, world: World) -> int:
    config, out = _settings(options)
    where = Where(folder=Path(out).absolute())
    witness = Witness(world.rank, where) if world.launcher != "alone" else None
    try:
        code = _play(config, out, options, world, where, witness)
    finally:
        if witness:
            witness.dismiss()
    if config.clients.min_clients is not None:  # a thread may still wait for a group that is gone
        from slora_dist.comm.alone import leave

        leave(code)
    return code


def _play(config: Config, out: Path, options: argparse.Namespace, world: World, where: Where, witness: Witness | None) -> int:
    speak_when_ended(world.rank, where, witness)
    _set_threads(config.run.threads)
    if config.clients.min_clients:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # torch prints a stack for every connection that breaks
    with _uncollected():  # torch only now: the number of threads is read when it is loaded
        from slora_dist import comm, device
        from slora_dist.admission import admit, joining
        from slora_dist.comm.base import INIT_SECONDS

    place, healing = device.choose(config.run.device, world), _healing(config, options)
    where.operation = f"connect within {INIT_SECONDS:.0f} s"
    communicator = comm.connect(config.comm.backend, world, os.environ, config.comm.timeout, place, healing)
    where.operation = "admission"
    try:
        admitted = joining(communicator) if options.join else admit(communicator, config, os.environ)
        with _uncollected():
            from slora_dist.job import Job
        job = Job(config, communicator, out, place, where, admitted, launch(os.environ))
        complete = job.run(options.resume is not None, stop_after=options.stop_after, track=options.track)
    except ConfigError:
        with suppress(RunError):  # whoever was refused may have gone at once
            communicator.close()
        raise
    except Exception as error:  # the program ends here, so this is where to say why
        if witness:
            witness.dismiss()
        where.finish()
        _fail(communicator, where, f"{where}: {error}", error)
    communicator.close()
    return 0 if complete else INCOMPLETE


@contextmanager
def _uncollected() -> Iterator[None]:
    """Import without the garbage collector: modules stay, and to search them again and again takes a fifth of their loading."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _healing(config: Config, options: argparse.Namespace) -> "Healing | None":
    """Return what this rank needs to go on when another dies, if it is to."""
    if config.clients.min_clients is None:
        if options.join:
            raise ConfigError("--join", "without clients.min_clients no run takes in a rank", "clients.min_clients, as the others have it")
        return None
    from slora_dist import admission, secret
    from slora_dist.comm.lifeline import Healing

    known = secret.find(os.environ) or b""
    return Healing(config.comm.client_timeout, known, admission.account(config), partial(admission.judge, config), options.join)


def _fail(communicator: "Communicator", where: Where, text: str, error: Exception) -> NoReturn:
    """Say what broke on this rank and end all ranks: none may wait for one that is gone."""
    last_words(communicator.rank, where, f"failed in {text}")
    if not isinstance(error, RunError):
        import traceback

        traceback.print_exception(error)
    communicator.abort(_code(error))


def _code(error: Exception) -> int:
    return DESERTED if isinstance(error, RootGone) else BROKEN


def _settings(options: argparse.Namespace) -> tuple[Config, Path]:
    if not options.resume:
        if not options.config:
            raise ConfigError("CONFIG.yaml", "missing", "slora-dist train CONFIG.yaml, or slora-dist train --resume RUN")
        return settings.load(options.config, options.overrides), Path(out_folder(options))
    if options.out and Path(options.out) != Path(options.resume):
        raise ConfigError("--out", f"{options.out} with --resume: a run goes on in its own folder", f"none, or {options.resume}")
    from slora_dist.runfolder import RunFolder

    config = RunFolder(options.resume).config()
    if options.config:
        given = [options.config, *options.overrides]
        is_file = not ("=" in options.config and not Path(options.config).exists())
        other = settings.load(given[0], given[1:]) if is_file else settings.override(config, given)
        settings.require_equal(config, other)
    return config, Path(options.resume)


def _set_threads(threads: int) -> None:
    """Fix the threads of every numerical library: sums depend on them, and ranks must agree to the bit."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(threads)
    import torch

    torch.set_num_threads(threads)


def _doctor(options: argparse.Namespace, world: World) -> int:
    config = settings.load(options.config, options.overrides) if options.config else None
    if options.out and world.rank == 0:
        check_place(options.out)
    environ = dict(os.environ)  # as it was given
    _set_threads(config.run.threads if config else 1)
    from slora_dist import admission, comm, device, doctor, show
    from slora_dist.comm.sealed import Sealed

    place = device.choose(config.run.device if config else "auto", world)
    backend = options.backend or (config.comm.backend if config else "auto")
    communicator = comm.connect(backend, world, os.environ, config.comm.timeout if config else DOCTOR_SECONDS, place)
    try:
        admitted = admission.admit(communicator, config, os.environ) if config else None
        sealing = admitted and config and config.comm.encrypt and communicator.size > 1
        measured = Sealed(communicator, admitted.session) if admitted and sealing else communicator
        found = doctor.examine(measured, world, environ, place, config)
    except ConfigError:
        communicator.close()
        raise
    except Exception as error:
        _fail(communicator, Where(), f"doctor: {error}", error)
    communicator.close()
    if found:
        print(json.dumps(found, indent=1)) if options.json else show.doctor(found)
        if options.out:
            write(options.out, json.dumps(found, indent=1) + "\n")
    return 0


ON_RANKS = {"train": _train, "doctor": _doctor}
