"""The bound holds, the noise has the size that it should have, and epsilon is what theory says."""

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.stats import kstest, norm

from slora_dist import privacy
from slora_dist.audit.checks import CHECKS
from slora_dist.audit.run import Run
from slora_dist.errors import ConfigError
from slora_dist.report.page import Options
from slora_dist.report.page import report as page_of
from slora_dist.runfolder import RunFolder
from tests.tiny import SHORT, metrics, run, same, tiny

NOISY = ("privacy.clip=0.5", "privacy.noise_multiplier=1.5", "privacy.seeded=true")
DISTRIBUTED = (*NOISY, "privacy.noise=distributed", "comm.secure=true", "comm.sum=exact")


@given(arrays(np.float32, st.integers(1, 200), elements=st.floats(-(2.0**60), 2.0**60, width=32)), st.floats(1e-6, 1e6))
def test_no_update_is_longer_than_the_bound(update: NDArray[np.float32], most: float) -> None:
    update_N = torch.from_numpy(update)
    clipped_N = privacy.clip(update_N, most)
    assert float(clipped_N.double().norm()) <= most * (1 + 1e-9)
    if float(update_N.double().norm()) <= most:
        assert torch.equal(clipped_N, update_N)
    else:
        torch.testing.assert_close(
            clipped_N.double(), update_N.double() * (most / float(update_N.double().norm())), rtol=1e-5, atol=most * 1e-6
        )


def test_noise_is_normal_of_the_size_asked_for() -> None:
    config = tiny(*NOISY)
    noise_N = privacy.noise(config, 200_000, 0.25, 3, 0).numpy()
    assert kstest(noise_N / (1.5 * 0.5 * math.sqrt(0.25)), "norm").pvalue > 1e-4
    assert abs(np.corrcoef(noise_N[:-1], noise_N[1:])[0, 1]) < 0.01
    assert len(privacy.normal(bytes(32), 7)) == 7 and privacy.normal(bytes(32), 8)[:3].isfinite().all()


def test_seeded_noise_repeats_and_other_noise_does_not() -> None:
    seeded, secret = tiny(*NOISY), tiny(*NOISY, "privacy.seeded=false")
    assert torch.equal(privacy.noise(seeded, 50, 1.0, 1, 0), privacy.noise(seeded, 50, 1.0, 1, 0))
    others = [(seeded, 2, 0), (seeded, 1, 1), (secret, 1, 0), (secret, 1, 0), (tiny(*NOISY, "run.seed=1"), 1, 0)]
    drawn = [tuple(privacy.noise(config, 50, 1.0, number, who).tolist()) for config, number, who in others]
    assert len(set(drawn)) == len(drawn)


def gaussian_epsilon(sigma: float, delta: float) -> float:
    """Epsilon of a Gaussian mechanism of sensitivity 1, exactly (Balle and Wang 2018, theorem 8)."""

    def excess(epsilon: float) -> float:
        a, b = 1 / (2 * sigma), epsilon * sigma
        return float(norm.cdf(a - b) - math.exp(epsilon) * norm.cdf(-a - b)) - delta

    return float(brentq(excess, 0, 200))


@pytest.mark.parametrize(("multiplier", "rounds"), [(2.0, 1), (8.0, 10), (20.0, 100)])
def test_epsilon_is_a_near_bound_of_the_exact_one(multiplier: float, rounds: int) -> None:
    """T rounds of all clients are one Gaussian mechanism whose noise is divided by sqrt(T); a client moves the sum by 2 x clip."""
    exact = gaussian_epsilon(multiplier / 2 / math.sqrt(rounds), 1e-5)
    told = privacy.epsilon(multiplier, 1e-5, {(50, 50): rounds})
    assert exact <= told <= 1.2 * exact


def test_epsilon_grows_with_rounds_and_shrinks_with_noise_and_sampling() -> None:
    rounds = [privacy.epsilon(4.0, 1e-5, {(100, 10): rounds}) for rounds in (1, 2, 50)]
    assert rounds[0] < rounds[1] < rounds[2] < privacy.epsilon(4.0, 1e-5, {(100, 100): 50})
    assert privacy.epsilon(8.0, 1e-5, {(100, 10): 50}) < rounds[2] < privacy.epsilon(4.0, 1e-7, {(100, 10): 50})
    mixed = privacy.epsilon(4.0, 1e-5, {(100, 10): 25, (50, 10): 25})
    assert rounds[2] < mixed < privacy.epsilon(4.0, 1e-5, {(50, 10): 50}), "of fewer clients each is drawn more often"


@pytest.mark.parametrize("overrides", [NOISY, DISTRIBUTED], ids=["central", "distributed"])
def test_a_run_tells_what_was_spent_and_repeats(overrides: tuple[str, ...], tmp_path: Path) -> None:
    straight, broken = run(tmp_path / "straight", *SHORT, *overrides), run(tmp_path / "broken", *SHORT, *overrides, stop_after=2)
    run(broken.path, resume=True)
    assert same(straight, broken)
    spent = [line["privacy"] for line in metrics(straight)]
    assert [one["epsilon"] for one in spent] == [privacy.epsilon(1.5, 1e-5, {(6, 3): number}) for number in range(1, 5)]
    assert all(one["epsilon"] < one["epsilon_unsampled"] for one in spent) and straight.summary()["privacy"] == spent[-1]
    assert not [fault for check in CHECKS.values() for fault in check(Run(straight)) or ()]
    page = page_of([straight.path], tmp_path / "report", Options()).with_suffix(".md").read_text()
    assert "## Differential privacy" in page and f"| {spent[-1]['epsilon']:.4g} |" in page


def test_clients_that_are_missing_and_rounds_that_are_played_again_are_accounted_for(tmp_path: Path) -> None:
    """From round 2 on 3 of 4 clients are drawn in place of 3 of 6; round 3 is played twice, with other noise."""
    folder = run(tmp_path / "run", *SHORT, *NOISY, "privacy.seeded=false", "clients.away={0: [2], 5: [2]}", stop_after=2)
    checkpoint = folder.path / "checkpoint"
    shutil.copytree(checkpoint, tmp_path / "second")
    run(folder.path, resume=True, stop_after=3)
    shutil.rmtree(checkpoint)
    shutil.copytree(tmp_path / "second", checkpoint)  # as if the machine had failed before the third was on the disk
    run(folder.path, resume=True)
    spent = [line["privacy"]["epsilon"] for line in metrics(folder)]
    assert spent == [privacy.epsilon(1.5, 1e-5, {(6, 3): 1, (4, 3): later}) for later in (0, 1, 3, 4)]
    assert spent[-1] > privacy.epsilon(1.5, 1e-5, {(6, 3): 5})


@pytest.mark.parametrize("overrides", [NOISY, DISTRIBUTED], ids=["central", "distributed"])
def test_the_mean_carries_the_noise_of_the_sum(overrides: tuple[str, ...], tmp_path: Path) -> None:
    """The offset after one round is that without noise plus Gaussian noise of z x clip / K: by rank 0, or by all clients together."""
    once = (*SHORT, "method.name=sft", "method.sparse.rounds=1", "comm.sum=exact")

    def offset(folder: RunFolder) -> NDArray[np.float32]:
        checkpoint = folder.latest()
        assert checkpoint
        return checkpoint.tensors["offset"].numpy()

    noisy, plain = run(tmp_path / "noisy", *once, *overrides), run(tmp_path / "plain", *once, "privacy.clip=0.5")
    difference = offset(noisy) - offset(plain)
    assert len(difference) > 4000 and kstest(difference / (1.5 * 0.5 / 3), "norm").pvalue > 1e-4


@pytest.mark.parametrize(
    ("setting", "overrides"),
    [
        ("privacy.clip", ["privacy.noise_multiplier=1"]),
        ("privacy.clip", ["privacy.clip=0"]),
        ("privacy.delta", ["privacy.delta=1.0"]),
        ("privacy.noise", [*NOISY, "privacy.noise=distributed"]),
        ("server.weighting", [*NOISY, "server.weighting=examples"]),
        ("privacy.noise_multiplier", [*NOISY, "comm.wire.topk=0.1", "comm.wire.indices=gap"]),
        ("privacy.noise_multiplier", [*NOISY, "comm.wire.up_values=int8"]),
        ("server.aggregate", [*NOISY, "server.aggregate=median"]),
        ("privacy.noise_multiplier", [*NOISY, "method.lowrank.rule=svd"]),
        ("method.sparse.mask", [*NOISY, "method.sparse.mask=gradient"]),
    ],
)
def test_what_would_break_the_bound_is_refused(setting: str, overrides: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        tiny(*overrides)
    assert error.value.setting == setting


def test_a_missing_accountant_is_told_before_training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(privacy, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"slora-dist\[dp\]"):
        run(tmp_path / "run", *SHORT, *NOISY)
