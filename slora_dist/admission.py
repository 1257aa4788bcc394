"""Who may take part: before a model or data is loaded, every rank proves that it holds the job's secret and means the same run.

Rank 0 broadcasts a challenge. Every rank answers with a nonce, its version, its settings and a proof over all of that; rank 0 ends with
its verdict and its own proof over all nonces, so that no rank follows a false server. Who lacks the secret, has another version or other
settings ends the job: nobody has seen a model, a document or an update by then. In a job without a secret the proofs are mere checksums.

All messages have fixed sizes, and none is read before its proof holds. Legend: B bytes.
"""

import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

import slora_dist
from slora_dist import secret as secrecy
from slora_dist.comm.base import INIT_SECONDS, Transport, hurried
from slora_dist.comm.line import MAX_ACCOUNT
from slora_dist.comm.metered import Metered
from slora_dist.comm.torch_comm import TorchComm
from slora_dist.config import Config
from slora_dist.errors import ConfigError
from slora_dist.ledger import Label, Ledger
from slora_dist.log import say
from slora_dist.settings import difference
from slora_dist.wire import as_bytes

PROOF_BYTES, NONCE_BYTES, LENGTH_BYTES = 32, 32, 4
ANSWER_BYTES, VERDICT_BYTES = 64 << 10, 4 << 10  # of an answer; of a verdict, the nonces besides
SHOWN = 200  # characters of a value that an error shows
GIVEN = "the launcher's SLORA_DIST_SECRET or SLORA_DIST_SECRET_FILE, the same on every rank"

Problem = list[str]  # what a ConfigError says: setting, problem, allowed


@dataclass(frozen=True)
class _Account:
    version: str
    settings: dict[str, Any]
    problem: tuple[str, str, str] | None


_ACCOUNT = TypeAdapter(_Account)


@dataclass(frozen=True)
class Admitted:
    """A world in which everybody has proved who it is. ``ledger`` has the messages of the admission.

    ``session`` is a key of this start of this job; without a secret it protects nothing.
    """

    ledger: Ledger
    session: bytes


def admit(comm: Transport, config: Config, environ: Mapping[str, str]) -> Admitted:
    """Return once rank 0 and this rank trust each other and all ranks mean the same run.

    Raises ``ConfigError`` on all ranks when one is refused: on rank 0 and the refused one it says why, and the refused one prints it.
    Raises ``RunError`` when one says nothing for ``INIT_SECONDS``: nobody has anything else to do yet, so an operation's time-out, which
    covers training, is far too long.
    """
    with hurried(comm, INIT_SECONDS):
        return _admit(comm, config, environ)


def _admit(comm: Transport, config: Config, environ: Mapping[str, str]) -> Admitted:
    metered = Metered(comm, Ledger(comm.rank))
    secret, problem = _own(config, environ)
    challenge_B = as_bytes(secrets.token_bytes(NONCE_BYTES))
    metered.broadcast(challenge_B, _label("challenge", NONCE_BYTES), clients=1)
    challenge = _raw(challenge_B)
    mine = _mine(config, problem)
    nonce = secrets.token_bytes(NONCE_BYTES)
    answer_B = _answer(secret, challenge, comm.rank, nonce, mine)
    frames = [bytearray() for _ in range(comm.size)]
    for rank, _, chunk_b in metered.gather([answer_B], range(comm.size), _label("answer", ANSWER_BYTES), ANSWER_BYTES):
        frames[rank] += _raw(chunk_b)
    verdict_B = torch.zeros(VERDICT_BYTES + NONCE_BYTES * comm.size, dtype=torch.uint8)
    if comm.rank == 0:
        verdict_B = as_bytes(_verdict(secret, challenge, [bytes(frame) for frame in frames], mine))
    metered.broadcast(verdict_B, _label("verdict", verdict_B.numel()), clients=1)
    session = _accept(_raw(verdict_B), secret, challenge, comm.rank, nonce, problem)
    return Admitted(metered.ledger, session)


def joining(comm: Transport) -> Admitted:
    """Return the world of a rank that joins a run under way: it has proved itself on the lifeline already, and got the session's key."""
    assert isinstance(comm, TorchComm) and comm.generations
    return Admitted(Ledger(comm.rank), comm.generations.session)


def account(config: Config) -> bytes:
    """Return what a rank that joins a run under way tells rank 0 of itself."""
    return _text(_mine(config, None), MAX_ACCOUNT)


def judge(config: Config, rank: int, account: bytes) -> ConfigError | None:
    """Return why rank 0 refuses a rank that joins with this ``account`` of itself, or None."""
    refused = _mismatch(rank, account, _mine(config, None))
    return ConfigError(*refused[1]) if refused else None


def _own(config: Config, environ: Mapping[str, str]) -> tuple[bytes, Problem | None]:
    """Return this rank's secret (empty: none) and why it cannot be used, which it tells together with all others."""
    try:
        secret = secrecy.find(environ)
        if secret is None and config.comm.encrypt:
            raise ConfigError("comm.encrypt", "true, and this rank finds no secret to make a key of", f"{GIVEN}; or comm.encrypt=false")
        if secret is None and config.comm.secret == "required":
            raise ConfigError("comm.secret", "required, and this rank finds none", f"{GIVEN}; or comm.secret=auto")
    except ConfigError as error:
        return b"", [error.setting, error.problem, error.allowed]
    return secret or b"", None


def _mine(config: Config, problem: Problem | None) -> Mapping[str, Any]:
    return {"version": slora_dist.__version__, "settings": config.model_dump(mode="json"), "problem": problem}


def _text(mine: Mapping[str, Any], most: int) -> bytes:
    """Return what a rank tells of itself in ``most`` bytes or fewer."""
    text = json.dumps(mine).encode()
    if len(text) <= most:
        return text
    return json.dumps({**mine, "settings": {}, "problem": ["CONFIG.yaml", "its settings are too long", "60 kB of them"]}).encode()


def _answer(secret: bytes, challenge: bytes, rank: int, nonce: bytes, mine: Mapping[str, Any]) -> Tensor:
    text = _text(mine, ANSWER_BYTES - PROOF_BYTES - NONCE_BYTES - LENGTH_BYTES)
    body = nonce + len(text).to_bytes(LENGTH_BYTES, "little") + text
    body = body.ljust(ANSWER_BYTES - PROOF_BYTES, b"\0")
    return as_bytes(secrecy.proof(secret, b"answer", challenge, _number(rank), body) + body)


def _verdict(secret: bytes, challenge: bytes, frames: list[bytes], mine: Mapping[str, Any]) -> bytes:
    """Judge all answers and return rank 0's message: its proof, the first refusal or nothing, and all nonces."""
    refusals = (_judge(secret, challenge, rank, frame, mine) for rank, frame in enumerate(frames))
    refusal = next((refusal for refusal in refusals if refusal), None)
    text = json.dumps(refusal).encode()
    if refusal and LENGTH_BYTES + len(text) > VERDICT_BYTES - PROOF_BYTES:  # a name or a value may be of any length and any letters
        rank = refusal[0]
        problem = f"rank {rank} is refused, for more than can be told here"
        text = json.dumps([rank, ["slora_dist", problem, "the same on every rank"]]).encode()
    nonces = b"".join(frame[PROOF_BYTES : PROOF_BYTES + NONCE_BYTES] for frame in frames)
    body = (len(text).to_bytes(LENGTH_BYTES, "little") + text).ljust(VERDICT_BYTES - PROOF_BYTES, b"\0") + nonces
    return secrecy.proof(secret, b"verdict", challenge, body) + body


def _judge(secret: bytes, challenge: bytes, rank: int, frame: bytes, mine: Mapping[str, Any]) -> tuple[int, Problem] | None:
    """Return (rank, why) when a rank's answer refuses it, else None."""
    claimed, body = frame[:PROOF_BYTES], frame[PROOF_BYTES:]
    if not secrecy.holds(claimed, secret, b"answer", challenge, _number(rank), body):
        has = "does not hold the secret of rank 0" if secret else "holds a secret, or garbles it, and rank 0 finds none"
        return rank, [secrecy.VARIABLE, f"rank {rank} {has}", GIVEN]
    return _mismatch(rank, _told(body[NONCE_BYTES:]), mine)


def _mismatch(rank: int, text: bytes, mine: Mapping[str, Any]) -> tuple[int, Problem] | None:
    """Return (rank, why) when a rank, by the ``text`` of its account, means another run than rank 0 or cannot take part, else None."""
    try:
        theirs = _ACCOUNT.validate_json(text)
    except ValidationError:  # without a secret anybody may have written it
        return rank, ["slora_dist", f"rank {rank} tells of itself what cannot be read", "the same version on every rank"]
    if theirs.version != mine["version"]:
        problem = f"rank {rank} runs version {theirs.version}, rank 0 {mine['version']}"
        return rank, ["slora_dist", _clip(problem), "the same on every rank"]
    if theirs.problem:
        setting, problem, allowed = theirs.problem
        return rank, [setting, _clip(f"on rank {rank}: {problem}" if rank else problem), _clip(allowed)]
    found = difference(mine["settings"], theirs.settings)
    if found:
        name, here, there = found
        problem = f"rank {rank} has {_clip(repr(there))}, rank 0 has {_clip(repr(here))}"
        return rank, [_clip(name), problem, "the same settings on every rank"]
    return None


def _accept(verdict: bytes, secret: bytes, challenge: bytes, rank: int, nonce: bytes, problem: Problem | None) -> bytes:
    """Return the session's key when rank 0 has proved itself and refuses nobody; else raise, and say it where it concerns this rank."""
    claimed, body = verdict[:PROOF_BYTES], verdict[PROOF_BYTES:]
    nonces = body[VERDICT_BYTES - PROOF_BYTES :]
    proved = secrecy.holds(claimed, secret, b"verdict", challenge, body)
    if not proved or nonces[rank * NONCE_BYTES : (rank + 1) * NONCE_BYTES] != nonce:
        has = "does not hold the secret of this rank" if secret else "holds a secret, and this rank finds none"
        _refuse(rank, problem or [secrecy.VARIABLE, f"rank 0 {has}", GIVEN], said=True)
    refusal = json.loads(_told(body))
    if refusal:
        _refuse(rank, refusal[1], said=refusal[0] == rank)
    return secrecy.proof(secret, b"session", challenge, nonces)


def _refuse(rank: int, problem: Problem, said: bool) -> None:
    error = ConfigError(*problem)
    error.agreed = True
    if rank and said:  # rank 0's error is printed where it ends the program
        say(rank, f"error: {error}")
    raise error


def _label(kind: str, nbytes: int) -> Label:
    return Label("start", 0, "control", {kind: nbytes})


def _told(body: bytes) -> bytes:
    length = int.from_bytes(body[:LENGTH_BYTES], "little")
    return body[LENGTH_BYTES : LENGTH_BYTES + length]


def _number(rank: int) -> bytes:
    return rank.to_bytes(4, "little")


def _raw(wire_B: Tensor) -> bytes:
    return wire_B.cpu().numpy().tobytes()


def _clip(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
