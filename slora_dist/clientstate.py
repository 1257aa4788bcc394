"""What a client keeps from round to round, on the rank that plays it and nowhere else: residuals, control variates, private weights.

Each client has a folder of its own in ``RUN/clients`` with its state after each of the last three rounds in which it took part, so that a
round that has to be played again finds the state from before it: while a round is played, the checkpoint of the one before may still be
being written, and the run then goes on from the one before that. A run that is resumed on another number of ranks reads the same files:
for that the run folder has to lie where all ranks see it.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from slora_dist.disk import sync, writing
from slora_dist.errors import RunError

KEPT = 3


class ClientStates:
    """The states of the clients that this rank plays."""

    def __init__(self, run: Path) -> None:
        self._path = run / "clients"

    def load(self, client: int, number: int) -> dict[str, Tensor]:
        """Return the state with which ``client`` comes into round ``number``; empty when it takes part for the first time."""
        earlier = [path for at, path in self._states(client) if at < number]
        if not earlier:
            return {}
        try:
            state: dict[str, Tensor] = load_file(earlier[-1])
        except (OSError, SafetensorError) as error:
            raise RunError(f"the state of client {client} in {earlier[-1]} cannot be read: {error}") from error
        return state

    def has(self, client: int) -> bool:
        """Whether any state of ``client`` is here."""
        return bool(self._states(client))

    def save(self, client: int, number: int, state: Mapping[str, Tensor]) -> None:
        """Keep the state that ``client`` has after round ``number``. Raises ``RunError`` naming the file when it cannot be written."""
        folder = self._folder(client)
        path = self._state(client, number)
        draft = path.with_suffix(".part")
        with writing(path):
            folder.mkdir(parents=True, exist_ok=True)
            save_file({name: tensor.contiguous().cpu() for name, tensor in state.items()}, draft)
            sync(draft)
            draft.replace(path)
            for place in (folder, self._path):  # the round's checkpoint comes later: after a power failure it must not be there alone
                sync(place)
            later = [old for at, old in self._states(client) if at > number]  # of rounds that are played again
            for old in [*later, *[old for at, old in self._states(client) if at <= number][:-KEPT]]:
                old.unlink()

    def rewind(self, client: int, counted: int, number: int) -> None:
        """Let ``client`` go on from its state after round ``counted``, the last one that it took part in before round ``number``.

        Later ones are of rounds that broke, or were played without it. That of round ``number`` is laid aside: an update that was ready
        when the round broke may be sent after all.
        """
        for at, path in self._states(client):
            with writing(path):
                if at == number:
                    path.replace(self._aside(client, number))
                elif at > counted:
                    path.unlink()

    def take_back(self, client: int, number: int) -> None:
        """Take back what was laid aside: the update of round ``number`` that it belongs to is sent."""
        aside = self._aside(client, number)
        if aside.exists():
            with writing(aside):
                aside.replace(self._state(client, number))

    def forget(self) -> None:
        """Forget all clients: the run begins, and what is there is of another one in the same place, on this rank's own disk perhaps."""
        shutil.rmtree(self._path, ignore_errors=True)  # ranks that share a folder do so at once

    def _states(self, client: int) -> list[tuple[int, Path]]:
        found = self._folder(client).glob("round-*.safetensors")
        return sorted((int(path.stem.removeprefix("round-")), path) for path in found)

    def _state(self, client: int, number: int) -> Path:
        return self._folder(client) / f"round-{number:05d}.safetensors"

    def _aside(self, client: int, number: int) -> Path:
        return self._folder(client) / f"round-{number:05d}.aside"

    def _folder(self, client: int) -> Path:
        return self._path / f"client-{client:05d}"
